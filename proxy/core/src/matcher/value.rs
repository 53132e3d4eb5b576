//! `ValueMatcher`, `MetadataMatcher`, `FilterStateMatcher`: conditions on metadata and filter state.

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use envoy_types::pb::google::protobuf::{Value, value::Kind};

use super::{CidrSet, StringMatcher};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::stream_info::{FilterStateObject, Metadata};

/// How deep matchers may nest in one another.
const MAX_DEPTH: usize = 32;

/// A condition on a number.
#[derive(Debug, Clone, Copy)]
pub enum NumberMatcher {
    /// From inclusive, to exclusive.
    Range(f64, f64),
    /// Exactly this.
    Exact(f64),
}

impl NumberMatcher {
    /// From a `DoubleMatcher`.
    pub fn from_proto(message: &pb::DoubleMatcher) -> ConfigResult<Self> {
        use pb::double_matcher::MatchPattern as P;
        match &message.match_pattern {
            Some(P::Range(r)) => Ok(Self::Range(r.start, r.end)),
            Some(P::Exact(v)) => Ok(Self::Exact(*v)),
            None => Err(ConfigError::missing("match_pattern")),
        }
    }

    /// Whether the number satisfies the condition.
    pub fn matches(self, value: f64) -> bool {
        match self {
            Self::Range(start, end) => start <= value && value < end,
            Self::Exact(exact) => exact == value,
        }
    }
}

/// A condition on a `google.protobuf.Value`.
#[derive(Debug, Clone)]
pub enum ValueMatcher {
    /// It is null.
    Null,
    /// It is a number that satisfies this.
    Number(NumberMatcher),
    /// It is a string that satisfies this.
    String(StringMatcher),
    /// It is this boolean.
    Bool(bool),
    /// It is there (`present_match: false` never matches, as in Envoy).
    Present(bool),
    /// It is a list one of whose values satisfies this.
    OneOf(Box<ValueMatcher>),
    /// One of these is satisfied.
    Or(Vec<ValueMatcher>),
}

impl ValueMatcher {
    /// From the message.
    pub fn from_proto(message: &pb::ValueMatcher) -> ConfigResult<Self> {
        Self::parse(message, 0)
    }

    fn parse(message: &pb::ValueMatcher, depth: usize) -> ConfigResult<Self> {
        use pb::value_matcher::MatchPattern as P;
        if depth > MAX_DEPTH {
            return Err(ConfigError::new("matchers are nested too deep"));
        }
        Ok(match message.match_pattern.as_ref().ok_or_else(|| ConfigError::missing("match_pattern"))? {
            P::NullMatch(_) => Self::Null,
            P::DoubleMatch(m) => Self::Number(NumberMatcher::from_proto(m).at("double_match")?),
            P::StringMatch(m) => Self::String(StringMatcher::from_proto(m).at("string_match")?),
            P::BoolMatch(b) => Self::Bool(*b),
            P::PresentMatch(b) => Self::Present(*b),
            P::ListMatch(list) => match &list.match_pattern {
                Some(pb::list_matcher::MatchPattern::OneOf(one)) => {
                    Self::OneOf(Box::new(Self::parse(one, depth + 1).at("one_of").at("list_match")?))
                }
                None => return Err(ConfigError::missing("match_pattern").at("list_match")),
            },
            P::OrMatch(or) => {
                if or.value_matchers.len() < 2 {
                    let e = ConfigError::new("value must contain at least 2 item(s)");
                    return Err(e.at("value_matchers").at("or_match"));
                }
                let parse = |(i, m)| Self::parse(m, depth + 1).at_index("value_matchers", i).at("or_match");
                Self::Or(or.value_matchers.iter().enumerate().map(parse).collect::<ConfigResult<_>>()?)
            }
        })
    }

    /// Whether the value satisfies the condition; a value that is not there is `None`.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        let kind = value.and_then(|v| v.kind.as_ref());
        match self {
            Self::Null => matches!(kind, Some(Kind::NullValue(_))),
            Self::Number(m) => matches!(kind, Some(Kind::NumberValue(v)) if m.matches(*v)),
            Self::String(m) => matches!(kind, Some(Kind::StringValue(v)) if m.matches(v)),
            Self::Bool(b) => matches!(kind, Some(Kind::BoolValue(v)) if v == b),
            Self::Present(b) => *b && kind.is_some(),
            Self::OneOf(m) => {
                matches!(kind, Some(Kind::ListValue(l)) if l.values.iter().any(|v| m.matches(Some(v))))
            }
            Self::Or(all) => all.iter().any(|m| m.matches(value)),
        }
    }
}

/// The value at a path below a filter's struct.
pub fn metadata_value<'a, S: AsRef<str>>(
    metadata: Option<&'a Metadata>,
    filter: &str,
    path: &[S],
) -> Option<&'a Value> {
    let mut fields = &metadata?.get(filter)?.fields;
    let (last, parents) = path.split_last()?;
    for key in parents {
        match &fields.get(key.as_ref())?.kind {
            Some(Kind::StructValue(inner)) => fields = &inner.fields,
            _ => return None,
        }
    }
    fields.get(last.as_ref())
}

/// A condition on one value of metadata.
#[derive(Debug, Clone)]
pub struct MetadataMatcher {
    filter: String,
    path: Vec<String>,
    value: ValueMatcher,
    invert: bool,
}

impl MetadataMatcher {
    /// From the message.
    pub fn from_proto(message: &pb::MetadataMatcher) -> ConfigResult<Self> {
        if message.filter.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("filter"));
        }
        if message.path.is_empty() {
            return Err(ConfigError::new("value must contain at least 1 item(s)").at("path"));
        }
        let mut path = Vec::with_capacity(message.path.len());
        for (i, segment) in message.path.iter().enumerate() {
            match &segment.segment {
                Some(pb::metadata_matcher::path_segment::Segment::Key(key)) if !key.is_empty() => {
                    path.push(key.clone());
                }
                _ => return Err(ConfigError::missing("segment").index(i).at("path")),
            }
        }
        let value = message.value.as_ref().ok_or_else(|| ConfigError::missing("value"))?;
        Ok(Self {
            filter: message.filter.clone(),
            path,
            value: ValueMatcher::from_proto(value).at("value")?,
            invert: message.invert,
        })
    }

    /// The value the condition is about.
    pub fn find<'a>(&self, metadata: Option<&'a Metadata>) -> Option<&'a Value> {
        metadata_value(metadata, &self.filter, &self.path)
    }

    /// Whether a value that was found satisfies the condition, `invert` left out (access log filters).
    pub fn matches_value(&self, value: &Value) -> bool {
        self.value.matches(Some(value))
    }

    /// Whether metadata satisfies the condition; as in Envoy, `invert` turns the answer for a missing value too.
    pub fn matches(&self, metadata: Option<&Metadata>) -> bool {
        self.value.matches(self.find(metadata)) != self.invert
    }
}

/// A condition on one object of the filter state.
#[derive(Debug, Clone)]
pub struct FilterStateMatcher {
    key: String,
    what: FilterStateWhat,
}

#[derive(Debug, Clone)]
enum FilterStateWhat {
    String(StringMatcher),
    Address(CidrSet),
}

impl FilterStateMatcher {
    /// From the message.
    pub fn from_proto(message: &pb::FilterStateMatcher) -> ConfigResult<Self> {
        use pb::filter_state_matcher::Matcher as M;
        if message.key.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("key"));
        }
        let what = match &message.matcher {
            Some(M::StringMatch(m)) => {
                FilterStateWhat::String(StringMatcher::from_proto(m).at("string_match")?)
            }
            Some(M::AddressMatch(a)) => {
                FilterStateWhat::Address(CidrSet::from_xds(&a.ranges, a.invert_match).at("address_match")?)
            }
            None => return Err(ConfigError::missing("matcher")),
        };
        Ok(Self { key: message.key.clone(), what })
    }

    /// The object's key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the object satisfies the condition; one that is not there does not.
    pub fn matches(&self, object: Option<&dyn FilterStateObject>) -> bool {
        let Some(object) = object else { return false };
        match &self.what {
            FilterStateWhat::String(m) => object.plain().is_some_and(|text| m.matches(text.as_bytes())),
            FilterStateWhat::Address(set) => object.ip().is_some_and(|ip| set.contains(ip)),
        }
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::{ListValue, Struct};

    use super::*;

    fn value(kind: Kind) -> Value {
        Value { kind: Some(kind) }
    }

    fn metadata() -> Metadata {
        let inner =
            Struct { fields: [("b".to_owned(), value(Kind::StringValue("v".into())))].into_iter().collect() };
        let list = ListValue { values: vec![value(Kind::NumberValue(1.0)), value(Kind::NumberValue(2.5))] };
        let outer = Struct {
            fields: [
                ("a".to_owned(), value(Kind::StructValue(inner))),
                ("l".to_owned(), value(Kind::ListValue(list))),
            ]
            .into_iter()
            .collect(),
        };
        [("f".to_owned(), outer)].into_iter().collect()
    }

    fn matcher(path: &[&str], pattern: pb::value_matcher::MatchPattern, invert: bool) -> MetadataMatcher {
        use pb::metadata_matcher::{PathSegment, path_segment::Segment};
        let path = path.iter().map(|k| PathSegment { segment: Some(Segment::Key((*k).into())) }).collect();
        let value = Some(pb::ValueMatcher { match_pattern: Some(pattern) });
        MetadataMatcher::from_proto(&pb::MetadataMatcher { filter: "f".into(), path, value, invert }).unwrap()
    }

    #[test]
    fn a_path_leads_into_structs() {
        use pb::value_matcher::MatchPattern as P;
        let m = metadata();
        assert!(matcher(&["a", "b"], P::PresentMatch(true), false).matches(Some(&m)));
        assert!(!matcher(&["a", "c"], P::PresentMatch(true), false).matches(Some(&m)));
        assert!(!matcher(&["a", "b", "c"], P::PresentMatch(true), false).matches(Some(&m)));
        assert!(matcher(&["a", "c"], P::PresentMatch(true), true).matches(None));
        assert!(!matcher(&["a", "c"], P::PresentMatch(false), false).matches(None));
    }

    #[test]
    fn a_list_matches_by_one_of_its_values() {
        use pb::value_matcher::MatchPattern as P;
        let number = |v| {
            P::DoubleMatch(pb::DoubleMatcher {
                match_pattern: Some(pb::double_matcher::MatchPattern::Exact(v)),
            })
        };
        let one = |v| {
            P::ListMatch(Box::new(pb::ListMatcher {
                match_pattern: Some(pb::list_matcher::MatchPattern::OneOf(Box::new(pb::ValueMatcher {
                    match_pattern: Some(number(v)),
                }))),
            }))
        };
        let m = metadata();
        assert!(matcher(&["l"], one(2.5), false).matches(Some(&m)));
        assert!(!matcher(&["l"], one(3.0), false).matches(Some(&m)));
        assert!(!matcher(&["a"], one(2.5), false).matches(Some(&m)));
    }
}
