//! Tags that a configuration adds to spans and to entries of gRPC access logs. Source: `envoy/type/tracing/v3/custom_tag.proto`.
//!
//! A tag without a value is left out. The environment is read once, when the configuration is.

use std::borrow::Cow;

use envoy_types::pb::envoy::r#type::metadata::v3::metadata_key::{PathSegment, path_segment::Segment};
use envoy_types::pb::envoy::r#type::metadata::v3::metadata_kind::Kind as MetadataKind;
use envoy_types::pb::envoy::r#type::tracing::v3::{self as pb, custom_tag::Type};
use envoy_types::pb::google::protobuf::value::Kind;

use crate::error::{AtField, ConfigError, ConfigResult};
use crate::format::{Extensions, FormatContext, Formatter, write_json_value};
use crate::header::HeaderName;
use crate::stream_info::{Metadata, StreamInfo};

/// One tag.
#[derive(Debug)]
pub struct CustomTag {
    name: Box<str>,
    what: What,
}

#[derive(Debug)]
enum What {
    Fixed(Box<str>),
    Header {
        name: HeaderName,
        default: Box<str>,
    },
    Metadata {
        of: fn(&StreamInfo) -> Option<&Metadata>,
        filter: Box<str>,
        path: Vec<Box<str>>,
        default: Box<str>,
    },
    Format(Formatter),
}

impl CustomTag {
    /// From the message.
    pub fn from_proto(message: &pb::CustomTag) -> ConfigResult<Self> {
        let what = match &message.r#type {
            Some(Type::Literal(literal)) => What::Fixed(literal.value.as_str().into()),
            Some(Type::Environment(variable)) => {
                let value = std::env::var(&variable.name);
                What::Fixed(value.map_or_else(|_| variable.default_value.as_str().into(), String::into))
            }
            Some(Type::RequestHeader(header)) => What::Header {
                name: HeaderName::new(header.name.to_ascii_lowercase()),
                default: header.default_value.as_str().into(),
            },
            Some(Type::Metadata(metadata)) => Self::metadata(metadata).at("metadata")?,
            Some(Type::Value(format)) => {
                What::Format(Formatter::parse_header_value(format, &Extensions::NONE).at("value")?)
            }
            None => return Err(ConfigError::missing("type")),
        };
        Ok(Self { name: message.tag.as_str().into(), what })
    }

    /// From a repeated field.
    pub fn list_from_proto(messages: &[pb::CustomTag], field: &str) -> ConfigResult<Vec<Self>> {
        messages.iter().enumerate().map(|(i, m)| Self::from_proto(m).at_index(field, i)).collect()
    }

    fn metadata(message: &pb::custom_tag::Metadata) -> ConfigResult<What> {
        let of: fn(&StreamInfo) -> Option<&Metadata> = match message.kind.as_ref().and_then(|kind| kind.kind)
        {
            Some(MetadataKind::Request(_)) => |info| info.dynamic_metadata.as_deref(),
            Some(MetadataKind::Route(_)) => |info| info.route_metadata.as_deref(),
            Some(MetadataKind::Cluster(_)) => |info| info.cluster_metadata.as_deref(),
            Some(MetadataKind::Host(_)) => |info| info.upstream.as_ref()?.host_metadata.as_deref(),
            None => return Err(ConfigError::missing("kind")),
        };
        let key = message.metadata_key.as_ref().ok_or_else(|| ConfigError::missing("metadata_key"))?;
        let segment = |(i, segment): (usize, &PathSegment)| match &segment.segment {
            Some(Segment::Key(key)) => Ok(key.as_str().into()),
            Some(Segment::Index(_)) => {
                Err(ConfigError::unsupported("this field").at("index").index(i).at("path").at("metadata_key"))
            }
            None => Err(ConfigError::missing("segment").index(i).at("path").at("metadata_key")),
        };
        Ok(What::Metadata {
            of,
            filter: key.key.as_str().into(),
            path: key.path.iter().enumerate().map(segment).collect::<ConfigResult<_>>()?,
            default: message.default_value.as_str().into(),
        })
    }

    /// The tag's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its value for a stream.
    pub fn value<'a>(&'a self, context: &FormatContext<'a>) -> Option<Cow<'a, str>> {
        let text = match &self.what {
            What::Fixed(text) => Cow::Borrowed(&**text),
            What::Header { name, default } => {
                match context.request.and_then(|headers| headers.get_name(name)) {
                    Some(value) => sanitized(value),
                    None => Cow::Borrowed(&**default),
                }
            }
            What::Metadata { of, filter, path, default } => {
                // A text that is there counts although it is empty.
                match metadata_text(of(context.info), filter, path) {
                    Some(text) => return Some(text.into()),
                    None => Cow::Borrowed(&**default),
                }
            }
            What::Format(format) => {
                let mut out = Vec::new();
                format.write(context, &mut out);
                sanitized(&out).into_owned().into()
            }
        };
        Some(text).filter(|text| !text.is_empty())
    }
}

fn metadata_text(metadata: Option<&Metadata>, filter: &str, path: &[Box<str>]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    let mut value = metadata?.get(filter)?.fields.get(&**first)?;
    for key in rest {
        let Some(Kind::StructValue(inner)) = &value.kind else { return None };
        value = inner.fields.get(&**key)?;
    }
    match value.kind.as_ref()? {
        Kind::BoolValue(truth) => Some(truth.to_string()),
        Kind::NumberValue(number) => Some(crate::stats::number::general(*number, 6)),
        Kind::StringValue(text) => Some(text.clone()),
        Kind::ListValue(_) | Kind::StructValue(_) => {
            let mut out = Vec::new();
            write_json_value(value, &mut out);
            String::from_utf8(out).ok()
        }
        Kind::NullValue(_) => None,
    }
}

/// Text of bytes that may be none: what is not UTF-8 becomes `!`, byte by byte, as in Envoy.
pub fn sanitized(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.into();
    }
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| '!'));
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_marked() {
        assert_eq!(sanitized(b"plain"), "plain");
        assert_eq!(sanitized(b"a\xff\xfeb\xc3\xa9"), "a!!b\u{e9}");
    }

    #[test]
    fn numbers_and_truths_of_metadata_are_texts() {
        use envoy_types::pb::google::protobuf::{Struct, Value};
        let value = |kind| Value { kind: Some(kind) };
        let inner = Struct { fields: [("n".into(), value(Kind::NumberValue(1.5)))].into() };
        let fields =
            [("b".into(), value(Kind::BoolValue(true))), ("s".into(), value(Kind::StructValue(inner)))];
        let metadata = Metadata::from([("f".to_owned(), Struct { fields: fields.into() })]);
        let text = |path: &[&str]| {
            let path: Vec<Box<str>> = path.iter().map(|key| (*key).into()).collect();
            metadata_text(Some(&metadata), "f", &path)
        };
        assert_eq!(text(&["b"]).as_deref(), Some("true"));
        assert_eq!(text(&["s", "n"]).as_deref(), Some("1.5"));
        assert_eq!(text(&["s"]).as_deref(), Some("{\"n\":1.5}"));
        assert_eq!(text(&["b", "n"]), None);
        assert_eq!(text(&["x"]), None);
    }
}
