//! RTDS: one subscription for each `rtds_layer` of the runtime; and the roots of its disk layers, which are watched.

use std::cell::RefCell;
use std::rc::Rc;

use envoy_types::pb::envoy::service::runtime::v3::Runtime as Message;
use envoy_types::pb::google::protobuf::Struct;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::runtime::{Runtime, WantedLayer};
use xds_client::{Decoded, Resource, types};

use super::answer::{Answer, Awaited};
use super::file::Watch;
use super::resource::{checked, decode};
use super::source::kept;
use super::{Context, Source, Subscriber, SubscriptionStats};

/// All RTDS subscriptions.
pub struct Rtds {
    _layers: Vec<Source>,
    _roots: Vec<Watch>,
}

/// The subscriber of one layer.
struct Layer {
    context: Rc<Context>,
    runtime: Runtime,
    wanted: WantedLayer,
    answered: Answer,
    /// The message in force.
    current: RefCell<Option<Bytes>>,
}

impl Rtds {
    /// Subscribes; returns when every layer has been answered.
    pub(super) async fn start(context: &Rc<Context>, runtime: &Runtime) -> Self {
        let scope = context.root.scope("runtime");
        let mut layers = Vec::new();
        let mut answers = Vec::new();
        for wanted in runtime.wanted() {
            let source = wanted.source.clone();
            let answered = Answer::default();
            answers.push(answered.awaited());
            let (context, runtime) = (context.clone(), runtime.clone());
            let layer = Rc::new(Layer {
                context: context.clone(),
                runtime,
                wanted,
                answered,
                current: RefCell::default(),
            });
            layers.push(Source::start(&context, &source, SubscriptionStats::new(&scope), layer));
        }
        Awaited::all(answers).await;
        Self { _layers: layers, _roots: roots(context, runtime) }
    }
}

fn roots(context: &Context, runtime: &Runtime) -> Vec<Watch> {
    let Some(watcher) = &context.watcher else { return Vec::new() };
    let watch = |root: std::path::PathBuf| {
        let runtime = runtime.clone();
        let moved: Rc<dyn Fn()> = Rc::new(move || runtime.reload());
        let all = root.as_os_str().as_encoded_bytes().ends_with(b"/");
        let watch = if all { watcher.watch_folder(&root, moved) } else { watcher.watch_file(&root, moved) };
        watch.inspect_err(|e| super::log_error(&format!("cannot watch {}: {e}", root.display()))).ok()
    };
    runtime.roots().into_iter().filter_map(watch).collect()
}

impl Layer {
    fn set(&self, values: Option<&Struct>) -> Result<(), String> {
        self.runtime.set_layer(self.wanted.index, values).map_err(|e| e.to_string())?;
        self.answered.settle();
        Ok(())
    }
}

impl Subscriber for Layer {
    fn type_url(&self) -> &'static str {
        types::RUNTIME
    }

    fn name(&self) -> Option<&str> {
        Some(&self.wanted.name)
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode::<Message>(&self.context, resource)
    }

    fn update(&self, _version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        let resources = checked::<Message>(resources);
        let [one] = resources.as_slice() else {
            return Err(format!(
                "Unexpected RTDS resource length, number of added resources {}, number of removed resources 0",
                resources.len()
            ));
        };
        let (name, expected) = (&one.message.name, &self.wanted.name);
        if name != expected {
            return Err(format!("Unexpected RTDS runtime (expecting {expected}): {name}"));
        }
        self.set(one.message.layer.as_ref())?;
        // A copy of its own: a slice would keep the whole response.
        self.current.replace(Some(one.bytes.to_vec().into()));
        Ok(())
    }

    fn change(&self, _version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        match (added, removed) {
            ([], []) => Ok(()),
            ([first, ..], _) => self.update(&first.version, added),
            ([], _) => {
                self.current.replace(None);
                self.set(None)
            }
        }
    }

    fn failed(&self) {
        self.answered.settle();
    }

    fn in_force(&self) -> Vec<KeptResource> {
        self.current.borrow().iter().map(|bytes| kept("", bytes)).collect()
    }
}
