//! The table of endpoints.
//!
//! Paths, help texts and parameters are what `/help` of Envoy 1.40 prints; they are an interface (tools and the
//! home page read them), so they are kept to the letter.

use crate::{Admin, Query, Reply, clusters, config_dump, html, logging, simple, stats};

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
        simple::alloc_profiler,
    ),
    get("/certs", "print certs on machine", &[], simple::certs),
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
    get("/contention", "dump current Envoy mutex contention stats (if enabled)", &[], simple::contention),
    post(
        "/cpuprofiler",
        "enable/disable the CPU profiler",
        &[Param { name: "enable", help: "enables the CPU profiler", kind: Kind::OneOf(&["y", "n"]) }],
        simple::cpu_profiler,
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
        simple::drain_listeners,
    ),
    post("/healthcheck/fail", "cause the server to fail health checks", &[], simple::health_fail),
    post("/healthcheck/ok", "cause the server to pass health checks", &[], simple::health_ok),
    get("/heap_dump", "dump current Envoy heap (if supported)", &[], simple::heap_dump),
    post(
        "/heapprofiler",
        "enable/disable the heap profiler",
        &[Param { name: "enable", help: "enable/disable the heap profiler", kind: Kind::OneOf(&["y", "n"]) }],
        simple::heap_profiler,
    ),
    get("/help", "print out list of admin commands", &[], simple::help_reply),
    get(
        "/hot_restart_version",
        "print the hot restart compatibility version",
        &[],
        simple::hot_restart_version,
    ),
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
        simple::init_dump,
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
    get("/memory", "print current allocation/heap usage", &[], simple::memory),
    get("/memory/tcmalloc", "print TCMalloc stats", &[], simple::tcmalloc),
    get("/peak_heap_dump", "dump peak Envoy heap (if supported)", &[], simple::heap_dump),
    post("/quitquitquit", "exit the server", &[], simple::quit),
    get("/ready", "print server state, return 200 if LIVE, otherwise return 503", &[], simple::ready),
    post("/reopen_logs", "reopen access logs", &[], simple::reopen_logs),
    post("/reset_counters", "reset all counters to zero", &[], stats::reset),
    get("/runtime", "print runtime values", &[], simple::runtime),
    post(
        "/runtime_modify",
        "Adds or modifies runtime values as passed in query parameters. To delete a \
previously added key, use an empty string as the value. Note that deletion only \
applies to overrides added via this endpoint; values loaded from disk can be \
modified via override but not deleted. E.g. ?key1=value1&key2=value2...",
        &[],
        simple::runtime_modify,
    ),
    get("/server_info", "print server version/status information", &[], simple::server_info),
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
