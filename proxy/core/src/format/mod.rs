//! The substitution formatter: `%REQ(:METHOD)%` and its kin in access logs, local replies and header values.
//!
//! A format is parsed once into pieces; writing one appends to the caller's buffer and allocates nothing more,
//! but for the operators that must build their value (decoded query parameters, typed filter state). Text shows
//! a missing value as `-`, or as nothing with `omit_empty_values`; JSON shows it as `null`, or leaves the key out.
//!
//! Three properties of the output, all Envoy 1.40's, are worth knowing. The text format writes values as they
//! are: a header's tab or quote goes into the line raw (line breaks cannot be in a header, and the requested
//! server name, which once could carry them, is cleaned). JSON keys are sorted. A JSON value that consists of
//! one operator keeps its type; any other is a string.
//!
//! Sources: Envoy's `configuration/observability/access_log/usage`, `core.v3.SubstitutionFormatString`, and
//! Envoy 1.40's own output for each operator.

mod command;
mod json;
mod op;
mod parse;
mod plain;
mod time;
mod value;

#[cfg(test)]
mod tests;

use envoy_types::pb::envoy::config::core::v3 as pb;
use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use envoy_types::pb::google::protobuf::Struct;

use self::json::{JsonNode, escape_tail, write_node};
use self::op::Op;
use self::parse::{parse_struct, parse_text};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::header::HeaderMap;
use crate::stream_info::StreamInfo;

pub use self::plain::stream_id;
pub use self::value::{grpc_status_of, is_grpc_request};

pub use self::json::{write_json_number, write_json_string, write_json_value};

/// What a format may read. A TCP connection has no headers.
#[derive(Clone, Copy)]
pub struct FormatContext<'a> {
    /// The request as it is (after normalisation and filters).
    pub request: Option<&'a HeaderMap>,
    /// The response.
    pub response: Option<&'a HeaderMap>,
    /// The response's trailers.
    pub trailers: Option<&'a HeaderMap>,
    /// All else.
    pub info: &'a StreamInfo,
    /// The body of a local reply, for its own format.
    pub local_reply_body: &'a [u8],
    /// Why the line is written.
    pub log_type: AccessLogType,
}

impl<'a> FormatContext<'a> {
    /// A context with nothing but the stream.
    pub fn new(info: &'a StreamInfo) -> Self {
        Self {
            request: None,
            response: None,
            trailers: None,
            info,
            local_reply_body: b"",
            log_type: AccessLogType::NotSet,
        }
    }
}

/// The formatter extensions a configuration asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extensions {
    /// `envoy.formatter.req_without_query`
    req_without_query: bool,
}

impl Extensions {
    /// Those that are always there.
    pub const NONE: Self = Self { req_without_query: false };

    /// From a `formatters` field; an extension that Sampan does not have is refused by name.
    pub fn from_proto(formatters: &[pb::TypedExtensionConfig], field: &str) -> ConfigResult<Self> {
        let mut all = Self::NONE;
        for (i, formatter) in formatters.iter().enumerate() {
            let url = formatter.typed_config.as_ref().map_or("", |any| any.type_url.as_str());
            match url.rsplit('/').next().unwrap_or_default() {
                "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery" => {
                    all.req_without_query = true;
                }
                "envoy.extensions.formatter.metadata.v3.Metadata" => {}
                _ => {
                    let e = ConfigError::unsupported(format!("formatter '{}' ({url})", formatter.name));
                    return Err(e.index(i).at(field));
                }
            }
        }
        Ok(all)
    }
}

/// A part of a text format.
#[derive(Debug)]
enum Piece {
    Literal(Vec<u8>),
    Op(Op),
}

/// A parsed format.
#[derive(Debug)]
pub struct Formatter {
    what: What,
    omit_empty: bool,
}

#[derive(Debug)]
enum What {
    Text(Vec<Piece>),
    Json(JsonNode),
}

impl Formatter {
    /// A text format.
    pub fn parse(text: &str, extensions: &Extensions) -> ConfigResult<Self> {
        Ok(Self { what: What::Text(parse_text(text, *extensions)?), omit_empty: false })
    }

    /// The value of a header mutation: what is missing is empty, not `-`.
    pub fn parse_header_value(text: &str, extensions: &Extensions) -> ConfigResult<Self> {
        Ok(Self { omit_empty: true, ..Self::parse(text, extensions)? })
    }

    /// A JSON format; each line ends with a line feed.
    pub fn parse_json(format: &Struct, omit_empty: bool, extensions: &Extensions) -> ConfigResult<Self> {
        Ok(Self { what: What::Json(parse_struct(format, *extensions)?), omit_empty })
    }

    /// From the message. `content_type` is for local replies and read by them.
    #[allow(deprecated)] // `text_format` is deprecated and still taken.
    pub fn from_proto(message: &pb::SubstitutionFormatString) -> ConfigResult<Self> {
        use pb::substitution_format_string::Format as F;
        let extensions = Extensions::from_proto(&message.formatters, "formatters")?;
        let mut formatter = match &message.format {
            None => return Err(ConfigError::missing("format")),
            Some(F::TextFormat(text)) => Self::parse(text, &extensions).at("text_format")?,
            Some(F::TextFormatSource(source)) => {
                let text = read_source(source).at("text_format_source")?;
                Self::parse(&text, &extensions).at("text_format_source")?
            }
            Some(F::JsonFormat(format)) => {
                return Self::parse_json(format, message.omit_empty_values, &extensions).at("json_format");
            }
        };
        formatter.omit_empty = message.omit_empty_values;
        Ok(formatter)
    }

    /// Appends the formatted text; JSON with its line feed.
    pub fn write(&self, context: &FormatContext<'_>, out: &mut Vec<u8>) {
        match &self.what {
            What::Text(pieces) => write_pieces(pieces, context, self.omit_empty, false, out),
            What::Json(node) => {
                let start = out.len();
                if !write_node(node, context, self.omit_empty, out) {
                    out.truncate(start);
                    out.extend_from_slice(b"{}");
                }
                out.push(b'\n');
            }
        }
    }

    /// The text, where the format holds no operator: who sets headers can skip formatting.
    pub fn as_literal(&self) -> Option<&[u8]> {
        match &self.what {
            What::Text(pieces) => match pieces.as_slice() {
                [] => Some(b""),
                [Piece::Literal(text)] => Some(text),
                _ => None,
            },
            What::Json(_) => None,
        }
    }

    /// Whether the format is one operator and nothing else.
    pub fn is_one_operator(&self) -> bool {
        matches!(&self.what, What::Text(pieces) if matches!(pieces.as_slice(), [Piece::Op(_)]))
    }

    /// Whether this is a JSON format.
    pub fn is_json(&self) -> bool {
        matches!(self.what, What::Json(_))
    }
}

/// Writes text pieces; `escape` makes each value fit for a JSON string.
fn write_pieces(
    pieces: &[Piece],
    context: &FormatContext<'_>,
    omit_empty: bool,
    escape: bool,
    out: &mut Vec<u8>,
) {
    for piece in pieces {
        let start = out.len();
        match piece {
            Piece::Literal(text) => out.extend_from_slice(text),
            Piece::Op(op) => {
                if !op.write(context, out) {
                    out.truncate(start);
                    if !omit_empty {
                        out.push(b'-');
                    }
                }
            }
        }
        if escape {
            escape_tail(out, start);
        }
    }
}

/// Two lower-case digits for each byte.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(out, "{byte:02x}");
    }
    out
}

/// The text of a `DataSource`.
pub fn read_source(source: &pb::DataSource) -> ConfigResult<String> {
    use pb::data_source::Specifier as S;
    let text = |bytes: Vec<u8>| {
        String::from_utf8(bytes).map_err(|_| ConfigError::new("the data source is not valid UTF-8"))
    };
    match &source.specifier {
        None => Err(ConfigError::missing("specifier")),
        Some(S::InlineString(s)) => Ok(s.clone()),
        Some(S::InlineBytes(b)) => text(b.clone()).at("inline_bytes"),
        Some(S::Filename(name)) => std::fs::read(name)
            .map_err(|e| ConfigError::new(format!("unable to read file {name}: {e}")))
            .and_then(text)
            .at("filename"),
        Some(S::EnvironmentVariable(name)) => std::env::var(name)
            .map_err(|_| ConfigError::new(format!("Environment variable doesn't exist: {name}")))
            .at("environment_variable"),
    }
}
