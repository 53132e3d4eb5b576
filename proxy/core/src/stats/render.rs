//! `/stats` as text and as JSON, in Envoy's shapes.
//!
//! Texts come first, then counters and gauges together, then histograms; each group sorted by name.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use regex::Regex;

use super::histogram::{Merged, QUANTILES, Statistics};
use super::number::{general, shortest, streamed};
use super::tags::Extracted;
use super::{Entry, Kind, ScopeInner, Store, Unit, lock, slab};

/// What of the stats is wanted.
#[derive(Debug, Default, Clone)]
pub struct Params {
    /// Only stats that were ever written.
    pub used_only: bool,
    /// Only names in which this occurs.
    pub filter: Option<Regex>,
    /// The names in which it does not occur instead.
    pub invert_filter: bool,
    /// Only stats of one type.
    pub stat_type: StatType,
    /// How histograms are shown.
    pub buckets: BucketMode,
    /// Text readouts in the Prometheus output too.
    pub text_readouts: bool,
    /// `hidden=only`: Sampan hides no stat, so there is nothing to show.
    pub hidden_only: bool,
}

/// `type=`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum StatType {
    /// Everything.
    #[default]
    All,
    /// Counters.
    Counters,
    /// Gauges.
    Gauges,
    /// Histograms.
    Histograms,
    /// Texts.
    TextReadouts,
}

/// `histogram_buckets=`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum BucketMode {
    /// Not given: quantiles, but buckets in the Prometheus output.
    #[default]
    Unset,
    /// Quantiles.
    Summary,
    /// Values up to each bound.
    Cumulative,
    /// Values between the bounds.
    Disjoint,
    /// Every bin.
    Detailed,
}

/// One histogram as the last flush left it.
pub(super) struct HistogramRow {
    pub(super) name: String,
    pub(super) unit: Unit,
    pub(super) merged: Merged,
}

/// The stats that pass the parameters; equal names are one row.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) texts: BTreeMap<String, String>,
    /// Value and whether it is a counter.
    pub(super) numbers: BTreeMap<String, (u64, bool)>,
    pub(super) histograms: Vec<HistogramRow>,
    /// Those whose tags were given, by full name.
    pub(super) tagged: HashMap<String, Extracted>,
}

impl Rows {
    pub(super) fn collect(store: &Store, params: &Params) -> Self {
        let mut rows = Self::default();
        if params.hidden_only {
            return rows;
        }
        let model = store.model();
        let all = params.stat_type == StatType::All;
        let wanted = |kind| match kind {
            Kind::Counter => all || params.stat_type == StatType::Counters,
            Kind::Gauge => all || params.stat_type == StatType::Gauges,
            Kind::Text => all || params.stat_type == StatType::TextReadouts,
            Kind::Histogram(_) => all || params.stat_type == StatType::Histograms,
        };
        store.visit(wanted, |scope, stats, names| {
            for entry in stats {
                // Values first: most stats of a large mesh were never used and need no name then.
                let (value, used) = match entry.kind {
                    Kind::Counter | Kind::Gauge => slab::lock().value(entry.id),
                    Kind::Text => (0, scope.text(entry.id).is_some()),
                    Kind::Histogram(_) => (0, lock(&store.0.merged).contains_key(&entry.id)),
                };
                if params.used_only && !used {
                    continue;
                }
                let name = scope.full_name(*entry, names);
                let wanted = params.filter.as_ref().is_none_or(|f| f.is_match(&name) != params.invert_filter);
                if wanted && !model.rejects(&name) {
                    if let Some(given) = &scope.tags {
                        let leaf = names.get(entry.symbol as usize).map_or("", |n| n);
                        let tags = given.tags.iter().map(|(t, v)| (t.to_string(), v.to_string())).collect();
                        let extracted = Extracted { name: [&*scope.prefix, leaf].concat(), tags };
                        rows.tagged.insert(name.clone(), extracted);
                    }
                    rows.add(store, scope, *entry, name, value);
                }
            }
        });
        rows.histograms.sort_by(|a, b| a.name.cmp(&b.name));
        rows
    }

    fn add(&mut self, store: &Store, scope: &ScopeInner, entry: Entry, name: String, value: u64) {
        match entry.kind {
            Kind::Text => {
                self.texts.insert(name, scope.text(entry.id).unwrap_or_default().to_string());
            }
            Kind::Counter | Kind::Gauge => {
                let row = self.numbers.entry(name).or_insert((0, entry.kind == Kind::Counter));
                row.0 = row.0.wrapping_add(value);
            }
            Kind::Histogram(unit) => {
                let merged = lock(&store.0.merged).get(&entry.id).cloned().unwrap_or_default();
                self.histograms.push(HistogramRow { name, unit, merged });
            }
        }
    }
}

impl HistogramRow {
    pub(super) fn cumulative(&self) -> Statistics<'_> {
        self.merged.cumulative(self.unit)
    }

    pub(super) fn interval(&self) -> Statistics<'_> {
        self.merged.interval(self.unit)
    }

    fn used(&self) -> bool {
        self.cumulative().count() > 0
    }

    /// `P0(interval,cumulative) P25(…) …`
    fn quantile_summary(&self) -> String {
        let (interval, cumulative) = (self.interval().quantiles(), self.cumulative().quantiles());
        let parts = QUANTILES
            .iter()
            .zip(interval.iter().zip(&cumulative))
            .map(|(q, (i, c))| format!("P{}({},{})", general(q * 100.0, 6), shortest(*i), shortest(*c)));
        parts.collect::<Vec<_>>().join(" ")
    }

    /// Interval and cumulative counts for each bound.
    fn bucket_counts(&self, bounds: &[f64], disjoint: bool) -> Vec<(u64, u64)> {
        let step = |counts: Vec<u64>| {
            let before = std::iter::once(0).chain(counts.clone());
            if disjoint { counts.iter().zip(before).map(|(n, b)| n - b).collect() } else { counts }
        };
        let interval: Vec<u64> = step(self.interval().at_or_below(bounds));
        let cumulative: Vec<u64> = step(self.cumulative().at_or_below(bounds));
        interval.into_iter().zip(cumulative).collect()
    }
}

fn detail_text(statistics: Statistics<'_>) -> String {
    let bins = statistics.detail().map(|(l, w, n)| format!("{},{}:{n}", general(l, 15), general(w, 15)));
    bins.collect::<Vec<_>>().join(", ")
}

/// `name: value` lines.
pub fn text(store: &Store, params: &Params) -> String {
    let (rows, model) = (Rows::collect(store, params), store.model());
    let mut out = String::new();
    // Writing to a string cannot fail.
    for (name, text) in &rows.texts {
        let _ = writeln!(out, "{name}: \"{text}\"");
    }
    for (name, (value, _)) in &rows.numbers {
        let _ = writeln!(out, "{name}: {value}");
    }
    for row in &rows.histograms {
        let name = &row.name;
        let _ = match params.buckets {
            _ if !row.used() => writeln!(out, "{name}: No recorded values"),
            BucketMode::Unset | BucketMode::Summary => writeln!(out, "{name}: {}", row.quantile_summary()),
            BucketMode::Cumulative | BucketMode::Disjoint => {
                let bounds = model.buckets(name);
                let counts = row.bucket_counts(bounds, params.buckets == BucketMode::Disjoint);
                let buckets = bounds.iter().zip(counts);
                let buckets: Vec<_> =
                    buckets.map(|(b, (i, c))| format!("B{}({i},{c})", general(*b, 6))).collect();
                writeln!(out, "{name}: {}", buckets.join(" "))
            }
            BucketMode::Detailed => writeln!(
                out,
                "{name}:\n  totals={}\n  intervals={}\n  summary={}",
                detail_text(row.cumulative()),
                detail_text(row.interval()),
                row.quantile_summary()
            ),
        };
    }
    out
}

/// `{"stats":[{"name":…,"value":…},…,{"histograms":…}]}`.
pub fn json(store: &Store, params: &Params) -> String {
    let (rows, model) = (Rows::collect(store, params), store.model());
    let texts = rows.texts.iter().map(|(n, t)| format!("{{\"name\":{},\"value\":{}}}", quote(n), quote(t)));
    let numbers = rows.numbers.iter().map(|(n, (v, _))| format!("{{\"name\":{},\"value\":{v}}}", quote(n)));
    let mut items: Vec<String> = texts.chain(numbers).collect();
    if !rows.histograms.is_empty() {
        let each = rows.histograms.iter().map(|row| match params.buckets {
            BucketMode::Unset | BucketMode::Summary => {
                format!("{{\"name\":{},\"values\":{}}}", quote(&row.name), percentiles(row))
            }
            BucketMode::Detailed => format!(
                "{{\"name\":{},\"totals\":{},\"intervals\":{},\"percentiles\":{}}}",
                quote(&row.name),
                detail_json(row.cumulative()),
                detail_json(row.interval()),
                percentiles(row)
            ),
            BucketMode::Cumulative | BucketMode::Disjoint => {
                let bounds = model.buckets(&row.name);
                let counts = row.bucket_counts(bounds, params.buckets == BucketMode::Disjoint);
                let buckets = bounds.iter().zip(counts).map(|(bound, (i, c))| {
                    format!("{{\"upper_bound\":{},\"interval\":{i},\"cumulative\":{c}}}", streamed(*bound))
                });
                let buckets: Vec<_> = buckets.collect();
                format!("{{\"name\":{},\"buckets\":[{}]}}", quote(&row.name), buckets.join(","))
            }
        });
        let list = format!("[{}]", each.collect::<Vec<_>>().join(","));
        let supported: Vec<_> = QUANTILES.iter().map(|q| streamed(q * 100.0)).collect();
        let supported = supported.join(",");
        items.push(match params.buckets {
            BucketMode::Unset | BucketMode::Summary => format!(
                "{{\"histograms\":{{\"supported_quantiles\":[{supported}],\"computed_quantiles\":{list}}}}}"
            ),
            BucketMode::Detailed => {
                format!("{{\"histograms\":{{\"supported_percentiles\":[{supported}],\"details\":{list}}}}}")
            }
            BucketMode::Cumulative | BucketMode::Disjoint => format!("{{\"histograms\":{list}}}"),
        });
    }
    format!("{{\"stats\":[{}]}}", items.join(","))
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn percentiles(row: &HistogramRow) -> String {
    let pairs = row.cumulative().quantiles().into_iter().zip(row.interval().quantiles());
    let pairs: Vec<_> = pairs
        .map(|(c, i)| format!("{{\"cumulative\":{},\"interval\":{}}}", streamed(c), streamed(i)))
        .collect();
    format!("[{}]", pairs.join(","))
}

fn detail_json(statistics: Statistics<'_>) -> String {
    let bins = statistics.detail().map(|(l, w, n)| {
        format!("{{\"lower_bound\":{},\"width\":{},\"count\":{n}}}", streamed(l), streamed(w))
    });
    format!("[{}]", bins.collect::<Vec<_>>().join(","))
}
