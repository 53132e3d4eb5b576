//! The upstream of all cases: three listeners on loopback that answer from memory.
//!
//! * HTTP/1: any method, body read and dropped (`content-length` only), `/b/N` is answered with N bytes and a
//!   header block that was baked once.
//! * HTTP/2 with prior knowledge: the same paths.
//! * TCP: a client writes a big-endian u64 and gets as many bytes, as often as it likes.
//!
//! It shares the thread of the client. It does no more work than needed, so that one core can feed the proxy.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::error::{BenchError, Result};

/// The body sizes that are baked.
pub const SIZES: [usize; 3] = [1024, 10 * 1024, 100 * 1024];

const CHUNK: usize = 256 * 1024;

/// Where the three listeners are.
#[derive(Debug, Clone, Copy)]
pub struct Backends {
    /// HTTP/1.
    pub http1: SocketAddr,
    /// HTTP/2, prior knowledge.
    pub http2: SocketAddr,
    /// Bytes on demand.
    pub tcp: SocketAddr,
}

#[derive(Debug)]
struct Answers {
    http1: HashMap<usize, Bytes>,
    bodies: HashMap<usize, Bytes>,
}

impl Answers {
    fn bake() -> Self {
        let body = |n: usize| Bytes::from(vec![b'x'; n]);
        let http1 = |n: usize| {
            let mut answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {n}\r\n\
                 cache-control: no-store\r\n\r\n"
            )
            .into_bytes();
            answer.resize(answer.len() + n, b'x');
            Bytes::from(answer)
        };
        Self {
            http1: SIZES.iter().map(|&n| (n, http1(n))).collect(),
            bodies: SIZES.iter().map(|&n| (n, body(n))).collect(),
        }
    }
}

/// Starts the listeners as tasks of the current runtime; they live as long as it does.
pub async fn start() -> Result<Backends> {
    let answers = Arc::new(Answers::bake());
    let (http1, http1_addr) = listen().await?;
    let (http2, http2_addr) = listen().await?;
    let (tcp, tcp_addr) = listen().await?;
    let for_http2 = Arc::clone(&answers);
    accept(http1, move |stream| serve_http1(stream, Arc::clone(&answers)));
    accept(http2, move |stream| serve_http2(stream, Arc::clone(&for_http2)));
    accept(tcp, serve_tcp);
    Ok(Backends { http1: http1_addr, http2: http2_addr, tcp: tcp_addr })
}

async fn listen() -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(BenchError::io("backend listener"))?;
    let addr = listener.local_addr().map_err(BenchError::io("backend listener"))?;
    Ok((listener, addr))
}

fn accept<F, Fut>(listener: TcpListener, serve: F)
where
    F: Fn(TcpStream) -> Fut + Send + 'static,
    Fut: Future<Output = Result<()>> + Send + 'static,
{
    tokio::spawn(async move {
        loop {
            // Out of descriptors is the only failure to expect; the client will see it as a failed case.
            let Ok((stream, _)) = listener.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            let _ = stream.set_nodelay(true);
            // A connection that breaks is noticed by the client, which then fails the case.
            tokio::spawn(serve(stream));
        }
    });
}

/// The size that a path of the form `/b/N` asks for.
fn size_of(path: &str) -> Option<usize> {
    path.strip_prefix("/b/")?.parse().ok()
}

/// Reads one request head; the length of the head, the wanted size and the body's length.
fn parse_head(buf: &[u8]) -> Result<Option<(usize, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let status = request.parse(buf).map_err(|e| BenchError::protocol(format!("backend: {e}")))?;
    let httparse::Status::Complete(head) = status else { return Ok(None) };
    let size = request
        .path
        .and_then(size_of)
        .ok_or_else(|| BenchError::protocol(format!("backend: path {:?}", request.path)))?;
    let mut length = 0;
    for header in request.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            length = std::str::from_utf8(header.value)
                .ok()
                .and_then(|v| v.trim().parse().ok())
                .ok_or_else(|| BenchError::protocol("backend: content-length"))?;
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(BenchError::protocol("backend: a chunked request was not expected"));
        }
    }
    Ok(Some((head, size, length)))
}

async fn serve_http1(mut stream: TcpStream, answers: Arc<Answers>) -> Result<()> {
    let gone = || BenchError::io("backend connection");
    let mut buf = vec![0u8; 16 * 1024];
    let mut filled = 0;
    loop {
        let Some((head, size, length)) = parse_head(&buf[..filled])? else {
            if filled == buf.len() {
                return Err(BenchError::protocol("backend: head too large"));
            }
            let n = stream.read(&mut buf[filled..]).await.map_err(gone())?;
            if n == 0 {
                return Ok(());
            }
            filled += n;
            continue;
        };
        let mut have = filled.min(head + length);
        buf.copy_within(have..filled, 0);
        filled -= have;
        while have < head + length {
            let want = (head + length - have).min(buf.len());
            let n = stream.read(&mut buf[..want]).await.map_err(gone())?;
            if n == 0 {
                return Ok(());
            }
            have += n;
        }
        let answer =
            answers.http1.get(&size).ok_or_else(|| BenchError::protocol(format!("no body of {size}")))?;
        stream.write_all(answer).await.map_err(gone())?;
    }
}

async fn serve_http2(stream: TcpStream, answers: Arc<Answers>) -> Result<()> {
    let mut connection = h2::server::Builder::new()
        .max_concurrent_streams(1000)
        .initial_window_size(1 << 20)
        .initial_connection_window_size(1 << 24)
        .handshake::<_, Bytes>(stream)
        .await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let body = size_of(request.uri().path())
            .and_then(|n| answers.bodies.get(&n))
            .ok_or_else(|| BenchError::protocol(format!("backend: path {}", request.uri())))?;
        let response = http::Response::builder()
            .header("content-type", "application/octet-stream")
            .header("content-length", body.len())
            .header("cache-control", "no-store")
            .body(())
            .map_err(|e| BenchError::protocol(e.to_string()))?;
        respond.send_response(response, false)?.send_data(body.clone(), true)?;
    }
    Ok(())
}

async fn serve_tcp(mut stream: TcpStream) -> Result<()> {
    let gone = || BenchError::io("backend connection");
    // Connections that ask for little must not pay for a large buffer.
    let mut block = vec![b'x'; 4096];
    loop {
        let Ok(mut left) = stream.read_u64().await else { return Ok(()) };
        if left > block.len() as u64 {
            block.resize(CHUNK, b'x');
        }
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            stream.write_all(&block[..n]).await.map_err(gone())?;
            left -= n as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_whole_or_not_at_all() {
        let head = b"POST /b/1024 HTTP/1.1\r\nhost: a\r\nContent-Length: 7\r\n\r\n";
        assert_eq!(parse_head(head).unwrap(), Some((head.len(), 1024, 7)));
        assert_eq!(parse_head(&head[..30]).unwrap(), None);
        assert!(parse_head(b"GET /other HTTP/1.1\r\n\r\n").is_err());
        assert!(parse_head(b"GET /b/1 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
    }

    #[test]
    fn baked_answers_carry_their_length() {
        let answers = Answers::bake();
        for n in SIZES {
            assert_eq!(answers.bodies[&n].len(), n);
            let text = String::from_utf8(answers.http1[&n].to_vec()).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("content-length: {n}")));
            assert_eq!(body.len(), n);
        }
    }
}
