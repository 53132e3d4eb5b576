//! `istio.alpn`: what TLS to the upstream offers by ALPN, chosen by the HTTP protocol that is spoken with it. So a peer's
//! proxy knows Istio's traffic (`istio-http/1.1`) before it reads any of it.
//!
//! The list is left in the filter state, where the router finds it; connections that offer different protocols are not
//! mixed. A cluster whose metadata say `istio.alpn_override: "false"` keeps what its TLS context offers.
//!
//! Envoy's own binary does not have the filter; the source is istio/proxy's `alpn_filter.cc`.

use std::sync::Arc;

use envoy_types::pb::google::protobuf::{Any, value::Kind};
use sampan_config::istio::{self, Alpn};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::matcher::metadata_value;
use sampan_core::state_values::{APPLICATION_PROTOCOLS, ListState, TextKind};
use sampan_core::stream_info::{Metadata, Protocol};
use sampan_upstream::config::HttpProtocol;

use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, State, Step, decode};
use crate::stream::Stream;

pub(super) const TYPE: &str = istio::ALPN;

/// By `HTTP10`, `HTTP11`, `HTTP2`; empty where there is none.
struct Overrides([Arc<[Vec<u8>]>; 3]);

pub(super) fn make(any: &Any, _: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    Ok(HttpFilterKind::Filter(Arc::new(Overrides::from_proto(&decode(any)?)?)))
}

impl Overrides {
    fn from_proto(message: &Alpn) -> ConfigResult<Self> {
        let mut lists: [Option<Arc<[Vec<u8>]>>; 3] = Default::default();
        for (i, one) in message.alpn_override.iter().enumerate() {
            let slot = usize::try_from(one.upstream_protocol).ok().and_then(|at| lists.get_mut(at));
            let slot = slot
                .ok_or_else(|| ConfigError::new("value must be one of the defined enum values"))
                .at("upstream_protocol")
                .at_index("alpn_override", i)?;
            // The first for a protocol counts.
            slot.get_or_insert_with(|| {
                one.alpn_override.iter().map(|name| name.as_bytes().to_vec()).collect()
            });
        }
        Ok(Self(lists.map(Option::unwrap_or_default)))
    }

    fn of(&self, protocol: HttpProtocol, downstream: Option<Protocol>) -> &Arc<[Vec<u8>]> {
        let [http10, http11, http2] = &self.0;
        match (protocol, downstream) {
            (HttpProtocol::Http1, _) => http11,
            // Of the two that a host may choose from, HTTP/2 comes first.
            (HttpProtocol::Http2 | HttpProtocol::Auto, _) => http2,
            (HttpProtocol::Downstream, Some(Protocol::Http10)) => http10,
            (HttpProtocol::Downstream, Some(Protocol::Http2 | Protocol::Http3)) => http2,
            (HttpProtocol::Downstream, _) => http11,
        }
    }
}

fn is_off(metadata: Option<&Metadata>) -> bool {
    let said = metadata_value(metadata, "istio", &["alpn_override"]).and_then(|value| value.kind.as_ref());
    matches!(said, Some(Kind::StringValue(text)) if text == "false")
}

impl HttpFilter for Overrides {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        let cluster = stream.info.cluster.as_deref().and_then(|name| stream.worker.clusters.get(name));
        let Some(cluster) = cluster else { return Step::Continue };
        let config = cluster.cluster().config();
        if is_off(config.metadata.as_deref()) {
            return Step::Continue;
        }
        let list = self.of(config.http.protocol, stream.info.protocol);
        if !list.is_empty() {
            let object = ListState::object(TextKind::ApplicationProtocols, list.clone());
            stream.info.set_state(APPLICATION_PROTOCOLS, object);
        }
        Step::Continue
    }
}

#[cfg(test)]
mod tests {
    use sampan_config::istio::AlpnOverride;

    use super::*;

    fn one(upstream_protocol: i32, names: &[&str]) -> AlpnOverride {
        let alpn_override = names.iter().map(|name| (*name).to_owned()).collect();
        AlpnOverride { upstream_protocol, alpn_override }
    }

    #[test]
    fn the_protocol_spoken_upstream_picks_the_list() {
        let message = Alpn {
            alpn_override: vec![
                one(0, &["istio-http/1.0"]),
                one(1, &["istio-http/1.1", "istio"]),
                one(2, &["istio-h2"]),
                one(2, &["later"]),
            ],
        };
        let overrides = Overrides::from_proto(&message).unwrap();
        for (protocol, downstream, first) in [
            (HttpProtocol::Http1, Some(Protocol::Http2), "istio-http/1.1"),
            (HttpProtocol::Http2, Some(Protocol::Http11), "istio-h2"),
            (HttpProtocol::Auto, Some(Protocol::Http11), "istio-h2"),
            (HttpProtocol::Downstream, Some(Protocol::Http10), "istio-http/1.0"),
            (HttpProtocol::Downstream, Some(Protocol::Http11), "istio-http/1.1"),
            (HttpProtocol::Downstream, Some(Protocol::Http2), "istio-h2"),
        ] {
            assert_eq!(overrides.of(protocol, downstream)[0], first.as_bytes(), "{protocol:?}");
        }
        let unknown = Alpn { alpn_override: vec![one(3, &[])] };
        let error = Overrides::from_proto(&unknown).err().unwrap();
        assert_eq!(error.path(), "alpn_override[0].upstream_protocol");
    }
}
