use envoy_types::pb::envoy::config::bootstrap::v3::{RuntimeLayer, runtime_layer};
use envoy_types::pb::google::protobuf::{Struct, Value as Proto, value::Kind};

use super::*;
use crate::stats::Store;

fn tree(fields: impl IntoIterator<Item = (&'static str, Kind)>) -> Struct {
    let fields = fields.into_iter().map(|(k, v)| (k.into(), Proto { kind: Some(v) })).collect();
    Struct { fields }
}

fn layered(layers: Vec<(&str, LayerSpecifier)>) -> LayeredRuntime {
    let layer =
        |(name, specifier): (&str, _)| RuntimeLayer { name: name.into(), layer_specifier: Some(specifier) };
    LayeredRuntime { layers: layers.into_iter().map(layer).collect() }
}

fn admin() -> LayerSpecifier {
    LayerSpecifier::AdminLayer(runtime_layer::AdminLayer {})
}

#[test]
fn layers_merge_and_the_admin_layer_wins() {
    let store = Store::new();
    let fraction = tree([
        ("numerator", Kind::NumberValue(25.0)),
        ("denominator", Kind::StringValue("TEN_THOUSAND".into())),
    ]);
    let values = tree([
        ("health_check", Kind::StructValue(tree([("min_interval", Kind::NumberValue(5.0))]))),
        ("flag", Kind::BoolValue(true)),
        ("f", Kind::NumberValue(1.5)),
        ("quoted", Kind::StringValue("true".into())),
        ("frac", Kind::StructValue(fraction)),
    ]);
    let config = layered(vec![("base", LayerSpecifier::StaticLayer(values)), ("admin", admin())]);
    let runtime = Runtime::from_bootstrap(Some(&config), &store.root(), "").unwrap();
    assert_eq!(runtime.integer("health_check.min_interval", 1), 5);
    assert!(runtime.boolean("flag", false) && !runtime.boolean("quoted", false));
    assert_eq!((runtime.integer("f", 0), runtime.double("f", 0.0)), (1, 1.5));
    assert_eq!(runtime.snapshot().get("f"), Some("1.5"));
    assert_eq!(
        runtime.snapshot().get("frac"),
        Some(
            "goo.gle/debugproto \nfields {\n  key: \"denominator\"\n  value {\n    string_value: \
             \"TEN_THOUSAND\"\n  }\n}\nfields {\n  key: \"numerator\"\n  value {\n    number_value: 25\n  }\n}\n"
        )
    );
    assert_eq!(store.value("runtime.num_keys"), Some(5));
    runtime.modify([("flag", "false"), ("new", "7")]).unwrap();
    assert!(!runtime.boolean("flag", true));
    assert_eq!(runtime.integer("new", 0), 7);
    let active = |n| assert_eq!(store.value("runtime.admin_overrides_active"), Some(n));
    active(1);
    runtime.modify([("flag", ""), ("new", "")]).unwrap();
    active(0);
    assert!(runtime.boolean("flag", false));
    assert_eq!(store.value("runtime.load_success"), Some(4));
    assert_eq!(runtime.snapshot().layers().len(), 2);
}

#[test]
fn fractions_take_whole_per_cent_and_fractions() {
    let percent = FractionalPercent { numerator: 50, denominator: DenominatorType::Hundred.into() };
    let fraction = Fraction::fixed(&percent).with_key("k");
    let with = |text: &str| Runtime::new(BTreeMap::from([("k".to_owned(), text.to_owned())]));
    let hits = |runtime: &Runtime| (0..10_000).filter(|r| fraction.hit(runtime, *r)).count();
    assert_eq!(hits(&Runtime::default()), 5000);
    assert_eq!(hits(&with("10")), 1000);
    assert_eq!(hits(&with("{numerator: 25, denominator: TEN_THOUSAND}")), 25);
    assert_eq!(hits(&with("{\"numerator\": 7}")), 700);
    assert_eq!(hits(&with("1000")), 10_000);
    assert_eq!(hits(&with("hello")), 5000);
    assert!(Fraction::ALWAYS.hit(&with("0"), 99));
}

#[test]
fn what_is_not_supported_is_named() {
    let store = Store::new();
    let refused = |layers| Runtime::from_bootstrap(Some(&layered(layers)), &store.root(), "").err().unwrap();
    let rtds = LayerSpecifier::RtdsLayer(Default::default());
    let error = refused(vec![("a", admin()), ("r", rtds)]).to_string();
    assert_eq!(error, "layered_runtime.layers[1].rtds_layer.rtds_config: value is required");
    assert!(refused(vec![("a", admin()), ("b", admin())]).to_string().contains("Too many admin layers"));
    assert!(refused(vec![("a", admin()), ("a", admin())]).to_string().contains("Duplicate layer name: a"));
    let list = tree([("x", Kind::NullValue(0))]);
    let error = refused(vec![("s", LayerSpecifier::StaticLayer(list))]).to_string();
    assert_eq!(error, "layered_runtime.layers[0].static_layer: Invalid runtime entry value for x");
    let fixed = Runtime::new(BTreeMap::new());
    assert_eq!(fixed.modify([("a", "1")]), Err(NoAdminLayer));
}
