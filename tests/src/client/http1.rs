//! A structured HTTP/1 exchange.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use super::{Client, Connected, Kept};
use crate::case::HttpStep;
use crate::error::Result;
use crate::http1::{Body, Head, by_name, fields};
use crate::net::{End, Wire, raw, shown};

/// How long a connection that should stay open is watched.
const WATCH: Duration = Duration::from_millis(80);

/// Sends the request and reads the response.
pub(super) async fn exchange(client: &Client<'_>, step: &HttpStep) -> Result<Value> {
    let kept = step.conn.as_ref().and_then(|name| client.kept.borrow_mut().remove(name));
    let mut tls_seen = None;
    let mut wire = match kept {
        Some(Kept::Http1(wire)) => wire,
        _ => match client.connect(&step.to, step.source.as_deref(), step.tls.as_ref()).await? {
            Connected::Wire(wire, tls) => {
                tls_seen = tls;
                wire
            }
            Connected::Failed(error) => return Ok(json!({ "error": error })),
        },
    };
    let (head, body) = request(client, step)?;
    wire.send(&head).await;
    if let Some(ms) = step.delay_body {
        sleep(Duration::from_millis(ms)).await;
    }
    if !body.is_empty() {
        wire.send(&body).await;
    }
    let mut seen = response(&mut wire, &step.method).await;
    if let Some(tls) = tls_seen {
        seen["tls"] = tls;
    }
    if step.close {
        seen["end"] = wire.drain(Duration::from_secs(3)).await.name().into();
    } else if step.keep {
        seen["end"] = wire.drain(WATCH).await.name().into();
    }
    if let Some(name) = &step.conn {
        client.kept.borrow_mut().insert(name.clone(), Kept::Http1(wire));
    }
    Ok(seen)
}

fn request(client: &Client<'_>, step: &HttpStep) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut head = format!("{} {} HTTP/{}\r\n", step.method, client.names.fill(&step.path)?, step.version);
    if !step.host.is_empty() {
        head.push_str(&format!("host: {}\r\n", client.names.fill(&step.host)?));
    }
    for (name, value) in fields(&step.headers) {
        head.push_str(&format!("{name}: {}\r\n", client.names.fill(&value)?));
    }
    let content = match (&step.body, step.body_size) {
        (Some(body), _) => Some(raw(body)),
        (None, Some(size)) => Some(vec![b'x'; size]),
        (None, None) => None,
    };
    let mut body = Vec::new();
    if step.chunked || !step.trailers.is_empty() {
        head.push_str("transfer-encoding: chunked\r\n");
        if let Some(content) = content.filter(|c| !c.is_empty()) {
            body.extend(format!("{:x}\r\n", content.len()).into_bytes());
            body.extend(content);
            body.extend(b"\r\n");
        }
        body.extend(b"0\r\n");
        for (name, value) in fields(&step.trailers) {
            body.extend(raw(&format!("{name}: {value}\r\n")));
        }
        body.extend(b"\r\n");
    } else if let Some(content) = content {
        head.push_str(&format!("content-length: {}\r\n", content.len()));
        body = content;
    }
    head.push_str("\r\n");
    Ok((raw(&head), body))
}

async fn response(wire: &mut Wire, method: &str) -> Value {
    let mut informational = Vec::new();
    let head = loop {
        match Head::read(wire).await {
            Some(head) if (100..200).contains(&head.status()) && head.status() != 101 => {
                informational.push(json!(head.lines));
            }
            Some(head) => break head,
            None => {
                let end = wire.end.unwrap_or(End::Open).name();
                let mut seen = json!({ "error": format!("no response: {end}") });
                if !informational.is_empty() {
                    seen["info"] = informational.into();
                }
                return seen;
            }
        }
    };
    let body = Body::of_response(wire, &head, method).await;
    let mut seen = json!({
        "status": head.status(),
        "head": head.lines,
        "headers": by_name(head.lines.iter().skip(1)),
        "body": shown(&body.bytes),
    });
    if !body.trailers.is_empty() {
        seen["trailers"] = body.trailers.into();
    }
    if !informational.is_empty() {
        seen["info"] = informational.into();
    }
    if !body.complete {
        seen["truncated"] = wire.end.unwrap_or(End::Open).name().into();
    }
    seen
}
