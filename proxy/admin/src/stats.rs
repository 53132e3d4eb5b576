//! `/stats` and `/stats/prometheus`.

use regex::Regex;
use sampan_core::stats::{self, BucketMode, Params, StatType};

use crate::{Admin, HTML, Query, Reply, html};

/// The usage line of `histogram_buckets`.
const BUCKETS: &str =
    "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n";

struct Parsed {
    params: Params,
    native: bool,
}

fn parse(query: &Query) -> Result<Parsed, Reply> {
    let bad = |body: &str| Reply::error(400, body);
    let mut params = Params {
        used_only: query.has("usedonly"),
        text_readouts: query.has("text_readouts"),
        invert_filter: query.has("invert_filter"),
        ..Params::default()
    };
    if let Some(filter) = query.get("filter") {
        let regex = Regex::new(filter).map_err(|e| {
            let reason = e.to_string();
            let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
            Reply::error(400, format!("Invalid re2 regex: {reason}: {filter}"))
        })?;
        params.filter = Some(regex);
    }
    let mut native = false;
    params.buckets = match query.get("histogram_buckets") {
        None => BucketMode::Unset,
        Some("cumulative") => BucketMode::Cumulative,
        Some("disjoint") => BucketMode::Disjoint,
        Some("detailed") => BucketMode::Detailed,
        Some("summary" | "none") => BucketMode::Summary,
        Some("prometheusnative") => {
            native = true;
            BucketMode::Unset
        }
        Some(_) => return Err(bad(BUCKETS)),
    };
    params.stat_type = match query.get("type") {
        None | Some("All") => StatType::All,
        Some("Counters") => StatType::Counters,
        Some("Gauges") => StatType::Gauges,
        Some("Histograms") => StatType::Histograms,
        Some("TextReadouts") => StatType::TextReadouts,
        Some(_) => return Err(bad("invalid &type= param")),
    };
    match query.get("hidden") {
        None | Some("include" | "exclude") => {}
        Some("only") => params.hidden_only = true,
        Some(_) => return Err(bad("usage: /stats?hidden=(include|only|exclude)\n\n")),
    }
    Ok(Parsed { params, native })
}

fn refresh(admin: &Admin, params: &Params) {
    admin.source.refresh_stats();
    if !params.used_only {
        admin.source.materialise_stats();
    }
}

pub(crate) fn stats(admin: &Admin, query: &Query) -> Reply {
    let parsed = match parse(query) {
        Ok(parsed) => parsed,
        Err(reply) => return reply,
    };
    let format = query.get("format").unwrap_or("text");
    if parsed.native && format != "prometheus" {
        return Reply::error(400, "Invalid histogram_buckets type for non prometheus stats type");
    }
    let params = &parsed.params;
    refresh(admin, params);
    match format {
        "text" => Reply::text(stats::text(&admin.stats, params)),
        "json" => Reply::json(stats::json(&admin.stats, params)),
        "prometheus" => prometheus_of(admin, &parsed),
        "html" | "active-html" => {
            let body =
                html::page(&format!("<pre>{}</pre>", html::escape(&stats::text(&admin.stats, params))));
            Reply { status: 200, content_type: HTML, body }
        }
        _ => Reply::error(400, "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n"),
    }
}

pub(crate) fn prometheus(admin: &Admin, query: &Query) -> Reply {
    match parse(query) {
        Ok(parsed) => {
            refresh(admin, &parsed.params);
            prometheus_of(admin, &parsed)
        }
        Err(reply) => reply,
    }
}

fn prometheus_of(admin: &Admin, parsed: &Parsed) -> Reply {
    if parsed.native {
        let reason = "unsupported prometheusnative histogram type when not using protobuf exposition format";
        return Reply::error(400, reason);
    }
    if matches!(parsed.params.buckets, BucketMode::Detailed | BucketMode::Disjoint) {
        return Reply::error(400, "unsupported prometheus histogram bucket mode");
    }
    Reply::text(stats::prometheus(&admin.stats, &parsed.params))
}

pub(crate) fn reset(admin: &Admin, _: &Query) -> Reply {
    admin.stats.reset_counters();
    Reply::ok()
}

/// Sampan keeps no symbol table whose look-ups could be counted: the list is always empty.
pub(crate) fn lookups(admin: &Admin, _: &Query) -> Reply {
    if admin.lookups.get() {
        return Reply::text("   Count Lookup\n\ntotal: 0\n");
    }
    Reply::text("Lookup tracking is not enabled. Use /stats/recentlookups/enable to enable.\n\ntotal: 0\n")
}

pub(crate) fn lookups_clear(_: &Admin, _: &Query) -> Reply {
    Reply::ok()
}

pub(crate) fn lookups_enable(admin: &Admin, _: &Query) -> Reply {
    admin.lookups.set(true);
    Reply::ok()
}

pub(crate) fn lookups_disable(admin: &Admin, _: &Query) -> Reply {
    admin.lookups.set(false);
    Reply::ok()
}
