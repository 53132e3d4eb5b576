//! `DataSource` and PEM: where certificates, keys and revocation lists come from.

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

/// The bytes of a data source and the name under which they are reported: the path, or `<inline>`.
pub(crate) struct Loaded {
    pub(crate) bytes: Vec<u8>,
    pub(crate) path: String,
}

/// Reads a data source; one that is empty is an error, so that a forgotten secret never weakens anything.
pub(crate) fn read(source: &DataSource) -> ConfigResult<Loaded> {
    let inline = |bytes: Vec<u8>| Loaded { bytes, path: "<inline>".into() };
    let loaded = match &source.specifier {
        None => return Err(ConfigError::missing("specifier")),
        Some(Specifier::Filename(path)) => {
            let bytes = std::fs::read(path)
                .map_err(|e| ConfigError::new(format!("unable to read file: {path}: {e}")).at("filename"))?;
            Loaded { bytes, path: path.clone() }
        }
        Some(Specifier::InlineBytes(bytes)) => inline(bytes.clone()),
        Some(Specifier::InlineString(text)) => inline(text.clone().into_bytes()),
        Some(Specifier::EnvironmentVariable(name)) => {
            let value = std::env::var(name).map_err(|_| {
                ConfigError::new(format!("Environment variable doesn't exist: {name}"))
                    .at("environment_variable")
            })?;
            inline(value.into_bytes())
        }
    };
    if loaded.bytes.is_empty() {
        return Err(ConfigError::new("DataSource cannot be empty"));
    }
    Ok(loaded)
}

/// An optional data source of a message's field.
pub(crate) fn read_field(source: Option<&DataSource>, field: &str) -> ConfigResult<Option<Loaded>> {
    source.map(|s| read(s).at(field)).transpose()
}
