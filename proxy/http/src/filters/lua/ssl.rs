//! The SSL connection object.

use std::rc::Rc;

use mlua::{Lua, Value};
use sampan_core::stream_info::{CertInfo, TlsInfo};

use super::object::{Args, Fail, Kind, Method, Return, internal};

/// `connection():ssl()`, `streamInfo():downstreamSslConnection()`
pub(super) struct Ssl(pub(super) Rc<TlsInfo>);

fn text(lua: &Lua, args: &Args, f: impl FnOnce(&TlsInfo) -> Option<String>) -> Result<Return, Fail> {
    let this = args.this::<Ssl>()?;
    Return::value(lua, f(&this.own.0).unwrap_or_default())
}

fn peer(lua: &Lua, args: &Args, f: impl FnOnce(&CertInfo) -> String) -> Result<Return, Fail> {
    text(lua, args, |tls| tls.peer.as_deref().map(f))
}

fn list(lua: &Lua, args: &Args, f: impl FnOnce(&TlsInfo) -> Option<&Vec<String>>) -> Result<Return, Fail> {
    let this = args.this::<Ssl>()?;
    let empty = Vec::new();
    let texts = f(&this.own.0).unwrap_or(&empty);
    Return::value(lua, lua.create_sequence_from(texts.iter().map(String::as_str)).map_err(internal)?)
}

fn time(lua: &Lua, args: &Args, f: impl FnOnce(&CertInfo) -> i64) -> Result<Return, Fail> {
    let this = args.this::<Ssl>()?;
    Return::value(lua, this.own.0.peer.as_deref().map_or(0, f) as f64)
}

fn unsupported(_: &Lua, args: &Args) -> Result<Return, Fail> {
    args.this::<Ssl>()?;
    Err(Fail::from("OIDs of certificates are not supported"))
}

impl Kind for Ssl {
    const NAME: &'static str = "ssl";
    const METHODS: &'static [(&'static str, Method)] = &[
        ("peerCertificatePresented", |lua, args| {
            Return::value(lua, args.this::<Self>()?.own.0.peer.is_some())
        }),
        ("peerCertificateValidated", |lua, args| {
            Return::value(lua, args.this::<Self>()?.own.0.peer_validated)
        }),
        ("uriSanLocalCertificate", |lua, args| {
            list(lua, args, |tls| tls.local.as_ref().map(|c| &c.uri_sans))
        }),
        ("dnsSansLocalCertificate", |lua, args| {
            list(lua, args, |tls| tls.local.as_ref().map(|c| &c.dns_sans))
        }),
        ("uriSanPeerCertificate", |lua, args| list(lua, args, |tls| tls.peer.as_ref().map(|c| &c.uri_sans))),
        ("dnsSansPeerCertificate", |lua, args| list(lua, args, |tls| tls.peer.as_ref().map(|c| &c.dns_sans))),
        ("oidsPeerCertificate", unsupported),
        ("oidsLocalCertificate", unsupported),
        ("sha256PeerCertificateDigest", |lua, args| peer(lua, args, |c| c.sha256.clone())),
        ("serialNumberPeerCertificate", |lua, args| peer(lua, args, |c| c.serial.clone())),
        ("issuerPeerCertificate", |lua, args| peer(lua, args, |c| c.issuer.clone())),
        ("subjectPeerCertificate", |lua, args| peer(lua, args, |c| c.subject.clone())),
        ("parsedSubjectPeerCertificate", |lua, args| {
            let this = args.this::<Self>()?;
            match &this.own.0.peer {
                Some(peer) => Return::object(lua, &this.session, ParsedName(parts(&peer.subject))),
                None => Return::value(lua, Value::Nil),
            }
        }),
        ("subjectLocalCertificate", |lua, args| {
            text(lua, args, |tls| tls.local.as_ref().map(|local| local.subject.clone()))
        }),
        ("validFromPeerCertificate", |lua, args| time(lua, args, |c| c.not_before)),
        ("expirationPeerCertificate", |lua, args| time(lua, args, |c| c.not_after)),
        ("sessionId", |lua, args| text(lua, args, |tls| Some(tls.session_id.clone()))),
        ("ciphersuiteId", |lua, args| text(lua, args, |tls| Some(format!("0x{:04x}", tls.cipher_id())))),
        ("ciphersuiteString", |lua, args| text(lua, args, |tls| Some(tls.cipher.to_owned()))),
        ("urlEncodedPemEncodedPeerCertificate", |lua, args| peer(lua, args, |c| c.pem.to_string())),
        ("urlEncodedPemEncodedPeerCertificateChain", |lua, args| {
            text(lua, args, |tls| tls.peer_chain_pem.as_ref().map(|pem| pem.to_string()))
        }),
        ("tlsVersion", |lua, args| text(lua, args, |tls| Some(tls.version.to_owned()))),
    ];
}

/// `parsedSubjectPeerCertificate()`: the parts of a name, in the order of the certificate.
pub(super) struct ParsedName(Vec<(String, String)>);

impl ParsedName {
    fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, value)| value.as_str())
    }
}

impl Kind for ParsedName {
    const NAME: &'static str = "parsedName";
    const METHODS: &'static [(&'static str, Method)] = &[
        ("commonName", |lua, args| {
            Return::value(lua, args.this::<Self>()?.own.values("CN").next().unwrap_or_default())
        }),
        ("organizationName", |lua, args| {
            let this = args.this::<Self>()?;
            Return::value(lua, lua.create_sequence_from(this.own.values("O")).map_err(internal)?)
        }),
    ];
}

/// The parts of an RFC 2253 name, which begins with the certificate's last.
fn parts(name: &str) -> Vec<(String, String)> {
    let (mut all, mut part, mut escaped) = (Vec::new(), String::new(), false);
    for c in name.chars().chain([',']) {
        match c {
            _ if escaped => {
                part.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            ',' | '+' => {
                if let Some((key, value)) = std::mem::take(&mut part).split_once('=') {
                    all.push((key.to_owned(), value.to_owned()));
                }
            }
            c => part.push(c),
        }
    }
    all.reverse();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let name = ParsedName(parts("CN=a\\, b,O=One+O=Two,C=DE"));
        assert_eq!(name.values("CN").collect::<Vec<_>>(), ["a, b"]);
        assert_eq!(name.values("O").collect::<Vec<_>>(), ["Two", "One"]);
    }
}
