//! A request of the proxy's own to one of its clusters: sent whole, answered whole. For control planes that are polled.

use std::future::poll_fn;

use bytes::Bytes;
use sampan_codec::body::Frame;
use sampan_core::HeaderMap;
use sampan_upstream::{LbContext, Priority, WorkerClusters};

use super::exchange::Exchange;

/// The answer.
#[derive(Debug)]
pub struct Answer {
    /// `:status`
    pub status: u16,
    /// All of the body.
    pub body: Vec<u8>,
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
    let cluster = clusters.get(cluster).ok_or_else(|| format!("cluster '{cluster}' does not exist"))?;
    let host = cluster.pick(&LbContext::default()).ok_or("no healthy upstream")?;
    let lease = host.http(Priority::Default, false, None).await.map_err(|error| error.to_string())?;
    let reset = |_| "upstream reset".to_owned();
    let mut exchange = Exchange::start(lease, headers, body.is_empty(), b"").map_err(reset)?;
    if !body.is_empty() {
        poll_fn(|cx| exchange.poll_ready(cx)).await.map_err(reset)?;
        exchange.send_frame(Some(Frame::Data(body)), true).map_err(reset)?;
    }
    poll_fn(|cx| exchange.poll_flush(cx)).await.map_err(reset)?;
    let head = loop {
        let head = poll_fn(|cx| exchange.poll_head(cx)).await.map_err(|error| error.to_string())?;
        if head.status >= 200 {
            break head;
        }
    };
    let kind = super::codes::Kind { internal: true, canary: false };
    super::codes::charge(cluster.cluster(), head.status, kind);
    let mut answer = Answer { status: head.status, body: Vec::new() };
    while !head.end
        && let Some(frame) = poll_fn(|cx| exchange.poll_frame(cx)).await
    {
        if let Frame::Data(data) = frame.map_err(|error| error.to_string())? {
            if answer.body.len() + data.len() > limit {
                return Err(format!("a response of more than {limit} bytes"));
            }
            answer.body.extend_from_slice(&data);
        }
    }
    exchange.finish(true);
    Ok(answer)
}
