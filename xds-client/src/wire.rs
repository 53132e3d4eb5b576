//! The discovery protocol's messages, as far as a client reads and writes them.
//!
//! Written by hand although generated ones exist: a nested message and a byte string are the same on the wire, so the
//! node is encoded once by its owner and copied as bytes afterwards, and a resource stays a slice of the response that
//! brought it. Nothing here decodes a resource. Source: `envoy/service/discovery/v3/discovery.proto`.

use std::collections::BTreeMap;

use bytes::Bytes;

/// `google.protobuf.Any` whose value is not copied.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Any {
    /// The type of what the value holds.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// `google.rpc.Status` without its details.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// A gRPC status code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// What was wrong.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `google.protobuf.Duration`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Duration {
    /// Whole seconds.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// The rest.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// `envoy.config.core.v3.ControlPlane`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ControlPlane {
    /// Who serves.
    #[prost(string, tag = "1")]
    pub identifier: String,
}

/// `envoy.service.discovery.v3.Resource`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resource {
    /// The resource's own version.
    #[prost(string, tag = "1")]
    pub version: String,
    /// Absent in a heart-beat.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// Its name.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Other names under which it was asked for.
    #[prost(string, repeated, tag = "4")]
    pub aliases: Vec<String>,
    /// How long it lives without being sent again.
    #[prost(message, optional, tag = "6")]
    pub ttl: Option<Duration>,
}

/// `envoy.service.discovery.v3.DiscoveryRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryRequest {
    /// The last version that was accepted.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// The encoded `envoy.config.core.v3.Node`.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub node: Option<Bytes>,
    /// All that is asked for; none is everything.
    #[prost(string, repeated, tag = "3")]
    pub resource_names: Vec<String>,
    /// The type that is asked for.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Which response is answered.
    #[prost(string, tag = "5")]
    pub response_nonce: String,
    /// Why it was refused.
    #[prost(message, optional, tag = "6")]
    pub error_detail: Option<Status>,
}

/// `envoy.service.discovery.v3.DiscoveryResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DiscoveryResponse {
    /// The version of the whole.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// Bare, or wrapped in [`Resource`].
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Any>,
    /// The type of all resources.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be named by the answer.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Who answers.
    #[prost(message, optional, tag = "6")]
    pub control_plane: Option<ControlPlane>,
}

/// `envoy.service.discovery.v3.DeltaDiscoveryRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaDiscoveryRequest {
    /// The encoded `envoy.config.core.v3.Node`.
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub node: Option<Bytes>,
    /// The type that is asked for.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// What is asked for from now on.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// What is asked for no longer.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// What the client has already, at a stream's beginning.
    #[prost(btree_map = "string, string", tag = "5")]
    pub initial_resource_versions: BTreeMap<String, String>,
    /// Which response is answered.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Why it was refused.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// `envoy.service.discovery.v3.DeltaDiscoveryResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeltaDiscoveryResponse {
    /// The version of the whole, to be shown only.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// What is new or changed.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// The type of all resources.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be named by the answer.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// What is there no longer.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
    /// Who answers.
    #[prost(message, optional, tag = "7")]
    pub control_plane: Option<ControlPlane>,
}
