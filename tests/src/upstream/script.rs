//! Acts on a byte stream; upstreams and raw clients share them.

use std::time::Duration;

use regex::Regex;
use tokio::time::{sleep, timeout};

use crate::case::{Act, Reply};
use crate::http1::fields;
use crate::net::{Wire, raw, text};

/// How long an act waits for the peer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Runs the acts; true when the connection is over after them.
pub async fn run(wire: &mut Wire, acts: &[Act], name: &str) -> bool {
    for act in acts {
        match act {
            Act::Reply(reply) => wire.send(&reply_bytes(reply, name)).await,
            Act::Send(bytes) => wire.send(&raw(bytes)).await,
            Act::SendLast(bytes) => {
                wire.stream.cork();
                wire.send(&raw(bytes)).await;
                wire.half_close().await;
            }
            Act::Fill(count) => wire.send(&vec![b'x'; *count]).await,
            Act::Flood(count, bytes) => wire.send(&raw(bytes).repeat(*count)).await,
            Act::OpenAndReset(count) => wire.send(&resets(*count)).await,
            Act::Sleep(ms) => sleep(Duration::from_millis(*ms)).await,
            Act::Until(pattern) => {
                let Ok(pattern) = Regex::new(pattern) else { return true };
                let _ = timeout(PATIENCE, async {
                    while !pattern.is_match(&text(&wire.seen)) && wire.fill().await {}
                })
                .await;
            }
            Act::Read(count) => drop(timeout(PATIENCE, wire.take(*count)).await),
            Act::ReadBody | Act::Message(_) => {}
            Act::HalfClose => wire.half_close().await,
            Act::Close => {
                wire.half_close().await;
                return true;
            }
            Act::Reset | Act::RstStream(_) => {
                wire.stream.abort_on_close();
                return true;
            }
            Act::Echo => {
                let ahead = wire.buf.split();
                wire.send(&ahead).await;
                while wire.fill().await {
                    let bytes = wire.buf.split();
                    wire.send(&bytes).await;
                }
                wire.half_close().await;
                return true;
            }
            Act::Hang => {
                wire.drain(Duration::from_secs(10)).await;
                return true;
            }
        }
    }
    false
}

/// HEADERS with END_STREAM and END_HEADERS, then RST_STREAM with CANCEL, for that many streams (CVE-2023-44487).
fn resets(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for stream in (0..count).map(|n| 2 * n + 1) {
        let id = stream.to_be_bytes();
        bytes.extend([0, 0, 6, 1, 5]);
        bytes.extend(id);
        // :method GET, :path /, :scheme http, :authority a
        bytes.extend([0x82, 0x84, 0x86, 0x41, 1, b'a']);
        bytes.extend([0, 0, 4, 3, 0]);
        bytes.extend(id);
        bytes.extend([0, 0, 0, 8]);
    }
    bytes
}

/// A reply's body.
pub(super) fn reply_body(reply: &Reply) -> Vec<u8> {
    reply.body_size.map_or_else(|| raw(&reply.body), |size| vec![b'x'; size])
}

fn reply_bytes(reply: &Reply, _name: &str) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {} {}\r\n", reply.status, reason(reply.status));
    for (name, value) in fields(&reply.headers) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let body = reply_body(reply);
    let mut bytes;
    if reply.chunked || !reply.trailers.is_empty() {
        head.push_str("transfer-encoding: chunked\r\n\r\n");
        bytes = raw(&head);
        if !body.is_empty() {
            bytes.extend(format!("{:x}\r\n", body.len()).into_bytes());
            bytes.extend(&body);
            bytes.extend(b"\r\n");
        }
        bytes.extend(b"0\r\n");
        for (name, value) in fields(&reply.trailers) {
            bytes.extend(raw(&format!("{name}: {value}\r\n")));
        }
        bytes.extend(b"\r\n");
    } else {
        if reply.status != 204 && reply.status != 304 {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        bytes = raw(&head);
        bytes.extend(body);
    }
    bytes
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        304 => "Not Modified",
        404 => "Not Found",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Status",
    }
}
