//! How an exchange ends when it does not end well, and what is written down of it.

use std::borrow::Cow;
use std::time::Duration;

use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use sampan_codec::{BodyError, CodecError, ResetReason, h2};
use sampan_core::format::FormatContext;
use sampan_core::stream_info::ResponseFlag;

use super::{Exchange, Fate};
use crate::manager::h2::{Ended, Shared};
use crate::manager::responder::Responder;
use crate::route::Selected;
use crate::stream::Stream;

impl Exchange {
    /// The client gave up.
    pub fn gone(mut self: Box<Self>, reason: ResetReason, responder: &mut Responder) -> Fate {
        self.count_wire(responder);
        let reason = match responder {
            // The request's body has told before the stream did.
            Responder::H2(h2) if h2.shared.is_over() => ResetReason::ConnectionTermination,
            Responder::H2(h2) => h2.stream.meter().reset_by_peer.unwrap_or(reason),
            Responder::H1(connection, ..) if connection.is_gone() => ResetReason::ConnectionTermination,
            _ => reason,
        };
        if let Responder::H2(h2) = responder
            && reason == ResetReason::LocalReset
            && self.response.is_none()
            && h2.stream.meter().ended
        {
            // The codec has reset the stream for its body, in the middle of it.
            self.note_refused(ResponseFlag::DownstreamProtocolError, "http2.remote_reset");
            h2.shared.note_reset(self.stream.info.start);
            h2.finished = Some(self);
            return Fate::Abort;
        }
        if reason == ResetReason::LocalReset {
            self.reset(responder);
            if let Responder::H2(h2) = responder {
                h2.finished = Some(self);
            }
            return Fate::Abort;
        }
        match responder {
            Responder::H2(h2) => self.note_gone(reason, &h2.shared),
            Responder::H1(_, drain, _) => {
                let info = &mut self.stream.info;
                let stats = &self.stream.manager.stats;
                info.flags.set(ResponseFlag::DownstreamConnectionTermination);
                info.details = Some(Cow::Borrowed(if drain.is_closing() {
                    drain.closing_details()
                } else {
                    stats.downstream_cx_destroy_remote_active_rq.inc();
                    "downstream_remote_disconnect"
                }));
                stats.downstream_rq_rx_reset.inc();
                stats.downstream_cx_destroy_active_rq.inc();
            }
        }
        Fate::Abort
    }

    /// An HTTP/2 stream ended before its response was sent.
    pub fn note_gone(&mut self, reason: ResetReason, shared: &Shared) {
        self.stream.manager.stats.downstream_rq_rx_reset.inc();
        let info = &mut self.stream.info;
        if info.response_code == 0 {
            shared.note_reset(info.start);
        }
        if let Some(ended) = shared.ended() {
            if let Some(flag) = ended.flag {
                info.flags.set(flag);
            }
            info.details = Some(Cow::Borrowed(ended.details));
        } else if reason == ResetReason::ProtocolError {
            info.flags.set(ResponseFlag::DownstreamProtocolError);
            info.details = Some(Cow::Borrowed("http2.remote_reset"));
        } else if matches!(reason, ResetReason::RemoteReset | ResetReason::RemoteRefused) {
            info.flags.set(ResponseFlag::DownstreamRemoteReset);
            let refused = reason == ResetReason::RemoteRefused;
            info.details =
                Some(Cow::Borrowed(if refused { "http2.remote_refuse" } else { "http2.remote_reset" }));
        } else {
            info.flags.set(ResponseFlag::DownstreamConnectionTermination);
            info.details = Some(Cow::Borrowed("downstream_remote_disconnect"));
        }
    }

    /// A stream of HTTP/2 that the codec has not handed out and nobody has seen: counted and logged.
    pub fn unseen(stream: Box<Stream>, sent: u64, why: Ended) {
        let mut exchange = Self::begin(stream, (0, 0));
        exchange.note_refused(why.flag, why.details);
        exchange.stream.info.bytes.wire_sent = sent;
    }

    fn note_refused(&mut self, flag: impl Into<Option<ResponseFlag>>, details: &'static str) {
        if let Some(flag) = flag.into() {
            self.stream.info.flags.set(flag);
        }
        self.stream.info.details = Some(Cow::Borrowed(details));
        self.stream.manager.stats.downstream_rq_rx_reset.inc();
    }

    /// The codec does not like the request: its stream is reset (HTTP/2).
    pub fn turn_away(mut self: Box<Self>, error: CodecError, responder: &mut Responder) {
        let (flag, reason) = match h2::is_malformed(&error) {
            true => (ResponseFlag::DownstreamProtocolError, h2::Reason::PROTOCOL_ERROR),
            false => (ResponseFlag::DownstreamRemoteReset, h2::Reason::INTERNAL_ERROR),
        };
        self.note_refused(flag, error.details);
        if let Responder::H2(h2) = responder {
            h2.shared.note_reset(self.stream.info.start);
            h2.cut = Some(reason);
            h2.finished = Some(self);
        }
    }

    /// How long a client may let what is left of its response wait. Only the manager's own timeout for that comes behind
    /// the route's: Envoy takes its stream idle timeout, never the route's idle timeout, for one that is not configured.
    pub fn flush_timeout(&self) -> Option<Duration> {
        let action = self.stream.route.as_ref().and_then(Selected::cluster_action);
        let by_route = action.and_then(|action| action.flush_timeout);
        by_route.unwrap_or(self.stream.manager.limits.stream_flush_timeout)
    }

    /// What an HTTP/2 stream had on the wire.
    pub fn note_meter(&mut self, meter: &h2::Meter) {
        let bytes = &mut self.stream.info.bytes;
        bytes.wire_received = meter.received;
        bytes.wire_sent = meter.sent;
        bytes.header_received = meter.header_received;
        bytes.header_sent = meter.header_sent;
    }

    /// The request's body broke the framing while the response was under way.
    fn broken_by_client(mut self: Box<Self>, error: CodecError, responder: &mut Responder) -> Fate {
        let stats = &self.stream.manager.stats;
        stats.downstream_rq_rx_reset.inc();
        if let Responder::H1(..) = responder {
            stats.downstream_cx_destroy_active_rq.inc();
            stats.downstream_cx_destroy_local_active_rq.inc();
        }
        let info = &mut self.stream.info;
        info.flags.set(ResponseFlag::DownstreamProtocolError);
        info.details = Some(Cow::Borrowed(error.details));
        if let Responder::H2(h2) = responder {
            h2.finished = Some(self);
        }
        Fate::Linger
    }

    /// The response's body broke off.
    pub(super) fn broken(mut self: Box<Self>, error: BodyError, responder: &mut Responder) -> Fate {
        self.count_wire(responder);
        let info = &mut self.stream.info;
        let (flag, reason) = match error {
            BodyError::Timeout => (ResponseFlag::UpstreamRequestTimeout, "response_timeout"),
            // HTTP/2's codec has reset the stream.
            BodyError::Request(CodecError { status: 0, details, .. }) => {
                (ResponseFlag::DownstreamRemoteReset, details)
            }
            BodyError::Request(error) => return self.broken_by_client(error, responder),
            BodyError::Protocol(_) | BodyError::Reset(ResetReason::ProtocolError) => {
                (ResponseFlag::UpstreamProtocolError, "protocol_error")
            }
            BodyError::Reset(reason @ (ResetReason::RemoteReset | ResetReason::RemoteRefused)) => {
                (ResponseFlag::UpstreamRemoteReset, reason.as_str())
            }
            BodyError::Reset(reason) => (ResponseFlag::UpstreamConnectionTermination, reason.as_str()),
        };
        // A router that knows better (its timeout) has said so already.
        if info.flags.is_empty() {
            info.flags.set(flag);
            info.details = Some(match error {
                BodyError::Timeout | BodyError::Request(_) => Cow::Borrowed(reason),
                _ => format!("upstream_reset_after_response_started{{{reason}}}").into(),
            });
        }
        self.reset(responder);
        match responder {
            Responder::H2(h2) => {
                if self.stream.info.last_downstream_rx.is_none() {
                    self.stream.manager.stats.downstream_rq_response_before_rq_complete.inc();
                }
                h2.finished = Some(self);
                Fate::Linger
            }
            // The client knows that this is the last.
            Responder::H1(connection, ..) if self.close && connection.request_done() => Fate::Close,
            Responder::H1(..) => Fate::Linger,
        }
    }

    pub(super) fn reset(&mut self, responder: &mut Responder) {
        let stats = &self.stream.manager.stats;
        // The codec tells of its own resets too.
        stats.downstream_rq_rx_reset.inc();
        if let Responder::H2(h2) = responder {
            let flags = &self.stream.info.flags;
            let lost = flags.has(ResponseFlag::UpstreamConnectionFailure)
                || flags.has(ResponseFlag::UpstreamConnectionTermination);
            // A tunnel says that it was its far end (RFC 9113 section 8.5).
            h2.cut = Some(if lost && self.stream.upgrade.is_some() {
                h2::Reason::CONNECT_ERROR
            } else {
                h2::Reason::INTERNAL_ERROR
            });
            if self.stream.info.response_code == 0 {
                h2.shared.note_reset(self.stream.info.start);
            }
            // Where the codec has reset the stream for what the client sent, nobody else does.
            if self.stream.info.flags.has(ResponseFlag::DownstreamRemoteReset) {
                return;
            }
        }
        stats.downstream_rq_tx_reset.inc();
    }

    pub(super) fn log(&self, log_type: AccessLogType) {
        for log in &self.stream.manager.access_log {
            log.log(&self.facts(log_type));
        }
    }

    /// What logs are told.
    pub(super) fn facts(&self, log_type: AccessLogType) -> FormatContext<'_> {
        FormatContext {
            request: Some(&self.stream.request),
            response: self.response.as_ref(),
            trailers: self.trailers.as_ref(),
            info: &self.stream.info,
            local_reply_body: b"",
            log_type,
        }
    }

    /// What the wire carried for this exchange.
    pub(super) fn count_wire(&mut self, responder: &Responder) {
        if let Responder::H2(h2) = responder {
            self.note_meter(&h2.stream.meter());
        }
        if let Some((read, written)) = responder.wire_bytes() {
            self.stream.info.bytes.wire_received = read - self.wire_before.0;
            self.stream.info.bytes.wire_sent = written - self.wire_before.1;
        }
    }
}
