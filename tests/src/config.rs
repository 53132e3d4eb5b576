//! Assembles a bootstrap from the parts that a case gives.
//!
//! A case writes only what it is about; the rest is the plainest configuration that serves a request: one listener `main`
//! with one filter chain with an HTTP connection manager, whose one route leads to the first upstream, and one STATIC
//! cluster for each upstream. Parts given as maps are laid over these defaults: maps merge, `null` deletes, everything
//! else replaces. The words understood are listed in `tests/README.md`; what is not one of them is an error.

use serde_json::{Map, Value, json};

use crate::case::Upstream;
use crate::error::{Result, case_error};

const HCM: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const UPSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const DOWNSTREAM_TLS: &str = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const FILE_LOG: &str = "envoy.extensions.access_loggers.file.v3.FileAccessLog";

/// Filters by their short names: full name and message.
const ALIASES: &[(&str, &str, &str)] = &[
    ("router", "envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router"),
    ("fault", "envoy.filters.http.fault", "envoy.extensions.filters.http.fault.v3.HTTPFault"),
    ("cors", "envoy.filters.http.cors", "envoy.extensions.filters.http.cors.v3.Cors"),
    ("cors_policy", "envoy.filters.http.cors", "envoy.extensions.filters.http.cors.v3.CorsPolicy"),
    (
        "header_mutation",
        "envoy.filters.http.header_mutation",
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
    ),
    (
        "header_mutation_route",
        "envoy.filters.http.header_mutation",
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute",
    ),
    ("buffer", "envoy.filters.http.buffer", "envoy.extensions.filters.http.buffer.v3.Buffer"),
    ("buffer_route", "envoy.filters.http.buffer", "envoy.extensions.filters.http.buffer.v3.BufferPerRoute"),
    (
        "local_ratelimit",
        "envoy.filters.http.local_ratelimit",
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
    ),
    ("on_demand", "envoy.filters.http.on_demand", "envoy.extensions.filters.http.on_demand.v3.OnDemand"),
    (
        "health_check",
        "envoy.filters.http.health_check",
        "envoy.extensions.filters.http.health_check.v3.HealthCheck",
    ),
    ("lua", "envoy.filters.http.lua", "envoy.extensions.filters.http.lua.v3.Lua"),
    ("lua_route", "envoy.filters.http.lua", "envoy.extensions.filters.http.lua.v3.LuaPerRoute"),
    ("ext_authz", "envoy.filters.http.ext_authz", "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"),
    (
        "ext_authz_route",
        "envoy.filters.http.ext_authz",
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
    ),
    (
        "ext_authz_network",
        "envoy.filters.network.ext_authz",
        "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz",
    ),
    (
        "jwt_authn",
        "envoy.filters.http.jwt_authn",
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
    ),
    (
        "jwt_authn_route",
        "envoy.filters.http.jwt_authn",
        "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig",
    ),
    ("rbac", "envoy.filters.http.rbac", "envoy.extensions.filters.http.rbac.v3.RBAC"),
    ("rbac_route", "envoy.filters.http.rbac", "envoy.extensions.filters.http.rbac.v3.RBACPerRoute"),
    ("rbac_network", "envoy.filters.network.rbac", "envoy.extensions.filters.network.rbac.v3.RBAC"),
    (
        "set_filter_state",
        "envoy.filters.http.set_filter_state",
        "envoy.extensions.filters.http.set_filter_state.v3.Config",
    ),
    (
        "set_filter_state_network",
        "envoy.filters.network.set_filter_state",
        "envoy.extensions.filters.network.set_filter_state.v3.Config",
    ),
    (
        "sni_cluster",
        "envoy.filters.network.sni_cluster",
        "envoy.extensions.filters.network.sni_cluster.v3.SniCluster",
    ),
    (
        "dynamic_forward_proxy",
        "envoy.filters.http.dynamic_forward_proxy",
        "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig",
    ),
    (
        "dynamic_forward_proxy_route",
        "envoy.filters.http.dynamic_forward_proxy",
        "envoy.extensions.filters.http.dynamic_forward_proxy.v3.PerRouteConfig",
    ),
    (
        "sni_dynamic_forward_proxy",
        "envoy.filters.network.sni_dynamic_forward_proxy",
        "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig",
    ),
    (
        "grpc_stats",
        "envoy.filters.http.grpc_stats",
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
    ),
    ("grpc_web", "envoy.filters.http.grpc_web", "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"),
    ("disabled", "disabled", "envoy.config.route.v3.FilterConfig"),
    (
        "tls_inspector",
        "envoy.filters.listener.tls_inspector",
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
    ),
    (
        "http_inspector",
        "envoy.filters.listener.http_inspector",
        "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector",
    ),
    (
        "proxy_protocol",
        "envoy.filters.listener.proxy_protocol",
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol",
    ),
];

type Tree = Map<String, Value>;

/// The whole bootstrap, with placeholders still in it.
pub fn assemble(parts: &Tree, upstreams: &[(&String, &Upstream)]) -> Result<Value> {
    let mut parts = parts.clone();
    if let Some(full) = parts.remove("full") {
        return qualified(full);
    }
    let with = parts.remove("with");
    let log = parts.remove("log");
    let names: Vec<&str> = upstreams.iter().map(|(name, _)| name.as_str()).collect();
    let first = names.first().copied().unwrap_or("none").to_owned();

    let mut clusters: Tree = names.iter().map(|n| ((*n).to_owned(), json!({}))).collect();
    for (name, given) in object(parts.remove("clusters"), "clusters")? {
        clusters.insert(name, given);
    }
    let clusters = clusters
        .into_iter()
        .filter(|(_, c)| !c.is_null())
        .map(|(name, given)| cluster(&name, given))
        .collect::<Result<Vec<_>>>()?;

    let base = Chains { first: &first, log: log.as_ref() };
    let mut listeners = Vec::new();
    let others = object(parts.remove("listeners"), "listeners")?;
    if others.is_empty() || !parts.is_empty() {
        listeners.push(base.listener("main", parts)?);
    }
    for (name, given) in others {
        listeners.push(base.listener(&name, object(Some(given), &name)?)?);
    }
    let mut bootstrap = json!({
        "admin": { "address": socket("127.0.0.1", "{{admin}}") },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    });
    if let Some(with) = with {
        merge(&mut bootstrap, with);
    }
    qualified(bootstrap)
}

/// A listener of its own, as those of `listeners`.
pub(crate) fn listener(name: &str, parts: Tree) -> Result<Value> {
    Chains { first: "none", log: None }.listener(name, parts)
}

/// What the chains of a case have in common.
struct Chains<'a> {
    first: &'a str,
    log: Option<&'a Value>,
}

impl Chains<'_> {
    fn listener(&self, name: &str, mut parts: Tree) -> Result<Value> {
        let filters = array(parts.remove("listener_filters"), "listener_filters")?;
        let with = parts.remove("listener");
        let chains = match parts.remove("chains") {
            Some(chains) => array(Some(chains), "chains")?
                .into_iter()
                .map(|chain| self.chain(object(Some(chain), "chain")?))
                .collect::<Result<Vec<_>>>()?,
            None => vec![self.chain(std::mem::take(&mut parts))?],
        };
        let default = match parts.remove("default_chain") {
            Some(chain) => Some(self.chain(object(Some(chain), "default_chain")?)?),
            None => None,
        };
        nothing_left(&parts, "listener")?;
        let mut listener = json!({
            "name": name,
            "address": socket("127.0.0.1", &format!("{{{{listener.{name}}}}}")),
            "filter_chains": chains,
        });
        if let Some(default) = default {
            listener["default_filter_chain"] = default;
        }
        if !filters.is_empty() {
            listener["listener_filters"] = filters.into_iter().map(alias).collect::<Result<Vec<_>>>()?.into();
        }
        if let Some(with) = with {
            merge(&mut listener, with);
        }
        Ok(listener)
    }

    fn chain(&self, mut parts: Tree) -> Result<Value> {
        let mut chain = json!({});
        if let Some(name) = parts.remove("name") {
            chain["name"] = name;
        }
        if let Some(matching) = parts.remove("match") {
            chain["filter_chain_match"] = matching;
        }
        if let Some(tls) = parts.remove("tls") {
            chain["transport_socket"] = downstream_tls(tls);
        }
        let with = parts.remove("chain");
        let before = array(parts.remove("network"), "network")?;
        let (name, mut message) = match parts.remove("tcp") {
            Some(given) => {
                let mut proxy = json!({ "@type": TCP_PROXY, "stat_prefix": "tcp" });
                if given.get("weighted_clusters").is_none() {
                    proxy["cluster"] = self.first.into();
                }
                merge(&mut proxy, given);
                ("envoy.filters.network.tcp_proxy", proxy)
            }
            None => ("envoy.filters.network.http_connection_manager", self.manager(&mut parts)?),
        };
        if let (Some(log), true) = (self.log, message.get("access_log").is_none()) {
            message["access_log"] = json!([access_log(log)]);
        }
        let mut filters = before.into_iter().map(alias).collect::<Result<Vec<_>>>()?;
        filters.push(json!({ "name": name, "typed_config": message }));
        chain["filters"] = filters.into();
        nothing_left(&parts, "filter chain")?;
        if let Some(with) = with {
            merge(&mut chain, with);
        }
        Ok(chain)
    }

    fn manager(&self, parts: &mut Tree) -> Result<Value> {
        let mut filters = array(parts.remove("filters"), "filters")?;
        filters.push(json!({ "router": parts.remove("router").unwrap_or(json!({})) }));
        let routes = match (parts.remove("reply"), parts.remove("routes")) {
            (Some(body), _) => json!([{
                "match": { "prefix": "/" },
                "direct_response": { "status": 200, "body": { "inline_string": body } },
            }]),
            (None, Some(routes)) => routes,
            (None, None) => json!([{ "match": { "prefix": "/" }, "route": { "cluster": self.first } }]),
        };
        let hosts = match parts.remove("vhosts") {
            Some(hosts) => hosts,
            None => {
                let mut host = json!({ "name": "all", "domains": ["*"], "routes": routes });
                if let Some(with) = parts.remove("vhost") {
                    merge(&mut host, with);
                }
                json!([host])
            }
        };
        let mut table = json!({ "name": "table", "virtual_hosts": hosts });
        if let Some(with) = parts.remove("table") {
            merge(&mut table, with);
        }
        let mut manager = json!({
            "@type": HCM,
            "stat_prefix": "main",
            "route_config": table,
            "http_filters": filters.into_iter().map(alias).collect::<Result<Vec<_>>>()?,
        });
        if let Some(with) = parts.remove("hcm") {
            merge(&mut manager, with);
        }
        Ok(manager)
    }
}

pub(crate) fn cluster(name: &str, given: Value) -> Result<Value> {
    let mut parts = object(Some(given), name)?;
    let endpoints = array(parts.remove("endpoints"), "endpoints")?;
    let endpoints =
        if endpoints.is_empty() { vec![format!("{{{{upstream.{name}}}}}").into()] } else { endpoints };
    let host = parts.remove("host").unwrap_or("127.0.0.1".into());
    let host = host.as_str().unwrap_or_default();
    let endpoints: Vec<Value> = endpoints.into_iter().map(|given| endpoint(host, given)).collect();
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] },
    });
    let http = match (parts.remove("http2"), parts.remove("http")) {
        (_, Some(options)) => Some(options),
        (Some(Value::Bool(true)), None) => {
            Some(json!({ "explicit_http_config": { "http2_protocol_options": {} } }))
        }
        _ => None,
    };
    if let Some(options) = http {
        let mut message = json!({ "@type": HTTP_OPTIONS });
        merge(&mut message, options);
        cluster["typed_extension_protocol_options"] = json!({ HTTP_OPTIONS: message });
    }
    if let Some(tls) = parts.remove("tls") {
        let mut context = json!({ "@type": UPSTREAM_TLS, "common_tls_context": {} });
        merge(&mut context, tls);
        cluster["transport_socket"] =
            json!({ "name": "envoy.transport_sockets.tls", "typed_config": context });
    }
    merge(&mut cluster, Value::Object(parts));
    Ok(cluster)
}

/// An endpoint from the name of an upstream, a placeholder, or a map laid over that of `to`.
pub(crate) fn endpoint(host: &str, given: Value) -> Value {
    let (to, with) = match given {
        Value::Object(mut map) => (map.remove("to").unwrap_or("none".into()), Value::Object(map)),
        to => (to, json!({})),
    };
    let to = to.as_str().unwrap_or_default();
    let port = if to.starts_with("{{") { to.to_owned() } else { format!("{{{{upstream.{to}}}}}") };
    let mut endpoint = json!({ "endpoint": { "address": socket(host, &port) } });
    merge(&mut endpoint, with);
    endpoint
}

/// TLS of a listener from the name of a certificate, or from that and a map laid over it.
fn downstream_tls(given: Value) -> Value {
    let (certificate, with) = match given {
        Value::String(name) => (name, json!({})),
        Value::Object(mut map) => {
            let name = map.remove("cert").and_then(|c| c.as_str().map(str::to_owned));
            (name.unwrap_or("server".into()), Value::Object(map))
        }
        _ => ("server".into(), json!({})),
    };
    let mut context = json!({
        "@type": DOWNSTREAM_TLS,
        "common_tls_context": { "tls_certificates": [{
            "certificate_chain": { "filename": format!("{{{{certs}}}}/{certificate}.pem") },
            "private_key": { "filename": format!("{{{{certs}}}}/{certificate}.key") },
        }] },
    });
    merge(&mut context, with);
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": context })
}

fn access_log(log: &Value) -> Value {
    let mut message = json!({ "@type": FILE_LOG, "path": "{{log}}" });
    match log {
        Value::String(format) => {
            message["log_format"] =
                json!({ "text_format_source": { "inline_string": format!("{format}\n") } });
        }
        Value::Object(map) if map.contains_key("json") => {
            message["log_format"] = json!({ "json_format": map["json"] });
        }
        // `log: {}` is Envoy's default format.
        _ => {}
    }
    json!({ "name": "envoy.access_loggers.file", "typed_config": message })
}

/// Expands `{fault: {…}}` to a filter with name and type; anything else stays.
fn alias(given: Value) -> Result<Value> {
    let Value::Object(map) = &given else { return case_error("a filter is no map") };
    if map.contains_key("name") {
        return Ok(given);
    }
    let Some((key, config)) = map.iter().next() else { return case_error("an empty filter") };
    let Some((_, name, message)) = ALIASES.iter().find(|(short, ..)| short == key) else {
        return case_error(format!("no filter is called {key}"));
    };
    let mut typed = json!({ "@type": message });
    merge(&mut typed, config.clone());
    Ok(json!({ "name": name, "typed_config": typed }))
}

fn socket(address: &str, port: &str) -> Value {
    json!({ "socket_address": { "address": address, "port_value": port } })
}

/// Writes short type names out: `@type: pkg.Message`, and `$fault: {…}` for a typed message of a known filter.
pub(crate) fn qualified(tree: Value) -> Result<Value> {
    Ok(match tree {
        Value::Object(map) => {
            let mut full = Tree::new();
            for (key, value) in map {
                let short = key.strip_prefix('$');
                match (key.as_str(), &value) {
                    ("@type", Value::String(name)) if !name.contains('/') => {
                        full.insert(key, format!("type.googleapis.com/{name}").into());
                    }
                    _ if short.is_some() => {
                        let Some((_, name, message)) = ALIASES.iter().find(|(s, ..)| Some(*s) == short)
                        else {
                            return case_error(format!("no filter is called {key}"));
                        };
                        let mut typed = json!({ "@type": format!("type.googleapis.com/{message}") });
                        merge(&mut typed, qualified(value)?);
                        full.insert((*name).to_owned(), typed);
                    }
                    _ => {
                        full.insert(key, qualified(value)?);
                    }
                }
            }
            full.into()
        }
        Value::Array(items) => items.into_iter().map(qualified).collect::<Result<Vec<_>>>()?.into(),
        other => other,
    })
}

/// Lays `over` over `base`.
pub fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    base.remove(&key);
                } else if let Some(existing) = base.get_mut(&key) {
                    merge(existing, value);
                } else {
                    base.insert(key, value);
                }
            }
        }
        (base, over) => *base = over,
    }
}

pub(crate) fn object(value: Option<Value>, what: &str) -> Result<Tree> {
    match value {
        None | Some(Value::Null) => Ok(Tree::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(_) => case_error(format!("{what} is no map")),
    }
}

pub(crate) fn array(value: Option<Value>, what: &str) -> Result<Vec<Value>> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => case_error(format!("{what} is no list")),
    }
}

pub(crate) fn nothing_left(parts: &Tree, what: &str) -> Result<()> {
    match parts.keys().next() {
        None => Ok(()),
        Some(key) => case_error(format!("{what}: unknown word {key}")),
    }
}
