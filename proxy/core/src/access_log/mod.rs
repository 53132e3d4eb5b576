//! Access logs: filters, formats and sinks.
