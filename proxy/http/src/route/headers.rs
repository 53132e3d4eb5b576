//! `request_headers_to_add`, `response_headers_to_remove` and their kin: parsed once, applied in order.

use std::ops::Range;

use core::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher as StringMatcherMessage;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{Extensions, FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::StringMatcher;
use sampan_core::stream_info::StreamInfo;
use smallvec::SmallVec;

/// Header mutations of one level.
#[derive(Default)]
pub struct HeaderMutations {
    operations: Vec<Operation>,
    /// Each addition sees what the ones before it did; else all are evaluated before any takes effect.
    sequential: bool,
}

enum Operation {
    Remove(HeaderName),
    RemoveMatching(StringMatcher),
    Add(Addition),
}

struct Addition {
    name: HeaderName,
    value: Formatter,
    action: HeaderAppendAction,
    keep_empty: bool,
}

impl Addition {
    fn wanted(&self, headers: &HeaderMap) -> bool {
        let exists = || headers.get_name(as_stored(&self.name)).is_some();
        match self.action {
            HeaderAppendAction::AppendIfExistsOrAdd | HeaderAppendAction::OverwriteIfExistsOrAdd => true,
            HeaderAppendAction::AddIfAbsent => !exists(),
            HeaderAppendAction::OverwriteIfExists => exists(),
        }
    }

    fn put(&self, headers: &mut HeaderMap, value: &[u8]) {
        let name = as_stored(&self.name);
        if self.overwrites() {
            headers.remove_name(name);
            headers.append_name(name, value);
        } else {
            append(headers, name, value);
        }
    }

    fn overwrites(&self) -> bool {
        matches!(
            self.action,
            HeaderAppendAction::OverwriteIfExistsOrAdd | HeaderAppendAction::OverwriteIfExists
        )
    }
}

/// Headers that no configuration may set or remove.
fn forbidden(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

impl HeaderMutations {
    /// The two fields of routes, virtual hosts and so on; `side` is `request` or `response`.
    pub fn new(add: &[core::HeaderValueOption], remove: &[String], side: &str) -> ConfigResult<Self> {
        let mut operations = Vec::with_capacity(remove.len());
        for (i, name) in remove.iter().enumerate() {
            if forbidden(name) {
                return Err(ConfigError::new(":-prefixed or host headers may not be removed")
                    .index(i)
                    .at(&format!("{side}_headers_to_remove")));
            }
            operations.push(Operation::Remove(HeaderName::new(name)));
        }
        let mut all = Self::adding(add, &format!("{side}_headers_to_add"))?;
        all.operations.splice(0..0, operations);
        Ok(all)
    }

    /// Additions alone; `field` is their list.
    pub fn adding(options: &[core::HeaderValueOption], field: &str) -> ConfigResult<Self> {
        let add = |(i, option)| Operation::add(option).at_index(field, i);
        let operations = options.iter().enumerate().map(add).collect::<ConfigResult<_>>()?;
        Ok(Self { operations, sequential: false })
    }

    /// Headers that take the place of what is there; `field` is their list.
    pub fn overwriting(values: &[core::HeaderValue], field: &str) -> ConfigResult<Self> {
        let mut operations = Vec::with_capacity(values.len());
        for (i, value) in values.iter().enumerate() {
            let action = HeaderAppendAction::OverwriteIfExistsOrAdd.into();
            let option = core::HeaderValueOption {
                header: Some(value.clone()),
                append_action: action,
                ..core::HeaderValueOption::default()
            };
            operations.push(Operation::add(&option).at_index(field, i)?);
        }
        Ok(Self { operations, sequential: false })
    }

    /// The filter `header_mutation`'s list.
    pub fn from_mutations(
        messages: &[envoy_types::pb::envoy::config::common::mutation_rules::v3::HeaderMutation],
        field: &str,
    ) -> ConfigResult<Self> {
        use envoy_types::pb::envoy::config::common::mutation_rules::v3::header_mutation::Action;
        let mut operations = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            let operation = match message.action.as_ref() {
                Some(Action::Remove(name)) => Ok(Operation::Remove(HeaderName::new(name))),
                Some(Action::Append(option)) => Operation::add(option).at("append"),
                Some(Action::RemoveOnMatch(on)) => matching(on.key_matcher.as_ref()).at("remove_on_match"),
                None => Err(ConfigError::missing("action")),
            };
            operations.push(operation.at_index(field, i)?);
        }
        Ok(Self { operations, sequential: true })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// The values of additions to trailers that will come when the request's head is gone.
    pub fn values(&self, request: &HeaderMap, info: &StreamInfo) -> Values {
        let context = FormatContext { request: Some(request), ..FormatContext::new(info) };
        let value = |operation: &Operation| match operation {
            Operation::Add(addition) => {
                let mut value = Vec::new();
                addition.value.write(&context, &mut value);
                value
            }
            Operation::Remove(_) | Operation::RemoveMatching(_) => Vec::new(),
        };
        Values(self.operations.iter().map(value).collect())
    }

    /// Applies them with values made before.
    pub fn apply_values(&self, trailers: &mut HeaderMap, values: &Values) {
        for (operation, value) in self.operations.iter().zip(&values.0) {
            operation.apply(trailers, value);
        }
    }

    /// Applies them to a response's trailers.
    pub fn apply_to_trailers(
        &self,
        trailers: &mut HeaderMap,
        request: &HeaderMap,
        response: &HeaderMap,
        info: &StreamInfo,
    ) {
        for operation in &self.operations {
            let mut value = Vec::new();
            if let Operation::Add(addition) = operation {
                let context = FormatContext {
                    request: Some(request),
                    response: Some(response),
                    trailers: Some(trailers),
                    ..FormatContext::new(info)
                };
                addition.value.write(&context, &mut value);
            }
            operation.apply(trailers, &value);
        }
    }

    /// Applies them to a request.
    #[inline]
    pub fn apply_to_request(&self, request: &mut HeaderMap, info: &StreamInfo) {
        if !self.operations.is_empty() {
            self.apply(request, None, info);
        }
    }

    /// Applies them to a response.
    #[inline]
    pub fn apply_to_response(&self, response: &mut HeaderMap, request: &HeaderMap, info: &StreamInfo) {
        if !self.operations.is_empty() {
            self.apply(response, Some(request), info);
        }
    }

    /// `request` is there where `headers` are a response's.
    ///
    /// As in Envoy, values are made from the headers as they came; then what overwrites is put in place, at the end
    /// of the list, then what is added.
    fn apply(&self, headers: &mut HeaderMap, request: Option<&HeaderMap>, info: &StreamInfo) {
        let mut pending = Pending::default();
        for operation in &self.operations {
            match operation {
                Operation::Remove(name) => {
                    headers.remove_name(as_stored(name));
                }
                Operation::RemoveMatching(matcher) => {
                    headers.remove_if(|_, name, _| matcher.matches(name));
                }
                Operation::Add(addition) => {
                    pending.evaluate(addition, headers, request, info);
                    if self.sequential {
                        pending.apply(headers);
                    }
                }
            }
        }
        pending.apply(headers);
    }
}

/// Values of additions, in the order of the operations.
pub struct Values(Vec<Vec<u8>>);

/// Additions whose values are known and which have not taken effect yet.
#[derive(Default)]
struct Pending<'m> {
    additions: SmallVec<[(&'m Addition, Value<'m>); 8]>,
    text: Vec<u8>,
}

enum Value<'m> {
    Literal(&'m [u8]),
    /// Where in the buffer it stands.
    Formatted(Range<usize>),
}

impl<'m> Pending<'m> {
    fn evaluate(
        &mut self,
        addition: &'m Addition,
        headers: &HeaderMap,
        request: Option<&HeaderMap>,
        info: &StreamInfo,
    ) {
        if !addition.wanted(headers) {
            return;
        }
        let (value, empty) = match addition.value.as_literal() {
            Some(literal) => (Value::Literal(literal), literal.is_empty()),
            None => {
                let start = self.text.len();
                let context = FormatContext {
                    request: Some(request.unwrap_or(headers)),
                    response: request.is_some().then_some(headers),
                    ..FormatContext::new(info)
                };
                addition.value.write(&context, &mut self.text);
                (Value::Formatted(start..self.text.len()), self.text.len() == start)
            }
        };
        if !empty || addition.keep_empty {
            self.additions.push((addition, value));
        }
    }

    fn apply(&mut self, headers: &mut HeaderMap) {
        for overwriting in [true, false] {
            for (addition, value) in &self.additions {
                if addition.overwrites() != overwriting {
                    continue;
                }
                let value = match value {
                    Value::Literal(literal) => literal,
                    Value::Formatted(range) => &self.text[range.clone()],
                };
                addition.put(headers, value);
            }
        }
        self.additions.clear();
        self.text.clear();
    }
}

/// `host` lies in the list as `:authority`.
pub fn as_stored(name: &HeaderName) -> &HeaderName {
    static AUTHORITY: HeaderName = HeaderName::Known(HeaderId::AUTHORITY);
    if name.id() == HeaderId::HOST { &AUTHORITY } else { name }
}

fn matching(message: Option<&StringMatcherMessage>) -> ConfigResult<Operation> {
    let message = message.ok_or_else(|| ConfigError::missing("key_matcher"))?;
    Ok(Operation::RemoveMatching(StringMatcher::from_proto(message).at("key_matcher")?))
}

/// Adds another value. What Envoy keeps as inline headers, of which there can only be one, grows by a comma.
pub fn append(headers: &mut HeaderMap, name: &HeaderName, value: &[u8]) {
    match name.id() {
        HeaderId::COOKIE => headers.append_to_value(HeaderId::COOKIE, "; ", value),
        id if is_inline(id) => headers.append_to_value(id, ",", value),
        _ => headers.append_name(name, value),
    }
}

/// Whether Envoy keeps the header inline: there is only one, repeated values are joined by a comma.
pub fn is_inline(id: HeaderId) -> bool {
    id.is_pseudo()
        || id.name().starts_with("x-envoy-")
        || matches!(
            id,
            HeaderId::ACCEPT
                | HeaderId::ACCEPT_ENCODING
                | HeaderId::CACHE_CONTROL
                | HeaderId::CONNECTION
                | HeaderId::CONTENT_LENGTH
                | HeaderId::CONTENT_TYPE
                | HeaderId::DATE
                | HeaderId::EXPECT
                | HeaderId::FORWARDED
                | HeaderId::GRPC_MESSAGE
                | HeaderId::GRPC_STATUS
                | HeaderId::GRPC_TIMEOUT
                | HeaderId::HOST
                | HeaderId::KEEP_ALIVE
                | HeaderId::LOCATION
                | HeaderId::ORIGIN
                | HeaderId::PROXY_CONNECTION
                | HeaderId::REFERER
                | HeaderId::SERVER
                | HeaderId::TE
                | HeaderId::TRANSFER_ENCODING
                | HeaderId::UPGRADE
                | HeaderId::USER_AGENT
                | HeaderId::VIA
                | HeaderId::X_FORWARDED_CLIENT_CERT
                | HeaderId::X_FORWARDED_FOR
                | HeaderId::X_FORWARDED_HOST
                | HeaderId::X_FORWARDED_PORT
                | HeaderId::X_FORWARDED_PROTO
                | HeaderId::X_REQUEST_ID
        )
}

impl Operation {
    /// Applies it; `value` is that of an addition.
    fn apply(&self, headers: &mut HeaderMap, value: &[u8]) {
        match self {
            Self::Remove(name) => {
                headers.remove_name(as_stored(name));
            }
            Self::RemoveMatching(matcher) => {
                headers.remove_if(|_, name, _| matcher.matches(name));
            }
            Self::Add(addition) if addition.wanted(headers) => {
                if !value.is_empty() || addition.keep_empty {
                    addition.put(headers, value);
                }
            }
            Self::Add(_) => {}
        }
    }

    #[allow(deprecated)] // `append` is deprecated and still taken.
    fn add(option: &core::HeaderValueOption) -> ConfigResult<Self> {
        let header = option.header.as_ref().ok_or_else(|| ConfigError::missing("header"))?;
        if forbidden(&header.key) {
            return Err(ConfigError::new(":-prefixed or host headers may not be modified").at("header.key"));
        }
        if option.append.is_some() && option.append_action() != HeaderAppendAction::AppendIfExistsOrAdd {
            return Err(ConfigError::new("Both append and append_action are set and it's not allowed"));
        }
        let action = match option.append.map(|a| a.value) {
            Some(false) => HeaderAppendAction::OverwriteIfExistsOrAdd,
            Some(true) | None => option.append_action(),
        };
        let value = if header.value.is_empty() && !header.raw_value.is_empty() {
            let raw = std::str::from_utf8(&header.raw_value)
                .map_err(|_| ConfigError::unsupported("raw_value that is not UTF-8").at("header"))?;
            Formatter::parse_header_value(raw, &Extensions::NONE)
        } else {
            Formatter::parse_header_value(&header.value, &Extensions::NONE)
        };
        Ok(Self::Add(Addition {
            name: HeaderName::new(&header.key),
            value: value.at("header.value")?,
            action,
            keep_empty: option.keep_empty_value,
        }))
    }
}
