//! The messages of MongoDB's protocol before OP_MSG, and as much of BSON as the counters ask for.
//!
//! A message is read as Envoy reads it: parts are taken one behind the other, and its length counts only where a message
//! has optional parts. What Envoy's reader throws at is an error.
//!
//! A message is held until it is complete, up to [`LONGEST_HELD`]. Of longer ones the head is enough where nobody asks for
//! more (replies, inserts): their documents are passed over. Others are an error.

/// Something that is no message.
#[derive(Debug, PartialEq)]
pub(super) struct Malformed;

/// Documents in documents; MongoDB's own limit is a hundred.
const DEEPEST: usize = 100;
/// Larger messages than MongoDB takes (48 MB) are none.
const LONGEST: usize = 64 << 20;
/// What a connection can make each direction keep.
const LONGEST_HELD: usize = 1 << 20;
const HEADER: usize = 16;
/// Of a reply, before its documents.
const REPLY_HEAD: usize = HEADER + 20;

/// A field's value, as far as anybody asks.
#[derive(Debug, PartialEq)]
pub(super) enum Value {
    Document(Document),
    Array,
    Text(String),
    Number(i64),
    Other,
}

/// Fields in order, and how many bytes they took.
#[derive(Debug, PartialEq, Default)]
pub(super) struct Document {
    pub(super) fields: Vec<(String, Value)>,
    pub(super) size: usize,
}

/// One message.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Reply { to: i32, flags: i32, cursor: i64, documents: usize, size: usize },
    Query { id: i32, flags: i32, collection: String, query: Document },
    GetMore,
    Insert,
    KillCursors,
    Command,
    CommandReply,
}

impl Document {
    pub(super) fn find(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(super) fn document(&self, name: &str) -> Option<&Document> {
        self.fields.iter().find_map(|(key, value)| match value {
            Value::Document(document) if key == name => Some(document),
            _ => None,
        })
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.fields.iter().find_map(|(key, value)| match value {
            Value::Text(text) if key == name => Some(text.as_str()),
            _ => None,
        })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(head)
    }

    fn i32(&mut self) -> Result<i32, Malformed> {
        self.take(4)?.try_into().map(i32::from_le_bytes).map_err(|_| Malformed)
    }

    fn i64(&mut self) -> Result<i64, Malformed> {
        self.take(8)?.try_into().map(i64::from_le_bytes).map_err(|_| Malformed)
    }

    fn length(&mut self) -> Result<usize, Malformed> {
        usize::try_from(self.i32()?).map_err(|_| Malformed)
    }

    fn c_string(&mut self) -> Result<String, Malformed> {
        let end = self.0.iter().position(|b| *b == 0).ok_or(Malformed)?;
        let text = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(text)
    }

    fn string(&mut self) -> Result<String, Malformed> {
        let length = self.length()?;
        let bytes = self.take(length)?;
        Ok(String::from_utf8_lossy(&bytes[..length.saturating_sub(1)]).into_owned())
    }

    fn document(&mut self, depth: usize) -> Result<Document, Malformed> {
        let before = self.0.len();
        let size = self.length()?;
        if size == 0 || size > before || depth > DEEPEST {
            return Err(Malformed);
        }
        let behind = before - size;
        let mut document = Document { fields: Vec::new(), size };
        loop {
            match self.0.len().checked_sub(behind) {
                None | Some(0) => return Err(Malformed),
                Some(1) if self.take(1)? == [0] => return Ok(document),
                Some(1) => return Err(Malformed),
                Some(_) => {}
            }
            let kind = self.take(1)?[0];
            let key = self.c_string()?;
            let value = self.value(kind, depth)?;
            document.fields.push((key, value));
        }
    }

    fn value(&mut self, kind: u8, depth: usize) -> Result<Value, Malformed> {
        let skip = match kind {
            0x02 => return Ok(Value::Text(self.string()?)),
            0x03 => return Ok(Value::Document(self.document(depth + 1)?)),
            0x04 => return self.document(depth + 1).map(|_| Value::Array),
            0x10 => return Ok(Value::Number(self.i32()?.into())),
            0x12 => return Ok(Value::Number(self.i64()?)),
            0x0b => {
                self.c_string()?;
                self.c_string()?;
                0
            }
            0x05 => self.length()? + 1,
            0x0e => self.length()?,
            0x01 | 0x09 | 0x11 => 8,
            0x07 => 12,
            0x08 => 1,
            0x0a => 0,
            _ => return Err(Malformed),
        };
        self.take(skip)?;
        Ok(Value::Other)
    }

    /// What stands before a reply's documents: flags, cursor and how many they are.
    fn reply(&mut self) -> Result<(i32, i64, usize), Malformed> {
        let (flags, cursor) = (self.i32()?, self.i64()?);
        self.i32()?;
        Ok((flags, cursor, usize::try_from(self.i32()?).unwrap_or(0)))
    }

    /// Documents until `end` bytes are left.
    fn documents(&mut self, end: usize) -> Result<(), Malformed> {
        while self.0.len() > end {
            self.document(0)?;
        }
        Ok(())
    }
}

/// What stands at the beginning of what came.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// More must come.
    Incomplete,
    /// A message and its length, some of which may be still to come.
    Message(Message, usize),
}

/// The next message.
pub(super) fn decode(data: &[u8]) -> Result<Next, Malformed> {
    let mut reader = Reader(data);
    let Ok(length) = reader.i32() else { return Ok(Next::Incomplete) };
    let length = usize::try_from(length).map_err(|_| Malformed)?;
    if !(HEADER..=LONGEST).contains(&length) {
        return Err(Malformed);
    }
    if length > LONGEST_HELD {
        return by_head(reader, data.len(), length);
    }
    if data.len() < length {
        return Ok(Next::Incomplete);
    }
    let end = data.len() - length;
    let message = body(&mut reader, end)?;
    Ok(Next::Message(message, data.len() - reader.0.len()))
}

/// A message that is too long to be held, behind its length.
fn by_head(mut reader: Reader<'_>, come: usize, length: usize) -> Result<Next, Malformed> {
    if come < REPLY_HEAD {
        return Ok(Next::Incomplete);
    }
    let (_, to, op) = (reader.i32()?, reader.i32()?, reader.i32()?);
    let message = match op {
        1 => {
            let (flags, cursor, documents) = reader.reply()?;
            Message::Reply { to, flags, cursor, documents, size: length - REPLY_HEAD }
        }
        2002 => Message::Insert,
        _ => return Err(Malformed),
    };
    Ok(Next::Message(message, length))
}

/// A message behind its length; `end` bytes stand behind it.
fn body(reader: &mut Reader<'_>, end: usize) -> Result<Message, Malformed> {
    let (id, to, op) = (reader.i32()?, reader.i32()?, reader.i32()?);
    Ok(match op {
        1 => {
            let (flags, cursor, documents) = reader.reply()?;
            let mut size = 0;
            for _ in 0..documents {
                size += reader.document(0)?.size;
            }
            Message::Reply { to, flags, cursor, documents, size }
        }
        2004 => {
            let (flags, collection) = (reader.i32()?, reader.c_string()?);
            reader.take(8)?;
            let query = reader.document(0)?;
            if reader.0.len() > end {
                reader.document(0)?;
            }
            Message::Query { id, flags, collection, query }
        }
        2005 => {
            reader.i32()?;
            reader.c_string()?;
            reader.take(12)?;
            Message::GetMore
        }
        2002 => {
            reader.i32()?;
            reader.c_string()?;
            reader.documents(end)?;
            Message::Insert
        }
        2007 => {
            reader.i32()?;
            let count = usize::try_from(reader.i32()?).unwrap_or(0);
            reader.take(count.saturating_mul(8))?;
            Message::KillCursors
        }
        2010 => {
            reader.c_string()?;
            reader.c_string()?;
            reader.document(0)?;
            reader.document(0)?;
            reader.documents(end)?;
            Message::Command
        }
        2011 => {
            reader.document(0)?;
            reader.document(0)?;
            reader.documents(end)?;
            Message::CommandReply
        }
        _ => return Err(Malformed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_message_is_an_error() {
        assert_eq!(decode(&[16, 0]), Ok(Next::Incomplete));
        assert_eq!(decode(&[16, 0, 0, 0]), Ok(Next::Incomplete));
        assert_eq!(decode(&[15, 0, 0, 0]), Err(Malformed));
        assert_eq!(decode(&[255; 4]), Err(Malformed));
        let message = [16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xdd, 7, 0, 0];
        assert_eq!(decode(&message), Err(Malformed), "OP_MSG");
    }

    #[test]
    fn long_messages_are_not_held() {
        let head = |op: i32| {
            let words = [2 << 20, 1, 7, op, 2, 0, 0, 0, 3];
            words.iter().flat_map(|word: &i32| word.to_le_bytes()).collect::<Vec<u8>>()
        };
        let size = (2 << 20) - 36;
        let reply = Message::Reply { to: 7, flags: 2, cursor: 0, documents: 3, size };
        assert_eq!(decode(&head(1)), Ok(Next::Message(reply, 2 << 20)));
        assert_eq!(decode(&head(1)[..35]), Ok(Next::Incomplete));
        assert_eq!(decode(&head(2002)), Ok(Next::Message(Message::Insert, 2 << 20)));
        assert_eq!(decode(&head(2004)), Err(Malformed));
    }

    #[test]
    fn documents_have_a_depth() {
        let mut document = vec![5, 0, 0, 0, 0];
        for _ in 0..200 {
            let size = (document.len() + 8) as i32;
            document = [&size.to_le_bytes()[..], &[3, b'a', 0], &document, &[0]].concat();
        }
        assert_eq!(Reader(&document).document(0), Err(Malformed));
    }
}
