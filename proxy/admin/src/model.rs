//! `bootstrap.admin`.

use envoy_types::pb::envoy::config::accesslog::v3::{AccessLog, access_log::ConfigType};
use envoy_types::pb::envoy::config::bootstrap::v3 as pb;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::FileAccessLog;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use sampan_core::error::AtField;
use sampan_core::matcher::StringMatcher;
use sampan_core::{Address, ConfigResult};

/// The checked message.
#[derive(Debug, Default)]
pub struct AdminModel {
    /// Where to listen (without an address there is no admin interface), and with which options.
    pub(crate) message: pb::Admin,
    /// Access logs, for the composition to parse.
    pub access_log: Vec<AccessLog>,
    allow_paths: Vec<StringMatcher>,
}

impl AdminModel {
    /// Checks the message. `profile_path` and `ignore_global_conn_limit` have no effect: there is no profiler,
    /// and the admin interface never counts against that limit.
    pub fn parse(message: &pb::Admin) -> ConfigResult<Self> {
        message.address.as_ref().map(Address::from_proto).transpose().at("address")?;
        let mut access_log = message.access_log.clone();
        #[allow(deprecated, reason = "Envoy 1.40 still takes it")]
        let path = &message.access_log_path;
        if !path.is_empty() {
            access_log.push(file_log(path));
        }
        let allow_paths = StringMatcher::list_from_proto(&message.allow_paths, "allow_paths")?;
        Ok(Self { message: message.clone(), access_log, allow_paths })
    }

    /// Whether the path, with its query, may be asked for.
    pub fn allows(&self, path: &str) -> bool {
        self.allow_paths.is_empty() || self.allow_paths.iter().any(|m| m.matches(path))
    }
}

/// `access_log_path` is a file log in the usual format.
fn file_log(path: &str) -> AccessLog {
    let file = FileAccessLog { path: path.to_owned(), ..Default::default() };
    let any = Any {
        type_url: format!("type.googleapis.com/{}", FileAccessLog::full_name()),
        value: file.encode_to_vec(),
    };
    AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        filter: None,
        config_type: Some(ConfigType::TypedConfig(any)),
    }
}
