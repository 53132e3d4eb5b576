//! `envoy.filters.network.mongo_proxy`: counts what MongoDB's clients and servers say to each other.
//!
//! It looks at the bytes and holds none back. From the first message on that it cannot read (OP_MSG, which all newer
//! clients speak, is one, as in Envoy) it looks no more: `decoding_error`.
//!
//! Refused by name: `access_log`, `delay` and `emit_dynamic_metadata`. Runtime keys `mongo.*` are not read, and a
//! connection is not closed on drain (`cx_drain_close` stays 0).

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::extensions::filters::network::mongo_proxy::v3::MongoProxy as Model;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::stats::{Scope, Unit};
use sampan_tls::Tap;

use crate::context::{FactoryContext, Worker};
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, NetworkFilterRegistry, Verdict};
use crate::proto::decode;
use crate::stats::stats;

mod wire;

use wire::{Document, Message, Value};

stats! {
    /// `mongo.PREFIX.*`
    Counters {
        counters:
            cx_destroy_local_with_active_rq cx_destroy_remote_with_active_rq cx_drain_close decoding_error
            delays_injected op_command op_command_reply op_get_more op_insert op_kill_cursors op_query
            op_query_await_data op_query_exhaust op_query_multi_get op_query_no_cursor_timeout
            op_query_no_max_time op_query_scatter_get op_query_tailable_cursor op_reply
            op_reply_cursor_not_found op_reply_query_failure op_reply_valid_cursor;
        gauges: op_query_active;
    }
}

/// Registers the filter.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register("envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy", make);
}

struct Mongo {
    counters: Counters,
    scope: Scope,
    commands: Vec<String>,
}

fn make(any: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    let message: Model = decode(any)?;
    for (set, field) in [
        (!message.access_log.is_empty(), "access_log"),
        (message.delay.is_some(), "delay"),
        (message.emit_dynamic_metadata, "emit_dynamic_metadata"),
    ] {
        if set {
            return Err(ConfigError::unsupported(field).at(field));
        }
    }
    let commands = if message.commands.is_empty() {
        ["delete", "insert", "update"].map(str::to_owned).to_vec()
    } else {
        message.commands
    };
    let scope = context.root_scope().scope("mongo").scope(&message.stat_prefix);
    let filter = Mongo { counters: Counters::new(&scope), scope, commands };
    Ok(NetworkFilter::Connection(Arc::new(Filter(Arc::new(filter)))))
}

struct Filter(Arc<Mongo>);

impl ConnectionFilter for Filter {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        downstream.transport.tap(Box::new(Sniffer {
            mongo: self.0.clone(),
            buffers: Some(Default::default()),
            active: Vec::new(),
            by_peer: false,
        }));
        Box::pin(std::future::ready(Verdict::Continue))
    }
}

/// A query whose reply is still to come.
struct Active {
    id: i32,
    /// Below which names its reply is counted.
    names: Vec<String>,
    start: Instant,
}

/// One connection.
struct Sniffer {
    mongo: Arc<Mongo>,
    /// What has come of a message, from the client and to it; none once something could not be read.
    buffers: Option<[Vec<u8>; 2]>,
    active: Vec<Active>,
    by_peer: bool,
}

impl Tap for Sniffer {
    fn read(&mut self, bytes: &[u8]) {
        self.look(0, bytes);
    }

    fn written(&mut self, bytes: &[u8]) {
        self.look(1, bytes);
    }

    fn ended(&mut self) {
        self.by_peer = true;
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        let counters = &self.mongo.counters;
        counters.op_query_active.sub(self.active.len() as u64);
        match (self.active.is_empty(), self.by_peer) {
            (true, _) => {}
            (false, true) => counters.cx_destroy_remote_with_active_rq.inc(),
            (false, false) => counters.cx_destroy_local_with_active_rq.inc(),
        }
    }
}

impl Sniffer {
    fn look(&mut self, direction: usize, bytes: &[u8]) {
        let Some(mut buffers) = self.buffers.take() else { return };
        let buffer = &mut buffers[direction];
        buffer.extend_from_slice(bytes);
        loop {
            let taken = match wire::decode(buffer) {
                Ok(None) => break,
                Ok(Some((message, length))) => self.message(&message).map(|()| length),
                Err(malformed) => Err(malformed),
            };
            match taken {
                Ok(length) => drop(buffer.drain(..length)),
                Err(_) => return self.mongo.counters.decoding_error.inc(),
            }
        }
        self.buffers = Some(buffers);
    }

    fn message(&mut self, message: &Message) -> Result<(), wire::Malformed> {
        let counters = &self.mongo.counters;
        match message {
            Message::Query { id, flags, collection, query } => {
                return self.query(*id, *flags, collection, query);
            }
            Message::Reply { to, flags, cursor, documents, size } => {
                counters.op_reply.inc();
                for (counter, on) in [
                    (&counters.op_reply_valid_cursor, *cursor != 0),
                    (&counters.op_reply_cursor_not_found, flags & 1 != 0),
                    (&counters.op_reply_query_failure, flags & 2 != 0),
                ] {
                    counter.add(u64::from(on));
                }
                self.reply(*to, *documents as u64, *size as u64);
            }
            Message::GetMore => counters.op_get_more.inc(),
            Message::Insert => counters.op_insert.inc(),
            Message::KillCursors => counters.op_kill_cursors.inc(),
            Message::Command => counters.op_command.inc(),
            Message::CommandReply => counters.op_command_reply.inc(),
        }
        Ok(())
    }

    fn query(&mut self, id: i32, flags: i32, full: &str, query: &Document) -> Result<(), wire::Malformed> {
        let counters = &self.mongo.counters;
        counters.op_query.inc();
        for (counter, bit) in [
            (&counters.op_query_tailable_cursor, 1),
            (&counters.op_query_no_cursor_timeout, 4),
            (&counters.op_query_await_data, 5),
            (&counters.op_query_exhaust, 6),
        ] {
            counter.add(u64::from(flags & (1 << bit) != 0));
        }
        let names = match What::of(full, query)? {
            What::Command(name) => {
                let known = self.mongo.commands.contains(&name);
                let name = format!("cmd.{}", if known { name.as_str() } else { "unknown_command" });
                self.mongo.scope.counter(&format!("{name}.total")).inc();
                vec![name]
            }
            What::Query { collection, callsite, timed, kind } => {
                let mut names = vec![format!("collection.{collection}")];
                names.extend(callsite.map(|site| format!("collection.{collection}.callsite.{site}")));
                names.iter_mut().for_each(|name| name.push_str(".query"));
                for name in &names {
                    for part in std::iter::once("total").chain(kind) {
                        self.mongo.scope.counter(&format!("{name}.{part}")).inc();
                    }
                }
                counters.op_query_no_max_time.add(u64::from(!timed));
                counters.op_query_scatter_get.add(u64::from(kind == Some("scatter_get")));
                counters.op_query_multi_get.add(u64::from(kind == Some("multi_get")));
                names
            }
        };
        counters.op_query_active.inc();
        self.active.push(Active { id, names, start: Instant::now() });
        Ok(())
    }

    fn reply(&mut self, to: i32, documents: u64, size: u64) {
        let Some(at) = self.active.iter().position(|active| active.id == to) else { return };
        let active = self.active.remove(at);
        self.mongo.counters.op_query_active.dec();
        let time = u64::try_from(active.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        for name in &active.names {
            for (what, unit, value) in [
                ("reply_num_docs", Unit::Unspecified, documents),
                ("reply_size", Unit::Bytes, size),
                ("reply_time_ms", Unit::Milliseconds, time),
            ] {
                self.mongo.scope.histogram(&format!("{name}.{what}"), unit).record(value);
            }
        }
    }
}

/// What a query is.
enum What {
    Command(String),
    Query { collection: String, callsite: Option<String>, timed: bool, kind: Option<&'static str> },
}

impl What {
    fn of(full: &str, query: &Document) -> Result<Self, wire::Malformed> {
        if full.contains("$cmd") {
            let command = query.document("$query").unwrap_or(query);
            let (name, value) = command.fields.first().ok_or(wire::Malformed)?;
            return match (name.as_str(), value) {
                ("find", Value::Text(collection)) => Ok(Self::Query {
                    collection: collection.clone(),
                    callsite: command.text("comment").and_then(callsite),
                    timed: false,
                    kind: command.document("filter").map_or(Some("scatter_get"), kind),
                }),
                ("find", _) => Err(wire::Malformed),
                (name, _) => Ok(Self::Command(alias(name).to_owned())),
            };
        }
        let (_, collection) = full.split_once('.').ok_or(wire::Malformed)?;
        let time = query.find("$maxTimeMS").or_else(|| query.find("maxTimeMS"));
        let inner = || query.document("$query").map_or(Some("scatter_get"), kind);
        Ok(Self::Query {
            collection: collection.to_owned(),
            callsite: query.text("$comment").and_then(callsite),
            timed: matches!(time, Some(Value::Number(n)) if *n as i32 >= 1),
            kind: if query.find("_id").is_some() { kind(query) } else { inner() },
        })
    }
}

/// Whether the whole collection is searched, many documents by `_id`, or one.
fn kind(document: &Document) -> Option<&'static str> {
    match document.find("_id") {
        None => Some("scatter_get"),
        Some(Value::Document(_) | Value::Array) => Some("multi_get"),
        Some(_) => None,
    }
}

fn alias(command: &str) -> &str {
    match command {
        "collstats" => "collStats",
        "dbstats" => "dbStats",
        "findandmodify" => "findAndModify",
        "getlasterror" => "getLastError",
        "ismaster" => "isMaster",
        other => other,
    }
}

/// `callingFunction` of a comment in JSON.
fn callsite(comment: &str) -> Option<String> {
    let json: serde_json::Value = serde_json::from_str(comment).ok()?;
    json.get("callingFunction")?.as_str().map(str::to_owned).filter(|site| !site.is_empty())
}
