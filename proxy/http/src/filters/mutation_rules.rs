//! `HeaderMutationRules`: which headers a service outside may change.
//! Source: `config/common/mutation_rules/v3/mutation_rules.proto`.

use envoy_types::pb::envoy::config::common::mutation_rules::v3 as pb;
use envoy_types::pb::google::protobuf::BoolValue;
use sampan_core::error::{AtField, ConfigResult};
use sampan_core::header::{HeaderId, HeaderName, authority_is_valid};
use sampan_core::matcher::Regex;

/// What is about to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Set,
    Append,
    Remove,
}

/// What the rules say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ruling {
    Done,
    /// It is left undone.
    Ignored,
    /// All of the answer is bad.
    Failed,
}

/// The rules, parsed.
pub(super) struct MutationRules {
    all_routing: bool,
    envoy: bool,
    no_system: bool,
    nothing: bool,
    is_error: bool,
    allowed: Option<Regex>,
    disallowed: Option<Regex>,
}

impl MutationRules {
    pub(super) fn from_proto(message: &pb::HeaderMutationRules) -> ConfigResult<Self> {
        let is_true = |value: Option<BoolValue>| value.is_some_and(|value| value.value);
        let regex = |message: Option<&_>, field| message.map(Regex::from_proto).transpose().at(field);
        Ok(Self {
            all_routing: is_true(message.allow_all_routing),
            envoy: is_true(message.allow_envoy),
            no_system: is_true(message.disallow_system),
            nothing: is_true(message.disallow_all),
            is_error: is_true(message.disallow_is_error),
            allowed: regex(message.allow_expression.as_ref(), "allow_expression")?,
            disallowed: regex(message.disallow_expression.as_ref(), "disallow_expression")?,
        })
    }

    pub(super) fn check(&self, operation: Operation, name: &HeaderName, value: &[u8]) -> Ruling {
        if self.allows(operation, name) && (operation == Operation::Remove || fits(name, value)) {
            Ruling::Done
        } else if self.is_error {
            Ruling::Failed
        } else {
            Ruling::Ignored
        }
    }

    fn allows(&self, operation: Operation, name: &HeaderName) -> bool {
        let text = name.as_bytes();
        if operation == Operation::Remove && !is_removable(text) {
            return false;
        }
        if self.disallowed.as_ref().is_some_and(|regex| regex.matches(text)) {
            return false;
        }
        if self.allowed.as_ref().is_some_and(|regex| regex.matches(text)) {
            return true;
        }
        let routing = [HeaderId::HOST, HeaderId::AUTHORITY, HeaderId::METHOD, HeaderId::SCHEME];
        let system = text.starts_with(b":");
        !self.nothing
            && (self.all_routing || !routing.contains(&name.id()))
            && !(system && (operation == Operation::Append || self.no_system))
            && (self.envoy || !text.starts_with(b"x-envoy"))
    }
}

/// Whether a header may be taken out: without the others a request is none.
pub(super) fn is_removable(name: &[u8]) -> bool {
    !name.starts_with(b":") && !name.eq_ignore_ascii_case(b"host")
}

/// Whether a name has only bytes that a header's may have.
pub(super) fn name_is_valid(name: &[u8]) -> bool {
    let name = match name.strip_prefix(b":") {
        Some(b"") => return false,
        Some(rest) => rest,
        None => name,
    };
    name.iter().all(|c| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(c))
}

/// Whether a value has only bytes that a header's may have.
pub(super) fn value_is_valid(value: &[u8]) -> bool {
    value.iter().all(|c| *c == b'\t' || (*c >= b' ' && *c != 0x7f))
}

/// Whether a value can stand under this name.
fn fits(name: &HeaderName, value: &[u8]) -> bool {
    match name.id() {
        HeaderId::HOST => value_is_valid(value) && authority_is_valid(value),
        HeaderId::AUTHORITY => authority_is_valid(value),
        HeaderId::SCHEME => value.eq_ignore_ascii_case(b"http") || value.eq_ignore_ascii_case(b"https"),
        HeaderId::STATUS => {
            std::str::from_utf8(value).ok().and_then(|v| v.parse::<u32>().ok()).is_some_and(|s| s >= 200)
        }
        id => id.is_pseudo() || value_is_valid(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed() {
        let yes = || Some(BoolValue { value: true });
        let regex = |text: &str| {
            Some(envoy_types::pb::envoy::r#type::matcher::v3::RegexMatcher {
                regex: text.to_owned(),
                ..Default::default()
            })
        };
        let rules = |message| MutationRules::from_proto(&message).unwrap();
        let check = |rules: &MutationRules, operation, name: &str| {
            rules.check(operation, &HeaderName::new(name), b"http")
        };
        let plain = rules(pb::HeaderMutationRules::default());
        for (name, set, append, remove) in [
            ("x-a", Ruling::Done, Ruling::Done, Ruling::Done),
            (":path", Ruling::Done, Ruling::Ignored, Ruling::Ignored),
            (":method", Ruling::Ignored, Ruling::Ignored, Ruling::Ignored),
            ("host", Ruling::Ignored, Ruling::Ignored, Ruling::Ignored),
            ("x-envoy-a", Ruling::Ignored, Ruling::Ignored, Ruling::Ignored),
        ] {
            let found =
                [Operation::Set, Operation::Append, Operation::Remove].map(|o| check(&plain, o, name));
            assert_eq!(found, [set, append, remove], "{name}");
        }
        let strict = rules(pb::HeaderMutationRules {
            disallow_all: yes(),
            disallow_is_error: yes(),
            allow_expression: regex("x-.*"),
            disallow_expression: regex("x-no"),
            ..Default::default()
        });
        assert_eq!(check(&strict, Operation::Set, "x-yes"), Ruling::Done);
        assert_eq!(check(&strict, Operation::Set, "x-no"), Ruling::Failed);
        assert_eq!(check(&strict, Operation::Set, "other"), Ruling::Failed);
    }

    #[test]
    fn names_and_values() {
        assert!(name_is_valid(b"X-a") && name_is_valid(b":path") && !name_is_valid(b":"));
        assert!(!name_is_valid(b"a b") && !name_is_valid(b"a\r") && !name_is_valid(b"a:b"));
        assert!(value_is_valid(b"a\tb \xe9") && !value_is_valid(b"a\nb") && !value_is_valid(b"\x7f"));
    }
}
