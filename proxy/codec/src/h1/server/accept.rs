//! From a head that was read to a request that is served or refused: what Envoy's codec does, in its order.

use sampan_core::header::{HeaderId, HeaderMap, authority_is_valid};
use sampan_core::stream_info::Protocol;

use super::super::decode::Decoder;
use super::super::encode::Encoder;
use super::super::parse::{self, Framing, Head};
use super::hop::{sanitize_connection, take_upgrade};
use super::{Inner, RequestHead, UNDERSCORE, Underscores};
use crate::error::CodecError;

impl Inner {
    /// Makes a request of a head, or says how it is refused.
    pub(super) fn accept(&mut self, head: Head) -> Result<RequestHead, CodecError> {
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
