//! Tags: the variable parts of a name, taken out when a stat is shown.
//!
//! `cluster.foo.upstream_rq_404` becomes `cluster.upstream_rq` with `envoy.response_code=404` and
//! `envoy.cluster_name=foo`. The built-in rules are those of Envoy's `source/common/config/well_known_names.cc`;
//! `stats_config.stats_tags` adds to them. Every rule looks at the whole name, whatever others have taken out of
//! it. Order, which is the order of the labels: rules that may match any name as they were added, then those
//! bound to the name's first part as they were added.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::metrics::v3::{TagSpecifier, tag_specifier::TagValue};
use regex::Regex;

use crate::error::{ConfigError, ConfigResult};

const VALUE: &str = r"[^.]+";
const ADDRESS: &str = r"(?:(?:\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[[a-fA-F_\d]+\])_\d+)";
const LISTENER_OR_CLUSTER: &str = r"(?:listener|cluster)\..*?";

/// A rule by regular expression: tag, expression, text that must occur, value that does not count.
type Pattern = (&'static str, &'static str, &'static str, &'static str);

/// In the expressions, `<V>` is one part of a name, `<A>` an address, `<L>` a listener or cluster with its name.
const PATTERNS: &[Pattern] = &[
    ("envoy.response_code", r"_rq(_(\d{3}))$", "_rq_", ""),
    ("envoy.response_code_class", r"_rq_((\d))xx$", "_rq_", ""),
    (
        "envoy.dynamodb_partition_id",
        r"^http\.<V>\.dynamodb\.table\.<V>\.capacity\.<V>(\.__partition_id=(\w{7}))$",
        ".dynamodb.table.",
        "",
    ),
    (
        "envoy.dynamodb_operation",
        r"^http\.<V>\.dynamodb.(?:operation|table\.<V>\.capacity)(\.(<V>))(?:\.|$)",
        ".dynamodb.",
        "",
    ),
    ("envoy.dynamodb_table", r"^http\.<V>\.dynamodb.(?:table|error)\.((<V>)\.)", ".dynamodb.", ""),
    ("envoy.ssl_cipher", r"^listener\..*?\.ssl\.ciphers(\.([\w-]+))$", ".ssl.ciphers.", ""),
    ("envoy.ssl_curve", r"^<L>\.ssl\.curves(\.([\w-]+))$", ".ssl.curves.", ""),
    ("envoy.ssl_sigalg", r"^<L>\.ssl\.sigalgs(\.([\w-]+))$", ".ssl.sigalgs.", ""),
    ("envoy.ssl_version", r"^<L>\.ssl\.versions(\.(TLSv\d\.\d))$", ".ssl.versions.", ""),
    ("cipher_suite", r"^cluster\.<V>\.ssl\.ciphers(\.([\w-]+))$", ".ssl.ciphers.", ""),
    ("envoy.http_conn_manager_prefix", r"^listener\..*?\.http\.((<V>)\.)", ".http.", ""),
    (
        "envoy.worker_id",
        r"^(?:listener\.(?:<A>|<V>)|server|listener_manager|thread_local_cluster_manager)\.worker_((\d+)\.)",
        "",
        "",
    ),
    ("envoy.listener_address", r"^listener\.((<A>|<V>)\.)", "", "admin"),
    ("envoy.rds_route_config", r"^http\.<V>\.rds\.(([\w\-./]+)\.)\w+?$", ".rds.", ""),
    ("envoy.scoped_rds_config", r"^http\.<V>\.scoped_rds\.(([\w\-.]+)\.)\w+?$", ".scoped_rds.", ""),
    (
        "envoy.rbac_policy_name",
        r"^http\.<V>\.rbac\.(?:<V>\.)?policy\.((<V>)\.)(allowed|shadow_allowed|denied|shadow_denied)$",
        "",
        "",
    ),
    ("envoy.rbac_http_prefix", r"^http\.<V>\.rbac\.((<V>)\.).*?", "", "policy"),
    ("envoy.proxy_protocol_prefix", r"^proxy_proto\.((<V>)\.).+$", "", "versions"),
    ("envoy.proxy_protocol_version", r"^proxy_proto\.((?:<V>\.)?versions\.v(\d)\.)\w+$", "", ""),
    ("envoy.tls_certificate", r"^<L>\.ssl\.certificate\.((<V>)\.).*$", ".ssl.certificate", ""),
];

/// A rule by parts: `$` is the value, `*` any one part, `**` any number of them.
const TOKENS: &[(&str, &str)] = &[
    ("envoy.mongo_callsite", "mongo.*.collection.*.callsite.$.query.**"),
    ("envoy.mongo_collection", "mongo.*.collection.$.**.query.*"),
    ("envoy.mongo_cmd", "mongo.*.cmd.$.**"),
    ("envoy.grpc_bridge_method", "cluster.*.grpc.*.$.**"),
    ("envoy.http_user_agent", "http.*.user_agent.$.**"),
    ("envoy.virtual_cluster", "vhost.*.vcluster.$.**"),
    ("envoy.fault_downstream_cluster", "http.*.fault.$.**"),
    ("envoy.grpc_bridge_service", "cluster.*.grpc.$.**"),
    ("envoy.tcp_prefix", "tcp.$.**"),
    ("envoy.udp_prefix", "udp.$.**"),
    ("envoy.clientssl_prefix", "auth.clientssl.$.**"),
    ("envoy.ratelimit_prefix", "ratelimit.$.**"),
    ("envoy.cluster_name", "cluster.$.**"),
    ("envoy.ext_authz_prefix", "cluster.*.ext_authz.$.**"),
    ("envoy.ext_authz_prefix", "http.*.ext_authz.$.**"),
    ("envoy.http_conn_manager_prefix", "http.$.**"),
    ("envoy.virtual_host", "vhost.$.**"),
    ("envoy.mongo_prefix", "mongo.$.**"),
    ("envoy.route", "vhost.*.route.$.**"),
    ("envoy.thrift_prefix", "thrift.$.**"),
    ("envoy.redis_prefix", "redis.$.**"),
    ("envoy.local_http_ratelimit_prefix", "$.http_local_rate_limit.**"),
    ("envoy.local_network_ratelimit_prefix", "local_rate_limit.$.**"),
    ("envoy.local_listener_ratelimit_prefix", "listener_local_ratelimit.$.**"),
    ("envoy.dns_filter_prefix", "dns_filter.$.**"),
    ("envoy.connection_limit_prefix", "connection_limit.$.**"),
    ("envoy.rbac_prefix", "$.rbac.**"),
    ("envoy.google_grpc_client_prefix", "grpc.$.**"),
];

/// A name without its tags, and the tags.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extracted {
    /// The name that all stats of a kind share.
    pub name: String,
    /// Tag and value, in Envoy's order.
    pub tags: Vec<(String, String)>,
}

/// The rules in force.
#[derive(Debug)]
pub struct Tags {
    any: Vec<Rule>,
    by_first: HashMap<String, Vec<Rule>>,
}

#[derive(Debug)]
struct Rule {
    tag: String,
    how: How,
}

#[derive(Debug)]
enum How {
    Pattern { regex: Regex, contains: &'static str, except: &'static str },
    Tokens(Vec<&'static str>),
    Fixed(String),
}

impl Default for Tags {
    fn default() -> Self {
        // The built-in expressions compile, as the tests show; without them there would be no tags.
        Self::new(true, &[]).unwrap_or(Self { any: Vec::new(), by_first: HashMap::new() })
    }
}

impl Tags {
    /// The built-in rules, if wanted, and the configured ones.
    pub fn new(defaults: bool, specifiers: &[TagSpecifier]) -> ConfigResult<Self> {
        let mut tags = Self { any: Vec::new(), by_first: HashMap::new() };
        if defaults {
            tags.add_built_in(|_| true)?;
        }
        for (i, specifier) in specifiers.iter().enumerate() {
            tags.add(specifier).map_err(|e| e.index(i).at("stats_tags"))?;
        }
        Ok(tags)
    }

    fn add(&mut self, specifier: &TagSpecifier) -> ConfigResult<()> {
        let name = &specifier.tag_name;
        match &specifier.tag_value {
            Some(TagValue::FixedValue(value)) => self.push("", name, How::Fixed(value.clone())),
            Some(TagValue::Regex(regex)) if !regex.is_empty() => {
                if name.is_empty() {
                    return Err(ConfigError::new("tag_name cannot be empty").at("tag_name"));
                }
                self.push_regex(name, regex, "", "").map_err(|e| e.at("regex"))?;
            }
            _ => {
                if !self.add_built_in(|tag| tag == name)? {
                    return Err(ConfigError::new(format!(
                        "No regex specified for tag specifier and no default regex for name: '{name}'"
                    )));
                }
            }
        }
        Ok(())
    }

    fn add_built_in(&mut self, wanted: impl Fn(&str) -> bool) -> ConfigResult<bool> {
        let mut found = false;
        for (tag, regex, contains, except) in PATTERNS.iter().filter(|p| wanted(p.0)) {
            let regex =
                regex.replace("<V>", VALUE).replace("<A>", ADDRESS).replace("<L>", LISTENER_OR_CLUSTER);
            self.push_regex(tag, &regex, contains, except)?;
            found = true;
        }
        for (tag, tokens) in TOKENS.iter().filter(|t| wanted(t.0)) {
            let first = tokens.split('.').next().unwrap_or_default();
            let first = if first.starts_with(['$', '*']) { "" } else { first };
            self.push(first, tag, How::Tokens(tokens.split('.').collect()));
            found = true;
        }
        Ok(found)
    }

    fn push_regex(
        &mut self,
        tag: &str,
        regex: &str,
        contains: &'static str,
        except: &'static str,
    ) -> ConfigResult<()> {
        let compiled =
            Regex::new(regex).map_err(|e| ConfigError::new(format!("Invalid regex '{regex}': {e}")))?;
        self.push(first_part(regex), tag, How::Pattern { regex: compiled, contains, except });
        Ok(())
    }

    fn push(&mut self, first: &str, tag: &str, how: How) {
        let rule = Rule { tag: tag.into(), how };
        if first.is_empty() {
            self.any.push(rule);
        } else {
            self.by_first.entry(first.into()).or_default().push(rule);
        }
    }

    /// Takes the tags out of a name. Of two rules for one tag the first that matches counts.
    pub fn extract(&self, name: &str) -> Extracted {
        let bound = name.split_once('.').and_then(|(first, _)| self.by_first.get(first));
        let parts: Vec<&str> = name.split('.').collect();
        let mut tags: Vec<(String, String)> = Vec::new();
        let mut cut: Vec<(usize, usize)> = Vec::new();
        for rule in self.any.iter().chain(bound.into_iter().flatten()) {
            if tags.iter().any(|(tag, _)| *tag == rule.tag) {
                continue;
            }
            if let Some((value, range)) = rule.how.apply(name, &parts) {
                tags.push((rule.tag.clone(), value));
                cut.extend(range);
            }
        }
        Extracted { name: without(name, cut), tags }
    }
}

/// The literal first part of an expression such as `^cluster\.`, which decides whose names it can match.
fn first_part(regex: &str) -> &str {
    let Some(rest) = regex.strip_prefix('^') else { return "" };
    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    let (first, after) = rest.split_at(end);
    if after.starts_with(r"\.") && after.len() > 1 || after.starts_with(r"(?=\.)") || after == "$" {
        first
    } else {
        ""
    }
}

impl How {
    /// The value, and what of the name goes with it.
    fn apply(&self, name: &str, parts: &[&str]) -> Option<(String, Option<(usize, usize)>)> {
        match self {
            Self::Fixed(value) => Some((value.clone(), None)),
            Self::Pattern { regex, contains, except } => {
                if !name.contains(contains) {
                    return None;
                }
                let captures = regex.captures(name)?;
                let removed = captures.get(1).filter(|m| !m.is_empty())?;
                let value = captures.get(2).filter(|m| !m.is_empty()).unwrap_or(removed).as_str();
                if !except.is_empty() && *except == value {
                    return None;
                }
                Some((value.into(), Some((removed.start(), removed.end()))))
            }
            Self::Tokens(pattern) => {
                let at = search(pattern, parts)?;
                let start: usize = parts[..at].iter().map(|p| p.len() + 1).sum();
                let end = start + parts[at].len();
                let last = at + 1 == parts.len();
                let range = if last { (start.saturating_sub(1), end) } else { (start, end + 1) };
                Some((parts[at].into(), Some(range)))
            }
        }
    }
}

/// Where in `parts` the `$` of the pattern is, if the whole pattern matches.
fn search(pattern: &[&str], parts: &[&str]) -> Option<usize> {
    fn matches(pattern: &[&str], parts: &[&str], offset: usize, at: &mut Option<usize>) -> bool {
        match (pattern.split_first(), parts.split_first()) {
            (None, None) => true,
            // At the end of a pattern, `**` takes one part or more.
            (Some((&"**", [])), Some(_)) => true,
            (Some((&"**", rest)), Some(_)) => {
                (0..parts.len()).any(|skip| matches(rest, &parts[skip..], offset + skip, at))
            }
            (Some((want, rest)), Some((part, others))) => {
                if *want == "$" {
                    *at = Some(offset);
                } else if *want != "*" && want != part {
                    return false;
                }
                matches(rest, others, offset + 1, at)
            }
            _ => false,
        }
    }
    let mut at = None;
    matches(pattern, parts, 0, &mut at).then_some(at).flatten()
}

/// The name without the ranges, which may overlap.
fn without(name: &str, mut cut: Vec<(usize, usize)>) -> String {
    cut.sort_unstable();
    let (mut out, mut position) = (String::with_capacity(name.len()), 0);
    for (start, end) in cut {
        if start > position {
            out.push_str(&name[position..start]);
        }
        position = position.max(end);
    }
    out.push_str(&name[position..]);
    out
}
