//! Handles without what keeps them alive.

use std::marker::PhantomData;

use super::Scope;
use super::handle::{Counter, Gauge, Handle, Histogram, TextReadout};

/// A stat of a scope that its owner keeps: four bytes and not sixteen, for owners of whom there are ten thousand.
pub struct Thin<S> {
    id: u32,
    of: PhantomData<fn() -> S>,
}

macro_rules! thin {
    ($($stat:ident)*) => {
        $(
            impl From<&$stat> for Thin<$stat> {
                fn from(stat: &$stat) -> Self {
                    Self { id: stat.0.id, of: PhantomData }
                }
            }

            impl Thin<$stat> {
                /// The stat. The scope must be the one that it was made in.
                pub fn stat(&self, scope: &Scope) -> $stat {
                    $stat(Handle { scope: scope.inner.clone(), id: self.id })
                }
            }
        )*
    };
}

thin! { Counter Gauge Histogram TextReadout }
