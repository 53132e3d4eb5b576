//! `http_inspector`: is it HTTP/1.0, HTTP/1.1 or the HTTP/2 preface? Sets the application protocol to match on.

use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::ConfigResult;
use sampan_tls::Transport;

use super::{Accepted, ListenerFilter, Step};
use crate::context::FactoryContext;
use crate::stats::stats;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A request line that long is refused.
const MAX_INSPECT: usize = 64 * 1024;

stats! {
    /// `http_inspector.*`
    Counters {
        counters: http10_found http11_found http2_found http_not_found read_error;
        gauges: ;
    }
}

struct HttpInspector(Counters);

pub(super) fn make(_config: &Any, context: &FactoryContext) -> ConfigResult<Box<dyn ListenerFilter>> {
    Ok(Box::new(HttpInspector(Counters::new(&context.root_scope().scope("http_inspector")))))
}

impl ListenerFilter for HttpInspector {
    fn on_accept(&self, _transport: &Transport, accepted: &mut Accepted) -> bool {
        // Behind the TLS inspector, TLS has no readable request line.
        accepted.info.transport_protocol == "raw_buffer"
    }

    fn on_data(&self, data: &[u8], accepted: &mut Accepted) -> Step {
        let protocol = match inspect(data) {
            Found::Http10 => (&self.0.http10_found, "http/1.0"),
            Found::Http11 => (&self.0.http11_found, "http/1.1"),
            Found::Http2 => (&self.0.http2_found, "h2c"),
            Found::No => {
                self.0.http_not_found.inc();
                return Step::Done { consume: 0 };
            }
            Found::Unclear if data.len() < MAX_INSPECT => return Step::More,
            Found::Unclear => {
                self.0.read_error.inc();
                return Step::Close;
            }
        };
        protocol.0.inc();
        accepted.info.application_protocols = vec![protocol.1.into()];
        Step::Done { consume: 0 }
    }

    fn max_bytes(&self) -> usize {
        MAX_INSPECT
    }
}

#[derive(Debug, PartialEq)]
enum Found {
    Http10,
    Http11,
    Http2,
    No,
    Unclear,
}

/// For the fuzz target: what is found in bytes, and in their beginning, which must not say something else. Returns
/// what tells one outcome from another.
pub fn fuzz(bytes: &[u8], cut: usize) -> u64 {
    let whole = inspect(bytes);
    let part = inspect(&bytes[..cut.min(bytes.len())]);
    assert!(part == Found::Unclear || part == whole || cut == 0, "{part:?} became {whole:?}");
    whole as u64
}

fn inspect(data: &[u8]) -> Found {
    let common = data.len().min(PREFACE.len());
    if data[..common] == PREFACE[..common] {
        return if common == PREFACE.len() { Found::Http2 } else { Found::Unclear };
    }
    if !data.first().is_some_and(|b| is_token(*b)) {
        return Found::No;
    }
    let Some(end) = data.iter().position(|b| *b == b'\n') else { return Found::Unclear };
    let line = data[..end].strip_suffix(b"\r").unwrap_or(&data[..end]);
    let mut parts = line.split(|b| matches!(b, b' ' | b'\t')).filter(|p| !p.is_empty());
    let (method, target, version) = (parts.next(), parts.next(), parts.next());
    let method_ok = method.is_some_and(|m| m.iter().all(|b| is_token(*b)));
    let target_ok = target.is_some_and(|t| is_target(t, method == Some(b"CONNECT")));
    if !method_ok || !target_ok || parts.next().is_some() {
        return Found::No;
    }
    match version {
        Some(b"HTTP/1.1") => Found::Http11,
        Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor])
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            Found::Http10
        }
        // A line without a version is HTTP/0.9.
        None => Found::Http10,
        Some(_) => Found::No,
    }
}

fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

fn is_target(target: &[u8], connect: bool) -> bool {
    let form = match target {
        [b'/' | b'*', ..] => !connect,
        _ if connect => true,
        _ => target.windows(3).position(|w| w == b"://").is_some_and(|at| at > 0 && at + 3 < target.len()),
    };
    form && target.is_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_lines() {
        assert_eq!(inspect(b"GET / HTTP/1.1\r\n"), Found::Http11);
        assert_eq!(inspect(b"FANCY /x HTTP/1.1\nHost: a"), Found::Http11);
        assert_eq!(inspect(b"GET http://a/x HTTP/1.0\r\n"), Found::Http10);
        assert_eq!(inspect(b"CONNECT a:443 HTTP/1.1\r\n"), Found::Http11);
        assert_eq!(inspect(b"CONNECT foo HTTP/1.1\r\n"), Found::Http11);
        assert_eq!(inspect(b"GET  /x HTTP/1.1\r\n"), Found::Http11);
        assert_eq!(inspect(b"GET /\x01 HTTP/1.1\n"), Found::Http11);
        assert_eq!(inspect(b"GET / HTTP/2.0\r\n"), Found::Http10);
        assert_eq!(inspect(b"get / HTTP/1.0\r\n"), Found::Http10);
        assert_eq!(inspect(b"GET /x\r\n"), Found::Http10);
        assert_eq!(inspect(b"GET / http/1.1\r\n"), Found::No);
        assert_eq!(inspect(b"GET / HTTP/1.1 x\r\n"), Found::No);
        assert_eq!(inspect(b"GET foo HTTP/1.1\r\n"), Found::No);
        assert_eq!(inspect(b"GET /\xff HTTP/1.1\r\n"), Found::No);
        assert_eq!(inspect(b"@(x / HTTP/1.1\r\n"), Found::No);
        assert_eq!(inspect(b"GET / HTT"), Found::Unclear);
        assert_eq!(inspect(b"GET / FTP/1.1\r\n"), Found::No);
        assert_eq!(inspect(b"\r\nGET / HTTP/1.1\r\n"), Found::No);
        assert_eq!(inspect(b"\x16\x03\x01"), Found::No);
        assert_eq!(inspect(b"PRI * HT"), Found::Unclear);
        assert_eq!(inspect(PREFACE), Found::Http2);
    }
}
