//! `envoy.filters.http.header_mutation`: mutations of the listener, then those of the route's levels.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigResult};

use super::refuse;
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, Response, RouteConfig, State, Step, decode,
};
use crate::route::HeaderMutations;
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute";

struct Mutations {
    request: HeaderMutations,
    response: HeaderMutations,
}

struct HeaderMutation {
    name: Box<str>,
    own: Mutations,
    most_specific_wins: bool,
}

impl Mutations {
    fn from_proto(message: &pb::Mutations) -> ConfigResult<Self> {
        refuse(!message.query_parameter_mutations.is_empty(), "query_parameter_mutations")?;
        refuse(!message.response_trailers_mutations.is_empty(), "response_trailers_mutations")?;
        refuse(!message.request_trailers_mutations.is_empty(), "request_trailers_mutations")?;
        Ok(Self {
            request: HeaderMutations::from_mutations(&message.request_mutations, "request_mutations")?,
            response: HeaderMutations::from_mutations(&message.response_mutations, "response_mutations")?,
        })
    }
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: pb::HeaderMutation = decode(any)?;
    Ok(HttpFilterKind::Filter(Arc::new(HeaderMutation {
        name: context.filter_name.into(),
        own: Mutations::from_proto(&message.mutations.unwrap_or_default()).at("mutations")?,
        most_specific_wins: message.most_specific_header_mutations_wins,
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    let message: pb::HeaderMutationPerRoute = decode(any)?;
    Ok(Arc::new(Mutations::from_proto(&message.mutations.unwrap_or_default()).at("mutations")?))
}

impl HeaderMutation {
    /// The route's levels in the order in which they apply.
    fn levels(&self, stream: &Stream) -> Vec<Arc<Mutations>> {
        let Some(route) = &stream.route else { return Vec::new() };
        let levels = route.filter_config_levels(&self.name);
        let mut levels: Vec<_> = levels.filter_map(|c| c.clone().downcast::<Mutations>().ok()).collect();
        if self.most_specific_wins {
            levels.reverse();
        }
        levels
    }
}

impl HttpFilter for HeaderMutation {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        let levels = self.levels(stream);
        let Stream { request, info, .. } = stream;
        self.own.request.apply_to_request(request, info);
        for level in levels {
            level.request.apply_to_request(request, info);
        }
        Step::Continue
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        _state: &'a mut State,
    ) -> Step<'a> {
        self.own.response.apply_to_response(&mut response.headers, &stream.request, &stream.info);
        for level in self.levels(stream) {
            level.response.apply_to_response(&mut response.headers, &stream.request, &stream.info);
        }
        Step::Continue
    }
}
