//! The header mutations of one level: table, virtual host, route, weighted cluster.

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::ConfigResult;

use super::headers::HeaderMutations;

/// What is added to and removed from a request and its response.
#[derive(Default)]
pub(super) struct Mutations {
    pub(super) request: HeaderMutations,
    pub(super) response: HeaderMutations,
}

/// A message with the four fields.
pub(super) trait Mutates {
    /// Added to the request, removed from it, added to the response, removed from it.
    fn fields(&self) -> (&[HeaderValueOption], &[String], &[HeaderValueOption], &[String]);
}

macro_rules! mutates {
    ($($message:ty),*) => {
        $(impl Mutates for $message {
            fn fields(&self) -> (&[HeaderValueOption], &[String], &[HeaderValueOption], &[String]) {
                (
                    &self.request_headers_to_add,
                    &self.request_headers_to_remove,
                    &self.response_headers_to_add,
                    &self.response_headers_to_remove,
                )
            }
        })*
    };
}

mutates!(pb::RouteConfiguration, pb::VirtualHost, pb::Route, pb::weighted_cluster::ClusterWeight);

impl Mutations {
    pub(super) fn of(message: &impl Mutates) -> ConfigResult<Self> {
        let (request_add, request_remove, response_add, response_remove) = message.fields();
        Ok(Self {
            request: HeaderMutations::new(request_add, request_remove, "request")?,
            response: HeaderMutations::new(response_add, response_remove, "response")?,
        })
    }
}
