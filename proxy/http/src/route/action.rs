//! What is done with a request that a route matched.

use std::borrow::Cow;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{FormatContext, Formatter};

use super::RouteContext;
use super::forward::ClusterAction;
use super::matching::RouteMatch;
use super::mirror::Mirror;
use super::redirect::Redirect;
use super::retry::RetryPolicy;

/// A compiled action.
pub enum Action {
    /// To a cluster; also `filter_action` and `non_forwarding_action`, which go to none, as in Envoy: 503.
    Cluster(Box<ClusterAction>),
    /// 3xx with a location.
    Redirect(Box<Redirect>),
    /// A reply from the configuration.
    Direct(Box<DirectResponse>),
}

/// What a route inherits from its virtual host.
pub(super) struct Inherited<'a> {
    pub(super) retry: Option<&'a RetryPolicy>,
    /// `hedge_policy.hedge_on_per_try_timeout`
    pub(super) hedge: bool,
    pub(super) mirrors: &'a [Mirror],
    /// `ignore_path_parameters_in_path_matching`
    pub(super) ignore_parameters: bool,
    /// `max_direct_response_body_size_bytes`
    pub(super) max_body: usize,
}

/// A direct response.
pub struct DirectResponse {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: Arc<str>,
    /// `body_format`
    pub format: Option<Formatter>,
}

impl Action {
    pub(super) fn from_proto(
        message: &pb::route::Action,
        matching: &RouteMatch,
        context: &RouteContext<'_>,
        inherited: &Inherited<'_>,
    ) -> ConfigResult<Self> {
        Ok(match message {
            pb::route::Action::Route(m) => Self::Cluster(Box::new(
                ClusterAction::from_proto(m, matching, context, inherited).at("route")?,
            )),
            pb::route::Action::Redirect(m) => {
                Self::Redirect(Box::new(Redirect::from_proto(m).at("redirect")?))
            }
            pb::route::Action::DirectResponse(m) => Self::Direct(Box::new(
                DirectResponse::from_proto(m, inherited.max_body).at("direct_response")?,
            )),
            pb::route::Action::FilterAction(_) | pb::route::Action::NonForwardingAction(_) => {
                Self::Cluster(Box::new(ClusterAction::from_proto(
                    &pb::RouteAction::default(),
                    matching,
                    context,
                    inherited,
                )?))
            }
        })
    }

    /// The forwarding, if it is one.
    pub fn cluster(&self) -> Option<&ClusterAction> {
        match self {
            Self::Cluster(action) => Some(action),
            _ => None,
        }
    }
}

impl DirectResponse {
    fn from_proto(message: &pb::DirectResponseAction, max_body: usize) -> ConfigResult<Self> {
        let body = match &message.body {
            Some(source) => sampan_core::format::read_source(source).at("body")?,
            None => String::new(),
        };
        if body.len() > max_body {
            let reason = format!("response body size is {} bytes; maximum is {max_body}", body.len());
            return Err(ConfigError::new(reason).at("body"));
        }
        Ok(Self {
            status: message.status as u16,
            body: body.into(),
            format: message.body_format.as_ref().map(Formatter::from_proto).transpose().at("body_format")?,
        })
    }

    /// The body for a request.
    pub fn body(&self, context: &FormatContext<'_>) -> Cow<'static, str> {
        match &self.format {
            None => Cow::Owned((*self.body).to_owned()),
            Some(format) => {
                let mut out = Vec::new();
                format.write(&FormatContext { local_reply_body: self.body.as_bytes(), ..*context }, &mut out);
                Cow::Owned(String::from_utf8_lossy(&out).into_owned())
            }
        }
    }
}
