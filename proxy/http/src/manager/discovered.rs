//! The place of an HTTP filter whose configuration comes by ECDS.
//!
//! A stream keeps the filter that it met first, whatever comes in between: what it keeps of the stream and what sees
//! the response must be of one kind. Without a filter the answer is 500 with the flag `NFCF`, as in Envoy.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::ExtensionConfigSource;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::ResponseFlag;
use sampan_listener::discovered::{Make, make_alone};
use sampan_listener::{ExtensionSlot, FactoryContext, Stage};

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, HttpFilterRegistry, LocalReply, Response, State, Step,
};
use crate::stream::Stream;

type Filter = Arc<dyn HttpFilter>;

/// A filter's place.
pub struct Discovered(Arc<ExtensionSlot<Filter>>);

/// What a stream keeps.
struct Kept {
    filter: Option<Filter>,
    state: State,
}

impl Discovered {
    pub(super) fn from_proto(
        message: &ExtensionConfigSource,
        name: &str,
        context: &FactoryContext,
        registry: &HttpFilterRegistry,
        stat_prefix: &str,
    ) -> ConfigResult<Self> {
        let slot = ExtensionSlot::from_proto(message, name, Stage::Http, context, |type_name| {
            let factory = registry.factory(type_name)?;
            let (context, name, stat_prefix) = (context.clone(), name.to_owned(), stat_prefix.to_owned());
            let make: Make<Filter> = Box::new(move |config| {
                let made = make_alone(&context, |factory_context| {
                    let context = HttpFilterContext {
                        factory: factory_context,
                        stat_prefix: &stat_prefix,
                        filter_name: &name,
                    };
                    (factory.filter)(config, &context)
                })?;
                match made {
                    HttpFilterKind::Filter(filter) => Ok(filter),
                    HttpFilterKind::Router(_) => Err(ConfigError::new(format!(
                        "Error: terminal filter named {name} must be the last filter in a http filter chain."
                    ))),
                }
            });
            Some(make)
        })?;
        Ok(Self(slot))
    }

    fn kept<'a>(&self, state: &'a mut State) -> Option<&'a mut Kept> {
        let fresh = || Box::new(Kept { filter: self.0.current(), state: None });
        state.get_or_insert_with(|| fresh()).downcast_mut()
    }
}

impl HttpFilter for Discovered {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        match self.kept(state) {
            Some(Kept { filter: Some(filter), state }) => filter.on_request(stream, state),
            _ => Step::reply(LocalReply::new(500, "").flag(ResponseFlag::NoFilterConfigFound)),
        }
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        match self.kept(state) {
            Some(Kept { filter: Some(filter), state }) => filter.on_response(stream, response, state),
            _ => Step::Continue,
        }
    }

    /// Nothing of the stream's is given here, so that the filter in force will do.
    fn on_response_trailers(&self, stream: &Stream, response: &HeaderMap, trailers: &mut HeaderMap) {
        if let Some(filter) = self.0.current() {
            filter.on_response_trailers(stream, response, trailers);
        }
    }

    fn on_end(&self, stream: &mut Stream, state: &mut State) {
        if let Some(Kept { filter: Some(filter), state }) = self.kept(state)
            && state.is_some()
        {
            filter.on_end(stream, state);
        }
    }
}
