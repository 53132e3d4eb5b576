//! From a response's resources to checked messages.
//!
//! In the state of the world a response carries everything because of one. A resource whose bytes are in force is told by
//! its name and their comparison ([`decode_new`]) and neither checked nor decoded again.

use std::borrow::Cow;
use std::rc::Rc;

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::google::protobuf::Any;
use prost::bytes::Bytes;
use prost::{Message, Name};
use sampan_config::schema::Message as Schema;
use sampan_config::{CheckOptions, LoadError, UnknownFields, check};
use xds_client::{Decoded, Resource};

use super::Context;

/// A message that is a resource of its own.
pub trait Named: Message + Name + Default {
    /// What others call it by.
    fn resource_name(&self) -> &str;
}

/// Names the field that names the resource.
macro_rules! named {
    ($($message:ty: $field:ident),* $(,)?) => {
        $(impl Named for $message {
            fn resource_name(&self) -> &str {
                &self.$field
            }
        })*
    };
}

named! {
    envoy_types::pb::envoy::config::cluster::v3::Cluster: name,
    envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig: name,
    envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment: cluster_name,
    envoy_types::pb::envoy::config::listener::v3::Listener: name,
    envoy_types::pb::envoy::config::route::v3::RouteConfiguration: name,
    envoy_types::pb::envoy::config::route::v3::ScopedRouteConfiguration: name,
    envoy_types::pb::envoy::config::route::v3::VirtualHost: name,
    envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret: name,
    envoy_types::pb::envoy::service::runtime::v3::Runtime: name,
}

/// A message and the bytes it came in.
pub struct Checked<'a, M> {
    /// The message.
    pub message: &'a M,
    /// Its bytes: what an identical push is told by, and what `/config_dump` shows.
    pub bytes: &'a Bytes,
    /// The resource's own version; the response's where it has none.
    pub version: &'a str,
}

/// Decodes and checks a resource.
pub fn decode<M: Named + 'static>(context: &Context, resource: Resource) -> Result<Decoded, String> {
    let own = resource.name.clone();
    let (decoded, wrong) = decode_alone::<M>(context, resource)?;
    match wrong {
        Some(reason) if own.is_empty() => Err(format!("{}: {reason}", decoded.name)),
        Some(reason) => Err(format!("{own}: {reason}")),
        None => Ok(decoded),
    }
}

/// The same, where what is wrong in an `Any` of the message is the affair of who uses that: it comes beside the message.
fn decode_alone<M: Named + 'static>(
    context: &Context,
    resource: Resource,
) -> Result<(Decoded, Option<String>), String> {
    let Resource { name, version, type_url, value, aliases, .. } = resource;
    let value = value.unwrap_or_default();
    let Unpacked { message, bytes, wrong } =
        one::<M>(context, &type_url, value.clone()).map_err(|reason| {
            // What breaks a constraint can still say who it is.
            let named = M::decode(value).ok().filter(|_| name.is_empty());
            let name = named.map_or_else(|| name.clone(), |message| message.resource_name().to_owned());
            if name.is_empty() { reason } else { format!("{name}: {reason}") }
        })?;
    let name = if name.is_empty() { message.resource_name().to_owned() } else { name };
    Ok((Decoded { name, version, aliases, bytes, message: Box::new(message) }, wrong))
}

/// The resources as what [`decode`] made of them. One of another type cannot be among them.
pub fn checked<M: 'static>(resources: &[Rc<Decoded>]) -> Vec<Checked<'_, M>> {
    resources.iter().filter_map(|resource| Checked::of(resource)).collect()
}

impl<'a, M: 'static> Checked<'a, M> {
    fn of(resource: &'a Decoded) -> Option<Self> {
        let message = resource.message.downcast_ref()?;
        Some(Self { message, bytes: &resource.bytes, version: &resource.version })
    }
}

/// In place of a message whose bytes are in force: its name.
struct InForce(Box<str>);

/// In place of a message of which an `Any` is wrong: its name, and what is wrong.
struct Wrong {
    name: Box<str>,
    reason: String,
}

/// A resource that was decoded and checked, or whose bytes are in force.
pub struct Known<'a, M> {
    /// What its message calls it.
    pub name: &'a str,
    /// Its bytes.
    pub bytes: &'a Bytes,
    /// The resource's own version; the response's where it has none.
    pub version: &'a str,
    /// The message; none: its bytes were in force when it came, or it is wrong.
    pub decoded: Option<&'a M>,
    /// What is wrong in an `Any` of it. As in Envoy that refuses this resource and not those beside it.
    wrong: Option<&'a str>,
}

/// Decodes and checks a resource if `in_force` says that its name and bytes are not in force. Of messages whose field 1 is
/// their name. What is wrong in an `Any` of it [`Known::message`] says.
pub fn decode_new<M: Named + 'static>(
    context: &Context,
    resource: Resource,
    in_force: impl FnOnce(&str, &[u8]) -> bool,
) -> Result<Decoded, String> {
    let known = resource.value.clone().filter(|_| message_name(&resource.type_url) == M::full_name());
    let known = known.and_then(|bytes| {
        let name = name_of(&bytes).filter(|name| in_force(name, &bytes))?;
        Some((Box::<str>::from(name), bytes.clone()))
    });
    let Some((own, bytes)) = known else {
        let (decoded, wrong) = decode_alone::<M>(context, resource)?;
        let Some(reason) = wrong else { return Ok(decoded) };
        let own = decoded.message.downcast_ref::<M>().map_or(&*decoded.name, M::resource_name);
        let message = Box::new(Wrong { name: own.into(), reason });
        return Ok(Decoded { message, ..decoded });
    };
    let Resource { name, version, aliases, .. } = resource;
    let name = if name.is_empty() { own.to_string() } else { name };
    Ok(Decoded { name, version, aliases, bytes, message: Box::new(InForce(own)) })
}

/// The name of a message that begins with it, as encoders have it. Whatever follows may say otherwise, but not where bytes
/// are equal to those that were decoded under this name.
fn name_of(bytes: &[u8]) -> Option<&str> {
    const FIELD_1: u8 = 0x0a;
    let mut rest = bytes.strip_prefix(&[FIELD_1])?;
    let length = prost::decode_length_delimiter(&mut rest).ok()?;
    std::str::from_utf8(rest.get(..length)?).ok()
}

/// The resources as what [`decode_new`] made of them.
pub fn known<M: Named + 'static>(resources: &[Rc<Decoded>]) -> Vec<Known<'_, M>> {
    resources.iter().filter_map(|resource| Known::of(resource)).collect()
}

impl<'a, M: Named + 'static> Known<'a, M> {
    fn of(resource: &'a Decoded) -> Option<Self> {
        let Decoded { bytes, version, message, .. } = resource;
        if let Some(InForce(name)) = message.downcast_ref() {
            return Some(Self { name, bytes, version, decoded: None, wrong: None });
        }
        if let Some(Wrong { name, reason }) = message.downcast_ref() {
            return Some(Self { name, bytes, version, decoded: None, wrong: Some(reason) });
        }
        let message: &M = message.downcast_ref()?;
        Some(Self { name: message.resource_name(), bytes, version, decoded: Some(message), wrong: None })
    }

    /// The message; decoded now where it was in force, but not for who asks.
    pub fn message(&self) -> Result<Cow<'a, M>, String>
    where
        M: Clone,
    {
        if let Some(reason) = self.wrong {
            return Err(reason.to_owned());
        }
        match self.decoded {
            Some(message) => Ok(Cow::Borrowed(message)),
            None => M::decode(&**self.bytes).map(Cow::Owned).map_err(|e| e.to_string()),
        }
    }
}

/// The name of a type URL's message.
fn message_name(type_url: &str) -> &str {
    type_url.rsplit_once('/').map_or(type_url, |(_, name)| name)
}

/// A message whose own fields keep its constraints.
struct Unpacked<M> {
    message: M,
    bytes: Bytes,
    /// What is wrong in an `Any` of it.
    wrong: Option<String>,
}

fn one<M: Named>(context: &Context, type_url: &str, value: Bytes) -> Result<Unpacked<M>, String> {
    let message = message_name(type_url);
    if message == Wrapper::full_name() {
        let wrapper = Wrapper::decode(&*value).map_err(|e| format!("Unable to unpack as {message}: {e}"))?;
        let Any { type_url, value } = wrapper.resource.unwrap_or_default();
        return one(context, &type_url, value.into());
    }
    let name = M::full_name();
    if message != name {
        return Err(format!("Unable to unpack as {name}: the resource is of type {type_url}"));
    }
    let (message, unknown, wrong) = match unpack(&value, context.unknown) {
        Ok((message, unknown)) => (message, unknown, None),
        Err(reason) => {
            let (message, unknown) = unpack_outside(&value, context.unknown)?;
            (message, unknown, Some(reason))
        }
    };
    context.tell_unknown(&unknown);
    Ok(Unpacked { message, bytes: value, wrong })
}

/// Checks a resource's bytes against its type's constraints and decodes them; beside it stands what was unknown.
pub fn unpack<M: Named>(value: &[u8], unknown: UnknownFields) -> Result<(M, Vec<LoadError>), String> {
    unpack_with(value, unknown, true)
}

/// The same without a look at what stands in an `Any`.
fn unpack_outside<M: Named>(value: &[u8], unknown: UnknownFields) -> Result<(M, Vec<LoadError>), String> {
    unpack_with(value, unknown, false)
}

fn unpack_with<M: Named>(
    value: &[u8],
    unknown: UnknownFields,
    recurse_any: bool,
) -> Result<(M, Vec<LoadError>), String> {
    let name = M::full_name();
    let schema = Schema::find(&name).ok_or_else(|| format!("unknown message type {name}"))?;
    let options = CheckOptions { unknown, recurse_any, ..CheckOptions::default() };
    let report = check(schema, value, &options).map_err(|e| e.to_string())?;
    let message = M::decode(value).map_err(|e| format!("Unable to unpack as {name}: {e}"))?;
    Ok((message, report.unknown))
}
