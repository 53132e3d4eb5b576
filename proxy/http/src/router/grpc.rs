//! Unary gRPC calls of the proxy's own to one of its clusters: for filters that ask a service.
//!
//! The call is a [`callout`]: it is counted as any request to its cluster, ends at its deadline, and when it is dropped.
//! Source (statuses): `http-grpc-status-mapping.md` of gRPC; where a peer leaves out what it must send, Envoy was asked.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as pb;
use prost::Message;
use sampan_core::config_source;
use sampan_core::error::ConfigResult;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_upstream::WorkerClusters;
use xds_client::End;
use xds_client::grpc::{Deframer, framed};

use super::callout::{self, Answer, Asker, Request};
use super::timeouts::set_grpc_timeout;
use crate::manager::duration;
use crate::route::HeaderMutations;

/// The service did not follow gRPC; the code has no better name.
const UNKNOWN: u16 = 2;

/// A service of our clusters that is called, parsed.
pub struct GrpcService {
    service: config_source::GrpcService,
    /// `initial_metadata`
    metadata: HeaderMutations,
    timeout: Option<Duration>,
    /// `max_receive_message_length`
    limit: usize,
}

impl GrpcService {
    /// Checks the message; `timeout` counts where it has none. Whether the cluster is there shows with each call.
    pub fn from_proto(message: &pb::GrpcService, timeout: Option<Duration>) -> ConfigResult<Self> {
        let service = config_source::GrpcService::from_proto(message)?;
        let own = message.timeout.as_ref().map(duration);
        Ok(Self {
            limit: service.max_message,
            service,
            metadata: HeaderMutations::overwriting(&message.initial_metadata, "initial_metadata")?,
            timeout: own.or(timeout),
        })
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.service.cluster
    }

    /// Calls a method (`/package.Service/Method`) and waits for its answer.
    ///
    /// # Errors
    /// The status, which is never 0.
    pub async fn call<R: Message + Default>(
        &self,
        clusters: &WorkerClusters,
        path: &str,
        message: &impl Message,
        asker: Asker<'_>,
    ) -> Result<R, End> {
        let headers = self.head(path, asker);
        let ours = !self.service.skip_envoy_headers;
        let request = Request {
            timeout: self.timeout.filter(|timeout| !timeout.is_zero()),
            internal: ours,
            forwarded: ours,
            ..Request::new(self.cluster(), headers, framed(message))
        };
        let answer = callout::ask(clusters, request).await.map_err(End::unavailable)?;
        let bytes = last_message(answer, self.limit)?;
        R::decode(&*bytes).map_err(|error| End::internal(error.to_string()))
    }

    fn head(&self, path: &str, asker: Asker<'_>) -> HeaderMap {
        let mut headers = self.service.bare_head(path);
        if let Some(timeout) = self.timeout {
            set_grpc_timeout(&mut headers, timeout);
        }
        headers.append(HeaderId::CONTENT_TYPE, "application/grpc");
        asker.add(&self.metadata, &mut headers);
        escape_binary(&mut headers);
        headers
    }
}

/// Values under names that end in `-bin` travel in base64.
fn escape_binary(headers: &mut HeaderMap) {
    use base64::Engine as _;
    let binary = headers.iter().filter(|(_, name, _)| name.ends_with(b"-bin"));
    let escaped: Vec<_> = binary
        .map(|(_, name, value)| {
            (HeaderName::new(name), base64::engine::general_purpose::STANDARD.encode(value))
        })
        .collect();
    for (name, value) in escaped {
        headers.remove_name(&name);
        headers.append_name(&name, value);
    }
}

fn status(headers: &HeaderMap) -> Option<End> {
    // An empty value is none.
    let get = |name: &str| headers.get_name(&HeaderName::new(name)).filter(|value| !value.is_empty());
    End::of_headers(get)
}

/// The message of a call that ended well.
pub(super) fn last_message(answer: Answer, limit: usize) -> Result<bytes::Bytes, End> {
    let only_head = answer.body.is_empty() && answer.trailers.is_none();
    let unknown = || End { code: UNKNOWN, message: "missing grpc-status".to_owned() };
    if answer.status != 200 {
        let told = status(&answer.headers).filter(|_| only_head);
        return Err(told.unwrap_or_else(|| End::of_http(answer.status)));
    }
    let mut deframer = Deframer::default();
    deframer.push(answer.body);
    let mut message = None;
    while let Some(bytes) = deframer.pop()? {
        if limit > 0 && bytes.len() > limit {
            return Err(End { code: 8, message: "the message is too large".to_owned() });
        }
        message = Some(bytes);
    }
    let end = match &answer.trailers {
        Some(trailers) => status(trailers),
        None if only_head => status(&answer.headers),
        None => None,
    };
    match end.unwrap_or_else(unknown) {
        End { code: 0, .. } => message.ok_or_else(|| End::internal("no message")),
        end => Err(end),
    }
}

#[cfg(test)]
mod tests {
    use xds_client::wire::Status;

    use super::*;

    fn answer(
        status: u16,
        headers: &[(&str, &str)],
        body: &[u8],
        trailers: Option<&[(&str, &str)]>,
    ) -> Answer {
        let map = |lines: &[(&str, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in lines {
                map.append_lower(name.as_bytes(), value.as_bytes());
            }
            map
        };
        let body = bytes::Bytes::copy_from_slice(body);
        Answer { status, headers: map(headers), body, trailers: trailers.map(map) }
    }

    #[test]
    fn the_status_decides() {
        let message = framed(&Status { code: 3, message: "m".to_owned() });
        let ok = [("grpc-status", "0")];
        let code = |answer| last_message(answer, 0).map(|b| b.len()).map_err(|end| end.code);
        assert_eq!(code(answer(200, &[], &message, Some(&ok))), Ok(message.len() - 5));
        let denied = [("grpc-status", "7")];
        assert_eq!(code(answer(200, &[], &message, Some(&denied))), Err(7));
        assert_eq!(code(answer(200, &[], b"", Some(&ok))), Err(13), "OK without a message");
        assert_eq!(code(answer(200, &denied, b"", None)), Err(7), "trailers only");
        assert_eq!(code(answer(200, &[], b"", None)), Err(2), "nothing");
        assert_eq!(code(answer(200, &ok, &message, None)), Err(2), "no trailers behind a message");
        assert_eq!(code(answer(200, &[], &message, Some(&[]))), Err(2), "trailers without a status");
        assert_eq!(code(answer(200, &[], &message, Some(&[("grpc-status", "x")]))), Err(2));
        assert_eq!(code(answer(503, &denied, b"", None)), Err(7), "trailers only, whatever the status");
        assert_eq!(code(answer(404, &[], b"x", None)), Err(12));
        assert_eq!(code(answer(503, &denied, b"x", None)), Err(14));
        assert_eq!(code(answer(200, &[], &[1, 0, 0, 0, 1, 9], Some(&ok))), Err(13), "compressed");
        let long = answer(200, &[], &message, Some(&ok));
        assert_eq!(last_message(long, 2).unwrap_err().code, 8);
    }

    #[test]
    fn binary_metadata_is_escaped() {
        let mut headers = HeaderMap::new();
        headers.append_lower(b"x-bin", b"\x01\xff");
        headers.append_lower(b"x-text", b"t");
        escape_binary(&mut headers);
        assert_eq!(headers.get_name(&HeaderName::new("x-bin")), Some(&b"Af8="[..]));
        assert_eq!(headers.get_name(&HeaderName::new("x-text")), Some(&b"t"[..]));
    }
}
