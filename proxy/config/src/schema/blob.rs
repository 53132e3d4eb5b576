//! Reading the blob: words, rows of tables, the pool of byte strings.
//!
//! It is a constant whose indices a test has walked: the zeros and empty strings that stand for what lies outside are
//! never seen.

use std::cmp::Ordering;

use super::layout;

static BLOB: &[u8] = include_bytes!("../schema.bin");

/// Words of the header that are not tables.
const POOL: usize = 6;
pub(super) const MESSAGE_COUNT: usize = 7;
pub(super) const ENUM_COUNT: usize = 8;

/// A table of rows of equal size.
#[derive(Clone, Copy)]
pub(super) struct Table {
    /// The word of the header that has its offset.
    header: usize,
    /// Words of a row.
    words: usize,
}

pub(super) const MESSAGES: Table = Table { header: 1, words: layout::MESSAGE_WORDS };
pub(super) const FIELDS: Table = Table { header: 2, words: layout::FIELD_WORDS };
pub(super) const ONEOFS: Table = Table { header: 3, words: layout::ONEOF_WORDS };
pub(super) const ENUMS: Table = Table { header: 4, words: layout::ENUM_WORDS };
pub(super) const VALUES: Table = Table { header: 5, words: layout::VALUE_WORDS };

impl Table {
    /// A word of a row.
    pub(super) fn cell(self, row: u32, column: usize) -> u32 {
        word(word(self.header) as usize / 4 + row as usize * self.words + column)
    }
}

/// Word `index` of the blob.
pub(super) fn word(index: usize) -> u32 {
    BLOB.get(index * 4..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The byte string at an offset of the pool.
pub(super) fn pooled(offset: u32) -> &'static [u8] {
    let at = word(POOL) as usize + offset as usize;
    BLOB.get(at..)
        .and_then(|rest| rest.split_first_chunk())
        .and_then(|(length, rest)| rest.get(..usize::from(u16::from_le_bytes(*length))))
        .unwrap_or_default()
}

/// The same as text.
pub(super) fn pooled_str(offset: u32) -> &'static str {
    std::str::from_utf8(pooled(offset)).unwrap_or_default()
}

/// Which of `count` sorted rows is the one that is wanted: `order` compares a row with it.
pub(super) fn search(count: u32, order: impl Fn(u32) -> Ordering) -> Option<u32> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match order(middle) {
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
            Ordering::Equal => return Some(middle),
        }
    }
    None
}
