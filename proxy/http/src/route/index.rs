//! From a path to the routes that it could match, in their order, without asking all of them.
//!
//! Exact paths are hashed. Prefixes are hashed too, and the longest one of a path is found by halving the lengths
//! that occur: a prefix leaves a mark at each shorter length where the search for it would turn to the longer ones
//! ("Scalable High Speed IP Routing Lookups", Waldvogel et al. 1997), so that n lengths cost log n probes. Each prefix
//! knows the next shorter one that it begins with. Whatever cannot be hashed (regular expressions, templates,
//! case-insensitive paths) is always asked. The candidates of all lists are merged by their number, so that the
//! first route that matches is found as if all had been tried in turn.

use std::collections::HashMap;

use foldhash::fast::FixedState;
use smallvec::SmallVec;

/// Up to this many routes are simply tried in turn.
const LINEAR: usize = 12;

type Table<T> = HashMap<Box<[u8]>, T, FixedState>;

/// How a route's path can be looked up.
pub(super) enum PathKey<'a> {
    Exact(&'a [u8]),
    Prefix(&'a [u8]),
    Other,
}

pub(super) struct Index {
    len: u32,
    exact: Table<Vec<u32>>,
    prefixes: Prefixes,
    other: Vec<u32>,
}

impl Index {
    pub(super) fn new<'a>(paths: impl ExactSizeIterator<Item = PathKey<'a>>) -> Self {
        let mut index = Self {
            len: paths.len() as u32,
            exact: Table::default(),
            prefixes: Prefixes::default(),
            other: Vec::new(),
        };
        if paths.len() <= LINEAR {
            return index;
        }
        let mut prefixes = Vec::new();
        for (i, path) in paths.enumerate() {
            let i = i as u32;
            match path {
                PathKey::Exact(p) => index.exact.entry(p.into()).or_default().push(i),
                PathKey::Prefix(p) => prefixes.push((p, i)),
                PathKey::Other => index.other.push(i),
            }
        }
        index.prefixes = Prefixes::new(prefixes);
        index
    }

    /// The first route for which `matches` holds.
    pub(super) fn find(&self, path: &[u8], matches: impl Fn(u32) -> bool) -> Option<u32> {
        if self.len as usize <= LINEAR {
            return (0..self.len).find(|i| matches(*i));
        }
        let mut lists: SmallVec<[&[u32]; 8]> = SmallVec::new();
        if let Some(list) = self.exact.get(path) {
            lists.push(list);
        }
        lists.extend(self.prefixes.of(path));
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

/// A prefix that some routes have.
struct Node {
    /// The longest other prefix that this one begins with.
    parent: Option<u32>,
    routes: Vec<u32>,
}

#[derive(Default)]
struct Prefixes {
    nodes: Vec<Node>,
    /// Prefixes and marks, with the longest prefix that each begins with.
    entries: Table<Option<u32>>,
    /// Lengths of prefixes that occur, ascending.
    lengths: Vec<usize>,
}

impl Prefixes {
    fn new(mut routes: Vec<(&[u8], u32)>) -> Self {
        let mut lengths: Vec<usize> = routes.iter().map(|(prefix, _)| prefix.len()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut all = Self { lengths, ..Self::default() };
        // Sorted, a prefix stands before all that begin with it: its own chain is complete when they come.
        routes.sort();
        let mut open: Vec<(&[u8], u32)> = Vec::new();
        for (prefix, route) in routes {
            while open.last().is_some_and(|(longest, _)| !prefix.starts_with(longest)) {
                open.pop();
            }
            match open.last() {
                Some((same, node)) if *same == prefix => all.nodes[*node as usize].routes.push(route),
                longest => {
                    let parent = longest.map(|(_, node)| *node);
                    let node = all.nodes.len() as u32;
                    all.nodes.push(Node { parent, routes: vec![route] });
                    all.mark(prefix, node, &open);
                    open.push((prefix, node));
                }
            }
        }
        all
    }

    /// Enters a prefix and its marks; `open` are the prefixes that it begins with, the shortest first.
    fn mark(&mut self, prefix: &[u8], node: u32, open: &[(&[u8], u32)]) {
        let (mut low, mut high) = (0, self.lengths.len());
        while low < high {
            let middle = low.midpoint(high);
            let length = self.lengths[middle];
            if length > prefix.len() {
                high = middle;
                continue;
            }
            let longest = if length == prefix.len() {
                Some(node)
            } else {
                open.iter().rev().find(|(shorter, _)| shorter.len() <= length).map(|(_, node)| *node)
            };
            self.entries.insert(prefix[..length].into(), longest);
            if length == prefix.len() {
                return;
            }
            low = middle + 1;
        }
    }

    /// The routes of each prefix that the path begins with.
    fn of<'s>(&'s self, path: &[u8]) -> impl Iterator<Item = &'s [u32]> {
        let (mut low, mut high) = (0, self.lengths.len());
        let mut longest = None;
        while low < high {
            let middle = low.midpoint(high);
            match path.get(..self.lengths[middle]).and_then(|start| self.entries.get(start)) {
                Some(found) => {
                    longest = *found;
                    low = middle + 1;
                }
                None => high = middle,
            }
        }
        std::iter::successors(longest, |node| self.nodes[*node as usize].parent)
            .map(|node| self.nodes[node as usize].routes.as_slice())
    }
}
