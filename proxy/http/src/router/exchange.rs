//! One attempt at one upstream connection, the same for HTTP/1 and HTTP/2.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use sampan_codec::h1::{ClientConnection, ResponseHead};
use sampan_codec::h2::{ClientStream, Meter, Reason};
use sampan_codec::{BodyError, Frame, ResetReason};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::Protocol;
use sampan_upstream::{ConnectInfo, H1Lease, H2Lease, HttpLease, TcpLease, WorkerHost};

use crate::timer::Timer;
use sampan_listener::UpstreamBytes;

/// A request on its connection. Dropping it before the end closes the connection or resets the stream.
pub(super) enum Exchange {
    H1 {
        lease: Option<H1Lease>,
        host: Rc<WorkerHost>,
        half_closed: bool,
        /// What the connection had carried before, received and sent.
        before: (u64, u64),
    },
    H2 {
        /// Boxed as what is large below: an exchange is handed on by value, and nearly all are of HTTP/1.
        stream: Box<ClientStream>,
        lease: Box<H2Lease>,
        done: bool,
    },
    /// CONNECT that ends here: the host gets bytes, the client a 200 at once.
    Tcp {
        codec: Box<ClientConnection>,
        lease: Box<TcpLease>,
        /// The end of the request's body was queued.
        ended: bool,
    },
}

impl Exchange {
    /// Sends the head.
    ///
    /// `first`: what goes before the bytes of a TCP connection.
    pub(super) fn start(
        lease: HttpLease,
        headers: &HeaderMap,
        end: bool,
        first: &[u8],
    ) -> Result<Self, ResetReason> {
        match lease {
            HttpLease::Tcp(mut lease) => {
                let transport = lease.transport.take().ok_or(ResetReason::ConnectionFailure)?;
                let mut codec = Box::new(ClientConnection::new(transport, Rc::default()));
                codec.open_raw(first);
                Ok(Self::Tcp { codec, lease, ended: end })
            }
            HttpLease::H1(mut lease) => {
                let before = lease.codec().wire_bytes();
                lease.codec().send_head(headers, end);
                let host = lease.host().clone();
                Ok(Self::H1 { lease: Some(lease), host, half_closed: false, before })
            }
            HttpLease::H2(mut lease) => {
                let stream = Box::new(lease.start(headers, end)?);
                Ok(Self::H2 { stream, lease, done: false })
            }
        }
    }

    /// What is known of the connection, and how many streams it had carried before.
    pub(super) fn info(lease: &HttpLease) -> (&ConnectInfo, u64) {
        match lease {
            HttpLease::H1(lease) => (lease.info(), lease.streams_before()),
            HttpLease::H2(lease) => (lease.info(), lease.streams_before()),
            HttpLease::Tcp(lease) => (&lease.info, 0),
        }
    }

    pub(super) fn protocol(lease: &HttpLease) -> Option<Protocol> {
        match lease {
            HttpLease::H1(_) => Some(Protocol::Http11),
            HttpLease::H2(_) => Some(Protocol::Http2),
            HttpLease::Tcp(_) => None,
        }
    }

    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        match self {
            Self::H1 { lease: Some(lease), .. } => {
                lease.codec().poll_ready(cx).map_err(|_| ResetReason::ConnectionTermination)
            }
            Self::H1 { lease: None, .. } => Poll::Ready(Err(ResetReason::ConnectionTermination)),
            Self::H2 { stream, .. } => stream.poll_ready(cx),
            Self::Tcp { codec, .. } => codec.poll_ready(cx).map_err(|_| ResetReason::ConnectionTermination),
        }
    }

    pub(super) fn send_frame(&mut self, frame: Option<Frame>, end: bool) -> Result<(), ResetReason> {
        match self {
            Self::H1 { lease: Some(lease), .. } => {
                lease.codec().send_frame(frame, end);
                Ok(())
            }
            Self::H1 { lease: None, .. } => Ok(()),
            Self::H2 { stream, .. } => stream.send_frame(frame, end),
            Self::Tcp { codec, ended, .. } => {
                *ended |= end || matches!(frame, Some(Frame::Trailers(_)));
                codec.send_frame(frame, end);
                Ok(())
            }
        }
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        match self {
            Self::H1 { lease: Some(lease), .. } => {
                lease.codec().poll_flush(cx).map_err(|_| ResetReason::ConnectionTermination)
            }
            Self::H1 { lease: None, .. } | Self::H2 { .. } => Poll::Ready(Ok(())),
            Self::Tcp { codec, ended, .. } => {
                let flushed = if *ended { codec.poll_shutdown(cx) } else { codec.poll_flush(cx) };
                flushed.map_err(|_| ResetReason::ConnectionTermination)
            }
        }
    }

    /// In a tunnel the end of our direction is a half-close; of an upgrade over HTTP/1 the host learns nothing, as in
    /// Envoy.
    pub(super) fn poll_half_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // What goes wrong here shows when the other direction is read.
        match self {
            Self::H1 { lease: Some(lease), half_closed, .. } if !*half_closed => {
                if lease.codec().is_connect() {
                    let _ = ready!(lease.codec().poll_shutdown(cx));
                }
                *half_closed = true;
            }
            Self::H1 { .. } => {}
            Self::H2 { stream, .. } => {
                let _ = stream.send_frame(None, true);
            }
            Self::Tcp { codec, ended, .. } => {
                *ended = true;
                let _ = ready!(codec.poll_shutdown(cx));
            }
        }
        Poll::Ready(())
    }

    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, BodyError>> {
        match self {
            Self::H1 { lease: Some(lease), .. } => {
                let head = ready!(lease.codec().poll_head(cx));
                if head.is_ok() && lease.codec().close_notified() {
                    lease.host().cluster_stats().upstream_cx_close_notify.inc();
                }
                Poll::Ready(head)
            }
            Self::H1 { lease: None, .. } => {
                Poll::Ready(Err(BodyError::Reset(ResetReason::ConnectionTermination)))
            }
            Self::H2 { stream, lease, done } => {
                let head = ready!(stream.poll_head(cx));
                if let Err(BodyError::Reset(reason)) = head {
                    count_reset(lease, stream, done, reason);
                }
                Poll::Ready(head)
            }
            Self::Tcp { .. } => {
                let mut headers = HeaderMap::new();
                headers.append(HeaderId::STATUS, "200");
                Poll::Ready(Ok(ResponseHead { headers, status: 200, end: false, tunnel: true }))
            }
        }
    }

    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self {
            Self::H1 { lease: Some(lease), .. } => lease.codec().poll_frame(cx),
            Self::H1 { lease: None, .. } => Poll::Ready(None),
            Self::H2 { stream, lease, done } => {
                let frame = ready!(stream.poll_frame(cx));
                if let Some(Err(BodyError::Reset(reason))) = frame {
                    count_reset(lease, stream, done, reason);
                }
                Poll::Ready(frame)
            }
            Self::Tcp { codec, .. } => codec.poll_frame(cx),
        }
    }

    pub(super) fn response_done(&mut self) -> bool {
        match self {
            Self::H1 { lease: Some(lease), .. } => lease.codec().response_done(),
            Self::H1 { lease: None, .. } => true,
            Self::H2 { stream, .. } => stream.response_done(),
            Self::Tcp { codec, .. } => codec.response_done(),
        }
    }

    /// Tells the timer how many bytes were sent and received so far; known for HTTP/1 until [`Exchange::finish`].
    pub(super) fn note_wire(&mut self, timer: &Timer) {
        if let Some(meter) = self.meter() {
            timer.set_upstream_wire((meter.sent, meter.received));
            if !matches!(self, Self::Tcp { .. }) {
                timer.set_upstream_headers((meter.header_sent, meter.header_received));
            }
        }
    }

    /// The bytes sent and received so far; known for HTTP/1 until [`Exchange::finish`].
    pub(super) fn meter(&mut self) -> Option<UpstreamBytes> {
        match self {
            Self::H1 { lease: Some(lease), before, .. } => {
                let (received, sent) = lease.codec().wire_bytes();
                let (header_sent, header_received) = lease.codec().header_bytes();
                let (sent, received) = (sent - before.1, received - before.0);
                Some(UpstreamBytes { sent, received, header_sent, header_received })
            }
            Self::H1 { lease: None, .. } => None,
            Self::H2 { stream, .. } => {
                let Meter { sent, received, header_sent, header_received, .. } = stream.meter();
                Some(UpstreamBytes { sent, received, header_sent, header_received })
            }
            Self::Tcp { codec, .. } => {
                let (received, sent) = codec.wire_bytes();
                Some(UpstreamBytes { sent, received, ..UpstreamBytes::default() })
            }
        }
    }

    /// The response is complete: the connection goes back to its pool, if the request is complete too.
    pub(super) fn finish(&mut self, request_sent: bool) {
        match self {
            Self::H1 { lease, .. } => {
                if let Some(lease) = lease.take() {
                    lease.release();
                }
            }
            Self::H2 { stream, done, .. } => {
                if !request_sent {
                    stream.reset(Reason::NO_ERROR);
                }
                *done = true;
            }
            Self::Tcp { .. } => {}
        }
    }

    pub(super) fn host(&self) -> &Rc<WorkerHost> {
        match self {
            Self::H1 { host, .. } => host,
            Self::H2 { lease, .. } => lease.host(),
            Self::Tcp { lease, .. } => lease.host(),
        }
    }

    pub(super) fn is_h1(&self) -> bool {
        matches!(self, Self::H1 { .. })
    }
}

/// A stream ended before its end; each is counted, also one that is tried again.
fn count_reset(lease: &H2Lease, stream: &ClientStream, done: &mut bool, reason: ResetReason) {
    let stats = lease.host().cluster_stats();
    match reason {
        ResetReason::RemoteReset => stats.upstream_rq_rx_reset.inc(),
        ResetReason::LocalReset | ResetReason::ProtocolError => {
            stats.upstream_rq_tx_reset.inc();
            // A connection that is broken counts itself.
            if stream.is_malformed() {
                stats.upstream_cx_protocol_error.inc();
            }
        }
        ResetReason::ConnectionTermination | ResetReason::ConnectionFailure => {
            stats.upstream_rq_pending_failure_eject.inc();
        }
        ResetReason::RemoteRefused | ResetReason::Overflow => {}
    }
    *done = true;
}

impl Drop for Exchange {
    fn drop(&mut self) {
        match self {
            Self::H2 { stream, done: false, lease } => {
                lease.host().cluster_stats().upstream_rq_tx_reset.inc();
                // As Envoy says it, whoever gave the request up.
                stream.reset(Reason::INTERNAL_ERROR);
            }
            Self::Tcp { codec, lease, ended } => {
                let (received, sent) = codec.wire_bytes();
                lease.count_bytes(received, sent);
                // With our direction open the end is ours, whoever asked for it.
                if *ended && codec.closed_by_peer() {
                    lease.closed_by_peer();
                }
            }
            Self::H1 { .. } | Self::H2 { .. } => {}
        }
    }
}
