//! Scripted upstreams: they note what reaches them and answer as the case says.

mod http1;
mod http2;
mod script;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use serde_json::{Map, Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio_rustls::TlsAcceptor;

use crate::case::{self, Act, Rule, UpstreamKind};
use crate::certs::{Certs, common_name};
use crate::error::{Context, Result};
use crate::grpc;
use crate::http1::by_name;
use crate::net::{End, Stream, Wire, shown, text};
use crate::protobuf::{self, Ids};

pub use http2::{header_map, lines};
pub use script::run as run_script;

/// One request, as it arrived.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Number of the connection, from 1.
    pub conn: usize,
    /// Start line (or pseudo headers) and headers.
    pub head: Vec<String>,
    /// Body.
    pub body: String,
    /// What a gRPC upstream or a collector was sent (see [`crate::protobuf`]), in place of the body.
    pub messages: Option<Value>,
    /// Trailers.
    pub trailers: Vec<String>,
    /// The body did not come to its end.
    pub truncated: bool,
}

const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms: ";
const WHOLE_TIMEOUT: &str = "x-envoy-expected-rq-timeout-ms: 15000";

impl Seen {
    /// The same request id, and all else that attempts share; an internal redirect has another path.
    fn is_retry_of(&self, earlier: &Seen) -> bool {
        let shared = |seen: &Seen| -> Vec<String> {
            let own =
                |line: &&String| !line.starts_with(EXPECTED) && !line.starts_with("x-envoy-attempt-count: ");
            seen.head.iter().filter(own).cloned().collect()
        };
        self.head.iter().any(|line| line.starts_with("x-request-id: ")) && shared(self) == shared(earlier)
    }

    fn observation(&self, earlier: &[Seen]) -> Value {
        let start = self.head.iter().take_while(|l| l.starts_with(':')).count().max(1);
        let mut head = self.head.clone();
        if earlier.iter().any(|one| self.is_retry_of(one)) {
            // A retry may come before a millisecond of the default timeout has passed, or after.
            for line in head.iter_mut().filter(|line| line.as_str() == WHOLE_TIMEOUT) {
                *line = format!("{EXPECTED}LESS");
            }
        }
        if self.messages.is_some() {
            // Times and ids of the body make its length.
            for line in head.iter_mut().filter(|line| line.starts_with("content-length: ")) {
                *line = "content-length: LENGTH".to_owned();
            }
        }
        let mut map = json!({
            "conn": self.conn,
            "head": head,
            "headers": by_name(head.iter().skip(start)),
            "body": self.body,
        });
        let pseudo = |name: &str| self.head.iter().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
        map["line"] = match self.head.first() {
            Some(line) if !line.starts_with(':') => line.as_str().into(),
            _ => format!("{} {} HTTP/2", pseudo(":method: "), pseudo(":path: ")).into(),
        };
        if let Some(messages) = &self.messages {
            map["messages"] = messages.clone();
            map["body"] = "".into();
        }
        if !self.trailers.is_empty() {
            map["trailers"] = self.trailers.clone().into();
        }
        if self.truncated {
            map["truncated"] = true.into();
        }
        map
    }
}

/// One connection.
#[derive(Debug, Clone, Default)]
struct Connection {
    tls: Option<Value>,
    received: Option<String>,
    end: Option<String>,
}

/// An upstream that listens.
pub struct Upstream {
    name: String,
    script: case::Upstream,
    tls: Option<Arc<ServerConfig>>,
    seen: RefCell<Vec<Seen>>,
    connections: RefCell<Vec<Connection>>,
    requests: Cell<usize>,
    ids: RefCell<Ids>,
}

impl Upstream {
    /// Starts to listen; the second value is the port.
    pub async fn start(name: &str, script: &case::Upstream, certs: &Certs) -> Result<(Rc<Upstream>, u16)> {
        let host = script.host.as_deref().unwrap_or("127.0.0.1");
        let listener = TcpListener::bind((host, 0)).await.trying(format!("listen for upstream {name}"))?;
        let port = listener.local_addr().trying("ask for the port")?.port();
        let upstream = Rc::new(Upstream {
            name: name.to_owned(),
            script: script.clone(),
            tls: script.tls.as_ref().map(|tls| certs.server_config(tls)).transpose()?,
            seen: RefCell::default(),
            connections: RefCell::default(),
            requests: Cell::new(0),
            ids: RefCell::default(),
        });
        let accepting = Rc::clone(&upstream);
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                spawn_local(Rc::clone(&accepting).connection(stream));
            }
        });
        Ok((upstream, port))
    }

    async fn connection(self: Rc<Self>, mut stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let behind = self.script.tls.as_ref().map_or(0, |tls| tls.behind);
        if behind > 0 && stream.read_exact(&mut vec![0; behind]).await.is_err() {
            return;
        }
        self.connections.borrow_mut().push(Connection::default());
        let conn = self.connections.borrow().len();
        let stream = match &self.tls {
            None => Stream::Tcp(stream),
            Some(config) => match TlsAcceptor::from(Arc::clone(config)).accept(stream).await {
                Ok(stream) => {
                    let state = stream.get_ref().1;
                    let peer = state.peer_certificates().and_then(|c| common_name(c.first()?));
                    self.note(conn, |c| {
                        c.tls = Some(json!({
                            "sni": state.server_name(),
                            "alpn": state.alpn_protocol().map(text),
                            "peer": peer,
                        }));
                    });
                    Stream::TlsServer(Box::new(stream))
                }
                Err(_) => return self.note(conn, |c| c.tls = Some("failed".into())),
            },
        };
        let mut wire = Wire::new(stream);
        match self.script.kind {
            UpstreamKind::Http2 => http2::serve(&self, wire, conn).await,
            UpstreamKind::Http1 => {
                let over = script::run(&mut wire, &self.script.on_connect, &self.name).await;
                if !over {
                    http1::serve(&self, &mut wire, conn).await;
                }
                self.ended(conn, &wire);
            }
            UpstreamKind::Tcp | UpstreamKind::Echo => {
                let echo = [Act::Echo];
                let acts =
                    if self.script.kind == UpstreamKind::Echo { &echo[..] } else { &self.script.on_connect };
                let over = script::run(&mut wire, acts, &self.name).await;
                if !over {
                    wire.drain(Duration::from_secs(10)).await;
                }
                let received = text(&wire.seen);
                self.note(conn, |c| c.received = Some(received));
                self.ended(conn, &wire);
            }
        }
    }

    fn note(&self, conn: usize, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = self.connections.borrow_mut().get_mut(conn - 1) {
            change(connection);
        }
    }

    fn ended(&self, conn: usize, wire: &Wire) {
        let end = wire.end.map_or("us", End::name);
        self.note(conn, |c| c.end = Some(end.to_owned()));
    }

    /// Notes a request and picks its rule.
    fn request(&self, seen: Seen, path: &str) -> (usize, Option<Rule>) {
        self.requests.set(self.requests.get() + 1);
        let number = self.requests.get();
        let rule = self.script.rules.iter().find(|rule| {
            rule.nth.is_none_or(|nth| nth == number)
                && rule.path.as_deref().is_none_or(|wanted| match wanted.strip_suffix('*') {
                    Some(prefix) => path.starts_with(prefix),
                    None => path == wanted,
                })
        });
        self.seen.borrow_mut().push(seen);
        (number - 1, rule.cloned())
    }

    fn update(&self, index: usize, change: impl FnOnce(&mut Seen)) {
        if let Some(seen) = self.seen.borrow_mut().get_mut(index) {
            change(seen);
        }
    }

    /// Notes a body, as far as it has come.
    fn note_body(&self, index: usize, path: &str, bytes: &[u8]) {
        let messages = match &self.script.grpc {
            Some(grpc) => Some(grpc::messages(&grpc.request, bytes).into()),
            None => protobuf::messages(path, bytes, &mut self.ids.borrow_mut()),
        };
        self.update(index, |seen| {
            seen.body = shown(bytes);
            seen.messages = messages;
        });
    }

    /// All requests, or for byte upstreams all connections.
    pub fn observation(&self) -> Value {
        let seen = self.seen.borrow();
        let requests: Vec<Value> =
            seen.iter().enumerate().map(|(i, one)| one.observation(&seen[..i])).collect();
        let plain = matches!(self.script.kind, UpstreamKind::Tcp | UpstreamKind::Echo);
        if !plain && self.tls.is_none() && !self.script.conns {
            return requests.into();
        }
        let connections: Vec<Value> = self
            .connections
            .borrow()
            .iter()
            .map(|c| {
                let mut map = Map::new();
                if let Some(tls) = &c.tls {
                    map.insert("tls".into(), tls.clone());
                }
                if let Some(received) = &c.received {
                    map.insert("received".into(), received.as_str().into());
                }
                if self.script.conns || plain {
                    map.insert("end".into(), c.end.clone().unwrap_or("open".into()).into());
                }
                map.into()
            })
            .collect();
        if plain { connections.into() } else { json!({ "requests": requests, "conns": connections }) }
    }

    /// Number of requests so far, and of connections.
    pub fn counts(&self) -> (usize, usize) {
        (self.seen.borrow().len(), self.connections.borrow().len())
    }
}
