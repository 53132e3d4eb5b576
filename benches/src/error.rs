//! What can go wrong in a run, told apart by who is at fault.

use std::io;

/// A failed measurement. The text goes into the report beside the subject's name.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The proxy or the backend answered something else than the case expects.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The proxy did not start, died or did not become ready.
    #[error("{0}")]
    Subject(String),
    /// valgrind or strace is absent or printed what is not understood.
    #[error("{tool}: {what}")]
    Tool {
        /// The program's name.
        tool: &'static str,
        /// What it did.
        what: String,
    },
    /// Wrong arguments.
    #[error("{0}")]
    Usage(String),
}

impl BenchError {
    /// For `map_err`: an I/O error with what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// A protocol error.
    pub fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }
}

impl From<h2::Error> for BenchError {
    fn from(error: h2::Error) -> Self {
        Self::Protocol(format!("h2: {error}"))
    }
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, BenchError>;
