//! A response's head on its way down: counted, and with what the router adds to it.

use std::borrow::Cow;

use sampan_codec::Body;
use sampan_codec::h1::ResponseHead;
use sampan_core::clock;
use sampan_core::header::HeaderId;

use super::body::{self, UpstreamBody};
use super::exchange::Exchange;
use super::upload::Upload;
use super::{Forward, codes, outlier};
use crate::boxed::boxed;
use crate::filter::Response;

impl Forward<'_> {
    /// The response's head, with what the router adds to it.
    pub(super) fn respond(
        &mut self,
        mut head: ResponseHead,
        mut exchange: Exchange,
        upload: Upload,
    ) -> Response {
        let waits = self.waits_for_tunnel();
        let Self { stream, config, selected, cluster, timeouts, counters, cookies, .. } = self;
        let (internal, counters) = (self.internal, std::mem::take(counters));
        let canary = head.headers.get(HeaderId::X_ENVOY_UPSTREAM_CANARY) == Some(b"true");
        let host = exchange.host();
        let kind = codes::Kind { internal, canary: canary || host.canary() };
        // gRPC tells behind the body how it went.
        let later = stream.grpc && head.status < 500 && !head.end;
        if head.status >= 500 || (stream.grpc && head.end && !outlier::grpc_succeeds(&head.headers)) {
            host.host.stats.rq_error.inc();
        } else if !later {
            host.host.stats.rq_success.inc();
        }
        if config.dynamic_stats && !stream.info.health_check {
            codes::charge(cluster.cluster(), head.status, kind);
            counters.charge(head.status);
        }
        let received = stream.info.last_downstream_rx.unwrap_or_else(clock::recent);
        let took = clock::recent().duration_since(received).as_millis() as u64;
        if !config.suppress_envoy_headers && stream.info.last_downstream_rx.is_some() {
            let mut text = itoa::Buffer::new();
            let text = text.format(took);
            head.headers.trusted(|h| h.set(HeaderId::X_ENVOY_UPSTREAM_SERVICE_TIME, text));
        }
        for cookie in cookies.drain(..) {
            head.headers.append(HeaderId::SET_COOKIE, cookie);
        }
        stream.info.details.get_or_insert(Cow::Borrowed("via_upstream"));
        stream.info.response_code = head.status;
        selected.finalize_response(&stream.request, &mut head.headers, &stream.info);
        if selected.virtual_host().attempt_count_in_response {
            head.headers.set(HeaderId::X_ENVOY_ATTEMPT_COUNT, stream.info.attempts.to_string());
        }
        let complete = head.end && !head.tunnel;
        let refused = waits && !head.tunnel;
        if refused && upload.is_empty() {
            // There was no more to the request than its head: the connection may serve another.
            let _ = exchange.send_frame(None, true);
        }
        let body = if complete && (refused || upload.is_received() || exchange.is_h1()) {
            exchange.note_wire(&stream.timer);
            exchange.finish(upload.is_received());
            if config.dynamic_stats {
                codes::time(cluster.cluster(), took, kind);
                counters.time(took);
            }
            Body::Empty
        } else {
            Body::Stream(boxed(|| {
                UpstreamBody::new(body::Parts {
                    exchange,
                    upload,
                    timer: stream.timer.clone(),
                    deadline: std::mem::take(timeouts),
                    tunnel: head.tunnel,
                    refused,
                    complete,
                    counters,
                    grpc: later.then(|| config.rq_reset_after_response.clone()),
                    charge: config.dynamic_stats.then(|| (cluster.cluster().clone(), kind, received)),
                })
            }))
        };
        Response { status: head.status, headers: head.headers, body, tunnel: head.tunnel, local: false }
    }
}
