use super::*;

fn shown(store: &Store) -> String {
    text(store, &Params::default())
}

#[test]
fn a_stat_lives_as_long_as_its_scope_or_a_handle() {
    let store = Store::new();
    let scope = store.root().scope("cluster").scope("a");
    let counter = scope.counter("upstream_rq_total");
    scope.counter("upstream_rq_total").inc();
    counter.add(2);
    assert_eq!(shown(&store), "cluster.a.upstream_rq_total: 3\n");
    drop(scope);
    assert_eq!(store.value("cluster.a.upstream_rq_total"), Some(3));
    drop(counter);
    assert_eq!(shown(&store), "");
    // The id is used again and starts at 0.
    let again = store.root().scope("cluster").scope("a").counter("upstream_rq_total");
    assert_eq!(again.value(), 0);
}

#[test]
fn threads_sum_up_and_leave_their_values_behind() {
    let store = Store::new();
    let (counter, gauge) = (store.root().counter("c"), store.root().gauge("g"));
    let histogram = store.root().histogram("h", Unit::Milliseconds);
    std::thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(|| {
                for i in 0..1000 {
                    counter.inc();
                    gauge.inc();
                    histogram.record(i);
                }
            });
        }
    });
    gauge.sub(3999);
    store.flush();
    assert_eq!((counter.value(), gauge.value()), (4000, 1));
    assert!(shown(&store).contains("h: P0(0,0) P25("), "{}", shown(&store));
    gauge.set(7);
    std::thread::spawn({
        let gauge = gauge.clone();
        move || gauge.set(9)
    })
    .join()
    .unwrap();
    assert_eq!(gauge.value(), 9);
}

#[test]
fn a_scope_of_one_part_belongs_to_the_process() {
    let store = Store::new();
    store.root().scope("server").gauge("live").set(1);
    store.root().scope("server").scope("worker_0").counter("watchdog_miss").inc();
    assert_eq!(shown(&store), "server.live: 1\n");
}

#[test]
fn one_prefix_is_one_scope() {
    let store = Store::new();
    let (a, b) = (store.root().scope("http.in"), store.root().scope("http").scope("in"));
    a.counter("rq").inc();
    b.counter("rq").inc();
    assert_eq!(store.value("http.in.rq"), Some(2));
}

#[test]
fn used_only_knows_a_gauge_that_came_back_to_zero() {
    let store = Store::new();
    let gauge = store.root().gauge("g");
    store.root().gauge("never");
    gauge.inc();
    gauge.dec();
    let params = Params { used_only: true, ..Params::default() };
    assert_eq!(text(&store, &params), "g: 0\n");
}

#[test]
fn reset_sets_counters_to_zero_and_not_gauges() {
    let store = Store::new();
    let (counter, gauge) = (store.root().counter("c"), store.root().gauge("g"));
    counter.add(5);
    gauge.add(5);
    store.reset_counters();
    counter.inc();
    assert_eq!((counter.value(), gauge.value()), (1, 5));
}

#[test]
fn tags_are_envoys() {
    let tags = Tags::default();
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);
    let cases: &[Case<'_>] = &[
        (
            "cluster.c1.external.upstream_rq_404",
            "cluster.external.upstream_rq",
            &[("envoy.response_code", "404"), ("envoy.cluster_name", "c1")],
        ),
        (
            "http.ingress.downstream_rq_5xx",
            "http.downstream_rq_xx",
            &[("envoy.response_code_class", "5"), ("envoy.http_conn_manager_prefix", "ingress")],
        ),
        (
            "listener.127.0.0.1_19902.worker_0.downstream_cx_total",
            "listener.worker_downstream_cx_total",
            &[("envoy.worker_id", "0"), ("envoy.listener_address", "127.0.0.1_19902")],
        ),
        (
            "listener.[__1]_80.http.in.downstream_rq_2xx",
            "listener.http.downstream_rq_xx",
            &[
                ("envoy.response_code_class", "2"),
                ("envoy.http_conn_manager_prefix", "in"),
                ("envoy.listener_address", "[__1]_80"),
            ],
        ),
        ("listener.admin.downstream_cx_total", "listener.admin.downstream_cx_total", &[]),
        (
            "vhost.vh.vcluster.vc.upstream_rq_time",
            "vhost.vcluster.upstream_rq_time",
            &[("envoy.virtual_cluster", "vc"), ("envoy.virtual_host", "vh")],
        ),
        ("server.uptime", "server.uptime", &[]),
        ("cluster.only", "cluster.only", &[]),
    ];
    for (name, rest, expected) in cases {
        let extracted = tags.extract(name);
        let expected: Vec<_> = expected.iter().map(|(t, v)| (t.to_string(), v.to_string())).collect();
        assert_eq!((extracted.name.as_str(), extracted.tags), (*rest, expected), "{name}");
    }
}

fn model(
    yaml_like: impl FnOnce(&mut envoy_types::pb::envoy::config::metrics::v3::StatsConfig),
) -> StatsModel {
    let mut config = Default::default();
    yaml_like(&mut config);
    StatsModel::parse(&config).unwrap()
}

#[test]
fn istios_expressions_with_delimiters() {
    use envoy_types::pb::envoy::config::metrics::v3::{TagSpecifier, tag_specifier::TagValue};
    let specifier = |name: &str, regex: &str| TagSpecifier {
        tag_name: name.into(),
        tag_value: Some(TagValue::Regex(regex.into())),
    };
    let model = model(|c| {
        c.use_all_default_tags = Some(envoy_types::pb::google::protobuf::BoolValue { value: false });
        c.stats_tags = vec![
            specifier("cluster_name", r"^cluster\.((.+?(\..+?\.svc\.cluster\.local)?)\.)"),
            specifier("response_code", r"(response_code=\.=(.+?);\.;)|_rq(_(\d{3}))$"),
            TagSpecifier { tag_name: "pod".into(), tag_value: Some(TagValue::FixedValue("p1".into())) },
        ];
    });
    let extracted =
        model.tags().extract("cluster.outbound|80||a.b.svc.cluster.local.response_code=.=200;.;x");
    assert_eq!(extracted.name, "cluster.x");
    let expected =
        [("response_code", "200"), ("pod", "p1"), ("cluster_name", "outbound|80||a.b.svc.cluster.local")];
    assert_eq!(extracted.tags, expected.map(|(a, b)| (a.to_string(), b.to_string())));
    let unknown = Tags::new(true, &[TagSpecifier { tag_name: "nope".into(), tag_value: None }]);
    assert!(unknown.unwrap_err().to_string().contains("no default regex for name: 'nope'"));
}

#[test]
fn rejected_stats_do_not_exist() {
    use envoy_types::pb::envoy::config::metrics::v3::{StatsMatcher, stats_matcher};
    use envoy_types::pb::envoy::r#type::matcher::v3::{ListStringMatcher, StringMatcher, string_matcher};
    let store = Store::new();
    let prefix = StringMatcher {
        match_pattern: Some(string_matcher::MatchPattern::Prefix("server.".into())),
        ignore_case: false,
    };
    store.configure(model(|c| {
        let list = ListStringMatcher { patterns: vec![prefix] };
        let matcher = Some(stats_matcher::StatsMatcher::InclusionList(list));
        c.stats_matcher = Some(StatsMatcher { stats_matcher: matcher });
    }));
    let server = store.root().scope("server");
    server.gauge("live").set(1);
    let rejected = store.root().scope("http").counter("rq");
    rejected.inc();
    assert_eq!((shown(&store).as_str(), rejected.value()), ("server.live: 1\n", 0));
}

/// Lines as Envoy 1.40 printed them for the same values.
#[test]
fn output_is_envoys() {
    let store = Store::new();
    let scope = store.root().scope("cluster").scope("c1");
    scope.counter("upstream_rq_404").add(3);
    scope.gauge("upstream_cx_active");
    scope.text_readout("version_text").set("v\"1");
    let time = scope.histogram("upstream_rq_time", Unit::Milliseconds);
    scope.histogram("upstream_cx_length_ms", Unit::Milliseconds);
    [1, 8, 1].iter().for_each(|v| time.record(*v));
    assert!(shown(&store).contains("upstream_rq_time: No recorded values\n"), "before the flush");
    store.flush();
    assert_eq!(
        shown(&store),
        "cluster.c1.version_text: \"v\"1\"\ncluster.c1.upstream_cx_active: 0\ncluster.c1.upstream_rq_404: 3\n\
         cluster.c1.upstream_cx_length_ms: No recorded values\n\
         cluster.c1.upstream_rq_time: P0(1.0333333333333334,1.0333333333333334) \
         P25(1.0333333333333334,1.0333333333333334) P50(1.0666666666666667,1.0666666666666667) P75(8.05,8.05) \
         P90(8.05,8.05) P95(8.05,8.05) P99(8.05,8.05) P99.5(8.05,8.05) P99.9(8.05,8.05) P100(8.05,8.05)\n"
    );
    let filter = Some(regex::Regex::new("rq_time").unwrap());
    let detailed = Params { buckets: BucketMode::Detailed, filter, ..Params::default() };
    assert!(text(&store, &detailed).starts_with(
        "cluster.c1.upstream_rq_time:\n  totals=1,0.1:2, 8,0.1:1\n  intervals=1,0.1:2, 8,0.1:1\n  summary=P0("
    ));
    let disjoint = Params { buckets: BucketMode::Disjoint, ..detailed.clone() };
    assert!(
        text(&store, &disjoint)
            .starts_with("cluster.c1.upstream_rq_time: B0.5(0,0) B1(2,2) B5(0,0) B10(1,1)")
    );
    assert!(text(&store, &disjoint).ends_with("B1.8e+06(0,0) B3.6e+06(0,0)\n"));
    assert!(json(&store, &disjoint).ends_with(r#"{"upper_bound":3e+05,"interval":0,"cumulative":0},{"upper_bound":6e+05,"interval":0,"cumulative":0},{"upper_bound":1800000,"interval":0,"cumulative":0},{"upper_bound":3600000,"interval":0,"cumulative":0}]}]}]}"#));
    assert!(json(&store, &detailed).starts_with(r#"{"stats":[{"histograms":{"supported_percentiles":[0,25,50,75,90,95,99,99.5,99.9,100],"details":[{"name":"cluster.c1.upstream_rq_time","totals":[{"lower_bound":1,"width":0.1,"count":2},"#));
    let prom = prometheus(&store, &Params::default());
    assert!(prom.starts_with(
        "# TYPE envoy_cluster_upstream_rq counter\n\
         envoy_cluster_upstream_rq{envoy_response_code=\"404\",envoy_cluster_name=\"c1\"} 3\n\
         # TYPE envoy_cluster_upstream_cx_active gauge\nenvoy_cluster_upstream_cx_active{envoy_cluster_name=\"c1\"} 0\n\
         # TYPE envoy_cluster_upstream_cx_length_ms histogram\n"
    ));
    assert!(prom.ends_with(
        "envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"c1\",le=\"3600000\"} 3\n\
         envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name=\"c1\",le=\"+Inf\"} 3\n\
         envoy_cluster_upstream_rq_time_sum{envoy_cluster_name=\"c1\"} 10.14492753623188292522172559984\n\
         envoy_cluster_upstream_rq_time_count{envoy_cluster_name=\"c1\"} 3\n"
    ));
    let texts = Params { text_readouts: true, ..Params::default() };
    assert!(
        prometheus(&store, &texts)
            .contains("envoy_cluster_version_text{envoy_cluster_name=\"c1\",text_value=\"v\\\"1\"} 0\n")
    );
}

/// What Envoy 1.40 printed for one moment of a small mesh (testdata/), put into a store and printed again.
#[test]
fn a_real_envoys_output_comes_out_byte_for_byte() {
    let store = Store::new();
    let root = store.root();
    let (counters, gauges) = (include_str!("testdata/counters.txt"), include_str!("testdata/gauges.txt"));
    let histograms = include_str!("testdata/histograms.txt");
    let pairs = |text: &'static str| text.lines().filter_map(|l| l.rsplit_once(": "));
    for (name, value) in pairs(counters) {
        root.counter(name).add(value.parse().unwrap());
    }
    for (name, value) in pairs(gauges) {
        root.gauge(name).set(value.parse().unwrap());
    }
    let mut current = root.histogram("none", Unit::Milliseconds);
    for line in histograms.lines() {
        if let Some(bins) = line.strip_prefix("  totals=") {
            for bin in bins.split(", ") {
                let (bin, count) = bin.split_once(':').unwrap();
                let low = bin.split_once(',').unwrap().0.parse().unwrap();
                (0..count.parse::<u32>().unwrap()).for_each(|_| current.record(low));
            }
        } else if !line.starts_with("  ") {
            current =
                root.histogram(line.split(": ").next().unwrap().trim_end_matches(':'), Unit::Milliseconds);
        }
    }
    store.flush();
    let filter = Some(regex::Regex::new("^none$").unwrap());
    let params = Params { filter, invert_filter: true, ..Params::default() };
    let only = |stat_type| Params { stat_type, ..params.clone() };
    assert_eq!(text(&store, &only(StatType::Counters)), counters);
    assert_eq!(text(&store, &only(StatType::Gauges)), gauges);
    let detailed = Params { buckets: BucketMode::Detailed, ..only(StatType::Histograms) };
    assert_eq!(text(&store, &detailed), histograms);
    let (ours, theirs) = (prometheus(&store, &params), include_str!("testdata/prometheus.txt"));
    for (ours, theirs) in ours.lines().zip(theirs.lines()) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
    let buckets = Params { buckets: BucketMode::Cumulative, ..only(StatType::Histograms) };
    assert_eq!(text(&store, &buckets), include_str!("testdata/cumulative.txt"));
    assert_eq!(json(&store, &params), include_str!("testdata/stats.json"));
}

#[test]
fn sinks_are_refused_by_name() {
    use envoy_types::pb::envoy::config::metrics::v3::{StatsSink, stats_sink::ConfigType};
    use envoy_types::pb::google::protobuf::Any;
    let type_url = "type.googleapis.com/envoy.config.metrics.v3.StatsdSink".to_owned();
    let config_type = Some(ConfigType::TypedConfig(Any { type_url, value: Vec::new() }));
    let sink = StatsSink { name: "envoy.stat_sinks.statsd".into(), config_type };
    assert_eq!(
        refuse_sinks(&[sink]).unwrap_err().to_string(),
        "stats_sinks[0].typed_config: type.googleapis.com/envoy.config.metrics.v3.StatsdSink is not supported"
    );
    assert_eq!(refuse_sinks(&[]), Ok(()));
}

#[test]
fn a_lazy_set_is_made_when_first_needed() {
    let store = Store::new();
    let scope = store.root().scope("x");
    let lazy = Lazy::new(scope, |scope| scope.counter("c"));
    assert_eq!(store.value("x.c"), None);
    lazy.get().inc();
    lazy.get().inc();
    assert_eq!(store.value("x.c"), Some(2));
}

#[test]
fn given_tags_stand_for_those_that_names_tell() {
    let store = Store::new();
    let tags = |flags: &str| -> Vec<Tag> {
        vec![
            ("reporter".into(), "source".into()),
            ("source_principal".into(), "spiffe://cluster.local/ns/a.b/sa/c".into()),
            ("grpc_response_status".into(), "".into()),
            ("response_flags".into(), flags.into()),
        ]
    };
    let scope = store.tagged("istiocustom", tags("-"));
    scope.counter("istio_requests_total").add(2);
    // The same set is the same scope.
    store.tagged("istiocustom", tags("-")).counter("istio_requests_total").inc();
    store.tagged("istiocustom", tags("UH")).counter("istio_requests_total").inc();
    drop(scope);
    let text = text(&store, &Params::default());
    let full = "istiocustom.istio_requests_total.reporter.source.source_principal.\
                spiffe://cluster.local/ns/a.b/sa/c.grpc_response_status.response_flags.-";
    assert!(text.contains(&format!("{full}: 3\n")), "{text}");
    assert_eq!(store.value(full), Some(3));
    let prometheus = prometheus(&store, &Params::default());
    assert!(
        prometheus.contains(
            "# TYPE istio_requests_total counter\n\
             istio_requests_total{reporter=\"source\",source_principal=\"spiffe://cluster.local/ns/a.b/sa/c\",\
             grpc_response_status=\"\",response_flags=\"-\"} 3\n"
        ),
        "{prometheus}"
    );
}
