//! The admin interface.
//!
//! [`Admin`] answers a request from what it is given: the stats, the runtime, and an [`AdminSource`], through
//! which the program shows its clusters, listeners, certificates and configuration and takes commands. Nothing
//! here knows how those are kept, so the crate knows none of theirs. [`Listener`] serves it on the control thread; no
//! worker ever waits for it.
//!
//! Paths, parameters, statuses and bodies are Envoy 1.40's; what differs stands in `docs/divergences.md`. Every
//! text that goes into HTML is escaped, whoever chose it (a cluster's name is its owner's).
//!
//! Source: Envoy, "Administration interface".

#![allow(clippy::disallowed_methods, reason = "runs on the control thread")]

mod clusters;
mod config_dump;
mod endpoints;
mod html;
mod json;
mod logging;
mod model;
mod query;
mod serve;
mod simple;
mod source;
mod stats;

use std::cell::Cell;
use std::rc::Rc;

use sampan_core::runtime::Runtime;
use sampan_core::stats::Store;

pub use model::AdminModel;
pub use query::Query;
pub use serve::Listener;
pub use source::{
    AdminSource, ClusterRow, DrainRequest, HealthFlags, HostRow, ListenerRow, Outlier, Section, Thresholds,
};

/// What an endpoint answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// `content-type`.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

const TEXT: &str = "text/plain; charset=UTF-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=UTF-8";

impl Reply {
    fn text(body: impl Into<String>) -> Self {
        Self { status: 200, content_type: TEXT, body: body.into() }
    }

    fn json(body: String) -> Self {
        Self { status: 200, content_type: JSON, body }
    }

    fn error(status: u16, body: impl Into<String>) -> Self {
        Self { status, content_type: TEXT, body: body.into() }
    }

    fn ok() -> Self {
        Self::text("OK\n")
    }
}

/// A request, read to its end.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    /// The method.
    pub method: &'a str,
    /// The path with the query.
    pub path: &'a str,
    /// The body of a form.
    pub form: &'a str,
}

/// The endpoints and what they read.
pub struct Admin {
    source: Rc<dyn AdminSource>,
    stats: Store,
    runtime: Runtime,
    model: AdminModel,
    /// `/stats/recentlookups/enable` was called.
    lookups: Cell<bool>,
}

impl Admin {
    /// The interface over these parts.
    pub fn new(source: Rc<dyn AdminSource>, stats: Store, runtime: Runtime, model: AdminModel) -> Self {
        Self { source, stats, runtime, model, lookups: Cell::new(false) }
    }

    /// Answers a request.
    pub fn answer(&self, request: &Request<'_>) -> Reply {
        if !self.model.allows(request.path) {
            return Reply::error(403, format!("request to path {} not allowed", request.path));
        }
        let (path, query) = request.path.split_once('?').unwrap_or((request.path, ""));
        let Some(endpoint) = endpoints::find(path) else {
            return Reply::error(404, format!("invalid path. {}", endpoints::help()));
        };
        if endpoint.post && request.method != "POST" {
            return Reply::error(405, format!("Method {} not allowed, POST required.", request.method));
        }
        let query = if query.is_empty() { request.form } else { query };
        (endpoint.handler)(self, &Query::parse(query))
    }
}

#[cfg(test)]
mod tests;
