//! What the owner of resources says to the client, and the client to it.

use std::any::Any;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

/// A resource as it came. `value` is a slice of the response; keeping it keeps the response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Empty where a bare resource of the state of the world came: only who decodes it knows its name.
    pub name: String,
    /// The resource's own version; the response's where it has none.
    pub version: String,
    /// The type of the value.
    pub type_url: String,
    /// The encoded message. None: the server has no such resource but answers for `aliases` (VHDS).
    pub value: Option<Bytes>,
    /// The names under which it was asked for (VHDS: `routeconfig/host`).
    pub aliases: Vec<String>,
    /// How long it lives without being sent again.
    pub ttl: Option<Duration>,
}

/// A resource whose bytes were decoded and checked.
pub struct Decoded {
    /// Its name.
    pub name: String,
    /// The resource's own version; the response's where it has none.
    pub version: String,
    /// The names under which it was asked for.
    pub aliases: Vec<String>,
    /// The encoded message: what an identical push is told by. Keeping it keeps the response.
    pub bytes: Bytes,
    /// The message.
    pub message: Box<dyn Any>,
}

/// What a response means for one watcher.
pub struct Update<'a> {
    /// The version of the whole.
    pub version: &'a str,
    /// State of the world: all that is. Delta: what is new or changed.
    pub resources: &'a [Rc<Decoded>],
    /// Delta, and resources whose time to live is over.
    pub removed: &'a [String],
    /// Whether `resources` is a change and not all that is.
    pub delta: bool,
}

/// Why a response, or a part of it, was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Empty where the whole response is meant.
    pub name: String,
    /// Field path and reason.
    pub reason: String,
}

/// The owner of some resources of a type. What it takes of an update of which it refuses a part is its own policy:
/// the answer to the server is a NACK as soon as one watcher refuses.
pub trait Watcher {
    /// Decodes and checks a resource of the type. The first watcher of a type does it for all of them.
    ///
    /// # Errors
    /// What is wrong: the whole response is refused then.
    fn decode(&self, resource: Resource) -> Result<Decoded, String>;

    /// Takes a response, or that resources died of age (then the answer reaches nobody).
    ///
    /// # Errors
    /// What was refused, and why.
    fn update(&self, update: &Update<'_>) -> Result<(), String>;

    /// There is nothing to take, for this reason.
    fn failed(&self, why: Failure<'_>);
}

/// Why there is nothing to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure<'a> {
    /// `initial_fetch_timeout` went by: who waits goes on without.
    Timeout,
    /// The stream ended or was refused; another will be tried.
    Connection,
    /// A response of the type was refused, by this watcher or another.
    Rejected(&'a str),
}
