use envoy_types::pb::envoy::extensions::common::ratelimit::v3::{
    LocalRateLimitDescriptor, rate_limit_descriptor::Entry as EntryMessage,
};
use envoy_types::pb::envoy::r#type::v3::TokenBucket as BucketMessage;
use envoy_types::pb::google::protobuf::{Duration, UInt32Value};
use smallvec::smallvec;

use super::*;
use crate::route::Descriptors;

fn size(max: u32, seconds: i64) -> Option<BucketMessage> {
    Some(BucketMessage {
        max_tokens: max,
        fill_interval: Some(Duration { seconds, nanos: 0 }),
        ..Default::default()
    })
}

fn limit(entries: &[(&str, &str)], max: u32, seconds: i64) -> LocalRateLimitDescriptor {
    let entry = |(key, value): &(&str, &str)| EntryMessage { key: (*key).into(), value: (*value).into() };
    LocalRateLimitDescriptor {
        entries: entries.iter().map(entry).collect(),
        token_bucket: size(max, seconds),
        ..Default::default()
    }
}

fn limiter(
    descriptors: Vec<LocalRateLimitDescriptor>,
    default: Option<BucketMessage>,
) -> ConfigResult<Limiter> {
    let message = pb::LocalRateLimit {
        descriptors,
        token_bucket: default,
        max_dynamic_descriptors: Some(UInt32Value { value: 2 }),
        ..Default::default()
    };
    Ok(Limiter::new(Arc::new(Limits::from_proto(&message)?), Instant::now()))
}

fn asks(entries: &[(&'static str, &'static str)]) -> Descriptor<'static> {
    Descriptor {
        entries: entries.iter().map(|(k, v)| (*k, v.as_bytes().into())).collect(),
        hits: None,
        negative: false,
        limit: None,
        headers: XRateLimitOption::Unspecified,
    }
}

fn passes(limiter: &Limiter, entries: &[(&'static str, &'static str)]) -> bool {
    limiter.take(&[asks(entries)], Instant::now()).allowed
}

#[test]
fn entries_must_be_the_same_and_in_order() {
    let limiter = limiter(vec![limit(&[("a", "1"), ("b", "2")], 1, 1000)], None).unwrap();
    for _ in 0..3 {
        assert!(passes(&limiter, &[("a", "1")]));
        assert!(passes(&limiter, &[("b", "2"), ("a", "1")]));
        assert!(passes(&limiter, &[("a", "1"), ("b", "2"), ("c", "3")]));
    }
    assert!(passes(&limiter, &[("a", "1"), ("b", "2")]));
    assert!(!passes(&limiter, &[("a", "1"), ("b", "2")]));
}

#[test]
fn open_values_have_a_bucket_each_and_the_longest_unused_goes() {
    let limiter = limiter(vec![limit(&[("a", ""), ("b", "2")], 1, 1000)], None).unwrap();
    let ask = |value| passes(&limiter, &[("a", value), ("b", "2")]);
    assert!(ask("x") && ask("y") && !ask("x"));
    assert!(ask("z"), "a third one takes the place of y");
    assert!(!ask("x") && ask("y"));
    assert!(ask("") && !ask(""), "an empty value is one too");
}

#[test]
fn values_do_not_run_into_each_other() {
    let limiter = limiter(vec![limit(&[("a", ""), ("b", "")], 1, 1000)], None).unwrap();
    assert!(passes(&limiter, &[("a", "xy"), ("b", "z")]));
    assert!(passes(&limiter, &[("a", "x"), ("b", "yz")]));
}

#[test]
fn the_slowest_is_asked_first() {
    let limits = vec![limit(&[("k", "fast")], 5, 1), limit(&[("k", "slow")], 1, 1000)];
    let limiter = limiter(limits, None).unwrap();
    let both = [asks(&[("k", "fast")]), asks(&[("k", "slow")])];
    let now = Instant::now();
    assert!(limiter.take(&both, now).allowed);
    let verdict = limiter.take(&both, now);
    assert!(!verdict.allowed);
    assert_eq!(verdict.bucket.unwrap().size.max, 1);
    assert_eq!(limiter.fixed[0].holds(now).tokens, 4, "the fast one gave nothing the second time");
}

#[test]
fn shadows_let_pass_what_the_others_allow() {
    let shadow = LocalRateLimitDescriptor { shadow_mode: true, ..limit(&[("k", "s")], 1, 1000) };
    let limiter = limiter(vec![shadow], size(2, 1000)).unwrap();
    let ask = || limiter.take(&[asks(&[("k", "s")])], Instant::now());
    assert!(ask().allowed);
    let second = ask();
    assert!(second.allowed && second.shadow);
    let third = ask();
    assert!(!third.allowed && !third.shadow, "the default bucket is empty");
}

#[test]
fn what_has_a_budget_twice_is_refused() {
    let twice = |value: &str| limiter(vec![limit(&[("a", value)], 1, 1), limit(&[("a", value)], 2, 2)], None);
    assert_eq!(twice("1").err().unwrap().path(), "descriptors[1]");
    assert_eq!(twice("").err().unwrap().path(), "descriptors[1]");
    let short = limiter(vec![limit(&[("a", "1")], 1, 0)], None).err().unwrap();
    assert_eq!(short.path(), "descriptors[0].token_bucket.fill_interval");
}

#[test]
fn hits_are_taken_and_given_back() {
    let limiter = limiter(vec![limit(&[("a", "1")], 10, 1000)], None).unwrap();
    let now = Instant::now();
    let hits = |hits, negative| {
        let asked = Descriptor { hits: Some(hits), negative, ..asks(&[("a", "1")]) };
        let asked: Descriptors<'_> = smallvec![asked];
        limiter.take(&asked, now).allowed
    };
    assert!(hits(7, false) && !hits(4, false) && hits(2, true) && hits(5, false));
    assert!(!hits(0, false), "nothing is never given");
}
