//! What outlier detection is told of an attempt.

use sampan_codec::h1::ResponseHead;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_upstream::{Outcome, WorkerHost};

use super::Forward;
use super::failure::Failure;
use crate::stream::Stream;

impl Forward<'_> {
    /// How an attempt ended, to its response's head.
    pub(super) fn report(&self, result: Result<&ResponseHead, &Failure>) {
        let Some(host) = &self.host else { return };
        if let Err(Failure::Timeout | Failure::PerTryTimeout | Failure::PerTryIdleTimeout) = result {
            // As long as there is no connection, nothing is known of the host.
            if self.connected {
                let code = if self.timeouts.alternative_response { 204 } else { 504 };
                host.report(Outcome::Timeout, Some(code));
            }
            return;
        }
        report(host, Stream::is_grpc(&self.stream.request), result);
    }
}

/// The same for an attempt whose timeout was told already.
pub(super) fn report(host: &WorkerHost, grpc: bool, result: Result<&ResponseHead, &Failure>) {
    match result {
        Ok(head) => {
            let code = code_of(grpc, head);
            host.report(if code >= 500 { Outcome::Failed } else { Outcome::Success }, Some(code));
        }
        Err(Failure::Overflow | Failure::NoHost(_) | Failure::Downstream(_) | Failure::Timeout) => {}
        Err(_) => host.report(Outcome::ConnectFailed, None),
    }
}

/// The status, or what a gRPC status in the head means.
fn code_of(grpc: bool, head: &ResponseHead) -> u16 {
    match head.headers.get(HeaderId::GRPC_STATUS) {
        Some(status) if grpc => {
            std::str::from_utf8(status).ok().and_then(|s| s.parse().ok()).map_or(500, http_status)
        }
        _ => head.status,
    }
}

/// Whether a host has done well, by the gRPC status in a head or in trailers. None at all is a failure.
pub(super) fn grpc_succeeds(headers: &HeaderMap) -> bool {
    let status = headers.get(HeaderId::GRPC_STATUS).and_then(|s| std::str::from_utf8(s).ok()?.parse().ok());
    status.is_some_and(|status| http_status(status) < 500)
}

fn http_status(grpc: u32) -> u16 {
    match grpc {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}
