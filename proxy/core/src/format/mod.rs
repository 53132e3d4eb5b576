//! The substitution formatter: `%REQ(:PATH)%` and all other command operators.
