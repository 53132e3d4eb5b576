//! The client's side: structured requests, raw bytes, admin calls, and what came back.

mod http1;
mod http2;
mod raw;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use serde_json::{Map, Value, json};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::case::{AdminStep, ClientTls, HttpStep, RawStep};
use crate::certs::{Certs, common_name};
use crate::error::{Result, case_error};
use crate::http1::scalar;
use crate::names::Names;
use crate::net::{Stream, Wire, text};
use crate::process::Running;

/// A connection kept by name.
pub enum Kept {
    /// HTTP/1.
    Http1(Wire),
    /// HTTP/2.
    Http2(SendRequest<Bytes>),
}

/// The client of one run.
pub struct Client<'a> {
    /// Ports and paths.
    pub names: &'a Names,
    /// Certificates.
    pub certs: &'a Certs,
    kept: RefCell<HashMap<String, Kept>>,
    /// Configurations with their sessions, by the sessions' name.
    sessions: RefCell<HashMap<String, Arc<ClientConfig>>>,
}

/// What a connection attempt showed.
enum Connected {
    Wire(Wire, Option<Value>),
    Failed(String),
}

impl<'a> Client<'a> {
    /// A client without connections.
    pub fn new(names: &'a Names, certs: &'a Certs) -> Self {
        Client { names, certs, kept: RefCell::default(), sessions: RefCell::default() }
    }

    /// Closes a kept connection.
    pub fn close(&self, name: &str) {
        self.kept.borrow_mut().remove(name);
    }

    fn address(&self, to: &str) -> Result<String> {
        if to.contains(':') || to.contains('{') {
            self.names.fill(to)
        } else {
            Ok(format!("127.0.0.1:{}", self.names.get(&format!("listener.{to}"))?))
        }
    }

    async fn connect(&self, to: &str, source: Option<&str>, tls: Option<&ClientTls>) -> Result<Connected> {
        let address = self.address(to)?;
        let stream = match Stream::connect(&address, source).await {
            Ok(stream) => stream,
            Err(error) => return Ok(Connected::Failed(format!("connect: {:?}", error.kind()))),
        };
        let Some(tls) = tls else { return Ok(Connected::Wire(Wire::new(stream), None)) };
        let Stream::Tcp(stream) = stream else { return case_error("TLS on a unix socket") };
        let name = tls.sni.clone().unwrap_or_else(|| "none.test".into());
        let Ok(name) = ServerName::try_from(name) else { return case_error("no server name") };
        let connector = TlsConnector::from(self.client_config(tls)?);
        match timeout(Duration::from_secs(5), connector.connect(name, stream)).await {
            Ok(Ok(stream)) => {
                let state = stream.get_ref().1;
                let mut seen = json!({
                    "alpn": state.alpn_protocol().map(text),
                    "version": state.protocol_version().map(|v| format!("{v:?}")),
                    "cert": state.peer_certificates().and_then(|c| common_name(c.first()?)),
                });
                if tls.session.is_some() {
                    seen["resumed"] = (state.handshake_kind() == Some(HandshakeKind::Resumed)).into();
                }
                Ok(Connected::Wire(Wire::new(Stream::TlsClient(Box::new(stream))), Some(seen)))
            }
            Ok(Err(error)) => Ok(Connected::Failed(format!("tls: {}", alert(&error)))),
            Err(_) => Ok(Connected::Failed("tls: no answer".into())),
        }
    }

    fn client_config(&self, tls: &ClientTls) -> Result<Arc<ClientConfig>> {
        let Some(session) = &tls.session else { return self.certs.client_config(tls) };
        if let Some(known) = self.sessions.borrow().get(session) {
            return Ok(known.clone());
        }
        let made = self.certs.client_config(tls)?;
        self.sessions.borrow_mut().insert(session.clone(), made.clone());
        Ok(made)
    }

    /// A structured request, as often as asked.
    pub async fn http(&self, step: &HttpStep) -> Result<Value> {
        if step.repeat == 1 && step.tally.is_none() {
            return self.once(step).await;
        }
        let by = step.tally.as_deref().unwrap_or("status");
        let mut counts = HashMap::<String, usize>::new();
        for _ in 0..step.repeat {
            let one = self.once(step).await?;
            let value = one.get(by).or_else(|| one.get("headers")?.get(by)).map(scalar);
            let value = value.or_else(|| one.get("error").map(scalar)).unwrap_or_else(|| "none".into());
            *counts.entry(value).or_default() += 1;
        }
        let mut names: Vec<_> = counts.keys().chain(step.within.keys()).cloned().collect();
        names.sort();
        names.dedup();
        let mut tally = Map::new();
        for name in names {
            let count = counts.get(&name).copied().unwrap_or(0);
            let value = match step.within.get(&name) {
                Some((low, high)) if (*low..=*high).contains(&count) => "ok".into(),
                _ => count.into(),
            };
            tally.insert(name, value);
        }
        Ok(json!({ "tally": tally }))
    }

    async fn once(&self, step: &HttpStep) -> Result<Value> {
        let limit = Duration::from_millis(step.limit_ms);
        let exchange = async {
            if step.version == "2" {
                http2::exchange(self, step).await
            } else {
                http1::exchange(self, step).await
            }
        };
        match timeout(limit, exchange).await {
            Ok(seen) => seen,
            Err(_) => Ok(json!({ "error": "no end of the response in time" })),
        }
    }

    /// Bytes by script.
    pub async fn raw(&self, step: &RawStep) -> Result<Value> {
        raw::exchange(self, step).await
    }

    /// A call of the admin interface.
    pub async fn admin(&self, step: &AdminStep, subject: &Running) -> Result<Value> {
        let (head, body) = subject.admin_call(&step.method, &self.names.fill(&step.path)?).await?;
        let content_type = head.get("content-type").unwrap_or_default().to_owned();
        let body = match serde_json::from_str::<Value>(&body) {
            Ok(tree) if content_type.contains("json") => {
                if step.pick.is_empty() {
                    tree
                } else {
                    let pick = |p: &String| (p.clone(), tree.pointer(p).cloned().unwrap_or(Value::Null));
                    step.pick.iter().map(pick).collect::<Map<_, _>>().into()
                }
            }
            _ => match &step.grep {
                Some(pattern) => {
                    let Ok(pattern) = regex::Regex::new(&self.names.fill(pattern)?) else {
                        return case_error("grep is no regular expression");
                    };
                    body.lines().filter(|l| pattern.is_match(l)).collect::<Vec<_>>().into()
                }
                None => body.into(),
            },
        };
        Ok(json!({ "status": head.status(), "type": content_type, "body": body }))
    }
}

/// What is the same in all proxies of a TLS error: the alert, if one came.
fn alert(error: &std::io::Error) -> String {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::AlertReceived(alert)) => format!("alert {alert:?}"),
        Some(other) => other.to_string(),
        None => "closed".into(),
    }
}
