//! From the bootstrap's bytes to models and runtime objects. What is not supported and would change behaviour stops
//! the start with its field path.

use std::cell::RefCell;
use std::sync::Arc;

use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
use envoy_types::pb::envoy::config::bootstrap::v3::bootstrap::application_log_config::log_format::LogFormat;
use envoy_types::pb::envoy::config::cluster::v3::Cluster as ClusterMessage;
use envoy_types::pb::envoy::config::core::v3::BuildVersion;
use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
use envoy_types::pb::envoy::config::listener::v3::Listener as ListenerMessage;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::envoy::r#type::v3::SemanticVersion;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Struct, Value};
use prost::Message;
use prost::bytes::Bytes;
use sampan_config::{
    BootstrapParts, LoadError, LoadOptions, UnknownFields, load_bootstrap, split_bootstrap, with_node,
};
use sampan_core::access_log::{AccessLogManager, FlushPolicy, Target};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::log::{Component, Format, Level};
use sampan_core::overload::Overload;
use sampan_core::runtime::Runtime;
use sampan_core::stats::{StatsModel, Store};
use sampan_http::filter::HttpFilterRegistry;
use sampan_http::filters::jwt_authn::WantedKeys;
use sampan_listener::{ListenerConfig, NetworkFilterRegistry, NodeInfo, Server};
use sampan_tls::StaticSecrets;
use sampan_upstream::config::BindConfig;
use sampan_upstream::{ClusterConfig, ClusterManager, EventLog};
use thiserror::Error;

use crate::cli::Options;
use crate::xds::XdsModel;

/// Why the start is refused.
#[derive(Debug, Error)]
pub enum BootError {
    /// The bytes are no valid bootstrap.
    #[error("{0}")]
    Load(#[from] LoadError),
    /// A part of it cannot be used.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The system refuses something.
    #[error("{0}: {1}")]
    System(String, std::io::Error),
    /// A listener's address cannot be had.
    #[error("{0}")]
    Bind(#[from] sampan_listener::BindError),
}

/// Everything that the configuration means, before a socket is opened.
pub struct Boot {
    /// The bootstrap without static resources.
    pub bootstrap: Bootstrap,
    /// All of it, encoded, for `/config_dump`.
    pub bytes: Bytes,
    /// The static resources, encoded.
    pub parts: BootstrapParts,
    /// What there is once per process.
    pub server: Arc<Server>,
    /// The clusters.
    pub clusters: Arc<ClusterManager>,
    /// Fields that nobody knows and that were let pass.
    pub unknown_fields: usize,
    /// What comes later.
    pub xds: XdsModel,
    /// The listeners.
    pub listeners: Vec<Arc<ListenerConfig>>,
    /// The overload manager, until it is started.
    pub overload: RefCell<Option<Overload>>,
}

/// Loads and checks the bootstrap and makes all models. Needs a tokio runtime for DNS clusters.
pub fn load(options: &Options) -> Result<Boot, BootError> {
    let unknown = if options.allow_unknown_static { UnknownFields::Warn } else { UnknownFields::Reject };
    let loaded = load_bootstrap(
        options.config_path.as_deref(),
        options.config_yaml.as_deref(),
        &LoadOptions { unknown, ..LoadOptions::default() },
    )?;
    warn(options, &loaded.report);
    let parts = split_bootstrap(loaded.bytes())?;
    let mut bootstrap = parts.bootstrap.clone();
    apply_flags(&mut bootstrap, options);
    crate::unsupported::refuse(&bootstrap)?;
    application_log(&bootstrap, options)?;
    let stats = Store::new();
    if let Some(config) = &bootstrap.stats_config {
        stats.configure(StatsModel::parse(config).at("stats_config")?);
    }
    let service_cluster = bootstrap.node.as_ref().map_or("", |n| n.cluster.as_str());
    let runtime =
        Runtime::from_bootstrap(bootstrap.layered_runtime.as_ref(), &stats.root(), service_cluster)?;
    let secrets = secrets(&parts.secrets)?;
    let node = Arc::new(own_node(&bootstrap));
    let bind = bootstrap.cluster_manager.as_ref().and_then(|m| m.upstream_bind_config.as_ref());
    let bind =
        bind.map(BindConfig::from_proto).transpose().at("upstream_bind_config").at("cluster_manager")?;
    let policy = FlushPolicy { min_size: options.file_flush_min_size, interval: options.file_flush_interval };
    let logs = AccessLogManager::new(&stats.root(), policy);
    let events = outlier_events(&bootstrap, &logs)?;
    let manager = ClusterManager::new(&stats.root(), secrets.clone());
    let manager = manager.with_node(node).with_bind(bind).with_events(events);
    let clusters = Arc::new(manager);
    for (i, bytes) in parts.clusters.iter().enumerate() {
        add_cluster(&clusters, bytes).map_err(|e| e.index(i).at("clusters").at("static_resources"))?;
    }
    let overload = match &bootstrap.overload_manager {
        None => None,
        Some(message) => {
            let made = Overload::from_proto(message, &stats.root(), Box::new(crate::overload::Jemalloc));
            Some(made.at("overload_manager")?)
        }
    };
    let mut server = server(&bootstrap, stats, logs, runtime, secrets, &clusters);
    server.overload = overload.as_ref().map(Overload::state);
    let server = Arc::new(server);
    let listeners = listeners(&parts.listeners, &server)?;
    let manager = bootstrap.cluster_manager.as_ref();
    let load_stats = manager.and_then(|manager| manager.load_stats_config.as_ref());
    let xds = XdsModel::parse(bootstrap.dynamic_resources.as_ref(), load_stats)?;
    xds.check(&clusters)?;
    if xds.is_dynamic()
        || !server.runtime.wanted().is_empty()
        || clusters.clusters().all().iter().any(|c| is_eds(c) || !c.secrets().is_empty())
        || listeners.iter().any(|l| l.wants().iter().any(|want| !want.is::<WantedKeys>()))
    {
        check_node(&bootstrap)?;
    }
    let unknown_fields = loaded.report.unknown.len();
    let own = bootstrap.node.as_ref().map(Message::encode_to_vec).unwrap_or_default();
    let bytes = with_node(loaded.bytes(), &own)?;
    let overload = RefCell::new(overload);
    Ok(Boot { bootstrap, bytes, parts, server, clusters, unknown_fields, xds, listeners, overload })
}

fn warn(options: &Options, report: &sampan_config::Report) {
    for unknown in &report.unknown {
        sampan_core::log!(Component::Config, Level::Warn, "{unknown}");
    }
    if !options.skip_deprecated_logs {
        for deprecated in &report.deprecated {
            sampan_core::log!(Component::Config, Level::Warn, "deprecated field in use: {deprecated}");
        }
    }
}

/// `application_log_config`: the same as `--log-format`, which it excludes.
fn application_log(bootstrap: &Bootstrap, options: &Options) -> ConfigResult<()> {
    let config = bootstrap.application_log_config.as_ref();
    let Some(format) = config.and_then(|c| c.log_format.as_ref()).and_then(|f| f.log_format.as_ref()) else {
        return Ok(());
    };
    let made = if options.log_format.is_some() {
        let reason =
            "Only one of ApplicationLogConfig.log_format or CLI option --log-format can be specified.";
        Err(ConfigError::new(reason))
    } else {
        match format {
            LogFormat::TextFormat(pattern) => Ok(Format::parse(pattern)),
            LogFormat::JsonFormat(object) => {
                Format::json(object).map_err(|e| ConfigError::new(e.to_string()))
            }
        }
    };
    sampan_core::log::set_format(made.at("log_format").at("application_log_config")?);
    Ok(())
}

fn apply_flags(bootstrap: &mut Bootstrap, options: &Options) {
    let node = bootstrap.node.get_or_insert_default();
    if !options.service_node.is_empty() {
        node.id.clone_from(&options.service_node);
    }
    if !options.service_cluster.is_empty() {
        node.cluster.clone_from(&options.service_cluster);
    }
    if !options.service_zone.is_empty() {
        node.locality.get_or_insert_default().zone.clone_from(&options.service_zone);
    }
    // Whatever the file says, as in Envoy. What control planes know of Envoy 1.40 they may take for granted here.
    "envoy".clone_into(&mut node.user_agent_name);
    node.user_agent_version_type = Some(UserAgentVersionType::UserAgentBuildVersion(build_version()));
}

/// The version of Envoy whose behaviour this is, and which build.
fn build_version() -> BuildVersion {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let fields = [
        ("build.type", "RELEASE"),
        ("revision.sha", concat!("sampan-", env!("CARGO_PKG_VERSION"))),
        ("revision.status", "Clean"),
        ("ssl.version", "rustls"),
    ];
    let fields = fields.map(|(name, value)| (name.to_owned(), text(value)));
    BuildVersion {
        version: Some(SemanticVersion { major_number: 1, minor_number: 40, patch: 0 }),
        metadata: Some(Struct { fields: fields.into_iter().collect() }),
    }
}

/// Who we are, to peers.
fn own_node(bootstrap: &Bootstrap) -> sampan_core::peer::Node {
    let node = bootstrap.node.clone().unwrap_or_default();
    let locality = node.locality.unwrap_or_default();
    sampan_core::peer::Node {
        id: node.id,
        region: locality.region,
        zone: locality.zone,
        metadata: node.metadata.unwrap_or_default(),
    }
}

fn server(
    bootstrap: &Bootstrap,
    stats: Store,
    access_logs: AccessLogManager,
    runtime: Runtime,
    secrets: StaticSecrets,
    clusters: &Arc<ClusterManager>,
) -> Server {
    let own = clusters.node().clone();
    let cluster = bootstrap.node.as_ref().map(|node| node.cluster.clone()).unwrap_or_default();
    let info = NodeInfo { id: own.id.clone(), cluster, zone: own.zone.clone(), own };
    let known = clusters.clusters();
    let known = Arc::new(move |name: &str| known.get(name).is_some());
    access_logs.set_node(bootstrap.node.clone().unwrap_or_default());
    let mut server = Server::new(stats, runtime, secrets, info, known);
    server.access_logs = access_logs;
    server.dns_caches = clusters.dns_caches().clone();
    server.tracing = crate::unsupported::tracing(bootstrap).cloned();
    server
}

/// Where outlier detection tells of what it does.
fn outlier_events(bootstrap: &Bootstrap, logs: &AccessLogManager) -> ConfigResult<Option<EventLog>> {
    let outlier = bootstrap.cluster_manager.as_ref().and_then(|m| m.outlier_detection.as_ref());
    let Some(path) = outlier.map(|o| &o.event_log_path).filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    let file = logs.open(Target::Path(path.clone()));
    let file = file.at("event_log_path").at("outlier_detection").at("cluster_manager")?;
    Ok(Some(EventLog::new(file)))
}

fn is_eds(cluster: &sampan_upstream::Cluster) -> bool {
    matches!(cluster.config().discovery, sampan_upstream::Discovery::Eds(_))
}

/// Whoever serves resources wants to know to whom.
fn check_node(bootstrap: &Bootstrap) -> ConfigResult<()> {
    if bootstrap.node.as_ref().is_some_and(|n| !n.id.is_empty() && !n.cluster.is_empty()) {
        return Ok(());
    }
    Err(ConfigError::new(
        "node 'id' and 'cluster' are required. Set it either in 'node' config or via --service-node and \
         --service-cluster options.",
    )
    .at("node"))
}

fn secrets(encoded: &[Bytes]) -> ConfigResult<StaticSecrets> {
    let mut secrets = StaticSecrets::default();
    for (i, bytes) in encoded.iter().enumerate() {
        let secret: Secret = decode(bytes).at_index("secrets", i).at("static_resources")?;
        secrets.add(secret).at_index("secrets", i).at("static_resources")?;
    }
    Ok(secrets)
}

/// Decodes what the bootstrap's check has already accepted.
fn decode<M: Message + Default>(bytes: &Bytes) -> ConfigResult<M> {
    M::decode(&**bytes).map_err(|e| ConfigError::new(format!("malformed message: {e}")))
}

fn add_cluster(clusters: &ClusterManager, bytes: &Bytes) -> ConfigResult<()> {
    let message: ClusterMessage = decode(bytes)?;
    if clusters.clusters().get(&message.name).is_some() {
        return Err(ConfigError::new(format!("cluster manager: duplicate cluster '{}'", message.name)));
    }
    let name = message.name.clone();
    ClusterConfig::from_proto(&message, false)
        .and_then(|config| clusters.add(config))
        .map(drop)
        .map_err(|e| named(e, "cluster", &name))
}

/// Adds the resource's name to the reason.
fn named(error: ConfigError, kind: &str, name: &str) -> ConfigError {
    let reason = format!("{} ({kind} '{name}')", error.reason());
    let renamed = ConfigError::new(reason);
    if error.path().is_empty() { renamed } else { renamed.at(error.path()) }
}

/// The network filters of this program.
pub fn network_filters() -> NetworkFilterRegistry {
    let mut http = HttpFilterRegistry::default();
    sampan_http::filters::register(&mut http);
    let mut network = NetworkFilterRegistry::with_own_filters();
    sampan_http::manager::register(&mut network, Arc::new(http));
    network
}

fn listeners(encoded: &[Bytes], server: &Arc<Server>) -> ConfigResult<Vec<Arc<ListenerConfig>>> {
    let registry = network_filters();
    let mut all: Vec<Arc<ListenerConfig>> = Vec::with_capacity(encoded.len());
    for (i, bytes) in encoded.iter().enumerate() {
        let at = |e: ConfigError| e.index(i).at("listeners").at("static_resources");
        let message: ListenerMessage = decode(bytes).map_err(at)?;
        let made = ListenerConfig::from_proto(&message, server, &registry);
        let listener = made.map_err(|e| at(named(e, "listener", &message.name)))?;
        // The last of a name wins, and stands where the first stood.
        match all.iter_mut().find(|l| l.name == listener.name) {
            Some(earlier) => *earlier = Arc::new(listener),
            None => all.push(Arc::new(listener)),
        }
    }
    Ok(all)
}
