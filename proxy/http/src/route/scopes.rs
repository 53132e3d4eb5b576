//! Scoped routes: which route table serves a request is told by a key that is made of its headers.
//!
//! A scope is a key and a slot for a table of its own. A request whose key cannot be made, or that no scope has, finds
//! no route. The key is computed whenever the route is: filters that change headers may change the scope.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::config::route::v3::ScopedRouteConfiguration;
use envoy_types::pb::envoy::config::route::v3::scoped_route_configuration::key::fragment::Type as Part;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::ScopedRoutes;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::scoped_routes::{
    ConfigSpecifier,
    scope_key_builder::FragmentBuilder,
    scope_key_builder::fragment_builder::{HeaderValueExtractor, Type, header_value_extractor::ExtractType},
};
use sampan_core::config_source::ConfigSource;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderMap, HeaderName};
use sampan_core::stats::Scope;
use sampan_listener::FactoryContext;

use super::{RouteContext, RouteSlot, RouteTable};
use crate::filter::HttpFilterRegistry;

/// The scopes of a connection manager.
pub struct Scoped {
    fragments: Vec<Fragment>,
    slot: Arc<ScopeSlot>,
    /// Serves where no scope does.
    nothing: Arc<RouteSlot>,
}

/// Keys, as [`key`] writes them, to tables.
pub type Scopes = HashMap<Box<[u8]>, Arc<RouteSlot>, foldhash::fast::RandomState>;

/// What holds the scopes, which may be exchanged while it serves.
#[derive(Default)]
pub struct ScopeSlot(ArcSwap<Scopes>);

impl ScopeSlot {
    /// Exchanges the scopes.
    pub fn publish(&self, scopes: Arc<Scopes>) {
        self.0.store(scopes);
    }
}

/// What a manager wants of SRDS; whoever makes listeners sees to it.
pub struct WantedScopes {
    /// `scoped_routes.name`
    pub name: Arc<str>,
    /// `scoped_rds_config_source`
    pub source: ConfigSource,
    /// `rds_config_source`
    pub routes: Option<ConfigSource>,
    /// `http.PREFIX.`
    pub scope: Scope,
    /// Who waits; gone with the last connection of the manager.
    pub slot: Weak<ScopeSlot>,
}

/// A part of the key: what a header says.
struct Fragment {
    name: HeaderName,
    separator: Box<[u8]>,
    extract: Extract,
}

enum Extract {
    Index(usize),
    /// What stands behind the key and this separator.
    Element(Box<[u8]>, Box<[u8]>),
}

/// Appends a fragment, with its length, so that no two lists of fragments look the same.
fn append(fragment: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(fragment.len() as u64).to_le_bytes());
    out.extend_from_slice(fragment);
}

/// The key of a scope.
pub fn key(message: &ScopedRouteConfiguration) -> Box<[u8]> {
    let mut out = Vec::new();
    for fragment in message.key.iter().flat_map(|key| &key.fragments) {
        if let Some(Part::StringKey(text)) = &fragment.r#type {
            append(text.as_bytes(), &mut out);
        }
    }
    out.into()
}

thread_local! {
    /// Keys are written here, so that none is allocated.
    static KEY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Scoped {
    pub(super) fn from_proto(
        message: &ScopedRoutes,
        scope: &Scope,
        context: &FactoryContext,
        registry: &HttpFilterRegistry,
    ) -> ConfigResult<Self> {
        let builder =
            message.scope_key_builder.as_ref().ok_or_else(|| ConfigError::missing("scope_key_builder"))?;
        let mut fragments = Vec::with_capacity(builder.fragments.len());
        for (i, fragment) in builder.fragments.iter().enumerate() {
            fragments.push(Fragment::of(fragment).at_index("fragments", i).at("scope_key_builder")?);
        }
        let slot = Arc::new(ScopeSlot::default());
        let routes = message.rds_config_source.as_ref().map(ConfigSource::from_proto).transpose();
        let routes = routes.at("rds_config_source")?;
        let clusters = &*context.server.clusters;
        match &message.config_specifier {
            Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)) => {
                let context = RouteContext { registry, clusters, validate_clusters: true };
                let mut scopes = Scopes::default();
                for (i, one) in list.scoped_route_configurations.iter().enumerate() {
                    let table = inline(one, &context).at_index("scoped_route_configurations", i);
                    let table = table.at("scoped_route_configurations_list")?;
                    scopes.insert(key(one), RouteSlot::new(table));
                }
                slot.publish(Arc::new(scopes));
            }
            Some(ConfigSpecifier::ScopedRds(srds)) => {
                if !srds.srds_resources_locator.is_empty() {
                    return Err(
                        ConfigError::unsupported("this field").at("scoped_rds.srds_resources_locator")
                    );
                }
                let source = srds.scoped_rds_config_source.as_ref();
                let source = source.ok_or_else(|| ConfigError::missing("scoped_rds_config_source"));
                let source = source.and_then(ConfigSource::from_proto);
                context.want(WantedScopes {
                    name: message.name.as_str().into(),
                    source: source.at("scoped_rds_config_source").at("scoped_rds")?,
                    routes,
                    scope: scope.clone(),
                    slot: Arc::downgrade(&slot),
                });
            }
            None => return Err(ConfigError::missing("config_specifier")),
        }
        let nothing = RouteSlot::new(RouteTable::default());
        Ok(Self { fragments, slot, nothing })
    }

    /// Calls with the slot of a request's scope.
    pub(super) fn with<T>(&self, headers: &HeaderMap, read: impl FnOnce(&Arc<RouteSlot>) -> T) -> T {
        KEY.with_borrow_mut(|key| {
            key.clear();
            for fragment in &self.fragments {
                match fragment.read(headers) {
                    Some(value) => append(value, key),
                    None => return read(&self.nothing),
                }
            }
            read(self.slot.0.load().get(key.as_slice()).unwrap_or(&self.nothing))
        })
    }
}

fn inline(message: &ScopedRouteConfiguration, context: &RouteContext<'_>) -> ConfigResult<RouteTable> {
    if !message.route_configuration_name.is_empty() {
        return Err(ConfigError::new(
            "Fetching routes via RDS (route_configuration_name) is not supported with inline scoped routes.",
        ));
    }
    let routes = message.route_configuration.as_ref().ok_or_else(|| {
        ConfigError::new("You must specify a route_configuration with inline scoped routes.")
    })?;
    RouteTable::from_proto(routes, context).at("route_configuration")
}

impl Fragment {
    fn of(message: &FragmentBuilder) -> ConfigResult<Self> {
        let Some(Type::HeaderValueExtractor(extractor)) = &message.r#type else {
            return Err(ConfigError::missing("type"));
        };
        Self::from_header(extractor).at("header_value_extractor")
    }

    fn from_header(message: &HeaderValueExtractor) -> ConfigResult<Self> {
        let separator: Box<[u8]> = message.element_separator.as_bytes().into();
        let extract = match &message.extract_type {
            Some(ExtractType::Index(index)) if *index > 0 && separator.is_empty() => {
                return Err(ConfigError::new("Index > 0 for empty string element separator."));
            }
            Some(ExtractType::Index(index)) => Extract::Index(*index as usize),
            Some(ExtractType::Element(element)) => {
                Extract::Element(element.key.as_bytes().into(), element.separator.as_bytes().into())
            }
            None => return Err(ConfigError::new("HeaderValueExtractor extract_type not set.")),
        };
        Ok(Self { name: HeaderName::new(&message.name), separator, extract })
    }

    /// Of a header that is there more than once the first counts.
    fn read<'h>(&self, headers: &'h HeaderMap) -> Option<&'h [u8]> {
        let value = headers.get_name(&self.name)?;
        let mut elements = Elements { rest: Some(value), separator: &self.separator };
        match &self.extract {
            Extract::Index(index) => elements.nth(*index),
            Extract::Element(key, separator) => elements.find_map(|element| {
                let (name, value) = split(element, separator);
                (name == &**key).then(|| value.unwrap_or_default())
            }),
        }
    }
}

/// A value split at each separator; whole if there is none.
struct Elements<'h, 's> {
    rest: Option<&'h [u8]>,
    separator: &'s [u8],
}

impl<'h> Iterator for Elements<'h, '_> {
    type Item = &'h [u8];

    fn next(&mut self) -> Option<&'h [u8]> {
        let (first, rest) = split(self.rest?, self.separator);
        self.rest = rest;
        Some(first)
    }
}

/// What stands before the first separator and what behind it.
fn split<'h>(value: &'h [u8], separator: &[u8]) -> (&'h [u8], Option<&'h [u8]>) {
    let at = if separator.is_empty() { None } else { memchr::memmem::find(value, separator) };
    match at {
        Some(at) => (&value[..at], Some(&value[at + separator.len()..])),
        None => (value, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(separator: &str, extract: Extract) -> Fragment {
        Fragment { name: HeaderName::new("x-scope"), separator: separator.as_bytes().into(), extract }
    }

    #[test]
    fn headers_say_fragments() {
        let mut headers = HeaderMap::new();
        headers.append_name(&HeaderName::new("x-scope"), b"a=1;b=2;;b=3;c");
        headers.append_name(&HeaderName::new("x-scope"), b"d=4");
        let at = |index| fragment(";", Extract::Index(index));
        let of = |key: &str| fragment(";", Extract::Element(key.as_bytes().into(), (*b"=").into()));
        assert_eq!(at(1).read(&headers), Some(b"b=2".as_slice()));
        assert_eq!(at(2).read(&headers), Some(b"".as_slice()));
        assert_eq!(at(5).read(&headers), None);
        assert_eq!(fragment("", Extract::Index(0)).read(&headers), Some(b"a=1;b=2;;b=3;c".as_slice()));
        assert_eq!(of("b").read(&headers), Some(b"2".as_slice()));
        assert_eq!(of("c").read(&headers), Some(b"".as_slice()));
        assert_eq!(of("d").read(&headers), None);
        assert_eq!(at(0).read(&HeaderMap::new()), None);
    }

    #[test]
    fn fragments_do_not_run_together() {
        let key = |parts: &[&str]| {
            let mut out = Vec::new();
            parts.iter().for_each(|part| append(part.as_bytes(), &mut out));
            out
        };
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
    }
}
