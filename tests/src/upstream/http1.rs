//! An upstream that speaks HTTP/1.

use std::rc::Rc;

use super::{Seen, Upstream, script};
use crate::case::{Act, Reply, Rule};
use crate::http1::{Body, Head};
use crate::net::Wire;

/// Answers requests until the connection is over.
pub(super) async fn serve(upstream: &Rc<Upstream>, wire: &mut Wire, conn: usize) {
    while let Some(head) = Head::read(wire).await {
        let seen = Seen { conn, head: head.lines.clone(), ..Seen::default() };
        let (index, rule) = upstream.request(seen, head.start(1));
        let early = rule.as_ref().is_some_and(|r| r.early);
        if !early && !body(upstream, wire, &head, index).await {
            return;
        }
        let acts = rule.map_or_else(|| vec![usual(&upstream.name)], |Rule { acts, .. }| acts);
        let mut rest = &acts[..];
        // A script may read the body in its midst.
        if let Some(at) = acts.iter().position(|a| matches!(a, Act::ReadBody)) {
            if script::run(wire, &acts[..at], &upstream.name).await {
                return;
            }
            body(upstream, wire, &head, index).await;
            rest = &acts[at + 1..];
        }
        if script::run(wire, rest, &upstream.name).await {
            return;
        }
        if early && rest.len() == acts.len() && !body(upstream, wire, &head, index).await {
            return;
        }
    }
}

/// The answer to a request without a rule.
fn usual(name: &str) -> Act {
    Act::Reply(Reply {
        status: 200,
        headers: serde_json::Map::new(),
        body: name.to_owned(),
        body_size: None,
        trailers: serde_json::Map::new(),
        chunked: false,
    })
}

async fn body(upstream: &Upstream, wire: &mut Wire, head: &Head, index: usize) -> bool {
    let body = Body::of_request(wire, head).await;
    upstream.note_body(index, head.start(1), &body.bytes);
    upstream.update(index, |seen| {
        seen.trailers = body.trailers;
        seen.truncated = !body.complete;
    });
    body.complete
}
