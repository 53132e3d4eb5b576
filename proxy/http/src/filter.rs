//! HTTP filters: what a filter is, and the registry that maps its type URL to it.
//!
//! A filter object is immutable and shared by all streams and workers; what belongs to one stream lies in its
//! [`State`]. A filter that has nothing to wait for answers at once; one that waits (a delay, a callout) returns
//! a future that borrows the stream. Bodies are changed by wrapping them ([`Body::wrap`](sampan_codec::Body::wrap)).
//!
//! Requests pass the chain from first to last, responses from last to first; a local reply passes all of it.
//! A new filter is one file and one line in [`crate::filters::register`].

use std::any::Any as StdAny;
use std::borrow::Cow;
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_codec::{Body, BodyError};
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::format::FormatContext;
use sampan_core::header::{HeaderMap, HeaderName};
use sampan_core::stream_info::{ResponseFlag, StreamInfo};
use sampan_listener::FactoryContext;

use crate::stream::Stream;

/// A filter of the chain that is not the router.
pub trait HttpFilter: Send + Sync {
    /// The request's head passes; its body lies in `stream.body`.
    fn on_request<'a>(&'a self, _stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        Step::Continue
    }

    /// The response's head passes; its body lies in `response.body`.
    fn on_response<'a>(
        &'a self,
        _stream: &'a mut Stream,
        _response: &'a mut Response,
        _state: &'a mut State,
    ) -> Step<'a> {
        Step::Continue
    }

    /// The response's trailers pass; the head is on its way already.
    fn on_response_trailers(&self, _stream: &Stream, _response: &HeaderMap, _trailers: &mut HeaderMap) {}

    /// The stream is over and everything is known of it: what an access log is told, when it is told.
    fn on_log(&self, _context: &FormatContext<'_>) {}

    /// The stream is over, however it ended.
    fn on_end(&self, _stream: &mut Stream, _state: &mut State) {}
}

/// What a filter keeps for one stream; empty until it puts something there.
pub type State = Option<Box<dyn StdAny>>;

/// What comes next.
pub enum Step<'a> {
    /// The next filter.
    Continue,
    /// This reply instead.
    Reply(Box<LocalReply>),
    /// Known once the future is done.
    Wait(LocalBoxFuture<'a, Outcome>),
}

/// [`Step`] without the waiting.
pub enum Outcome {
    /// The next filter.
    Continue,
    /// This reply instead.
    Reply(Box<LocalReply>),
    /// This response instead, which is not made from a [`LocalReply`].
    Respond(Box<Response>),
    /// The stream ends without a reply.
    Reset,
}

impl Step<'_> {
    /// A reply.
    pub fn reply(reply: LocalReply) -> Self {
        Self::Reply(Box::new(reply))
    }

    /// Waits where there is something to wait for.
    pub async fn outcome(self) -> Outcome {
        match self {
            Step::Continue => Outcome::Continue,
            Step::Reply(reply) => Outcome::Reply(reply),
            Step::Wait(future) => future.await,
        }
    }

    /// The same, and whether it was not there at once.
    pub async fn outcome_and_wait(self) -> (Outcome, bool) {
        let Step::Wait(mut future) = self else { return (self.outcome().await, false) };
        let mut waited = false;
        let outcome = poll_fn(|cx| {
            let polled = future.as_mut().poll(cx);
            waited |= polled.is_pending();
            polled
        })
        .await;
        (outcome, waited)
    }
}

/// A response on its way downstream.
pub struct Response {
    /// The status.
    pub status: u16,
    /// Headers; `:status` is kept true to [`Response::status`] when it is sent.
    pub headers: HeaderMap,
    /// The body.
    pub body: Body,
    /// An accepted upgrade or CONNECT.
    pub tunnel: bool,
    /// Made by this proxy.
    pub local: bool,
}

/// A response that this proxy makes.
#[derive(Debug, Clone)]
pub struct LocalReply {
    /// The status.
    pub status: u16,
    /// A plain text body; empty for none.
    pub body: Cow<'static, str>,
    /// Response code details.
    pub details: Cow<'static, str>,
    /// A response flag.
    pub flag: Option<ResponseFlag>,
    /// Further headers.
    pub headers: Vec<(HeaderName, Vec<u8>)>,
    /// The gRPC status for gRPC clients, where it does not follow from the status.
    pub grpc_status: Option<u32>,
    /// Close the connection behind the reply.
    pub close: bool,
    /// It is the router's, which tells of its attempts.
    pub by_router: bool,
}

impl LocalReply {
    /// A reply without a body.
    pub fn new(status: u16, details: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            body: Cow::Borrowed(""),
            details: details.into(),
            flag: None,
            headers: Vec::new(),
            grpc_status: None,
            close: false,
            by_router: false,
        }
    }

    /// What a request is answered whose body broke off or broke the framing; none: its stream is reset, and where HTTP/2's
    /// codec has done so for what the client sent, `info` says why.
    pub fn to_broken_body(error: &BodyError, info: &mut StreamInfo) -> Option<Self> {
        let (BodyError::Protocol(error) | BodyError::Request(error)) = error else { return None };
        if error.status == 0 {
            info.flags.set(ResponseFlag::DownstreamRemoteReset);
            info.details = Some(Cow::Borrowed(error.details));
            return None;
        }
        let reply = Self::new(error.status, error.details).flag(ResponseFlag::DownstreamProtocolError);
        Some(Self { close: true, ..reply.body("Bad Request") })
    }

    /// With a body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Cow<'static, str>>) -> Self {
        self.body = body.into();
        self
    }

    /// With a response flag.
    #[must_use]
    pub fn flag(mut self, flag: ResponseFlag) -> Self {
        self.flag = Some(flag);
        self
    }

    /// With another header.
    #[must_use]
    pub fn header(mut self, name: impl Into<HeaderName>, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// As a filter's answer.
    pub fn outcome(self) -> Outcome {
        Outcome::Reply(Box::new(self))
    }
}

/// A filter as its factory makes it.
pub enum HttpFilterKind {
    /// Any but the last.
    Filter(Arc<dyn HttpFilter>),
    /// The router: the end of every chain.
    Router(Arc<crate::router::RouterConfig>),
}

/// A filter's configuration on a route, parsed.
pub type RouteConfig = Arc<dyn StdAny + Send + Sync>;

/// How a filter type is made.
#[derive(Clone, Copy)]
pub struct HttpFilterFactory {
    /// The filter of its `typed_config`.
    pub filter: fn(&Any, &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind>,
    /// Its configuration on a route; none where the filter has none.
    pub route: Option<fn(&Any) -> ConfigResult<RouteConfig>>,
}

/// What a factory is given.
pub struct HttpFilterContext<'a> {
    /// The listener's side.
    pub factory: &'a FactoryContext,
    /// `http.PREFIX`, with the dot between but none behind.
    pub stat_prefix: &'a str,
    /// The filter's name in the chain.
    pub filter_name: &'a str,
}

/// Full message names to factories.
#[derive(Default)]
pub struct HttpFilterRegistry {
    filters: HashMap<&'static str, HttpFilterFactory>,
    routes: HashMap<&'static str, fn(&Any) -> ConfigResult<RouteConfig>>,
}

impl HttpFilterRegistry {
    /// Registers a filter under its configuration's full message name, and with `route` that of its configuration on
    /// a route (often the same).
    pub fn register(
        &mut self,
        message: &'static str,
        route_message: Option<&'static str>,
        factory: HttpFilterFactory,
    ) {
        if let (Some(name), Some(parse)) = (route_message, factory.route) {
            self.routes.insert(name, parse);
        }
        self.filters.insert(message, factory);
    }

    /// Makes a filter, of a `TypedStruct` too; an unknown type is an error by name.
    pub fn make(&self, config: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
        let config = &*resolved(config)?;
        match self.filters.get(message_name(config)) {
            Some(factory) => (factory.filter)(config, context),
            None => Err(ConfigError::unsupported(format_args!("HTTP filter type {:?}", config.type_url))),
        }
    }

    /// How a type is made.
    pub fn factory(&self, message: &str) -> Option<HttpFilterFactory> {
        self.filters.get(message).copied()
    }

    /// Whether there is a filter with such a configuration on a route.
    pub fn knows_route_config(&self, config: &Any) -> bool {
        resolved(config).is_ok_and(|config| self.routes.contains_key(message_name(&config)))
    }

    /// Parses a filter's configuration on a route.
    pub fn route_config(&self, config: &Any) -> ConfigResult<RouteConfig> {
        let config = &*resolved(config)?;
        match self.routes.get(message_name(config)) {
            Some(parse) => parse(config),
            None => Err(ConfigError::unsupported(format_args!(
                "per-route filter configuration {:?}",
                config.type_url
            ))),
        }
    }
}

fn resolved(config: &Any) -> ConfigResult<Cow<'_, Any>> {
    sampan_config::any::resolved(config).map_err(|e| ConfigError::new(e.to_string()))
}

/// The full message name of an `Any`.
pub fn message_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// Decodes an `Any` whose type the registry has matched.
pub fn decode<M: prost::Message + Default>(any: &Any) -> ConfigResult<M> {
    M::decode(any.value.as_slice()).map_err(|e| ConfigError::new(format!("malformed message: {e}")))
}
