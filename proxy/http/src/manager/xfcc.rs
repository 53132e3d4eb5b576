//! `x-forwarded-client-cert`: what of it is passed on, and what is said in it about the client's certificate.
//!
//! As text (`Hash=…;Subject="…"`, elements behind commas), or as JSON (a list of objects). Where an element is appended
//! the header keeps the form that it has: a list in brackets is JSON, whatever stands in it.

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3::HttpRequestHeaderMatchInput;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use pb::http_connection_manager as hcm;
use pb::http_connection_manager::{ForwardClientCertDetails as Mode, ForwardClientCertFormat};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::ConnectionInput;
use sampan_core::matcher::tree::{Datum, Found, Input, MatchTree, TreeContext};
use sampan_core::stream_info::{CertInfo, ConnectionInfo, TlsInfo};
use serde_json::Value;

use crate::filter::{decode, message_name};

const NAME: HeaderId = HeaderId::X_FORWARDED_CLIENT_CERT;
const ACTION: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.ForwardClientCertConfig";

/// What the manager does with the header.
pub struct ClientCert {
    rule: Rule,
    /// `forward_client_cert_matcher`
    matcher: Option<Box<MatchTree<RequestInput, Rule>>>,
}

/// `forward_client_cert_details` and `set_current_client_cert_details`
struct Rule {
    mode: Mode,
    details: Details,
}

#[derive(Default)]
struct Details {
    cert: bool,
    chain: bool,
    subject: bool,
    uri: bool,
    dns: bool,
    issuer: bool,
    json: bool,
}

impl ClientCert {
    /// Parses the manager's fields.
    pub fn from_proto(message: &pb::HttpConnectionManager) -> ConfigResult<Self> {
        let details = message.set_current_client_cert_details.as_ref();
        let matcher = message.forward_client_cert_matcher.as_ref();
        let matcher = matcher.map(|m| MatchTree::from_proto(m, &mut Rules)).transpose();
        Ok(Self {
            rule: Rule::new(message.forward_client_cert_details(), details),
            matcher: matcher.at("forward_client_cert_matcher")?.map(Box::new),
        })
    }

    /// Does it to a request.
    pub fn apply(&self, headers: &mut HeaderMap, connection: &ConnectionInfo) {
        let found =
            self.matcher.as_ref().map(|tree| tree.find(&Request { headers, connection }, &mut |_| {}));
        match found {
            Some(Found::Action(rule)) => rule.apply(headers, connection),
            _ => self.rule.apply(headers, connection),
        }
    }
}

impl Rule {
    fn new(mode: Mode, details: Option<&hcm::SetCurrentClientCertDetails>) -> Self {
        let details = details.map_or_else(Details::default, |details| Details {
            cert: details.cert,
            chain: details.chain,
            subject: details.subject.is_some_and(|b| b.value),
            uri: details.uri,
            dns: details.dns,
            issuer: details.issuer,
            json: details.format() == ForwardClientCertFormat::Json,
        });
        Self { mode, details }
    }

    fn apply(&self, headers: &mut HeaderMap, connection: &ConnectionInfo) {
        let tls = connection.tls.as_deref();
        let peer = tls.and_then(|tls| Some((tls, tls.peer.as_deref()?)));
        let (tls, peer) = match (self.mode, peer) {
            (Mode::AlwaysForwardOnly, _) | (Mode::ForwardOnly, Some(_)) => return,
            (Mode::Sanitize, _) | (_, None) => {
                headers.remove(NAME);
                return;
            }
            (Mode::AppendForward | Mode::SanitizeSet, Some(peer)) => peer,
        };
        let before = headers.get(NAME).filter(|value| !value.is_empty() && self.mode == Mode::AppendForward);
        let value = match before {
            None if self.details.json => format!("[{}]", self.details.json(tls, peer)).into_bytes(),
            None => self.details.text(tls, peer).into_bytes(),
            // Envoy, too, leaves a comma where the list is empty.
            Some([list @ .., b']']) if list.first() == Some(&b'[') => {
                [list, format!(",{}]", self.details.json(tls, peer)).as_bytes()].concat()
            }
            Some(_) => {
                headers.append_to_value(NAME, ",", self.details.text(tls, peer).as_bytes());
                return;
            }
        };
        headers.set(NAME, value);
    }
}

impl Details {
    fn text(&self, tls: &TlsInfo, peer: &CertInfo) -> String {
        let mut parts: Vec<String> = Vec::new();
        if let Some(local) = &tls.local {
            parts.extend(local.uri_sans.iter().map(|uri| format!("By={uri}")));
        }
        parts.push(format!("Hash={}", peer.sha256));
        if self.cert && !peer.pem.is_empty() {
            parts.push(format!("Cert=\"{}\"", peer.pem));
        }
        if self.chain
            && let Some(chain) = &tls.peer_chain_pem
        {
            parts.push(format!("Chain=\"{chain}\""));
        }
        if self.subject {
            parts.push(format!("Subject=\"{}\"", peer.subject));
        }
        if self.uri && peer.uri_sans.is_empty() {
            parts.push("URI=".to_owned());
        }
        if self.uri {
            parts.extend(peer.uri_sans.iter().map(|uri| format!("URI={uri}")));
        }
        if self.dns {
            parts.extend(peer.dns_sans.iter().map(|dns| format!("DNS={dns}")));
        }
        if self.issuer {
            parts.push(format!("Issuer=\"{}\"", peer.issuer));
        }
        parts.join(";")
    }

    fn json(&self, tls: &TlsInfo, peer: &CertInfo) -> Value {
        let local = tls.local.as_ref().map_or(&[][..], |local| &local.uri_sans);
        let list = |on: bool, values: &[String]| (on && !values.is_empty()).then(|| Value::from(values));
        let text = |on: bool, value: &str| on.then(|| Value::from(value));
        let cert = (self.cert && !peer.pem.is_empty()).then(|| Value::from(peer.pem.plain().concat()));
        let chain = tls.peer_chain_pem.as_ref().filter(|_| self.chain).map(|chain| chain.plain().into());
        let members = [
            ("by", list(true, local)),
            ("hash", text(true, &peer.sha256)),
            ("cert", cert),
            ("chain", chain),
            ("subject", text(self.subject, &peer.subject)),
            ("uri", list(self.uri, &peer.uri_sans)),
            ("dns", list(self.dns, &peer.dns_sans)),
            ("issuer", text(self.issuer, &peer.issuer)),
        ];
        members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

/// What the matcher asks.
struct Request<'r> {
    headers: &'r HeaderMap,
    connection: &'r ConnectionInfo,
}

enum RequestInput {
    Header(HeaderName),
    Connection(ConnectionInput),
}

impl Input<Request<'_>> for RequestInput {
    fn read<'d>(&'d self, request: &'d Request<'_>) -> Datum<'d> {
        match self {
            Self::Header(name) => request.headers.joined(name).map_or(Datum::Missing, Datum::Bytes),
            Self::Connection(input) => input.read(request.connection),
        }
    }
}

/// Compiles the matcher.
struct Rules;

impl TreeContext for Rules {
    type Input = RequestInput;
    type Action = Rule;
    const KEEP_MATCHING: bool = false;

    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<RequestInput> {
        let any = typed_config(config)?;
        if message_name(any) == "envoy.type.matcher.v3.HttpRequestHeaderMatchInput" {
            let message: HttpRequestHeaderMatchInput = decode(any).at("typed_config")?;
            return Ok(RequestInput::Header(HeaderName::new(&message.header_name)));
        }
        ConnectionInput::from_any(any)?.map(RequestInput::Connection).ok_or_else(|| {
            ConfigError::unsupported(format!("input type {:?}", any.type_url)).at("typed_config")
        })
    }

    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Rule> {
        let any = typed_config(config)?;
        if message_name(any) != ACTION {
            let error = ConfigError::unsupported(format!("action type {:?}", any.type_url));
            return Err(error.at("typed_config"));
        }
        let message: hcm::ForwardClientCertConfig = decode(any).at("typed_config")?;
        let details = message.set_current_client_cert_details.as_ref();
        Ok(Rule::new(message.forward_client_cert_details(), details))
    }
}

fn typed_config(config: &TypedExtensionConfig) -> ConfigResult<&Any> {
    config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))
}
