//! `tcp_proxy`'s way through an HTTP host (`tunneling_config`): CONNECT or POST, whose payload in both directions is the
//! session's bytes.
//!
//! The host agrees with a head of 200 (over HTTP/1 with any 2xx) that does not end the response; nothing of the client's
//! is sent before. Over HTTP/2 each direction ends by itself; over HTTP/1 the client's end closes the connection behind
//! what was sent, as in Envoy. When the stream or, over HTTP/1, the connection ends, so does the client's connection.
//! The router proper has no part in this: no counters of responses, no timeouts, no access log but `tcp_proxy`'s.

use std::any::Any;
use std::borrow::Cow;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::TunnelingConfig;
use envoy_types::pb::google::protobuf::{Any as ProtoAny, Value, value::Kind};
use futures_util::future::LocalBoxFuture;
use prost::Message;
use sampan_codec::Frame;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{Extensions, FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stream_info::{ConnectionInfo, FilterStateObject, StreamInfo};
use sampan_listener::{TunnelFailure, TunnelTold, Tunnelled, Tunnels, UpstreamBytes};
use sampan_tls::{Transport, Tunnel};
use sampan_upstream::{ConnectOptions, HttpLease, Priority, WorkerHost};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::callout::Asker;
use super::exchange::Exchange;
use crate::manager::request::uuid;
use crate::route::HeaderMutations;

const RESPONSE_HEADERS: &str = "envoy.tcp_proxy.propagate_response_headers";
const RESPONSE_TRAILERS: &str = "envoy.tcp_proxy.propagate_response_trailers";
/// Bytes of the frame.
const RST_STREAM: u64 = 13;
/// Where the log finds the request's id.
const METADATA: &str = "envoy.filters.network.tcp_proxy";

/// A `TunnelingConfig`, checked.
struct HttpTunnels {
    hostname: Formatter,
    /// `use_post`: the path.
    post: Option<String>,
    headers: HeaderMutations,
    request_id: Option<RequestId>,
    propagate_headers: bool,
    propagate_trailers: bool,
}

/// `request_id_extension`
struct RequestId {
    header: HeaderName,
    metadata_key: String,
}

/// Makes a `tcp_proxy`'s tunnels.
pub(crate) fn tunnels(message: &TunnelingConfig) -> ConfigResult<Arc<dyn Tunnels>> {
    Ok(Arc::new(HttpTunnels::from_proto(message)?))
}

impl HttpTunnels {
    fn from_proto(message: &TunnelingConfig) -> ConfigResult<Self> {
        if !message.formatters.is_empty() {
            return Err(ConfigError::unsupported("formatters").at("formatters"));
        }
        let post = match (message.use_post, message.post_path.as_str()) {
            (false, "") => None,
            (false, _) => {
                let reason = "Can't set a post path when POST method isn't used";
                return Err(ConfigError::new(reason).at("post_path"));
            }
            (true, "") => Some("/".to_owned()),
            (true, path) => Some(path.to_owned()),
        };
        Ok(Self {
            hostname: Formatter::parse(&message.hostname, &Extensions::NONE).at("hostname")?,
            post,
            headers: HeaderMutations::adding(&message.headers_to_add, "headers_to_add")?,
            request_id: RequestId::from_proto(message)?,
            propagate_headers: message.propagate_response_headers,
            propagate_trailers: message.propagate_response_trailers,
        })
    }

    /// The request's head; its id goes into the metadata, where headers may read it.
    fn head(&self, lease: &HttpLease, info: &RefCell<StreamInfo>) -> HeaderMap {
        let mut hostname = Vec::new();
        self.hostname.write(&FormatContext::new(&info.borrow()), &mut hostname);
        let mut headers = HeaderMap::new();
        headers.append(HeaderId::METHOD, if self.post.is_some() { "POST" } else { "CONNECT" });
        headers.append(HeaderId::AUTHORITY, hostname);
        if let Some(path) = &self.post {
            headers.append(HeaderId::PATH, path.as_str());
            if matches!(lease, HttpLease::H2(_)) {
                let tls = Exchange::info(lease).0.tls.is_some();
                headers.append(HeaderId::SCHEME, if tls { "https" } else { "http" });
            }
        }
        if let Some(request_id) = &self.request_id {
            request_id.set(&mut headers, &mut info.borrow_mut());
        }
        let asker = Asker { request: &HeaderMap::new(), info: &info.borrow(), trace: None };
        asker.add(&self.headers, &mut headers);
        headers
    }

    async fn begin(
        &self,
        host: &Rc<WorkerHost>,
        options: &ConnectOptions,
        info: &RefCell<StreamInfo>,
        told: &Rc<TunnelTold>,
    ) -> Result<Tunnelled, TunnelFailure> {
        let lease = host.http(Priority::Default, false, Some(options)).await;
        let lease = lease.map_err(TunnelFailure::Pool)?;
        let connect_info = match &lease {
            HttpLease::H1(lease) => lease.info().clone(),
            HttpLease::H2(lease) => lease.info().clone(),
            HttpLease::Tcp(_) => return Err(TunnelFailure::Reset),
        };
        told.asked.set(Some(connect_info.id));
        let head = self.head(&lease, info);
        let exchange = Exchange::start(lease, &head, false, b"").map_err(|_| TunnelFailure::Reset)?;
        let connection = info.borrow().connection.clone();
        let mut stream = Stream {
            exchange,
            told: told.clone(),
            counted: UpstreamBytes::default(),
            trailers_to: self.propagate_trailers.then(|| connection.clone()),
            kept: Bytes::new(),
            read: false,
            written: false,
            over: false,
        };
        let agreed = stream.agreed(self.propagate_headers.then_some(&*connection)).await;
        stream.count();
        agreed?;
        told.asked.set(None);
        Ok(Tunnelled { transport: Transport::Tunnel(Box::new(stream)), info: connect_info })
    }
}

impl Tunnels for HttpTunnels {
    fn open<'a>(
        &'a self,
        host: &'a Rc<WorkerHost>,
        options: &'a ConnectOptions,
        info: &'a RefCell<StreamInfo>,
        told: &'a Rc<TunnelTold>,
    ) -> LocalBoxFuture<'a, Result<Tunnelled, TunnelFailure>> {
        Box::pin(self.begin(host, options, info, told))
    }
}

impl RequestId {
    fn from_proto(message: &TunnelingConfig) -> ConfigResult<Option<Self>> {
        const UUID: &str = "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig";
        let extension = message.request_id_extension.as_ref().and_then(|e| e.typed_config.as_ref());
        let Some(any) = extension else { return Ok(None) };
        if crate::filter::message_name(any) != UUID {
            return Err(ConfigError::unsupported(&any.type_url).at("request_id_extension"));
        }
        let or =
            |given: &String, usual: &str| if given.is_empty() { usual.to_owned() } else { given.clone() };
        Ok(Some(Self {
            header: HeaderName::new(or(&message.request_id_header, "x-request-id")),
            metadata_key: or(&message.request_id_metadata_key, "tunnel_request_id"),
        }))
    }

    fn set(&self, headers: &mut HeaderMap, info: &mut StreamInfo) {
        let id = uuid(rand::random(), rand::random());
        headers.append_name(&self.header, id);
        let value = Value { kind: Some(Kind::StringValue(String::from_utf8_lossy(&id).into_owned())) };
        info.dynamic_metadata_mut(METADATA).fields.insert(self.metadata_key.clone(), value);
    }
}

/// The bytes in the request's and the response's body.
struct Stream {
    exchange: Exchange,
    told: Rc<TunnelTold>,
    /// What of the bytes told is this stream's.
    counted: UpstreamBytes,
    /// The client's connection, if the response's trailers are left there.
    trailers_to: Option<Rc<ConnectionInfo>>,
    /// Received, but not yet read.
    kept: Bytes,
    /// The response has ended.
    read: bool,
    /// The request has ended.
    written: bool,
    /// The stream broke.
    over: bool,
}

impl Stream {
    /// Waits for the host's word; its head is left at the connection where that is wanted.
    async fn agreed(&mut self, headers_to: Option<&ConnectionInfo>) -> Result<(), TunnelFailure> {
        let exchange = &mut self.exchange;
        let head = loop {
            let head = poll_fn(|cx| {
                // A failed write may have an answer behind it: the read tells.
                let _ = exchange.poll_flush(cx);
                exchange.poll_head(cx)
            });
            match head.await {
                Ok(head) if head.status < 200 && head.status != 101 => {}
                Ok(head) => break head,
                Err(_) => {
                    self.over = true;
                    return Err(TunnelFailure::Reset);
                }
            }
        };
        if let Some(connection) = headers_to {
            connection.set_state(RESPONSE_HEADERS, Rc::new(Headers::of(&head.headers)));
        }
        let accepted =
            if self.exchange.is_h1() { (200..300).contains(&head.status) } else { head.status == 200 };
        if accepted && !head.end { Ok(()) } else { Err(TunnelFailure::Response(head.status)) }
    }

    fn count(&mut self) {
        let Some(now) = self.exchange.meter() else { return };
        let (mut all, before) = (self.told.bytes.get(), self.counted);
        all.sent += now.sent - before.sent;
        all.received += now.received - before.received;
        all.header_sent += now.header_sent - before.header_sent;
        all.header_received += now.header_received - before.header_received;
        self.counted = now;
        self.told.bytes.set(all);
    }

    /// Where both ends have come nothing is left to reset.
    fn end(&mut self) {
        if self.read && self.written {
            self.over = true;
            self.exchange.finish(true);
        }
    }
}

impl Drop for Stream {
    /// A stream of HTTP/2 that has not come to its end is reset.
    fn drop(&mut self) {
        self.count();
        if !self.over && !self.exchange.is_h1() {
            let mut all = self.told.bytes.get();
            all.sent += RST_STREAM;
            self.told.bytes.set(all);
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        space: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.kept.is_empty() && !this.read && !this.over {
            let _ = this.exchange.poll_flush(cx);
            let frame = ready!(this.exchange.poll_frame(cx));
            this.count();
            match frame {
                Some(Ok(Frame::Data(data))) => this.kept = data,
                Some(Ok(Frame::Trailers(trailers))) => {
                    if let Some(connection) = &this.trailers_to {
                        connection.set_state(RESPONSE_TRAILERS, Rc::new(Headers::of(&trailers)));
                    }
                    this.read = true;
                }
                None => this.read = true,
                Some(Err(_)) => this.over = true,
            }
            this.end();
        }
        let data = this.kept.split_to(this.kept.len().min(space.remaining()));
        space.put_slice(&data);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if !this.over && ready!(this.exchange.poll_ready(cx)).is_ok() {
            let _ = this.exchange.send_frame(Some(Frame::Data(Bytes::copy_from_slice(data))), false);
            let _ = this.exchange.poll_flush(cx);
            this.count();
        }
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.over {
            // What goes wrong here shows when the other direction is read.
            let _ = ready!(self.exchange.poll_flush(cx));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(Ok(()));
        }
        if !std::mem::replace(&mut this.written, true) {
            let _ = this.exchange.send_frame(None, true);
        }
        // What goes wrong here shows when the other direction is read.
        let _ = ready!(this.exchange.poll_flush(cx));
        this.count();
        // Nothing is left to reset; a connection of HTTP/1 closes with its request.
        if this.exchange.is_h1() {
            this.over = true;
        } else {
            this.end();
        }
        Poll::Ready(Ok(()))
    }
}

impl Tunnel for Stream {
    fn is_over(&self) -> bool {
        self.over && self.kept.is_empty()
    }
}

/// A head or trailers, left for the log.
struct Headers(Vec<(String, String)>);

impl Headers {
    fn of(headers: &HeaderMap) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self(headers.iter().map(|(_, name, value)| (text(name), text(value))).collect())
    }
}

impl FilterStateObject for Headers {
    fn plain(&self) -> Option<Cow<'_, str>> {
        None
    }

    fn typed(&self) -> Option<serde_json::Value> {
        let one = |(key, value): &(String, String)| match value.as_str() {
            "" => serde_json::json!({ "key": key }),
            value => serde_json::json!({ "key": key, "value": value }),
        };
        let all: Vec<_> = self.0.iter().map(one).collect();
        Some(serde_json::json!({ "headers": all }))
    }

    fn message(&self) -> Option<ProtoAny> {
        let one = |(key, value): &(String, String)| core::HeaderValue {
            key: key.clone(),
            value: value.clone(),
            ..core::HeaderValue::default()
        };
        let message = core::HeaderMap { headers: self.0.iter().map(one).collect() };
        Some(ProtoAny {
            type_url: "type.googleapis.com/envoy.config.core.v3.HeaderMap".to_owned(),
            value: message.encode_to_vec(),
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
