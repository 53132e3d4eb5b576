//! The HTTP connection manager: the network filter that serves HTTP.
//!
//! `config` is its model, `connection` decides the codec, `h1` and `h2` take requests off it, `exchange` serves one,
//! `request` and [`path`] normalise it, `responder` writes the response whatever the codec.

mod config;
mod connection;
mod date;
mod discovered;
mod exchange;
mod h1;
mod h2;
mod local_reply;
mod origin;
pub mod path;
mod proxy_status;
mod referer;
pub(crate) mod request;
mod responder;
mod stats;
mod xfcc;

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::ConfigResult;
use sampan_listener::{
    Downstream, FactoryContext, NetworkFilter, NetworkFilterRegistry, TerminalFilter, Worker,
};

pub use config::{Chain, Manager, NamedFilter, duration, header_case};
pub use request::{append_ip, is_upgrade, split_port};

use crate::filter::{HttpFilter, HttpFilterRegistry, decode};

/// The manager's type.
pub const TYPE: &str = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

struct Terminal(Arc<Manager>);

impl TerminalFilter for Terminal {
    fn serve(self: Arc<Self>, downstream: Downstream, worker: Rc<Worker>) -> LocalBoxFuture<'static, ()> {
        Box::pin(connection::serve(self.0.clone(), downstream, worker))
    }

    fn serves_refused(&self) -> bool {
        true
    }
}

/// A manager that answers by itself: the filter stands in the router's place.
pub fn answering(
    message: &HttpConnectionManager,
    context: &FactoryContext,
    name: &str,
    filter: Arc<dyn HttpFilter>,
) -> ConfigResult<NetworkFilter> {
    let mut manager = Manager::from_proto(message, context, &HttpFilterRegistry::default())?;
    manager.chain.filters.push(NamedFilter { name: name.into(), filter, disabled: false });
    Ok(NetworkFilter::Terminal(Arc::new(Terminal(Arc::new(manager)))))
}

/// Registers the manager as a network filter that makes its HTTP filters of `filters`, and the network filters that are
/// kin to HTTP ones.
pub fn register(registry: &mut NetworkFilterRegistry, filters: Arc<HttpFilterRegistry>) {
    crate::filters::ext_authz::network::register(registry);
    sampan_listener::tcp_proxy::register_with_tunnels(registry, crate::router::tunnels);
    registry.register(TYPE, move |any, context| -> ConfigResult<NetworkFilter> {
        let message: HttpConnectionManager = decode(any)?;
        let manager = Manager::from_proto(&message, context, &filters)?;
        Ok(NetworkFilter::Terminal(Arc::new(Terminal(Arc::new(manager)))))
    });
}
