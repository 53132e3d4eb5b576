//! An upstream that speaks HTTP/2.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use serde_json::{Map, Value};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::{Seen, Upstream, script};
use crate::case::{Act, Reply};
use crate::grpc;
use crate::http1::fields;
use crate::net::{Wire, raw, text};

/// Answers streams until the connection is over.
pub(super) async fn serve(upstream: &Rc<Upstream>, wire: Wire, conn: usize) {
    let mut builder = h2::server::Builder::new();
    builder.enable_connect_protocol();
    if let Some(limit) = upstream.script.max_streams {
        builder.max_concurrent_streams(limit);
    }
    let served = async {
        let mut connection = builder.handshake(wire.stream).await?;
        while let Some(stream) = connection.accept().await {
            let (request, respond) = stream?;
            spawn_local(answer(Rc::clone(upstream), request, respond, conn));
        }
        Ok::<(), h2::Error>(())
    };
    let end = if served.await.is_ok() { "fin" } else { "rst" };
    upstream.note(conn, |c| c.end = Some(end.to_owned()));
}

/// Header lines of a map.
pub fn lines(headers: &HeaderMap) -> Vec<String> {
    headers.iter().map(|(name, value)| format!("{name}: {}", text(value.as_bytes()))).collect()
}

/// A header map of a case file's headers.
pub fn header_map(headers: &Map<String, Value>) -> HeaderMap {
    fields(headers)
        .into_iter()
        .filter_map(|(name, value)| {
            let name = HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes()).ok()?;
            Some((name, HeaderValue::from_bytes(&raw(&value)).ok()?))
        })
        .fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value);
            map
        })
}

async fn answer(
    upstream: Rc<Upstream>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    conn: usize,
) {
    let (parts, mut body) = request.into_parts();
    let mut head = vec![format!(":method: {}", parts.method)];
    if let Some(scheme) = parts.uri.scheme() {
        head.push(format!(":scheme: {scheme}"));
    }
    if let Some(authority) = parts.uri.authority() {
        head.push(format!(":authority: {authority}"));
    }
    let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    head.push(format!(":path: {path}"));
    if let Some(protocol) = parts.extensions.get::<h2::ext::Protocol>() {
        head.push(format!(":protocol: {}", protocol.as_str()));
    }
    head.extend(lines(&parts.headers));
    let (index, rule) = upstream.request(Seen { conn, head, ..Seen::default() }, &path);
    let early = rule.as_ref().is_some_and(|r| r.early);
    if !early {
        read_body(&upstream, &mut body, index, &path).await;
    }
    let acts = rule.map_or_else(Vec::new, |r| r.acts);
    if acts.is_empty() {
        let mut headers = HeaderMap::new();
        headers.insert("content-length", HeaderValue::from(upstream.name.len()));
        return reply(&mut respond, 200, headers, upstream.name.clone().into(), HeaderMap::new());
    }
    for act in acts {
        match act {
            Act::Reply(r) => send_reply(&mut respond, &r),
            Act::Message(message) => send_message(&upstream, &mut respond, &message),
            Act::Sleep(ms) => sleep(Duration::from_millis(ms)).await,
            Act::ReadBody => read_body(&upstream, &mut body, index, &path).await,
            Act::Reset | Act::Close => respond.send_reset(Reason::CANCEL),
            Act::RstStream(code) => respond.send_reset(Reason::from(code)),
            Act::Echo => return echo(&mut respond, &mut body).await,
            Act::Hang => sleep(Duration::from_secs(10)).await,
            Act::Flood(..)
            | Act::OpenAndReset(_)
            | Act::Send(_)
            | Act::SendLast(_)
            | Act::Fill(_)
            | Act::Until(_)
            | Act::Read(_)
            | Act::HalfClose => {}
        }
    }
    if early {
        read_body(&upstream, &mut body, index, &path).await;
    }
}

async fn read_body(upstream: &Upstream, body: &mut RecvStream, index: usize, path: &str) {
    let mut bytes = Vec::new();
    let mut truncated = false;
    while let Some(data) = body.data().await {
        match data {
            Ok(data) => {
                let _ = body.flow_control().release_capacity(data.len());
                bytes.extend_from_slice(&data);
                // A stream's messages count as they come.
                upstream.note_body(index, path, &bytes);
            }
            Err(_) => {
                truncated = true;
                break;
            }
        }
    }
    let trailers = body.trailers().await.ok().flatten().map(|t| lines(&t)).unwrap_or_default();
    upstream.update(index, |seen| {
        seen.trailers = trailers;
        seen.truncated = truncated;
    });
}

fn send_reply(respond: &mut SendResponse<Bytes>, r: &Reply) {
    reply(respond, r.status, header_map(&r.headers), script::reply_body(r).into(), header_map(&r.trailers));
}

/// A message that cannot be made shows in the status.
fn send_message(upstream: &Upstream, respond: &mut SendResponse<Bytes>, message: &Value) {
    let mut headers = HeaderMap::new();
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let name = upstream.script.grpc.as_ref().map_or("", |grpc| &grpc.response);
    match grpc::framed(name, message) {
        Ok(body) => reply(respond, 200, headers, body.into(), trailers),
        Err(error) => reply(respond, 500, HeaderMap::new(), error.to_string().into(), HeaderMap::new()),
    }
}

fn reply(
    respond: &mut SendResponse<Bytes>,
    status: u16,
    headers: HeaderMap,
    body: Bytes,
    trailers: HeaderMap,
) {
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    *response.headers_mut() = headers;
    if (100..200).contains(&status) {
        let _ = respond.send_informational(response);
        return;
    }
    let Ok(mut stream) = respond.send_response(response, body.is_empty() && trailers.is_empty()) else {
        return;
    };
    if !body.is_empty() && stream.send_data(body, trailers.is_empty()).is_err() {
        return;
    }
    if !trailers.is_empty() {
        let _ = stream.send_trailers(trailers);
    }
}

/// Sends the request's body back as it comes: for CONNECT and extended CONNECT.
async fn echo(respond: &mut SendResponse<Bytes>, body: &mut RecvStream) {
    let Ok(mut stream) = respond.send_response(Response::new(()), false) else { return };
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        if stream.send_data(data, false).is_err() {
            return;
        }
    }
    let _ = stream.send_data(Bytes::new(), true);
}
