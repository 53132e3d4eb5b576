//! Configuration that changes while it serves.
//!
//! # Slots
//!
//! Every named resource (cluster, endpoints, listener, route table, secret) has a slot of its own. A response is taken
//! apart into resources on the control thread; what is byte for byte as it was costs one comparison, what is new is
//! checked and compiled, and the slot's content is swapped as a whole. Nobody waits for a lock on the request path: a
//! worker keeps what it took from a slot and sees by a flag or a version that there is something newer.
//!
//! ```text
//!   source   file (inotify), later ADS, gRPC, REST       delivers responses to a Subscriber, counts them
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
//! Static clusters, then CDS and its clusters' endpoints, then listeners. Afterwards a new or changed cluster whose
//! endpoints must come first waits aside ([`sampan_upstream::ClusterManager`]) until the first answer, good or bad.

mod clusters;
mod endpoints;
mod extensions;
mod file;
mod listeners;
mod resource;
mod routes;
mod secrets;
mod source;

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::config::bootstrap::v3::bootstrap::DynamicResources;
use sampan_core::config_source::ConfigSource;
use sampan_core::error::{AtField, ConfigResult};
use sampan_core::stats::Scope;
use sampan_listener::{ListenerConfig, Server};
use sampan_upstream::ClusterManager;

use crate::listeners::ListenerManager;
pub use clusters::Cds;
use endpoints::Eds;
pub use extensions::{CurrentExtension, Extensions};
use file::Watcher;
pub use listeners::Lds;
pub use routes::{Current, Rds as Routes};
pub use secrets::{CurrentSecret, Secrets};
use source::{Source, Subscriber, SubscriptionStats};

/// What the bootstrap says of dynamic resources, checked.
#[derive(Debug, Default)]
pub struct XdsModel {
    /// `dynamic_resources.cds_config`
    pub cds: Option<ConfigSource>,
    /// `dynamic_resources.lds_config`
    pub lds: Option<ConfigSource>,
}

impl XdsModel {
    /// Checks the message; what it says beyond this is refused by the bootstrap's check.
    pub fn parse(message: Option<&DynamicResources>) -> ConfigResult<Self> {
        let Some(message) = message else { return Ok(Self::default()) };
        let cds = message.cds_config.as_ref().map(ConfigSource::from_proto).transpose();
        let lds = message.lds_config.as_ref().map(ConfigSource::from_proto).transpose();
        Ok(Self {
            cds: cds.at("cds_config").at("dynamic_resources")?,
            lds: lds.at("lds_config").at("dynamic_resources")?,
        })
    }
}

impl XdsModel {
    /// Whether anything comes from elsewhere.
    pub fn is_dynamic(&self) -> bool {
        self.cds.is_some() || self.lds.is_some()
    }
}

/// What all subscriptions share; lives on the control thread.
pub struct Context {
    clusters: Arc<ClusterManager>,
    root: Scope,
    watcher: Option<Watcher>,
    /// `--reject-unknown-dynamic-fields`
    reject_unknown: bool,
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
}

impl Dependencies {
    /// Subscribes to what a listener wants; what is awaited then returns when all of it has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        let (routes, secrets) = (self.routes.follow(listener), self.secrets.follow(listener));
        let extensions = self.extensions.follow(listener);
        async move {
            secrets.await;
            routes.await;
            extensions.await;
        }
    }
}

/// The dynamic part of the configuration.
pub struct Xds {
    /// CDS, if there is any.
    pub cds: Option<Rc<Cds>>,
    /// LDS, if there is any.
    pub lds: Option<Rc<Lds>>,
    /// RDS, SDS and ECDS.
    pub shared: Dependencies,
    eds: Rc<Eds>,
    sources: std::cell::RefCell<Vec<Source>>,
}

impl Xds {
    /// Subscribes; returns when clusters and their endpoints, then listeners and their routes have had their first
    /// answer. Listeners of LDS serve as soon as they are warm.
    pub async fn start(
        model: &XdsModel,
        clusters: &Arc<ClusterManager>,
        server: &Arc<Server>,
        listeners: &Rc<ListenerManager>,
        reject_unknown: bool,
    ) -> Self {
        let root = &server.stats.root();
        let context = Rc::new(Context {
            clusters: clusters.clone(),
            root: root.clone(),
            watcher: Watcher::new().inspect_err(|e| log_error(&format!("inotify: {e}"))).ok(),
            reject_unknown,
        });
        let secrets = Rc::new(Secrets::new(context.clone()));
        let eds = Rc::new(Eds::new(context.clone(), secrets.clone()));
        for cluster in clusters.clusters().all() {
            eds.follow(&cluster);
        }
        let routes = Rc::new(Routes::new(context.clone(), server.clone()));
        let shared = Dependencies { routes, secrets, extensions: Rc::new(Extensions::new(context.clone())) };
        let mut this = Self { cds: None, lds: None, shared, eds, sources: std::cell::RefCell::default() };
        if let Some(source) = &model.cds {
            clusters.initialised().await;
            let scope = root.scope("cluster_manager").scope("cds");
            let cds = Rc::new(Cds::new(context.clone(), this.eds.clone(), &scope));
            let stats = SubscriptionStats::new(&scope);
            this.sources.borrow_mut().push(Source::start(&context, source, stats, cds.clone()));
            cds.answered().await;
            clusters.initialised().await;
            cds.serving();
            this.cds = Some(cds);
        }
        clusters.initialised().await;
        for entry in listeners.active() {
            this.shared.follow(&entry.config).await;
        }
        if let Some(source) = &model.lds {
            let lds = Rc::new(Lds::new(context.clone(), listeners.clone(), this.shared.clone()));
            let stats = SubscriptionStats::new(&root.scope("listener_manager").scope("lds"));
            this.sources.borrow_mut().push(Source::start(&context, source, stats, lds.clone()));
            lds.answered().await;
            this.lds = Some(lds);
        }
        this
    }
}

fn log_error(text: &str) {
    sampan_core::log!(sampan_core::log::Component::Config, sampan_core::log::Level::Warn, "{text}");
}
