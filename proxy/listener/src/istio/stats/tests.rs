//! What the differential harness does not reach: overrides of all metrics, metrics of one's own, refusals.

use sampan_config::istio::{MetricConfig, MetricDefinition, PluginConfig};
use sampan_core::stats::{Params, Tag, prometheus};

use super::*;

fn base() -> Vec<Tag> {
    vec![("reporter".into(), "source".into()), ("source_app".into(), "a".into())]
}

fn config(metrics: Vec<MetricConfig>) -> PluginConfig {
    PluginConfig { metrics, ..PluginConfig::default() }
}

fn dimension(name: &str, tag: &str, value: &str) -> MetricConfig {
    let dimensions = std::iter::once((tag.to_owned(), value.to_owned())).collect();
    MetricConfig { name: name.to_owned(), dimensions, ..MetricConfig::default() }
}

#[test]
fn an_override_without_a_name_means_all_metrics() {
    let removed = MetricConfig { tags_to_remove: vec!["source_app".into()], ..MetricConfig::default() };
    let message = config(vec![removed, dimension("", "zone", "'z'")]);
    let overrides = Overrides::new(&message);
    for metric in ["requests_total", "tcp_sent_bytes_total"] {
        let tags = overrides.apply(metric, &base(), &["z".to_owned()]).unwrap();
        let expected: Vec<Tag> = vec![("reporter".into(), "source".into()), ("zone".into(), "z".into())];
        assert_eq!(tags, expected);
    }
}

#[test]
fn a_dropped_metric_and_one_that_nobody_knows() {
    let drop = |name: &str| MetricConfig { name: name.into(), drop: true, ..MetricConfig::default() };
    let overrides = Overrides::new(&config(vec![drop("request_bytes"), drop("nonsense")]));
    assert!(overrides.apply("request_bytes", &base(), &[]).is_none());
    assert_eq!(overrides.apply("response_bytes", &base(), &[]).unwrap(), base());
}

#[test]
fn metrics_of_ones_own() {
    let definition = |name: &str, kind| MetricDefinition {
        name: name.to_owned(),
        value: "2".to_owned(),
        r#type: kind as i32,
    };
    let message = PluginConfig {
        definitions: vec![
            definition("mine", sampan_config::istio::MetricType::Counter),
            definition("level", sampan_config::istio::MetricType::Gauge),
            // Standard ones are not defined anew.
            definition("requests_total", sampan_config::istio::MetricType::Counter),
        ],
        metrics: vec![dimension("mine", "source_app", "'b'")],
        ..PluginConfig::default()
    };
    let overrides = Overrides::new(&message);
    let store = Store::new();
    let custom = overrides.custom(&store, &["b".to_owned()]);
    assert_eq!(custom.len(), 2);
    for _ in 0..2 {
        custom.iter().for_each(|custom| custom.count(2));
    }
    let text = prometheus(&store, &Params::default());
    assert!(text.contains("istio_mine{source_app=\"b\"} 4\n"), "{text}");
    assert!(text.contains("istio_level{} 2\n"), "{text}");
}
