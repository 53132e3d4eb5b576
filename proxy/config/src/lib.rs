//! Bootstrap and xDS bytes to checked messages.
