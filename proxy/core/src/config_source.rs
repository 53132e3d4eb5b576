//! `ConfigSource`: where a dynamic resource comes from, whatever its type.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::config::core::v3::{self as pb, config_source::ConfigSourceSpecifier};
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;

use crate::error::{AtField, ConfigError, ConfigResult};
use crate::header::{HeaderId, HeaderMap};

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
    /// The bootstrap's `ads_config`.
    Ads,
    /// A stream or a poll of its own.
    Api(Box<ApiSource>),
}

/// A checked `ApiConfigSource`.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiSource {
    /// How it is asked.
    pub api: Api,
    /// `set_node_on_first_message_only`
    pub node_on_first_message_only: bool,
    /// `rate_limit_settings`: how many requests at once, and how many in a second.
    pub rate_limit: Option<(u32, f64)>,
}

impl Eq for ApiSource {}

/// How a control plane is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Api {
    /// Streams: `GRPC`, `DELTA_GRPC`.
    Grpc {
        /// Whether responses carry changes.
        delta: bool,
        /// Whom.
        service: GrpcService,
    },
    /// `REST`: a request every `refresh_delay`.
    Rest {
        /// The one of `cluster_names`.
        cluster: Arc<str>,
        /// How long after a response; up to as much again at random is added by who asks.
        refresh_delay: Duration,
        /// `request_timeout`
        timeout: Duration,
    },
}

/// A checked `GrpcService` whose target is one of our clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcService {
    /// `envoy_grpc.cluster_name`
    pub cluster: Arc<str>,
    /// `envoy_grpc.authority`; the cluster's name where it is empty.
    pub authority: Arc<str>,
    /// `initial_metadata`: names in lower case, values under names that end in `-bin` in base64.
    pub metadata: Vec<(String, String)>,
    /// `envoy_grpc.retry_policy.retry_back_off`: first and greatest bound of the wait before the next stream.
    pub backoff: (Duration, Duration),
    /// `envoy_grpc.max_receive_message_length`; 0: no limit.
    pub max_message: usize,
    /// `envoy_grpc.skip_envoy_headers`
    pub skip_envoy_headers: bool,
}

impl ConfigSource {
    #[allow(deprecated, reason = "Envoy 1.40 still takes `path`")]
    /// Checks the message. The file must be there, as Envoy demands.
    pub fn from_proto(message: &pb::ConfigSource) -> ConfigResult<Self> {
        let timeout = message.initial_fetch_timeout.as_ref();
        let timeout = timeout.map_or(Duration::from_secs(15), duration);
        let kind = match &message.config_source_specifier {
            Some(ConfigSourceSpecifier::Path(path)) => SourceKind::file(path, None).at("path"),
            Some(ConfigSourceSpecifier::PathConfigSource(source)) => {
                SourceKind::file(&source.path, source.watched_directory.as_ref()).at("path_config_source")
            }
            Some(ConfigSourceSpecifier::Ads(_)) => Ok(SourceKind::Ads),
            Some(ConfigSourceSpecifier::ApiConfigSource(source)) => ApiSource::from_proto(source)
                .map(|api| SourceKind::Api(Box::new(api)))
                .at("api_config_source"),
            Some(ConfigSourceSpecifier::Self_(_)) => Err(ConfigError::unsupported("self").at("self")),
            None => Err(ConfigError::missing("config_source_specifier")),
        }?;
        Ok(Self { kind, initial_fetch_timeout: Some(timeout).filter(|t| !t.is_zero()) })
    }
}

impl ApiSource {
    /// Checks the message. Whether its cluster is there, and static, is to be asked of who knows the clusters.
    pub fn from_proto(message: &pb::ApiConfigSource) -> ConfigResult<Self> {
        use pb::api_config_source::ApiType;
        if let Some(validator) = message.config_validators.first() {
            let reason = format_args!("config validator {}", validator.name);
            return Err(ConfigError::unsupported(reason).index(0).at("config_validators"));
        }
        #[allow(deprecated, reason = "the enum has it")]
        if message.transport_api_version == pb::ApiVersion::V2 as i32 {
            let reason = "The v2 xDS major version has been removed and is no longer supported";
            return Err(ConfigError::new(reason).at("transport_api_version"));
        }
        #[allow(deprecated, reason = "the enum has it")]
        let api = match ApiType::try_from(message.api_type) {
            Ok(ApiType::Grpc) => Self::grpc(message, false)?,
            Ok(ApiType::DeltaGrpc) => Self::grpc(message, true)?,
            Ok(ApiType::Rest) => Self::rest(message)?,
            Ok(aggregated @ (ApiType::AggregatedGrpc | ApiType::AggregatedDeltaGrpc)) => {
                let reason = format!("Unsupported config source {}", aggregated.as_str_name());
                return Err(ConfigError::new(reason).at("api_type"));
            }
            _ => {
                let reason = "REST_LEGACY no longer a supported ApiConfigSource. Please specify an explicit \
                              supported api_type";
                return Err(ConfigError::new(reason).at("api_type"));
            }
        };
        let rate_limit = message.rate_limit_settings.as_ref().map(|settings| {
            let tokens = settings.max_tokens.map_or(100, |tokens| tokens.value);
            (tokens, settings.fill_rate.map_or(10.0, |rate| rate.value))
        });
        if rate_limit.is_some_and(|(_, rate)| !rate.is_finite()) {
            let reason = "The value of fill_rate in RateLimitSettings must not be NaN nor Inf";
            return Err(ConfigError::new(reason).at("fill_rate").at("rate_limit_settings"));
        }
        Ok(Self { api, node_on_first_message_only: message.set_node_on_first_message_only, rate_limit })
    }

    fn grpc(message: &pb::ApiConfigSource, delta: bool) -> ConfigResult<Api> {
        if !message.cluster_names.is_empty() {
            let reason = "envoy.config.core.v3.ApiConfigSource::(AGGREGATED_)(DELTA_)GRPC must not have a cluster \
                          name specified";
            return Err(ConfigError::new(reason).at("cluster_names"));
        }
        match message.grpc_services.as_slice() {
            [] => Err(ConfigError::new(
                "API configs must have either a gRPC service or a cluster name defined",
            )
            .at("grpc_services")),
            [service] => {
                let service = GrpcService::from_proto(service).at_index("grpc_services", 0)?;
                Ok(Api::Grpc { delta, service })
            }
            [_, _] => Err(ConfigError::unsupported("a second service (failover)").index(1).at("grpc_services")),
            _ => Err(ConfigError::new(
                "envoy.config.core.v3.ApiConfigSource::(AGGREGATED_)(DELTA_)GRPC must have no more than 2 gRPC \
                 services specified",
            )
            .at("grpc_services")),
        }
    }

    fn rest(message: &pb::ApiConfigSource) -> ConfigResult<Api> {
        if !message.grpc_services.is_empty() {
            let reason = "envoy.config.core.v3.ApiConfigSource, if not a gRPC type, must not have a gRPC service \
                          specified";
            return Err(ConfigError::new(reason).at("grpc_services"));
        }
        let [cluster] = message.cluster_names.as_slice() else {
            let reason = "envoy.config.core.v3.ApiConfigSource must have a singleton cluster name specified";
            return Err(ConfigError::new(reason).at("cluster_names"));
        };
        let Some(refresh_delay) = message.refresh_delay.as_ref() else {
            let reason = "refresh_delay is required for REST API configuration sources";
            return Err(ConfigError::new(reason).at("refresh_delay"));
        };
        let timeout = message.request_timeout.as_ref().map_or(Duration::from_secs(1), duration);
        Ok(Api::Rest { cluster: cluster.as_str().into(), refresh_delay: duration(refresh_delay), timeout })
    }

    /// The cluster that serves.
    pub fn cluster(&self) -> &Arc<str> {
        match &self.api {
            Api::Grpc { service, .. } => &service.cluster,
            Api::Rest { cluster, .. } => cluster,
        }
    }
}

impl GrpcService {
    /// The head of a call of a method (`/package.Service/Method`) as far as `grpc-timeout`, `content-type` and the
    /// metadata, which follow in this order.
    pub fn bare_head(&self, path: &str) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(512, 16);
        headers.append(HeaderId::METHOD, "POST");
        headers.append(HeaderId::SCHEME, "http");
        headers.append(HeaderId::AUTHORITY, &*self.authority);
        headers.append(HeaderId::PATH, path);
        headers.append(HeaderId::TE, "trailers");
        headers
    }

    /// The head of a call whose metadata are what stands in the configuration.
    pub fn head(&self, path: &str) -> HeaderMap {
        let mut headers = self.bare_head(path);
        headers.append(HeaderId::CONTENT_TYPE, "application/grpc");
        for (name, value) in &self.metadata {
            headers.append_lower(name.as_bytes(), value.as_bytes());
        }
        headers
    }

    /// The head of a stream, which tells whose it is unless `skip_envoy_headers` is set.
    pub fn stream_head(&self, path: &str, tls: bool) -> HeaderMap {
        let mut headers = self.head(path);
        if tls {
            headers.set(HeaderId::SCHEME, "https");
        }
        if !self.skip_envoy_headers {
            headers.append(HeaderId::X_ENVOY_INTERNAL, "true");
            let own = crate::local_info::address().to_string();
            headers.append_to_value(HeaderId::X_FORWARDED_FOR, ",", own.as_bytes());
        }
        headers
    }

    /// Checks the message.
    pub fn from_proto(message: &pb::GrpcService) -> ConfigResult<Self> {
        use pb::grpc_service::TargetSpecifier;
        if message.retry_policy.is_some() {
            return Err(ConfigError::unsupported("retry_policy").at("retry_policy"));
        }
        let target = match &message.target_specifier {
            Some(TargetSpecifier::EnvoyGrpc(target)) => target,
            Some(TargetSpecifier::GoogleGrpc(_)) => {
                return Err(ConfigError::unsupported("google_grpc").at("google_grpc"));
            }
            None => return Err(ConfigError::missing("target_specifier")),
        };
        let backoff = target.retry_policy.as_ref().and_then(|policy| policy.retry_back_off.as_ref());
        let (base, max) =
            backoff.map_or((None, None), |b| (b.base_interval.as_ref(), b.max_interval.as_ref()));
        let base = base.map_or(Duration::from_millis(500), duration);
        let default_max = if backoff.is_some() { base * 10 } else { Duration::from_secs(30) };
        let max = max.map_or(default_max, duration);
        if max < base {
            let reason = "max_interval must be greater than or equal to the base_interval";
            return Err(ConfigError::new(reason).at("retry_back_off").at("retry_policy").at("envoy_grpc"));
        }
        Ok(Self {
            cluster: target.cluster_name.as_str().into(),
            authority: match target.authority.as_str() {
                "" => target.cluster_name.as_str().into(),
                authority => authority.into(),
            },
            metadata: metadata(&message.initial_metadata),
            backoff: (base, max),
            max_message: target.max_receive_message_length.map_or(0, |limit| limit.value as usize),
            skip_envoy_headers: target.skip_envoy_headers,
        })
    }
}

/// What is sent of `initial_metadata`. As in Envoy a name that comes again takes the place of what came before, what is
/// empty is left out, and `raw_value` is not looked at.
fn metadata(headers: &[pb::HeaderValue]) -> Vec<(String, String)> {
    let mut sent: Vec<(String, String)> = Vec::new();
    for header in headers.iter().filter(|header| !header.value.is_empty()) {
        let key = header.key.to_ascii_lowercase();
        let binary = key.ends_with("-bin");
        sent.retain(|(name, _)| *name != key);
        sent.push((key, if binary { STANDARD.encode(&header.value) } else { header.value.clone() }));
    }
    sent
}

pub(crate) fn duration(message: &ProtoDuration) -> Duration {
    Duration::new(message.seconds.max(0).unsigned_abs(), message.nanos.max(0).unsigned_abs())
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
