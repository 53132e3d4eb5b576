//! The endpoints that are a few lines each.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::admin::v3 as pb;
use serde_json::{Value, json};

use crate::endpoints::help;
use crate::json::{json_of, pretty};
use crate::source::DrainRequest;
use crate::{Admin, JSON, Query, Reply};

pub(crate) fn certs(admin: &Admin, _: &Query) -> Reply {
    json_of(&admin.source.certs(), true)
}

pub(crate) fn memory(admin: &Admin, _: &Query) -> Reply {
    json_of(&admin.source.memory(), true)
}

pub(crate) fn init_dump(admin: &Admin, query: &Query) -> Reply {
    let mut dump = admin.source.init_dump();
    if query.get("mask").is_some_and(|mask| mask != "listener") {
        dump.unready_targets_dumps.clear();
    }
    json_of(&dump, false)
}

pub(crate) fn server_info(admin: &Admin, _: &Query) -> Reply {
    let mut info = admin.source.server_info();
    info.set_state(admin.source.state());
    info.hot_restart_version = admin.source.hot_restart_version();
    json_of(&info, true)
}

pub(crate) fn ready(admin: &Admin, _: &Query) -> Reply {
    let state = admin.source.state();
    let status = if state == pb::server_info::State::Live { 200 } else { 503 };
    Reply { status, ..Reply::text(format!("{}\n", state.as_str_name())) }
}

pub(crate) fn hot_restart_version(admin: &Admin, _: &Query) -> Reply {
    Reply::text(admin.source.hot_restart_version())
}

pub(crate) fn help_reply(_: &Admin, _: &Query) -> Reply {
    Reply::text(help())
}

pub(crate) fn contention(_: &Admin, _: &Query) -> Reply {
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

pub(crate) fn cpu_profiler(_: &Admin, query: &Query) -> Reply {
    profiler(query, "cpu profiler")
}

pub(crate) fn alloc_profiler(_: &Admin, query: &Query) -> Reply {
    profiler(query, "allocation profiler")
}

pub(crate) fn heap_profiler(_: &Admin, _: &Query) -> Reply {
    Reply::error(501, "The current build does not support heap profiler")
}

pub(crate) fn heap_dump(_: &Admin, _: &Query) -> Reply {
    Reply::error(501, "The current build does not support heap dump")
}

pub(crate) fn tcmalloc(_: &Admin, _: &Query) -> Reply {
    Reply::error(501, "The current build does not use TCMalloc")
}

pub(crate) fn health_fail(admin: &Admin, _: &Query) -> Reply {
    admin.source.fail_health_check(true);
    Reply::ok()
}

pub(crate) fn health_ok(admin: &Admin, _: &Query) -> Reply {
    admin.source.fail_health_check(false);
    Reply::ok()
}

pub(crate) fn drain_listeners(admin: &Admin, query: &Query) -> Reply {
    admin.source.drain_listeners(DrainRequest {
        // As in Envoy 1.40 one alone means both.
        graceful: query.has("graceful") || query.has("skip_exit"),
        inbound_only: query.has("inboundonly"),
        skip_exit: query.has("skip_exit"),
    });
    Reply::ok()
}

pub(crate) fn reopen_logs(admin: &Admin, _: &Query) -> Reply {
    admin.source.reopen_logs();
    Reply::ok()
}

pub(crate) fn quit(admin: &Admin, _: &Query) -> Reply {
    admin.source.quit();
    Reply::ok()
}

pub(crate) fn runtime(admin: &Admin, _: &Query) -> Reply {
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

pub(crate) fn runtime_modify(admin: &Admin, query: &Query) -> Reply {
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
