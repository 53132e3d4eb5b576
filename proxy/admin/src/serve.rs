//! HTTP/1.1 for the admin interface, on the control thread.
//!
//! Answers are chunked and carry Envoy's headers in Envoy's order. A form's body is read up to 1 MiB. HTTP/1.0 is
//! refused with 426, as Envoy's admin listener does.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Response, StatusCode, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use sampan_core::log::{Component, Level};
use sampan_core::stream_info::Protocol;
use sampan_core::{Address, HeaderId, HeaderMap, HeaderName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::counters::{Connection, Stats};
use crate::source::AccessEntry;
use crate::{Admin, Reply, Request};

const MAX_FORM: usize = 1 << 20;

/// Where the admin interface listens.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// Binds the address; a socket file left behind by a dead process is replaced.
    pub async fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Ip(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            Address::Pipe(path) if path.starts_with('@') => {
                use std::os::linux::net::SocketAddrExt;
                let name = std::os::unix::net::SocketAddr::from_abstract_name(&path.as_bytes()[1..])?;
                let listener = std::os::unix::net::UnixListener::bind_addr(&name)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(UnixListener::from_std(listener)?))
            }
            Address::Pipe(path) => {
                if std::os::unix::net::UnixStream::connect(Path::new(&**path)).is_err() {
                    let _ = std::fs::remove_file(&**path);
                }
                Ok(Self::Unix(UnixListener::bind(&**path)?))
            }
            Address::Internal(..) => Err(io::Error::from(io::ErrorKind::Unsupported)),
        }
    }

    /// The address as `--admin-address-path` writes it: with the port that was really bound.
    pub fn local_address(&self) -> io::Result<String> {
        match self {
            Self::Tcp(listener) => Ok(listener.local_addr()?.to_string()),
            Self::Unix(listener) => {
                let address = listener.local_addr()?;
                Ok(address.as_pathname().map(|p| p.display().to_string()).unwrap_or_default())
            }
        }
    }
}

/// Serves until the future is dropped. Must run where `spawn_local` works: connections are tasks of this thread.
pub async fn serve(listener: Listener, admin: Rc<Admin>) {
    let stats = Stats::new(&admin.stats.root());
    loop {
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, peer)| {
                let _ = stream.set_nodelay(true);
                tokio::task::spawn_local(connection(
                    stream.local_addr().ok(),
                    stream,
                    Some(peer),
                    admin.clone(),
                    Connection::new(&stats),
                ));
            }),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::task::spawn_local(connection(
                    None,
                    stream,
                    None,
                    admin.clone(),
                    Connection::new(&stats),
                ));
            }),
        };
        if let Err(error) = accepted {
            sampan_core::log!(Component::Admin, Level::Warn, "admin listener: {error}");
            // Out of descriptors: do not spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn connection(
    local: Option<SocketAddr>,
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    peer: Option<SocketAddr>,
    admin: Rc<Admin>,
    counted: Connection,
) {
    let stats = counted.stats();
    let service = service_fn(move |request| {
        let (admin, stats) = (admin.clone(), stats.clone());
        async move { Ok::<_, Infallible>(respond(&admin, &stats, (local, peer), request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        sampan_core::log!(Component::Admin, Level::Debug, "admin connection: {error}");
    }
    drop(counted);
}

async fn respond(
    admin: &Admin,
    stats: &Stats,
    (local, peer): (Option<SocketAddr>, Option<SocketAddr>),
    request: hyper::Request<Incoming>,
) -> Response<Once> {
    let start = Instant::now();
    stats.request();
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
    let form = is_form(&head.headers) && head.method == hyper::Method::POST;
    let mut bytes_received = 0;
    let reply = if head.version < Version::HTTP_11 {
        Reply::error(426, "Upgrade Required")
    } else {
        match Limited::new(body, MAX_FORM).collect().await {
            Err(_) => Reply::error(413, "Payload Too Large"),
            Ok(body) => {
                let body = body.to_bytes();
                bytes_received = body.len();
                let form = if form { String::from_utf8_lossy(&body) } else { "".into() };
                admin.answer(&Request { method: head.method.as_str(), path, form: &form })
            }
        }
    };
    stats.response(reply.status, start.elapsed());
    let (status, body_size) = (reply.status, reply.body.len());
    let response = response(reply);
    if admin.source.logs_access() {
        admin.source.accessed(&AccessEntry {
            request: &request_head(&head, peer),
            response: &copied(response.headers()),
            status,
            protocol: if head.version < Version::HTTP_11 { Protocol::Http10 } else { Protocol::Http11 },
            bytes_received,
            bytes_sent: body_size,
            start,
            local,
            peer,
        });
    }
    response
}

/// The request's head as the access log reads it.
fn request_head(head: &hyper::http::request::Parts, peer: Option<SocketAddr>) -> HeaderMap {
    let mut headers = copied(&head.headers);
    let authority = headers.get(HeaderId::HOST).map(<[u8]>::to_vec);
    headers.remove(HeaderId::HOST);
    headers.set(HeaderId::METHOD, head.method.as_str());
    headers.set(HeaderId::PATH, head.uri.path_and_query().map_or("/", |p| p.as_str()));
    if let Some(authority) = authority {
        headers.set(HeaderId::AUTHORITY, authority.as_slice());
    }
    // As everywhere, a client on this machine is shown with the machine's own address.
    if let Some(peer) = peer.map(|p| p.ip()) {
        let address = if peer.is_loopback() { sampan_core::local_info::address() } else { peer };
        headers.append_to_value(HeaderId::X_FORWARDED_FOR, ",", address.to_string().as_bytes());
    }
    headers
}

fn copied(headers: &hyper::HeaderMap) -> HeaderMap {
    let mut copy = HeaderMap::new();
    for (name, value) in headers {
        copy.append_name(&HeaderName::new(name.as_str()), value.as_bytes());
    }
    copy
}

fn is_form(headers: &hyper::HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    value.starts_with(b"application/x-www-form-urlencoded")
}

fn response(reply: Reply) -> Response<Once> {
    let mut response = Response::new(Once(Some(reply.body.into())));
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(SystemTime::now())) {
        headers.insert(header::DATE, date);
    }
    headers.insert(header::SERVER, HeaderValue::from_static("envoy"));
    if reply.status == 426 {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A body of one frame that does not tell its length, so that it is sent chunked as Envoy sends it.
struct Once(Option<Bytes>);

impl Body for Once {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().filter(|b| !b.is_empty()).map(|bytes| Ok(Frame::data(bytes))))
    }
}
