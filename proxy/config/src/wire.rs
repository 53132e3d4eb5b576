//! Protobuf wire format: just enough to read, write and walk messages without generated types.
//!
//! Source: the Protocol Buffers encoding document. Groups (wire types 3 and 4) are obsolete and refused: no message
//! of Envoy has them. A varint is at most ten bytes; bits beyond the 64th are dropped, as every reader does.

/// Why a message could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end within a field.
    #[error("truncated message")]
    Truncated,
    /// A varint of more than ten bytes.
    #[error("varint of more than ten bytes")]
    Varint,
    /// A field number of zero or beyond 2^29.
    #[error("invalid field number")]
    FieldNumber,
    /// A wire type that proto3 does not have.
    #[error("invalid wire type {0}")]
    WireType(u8),
}

/// The value of one field as it stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 1.
    Fixed64(u64),
    /// Wire type 2.
    Bytes(&'a [u8]),
    /// Wire type 5.
    Fixed32(u32),
}

impl Value<'_> {
    /// The wire type of this value.
    pub fn wire_type(&self) -> u8 {
        match self {
            Self::Varint(_) => 0,
            Self::Fixed64(_) => 1,
            Self::Bytes(_) => 2,
            Self::Fixed32(_) => 5,
        }
    }
}

/// Iterates over the fields of one message. After an error it ends.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `message`.
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    /// What has not been read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn field(&mut self) -> Result<(u32, Value<'a>), WireError> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).unwrap_or(u32::MAX);
        if number == 0 || number >= 1 << 29 {
            return Err(WireError::FieldNumber);
        }
        let value = match (tag & 7) as u8 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| WireError::Truncated)?;
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.array()?)),
            other => return Err(WireError::WireType(other)),
        };
        Ok((number, value))
    }

    /// Reads one varint: for packed fields.
    #[inline]
    pub fn varint(&mut self) -> Result<u64, WireError> {
        // Nearly all tags and lengths are one byte.
        if let [byte @ ..0x80, rest @ ..] = self.rest {
            self.rest = rest;
            return Ok(u64::from(*byte));
        }
        self.long_varint()
    }

    fn long_varint(&mut self) -> Result<u64, WireError> {
        let mut out = 0u64;
        for (index, byte) in self.rest.iter().take(10).enumerate() {
            out |= u64::from(byte & 0x7f).wrapping_shl(7 * index as u32);
            if byte & 0x80 == 0 {
                self.rest = &self.rest[index + 1..];
                return Ok(out);
            }
        }
        Err(if self.rest.len() < 10 { WireError::Truncated } else { WireError::Varint })
    }

    /// Reads `N` bytes: for packed fixed-size fields.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(WireError::Truncated)?;
        self.rest = tail;
        Ok(*head)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.rest.split_at_checked(length).ok_or(WireError::Truncated)?;
        self.rest = tail;
        Ok(head)
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<(u32, Value<'a>), WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a field's tag.
pub fn put_tag(out: &mut Vec<u8>, number: u32, wire_type: u8) {
    put_varint(out, u64::from(number) << 3 | u64::from(wire_type));
}

/// Appends a length-delimited field.
pub fn put_bytes(out: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    put_tag(out, number, 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Opens a length-delimited field whose length is not known yet. `guess` is about how many bytes will follow: a
/// wrong guess costs one move of the content, nothing else.
pub fn open(out: &mut Vec<u8>, number: u32, guess: usize) -> Hole {
    put_tag(out, number, 2);
    let width = varint_width(guess as u64);
    out.resize(out.len() + width, 0);
    Hole { start: out.len(), width }
}

/// The place of a length that [`close`] fills in.
#[derive(Debug, Clone, Copy)]
pub struct Hole {
    start: usize,
    width: usize,
}

/// Closes what [`open`] opened: everything appended since is the field's content.
pub fn close(out: &mut Vec<u8>, hole: Hole) {
    let length = out.len() - hole.start;
    let width = varint_width(length as u64);
    if width != hole.width {
        let start = hole.start - hole.width + width;
        out.resize(out.len().max(start + length), 0);
        out.copy_within(hole.start..hole.start + length, start);
        out.truncate(start + length);
    }
    let mut value = length as u64;
    let at = hole.start - hole.width;
    for byte in &mut out[at..at + width] {
        *byte = value as u8 & 0x7f | 0x80;
        value >>= 7;
    }
    out[at + width - 1] &= 0x7f;
}

fn varint_width(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_of_any_guess_give_the_same_bytes() {
        for length in [0usize, 1, 127, 128, 300, 16_383, 16_384, 70_000] {
            let content: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let mut expected = Vec::new();
            put_bytes(&mut expected, 7, &content);
            for guess in [0usize, 127, 128, 20_000, 3_000_000] {
                let mut out = b"before".to_vec();
                let hole = open(&mut out, 7, guess);
                out.extend_from_slice(&content);
                close(&mut out, hole);
                assert_eq!(&out[..6], b"before");
                assert_eq!(&out[6..], &expected[..], "length {length} guess {guess}");
            }
        }
    }

    #[test]
    fn reader_ends_at_the_first_fault() {
        fn all(bytes: &[u8]) -> Option<Result<(u32, Value<'_>), WireError>> {
            Reader::new(bytes).last()
        }
        assert_eq!(all(&[0x08, 0x96, 0x01]), Some(Ok((1, Value::Varint(150)))));
        assert_eq!(all(&[0x12, 0x05, 1]), Some(Err(WireError::Truncated)));
        assert_eq!(all(&[0x08, 0xff]), Some(Err(WireError::Truncated)));
        assert_eq!(
            all(&[0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            Some(Err(WireError::Varint))
        );
        assert_eq!(all(&[0x0b]), Some(Err(WireError::WireType(3))));
        assert_eq!(all(&[0x00]), Some(Err(WireError::FieldNumber)));
        assert_eq!(all(&[]), None);
    }
}
