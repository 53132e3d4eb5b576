//! Replies of this proxy's own: to a deadline that passed, and what any of them leaves in the stream info.

use sampan_core::stream_info::{Protocol, ResponseFlag};

use super::Exchange;
use crate::filter::{LocalReply, Response};
use crate::timer::Expired;

const GRPC_DEADLINE_EXCEEDED: u32 = 4;

impl Exchange {
    /// The reply that a deadline means, with its counters.
    pub(super) fn expired(&mut self, what: Expired) -> LocalReply {
        let stats = &self.stream.manager.stats;
        match what {
            Expired::Idle => {
                stats.downstream_rq_idle_timeout.inc();
                let reply = LocalReply::new(408, "stream_idle_timeout").body("stream timeout");
                // A request that was wholly received waits for the upstream: that is the gateway's timeout.
                let status = if self.stream.info.last_downstream_rx.is_some() { 504 } else { 408 };
                LocalReply { status, ..reply }.flag(ResponseFlag::StreamIdleTimeout)
            }
            Expired::MaxDuration => {
                stats.downstream_rq_max_duration_reached.inc();
                let done = self.stream.info.last_downstream_rx.is_some();
                let status = if done { 504 } else { 408 };
                let mut reply =
                    LocalReply::new(status, "max_duration_timeout").body("downstream duration timeout");
                reply.grpc_status = Some(GRPC_DEADLINE_EXCEEDED);
                reply
            }
            Expired::Request => {
                stats.downstream_rq_timeout.inc();
                self.close = true;
                LocalReply::new(408, "request_overall_timeout").body("request timeout")
            }
        }
    }

    /// A local reply as a response, and its traces in the stream info.
    pub(super) fn local_response(&mut self, reply: LocalReply) -> Response {
        let stream = &mut self.stream;
        if let Some(flag) = reply.flag {
            stream.info.flags.set(flag);
        }
        // A bad request may be out of step with its connection (HTTP/1).
        let bad = reply.status == 400
            && stream.info.protocol.is_some_and(|p| p < Protocol::Http2)
            && !stream.manager.stream_errors;
        self.close |= reply.close || bad;
        self.at_once = stream.resumed.is_none() && stream.info.attempts == 0;
        stream.info.details = Some(reply.details.clone());
        let manager = stream.manager.clone();
        manager.local_reply.respond(reply, stream)
    }
}
