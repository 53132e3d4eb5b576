//! The fields of one message, sorted: what the checker and the printer walk.
//!
//! On the wire fields come in any order, a scalar may stand several times (the last one counts), a message may stand
//! in pieces (they are merged), of a oneof the last member counts. Appending one message to another is how protobuf
//! merges them, so all of this does occur: `--config-yaml` over a file.

use std::borrow::Cow;

use smallvec::SmallVec;

use crate::{
    schema::{Field, Message},
    wire::{Reader, Value, WireError},
};

/// One occurrence of a field: its position among the message's fields and its value.
type Entry<'a> = (u16, Value<'a>);

/// A message's fields by position.
pub(crate) struct Grouped<'a> {
    entries: SmallVec<[Entry<'a>; 4]>,
    /// Numbers that the message does not have, or not with that wire type.
    pub(crate) unknown: Vec<u32>,
}

impl<'a> Grouped<'a> {
    pub(crate) fn read(message: Message, bytes: &'a [u8]) -> Result<Self, WireError> {
        let mut out = Self { entries: SmallVec::new(), unknown: Vec::new() };
        // Last member seen of each oneof; messages have few.
        let mut oneofs: SmallVec<[(usize, u16); 4]> = SmallVec::new();
        let mut sorted = true;
        let mut conflict = false;
        for field in Reader::new(bytes) {
            let (number, value) = field?;
            let Some(position) = message.position(number).filter(|p| fits(message.field_at(*p), &value))
            else {
                out.unknown.push(number);
                continue;
            };
            let position = position as u16;
            if let Some(oneof) = message.field_at(usize::from(position)).oneof() {
                match oneofs.iter_mut().find(|(seen, _)| *seen == oneof) {
                    Some((_, last)) => {
                        conflict |= *last != position;
                        *last = position;
                    }
                    None => oneofs.push((oneof, position)),
                }
            }
            sorted &= out.entries.last().is_none_or(|(last, _)| *last <= position);
            out.entries.push((position, value));
        }
        if conflict {
            out.keep_last_of_oneofs(message, &oneofs);
        }
        if !sorted {
            out.entries.sort_by_key(|(position, _)| *position);
        }
        Ok(out)
    }

    /// A member of a oneof clears what other members had, and what it had itself before another one was set.
    fn keep_last_of_oneofs(&mut self, message: Message, oneofs: &[(usize, u16)]) {
        for (oneof, last) in oneofs {
            let of_it = |position: u16| message.field_at(usize::from(position)).oneof() == Some(*oneof);
            let other = self.entries.iter().rposition(|(position, _)| of_it(*position) && position != last);
            let mut index = 0;
            self.entries.retain(|(position, _)| {
                let keep = !of_it(*position) || other.is_none_or(|other| index > other);
                index += 1;
                keep
            });
        }
    }

    /// Iterates over the fields of `message` with their occurrences.
    pub(crate) fn groups(&self, message: Message) -> impl Iterator<Item = (Field, &[Entry<'a>])> {
        let mut rest = self.entries.as_slice();
        message.fields().enumerate().map(move |(position, field)| {
            let count = rest.iter().take_while(|(at, _)| usize::from(*at) == position).count();
            let (group, tail) = rest.split_at(count);
            rest = tail;
            (field, group)
        })
    }

    /// Iterates over the fields that are there: their positions and their occurrences.
    pub(crate) fn present(&self) -> impl Iterator<Item = (u16, &[Entry<'a>])> {
        self.entries.chunk_by(|a, b| a.0 == b.0).map(|group| (group[0].0, group))
    }

    /// The occurrences of one field.
    pub(crate) fn of(&self, message: Message, number: u32) -> &[Entry<'a>] {
        let Some(position) = message.position(number) else { return &[] };
        let start = self.entries.partition_point(|(at, _)| usize::from(*at) < position);
        let end = self.entries.partition_point(|(at, _)| usize::from(*at) <= position);
        &self.entries[start..end]
    }
}

/// Whether a value has the field's wire type; repeated scalars may be packed or not.
fn fits(field: Field, value: &Value<'_>) -> bool {
    let expected = field.kind().wire_type();
    value.wire_type() == expected || field.is_repeated() && expected != 2 && value.wire_type() == 2
}

/// The content of a message that may stand in pieces.
pub(crate) fn merged<'a>(group: &[Entry<'a>]) -> Cow<'a, [u8]> {
    match group {
        [] => Cow::Borrowed(&[]),
        [(_, Value::Bytes(bytes))] => Cow::Borrowed(bytes),
        _ => {
            let pieces = group.iter().filter_map(|(_, value)| match value {
                Value::Bytes(bytes) => Some(*bytes),
                _ => None,
            });
            Cow::Owned(pieces.collect::<Vec<_>>().concat())
        }
    }
}

/// Calls `visit` with each element of a repeated field: scalars out of packed blocks as if they stood alone.
pub(crate) fn each_element<'a, E: From<WireError>>(
    field: Field,
    group: &[Entry<'a>],
    mut visit: impl FnMut(usize, Value<'a>) -> Result<(), E>,
) -> Result<(), E> {
    let wire_type = field.kind().wire_type();
    let mut index = 0;
    for (_, value) in group {
        match value {
            Value::Bytes(packed) if wire_type != 2 => {
                let mut reader = Reader::new(packed);
                while !reader.rest().is_empty() {
                    let element = match wire_type {
                        1 => Value::Fixed64(u64::from_le_bytes(reader.array()?)),
                        5 => Value::Fixed32(u32::from_le_bytes(reader.array()?)),
                        _ => Value::Varint(reader.varint()?),
                    };
                    visit(index, element)?;
                    index += 1;
                }
            }
            other => {
                visit(index, *other)?;
                index += 1;
            }
        }
    }
    Ok(())
}

/// A map entry; what is not there has its default value.
pub(crate) struct MapEntry<'a> {
    pub(crate) key: Option<Value<'a>>,
    pub(crate) value: Option<Value<'a>>,
    /// The value if it is a message: its pieces merged.
    pub(crate) message: Option<Cow<'a, [u8]>>,
}

/// Reads a map entry.
pub(crate) fn map_entry(entry: Message, bytes: &[u8]) -> Result<MapEntry<'_>, WireError> {
    let grouped = Grouped::read(entry, bytes)?;
    let key = grouped.of(entry, 1).last().map(|(_, value)| *value);
    let values = grouped.of(entry, 2);
    let value = values.last().map(|(_, value)| *value);
    let is_message = entry.field(2).is_some_and(|field| field.message().is_some()) && !values.is_empty();
    Ok(MapEntry { key, value, message: is_message.then(|| merged(values)) })
}

/// What a field has that is not there.
pub(crate) fn default_of(field: Field) -> Value<'static> {
    match field.kind().wire_type() {
        1 => Value::Fixed64(0),
        2 => Value::Bytes(&[]),
        5 => Value::Fixed32(0),
        _ => Value::Varint(0),
    }
}
