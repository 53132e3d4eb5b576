//! Envoy's recorded exchanges, and servers that behave at random.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Batch, Name, NodePolicy, WILDCARD, delta, sotw};
use crate::handler::Refusal;
use crate::wire::{self, Any, DeltaDiscoveryResponse, DiscoveryResponse};

const TYPE: &str = "type.googleapis.com/t.T";

/// Refuses what holds "bad".
#[derive(Default)]
struct Owner {
    updates: Vec<Batch>,
}

impl Owner {
    fn update(&mut self, batch: Batch) -> Result<(), Refusal> {
        let bad = batch.resources.iter().find(|resource| resource.value.as_deref() == Some(b"bad"));
        let refusal = bad.map(|bad| Refusal { name: bad.name.clone(), reason: "is bad".into() });
        self.updates.push(batch);
        refusal.map_or(Ok(()), Err)
    }
}

impl sotw::Subscription {
    /// The next request as the server reads it.
    fn asks(&mut self) -> Option<wire::DiscoveryRequest> {
        let mut deframer = crate::grpc::Deframer::default();
        deframer.push(self.next_request()?.framed());
        Some(prost::Message::decode(deframer.pop().unwrap().unwrap()).unwrap())
    }

    fn interest(&mut self, names: BTreeSet<Name>) {
        let old = self.names().clone();
        names.difference(&old).for_each(|name| self.add(name));
        old.difference(&names).for_each(|name| self.remove(name));
    }

    fn receive(&mut self, response: DiscoveryResponse, now: Instant, owner: &mut Owner) {
        let opened = self.take_apart(response.resources.clone(), &response.version_info, now);
        let outcome = opened.and_then(|batch| {
            let lives = batch.resources.iter().map(|r| (r.name.clone(), r.ttl)).collect();
            owner.update(batch).map(|()| lives)
        });
        self.answer(response, outcome, now);
    }
}

impl delta::Subscription {
    fn interest(&mut self, names: BTreeSet<Name>) {
        let old = self.names().clone();
        names.difference(&old).for_each(|name| self.add(name));
        old.difference(&names).for_each(|name| self.remove(name));
    }

    fn receive(&mut self, response: DeltaDiscoveryResponse, now: Instant, owner: &mut Owner) {
        let outcome = self.take_apart(&response).and_then(|batch| owner.update(batch));
        self.answer(response, outcome, now);
    }
}

fn names(of: &[&str]) -> BTreeSet<Name> {
    of.iter().map(|name| (*name).into()).collect()
}

fn any(value: &str) -> Any {
    Any { type_url: TYPE.into(), value: Bytes::copy_from_slice(value.as_bytes()) }
}

fn named(name: &str, version: &str, value: Option<&str>, seconds: i64) -> wire::Resource {
    let ttl = (seconds > 0).then_some(wire::Duration { seconds, nanos: 0 });
    let (version, name) = (version.into(), name.into());
    wire::Resource { version, resource: value.map(any), name, aliases: Vec::new(), ttl }
}

fn world(version: &str, nonce: &str, resources: Vec<Any>) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: version.into(),
        resources,
        type_url: TYPE.into(),
        nonce: nonce.into(),
        control_plane: None,
    }
}

fn change(nonce: &str, resources: Vec<wire::Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: "s".into(),
        resources,
        type_url: TYPE.into(),
        nonce: nonce.into(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        control_plane: None,
    }
}

#[test]
fn state_of_the_world_says_what_envoy_said() {
    let (mut cds, mut owner, now) = (sotw::Subscription::new(TYPE), Owner::default(), Instant::now());
    cds.interest(names(&[WILDCARD]));
    assert!(cds.asks().is_none(), "no stream");
    cds.stream_opened();
    let first = cds.asks().unwrap();
    assert!(first.resource_names.is_empty() && first.version_info.is_empty());
    cds.receive(world("1", "n1", vec![any("a")]), now, &mut owner);
    let ack = cds.asks().unwrap();
    assert_eq!((ack.version_info.as_str(), ack.response_nonce.as_str()), ("1", "n1"));
    cds.receive(world("2", "n2", vec![any("bad")]), now, &mut owner);
    let nack = cds.asks().unwrap();
    assert_eq!((nack.version_info.as_str(), nack.response_nonce.as_str()), ("1", "n2"));
    assert_eq!(nack.error_detail.unwrap().code, 13);
    cds.receive(world("3", "n3", vec![any("a")]), now, &mut owner);
    assert!(cds.asks().unwrap().error_detail.is_none());
    cds.stream_closed();
    cds.stream_opened();
    let again = cds.asks().unwrap();
    assert_eq!((again.version_info.as_str(), again.response_nonce.as_str()), ("3", ""));

    // A clusters' owner that warms: the answer waits, and a new stream begins without this type.
    cds.receive(world("5", "m1", vec![any("c")]), now, &mut owner);
    cds.pause();
    assert!(cds.asks().is_none());
    cds.stream_closed();
    cds.stream_opened();
    assert!(cds.asks().is_none());
    cds.resume();
    assert_eq!(cds.asks().unwrap().version_info, "5");
}

#[test]
fn a_long_refusal_is_cut_between_two_letters() {
    let (mut cds, now) = (sotw::Subscription::new(TYPE), Instant::now());
    cds.interest(names(&[WILDCARD]));
    cds.stream_opened();
    let refusal = Refusal { name: String::new(), reason: format!("x{}", "ä".repeat(5000)) };
    cds.answer(world("1", "n1", Vec::new()), Err(refusal), now);
    let said = cds.asks().unwrap().error_detail.unwrap().message;
    assert_eq!(said, format!("x{}...(truncated)", "ä".repeat(2047)));
}

#[test]
fn the_last_name_let_go_never_asks_for_everything() {
    let mut eds = sotw::Subscription::new(TYPE);
    eds.stream_opened();
    eds.interest(names(&["a"]));
    eds.interest(names(&[]));
    assert!(eds.asks().is_none());
    eds.interest(names(&["a"]));
    assert_eq!(eds.asks().unwrap().resource_names, ["a"]);
    eds.interest(names(&[]));
    assert!(eds.asks().unwrap().resource_names.is_empty());
}

#[test]
fn delta_says_what_envoy_said() {
    let (mut cds, mut owner, now) = (delta::Subscription::new(TYPE), Owner::default(), Instant::now());
    cds.interest(names(&[WILDCARD]));
    cds.stream_opened();
    let first = cds.next_request();
    assert!(first.is_some_and(|first| first.resource_names_subscribe.is_empty()));
    let both = vec![named("a", "1", Some("a"), 0), named("b", "1", Some("b"), 0)];
    cds.receive(change("n1", both, &[]), now, &mut owner);
    assert_eq!(cds.next_request().unwrap().response_nonce, "n1");
    let bad = vec![named("c", "2", Some("c"), 0), named("z", "2", Some("bad"), 0)];
    cds.receive(change("n2", bad, &[]), now, &mut owner);
    assert_eq!(cds.next_request().unwrap().error_detail.unwrap().message, "z: is bad");
    cds.receive(change("n3", Vec::new(), &["b"]), now, &mut owner);
    cds.stream_closed();
    cds.stream_opened();
    let again = cds.next_request().unwrap();
    assert_eq!(again.initial_resource_versions.into_iter().collect::<Vec<_>>(), [("a".into(), "1".into())]);
    assert!(again.resource_names_subscribe.is_empty() && again.response_nonce.is_empty());

    let mut eds = delta::Subscription::new(TYPE);
    eds.stream_opened();
    eds.interest(names(&["a", "b"]));
    assert_eq!(eds.next_request().unwrap().resource_names_subscribe, ["a", "b"]);
    eds.interest(names(&["a"]));
    assert_eq!(eds.next_request().unwrap().resource_names_unsubscribe, ["b"]);
}

#[test]
fn names_that_come_and_go_leave_nothing_behind() {
    let now = Instant::now();
    let mut s = delta::Subscription::new(crate::types::VIRTUAL_HOST);
    s.add(&WILDCARD.into());
    s.stream_opened();
    s.next_request().unwrap();
    s.add(&"never sent".into());
    s.remove("never sent");
    assert_eq!(s.next_request(), None);
    s.add(&"a".into());
    assert_eq!(s.next_request().unwrap().resource_names_subscribe, ["a"]);
    let absent =
        |name| wire::Resource { resource: None, aliases: vec!["x".into()], ..named(name, "1", None, 0) };
    s.answer(change("n", vec![absent("a"), absent("not asked")], &[]), Ok(()), now);
    assert_eq!(s.known().len(), 1);
    s.next_request().unwrap();
    s.remove("a");
    assert!(s.known().is_empty());
    // The server does not know yet that it was let go.
    s.add(&"a".into());
    s.remove("a");
    assert_eq!(s.next_request().unwrap().resource_names_unsubscribe, ["a"]);
}

#[test]
fn twice_the_same_name_or_another_type_is_refused_whole() {
    let (mut cds, mut owner, now) = (delta::Subscription::new(TYPE), Owner::default(), Instant::now());
    cds.interest(names(&[WILDCARD]));
    cds.stream_opened();
    cds.next_request();
    cds.receive(change("n1", vec![named("a", "1", Some("a"), 0)], &["a"]), now, &mut owner);
    assert!(cds.next_request().unwrap().error_detail.is_some());
    let mut other = named("a", "1", Some("a"), 0);
    other.resource = Some(Any { type_url: "other".into(), value: Bytes::new() });
    cds.receive(change("n2", vec![other], &[]), now, &mut owner);
    assert!(cds.next_request().unwrap().error_detail.is_some());
    assert!(owner.updates.is_empty());
}

#[test]
fn a_heart_beat_prolongs_and_silence_removes() {
    let (mut owner, now) = (Owner::default(), Instant::now());
    let later = |seconds| now + Duration::from_secs(seconds);
    let mut cds = delta::Subscription::new(TYPE);
    cds.interest(names(&[WILDCARD]));
    cds.stream_opened();
    cds.receive(change("n1", vec![named("a", "1", Some("a"), 10)], &[]), now, &mut owner);
    cds.receive(change("n2", vec![named("a", "1", None, 10)], &[]), later(5), &mut owner);
    assert_eq!(cds.next_expiry(), Some(later(15)));
    assert!(owner.updates[1].resources.is_empty());
    assert_eq!((cds.expire(later(15)), cds.known().len()), (vec!["a".to_owned()], 0));

    let mut lds = sotw::Subscription::new(TYPE);
    lds.interest(names(&[WILDCARD]));
    lds.stream_opened();
    let wrap = |resource: wire::Resource| Any {
        type_url: sotw::WRAPPER.into(),
        value: resource.encode_to_vec().into(),
    };
    lds.receive(world("1", "n", vec![wrap(named("a", "1", Some("a"), 10))]), now, &mut owner);
    lds.receive(world("1", "n", vec![wrap(named("a", "1", None, 10))]), later(5), &mut owner);
    assert_eq!(lds.next_expiry(), Some(later(15)));
}

#[test]
fn the_node_goes_with_the_first_request_of_a_stream() {
    let mut node = NodePolicy::new(Bytes::from_static(b"n"), true);
    assert!(node.for_request().is_some() && node.for_request().is_none());
    node.stream_opened();
    assert!(node.for_request().is_some());
}

fn some_names(random: &mut StdRng) -> BTreeSet<Name> {
    let all = ["a", "b", "c", WILDCARD];
    all.into_iter().filter(|_| random.random_bool(0.5)).map(Into::into).collect()
}

/// One answer for each response, versions only by acceptance, and what the server was last told is what is wanted.
#[test]
fn random_servers_of_the_world() {
    for seed in 0..500 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut state, mut owner, now) = (sotw::Subscription::new(TYPE), Owner::default(), Instant::now());
        let (mut wanted, mut accepted, mut told, mut open) = (names(&[]), String::new(), None, false);
        for step in 0..60 {
            match random.random_range(0..4) {
                0 => {
                    wanted = some_names(&mut random);
                    state.interest(wanted.clone());
                }
                1 if open => {
                    open = false;
                    state.stream_closed();
                }
                1 => {
                    (open, told) = (true, None);
                    state.stream_opened();
                }
                _ if open => {
                    let (bad, version) = (random.random_bool(0.4), step.to_string());
                    let body = vec![any(if bad { "bad" } else { "good" })];
                    state.receive(world(&version, &version, body), now, &mut owner);
                    let answer = state.asks().expect("an answer");
                    if !bad {
                        accepted = version.clone();
                    }
                    assert_eq!((answer.version_info, answer.response_nonce), (accepted.clone(), version));
                    assert_eq!(answer.error_detail.is_some(), bad);
                    told = Some(answer.resource_names);
                    assert!(state.asks().is_none(), "one answer");
                }
                _ => assert!(state.asks().is_none(), "no stream"),
            }
            // A server that does not read: what changes meanwhile goes out together.
            if random.random_bool(0.3) {
                continue;
            }
            if let Some(request) = state.asks() {
                assert_eq!(request.version_info, accepted, "a request keeps what was accepted");
                let everything = told.is_none() && wanted == names(&[WILDCARD]);
                assert!(!everything || request.resource_names.is_empty(), "a stream's first names nothing");
                told = Some(request.resource_names);
            }
            if open {
                let told: BTreeSet<_> = told.clone().into_iter().flatten().map(Name::from).collect();
                assert!(told == wanted || (told.is_empty() && wanted == names(&[WILDCARD])), "seed {seed}");
            }
        }
    }
}

/// The server's own book of subscriptions agrees with what is wanted; a new stream names what is known.
#[test]
fn random_servers_of_changes() {
    for seed in 0..500 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut state, mut owner, now) = (delta::Subscription::new(TYPE), Owner::default(), Instant::now());
        let (mut wanted, mut book, mut open, mut fresh) = (names(&[]), names(&[]), false, false);
        let mut owed = Vec::new();
        for step in 0..60 {
            match random.random_range(0..4) {
                0 => {
                    wanted = some_names(&mut random);
                    state.interest(wanted.clone());
                }
                1 if open => {
                    (open, owed) = (false, Vec::new());
                    state.stream_closed();
                }
                1 => {
                    (open, fresh, book) = (true, true, names(&[]));
                    state.stream_opened();
                }
                _ if open => {
                    let (bad, before) = (random.random_bool(0.4), state.known().clone());
                    let body = named("a", &step.to_string(), Some(if bad { "bad" } else { "good" }), 0);
                    let gone = if random.random_bool(0.3) { vec!["b"] } else { vec![] };
                    state.receive(change(&step.to_string(), vec![body], &gone), now, &mut owner);
                    owed.push((step.to_string(), bad));
                    assert!(!bad || before == *state.known(), "a refusal changes no version");
                }
                _ => assert!(state.next_request().is_none(), "no stream"),
            }
            let everything = wanted.contains(WILDCARD);
            assert!(everything || state.known().keys().all(|name| wanted.contains(name)), "seed {seed}");
            // A server that does not read: what changes meanwhile goes out together.
            if random.random_bool(0.3) {
                continue;
            }
            while let Some(request) = state.next_request() {
                let known =
                    state.known().iter().map(|(name, version)| (name.to_string(), version.to_string()));
                assert!(
                    fresh == (request.initial_resource_versions == known.collect::<BTreeMap<_, _>>())
                        || state.known().is_empty()
                );
                if fresh && request.resource_names_subscribe.is_empty() && wanted.contains(WILDCARD) {
                    book.insert(WILDCARD.into());
                }
                fresh = false;
                book.extend(request.resource_names_subscribe.into_iter().map(Name::from));
                let gone = &request.resource_names_unsubscribe;
                assert!(gone.iter().all(|gone| book.contains(&**gone)), "seed {seed}: {gone:?} of {book:?}");
                book.retain(|name| !request.resource_names_unsubscribe.iter().any(|gone| **gone == **name));
                if !request.response_nonce.is_empty() {
                    assert_eq!((request.response_nonce, request.error_detail.is_some()), owed.remove(0));
                }
            }
            assert!(owed.is_empty() && (!open || book == wanted), "seed {seed}: {book:?}, {wanted:?}");
        }
    }
}
