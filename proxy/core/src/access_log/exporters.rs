//! Exporters of access logs: loggers of one configuration share one, as in Envoy.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use envoy_types::pb::envoy::config::core::v3::Node;

use crate::export::{Exporter, Plan};
use crate::stats::Scope;

/// What an exporter sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Http,
    Tcp,
    OpenTelemetry,
}

/// The exporters in use.
pub(super) struct Exporters {
    root: Scope,
    node: OnceLock<Node>,
    made: Mutex<Made>,
}

/// By kind and encoded configuration.
type Made = HashMap<(Kind, Vec<u8>), Weak<Exporter>>;

impl Exporters {
    pub(super) fn new(root: &Scope) -> Self {
        Self { root: root.clone(), node: OnceLock::new(), made: Mutex::default() }
    }

    /// Who we are; the first who says so counts.
    pub(super) fn set_node(&self, node: Node) {
        let _ = self.node.set(node);
    }

    pub(super) fn node(&self) -> Node {
        self.node.get().cloned().unwrap_or_default()
    }

    pub(super) fn scope(&self, name: &str) -> Scope {
        self.root.scope(name)
    }

    /// The exporter of a configuration, made at its first use.
    pub(super) fn shared(&self, kind: Kind, config: Vec<u8>, plan: impl FnOnce() -> Plan) -> Arc<Exporter> {
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
