//! The table of endpoints, and those that are a few lines each.
//!
//! Paths, help texts and parameters are what `/help` of Envoy 1.40 prints; they are an interface (tools and the
//! home page read them), so they are kept to the letter.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use prost::Name;
use sampan_config::PrintOptions;
use sampan_config::schema::Message;
use serde_json::{Value, json};

use crate::source::DrainRequest;
use crate::{Admin, JSON, Query, Reply, clusters, config_dump, html, logging, stats};

/// An endpoint.
pub(crate) struct Endpoint {
    pub(crate) path: &'static str,
    pub(crate) help: &'static str,
    /// It changes something and wants POST.
    pub(crate) post: bool,
    pub(crate) params: &'static [Param],
    pub(crate) handler: fn(&Admin, &Query) -> Reply,
}

/// A parameter, as `/help` and the home page show it.
pub(crate) struct Param {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) kind: Kind,
}

/// What a parameter takes.
pub(crate) enum Kind {
    /// It is there or not.
    Flag,
    Text,
    OneOf(&'static [&'static str]),
}

type Handler = fn(&Admin, &Query) -> Reply;

const fn get(path: &'static str, help: &'static str, params: &'static [Param], handler: Handler) -> Endpoint {
    Endpoint { path, help, post: false, params, handler }
}

const fn post(
    path: &'static str,
    help: &'static str,
    params: &'static [Param],
    handler: Handler,
) -> Endpoint {
    Endpoint { path, help, post: true, params, handler }
}

/// All endpoints, sorted by path.
pub(crate) static ENDPOINTS: &[Endpoint] = &[
    get("/", "Admin home page", &[], html::home),
    post(
        "/allocprofiler",
        "enable/disable the allocation profiler (if supported)",
        &[Param {
            name: "enable",
            help: "enable/disable the allocation profiler",
            kind: Kind::OneOf(&["y", "n"]),
        }],
        alloc_profiler,
    ),
    get("/certs", "print certs on machine", &[], certs),
    get(
        "/clusters",
        "upstream cluster status",
        &[Param {
            name: "filter",
            help: "Regular expression (Google re2) for filtering clusters by name",
            kind: Kind::Text,
        }],
        clusters::clusters,
    ),
    get(
        "/config_dump",
        "dump current Envoy configs",
        &[
            Param { name: "resource", help: "The resource to dump", kind: Kind::Text },
            Param {
                name: "mask",
                help: "The mask to apply. When both resource and mask are specified, the mask is \
applied to every element in the desired repeated field so that only a subset of \
fields are returned. The mask is parsed as a Protobuf::FieldMask",
                kind: Kind::Text,
            },
            Param {
                name: "name_regex",
                help: "Dump only the currently loaded configurations whose names match the specified \
regex. Can be used with both resource and mask query parameters.",
                kind: Kind::Text,
            },
            Param {
                name: "include_eds",
                help: "Dump currently loaded configuration including EDS. See the response definition \
for more information",
                kind: Kind::Flag,
            },
        ],
        config_dump::config_dump,
    ),
    get("/contention", "dump current Envoy mutex contention stats (if enabled)", &[], contention),
    post(
        "/cpuprofiler",
        "enable/disable the CPU profiler",
        &[Param { name: "enable", help: "enables the CPU profiler", kind: Kind::OneOf(&["y", "n"]) }],
        cpu_profiler,
    ),
    post(
        "/drain_listeners",
        "drain listeners",
        &[
            Param {
                name: "graceful",
                help: "When draining listeners, enter a graceful drain period prior to closing \
listeners. This behaviour and duration is configurable via server options or CLI",
                kind: Kind::Flag,
            },
            Param {
                name: "skip_exit",
                help: "When draining listeners, drain the connections but never stop the listeners. The \
graceful parameter has no effect when this is set, since the drain period only \
delays stopping the listeners",
                kind: Kind::Flag,
            },
            Param {
                name: "inboundonly",
                help: "Drains all inbound listeners. traffic_direction field in \
envoy_v3_api_msg_config.listener.v3.Listener is used to determine whether a \
listener is inbound or outbound.",
                kind: Kind::Flag,
            },
        ],
        drain_listeners,
    ),
    post("/healthcheck/fail", "cause the server to fail health checks", &[], health_fail),
    post("/healthcheck/ok", "cause the server to pass health checks", &[], health_ok),
    get("/heap_dump", "dump current Envoy heap (if supported)", &[], heap_dump),
    post(
        "/heapprofiler",
        "enable/disable the heap profiler",
        &[Param { name: "enable", help: "enable/disable the heap profiler", kind: Kind::OneOf(&["y", "n"]) }],
        heap_profiler,
    ),
    get("/help", "print out list of admin commands", &[], help_reply),
    get("/hot_restart_version", "print the hot restart compatibility version", &[], hot_restart_version),
    get(
        "/init_dump",
        "dump current Envoy init manager information (experimental)",
        &[Param {
            name: "mask",
            help: "The desired component to dump unready targets. The mask is parsed as a \
Protobuf::FieldMask. For example, get the unready targets of all listeners with \
/init_dump?mask=listener`",
            kind: Kind::Text,
        }],
        init_dump,
    ),
    get(
        "/listeners",
        "print listener info",
        &[Param { name: "format", help: "File format to use", kind: Kind::OneOf(&["text", "json"]) }],
        clusters::listeners,
    ),
    post(
        "/logging",
        "query/change logging levels",
        &[
            Param {
                name: "paths",
                help: "Change multiple logging levels by setting to \
<logger_name1>:<desired_level1>,<logger_name2>:<desired_level2>. If fine grain \
logging is enabled, use __FILE__ or a glob experision as the logger name. For \
example, source/common*:warning",
                kind: Kind::Text,
            },
            Param {
                name: "group",
                help: "Change given logger group to desired level, set to \
<logger_group_name>:<desired_level>. logger_group_name must be a logger name.",
                kind: Kind::Text,
            },
            Param {
                name: "level",
                help: "desired logging level, this will change all loggers's level",
                kind: Kind::OneOf(&["", "trace", "debug", "info", "warning", "error", "critical", "off"]),
            },
        ],
        logging::logging,
    ),
    get("/memory", "print current allocation/heap usage", &[], memory),
    get("/memory/tcmalloc", "print TCMalloc stats", &[], tcmalloc),
    get("/peak_heap_dump", "dump peak Envoy heap (if supported)", &[], heap_dump),
    post("/quitquitquit", "exit the server", &[], quit),
    get("/ready", "print server state, return 200 if LIVE, otherwise return 503", &[], ready),
    post("/reopen_logs", "reopen access logs", &[], reopen_logs),
    post("/reset_counters", "reset all counters to zero", &[], stats::reset),
    get("/runtime", "print runtime values", &[], runtime),
    post(
        "/runtime_modify",
        "Adds or modifies runtime values as passed in query parameters. To delete a \
previously added key, use an empty string as the value. Note that deletion only \
applies to overrides added via this endpoint; values loaded from disk can be \
modified via override but not deleted. E.g. ?key1=value1&key2=value2...",
        &[],
        runtime_modify,
    ),
    get("/server_info", "print server version/status information", &[], server_info),
    get(
        "/stats",
        "print server stats",
        &[
            Param {
                name: "usedonly",
                help: "Only include stats that have been written by system since restart",
                kind: Kind::Flag,
            },
            Param {
                name: "filter",
                help: "Regular expression (Google re2) for filtering stats",
                kind: Kind::Text,
            },
            Param { name: "invert_filter", help: "Invert the filter regex", kind: Kind::Flag },
            Param {
                name: "format",
                help: "Format to use",
                kind: Kind::OneOf(&["html", "active-html", "text", "json"]),
            },
            Param {
                name: "type",
                help: "Stat types to include.",
                kind: Kind::OneOf(&["All", "Counters", "Histograms", "Gauges", "TextReadouts"]),
            },
            Param {
                name: "histogram_buckets",
                help: "Histogram bucket display mode",
                kind: Kind::OneOf(&["cumulative", "disjoint", "detailed", "summary"]),
            },
        ],
        stats::stats,
    ),
    get(
        "/stats/prometheus",
        "print server stats in prometheus format",
        &[
            Param {
                name: "usedonly",
                help: "Only include stats that have been written by system since restart",
                kind: Kind::Flag,
            },
            Param {
                name: "text_readouts",
                help: "Render text_readouts as new gaugues with value 0 (increases Prometheus data \
size)",
                kind: Kind::Flag,
            },
            Param {
                name: "filter",
                help: "Regular expression (Google re2) for filtering stats",
                kind: Kind::Text,
            },
            Param { name: "invert_filter", help: "Invert the filter regex", kind: Kind::Flag },
            Param {
                name: "histogram_buckets",
                help: "Histogram bucket display mode",
                kind: Kind::OneOf(&["cumulative", "summary"]),
            },
        ],
        stats::prometheus,
    ),
    get("/stats/recentlookups", "Show recent stat-name lookups", &[], stats::lookups),
    post(
        "/stats/recentlookups/clear",
        "clear list of stat-name lookups and counter",
        &[],
        stats::lookups_clear,
    ),
    post(
        "/stats/recentlookups/disable",
        "disable recording of reset stat-name lookup names",
        &[],
        stats::lookups_disable,
    ),
    post(
        "/stats/recentlookups/enable",
        "enable recording of reset stat-name lookup names",
        &[],
        stats::lookups_enable,
    ),
];

pub(crate) fn find(path: &str) -> Option<&'static Endpoint> {
    ENDPOINTS.iter().find(|endpoint| endpoint.path == path)
}

/// What `/help` prints.
pub(crate) fn help() -> String {
    let mut out = String::from("admin commands are:\n");
    for endpoint in ENDPOINTS {
        let method = if endpoint.post { " (POST)" } else { "" };
        out.push_str(&format!("  {}{method}: {}\n", endpoint.path, endpoint.help));
        for param in endpoint.params {
            out.push_str(&format!("      {}: {}", param.name, param.help));
            if let Kind::OneOf(choices) = &param.kind {
                out.push_str(&format!("; One of ({})", choices.join(", ")));
            }
            out.push('\n');
        }
    }
    out
}

/// A message as JSON; with `defaults`, fields that have their default value too.
pub(crate) fn json_of<T: prost::Message + Name>(message: &T, defaults: bool) -> Reply {
    let options = PrintOptions { pretty: true, redact: true, defaults };
    let bytes = message.encode_to_vec();
    match Message::find(&T::full_name()).map(|m| sampan_config::to_json(m, &bytes, options)) {
        Some(Ok(json)) => Reply::json(json),
        Some(Err(error)) => Reply::error(500, error.to_string()),
        None => Reply::error(500, format!("unknown message {}", T::full_name())),
    }
}

/// A message as an `Any`.
pub(crate) fn packed<T: prost::Message + Name>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec() }
}

/// JSON indented by one space, with the characters escaped that protobuf's printer escapes.
pub(crate) fn pretty(value: &Value) -> String {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    // A `Value` serialises, and a vector takes everything.
    let _ = serde::Serialize::serialize(value, &mut serializer);
    out.push(b'\n');
    // `<` and `>` stand only inside strings.
    String::from_utf8_lossy(&out).replace('<', "\\u003c").replace('>', "\\u003e")
}

fn certs(admin: &Admin, _: &Query) -> Reply {
    json_of(&admin.source.certs(), true)
}

fn memory(admin: &Admin, _: &Query) -> Reply {
    json_of(&admin.source.memory(), true)
}

fn init_dump(admin: &Admin, query: &Query) -> Reply {
    let mut dump = admin.source.init_dump();
    if query.get("mask").is_some_and(|mask| mask != "listener") {
        dump.unready_targets_dumps.clear();
    }
    json_of(&dump, false)
}

fn server_info(admin: &Admin, _: &Query) -> Reply {
    let mut info = admin.source.server_info();
    info.set_state(admin.source.state());
    info.hot_restart_version = admin.source.hot_restart_version();
    json_of(&info, true)
}

fn ready(admin: &Admin, _: &Query) -> Reply {
    let state = admin.source.state();
    let status = if state == pb::server_info::State::Live { 200 } else { 503 };
    Reply { status, ..Reply::text(format!("{}\n", state.as_str_name())) }
}

fn hot_restart_version(admin: &Admin, _: &Query) -> Reply {
    Reply::text(admin.source.hot_restart_version())
}

fn help_reply(_: &Admin, _: &Query) -> Reply {
    Reply::text(help())
}

fn contention(_: &Admin, _: &Query) -> Reply {
    Reply::text(
        "Mutex contention tracing is not enabled. To enable, run Envoy with flag --enable-mutex-tracing.",
    )
}

/// Profilers that do not exist: asked to start they say so, asked to stop there is nothing to do.
fn profiler(query: &Query, name: &str) -> Reply {
    match query.get("enable") {
        Some("y") => Reply::error(501, format!("The current build does not support {name}")),
        Some("n") => Reply::ok(),
        _ => Reply::error(400, "?enable=<y|n>\n"),
    }
}

fn cpu_profiler(_: &Admin, query: &Query) -> Reply {
    profiler(query, "cpu profiler")
}

fn alloc_profiler(_: &Admin, query: &Query) -> Reply {
    profiler(query, "allocation profiler")
}

fn heap_profiler(_: &Admin, _: &Query) -> Reply {
    Reply::error(501, "The current build does not support heap profiler")
}

fn heap_dump(_: &Admin, _: &Query) -> Reply {
    Reply::error(501, "The current build does not support heap dump")
}

fn tcmalloc(_: &Admin, _: &Query) -> Reply {
    Reply::error(501, "The current build does not use TCMalloc")
}

fn health_fail(admin: &Admin, _: &Query) -> Reply {
    admin.source.fail_health_check(true);
    Reply::ok()
}

fn health_ok(admin: &Admin, _: &Query) -> Reply {
    admin.source.fail_health_check(false);
    Reply::ok()
}

fn drain_listeners(admin: &Admin, query: &Query) -> Reply {
    admin.source.drain_listeners(DrainRequest {
        // As in Envoy 1.40 one alone means both.
        graceful: query.has("graceful") || query.has("skip_exit"),
        inbound_only: query.has("inboundonly"),
        skip_exit: query.has("skip_exit"),
    });
    Reply::ok()
}

fn reopen_logs(admin: &Admin, _: &Query) -> Reply {
    admin.source.reopen_logs();
    Reply::ok()
}

fn quit(admin: &Admin, _: &Query) -> Reply {
    admin.source.quit();
    Reply::ok()
}

fn runtime(admin: &Admin, _: &Query) -> Reply {
    let snapshot = admin.runtime.snapshot();
    let layers = snapshot.layers();
    let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for key in layers.iter().flat_map(|layer| layer.values.keys()) {
        let texts = layers.iter().map(|l| l.values.get(key).map_or("", |v| v.text()));
        keys.entry(key).or_insert_with(|| texts.collect());
    }
    let entries = keys.into_iter().map(|(key, texts)| {
        let last = texts.iter().rev().find(|t| !t.is_empty()).copied().unwrap_or_default();
        (key.to_owned(), json!({ "final_value": last, "layer_values": texts }))
    });
    let entries: serde_json::Map<String, Value> = entries.collect();
    let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
    let body = pretty(&json!({ "entries": entries, "layers": names }));
    Reply { status: 200, content_type: JSON, body }
}

fn runtime_modify(admin: &Admin, query: &Query) -> Reply {
    let values = query.first_values();
    if values.is_empty() {
        return Reply::error(
            400,
            "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n       or send the parameters as form \
             values\nuse an empty value to remove a previously added override",
        );
    }
    match admin.runtime.modify(values) {
        Ok(()) => Reply::ok(),
        Err(error) => Reply::error(503, error.to_string()),
    }
}
