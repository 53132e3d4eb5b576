//! `ORIGINAL_DST`: the host is where the client wanted to go.
//!
//! Asked in this order, the first answer counts: the filter state `envoy.network.transport_socket.original_dst_address`,
//! the metadata of `metadata_key`, the header of `use_http_header`, the restored local address of the client's
//! connection. `upstream_port_override` then replaces the port.

use std::net::SocketAddr;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster as Message, cluster as pb};
use envoy_types::pb::envoy::r#type::metadata::v3::{MetadataKey, metadata_key::path_segment::Segment};
use envoy_types::pb::google::protobuf::{Value, value::Kind};
use sampan_core::address::{literal_and_port, with_port};
use sampan_core::error::AtField;
use sampan_core::header::{HeaderMap, HeaderName};
use sampan_core::stats::Counter;
use sampan_core::stream_info::StreamInfo;
use sampan_core::{ConfigError, ConfigResult};

use super::duration;

/// What other filters leave for this kind of cluster.
const FILTER_STATE: &str = "envoy.network.transport_socket.original_dst_address";

/// Where the destination is looked for, and how long a host without traffic stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginalDstConfig {
    header: Option<HeaderName>,
    metadata: Option<(Box<str>, Vec<Box<str>>)>,
    port: Option<u16>,
    /// `cleanup_interval`, 5 s where absent.
    pub cleanup_interval: Duration,
}

impl OriginalDstConfig {
    pub(super) fn from_cluster(message: &Message) -> ConfigResult<Self> {
        if message.lb_policy() != pb::LbPolicy::ClusterProvided {
            return Err(ConfigError::new(format!(
                "cluster: LB policy {} is not valid for Cluster type ORIGINAL_DST. Only 'CLUSTER_PROVIDED' is \
                 allowed with cluster type 'ORIGINAL_DST'",
                message.lb_policy().as_str_name()
            ))
            .at("lb_policy"));
        }
        if message.load_assignment.is_some() {
            return Err(ConfigError::new("ORIGINAL_DST clusters must have no load assignment configured")
                .at("load_assignment"));
        }
        let interval = duration(message.cleanup_interval.as_ref()).at("cleanup_interval")?;
        let default = pb::OriginalDstLbConfig::default();
        let config = match &message.lb_config {
            Some(pb::LbConfig::OriginalDstLbConfig(config)) => config,
            _ => &default,
        };
        Ok(Self {
            cleanup_interval: interval.unwrap_or(Duration::from_secs(5)),
            ..Self::from_proto(config).at("original_dst_lb_config")?
        })
    }

    fn from_proto(m: &pb::OriginalDstLbConfig) -> ConfigResult<Self> {
        let name = m.http_header_name.as_str();
        if !m.use_http_header && !name.is_empty() {
            return Err(ConfigError::new(format!(
                "ORIGINAL_DST cluster: invalid config http_header_name={name} and use_http_header is false. Set \
                 use_http_header to true if http_header_name is desired."
            ))
            .at("http_header_name"));
        }
        let name = if name.is_empty() { "x-envoy-original-dst-host" } else { name };
        let port = m.upstream_port_override.as_ref().map(|p| u16::try_from(p.value)).transpose();
        let too_high = |_| ConfigError::new("value must be less than or equal to 65535");
        Ok(Self {
            header: m.use_http_header.then(|| HeaderName::new(name)),
            metadata: m.metadata_key.as_ref().map(path).transpose().at("metadata_key")?,
            port: port.map_err(too_high).at("upstream_port_override")?,
            cleanup_interval: Duration::ZERO,
        })
    }

    /// Where a request or, without headers, a connection goes; none: nobody knows. `invalid` counts words that are no
    /// address.
    pub fn destination(
        &self,
        headers: Option<&HeaderMap>,
        info: &StreamInfo,
        invalid: &Counter,
    ) -> Option<SocketAddr> {
        let parsed = |text: &str| {
            let address = literal_and_port(text);
            if address.is_none() {
                invalid.inc();
            }
            address
        };
        let named = info.state(FILTER_STATE);
        let address = named
            .and_then(|object| literal_and_port(&object.plain()?))
            .or_else(|| parsed(self.in_metadata(info)?))
            .or_else(|| {
                let value = headers?.get_name(self.header.as_ref()?)?;
                parsed(&String::from_utf8_lossy(value))
            })
            .or_else(|| {
                let connection = &info.connection;
                connection.local_restored.then(|| connection.local.socket_addr()).flatten()
            })?;
        Some(self.port.map_or(address, |port| with_port(address, port)))
    }

    fn in_metadata<'a>(&self, info: &'a StreamInfo) -> Option<&'a str> {
        let (filter, path) = self.metadata.as_ref()?;
        let mut keys = path.iter();
        let mut value: &Value =
            info.dynamic_metadata.as_ref()?.get(&**filter)?.fields.get(&**keys.next()?)?;
        for key in keys {
            let Some(Kind::StructValue(inner)) = &value.kind else { return None };
            value = inner.fields.get(&**key)?;
        }
        // Of a list the first counts.
        if let Some(Kind::ListValue(list)) = &value.kind {
            value = list.values.first()?;
        }
        match &value.kind {
            Some(Kind::StringValue(text)) => Some(text),
            _ => None,
        }
    }
}

fn path(m: &MetadataKey) -> ConfigResult<(Box<str>, Vec<Box<str>>)> {
    let keys = m.path.iter().enumerate().map(|(i, segment)| match &segment.segment {
        Some(Segment::Key(key)) => Ok(key.as_str().into()),
        Some(Segment::Index(_)) => Err(ConfigError::unsupported("index")).at_index("path", i),
        None => Err(ConfigError::missing("segment")).at_index("path", i),
    });
    Ok((m.key.as_str().into(), keys.collect::<ConfigResult<_>>()?))
}
