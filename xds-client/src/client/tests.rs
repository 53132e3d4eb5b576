//! The client over a transport that the test holds in its hands.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::wire::{Any, DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse};
use crate::{
    Call, Client, Config, Decoded, End, Failure, LocalFuture, Observer, RateLimit, Resource, Transport,
    Update, Variant, Watch, Watcher, grpc, types, wire,
};
use bytes::Bytes;
use prost::Message;
use tokio::task::LocalSet;

/// The other end: what was sent, and what is to come.
#[derive(Default)]
struct Server {
    opened: Cell<usize>,
    refuse: Cell<bool>,
    requests: RefCell<Vec<Bytes>>,
    chunks: RefCell<VecDeque<Result<Bytes, End>>>,
    read: Cell<usize>,
    waker: RefCell<Option<Waker>>,
}

impl Server {
    fn push(&self, chunk: Result<Bytes, End>) {
        self.chunks.borrow_mut().push_back(chunk);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn world(&self, type_url: &str, version: &str, values: &[&str]) {
        let any =
            |value: &&str| Any { type_url: type_url.into(), value: Bytes::copy_from_slice(value.as_bytes()) };
        let resources = values.iter().map(any).collect();
        let (version_info, nonce) = (version.to_owned(), format!("n{version}"));
        let type_url = type_url.to_owned();
        let response = DiscoveryResponse { version_info, resources, type_url, nonce, control_plane: None };
        self.push(Ok(grpc::framed(&response)));
    }

    /// `type: names @version !refused`, in short.
    fn said(&self) -> Vec<String> {
        let requests = self.requests.take();
        let say = |bytes: Bytes| {
            let r = DiscoveryRequest::decode(bytes.slice(5..)).unwrap();
            let short = r.type_url.rsplit('.').next().unwrap().to_owned();
            let error = r.error_detail.map(|e| format!(" !{}", e.message)).unwrap_or_default();
            let node = if r.node.is_some() { " node" } else { "" };
            format!(
                "{short}:{} @{}/{}{node}{error}",
                r.resource_names.join(","),
                r.version_info,
                r.response_nonce
            )
        };
        requests.into_iter().map(say).collect()
    }
}

struct Wire(Rc<Server>);

impl Transport for Wire {
    fn open<'a>(&'a self, _path: &'a str) -> LocalFuture<'a, Result<Box<dyn Call>, End>> {
        Box::pin(async move {
            if self.0.refuse.get() {
                return Err(End::unavailable("refused"));
            }
            self.0.opened.set(self.0.opened.get() + 1);
            Ok(Box::new(Wire(self.0.clone())) as Box<dyn Call>)
        })
    }
}

impl Call for Wire {
    fn send(&mut self, bytes: Bytes) {
        self.0.requests.borrow_mut().push(bytes);
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        Poll::Ready(Ok(()))
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, End>> {
        match self.0.chunks.borrow_mut().pop_front() {
            Some(chunk) => {
                self.0.read.set(self.0.read.get() + 1);
                Poll::Ready(chunk)
            }
            None => {
                self.0.waker.replace(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

/// Resources are texts: their own names, up to a `=`. Refuses what says `bad`, cannot decode `garbage`.
#[derive(Default)]
struct Owner {
    log: RefCell<Vec<String>>,
    on_update: RefCell<Option<Box<dyn Fn()>>>,
}

impl Watcher for Owner {
    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        let bytes = resource.value.unwrap_or_default();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        if text == "garbage" {
            return Err("cannot be decoded".to_owned());
        }
        let name = text.split('=').next().unwrap_or_default().to_owned();
        let (version, aliases) = (resource.version, resource.aliases);
        Ok(Decoded { name, version, aliases, bytes, message: Box::new(text) })
    }

    fn update(&self, update: &Update<'_>) -> Result<(), String> {
        let texts: Vec<_> =
            update.resources.iter().filter_map(|r| r.message.downcast_ref::<String>()).collect();
        let texts: Vec<_> = texts.into_iter().map(String::as_str).collect();
        self.log.borrow_mut().push(format!("{}-{}", texts.join(","), update.removed.join(",")));
        if let Some(act) = &*self.on_update.borrow() {
            act();
        }
        if texts.iter().any(|text| text.ends_with("bad")) { Err("it is bad".to_owned()) } else { Ok(()) }
    }

    fn failed(&self, why: Failure<'_>) {
        self.log.borrow_mut().push(format!("{why:?}"));
    }
}

#[derive(Default)]
struct Book(RefCell<Vec<String>>);

impl Observer for Book {
    fn connected(&self, connected: bool) {
        self.0.borrow_mut().push(format!("connected {connected}"));
    }

    fn rate_limited(&self) {
        self.0.borrow_mut().push("limited".to_owned());
    }
}

fn config(variant: Variant) -> Config {
    Config {
        path: types::aggregated(variant).to_owned(),
        variant,
        node: Bytes::from_static(b"\x0a\x01n"),
        node_on_first_message_only: true,
        backoff: (Duration::from_millis(500), Duration::from_secs(30)),
        max_message: 0,
        rate_limit: None,
    }
}

fn client(config: Config) -> (Client, Rc<Server>, Rc<Book>) {
    let (server, book) = (Rc::new(Server::default()), Rc::new(Book::default()));
    let client = Client::new(config, Rc::new(Wire(server.clone())), book.clone());
    client.start();
    (client, server, book)
}

fn watch(client: &Client, type_url: &str, names: &[&str]) -> (Watch, Rc<Owner>) {
    let owner = Rc::new(Owner::default());
    (client.watch(type_url, names, owner.clone(), Some(Duration::from_secs(15))), owner)
}

/// Lets everything happen that can, without time going by.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    LocalSet::new().block_on(&runtime.unwrap(), test);
}

#[test]
fn what_a_response_makes_others_ask_for_goes_before_its_answer() {
    run(async {
        let (client, server, _) = client(config(Variant::StateOfTheWorld));
        let (_cds, clusters) = watch(&client, types::CLUSTER, &[]);
        settle().await;
        assert_eq!(server.said(), ["Cluster: @/ node"]);
        let endpoints = Rc::new(Owner::default());
        let held: Rc<RefCell<Vec<Watch>>> = Rc::default();
        let (from, to, keep) = (client.clone(), endpoints.clone(), held.clone());
        clusters.on_update.replace(Some(Box::new(move || {
            let _together = from.pause(&[types::ENDPOINTS]);
            for name in ["a", "b"] {
                keep.borrow_mut().push(from.watch(types::ENDPOINTS, &[name], to.clone(), None));
            }
        })));
        server.world(types::CLUSTER, "1", &["a", "b"]);
        settle().await;
        assert_eq!(server.said(), ["ClusterLoadAssignment:a,b @/", "Cluster: @1/n1"]);
        // Each watcher gets its own, the newest first.
        server.world(types::ENDPOINTS, "2", &["a=1", "b=2", "c=3"]);
        settle().await;
        assert_eq!(*endpoints.log.borrow(), ["b=2-", "a=1-"]);
        held.borrow_mut().pop();
        settle().await;
        assert_eq!(server.said(), ["ClusterLoadAssignment:a,b @2/n2", "ClusterLoadAssignment:a @2/n2"]);
    });
}

#[test]
fn a_refusal_is_told_to_the_server_and_to_all_watchers() {
    run(async {
        let (client, server, _) = client(config(Variant::StateOfTheWorld));
        let (_a, first) = watch(&client, types::ROUTES, &["a"]);
        let (_b, second) = watch(&client, types::ROUTES, &["b"]);
        settle().await;
        server.world(types::ROUTES, "1", &["a=1", "b=bad"]);
        settle().await;
        // The newest is asked first, and its refusal ends it, as in Envoy.
        assert_eq!(*second.log.borrow(), ["b=bad-", "Rejected(\"it is bad\")"]);
        assert_eq!(*first.log.borrow(), ["Rejected(\"it is bad\")"]);
        server.world(types::ROUTES, "2", &["a=1", "garbage"]);
        settle().await;
        assert_eq!(first.log.borrow().len(), 2, "nothing is handed out where one cannot be decoded");
        server.world(types::ROUTES, "3", &["a=1"]);
        settle().await;
        let said = server.said();
        assert_eq!(
            said[1..],
            [
                "RouteConfiguration:a,b @/n1 !it is bad",
                "RouteConfiguration:a,b @/n2 !cannot be decoded",
                "RouteConfiguration:a,b @3/n3"
            ]
        );
    });
}

#[test]
fn of_two_with_one_name_the_first_counts_for_who_asked_by_name() {
    run(async {
        let (client, server, _) = client(config(Variant::StateOfTheWorld));
        let (_a, named) = watch(&client, types::ROUTES, &["a"]);
        let (_all, everything) = watch(&client, types::CLUSTER, &[]);
        settle().await;
        for type_url in [types::ROUTES, types::CLUSTER] {
            server.world(type_url, "1", &["a=1", "b=1", "a=2"]);
        }
        settle().await;
        assert_eq!(*named.log.borrow(), ["a=1-"]);
        assert_eq!(*everything.log.borrow(), ["a=1,b=1,a=2-"]);
    });
}

#[test]
fn a_new_stream_begins_with_what_is_known() {
    run(async {
        let (client, server, book) = client(config(Variant::StateOfTheWorld));
        let (_cds, clusters) = watch(&client, types::CLUSTER, &[]);
        let (_eds, _) = watch(&client, types::ENDPOINTS, &["a"]);
        server.world(types::CLUSTER, "7", &["a"]);
        settle().await;
        server.said();
        server.push(Err(End::unavailable("gone")));
        settle().await;
        assert_eq!(clusters.log.borrow().last().unwrap(), "Connection");
        assert_eq!(server.opened.get(), 1, "not at once");
        tokio::time::sleep(Duration::from_millis(501)).await;
        settle().await;
        assert_eq!(server.said(), ["Cluster: @7/ node", "ClusterLoadAssignment:a @/"]);
        assert_eq!(*book.0.borrow(), ["connected true", "connected false", "connected true"]);

        // Servers that refuse are asked again, ever later, and for ever.
        server.refuse.set(true);
        server.push(Err(End::unavailable("gone")));
        tokio::time::sleep(Duration::from_secs(600)).await;
        let failures = clusters.log.borrow().iter().filter(|line| *line == "Connection").count();
        assert!((20..400).contains(&failures), "{failures}");
        server.refuse.set(false);
        tokio::time::sleep(Duration::from_secs(31)).await;
        settle().await;
        assert_eq!(server.opened.get(), 3);
    });
}

#[test]
fn who_gets_no_answer_in_time_is_told_once() {
    run(async {
        let (client, server, _) = client(config(Variant::StateOfTheWorld));
        let (_a, late) = watch(&client, types::ROUTES, &["a"]);
        let (_b, served) = watch(&client, types::ROUTES, &["b"]);
        server.world(types::ROUTES, "1", &["b=1"]);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(
            (&*late.log.borrow(), &*served.log.borrow()),
            (&vec!["Timeout".to_owned()], &vec!["b=1-".to_owned()])
        );
    });
}

#[test]
fn a_fast_server_waits_for_answers() {
    run(async {
        let (client, server, _) = client(config(Variant::StateOfTheWorld));
        let (_cds, _) = watch(&client, types::CLUSTER, &[]);
        settle().await;
        for version in 0..1000 {
            server.world(types::CLUSTER, &version.to_string(), &["a"]);
        }
        settle().await;
        // As many answers as responses were read, and the first request.
        assert_eq!(server.said().len(), server.read.get() + 1);
    });
}

#[test]
fn the_rate_limit_holds_requests_back() {
    run(async {
        let limit = Some(RateLimit { max_tokens: 2, fill_rate: 1.0 });
        let (client, server, book) = client(Config { rate_limit: limit, ..config(Variant::StateOfTheWorld) });
        let watches: Vec<_> = (0..4).map(|i| watch(&client, &format!("t.{i}"), &[])).collect();
        settle().await;
        assert_eq!(server.said().len(), 2);
        assert!(book.0.borrow().iter().any(|line| line == "limited"));
        // The bucket reads the real clock, which does not stand still here.
        std::thread::sleep(Duration::from_millis(1100));
        tokio::time::sleep(Duration::from_secs(2)).await;
        settle().await;
        assert_eq!(server.said().len(), 1);
        drop(watches);
    });
}

#[test]
fn delta_gives_each_watcher_its_changes() {
    run(async {
        let (client, server, _) = client(config(Variant::Delta));
        let (_cds, clusters) = watch(&client, types::CLUSTER, &[]);
        let (eds, endpoints) = watch(&client, types::ENDPOINTS, &["a"]);
        settle().await;
        let resource = |type_url: &str, name: &str| wire::Resource {
            name: name.into(),
            version: "1".into(),
            resource: Some(Any { type_url: type_url.into(), value: Bytes::copy_from_slice(name.as_bytes()) }),
            aliases: Vec::new(),
            ttl: Some(wire::Duration { seconds: 0, nanos: 50_000_000 }),
        };
        let change = |type_url: &str, names: &[&str], removed: &[&str]| DeltaDiscoveryResponse {
            type_url: type_url.into(),
            nonce: "n".into(),
            resources: names.iter().map(|name| resource(type_url, name)).collect(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        server.push(Ok(grpc::framed(&change(types::CLUSTER, &["x", "y"], &["z"]))));
        server.push(Ok(grpc::framed(&change(types::ENDPOINTS, &["a", "other"], &[]))));
        settle().await;
        assert_eq!(
            (&*clusters.log.borrow(), &*endpoints.log.borrow()),
            (&vec!["x,y-z".to_owned()], &vec!["a-".to_owned()])
        );
        // What nobody asked for is not even decoded; of a type that was only paused nobody answers.
        server.push(Ok(grpc::framed(&change(types::ENDPOINTS, &["garbage"], &[]))));
        let _pause = client.pause(&[types::ROUTES]);
        let asked = server.requests.borrow().len();
        server.push(Ok(grpc::framed(&change(types::ROUTES, &["r"], &[]))));
        settle().await;
        let answer = server.requests.borrow().last().cloned().unwrap();
        assert_eq!(DeltaDiscoveryRequest::decode(answer.slice(5..)).unwrap().error_detail, None);
        assert_eq!(server.requests.borrow().len(), asked + 1);
        eds.update(&["b"]);
        settle().await;
        let last = server.requests.borrow().last().cloned().unwrap();
        let last = DeltaDiscoveryRequest::decode(last.slice(5..)).unwrap();
        assert_eq!(
            (last.resource_names_subscribe, last.resource_names_unsubscribe),
            (vec!["b".into()], vec!["a".into()])
        );
        // What is not renewed dies.
        std::thread::sleep(Duration::from_millis(60));
        tokio::time::sleep(Duration::from_secs(1)).await;
        settle().await;
        assert_eq!(clusters.log.borrow()[1], "-x,y");
    });
}

#[test]
fn heart_beats_alone_say_nothing_to_who_wants_everything() {
    run(async {
        let (client, server, _) = client(config(Variant::StateOfTheWorld));
        let (_cds, clusters) = watch(&client, types::CLUSTER, &[]);
        settle().await;
        server.world(types::CLUSTER, "1", &["a"]);
        settle().await;
        let beat = |seconds| {
            let ttl = Some(wire::Duration { seconds, nanos: 0 });
            let beat = wire::Resource { name: "a".into(), ttl, ..wire::Resource::default() };
            let type_url = "type.googleapis.com/envoy.service.discovery.v3.Resource".to_owned();
            let value = beat.encode_to_vec().into();
            grpc::framed(&DiscoveryResponse {
                version_info: "1".into(),
                resources: vec![Any { type_url, value }],
                type_url: types::CLUSTER.into(),
                nonce: "beat".into(),
                control_plane: None,
            })
        };
        server.said();
        server.push(Ok(beat(10)));
        settle().await;
        assert_eq!((clusters.log.borrow().len(), server.said()), (1, vec!["Cluster: @1/beat".to_owned()]));
        server.push(Ok(beat(-1)));
        settle().await;
        assert!(server.said()[0].contains("!a: ttl: Invalid duration"));
    });
}
