use std::time::Duration;

use envoy_types::pb::envoy::extensions::common::dynamic_forward_proxy::v3 as pb;
use envoy_types::pb::google::protobuf::UInt32Value;
use sampan_core::stats::Store;

use super::*;

fn caches(store: &Store) -> DnsCaches {
    DnsCaches::new(&store.root())
}

fn config(change: impl FnOnce(&mut pb::DnsCacheConfig)) -> Arc<DnsCacheConfig> {
    // V4_ONLY
    let mut message = pb::DnsCacheConfig { name: "c".into(), dns_lookup_family: 1, ..Default::default() };
    change(&mut message);
    DnsCacheConfig::from_proto(&message).unwrap()
}

async fn resolved(load: Load) -> Arc<Entry> {
    match load {
        Load::Known(entry) => entry,
        Load::Wait(entry) => {
            sampan_core::time::timeout(Duration::from_secs(5), entry.resolved()).await.unwrap();
            entry
        }
        Load::Overflow => panic!("no room"),
    }
}

#[tokio::test]
async fn a_name_is_asked_once_and_known_then() {
    let store = Store::new();
    let cache = caches(&store).get(&config(|_| ())).unwrap();
    let entry = resolved(cache.load("localhost", 80)).await;
    assert_eq!(entry.address(), Some("127.0.0.1:80".parse().unwrap()));
    assert!(matches!(cache.load("localhost:80", 1), Load::Known(again) if Arc::ptr_eq(&again, &entry)));
    let none = resolved(cache.load("x.onion:8080", 80)).await;
    assert_eq!(none.address(), None);
    assert_eq!(&*none.details(), "dns_resolution_failure{cares_norecords:Domain_name_not_found}");
    assert_eq!(store.value("dns_cache.c.dns_query_attempt"), Some(2));
    assert_eq!(store.value("dns_cache.c.num_hosts"), Some(2));
}

#[tokio::test]
async fn there_is_room_for_so_many() {
    let store = Store::new();
    let cache = caches(&store).get(&config(|m| m.max_hosts = Some(UInt32Value { value: 1 }))).unwrap();
    resolved(cache.load("localhost", 80)).await;
    assert!(matches!(cache.load("localhost", 80), Load::Known(_)));
    assert!(matches!(cache.load("localhost", 81), Load::Overflow));
    assert_eq!(store.value("dns_cache.c.host_overflow"), Some(1));
}

#[tokio::test]
async fn one_name_is_one_cache_for_as_long_as_one_is_used() {
    let store = Store::new();
    let caches = caches(&store);
    let one = caches.get(&config(|_| ())).unwrap();
    let other = config(|m| m.max_hosts = Some(UInt32Value { value: 1 }));
    let Err(error) = caches.get(&other) else { panic!("another configuration was taken") };
    assert_eq!(error.to_string(), "config specified DNS cache 'c' with different settings");
    assert!(Arc::ptr_eq(&one, &caches.get(&config(|_| ())).unwrap()));
    drop(one);
    assert!(caches.get(&other).is_ok());
}

#[tokio::test]
async fn so_many_may_wait() {
    let store = Store::new();
    let breaker = pb::DnsCacheCircuitBreakers { max_pending_requests: Some(UInt32Value { value: 1 }) };
    let cache = caches(&store).get(&config(|m| m.dns_cache_circuit_breaker = Some(breaker))).unwrap();
    let shown = |name: &str| store.value(&format!("dns_cache.c.circuit_breakers.{name}"));
    let waiting = cache.wait();
    assert!(waiting.is_some() && cache.wait().is_none() && !cache.has_room());
    assert_eq!((shown("rq_pending_open"), shown("rq_pending_remaining")), (Some(1), Some(0)));
    drop(waiting);
    assert_eq!((shown("rq_pending_open"), shown("rq_pending_remaining")), (Some(0), Some(1)));
    assert_eq!(store.value("dns_cache.c.dns_rq_pending_overflow"), Some(1));
}

#[tokio::test]
async fn nothing_is_kept_of_what_is_too_long_for_a_name() {
    let store = Store::new();
    let cache = caches(&store).get(&config(|_| ())).unwrap();
    let Load::Known(entry) = cache.load(&"a".repeat(10_000), 80) else { panic!("it was asked for") };
    assert_eq!(entry.address(), None);
    assert_eq!(&*entry.details(), "dns_resolution_failure{cares_failure:Misformatted_domain_name}");
    assert_eq!(store.value("dns_cache.c.num_hosts"), Some(0));
}

/// What no longer resolves stays where it was.
#[test]
fn an_address_stays_when_there_is_none() {
    let entry = Entry::new("a:80".into(), 80);
    assert!(entry.take(vec![[10, 0, 0, 1].into()], "found".into(), false));
    assert!(!entry.take(Vec::new(), "lost".into(), true));
    assert_eq!((entry.address(), &*entry.details()), (Some("10.0.0.1:80".parse().unwrap()), "found"));
    assert!(!entry.has_failed());
}
