//! `envoy.filters.network.mongo_proxy`: counts what MongoDB's clients and servers say to each other.
//!
//! It looks at the bytes and holds none back. From the first message on that it cannot read (OP_MSG, which all newer
//! clients speak, is one, as in Envoy) it looks no more: `decoding_error`.
//!
//! Refused by name: `access_log`, `delay` and `emit_dynamic_metadata`. Runtime keys `mongo.*` are not read, and a
//! connection is not closed on drain (`cx_drain_close` stays 0).

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
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

use wire::{Document, Message, Next, Value};

/// Queries of a connection whose replies are still to come.
const MOST_ACTIVE: usize = 1024;
/// Collections, and callsites in them, that have stats.
const MOST_NAMES: usize = 1000;
/// Bytes of such a name; MongoDB takes 255 of database and collection.
const LONGEST_NAME: usize = 512;

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
    /// `collection.…` that have stats. Making a stat takes a lock as well.
    names: Mutex<HashSet<String>>,
}

impl Mongo {
    /// Whether there may be stats below this name.
    fn knows(&self, name: &str) -> bool {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = name.len() <= LONGEST_NAME && names.len() < MOST_NAMES;
        names.contains(name) || (fits && names.insert(name.to_owned()))
    }
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
    let filter = Mongo { counters: Counters::new(&scope), scope, commands, names: Mutex::default() };
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
            incoming: Some(Default::default()),
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

/// One direction.
#[derive(Default)]
struct Incoming {
    /// What has come of a message.
    buffer: Vec<u8>,
    /// How much is still to come of one that was passed over.
    skip: usize,
}

/// One connection.
struct Sniffer {
    mongo: Arc<Mongo>,
    /// From the client and to it; none once something could not be read.
    incoming: Option<[Incoming; 2]>,
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
        let Some(mut incoming) = self.incoming.take() else { return };
        match self.take(&mut incoming[direction], bytes) {
            Ok(()) => self.incoming = Some(incoming),
            Err(wire::Malformed) => self.mongo.counters.decoding_error.inc(),
        }
    }

    fn take(&mut self, incoming: &mut Incoming, bytes: &[u8]) -> Result<(), wire::Malformed> {
        let Incoming { buffer, skip } = incoming;
        let over = bytes.len().min(*skip);
        *skip -= over;
        buffer.extend_from_slice(&bytes[over..]);
        while let Next::Message(message, length) = wire::decode(buffer)? {
            self.message(&message)?;
            let here = length.min(buffer.len());
            buffer.drain(..here);
            *skip = length - here;
        }
        Ok(())
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
        if self.active.len() >= MOST_ACTIVE {
            return Err(wire::Malformed);
        }
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
                names.retain(|name| self.mongo.knows(name));
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

#[cfg(test)]
mod tests {
    use sampan_core::stats::Store;

    use super::*;

    fn sniffer() -> Sniffer {
        let scope = Store::new().root();
        let mongo =
            Mongo { counters: Counters::new(&scope), scope, commands: vec![], names: Mutex::default() };
        Sniffer { mongo: Arc::new(mongo), incoming: Some(Default::default()), active: vec![], by_peer: false }
    }

    fn query(id: i32, collection: &str) -> Vec<u8> {
        let rest = [&[0; 4], collection.as_bytes(), &[0; 9], &[5, 0, 0, 0, 0]].concat();
        let words = [16 + rest.len() as i32, id, 0, 2004];
        words.iter().flat_map(|word| word.to_le_bytes()).chain(rest).collect()
    }

    #[test]
    fn a_long_message_is_passed_over() {
        let mut sniffer = sniffer();
        let head: Vec<u8> = [2 << 20, 1, 0, 2002].iter().flat_map(|word: &i32| word.to_le_bytes()).collect();
        let mut whole = [head, vec![0; (2 << 20) - 16]].concat();
        whole.extend(query(1, "db.users"));
        for piece in whole.chunks(30_000) {
            sniffer.read(piece);
            assert!(sniffer.incoming.as_ref().unwrap()[0].buffer.len() <= 30_000);
        }
        assert_eq!(sniffer.active.len(), 1);
    }

    #[test]
    fn what_clients_choose_is_bounded() {
        let mut sniffer = sniffer();
        let long = "x".repeat(LONGEST_NAME);
        sniffer.read(&query(0, &format!("db.{long}")));
        assert!(sniffer.active[0].names.is_empty());
        for id in 1..=MOST_ACTIVE as i32 {
            assert_eq!(sniffer.active.len(), id as usize);
            sniffer.read(&query(id, &format!("db.c{id}")));
        }
        assert_eq!(sniffer.mongo.names.lock().unwrap().len(), MOST_NAMES);
        assert_eq!(sniffer.active.len(), MOST_ACTIVE);
        assert!(sniffer.incoming.is_none(), "one more is an error");
    }
}
