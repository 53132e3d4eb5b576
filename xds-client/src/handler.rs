//! What the owner of a type says to the client, and the client to it.

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

/// One response, to be answered once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// The version of the whole.
    pub version: String,
    /// State of the world: all that is. Delta: what is new or changed. Heart-beats are not among them.
    pub resources: Vec<Resource>,
    /// Delta, and resources whose time to live is over.
    pub removed: Vec<String>,
}

/// Why a resource was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Empty where the whole response is meant.
    pub name: String,
    /// Field path and reason.
    pub reason: String,
}

/// The owner of one type. What it takes of a response of which it refuses a part is its own policy: the answer to the
/// server is a NACK as soon as one refusal is there.
pub trait Handler {
    /// A response, or resources that died of age (then the answer reaches nobody).
    ///
    /// # Errors
    /// What was refused; an empty list is an acceptance.
    fn update(&mut self, update: Update) -> Result<(), Vec<Refusal>>;

    /// The names of bare resources of the state of the world, for heart-beats and times to live. Default: unknown.
    fn name_of(&self, _value: &Bytes) -> Option<String> {
        None
    }

    /// Nothing came within `initial_fetch_timeout`, or the stream could not be opened: those who wait go on without.
    fn failed(&mut self, why: Failure);
}

/// Why there is nothing to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// `initial_fetch_timeout` went by.
    Timeout,
    /// The stream ended or was refused.
    Connection,
}
