//! Exporters in use: loggers of one configuration share one, and so do tracers, as in Envoy.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use envoy_types::pb::envoy::config::core::v3::Node;

use super::{Exporter, Plan};
use crate::stats::Scope;

/// What an exporter sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Log entries of HTTP streams.
    Http,
    /// Log entries of connections.
    Tcp,
    /// Log records of OTLP.
    OpenTelemetry,
    /// Spans.
    Spans,
}

/// The exporters of a process.
pub struct Exporters {
    root: Scope,
    node: OnceLock<Node>,
    made: Mutex<Made>,
}

/// By kind and encoded configuration.
type Made = HashMap<(Kind, Vec<u8>), Weak<Exporter>>;

impl Exporters {
    /// None yet; their stats are made in `root`.
    pub fn new(root: &Scope) -> Self {
        Self { root: root.clone(), node: OnceLock::new(), made: Mutex::default() }
    }

    /// Who we are; the first who says so counts.
    pub fn set_node(&self, node: Node) {
        let _ = self.node.set(node);
    }

    /// Who we are.
    pub fn node(&self) -> Node {
        self.node.get().cloned().unwrap_or_default()
    }

    /// A scope below the root.
    pub fn scope(&self, name: &str) -> Scope {
        self.root.scope(name)
    }

    /// The exporter of a configuration, made at its first use.
    pub fn shared(&self, kind: Kind, config: Vec<u8>, plan: impl FnOnce() -> Plan) -> Arc<Exporter> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.retain(|_, exporter| exporter.strong_count() > 0);
        let known = made.get(&(kind, config.clone())).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let exporter = Arc::new(Exporter::new(plan()));
            made.insert((kind, config), Arc::downgrade(&exporter));
            exporter
        })
    }
}
