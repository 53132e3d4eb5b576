//! Metric overrides: metrics that are not made, labels that are left out, replaced or added, metrics of one's own.
//!
//! Expressions are CEL; those that are a constant (`'a'`, `1`, `true`) are taken, all others are refused by name.
//! Istio passes over names of metrics and labels that it does not know, and so does this.

use std::collections::HashMap;

use sampan_config::istio::{MetricType, PluginConfig};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
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
    /// Standard labels: another value, or none.
    tags: HashMap<String, Option<String>>,
    /// Labels behind the standard ones.
    more: Vec<(String, String)>,
}

/// A metric of one's own, by its name.
struct Definition {
    name: String,
    value: u64,
    kind: MetricType,
}

/// All overrides of a filter.
#[derive(Default)]
pub(super) struct Overrides {
    changes: HashMap<String, Change>,
    definitions: Vec<Definition>,
}

/// A metric of one's own, made.
pub(super) enum Custom {
    Counter(Counter, u64),
    Gauge(Gauge, u64),
    Histogram(Histogram, u64),
}

impl Custom {
    pub(super) fn count(&self) {
        match self {
            Self::Counter(counter, n) => counter.add(*n),
            // Every worker sets the same constant.
            Self::Gauge(gauge, n) if gauge.value() != *n => gauge.set(*n),
            Self::Gauge(..) => {}
            Self::Histogram(histogram, n) => histogram.record(*n),
        }
    }
}

impl Overrides {
    pub(super) fn new(message: &PluginConfig) -> ConfigResult<Self> {
        let mut overrides = Self::default();
        for (index, definition) in message.definitions.iter().enumerate() {
            // A standard metric cannot be defined anew.
            if METRICS.contains(&definition.name.as_str()) {
                continue;
            }
            let value = constant(&definition.value).at("value").at_index("definitions", index)?;
            overrides.definitions.push(Definition {
                name: definition.name.clone(),
                value: value.parse().unwrap_or_default(),
                kind: definition.r#type(),
            });
        }
        for (index, metric) in message.metrics.iter().enumerate() {
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
                let value = constant(expression)
                    .map_err(|e| e.at(tag).at("dimensions").index(index).at("metrics"))?;
                overrides.add(&metric.name, tag, &value);
            }
        }
        Ok(overrides)
    }

    fn change(&mut self, metric: &str) -> &mut Change {
        self.changes.entry(metric.to_owned()).or_default()
    }

    /// The standard metrics that a name means; the empty one means all.
    fn standard(&self, name: &str) -> Vec<String> {
        let means = |metric: &&&str| name.is_empty() || **metric == name;
        METRICS.iter().filter(means).map(|metric| (*metric).to_owned()).collect()
    }

    fn add(&mut self, metric: &str, tag: &str, value: &str) {
        for name in self.standard(metric) {
            let change = self.change(&name);
            if TAGS.contains(&tag) {
                change.tags.insert(tag.to_owned(), Some(value.to_owned()));
            } else {
                change.more.push((tag.to_owned(), value.to_owned()));
            }
        }
        let own = self.definitions.iter().map(|definition| definition.name.clone());
        let own: Vec<_> = own.filter(|name| metric.is_empty() || name == metric).collect();
        for name in own {
            self.change(&name).more.push((tag.to_owned(), value.to_owned()));
        }
    }

    /// The labels of a metric; none where it is dropped.
    pub(super) fn apply(&self, metric: &str, base: &[Tag]) -> Option<Vec<Tag>> {
        let Some(change) = self.changes.get(metric) else { return Some(base.to_vec()) };
        if change.drop {
            return None;
        }
        let kept = base.iter().filter_map(|(tag, value)| match change.tags.get(&**tag) {
            None => Some((tag.clone(), value.clone())),
            Some(other) => other.as_ref().map(|value| (tag.clone(), value.as_str().into())),
        });
        let more = change.more.iter().map(|(tag, value)| (tag.clone().into(), value.as_str().into()));
        Some(kept.chain(more).collect())
    }

    /// The metrics of one's own.
    pub(super) fn custom(&self, store: &Store) -> Vec<Custom> {
        let make = |definition: &Definition| {
            let scope = store.tagged(super::NAMESPACE, self.apply(&definition.name, &[])?);
            let (name, value) = (["istio_", &definition.name].concat(), definition.value);
            Some(match definition.kind {
                MetricType::Counter => Custom::Counter(scope.counter(&name), value),
                MetricType::Gauge => Custom::Gauge(scope.gauge(&name), value),
                MetricType::Histogram => Custom::Histogram(scope.histogram(&name, Unit::Bytes), value),
            })
        };
        self.definitions.iter().filter_map(make).collect()
    }
}

/// The value of a constant expression as a label prints it.
fn constant(expression: &str) -> ConfigResult<String> {
    let text = expression.trim();
    let quoted = ['\'', '"'].into_iter().find_map(|q| text.strip_prefix(q)?.strip_suffix(q));
    if let Some(inner) = quoted
        && !inner.contains(['\'', '"', '\\'])
    {
        return Ok(inner.to_owned());
    }
    if text.parse::<i64>().is_ok() || matches!(text, "true" | "false") {
        return Ok(text.to_owned());
    }
    Err(ConfigError::unsupported(format_args!("CEL expression {expression:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants() {
        assert_eq!(constant("'a b'").unwrap(), "a b");
        assert_eq!(constant(" \"x\" ").unwrap(), "x");
        assert_eq!(constant("-3").unwrap(), "-3");
        assert_eq!(constant("true").unwrap(), "true");
        for expression in ["request.host", "'a' + 'b'", "'", ""] {
            assert!(constant(expression).unwrap_err().to_string().contains("CEL expression"), "{expression}");
        }
    }
}
