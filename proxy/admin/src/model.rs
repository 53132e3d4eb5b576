//! `bootstrap.admin`.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use sampan_core::error::AtField;
use sampan_core::matcher::StringMatcher;
use sampan_core::{Address, ConfigError, ConfigResult};

/// The checked message.
#[derive(Debug, Default)]
pub struct AdminModel {
    /// Where to listen; without one there is no admin interface.
    pub address: Option<Address>,
    /// Access logs, for the composition to parse.
    pub access_log: Vec<AccessLog>,
    allow_paths: Vec<StringMatcher>,
}

impl AdminModel {
    /// Checks the message. `profile_path` and `ignore_global_conn_limit` have no effect: there is no profiler,
    /// and the admin interface never counts against that limit.
    pub fn parse(message: &pb::Admin) -> ConfigResult<Self> {
        let address = message.address.as_ref().map(Address::from_proto).transpose().at("address")?;
        if !message.socket_options.is_empty() {
            return Err(ConfigError::unsupported("socket_options").at("socket_options"));
        }
        #[allow(deprecated)]
        if !matches!(message.access_log_path.as_str(), "" | "/dev/null") {
            return Err(ConfigError::unsupported("access_log_path (use access_log)").at("access_log_path"));
        }
        let allow_paths = StringMatcher::list_from_proto(&message.allow_paths, "allow_paths")?;
        Ok(Self { address, access_log: message.access_log.clone(), allow_paths })
    }

    /// Whether the path, with its query, may be asked for.
    pub fn allows(&self, path: &str) -> bool {
        self.allow_paths.is_empty() || self.allow_paths.iter().any(|m| m.matches(path))
    }
}
