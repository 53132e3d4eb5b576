//! gRPC's framing: one byte of flags, four bytes of length, the message.
//! Source: gRPC's `PROTOCOL-HTTP2.md`, "Length-Prefixed-Message".

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::transport::End;

const PREFIX: usize = 5;

/// A message with its prefix.
pub fn framed(message: &impl Message) -> Bytes {
    framed_with(message, &[])
}

/// A message of which some fields are encoded already: on the wire fields may stand in any order.
pub fn framed_with(message: &impl Message, fields: &[u8]) -> Bytes {
    let length = message.encoded_len() + fields.len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    // A request above 4 GiB would need more names than there is memory for.
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(&mut bytes);
    bytes.put_slice(fields);
    bytes.freeze()
}

/// Puts messages together from the chunks in which they come. A message that lies in one chunk is not copied.
#[derive(Debug, Default)]
pub struct Deframer {
    chunks: VecDeque<Bytes>,
    length: usize,
    /// The greatest message; 0: any.
    limit: usize,
}

impl Deframer {
    /// One that takes no message above so many bytes; 0: any.
    pub fn limited(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Another chunk.
    pub fn push(&mut self, chunk: Bytes) {
        self.length += chunk.len();
        if !chunk.is_empty() {
            self.chunks.push_back(chunk);
        }
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    /// The message is compressed, which was not offered, or too long (status 8).
    pub fn pop(&mut self) -> Result<Option<Bytes>, End> {
        if self.length < PREFIX {
            return Ok(None);
        }
        let mut prefix = [0; PREFIX];
        let mut bytes = self.chunks.iter().flat_map(|chunk| chunk.iter());
        prefix.iter_mut().zip(&mut bytes).for_each(|(to, from)| *to = *from);
        if prefix[0] != 0 {
            return Err(End::internal("a compressed message, which was not asked for"));
        }
        let size = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if self.limit > 0 && size > self.limit {
            let message = format!("a message of {size} bytes, more than the {} that are taken", self.limit);
            return Err(End { code: 8, message });
        }
        if self.length - PREFIX < size {
            return Ok(None);
        }
        self.take(PREFIX);
        Ok(Some(self.take(size)))
    }

    fn take(&mut self, size: usize) -> Bytes {
        self.length -= size;
        match self.chunks.front_mut() {
            Some(first) if first.len() >= size => {
                let taken = first.split_to(size);
                if first.is_empty() {
                    self.chunks.pop_front();
                }
                return taken;
            }
            _ => {}
        }
        let mut taken = BytesMut::with_capacity(size);
        while taken.len() < size
            && let Some(first) = self.chunks.front_mut()
        {
            let part = first.len().min(size - taken.len());
            taken.put_slice(&first[..part]);
            first.advance(part);
            if first.is_empty() {
                self.chunks.pop_front();
            }
        }
        taken.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Status;

    #[test]
    fn messages_come_whole_however_they_were_cut() {
        let messages = [Status { code: 1, message: "a".repeat(300) }, Status::default()];
        let all: Vec<u8> = messages.iter().flat_map(|m| framed(m).to_vec()).collect();
        for size in [1, 2, 3, 7, 305, all.len()] {
            let (mut deframer, mut got) = (Deframer::default(), Vec::new());
            for chunk in all.chunks(size) {
                deframer.push(Bytes::copy_from_slice(chunk));
                while let Some(bytes) = deframer.pop().unwrap() {
                    got.push(Status::decode(bytes).unwrap());
                }
            }
            assert_eq!(got, messages, "chunks of {size}");
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_by_its_prefix() {
        let mut deframer = Deframer::limited(3);
        deframer.push(Bytes::from_static(&[0, 0, 0, 0, 3, 1, 2, 3, 0, 0, 0, 0, 4]));
        assert_eq!(deframer.pop().unwrap().unwrap().len(), 3);
        assert_eq!(deframer.pop().unwrap_err().code, 8);
    }

    #[test]
    fn a_compressed_message_is_refused() {
        let mut deframer = Deframer::default();
        deframer.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert_eq!(deframer.pop().unwrap_err().code, 13);
    }
}
