//! Fields of the bootstrap that would change behaviour and that are not there yet: refused by name.
//!
//! Without effect, and so let pass: `watchdog(s)` (there is none; its stats stay 0), `memory_allocator_manager`,
//! `enable_worker_cpu_affinity`, `enable_dispatcher_stats`, `perf_tracing_file_path`, `deferred_stat_options` (stats are always made at
//! their first use), `cluster_manager.enable_deferred_cluster_creation`, and what only control planes or gRPC read
//! (`node_context_params`, `grpc_async_client_manager_config`).

use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::trace::v3::tracing;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigError, ConfigResult};

/// It prepares internal listeners; those themselves, and addresses that lead to them, are refused by name.
const INTERNAL_LISTENER: &str = "envoy.extensions.bootstrap.internal_listener.v3.InternalListener";

/// What may be the default of connection managers that trace; more is checked where they are.
const TRACERS: [&str; 2] =
    ["envoy.config.trace.v3.ZipkinConfig", "envoy.config.trace.v3.OpenTelemetryConfig"];

/// Refuses the first of them.
pub fn refuse(b: &Bootstrap) -> ConfigResult<()> {
    whole_fields(b)?;
    if b.stats_flush.is_some() && b.stats_flush_interval.is_some() {
        return Err(ConfigError::new(
            "Only one of stats_flush_interval or stats_flush_on_admin should be set!",
        ));
    }
    for (i, extension) in b.bootstrap_extensions.iter().enumerate() {
        typed("bootstrap extension", extension, &[INTERNAL_LISTENER]).at_index("bootstrap_extensions", i)?;
    }
    if let Some(provider) = tracing(b) {
        use envoy_types::pb::envoy::config::trace::v3::tracing::http::ConfigType::TypedConfig;
        let kind =
            provider.config_type.as_ref().map_or(provider.name.as_str(), |TypedConfig(any)| name_of(any));
        if !TRACERS.contains(&kind) {
            return Err(ConfigError::unsupported(format_args!("tracer {kind}")).at("http").at("tracing"));
        }
    }
    if let Some(sink) = b.stats_sinks.first() {
        use envoy_types::pb::envoy::config::metrics::v3::stats_sink::ConfigType::TypedConfig;
        let kind = sink.config_type.as_ref().map_or(sink.name.as_str(), |TypedConfig(any)| name_of(any));
        return Err(ConfigError::unsupported(format_args!("stats sink {kind}"))).at_index("stats_sinks", 0);
    }
    // Here, unlike in a cluster, Envoy passes over a resolver that it does not have.
    let cares = |r: &&TypedExtensionConfig| {
        r.typed_config.as_ref().is_some_and(|any| name_of(any).ends_with(".CaresDnsResolverConfig"))
    };
    let resolver = b.typed_dns_resolver_config.as_ref().filter(cares);
    sampan_upstream::config::check_resolver(resolver).at("typed_dns_resolver_config")?;
    if let Some(engine) = &b.default_regex_engine {
        typed("regex engine", engine, &["envoy.extensions.regex_engines.v3.GoogleRE2"])
            .at("default_regex_engine")?;
    }
    if let Some(manager) = &b.listener_manager {
        typed("listener manager", manager, &["envoy.config.listener.v3.ListenerManager"])
            .at("listener_manager")?;
    }
    Ok(())
}

#[allow(deprecated, reason = "Envoy 1.40 still takes the fields")]
fn whole_fields(b: &Bootstrap) -> ConfigResult<()> {
    let dynamic = b.dynamic_resources.clone().unwrap_or_default();
    let manager = b.cluster_manager.clone().unwrap_or_default();
    let outlier = manager.outlier_detection.as_ref();
    for (set, field) in [
        (!dynamic.lds_resources_locator.is_empty(), "dynamic_resources.lds_resources_locator"),
        (!dynamic.cds_resources_locator.is_empty(), "dynamic_resources.cds_resources_locator"),
        (
            outlier.is_some_and(|o| o.event_service.is_some()),
            "cluster_manager.outlier_detection.event_service",
        ),
        // It switches zone aware routing on.
        (!manager.local_cluster_name.is_empty(), "cluster_manager.local_cluster_name"),
        (b.hds_config.is_some(), "hds_config"),
        (!b.header_prefix.is_empty() && b.header_prefix != "x-envoy", "header_prefix"),
        (b.use_tcp_for_dns_lookups, "use_tcp_for_dns_lookups"),
        (b.dns_resolution_config.is_some(), "dns_resolution_config"),
        (!b.inline_headers.is_empty(), "inline_headers"),
        (!b.fatal_actions.is_empty(), "fatal_actions"),
        (!b.config_sources.is_empty(), "config_sources"),
        (b.default_config_source.is_some(), "default_config_source"),
        (!b.default_socket_interface.is_empty(), "default_socket_interface"),
        (!b.certificate_provider_instances.is_empty(), "certificate_provider_instances"),
        (b.xds_delegate_extension.is_some(), "xds_delegate_extension"),
        (b.xds_config_tracker_extension.is_some(), "xds_config_tracker_extension"),
        (b.stats_eviction.is_some(), "stats_eviction"),
    ] {
        if set {
            return Err(ConfigError::unsupported("this field").at(field));
        }
    }
    Ok(())
}

fn name_of(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// Refuses an extension whose type is none of those known.
fn typed(what: &str, extension: &TypedExtensionConfig, known: &[&str]) -> ConfigResult<()> {
    let name = extension.typed_config.as_ref().map_or(extension.name.as_str(), name_of);
    if known.contains(&name) { Ok(()) } else { Err(ConfigError::unsupported(format_args!("{what} {name}"))) }
}

/// `tracing.http`
#[allow(deprecated, reason = "Envoy 1.40 still takes the field")]
pub fn tracing(b: &Bootstrap) -> Option<&tracing::Http> {
    b.tracing.as_ref()?.http.as_ref()
}
