//! `envoy.filters.http.header_mutation`: mutations of the listener, then those of the route's levels; of headers,
//! trailers and query parameters.
//!
//! What a request's trailers get is formatted when its head passes; they themselves come when the head is gone.

pub(super) mod query;

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::error::{AtField, ConfigResult};
use sampan_core::header::HeaderMap;
use smallvec::SmallVec;

use self::query::QueryMutations;
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, Response, RouteConfig, State, Step, decode,
};
use crate::route::{HeaderMutations, Selected, Values};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute";

struct Mutations {
    request: HeaderMutations,
    query: QueryMutations,
    request_trailers: HeaderMutations,
    response: HeaderMutations,
    response_trailers: HeaderMutations,
}

struct HeaderMutation {
    name: Box<str>,
    own: Arc<Mutations>,
    most_specific_wins: bool,
}

impl Mutations {
    fn from_proto(message: Option<pb::Mutations>) -> ConfigResult<Self> {
        let message = message.unwrap_or_default();
        let headers = HeaderMutations::from_mutations;
        Ok(Self {
            request: headers(&message.request_mutations, "request_mutations")?,
            query: QueryMutations::from_proto(&message.query_parameter_mutations)?,
            request_trailers: headers(&message.request_trailers_mutations, "request_trailers_mutations")?,
            response: headers(&message.response_mutations, "response_mutations")?,
            response_trailers: headers(&message.response_trailers_mutations, "response_trailers_mutations")?,
        })
    }
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: pb::HeaderMutation = decode(any)?;
    Ok(HttpFilterKind::Filter(Arc::new(HeaderMutation {
        name: context.filter_name.into(),
        own: Arc::new(Mutations::from_proto(message.mutations).at("mutations")?),
        most_specific_wins: message.most_specific_header_mutations_wins,
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    let message: pb::HeaderMutationPerRoute = decode(any)?;
    Ok(Arc::new(Mutations::from_proto(message.mutations).at("mutations")?))
}

impl HeaderMutation {
    /// The route's levels in the order in which they apply.
    fn levels<'r>(&'r self, route: Option<&'r Selected>) -> SmallVec<[&'r RouteConfig; 4]> {
        let levels = route.into_iter().flat_map(|route| route.filter_config_levels(&self.name));
        let mut levels: SmallVec<[&RouteConfig; 4]> = levels.collect();
        if self.most_specific_wins {
            levels.reverse();
        }
        levels
    }

    /// All that applies, the filter's own first.
    fn each<'r>(&'r self, route: Option<&'r Selected>) -> impl Iterator<Item = &'r Mutations> {
        let levels = self.levels(route).into_iter().filter_map(|level| level.downcast_ref());
        std::iter::once(&*self.own).chain(levels)
    }

    /// Puts what a request's trailers will get around its body.
    fn wrap(&self, stream: &mut Stream) {
        let Stream { request, info, route, body, .. } = stream;
        let route = route.as_ref();
        if body.is_end() || self.each(route).all(|m| m.request_trailers.is_empty()) {
            return;
        }
        let levels = self.levels(route).into_iter().filter_map(|l| l.clone().downcast::<Mutations>().ok());
        let later = std::iter::once(self.own.clone()).chain(levels).map(|mutations| {
            let values = mutations.request_trailers.values(request, info);
            (mutations, values)
        });
        let later = later.collect();
        body.wrap(|body| Trailers { body, later });
    }
}

impl HttpFilter for HeaderMutation {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        let Stream { request, info, route, .. } = stream;
        for mutations in self.each(route.as_ref()) {
            mutations.request.apply_to_request(request, info);
            mutations.query.apply(request, info);
        }
        self.wrap(stream);
        Step::Continue
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        _state: &'a mut State,
    ) -> Step<'a> {
        for mutations in self.each(stream.route.as_ref()) {
            mutations.response.apply_to_response(&mut response.headers, &stream.request, &stream.info);
        }
        Step::Continue
    }

    fn on_response_trailers(&self, stream: &Stream, response: &HeaderMap, trailers: &mut HeaderMap) {
        for mutations in self.each(stream.route.as_ref()) {
            mutations.response_trailers.apply_to_trailers(trailers, &stream.request, response, &stream.info);
        }
    }
}

/// A request's body whose trailers, if it has some, are changed.
struct Trailers {
    body: Body,
    later: Vec<(Arc<Mutations>, Values)>,
}

impl BodyStream for Trailers {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut frame = ready!(self.body.poll_frame(cx));
        if let Some(Ok(Frame::Trailers(trailers))) = &mut frame {
            for (mutations, values) in &self.later {
                mutations.request_trailers.apply_values(trailers, values);
            }
        }
        Poll::Ready(frame)
    }

    fn is_end(&self) -> bool {
        self.body.is_end()
    }
}
