//! The HTTP filters, one file each, and the registry's lines.

use crate::filter::{HttpFilterFactory, HttpFilterRegistry};
use crate::router::{self, RouterConfig};

/// Registers every filter.
pub fn register(registry: &mut HttpFilterRegistry) {
    registry.register(router::TYPE, None, HttpFilterFactory { filter: RouterConfig::factory, route: None });
}
