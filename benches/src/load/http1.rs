//! HTTP/1 client: baked request bytes out, answer checked and dropped.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Baked, Io};
use crate::error::{BenchError, Result};

/// A baked request and what the answer must be.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Baked,
    body: usize,
}

/// The headers of a plain browser-like client; `host` is what the proxies' virtual hosts expect.
const HEADERS: &str = "host: bench.example.com\r\nuser-agent: sampan-benches\r\naccept: */*\r\n";

impl Request {
    /// `GET` of `size` bytes.
    #[must_use]
    pub fn get(size: usize) -> Self {
        Self { bytes: format!("GET /b/{size} HTTP/1.1\r\n{HEADERS}\r\n").into_bytes().into(), body: size }
    }

    /// `POST` of `size` bytes that is answered with `answer` bytes.
    #[must_use]
    pub fn post(size: usize, answer: usize) -> Self {
        let mut bytes = format!(
            "POST /b/{answer} HTTP/1.1\r\n{HEADERS}content-type: application/octet-stream\r\n\
             content-length: {size}\r\n\r\n"
        )
        .into_bytes();
        bytes.resize(bytes.len() + size, b'p');
        Self { bytes: bytes.into(), body: answer }
    }

    /// The same with `connection: close`.
    #[must_use]
    pub fn closing(&self) -> Self {
        let head_end =
            self.bytes.windows(4).position(|w| w == b"\r\n\r\n").map_or(self.bytes.len(), |i| i + 2);
        let mut bytes = self.bytes[..head_end].to_vec();
        bytes.extend_from_slice(b"connection: close\r\n");
        bytes.extend_from_slice(&self.bytes[head_end..]);
        Self { bytes: Arc::from(bytes), body: self.body }
    }
}

/// A connection that repeats one request.
pub struct Http1Connection {
    io: Box<dyn Io>,
    request: Request,
    buf: Vec<u8>,
}

impl Http1Connection {
    /// Over an open connection.
    #[must_use]
    pub fn new(io: Box<dyn Io>, request: Request) -> Self {
        Self { io, request, buf: Vec::new() }
    }

    /// Gives the read buffer back: for connections that are to sit idle.
    pub fn rest(&mut self) {
        self.buf = Vec::new();
    }

    /// One request and its whole answer.
    pub async fn exchange(&mut self) -> Result<()> {
        let broken = || BenchError::io("exchange");
        self.buf.resize(32 * 1024, 0);
        self.io.write_all(&self.request.bytes).await.map_err(broken())?;
        self.io.flush().await.map_err(broken())?;
        let mut filled = 0;
        let (head, length) = loop {
            let n = self.io.read(&mut self.buf[filled..]).await.map_err(broken())?;
            if n == 0 {
                return Err(BenchError::protocol("connection closed before the answer"));
            }
            filled += n;
            if let Some(found) = parse_head(&self.buf[..filled])? {
                break found;
            }
        };
        if length != self.request.body {
            return Err(BenchError::protocol(format!("answer of {length} bytes, not {}", self.request.body)));
        }
        let mut have = filled - head;
        while have < length {
            let n = self.io.read(&mut self.buf).await.map_err(broken())?;
            if n == 0 {
                return Err(BenchError::protocol("connection closed within the answer"));
            }
            have += n;
        }
        if have > length {
            return Err(BenchError::protocol("bytes after the answer"));
        }
        Ok(())
    }
}

/// The length of the head and of the body, or that more bytes are needed. Anything but 200 is an error.
fn parse_head(buf: &[u8]) -> Result<Option<(usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let status = response.parse(buf).map_err(|e| BenchError::protocol(format!("answer: {e}")))?;
    let httparse::Status::Complete(head) = status else { return Ok(None) };
    if response.code != Some(200) {
        return Err(BenchError::protocol(format!("status {:?}", response.code)));
    }
    let length = response
        .headers
        .iter()
        .find(|h| h.name.eq_ignore_ascii_case("content-length"))
        .and_then(|h| std::str::from_utf8(h.value).ok()?.trim().parse().ok())
        .ok_or_else(|| BenchError::protocol("answer without content-length"))?;
    Ok(Some((head, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_good_answers_pass() {
        let good = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n";
        assert_eq!(parse_head(good).unwrap(), Some((good.len(), 3)));
        assert_eq!(parse_head(&good[..20]).unwrap(), None);
        assert!(parse_head(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\n\r\n").is_err());
        assert!(parse_head(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
    }

    #[test]
    fn closing_adds_one_header() {
        let text = String::from_utf8(Request::get(5).closing().bytes.to_vec()).unwrap();
        assert!(text.ends_with("accept: */*\r\nconnection: close\r\n\r\n"), "{text}");
    }
}
