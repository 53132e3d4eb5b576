//! The protocol's two variants as state machines, one for each type of a stream.

pub mod delta;
pub mod sotw;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::handler::{Refusal, Resource};
use crate::wire;

/// What is asked for by ten thousand names is asked for by their one copy.
pub type Name = Rc<str>;

/// The name that asks for everything.
pub const WILDCARD: &str = "*";

const INTERNAL: i32 = 13;
const MAX_DETAIL: usize = 4096;

/// Which requests of a stream carry the node.
#[derive(Clone, Debug)]
pub struct NodePolicy {
    node: Bytes,
    first_only: bool,
    sent: bool,
}

impl NodePolicy {
    /// `first_only` is `set_node_on_first_message_only`.
    pub fn new(node: Bytes, first_only: bool) -> Self {
        Self { node, first_only, sent: false }
    }

    /// A new stream: its first request carries the node.
    pub fn stream_opened(&mut self) {
        self.sent = false;
    }

    /// The node for the request that is sent now.
    pub fn for_request(&mut self) -> Option<Bytes> {
        let omit = self.first_only && self.sent;
        self.sent = true;
        (!omit).then(|| self.node.clone())
    }
}

/// What is in a response, heart-beats left out.
#[derive(Debug, Default)]
pub struct Batch {
    /// State of the world: all that is. Delta: what is new or changed.
    pub resources: Vec<Resource>,
    /// Delta: what is gone.
    pub removed: Vec<String>,
}

/// When resources die of age.
#[derive(Debug, Default)]
struct Lives(BTreeMap<String, Instant>);

impl Lives {
    fn set(&mut self, name: &str, ttl: Option<Duration>, now: Instant) {
        match ttl.and_then(|ttl| now.checked_add(ttl)) {
            Some(end) => drop(self.0.insert(name.to_owned(), end)),
            None => drop(self.0.remove(name)),
        }
    }

    fn next(&self) -> Option<Instant> {
        self.0.values().min().copied()
    }

    fn expire(&mut self, now: Instant) -> Vec<String> {
        let dead: Vec<_> =
            self.0.iter().filter(|(_, end)| **end <= now).map(|(name, _)| name.clone()).collect();
        for name in &dead {
            self.0.remove(name);
        }
        dead
    }
}

fn ttl(of: Option<wire::Duration>) -> Option<Duration> {
    let of = of?;
    let nanos = u32::try_from(of.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(u64::try_from(of.seconds).ok()?, nanos))
}

/// A time to live below zero refuses the response.
fn check_ttl(resource: &wire::Resource) -> Result<(), Refusal> {
    if resource.ttl.is_some() && ttl(resource.ttl).is_none() {
        return Err(refusal(&resource.name, "ttl: Invalid duration: Expected positive duration"));
    }
    Ok(())
}

/// The error detail of a NACK.
fn detail(refusal: Refusal) -> wire::Status {
    let mut message = match refusal.name.as_str() {
        "" => refusal.reason,
        name => format!("{name}: {}", refusal.reason),
    };
    if message.len() > MAX_DETAIL {
        message.truncate(message.floor_char_boundary(MAX_DETAIL));
        message.push_str("...(truncated)");
    }
    wire::Status { code: INTERNAL, message }
}

fn refusal(name: &str, reason: impl Into<String>) -> Refusal {
    Refusal { name: name.to_owned(), reason: reason.into() }
}
