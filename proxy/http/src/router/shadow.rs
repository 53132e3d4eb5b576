//! Mirrored requests: a copy of head and body goes to another cluster, its answer is read and forgotten.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_listener::Worker;

use super::callout;
use crate::manager::{append_ip, split_port};
use crate::route::ClusterAction;
use crate::stream::Stream;

/// A copy that waits for its body.
pub(super) struct Shadow {
    worker: Rc<Worker>,
    cluster: std::sync::Arc<str>,
    headers: HeaderMap,
}

/// The copies that this request is to have.
pub(super) fn begin(stream: &Stream, action: &ClusterAction) -> Vec<Shadow> {
    if action.mirrors.is_empty() || stream.upgrade.is_some() {
        return Vec::new();
    }
    let mut shadows = Vec::new();
    for mirror in &action.mirrors {
        if !mirror.fraction.hit(&stream.worker.runtime, stream.worker.random()) {
            continue;
        }
        let cluster = match &mirror.cluster {
            Ok(name) => name.clone(),
            Err(header) => {
                let value = stream.request.get_name(header).and_then(|v| std::str::from_utf8(v).ok());
                let Some(name) = value.filter(|v| !v.is_empty()) else { continue };
                name.into()
            }
        };
        let mut headers = stream.request.clone();
        if !mirror.keep_host {
            append_suffix(&mut headers);
        }
        // A copy is the proxy's own request.
        headers.set(HeaderId::X_ENVOY_INTERNAL, "true");
        append_ip(&mut headers, sampan_core::local_info::address());
        shadows.push(Shadow { worker: stream.worker.clone(), cluster, headers });
    }
    shadows
}

/// `host` becomes `host-shadow`, before its port.
fn append_suffix(headers: &mut HeaderMap) {
    let Some(host) = headers.get(HeaderId::AUTHORITY) else { return };
    let (name, port) = split_port(host);
    let mut shadow = [name, b"-shadow"].concat();
    if let Some(port) = port {
        shadow.push(b':');
        shadow.extend_from_slice(port);
    }
    headers.set(HeaderId::AUTHORITY, shadow);
}

/// Copies what passes for the shadows; they go out when the body is complete.
struct Tee {
    body: Body,
    shadows: Vec<Shadow>,
    seen: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    room: usize,
}

/// Puts the copying around a body, where anybody wants copies.
pub(super) fn tee(body: Body, shadows: Vec<Shadow>, room: usize) -> Body {
    if shadows.is_empty() {
        return body;
    }
    if body.is_end() {
        for shadow in shadows {
            shadow.send(Vec::new(), None);
        }
        return body;
    }
    Body::stream(Tee { body, shadows, seen: Vec::new(), trailers: None, room })
}

impl Tee {
    fn complete(&mut self) {
        for shadow in self.shadows.drain(..) {
            shadow.send(self.seen.clone(), self.trailers.clone());
        }
    }
}

impl BodyStream for Tee {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let frame = ready!(self.body.poll_frame(cx));
        match &frame {
            Some(Ok(Frame::Data(data))) if data.len() <= self.room => {
                self.room -= data.len();
                self.seen.push(data.clone());
                if self.body.is_end() {
                    self.complete();
                }
            }
            Some(Ok(Frame::Data(_))) | Some(Err(_)) => {
                for shadow in self.shadows.drain(..) {
                    if let Some(cluster) = shadow.worker.clusters.get(&shadow.cluster) {
                        cluster.stats().retry_or_shadow_abandoned.inc();
                    }
                }
                self.seen.clear();
            }
            Some(Ok(Frame::Trailers(trailers))) => {
                self.trailers = Some(trailers.clone());
                self.complete();
            }
            None => self.complete(),
        }
        Poll::Ready(frame)
    }

    fn is_end(&self) -> bool {
        self.body.is_end()
    }
}

impl Shadow {
    fn send(self, body: Vec<Bytes>, trailers: Option<HeaderMap>) {
        tokio::task::spawn_local(async move {
            let Self { worker, cluster, headers } = self;
            let request = callout::Request {
                body,
                trailers,
                limit: None,
                internal: false,
                forwarded: false,
                ..callout::Request::new(&cluster, headers, Bytes::new())
            };
            // Nobody waits for it; what goes wrong shows in the cluster's counters.
            let _ = callout::ask(&worker.clusters, request).await;
        });
    }
}
