//! `core.v3.HttpService`: whom records are posted to, and with which headers.
//!
//! `request_headers_to_add` are formats that see nothing of any request; a header replaces the one of its name whatever its
//! `append_action` says, as in Envoy 1.40. A `raw_value` is no format and comes before the rest.

use std::net::Ipv4Addr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as pb;

use crate::address::Address;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::format::{Extensions, FormatContext, Formatter};
use crate::header::{HeaderId, HeaderMap, HeaderName};
use crate::otlp;
use crate::stream_info::{ConnectionInfo, StreamInfo};

/// A service that takes POSTs.
#[derive(Debug)]
pub struct HttpService {
    /// `http_uri.cluster`
    pub cluster: Arc<str>,
    /// `http_uri.timeout`
    pub timeout: Duration,
    head: HeaderMap,
    added: Vec<(HeaderName, Formatter)>,
}

/// What an URI names, as Envoy cuts it: nothing is decoded or checked.
#[derive(Debug, PartialEq, Eq)]
pub struct Parts<'a> {
    /// Whether it has a scheme.
    pub absolute: bool,
    /// What stands before the first `/`; empty where nothing does.
    pub host: &'a str,
    /// From there on.
    pub path: &'a str,
}

impl<'a> Parts<'a> {
    /// Cuts.
    pub fn of(uri: &'a str) -> Self {
        let (absolute, rest) = uri.split_once("://").map_or((false, uri), |(_, rest)| (true, rest));
        let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        Self { absolute, host, path }
    }
}

impl HttpService {
    /// A service of a cluster, without a deadline.
    pub fn new(cluster: &str, host: &str, path: &str) -> Self {
        let mut head = HeaderMap::new();
        head.append(HeaderId::METHOD, "POST");
        head.append(HeaderId::PATH, path);
        head.append(HeaderId::AUTHORITY, host);
        Self { cluster: cluster.into(), timeout: Duration::ZERO, head, added: Vec::new() }
    }

    /// A service for OTLP.
    pub fn otlp(message: &pb::HttpService) -> ConfigResult<Self> {
        let (cluster, uri) = Self::target(message);
        let parts = Parts::of(uri);
        let service = Self::new(cluster, parts.host, parts.path)
            .header(HeaderId::CONTENT_TYPE, "application/x-protobuf")
            .header(HeaderId::USER_AGENT, &otlp::user_agent());
        service.with(message)
    }

    /// The cluster and the URI of a message; a message without them leads nowhere.
    pub fn target(message: &pb::HttpService) -> (&str, &str) {
        let Some(pb::HttpUri { uri, http_upstream_type, .. }) = &message.http_uri else { return ("", "") };
        match http_upstream_type {
            Some(pb::http_uri::HttpUpstreamType::Cluster(cluster)) => (cluster, uri),
            None => ("", uri),
        }
    }

    /// With a message's deadline and headers.
    pub fn with(mut self, message: &pb::HttpService) -> ConfigResult<Self> {
        let formatters = Extensions::from_proto(&message.formatters, "formatters")?;
        let timeout = message.http_uri.as_ref().and_then(|uri| uri.timeout.as_ref());
        self.timeout = timeout.map_or(Duration::ZERO, crate::config_source::duration);
        for (i, option) in message.request_headers_to_add.iter().enumerate() {
            let Some(header) = &option.header else {
                return Err(ConfigError::missing("header").index(i).at("request_headers_to_add"));
            };
            let name = HeaderName::new(header.key.to_ascii_lowercase());
            if header.value.is_empty() {
                replace(&mut self.head, &name, &header.raw_value);
                continue;
            }
            let value = Formatter::parse(&header.value, &formatters).at("header.value");
            self.added.push((name, value.at_index("request_headers_to_add", i)?));
        }
        Ok(self)
    }

    /// With one more header of its own, before those of the message.
    pub fn header(mut self, id: HeaderId, value: &str) -> Self {
        self.head.append(id, value);
        self
    }

    /// The head of a POST.
    pub fn head(&self) -> HeaderMap {
        let mut head = self.head.clone();
        if self.added.is_empty() {
            return head;
        }
        let nobody = || Address::Ip((Ipv4Addr::UNSPECIFIED, 0).into());
        let connection = ConnectionInfo::accepted(0, "".into(), nobody(), nobody());
        let info = StreamInfo::new(0, Rc::new(connection), None);
        let (context, mut value) = (FormatContext::new(&info), Vec::new());
        for (name, format) in &self.added {
            value.clear();
            format.write(&context, &mut value);
            replace(&mut head, name, &value);
        }
        head
    }
}

/// What comes stands at the end.
fn replace(head: &mut HeaderMap, name: &HeaderName, value: &[u8]) {
    if !name.id().is_pseudo() {
        head.remove_name(name);
    }
    head.set_name(name, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_cut() {
        let of = |uri| {
            let Parts { absolute, host, path } = Parts::of(uri);
            (absolute, host, path)
        };
        assert_eq!(of("https://h:1/p?q=/"), (true, "h:1", "/p?q=/"));
        assert_eq!(of("http://h"), (true, "h", "/"));
        assert_eq!(of("/p/q"), (false, "", "/p/q"));
        assert_eq!(of("h/p"), (false, "h", "/p"));
    }
}
