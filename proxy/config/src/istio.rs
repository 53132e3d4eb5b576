//! Istio's own messages, which no crate carries: written by hand from `config.proto` of the filters of istio/proxy.
//!
//! Their fields are known to the [schema](crate::schema) too (`tests/schema/extra.txt`), so that they are checked,
//! printed and made of `TypedStruct`s like all others. Fields that Istio has dropped (`debug`, `stat_prefix`) are
//! unknown fields.

/// `stats.PluginConfig`: the filter `istio.stats`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PluginConfig {
    /// The `host` header does not name the service where the control plane does not.
    #[prost(bool, tag = "6")]
    pub disable_host_header_fallback: bool,
    /// How often a TCP connection reports.
    #[prost(message, optional, tag = "7")]
    pub tcp_reporting_duration: Option<envoy_types::pb::google::protobuf::Duration>,
    /// Overrides.
    #[prost(message, repeated, tag = "8")]
    pub metrics: Vec<MetricConfig>,
    /// Further metrics.
    #[prost(message, repeated, tag = "9")]
    pub definitions: Vec<MetricDefinition>,
    /// Who reports.
    #[prost(enumeration = "Reporter", tag = "10")]
    pub reporter: i32,
    /// Deprecated.
    #[prost(message, optional, tag = "11")]
    pub rotation_interval: Option<envoy_types::pb::google::protobuf::Duration>,
    /// Deprecated.
    #[prost(message, optional, tag = "12")]
    pub graceful_deletion_interval: Option<envoy_types::pb::google::protobuf::Duration>,
}

/// Who reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Reporter {
    /// The client's or the server's sidecar, by the listener's direction.
    Unspecified = 0,
    /// A gateway that stands for the servers (a waypoint).
    ServerGateway = 1,
}

/// `stats.MetricConfig`: an override of one metric, or of all.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricConfig {
    /// Tag to CEL expression.
    #[prost(btree_map = "string, string", tag = "1")]
    pub dimensions: std::collections::BTreeMap<String, String>,
    /// The metric without `istio_`; empty for all.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Tags to leave out.
    #[prost(string, repeated, tag = "3")]
    pub tags_to_remove: Vec<String>,
    /// Not implemented by Istio either.
    #[prost(string, tag = "4")]
    pub r#match: String,
    /// The metric is not made.
    #[prost(bool, tag = "5")]
    pub drop: bool,
}

/// `stats.MetricDefinition`: a metric of one's own.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetricDefinition {
    /// Its name without `istio_`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// CEL expression of its value.
    #[prost(string, tag = "2")]
    pub value: String,
    /// What it is.
    #[prost(enumeration = "MetricType", tag = "3")]
    pub r#type: i32,
}

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum MetricType {
    /// A counter.
    Counter = 0,
    /// A gauge.
    Gauge = 1,
    /// A histogram.
    Histogram = 2,
}

/// `io.istio.http.peer_metadata.Config`: the HTTP filter `istio.metadata_exchange`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PeerMetadata {
    /// How the client's workload is found; the first method that knows wins.
    #[prost(message, repeated, tag = "1")]
    pub downstream_discovery: Vec<DiscoveryMethod>,
    /// How the server's workload is found.
    #[prost(message, repeated, tag = "2")]
    pub upstream_discovery: Vec<DiscoveryMethod>,
    /// How the client is told of us.
    #[prost(message, repeated, tag = "3")]
    pub downstream_propagation: Vec<PropagationMethod>,
    /// How the server is told of us.
    #[prost(message, repeated, tag = "4")]
    pub upstream_propagation: Vec<PropagationMethod>,
    /// Internal upstream connections get the filter state too.
    #[prost(bool, tag = "5")]
    pub shared_with_upstream: bool,
    /// Labels to tell and keep besides.
    #[prost(string, repeated, tag = "6")]
    pub additional_labels: Vec<String>,
}

/// `io.istio.http.peer_metadata.Config.DiscoveryMethod`
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryMethod {
    /// The method.
    #[prost(oneof = "Discovery", tags = "1, 2, 3, 4")]
    pub method_specifier: Option<Discovery>,
}

/// How a workload is found.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Discovery {
    /// By the header `baggage`.
    #[prost(message, tag = "1")]
    Baggage(Empty),
    /// By the address, in the workload discovery service.
    #[prost(message, tag = "2")]
    WorkloadDiscovery(Empty),
    /// By `x-envoy-peer-metadata`.
    #[prost(message, tag = "3")]
    IstioHeaders(IstioHeaders),
    /// By what the upstream connection knows.
    #[prost(message, tag = "4")]
    UpstreamFilterState(UpstreamFilterState),
}

/// `io.istio.http.peer_metadata.Config.PropagationMethod`
#[derive(Clone, PartialEq, prost::Message)]
pub struct PropagationMethod {
    /// The method.
    #[prost(oneof = "Propagation", tags = "1, 2")]
    pub method_specifier: Option<Propagation>,
}

/// How a peer is told of us.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Propagation {
    /// By `x-envoy-peer-metadata`.
    #[prost(message, tag = "1")]
    IstioHeaders(IstioHeaders),
    /// By the header `baggage`.
    #[prost(message, tag = "2")]
    Baggage(Empty),
}

/// A message without fields.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Empty {}

/// `io.istio.http.peer_metadata.Config.IstioHeaders`
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct IstioHeaders {
    /// Services outside the mesh are told nothing.
    #[prost(bool, tag = "1")]
    pub skip_external_clusters: bool,
}

/// `io.istio.http.peer_metadata.Config.UpstreamFilterState`
#[derive(Clone, PartialEq, prost::Message)]
pub struct UpstreamFilterState {
    /// The key.
    #[prost(string, tag = "1")]
    pub peer_metadata_key: String,
}

/// `envoy.tcp.metadataexchange.config.MetadataExchange`: the network filter, of a listener or of a cluster.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MetadataExchange {
    /// The ALPN protocol by which peers agree on it.
    #[prost(string, tag = "1")]
    pub protocol: String,
    /// Asks the workload discovery service where the peer does not tell.
    #[prost(bool, tag = "2")]
    pub enable_discovery: bool,
    /// Labels to tell and keep besides.
    #[prost(string, repeated, tag = "3")]
    pub additional_labels: Vec<String>,
}

/// `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig`: what TLS to the upstream offers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Alpn {
    /// By the protocol that is spoken with the upstream.
    #[prost(message, repeated, tag = "1")]
    pub alpn_override: Vec<AlpnOverride>,
}

/// The protocols to offer in place of the TLS context's.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AlpnOverride {
    /// The protocol spoken with the upstream: `HTTP10`, `HTTP11`, `HTTP2`.
    #[prost(int32, tag = "1")]
    pub upstream_protocol: i32,
    /// What to offer.
    #[prost(string, repeated, tag = "2")]
    pub alpn_override: Vec<String>,
}

/// Full name of [`Alpn`].
pub const ALPN: &str = "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig";
/// Full name of [`PluginConfig`].
pub const PLUGIN_CONFIG: &str = "stats.PluginConfig";
/// Full name of [`PeerMetadata`].
pub const PEER_METADATA: &str = "io.istio.http.peer_metadata.Config";
/// Full name of [`MetadataExchange`].
pub const METADATA_EXCHANGE: &str = "envoy.tcp.metadataexchange.config.MetadataExchange";
