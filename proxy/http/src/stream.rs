//! One exchange as filters and the router see it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use sampan_codec::Body;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::{Protocol, StreamInfo};
use sampan_listener::Worker;

use crate::filter::RouteConfig;
use crate::manager::{Manager, NamedFilter};
use crate::route::{Redirected, Selected, SharedTable};
use crate::timer::Timer;
use crate::tracing::Context;

/// A request under way.
pub struct Stream {
    /// Headers, pseudo headers among them.
    pub request: HeaderMap,
    /// The body; the router takes it.
    pub body: Body,
    /// What is known.
    pub info: StreamInfo,
    /// The route table that was in force when the request came.
    pub routes: SharedTable,
    /// The route chosen; none where no route matches.
    pub route: Option<Selected>,
    /// The worker.
    pub worker: Rc<Worker>,
    /// The connection manager.
    pub manager: Arc<Manager>,
    /// The task's timer.
    pub timer: Timer,
    /// What the client asked to upgrade to, lower case; CONNECT is `connect`.
    pub upgrade: Option<Box<str>>,
    /// The request's path before rewrites, its method, for local replies.
    pub head_request: bool,
    /// The client speaks gRPC.
    pub grpc: bool,
    /// The port that was stripped from a CONNECT's host.
    pub connect_port: Option<u16>,
    /// When the stream last went on after a filter had waited.
    pub resumed: Option<Instant>,
    /// This proxy's span in a trace, where one is made.
    pub trace: Option<Box<Context>>,
    /// The caller has named the operation: the response does not.
    pub operation_set: bool,
    /// The host that a filter wants, and whether no other will do.
    pub override_host: Option<(Box<str>, bool)>,
    /// How often and where the request was redirected inside of this proxy.
    pub redirected: Option<Box<Redirected>>,
}

impl Stream {
    /// Whether a filter of the chain is off on this stream's route.
    pub fn filter_disabled(&self, named: &NamedFilter) -> bool {
        let by_route = self.route.as_ref().and_then(|route| route.filter_disabled(&named.name));
        by_route.unwrap_or(named.disabled)
    }

    /// How much of a body filters may hold back, and of a request be kept to be sent again: over HTTP/2 a stream's window,
    /// as in Envoy.
    pub fn buffer_limit(&self) -> usize {
        let limit = match self.info.protocol {
            Some(Protocol::Http2) => self.manager.h2.stream_window,
            _ => self.manager.buffer_limit,
        };
        limit as usize
    }

    /// Picks the route anew; for filters that changed what routes match on.
    pub fn refresh_route(&mut self) {
        if let Some(routes) = self.manager.routes.table_again(&self.request) {
            self.routes = routes;
        }
        self.route = self.routes.clone().select(self);
        crate::router::note_route(self);
    }

    /// The most specific configuration of a filter on this stream's route, downcast.
    pub fn route_config<T: Send + Sync + 'static>(&self, filter: &str) -> Option<Arc<T>> {
        let config: RouteConfig = self.route.as_ref()?.filter_config(filter)?;
        config.downcast::<T>().ok()
    }

    /// The same, borrowed.
    pub fn route_config_ref<T: 'static>(&self, filter: &str) -> Option<&T> {
        self.route.as_ref()?.filter_config_ref(filter)?.downcast_ref()
    }

    /// The time as the stream knows it without looking at a clock: its request's, or when it went on after waiting.
    pub fn now(&self) -> Instant {
        self.resumed.unwrap_or(self.info.start)
    }

    /// Whether the request's content type is gRPC's.
    pub fn is_grpc(headers: &HeaderMap) -> bool {
        headers.get(HeaderId::CONTENT_TYPE).is_some_and(|value| {
            value
                .strip_prefix(b"application/grpc")
                .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
        })
    }
}
