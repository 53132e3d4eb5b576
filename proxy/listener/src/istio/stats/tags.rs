//! The labels that follow from a stream's facts, in the order in which Istio makes them.

use std::borrow::Cow;

use envoy_types::pb::google::protobuf::value::Kind;
use sampan_core::peer::Peer;
use sampan_core::stats::Tag;

use super::Reporter;
use super::facts::{Facts, Far, Shape};

const UNKNOWN: &str = "unknown";

/// What is known of the far end, read now.
fn far<'a>(facts: &'a Facts<'_>) -> Option<Cow<'a, Peer>> {
    match &facts.far {
        Far::Unknown => None,
        Far::Peer(shared) => Some(Cow::Borrowed(&shared.peer)),
        Far::Endpoint(metadata) => {
            let workload = metadata.get("istio").and_then(|istio| istio.fields.get("workload"));
            match workload.and_then(|value| value.kind.as_ref()) {
                Some(Kind::StringValue(encoded)) => Peer::from_endpoint(encoded),
                _ => Peer::from_endpoint(""),
            }
            .map(Cow::Owned)
        }
    }
}

/// `/ns/NAMESPACE/` of a SPIFFE name.
fn namespace_of(principal: &str) -> Option<&str> {
    let (_, rest) = principal.split_once("/ns/")?;
    rest.split('/').next()
}

/// Host, short name and namespace of the service.
struct Named<'a> {
    host: &'a str,
    name: &'a str,
    namespace: &'a str,
}

fn service<'a>(facts: &'a Facts<'_>) -> Named<'a> {
    let fallback = facts.host;
    if let Some(name) = facts.special {
        return Named { host: fallback, name, namespace: "" };
    }
    let Some(service) = &facts.service else {
        return Named { host: fallback, name: fallback, namespace: "" };
    };
    let host = service.host.as_deref().unwrap_or(fallback);
    let short = || host.split('.').next().unwrap_or_default();
    Named { host, name: service.name.as_deref().unwrap_or_else(short), namespace: &service.namespace }
}

fn or<'a>(text: &'a str, otherwise: &'a str) -> &'a str {
    if text.is_empty() { otherwise } else { text }
}

/// All labels of a shape.
pub(super) fn all(facts: &Facts<'_>) -> Vec<Tag> {
    let mut tags: Vec<Tag> = Vec::with_capacity(25);
    let mut put = |tag: &'static str, value: &str| tags.push((Cow::Borrowed(tag), value.into()));
    put(
        "reporter",
        match facts.stats.reporter {
            Reporter::Client => "source",
            Reporter::Server => "destination",
            Reporter::ServerGateway => "waypoint",
        },
    );
    match facts.stats.reporter {
        Reporter::Client => client_reports(facts, &mut put),
        Reporter::Server | Reporter::ServerGateway => server_reports(facts, &mut put),
    }
    let protocol = match facts.shape {
        Shape::Messages => return tags,
        Shape::Http => "http",
        Shape::Grpc => "grpc",
        Shape::Tcp => "tcp",
    };
    put("request_protocol", protocol);
    if facts.shape != Shape::Tcp {
        put("response_code", &facts.code.to_string());
        put("grpc_response_status", &facts.grpc_status.map(|s| s.to_string()).unwrap_or_default());
    }
    put("response_flags", &facts.flags.to_string());
    put(
        "connection_security_policy",
        match facts.mutual_tls {
            Some(true) => "mutual_tls",
            Some(false) => "none",
            None => UNKNOWN,
        },
    );
    tags
}

type Put<'p> = dyn FnMut(&'static str, &str) + 'p;

/// The namespace of the far end: by its certificate, else by what it told.
fn far_namespace<'a>(san: &'a str, peer: Option<&'a Peer>) -> &'a str {
    let by_san = namespace_of(san).unwrap_or_default();
    or(by_san, peer.map_or("", |peer| &peer.namespace))
}

fn server_reports(facts: &Facts<'_>, put: &mut Put<'_>) {
    let peer = far(facts);
    let peer = peer.as_deref();
    let of = |field: fn(&Peer) -> &str, otherwise| or(peer.map_or("", field), otherwise);
    put("source_workload", of(|p| &p.workload, UNKNOWN));
    put("source_canonical_service", of(|p| &p.service, UNKNOWN));
    put("source_canonical_revision", of(|p| &p.revision, "latest"));
    put("source_workload_namespace", or(far_namespace(&facts.peer_san, peer), UNKNOWN));
    put("source_principal", or(&facts.peer_san, UNKNOWN));
    put("source_app", of(|p| &p.app, UNKNOWN));
    put("source_version", of(|p| &p.version, UNKNOWN));
    put("source_cluster", of(|p| &p.cluster, UNKNOWN));
    let named = service(facts);
    if facts.stats.reporter == Reporter::ServerGateway {
        let behind = facts.behind.as_ref().map(|shared| &shared.peer);
        let of = |field: fn(&Peer) -> &str| or(behind.map_or("", field), UNKNOWN);
        put("destination_workload", of(|p| &p.workload));
        put("destination_workload_namespace", of(|p| &p.namespace));
        put("destination_principal", of(|p| &p.identity));
        put("destination_app", of(|p| &p.app));
        put("destination_version", of(|p| &p.version));
        put("destination_service", or(named.host, UNKNOWN));
        put("destination_canonical_service", of(|p| &p.service));
        put("destination_canonical_revision", of(|p| &p.revision));
        put("destination_service_name", or(named.name, UNKNOWN));
        put("destination_service_namespace", or(named.namespace, UNKNOWN));
        put("destination_cluster", of(|p| &p.cluster));
        return;
    }
    let own = &facts.stats.own;
    put("destination_workload", &own.workload);
    put("destination_workload_namespace", &own.namespace);
    put("destination_principal", or(&facts.local_san, UNKNOWN));
    put("destination_app", &own.app);
    put("destination_version", &own.version);
    put("destination_service", or(named.host, &own.service));
    put("destination_canonical_service", &own.service);
    put("destination_canonical_revision", &own.revision);
    put("destination_service_name", or(named.name, &own.service));
    put("destination_service_namespace", &own.namespace);
    put("destination_cluster", &own.cluster);
}

fn client_reports(facts: &Facts<'_>, put: &mut Put<'_>) {
    let peer = far(facts);
    let peer = peer.as_deref();
    let of = |field: fn(&Peer) -> &str, otherwise| or(peer.map_or("", field), otherwise);
    // What an endpoint's metadata tells has no identity.
    let san = or(&facts.peer_san, peer.map_or("", |p| &p.identity));
    let namespace = far_namespace(san, peer);
    let own = &facts.stats.own;
    put("source_workload", &own.workload);
    put("source_canonical_service", &own.service);
    put("source_canonical_revision", &own.revision);
    put("source_workload_namespace", &own.namespace);
    put("source_principal", or(&facts.local_san, UNKNOWN));
    put("source_app", &own.app);
    put("source_version", &own.version);
    put("source_cluster", &own.cluster);
    let named = service(facts);
    put("destination_workload", of(|p| &p.workload, UNKNOWN));
    put("destination_workload_namespace", or(namespace, UNKNOWN));
    put("destination_principal", or(san, UNKNOWN));
    put("destination_app", of(|p| &p.app, UNKNOWN));
    put("destination_version", of(|p| &p.version, UNKNOWN));
    put("destination_service", or(named.host, UNKNOWN));
    put("destination_canonical_service", of(|p| &p.service, UNKNOWN));
    put("destination_canonical_revision", of(|p| &p.revision, "latest"));
    put("destination_service_name", or(named.name, UNKNOWN));
    put("destination_service_namespace", or(or(named.namespace, namespace), UNKNOWN));
    put("destination_cluster", of(|p| &p.cluster, UNKNOWN));
}
