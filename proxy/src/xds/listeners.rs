//! LDS: listeners come, change and go.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use envoy_types::pb::envoy::admin::v3::UpdateFailureState;
use envoy_types::pb::envoy::config::listener::v3::Listener as Message;
use envoy_types::pb::google::protobuf::{Any, Timestamp};
use sampan_config::last_good::KeptResource;
use sampan_upstream::Origin;
use xds_client::{Decoded, Resource, types};

use super::answer::Answer;
use super::resource::{Known, decode_new, known};
use super::source::kept;
use super::{Context, Dependencies, Subscriber};
use crate::listeners::ListenerManager;

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

    /// The version of the last response, refused listeners or not.
    pub fn version(&self) -> Arc<str> {
        self.version.borrow().clone()
    }

    /// Returns when the first answer has come, or is known not to.
    pub(super) async fn answered(&self) {
        self.answered.awaited().settled().await;
    }

    fn remove_others(&self, resources: &[Known<'_, Message>]) {
        let names: HashSet<_> = resources.iter().map(|r| r.name).collect();
        let listeners = &self.listeners;
        for entry in listeners.active().into_iter().chain(listeners.warming()) {
            if entry.origin.is_some() && !names.contains(&*entry.config.name) {
                listeners.remove(&entry.config.name);
            }
        }
    }

    fn is_in_force(&self, name: &str, bytes: &[u8]) -> bool {
        let newest = self.listeners.newest(name);
        newest.is_some_and(|entry| entry.origin.as_ref().is_some_and(|origin| *origin.bytes == *bytes))
    }

    fn take(&self, resource: &Known<'_, Message>) -> Result<(), String> {
        if self.is_in_force(resource.name, resource.bytes) {
            return Ok(());
        }
        let origin = Origin {
            version: resource.version.into(),
            // A copy of its own: a slice would keep the whole response.
            bytes: resource.bytes.to_vec().into(),
            updated: SystemTime::now(),
        };
        self.listeners.update(&*resource.message()?, origin, &self.warm).map(drop)
    }

    fn take_all(&self, resources: &[Known<'_, Message>]) -> Result<(), String> {
        let mut names = HashSet::new();
        let mut wrong = Vec::new();
        let mut failures = Vec::new();
        for resource in resources {
            let name = resource.name;
            let taken = if names.insert(name) {
                self.take(resource)
            } else {
                Err(format!("duplicate listener {name} found"))
            };
            if let Err(reason) = taken {
                wrong.push(format!("{name}: {reason}"));
                failures.push((name.to_owned(), failure(resource.bytes, reason)));
            }
        }
        self.listeners.set_failures(failures);
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
        self.remove_others(&resources);
        *self.version.borrow_mut() = version.into();
        self.take_all(&resources)
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let _together = self.together();
        removed.iter().for_each(|name| self.listeners.remove(name));
        if !(added.is_empty() && removed.is_empty()) {
            *self.version.borrow_mut() = version.into();
        }
        self.take_all(&known(added))
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

fn failure(bytes: &[u8], details: String) -> UpdateFailureState {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UpdateFailureState {
        failed_configuration: Some(Any {
            type_url: "type.googleapis.com/envoy.config.listener.v3.Listener".to_owned(),
            value: bytes.to_vec(),
        }),
        last_update_attempt: Some(Timestamp {
            seconds: since.as_secs() as i64,
            nanos: (since.subsec_millis() * 1_000_000) as i32,
        }),
        details,
        ..Default::default()
    }
}
