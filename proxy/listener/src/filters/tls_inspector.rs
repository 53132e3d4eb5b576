//! `tls_inspector`: server name and ALPN of a ClientHello (RFC 8446 4.1.2, RFC 6066 3, RFC 7301 3.1), which may be
//! cut into several records (RFC 8446 5.1) and segments.
//!
//! What is no TLS passes on as `raw_buffer`; the first five bytes decide. A malformed ClientHello passes on too,
//! unless `close_connection_on_client_hello_parsing_errors`.

use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector as Message;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::stats::{Histogram, Unit};
use sampan_tls::Transport;

use super::{Accepted, ListenerFilter, Step};
use crate::context::FactoryContext;
use crate::proto::{decode, refuse, u32_of};
use crate::stats::stats;

/// The most bytes that are looked at.
const MAX_BYTES: usize = 64 * 1024;
/// The longest ClientHello message; a longer one counts as malformed.
const MAX_MESSAGE: usize = 16 * 1024;
/// The longest record, with room for what an encrypted one may add.
const MAX_RECORD: usize = 16 * 1024 + 256;

stats! {
    /// `tls_inspector.*`
    Counters {
        counters: alpn_found alpn_not_found client_hello_too_large sni_found sni_not_found tls_found tls_not_found;
        gauges: ;
    }
}

struct TlsInspector {
    counters: Counters,
    bytes_processed: Histogram,
    close_on_errors: bool,
    max_bytes: usize,
}

pub(super) fn make(config: &Any, context: &FactoryContext) -> ConfigResult<Box<dyn ListenerFilter>> {
    let message: Message = decode(config)?;
    refuse(message.enable_ja3_fingerprinting.is_some_and(|b| b.value), "enable_ja3_fingerprinting")?;
    refuse(message.enable_ja4_fingerprinting.is_some_and(|b| b.value), "enable_ja4_fingerprinting")?;
    let max_bytes = u32_of(message.max_client_hello_size).map_or(MAX_BYTES, |n| n as usize);
    if max_bytes > MAX_BYTES {
        return Err(ConfigError::new(format!(
            "max_client_hello_size of {max_bytes} is greater than maximum of {MAX_BYTES}."
        ))
        .at("max_client_hello_size"));
    }
    let scope = context.root_scope().scope("tls_inspector");
    Ok(Box::new(TlsInspector {
        counters: Counters::new(&scope),
        bytes_processed: scope.histogram("bytes_processed", Unit::Bytes),
        close_on_errors: message.close_connection_on_client_hello_parsing_errors,
        max_bytes,
    }))
}

impl ListenerFilter for TlsInspector {
    fn on_accept(&self, _transport: &Transport, _accepted: &mut Accepted) -> bool {
        true
    }

    fn on_data(&self, data: &[u8], accepted: &mut Accepted) -> Step {
        match inspect(data) {
            Found::Unclear if data.len() < self.max_bytes => Step::More,
            Found::Unclear => {
                self.counters.client_hello_too_large.inc();
                self.bytes_processed.record(data.len() as u64);
                Step::Close
            }
            Found::No { looked_at } => {
                self.bytes_processed.record(looked_at as u64);
                if self.close_on_errors {
                    return Step::Close;
                }
                self.counters.tls_not_found.inc();
                Step::Done { consume: 0 }
            }
            Found::Hello(hello) => {
                self.bytes_processed.record(hello.bytes as u64);
                self.found(hello, accepted);
                Step::Done { consume: 0 }
            }
        }
    }

    fn max_bytes(&self) -> usize {
        self.max_bytes
    }
}

impl TlsInspector {
    fn found(&self, hello: Hello, accepted: &mut Accepted) {
        let info = &mut accepted.info;
        self.counters.tls_found.inc();
        info.transport_protocol = "tls";
        match hello.server_name {
            Some(name) => {
                self.counters.sni_found.inc();
                info.requested_server_name = Some(name.to_ascii_lowercase().into());
            }
            None => self.counters.sni_not_found.inc(),
        }
        if hello.alpn.is_empty() {
            self.counters.alpn_not_found.inc();
        } else {
            self.counters.alpn_found.inc();
            info.application_protocols =
                hello.alpn.iter().map(|p| String::from_utf8_lossy(p).into()).collect();
        }
    }
}

#[derive(Debug, PartialEq)]
enum Found {
    Hello(Hello),
    No { looked_at: usize },
    Unclear,
}

#[derive(Debug, PartialEq, Default)]
struct Hello {
    server_name: Option<String>,
    alpn: Vec<Vec<u8>>,
    /// Bytes on the wire up to the end of its last record.
    bytes: usize,
}

/// For the fuzz target: what is found in bytes, and in their beginning, which must not say something else. Returns
/// what tells one outcome from another.
pub fn fuzz(bytes: &[u8], cut: usize) -> u64 {
    let whole = inspect(bytes);
    let part = inspect(&bytes[..cut.min(bytes.len())]);
    assert!(part == Found::Unclear || part == whole, "{part:?} became {whole:?}");
    match whole {
        Found::Unclear => 0,
        Found::No { looked_at } => 1 + (looked_at as u64).min(64),
        Found::Hello(hello) => {
            100 + u64::from(hello.server_name.is_some()) * 8 + hello.alpn.len().min(7) as u64
        }
    }
}

/// Puts the records' payloads together until the ClientHello is whole.
fn inspect(data: &[u8]) -> Found {
    let mut message = Vec::new();
    let mut rest = data;
    loop {
        let Some((header, after)) = rest.split_at_checked(5) else { return Found::Unclear };
        let looked_at = data.len() - after.len();
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != 22 || header[1] != 3 || len > MAX_RECORD {
            return Found::No { looked_at };
        }
        let Some((payload, next)) = after.split_at_checked(len) else { return Found::Unclear };
        message.extend_from_slice(payload);
        rest = next;
        let Some((head, body)) = message.split_at_checked(4) else { continue };
        let len = usize::from(head[1]) << 16 | usize::from(head[2]) << 8 | usize::from(head[3]);
        let bytes = data.len() - rest.len();
        if head[0] != 1 || len > MAX_MESSAGE {
            return Found::No { looked_at: bytes };
        }
        if let Some(body) = body.get(..len) {
            return match client_hello(body) {
                Some(hello) => Found::Hello(Hello { bytes, ..hello }),
                None => Found::No { looked_at: bytes },
            };
        }
    }
}

/// A cursor over length-prefixed TLS structures.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    fn vec8(&mut self) -> Option<&'a [u8]> {
        let len = self.take(1)?[0];
        self.take(len.into())
    }

    fn vec16(&mut self) -> Option<&'a [u8]> {
        let len = self.u16()?;
        self.take(len.into())
    }
}

fn client_hello(body: &[u8]) -> Option<Hello> {
    let mut r = Reader(body);
    // Version, random, session id, cipher suites, compression methods.
    r.take(2 + 32)?;
    r.vec8().filter(|id| id.len() <= 32)?;
    r.vec16().filter(|c| c.len() >= 2 && c.len() % 2 == 0)?;
    r.vec8().filter(|c| !c.is_empty())?;
    let mut hello = Hello::default();
    if r.0.is_empty() {
        return Some(hello);
    }
    let mut extensions = Reader(r.vec16()?);
    if !r.0.is_empty() {
        return None;
    }
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let value = extensions.vec16()?;
        match kind {
            0 => hello.server_name = server_name(value)?,
            16 => hello.alpn = alpn(value),
            _ => {}
        }
    }
    Some(hello)
}

/// The one host name; any other name type or an empty name is malformed.
fn server_name(value: &[u8]) -> Option<Option<String>> {
    let mut outer = Reader(value);
    let mut list = Reader(outer.vec16()?);
    let kind = list.take(1)?[0];
    let name = list.vec16()?;
    let whole = outer.0.is_empty() && list.0.is_empty();
    if kind != 0 || !whole || name.is_empty() || name.len() > 255 || name.contains(&0) {
        return None;
    }
    Some(Some(String::from_utf8_lossy(name).into_owned()))
}

/// The protocols; a malformed list counts as none, as the TLS stack behind will refuse it itself.
fn alpn(value: &[u8]) -> Vec<Vec<u8>> {
    let read = || {
        let mut outer = Reader(value);
        let mut list = Reader(outer.vec16()?);
        let mut out = Vec::new();
        while !list.0.is_empty() {
            out.push(list.vec8().filter(|p| !p.is_empty())?.to_vec());
        }
        outer.0.is_empty().then_some(out)
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(sni: &str, alpn: &[&str]) -> Vec<u8> {
        let mut ext = Vec::new();
        if !sni.is_empty() {
            let n = sni.len() as u16;
            ext.extend([0, 0]);
            ext.extend((n + 5).to_be_bytes());
            ext.extend((n + 3).to_be_bytes());
            ext.push(0);
            ext.extend(n.to_be_bytes());
            ext.extend(sni.as_bytes());
        }
        let list: Vec<u8> =
            alpn.iter().flat_map(|p| std::iter::once(p.len() as u8).chain(p.bytes())).collect();
        if !list.is_empty() {
            ext.extend([0, 16]);
            ext.extend((list.len() as u16 + 2).to_be_bytes());
            ext.extend((list.len() as u16).to_be_bytes());
            ext.extend(&list);
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
        body.extend((ext.len() as u16).to_be_bytes());
        body.extend(ext);
        let mut message = vec![1, 0, (body.len() >> 8) as u8, body.len() as u8];
        message.extend(body);
        message
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let record = |part: &[u8]| {
            let mut r = vec![22, 3, 1];
            r.extend((part.len() as u16).to_be_bytes());
            r.extend(part);
            r
        };
        message.chunks(size).flat_map(record).collect()
    }

    #[test]
    fn finds_name_and_protocols_however_it_is_cut() {
        let message = hello("Api.Example.com", &["h2", "http/1.1"]);
        for size in [1, 3, 50, 10_000] {
            let wire = records(&message, size);
            for cut in 0..wire.len() {
                assert_eq!(inspect(&wire[..cut]), Found::Unclear, "size {size} cut {cut}");
            }
            let Found::Hello(found) = inspect(&wire) else { panic!("size {size}") };
            assert_eq!(found.server_name.as_deref(), Some("Api.Example.com"));
            assert_eq!(found.alpn, [b"h2".to_vec(), b"http/1.1".to_vec()]);
            assert_eq!(found.bytes, wire.len());
        }
    }

    #[test]
    fn what_is_no_client_hello() {
        assert_eq!(inspect(b"GET "), Found::Unclear);
        assert_eq!(inspect(b"GET / HTTP/1.1"), Found::No { looked_at: 5 });
        assert_eq!(inspect(&[22, 2, 0, 0, 1]), Found::No { looked_at: 5 });
        assert_eq!(inspect(&records(&[1, 1, 0, 0, 0], 100)), Found::No { looked_at: 10 });
        assert_eq!(inspect(&records(&[2, 0, 0, 0], 100)), Found::No { looked_at: 9 });
        let mut bad = hello("a", &[]);
        let end = bad.len() - 1;
        bad[end] = 0;
        assert!(matches!(inspect(&records(&bad, 500)), Found::No { .. }));
        assert!(matches!(inspect(&records(&hello("", &[]), 500)), Found::Hello(_)));
    }

    #[test]
    fn no_bytes_panic() {
        let message = hello("a.b", &["h2"]);
        let wire = records(&message, 40);
        for at in 0..wire.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut wire = wire.clone();
                wire[at] = value;
                let _ = inspect(&wire);
            }
        }
    }
}
