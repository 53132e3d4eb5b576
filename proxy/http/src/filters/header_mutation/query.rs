//! Mutations of query parameters. As in Envoy, a query that is changed comes back sorted by name and with what was
//! there decoded; only values that a mutation sets are encoded.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::value::Kind;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{Extensions, FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::matcher::percent_decoded;
use sampan_core::stream_info::StreamInfo;

use core::key_value_append::KeyValueAppendAction as Action;

/// `query_parameter_mutations`
pub(super) struct QueryMutations(Vec<Mutation>);

enum Mutation {
    Remove(Vec<u8>),
    Append { name: Vec<u8>, value: Formatter, action: Action },
}

pub(in crate::filters) type Parameters = BTreeMap<Vec<u8>, Vec<Vec<u8>>>;

impl QueryMutations {
    pub(super) fn from_proto(messages: &[core::KeyValueMutation]) -> ConfigResult<Self> {
        let parse = |(i, m)| Mutation::from_proto(m).at_index("query_parameter_mutations", i);
        Ok(Self(messages.iter().enumerate().map(parse).collect::<ConfigResult<_>>()?))
    }

    pub(super) fn apply(&self, request: &mut HeaderMap, info: &StreamInfo) {
        if self.0.is_empty() {
            return;
        }
        let decoded = |text: &[u8]| percent_decoded(text).into_owned();
        let Some((path, mut parameters)) = split(request, decoded) else { return };
        for mutation in &self.0 {
            mutation.apply(&mut parameters, request, info);
        }
        join(request, path, &parameters);
    }
}

/// Changes a request's query, whose parameters come as they are: encoded.
pub(in crate::filters) fn rewrite(request: &mut HeaderMap, change: impl FnOnce(&mut Parameters)) {
    let Some((path, mut parameters)) = split(request, <[u8]>::to_vec) else { return };
    change(&mut parameters);
    join(request, path, &parameters);
}

/// The path before its query, and the query.
fn split(request: &HeaderMap, read: fn(&[u8]) -> Vec<u8>) -> Option<(Vec<u8>, Parameters)> {
    let path = request.get(HeaderId::PATH)?;
    let (path, query) = match path.iter().position(|c| *c == b'?') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (path, &b""[..]),
    };
    Some((path.to_vec(), parse(query, read)))
}

fn join(request: &mut HeaderMap, mut path: Vec<u8>, parameters: &Parameters) {
    let mut separator = b'?';
    for (name, values) in parameters {
        for value in values {
            path.push(separator);
            path.extend_from_slice(name);
            path.push(b'=');
            path.extend_from_slice(value);
            separator = b'&';
        }
    }
    request.set(HeaderId::PATH, path);
}

impl Mutation {
    fn from_proto(message: &core::KeyValueMutation) -> ConfigResult<Self> {
        match (&message.append, message.remove.as_str()) {
            (Some(_), remove) if !remove.is_empty() => {
                Err(ConfigError::new("Only one of 'append'/'remove can be specified."))
            }
            (Some(append), _) => Self::append(append).at("append"),
            (None, "") => Err(ConfigError::new("One of 'append'/'remove' must be specified.")),
            (None, name) => Ok(Self::Remove(name.into())),
        }
    }

    fn append(message: &core::KeyValueAppend) -> ConfigResult<Self> {
        let Some(record) = &message.record else {
            return Err(ConfigError::new("No record specified for append mutation."));
        };
        let Some(Kind::StringValue(value)) = record.value.as_ref().and_then(|v| v.kind.as_ref()) else {
            let reason = "Only string value is allowed for record value.";
            return Err(ConfigError::new(reason).at("value").at("record"));
        };
        let value = Formatter::parse_header_value(value, &Extensions::NONE);
        Ok(Self::Append {
            name: record.key.as_str().into(),
            value: value.at("value").at("record")?,
            action: message.action(),
        })
    }

    fn apply(&self, parameters: &mut Parameters, request: &HeaderMap, info: &StreamInfo) {
        let (name, format, action) = match self {
            Self::Remove(name) => {
                parameters.remove(name);
                return;
            }
            Self::Append { name, value, action } => (name, value, *action),
        };
        let exists = parameters.contains_key(name);
        let wanted = match action {
            Action::AppendIfExistsOrAdd | Action::OverwriteIfExistsOrAdd => true,
            Action::AddIfAbsent => !exists,
            Action::OverwriteIfExists => exists,
        };
        if !wanted {
            return;
        }
        let mut value = Vec::new();
        format.write(&FormatContext { request: Some(request), ..FormatContext::new(info) }, &mut value);
        let values = parameters.entry(name.clone()).or_default();
        if matches!(action, Action::OverwriteIfExists | Action::OverwriteIfExistsOrAdd) {
            values.clear();
        }
        values.push(encoded(&value));
    }
}

/// A query's parameters. A name without `=` has an empty value.
fn parse(query: &[u8], read: fn(&[u8]) -> Vec<u8>) -> Parameters {
    let mut parameters = Parameters::new();
    let mut rest = query;
    while !rest.is_empty() {
        let (part, behind) = match rest.iter().position(|c| *c == b'&') {
            Some(at) => (&rest[..at], &rest[at + 1..]),
            None => (rest, &b""[..]),
        };
        let (name, value) = match part.iter().position(|c| *c == b'=') {
            Some(at) => (&part[..at], &part[at + 1..]),
            None => (part, &b""[..]),
        };
        parameters.entry(read(name)).or_default().push(read(value));
        rest = behind;
    }
    parameters
}

/// `%XX` for all but letters, digits and `*-._`.
pub(in crate::filters) fn encoded(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    for byte in value {
        if byte.is_ascii_alphanumeric() || b"*-._".contains(byte) {
            out.push(*byte);
        } else {
            let digit = |d: u8| if d < 10 { b'0' + d } else { b'A' + d - 10 };
            out.extend_from_slice(&[b'%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_parts_count_but_the_last() {
        let parse = |query| parse(query, <[u8]>::to_vec);
        let parameters = parse(b"&=x&=&q==1&a");
        assert_eq!(parameters[&b""[..]], [&b""[..], b"x", b""]);
        assert_eq!(parameters[&b"q"[..]], [b"=1"]);
        assert_eq!(parameters[&b"a"[..]], [b""]);
        assert!(parse(b"").is_empty());
        assert_eq!(parse(b"a&").len(), 1);
    }

    #[test]
    fn what_is_encoded() {
        assert_eq!(encoded(b"aZ9*-._ ~%/\xe9"), b"aZ9*-._%20%7E%25%2F%E9");
    }
}
