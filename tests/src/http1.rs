//! HTTP/1 as seen on the wire: heads kept line by line, in order and case, bodies decoded.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::net::{Wire, text};

/// A request's or response's head.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// All lines without their ends, the start line first.
    pub lines: Vec<String>,
}

impl Head {
    /// Reads one; `None` when the peer ended it first.
    pub async fn read(wire: &mut Wire) -> Option<Head> {
        let mut lines = Vec::new();
        loop {
            let line = text(&wire.line().await?);
            let line = line.trim_end_matches(['\r', '\n']).to_owned();
            match (line.is_empty(), lines.is_empty()) {
                (true, false) => return Some(Head { lines }),
                // An empty line before the start line is to be ignored (RFC 9112, 2.2).
                (true, true) => {}
                (false, _) => lines.push(line),
            }
        }
    }

    /// The words of the start line.
    pub fn start(&self, word: usize) -> &str {
        self.lines.first().and_then(|l| l.split(' ').nth(word)).unwrap_or_default()
    }

    /// Status of a response.
    pub fn status(&self) -> u16 {
        self.start(1).parse().unwrap_or(0)
    }

    /// The first value of a header.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.lines.iter().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    fn chunked(&self) -> bool {
        self.get("transfer-encoding").is_some_and(|v| v.to_ascii_lowercase().contains("chunked"))
    }

    fn length(&self) -> Option<usize> {
        self.get("content-length")?.parse().ok()
    }
}

/// A body and what came after it.
#[derive(Debug, Clone, Default)]
pub struct Body {
    /// The decoded bytes.
    pub bytes: Vec<u8>,
    /// Trailer lines.
    pub trailers: Vec<String>,
    /// It came to its proper end.
    pub complete: bool,
}

impl Body {
    /// Reads a request's body.
    pub async fn of_request(wire: &mut Wire, head: &Head) -> Body {
        if head.chunked() {
            Body::chunks(wire).await
        } else {
            Body::counted(wire, head.length().unwrap_or(0)).await
        }
    }

    /// Reads the body of the response to `method`.
    pub async fn of_response(wire: &mut Wire, head: &Head, method: &str) -> Body {
        let status = head.status();
        if method == "HEAD" || status == 204 || status == 304 || (100..200).contains(&status) {
            Body { complete: true, ..Body::default() }
        } else if head.chunked() {
            Body::chunks(wire).await
        } else if let Some(length) = head.length() {
            Body::counted(wire, length).await
        } else {
            while wire.fill().await {}
            let bytes = wire.buf.split().to_vec();
            Body { bytes, complete: true, ..Body::default() }
        }
    }

    async fn counted(wire: &mut Wire, length: usize) -> Body {
        let bytes = wire.take(length).await;
        Body { complete: bytes.len() == length, bytes, ..Body::default() }
    }

    async fn chunks(wire: &mut Wire) -> Body {
        let mut body = Body::default();
        while let Some(line) = wire.line().await {
            let line = text(&line);
            let size = line.trim().split(';').next().unwrap_or_default();
            let Ok(size) = usize::from_str_radix(size, 16) else { return body };
            if size == 0 {
                while let Some(line) = wire.line().await {
                    let line = text(&line).trim_end().to_owned();
                    if line.is_empty() {
                        body.complete = true;
                        break;
                    }
                    body.trailers.push(line);
                }
                return body;
            }
            let bytes = wire.take(size).await;
            let whole = bytes.len() == size;
            body.bytes.extend(bytes);
            if !whole || wire.line().await.is_none() {
                return body;
            }
        }
        body
    }
}

/// Header names and values in order, from a case file: a list repeats the name.
pub fn fields(map: &Map<String, Value>) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    for (name, value) in map {
        match value {
            Value::Array(values) => fields.extend(values.iter().map(|v| (name.clone(), scalar(v)))),
            value => fields.push((name.clone(), scalar(value))),
        }
    }
    fields
}

/// A scalar as text.
pub fn scalar(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Header lines by lower-case name, for expectations; repeated ones are joined with ` | `.
pub fn by_name<'a>(lines: impl Iterator<Item = &'a String>) -> Value {
    let mut map = BTreeMap::<String, String>::new();
    for line in lines {
        let colon = line.char_indices().skip(1).find(|(_, c)| *c == ':').map_or(line.len(), |(at, _)| at);
        let (name, value) = line.split_at(colon);
        let value = value.trim_start_matches(':').trim();
        map.entry(name.to_ascii_lowercase())
            .and_modify(|v| {
                v.push_str(" | ");
                v.push_str(value);
            })
            .or_insert_with(|| value.to_owned());
    }
    json!(map)
}
