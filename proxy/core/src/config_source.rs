//! `ConfigSource`: where a dynamic resource comes from, whatever its type.

use std::path::PathBuf;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{self as pb, config_source::ConfigSourceSpecifier};

use crate::error::{AtField, ConfigError, ConfigResult};

/// A checked `ConfigSource`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSource {
    /// Where from.
    pub kind: SourceKind,
    /// `initial_fetch_timeout`: for how long users warm; none: until the resource comes.
    pub initial_fetch_timeout: Option<Duration>,
}

/// Who serves a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceKind {
    /// A file that holds a `DiscoveryResponse`, read anew whenever one is moved to its place.
    Path {
        /// `path`
        path: PathBuf,
        /// `watched_directory.path`: read anew whenever anything is moved into this folder instead.
        watched_directory: Option<PathBuf>,
    },
}

impl ConfigSource {
    #[allow(deprecated, reason = "Envoy 1.40 still takes `path`")]
    /// Checks the message. The file must be there, as Envoy demands.
    pub fn from_proto(message: &pb::ConfigSource) -> ConfigResult<Self> {
        let timeout = message.initial_fetch_timeout.as_ref();
        let timeout = timeout.map_or(Duration::from_secs(15), |d| {
            Duration::new(d.seconds.max(0).unsigned_abs(), d.nanos.max(0).unsigned_abs())
        });
        let kind = match &message.config_source_specifier {
            Some(ConfigSourceSpecifier::Path(path)) => SourceKind::file(path, None).at("path"),
            Some(ConfigSourceSpecifier::PathConfigSource(source)) => {
                SourceKind::file(&source.path, source.watched_directory.as_ref()).at("path_config_source")
            }
            Some(ConfigSourceSpecifier::Ads(_)) => Err(ConfigError::unsupported("ads").at("ads")),
            Some(ConfigSourceSpecifier::ApiConfigSource(_)) => {
                Err(ConfigError::unsupported("api_config_source").at("api_config_source"))
            }
            Some(ConfigSourceSpecifier::Self_(_)) => Err(ConfigError::unsupported("self").at("self")),
            None => Err(ConfigError::missing("config_source_specifier")),
        }?;
        Ok(Self { kind, initial_fetch_timeout: Some(timeout).filter(|t| !t.is_zero()) })
    }
}

impl SourceKind {
    fn file(path: &str, watched: Option<&pb::WatchedDirectory>) -> ConfigResult<Self> {
        let path = PathBuf::from(path);
        if !path.exists() {
            return Err(ConfigError::new(format!(
                "paths must refer to an existing path in the system: '{}' does not exist",
                path.display()
            )));
        }
        let watched_directory = watched.map(|w| PathBuf::from(&w.path));
        if let Some(folder) = watched_directory.as_ref().filter(|folder| !folder.is_dir()) {
            let reason = format!(
                "unable to add filesystem watch for file {}: No such file or directory",
                folder.display()
            );
            return Err(ConfigError::new(reason).at("watched_directory"));
        }
        Ok(Self::Path { path, watched_directory })
    }
}
