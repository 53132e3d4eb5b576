//! The model: `ExtAuthz` and what routes lay over it.

use std::collections::HashMap;

use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3 as pb;
use envoy_types::pb::google::protobuf::value::Kind;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderId;
use sampan_core::matcher::{MetadataMatcher, StringMatcher};
use sampan_core::runtime::Fraction;
use sampan_listener::Server;

use super::check::{Told, ToldOfRequest};
use super::service::{Service, matchers};
use crate::filters::mutation_rules::MutationRules;
use crate::filters::refuse;

/// How much of a body is read before the server is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct BodySettings {
    pub(super) max: usize,
    pub(super) partial: bool,
}

/// `ExtAuthz`
pub(super) struct Config {
    pub(super) service: Service,
    pub(super) told: Told,
    pub(super) of_request: ToldOfRequest,
    pub(super) body: Option<BodySettings>,
    pub(super) failure_allowed: bool,
    pub(super) failure_header: bool,
    pub(super) clear_route_cache: bool,
    pub(super) status_on_error: u16,
    pub(super) validate: bool,
    pub(super) rules: Option<MutationRules>,
    pub(super) enabled: Option<Fraction>,
    pub(super) enabled_metadata: Option<MetadataMatcher>,
    pub(super) deny_at_disable: Option<(String, bool)>,
    /// `enable_dynamic_metadata_ingestion`
    pub(super) takes_metadata: bool,
    pub(super) max_denied_body: usize,
    /// `charge_cluster_response_stats`
    pub(super) charges_cluster: bool,
}

/// What a route lays over it.
#[derive(Default)]
pub(super) struct PerRoute {
    pub(super) disabled: bool,
    pub(super) extensions: HashMap<String, String>,
    pub(super) no_body: bool,
    pub(super) body: Option<BodySettings>,
    pub(super) service: Option<Service>,
}

impl BodySettings {
    fn from_proto(message: pb::BufferSettings) -> Self {
        Self { max: message.max_request_bytes as usize, partial: message.allow_partial_message }
    }
}

/// The strings of a struct in the node's metadata.
pub(super) fn labels(server: &Server, key: &str) -> HashMap<String, String> {
    let Some(Kind::StructValue(all)) = server.node.own.metadata.fields.get(key).and_then(|v| v.kind.as_ref())
    else {
        return HashMap::new();
    };
    let text = |kind: Option<&Kind>| match kind {
        Some(Kind::StringValue(text)) => text.clone(),
        _ => String::new(),
    };
    all.fields.iter().map(|(name, value)| (name.clone(), text(value.kind.as_ref()))).collect()
}

fn check_supported(message: &pb::ExtAuthz) -> ConfigResult<()> {
    for (set, field) in [
        (!message.typed_metadata_context_namespaces.is_empty(), "typed_metadata_context_namespaces"),
        (
            !message.route_typed_metadata_context_namespaces.is_empty(),
            "route_typed_metadata_context_namespaces",
        ),
        (message.filter_metadata.is_some(), "filter_metadata"),
        (message.emit_filter_state_stats, "emit_filter_state_stats"),
        (message.enforce_response_header_limits, "enforce_response_header_limits"),
        (message.shadow_mode, "shadow_mode"),
    ] {
        refuse(set, field)?;
    }
    Ok(())
}

impl Config {
    pub(super) fn from_proto(message: &pb::ExtAuthz, server: &Server) -> ConfigResult<Self> {
        use pb::ext_authz::Services;
        check_supported(message)?;
        let body = message.with_request_body.unwrap_or_default();
        let (service, http) = match &message.services {
            Some(Services::GrpcService(service)) => (Service::grpc(service).at("grpc_service")?, false),
            Some(Services::HttpService(service)) => (Service::http(service).at("http_service")?, true),
            None => return Err(ConfigError::missing("services")),
        };
        let status = message.status_on_error.map_or(0, |status| status.code);
        let wrapper = |value: Option<envoy_types::pb::google::protobuf::BoolValue>| value.map(|v| v.value);
        Ok(Self {
            service,
            told: Told {
                certificate: message.include_peer_certificate,
                tls_session: message.include_tls_session,
                labels: labels(server, &message.bootstrap_metadata_labels_key),
                metadata: message.metadata_context_namespaces.clone(),
            },
            of_request: ToldOfRequest {
                allowed: allowed_headers(message)?,
                disallowed: matchers(message.disallowed_headers.as_ref(), "disallowed_headers")?,
                raw_headers: message.encode_raw_headers,
                raw_body: http || body.pack_as_bytes,
                route_metadata: message.route_metadata_context_namespaces.clone(),
            },
            body: Some(BodySettings::from_proto(body)).filter(|body| body.max > 0),
            failure_allowed: message.failure_mode_allow,
            failure_header: message.failure_mode_allow_header_add,
            clear_route_cache: message.clear_route_cache,
            status_on_error: u16::try_from(status).ok().filter(|s| (100..=511).contains(s)).unwrap_or(403),
            validate: message.validate_mutations,
            rules: message
                .decoder_header_mutation_rules
                .as_ref()
                .map(MutationRules::from_proto)
                .transpose()
                .at("decoder_header_mutation_rules")?,
            enabled: message.filter_enabled.as_ref().map(Fraction::from_proto),
            enabled_metadata: message
                .filter_enabled_metadata
                .as_ref()
                .map(MetadataMatcher::from_proto)
                .transpose()
                .at("filter_enabled_metadata")?,
            deny_at_disable: message
                .deny_at_disable
                .as_ref()
                .map(|flag| (flag.runtime_key.clone(), wrapper(flag.default_value).unwrap_or(false))),
            takes_metadata: wrapper(message.enable_dynamic_metadata_ingestion).unwrap_or(true),
            max_denied_body: message.max_denied_response_body_bytes as usize,
            charges_cluster: wrapper(message.charge_cluster_response_stats).unwrap_or(true),
        })
    }
}

/// What of the request's headers is told. Over HTTP it is little unless more is allowed.
fn allowed_headers(message: &pb::ExtAuthz) -> ConfigResult<Option<Vec<StringMatcher>>> {
    let own = || matchers(message.allowed_headers.as_ref(), "allowed_headers");
    let Some(pb::ext_authz::Services::HttpService(service)) = &message.services else {
        return message.allowed_headers.is_some().then(own).transpose();
    };
    #[allow(deprecated, reason = "Envoy 1.40 still takes it")]
    let old = service.authorization_request.as_ref().and_then(|request| request.allowed_headers.as_ref());
    if old.is_some() && message.allowed_headers.is_some() {
        let reason = "Invalid duplicate configuration for allowed_headers.";
        return Err(ConfigError::new(reason).at("allowed_headers"));
    }
    let mut allowed = match old {
        Some(_) => matchers(old, "allowed_headers").at("authorization_request").at("http_service")?,
        None => own()?,
    };
    let always = [HeaderId::AUTHORIZATION, HeaderId::METHOD, HeaderId::PATH, HeaderId::AUTHORITY];
    allowed.extend(always.map(|id| StringMatcher::exact(id.name())));
    Ok(Some(allowed))
}

impl PerRoute {
    pub(super) fn from_proto(message: &pb::ExtAuthzPerRoute) -> ConfigResult<Self> {
        use pb::check_settings::ServiceOverride;
        use pb::ext_authz_per_route::Override;
        let settings = match &message.r#override {
            Some(Override::Disabled(disabled)) => return Ok(Self { disabled: *disabled, ..Self::default() }),
            Some(Override::CheckSettings(settings)) => settings,
            None => return Err(ConfigError::missing("override")),
        };
        if settings.disable_request_body_buffering && settings.with_request_body.is_some() {
            let reason = "Invalid configuration for check_settings. Only one of disable_request_body_buffering or \
                          with_request_body can be set.";
            return Err(ConfigError::new(reason).at("check_settings"));
        }
        let service = match &settings.service_override {
            Some(ServiceOverride::GrpcService(service)) => Some(Service::grpc(service).at("grpc_service")),
            Some(ServiceOverride::HttpService(service)) => Some(Service::http(service).at("http_service")),
            None => None,
        };
        Ok(Self {
            disabled: false,
            extensions: settings.context_extensions.clone(),
            no_body: settings.disable_request_body_buffering,
            body: settings.with_request_body.map(BodySettings::from_proto),
            service: service.transpose().at("check_settings")?,
        })
    }
}
