//! Ports and paths of one run under symbolic names, so that a case file holds none and two runs can be compared.
//!
//! `{{listener.X}}`, `{{control_plane}}` and `{{admin}}` are allocated at first use, `{{closed.X}}` is a port that refuses connections,
//! `{{upstream.X}}` is set when the upstream listens, `{{dir}}`, `{{certs}}` and `{{log}}` are paths, `{{pem.X}}` is the text of
//! the file X of `{{certs}}`,
//! `{{host_ip}}` is the machine's own address. After the run every known
//! number goes back to its name, any other port of a loopback address becomes `PORT`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};

use regex::{Captures, Regex};
use serde_json::{Map, Value};
use socket2::{Domain, Socket, Type};

use crate::error::{Context, Error, Result, case_error};

static PLACEHOLDER: LazyLock<Regex> = LazyLock::new(|| regex(r"\{\{([A-Za-z0-9_.-]+)\}\}"));
static LOOPBACK: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(127\.\d+\.\d+\.\d+|\[::1\]|\[::ffff:127\.0\.0\.1\]):(\d{4,5})\b"));
static NUMBER: LazyLock<Regex> = LazyLock::new(|| regex(r"\d+"));
static NEXT_PORT: LazyLock<AtomicU16> =
    LazyLock::new(|| AtomicU16::new(10_000 + (std::process::id() % 100) as u16 * 200));

/// A regular expression that is part of the program.
pub fn regex(pattern: &str) -> Regex {
    #[expect(clippy::expect_used, reason = "the pattern is a constant of the program")]
    Regex::new(pattern).expect("valid pattern")
}

/// The names of one run.
#[derive(Default)]
pub struct Names {
    values: RefCell<BTreeMap<String, String>>,
    refusing: RefCell<Vec<Socket>>,
}

impl Names {
    /// Sets a name.
    pub fn set(&self, name: impl Into<String>, value: impl ToString) {
        self.values.borrow_mut().insert(name.into(), value.to_string());
    }

    /// The value of a name; ports are allocated at first use.
    pub fn get(&self, name: &str) -> Result<String> {
        if let Some(value) = self.values.borrow().get(name) {
            return Ok(value.clone());
        }
        if let (Some(file), Some(certs)) = (name.strip_prefix("pem."), self.values.borrow().get("certs")) {
            return std::fs::read_to_string(format!("{certs}/{file}")).trying(format!("read {file}"));
        }
        let port = if name == "admin" || name.starts_with("listener.") || name.starts_with("control_plane") {
            free_port()?
        } else if name.starts_with("closed.") {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).trying("socket")?;
            let port = free_port()?;
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
            socket.bind(&address.into()).trying("bind")?;
            self.refusing.borrow_mut().push(socket);
            port
        } else {
            return case_error(format!("nothing is called {name}"));
        };
        self.set(name, port);
        Ok(port.to_string())
    }

    /// Puts values in the place of names.
    pub fn fill(&self, text: &str) -> Result<String> {
        let mut failure = None;
        let filled = PLACEHOLDER.replace_all(text, |found: &Captures| {
            self.get(&found[1]).unwrap_or_else(|error| {
                failure = Some(error);
                String::new()
            })
        });
        failure.map_or(Ok(filled.into_owned()), Err)
    }

    /// The same for a tree; a string that is nothing but the name of a port becomes a number.
    pub fn fill_tree(&self, tree: &Value) -> Result<Value> {
        Ok(match tree {
            Value::String(text) => {
                let filled = self.fill(text)?;
                let whole = text.starts_with("{{") && text.find("}}") == Some(text.len() - 2);
                match filled.parse::<u16>() {
                    Ok(port) if whole => port.into(),
                    _ => filled.into(),
                }
            }
            Value::Array(items) => items.iter().map(|v| self.fill_tree(v)).collect::<Result<_>>()?,
            Value::Object(map) => {
                let mut filled = Map::new();
                for (key, value) in map {
                    filled.insert(self.fill(key)?, self.fill_tree(value)?);
                }
                filled.into()
            }
            other => other.clone(),
        })
    }

    /// Puts names in the place of values.
    pub fn hide(&self, text: &str) -> String {
        let values = self.values.borrow();
        let mut text = text.to_owned();
        for name in ["log", "dir", "certs", "host_ip"] {
            if let Some(path) = values.get(name) {
                text = text.replace(path.as_str(), &format!("{{{{{name}}}}}"));
            }
        }
        let named =
            |number: &str| values.iter().find(|(_, v)| *v == number).map(|(k, _)| format!("{{{{{k}}}}}"));
        let text =
            NUMBER.replace_all(&text, |found: &Captures| named(&found[0]).unwrap_or_else(|| found[0].into()));
        LOOPBACK.replace_all(&text, "$1:PORT").into_owned()
    }

    /// The same for a tree.
    pub fn hide_tree(&self, tree: &Value) -> Value {
        match tree {
            Value::String(text) => self.hide(text).into(),
            Value::Number(number) => {
                let number = number.to_string();
                let hidden = if number.len() == 5 { self.hide(&number) } else { number.clone() };
                if hidden == number { tree.clone() } else { hidden.into() }
            }
            Value::Array(items) => items.iter().map(|v| self.hide_tree(v)).collect(),
            Value::Object(map) => {
                map.iter().map(|(k, v)| (self.hide(k), self.hide_tree(v))).collect::<Map<_, _>>().into()
            }
            other => other.clone(),
        }
    }
}

/// The address that a proxy takes for its own, as Envoy finds it: the first of an interface that is not the loopback.
pub fn host_address() -> Option<String> {
    let interfaces = nix::ifaddrs::getifaddrs().ok()?;
    let mut addresses = interfaces.filter_map(|i| Some(i.address?.as_sockaddr_in()?.ip()));
    addresses.find(|ip| !ip.is_loopback()).map(|ip| ip.to_string())
}

/// A port that nobody uses, below the ephemeral range so that no client's socket takes it meanwhile.
fn free_port() -> Result<u16> {
    for _ in 0..2000 {
        let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        if port >= 32_000 {
            NEXT_PORT.store(10_000, Ordering::Relaxed);
            continue;
        }
        // Round numbers are timeouts and sizes in the cases; they must not be taken for a port's name.
        if port.is_multiple_of(100) {
            continue;
        }
        if TcpListener::bind(("0.0.0.0", port)).is_ok() && TcpListener::bind(("::1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(Error::Subject("no free port".into()))
}
