//! `xds.type.matcher.v3.Matcher`: a tree of conditions that leads to one action.
//!
//! ```text
//!   list     predicates in turn; the first that holds and leads somewhere
//!   map      an input's value, whole or by its longest prefix
//!   ranges   an input's address, by the narrowest range (`xds.type.matcher.v3.IPMatcher`)
//!   nothing  what `on_no_match` says
//! ```
//!
//! Whoever has a tree says by [`TreeContext`] what inputs it can read and what its actions are: routes, RBAC's rules,
//! filter chains. A subtree that leads nowhere counts as no match: the search goes on behind it, with the next
//! predicate, the next shorter prefix, at last `on_no_match`. What `keep_matching` stands at is told to the caller
//! and passed over. An input that is not there yet ends the search ([`Found::Pending`]); one that is missing for good
//! satisfies no condition on its value.
//!
//! Source: the `xds.type.matcher.v3` messages, Envoy's matching API.

mod model;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;

use foldhash::fast::FixedState;

use super::{CidrRange, CidrSet, StringMatcher};
pub use model::{TreeContext, from_common};

/// What an input read.
pub enum Datum<'d> {
    /// It may come later.
    Pending,
    /// It is not there.
    Missing,
    /// This.
    Bytes(Cow<'d, [u8]>),
}

/// Something that conditions can be about.
pub trait Input<D: ?Sized> {
    /// Its value.
    fn read<'d>(&'d self, data: &'d D) -> Datum<'d>;
}

/// Where a search led.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'t, A> {
    /// To this.
    Action(&'t A),
    /// Nowhere.
    Nothing,
    /// That cannot be said before an input is there.
    Pending,
}

/// A compiled tree.
pub struct MatchTree<I, A> {
    what: What<I, A>,
    on_no_match: Option<OnMatch<I, A>>,
}

enum What<I, A> {
    /// Nothing is asked.
    Nothing,
    List(Vec<(Predicate<I>, OnMatch<I, A>)>),
    Exact(I, Map<I, A>),
    /// By the longest prefix; the lengths that occur, longest first.
    Prefix(I, Map<I, A>, Vec<usize>),
    /// By the ranges that hold the address, narrowest first.
    Ranges(I, Vec<Range>, Vec<OnMatch<I, A>>),
}

struct Range {
    range: CidrRange,
    /// It counts only where no other is narrower.
    exclusive: bool,
    /// Which of the places it leads to.
    to: usize,
}

type Map<I, A> = HashMap<Box<[u8]>, OnMatch<I, A>, FixedState>;

struct OnMatch<I, A> {
    then: Then<I, A>,
    keep_matching: bool,
}

enum Then<I, A> {
    Tree(Box<MatchTree<I, A>>),
    Action(A),
}

enum Predicate<I> {
    Single(I, StringMatcher),
    /// `input_matchers.ip.v3.Ip`
    Ip(I, CidrSet),
    Or(Vec<Predicate<I>>),
    And(Vec<Predicate<I>>),
    Not(Box<Predicate<I>>),
}

fn address(text: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

impl<I> Predicate<I> {
    /// Whether it holds; none where an input is not there yet.
    fn holds<D: ?Sized>(&self, data: &D) -> Option<bool>
    where
        I: Input<D>,
    {
        match self {
            Self::Single(input, matcher) => match input.read(data) {
                Datum::Pending => None,
                Datum::Missing => Some(false),
                Datum::Bytes(value) => Some(matcher.matches(&value)),
            },
            Self::Ip(input, set) => match input.read(data) {
                Datum::Pending => None,
                Datum::Missing => Some(false),
                Datum::Bytes(value) => Some(address(&value).is_some_and(|ip| set.contains(ip))),
            },
            Self::Or(all) => {
                let mut known = true;
                for one in all {
                    match one.holds(data) {
                        Some(true) => return Some(true),
                        Some(false) => {}
                        None => known = false,
                    }
                }
                known.then_some(false)
            }
            Self::And(all) => {
                for one in all {
                    match one.holds(data) {
                        Some(true) => {}
                        other => return other,
                    }
                }
                Some(true)
            }
            Self::Not(one) => one.holds(data).map(|holds| !holds),
        }
    }
}

impl<I, A> MatchTree<I, A> {
    /// Where it leads; `skipped` is told of actions that `keep_matching` passes over.
    pub fn find<D: ?Sized>(&self, data: &D, skipped: &mut dyn FnMut(&A)) -> Found<'_, A>
    where
        I: Input<D>,
    {
        let found = match &self.what {
            What::Nothing => Found::Nothing,
            What::List(list) => list
                .iter()
                .find_map(|(predicate, on_match)| match predicate.holds(data) {
                    None => Some(Found::Pending),
                    Some(false) => None,
                    Some(true) => on_match.follow(data, skipped),
                })
                .unwrap_or(Found::Nothing),
            What::Exact(input, map) => match input.read(data) {
                Datum::Pending => Found::Pending,
                Datum::Missing => Found::Nothing,
                Datum::Bytes(value) => map
                    .get(&*value)
                    .and_then(|on_match| on_match.follow(data, skipped))
                    .unwrap_or(Found::Nothing),
            },
            What::Prefix(input, map, lengths) => match input.read(data) {
                Datum::Pending => Found::Pending,
                Datum::Missing => Found::Nothing,
                Datum::Bytes(value) => lengths
                    .iter()
                    .filter_map(|length| map.get(value.get(..*length)?))
                    .find_map(|on_match| on_match.follow(data, skipped))
                    .unwrap_or(Found::Nothing),
            },
            What::Ranges(input, ranges, places) => match input.read(data) {
                Datum::Pending => Found::Pending,
                Datum::Missing => Found::Nothing,
                Datum::Bytes(value) => {
                    let held = |ip| ranges.iter().filter(move |range| range.range.contains(ip));
                    let held = address(&value).into_iter().flat_map(held).enumerate();
                    held.filter(|(i, range)| *i == 0 || !range.exclusive)
                        .find_map(|(_, range)| places.get(range.to)?.follow(data, skipped))
                        .unwrap_or(Found::Nothing)
                }
            },
        };
        match (found, &self.on_no_match) {
            (Found::Nothing, Some(on_match)) => on_match.follow(data, skipped).unwrap_or(Found::Nothing),
            (found, _) => found,
        }
    }
}

impl<I, A> OnMatch<I, A> {
    /// What it leads to; none for nothing.
    fn follow<D: ?Sized>(&self, data: &D, skipped: &mut dyn FnMut(&A)) -> Option<Found<'_, A>>
    where
        I: Input<D>,
    {
        let found = match &self.then {
            Then::Tree(tree) => tree.find(data, skipped),
            Then::Action(action) => Found::Action(action),
        };
        match found {
            Found::Action(action) if self.keep_matching => {
                skipped(action);
                None
            }
            Found::Nothing => None,
            found => Some(found),
        }
    }
}
