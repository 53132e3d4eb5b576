//! Requests of the proxy's own to its clusters: sent whole, answered whole. For control planes that are polled and for mirrored requests.

use std::future::poll_fn;

use bytes::Bytes;
use sampan_codec::body::Frame;
use sampan_core::HeaderMap;
use sampan_upstream::{LbContext, Priority, WorkerClusters};

use super::codes::{self, Kind};
use super::exchange::Exchange;

/// The answer.
#[derive(Debug)]
pub struct Answer {
    /// `:status`
    pub status: u16,
    /// All of the body.
    pub body: Vec<u8>,
}

/// What is sent.
pub(super) struct Request<'a> {
    pub headers: &'a HeaderMap,
    pub body: Vec<Bytes>,
    pub trailers: Option<HeaderMap>,
    /// Whether the cluster's counters take it as internal.
    pub internal: bool,
}

/// Sends a request and waits for all of the response, `limit` bytes at most. A deadline is the caller's.
///
/// # Errors
/// Why there is no answer, in words for the log.
pub async fn call(
    clusters: &WorkerClusters,
    cluster: &str,
    headers: &HeaderMap,
    body: Bytes,
    limit: usize,
) -> Result<Answer, String> {
    let body = if body.is_empty() { Vec::new() } else { vec![body] };
    let request = Request { headers, body, trailers: None, internal: true };
    let mut received = Vec::new();
    let status = send(clusters, cluster, request, |data| {
        if received.len() + data.len() > limit {
            return Err(format!("a response of more than {limit} bytes"));
        }
        received.extend_from_slice(data);
        Ok(())
    });
    Ok(Answer { status: status.await?, body: received })
}

/// Sends a request and hands over the response's body as it comes; the value is the status.
pub(super) async fn send(
    clusters: &WorkerClusters,
    cluster: &str,
    request: Request<'_>,
    mut received: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<u16, String> {
    let cluster = clusters.get(cluster).ok_or_else(|| format!("cluster '{cluster}' does not exist"))?;
    let host = cluster.pick(&LbContext::default()).ok_or("no healthy upstream")?;
    let lease = host.http(Priority::Default, false, None).await.map_err(|error| error.to_string())?;
    let reset = |_| "upstream reset".to_owned();
    let Request { headers, body, trailers, internal } = request;
    let mut frames = body.len() + usize::from(trailers.is_some());
    let mut exchange = Exchange::start(lease, headers, frames == 0, b"").map_err(reset)?;
    for frame in body.into_iter().map(Frame::Data).chain(trailers.map(Frame::Trailers)) {
        frames -= 1;
        poll_fn(|cx| exchange.poll_ready(cx)).await.map_err(reset)?;
        exchange.send_frame(Some(frame), frames == 0).map_err(reset)?;
    }
    poll_fn(|cx| exchange.poll_flush(cx)).await.map_err(reset)?;
    let head = loop {
        let head = poll_fn(|cx| exchange.poll_head(cx)).await.map_err(|error| error.to_string())?;
        if head.status >= 200 {
            break head;
        }
    };
    codes::charge(cluster.cluster(), head.status, Kind { internal, canary: false });
    while !head.end
        && let Some(frame) = poll_fn(|cx| exchange.poll_frame(cx)).await
    {
        if let Frame::Data(data) = frame.map_err(|error| error.to_string())? {
            received(&data)?;
        }
    }
    exchange.finish(true);
    Ok(head.status)
}
