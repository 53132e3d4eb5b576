//! How a request's head is read and extended.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use ipnet::IpNet;
use pb::http_connection_manager as hcm;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::stream_info::ConnectionInfo;
use sampan_listener::FactoryContext;

use super::super::origin::Detector;
use super::super::path::{EscapedSlashes, PathOptions};
use super::super::xfcc::ClientCert;
use super::flag;
use crate::route::HeaderMutations;

/// What is done to a request's headers before anything reads them.
pub struct RequestOptions {
    /// `use_remote_address`
    pub use_remote_address: bool,
    /// `xff_num_trusted_hops`
    pub xff_num_trusted_hops: u32,
    /// `original_ip_detection_extensions`, or else `x-forwarded-for` by the number of hops.
    pub origin: Vec<Detector>,
    /// `skip_xff_append`
    pub skip_xff_append: bool,
    /// `internal_address_config`
    pub internal: Option<Internal>,
    /// `append_x_forwarded_port`
    pub append_x_forwarded_port: bool,
    /// `scheme_header_transformation.scheme_to_overwrite`
    pub scheme: Option<&'static str>,
    /// `scheme_header_transformation.match_upstream`: the scheme is that of the connection to the first host.
    pub scheme_of_upstream: bool,
    /// `add_user_agent`: the service cluster's name.
    pub user_agent: Option<String>,
    /// The node's id, sent with `add_user_agent`.
    pub node: String,
    /// `generate_request_id`
    pub generate_request_id: bool,
    /// `preserve_external_request_id`
    pub preserve_external_request_id: bool,
    /// `request_id_extension`'s `pack_trace_reason`
    pub pack_trace_reason: bool,
    /// `forward_client_cert_details`, `set_current_client_cert_details`, `forward_client_cert_matcher`
    pub client_cert: ClientCert,
    /// `forward_proto_config`
    pub forward_proto: Option<ForwardProto>,
    /// Path normalisation.
    pub path: PathOptions,
    /// `strip_trailing_host_dot`
    pub strip_trailing_host_dot: bool,
    /// `strip_matching_host_port`, `strip_any_host_port`
    pub strip_port: StripPort,
}

/// `internal_address_config`
#[derive(Debug, Clone)]
pub struct Internal {
    /// `cidr_ranges`, or else the private ranges of RFC 1918 and 4193.
    pub ranges: Vec<IpNet>,
    /// `unix_sockets`
    pub unix_sockets: bool,
}

/// `forward_proto_config`
#[derive(Debug, Clone)]
pub struct ForwardProto {
    /// `https_destination_ports`
    pub https: Vec<u32>,
    /// `http_destination_ports`
    pub http: Vec<u32>,
}

impl ForwardProto {
    /// The scheme that the destination port of the PROXY header means.
    pub fn scheme(&self, connection: &ConnectionInfo, tls: bool) -> &'static str {
        let port = connection.local.port().filter(|_| connection.local_restored).map(u32::from);
        match port {
            Some(port) if self.https.contains(&port) => "https",
            Some(port) if self.http.contains(&port) => "http",
            _ if tls => "https",
            _ => "http",
        }
    }
}

/// How the host's port is stripped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StripPort {
    /// Not.
    Keep,
    /// If it is the listener's.
    Matching,
    /// Always.
    Any,
}

/// How the client is found where `use_remote_address` is off.
fn origin(message: &pb::HttpConnectionManager) -> ConfigResult<Vec<Detector>> {
    let extensions = &message.original_ip_detection_extensions;
    if extensions.is_empty() {
        return Ok(vec![Detector::Hops { skip: message.xff_num_trusted_hops, append: false }]);
    }
    for (mixed, field) in [
        (flag(message.use_remote_address, false), "use_remote_address"),
        (message.xff_num_trusted_hops > 0, "xff_num_trusted_hops"),
    ] {
        if mixed {
            let reason = format!("Original IP detection extensions and {field} may not be mixed");
            return Err(ConfigError::new(reason).at("original_ip_detection_extensions"));
        }
    }
    Detector::list(extensions)
}

pub(super) fn early_mutations(
    extensions: &[core::TypedExtensionConfig],
) -> ConfigResult<Vec<HeaderMutations>> {
    use envoy_types::pb::envoy::extensions::http::early_header_mutation::header_mutation::v3::HeaderMutation;
    let one = |(i, extension): (usize, &core::TypedExtensionConfig)| {
        let any = extension.typed_config.clone().unwrap_or_default();
        let mutations = match crate::filter::message_name(&any) {
            "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation" => {
                crate::filter::decode::<HeaderMutation>(&any)
                    .and_then(|m| HeaderMutations::from_mutations(&m.mutations, "mutations"))
            }
            url => Err(ConfigError::unsupported(format!(
                "early header mutation extension '{}' ({url})",
                extension.name
            ))),
        };
        mutations.at_index("early_header_mutation_extensions", i)
    };
    extensions.iter().enumerate().map(one).collect()
}

fn internal(message: &hcm::InternalAddressConfig) -> ConfigResult<Internal> {
    const PRIVATE: [&str; 6] =
        ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.1/32", "fd00::/8", "::1/128"];
    let mut ranges = Vec::new();
    for (i, range) in message.cidr_ranges.iter().enumerate() {
        let net = format!("{}/{}", range.address_prefix, range.prefix_len.map_or(32, |n| n.value));
        let net: IpNet = net.parse().map_err(|_| {
            ConfigError::new(format!("invalid CIDR range {net:?}"))
                .index(i)
                .at("internal_address_config.cidr_ranges")
        })?;
        ranges.push(net);
    }
    if ranges.is_empty() {
        ranges.extend(PRIVATE.iter().filter_map(|net| net.parse::<IpNet>().ok()));
    }
    Ok(Internal { ranges, unix_sockets: message.unix_sockets })
}

pub(super) fn request_options(
    message: &pb::HttpConnectionManager,
    context: &FactoryContext,
) -> ConfigResult<RequestOptions> {
    use hcm::PathWithEscapedSlashesAction as Slashes;
    let node = &context.server.node;
    let transformation = message.scheme_header_transformation.as_ref();
    let scheme = transformation.and_then(|t| t.transformation.as_ref());
    let strip_any = matches!(message.strip_port_mode, Some(hcm::StripPortMode::StripAnyHostPort(true)));
    if strip_any && message.strip_matching_host_port {
        return Err(ConfigError::new(
            "only one of `strip_matching_host_port` or `strip_any_host_port` can be set",
        ));
    }
    if message.append_x_forwarded_port && !flag(message.use_remote_address, false) && message.skip_xff_append
    {
        return Err(ConfigError::new("skip_xff_append can only be used with use_remote_address"));
    }
    let request_id = request_id(message)?;
    Ok(RequestOptions {
        use_remote_address: flag(message.use_remote_address, false),
        xff_num_trusted_hops: message.xff_num_trusted_hops,
        origin: origin(message)?,
        skip_xff_append: message.skip_xff_append,
        internal: message.internal_address_config.as_ref().map(internal).transpose()?,
        append_x_forwarded_port: message.append_x_forwarded_port,
        scheme: match scheme {
            Some(core::scheme_header_transformation::Transformation::SchemeToOverwrite(s)) => {
                Some(if s.eq_ignore_ascii_case("https") { "https" } else { "http" })
            }
            None => None,
        },
        scheme_of_upstream: scheme.is_none() && transformation.is_some_and(|t| t.match_upstream),
        user_agent: flag(message.add_user_agent, false).then(|| node.cluster.clone()),
        node: node.id.clone(),
        generate_request_id: request_id.generate,
        preserve_external_request_id: message.preserve_external_request_id,
        pack_trace_reason: request_id.pack,
        client_cert: ClientCert::from_proto(message)?,
        forward_proto: message.forward_proto_config.as_ref().map(|config| ForwardProto {
            https: config.https_destination_ports.clone(),
            http: config.http_destination_ports.clone(),
        }),
        path: PathOptions {
            normalize: flag(message.normalize_path, false),
            merge_slashes: message.merge_slashes,
            escaped_slashes: match message.path_with_escaped_slashes_action() {
                Slashes::ImplementationSpecificDefault | Slashes::KeepUnchanged => EscapedSlashes::Keep,
                Slashes::RejectRequest => EscapedSlashes::Reject,
                Slashes::UnescapeAndRedirect => EscapedSlashes::Redirect,
                Slashes::UnescapeAndForward => EscapedSlashes::Forward,
            },
        },
        strip_trailing_host_dot: message.strip_trailing_host_dot,
        strip_port: if strip_any {
            StripPort::Any
        } else if message.strip_matching_host_port {
            StripPort::Matching
        } else {
            StripPort::Keep
        },
    })
}

/// What is done about `x-request-id`.
pub(super) struct RequestId {
    generate: bool,
    pub(super) pack: bool,
    pub(super) samples: bool,
}

pub(super) fn request_id(message: &pb::HttpConnectionManager) -> ConfigResult<RequestId> {
    use envoy_types::pb::envoy::extensions::request_id::uuid::v3::UuidRequestIdConfig;
    let (mut pack, mut samples) = (true, true);
    if let Some(any) = message.request_id_extension.as_ref().and_then(|e| e.typed_config.as_ref()) {
        if crate::filter::message_name(any) != "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" {
            return Err(ConfigError::unsupported(format!("request id type {:?}", any.type_url))
                .at("typed_config")
                .at("request_id_extension"));
        }
        let config: UuidRequestIdConfig = crate::filter::decode(any)?;
        pack = flag(config.pack_trace_reason, true);
        samples = flag(config.use_request_id_for_trace_sampling, true);
    }
    Ok(RequestId { generate: flag(message.generate_request_id, true), pack, samples })
}
