//! `envoy.filters.http.on_demand`: a request for which there is no route waits until its virtual host has come (VHDS), and
//! with `odcds` one whose cluster is not there until that has (on-demand CDS).
//!
//! As in Envoy 1.40 the request goes on behind this filter with the route that it has then, body and all, and filters
//! before it run once. Without VHDS, and on a host that has had its answer, it goes on at once. Nothing limits that wait
//! but the stream's own timeouts; the one for a cluster ends after `odcds.timeout`.
//!
//! On a route `odcds` replaces the filter's, or takes it away.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::http::on_demand::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigResult};
use sampan_core::header::HeaderId;
use sampan_upstream::OnDemand as Clusters;

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, Outcome, RouteConfig, State, Step, decode,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.on_demand.v3.OnDemand";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.on_demand.v3.PerRouteConfig";

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

struct OnDemand {
    name: Box<str>,
    clusters: Odcds,
}

/// Where clusters are asked for.
struct Odcds(Option<Arc<Clusters>>);

impl Odcds {
    fn from_proto(message: Option<&pb::OnDemandCds>) -> ConfigResult<Self> {
        let Some(pb::OnDemandCds { source, resources_locator, timeout }) = message else {
            return Ok(Self(None));
        };
        let clusters =
            Clusters::from_proto(source.as_ref(), resources_locator, timeout.as_ref(), DEFAULT_TIMEOUT);
        clusters.map(|clusters| Self(Some(clusters))).at("odcds")
    }
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let clusters = Odcds::from_proto(decode::<pb::OnDemand>(any)?.odcds.as_ref())?;
    Ok(HttpFilterKind::Filter(Arc::new(OnDemand { name: context.filter_name.into(), clusters })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(Odcds::from_proto(decode::<pb::PerRouteConfig>(any)?.odcds.as_ref())?))
}

impl HttpFilter for OnDemand {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        if stream.route.is_some() {
            return self.find_cluster(stream);
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

impl OnDemand {
    fn find_cluster<'a>(&'a self, stream: &'a mut Stream) -> Step<'a> {
        let Odcds(clusters) = stream.route_config_ref(&self.name).unwrap_or(&self.clusters);
        let (Some(clusters), Some(name)) = (clusters, &stream.info.cluster) else { return Step::Continue };
        if name.is_empty() || stream.worker.clusters.get(name).is_some() {
            return Step::Continue;
        }
        let answer = stream.worker.clusters.demand(clusters, name);
        Step::Wait(Box::pin(async move {
            // Whatever it is: the router sees whether the cluster is there.
            answer.await;
            Outcome::Continue
        }))
    }
}
