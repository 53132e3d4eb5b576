//! Row sizes, offsets and flags that the writer of the blob shares with the reader.

/// First word: format and version.
pub const MAGIC: u32 = 0x3143_5353;
/// Words before the first table: magic, six offsets (five tables, pool), number of messages, number of enums.
pub const HEADER_WORDS: usize = 9;
/// name, file, flags, first field, first oneof, field count | oneof count << 16.
pub const MESSAGE_WORDS: usize = 6;
/// number, name, JSON name, type index, kind | (oneof + 1) << 8 | flags << 16, rules.
pub const FIELD_WORDS: usize = 6;
/// name, required.
pub const ONEOF_WORDS: usize = 2;
/// name, first value, count.
pub const ENUM_WORDS: usize = 3;
/// name, number, flags.
pub const VALUE_WORDS: usize = 3;
/// No type index.
pub const NONE: u32 = u32::MAX;

/// Low byte of a message's flags: types that protobuf's JSON mapping treats specially.
pub const WELL_KNOWN_ANY: u32 = 1;
/// `google.protobuf.Struct`.
pub const WELL_KNOWN_STRUCT: u32 = 2;
/// `google.protobuf.Value`.
pub const WELL_KNOWN_VALUE: u32 = 3;
/// `google.protobuf.ListValue`.
pub const WELL_KNOWN_LIST: u32 = 4;
/// `google.protobuf.Duration`.
pub const WELL_KNOWN_DURATION: u32 = 5;
/// `google.protobuf.Timestamp`.
pub const WELL_KNOWN_TIMESTAMP: u32 = 6;
/// `google.protobuf.FieldMask`.
pub const WELL_KNOWN_FIELD_MASK: u32 = 7;
/// `google.protobuf.UInt32Value` and its kind.
pub const WELL_KNOWN_WRAPPER: u32 = 8;
/// `google.protobuf.Empty`: nothing special, but kept.
pub const WELL_KNOWN_EMPTY: u32 = 0;

/// Bits of the flag words.
pub mod flag {
    /// Message: entry of a map field.
    pub const MAP_ENTRY: u32 = 1 << 8;
    /// Message: marked work in progress.
    pub const MESSAGE_WIP: u32 = 1 << 9;
    /// Message: its constraints are switched off.
    pub const UNCHECKED: u32 = 1 << 10;

    /// Field: repeated, not a map.
    pub const REPEATED: u32 = 1;
    /// Field: a map.
    pub const MAP: u32 = 1 << 1;
    /// Field: absence differs from the default value.
    pub const PRESENCE: u32 = 1 << 2;
    /// Field: deprecated.
    pub const DEPRECATED: u32 = 1 << 3;
    /// Field: deprecated and refused unless runtime allows it.
    pub const DISALLOWED: u32 = 1 << 4;
    /// Field: never to be shown.
    pub const SENSITIVE: u32 = 1 << 5;
    /// Field: marked work in progress.
    pub const FIELD_WIP: u32 = 1 << 6;
    /// Field: scalars written one by one.
    pub const UNPACKED: u32 = 1 << 7;

    /// Enum value: deprecated.
    pub const VALUE_DEPRECATED: u32 = 1;
    /// Enum value: deprecated and refused unless runtime allows it.
    pub const VALUE_DISALLOWED: u32 = 1 << 1;
}
