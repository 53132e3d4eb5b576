//! `envoy.filters.network.rbac`: lets a connection pass or closes it, as its rules say.
//!
//! Envoy asks the rules with the client's first byte (`ONE_TIME_ON_FIRST_BYTE`), when `tcp_proxy` has connected to its
//! host already. Here they are asked when the connection is made; a refusal is in force with the first byte, so that it is
//! counted, logged and seen as Envoy's. A refused connection gets nothing of what its host says before.
//!
//! `CONTINUOUS` is for rules on what codecs of other protocols find in each message, which there are none of.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderMap;
use sampan_core::rbac::{Facts, Results, Rules, denied_details};
use sampan_core::stats::Counter;
use sampan_tls::Transport;
use tokio::io::AsyncReadExt;

use crate::context::{FactoryContext, Worker};
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, NetworkFilterRegistry, Verdict};
use crate::proto::{decode, duration};

/// Why this proxy closes a connection that it refuses.
pub const CLOSE_REASON: &str = "rbac_deny_close";

/// Registers the filter.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register("envoy.extensions.filters.network.rbac.v3.RBAC", make);
}

struct Rbac {
    rules: Option<Rules>,
    shadow: Option<Rules>,
    shadow_prefix: String,
    delay: Duration,
    allowed: Counter,
    denied: Counter,
    shadow_allowed: Counter,
    shadow_denied: Counter,
}

/// A refusal of a connection, in force with the first byte that the client sends.
pub struct Refusal {
    /// `%CONNECTION_TERMINATION_DETAILS%`
    pub details: String,
    denied: Counter,
    delay: Duration,
}

impl Refusal {
    /// Returns when the connection is to be closed: with the bytes read if by the refusal, without if the client went
    /// before.
    /// `fin`: the client's end counts like a byte (who serves the connection knows half-closed ones).
    pub async fn in_force(&self, transport: &mut Transport, fin: bool) -> Option<usize> {
        // All that is there is read: closing a socket with unread bytes would be a reset.
        let mut first = vec![0; 16 * 1024];
        let read = transport.read(&mut first).await.ok().filter(|read| fin || *read > 0)?;
        self.denied.inc();
        if !self.delay.is_zero() {
            sampan_core::time::sleep(self.delay).await;
        }
        Some(read)
    }
}

fn make(any: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    let message: pb::Rbac = decode(any)?;
    if message.stat_prefix.is_empty() {
        return Err(ConfigError::new("value length must be at least 1 characters").at("stat_prefix"));
    }
    if message.enforcement_type() != pb::rbac::EnforcementType::OneTimeOnFirstByte {
        return Err(ConfigError::unsupported("CONTINUOUS").at("enforcement_type"));
    }
    let dotless = |prefix: &str| prefix.strip_suffix('.').unwrap_or(prefix).to_owned();
    let scope = context.root_scope().scope(&dotless(&message.stat_prefix)).scope("rbac");
    let shadow_prefix = dotless(&message.shadow_rules_stat_prefix);
    let shadow_scope = if shadow_prefix.is_empty() { scope.clone() } else { scope.scope(&shadow_prefix) };
    let rules = |rules, matcher, fields| Rules::from_fields(rules, matcher, fields, None);
    Ok(NetworkFilter::Connection(Arc::new(Rbac {
        rules: rules(message.rules.as_ref(), message.matcher.as_ref(), ["rules", "matcher"])?,
        shadow: rules(
            message.shadow_rules.as_ref(),
            message.shadow_matcher.as_ref(),
            ["shadow_rules", "shadow_matcher"],
        )?,
        delay: message.delay_deny.as_ref().map(duration).transpose().at("delay_deny")?.unwrap_or_default(),
        allowed: scope.counter("allowed"),
        denied: scope.counter("denied"),
        shadow_allowed: shadow_scope.counter("shadow_allowed"),
        shadow_denied: shadow_scope.counter("shadow_denied"),
        shadow_prefix: message.shadow_rules_stat_prefix,
    })))
}

impl ConnectionFilter for Rbac {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        // What one filter refuses, those behind it are not asked about.
        if downstream.refusal.is_some() {
            return Box::pin(std::future::ready(Verdict::Continue));
        }
        let results = Results {
            namespace: "envoy.filters.network.rbac",
            shadow_prefix: &self.shadow_prefix,
            rules_prefix: None,
        };
        let headers = HeaderMap::new();
        let details = downstream.with_stream_info(|info| {
            let facts = Facts { headers: &headers, info, route: false, bare_path: None };
            let shadow = self.shadow.as_ref().map(|rules| rules.decide(facts));
            let enforced = self.rules.as_ref().map(|rules| rules.decide(facts));
            if let Some(decision) = shadow {
                if decision.allowed {
                    self.shadow_allowed.inc()
                } else {
                    self.shadow_denied.inc()
                }
                results.note_shadow(info, decision);
            }
            let decision = enforced?;
            results.note_enforced(info, decision);
            if decision.allowed {
                self.allowed.inc();
                return None;
            }
            Some(denied_details(decision.policy))
        });
        if let Some(details) = details {
            downstream.refusal =
                Some(Box::new(Refusal { details, denied: self.denied.clone(), delay: self.delay }));
        }
        Box::pin(std::future::ready(Verdict::Continue))
    }
}
