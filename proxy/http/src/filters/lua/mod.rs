//! `envoy.filters.http.lua`: scripts that see requests and responses pass, as coroutines.
//!
//! ```text
//!   config   what the messages say; each script is tried when it is read
//!   vm       interpreters, one for each script and worker (and why this one)
//!   session  what one run of a script shares with its stream
//!   drive    runs it: to its end, or to what it waits for
//!   body     runs it on while the body passes
//!   object   methods as scripts call them; handle, headers, info, ssl, call, crypto are their types
//! ```
//!
//! A request for whose chain the script defines no function costs a look at the route. A script that fails is logged
//! and counted (`lua.errors`), and its message goes on as it is by then.
//!
//! As in Envoy: what a script got from its handle is dead once the script has waited (for a body, a call); a body
//! that came during an `httpCall()` can no longer be asked for; headers that were changed move the route.

mod body;
mod call;
mod config;
mod crypto;
mod drive;
mod handle;
mod headers;
mod info;
mod object;
mod session;
mod ssl;
mod value;
mod vm;

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::ConfigResult;

use self::config::{Config, PerRoute};
use self::drive::Run;
use self::session::{Session, Way};
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, Response, RouteConfig, State, Step, decode,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.lua.v3.Lua";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.lua.v3.LuaPerRoute";

struct Lua(Arc<Config>);

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let config = Config::from_proto(&decode(any)?, context)?;
    Ok(HttpFilterKind::Filter(Arc::new(Lua(Arc::new(config)))))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(PerRoute::from_proto(decode(any)?)?))
}

/// Scripts of which something is to be said when the stream ends: they saw the body pass, or changed it.
type Followers = Vec<Rc<Session>>;

impl Lua {
    fn run<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: Option<&'a mut Response>,
        state: &'a mut State,
    ) -> Step<'a> {
        let way = if response.is_some() { Way::Response } else { Way::Request };
        let route = stream.route_config_ref::<PerRoute>(&self.0.name);
        let setup = self.0.setup(route);
        let Some(setup) = setup.filter(|setup| match way {
            Way::Request => setup.on_request,
            Way::Response => setup.on_response,
        }) else {
            return Step::Continue;
        };
        let Some(vm) = setup.vm() else { return Step::Continue };
        Run::start(&self.0, vm, stream, response, state, way)
    }
}

impl HttpFilter for Lua {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        self.run(stream, None, state)
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        self.run(stream, Some(response), state)
    }

    fn on_end(&self, stream: &mut Stream, state: &mut State) {
        let followers = state.take().and_then(|state| state.downcast::<Followers>().ok());
        for session in followers.into_iter().flat_map(|followers| *followers) {
            let mut live = session.live.borrow_mut();
            for (filter, key, value) in live.late.drain(..) {
                stream.info.dynamic_metadata_mut(&filter).fields.insert(key, value);
            }
            if session.way == Way::Request {
                // The router has counted what the script made of the body.
                let counted = stream.info.bytes.received.max(stream.timer.received());
                let received = (counted + live.came).saturating_sub(live.went);
                stream.info.bytes.received = received;
                stream.timer.set_received(received);
            }
        }
    }
}
