//! A structured HTTP/2 exchange.

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use serde_json::{Value, json};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use super::{Client, Connected, Kept};
use crate::case::HttpStep;
use crate::error::{Error, Result};
use crate::http1::by_name;
use crate::net::{Stream, raw, shown};
use crate::upstream::{header_map, lines};

/// Sends the request and reads the response.
pub(super) async fn exchange(client: &Client<'_>, step: &HttpStep) -> Result<Value> {
    let kept = step.conn.as_ref().and_then(|name| match client.kept.borrow().get(name) {
        Some(Kept::Http2(sender)) => Some(sender.clone()),
        _ => None,
    });
    let mut tls_seen = None;
    let sender = match kept {
        Some(sender) => sender,
        None => match client.connect(&step.to, step.source.as_deref(), step.tls.as_ref()).await? {
            Connected::Wire(wire, tls) => {
                tls_seen = tls;
                match open(wire.stream).await {
                    Ok(sender) => sender,
                    Err(error) => return Ok(json!({ "error": error.to_string() })),
                }
            }
            Connected::Failed(error) => return Ok(json!({ "error": error })),
        },
    };
    if let Some(name) = &step.conn {
        client.kept.borrow_mut().insert(name.clone(), Kept::Http2(sender.clone()));
    }
    let mut seen = match send(sender, request(client, step)?, step).await {
        Ok(seen) => seen,
        Err(error) => json!({ "error": error.to_string() }),
    };
    if let Some(tls) = tls_seen {
        seen["tls"] = tls;
    }
    Ok(seen)
}

async fn open(stream: Stream) -> std::result::Result<SendRequest<Bytes>, h2::Error> {
    let (sender, connection) = h2::client::Builder::new().enable_push(false).handshake(stream).await?;
    spawn_local(async move {
        // How it ended shows in the streams.
        let _ = connection.await;
    });
    Ok(sender)
}

fn request(client: &Client<'_>, step: &HttpStep) -> Result<Request<()>> {
    let scheme = step.scheme.as_deref().unwrap_or(if step.tls.is_some() { "https" } else { "http" });
    let host = client.names.fill(&step.host)?;
    let mut builder = Request::builder().method(step.method.as_str()).version(http::Version::HTTP_2);
    builder = if step.method == "CONNECT" && !step.headers.contains_key(":protocol") {
        builder.uri(host)
    } else {
        builder.uri(format!("{scheme}://{host}{}", client.names.fill(&step.path)?))
    };
    let mut request = builder.body(()).map_err(|e| Error::Case(format!("HTTP/2 request: {e}")))?;
    *request.headers_mut() = header_map(&step.headers);
    if let Some(protocol) = step.headers.get(":protocol").and_then(Value::as_str) {
        request.extensions_mut().insert(h2::ext::Protocol::from(protocol));
    }
    Ok(request)
}

async fn send(
    sender: SendRequest<Bytes>,
    request: Request<()>,
    step: &HttpStep,
) -> std::result::Result<Value, h2::Error> {
    let mut sender = sender.ready().await?;
    let body = step.body.as_deref().map(raw).or_else(|| step.body_size.map(|n| vec![b'x'; n]));
    let trailers = header_map(&step.trailers);
    let bare = body.is_none() && trailers.is_empty();
    let (mut response, stream) = sender.send_request(request, bare)?;
    if !bare {
        if let Some(ms) = step.delay_body {
            sleep(Duration::from_millis(ms)).await;
        }
        spawn_local(send_body(stream, body.unwrap_or_default(), trailers));
    }
    // The informational ones are known once the response is there.
    let head = (&mut response).await?;
    let mut informational = Vec::new();
    let wait = Duration::from_millis(1);
    while let Ok(Some(Ok(info))) = timeout(wait, poll_fn(|cx| response.poll_informational(cx))).await {
        informational.push(json!({ "status": info.status().as_u16(), "head": lines(info.headers()) }));
    }
    let mut seen = read(head).await;
    if !informational.is_empty() {
        seen["info"] = informational.into();
    }
    Ok(seen)
}

async fn send_body(mut stream: SendStream<Bytes>, mut body: Vec<u8>, trailers: HeaderMap) {
    while !body.is_empty() {
        stream.reserve_capacity(body.len());
        let Some(Ok(capacity)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
        let rest = body.split_off(capacity.min(body.len()));
        let last = rest.is_empty() && trailers.is_empty();
        if stream.send_data(std::mem::replace(&mut body, rest).into(), last).is_err() {
            return;
        }
        if last {
            return;
        }
    }
    if trailers.is_empty() {
        let _ = stream.send_data(Bytes::new(), true);
    } else {
        let _ = stream.send_trailers(trailers);
    }
}

async fn read(response: Response<RecvStream>) -> Value {
    let (parts, mut stream) = response.into_parts();
    let mut body = Vec::new();
    let mut error = None;
    while let Some(data) = stream.data().await {
        match data {
            Ok(data) => {
                let _ = stream.flow_control().release_capacity(data.len());
                body.extend_from_slice(&data);
            }
            Err(e) => {
                error = Some(e.to_string());
                break;
            }
        }
    }
    let head = lines(&parts.headers);
    let mut seen = json!({
        "status": parts.status.as_u16(),
        "headers": by_name(head.iter()),
        "head": head,
        "body": shown(&body),
    });
    match stream.trailers().await {
        Ok(Some(trailers)) => seen["trailers"] = lines(&trailers).into(),
        Ok(None) => {}
        Err(e) => error = Some(e.to_string()),
    }
    if let Some(error) = error {
        seen["truncated"] = error.into();
    }
    seen
}
