//! What is taken and what is refused.

use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration};

use super::*;

fn plain() -> Message {
    Message { name: "c".into(), ..Default::default() }
}

fn error(message: &Message) -> String {
    ClusterConfig::from_proto(message, false).err().unwrap().to_string()
}

#[test]
fn defaults_are_envoys() {
    let config = ClusterConfig::from_proto(&plain(), false).unwrap();
    assert_eq!(config.connect_timeout, Duration::from_secs(5));
    assert_eq!(config.buffer_limit, 1024 * 1024);
    assert_eq!(config.lb.panic_threshold, 50);
    assert_eq!(config.http.protocol, HttpProtocol::Http1);
    assert_eq!(config.http.idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(config.load_assignment.overprovisioning_factor, 140);
    assert!(std::mem::size_of::<ClusterConfig>() < 512, "{}", std::mem::size_of::<ClusterConfig>());
}

#[test]
fn the_unsupported_is_refused_by_name() {
    let mut message = plain();
    message.health_checks.push(Default::default());
    assert_eq!(error(&message), "health_checks: health_checks is not supported");
    let mut message = plain();
    let any = Any { type_url: "type.googleapis.com/x.Y".into(), ..Default::default() };
    message.typed_extension_protocol_options.insert("k".into(), any);
    assert_eq!(error(&message), "typed_extension_protocol_options[\"k\"]: x.Y is not supported");
}

#[test]
fn a_zero_connect_timeout_is_refused() {
    let mut message = plain();
    message.connect_timeout = Some(ProtoDuration::default());
    assert_eq!(error(&message), "connect_timeout: value must be greater than 0s");
}

#[test]
fn logical_dns_takes_one_endpoint() {
    let mut message = plain();
    message.cluster_discovery_type =
        Some(pb::ClusterDiscoveryType::Type(pb::DiscoveryType::LogicalDns.into()));
    assert!(error(&message).starts_with("load_assignment: LOGICAL_DNS clusters must have a single"));
}

#[test]
fn http2_by_extension_and_by_the_deprecated_field() {
    use envoy_types::pb::envoy::extensions::upstreams::http::v3 as ext;
    use ext::http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config};
    let mut message = plain();
    #[allow(deprecated)]
    {
        message.http2_protocol_options = Some(Default::default());
    }
    assert_eq!(ClusterConfig::from_proto(&message, false).unwrap().http.protocol, HttpProtocol::Http2);
    let options = ext::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(explicit_http_config::ProtocolConfig::Http2ProtocolOptions(
                Default::default(),
            )),
        })),
        ..Default::default()
    };
    let any = Any {
        type_url: "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions".into(),
        value: prost::Message::encode_to_vec(&options),
    };
    let mut message = plain();
    message
        .typed_extension_protocol_options
        .insert("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".into(), any);
    assert_eq!(ClusterConfig::from_proto(&message, false).unwrap().http.protocol, HttpProtocol::Http2);
}
