//! `envoy.filters.network.ext_authz`: a server outside is asked about a connection when its client's first byte comes, and
//! nothing of the client's passes before it has said yes. What the host says first reaches the client meanwhile.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3 as pb;
use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use envoy_types::pb::google::protobuf::{Any, Value, value::Kind};
use futures_util::future::LocalBoxFuture;
use sampan_core::clock;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderMap;
use sampan_core::matcher::MetadataMatcher;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_core::stream_info::{ResponseFlag, StreamInfo};
use sampan_listener::{
    ConnectionFilter, Downstream, FactoryContext, Findings, NetworkFilter, NetworkFilterRegistry, Verdict,
    Worker,
};

use super::check::Told;
use super::config::labels;
use super::response::{Response, Verdict as Said};
use super::service::Service;
use crate::filter::decode;
use crate::filters::refuse;
use crate::router::callout::Asker;

const TYPE: &str = "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz";
/// The namespace of the dynamic metadata.
const NAMESPACE: &str = "envoy.filters.network.ext_authz";

/// Registers the filter.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register(TYPE, |any, context| {
        Ok(NetworkFilter::Connection(Arc::new(ExtAuthz(Arc::new(Shared::make(any, context)?)))))
    });
}

struct ExtAuthz(Arc<Shared>);

/// What questions under way hold too.
struct Shared {
    service: Service,
    told: Told,
    enabled: Option<MetadataMatcher>,
    failure_allowed: bool,
    stats: Stats,
}

struct Stats {
    cx_closed: Counter,
    denied: Counter,
    error: Counter,
    failure_mode_allowed: Counter,
    ok: Counter,
    total: Counter,
    disabled: Counter,
    active: Gauge,
}

impl Stats {
    fn new(scope: &Scope) -> Self {
        Self {
            cx_closed: scope.counter("cx_closed"),
            denied: scope.counter("denied"),
            error: scope.counter("error"),
            failure_mode_allowed: scope.counter("failure_mode_allowed"),
            ok: scope.counter("ok"),
            total: scope.counter("total"),
            disabled: scope.counter("disabled"),
            active: scope.gauge("active"),
        }
    }
}

impl Shared {
    fn make(any: &Any, context: &FactoryContext) -> ConfigResult<Self> {
        let message: pb::ExtAuthz = decode(any)?;
        refuse(message.send_tls_alert_on_denial, "send_tls_alert_on_denial")?;
        refuse(!message.typed_metadata_context_namespaces.is_empty(), "typed_metadata_context_namespaces")?;
        refuse(message.shadow_mode, "shadow_mode")?;
        let Some(service) = &message.grpc_service else { return Err(ConfigError::missing("grpc_service")) };
        Ok(Self {
            service: Service::grpc(service).at("grpc_service")?,
            told: Told {
                certificate: message.include_peer_certificate,
                tls_session: message.include_tls_session,
                labels: labels(&context.server, &message.bootstrap_metadata_labels_key),
                metadata: message.metadata_context_namespaces,
            },
            enabled: message
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatcher::from_proto)
                .transpose()
                .at("filter_enabled_metadata")?,
            failure_allowed: message.failure_mode_allow,
            stats: Stats::new(&context.root_scope().scope("ext_authz").scope(&message.stat_prefix)),
        })
    }

    /// Asks, and says whether the connection may go on.
    async fn ask(
        self: Arc<Self>,
        request: CheckRequest,
        info: StreamInfo,
        findings: Rc<Findings>,
        worker: Rc<Worker>,
    ) -> bool {
        let start = clock::tick();
        self.stats.total.inc();
        let active = Active::new(&self.stats.active);
        let headers = HeaderMap::new();
        let asker = Asker { request: &headers, info: &info, trace: None };
        let mut response = self.service.check(&worker.clusters, request, asker).await;
        drop(active);
        if response.verdict == Said::Ok {
            let took = clock::recent().duration_since(start).as_millis() as f64;
            let value = Value { kind: Some(Kind::NumberValue(took)) };
            response.metadata.fields.insert("ext_authz_duration".to_owned(), value);
        }
        findings.add_metadata(NAMESPACE, std::mem::take(&mut response.metadata));
        self.decide(&response, &findings)
    }

    fn decide(&self, response: &Response, findings: &Findings) -> bool {
        let details = match response.verdict {
            Said::Ok => {
                self.stats.ok.inc();
                return true;
            }
            Said::Error => {
                self.stats.error.inc();
                if self.failure_allowed {
                    self.stats.failure_mode_allowed.inc();
                    return true;
                }
                "ext_authz_error"
            }
            Said::Denied => {
                self.stats.denied.inc();
                "ext_authz_denied"
            }
        };
        self.stats.cx_closed.inc();
        findings.refuse(ResponseFlag::UnauthorizedExternalService, details, "ext_authz_close");
        false
    }
}

/// Counts a question while it is open, however it ends.
struct Active<'g>(&'g Gauge);

impl<'g> Active<'g> {
    fn new(gauge: &'g Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl ConnectionFilter for ExtAuthz {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        let shared = self.0.clone();
        let findings = downstream.info.slots.get_or_insert_with(Findings::default);
        let metadata = downstream.metadata.as_deref();
        if shared.enabled.as_ref().is_some_and(|matcher| !matcher.matches(metadata)) {
            downstream.transport.close_until(Box::new(move |_| {
                shared.stats.disabled.inc();
                Box::pin(std::future::ready(true))
            }));
            return Box::pin(std::future::ready(Verdict::Continue));
        }
        let request = downstream.with_stream_info(|info| shared.told.of_connection(info));
        let info = StreamInfo::new(0, downstream.info.clone(), None);
        let worker = worker.clone();
        downstream.transport.close_until(Box::new(move |length| {
            findings.received(length);
            Box::pin(shared.ask(request, info, findings, worker))
        }));
        Box::pin(std::future::ready(Verdict::Continue))
    }
}
