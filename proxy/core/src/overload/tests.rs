use std::cell::Cell;
use std::rc::Rc;

use envoy_types::pb::envoy::extensions::resource_monitors::downstream_connections::v3::DownstreamConnectionsConfig;
use envoy_types::pb::envoy::extensions::resource_monitors::fixed_heap::v3::FixedHeapConfig;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use super::*;
use crate::stats::Store;

struct Fake(Rc<Cell<u64>>);

impl Heap for Fake {
    fn allocated(&self) -> u64 {
        self.0.get()
    }
    fn shrink(&self) {}
}

fn monitor<M: Message + Name>(name: &str, message: &M) -> pb::ResourceMonitor {
    let any =
        Any { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() };
    pb::ResourceMonitor {
        name: name.into(),
        config_type: Some(pb::resource_monitor::ConfigType::TypedConfig(any)),
    }
}

fn action(name: &str, trigger: pb::trigger::TriggerOneof) -> pb::OverloadAction {
    let trigger = pb::Trigger { name: "heap".into(), trigger_oneof: Some(trigger) };
    pb::OverloadAction { name: name.into(), triggers: vec![trigger], typed_config: None }
}

fn threshold(value: f64) -> pb::trigger::TriggerOneof {
    pb::trigger::TriggerOneof::Threshold(pb::ThresholdTrigger { value })
}

fn scaled(scaling_threshold: f64, saturation_threshold: f64) -> pb::trigger::TriggerOneof {
    pb::trigger::TriggerOneof::Scaled(pb::ScaledTrigger { scaling_threshold, saturation_threshold })
}

fn heap_of(max_heap_size_bytes: u64) -> FixedHeapConfig {
    FixedHeapConfig { max_heap_size_bytes, ..Default::default() }
}

fn heap_with(actions: Vec<pb::OverloadAction>) -> pb::OverloadManager {
    let heap = monitor("heap", &heap_of(1000));
    pb::OverloadManager { resource_monitors: vec![heap], actions, ..Default::default() }
}

#[test]
fn pressure_moves_actions_and_their_gauges() {
    let (store, used) = (Store::new(), Rc::new(Cell::new(0)));
    let message = heap_with(vec![
        action("envoy.overload_actions.stop_accepting_requests", threshold(0.9)),
        action("envoy.overload_actions.reject_incoming_connections", scaled(0.5, 0.7)),
        action("envoy.overload_actions.stop_accepting_connections", threshold(0.95)),
    ]);
    let mut overload = Overload::from_proto(&message, &store.root(), Box::new(Fake(used.clone()))).unwrap();
    let state = overload.state();
    let stopped = state.stop_accepting_connections();
    let value = |name: &str| store.value(&format!("overload.{name}")).unwrap();
    overload.refresh();
    assert!(!state.stop_accepting_requests.hits(|| 0) && !state.reject_incoming_connections.hits(|| 0));
    used.set(600);
    overload.refresh();
    assert_eq!(value("heap.pressure"), 60);
    assert_eq!(value("envoy.overload_actions.reject_incoming_connections.scale_percent"), 50);
    assert!(state.reject_incoming_connections.hits(|| u64::MAX / 4));
    assert!(!state.reject_incoming_connections.hits(|| u64::MAX / 4 * 3));
    used.set(990);
    overload.refresh();
    assert!(state.stop_accepting_requests.hits(|| unreachable!()) && *stopped.borrow());
    assert_eq!(value("envoy.overload_actions.stop_accepting_requests.active"), 1);
    used.set(0);
    overload.refresh();
    assert!(!*stopped.borrow());
    assert_eq!(value("envoy.overload_actions.reject_incoming_connections.scale_percent"), 0);
}

#[test]
fn connections_are_admitted_up_to_the_limit() {
    let limit = DownstreamConnectionsConfig { max_active_downstream_connections: 2 };
    let resource_monitors = vec![monitor(model::MAX_CONNECTIONS, &limit)];
    let message = pb::OverloadManager { resource_monitors, ..Default::default() };
    let overload =
        Overload::from_proto(&message, &Store::new().root(), Box::new(Fake(Rc::default()))).unwrap();
    let state = overload.state();
    assert!(state.limits_connections() && !overload.measures());
    assert!(state.admit_connection() && state.admit_connection() && !state.admit_connection());
    state.release_connection();
    assert!(state.admit_connection());
}

#[test]
fn refusals_name_what_is_wrong() {
    let error = |message: &pb::OverloadManager| {
        Overload::from_proto(message, &Store::new().root(), Box::new(Fake(Rc::default())))
            .err()
            .unwrap()
            .to_string()
    };
    let of = |name: &str, trigger| error(&heap_with(vec![action(name, trigger)]));
    assert_eq!(
        of("envoy.overload_actions.reduce_timeouts", threshold(0.1)),
        "actions[0].name: overload action envoy.overload_actions.reduce_timeouts is not supported"
    );
    assert_eq!(of("x", threshold(0.1)), "actions[0].name: Unknown Overload Manager Action x");
    assert_eq!(
        of("envoy.overload_actions.shrink_heap", scaled(0.5, 0.5)),
        "actions[0].triggers[0].scaled: scaling_threshold must be less than saturation_threshold"
    );
    let mut twice = heap_with(vec![]);
    twice.resource_monitors.push(twice.resource_monitors[0].clone());
    assert_eq!(error(&twice), "resource_monitors[1]: Duplicate resource monitor heap");
    let mut unknown = heap_with(vec![action("envoy.overload_actions.shrink_heap", threshold(0.5))]);
    unknown.actions[0].triggers[0].name = "nosuch".into();
    assert!(error(&unknown).contains("Unknown trigger resource nosuch"));
    let zero = monitor("heap", &heap_of(0));
    let zero = pb::OverloadManager { resource_monitors: vec![zero], ..Default::default() };
    assert!(error(&zero).contains("max heap size must be greater than 0"));
}
