//! From a response's resources to checked messages.

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::google::protobuf::Any;
use prost::bytes::Bytes;
use prost::{Message, Name};
use sampan_config::schema::Message as Schema;
use sampan_config::{CheckOptions, UnknownFields, check};

use super::Context;

/// A message and the bytes it came in.
pub struct Checked<M> {
    /// The message.
    pub message: M,
    /// Its bytes: what an identical push is told by, and what `/config_dump` shows.
    pub bytes: Bytes,
}

/// All resources of a response, or why the response is refused.
pub fn decode<M: Message + Name + Default>(
    context: &Context,
    resources: Vec<sampan_config::Resource>,
) -> Result<Vec<Checked<M>>, String> {
    resources.into_iter().map(|r| one(context, &r.type_url, r.value)).collect()
}

fn one<M: Message + Name + Default>(
    context: &Context,
    type_url: &str,
    value: Bytes,
) -> Result<Checked<M>, String> {
    let name = M::full_name();
    let message = type_url.rsplit_once('/').map_or(type_url, |(_, name)| name);
    if message == Wrapper::full_name() {
        let wrapper = Wrapper::decode(value).map_err(|e| format!("Unable to unpack as {message}: {e}"))?;
        let Any { type_url, value } = wrapper.resource.unwrap_or_default();
        return one(context, &type_url, value.into());
    }
    if message != name {
        return Err(format!("Unable to unpack as {name}: the resource is of type {type_url}"));
    }
    let unknown = if context.reject_unknown { UnknownFields::Reject } else { UnknownFields::Warn };
    let schema = Schema::find(&name).ok_or_else(|| format!("unknown message type {name}"))?;
    let options = CheckOptions { unknown, ..CheckOptions::default() };
    let report = check(schema, &value, &options).map_err(|e| e.to_string())?;
    if !report.unknown.is_empty() {
        context.root.scope("server").counter("dynamic_unknown_fields").add(report.unknown.len() as u64);
    }
    let message = M::decode(value.clone()).map_err(|e| format!("Unable to unpack as {name}: {e}"))?;
    Ok(Checked { message, bytes: value })
}
