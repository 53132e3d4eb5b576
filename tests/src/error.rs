//! What can go wrong in the harness itself. A difference between the subjects is not an error but a finding.

use std::fmt::Display;
use std::io;

/// A harness failure; it fails the case in which it happens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The case file is wrong.
    #[error("case file: {0}")]
    Case(String),
    /// An operating system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The subject did not start, answer or stop as a proxy must.
    #[error("subject: {0}")]
    Subject(String),
}

/// Shorthand for results of the harness.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds to an error what was tried.
pub trait Context<T> {
    /// Names the attempt.
    fn trying(self, what: impl Display) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn trying(self, what: impl Display) -> Result<T> {
        self.map_err(|source| Error::Io { what: what.to_string(), source })
    }
}

/// A mistake in a case file.
pub fn case_error<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Case(message.into()))
}
