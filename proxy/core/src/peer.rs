//! What Istio knows of the workload at the other end of a connection, and of our own: the `WorkloadMetadataObject` of
//! istio/proxy.
//!
//! It travels as a `Struct` (header `x-envoy-peer-metadata`, TCP metadata exchange; keys as in a node's metadata), as
//! an endpoint's `istio.workload` (`name;namespace;service;revision;cluster`) and as `baggage`. Filters leave it in the
//! filter state under [`DOWNSTREAM`] and [`UPSTREAM`] (a serialised `Struct`, for CEL) and under the same with `_obj`
//! (fields by name, for logs). All four print what Istio's proxy prints.
//!
//! Source: `extensions/common/metadata_object.cc` of istio/proxy.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::rc::Rc;

use envoy_types::pb::google::protobuf::{Any as ProtoAny, Struct, Value, value::Kind};
use serde_json::{Map, Value as Json};

use crate::stream_info::{FilterState, FilterStateObject};

mod exchange;
mod wire;

pub use exchange::{Exchange, ExchangeStats, Outcome, PeerCell, PeerExchange};

/// Filter state key of the client's workload.
pub const DOWNSTREAM: &str = "downstream_peer";
/// Filter state key of the workload that serves.
pub const UPSTREAM: &str = "upstream_peer";
/// Filter state key that says that nobody will tell.
pub const NOT_FOUND: &str = "peer_not_found";

const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";
const OWNER_PREFIX: &str = "kubernetes://apis/apps/v1/namespaces/";

/// This proxy's node, as far as peers are told of it.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// `node.id`
    pub id: String,
    /// `node.locality.region`
    pub region: String,
    /// `node.locality.zone`
    pub zone: String,
    /// `node.metadata`
    pub metadata: Struct,
}

impl Node {
    /// Our own workload, with these labels besides those that are always told.
    pub fn peer(&self, additional_labels: &[String]) -> Peer {
        Peer::from_struct(&self.metadata, additional_labels, Some((&self.region, &self.zone)))
    }
}

/// What owns a workload's pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// Not told.
    #[default]
    Unknown,
    /// Nobody.
    Pod,
    /// A deployment.
    Deployment,
    /// A job.
    Job,
    /// A cron job.
    CronJob,
}

impl WorkloadKind {
    fn suffix(self) -> Option<&'static str> {
        match self {
            Self::Unknown => None,
            Self::Pod => Some("pod"),
            Self::Deployment => Some("deployment"),
            Self::Job => Some("job"),
            Self::CronJob => Some("cronjob"),
        }
    }

    fn from_suffix(suffix: &str) -> Self {
        let all = [Self::Pod, Self::Deployment, Self::Job, Self::CronJob];
        all.into_iter().find(|kind| kind.suffix() == Some(suffix)).unwrap_or_default()
    }

    /// From `kubernetes://apis/apps/v1/namespaces/NS/deployments/WORKLOAD`.
    fn from_owner(owner: &str, workload: &str) -> Self {
        let cut = owner.len().checked_sub(workload.len() + 2).filter(|cut| *cut > 0);
        let kind = cut.and_then(|cut| owner.get(..cut)).and_then(|rest| rest.rsplit_once('/'));
        kind.map(|(_, suffix)| Self::from_suffix(suffix)).unwrap_or_default()
    }
}

/// A workload. Empty is unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Peer {
    /// The instance (pod).
    pub name: String,
    /// The cluster of the mesh.
    pub cluster: String,
    /// The namespace.
    pub namespace: String,
    /// The workload.
    pub workload: String,
    /// The canonical service.
    pub service: String,
    /// The canonical revision.
    pub revision: String,
    /// Label `app.kubernetes.io/name` or `app`.
    pub app: String,
    /// Label `app.kubernetes.io/version` or `version`.
    pub version: String,
    /// What owns it.
    pub kind: WorkloadKind,
    /// SPIFFE identity, where the source tells it.
    pub identity: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// The labels that the configuration asked for.
    pub labels: Vec<(String, String)>,
}

fn text(value: &Value) -> &str {
    match &value.kind {
        Some(Kind::StringValue(text)) => text,
        _ => "",
    }
}

impl Peer {
    /// From a node's metadata or what a peer sent. `additional` names labels to keep; `locality` (region, zone) fills
    /// what the metadata leaves open.
    pub fn from_struct(metadata: &Struct, additional: &[String], locality: Option<(&str, &str)>) -> Self {
        let field = |key: &str| metadata.fields.get(key).map(text).unwrap_or_default();
        let mut peer = Self {
            name: field("NAME").to_owned(),
            cluster: field("CLUSTER_ID").to_owned(),
            namespace: field("NAMESPACE").to_owned(),
            workload: field("WORKLOAD_NAME").to_owned(),
            kind: WorkloadKind::from_owner(field("OWNER"), field("WORKLOAD_NAME")),
            identity: field("IDENTITY").to_owned(),
            region: field("REGION").to_owned(),
            zone: field("AVAILABILITY_ZONE").to_owned(),
            ..Self::default()
        };
        if let Some(Kind::StructValue(labels)) = metadata.fields.get("LABELS").and_then(|v| v.kind.as_ref()) {
            peer.take_labels(labels, additional);
        }
        if let Some((region, zone)) = locality {
            for (own, given) in [(&mut peer.region, region), (&mut peer.zone, zone)] {
                if own.is_empty() {
                    given.clone_into(own);
                }
            }
        }
        peer
    }

    fn take_labels(&mut self, labels: &Struct, additional: &[String]) {
        let label = |key: &str| labels.fields.get(key).map(text).unwrap_or_default();
        let either = |first: &str, second: &str| {
            let first = label(first);
            if first.is_empty() { label(second) } else { first }.to_owned()
        };
        self.service = label(CANONICAL_NAME).to_owned();
        self.revision = label(CANONICAL_REVISION).to_owned();
        self.app = either("app.kubernetes.io/name", "app");
        self.version = either("app.kubernetes.io/version", "version");
        let known = [
            CANONICAL_NAME,
            CANONICAL_REVISION,
            "app.kubernetes.io/name",
            "app",
            "app.kubernetes.io/version",
            "version",
        ];
        let wanted: BTreeMap<&str, &str> = additional
            .iter()
            .filter(|key| !known.contains(&key.as_str()))
            .filter_map(|key| Some((key.as_str(), text(labels.fields.get(key)?))))
            .collect();
        self.labels = wanted.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    }

    /// From an endpoint's metadata `istio.workload`.
    pub fn from_endpoint(encoded: &str) -> Option<Self> {
        let mut parts = encoded.split(';').map(str::to_owned);
        Some(Self {
            workload: parts.next()?,
            namespace: parts.next()?,
            service: parts.next()?,
            revision: parts.next()?,
            cluster: parts.next()?,
            ..Self::default()
        })
    }

    /// From a `baggage` header; what it does not tell stays empty.
    pub fn from_baggage(baggage: &str) -> Self {
        let mut peer = Self::default();
        for property in baggage.split(',') {
            let (key, value) = property.split_once('=').unwrap_or((property, ""));
            // Only the first two parts count: `a=b=c` is `b`.
            let value = value.split('=').next().unwrap_or_default().to_owned();
            match key {
                "k8s.namespace.name" => peer.namespace = value,
                "k8s.cluster.name" => peer.cluster = value,
                "service.name" => {
                    if peer.app.is_empty() {
                        peer.app.clone_from(&value);
                    }
                    peer.service = value;
                }
                "service.version" => {
                    if peer.version.is_empty() {
                        peer.version.clone_from(&value);
                    }
                    peer.revision = value;
                }
                "app.name" => {
                    if peer.service.is_empty() {
                        peer.service.clone_from(&value);
                    }
                    peer.app = value;
                }
                "app.version" => {
                    if peer.revision.is_empty() {
                        peer.revision.clone_from(&value);
                    }
                    peer.version = value;
                }
                "k8s.instance.name" => peer.name = value,
                "cloud.region" => peer.region = value,
                "cloud.availability_zone" => peer.zone = value,
                "k8s.pod.name" | "k8s.deployment.name" | "k8s.job.name" | "k8s.cronjob.name" => {
                    peer.kind = WorkloadKind::from_suffix(key.split('.').nth(1).unwrap_or_default());
                    peer.workload = value;
                }
                _ => {}
            }
        }
        peer
    }

    /// As a `baggage` header's value.
    pub fn baggage(&self) -> String {
        let workload = format!("k8s.{}.name", self.kind.suffix().unwrap_or("pod"));
        // The service's name and version always win, and are empty where they are unknown, as in Istio.
        let app = Some(&self.app).filter(|app| **app != self.service);
        let version = Some(&self.version).filter(|version| **version != self.revision);
        let parts = [
            (workload.as_str(), Some(&self.workload)),
            ("service.name", Some(&self.service)),
            ("app.name", app),
            ("service.version", Some(&self.revision)),
            ("app.version", version),
            ("k8s.namespace.name", Some(&self.namespace)),
            ("k8s.cluster.name", Some(&self.cluster)),
            ("k8s.instance.name", Some(&self.name)),
            ("cloud.region", Some(&self.region)),
            ("cloud.availability_zone", Some(&self.zone)),
        ];
        let parts = parts.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let parts: Vec<_> = parts.filter(|(_, v)| !v.is_empty()).map(|(k, v)| format!("{k}={v}")).collect();
        parts.join(",")
    }

    /// The `Struct` that peers are sent, encoded with its keys in order.
    pub fn encode(&self) -> Vec<u8> {
        let owner = self
            .kind
            .suffix()
            .map(|suffix| format!("{OWNER_PREFIX}{}/{suffix}s/{}", self.namespace, self.workload));
        let mut labels: BTreeMap<&str, &str> = [
            (CANONICAL_NAME, &self.service),
            (CANONICAL_REVISION, &self.revision),
            ("app", &self.app),
            ("version", &self.version),
        ]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (key, value.as_str()))
        .collect();
        labels.extend(self.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        let mut fields: Vec<(&str, &str)> = vec![
            ("AVAILABILITY_ZONE", &self.zone),
            ("CLUSTER_ID", &self.cluster),
            ("IDENTITY", &self.identity),
            ("NAME", &self.name),
            ("NAMESPACE", &self.namespace),
            ("OWNER", owner.as_deref().unwrap_or_default()),
            ("REGION", &self.region),
            ("WORKLOAD_NAME", &self.workload),
        ];
        fields.retain(|(_, value)| !value.is_empty());
        wire::put(&fields, Some(("LABELS", &labels)))
    }

    /// Name and value of what is known, under the names that CEL expressions use.
    fn named(&self) -> Vec<(&'static str, &str)> {
        let all = [
            ("type", self.kind.suffix().unwrap_or_default()),
            ("workload", &self.workload),
            ("name", &self.name),
            ("cluster", &self.cluster),
            ("namespace", &self.namespace),
            ("service", &self.service),
            ("revision", &self.revision),
            ("app", &self.app),
            ("version", &self.version),
            ("identity", &self.identity),
            ("region", &self.region),
            ("availability_zone", &self.zone),
        ];
        all.into_iter().filter(|(_, value)| !value.is_empty()).collect()
    }

    /// The value of a field by the name that CEL expressions and logs use; none where there is no such field.
    pub fn field(&self, name: &str) -> Option<&str> {
        Some(match name {
            "namespace" => &self.namespace,
            "cluster" => &self.cluster,
            "service" => &self.service,
            "revision" => &self.revision,
            "app" => &self.app,
            "version" => &self.version,
            "workload" => &self.workload,
            "type" => self.kind.suffix().unwrap_or("unknown"),
            "name" => &self.name,
            "region" => &self.region,
            "availability_zone" => &self.zone,
            _ => return None,
        })
    }

    fn json(&self) -> Json {
        let mut fields: Map<String, Json> = self
            .named()
            .into_iter()
            // Istio tells the instance only with the cluster.
            .filter(|(name, _)| *name != "name" || !self.cluster.is_empty())
            .map(|(name, value)| (name.to_owned(), Json::from(value)))
            .collect();
        if !self.labels.is_empty() {
            let labels: Map<_, _> =
                self.labels.iter().map(|(k, v)| (k.clone(), Json::from(v.as_str()))).collect();
            fields.insert("labels".to_owned(), Json::Object(labels));
        }
        Json::Object(fields)
    }

    /// The `Struct` of the filter state, encoded.
    fn encode_named(&self) -> Vec<u8> {
        let mut fields = self.named();
        fields.retain(|(name, _)| *name != "name" || !self.cluster.is_empty());
        fields.sort_unstable();
        let labels: BTreeMap<&str, &str> =
            self.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        wire::put(&fields, Some(("labels", &labels)).filter(|(_, labels)| !labels.is_empty()))
    }
}

/// A peer that streams share, with the hash of what it is: label sets are found by it.
#[derive(Debug)]
pub struct SharedPeer {
    /// The workload.
    pub peer: Peer,
    /// Its hash; equal peers have equal ones within a process.
    pub hash: u64,
}

impl SharedPeer {
    /// Shares a peer.
    pub fn new(peer: Peer) -> Rc<Self> {
        let hash = foldhash::fast::FixedState::default().hash_one(&peer);
        Rc::new(Self { peer, hash })
    }
}

/// The peer of one direction, as the filter state holds it; readers that know the type take [`PeerState::peer`].
pub struct PeerState {
    /// The workload.
    pub peer: Rc<SharedPeer>,
    /// As an object with fields (`…_obj`), not as a serialised `Struct`.
    object: bool,
}

impl FilterStateObject for PeerState {
    fn plain(&self) -> Option<Cow<'_, str>> {
        let peer = &self.peer.peer;
        if !self.object {
            return Some(String::from_utf8_lossy(&peer.encode_named()).into_owned().into());
        }
        let pairs = peer.named().into_iter().filter(|(name, _)| *name != "identity");
        let mut parts: Vec<String> = pairs.map(|(name, value)| format!("{name}={value}")).collect();
        parts.extend(peer.labels.iter().map(|(key, value)| format!("labels[]{key}={value}")));
        Some(parts.join(",").into())
    }

    fn typed(&self) -> Option<Json> {
        let value = self.peer.peer.json();
        if self.object {
            return Some(value);
        }
        Some(serde_json::json!({"@type": "type.googleapis.com/google.protobuf.Struct", "value": value}))
    }

    fn message(&self) -> Option<ProtoAny> {
        let type_url = "type.googleapis.com/google.protobuf.Struct".to_owned();
        Some(ProtoAny { type_url, value: self.peer.peer.encode_named() })
    }

    fn field(&self, name: &str) -> Option<Cow<'_, str>> {
        if self.object { self.peer.peer.field(name).map(Cow::Borrowed) } else { None }
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Leaves a peer for others, unless somebody has told before.
pub fn set(state: &mut FilterState, key: &'static str, peer: &Rc<SharedPeer>) {
    if state.get(key).is_some() {
        return;
    }
    let object = |object| -> Rc<dyn FilterStateObject> { Rc::new(PeerState { peer: peer.clone(), object }) };
    state.set(key, object(false));
    state.set(&format!("{key}_obj"), object(true));
}

/// The peer that was left under a key.
pub fn get<'a>(state: &'a FilterState, key: &str) -> Option<&'a Rc<SharedPeer>> {
    state.get(key)?.as_any().downcast_ref::<PeerState>().map(|state| &state.peer)
}

#[cfg(test)]
mod tests;
