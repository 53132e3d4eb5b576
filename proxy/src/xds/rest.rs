//! REST: a control plane that is asked again and again, a `DiscoveryRequest` in JSON for a `DiscoveryResponse` in JSON.
//! There is no answer to a response; the next request names the version that was accepted.
//! Source: `docs/root/api-docs/xds_protocol.rst`, "REST-JSON polling subscriptions".

use std::rc::Rc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use prost::bytes::Bytes;
use prost::{Message, Name};
use sampan_config::schema::Message as Schema;
use sampan_config::{Format, LoadOptions, PrintOptions, load_text, to_json};
use sampan_core::HeaderMap;
use sampan_core::header::HeaderId;
use sampan_core::log::{Component, Level};
use sampan_http::router::callout::{self, Request};
use tokio::task::AbortHandle;
use xds_client::types;

use super::Context;
use super::last_good::Keeper;
use super::source::{Subscriber, SubscriptionStats, take, warn};

/// The greatest answer that is read.
const LIMIT: usize = 256 << 20;

/// Ends the polling when it is dropped.
pub struct Poll(Vec<AbortHandle>);

impl Drop for Poll {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// What is asked, and whom.
pub struct Question {
    /// `cluster_names`
    pub cluster: std::sync::Arc<str>,
    /// `refresh_delay`; as much again at random is added.
    pub delay: Duration,
    /// `request_timeout`
    pub timeout: Duration,
    /// `initial_fetch_timeout`
    pub initial: Option<Duration>,
}

struct Rest {
    context: Rc<Context>,
    question: Question,
    path: &'static str,
    stats: SubscriptionStats,
    subscriber: Rc<dyn Subscriber>,
    keeper: Option<Keeper>,
    answered: std::cell::Cell<bool>,
}

/// Where a type is asked for; none where the API has no such path.
fn path(type_url: &str) -> Option<&'static str> {
    Some(match type_url {
        types::CLUSTER => "/v3/discovery:clusters",
        types::ENDPOINTS => "/v3/discovery:endpoints",
        types::LISTENER => "/v3/discovery:listeners",
        types::ROUTES => "/v3/discovery:routes",
        types::SCOPED_ROUTES => "/v3/discovery:scoped-routes",
        types::SECRET => "/v3/discovery:secrets",
        types::RUNTIME => "/v3/discovery:runtime",
        types::EXTENSION => "/v3/discovery:extension_configs",
        _ => return None,
    })
}

/// Begins to ask; none where the type is not served so.
pub fn start(
    context: &Rc<Context>,
    question: Question,
    stats: SubscriptionStats,
    subscriber: &Rc<dyn Subscriber>,
) -> Option<Poll> {
    let path = path(subscriber.type_url())?;
    let (context, subscriber) = (context.clone(), subscriber.clone());
    let keeper = context.last_good.as_ref().map(|kept| kept.keep(&question.cluster, &subscriber));
    let answered = false.into();
    let rest = Rc::new(Rest { context, question, path, stats, subscriber, keeper, answered });
    let mut tasks = Vec::new();
    if let Some(after) = rest.question.initial {
        let rest = rest.clone();
        let late = async move {
            tokio::time::sleep(after).await;
            if !rest.answered.get() {
                warn(&format!("REST config: initial fetch timeout for {}", rest.path));
                rest.stats.timed_out();
                if !rest.keeper.as_ref().is_some_and(|keeper| keeper.late(&rest.stats)) {
                    rest.subscriber.failed();
                }
            }
        };
        tasks.push(tokio::task::spawn_local(late).abort_handle());
    }
    tasks.push(tokio::task::spawn_local(rest.poll()).abort_handle());
    Some(Poll(tasks))
}

impl Rest {
    async fn poll(self: Rc<Self>) {
        self.context.clusters.settled(&self.question.cluster).await;
        let mut version = String::new();
        loop {
            self.stats.attempted();
            match self.ask(&version).await {
                Ok(Some(body)) => self.take(&body, &mut version),
                Ok(None) => {}
                Err(reason) => {
                    sampan_core::log!(Component::Config, Level::Debug, "{}: {reason}", self.path);
                    warn(&format!("REST update for {} failed", self.path));
                    self.stats.unreachable();
                    if let Some(keeper) = &self.keeper {
                        keeper.unreachable(&self.stats);
                    }
                }
            }
            let delay = u64::try_from(self.question.delay.as_millis()).unwrap_or(u64::MAX).max(1);
            let jitter = Duration::from_millis(self.context.control.random() % delay);
            tokio::time::sleep(self.question.delay + jitter).await;
        }
    }

    /// None: nothing is new.
    async fn ask(&self, version: &str) -> Result<Option<Bytes>, String> {
        let body = question(self.context.control.node(), &*self.subscriber, version)?;
        let mut headers = HeaderMap::with_capacity(256, 8);
        headers.append(HeaderId::METHOD, "POST");
        headers.append(HeaderId::SCHEME, "http");
        headers.append(HeaderId::PATH, self.path);
        headers.append(HeaderId::AUTHORITY, &*self.question.cluster);
        headers.append_lower(b"content-type", b"application/json");
        headers.append_lower(b"content-length", body.len().to_string().as_bytes());
        let clusters = self.context.control.clusters();
        let request = Request {
            timeout: Some(self.question.timeout).filter(|timeout| !timeout.is_zero()),
            limit: Some(LIMIT),
            ..Request::new(&self.question.cluster, headers, Bytes::from(body))
        };
        let answer = callout::ask(clusters, request).await?;
        match answer.status {
            200 => Ok(Some(answer.body)),
            304 => Ok(None),
            status => Err(format!("status {status}")),
        }
    }

    fn take(&self, body: &[u8], version: &mut String) {
        let since = Instant::now();
        self.answered.set(true);
        if let Some(keeper) = &self.keeper {
            keeper.heard();
        }
        let options = LoadOptions { unknown: self.context.unknown, skip_any: true, ..LoadOptions::default() };
        let loaded = std::str::from_utf8(body).map_err(|error| error.to_string()).and_then(|text| {
            let loaded = load_text::<DiscoveryResponse>(Format::Json, text, &options);
            let decoded = loaded.and_then(|loaded| {
                self.context.tell_unknown(&loaded.report.unknown);
                loaded.decode()
            });
            decoded.map_err(|error| error.to_string())
        });
        let taken = loaded.and_then(|response| {
            let resources = response.resources.into_iter();
            let resources = resources.map(|any| (any.type_url, String::new(), any.value.into()));
            take(&*self.subscriber, &response.version_info, resources)?;
            Ok(response.version_info)
        });
        match taken {
            Ok(accepted) => {
                self.stats.accepted(&accepted, since);
                if let Some(keeper) = &self.keeper {
                    keeper.accepted(&accepted);
                }
                *version = accepted;
            }
            Err(reason) => {
                warn(&format!("REST config for {} rejected: {reason}", self.path));
                self.stats.rejected();
                self.subscriber.failed();
            }
        }
    }
}

/// The body of a request.
fn question(node: Node, subscriber: &dyn Subscriber, version: &str) -> Result<String, String> {
    let request = DiscoveryRequest {
        version_info: version.to_owned(),
        node: Some(node),
        resource_names: subscriber.name().map(str::to_owned).into_iter().collect(),
        type_url: subscriber.type_url().to_owned(),
        ..DiscoveryRequest::default()
    };
    let schema = Schema::find(&DiscoveryRequest::full_name()).ok_or("no schema")?;
    to_json(schema, &request.encode_to_vec(), PrintOptions::default()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use xds_client::{Decoded, Resource};

    use super::*;

    struct Routes;

    impl Subscriber for Routes {
        fn type_url(&self) -> &'static str {
            types::ROUTES
        }

        fn name(&self) -> Option<&str> {
            Some("r")
        }

        fn decode(&self, _resource: Resource) -> Result<Decoded, String> {
            Err("not here".to_owned())
        }

        fn update(&self, _version: &str, _resources: &[Rc<Decoded>]) -> Result<(), String> {
            Ok(())
        }

        fn failed(&self) {}
    }

    /// As Envoy 1.40 asks.
    #[test]
    fn a_request_names_its_type() {
        let node = Node { id: "n".to_owned(), ..Node::default() };
        let body = question(node, &Routes, "7").unwrap();
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let whole = serde_json::json!({
            "version_info": "7", "node": {"id": "n"}, "resource_names": ["r"],
            "type_url": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
        });
        assert_eq!(body, whole);
    }
}
