//! Configuration that changes while it serves.
//!
//! # Slots
//!
//! Every named resource (cluster, endpoints, listener, route table, secret) has a slot of its own. A response is taken
//! apart into resources on the control thread; what is byte for byte as it was costs one comparison, of the great types
//! before it is decoded ([`resource::decode_new`]); what is new is checked and compiled, and the slot's content is
//! swapped as a whole. Nobody waits for a lock on the request path: a worker keeps what it took from a slot and sees by
//! a flag or a version that there is something newer.
//!
//! ```text
//!   source   file (inotify), or part of a stream         delivers responses to a Subscriber, counts them
//!   rest     control planes that are polled
//!   grpc     streams to control planes (xds-client), over our own clusters
//!   last_good what is kept in a file for a start without control planes
//!   types    clusters (CDS), endpoints (EDS), …          resources -> models -> slots; the error is the NACK
//! ```
//!
//! # What a source and a type say to each other
//!
//! A [`Subscriber`] is given everything that there is of its type (state of the world) and says what was wrong. What
//! it could use is in force then, what it could not leaves its slot as it was. A source that cannot deliver says so
//! ([`Subscriber::failed`]), which ends the warming of those that wait for a first answer but changes nothing.
//!
//! # Good resources beside a bad one, as in Envoy 1.40
//!
//! A resource that cannot be decoded or breaks a constraint of its message refuses the whole response. One that
//! breaks a rule beyond that is refused alone: clusters beside it are taken and removed clusters go, yet the response
//! counts as rejected and `version_text` stays.
//!
//! # Order and warming
//!
//! Runtime layers, static clusters, then CDS and its clusters' endpoints, then listeners. Afterwards a new or changed cluster whose
//! endpoints or secrets must come first waits aside ([`sampan_upstream::ClusterManager`]) until the first answer, good or bad.

mod answer;
mod clusters;
mod demands;
mod endpoints;
mod extensions;
mod file;
mod grpc;
mod hosts;
mod jwks;
mod last_good;
mod listeners;
mod resource;
mod rest;
mod routes;
mod runtime;
mod scopes;
mod secrets;
mod source;

use std::cell::{OnceCell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::config::bootstrap::v3::bootstrap::DynamicResources;
use envoy_types::pb::envoy::config::core::v3::{ApiConfigSource, Node};
use sampan_config::{LoadError, UnknownFields};
use sampan_core::config_source::{Api, ApiSource, ConfigSource, SourceKind};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::stats::Scope;
use sampan_listener::{ListenerConfig, Server};
use sampan_upstream::{ClusterManager, Discovery};
use tokio::sync::Notify;
use xds_client::{Client, Pause};

use crate::listeners::ListenerManager;
pub use clusters::Cds;
use endpoints::Eds;
pub use extensions::{CurrentExtension, Extensions};
use file::Watcher;
pub use jwks::KeysAhead;
use last_good::LastGood;
pub use listeners::Lds;
pub use resource::{Named, unpack};
pub use routes::{Current, Rds as Routes};
pub use scopes::Srds;
pub use secrets::{CurrentSecret, Secrets};
use source::{Source, Subscriber, SubscriptionStats, warn};

/// What the bootstrap says of dynamic resources, checked.
#[derive(Debug, Default)]
pub struct XdsModel {
    /// `dynamic_resources.ads_config`
    pub ads: Option<ApiSource>,
    /// `dynamic_resources.cds_config`
    pub cds: Option<ConfigSource>,
    /// `dynamic_resources.lds_config`
    pub lds: Option<ConfigSource>,
    /// `cluster_manager.load_stats_config`
    pub load_stats: Option<ApiSource>,
}

impl XdsModel {
    /// Checks the message; what it says beyond this is refused by the bootstrap's check.
    pub fn parse(
        message: Option<&DynamicResources>,
        load_stats: Option<&ApiConfigSource>,
    ) -> ConfigResult<Self> {
        let load_stats = load_stats.map(ApiSource::from_proto).transpose();
        let load_stats = load_stats.at("load_stats_config").at("cluster_manager")?;
        let Some(message) = message else { return Ok(Self { load_stats, ..Self::default() }) };
        let cds = message.cds_config.as_ref().map(ConfigSource::from_proto).transpose();
        let lds = message.lds_config.as_ref().map(ConfigSource::from_proto).transpose();
        let ads = message.ads_config.as_ref().map(ApiSource::from_proto).transpose();
        Ok(Self {
            ads: ads.at("ads_config").at("dynamic_resources")?,
            cds: cds.at("cds_config").at("dynamic_resources")?,
            lds: lds.at("lds_config").at("dynamic_resources")?,
            load_stats,
        })
    }
}

impl XdsModel {
    /// Whether anything comes from elsewhere.
    pub fn is_dynamic(&self) -> bool {
        self.ads.is_some() || self.cds.is_some() || self.lds.is_some()
    }

    /// What can be told only when the clusters are known: whether those that serve are there.
    pub fn check(&self, clusters: &ClusterManager) -> ConfigResult<()> {
        if let Some(ads) = &self.ads {
            let checked = match &ads.api {
                Api::Rest { .. } => Err(ConfigError::new("ADS is served over gRPC only").at("api_type")),
                Api::Grpc { .. } => check_cluster(ads, clusters),
            };
            checked.at("ads_config").at("dynamic_resources")?;
        }
        if let Some(source) = &self.load_stats {
            let checked = match &source.api {
                Api::Rest { .. } => Err(ConfigError::new("load is reported over gRPC only").at("api_type")),
                Api::Grpc { .. } => check_cluster(source, clusters),
            };
            checked.at("load_stats_config").at("cluster_manager")?;
        }
        for (source, field) in [(&self.cds, "cds_config"), (&self.lds, "lds_config")] {
            let Some(source) = source else { continue };
            self.check_source(source, clusters).at(field).at("dynamic_resources")?;
        }
        for cluster in clusters.clusters().all() {
            if let Discovery::Eds(eds) = &cluster.config().discovery {
                let checked = self.check_source(&eds.source, clusters);
                checked.map_err(|e| {
                    ConfigError::new(format!("{} (cluster '{}')", e.reason(), cluster.name()))
                })?;
            }
        }
        Ok(())
    }

    /// Whether who serves this is there.
    pub fn check_source(&self, source: &ConfigSource, clusters: &ClusterManager) -> ConfigResult<()> {
        match &source.kind {
            SourceKind::Ads if self.ads.is_none() => {
                Err(ConfigError::new("ADS must be configured to support an ADS config source").at("ads"))
            }
            SourceKind::Api(api) => check_cluster(api, clusters).at("api_config_source"),
            _ => Ok(()),
        }
    }
}

fn check_cluster(source: &ApiSource, clusters: &ClusterManager) -> ConfigResult<()> {
    let name = source.cluster();
    let cluster = clusters.clusters().get(name);
    let fits = |c: &sampan_upstream::Cluster| {
        c.origin().is_none() && !matches!(c.config().discovery, Discovery::Eds(_))
    };
    if cluster.is_some_and(|c| fits(&c)) {
        return Ok(());
    }
    Err(ConfigError::new(format!(
        "envoy.config.core.v3.ApiConfigSource must have a statically defined non-EDS cluster: '{name}' does not exist, \
         was added via api, or is an EDS cluster"
    )))
}

/// What all subscriptions share; lives on the control thread.
pub struct Context {
    clusters: Arc<ClusterManager>,
    root: Scope,
    watcher: Option<Watcher>,
    unknown: UnknownFields,
    /// What of it was told.
    unknown_told: RefCell<HashSet<String>>,
    control: grpc::ControlPlanes,
    /// Something was taken.
    updated: Rc<Notify>,
    /// The stream of `ads_config`.
    ads: Option<Client>,
    /// What is kept for a start without control planes.
    last_good: Option<Rc<LastGood>>,
}

/// What the command line says of it.
pub struct Flags<'a> {
    /// `--reject-unknown-dynamic-fields`, `--ignore-unknown-dynamic-fields`
    pub unknown: UnknownFields,
    /// `--last-good-config-path`
    pub last_good: Option<&'a std::path::Path>,
}

#[cfg(test)]
impl Context {
    /// Without sources.
    fn of_tests(store: &sampan_core::stats::Store) -> Rc<Self> {
        let root = store.root();
        let clusters = Arc::new(ClusterManager::new(&root, sampan_tls::StaticSecrets::default()));
        let control = grpc::ControlPlanes::new(&clusters, &Node::default());
        let (updated, unknown, unknown_told) = (Rc::default(), UnknownFields::Warn, RefCell::default());
        let (watcher, ads, last_good) = (None, None, None);
        Rc::new(Self { clusters, root, watcher, unknown, unknown_told, control, updated, ads, last_good })
    }
}

impl Context {
    /// Fields that a message does not have: as in Envoy each is told and counted once.
    fn tell_unknown(&self, fields: &[LoadError]) {
        for field in fields {
            if self.unknown_told.borrow_mut().insert(field.reason.clone()) {
                warn(&format!("Unknown field: {field}"));
                self.root.scope("server").counter("dynamic_unknown_fields").inc();
            }
        }
    }

    /// Holds back what is asked of the aggregated stream, if there is one.
    fn pause(&self, type_urls: &[&str]) -> Option<Pause> {
        self.ads.as_ref().map(|ads| ads.pause(type_urls))
    }
}

/// What listeners wait for.
#[derive(Clone)]
pub struct Dependencies {
    /// RDS
    pub routes: Rc<Routes>,
    /// SDS
    pub secrets: Rc<Secrets>,
    /// ECDS
    pub extensions: Rc<Extensions>,
    /// SRDS
    pub scopes: Rc<Srds>,
    /// Keys of `jwt_authn`
    pub keys: Rc<KeysAhead>,
}

impl Dependencies {
    /// What of a listener's wants was not answered yet, in Envoy's words.
    pub fn unready(&self, listener: &ListenerConfig) -> Vec<String> {
        let mut all = self.extensions.unready(listener);
        all.extend(self.routes.unready(listener));
        all.extend(self.scopes.unready(listener));
        all.extend(self.secrets.unready(listener));
        all.extend(KeysAhead::unready(listener));
        all
    }

    /// Subscribes to what a listener wants; what is awaited then returns when all of it has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        let (routes, secrets) = (self.routes.follow(listener), self.secrets.follow(listener));
        let (extensions, scopes) = (self.extensions.follow(listener), self.scopes.follow(listener));
        let keys = self.keys.follow(listener);
        async move {
            secrets.await;
            routes.await;
            scopes.await;
            extensions.await;
            keys.await;
        }
    }
}

/// The dynamic part of the configuration.
pub struct Xds {
    /// CDS, if there is any, from its turn in the start.
    pub cds: OnceCell<Rc<Cds>>,
    /// LDS, likewise.
    pub lds: OnceCell<Rc<Lds>>,
    /// RDS, SRDS, SDS and ECDS.
    pub shared: Dependencies,
    context: Rc<Context>,
    eds: Rc<Eds>,
    #[allow(dead_code, reason = "held for its drop")]
    rtds: OnceCell<runtime::Rtds>,
    sources: RefCell<Vec<Source>>,
}

impl Xds {
    /// Subscribes to the endpoints and secrets of clusters that are there.
    pub fn new(
        model: &XdsModel,
        clusters: &Arc<ClusterManager>,
        server: &Arc<Server>,
        listeners: &ListenerManager,
        node: &Node,
        flags: &Flags<'_>,
    ) -> Self {
        let root = &server.stats.root();
        let control = grpc::ControlPlanes::new(clusters, node);
        // The admin interface's access log goes out from this thread.
        sampan_http::router::uplink::install(control.clusters());
        let ads = model.ads.as_ref().and_then(|source| {
            let Api::Grpc { delta, .. } = &source.api else { return None };
            control.client(source, xds_client::types::aggregated(grpc::variant(*delta)), root)
        });
        let context = Rc::new(Context {
            control,
            updated: Rc::default(),
            ads,
            clusters: clusters.clone(),
            root: root.clone(),
            watcher: Watcher::new().inspect_err(|e| log_error(&format!("inotify: {e}"))).ok(),
            unknown: flags.unknown,
            unknown_told: RefCell::default(),
            last_good: flags.last_good.map(|path| LastGood::open(path, node, root)),
        });
        if let Some(ApiSource { api: Api::Grpc { service, .. }, .. }) = &model.load_stats {
            let transport = (context.control.transport(service), service.max_message);
            crate::load_report::Reporter::start(clusters, transport, node, root);
        }
        tokio::task::spawn_local(crate::overload::give_back(context.updated.clone()));
        let secrets = Rc::new(Secrets::new(context.clone()));
        let eds = Rc::new(Eds::new(context.clone(), secrets.clone()));
        for cluster in clusters.clusters().all() {
            eds.follow(&cluster);
        }
        demands::start(&context, &eds, root);
        let routes = Rc::new(Routes::new(context.clone(), server.clone()));
        let extensions = Rc::new(Extensions::new(context.clone()));
        let scopes = Rc::new(Srds::new(context.clone(), routes.clone()));
        let keys = Rc::new(KeysAhead::new(context.clone()));
        let shared = Dependencies { routes, secrets, extensions, scopes, keys };
        listeners.depend_on(shared.clone());
        let (cds, lds, rtds, sources) = Default::default();
        Self { cds, lds, shared, context, eds, rtds, sources }
    }

    /// Subscribes to the rest; returns when clusters and their endpoints, then listeners and their routes have had their first
    /// answer. Listeners of LDS serve as soon as they are warm. Called once.
    pub async fn start(
        &self,
        model: &XdsModel,
        clusters: &Arc<ClusterManager>,
        server: &Arc<Server>,
        listeners: &Rc<ListenerManager>,
        clusters_ready: impl FnOnce(),
    ) {
        let (context, root) = (&self.context, &server.stats.root());
        // As in Envoy they are there however long it takes until listeners are asked for.
        let scope = root.scope("listener_manager").scope("lds");
        let lds = model.lds.as_ref().map(|source| (source, SubscriptionStats::new(&scope)));
        if let Some(ads) = &context.ads {
            ads.start();
        }
        let rtds = runtime::Rtds::start(context, &server.runtime).await;
        self.rtds.get_or_init(|| rtds);
        if let Some(source) = &model.cds {
            clusters.initialised().await;
            let scope = root.scope("cluster_manager").scope("cds");
            let cds = self.cds.get_or_init(|| Rc::new(Cds::new(context.clone(), self.eds.clone(), &scope)));
            let stats = SubscriptionStats::new(&scope);
            self.sources.borrow_mut().push(Source::start(context, source, stats, cds.clone()));
            cds.answered().await;
            clusters.initialised().await;
            cds.serving();
        }
        clusters.initialised().await;
        clusters_ready();
        for entry in listeners.active() {
            self.shared.follow(&entry.config).await;
        }
        if let Some((source, stats)) = lds {
            let made = || Rc::new(Lds::new(context.clone(), listeners.clone(), self.shared.clone()));
            let lds = self.lds.get_or_init(made);
            self.sources.borrow_mut().push(Source::start(context, source, stats, lds.clone()));
            lds.answered().await;
            // As in Envoy the first listeners belong to the start.
            listeners.warmed().await;
        }
        if let Some(last_good) = &context.last_good {
            last_good.started();
        }
    }

    /// Writes what is kept for a start without control planes.
    pub fn keep(&self) {
        if let Some(last_good) = &self.context.last_good {
            last_good.flush();
        }
    }

    /// Closes the control thread's connections to clusters that lost their slot, and ends what nobody wants any more.
    pub fn tidy(&self) {
        self.context.control.prune();
        self.shared.routes.tidy();
        self.shared.secrets.tidy();
    }
}

fn log_error(text: &str) {
    sampan_core::log!(sampan_core::log::Component::Config, sampan_core::log::Level::Warn, "{text}");
}
