//! From a path to the routes that it could match, in their order, without asking all of them.
//!
//! Exact paths and prefixes are hashed, prefixes by each length that occurs; whatever cannot be hashed (regular
//! expressions, templates, case-insensitive paths) is always asked. The candidates of all lists are merged by
//! their number, so that the first route that matches is found as if all had been tried in turn.

use std::collections::HashMap;

use foldhash::fast::FixedState;
use smallvec::SmallVec;

/// Up to this many routes are simply tried in turn.
const LINEAR: usize = 12;

type Lists = HashMap<Box<[u8]>, Vec<u32>, FixedState>;

/// How a route's path can be looked up.
pub(super) enum PathKey<'a> {
    Exact(&'a [u8]),
    Prefix(&'a [u8]),
    Other,
}

pub(super) struct Index {
    len: u32,
    exact: Lists,
    prefixes: Lists,
    /// Lengths of prefixes that occur, ascending.
    lengths: Vec<usize>,
    other: Vec<u32>,
}

impl Index {
    pub(super) fn new<'a>(paths: impl ExactSizeIterator<Item = PathKey<'a>>) -> Self {
        let mut index = Self {
            len: paths.len() as u32,
            exact: Lists::default(),
            prefixes: Lists::default(),
            lengths: Vec::new(),
            other: Vec::new(),
        };
        if paths.len() <= LINEAR {
            return index;
        }
        for (i, path) in paths.enumerate() {
            match path {
                PathKey::Exact(p) => index.exact.entry(p.into()).or_default().push(i as u32),
                PathKey::Prefix(p) => {
                    index.prefixes.entry(p.into()).or_default().push(i as u32);
                    index.lengths.push(p.len());
                }
                PathKey::Other => index.other.push(i as u32),
            }
        }
        index.lengths.sort_unstable();
        index.lengths.dedup();
        index
    }

    /// The first route for which `matches` holds.
    pub(super) fn find(&self, path: &[u8], matches: impl Fn(u32) -> bool) -> Option<u32> {
        if self.len as usize <= LINEAR {
            return (0..self.len).find(|i| matches(*i));
        }
        let mut lists: SmallVec<[&[u32]; 16]> = SmallVec::new();
        if let Some(list) = self.exact.get(path) {
            lists.push(list);
        }
        for len in self.lengths.iter().take_while(|len| **len <= path.len()) {
            if let Some(list) = self.prefixes.get(&path[..*len]) {
                lists.push(list);
            }
        }
        if !self.other.is_empty() {
            lists.push(&self.other);
        }
        loop {
            let next = lists.iter_mut().filter(|l| !l.is_empty()).min_by_key(|l| l[0])?;
            let candidate = next[0];
            *next = &next[1..];
            if matches(candidate) {
                return Some(candidate);
            }
        }
    }
}
