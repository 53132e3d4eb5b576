//! `envoy.filters.http.set_filter_state`: leaves objects in the filter state; the filter's first, then those of the
//! table, the virtual host and the route.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::set_filter_state::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::ConfigResult;
use sampan_core::format::FormatContext;
use sampan_core::state_values::StateValues;

use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, RouteConfig, State, Step, decode};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.set_filter_state.v3.Config";

struct SetFilterState {
    name: Box<str>,
    values: StateValues,
}

fn parse(any: &Any) -> ConfigResult<StateValues> {
    let message: pb::Config = decode(any)?;
    StateValues::from_proto(&message.on_request_headers, "on_request_headers")
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let values = parse(any)?;
    Ok(HttpFilterKind::Filter(Arc::new(SetFilterState { name: context.filter_name.into(), values })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(parse(any)?))
}

fn apply(values: &StateValues, stream: &mut Stream) {
    for index in 0..values.len() {
        let context = FormatContext { request: Some(&stream.request), ..FormatContext::new(&stream.info) };
        if let Some((key, object)) = values.make(index, &context) {
            stream.info.set_state(key, object);
        }
    }
}

impl HttpFilter for SetFilterState {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        apply(&self.values, stream);
        let Some(route) = &stream.route else { return Step::Continue };
        let levels: Vec<_> = route
            .filter_config_levels(&self.name)
            .filter_map(|c| c.clone().downcast::<StateValues>().ok())
            .collect();
        // The most specific comes first.
        for values in levels.iter().rev() {
            apply(values, stream);
        }
        Step::Continue
    }
}
