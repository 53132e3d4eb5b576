//! The server's side of a connection: request heads in, responses out, one exchange at a time.
//!
//! The connection is shared by the one who reads the request's body and the one who writes the response; both
//! live on one worker, so sharing is an `Rc`.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use sampan_core::header::{HeaderId, HeaderMap, authority_is_valid};
use sampan_core::matcher::StringMatcher;
use sampan_core::stream_info::Protocol;
use sampan_tls::Transport;

use super::decode::Decoder;
use super::encode::{self, Encoder, HeaderCase, Shape};
use super::io::Io;
use super::parse::{self, Framing, Head, Limits};
use crate::body::{BodyError, BodyStream, Frame};
use crate::error::CodecError;

/// What to do with a header whose name has an underscore (`headers_with_underscores_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Underscores {
    /// Pass it on.
    #[default]
    Allow,
    /// Answer 400.
    Reject,
    /// Drop the header.
    Drop,
}

/// A header's name has an underscore, and such requests are refused.
pub const UNDERSCORE: CodecError =
    CodecError::bad("http1.unexpected_underscore", "header name contains underscores");

/// What a listener's configuration says about HTTP/1.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Bytes of a head.
    pub max_header_bytes: usize,
    /// Headers of a head.
    pub max_headers: usize,
    /// `accept_http_10`
    pub accept_http10: bool,
    /// `default_host_for_http_10`
    pub default_host: Option<String>,
    /// `allow_absolute_url`, on by default.
    pub allow_absolute_url: bool,
    /// `allow_chunked_length`
    pub allow_chunked_length: bool,
    /// `enable_trailers`
    pub enable_trailers: bool,
    /// `allow_custom_methods`
    pub allow_custom_methods: bool,
    /// `ignore_http_11_upgrade`
    pub ignore_upgrades: Vec<StringMatcher>,
    /// Spelling of response header names.
    pub case: HeaderCase,
    /// Underscores in header names.
    pub underscores: Underscores,
    /// Whether `https://` in the target of a request that came without TLS is refused (`use_remote_address`).
    pub refuse_https: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_header_bytes: 60 * 1024,
            max_headers: 100,
            accept_http10: false,
            default_host: None,
            allow_absolute_url: true,
            allow_chunked_length: false,
            enable_trailers: false,
            allow_custom_methods: false,
            ignore_upgrades: Vec::new(),
            case: HeaderCase::Lower,
            underscores: Underscores::Allow,
            refuse_https: false,
        }
    }
}

/// A request's head.
#[derive(Debug)]
pub struct RequestHead {
    /// Pseudo headers first.
    pub headers: HeaderMap,
    /// HTTP/1.0 or 1.1.
    pub protocol: Protocol,
    /// Whether no body follows.
    pub end: bool,
    /// `connection: upgrade` with an `upgrade`, or CONNECT: what follows is a tunnel.
    pub upgrade: bool,
    /// Bytes of the head.
    pub bytes: usize,
    /// Those of its header lines, as Envoy counts them: a separator of two and a line end are three.
    pub header_bytes: usize,
    /// Headers dropped for an underscore.
    pub dropped_underscores: u32,
}

/// Why there is no (further) request.
#[derive(Debug)]
pub enum HeadError {
    /// The client broke the protocol: answer with the status, then close.
    Protocol(CodecError),
    /// The connection ended; inside a head when `true`.
    Closed(bool),
    /// The socket failed.
    Io(io::Error),
}

/// A connection; clones share it.
#[derive(Clone)]
pub struct ServerConnection(Rc<RefCell<Inner>>);

struct Inner {
    io: Io,
    options: Rc<ServerOptions>,
    limits: Limits,
    decoder: Decoder,
    encoder: Encoder,
    protocol: Protocol,
    head_request: bool,
    connect: bool,
    /// How far the inbox was searched for the end of a head.
    searched: usize,
    /// The client has half-closed or failed while a request was under way.
    gone: bool,
    /// The size of a head that was read and then refused, and of its header lines.
    refused: (u64, u64),
}

/// The body of the request under way.
pub struct RequestBody(ServerConnection);

impl ServerConnection {
    /// A fresh connection.
    pub fn new(transport: Transport, options: Rc<ServerOptions>) -> Self {
        let limits = Limits {
            max_bytes: options.max_header_bytes,
            max_headers: options.max_headers,
            spelling: options.case.spelling(),
            allow_custom_methods: options.allow_custom_methods,
        };
        Self(Rc::new(RefCell::new(Inner {
            io: Io::new(transport),
            options,
            limits,
            decoder: Decoder::Done,
            encoder: Encoder::None,
            protocol: Protocol::Http11,
            head_request: false,
            connect: false,
            searched: 0,
            gone: false,
            refused: (0, 0),
        })))
    }

    /// Bytes that were read from the transport before the codec took over.
    pub fn unread(&self, bytes: &[u8]) {
        self.0.borrow_mut().io.inbox.extend_from_slice(bytes);
    }

    /// The next request's head. The one before must be over.
    pub fn poll_head(&self, cx: &mut Context<'_>) -> Poll<Result<RequestHead, HeadError>> {
        self.0.borrow_mut().poll_head(cx)
    }

    /// Whether bytes of a next request are here already.
    pub fn has_input(&self) -> bool {
        !self.0.borrow().io.inbox.is_empty()
    }

    /// The body of the request under way.
    pub fn body(&self) -> RequestBody {
        RequestBody(self.clone())
    }

    /// Whether the request under way was wholly read.
    pub fn request_done(&self) -> bool {
        self.0.borrow().decoder.is_done()
    }

    /// Queues an informational head (100, 102, 103).
    pub fn send_informational(&self, status: u16, headers: &HeaderMap) {
        let mut inner = self.0.borrow_mut();
        let inner = &mut *inner;
        let shape = Shape {
            end: true,
            status: Some(status),
            head: false,
            bodiless: false,
            tunnel: true,
            http10: false,
        };
        encode::response(&mut inner.io, inner.protocol, headers, inner.options.case, shape);
    }

    /// Queues the response's head and tells the bytes of its header lines. `tunnel`: the response accepts an upgrade or
    /// CONNECT.
    pub fn send_head(&self, status: u16, headers: &HeaderMap, end: bool, tunnel: bool) -> usize {
        let mut inner = self.0.borrow_mut();
        let inner = &mut *inner;
        let http10 = inner.protocol == Protocol::Http10;
        let shape =
            Shape { end, status: Some(status), head: inner.head_request, bodiless: false, tunnel, http10 };
        let (encoder, bytes) =
            encode::response(&mut inner.io, inner.protocol, headers, inner.options.case, shape);
        inner.encoder = encoder;
        bytes
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        if inner.io.can_push() { Poll::Ready(Ok(())) } else { inner.io.poll_flush(cx) }
    }

    /// Queues a frame of the response's body, or its end.
    pub fn send_frame(&self, frame: Option<Frame>, end: bool) {
        let mut inner = self.0.borrow_mut();
        let inner = &mut *inner;
        inner.encoder.frame(&mut inner.io, frame, end, inner.options.enable_trailers);
    }

    /// Writes what is queued.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().io.poll_flush(cx)
    }

    /// Ends our direction.
    pub fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().io.poll_shutdown(cx)
    }

    /// Ready once the client is gone while its request, already read, is being served. What it sends meanwhile
    /// (pipelined requests, the bytes of a tunnel) waits in the inbox, up to a head's limit.
    pub fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.0.borrow_mut();
        if inner.gone {
            return Poll::Ready(());
        }
        let tunnel = inner.decoder == Decoder::Close;
        if !inner.decoder.is_done() && !tunnel {
            return Poll::Pending;
        }
        while inner.io.inbox.len() <= inner.limits.max_bytes {
            match ready!(inner.io.poll_fill(cx)) {
                // Who reads the tunnel has found nothing yet.
                Ok(n) if n > 0 && tunnel => cx.waker().wake_by_ref(),
                Ok(n) if n > 0 => {}
                _ => {
                    inner.gone = true;
                    return Poll::Ready(());
                }
            }
        }
        Poll::Pending
    }

    /// Whether the client was found to be gone, by [`ServerConnection::poll_gone`] or within its request's body.
    pub fn is_gone(&self) -> bool {
        self.0.borrow().gone
    }

    /// Forgets the head that was refused and what came behind it; tells the bytes of all, and of the head's lines where
    /// it could be read.
    pub fn discard_input(&self) -> (u64, u64) {
        let mut inner = self.0.borrow_mut();
        let n = inner.io.inbox.len();
        inner.io.drop_inbox(n);
        (inner.refused.0 + n as u64, inner.refused.1)
    }

    /// Reads and drops what the client still sends; ready at its end. For a polite close.
    pub fn poll_discard(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.0.borrow_mut();
        loop {
            let n = inner.io.inbox.len();
            inner.io.drop_inbox(n);
            match ready!(inner.io.poll_fill(cx)) {
                Ok(n) if n > 0 => {}
                _ => return Poll::Ready(()),
            }
        }
    }

    /// Bytes read and written on the wire so far.
    pub fn wire_bytes(&self) -> (u64, u64) {
        let inner = self.0.borrow();
        (inner.io.bytes_in, inner.io.bytes_out)
    }

    /// The same without what was read ahead: where the current message stands.
    pub fn consumed_bytes(&self) -> (u64, u64) {
        let inner = self.0.borrow();
        (inner.io.bytes_in - inner.io.inbox.len() as u64, inner.io.bytes_out)
    }

    /// The transport and unread bytes, if nobody else holds the connection.
    pub fn into_parts(self) -> Option<(Transport, BytesMut)> {
        Rc::try_unwrap(self.0).ok().map(|inner| inner.into_inner().io.into_parts())
    }
}

impl Inner {
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<RequestHead, HeadError>> {
        loop {
            if self.io.inbox.is_empty() {
                self.searched = 0;
                let limits = self.limits;
                let read = ready!(self.io.poll_read_scratch(cx, |seen| read_head(seen, &limits)));
                match read.map_err(HeadError::Io)? {
                    None => return Poll::Ready(Err(HeadError::Closed(false))),
                    Some(Err(e)) => return Poll::Ready(Err(HeadError::Protocol(e))),
                    Some(Ok(Some(head))) => {
                        return Poll::Ready(self.accept(head).map_err(HeadError::Protocol));
                    }
                    Some(Ok(None)) => self.searched = self.io.inbox.len(),
                }
            } else if self.searched == 0
                || self.io.inbox.len() > self.limits.max_bytes
                || parse::head_may_be_complete(&self.io.inbox, self.searched)
            {
                let (used, result) = read_head(&self.io.inbox, &self.limits);
                self.searched = self.io.inbox.len();
                self.io.drop_inbox(used);
                if let Some(head) = result.map_err(HeadError::Protocol)? {
                    self.searched = 0;
                    return Poll::Ready(self.accept(head).map_err(HeadError::Protocol));
                }
                if !self.io.inbox.is_empty() && ready!(self.io.poll_fill(cx)).map_err(HeadError::Io)? == 0 {
                    return Poll::Ready(Err(HeadError::Closed(true)));
                }
            } else {
                self.searched = self.io.inbox.len();
                if ready!(self.io.poll_fill(cx)).map_err(HeadError::Io)? == 0 {
                    return Poll::Ready(Err(HeadError::Closed(true)));
                }
            }
        }
    }

    /// What Envoy's codec does once a head is complete, in its order.
    fn accept(&mut self, head: Head) -> Result<RequestHead, CodecError> {
        let header_bytes = head.header_bytes();
        self.refused = (head.len as u64, header_bytes as u64);
        let Head { mut headers, protocol, len, target, .. } = head;
        self.protocol = protocol;
        self.encoder = Encoder::Raw;
        let method = headers.get(HeaderId::METHOD).unwrap_or_default();
        self.connect = method == b"CONNECT";
        self.head_request = method == b"HEAD";
        let dropped_underscores = self.underscores(&mut headers)?;
        let upgrade = take_upgrade(&mut headers, &self.options.ignore_upgrades) || self.connect;
        let framing = parse::framing(&mut headers, self.connect, self.options.allow_chunked_length)?;
        if !upgrade && headers.contains(HeaderId::CONNECTION) {
            sanitize_connection(&mut headers)?;
        }
        self.target(&mut headers, target)?;
        if protocol == Protocol::Http10 {
            if !self.options.accept_http10 {
                // The refusal is in our own version.
                self.protocol = Protocol::Http11;
                return Err(parse::LOW_VERSION);
            }
            if let Some(host) = &self.options.default_host
                && !headers.contains(HeaderId::AUTHORITY)
            {
                headers.insert_first(HeaderId::AUTHORITY, host);
            }
        }
        if headers.get(HeaderId::AUTHORITY).is_some_and(|a| !authority_is_valid(a)) {
            return Err(CodecError::bad("http.invalid_authority", "invalid authority"));
        }
        self.decoder = if upgrade { Decoder::Close } else { Decoder::from(framing.unwrap_or(Framing::None)) };
        Ok(RequestHead {
            headers,
            protocol,
            end: self.decoder.is_done(),
            upgrade,
            bytes: len,
            header_bytes,
            dropped_underscores,
        })
    }

    fn underscores(&self, headers: &mut HeaderMap) -> Result<u32, CodecError> {
        if self.options.underscores == Underscores::Allow {
            return Ok(0);
        }
        let mut found = 0;
        headers.remove_if(|_, name, _| {
            let has = name.contains(&b'_');
            found += u32::from(has);
            has
        });
        if found > 0 && self.options.underscores == Underscores::Reject {
            return Err(UNDERSCORE);
        }
        Ok(found)
    }

    /// The request target becomes `:path`, and in its absolute form `:scheme` and `:authority` too.
    fn target(&self, headers: &mut HeaderMap, target: (usize, usize)) -> Result<(), CodecError> {
        const INVALID: CodecError = CodecError::bad("http1.invalid_url", "invalid url in request line");
        if headers.may_repeat() && headers.get_all(HeaderId::HOST).nth(1).is_some() {
            // All of them are what is routed on and sent on: no two parsers can see two hosts (CVE-2026-73550).
            let all = headers.get_all(HeaderId::HOST).collect::<Vec<_>>().join(&b","[..]);
            headers.set(HeaderId::HOST, all);
        }
        headers.promote(HeaderId::HOST, HeaderId::AUTHORITY);
        if headers.contains(HeaderId::PATH) && !self.connect {
            return Ok(());
        }
        let url = headers.raw(target);
        let method_is_options = headers.get(HeaderId::METHOD) == Some(b"OPTIONS");
        let origin_form = url.first() == Some(&b'/') || (method_is_options && url.first() == Some(&b'*'));
        if !self.connect && (origin_form || !self.options.allow_absolute_url) {
            headers.push_raw_first(HeaderId::PATH, target);
            return Ok(());
        }
        let (scheme_len, rest) = if self.connect {
            (0, 0)
        } else {
            let at = url.windows(3).position(|w| w == b"://").ok_or(INVALID)?;
            (at, at + 3)
        };
        let path = url[rest..].iter().position(|c| matches!(c, b'/' | b'?' | b'#')).map(|p| p + rest);
        let authority_end = path.unwrap_or(url.len());
        // User information is not part of the authority.
        let authority_start =
            url[rest..authority_end].iter().rposition(|c| *c == b'@').map_or(rest, |at| rest + at + 1);
        let authority = url[authority_start..authority_end].to_vec();
        if authority.is_empty() || (self.connect && !authority.contains(&b':')) {
            return Err(INVALID);
        }
        let scheme = url[..scheme_len].to_ascii_lowercase();
        let path = path.map_or(b"/".to_vec(), |p| url[p..].to_vec());
        headers.set(HeaderId::AUTHORITY, authority);
        headers.promote(HeaderId::AUTHORITY, HeaderId::AUTHORITY);
        if self.connect {
            return Ok(());
        }
        if scheme != b"http" && scheme != b"https" {
            return Err(CodecError::bad("http1.invalid_scheme", "invalid scheme"));
        }
        if scheme == b"https" && self.options.refuse_https && !self.io.transport().is_tls() {
            return Err(CodecError {
                status: 403,
                details: "http1.https_url_on_plaintext_connection",
                message: "https in the clear",
            });
        }
        headers.insert_first(HeaderId::SCHEME, scheme);
        headers.insert_first(HeaderId::PATH, path);
        Ok(())
    }
}

/// Skips empty lines and parses; also how many bytes that took.
fn read_head(bytes: &[u8], limits: &Limits) -> (usize, Result<Option<Head>, CodecError>) {
    let skipped = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    let result = parse::request(&bytes[skipped..], limits, false);
    let used = skipped + result.as_ref().ok().and_then(Option::as_ref).map_or(0, |head| head.len);
    (used, result)
}

/// Whether the request asks for an upgrade. `h2c` is not offered: that wish is taken out, and so are those to be ignored.
fn take_upgrade(headers: &mut HeaderMap, ignored: &[StringMatcher]) -> bool {
    if !headers.contains(HeaderId::UPGRADE) || !headers.lists(HeaderId::CONNECTION, "upgrade") {
        return false;
    }
    if headers.get(HeaderId::UPGRADE).is_some_and(|u| u.eq_ignore_ascii_case(b"h2c")) {
        headers.remove(HeaderId::UPGRADE);
        headers.remove(HeaderId::HTTP2_SETTINGS);
        drop_connection_tokens(headers, |token| {
            token.eq_ignore_ascii_case(b"upgrade") || token.eq_ignore_ascii_case(b"http2-settings")
        });
        return false;
    }
    if ignored.is_empty() {
        return true;
    }
    let value = headers.get(HeaderId::UPGRADE).unwrap_or_default();
    let wishes = value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|wish| !wish.is_empty());
    let kept: Vec<_> = wishes.filter(|wish| !ignored.iter().any(|one| one.matches(wish))).collect();
    if kept.is_empty() {
        headers.remove(HeaderId::UPGRADE);
        drop_connection_tokens(headers, |token| token.eq_ignore_ascii_case(b"upgrade"));
        return false;
    }
    let kept = kept.join(&b","[..]);
    headers.set(HeaderId::UPGRADE, kept);
    true
}

fn drop_connection_tokens(headers: &mut HeaderMap, drop: impl Fn(&[u8]) -> bool) {
    let value = headers.get_all(HeaderId::CONNECTION).collect::<Vec<_>>().join(&b","[..]);
    let kept: Vec<_> = value
        .split(|b| *b == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty() && !drop(token))
        .collect();
    if kept.is_empty() {
        headers.remove(HeaderId::CONNECTION);
    } else {
        headers.set(HeaderId::CONNECTION, kept.join(&b","[..]));
    }
}

/// Headers that `connection` nominates are for this hop only; nominating some of them is an attack.
fn sanitize_connection(headers: &mut HeaderMap) -> Result<(), CodecError> {
    const REJECTED: CodecError =
        CodecError::bad("http1.connection_header_rejected", "Invalid nominated headers in Connection.");
    let value = headers.get(HeaderId::CONNECTION).unwrap_or_default();
    if value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close") {
        return Ok(());
    }
    let value =
        headers.get_all(HeaderId::CONNECTION).collect::<Vec<_>>().join(&b","[..]).to_ascii_lowercase();
    let tokens: Vec<_> =
        value.split(|b| *b == b',').filter(|t| !t.is_empty()).map(<[u8]>::trim_ascii).collect();
    if tokens.len() >= 10 {
        return Err(REJECTED);
    }
    let mut nominated = Vec::new();
    for token in tokens {
        match HeaderId::from_lower(token) {
            HeaderId::KEEP_ALIVE | HeaderId::UPGRADE | HeaderId::HTTP2_SETTINGS => {}
            HeaderId::X_FORWARDED_FOR | HeaderId::X_FORWARDED_HOST | HeaderId::X_FORWARDED_PROTO => {
                return Err(REJECTED);
            }
            _ if token == b"close" => {}
            _ if token.starts_with(b":") => return Err(REJECTED),
            HeaderId::CONNECTION => nominated.push(token),
            HeaderId::TE => {
                let te = headers.get_all(HeaderId::TE).collect::<Vec<_>>().join(&b","[..]);
                if te.len() > 256 {
                    return Err(REJECTED);
                }
                let trailers =
                    te.split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(b"trailers"));
                if trailers {
                    headers.set(HeaderId::TE, "trailers");
                } else {
                    headers.remove(HeaderId::TE);
                    nominated.push(token);
                }
            }
            _ => {
                headers.remove_if(|_, name, _| name == token);
                nominated.push(token);
            }
        }
    }
    if !nominated.is_empty() {
        drop_connection_tokens(headers, |t| nominated.iter().any(|n| n.eq_ignore_ascii_case(t)));
    }
    Ok(())
}

/// The characters of an authority (RFC 3986 section 3.2, as Envoy checks them).
impl BodyStream for RequestBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut inner = self.0.0.borrow_mut();
        let inner = &mut *inner;
        let trailers = inner.options.enable_trailers;
        let frame = ready!(inner.decoder.poll_frame(&mut inner.io, &inner.limits, trailers, cx));
        inner.gone |= matches!(frame, Some(Err(BodyError::Reset(_))));
        Poll::Ready(frame)
    }

    fn is_end(&self) -> bool {
        self.0.request_done()
    }
}
