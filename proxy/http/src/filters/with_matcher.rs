//! `ExtensionWithMatcher`: another filter, and a tree that says which requests pass it by (`SkipFilter`).
//!
//! The tree is asked when the request's head reaches the filter; what it cannot say without the response is said when
//! the response's head passes, and the filter sees the request then. Without a tree every request passes the filter by.
//! A route's `ExtensionWithMatcherPerRoute` takes the tree's place. The log is told in any case, as in Envoy.
//!
//! Source: `source/extensions/filters/http/match_delegate`.

use std::sync::{Arc, LazyLock};

use envoy_types::pb::envoy::extensions::common::matching::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3::Matcher;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::FormatContext;
use sampan_core::header::HeaderMap;
use sampan_core::matcher::tree::{Found, MatchTree, TreeContext, from_common};
use sampan_core::matcher::{RequestFacts, RequestInput};

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, HttpFilterRegistry, Response, RouteConfig, State, Step,
    decode, message_name,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.common.matching.v3.ExtensionWithMatcher";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.common.matching.v3.ExtensionWithMatcherPerRoute";
const SKIP: &str = "envoy.extensions.filters.common.matcher.action.v3.SkipFilter";

/// What can stand within.
static FILTERS: LazyLock<HttpFilterRegistry> = LazyLock::new(|| {
    let mut registry = HttpFilterRegistry::default();
    super::register(&mut registry);
    registry
});

type Tree = MatchTree<RequestInput, Skip>;

/// The one action there is.
struct Skip;

struct WithMatcher {
    name: Box<str>,
    filter: Arc<dyn HttpFilter>,
    tree: Option<Tree>,
}

/// What a stream keeps.
#[derive(Default)]
struct Kept {
    /// Whether the filter is passed by; none until the tree has said it.
    skips: Option<bool>,
    state: State,
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: pb::ExtensionWithMatcher = decode(any)?;
    let inner = message.extension_config.as_ref().ok_or_else(|| ConfigError::missing("extension_config"))?;
    let config = inner.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"));
    let made = config.and_then(|config| FILTERS.make(config, context)).at("extension_config")?;
    let HttpFilterKind::Filter(filter) = made else {
        return Err(ConfigError::unsupported("a router behind a matcher").at("extension_config"));
    };
    #[allow(deprecated, reason = "`matcher` is deprecated and still taken")]
    let tree = match (&message.xds_matcher, &message.matcher) {
        (Some(matcher), _) => Some(tree(matcher).at("xds_matcher")?),
        (None, Some(matcher)) => Some(from_common(matcher).and_then(|m| tree(&m)).at("matcher")?),
        (None, None) => None,
    };
    Ok(HttpFilterKind::Filter(Arc::new(WithMatcher { name: context.filter_name.into(), filter, tree })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    let message: pb::ExtensionWithMatcherPerRoute = decode(any)?;
    let matcher = message.xds_matcher.as_ref().ok_or_else(|| ConfigError::missing("xds_matcher"))?;
    Ok(Arc::new(tree(matcher).at("xds_matcher")?))
}

fn tree(message: &Matcher) -> ConfigResult<Tree> {
    MatchTree::from_proto(message, &mut Builder)
}

/// Compiles a tree.
struct Builder;

impl TreeContext for Builder {
    type Input = RequestInput;
    type Action = Skip;
    const KEEP_MATCHING: bool = false;

    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<RequestInput> {
        RequestInput::from_proto(config)
    }

    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Skip> {
        let any = config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        match message_name(any) {
            SKIP => Ok(Skip),
            name => Err(ConfigError::unsupported(format!("filter action {name:?}")).at("typed_config")),
        }
    }
}

impl WithMatcher {
    /// Whether the filter is passed by; none where that cannot be said yet.
    fn decide(
        &self,
        stream: &Stream,
        request: Option<&HeaderMap>,
        response: Option<&HeaderMap>,
    ) -> Option<bool> {
        let Some(tree) = stream.route_config_ref::<Tree>(&self.name).or(self.tree.as_ref()) else {
            return Some(true);
        };
        match tree.find(&RequestFacts { request, response, info: &stream.info }, &mut |_| {}) {
            Found::Action(Skip) => Some(true),
            Found::Nothing => Some(false),
            Found::Pending => None,
        }
    }

    fn kept<'a>(&self, state: &'a mut State) -> Option<&'a mut Kept> {
        state.get_or_insert_with(|| Box::new(Kept::default())).downcast_mut()
    }
}

impl HttpFilter for WithMatcher {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        let Some(kept) = self.kept(state) else { return Step::Continue };
        kept.skips = self.decide(stream, Some(&stream.request), None);
        match kept.skips {
            Some(true) => Step::Continue,
            _ => self.filter.on_request(stream, &mut kept.state),
        }
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        // A request that was answered before the filter is not known to it.
        let request = state.is_some().then_some(());
        let Some(kept) = self.kept(state) else { return Step::Continue };
        if kept.skips.is_none() {
            let request = request.map(|()| &stream.request);
            kept.skips = self.decide(stream, request, Some(&response.headers));
        }
        match kept.skips {
            Some(true) => Step::Continue,
            _ => self.filter.on_response(stream, response, &mut kept.state),
        }
    }

    /// Nothing of the stream's is given here: the tree is asked about the heads as they are now.
    fn on_response_trailers(&self, stream: &Stream, response: &HeaderMap, trailers: &mut HeaderMap) {
        if self.decide(stream, Some(&stream.request), Some(response)) != Some(true) {
            self.filter.on_response_trailers(stream, response, trailers);
        }
    }

    fn on_log(&self, context: &FormatContext<'_>) {
        self.filter.on_log(context);
    }

    fn on_end(&self, stream: &mut Stream, state: &mut State) {
        if let Some(kept) = self.kept(state)
            && kept.state.is_some()
        {
            self.filter.on_end(stream, &mut kept.state);
        }
    }
}
