//! The process as its admin interface shows it.

mod endpoints;

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, ScopedRoutes, http_connection_manager::RouteSpecifier,
    scoped_routes::ConfigSpecifier,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration, Timestamp};
use prost::Message;
use prost::bytes::Bytes;
use sampan_admin::{
    AdminSource, ClusterRow, DrainRequest, HealthFlags, HostRow, ListenerRow, Outlier, Section, Thresholds,
};
use sampan_core::Address;
use sampan_core::drain::Phase;
use sampan_listener::Stage;
use sampan_upstream::{Cluster, HealthFlag, Host, Origin, Priority};

use crate::listeners::Entry;
use crate::server::{Command, Process};
use crate::xds::{CurrentExtension, CurrentSecret};

/// What [`sampan_admin`] reads.
pub struct View {
    process: Rc<Process>,
}

impl View {
    /// A view of the process.
    pub fn new(process: Rc<Process>) -> Self {
        Self { process }
    }

    fn updated(&self) -> Option<Timestamp> {
        Some(timestamp(self.process.started_at))
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: (since.subsec_millis() * 1_000_000) as i32 }
}

fn proto_duration(duration: Duration) -> ProtoDuration {
    ProtoDuration { seconds: duration.as_secs() as i64, nanos: 0 }
}

pub(crate) fn proto_address(address: &Address) -> core::Address {
    use core::address::Address as A;
    let inner = match address {
        Address::Ip(ip) => A::SocketAddress(core::SocketAddress {
            address: ip.ip().to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(ip.port().into())),
            ..Default::default()
        }),
        Address::Pipe(path) => A::Pipe(core::Pipe { path: path.to_string(), mode: 0 }),
        Address::Internal(name, id) => A::EnvoyInternalAddress(core::EnvoyInternalAddress {
            endpoint_id: id.to_string(),
            address_name_specifier: Some(
                core::envoy_internal_address::AddressNameSpecifier::ServerListenerName(name.to_string()),
            ),
        }),
    };
    core::Address { address: Some(inner) }
}

fn any(type_url: &str, value: impl Into<Vec<u8>>) -> Any {
    Any { type_url: format!("type.googleapis.com/{type_url}"), value: value.into() }
}

fn packed<M: Message + prost::Name>(message: &M) -> Any {
    any(&M::full_name(), message.encode_to_vec())
}

/// `message { bytes = number }`, without decoding what is inside.
fn length_delimited(number: u32, inner: &Bytes, out: &mut Vec<u8>) {
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, out);
    prost::encoding::encode_varint(inner.len() as u64, out);
    out.extend_from_slice(inner);
}

fn cluster_row(cluster: &Cluster) -> ClusterRow {
    let thresholds = |priority| {
        let t = cluster.thresholds(priority);
        Thresholds {
            max_connections: t.max_connections,
            max_pending_requests: t.max_pending_requests,
            max_requests: t.max_requests,
            max_retries: t.max_retries,
        }
    };
    let hosts = cluster.hosts();
    ClusterRow {
        name: cluster.name().to_string(),
        observability_name: cluster.observability_name().to_string(),
        eds_service_name: cluster.eds_service_name().unwrap_or_default().to_owned(),
        added_via_api: cluster.origin().is_some(),
        outlier: cluster.success_rates().map(|[external, local]| Outlier {
            average: external.average,
            threshold: external.threshold,
            local_average: local.average,
            local_threshold: local.threshold,
        }),
        thresholds: [thresholds(Priority::Default), thresholds(Priority::High)],
        hosts: hosts.hosts().map(|host| host_row(host)).collect(),
    }
}

fn host_row(host: &Host) -> HostRow {
    let address = host.address();
    let all = host.stats.all();
    let rates = host.success_rates();
    let rate = |origin: usize| rates.map(|rates| rates[origin]).filter(|rate| *rate >= 0.0);
    let pick = |gauge| {
        all.iter().filter(move |(.., g)| *g == gauge).map(|(name, value, _)| (*name, *value)).collect()
    };
    HostRow {
        address: proto_address(&address),
        address_text: address.to_string(),
        hostname: host.hostname.to_string(),
        counters: pick(false),
        gauges: pick(true),
        health: health_flags(host),
        weight: host.weight(),
        priority: host.priority(),
        locality: core::Locality {
            region: host.locality.region.to_string(),
            zone: host.locality.zone.to_string(),
            sub_zone: host.locality.sub_zone.to_string(),
        },
        canary: host.canary(),
        success_rate: rate(0),
        local_success_rate: rate(1),
    }
}

fn health_flags(host: &Host) -> HealthFlags {
    HealthFlags {
        failed_active_hc: host.has_flag(HealthFlag::FailedActiveHc),
        failed_outlier_check: host.has_flag(HealthFlag::FailedOutlierCheck),
        failed_eds_health: host.has_flag(HealthFlag::FailedEdsHealth),
        degraded_active_hc: host.has_flag(HealthFlag::DegradedActiveHc),
        degraded_eds_health: host.has_flag(HealthFlag::DegradedEdsHealth),
        pending_dynamic_removal: host.has_flag(HealthFlag::PendingDynamicRemoval),
        pending_active_hc: host.has_flag(HealthFlag::PendingActiveHc),
        excluded_via_immediate_hc_fail: host.has_flag(HealthFlag::ExcludedViaImmediateHcFail),
        active_hc_timeout: host.has_flag(HealthFlag::ActiveHcTimeout),
        eds_status_draining: host.has_flag(HealthFlag::EdsStatusDraining),
    }
}

/// Resident and virtual bytes of this process.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = pages.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or_default();
    pages * 4096
}

impl AdminSource for View {
    fn state(&self) -> pb::server_info::State {
        if self.process.drain.phase() > Phase::Serving || self.process.failed.get() {
            pb::server_info::State::Draining
        } else if self.process.live.get() {
            pb::server_info::State::Live
        } else if self.process.clusters_ready.get() {
            pb::server_info::State::Initializing
        } else {
            pb::server_info::State::PreInitializing
        }
    }

    fn server_info(&self) -> pb::ServerInfo {
        let options = &self.process.options;
        let uptime = Some(proto_duration(self.process.started.elapsed()));
        let concurrency = self.process.stats.concurrency.value();
        pb::ServerInfo {
            version: crate::cli::version().split_whitespace().last().unwrap_or_default().to_owned(),
            state: self.state() as i32,
            uptime_current_epoch: uptime,
            uptime_all_epochs: uptime,
            hot_restart_version: "disabled".to_owned(),
            command_line_options: Some(pb::CommandLineOptions {
                base_id: options.base_id.into(),
                concurrency: concurrency as u32,
                config_path: options
                    .config_path
                    .as_ref()
                    .map(|p| p.display().to_string())
                    .unwrap_or_default(),
                config_yaml: options.config_yaml.clone().unwrap_or_default(),
                allow_unknown_static_fields: options.allow_unknown_static,
                reject_unknown_dynamic_fields: options.reject_unknown_dynamic,
                ignore_unknown_dynamic_fields: options.ignore_unknown_dynamic,
                log_level: options.log_level.clone(),
                component_log_level: options.component_log_level.clone(),
                log_format: options.log_format.clone().unwrap_or_default(),
                log_path: options.log_path.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
                service_cluster: options.service_cluster.clone(),
                service_node: options.service_node.clone(),
                service_zone: options.service_zone.clone(),
                file_flush_interval: Some(proto_duration(options.file_flush_interval)),
                drain_time: Some(proto_duration(options.drain_time)),
                parent_shutdown_time: Some(proto_duration(options.parent_shutdown_time)),
                disable_hot_restart: true,
                restart_epoch: options.restart_epoch,
                cpuset_threads: options.cpuset_threads,
                ..Default::default()
            }),
            node: self.process.boot.bootstrap.node.clone(),
            hot_restart_initializing: false,
        }
    }

    fn clusters(&self) -> Vec<ClusterRow> {
        self.process.boot.clusters.clusters().all().iter().map(|c| cluster_row(c)).collect()
    }

    fn listeners(&self) -> Vec<ListenerRow> {
        let row = |entry: &Rc<Entry>| ListenerRow {
            name: entry.config.name.to_string(),
            addresses: entry.addresses.iter().map(|a| (proto_address(a), a.to_string())).collect(),
        };
        self.process.listeners.active().iter().map(row).collect()
    }

    fn init_dump(&self) -> pb::UnreadyTargetsDumps {
        let unready_targets_dumps = self.process.listeners.unready(self.process.live.get());
        pb::UnreadyTargetsDumps { unready_targets_dumps }
    }

    fn certs(&self) -> pb::Certificates {
        pb::Certificates { certificates: self.certificates() }
    }

    fn memory(&self) -> pb::Memory {
        let figures = crate::overload::figures();
        pb::Memory {
            allocated: figures.allocated,
            heap_size: figures.active,
            total_physical_bytes: resident(),
            pageheap_free: figures.resident.saturating_sub(figures.active),
            ..Default::default()
        }
    }

    fn config(&self, section: Section) -> Option<Any> {
        let boot = &self.process.boot;
        match section {
            Section::Bootstrap => {
                let mut out = Vec::with_capacity(boot.bytes.len() + 32);
                length_delimited(1, &boot.bytes, &mut out);
                let stamp = Bytes::from(self.updated()?.encode_to_vec());
                length_delimited(2, &stamp, &mut out);
                Some(any("envoy.admin.v3.BootstrapConfigDump", out))
            }
            Section::Clusters => Some(packed(&pb::ClustersConfigDump {
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
            })),
            Section::HttpExtensions => self.extensions(Stage::Http),
            Section::NetworkExtensions => self.extensions(Stage::Network),
            Section::ListenerExtensions => self.extensions(Stage::Listener),
            Section::Listeners => Some(packed(&pb::ListenersConfigDump {
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
            })),
            Section::Routes => Some(packed(&pb::RoutesConfigDump {
                static_route_configs: static_routes(&boot.parts.listeners)
                    .map(|routes| self.with_hosts(&routes).unwrap_or_else(|| routes.encode_to_vec()))
                    .map(|bytes| pb::routes_config_dump::StaticRouteConfig {
                        route_config: Some(any("envoy.config.route.v3.RouteConfiguration", bytes)),
                        last_updated: self.updated(),
                    })
                    .collect(),
                dynamic_route_configs: self.dynamic_routes(),
            })),
            Section::ScopedRoutes => Some(packed(&self.scoped_routes())),
            Section::Secrets => Some(packed(&self.secrets())),
        }
    }

    fn endpoints(&self) -> Vec<(bool, ClusterLoadAssignment)> {
        let clusters = self.process.boot.clusters.clusters().all();
        clusters.iter().map(|c| (c.origin().is_some(), endpoints::assignment(c))).collect()
    }

    fn fail_health_check(&self, fail: bool) {
        self.process.fail_health_check(fail);
    }

    fn drain_listeners(&self, request: DrainRequest) {
        self.send(Command::DrainListeners(request));
    }

    fn reopen_logs(&self) {
        self.send(Command::ReopenLogs);
    }

    fn quit(&self) {
        let commands = self.process.commands.clone();
        tokio::task::spawn_local(async move {
            // The answer shall still be written.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = commands.send(Command::Quit);
        });
    }

    fn materialise_stats(&self) {
        self.process.boot.clusters.materialise_stats();
    }

    fn refresh_stats(&self) {
        let stats = &self.process.stats;
        stats.uptime.set(self.process.started.elapsed().as_secs());
        stats.live.set(u64::from(self.process.live.get() && !self.process.failed.get()));
        stats.state.set(self.state() as u64);
        let figures = crate::overload::figures();
        stats.memory_allocated.set(figures.allocated);
        stats.memory_heap_size.set(figures.active);
        stats.memory_physical_size.set(resident());
        stats.total_connections.set(self.process.drain.active() as u64);
        let all = self.certificates();
        let details = all.iter().flat_map(|c| c.ca_cert.iter().chain(&c.cert_chain));
        stats.first_certificate(details.map(|d| d.days_until_expiration).min());
        if self.process.flush_interval().is_none() {
            // Behind the answer, as in Envoy: the next one shows it.
            let process = self.process.clone();
            tokio::task::spawn_local(async move { process.boot.server.stats.flush() });
        }
    }
}

impl View {
    fn certificates(&self) -> Vec<pb::Certificate> {
        let boot = &self.process.boot;
        let listeners = self.process.listeners.active();
        let listeners = listeners.iter().flat_map(|entry| entry.config.certificates());
        let clusters = boot.clusters.clusters().all();
        listeners.chain(clusters.iter().flat_map(|cluster| cluster.certificates())).collect()
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

    fn send(&self, command: Command) {
        // The main loop is gone only when the process is about to be.
        let _ = self.process.commands.send(command);
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
