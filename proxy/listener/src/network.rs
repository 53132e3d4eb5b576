//! Network filters: what runs on a connection once its filter chain is known and TLS is done.
//!
//! A filter object is immutable and shared by all connections and workers; what belongs to one connection lives on
//! the stack of the filter's future. A chain is any number of [`ConnectionFilter`]s and one [`TerminalFilter`],
//! which takes the connection over and serves it to its end.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::ExtensionConfigSource;
use envoy_types::pb::google::protobuf::{Any, Struct};
use futures_util::future::LocalBoxFuture;
use sampan_core::drain;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::format::FormatContext;
use sampan_core::stream_info::{ConnectionInfo, Metadata, ResponseFlag, StreamInfo};
use sampan_tls::Transport;

use crate::accept::Open;
use crate::config::ListenerConfig;
use crate::context::{FactoryContext, Worker};
use crate::discovered::{ExtensionSlot, Make, Stage, make_alone};
use crate::rbac::Refusal;

/// A connection from a client, handed to the network filters. Dropping it closes it.
pub struct Downstream {
    /// The byte stream; nothing has been read from it that a network filter should see.
    pub transport: Transport,
    /// What is known about it. A filter that adds something uses `Rc::make_mut`.
    pub info: Rc<ConnectionInfo>,
    /// `per_connection_buffer_limit_bytes`
    pub buffer_limit: u32,
    /// Drain of what this connection belongs to (its listener, or the process). Ask this one, not the worker's.
    pub drain: drain::Signal,
    /// Dynamic metadata that listener filters have set (TLVs of the PROXY protocol).
    pub metadata: Option<Box<Metadata>>,
    /// A filter refuses the connection: see [`Refusal`].
    pub refusal: Option<Box<Refusal>>,
    /// A filter has closed the connection: who serves it accounts for it, and no more.
    pub over: bool,
    /// Counts the connection as active while it lives; keep it until the connection is closed.
    pub held: Held,
}

impl Downstream {
    /// What is known of the connection as formats and rules read it; what is set there stays with the connection.
    pub fn with_stream_info<T>(&mut self, look: impl FnOnce(&mut StreamInfo) -> T) -> T {
        let mut info = StreamInfo::new(0, self.info.clone(), None);
        info.dynamic_metadata = self.metadata.take();
        let seen = look(&mut info);
        self.metadata = info.dynamic_metadata;
        seen
    }
}

/// What listener filters have set, for what serves the connection's requests: kept in the connection's slots.
pub struct ConnectionMetadata(pub Box<Metadata>);

/// What filters find out about a connection when its client speaks, too late for [`Downstream`]; kept in the connection's
/// slots for whoever serves it.
#[derive(Default)]
pub struct Findings(RefCell<Found>);

#[derive(Default)]
struct Found {
    metadata: Metadata,
    received: usize,
    refused: Option<(ResponseFlag, &'static str, &'static str)>,
}

impl Findings {
    /// Dynamic metadata.
    pub fn add_metadata(&self, filter: &str, values: Struct) {
        if !values.fields.is_empty() {
            let mut found = self.0.borrow_mut();
            found.metadata.entry(filter.to_owned()).or_default().fields.extend(values.fields);
        }
    }

    /// How much came before somebody was asked.
    pub fn received(&self, bytes: usize) {
        self.0.borrow_mut().received = bytes;
    }

    /// The connection ends: its flag, its details, and why this proxy closes it.
    pub fn refuse(&self, flag: ResponseFlag, details: &'static str, close_reason: &'static str) {
        self.0.borrow_mut().refused = Some((flag, details, close_reason));
    }

    /// Adds what was found to what is known.
    pub fn tell(&self, info: &mut StreamInfo) {
        let found = self.0.borrow();
        if let Some((flag, details, close_reason)) = found.refused {
            info.bytes.received = found.received as u64;
            info.flags.set(flag);
            info.details = Some(details.into());
            info.downstream_local_close_reason = Some(close_reason.into());
        }
        for (filter, values) in &found.metadata {
            info.dynamic_metadata_mut(filter).fields.extend(values.fields.clone());
        }
    }
}

/// Keeps a connection counted; the counters of its end and the listener's access log are written when it is dropped.
pub struct Held {
    pub(crate) open: Open,
    start: Instant,
    _drain: drain::Guard,
    /// For the listener's access log, where it has one and nobody has written to it yet.
    to_log: Option<Rc<ConnectionInfo>>,
    /// Who wants to be told of the connection, until they were told of its end; and what they are told where nobody
    /// knows more.
    observers: Vec<Box<dyn Observer>>,
    observed: Option<Rc<ConnectionInfo>>,
}

/// A filter's part that follows a connection to its end.
pub trait Observer {
    /// How often it is told in between; none where only the end counts.
    fn period(&self) -> Option<Duration>;

    /// What is known now, and whether the connection is over.
    fn report(&self, info: &StreamInfo, end: bool);
}

impl Held {
    pub(crate) fn new(open: Open, drain: drain::Guard, start: Instant) -> Self {
        let listener = &open.0;
        let counters = &listener.config.stats.counters;
        counters.downstream_cx_total.inc();
        counters.downstream_pre_cx_active.touch();
        counters.downstream_cx_active.inc();
        listener.counters.downstream_cx_total.inc();
        listener.counters.downstream_cx_active.inc();
        Self { open, start, _drain: drain, to_log: None, observers: Vec::new(), observed: None }
    }

    /// Makes the drop write to the listener's access log.
    pub(crate) fn log_at_end(&mut self, info: &Rc<ConnectionInfo>) {
        if !self.open.0.config.access_log.is_empty() {
            self.to_log = Some(info.clone());
        }
    }

    /// Adds somebody who follows the connection.
    pub fn observe(&mut self, observer: Box<dyn Observer>) {
        self.observers.push(observer);
    }

    /// The connection as it is once all filters have seen it.
    pub(crate) fn observed(&mut self, info: &Rc<ConnectionInfo>) {
        if !self.observers.is_empty() {
            self.observed = Some(info.clone());
        }
    }

    /// Who follows the connection.
    pub fn observers(&self) -> &[Box<dyn Observer>] {
        &self.observers
    }

    /// Tells what a filter knows of the connection at its end, in place of what the drop would: to those who follow it
    /// and to the listener's access log.
    pub fn log(&mut self, info: &StreamInfo) {
        for observer in self.observers.drain(..) {
            observer.report(info, true);
        }
        if self.to_log.take().is_some() {
            log(&self.open.0.config, info);
        }
    }
}

/// The listener's access log.
pub(crate) fn log(config: &ListenerConfig, info: &StreamInfo) {
    let context = FormatContext::new(info);
    config.access_log.iter().for_each(|l| l.log(&context));
}

impl Drop for Held {
    fn drop(&mut self) {
        let listener = &self.open.0;
        let stats = &listener.config.stats;
        stats.counters.downstream_cx_active.dec();
        stats.counters.downstream_cx_destroy.inc();
        listener.counters.downstream_cx_active.dec();
        stats.length_ms.record(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX));
        if let (false, Some(connection)) = (self.observers.is_empty(), self.observed.take()) {
            let info = ended(connection);
            self.observers.iter().for_each(|observer| observer.report(&info, true));
        }
        if let Some(connection) = self.to_log.take() {
            log(&self.open.0.config, &ended(connection));
        }
    }
}

/// A connection of which nothing but its own facts is known.
pub(crate) fn ended(connection: Rc<ConnectionInfo>) -> StreamInfo {
    let (start, start_system) = (connection.start, connection.start_system);
    StreamInfo { start, start_system, end: Some(Instant::now()), ..StreamInfo::new(0, connection, None) }
}

/// What a [`ConnectionFilter`] decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The next filter's turn.
    Continue,
    /// Close the connection.
    Close,
    /// The same, but whoever would have served it accounts for it, as an Envoy's last filter does of a connection that
    /// one before it has closed.
    Over,
}

/// A filter that is not the last: looks at the connection before the last one serves it.
pub trait ConnectionFilter: Send + Sync {
    /// Runs once, before any byte was read. What it changes on the connection, later filters see.
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict>;
}

/// The last filter of a chain.
pub trait TerminalFilter: Send + Sync {
    /// Serves the connection to its end.
    ///
    /// An `async move` block that names only some fields of `downstream` captures only those, and the others,
    /// [`Held`] among them, are dropped before the first poll. Begin it with `let downstream = downstream;`.
    fn serve(self: Arc<Self>, downstream: Downstream, worker: Rc<Worker>) -> LocalBoxFuture<'static, ()>;

    /// Whether [`Self::serve`] looks at [`Downstream::refusal`] and [`Downstream::over`]; who does not gets no such
    /// connection.
    fn serves_refused(&self) -> bool {
        false
    }
}

/// A filter as its factory makes it.
#[derive(Clone)]
pub enum NetworkFilter {
    /// Not the last.
    Connection(Arc<dyn ConnectionFilter>),
    /// The last.
    Terminal(Arc<dyn TerminalFilter>),
}

/// Makes a filter of its `typed_config`.
pub type NetworkFilterFactory =
    Arc<dyn Fn(&Any, &FactoryContext) -> ConfigResult<NetworkFilter> + Send + Sync>;

/// Type URL to factory. The program composes it: this crate's own filters and the connection manager.
#[derive(Default)]
pub struct NetworkFilterRegistry(HashMap<&'static str, NetworkFilterFactory>);

impl NetworkFilterRegistry {
    /// Registers a filter under the full name of its configuration message (the type URL behind the last `/`).
    pub fn register(
        &mut self,
        message: &'static str,
        factory: impl Fn(&Any, &FactoryContext) -> ConfigResult<NetworkFilter> + Send + Sync + 'static,
    ) {
        self.0.insert(message, Arc::new(factory));
    }

    /// Makes a filter, of a `TypedStruct` too; an unknown type is an error by name.
    pub fn make(&self, config: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
        let config = &*sampan_config::any::resolved(config).map_err(|e| ConfigError::new(e.to_string()))?;
        let name = config.type_url.rsplit('/').next().unwrap_or_default();
        match self.0.get(name) {
            Some(factory) => factory(config, context),
            None => Err(ConfigError::unsupported(format_args!("network filter type {:?}", config.type_url))),
        }
    }
}

impl NetworkFilterRegistry {
    /// How a type is made.
    pub fn factory(&self, message: &str) -> Option<NetworkFilterFactory> {
        self.0.get(message).cloned()
    }

    /// A registry with the filters of this crate.
    pub fn with_own_filters() -> Self {
        let mut registry = Self::default();
        crate::mongo::register(&mut registry);
        crate::rbac::register(&mut registry);
        crate::simple::register(&mut registry);
        crate::sni_forward::register(&mut registry);
        crate::state::register(&mut registry);
        crate::tcp_proxy::register(&mut registry);
        crate::istio::register(&mut registry);
        registry
    }
}

/// A filter's place in a chain whose configuration comes by ECDS.
struct Discovered {
    slot: Arc<ExtensionSlot<NetworkFilter>>,
    /// Connections that came while there was none.
    missing: sampan_core::stats::Counter,
}

/// Makes the place of a filter that ECDS configures; `last` says whether it must end the chain.
pub(crate) fn discovered(
    message: &ExtensionConfigSource,
    name: &str,
    context: &FactoryContext,
    registry: &NetworkFilterRegistry,
    last: bool,
) -> ConfigResult<NetworkFilter> {
    let slot = ExtensionSlot::from_proto(message, name, Stage::Network, context, |type_name| {
        let factory = registry.factory(type_name)?;
        let (context, name) = (context.clone(), name.to_owned());
        let make: Make<NetworkFilter> = Box::new(move |config| {
            let made = make_alone(&context, |context| factory(config, context))?;
            match (&made, last) {
                (NetworkFilter::Terminal(_), false) => Err(ConfigError::new(format!(
                    "terminal filter named {name} must be the last filter in a network filter chain."
                ))),
                (NetworkFilter::Connection(_), true) => Err(ConfigError::new(format!(
                    "non-terminal filter named {name} is the last filter in a network filter chain."
                ))),
                _ => Ok(made),
            }
        });
        Some(make)
    })?;
    let missing = context.listener_scope.counter("network_extension_config_missing");
    let place = Arc::new(Discovered { slot, missing });
    Ok(if last { NetworkFilter::Terminal(place) } else { NetworkFilter::Connection(place) })
}

impl ConnectionFilter for Discovered {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        let filter = self.slot.current();
        Box::pin(async move {
            match filter {
                Some(NetworkFilter::Connection(filter)) => filter.on_new_connection(downstream, worker).await,
                _ => {
                    self.missing.inc();
                    Verdict::Close
                }
            }
        })
    }
}

impl TerminalFilter for Discovered {
    fn serve(self: Arc<Self>, downstream: Downstream, worker: Rc<Worker>) -> LocalBoxFuture<'static, ()> {
        match self.slot.current() {
            Some(NetworkFilter::Terminal(filter)) => filter.serve(downstream, worker),
            _ => {
                self.missing.inc();
                Box::pin(async {})
            }
        }
    }
}
