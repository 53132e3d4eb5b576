//! `bootstrap.overload_manager`, checked.

use std::path::PathBuf;
use std::time::Duration;

use envoy_types::pb::envoy::config::overload::v3 as pb;
use envoy_types::pb::envoy::extensions::resource_monitors::downstream_connections::v3::DownstreamConnectionsConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::fixed_heap::v3::FixedHeapConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::injected_resource::v3::InjectedResourceConfig;
use envoy_types::pb::google::protobuf::Any;
use pb::resource_monitor::ConfigType;
use pb::trigger::TriggerOneof;
use prost::Message;

use crate::error::{AtField, ConfigError, ConfigResult};

/// The one monitor that is known by its name: it is asked at each accept instead of being measured.
pub(super) const MAX_CONNECTIONS: &str = "envoy.resource_monitors.global_downstream_max_connections";

/// What is measured at each refresh.
#[derive(Debug, PartialEq)]
pub(super) enum Monitor {
    /// Against these many bytes.
    FixedHeap(u64),
    /// A file that holds a number between 0 and 1.
    Injected(PathBuf),
}

/// When an action sets in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Trigger {
    Threshold(f64),
    Scaled { scaling: f64, saturation: f64 },
}

impl Trigger {
    /// The state that a pressure means.
    pub(super) fn state(self, pressure: f64) -> f32 {
        match self {
            Self::Threshold(at) => f32::from(u8::from(pressure >= at)),
            Self::Scaled { scaling, .. } if pressure <= scaling => 0.0,
            Self::Scaled { saturation, .. } if pressure >= saturation => 1.0,
            Self::Scaled { scaling, saturation } => ((pressure - scaling) / (saturation - scaling)) as f32,
        }
    }
}

/// The actions that are supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    StopAcceptingRequests,
    DisableHttpKeepalive,
    StopAcceptingConnections,
    RejectIncomingConnections,
    ShrinkHeap,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::StopAcceptingRequests,
        Self::DisableHttpKeepalive,
        Self::StopAcceptingConnections,
        Self::RejectIncomingConnections,
        Self::ShrinkHeap,
    ];

    /// Envoy's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::StopAcceptingRequests => "envoy.overload_actions.stop_accepting_requests",
            Self::DisableHttpKeepalive => "envoy.overload_actions.disable_http_keepalive",
            Self::StopAcceptingConnections => "envoy.overload_actions.stop_accepting_connections",
            Self::RejectIncomingConnections => "envoy.overload_actions.reject_incoming_connections",
            Self::ShrinkHeap => "envoy.overload_actions.shrink_heap",
        }
    }

    fn parse(name: &str) -> ConfigResult<Self> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| match name {
            "envoy.overload_actions.reduce_timeouts" | "envoy.overload_actions.reset_high_memory_stream" => {
                ConfigError::unsupported(format_args!("overload action {name}")).at("name")
            }
            _ => ConfigError::new(format!("Unknown Overload Manager Action {name}")).at("name"),
        })
    }
}

/// An action with its triggers by resource.
#[derive(Debug)]
pub(super) struct ActionModel {
    pub(super) kind: Kind,
    pub(super) triggers: Vec<(String, Trigger)>,
}

/// The checked message.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) refresh_interval: Duration,
    pub(super) monitors: Vec<(String, Monitor)>,
    pub(super) actions: Vec<ActionModel>,
    pub(super) max_connections: Option<u64>,
}

impl Model {
    pub(super) fn parse(message: &pb::OverloadManager) -> ConfigResult<Self> {
        if !message.loadshed_points.is_empty() {
            return Err(ConfigError::unsupported("loadshed_points").at("loadshed_points"));
        }
        if message.buffer_factory_config.is_some() {
            return Err(ConfigError::unsupported("buffer_factory_config").at("buffer_factory_config"));
        }
        let refresh = message.refresh_interval.as_ref();
        let refresh_interval = refresh.map_or(Duration::from_secs(1), |d| {
            Duration::new(u64::try_from(d.seconds).unwrap_or(0), u32::try_from(d.nanos).unwrap_or(0))
        });
        let mut model = Self {
            refresh_interval: refresh_interval.max(Duration::from_millis(1)),
            monitors: Vec::new(),
            actions: Vec::new(),
            max_connections: None,
        };
        for (index, monitor) in message.resource_monitors.iter().enumerate() {
            model.add_monitor(monitor).at_index("resource_monitors", index)?;
        }
        for (index, action) in message.actions.iter().enumerate() {
            model.add_action(action).at_index("actions", index)?;
        }
        Ok(model)
    }

    fn add_monitor(&mut self, message: &pb::ResourceMonitor) -> ConfigResult<()> {
        let name = &message.name;
        let Some(ConfigType::TypedConfig(any)) = &message.config_type else {
            return Err(ConfigError::missing("typed_config"));
        };
        if self.monitors.iter().any(|(known, _)| known == name) {
            return Err(ConfigError::new(format!("Duplicate resource monitor {name}")));
        }
        let monitor = match any.type_url.rsplit('/').next().unwrap_or_default() {
            "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig" => {
                if name != MAX_CONNECTIONS {
                    let reason =
                        format!("this type goes with the name {MAX_CONNECTIONS} only, not with '{name}'");
                    return Err(ConfigError::new(reason).at("name"));
                }
                let max = decode::<DownstreamConnectionsConfig>(any)?.max_active_downstream_connections;
                let max = u64::try_from(max).unwrap_or_default();
                return match self.max_connections.replace(max) {
                    None => Ok(()),
                    Some(_) => Err(ConfigError::new(format!("Duplicate resource monitor {name}"))),
                };
            }
            "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig" => {
                let config = decode::<FixedHeapConfig>(any)?;
                if config.max_heap_size_bytes_runtime.is_some() {
                    let field = "max_heap_size_bytes_runtime";
                    return Err(ConfigError::unsupported(field).at(field).at("typed_config"));
                }
                match config.max_heap_size_bytes {
                    0 => Err(ConfigError::new("fixed_heap: max heap size must be greater than 0")
                        .at("max_heap_size_bytes")
                        .at("typed_config")),
                    max => Ok(Monitor::FixedHeap(max)),
                }
            }
            "envoy.extensions.resource_monitors.injected_resource.v3.InjectedResourceConfig" => {
                let path = PathBuf::from(decode::<InjectedResourceConfig>(any)?.filename);
                if path.parent().is_none_or(|folder| !folder.as_os_str().is_empty() && !folder.exists()) {
                    let reason = format!("unable to add filesystem watch for file {}", path.display());
                    return Err(ConfigError::new(reason).at("filename").at("typed_config"));
                }
                Ok(Monitor::Injected(path))
            }
            other => {
                Err(ConfigError::unsupported(format_args!("resource monitor {other}")).at("typed_config"))
            }
        }?;
        if name == MAX_CONNECTIONS {
            return Err(
                ConfigError::new(format!("{name} wants a DownstreamConnectionsConfig")).at("typed_config")
            );
        }
        self.monitors.push((name.clone(), monitor));
        Ok(())
    }

    fn add_action(&mut self, message: &pb::OverloadAction) -> ConfigResult<()> {
        let kind = Kind::parse(&message.name)?;
        if self.actions.iter().any(|action| action.kind == kind) {
            return Err(ConfigError::new(format!("Duplicate overload action {}", message.name)));
        }
        if message.typed_config.is_some() {
            let reason = format!(
                "Overload action \"{}\" has an unexpected value for the typed_config field",
                message.name
            );
            return Err(ConfigError::new(reason).at("typed_config"));
        }
        let mut triggers: Vec<(String, Trigger)> = Vec::new();
        for (index, trigger) in message.triggers.iter().enumerate() {
            let name = &trigger.name;
            let checked = checked_trigger(trigger).and_then(|checked| {
                if triggers.iter().any(|(known, _)| known == name) {
                    let reason = format!("Duplicate trigger resource for overload action {}", message.name);
                    return Err(ConfigError::new(reason));
                }
                // The connection limit may be named; it is no pressure and triggers nothing, as in Envoy.
                if name != MAX_CONNECTIONS && !self.monitors.iter().any(|(known, _)| known == name) {
                    let reason =
                        format!("Unknown trigger resource {name} for overload action {}", message.name);
                    return Err(ConfigError::new(reason).at("name"));
                }
                Ok(checked)
            });
            triggers.push((name.clone(), checked.at_index("triggers", index)?));
        }
        self.actions.push(ActionModel { kind, triggers });
        Ok(())
    }
}

fn checked_trigger(message: &pb::Trigger) -> ConfigResult<Trigger> {
    match &message.trigger_oneof {
        Some(TriggerOneof::Threshold(threshold)) => Ok(Trigger::Threshold(threshold.value)),
        Some(TriggerOneof::Scaled(s)) if s.scaling_threshold >= s.saturation_threshold => {
            Err(ConfigError::new("scaling_threshold must be less than saturation_threshold").at("scaled"))
        }
        Some(TriggerOneof::Scaled(s)) => {
            Ok(Trigger::Scaled { scaling: s.scaling_threshold, saturation: s.saturation_threshold })
        }
        None => Err(ConfigError::new(format!("action not set for trigger {}", message.name))),
    }
}

fn decode<M: Message + Default>(any: &Any) -> ConfigResult<M> {
    M::decode(&*any.value).map_err(|e| ConfigError::new(format!("malformed message: {e}")).at("typed_config"))
}
