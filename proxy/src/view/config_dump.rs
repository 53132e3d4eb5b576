//! `/config_dump`: what was configured, as the messages that came, with their versions and times.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, ScopedRoutes, http_connection_manager::RouteSpecifier,
    scoped_routes::ConfigSpecifier,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::google::protobuf::{Any, Timestamp};
use prost::Message;
use prost::bytes::Bytes;
use sampan_admin::Section;
use sampan_listener::Stage;
use sampan_upstream::{Cluster, Origin};

use super::View;
use crate::listeners::Entry;
use crate::xds::{CurrentExtension, CurrentSecret};

impl View {
    /// A section of the dump; none where there is nothing of its kind.
    pub(super) fn dump(&self, section: Section) -> Option<Any> {
        match section {
            Section::Bootstrap => Some(self.bootstrap()),
            Section::Clusters => Some(packed(&self.clusters_dump())),
            Section::HttpExtensions => self.extensions(Stage::Http),
            Section::NetworkExtensions => self.extensions(Stage::Network),
            Section::ListenerExtensions => self.extensions(Stage::Listener),
            Section::Listeners => Some(packed(&self.listeners_dump())),
            Section::Routes => Some(packed(&self.routes())),
            Section::ScopedRoutes => Some(packed(&self.scoped_routes())),
            Section::Secrets => Some(packed(&self.secrets())),
        }
    }

    fn bootstrap(&self) -> Any {
        let bytes = &self.process.boot.bytes;
        let mut out = Vec::with_capacity(bytes.len() + 32);
        length_delimited(1, bytes, &mut out);
        length_delimited(2, &timestamp(self.process.started_at).encode_to_vec(), &mut out);
        any("envoy.admin.v3.BootstrapConfigDump", out)
    }

    fn clusters_dump(&self) -> pb::ClustersConfigDump {
        let boot = &self.process.boot;
        pb::ClustersConfigDump {
            version_info: self.cds_version(),
            dynamic_active_clusters: dynamic_clusters(&boot.clusters.clusters().all()),
            dynamic_warming_clusters: dynamic_clusters(&boot.clusters.waiting()),
            static_clusters: boot
                .parts
                .clusters
                .iter()
                .map(|bytes| pb::clusters_config_dump::StaticCluster {
                    cluster: Some(any("envoy.config.cluster.v3.Cluster", bytes.to_vec())),
                    last_updated: self.updated(),
                })
                .collect(),
        }
    }

    fn listeners_dump(&self) -> pb::ListenersConfigDump {
        let boot = &self.process.boot;
        pb::ListenersConfigDump {
            version_info: self.lds_version(),
            dynamic_listeners: self.dynamic_listeners(),
            static_listeners: boot
                .parts
                .listeners
                .iter()
                .map(|bytes| pb::listeners_config_dump::StaticListener {
                    listener: Some(any("envoy.config.listener.v3.Listener", bytes.to_vec())),
                    last_updated: self.updated(),
                })
                .collect(),
        }
    }

    fn routes(&self) -> pb::RoutesConfigDump {
        let boot = &self.process.boot;
        pb::RoutesConfigDump {
            static_route_configs: static_routes(&boot.parts.listeners)
                .map(|routes| self.with_hosts(&routes).unwrap_or_else(|| routes.encode_to_vec()))
                .map(|bytes| pb::routes_config_dump::StaticRouteConfig {
                    route_config: Some(any("envoy.config.route.v3.RouteConfiguration", bytes)),
                    last_updated: self.updated(),
                })
                .collect(),
            dynamic_route_configs: self.dynamic_routes(),
        }
    }

    /// An inline table with the hosts that came (VHDS), encoded.
    fn with_hosts(&self, routes: &RouteConfiguration) -> Option<Vec<u8>> {
        routes.vhds.as_ref()?;
        self.process.xds.get()?.shared.routes.with_hosts(&routes.name).map(|bytes| bytes.to_vec())
    }

    fn dynamic_routes(&self) -> Vec<pb::routes_config_dump::DynamicRouteConfig> {
        let current = self.process.xds.get().map(|xds| xds.shared.routes.current()).unwrap_or_default();
        let dump = |table: crate::xds::Current| pb::routes_config_dump::DynamicRouteConfig {
            version_info: table.version.to_string(),
            route_config: Some(any("envoy.config.route.v3.RouteConfiguration", table.bytes.to_vec())),
            last_updated: Some(timestamp(table.updated)),
            ..Default::default()
        };
        current.into_iter().map(dump).collect()
    }

    /// None where no filter is discovered.
    fn extensions(&self, stage: Stage) -> Option<Any> {
        let current = self.process.xds.get()?.shared.extensions.current(stage)?;
        let dump = |extension: CurrentExtension| pb::ecds_config_dump::EcdsFilterConfig {
            version_info: extension.version.to_string(),
            ecds_filter: Some(any("envoy.config.core.v3.TypedExtensionConfig", extension.bytes.to_vec())),
            last_updated: Some(timestamp(extension.updated)),
            ..Default::default()
        };
        Some(packed(&pb::EcdsConfigDump { ecds_filters: current.into_iter().map(dump).collect() }))
    }

    fn scoped_routes(&self) -> pb::ScopedRoutesConfigDump {
        use pb::scoped_routes_config_dump::{DynamicScopedRouteConfigs, InlineScopedRouteConfigs};
        let scope = |bytes| any("envoy.config.route.v3.ScopedRouteConfiguration", bytes);
        let inline = inline_scopes(&self.process.boot.parts.listeners).into_iter();
        let current = self.process.xds.get().map(|xds| xds.shared.scopes.current()).unwrap_or_default();
        pb::ScopedRoutesConfigDump {
            inline_scoped_route_configs: inline
                .map(|(name, scopes)| InlineScopedRouteConfigs {
                    name,
                    scoped_route_configs: scopes.into_iter().map(scope).collect(),
                    last_updated: self.updated(),
                })
                .collect(),
            dynamic_scoped_route_configs: current
                .into_iter()
                .map(|scopes| DynamicScopedRouteConfigs {
                    name: scopes.name.to_string(),
                    version_info: scopes.version.to_string(),
                    scoped_route_configs: scopes.scopes.iter().map(|s| scope(s.to_vec())).collect(),
                    last_updated: Some(timestamp(scopes.updated)),
                    ..Default::default()
                })
                .collect(),
        }
    }

    fn secrets(&self) -> pb::SecretsConfigDump {
        use pb::secrets_config_dump::{DynamicSecret, StaticSecret};
        let fixed = |secret: &Arc<Secret>| StaticSecret {
            name: secret.name.clone(),
            secret: Some(packed(&**secret)),
            ..Default::default()
        };
        let static_secrets = self.process.boot.server.secrets.statics().map(fixed).collect();
        let Some(xds) = self.process.xds.get() else {
            return pb::SecretsConfigDump { static_secrets, ..Default::default() };
        };
        let (here, missing) = xds.shared.secrets.current();
        let dump = |secret: &CurrentSecret| DynamicSecret {
            name: secret.name.to_string(),
            version_info: secret.version.to_string(),
            last_updated: Some(timestamp(secret.updated)),
            secret: Some(packed(&*secret.secret)),
            ..Default::default()
        };
        let awaited = |name: &Arc<str>| DynamicSecret {
            name: name.to_string(),
            version_info: "uninitialized".to_owned(),
            last_updated: self.updated(),
            secret: Some(packed(&Secret { name: name.to_string(), ..Default::default() })),
            ..Default::default()
        };
        pb::SecretsConfigDump {
            static_secrets,
            dynamic_active_secrets: here.iter().map(dump).collect(),
            dynamic_warming_secrets: missing.iter().map(awaited).collect(),
        }
    }

    /// When what the bootstrap has was taken.
    fn updated(&self) -> Option<Timestamp> {
        Some(timestamp(self.process.started_at))
    }

    fn lds_version(&self) -> String {
        let lds = self.process.xds.get().and_then(|xds| xds.lds.get());
        lds.map(|lds| lds.version().to_string()).unwrap_or_default()
    }

    /// What LDS added, each with all of its states.
    fn dynamic_listeners(&self) -> Vec<pb::listeners_config_dump::DynamicListener> {
        use pb::listeners_config_dump::{DynamicListener, DynamicListenerState};
        fn named<'a>(out: &'a mut Vec<DynamicListener>, name: &str) -> &'a mut DynamicListener {
            let at = out.iter().position(|l| l.name == name).unwrap_or(out.len());
            if at == out.len() {
                out.push(DynamicListener { name: name.to_owned(), ..Default::default() });
            }
            &mut out[at]
        }
        let state = |origin: &Origin| DynamicListenerState {
            version_info: origin.version.to_string(),
            listener: Some(any("envoy.config.listener.v3.Listener", origin.bytes.to_vec())),
            last_updated: Some(timestamp(origin.updated)),
        };
        let listeners = &self.process.listeners;
        let mut out = Vec::new();
        type Place = fn(&mut DynamicListener) -> &mut Option<DynamicListenerState>;
        let states: [(Vec<Rc<Entry>>, Place); 3] = [
            (listeners.active(), |l| &mut l.active_state),
            (listeners.warming(), |l| &mut l.warming_state),
            (listeners.draining(), |l| &mut l.draining_state),
        ];
        for (entries, place) in states {
            for (entry, origin) in entries.iter().filter_map(|e| Some((e, e.origin.as_ref()?))) {
                *place(named(&mut out, &entry.config.name)) = Some(state(origin));
            }
        }
        let failures = listeners.failures();
        for failure in &failures {
            if let Some(name) = &failure.name {
                named(&mut out, name).error_state = Some(failure.state.clone());
            }
        }
        // As in Envoy each stands there a second time, without name and time.
        out.extend(failures.into_iter().map(|failure| DynamicListener {
            error_state: Some(pb::UpdateFailureState { last_update_attempt: None, ..failure.state }),
            ..Default::default()
        }));
        out
    }

    fn cds_version(&self) -> String {
        let cds = self.process.xds.get().and_then(|xds| xds.cds.get());
        cds.map(|cds| cds.version().to_string()).unwrap_or_default()
    }
}

/// What CDS added, for `/config_dump`.
fn dynamic_clusters(all: &[Arc<Cluster>]) -> Vec<pb::clusters_config_dump::DynamicCluster> {
    let dump = |origin: &Origin| pb::clusters_config_dump::DynamicCluster {
        version_info: origin.version.to_string(),
        cluster: Some(any("envoy.config.cluster.v3.Cluster", origin.bytes.to_vec())),
        last_updated: Some(timestamp(origin.updated)),
        ..Default::default()
    };
    all.iter().filter_map(|cluster| cluster.origin().map(dump)).collect()
}

/// The inline route tables of all connection managers.
fn static_routes(listeners: &[Bytes]) -> impl Iterator<Item = RouteConfiguration> {
    managers(listeners).filter_map(|manager| match manager.route_specifier? {
        RouteSpecifier::RouteConfig(routes) => Some(routes),
        _ => None,
    })
}

/// The inline scopes of all connection managers, encoded, with the names of the lists.
fn inline_scopes(listeners: &[Bytes]) -> Vec<(String, Vec<Vec<u8>>)> {
    managers(listeners)
        .filter_map(|manager| match manager.route_specifier? {
            RouteSpecifier::ScopedRoutes(ScopedRoutes {
                name,
                config_specifier: Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)),
                ..
            }) => Some((name, list.scoped_route_configurations.iter().map(Message::encode_to_vec).collect())),
            _ => None,
        })
        .collect()
}

/// All connection managers of encoded listeners.
fn managers(listeners: &[Bytes]) -> impl Iterator<Item = HttpConnectionManager> {
    use envoy_types::pb::envoy::config::listener::v3::{Listener, filter::ConfigType};
    let listeners = listeners.iter().filter_map(|bytes| Listener::decode(&**bytes).ok());
    let chains = listeners.flat_map(|l| l.filter_chains.into_iter().chain(l.default_filter_chain));
    chains.flat_map(|chain| chain.filters).filter_map(|filter| match filter.config_type? {
        ConfigType::TypedConfig(config) if config.type_url.ends_with(sampan_http::manager::TYPE) => {
            HttpConnectionManager::decode(config.value.as_slice()).ok()
        }
        _ => None,
    })
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: (since.subsec_millis() * 1_000_000) as i32 }
}

fn any(type_url: &str, value: impl Into<Vec<u8>>) -> Any {
    Any { type_url: format!("type.googleapis.com/{type_url}"), value: value.into() }
}

fn packed<M: Message + prost::Name>(message: &M) -> Any {
    any(&M::full_name(), message.encode_to_vec())
}

/// `message { bytes = number }`, without decoding what is inside.
fn length_delimited(number: u32, inner: &[u8], out: &mut Vec<u8>) {
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, out);
    prost::encoding::encode_varint(inner.len() as u64, out);
    out.extend_from_slice(inner);
}
