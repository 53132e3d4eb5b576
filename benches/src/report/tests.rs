use super::*;

fn report() -> Report {
    let mut report = Report::new("A run.".into());
    for kind in [Kind::Envoy, Kind::Sampan] {
        report.present(&Subject { kind, path: "/x".into(), version: "1".into() });
    }
    report.missing(Kind::Nginx, "nginx: not found".into());
    report
}

#[test]
fn numbers() {
    assert_eq!(number(0.256), "0.26");
    assert_eq!(number(12.34), "12.3");
    assert_eq!(number(1234.0), "1234");
    assert_eq!(number(160_123.0), "160 123");
    assert_eq!(number(-160_123.0), "-160 123");
    assert_eq!(number(1_000_000.0), "1 000 000");
}

#[test]
fn a_met_target_and_a_missing_subject_are_shown() {
    let mut report = report();
    report.record(Metric::Cpu, "h1-1k", "request", Kind::Sampan, Ok(Value::plain(25.0)));
    report.record(Metric::Cpu, "h1-1k", "request", Kind::Envoy, Ok(Value::plain(100.0)));
    let text = report.markdown();
    let row = "| h1-1k | request | 100 | 25.0 (0.25) | missing | ≤ 0.30 × Envoy, met |";
    assert!(text.contains(row), "{text}");
    assert!(text.contains("- nginx: **missing** (nginx: not found)"), "{text}");
    assert_eq!(report.complaints(), Vec::<String>::new());
}

#[test]
fn what_is_missed_fails_or_lacks_is_complained_of() {
    let mut report = report();
    report.record(Metric::Cpu, "h1-1k", "request", Kind::Envoy, Ok(Value::plain(100.0)));
    report.record(Metric::Cpu, "h1-1k", "request", Kind::Sampan, Ok(Value::plain(31.0)));
    report.record(Metric::Cpu, "h1-10k", "request", Kind::Sampan, Err(BenchError::protocol("status 503")));
    report.record(Metric::Cpu, "h2-h2", "request", Kind::Envoy, Ok(Value::plain(100.0)));
    report.record(Metric::Instructions, "h1-1k", "request", Kind::Sampan, Ok(Value::plain(19_999.0)));
    let complaints = report.complaints();
    assert_eq!(complaints.len(), 3, "{complaints:?}");
    assert!(complaints[0].contains("31.0 µs per request (0.31 × Envoy)"), "{complaints:?}");
    assert!(complaints[1].contains("status 503"), "{complaints:?}");
    assert!(complaints[2].contains("h2-h2: not measured"), "{complaints:?}");
    assert!(report.markdown().contains("- sampan, h1-10k: failed: protocol: status 503"));
}

#[test]
fn without_sampan_the_check_fails() {
    let mut report = Report::new(String::new());
    report.missing(Kind::Sampan, "sampan: not found".into());
    assert_eq!(report.complaints().len(), 1);
    assert_eq!(Report::new(String::new()).complaints(), ["nothing was measured"]);
}

#[test]
fn a_ratio_target_without_envoy_is_not_met() {
    assert!(!Target::Ratio(0.3).met(&Value::plain(1.0)));
    assert!(Target::Value(6.0).met(&Value::plain(6.0)));
}

#[test]
fn json_names_everything() {
    let mut report = report();
    report.cannot(Metric::Cpu, "h1-1k", "request", Kind::Nginx, "reason");
    let json: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
    assert_eq!(json["rows"][0]["cells"]["nginx"]["cannot"], "reason");
    assert_eq!(json["rows"][0]["target"]["ratio"], 0.30);
    assert_eq!(json["missing"][0]["kind"], "nginx");
    assert!(json["subjects"][0].get("path").is_none());
}
