//! Searches through small trees: inputs are the letters of a text, actions are names.

use std::collections::HashMap;

use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3 as pb;
use pb::matcher::matcher_list::{FieldMatcher, Predicate as P, predicate};
use pb::matcher::matcher_tree::{MatchMap, TreeType};
use pb::matcher::{MatcherList, MatcherTree, MatcherType, OnMatch as On, on_match};

use super::*;
use crate::error::{ConfigError, ConfigResult};

/// Reads the value of a key; `late` is not there yet.
struct Key(String);

type Data = HashMap<&'static str, &'static str>;

impl Input<Data> for Key {
    fn read<'d>(&'d self, data: &'d Data) -> Datum<'d> {
        match data.get(&*self.0) {
            _ if self.0 == "late" => Datum::Pending,
            None => Datum::Missing,
            Some(value) => Datum::Bytes(Cow::Borrowed(value.as_bytes())),
        }
    }
}

struct Names;

impl TreeContext for Names {
    type Input = Key;
    type Action = String;
    const KEEP_MATCHING: bool = true;

    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Key> {
        Ok(Key(config.name.clone()))
    }

    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<String> {
        if config.name == "bad" {
            return Err(ConfigError::new("bad action"));
        }
        Ok(config.name.clone())
    }
}

fn named(name: &str) -> TypedExtensionConfig {
    TypedExtensionConfig { name: name.into(), typed_config: Some(Any::default()) }
}

fn to(name: &str) -> On {
    On { keep_matching: false, on_match: Some(on_match::OnMatch::Action(named(name))) }
}

fn keep(on: On) -> On {
    On { keep_matching: true, ..on }
}

fn into(tree: pb::Matcher) -> On {
    On { keep_matching: false, on_match: Some(on_match::OnMatch::Matcher(Box::new(tree))) }
}

fn is(key: &str, value: &str) -> P {
    let pattern = pb::string_matcher::MatchPattern::Exact(value.into());
    let matcher = pb::StringMatcher { ignore_case: false, match_pattern: Some(pattern) };
    let single = predicate::SinglePredicate {
        input: Some(named(key)),
        matcher: Some(predicate::single_predicate::Matcher::ValueMatch(matcher)),
    };
    P { match_type: Some(predicate::MatchType::SinglePredicate(single)) }
}

fn all(list: Vec<P>) -> P {
    P { match_type: Some(predicate::MatchType::AndMatcher(predicate::PredicateList { predicate: list })) }
}

fn any(list: Vec<P>) -> P {
    P { match_type: Some(predicate::MatchType::OrMatcher(predicate::PredicateList { predicate: list })) }
}

fn not(one: P) -> P {
    P { match_type: Some(predicate::MatchType::NotMatcher(Box::new(one))) }
}

fn list(fields: Vec<(P, On)>, otherwise: Option<On>) -> pb::Matcher {
    let matchers = fields
        .into_iter()
        .map(|(predicate, on)| FieldMatcher { predicate: Some(predicate), on_match: Some(on) })
        .collect();
    pb::Matcher {
        on_no_match: otherwise.map(Box::new),
        matcher_type: Some(MatcherType::MatcherList(MatcherList { matchers })),
    }
}

fn map(fields: Vec<(&str, On)>) -> MatchMap {
    MatchMap { map: fields.into_iter().map(|(key, on)| (key.to_owned(), on)).collect() }
}

fn tree(key: &str, tree_type: TreeType, otherwise: Option<On>) -> pb::Matcher {
    let tree = MatcherTree { input: Some(named(key)), tree_type: Some(tree_type) };
    pb::Matcher { on_no_match: otherwise.map(Box::new), matcher_type: Some(MatcherType::MatcherTree(tree)) }
}

/// What the tree leads to: an action's name, `-` or `?`; behind it what was passed over.
fn find(message: &pb::Matcher, data: &[(&'static str, &'static str)]) -> String {
    let tree = MatchTree::from_proto(message, &mut Names).unwrap();
    let mut skipped = String::new();
    let data: Data = data.iter().copied().collect();
    let found = match tree.find(&data, &mut |name: &String| skipped.push_str(&format!(" {name}"))) {
        Found::Action(name) => name.clone(),
        Found::Nothing => "-".to_owned(),
        Found::Pending => "?".to_owned(),
    };
    found + &skipped
}

#[test]
fn the_first_predicate_that_holds_decides() {
    let one = list(
        vec![
            (all(vec![is("a", "1"), is("b", "2")]), to("both")),
            (any(vec![is("a", "1"), is("b", "2")]), to("one")),
            (not(is("a", "3")), to("not three")),
        ],
        Some(to("else")),
    );
    assert_eq!(find(&one, &[("a", "1"), ("b", "2")]), "both");
    assert_eq!(find(&one, &[("b", "2")]), "one");
    assert_eq!(find(&one, &[]), "not three");
    assert_eq!(find(&one, &[("a", "3")]), "else");
}

#[test]
fn maps_take_whole_values_and_longest_prefixes() {
    let exact =
        tree("a", TreeType::ExactMatchMap(map(vec![("x", to("x")), ("xy", to("xy"))])), Some(to("else")));
    assert_eq!(find(&exact, &[("a", "xy")]), "xy");
    assert_eq!(find(&exact, &[("a", "xyz")]), "else");
    assert_eq!(find(&exact, &[]), "else");
    let nothing = list(vec![(is("b", "1"), to("b"))], None);
    let prefix = tree(
        "a",
        TreeType::PrefixMatchMap(map(vec![("x", to("x")), ("xyz", into(nothing)), ("", to("any"))])),
        None,
    );
    assert_eq!(find(&prefix, &[("a", "xy")]), "x");
    assert_eq!(find(&prefix, &[("a", "xyz1"), ("b", "1")]), "b");
    assert_eq!(find(&prefix, &[("a", "xyz1")]), "x", "a subtree that leads nowhere is no match");
    assert_eq!(find(&prefix, &[("a", "z")]), "any");
    assert_eq!(find(&prefix, &[]), "-");
}

#[test]
fn what_is_kept_matching_is_passed_over() {
    let inner = list(vec![(is("a", "1"), to("inner"))], None);
    let outer = list(
        vec![
            (is("a", "1"), keep(to("first"))),
            (is("a", "1"), keep(into(inner))),
            (is("a", "1"), to("last")),
        ],
        None,
    );
    assert_eq!(find(&outer, &[("a", "1")]), "last first inner");
    assert_eq!(find(&outer, &[]), "-");
}

#[test]
fn what_is_not_there_yet_ends_the_search() {
    let one = |predicate| list(vec![(predicate, to("it"))], Some(to("else")));
    assert_eq!(find(&one(is("late", "1")), &[]), "?");
    assert_eq!(find(&one(not(is("late", "1"))), &[]), "?");
    assert_eq!(find(&one(any(vec![is("late", "1"), is("a", "1")])), &[("a", "1")]), "it");
    assert_eq!(find(&one(any(vec![is("late", "1"), is("a", "1")])), &[]), "?");
    assert_eq!(find(&one(all(vec![is("a", "1"), is("late", "1")])), &[]), "else");
    assert_eq!(find(&tree("late", TreeType::ExactMatchMap(map(vec![("x", to("x"))])), None), &[]), "?");
}

#[test]
fn a_tree_without_conditions_leads_where_nothing_matches() {
    let tree = pb::Matcher { on_no_match: Some(Box::new(to("always"))), matcher_type: None };
    assert_eq!(find(&tree, &[]), "always");
    assert_eq!(find(&pb::Matcher::default(), &[]), "-");
}

#[test]
fn mistakes_are_told_with_their_place() {
    let path = |message: &pb::Matcher| {
        let error = MatchTree::<Key, String>::from_proto(message, &mut Names).err().unwrap();
        error.path().to_owned()
    };
    assert_eq!(
        path(&list(vec![(is("a", "1"), to("bad"))], None)),
        "matcher_list.matchers[0].on_match.action"
    );
    assert_eq!(
        path(&list(vec![(P::default(), to("a"))], None)),
        "matcher_list.matchers[0].predicate.match_type"
    );
    let bad = tree("a", TreeType::CustomMatch(named("c")), None);
    assert_eq!(path(&bad), "matcher_tree.custom_match");
    assert_eq!(path(&list(vec![], Some(On::default()))), "on_no_match.on_match");
}
