//! Small readings of protobuf values that several models share.

use std::time::Duration;

use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration, UInt32Value};
use sampan_core::error::{ConfigError, ConfigResult};

/// A duration; negative or out of range is refused.
pub(crate) fn duration(d: &ProtoDuration) -> ConfigResult<Duration> {
    let seconds = u64::try_from(d.seconds).map_err(|_| ConfigError::new("duration must not be negative"))?;
    let nanos = u32::try_from(d.nanos).ok().filter(|n| *n < 1_000_000_000);
    let nanos = nanos.ok_or_else(|| ConfigError::new("duration out of range"))?;
    Ok(Duration::new(seconds, nanos))
}

/// An optional duration of which 0 means none.
pub(crate) fn nonzero(d: Option<&ProtoDuration>, field: &str) -> ConfigResult<Option<Duration>> {
    d.map(duration).transpose().map(|d| d.filter(|d| !d.is_zero())).map_err(|e| e.at(field))
}

pub(crate) fn u32_of(value: Option<UInt32Value>) -> Option<u32> {
    value.map(|v| v.value)
}

/// Decodes an `Any` whose type the caller has checked.
pub(crate) fn decode<M: prost::Message + Default>(any: &Any) -> ConfigResult<M> {
    M::decode(any.value.as_slice()).map_err(|e| ConfigError::new(format!("malformed {}: {e}", any.type_url)))
}

/// The message's full name of a type URL.
pub(crate) fn message_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or_default()
}

/// Refuses a field that changes behaviour and is not implemented.
pub(crate) fn refuse(is_set: bool, field: &str) -> ConfigResult<()> {
    if is_set { Err(ConfigError::unsupported(field).at(field)) } else { Ok(()) }
}
