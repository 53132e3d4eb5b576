//! The service that a cluster stands for: the first of `istio.services` in its metadata, read once per worker and
//! message.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::{Struct, value::Kind};
use sampan_core::stream_info::Metadata;

/// How many clusters' messages a worker remembers.
const REMEMBERED: usize = 8192;

/// A service.
#[derive(Debug, Default)]
pub(super) struct Service {
    /// Tells it from others; no number is used twice.
    pub(super) number: u64,
    /// Host name; none where the metadata has none.
    pub(super) host: Option<Box<str>>,
    /// Short name.
    pub(super) name: Option<Box<str>>,
    /// Namespace.
    pub(super) namespace: Box<str>,
}

#[derive(Default)]
struct Known {
    next: u64,
    /// By the address of the metadata, which is kept so that no other gets it.
    services: HashMap<usize, Entry, foldhash::fast::RandomState>,
}

type Entry = (Arc<Metadata>, Option<Rc<Service>>);

thread_local! {
    static KNOWN: RefCell<Known> = RefCell::default();
}

/// The service of a cluster's metadata.
pub(super) fn of(metadata: &Arc<Metadata>) -> Option<Rc<Service>> {
    KNOWN.with_borrow_mut(|known| {
        let key = Arc::as_ptr(metadata) as usize;
        if let Some((_, service)) = known.services.get(&key) {
            return service.clone();
        }
        if known.services.len() >= REMEMBERED {
            known.services.clear();
        }
        known.next += 1;
        let service = read(metadata, known.next).map(Rc::new);
        known.services.insert(key, (metadata.clone(), service.clone()));
        service
    })
}

fn read(metadata: &Metadata, number: u64) -> Option<Service> {
    let kind = metadata.get("istio")?.fields.get("services")?.kind.as_ref();
    let Some(Kind::ListValue(list)) = kind else { return None };
    let Some(Kind::StructValue(first)) = list.values.first()?.kind.as_ref() else {
        return Some(Service { number, ..Service::default() });
    };
    Some(Service {
        number,
        host: string(first, "host"),
        name: string(first, "name"),
        namespace: string(first, "namespace").unwrap_or_default(),
    })
}

fn string(fields: &Struct, key: &str) -> Option<Box<str>> {
    Some(match fields.fields.get(key)?.kind.as_ref() {
        Some(Kind::StringValue(text)) => text.as_str().into(),
        _ => "".into(),
    })
}
