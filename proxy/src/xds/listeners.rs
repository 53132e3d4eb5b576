//! LDS: listeners come, change and go.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use envoy_types::pb::envoy::admin::v3::UpdateFailureState;
use envoy_types::pb::envoy::config::listener::v3::Listener as Message;
use envoy_types::pb::google::protobuf::{Any, Timestamp};
use prost::Message as _;
use sampan_config::last_good::KeptResource;
use sampan_core::log::{Component, Level};
use sampan_upstream::Origin;
use xds_client::{Decoded, Resource, types};

use super::answer::Answer;
use super::resource::{Known, decode_new, known};
use super::source::kept;
use super::{Context, Dependencies, Subscriber};
use crate::listeners::{Failure, ListenerManager, Taken};

/// The subscriber of `dynamic_resources.lds_config`.
pub struct Lds {
    context: Rc<Context>,
    listeners: Rc<ListenerManager>,
    warm: Dependencies,
    version: RefCell<Arc<str>>,
    answered: Answer,
}

impl Lds {
    pub(super) fn new(context: Rc<Context>, listeners: Rc<ListenerManager>, warm: Dependencies) -> Self {
        let answered = Answer::default();
        Self { context, listeners, warm, version: RefCell::new("".into()), answered }
    }

    /// The version of the last response that changed something, refused listeners or not.
    pub fn version(&self) -> Arc<str> {
        self.version.borrow().clone()
    }

    /// Returns when the first answer has come, or is known not to.
    pub(super) async fn answered(&self) {
        self.answered.awaited().settled().await;
    }

    /// Says how many there were.
    fn remove_others(&self, resources: &[Known<'_, Message>]) -> usize {
        let names: HashSet<_> = resources.iter().map(|r| r.name).collect();
        let listeners = &self.listeners;
        let all = listeners.active().into_iter().chain(listeners.warming());
        let gone = all.filter(|entry| entry.origin.is_some() && !names.contains(&*entry.config.name));
        gone.filter(|entry| listeners.remove(&entry.config.name)).count()
    }

    fn is_in_force(&self, name: &str, bytes: &[u8]) -> bool {
        let newest = self.listeners.newest(name);
        newest.is_some_and(|entry| entry.origin.as_ref().is_some_and(|origin| *origin.bytes == *bytes))
    }

    fn take(&self, resource: &Known<'_, Message>) -> Result<Taken, String> {
        if self.is_in_force(resource.name, resource.bytes) {
            return Ok(Taken::Same);
        }
        let origin = Origin {
            version: resource.version.into(),
            // A copy of its own: a slice would keep the whole response.
            bytes: resource.bytes.to_vec().into(),
            updated: SystemTime::now(),
        };
        self.listeners.update(&*resource.message()?, origin, &self.warm)
    }

    /// Takes what is new; `removed`: how many went before.
    fn take_all(
        &self,
        version: &str,
        resources: &[Known<'_, Message>],
        removed: usize,
    ) -> Result<(), String> {
        let mut names = HashSet::new();
        let mut wrong = Vec::new();
        let mut failures = Vec::new();
        let mut changes = removed;
        for resource in resources {
            let name = resource.name;
            let first = names.insert(name);
            let taken =
                if first { self.take(resource) } else { Err(format!("duplicate listener {name} found")) };
            match taken {
                Ok(Taken::Same) => {}
                Ok(Taken::New) => changes += 1,
                Err(reason) => {
                    sampan_core::log!(
                        Component::Upstream,
                        Level::Warn,
                        "lds: listener '{name}' config rejected: {reason}"
                    );
                    wrong.push(format!("{name}: {reason}"));
                    failures.push(failure(resource, first, reason));
                }
            }
        }
        self.listeners.set_failures(failures);
        if changes > 0 {
            *self.version.borrow_mut() = version.into();
        }
        if !wrong.is_empty() {
            return Err(format!("Error adding/updating listener(s) {}", wrong.join(", ")));
        }
        self.answered.settle();
        Ok(())
    }

    /// One request for all routes and secrets that the listeners want.
    fn together(&self) -> Option<xds_client::Pause> {
        self.context.pause(&[types::ROUTES, types::SCOPED_ROUTES, types::SECRET])
    }
}

impl Subscriber for Lds {
    fn type_url(&self) -> &'static str {
        types::LISTENER
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode_new::<Message>(&self.context, resource, |name, bytes| self.is_in_force(name, bytes))
    }

    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        let _together = self.together();
        let resources = known(resources);
        let removed = self.remove_others(&resources);
        self.take_all(version, &resources, removed)
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let _together = self.together();
        let removed = removed.iter().filter(|name| self.listeners.remove(name)).count();
        self.take_all(version, &known(added), removed)
    }

    fn failed(&self) {
        self.answered.settle();
    }

    fn in_force(&self) -> Vec<KeptResource> {
        let warming = self.listeners.warming();
        let newer: HashSet<_> = warming.iter().map(|entry| entry.config.name.clone()).collect();
        let active = self.listeners.active().into_iter().filter(|entry| !newer.contains(&entry.config.name));
        let all = active.chain(warming);
        all.filter_map(|entry| entry.origin.as_ref().map(|o| kept(&o.version, &o.bytes))).collect()
    }
}

/// As in Envoy the state stands under the listener's name only where the listener had an address and its name once.
fn failure(resource: &Known<'_, Message>, first: bool, details: String) -> Failure {
    let message = Message::decode(&**resource.bytes).unwrap_or_default();
    let name = (first && message.address.is_some()).then(|| resource.name.to_owned());
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let state = UpdateFailureState {
        failed_configuration: Some(Any {
            type_url: "type.googleapis.com/envoy.config.listener.v3.Listener".to_owned(),
            value: resource.bytes.to_vec(),
        }),
        last_update_attempt: Some(Timestamp {
            seconds: since.as_secs() as i64,
            nanos: (since.subsec_millis() * 1_000_000) as i32,
        }),
        details,
        ..Default::default()
    };
    Failure { name, state }
}
