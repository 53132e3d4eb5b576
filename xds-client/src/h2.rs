//! A transport of its own: one HTTP/2 connection over whatever byte stream a connector gives (TCP, TLS, a unix socket).
//!
//! The proxy does not use it, it calls through its own clusters. It is here so that the client needs nobody else.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;

use crate::transport::{Call, End, LocalFuture, Transport};

/// What can carry HTTP/2.
pub trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// Calls over connections that `connect` makes, one connection for each call.
pub struct Http2<F> {
    connect: F,
    /// `http://authority` or `https://authority`
    origin: String,
    metadata: Vec<(String, String)>,
}

impl<F, C> Http2<F>
where
    F: Fn() -> C,
    C: Future<Output = io::Result<Box<dyn Io>>>,
{
    /// `origin` is what requests are addressed to: `http://authority` or `https://authority`. `metadata` goes with
    /// every call; the names are in lower case.
    pub fn new(connect: F, origin: &str, metadata: Vec<(String, String)>) -> Self {
        Self { connect, origin: origin.trim_end_matches('/').to_owned(), metadata }
    }

    fn request(&self, path: &str) -> Result<Request<()>, End> {
        let mut request = Request::post(format!("{}{path}", self.origin))
            .version(http::Version::HTTP_2)
            .header("te", "trailers")
            .header("content-type", "application/grpc");
        for (name, value) in &self.metadata {
            request = request.header(name, value);
        }
        request.body(()).map_err(|error| End::internal(error.to_string()))
    }
}

impl<F, C> Transport for Http2<F>
where
    F: Fn() -> C,
    C: Future<Output = io::Result<Box<dyn Io>>>,
{
    fn open<'a>(&'a self, path: &'a str) -> LocalFuture<'a, Result<Box<dyn Call>, End>> {
        Box::pin(async move {
            let request = self.request(path)?;
            let io = (self.connect)().await.map_err(|error| End::unavailable(error.to_string()))?;
            let (handle, connection) = h2::client::handshake(io).await.map_err(broken)?;
            let driver = tokio::task::spawn_local(async move {
                // What ends the connection ends the call too, which tells why.
                let _ = connection.await;
            });
            let driver = Driver(driver.abort_handle());
            let (response, send) =
                handle.ready().await.map_err(broken)?.send_request(request, false).map_err(broken)?;
            let state = State::Waiting(response);
            Ok(Box::new(Exchange { send, out: Bytes::new(), state, _driver: driver }) as Box<dyn Call>)
        })
    }
}

fn broken(error: h2::Error) -> End {
    End::unavailable(error.to_string())
}

/// Ends the connection with its call.
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Exchange {
    send: SendStream<Bytes>,
    out: Bytes,
    state: State,
    _driver: Driver,
}

enum State {
    Waiting(ResponseFuture),
    Body(RecvStream),
}

impl Call for Exchange {
    fn send(&mut self, bytes: Bytes) {
        self.send.reserve_capacity(bytes.len());
        self.out = bytes;
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        while !self.out.is_empty() {
            if self.send.capacity() == 0 {
                // A peer that takes no more has said why, or will: that is for `poll_data` to tell.
                let Some(Ok(_)) = ready!(self.send.poll_capacity(cx)) else { break };
            }
            let part = self.out.split_to(self.out.len().min(self.send.capacity()));
            if self.send.send_data(part, false).is_err() {
                break;
            }
        }
        self.out.clear();
        Poll::Ready(Ok(()))
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, End>> {
        loop {
            match &mut self.state {
                State::Waiting(response) => {
                    let response = ready!(Pin::new(response).poll(cx)).map_err(broken)?;
                    if let Some(end) = status(response.headers()) {
                        return Poll::Ready(Err(end));
                    }
                    if response.status() != 200 {
                        return Poll::Ready(Err(End::of_http(response.status().as_u16())));
                    }
                    self.state = State::Body(response.into_body());
                }
                State::Body(body) => {
                    if let Some(chunk) = ready!(body.poll_data(cx)) {
                        let chunk = chunk.map_err(broken)?;
                        // Who polled has room for more.
                        body.flow_control().release_capacity(chunk.len()).map_err(broken)?;
                        return Poll::Ready(Ok(chunk));
                    }
                    let trailers = ready!(body.poll_trailers(cx)).map_err(broken)?;
                    let end = trailers.as_ref().and_then(status);
                    return Poll::Ready(Err(end.unwrap_or_else(|| End::internal("missing grpc-status"))));
                }
            }
        }
    }
}

fn status(headers: &HeaderMap) -> Option<End> {
    End::of_headers(|name| headers.get(name).map(http::HeaderValue::as_bytes))
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::DuplexStream;

    use super::*;
    use crate::wire::DiscoveryRequest;
    use crate::{grpc, types};

    /// Answers one call: what it was sent, in two pieces, then a status.
    async fn serve(io: DuplexStream) {
        let mut connection = h2::server::handshake(io).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        assert_eq!(
            (request.method().as_str(), request.headers()["x-token"].as_bytes()),
            ("POST", &b"secret"[..])
        );
        let (path, mut body) = (request.uri().path().to_owned(), request.into_body());
        tokio::task::spawn_local(async move { while connection.accept().await.is_some() {} });
        let said = body.data().await.unwrap().unwrap();
        let mut send = respond.send_response(http::Response::new(()), false).unwrap();
        send.send_data(said.slice(..3), false).unwrap();
        send.send_data(said.slice(3..), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "8".parse().unwrap());
        trailers.insert("grpc-message", path.parse().unwrap());
        send.send_trailers(trailers).unwrap();
    }

    #[test]
    fn a_call_goes_both_ways_and_ends_with_its_status() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let connect = || async {
                let (ours, theirs) = tokio::io::duplex(1 << 16);
                tokio::task::spawn_local(serve(theirs));
                Ok(Box::new(ours) as Box<dyn Io>)
            };
            let metadata = vec![("x-token".to_owned(), "secret".to_owned())];
            let transport = Http2::new(connect, "http://control-plane/", metadata);
            let mut call = transport.open(types::aggregated(crate::Variant::Delta)).await.unwrap();
            let request = DiscoveryRequest { version_info: "1".to_owned(), ..DiscoveryRequest::default() };
            call.send(grpc::framed(&request));
            poll_fn(|cx| call.poll_flush(cx)).await.unwrap();
            let mut deframer = grpc::Deframer::default();
            let end = loop {
                match poll_fn(|cx| call.poll_data(cx)).await {
                    Ok(chunk) => deframer.push(chunk),
                    Err(end) => break end,
                }
            };
            let got: DiscoveryRequest = prost::Message::decode(deframer.pop().unwrap().unwrap()).unwrap();
            assert_eq!((got, end.code), (request, 8));
            assert!(end.message.ends_with("DeltaAggregatedResources"));
        });
    }
}
