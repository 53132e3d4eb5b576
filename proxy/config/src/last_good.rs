//! The form of the last good configuration: what control planes gave to one node, kept for a start without them.
//!
//! ```text
//!  0   8  "SampanLG"
//!  8   4  version of the form, little endian
//! 12   8  length of the body, little endian
//! 20  16  XXH3-128 of the body, little endian
//! 36      the body: LastGood as protobuf
//! ```
//!
//! The checksum finds damage, not malice: who may write the file may write a configuration. A file of another form,
//! another length or another node is refused as a whole; nothing of a damaged one is used.

use bytes::Bytes;
use prost::Message;
use thiserror::Error;
use twox_hash::XxHash3_128;

const MAGIC: &[u8; 8] = b"SampanLG";
const FORM: u32 = 1;
const HEADER: usize = 36;

/// The greatest file that is read or written.
pub const LIMIT: u64 = 256 << 20;

/// All of it.
#[derive(Clone, PartialEq, Message)]
pub struct LastGood {
    /// `node.id` of who kept it.
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// `node.cluster` of who kept it.
    #[prost(string, tag = "2")]
    pub node_cluster: String,
    /// When, in seconds since 1970.
    #[prost(int64, tag = "3")]
    pub saved_at: i64,
    /// What was subscribed to and answered.
    #[prost(message, repeated, tag = "4")]
    pub subscriptions: Vec<Subscription>,
}

/// What one subscription has.
#[derive(Clone, PartialEq, Message)]
pub struct Subscription {
    /// The cluster that serves it.
    #[prost(string, tag = "1")]
    pub source: String,
    /// The resources' type.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// The one resource that is wanted; empty: all there are.
    #[prost(string, tag = "3")]
    pub name: String,
    /// The version of the whole.
    #[prost(string, tag = "4")]
    pub version: String,
    /// The resources.
    #[prost(message, repeated, tag = "5")]
    pub resources: Vec<KeptResource>,
}

/// One resource.
#[derive(Clone, PartialEq, Message)]
pub struct KeptResource {
    /// Its own version; empty: that of the whole.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The encoded message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// Why a file is not used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LastGoodError {
    /// Something else.
    #[error("it is no file of a last good configuration")]
    Foreign,
    /// Of an older or newer program.
    #[error("it has form {0}, and this program reads form {FORM}")]
    Form(u32),
    /// Cut off, or with something behind it.
    #[error("it should have {wanted} bytes behind its header and has {found}")]
    Length {
        /// What the header says.
        wanted: u64,
        /// What is there.
        found: u64,
    },
    /// More than is read.
    #[error("it has {0} bytes, and at most {LIMIT} are read")]
    Large(u64),
    /// The bytes are not those that were written.
    #[error("it is damaged: its checksum does not match")]
    Checksum,
    /// The checksum is right and the body is not.
    #[error("it cannot be decoded: {0}")]
    Decode(String),
    /// Another node kept it.
    #[error("it belongs to node '{id}' of cluster '{cluster}'")]
    Node {
        /// Its `node.id`.
        id: String,
        /// Its `node.cluster`.
        cluster: String,
    },
}

impl LastGood {
    /// Reads a file. The resources are slices of it.
    ///
    /// # Errors
    /// Why nothing of it is used.
    pub fn read(mut file: Bytes, node_id: &str, node_cluster: &str) -> Result<Self, LastGoodError> {
        if file.len() as u64 > LIMIT {
            return Err(LastGoodError::Large(file.len() as u64));
        }
        let header: [u8; HEADER] =
            file.first_chunk().copied().filter(|h| h.starts_with(MAGIC)).ok_or(LastGoodError::Foreign)?;
        let form = u32::from_le_bytes(field(&header, 8));
        if form != FORM {
            return Err(LastGoodError::Form(form));
        }
        let body = file.split_off(HEADER);
        let (wanted, found) = (u64::from_le_bytes(field(&header, 12)), body.len() as u64);
        if wanted != found {
            return Err(LastGoodError::Length { wanted, found });
        }
        if u128::from_le_bytes(field(&header, 20)) != XxHash3_128::oneshot(&body) {
            return Err(LastGoodError::Checksum);
        }
        let this = Self::decode(body).map_err(|error| LastGoodError::Decode(error.to_string()))?;
        if this.node_id != node_id || this.node_cluster != node_cluster {
            let Self { node_id: id, node_cluster: cluster, .. } = this;
            return Err(LastGoodError::Node { id, cluster });
        }
        Ok(this)
    }

    /// The file's bytes.
    pub fn write(&self) -> Vec<u8> {
        let mut file = vec![0; HEADER];
        file.reserve_exact(self.encoded_len());
        // A Vec takes whatever comes.
        let _ = self.encode(&mut file);
        seal(&mut file);
        file
    }
}

/// Writes the header of what stands behind its place.
pub fn seal(file: &mut [u8]) {
    let Some((header, body)) = file.split_first_chunk_mut::<HEADER>() else { return };
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&FORM.to_le_bytes());
    header[12..20].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[20..].copy_from_slice(&XxHash3_128::oneshot(body).to_le_bytes());
}

fn field<const N: usize>(header: &[u8; HEADER], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> LastGood {
        let resource = |value: &'static str| KeptResource { version: "1".into(), value: value.into() };
        LastGood {
            node_id: "n".into(),
            node_cluster: "c".into(),
            saved_at: 1,
            subscriptions: vec![Subscription {
                source: "ads".into(),
                type_url: "t".into(),
                name: String::new(),
                version: "2".into(),
                resources: vec![resource("x"), resource("")],
            }],
        }
    }

    fn read(file: Vec<u8>) -> Result<LastGood, LastGoodError> {
        LastGood::read(file.into(), "n", "c")
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(read(kept().write()), Ok(kept()));
        assert_eq!(
            LastGood::read(kept().write().into(), "n", "d"),
            Err(LastGoodError::Node { id: "n".into(), cluster: "c".into() })
        );
    }

    #[test]
    fn every_damage_is_found() {
        let good = kept().write();
        for end in 0..good.len() {
            assert!(read(good[..end].to_vec()).is_err(), "cut at {end}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let wrong = match at {
                0..8 => matches!(read(bad), Err(LastGoodError::Foreign)),
                8..12 => matches!(read(bad), Err(LastGoodError::Form(_))),
                12..20 => matches!(read(bad), Err(LastGoodError::Length { .. })),
                _ => matches!(read(bad), Err(LastGoodError::Checksum)),
            };
            assert!(wrong, "a bit at {at}");
        }
        let mut long = good.clone();
        long.push(0);
        assert!(matches!(read(long), Err(LastGoodError::Length { .. })));
        let mut nonsense = good;
        nonsense.truncate(HEADER);
        nonsense.push(0xff);
        seal(&mut nonsense);
        assert!(matches!(read(nonsense), Err(LastGoodError::Decode(_))));
    }
}
