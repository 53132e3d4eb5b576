//! The process as its admin interface shows it.

mod clusters;
mod config_dump;
mod endpoints;

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration};
use sampan_admin::{AdminSource, ClusterRow, DrainRequest, ListenerRow, Section};
use sampan_core::Address;
use sampan_core::drain::Phase;

use crate::cli::Options;
use crate::listeners::Entry;
use crate::server::{Command, Process};

/// What [`sampan_admin`] reads.
pub struct View {
    process: Rc<Process>,
}

impl View {
    /// A view of the process.
    pub fn new(process: Rc<Process>) -> Self {
        Self { process }
    }

    fn certificates(&self) -> Vec<pb::Certificate> {
        let boot = &self.process.boot;
        let listeners = self.process.listeners.active();
        let listeners = listeners.iter().flat_map(|entry| entry.config.certificates());
        let clusters = boot.clusters.clusters().all();
        listeners.chain(clusters.iter().flat_map(|cluster| cluster.certificates())).collect()
    }

    fn send(&self, command: Command) {
        // The main loop is gone only when the process is about to be.
        let _ = self.process.commands.send(command);
    }
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
        let uptime = Some(proto_duration(self.process.started.elapsed()));
        let concurrency = self.process.stats.concurrency.value();
        pb::ServerInfo {
            version: crate::cli::version().split_whitespace().last().unwrap_or_default().to_owned(),
            state: self.state() as i32,
            uptime_current_epoch: uptime,
            uptime_all_epochs: uptime,
            hot_restart_version: "disabled".to_owned(),
            command_line_options: Some(command_line(&self.process.options, concurrency as u32)),
            node: self.process.boot.bootstrap.node.clone(),
            hot_restart_initializing: false,
        }
    }

    fn clusters(&self) -> Vec<ClusterRow> {
        self.process.boot.clusters.clusters().all().iter().map(|c| clusters::row(c)).collect()
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
        self.dump(section)
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

fn proto_duration(duration: Duration) -> ProtoDuration {
    ProtoDuration { seconds: duration.as_secs() as i64, nanos: 0 }
}

/// An address as a message.
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

fn command_line(options: &Options, concurrency: u32) -> pb::CommandLineOptions {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
    pb::CommandLineOptions {
        base_id: options.base_id.into(),
        base_id_path: path(&options.base_id_path),
        concurrency,
        config_path: path(&options.config_path),
        config_yaml: options.config_yaml.clone().unwrap_or_default(),
        allow_unknown_static_fields: options.allow_unknown_static,
        reject_unknown_dynamic_fields: options.reject_unknown_dynamic,
        ignore_unknown_dynamic_fields: options.ignore_unknown_dynamic,
        log_level: options.log_level.clone(),
        component_log_level: options.component_log_level.clone(),
        log_format: options.log_format.as_deref().unwrap_or(sampan_core::log::DEFAULT_FORMAT).to_owned(),
        log_format_escaped: options.log_format_escaped,
        log_path: path(&options.log_path),
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
    }
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = pages.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or_default();
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
    pages * size as u64
}
