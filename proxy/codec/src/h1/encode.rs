//! Heads and bodies to the wire.

use std::io::Write as _;

use sampan_core::header::{HeaderId, HeaderMap, Piece, Spelling};
use sampan_core::stream_info::Protocol;

use super::io::Io;
use crate::body::Frame;

/// How header names are spelled on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeaderCase {
    /// As in the list: lower case.
    #[default]
    Lower,
    /// `proper_case_words`: `Content-Type`.
    Proper,
    /// As received, where the spelling was kept (`preserve_case`); else lower case.
    Preserve,
    /// As received; proper case for names that this proxy adds.
    PreserveOrProper,
}

impl HeaderCase {
    /// What a parser with this configuration keeps.
    pub(super) fn spelling(self) -> Spelling {
        match self {
            Self::Lower | Self::Proper => Spelling::Unknown,
            Self::Preserve => Spelling::Kept,
            Self::PreserveOrProper => Spelling::KeptOrProper,
        }
    }

    /// How a message is written by a codec with this configuration: a stateful formatter is the message's own, put
    /// there by the codec that read it, and goes before what the writing codec would do.
    fn of(self, headers: &HeaderMap) -> Self {
        match (headers.spelling(), self) {
            (Spelling::Kept, _) => Self::Preserve,
            (Spelling::KeptOrProper, _) => Self::PreserveOrProper,
            (Spelling::Unknown, Self::Proper) => Self::Proper,
            (Spelling::Unknown, _) => Self::Lower,
        }
    }
}

/// How the body of the message under way is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoder {
    /// Nothing may follow (HEAD, 204, 304); data is dropped.
    None,
    /// As it is: a length was announced, or the connection's end delimits.
    Raw,
    Chunked,
}

/// What decides about the body's framing besides the headers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) end: bool,
    /// The status; none for a request.
    pub(super) status: Option<u16>,
    /// Response to HEAD.
    pub(super) head: bool,
    /// Request without a body by its method (GET, HEAD, …): no `content-length: 0`.
    pub(super) bodiless: bool,
    /// Response to CONNECT, a CONNECT request, an upgrade: no framing at all.
    pub(super) tunnel: bool,
    /// The peer speaks 1.0: no chunks.
    pub(super) http10: bool,
}

/// The request line and headers; tells the bytes of the latter.
pub(super) fn request(io: &mut Io, headers: &HeaderMap, case: HeaderCase, shape: Shape) -> (Encoder, usize) {
    let out = io.out();
    let method = headers.get(HeaderId::METHOD).unwrap_or(b"GET");
    out.extend_from_slice(method);
    out.push(b' ');
    let target = match headers.get(HeaderId::PATH) {
        Some(path) if method != b"CONNECT" => path,
        _ => headers.get(HeaderId::AUTHORITY).unwrap_or(b"/"),
    };
    out.extend_from_slice(target);
    out.extend_from_slice(b" HTTP/1.1\r\n");
    lines(out, headers, case, shape)
}

/// The status line and headers; tells the bytes of the latter.
pub(super) fn response(
    io: &mut Io,
    protocol: Protocol,
    headers: &HeaderMap,
    case: HeaderCase,
    shape: Shape,
) -> (Encoder, usize) {
    let out = io.out();
    out.extend_from_slice(if protocol == Protocol::Http10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
    let status = shape.status.unwrap_or_default();
    if status == 200 {
        out.extend_from_slice(b"200 OK\r\n");
    } else {
        // Writing to a Vec does not fail.
        let _ = write!(out, "{status} {}\r\n", reason(status));
    }
    lines(out, headers, case, shape)
}

fn lines(out: &mut Vec<u8>, headers: &HeaderMap, case: HeaderCase, shape: Shape) -> (Encoder, usize) {
    let start = out.len();
    let case = case.of(headers);
    match case {
        HeaderCase::Lower => lower_lines(out, headers),
        _ => spelled_lines(out, headers, case),
    }
    let has_length = headers.contains(HeaderId::CONTENT_LENGTH);
    let encoder = frame_by(out, has_length, case, shape, headers.contains(HeaderId::UPGRADE));
    let bytes = out.len() - start;
    out.extend_from_slice(b"\r\n");
    (encoder, bytes)
}

/// Headers that were received as lines and left alone go out as they came, many at once.
fn lower_lines(out: &mut Vec<u8>, headers: &HeaderMap) {
    for piece in headers.iter_lines() {
        let value = match piece {
            Piece::Lines(lines) => {
                out.extend_from_slice(lines);
                continue;
            }
            Piece::Known(id, value) => {
                out.extend_from_slice(id.line_start().as_bytes());
                value
            }
            Piece::Custom(name, value) => {
                out.extend_from_slice(name);
                out.extend_from_slice(b": ");
                value
            }
        };
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
}

fn spelled_lines(out: &mut Vec<u8>, headers: &HeaderMap, case: HeaderCase) {
    for (id, name, spelled, value) in headers.iter_spelled() {
        let mut name = name;
        match id {
            HeaderId::AUTHORITY => name = b"host",
            id if id.is_pseudo() => continue,
            _ => {}
        }
        push_name(out, name, spelled, case);
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
}

fn frame_by(out: &mut Vec<u8>, has_length: bool, case: HeaderCase, shape: Shape, upgrade: bool) -> Encoder {
    let body = if shape.head { Encoder::None } else { Encoder::Raw };
    if has_length {
        return body;
    }
    if let Some(100..=199 | 204 | 304) = shape.status {
        return if shape.status == Some(101) { Encoder::Raw } else { Encoder::None };
    }
    if shape.end && !shape.head {
        if !shape.bodiless && !shape.tunnel {
            push_name(out, b"content-length", None, case);
            out.extend_from_slice(b": 0\r\n");
        }
        return Encoder::None;
    }
    if shape.http10 {
        return body;
    }
    if shape.tunnel || upgrade {
        return body;
    }
    push_name(out, b"transfer-encoding", None, case);
    out.extend_from_slice(b": chunked\r\n");
    if shape.head { Encoder::None } else { Encoder::Chunked }
}

fn push_name(out: &mut Vec<u8>, name: &[u8], spelled: Option<&[u8]>, case: HeaderCase) {
    match (case, spelled) {
        (HeaderCase::Preserve | HeaderCase::PreserveOrProper, Some(spelled)) => {
            out.extend_from_slice(spelled)
        }
        (HeaderCase::Lower | HeaderCase::Preserve, _) => out.extend_from_slice(name),
        (HeaderCase::Proper | HeaderCase::PreserveOrProper, _) => {
            let mut upper = true;
            for c in name {
                out.push(if upper { c.to_ascii_uppercase() } else { *c });
                // Envoy's words begin behind anything that is not a letter or a digit.
                upper = !c.is_ascii_alphanumeric();
            }
        }
    }
}

impl Encoder {
    /// Queues a frame, and with `end` the end of the body.
    pub(super) fn frame(self, io: &mut Io, frame: Option<Frame>, end: bool, keep_trailers: bool) {
        let mut trailers = None;
        match (self, frame) {
            (_, None) | (Self::None, _) => {}
            (Self::Raw, Some(Frame::Data(data))) => io.push(data),
            (Self::Raw, Some(Frame::Trailers(_))) => {}
            (Self::Chunked, Some(Frame::Data(data))) => {
                // Writing to a Vec does not fail.
                let _ = write!(io.out(), "{:x}\r\n", data.len());
                io.push_chunk(data);
                if !end {
                    return;
                }
            }
            (Self::Chunked, Some(Frame::Trailers(t))) => trailers = Some(t),
        }
        if self == Self::Chunked && (end || trailers.is_some()) {
            let mut last = Vec::with_capacity(64);
            last.extend_from_slice(b"0\r\n");
            if let Some(trailers) = trailers.filter(|_| keep_trailers) {
                for (_, name, value) in trailers.iter() {
                    last.extend_from_slice(name);
                    last.extend_from_slice(b": ");
                    last.extend_from_slice(value);
                    last.extend_from_slice(b"\r\n");
                }
            }
            last.extend_from_slice(b"\r\n");
            io.push_end(&last);
        }
    }
}

/// The reason phrase of a status, as Envoy's `CodeUtility` has it.
pub(super) fn reason(status: u16) -> &'static str {
    match status {
        101 => "Switching Protocols",
        103 => "Unknown",
        203 => "Non-Authoritative Information",
        208 => "Already Reported",
        599 => "Last Unassigned Server Error Code",
        102 | 418 | 420 | 451 | 509 => "Unknown",
        413 => "Payload Too Large",
        422 => "Unprocessable Entity",
        _ => http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or("Unknown"),
    }
}
