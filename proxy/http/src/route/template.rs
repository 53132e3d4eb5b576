//! Path templates (`envoy.path.match.uri_template`, `envoy.path.rewrite.uri_template`).
//!
//! `*` is one path segment, `**` the rest, `{name}` and `{name=pattern}` capture. A template becomes a regular
//! expression over the path without its query.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::extensions::path::rewrite::uri_template::v3::UriTemplateRewriteConfig;
use regex::bytes::Regex;
use sampan_core::error::{AtField, ConfigError, ConfigResult};

use crate::filter::{decode, message_name};

/// A compiled path template.
pub struct Template(Regex);

/// A compiled rewrite of what a [`Template`] captured.
pub struct TemplateRewrite(Vec<Part>);

enum Part {
    Literal(String),
    Variable(String),
}

fn invalid(template: &str) -> ConfigError {
    ConfigError::new(format!("path_match_policy.path_template {template} is invalid"))
}

impl Template {
    pub(crate) fn matching(policy: &TypedExtensionConfig) -> ConfigResult<Self> {
        let any = policy.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        if message_name(any) != "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" {
            return Err(
                ConfigError::unsupported(format!("path match type {:?}", any.type_url)).at("typed_config")
            );
        }
        let config: UriTemplateMatchConfig = decode(any)?;
        Self::parse(&config.path_template).at("typed_config.path_template")
    }

    pub(super) fn parse(template: &str) -> ConfigResult<Self> {
        if !template.starts_with('/') || template.len() > 1024 {
            return Err(invalid(template));
        }
        let mut pattern = "^".to_owned();
        let mut rest = template;
        while !rest.is_empty() {
            if let Some(tail) = rest.strip_prefix('{') {
                let end = tail.find('}').ok_or_else(|| invalid(template))?;
                let (name, inner) = tail[..end].split_once('=').unwrap_or((&tail[..end], "*"));
                let first_ok = name.starts_with(|c: char| c.is_ascii_alphabetic());
                if !first_ok
                    || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                    || name.len() > 16
                {
                    return Err(invalid(template));
                }
                pattern.push_str(&format!("(?P<{name}>"));
                let mut inner = inner;
                while !inner.is_empty() {
                    inner = token(inner, &mut pattern).ok_or_else(|| invalid(template))?;
                }
                pattern.push(')');
                rest = &tail[end + 1..];
            } else {
                rest = token(rest, &mut pattern).ok_or_else(|| invalid(template))?;
            }
        }
        pattern.push('$');
        Regex::new(&pattern).map(Self).map_err(|_| invalid(template))
    }

    pub(crate) fn matches(&self, path: &[u8]) -> bool {
        self.0.is_match(path)
    }
}

/// Characters of a path segment.
const SEGMENT: &str = r"a-zA-Z0-9\-._~%!$&'()*+,;=:@";

/// Turns the first token (`/`, `*`, `**`, a literal) into a regular expression; what is behind it, none where the
/// template is no template. A `*` within a literal stays what it is in a regular expression, as in Envoy.
fn token<'t>(rest: &'t str, pattern: &mut String) -> Option<&'t str> {
    if let Some(tail) = rest.strip_prefix('/') {
        pattern.push('/');
        return Some(tail);
    }
    if let Some(tail) = rest.strip_prefix("**") {
        pattern.push_str(&format!("[{SEGMENT}/]*"));
        return Some(tail);
    }
    if let Some(tail) = rest.strip_prefix('*') {
        pattern.push_str(&format!("[{SEGMENT}]+"));
        return Some(tail);
    }
    let end = rest.find(['/', '{', '}']).unwrap_or(rest.len());
    let (literal, tail) = rest.split_at(end);
    let valid = |c: char| c.is_ascii_alphanumeric() || "-._~%!$&'()*+,;=:@".contains(c);
    if literal.is_empty() || !literal.chars().all(valid) {
        return None;
    }
    for c in literal.chars() {
        if "$()+.".contains(c) {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    Some(tail)
}

impl TemplateRewrite {
    pub(super) fn rewriting(
        policy: &TypedExtensionConfig,
        template: Option<&Template>,
    ) -> ConfigResult<Self> {
        let any = policy.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        if message_name(any) != "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig" {
            return Err(
                ConfigError::unsupported(format!("path rewrite type {:?}", any.type_url)).at("typed_config")
            );
        }
        let config: UriTemplateRewriteConfig = decode(any)?;
        let template = template.ok_or_else(|| {
            ConfigError::new(
                "unable to use uri_template rewrite extension without uri_template match extension",
            )
        })?;
        let mut parts = Vec::new();
        let mut rest = config.path_template_rewrite.as_str();
        while !rest.is_empty() {
            let open = rest.find('{').unwrap_or(rest.len());
            if open > 0 {
                parts.push(Part::Literal(rest[..open].to_owned()));
            }
            rest = &rest[open..];
            if let Some(tail) = rest.strip_prefix('{') {
                let end = tail.find('}').ok_or_else(|| ConfigError::new("unbalanced { in rewrite"))?;
                let name = &tail[..end];
                if !template.0.capture_names().flatten().any(|n| n == name) {
                    return Err(ConfigError::new(format!("variable {name:?} is not in the match template")));
                }
                parts.push(Part::Variable(name.to_owned()));
                rest = &tail[end + 1..];
            }
        }
        Ok(Self(parts))
    }

    /// The new path for a path that the template matched.
    pub fn rewrite(&self, template: &Template, path: &[u8]) -> Option<Vec<u8>> {
        let captures = template.0.captures(path)?;
        let mut out = Vec::with_capacity(path.len());
        for part in &self.0 {
            match part {
                Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
                Part::Variable(name) => {
                    out.extend_from_slice(captures.name(name).map_or(b"", |m| m.as_bytes()))
                }
            }
        }
        Some(out)
    }
}
