//! The Prometheus text format, with Envoy's names, label order and number formats.
//!
//! Counters, then gauges, then texts (as gauges of value 0), then histograms. Groups are sorted by the name
//! without tags, the lines of a group by the full name; names compare part by part, not byte by byte.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::histogram::QUANTILES;
use super::number::{general, shortest};
use super::render::{BucketMode, HistogramRow, Params, Rows};
use super::tags::{Extracted, Tags};
use super::{StatsModel, Store};

/// A name whose parts are compared one by one.
#[derive(PartialEq, Eq)]
struct Name(String);

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.split('.').cmp(other.0.split('.'))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Lines of one metric: full name to labels and what is to be written.
type Groups<T> = BTreeMap<Name, BTreeMap<Name, (String, T)>>;

/// Where labels come from: the rules, and what was given with the stats.
struct Labels<'a> {
    rules: &'a Tags,
    given: HashMap<String, Extracted>,
}

fn group<T>(tags: &mut Labels<'_>, rows: impl Iterator<Item = (String, T)>) -> Groups<T> {
    let mut groups = Groups::new();
    for (name, value) in rows {
        let extracted = tags.given.remove(&name).unwrap_or_else(|| tags.rules.extract(&name));
        let labels = extracted.tags.iter().map(|(tag, value)| label(tag, value));
        let labels = labels.collect::<Vec<_>>().join(",");
        groups.entry(Name(extracted.name)).or_default().insert(Name(name), (labels, value));
    }
    groups
}

fn label(tag: &str, value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('\n', r"\n").replace('"', "\\\"");
    format!("{}=\"{value}\"", sanitise(tag))
}

fn sanitise(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// Names of a custom namespace (Istio's filters register theirs) stand for themselves.
fn metric_name(name: &str) -> String {
    match name.strip_prefix("istiocustom.") {
        Some(own) => sanitise(own),
        None => format!("envoy_{}", sanitise(name)),
    }
}

fn write<T>(out: &mut String, groups: Groups<T>, kind: &str, each: impl Fn(&mut String, &str, &str, &T)) {
    for (name, lines) in groups {
        let name = metric_name(&name.0);
        let _ = writeln!(out, "# TYPE {name} {kind}");
        for (labels, value) in lines.values() {
            each(out, &name, labels, value);
        }
    }
}

/// The whole output. The caller refuses the bucket modes that make no sense here (detailed, disjoint).
pub fn prometheus(store: &Store, params: &Params) -> String {
    let (rows, model) = (Rows::collect(store, params), store.model());
    let tags = &mut Labels { rules: model.tags(), given: rows.tagged };
    let mut out = String::new();
    let (counters, gauges): (Vec<_>, Vec<_>) =
        rows.numbers.into_iter().partition(|(_, (_, counter))| *counter);
    let number = |out: &mut String, name: &str, labels: &str, value: &(u64, bool)| {
        let _ = writeln!(out, "{name}{{{labels}}} {}", value.0);
    };
    write(&mut out, group(tags, counters.into_iter()), "counter", number);
    write(&mut out, group(tags, gauges.into_iter()), "gauge", number);
    if params.text_readouts {
        write(&mut out, group(tags, rows.texts.into_iter()), "gauge", |out, name, labels, text| {
            let comma = if labels.is_empty() { "" } else { "," };
            let _ = writeln!(out, "{name}{{{labels}{comma}{}}} 0", label("text_value", text));
        });
    }
    let histograms = group(tags, rows.histograms.into_iter().map(|row| (row.name.clone(), row)));
    if params.buckets == BucketMode::Summary {
        write(&mut out, histograms, "summary", summary);
    } else {
        write(&mut out, histograms, "histogram", |out, name, labels, row| {
            buckets(&model, out, name, labels, row);
        });
    }
    out
}

fn buckets(model: &StatsModel, out: &mut String, name: &str, labels: &str, row: &HistogramRow) {
    let (statistics, comma) = (row.cumulative(), if labels.is_empty() { "" } else { "," });
    let bounds = model.buckets(&row.name);
    for (bound, count) in bounds.iter().zip(statistics.at_or_below(bounds)) {
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{}\"}} {count}", general(*bound, 32));
    }
    let count = statistics.count();
    let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
    let _ = writeln!(out, "{name}_sum{{{labels}}} {}", general(statistics.sum(), 32));
    let _ = writeln!(out, "{name}_count{{{labels}}} {count}");
}

fn summary(out: &mut String, name: &str, labels: &str, row: &HistogramRow) {
    let (statistics, comma) = (row.interval(), if labels.is_empty() { "" } else { "," });
    for (quantile, value) in QUANTILES.iter().zip(statistics.quantiles()) {
        let (quantile, value) = (shortest(*quantile), general(value, 32));
        let _ = writeln!(out, "{name}{{{labels}{comma}quantile=\"{quantile}\"}} {value}");
    }
    let _ = writeln!(out, "{name}_sum{{{labels}}} {}", general(statistics.sum(), 32));
    let _ = writeln!(out, "{name}_count{{{labels}}} {}", statistics.count());
}
