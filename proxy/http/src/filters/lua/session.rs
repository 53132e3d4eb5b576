//! What one run of a script shares with the stream that it runs for.
//!
//! While the script runs, the stream's headers, dynamic metadata and filter state lie here, lent by whoever drives it
//! ([`super::drive`]); while it waits, the stream has them back. When the head is gone and a script still looks at the
//! body, it has copies.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::google::protobuf::Value;
use mlua::{Lua, Value as LuaValue};
use sampan_core::Address;
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::{ConnectionInfo, FilterState, Metadata, Protocol};
use sampan_listener::Worker;

use super::config::PerRoute;
use super::object::{Fail, Return};
use crate::filter::{LocalReply, Response};
use crate::router::callout;
use crate::stream::Stream;
use crate::tracing::Context;

/// Which function of the script runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Request,
    Response,
}

/// What a method answers once there is a route again.
pub(super) type Again = fn(&Lua, &Rc<Session>) -> mlua::Result<LuaValue>;

/// What a script waits for.
#[derive(Default)]
pub(super) enum Asked {
    /// Nothing: it runs or is over.
    #[default]
    Nothing,
    /// All of the body.
    Body,
    /// The next piece of it.
    Chunk,
    Trailers,
    /// A route for the headers as they are now.
    Route(Again),
    /// The answer to a request of its own.
    Call(Box<Call>),
    /// Nothing any more: this is the response.
    Reply(Box<LocalReply>),
}

/// A request of the script's own.
pub(super) struct Call {
    pub(super) cluster: String,
    pub(super) request: CallRequest,
    /// Repeated headers of the answer are lists.
    pub(super) repeated: bool,
}

/// What is sent; see [`callout::Request`].
pub(super) struct CallRequest {
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) timeout: Option<std::time::Duration>,
    pub(super) forwarded: bool,
}

impl Call {
    /// As the client takes it.
    pub(super) fn request(&mut self) -> callout::Request<'_> {
        let request = &mut self.request;
        callout::Request {
            timeout: request.timeout,
            forwarded: request.forwarded,
            ..callout::Request::new(
                &self.cluster,
                std::mem::take(&mut request.headers),
                std::mem::take(&mut request.body),
            )
        }
    }
}

/// What is known of the stream, as far as scripts may ask.
pub(super) struct Facts {
    pub(super) connection: Rc<ConnectionInfo>,
    pub(super) remote: Address,
    pub(super) protocol: Option<Protocol>,
    pub(super) route_name: Option<Arc<str>>,
    pub(super) virtual_cluster: Option<Arc<str>>,
    pub(super) route_metadata: Option<Arc<Metadata>>,
    pub(super) host_metadata: Option<Arc<Metadata>>,
}

impl Facts {
    pub(super) fn of(stream: &Stream) -> Self {
        let info = &stream.info;
        Self {
            connection: info.connection.clone(),
            remote: info.remote.clone(),
            protocol: info.protocol,
            route_name: info.route_name.clone(),
            virtual_cluster: info.virtual_cluster.clone(),
            route_metadata: info.route_metadata.clone(),
            host_metadata: stream.route.as_ref().and_then(|route| route.virtual_host().metadata.clone()),
        }
    }
}

/// What the script has in its hands.
pub(super) struct Live {
    pub(super) asked: Asked,
    pub(super) headers: HeaderMap,
    pub(super) trailers: Option<HeaderMap>,
    /// What is held of the body, or the piece that passes.
    pub(super) body: Option<Bytes>,
    pub(super) metadata: Option<Box<Metadata>>,
    pub(super) filter_state: Option<Box<FilterState>>,
    /// Dynamic metadata that was set when the stream's own was out of reach.
    pub(super) late: Vec<(String, String, Value)>,
    pub(super) trace: Option<Box<Context>>,
    pub(super) facts: Facts,
    pub(super) context: Option<Arc<PerRoute>>,
    /// The message's end is known.
    pub(super) end: bool,
    pub(super) saw_body: bool,
    /// The body was asked for as a whole.
    pub(super) buffered: bool,
    /// The head has passed.
    pub(super) continued: bool,
    /// Headers have changed since the route was picked.
    pub(super) route_stale: bool,
    /// What `metadata()` gave in this turn; it gives it again.
    pub(super) metadata_of: Option<(Option<Arc<Metadata>>, Box<str>)>,
    /// What `importPublicKey()` has taken, by name, and what it gave in this turn.
    pub(super) keys: HashMap<Vec<u8>, Vec<u8>>,
    pub(super) key_of_turn: Option<Vec<u8>>,
    /// The upstream host that the script wants.
    pub(super) override_host: Option<(Box<str>, bool)>,
    /// Bytes of the body that came, and that the script made of them.
    pub(super) came: u64,
    pub(super) went: u64,
    pub(super) header_iterator: Option<Headers>,
    pub(super) trailer_iterator: Option<Headers>,
}

impl Live {
    pub(super) fn new(facts: Facts, context: Option<Arc<PerRoute>>, end: bool) -> Self {
        Self {
            asked: Asked::Nothing,
            headers: HeaderMap::new(),
            trailers: None,
            body: None,
            metadata: None,
            filter_state: None,
            late: Vec::new(),
            trace: None,
            facts,
            context,
            end,
            saw_body: false,
            buffered: false,
            continued: false,
            route_stale: false,
            metadata_of: None,
            keys: HashMap::new(),
            key_of_turn: None,
            override_host: None,
            came: 0,
            went: 0,
            header_iterator: None,
            trailer_iterator: None,
        }
    }
}

/// Copies of headers that are walked through.
pub(super) type Headers = std::vec::IntoIter<(Vec<u8>, Vec<u8>)>;

/// See the module.
pub(super) struct Session {
    pub(super) way: Way,
    /// Headers that change move the route.
    pub(super) clears_route: bool,
    pub(super) filter_name: Arc<str>,
    pub(super) worker: Rc<Worker>,
    pub(super) running: Cell<bool>,
    /// Counts the script's waits: objects of an earlier turn are dead.
    pub(super) turn: Cell<u32>,
    pub(super) live: RefCell<Live>,
}

impl Session {
    /// Lends a stream's parts, or gives them back: the same both ways.
    pub(super) fn exchange(&self, stream: &mut Stream, response: Option<&mut Response>) {
        let mut live = self.live.borrow_mut();
        std::mem::swap(&mut live.headers, response.map_or(&mut stream.request, |r| &mut r.headers));
        std::mem::swap(&mut live.metadata, &mut stream.info.dynamic_metadata);
        std::mem::swap(&mut live.filter_state, &mut stream.info.filter_state);
        std::mem::swap(&mut live.trace, &mut stream.trace);
    }

    /// What a method works on. A finalizer that the script gave to something of its own may run wherever memory is
    /// taken, in the middle of a method too: such a call is refused.
    pub(super) fn live(&self) -> Result<RefMut<'_, Live>, Fail> {
        self.live.try_borrow_mut().map_err(|_| Fail::from("object is in use"))
    }

    /// The script waits for this.
    pub(super) fn ask(&self, asked: Asked) -> Result<Return, Fail> {
        self.live()?.asked = asked;
        Ok(Return::Wait)
    }
}
