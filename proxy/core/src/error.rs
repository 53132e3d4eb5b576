//! How a wrong configuration is refused: a path and a reason.
//!
//! A model is parsed from the inside out, so the path is put together on the way back: the innermost parser
//! says what is wrong, each caller adds the field it was in. The resource's own name is added last, by whoever
//! knows it (listener, cluster, route table).

use std::fmt;

/// The result of turning a message into a model.
pub type ConfigResult<T> = Result<T, ConfigError>;

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Field path from the outermost message, `filter_chains[1].filters[0].typed_config`; built back to front.
    path: String,
    /// What is wrong and what was expected.
    reason: String,
}

impl ConfigError {
    /// An error about the value at hand.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { path: String::new(), reason: reason.into() }
    }

    /// A field or type that changes behaviour and that Sampan does not implement.
    pub fn unsupported(what: impl fmt::Display) -> Self {
        Self::new(format!("{what} is not supported"))
    }

    /// A message field that must be there.
    pub fn missing(field: &str) -> Self {
        Self::new("value is required").at(field)
    }

    /// The same error seen from the message that holds it in `field`.
    #[must_use]
    pub fn at(mut self, field: &str) -> Self {
        if !self.path.is_empty() && !self.path.starts_with('[') {
            self.path.insert(0, '.');
        }
        self.path.insert_str(0, field);
        self
    }

    /// The same error seen from the repeated field's list.
    #[must_use]
    pub fn index(self, index: usize) -> Self {
        self.at(&format!("[{index}]"))
    }

    /// The same error seen from a map's entry.
    #[must_use]
    pub fn key(self, key: &str) -> Self {
        self.at(&format!("[{key:?}]"))
    }

    /// The field path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The reason.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.path, self.reason)
        }
    }
}

impl std::error::Error for ConfigError {}

/// Adds the field path to a result.
pub trait AtField<T> {
    /// See [`ConfigError::at`].
    fn at(self, field: &str) -> ConfigResult<T>;
    /// `field[index]`.
    fn at_index(self, field: &str, index: usize) -> ConfigResult<T>;
}

impl<T> AtField<T> for ConfigResult<T> {
    fn at(self, field: &str) -> ConfigResult<T> {
        self.map_err(|e| e.at(field))
    }
    fn at_index(self, field: &str, index: usize) -> ConfigResult<T> {
        self.map_err(|e| e.index(index).at(field))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_grows_from_the_inside() {
        let e = ConfigError::new("must be > 0").at("port").at("address").index(2).at("endpoints");
        assert_eq!(e.to_string(), "endpoints[2].address.port: must be > 0");
    }
}
