//! Keys of `jwt_authn` that are fetched ahead of requests (`async_fetch`).

use std::rc::Rc;

use sampan_http::filters::jwt_authn::WantedKeys;
use sampan_listener::ListenerConfig;
use tokio::sync::oneshot;

use super::Context;

/// Fetches what listeners want, for as long as they live.
pub struct KeysAhead {
    context: Rc<Context>,
}

impl KeysAhead {
    pub(super) fn new(context: Rc<Context>) -> Self {
        Self { context }
    }

    /// What of a listener's keys was not fetched yet, in Envoy's words.
    pub fn unready(listener: &ListenerConfig) -> impl Iterator<Item = String> {
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedKeys>());
        wanted.filter_map(WantedKeys::awaited).map(|uri| format!("target Jwks async fetching url={uri}"))
    }

    /// Begins to fetch what a listener wants; what is awaited then returns when all that it waits for was fetched once.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedKeys>());
        let answers = wanted.filter_map(|wanted| {
            let (done, answer) = oneshot::channel();
            let clusters = self.context.control.clusters().clone();
            tokio::task::spawn_local(wanted.follow(clusters, move || {
                // Who waited may be gone.
                let _ = done.send(());
            }));
            wanted.holds_listener.then_some(answer)
        });
        let answers: Vec<_> = answers.collect();
        async move {
            for answer in answers {
                // Keys that nobody wants any more are awaited by nobody.
                let _ = answer.await;
            }
        }
    }
}
