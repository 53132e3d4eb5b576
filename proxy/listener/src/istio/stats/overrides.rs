//! Metric overrides: metrics that are not made, labels that are left out, replaced or added, metrics of one's own.
//!
//! Values are CEL expressions, evaluated when a stream is over (or a connection first reports); one that cannot be
//! evaluated is `unknown`. Istio logs what it cannot parse and passes over it, as over names of metrics and labels that
//! it does not know: a label whose expression does not parse is left out.

use std::collections::HashMap;

use sampan_config::istio::{MetricType, PluginConfig};
use sampan_core::cel::Expression;
use sampan_core::format::FormatContext;
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Histogram, Store, Tag, Unit};

const METRICS: [&str; 10] = [
    "requests_total",
    "request_duration_milliseconds",
    "request_bytes",
    "response_bytes",
    "request_messages_total",
    "response_messages_total",
    "tcp_connections_opened_total",
    "tcp_connections_closed_total",
    "tcp_sent_bytes_total",
    "tcp_received_bytes_total",
];

const TAGS: [&str; 25] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "source_canonical_revision",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "response_code",
    "grpc_response_status",
];

/// What is done to one metric.
#[derive(Default)]
struct Change {
    drop: bool,
    /// Standard labels: another value, or none. Values are numbers of expressions.
    tags: HashMap<String, Option<usize>>,
    /// Labels behind the standard ones.
    more: Vec<(String, usize)>,
}

/// A metric of one's own, by its name.
struct Definition {
    name: String,
    value: Expression,
    kind: MetricType,
}

/// All overrides of a filter.
#[derive(Default)]
pub(super) struct Overrides {
    changes: HashMap<String, Change>,
    definitions: Vec<Definition>,
    /// Of labels.
    expressions: Vec<Expression>,
}

/// A metric of one's own, made.
pub(super) enum Custom {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

impl Custom {
    pub(super) fn count(&self, n: u64) {
        match self {
            Self::Counter(counter) => counter.add(n),
            Self::Gauge(gauge) => gauge.set(n),
            Self::Histogram(histogram) => histogram.record(n),
        }
    }
}

/// Parses; what does not parse is logged.
fn parse(source: &str) -> Option<Expression> {
    let parsed = Expression::parse(source);
    parsed.map_err(|e| sampan_core::log!(Component::Filter, Level::Info, "istio.stats: {e}")).ok()
}

impl Overrides {
    pub(super) fn new(message: &PluginConfig) -> Self {
        let mut overrides = Self::default();
        for definition in &message.definitions {
            // A standard metric cannot be defined anew.
            if METRICS.contains(&definition.name.as_str()) {
                continue;
            }
            let Some(value) = parse(&definition.value) else { continue };
            let (name, kind) = (definition.name.clone(), definition.r#type());
            overrides.definitions.push(Definition { name, value, kind });
        }
        for metric in &message.metrics {
            if metric.drop {
                if METRICS.contains(&metric.name.as_str()) {
                    overrides.change(&metric.name).drop = true;
                }
                continue;
            }
            for tag in metric.tags_to_remove.iter().filter(|tag| TAGS.contains(&tag.as_str())) {
                for name in overrides.standard(&metric.name) {
                    overrides.change(&name).tags.insert(tag.clone(), None);
                }
            }
            for (tag, expression) in &metric.dimensions {
                let number = overrides.expression(expression);
                overrides.add(&metric.name, tag, number);
            }
        }
        overrides
    }

    /// The number of an expression; none where it does not parse.
    fn expression(&mut self, source: &str) -> Option<usize> {
        let known = self.expressions.iter().position(|expression| expression.source() == source);
        known.or_else(|| {
            self.expressions.push(parse(source)?);
            Some(self.expressions.len() - 1)
        })
    }

    fn change(&mut self, metric: &str) -> &mut Change {
        self.changes.entry(metric.to_owned()).or_default()
    }

    /// The standard metrics that a name means; the empty one means all.
    fn standard(&self, name: &str) -> Vec<String> {
        let means = |metric: &&&str| name.is_empty() || **metric == name;
        METRICS.iter().filter(means).map(|metric| (*metric).to_owned()).collect()
    }

    fn add(&mut self, metric: &str, tag: &str, value: Option<usize>) {
        for name in self.standard(metric) {
            let change = self.change(&name);
            if TAGS.contains(&tag) {
                change.tags.insert(tag.to_owned(), value);
            } else {
                change.more.extend(value.map(|value| (tag.to_owned(), value)));
            }
        }
        let own = self.definitions.iter().map(|definition| definition.name.clone());
        let own: Vec<_> = own.filter(|name| metric.is_empty() || name == metric).collect();
        for name in own {
            self.change(&name).more.extend(value.map(|value| (tag.to_owned(), value)));
        }
    }

    /// The labels of a metric; none where it is dropped.
    pub(super) fn apply(&self, metric: &str, base: &[Tag], values: &[String]) -> Option<Vec<Tag>> {
        let Some(change) = self.changes.get(metric) else { return Some(base.to_vec()) };
        let of = |number: &usize| -> Box<str> { values.get(*number).map_or("", String::as_str).into() };
        if change.drop {
            return None;
        }
        let kept = base.iter().filter_map(|(tag, value)| match change.tags.get(&**tag) {
            None => Some((tag.clone(), value.clone())),
            Some(other) => other.as_ref().map(|number| (tag.clone(), of(number))),
        });
        let more = change.more.iter().map(|(tag, number)| (tag.clone().into(), of(number)));
        Some(kept.chain(more).collect())
    }

    /// The metrics of one's own.
    pub(super) fn custom(&self, store: &Store, values: &[String]) -> Vec<Custom> {
        let make = |definition: &Definition| {
            let tags = self.apply(&definition.name, &[], values).unwrap_or_default();
            let (scope, name) = (store.tagged(super::NAMESPACE, tags), ["istio_", &definition.name].concat());
            match definition.kind {
                MetricType::Counter => Custom::Counter(scope.counter(&name)),
                MetricType::Gauge => Custom::Gauge(scope.gauge(&name)),
                MetricType::Histogram => Custom::Histogram(scope.histogram(&name, Unit::Bytes)),
            }
        };
        self.definitions.iter().map(make).collect()
    }

    /// Counts the metrics of one's own; what has no value that is a number counts 0.
    pub(super) fn count(&self, custom: &[Custom], context: &FormatContext<'_>) {
        for (definition, custom) in self.definitions.iter().zip(custom) {
            let value = definition.value.text(context).and_then(|text| text.parse().ok());
            custom.count(value.unwrap_or(0));
        }
    }

    /// The values of the labels' expressions for a stream.
    pub(super) fn values(&self, context: &FormatContext<'_>) -> Vec<String> {
        let value =
            |expression: &Expression| expression.text(context).unwrap_or_else(|| "unknown".to_owned());
        self.expressions.iter().map(value).collect()
    }
}
