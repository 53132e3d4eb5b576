//! The overload manager: monitors measure pressure, triggers turn it into the state of actions, and what serves reads the
//! state of the action that concerns it.
//!
//! [`Overload`] belongs to the control thread, which calls [`Overload::refresh`] at each interval. A listener and a connection
//! manager hold the shared [`OverloadState`], or none where nothing is configured or the listener is exempt
//! (`bypass_overload_manager`): then a request pays nothing. Where there is one, an action costs one plain load.
//!
//! Monitors: `fixed_heap`, `injected_resource` (a file that holds the pressure, for tests) and
//! `global_downstream_max_connections`, which measures nothing but is asked at each accept. Actions: stop_accepting_requests,
//! disable_http_keepalive, stop_accepting_connections, reject_incoming_connections, shrink_heap. Anything else is refused by
//! name.

mod model;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::overload::v3 as pb;
use tokio::sync::watch;

use crate::error::ConfigResult;
use crate::stats::{Counter, Gauge, Histogram, Scope, Unit};
use model::{ActionModel, Kind, Model, Monitor, Trigger};

/// How often the heap is shrunk while that action is active, as in Envoy.
const SHRINK_INTERVAL: Duration = Duration::from_secs(10);

/// How far an action is on its way from inactive (0) to saturated (1).
#[derive(Debug, Default)]
pub struct Fraction(AtomicU32);

impl Fraction {
    /// The state as a number.
    pub fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }

    /// Whether the action hits this time. Draws a number only between the two ends.
    pub fn hits(&self, random: impl FnOnce() -> u64) -> bool {
        let value = self.get();
        value > 0.0 && (value >= 1.0 || (random() as f64 / u64::MAX as f64) < f64::from(value))
    }
}

/// What listeners and connection managers read.
pub struct OverloadState {
    /// New requests are answered with 503.
    pub stop_accepting_requests: Fraction,
    /// HTTP/1 connections are closed behind their response, HTTP/2 connections are drained.
    pub disable_http_keepalive: Fraction,
    /// New connections are closed at once.
    pub reject_incoming_connections: Fraction,
    stop_accepting_connections: watch::Sender<bool>,
    max_connections: Option<(u64, Counter)>,
    connections: AtomicU64,
}

impl OverloadState {
    /// Tells when listeners shall stop to accept (true) and when they may go on.
    pub fn stop_accepting_connections(&self) -> watch::Receiver<bool> {
        self.stop_accepting_connections.subscribe()
    }

    /// Whether `global_downstream_max_connections` is configured; the runtime key of that limit counts for nothing then.
    pub fn limits_connections(&self) -> bool {
        self.max_connections.is_some()
    }

    /// Counts one more connection, if the limit allows it; `failed_updates` counts those that it does not.
    pub fn admit_connection(&self) -> bool {
        let Some((limit, failed)) = &self.max_connections else { return true };
        let more = |open: u64| (open < *limit).then_some(open + 1);
        let admitted = self.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if !admitted {
            failed.inc();
        }
        admitted
    }

    /// A connection that was admitted is gone.
    pub fn release_connection(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the process knows of its heap.
pub trait Heap {
    /// Bytes that the program holds.
    fn allocated(&self) -> u64;
    /// Gives unused pages back to the kernel.
    fn shrink(&self);
}

struct MonitorStats {
    pressure: Gauge,
    failed_updates: Counter,
}

struct Action {
    kind: Kind,
    triggers: Vec<(String, Trigger, f32)>,
    active: Gauge,
    scale_percent: Gauge,
}

impl Action {
    fn new(model: ActionModel, scope: &Scope) -> Self {
        let scope = scope.scope(model.kind.name());
        Self {
            kind: model.kind,
            triggers: model
                .triggers
                .into_iter()
                .map(|(resource, trigger)| (resource, trigger, 0.0))
                .collect(),
            active: scope.gauge("active"),
            scale_percent: scope.gauge("scale_percent"),
        }
    }

    /// Takes a resource's pressure; the action's state is the greatest of its triggers'. The gauges show the trigger that
    /// changed last, as in Envoy.
    fn update(&mut self, resource: &str, pressure: f64) {
        for (name, trigger, state) in &mut self.triggers {
            if name == resource {
                let new = trigger.state(pressure);
                if new.to_bits() != state.to_bits() {
                    *state = new;
                    self.active.set(u64::from(new >= 1.0));
                    self.scale_percent.set((new * 100.0) as u64);
                }
            }
        }
    }

    fn state(&self) -> f32 {
        self.triggers.iter().map(|(.., state)| *state).fold(0.0, f32::max)
    }
}

/// The overload manager of the control thread.
pub struct Overload {
    /// How often to call [`Overload::refresh`].
    pub refresh_interval: Duration,
    state: Arc<OverloadState>,
    monitors: Vec<(String, Monitor, MonitorStats)>,
    actions: Vec<Action>,
    delay: Histogram,
    measured: Instant,
    shrink_count: Option<Counter>,
    shrink_at: Instant,
    heap: Box<dyn Heap>,
}

impl Overload {
    /// Checks `bootstrap.overload_manager` and makes its stats, `overload.*`.
    pub fn from_proto(
        message: &pb::OverloadManager,
        root: &Scope,
        heap: Box<dyn Heap>,
    ) -> ConfigResult<Self> {
        let Model { refresh_interval, monitors, actions, max_connections } = Model::parse(message)?;
        let scope = root.scope("overload");
        let max_connections = max_connections.map(|max| {
            let scope = scope.scope(model::MAX_CONNECTIONS);
            scope.gauge("pressure");
            (max, scope.counter("failed_updates"))
        });
        let shrink = actions.iter().find(|a| a.kind == Kind::ShrinkHeap);
        let shrink_count = shrink.map(|a| scope.scope(a.kind.name()).counter("shrink_count"));
        let with_stats = |(name, monitor): (String, Monitor)| {
            let scope = scope.scope(&name);
            scope.counter("skipped_updates");
            let stats = MonitorStats {
                pressure: scope.gauge("pressure"),
                failed_updates: scope.counter("failed_updates"),
            };
            (name, monitor, stats)
        };
        Ok(Self {
            refresh_interval,
            state: Arc::new(OverloadState {
                stop_accepting_requests: Fraction::default(),
                disable_http_keepalive: Fraction::default(),
                reject_incoming_connections: Fraction::default(),
                stop_accepting_connections: watch::Sender::new(false),
                max_connections,
                connections: AtomicU64::new(0),
            }),
            monitors: monitors.into_iter().map(with_stats).collect(),
            actions: actions.into_iter().map(|model| Action::new(model, &scope)).collect(),
            delay: scope.histogram("refresh_interval_delay", Unit::Milliseconds),
            measured: Instant::now(),
            shrink_count,
            shrink_at: Instant::now() + SHRINK_INTERVAL,
            heap,
        })
    }

    /// What the workers read.
    pub fn state(&self) -> Arc<OverloadState> {
        self.state.clone()
    }

    /// Whether there is anything to measure at all.
    pub fn measures(&self) -> bool {
        !self.monitors.is_empty()
    }

    /// Measures every resource and publishes the actions' states.
    pub fn refresh(&mut self) {
        for (name, monitor, stats) in &self.monitors {
            match pressure(monitor, &*self.heap) {
                Some(pressure) => {
                    stats.pressure.set((pressure * 100.0) as u64);
                    self.actions.iter_mut().for_each(|action| action.update(name, pressure));
                }
                None => stats.failed_updates.inc(),
            }
        }
        let states: HashMap<Kind, f32> = self.actions.iter().map(|a| (a.kind, a.state())).collect();
        let of = |kind| states.get(&kind).copied().unwrap_or(0.0);
        self.state.stop_accepting_requests.set(of(Kind::StopAcceptingRequests));
        self.state.disable_http_keepalive.set(of(Kind::DisableHttpKeepalive));
        self.state.reject_incoming_connections.set(of(Kind::RejectIncomingConnections));
        let stop = of(Kind::StopAcceptingConnections) >= 1.0;
        self.state
            .stop_accepting_connections
            .send_if_modified(|stopped| std::mem::replace(stopped, stop) != stop);
        let now = Instant::now();
        self.delay.record((now - self.measured).as_millis() as u64);
        self.measured = now;
        if now >= self.shrink_at {
            self.shrink_at = now + SHRINK_INTERVAL;
            if let Some(count) = self.shrink_count.as_ref().filter(|_| of(Kind::ShrinkHeap) >= 1.0) {
                self.heap.shrink();
                count.inc();
            }
        }
    }
}

/// The pressure between 0 and 1 (or beyond); none where it cannot be measured.
fn pressure(monitor: &Monitor, heap: &dyn Heap) -> Option<f64> {
    match monitor {
        Monitor::FixedHeap(max) => Some(heap.allocated() as f64 / *max as f64),
        Monitor::Injected(path) => injected(path),
    }
}

fn injected(path: &PathBuf) -> Option<f64> {
    let pressure = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
    (0.0..=1.0).contains(&pressure).then_some(pressure)
}
