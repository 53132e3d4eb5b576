//! `envoy.filters.http.on_demand`: a request for which there is no route waits until its virtual host has come (VHDS).
//!
//! As in Envoy 1.40 the request goes on behind this filter with the route that it has then, body and all, and filters
//! before it run once. Without VHDS, and on a host that has had its answer, it goes on at once. Nothing limits the wait
//! but the stream's own timeouts.
//!
//! On-demand CDS (`odcds`) is refused by name.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::on_demand::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::ConfigResult;
use sampan_core::header::HeaderId;

use super::refuse;
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, Outcome, RouteConfig, State, Step, decode,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.on_demand.v3.OnDemand";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.on_demand.v3.PerRouteConfig";

struct OnDemand;

pub(super) fn make(any: &Any, _: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    refuse(decode::<pb::OnDemand>(any)?.odcds.is_some(), "odcds")?;
    Ok(HttpFilterKind::Filter(Arc::new(OnDemand)))
}

/// Says something of `odcds` only.
pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    refuse(decode::<pb::PerRouteConfig>(any)?.odcds.is_some(), "odcds")?;
    Ok(Arc::new(()))
}

impl HttpFilter for OnDemand {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        if stream.route.is_some() {
            return Step::Continue;
        }
        let Some(hosts) = stream.manager.routes.hosts_on_demand() else { return Step::Continue };
        let answer = hosts.ask(stream.request.get(HeaderId::AUTHORITY).unwrap_or_default());
        Step::Wait(Box::pin(async move {
            answer.await;
            stream.routes = stream.manager.routes.table(&stream.request);
            stream.refresh_route();
            Outcome::Continue
        }))
    }
}
