//! What a route makes of a request's path and host.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_action::HostRewriteSpecifier;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{Extensions, FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::RegexRewrite;
use sampan_core::stream_info::StreamInfo;

use super::matching::{RouteMatch, without_query};
use super::template::TemplateRewrite;

/// How the path changes; the query stays as it is.
pub(super) enum PathRewrite {
    Prefix(Box<[u8]>),
    Regex(RegexRewrite),
    Template(TemplateRewrite),
    /// `path_rewrite`; nothing changes where it comes out empty.
    Format(Formatter),
}

/// How the host changes.
pub(super) enum HostRewrite {
    Literal(Box<str>),
    Header(HeaderName),
    PathRegex(RegexRewrite),
    Format(Formatter),
    /// `auto_host_rewrite`: the name of the host that was picked.
    Auto,
}

fn formatted(format: &Formatter, headers: &HeaderMap, info: &StreamInfo) -> Vec<u8> {
    let mut out = Vec::new();
    format.write(&FormatContext { request: Some(headers), ..FormatContext::new(info) }, &mut out);
    out
}

impl PathRewrite {
    /// The one of the four fields that is set.
    pub(super) fn from_proto(message: &pb::RouteAction, matching: &RouteMatch) -> ConfigResult<Option<Self>> {
        let set = [
            !message.prefix_rewrite.is_empty(),
            message.regex_rewrite.is_some(),
            message.path_rewrite_policy.is_some(),
            !message.path_rewrite.is_empty(),
        ];
        if set.iter().filter(|set| **set).count() > 1 {
            return Err(ConfigError::new(
                "Specify only one of prefix_rewrite, regex_rewrite or path_rewrite_policy",
            ));
        }
        if let Some(regex) = &message.regex_rewrite {
            return Ok(Some(Self::Regex(RegexRewrite::from_proto(regex).at("regex_rewrite")?)));
        }
        if let Some(policy) = &message.path_rewrite_policy {
            let rewrite = TemplateRewrite::rewriting(policy, matching.template());
            return Ok(Some(Self::Template(rewrite.at("path_rewrite_policy")?)));
        }
        if !message.path_rewrite.is_empty() {
            let format = Formatter::parse_header_value(&message.path_rewrite, &Extensions::NONE);
            return Ok(Some(Self::Format(format.at("path_rewrite")?)));
        }
        Ok(set[0].then(|| Self::Prefix(message.prefix_rewrite.as_bytes().into())))
    }

    /// The new path, query included; none where it stays.
    pub(super) fn rewrite(
        &self,
        matching: &RouteMatch,
        headers: &HeaderMap,
        info: &StreamInfo,
    ) -> Option<Vec<u8>> {
        let path = headers.get(HeaderId::PATH)?;
        let just_path = without_query(path);
        let mut new = match self {
            Self::Prefix(prefix) => [prefix, &just_path[matching.matched(just_path)?..]].concat(),
            Self::Regex(regex) => regex.replace(just_path)?,
            Self::Template(rewrite) => rewrite.rewrite(matching.template()?, just_path)?,
            Self::Format(format) => Some(formatted(format, headers, info)).filter(|new| !new.is_empty())?,
        };
        new.extend_from_slice(&path[just_path.len()..]);
        Some(new)
    }
}

impl HostRewrite {
    pub(super) fn from_proto(message: &pb::RouteAction) -> ConfigResult<Option<Self>> {
        use HostRewriteSpecifier as H;
        Ok(match &message.host_rewrite_specifier {
            None => None,
            Some(H::HostRewriteLiteral(host)) => Some(Self::Literal(host.as_str().into())),
            Some(H::AutoHostRewrite(on)) => on.value.then_some(Self::Auto),
            Some(H::HostRewriteHeader(name)) => Some(Self::Header(HeaderName::new(name))),
            Some(H::HostRewritePathRegex(regex)) => {
                Some(Self::PathRegex(RegexRewrite::from_proto(regex).at("host_rewrite_path_regex")?))
            }
            Some(H::HostRewrite(text)) => {
                Some(Self::Format(Formatter::parse(text, &Extensions::NONE).at("host_rewrite")?))
            }
        })
    }

    /// The new host; none where it stays, or is known only once an upstream host was picked.
    pub(super) fn rewrite(&self, headers: &HeaderMap, info: &StreamInfo) -> Option<Cow<'_, [u8]>> {
        let new = match self {
            Self::Literal(host) => return Some(Cow::Borrowed(host.as_bytes())),
            Self::Header(name) => headers.get_name(name)?.to_vec(),
            Self::PathRegex(regex) => {
                let path = without_query(headers.get(HeaderId::PATH)?);
                return Some(Cow::Owned(regex.replace(path).unwrap_or_else(|| path.to_vec())));
            }
            Self::Format(format) => formatted(format, headers, info),
            Self::Auto => return None,
        };
        (!new.is_empty()).then_some(Cow::Owned(new))
    }
}
