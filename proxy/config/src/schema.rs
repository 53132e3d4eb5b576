//! What the configuration's messages look like: names, fields, enums, constraints.
//!
//! Protobuf libraries build a descriptor pool at start (50 MiB and 100 ms for Envoy's API). Here the same facts lie
//! in one read-only blob that is part of the program's image: nothing is parsed at start, only the pages that a
//! look-up touches are ever in memory, and a descriptor is an index of four bytes. `tests/schema` makes the blob
//! from the descriptor set that the `envoy-types` crate was generated from and proves that the committed file is
//! current.
//!
//! Layout (see [`layout`]): a header of 32-bit little-endian words, then five tables of fixed-size rows (messages
//! sorted by full name, fields sorted by number within their message, oneofs, enums sorted by full name, enum values
//! in order of declaration), then a pool of byte strings (two bytes of length, the bytes). Constraints are the bytes
//! of `validate.FieldRules` in that pool; [`crate::check()`] reads them.

mod blob;
pub mod layout;

use blob::{
    ENUM_COUNT, ENUMS, FIELDS, MESSAGE_COUNT, MESSAGES, ONEOFS, VALUES, pooled, pooled_str, search, word,
};
use layout::flag;

/// A message type.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Message(u32);

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How protobuf's JSON mapping treats a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WellKnown {
    /// An ordinary message.
    No,
    /// `google.protobuf.Any`: its members are those of the message within, with `@type`.
    Any,
    /// Any JSON object.
    Struct,
    /// Any JSON value.
    Value,
    /// Any JSON array.
    List,
    /// `"1.5s"`.
    Duration,
    /// RFC 3339.
    Timestamp,
    /// Comma-separated paths.
    FieldMask,
    /// The value itself.
    Wrapper,
}

impl Message {
    /// Finds a message by its full name, as in `envoy.config.cluster.v3.Cluster`.
    pub fn find(full_name: &str) -> Option<Self> {
        let name = full_name.as_bytes();
        search(word(MESSAGE_COUNT), |row| pooled(MESSAGES.cell(row, 0)).cmp(name)).map(Self)
    }

    /// The message that `T` stands for; the schema has all of the API, so there is one for every configuration type.
    pub fn of<T: prost::Name>() -> Option<Self> {
        Self::find(&T::full_name())
    }

    /// Finds a message by a type URL: what follows the last slash is its name.
    pub fn of_type_url(type_url: &str) -> Option<Self> {
        Self::find(type_url.rsplit('/').next().unwrap_or_default())
    }

    /// All messages, ordered by name.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..word(MESSAGE_COUNT)).map(Self)
    }

    fn column(self, column: usize) -> u32 {
        MESSAGES.cell(self.0, column)
    }

    /// Full name.
    pub fn name(self) -> &'static str {
        pooled_str(self.column(0))
    }

    /// Name of the file that defines it, without its folders.
    pub fn file(self) -> &'static str {
        pooled_str(self.column(1))
    }

    /// Its part in protobuf's JSON mapping.
    pub fn well_known(self) -> WellKnown {
        match self.column(2) & 0xff {
            layout::WELL_KNOWN_ANY => WellKnown::Any,
            layout::WELL_KNOWN_STRUCT => WellKnown::Struct,
            layout::WELL_KNOWN_VALUE => WellKnown::Value,
            layout::WELL_KNOWN_LIST => WellKnown::List,
            layout::WELL_KNOWN_DURATION => WellKnown::Duration,
            layout::WELL_KNOWN_TIMESTAMP => WellKnown::Timestamp,
            layout::WELL_KNOWN_FIELD_MASK => WellKnown::FieldMask,
            layout::WELL_KNOWN_WRAPPER => WellKnown::Wrapper,
            _ => WellKnown::No,
        }
    }

    /// Whether its constraints are enforced.
    pub fn is_checked(self) -> bool {
        self.column(2) & flag::UNCHECKED == 0
    }

    /// Whether Envoy warns that it is work in progress.
    pub fn is_work_in_progress(self) -> bool {
        self.column(2) & flag::MESSAGE_WIP != 0
    }

    /// Number of fields.
    pub fn field_count(self) -> usize {
        (self.column(5) & 0xffff) as usize
    }

    /// The field at `index` in the order of numbers.
    pub fn field_at(self, index: usize) -> Field {
        Field(self.column(3) + index as u32)
    }

    /// Its fields in the order of their numbers.
    pub fn fields(self) -> impl ExactSizeIterator<Item = Field> {
        let first = self.column(3);
        (first..first + self.field_count() as u32).map(Field)
    }

    /// Its oneofs.
    pub fn oneofs(self) -> impl ExactSizeIterator<Item = Oneof> {
        let first = self.column(4);
        (first..first + (self.column(5) >> 16)).map(Oneof)
    }

    /// The oneof at `index`.
    pub fn oneof_at(self, index: usize) -> Oneof {
        Oneof(self.column(4) + index as u32)
    }

    /// Position of the field with this number among [`Message::fields`].
    pub fn position(self, number: u32) -> Option<usize> {
        let (first, count) = (self.column(3), self.field_count() as u32);
        // Most numbers have no gap before them.
        let guess = number.wrapping_sub(1);
        if guess < count && Field(first + guess).number() == number {
            return Some(guess as usize);
        }
        search(count, |index| Field(first + index).number().cmp(&number)).map(|index| index as usize)
    }

    /// The field with this number.
    pub fn field(self, number: u32) -> Option<Field> {
        self.position(number).map(|index| self.field_at(index))
    }

    /// The field with this name or JSON name.
    pub fn field_by_name(self, name: &str) -> Option<Field> {
        let name = name.as_bytes();
        self.fields().find(|field| pooled(field.column(1)) == name || pooled(field.column(2)) == name)
    }
}

/// What a field holds. The numbers are those of `FieldDescriptorProto.Type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Double,
    Float,
    Int64,
    Uint64,
    Int32,
    Fixed64,
    Fixed32,
    Bool,
    String,
    Message,
    Bytes,
    Uint32,
    Enum,
    Sfixed32,
    Sfixed64,
    Sint32,
    Sint64,
}

impl Kind {
    /// The wire type of a value of this kind that is not packed.
    pub fn wire_type(self) -> u8 {
        match self {
            Self::Double | Self::Fixed64 | Self::Sfixed64 => 1,
            Self::Float | Self::Fixed32 | Self::Sfixed32 => 5,
            Self::String | Self::Bytes | Self::Message => 2,
            _ => 0,
        }
    }
}

/// A field of a message.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Field(u32);

impl std::fmt::Debug for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Field {
    fn column(self, column: usize) -> u32 {
        FIELDS.cell(self.0, column)
    }

    fn flags(self) -> u32 {
        self.column(4) >> 16
    }

    /// Field number.
    pub fn number(self) -> u32 {
        self.column(0)
    }

    /// Name as in the `.proto` file.
    pub fn name(self) -> &'static str {
        pooled_str(self.column(1))
    }

    /// Name in lowerCamelCase.
    pub fn json_name(self) -> &'static str {
        pooled_str(self.column(2))
    }

    /// What it holds.
    pub fn kind(self) -> Kind {
        match self.column(4) & 0xff {
            1 => Kind::Double,
            2 => Kind::Float,
            3 => Kind::Int64,
            4 => Kind::Uint64,
            5 => Kind::Int32,
            6 => Kind::Fixed64,
            7 => Kind::Fixed32,
            8 => Kind::Bool,
            9 => Kind::String,
            12 => Kind::Bytes,
            13 => Kind::Uint32,
            14 => Kind::Enum,
            15 => Kind::Sfixed32,
            16 => Kind::Sfixed64,
            17 => Kind::Sint32,
            18 => Kind::Sint64,
            _ => Kind::Message,
        }
    }

    /// The message it holds, if it does; for a map, its entry.
    pub fn message(self) -> Option<Message> {
        (self.kind() == Kind::Message).then(|| Message(self.column(3)))
    }

    /// The enum it holds, if it does.
    pub fn enumeration(self) -> Option<Enum> {
        (self.kind() == Kind::Enum).then(|| Enum(self.column(3)))
    }

    /// Index of its oneof within the message.
    pub fn oneof(self) -> Option<usize> {
        ((self.column(4) >> 8) & 0xff).checked_sub(1).map(|index| index as usize)
    }

    /// Repeated and not a map.
    pub fn is_repeated(self) -> bool {
        self.flags() & flag::REPEATED != 0
    }

    /// A map.
    pub fn is_map(self) -> bool {
        self.flags() & flag::MAP != 0
    }

    /// Whether its absence differs from its default value.
    pub fn has_presence(self) -> bool {
        self.flags() & flag::PRESENCE != 0
    }

    /// Whether repeated scalars are written as one packed block.
    pub fn is_packed(self) -> bool {
        self.is_repeated() && self.kind().wire_type() != 2 && self.flags() & flag::UNPACKED == 0
    }

    /// Deprecated.
    pub fn is_deprecated(self) -> bool {
        self.flags() & flag::DEPRECATED != 0
    }

    /// Deprecated and refused unless runtime allows it.
    pub fn is_disallowed(self) -> bool {
        self.flags() & flag::DISALLOWED != 0
    }

    /// A secret that must not be shown.
    pub fn is_sensitive(self) -> bool {
        self.flags() & flag::SENSITIVE != 0
    }

    /// Whether Envoy warns that it is work in progress.
    pub fn is_work_in_progress(self) -> bool {
        self.flags() & flag::FIELD_WIP != 0
    }

    /// Bytes of its `validate.FieldRules`; empty if it has none.
    pub fn rules(self) -> &'static [u8] {
        pooled(self.column(5))
    }
}

/// A oneof of a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Oneof(u32);

impl Oneof {
    /// Name as in the `.proto` file.
    pub fn name(self) -> &'static str {
        pooled_str(ONEOFS.cell(self.0, 0))
    }

    /// Whether one of its fields must be set.
    pub fn is_required(self) -> bool {
        ONEOFS.cell(self.0, 1) != 0
    }
}

/// An enum type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Enum(u32);

impl Enum {
    /// Finds an enum by its full name.
    pub fn find(full_name: &str) -> Option<Self> {
        let name = full_name.as_bytes();
        search(word(ENUM_COUNT), |row| pooled(ENUMS.cell(row, 0)).cmp(name)).map(Self)
    }

    /// Full name.
    pub fn name(self) -> &'static str {
        pooled_str(ENUMS.cell(self.0, 0))
    }

    /// Its values in the order of declaration.
    pub fn values(self) -> impl ExactSizeIterator<Item = EnumValue> {
        let first = ENUMS.cell(self.0, 1);
        (first..first + ENUMS.cell(self.0, 2)).map(EnumValue)
    }

    /// The first value with this number.
    pub fn value(self, number: i32) -> Option<EnumValue> {
        self.values().find(|value| value.number() == number)
    }

    /// The value with this name, whatever the case: Envoy reads its configuration so.
    pub fn value_by_name(self, name: &str) -> Option<EnumValue> {
        self.values().find(|value| value.name().eq_ignore_ascii_case(name))
    }
}

/// A value of an enum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EnumValue(u32);

impl EnumValue {
    fn column(self, column: usize) -> u32 {
        VALUES.cell(self.0, column)
    }

    /// Name, without the enum's.
    pub fn name(self) -> &'static str {
        pooled_str(self.column(0))
    }

    /// Number.
    pub fn number(self) -> i32 {
        self.column(1) as i32
    }

    /// Deprecated.
    pub fn is_deprecated(self) -> bool {
        self.column(2) & flag::VALUE_DEPRECATED != 0
    }

    /// Deprecated and refused unless runtime allows it.
    pub fn is_disallowed(self) -> bool {
        self.column(2) & flag::VALUE_DISALLOWED != 0
    }
}
