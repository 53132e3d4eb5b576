//! `envoy.filters.http.dynamic_forward_proxy`: the host that a request names is resolved before the router looks for it
//! among those of a dynamic_forward_proxy cluster, and the request is answered here where it does not resolve.
//!
//! The cluster would resolve it too; with this filter that is told as `DF`, and `host_rewrite_literal` and
//! `host_rewrite_header` of a route name another host first. As in Envoy the filter has to do with clusters only whose
//! type bears Envoy's name, and a request whose host is known fails too while too many wait.

use std::net::SocketAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::dynamic_forward_proxy::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::clock;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderName};
use sampan_core::state_values::{AddressState, UPSTREAM_ADDRESS, dynamic_host, dynamic_port};
use sampan_core::stream_info::{ResponseFlag, StreamInfo};
use sampan_upstream::DnsCacheUser;
use sampan_upstream::config::DnsCacheConfig;
use sampan_upstream::dns_cache::name::{self, Authority};
use sampan_upstream::dns_cache::{Entry, Load};

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Outcome, RouteConfig, State, Step, decode,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.dynamic_forward_proxy.v3.PerRouteConfig";

struct DynamicForwardProxy {
    name: Box<str>,
    cache: DnsCacheUser,
    /// `save_upstream_address`
    saves_address: bool,
    /// `allow_dynamic_host_from_filter_state`
    from_state: bool,
}

/// Which host is meant, on a route.
enum Rewrite {
    Nothing,
    Literal(String),
    Header(HeaderName),
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    use pb::filter_config::ImplementationSpecifier as I;
    let message: pb::FilterConfig = decode(any)?;
    let cache = match &message.implementation_specifier {
        Some(I::DnsCacheConfig(cache)) => cache,
        Some(I::SubClusterConfig(_)) => {
            return Err(ConfigError::unsupported("sub_cluster_config").at("sub_cluster_config"));
        }
        // The one without a name, as in Envoy.
        None => &Default::default(),
    };
    let caches = &context.factory.server.dns_caches;
    let cache = DnsCacheConfig::from_proto(cache).and_then(|c| caches.get(&c)).at("dns_cache_config")?;
    Ok(HttpFilterKind::Filter(Arc::new(DynamicForwardProxy {
        name: context.filter_name.into(),
        cache,
        saves_address: message.save_upstream_address,
        from_state: message.allow_dynamic_host_from_filter_state,
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    use pb::per_route_config::HostRewriteSpecifier as R;
    let message: pb::PerRouteConfig = decode(any)?;
    let rewrite = match message.host_rewrite_specifier {
        Some(R::HostRewriteLiteral(host)) if !host.is_empty() => Rewrite::Literal(host),
        Some(R::HostRewriteHeader(name)) if !name.is_empty() => Rewrite::Header(HeaderName::new(&name)),
        _ => Rewrite::Nothing,
    };
    Ok(Arc::new(rewrite))
}

impl HttpFilter for DynamicForwardProxy {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        let Some(cluster) = stream.info.cluster.as_ref().and_then(|name| stream.worker.clusters.get(name))
        else {
            return Step::Continue;
        };
        let Some((_, of_cluster)) = cluster.cluster().forwards().filter(|(config, _)| config.with_filter)
        else {
            return Step::Continue;
        };
        self.rewrite(stream);
        let text = String::from_utf8_lossy(stream.request.get(HeaderId::AUTHORITY).unwrap_or_default());
        let default_port = cluster.cluster().default_port();
        let authority = Authority::parse(&text);
        let port = authority.port.unwrap_or(default_port);
        let (host, other_port) = if self.from_state {
            (dynamic_host(&stream.info), dynamic_port(&stream.info))
        } else {
            (None, None)
        };
        let (key, port) = match (&host, other_port) {
            (None, None) => (authority.key(&text, default_port), port),
            (Some(host), _) => {
                let port = other_port.unwrap_or(port);
                (name::key(host.into(), port), port)
            }
            (None, Some(port)) => (Authority { port: None, ..authority }.key(authority.host, port), port),
        };
        // Known and in use on this worker: nothing is to be locked.
        if Arc::ptr_eq(of_cluster, &self.cache)
            && self.cache.has_room()
            && let Some(host) = cluster.named(&key)
        {
            if let Some(address) = host.host.address().socket_addr() {
                self.save(&mut stream.info, address);
            }
            return Step::Continue;
        }
        let Some(waiting) = self.cache.wait() else {
            let reply = LocalReply::new(503, "dynamic_forward_proxy_pending_request_overflow");
            return Step::reply(reply.body("Dynamic forward proxy pending request overflow"));
        };
        if text.is_empty() {
            return Step::reply(LocalReply::new(400, "empty_host_header").body("Empty host header"));
        }
        match self.cache.load_key(key, port) {
            Load::Known(entry) => match self.finish(&mut stream.info, &entry) {
                None => Step::Continue,
                Some(reply) => Step::reply(reply),
            },
            Load::Overflow => {
                Step::reply(LocalReply::new(503, "dns_cache_overflow").body("DNS cache overflow"))
            }
            Load::Wait(entry) => Step::Wait(Box::pin(async move {
                entry.resolved().await;
                drop(waiting);
                clock::tick();
                match self.finish(&mut stream.info, &entry) {
                    None => Outcome::Continue,
                    Some(reply) => reply.outcome(),
                }
            })),
        }
    }
}

impl DynamicForwardProxy {
    /// Names the host that the route wants.
    fn rewrite(&self, stream: &mut Stream) {
        let Some(rewrite) = stream.route_config::<Rewrite>(&self.name) else { return };
        match &*rewrite {
            Rewrite::Nothing => {}
            Rewrite::Literal(host) => stream.request.set(HeaderId::AUTHORITY, host.as_str()),
            Rewrite::Header(name) => {
                // Of several the first: anybody may have added one.
                if let Some(host) = stream.request.get_name(name).map(<[u8]>::to_vec) {
                    stream.request.set(HeaderId::AUTHORITY, host);
                }
            }
        }
    }

    /// The name is resolved; a reply where it is not.
    fn finish(&self, info: &mut StreamInfo, entry: &Entry) -> Option<LocalReply> {
        let Some(address) = entry.address() else {
            let reply = LocalReply::new(503, entry.details().to_string()).body("DNS resolution failure");
            return Some(reply.flag(ResponseFlag::DnsResolutionFailed));
        };
        self.save(info, address);
        None
    }

    fn save(&self, info: &mut StreamInfo, address: SocketAddr) {
        if self.saves_address {
            info.set_state(UPSTREAM_ADDRESS, AddressState::object(address.ip()));
        }
    }
}
