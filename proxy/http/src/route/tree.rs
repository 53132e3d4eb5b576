//! `VirtualHost.matcher`: a tree whose actions are routes, each of which is still asked for its own conditions.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::extensions::matching::common_inputs::network::v3::FilterStateInput;
use envoy_types::pb::envoy::r#type::matcher::v3::HttpRequestHeaderMatchInput;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderName};
use sampan_core::matcher::tree::{Datum, Found, Input, MatchTree, TreeContext};

use super::index::Index;
use super::{RequestView, Route};
use crate::filter::{decode, message_name};

/// How a virtual host finds a route.
pub(super) enum Lookup {
    /// Among all of them.
    All(Routes),
    /// Among those that the tree leads to.
    Tree(MatchTree<RequestInput, Routes>),
}

/// Neighbours in a virtual host's list of routes.
pub(super) struct Routes {
    first: u32,
    index: Index,
}

/// What the tree may ask of a request.
pub(super) enum RequestInput {
    Header(HeaderName),
    FilterState(Box<str>),
}

impl Routes {
    /// Those of the list from `first` on.
    pub(super) fn from(first: usize, routes: &[Route]) -> Self {
        let index = Index::new(routes[first..].iter().map(|route| route.matching.path()));
        Self { first: first as u32, index }
    }

    fn find(&self, path: &[u8], matches: impl Fn(u32) -> bool) -> Option<u32> {
        self.index.find(path, |i| matches(self.first + i)).map(|i| self.first + i)
    }
}

impl Lookup {
    /// The first route for which `matches` holds.
    pub(super) fn find(
        &self,
        path: &[u8],
        request: &RequestView<'_>,
        matches: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        match self {
            Self::All(routes) => routes.find(path, matches),
            Self::Tree(tree) => match tree.find(request, &mut |_| {}) {
                Found::Action(routes) => routes.find(path, matches),
                Found::Nothing | Found::Pending => None,
            },
        }
    }
}

impl Input<RequestView<'_>> for RequestInput {
    fn read<'d>(&'d self, request: &'d RequestView<'_>) -> Datum<'d> {
        let value = match self {
            Self::Header(name) => request.headers.joined(name),
            Self::FilterState(key) => {
                let text = request.info.state(key).and_then(|object| object.plain().map(Cow::into_owned));
                text.map(|text| Cow::Owned(text.into_bytes()))
            }
        };
        value.map_or(Datum::Missing, Datum::Bytes)
    }
}

/// Compiles a tree; its routes go to a list.
pub(super) struct Builder<'b> {
    pub(super) routes: Vec<Route>,
    /// Compiles one route.
    pub(super) make: &'b dyn Fn(&pb::Route) -> ConfigResult<Route>,
}

impl TreeContext for Builder<'_> {
    type Input = RequestInput;
    type Action = Routes;
    const KEEP_MATCHING: bool = false;

    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<RequestInput> {
        let any = typed_config(config)?;
        match message_name(any) {
            "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" => {
                let message: HttpRequestHeaderMatchInput = decode(any).at("typed_config")?;
                let name = HeaderName::new(&message.header_name);
                // A request's `host` is its `:authority`, under either name.
                let host = name.id() == HeaderId::HOST;
                Ok(RequestInput::Header(if host { HeaderId::AUTHORITY.into() } else { name }))
            }
            "envoy.extensions.matching.common_inputs.network.v3.FilterStateInput" => {
                let message: FilterStateInput = decode(any).at("typed_config")?;
                Ok(RequestInput::FilterState(message.key.into()))
            }
            _ => Err(ConfigError::new(format!(
                "Route table can only match on request headers, saw {}",
                any.type_url
            ))),
        }
    }

    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Routes> {
        let any = typed_config(config)?;
        let first = self.routes.len();
        match message_name(any) {
            "envoy.config.route.v3.Route" => {
                let route = decode(any).and_then(|message| (self.make)(&message));
                self.routes.push(route.at("typed_config")?);
            }
            "envoy.config.route.v3.RouteList" => {
                let list: pb::RouteList = decode(any).at("typed_config")?;
                for (i, message) in list.routes.iter().enumerate() {
                    self.routes.push((self.make)(message).at_index("routes", i).at("typed_config")?);
                }
            }
            name => return Err(ConfigError::unsupported(format!("route action {name:?}"))),
        }
        Ok(Routes::from(first, &self.routes))
    }
}

fn typed_config(config: &TypedExtensionConfig) -> ConfigResult<&Any> {
    config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))
}
