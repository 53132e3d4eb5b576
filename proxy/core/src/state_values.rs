//! `FilterStateValue`: objects of the filter state made of format strings, for the `set_filter_state` filters.
//!
//! `shared_with_upstream` concerns internal upstream connections, which there are not; `read_only` has no effect in
//! Envoy 1.40 either. A factory that Sampan does not have is refused by name: its object would be without effect.

use std::any::Any;
use std::borrow::Cow;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::common::set_filter_state::v3 as pb;
use envoy_types::pb::google::protobuf::Any as ProtoAny;
use prost::Message;

use crate::error::{AtField, ConfigError, ConfigResult};
use crate::format::{FormatContext, Formatter};
use crate::stream_info::{FilterStateObject, StateObject, StreamInfo};

/// Which factory has made a text; an object of one does not serve a reader of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextKind {
    /// `envoy.string`, `envoy.hashable_string`, `envoy.upstream.dynamic_host`
    String,
    /// `envoy.upstream.dynamic_port`, a number.
    DynamicPort,
    /// `envoy.tcp_proxy.cluster`: where `tcp_proxy` sends the connection.
    TcpProxyCluster,
    /// `envoy.network.upstream_server_name`: the server name of TLS to the upstream.
    UpstreamServerName,
    /// `envoy.network.application_protocols`: what that TLS offers by ALPN, a list.
    ApplicationProtocols,
    /// `envoy.network.upstream_subject_alt_names`: names one of which its certificate must carry, a list.
    UpstreamSubjectAltNames,
}

/// The keys under which the router and `tcp_proxy` look for what TLS to the upstream is to do.
pub const UPSTREAM_SERVER_NAME: &str = "envoy.network.upstream_server_name";
/// See [`UPSTREAM_SERVER_NAME`].
pub const APPLICATION_PROTOCOLS: &str = "envoy.network.application_protocols";
/// See [`UPSTREAM_SERVER_NAME`].
pub const UPSTREAM_SUBJECT_ALT_NAMES: &str = "envoy.network.upstream_subject_alt_names";

/// The key under which `tcp_proxy` looks for its cluster.
pub const TCP_PROXY_CLUSTER: &str = "envoy.tcp_proxy.cluster";

/// The key under which dynamic_forward_proxy looks for the host that is meant, in place of the one that is asked for.
pub const DYNAMIC_HOST: &str = "envoy.upstream.dynamic_host";
/// And for its port.
pub const DYNAMIC_PORT: &str = "envoy.upstream.dynamic_port";

/// The key under which dynamic_forward_proxy leaves the address of a host that it has resolved.
pub const UPSTREAM_ADDRESS: &str = "envoy.stream.upstream_address";

/// Factories of Envoy's whose objects Sampan has no reader for.
const OTHERS: [&str; 8] = [
    "envoy.filters.listener.original_dst.local_ip",
    "envoy.filters.listener.original_dst.remote_ip",
    "envoy.network.ip",
    "envoy.network.network_namespace",
    "envoy.network.transport_socket.original_dst_address",
    "envoy.ratelimit.hits_addend",
    "envoy.tcp_proxy.disable_tunneling",
    "envoy.tcp_proxy.per_connection_idle_timeout_ms",
];

/// An object that is a text.
pub struct TextState {
    kind: TextKind,
    text: String,
}

impl TextState {
    /// An object for the filter state.
    pub fn object(kind: TextKind, text: String) -> StateObject {
        Rc::new(Self { kind, text })
    }

    /// The text of an object if a factory of that kind has made it.
    pub fn read(object: &dyn FilterStateObject, kind: TextKind) -> Option<&str> {
        let this = object.as_any().downcast_ref::<Self>()?;
        (this.kind == kind).then_some(this.text.as_str())
    }
}

impl FilterStateObject for TextState {
    fn plain(&self) -> Option<Cow<'_, str>> {
        Some(self.text.as_str().into())
    }

    fn typed(&self) -> Option<serde_json::Value> {
        (self.kind == TextKind::String).then(|| self.text.clone().into())
    }

    fn message(&self) -> Option<ProtoAny> {
        (self.kind == TextKind::String).then(|| ProtoAny {
            type_url: "type.googleapis.com/google.protobuf.StringValue".to_owned(),
            value: self.text.encode_to_vec(),
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A list of texts, shared with whoever makes the object; the log shows nothing of it, as in Envoy.
pub struct ListState(TextKind, Arc<[Vec<u8>]>);

impl ListState {
    /// An object for the filter state.
    pub fn object(kind: TextKind, list: Arc<[Vec<u8>]>) -> StateObject {
        Rc::new(Self(kind, list))
    }

    /// The list of an object if a factory of that kind has made it.
    pub fn read(object: &dyn FilterStateObject, kind: TextKind) -> Option<&Arc<[Vec<u8>]>> {
        let this = object.as_any().downcast_ref::<Self>()?;
        (this.0 == kind).then_some(&this.1)
    }
}

impl FilterStateObject for ListState {
    fn plain(&self) -> Option<Cow<'_, str>> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A number.
pub struct NumberState(u32);

impl NumberState {
    /// An object for the filter state.
    pub fn object(number: u32) -> StateObject {
        Rc::new(Self(number))
    }
}

impl FilterStateObject for NumberState {
    fn plain(&self) -> Option<Cow<'_, str>> {
        Some(self.0.to_string().into())
    }

    fn typed(&self) -> Option<serde_json::Value> {
        Some(self.0.into())
    }

    fn message(&self) -> Option<ProtoAny> {
        Some(ProtoAny {
            type_url: "type.googleapis.com/google.protobuf.UInt32Value".to_owned(),
            value: self.0.encode_to_vec(),
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An address; the log shows nothing of it, as in Envoy.
pub struct AddressState(IpAddr);

impl AddressState {
    /// An object for the filter state.
    pub fn object(ip: IpAddr) -> StateObject {
        Rc::new(Self(ip))
    }
}

impl FilterStateObject for AddressState {
    fn plain(&self) -> Option<Cow<'_, str>> {
        None
    }

    fn ip(&self) -> Option<IpAddr> {
        Some(self.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The host that filters say is meant.
pub fn dynamic_host(info: &StreamInfo) -> Option<String> {
    let object = info.state(DYNAMIC_HOST)?;
    TextState::read(&*object, TextKind::String).map(str::to_owned)
}

/// And its port, if it is one.
pub fn dynamic_port(info: &StreamInfo) -> Option<u16> {
    let object = info.state(DYNAMIC_PORT)?;
    let NumberState(number) = object.as_any().downcast_ref()?;
    u16::try_from(*number).ok().filter(|port| *port > 0)
}

/// A list of values, made in order.
#[derive(Debug)]
pub struct StateValues(Vec<StateValue>);

#[derive(Debug)]
struct StateValue {
    key: Box<str>,
    kind: TextKind,
    skip_if_empty: bool,
    format: Formatter,
}

impl StateValues {
    /// From a repeated field of that name.
    pub fn from_proto(messages: &[pb::FilterStateValue], field: &str) -> ConfigResult<Self> {
        let all = messages.iter().enumerate().map(|(i, m)| StateValue::from_proto(m).at_index(field, i));
        Ok(Self(all.collect::<ConfigResult<_>>()?))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The object of one value and its key, from what is known now; `None` where an empty one is to be skipped, or the text
    /// is none for its factory.
    /// Each is to be in the state before the next is made: formats may read it.
    pub fn make(&self, index: usize, context: &FormatContext<'_>) -> Option<(&str, StateObject)> {
        let value = self.0.get(index)?;
        let mut text = Vec::new();
        value.format.write(context, &mut text);
        if text.is_empty() && value.skip_if_empty {
            return None;
        }
        let text = String::from_utf8_lossy(&text).into_owned();
        let object = match value.kind {
            TextKind::ApplicationProtocols | TextKind::UpstreamSubjectAltNames => {
                let parts = text.split(',').filter(|part| !part.is_empty());
                ListState::object(value.kind, parts.map(|part| part.as_bytes().to_vec()).collect())
            }
            TextKind::DynamicPort => NumberState::object(text.trim().parse().ok()?),
            kind => TextState::object(kind, text),
        };
        Some((&value.key, object))
    }
}

impl StateValue {
    fn from_proto(message: &pb::FilterStateValue) -> ConfigResult<Self> {
        use pb::filter_state_value::{Key, Value};
        let Some(Key::ObjectKey(key)) = &message.key else { return Err(ConfigError::missing("object_key")) };
        let Some(Value::FormatString(format)) = &message.value else {
            return Err(ConfigError::missing("format_string"));
        };
        let factory = if message.factory_key.is_empty() { key } else { &message.factory_key };
        let kind = match factory.as_str() {
            "envoy.string" | "envoy.hashable_string" | DYNAMIC_HOST => TextKind::String,
            DYNAMIC_PORT => TextKind::DynamicPort,
            TCP_PROXY_CLUSTER => TextKind::TcpProxyCluster,
            UPSTREAM_SERVER_NAME => TextKind::UpstreamServerName,
            APPLICATION_PROTOCOLS => TextKind::ApplicationProtocols,
            UPSTREAM_SUBJECT_ALT_NAMES => TextKind::UpstreamSubjectAltNames,
            other if OTHERS.contains(&other) => {
                return Err(ConfigError::unsupported(format_args!("the filter state factory {other}")));
            }
            _ => return Err(ConfigError::new(format!("'{key}' does not have an object factory"))),
        };
        Ok(Self {
            key: key.as_str().into(),
            kind,
            skip_if_empty: message.skip_if_empty,
            format: Formatter::from_proto(format).at("format_string")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_serves_readers_of_its_kind_only() {
        let object = TextState::object(TextKind::String, "c".into());
        assert_eq!(TextState::read(&*object, TextKind::TcpProxyCluster), None);
        assert_eq!(TextState::read(&*object, TextKind::String), Some("c"));
    }

    #[test]
    fn factories_that_are_not_there_are_told_apart_from_those_that_no_one_has() {
        use envoy_types::pb::envoy::config::core::v3::SubstitutionFormatString;
        let parse = |key: &str| {
            StateValue::from_proto(&pb::FilterStateValue {
                key: Some(pb::filter_state_value::Key::ObjectKey(key.into())),
                value: Some(pb::filter_state_value::Value::FormatString(SubstitutionFormatString::default())),
                ..Default::default()
            })
            .unwrap_err()
            .to_string()
        };
        assert_eq!(parse("x"), "'x' does not have an object factory");
        assert_eq!(parse("envoy.network.ip"), "the filter state factory envoy.network.ip is not supported");
    }
}
