//! Objects that filters leave for each other, by key: of a stream, and of the connection below it.
//!
//! The last object under a key counts, but a stream cannot take a key that its connection has: the connection's
//! object stays, as in Envoy. (`read_only` objects are of the past: Envoy 1.40 replaces them like any other.)

use std::any::Any;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;

use envoy_types::pb::google::protobuf::Any as ProtoAny;

use super::{ConnectionInfo, StreamInfo};

/// An object in the filter state; how the formatter and matchers see it.
pub trait FilterStateObject {
    /// `%FILTER_STATE(key:PLAIN)%`
    fn plain(&self) -> Option<Cow<'_, str>>;
    /// `%FILTER_STATE(key:TYPED)%`
    fn typed(&self) -> Option<serde_json::Value> {
        self.plain().map(|s| serde_json::Value::String(s.into_owned()))
    }
    /// `%FILTER_STATE(key:FIELD:name)%`
    fn field(&self, _name: &str) -> Option<Cow<'_, str>> {
        None
    }
    /// The address that an `address_match` reads; a text that looks like one is none.
    fn ip(&self) -> Option<IpAddr> {
        None
    }
    /// The object as gRPC access logs show it.
    fn message(&self) -> Option<ProtoAny> {
        None
    }
    /// For readers that know the concrete type.
    fn as_any(&self) -> &dyn Any;
}

/// An object, shared.
pub type StateObject = Rc<dyn FilterStateObject>;

/// Objects by key.
#[derive(Clone, Default)]
pub struct FilterState(BTreeMap<Box<str>, StateObject>);

impl FilterState {
    /// All objects, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StateObject)> {
        self.0.iter().map(|(key, object)| (&**key, object))
    }

    /// The object of a key.
    pub fn get(&self, key: &str) -> Option<&StateObject> {
        self.0.get(key)
    }

    /// Leaves an object in place of the one that is there.
    pub fn set(&mut self, key: &str, object: StateObject) {
        self.0.insert(key.into(), object);
    }
}

impl fmt::Debug for FilterState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl ConnectionInfo {
    /// An object of the connection.
    pub fn state(&self, key: &str) -> Option<StateObject> {
        self.slots.get::<RefCell<FilterState>>()?.borrow().get(key).cloned()
    }

    /// Leaves an object for as long as the connection lives.
    pub fn set_state(&self, key: &str, object: StateObject) {
        let state = self.slots.get_or_insert_with(RefCell::<FilterState>::default);
        state.borrow_mut().set(key, object);
    }
}

impl StreamInfo {
    /// Calls `f` with each object of the connection and then of the stream.
    pub fn each_state(&self, mut f: impl FnMut(&str, &StateObject)) {
        if let Some(state) = self.connection.slots.get::<RefCell<FilterState>>() {
            state.borrow().iter().for_each(|(key, object)| f(key, object));
        }
        self.filter_state.iter().flat_map(|state| state.iter()).for_each(|(key, object)| f(key, object));
    }

    /// Whether there may be an object at all. Never wrong where it says no.
    pub fn may_have_state(&self) -> bool {
        self.filter_state.is_some() || !self.connection.slots.is_empty()
    }

    /// An object of the stream or of its connection.
    pub fn state(&self, key: &str) -> Option<StateObject> {
        let own = self.filter_state.as_deref().and_then(|state| state.get(key).cloned());
        own.or_else(|| self.connection.state(key))
    }

    /// Leaves an object for as long as the stream lives; not under a key that its connection has.
    pub fn set_state(&mut self, key: &str, object: StateObject) {
        if self.connection.state(key).is_none() {
            self.filter_state.get_or_insert_default().set(key, object);
        }
    }
}
