//! `HttpProtocolOptions`: which protocol is spoken to the hosts, and its limits.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster, cluster::ClusterProtocolSelection};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::core::v3::http1_protocol_options::header_key_format::HeaderFormat;
use envoy_types::pb::envoy::extensions::http::header_formatters::preserve_case::v3 as preserve;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as ext;
use sampan_codec::h1::HeaderCase;
use sampan_codec::{h1, h2};
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use super::http2::http2_options;
use super::{duration, type_name, unpack};

const EXTENSION: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Which protocol is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpProtocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    Http2,
    /// What the downstream spoke.
    Downstream,
    /// What the host chooses by ALPN (`auto_config`).
    Auto,
}

/// How HTTP is spoken to the hosts.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Which protocol.
    pub protocol: HttpProtocol,
    /// HTTP/1's options.
    pub h1: h1::ClientOptions,
    /// HTTP/2's options.
    pub h2: h2::Options,
    /// `idle_timeout` of a connection without requests; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// `max_connection_duration`
    pub max_connection_duration: Option<Duration>,
    /// `max_requests_per_connection`; 0: no limit.
    pub max_requests_per_connection: u32,
    /// `max_stream_duration` of a request, where the route sets none.
    pub max_stream_duration: Option<Duration>,
    /// `auto_sni`
    pub auto_sni: bool,
    /// `auto_san_validation`
    pub auto_san_validation: bool,
    /// `override_auto_sni_header`; empty: the host.
    pub auto_sni_header: String,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            protocol: HttpProtocol::Http1,
            h1: h1::ClientOptions::default(),
            h2: h2::Options::default(),
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            max_requests_per_connection: 0,
            max_stream_duration: None,
            auto_sni: false,
            auto_san_validation: false,
            auto_sni_header: String::new(),
        }
    }
}

static DEFAULT: LazyLock<Arc<HttpConfig>> = LazyLock::new(Arc::default);

impl HttpConfig {
    #[allow(deprecated, reason = "Envoy 1.40 still takes the fields")]
    /// `names`: server names are sent and verified where nothing is said of that.
    pub(super) fn from_proto(m: &Cluster, names: bool) -> ConfigResult<Arc<Self>> {
        let deprecated = names
            || m.http_protocol_options.is_some()
            || m.http2_protocol_options.is_some()
            || m.common_http_protocol_options.is_some()
            || m.upstream_http_protocol_options.is_some()
            || m.max_requests_per_connection.is_some()
            || m.protocol_selection != 0;
        let mut extension = None;
        for (key, any) in &m.typed_extension_protocol_options {
            let path = |e: ConfigError| e.key(key).at("typed_extension_protocol_options");
            if type_name(any) != EXTENSION {
                return Err(path(ConfigError::unsupported(type_name(any))));
            }
            let options: ext::HttpProtocolOptions = unpack(Some(any)).map_err(path)?;
            extension = Some(Self::from_extension(&options).map(Arc::new).map_err(path)?);
        }
        if let Some(config) = extension {
            return Ok(config);
        }
        if !deprecated {
            return Ok(DEFAULT.clone());
        }
        let mut config = Self { auto_sni: names, auto_san_validation: names, ..Self::default() };
        if let Some(common) = &m.common_http_protocol_options {
            config.common(common).at("common_http_protocol_options")?;
        }
        if let Some(max) = m.max_requests_per_connection {
            config.max_requests_per_connection = max.value;
        }
        config.upstream(m.upstream_http_protocol_options.as_ref()).at("upstream_http_protocol_options")?;
        config.h1(m.http_protocol_options.as_ref()).at("http_protocol_options")?;
        config.h2(m.http2_protocol_options.as_ref()).at("http2_protocol_options")?;
        if m.protocol_selection() == ClusterProtocolSelection::UseDownstreamProtocol {
            config.protocol = HttpProtocol::Downstream;
        } else if m.http2_protocol_options.is_some() {
            config.protocol = HttpProtocol::Http2;
        }
        Ok(Arc::new(config))
    }

    fn from_extension(m: &ext::HttpProtocolOptions) -> ConfigResult<Self> {
        use ext::http_protocol_options::UpstreamProtocolOptions as U;
        use ext::http_protocol_options::explicit_http_config::ProtocolConfig as P;
        refuse(&[
            (m.header_validation_config.is_some(), "header_validation_config"),
            (m.outlier_detection.is_some(), "outlier_detection"),
            (!m.request_mirror_policies.is_empty(), "request_mirror_policies"),
            (!m.hash_policy.is_empty(), "hash_policy"),
            (m.retry_policy.is_some(), "retry_policy"),
        ])?;
        for (i, filter) in m.http_filters.iter().enumerate() {
            if filter.name != "envoy.filters.http.upstream_codec" || i + 1 != m.http_filters.len() {
                return Err(ConfigError::unsupported(format!("upstream HTTP filter {}", filter.name))
                    .index(i)
                    .at("http_filters"));
            }
        }
        let mut config = Self::default();
        if let Some(common) = &m.common_http_protocol_options {
            config.common(common).at("common_http_protocol_options")?;
        }
        config.upstream(m.upstream_http_protocol_options.as_ref()).at("upstream_http_protocol_options")?;
        match &m.upstream_protocol_options {
            None => return Err(ConfigError::missing("upstream_protocol_options")),
            Some(U::ExplicitHttpConfig(explicit)) => match &explicit.protocol_config {
                Some(P::HttpProtocolOptions(h1)) => {
                    config.h1(Some(h1)).at("explicit_http_config.http_protocol_options")?;
                }
                Some(P::Http2ProtocolOptions(h2)) => {
                    config.h2(Some(h2)).at("explicit_http_config.http2_protocol_options")?;
                    config.protocol = HttpProtocol::Http2;
                }
                Some(P::Http3ProtocolOptions(_)) => {
                    return Err(ConfigError::unsupported("http3_protocol_options")
                        .at("explicit_http_config.http3_protocol_options"));
                }
                None => return Err(ConfigError::missing("explicit_http_config.protocol_config")),
            },
            Some(U::UseDownstreamProtocolConfig(d)) => {
                const FIELD: &str = "use_downstream_protocol_config";
                refuse(&[(d.http3_protocol_options.is_some(), "http3_protocol_options")]).at(FIELD)?;
                config.h1(d.http_protocol_options.as_ref()).at("http_protocol_options").at(FIELD)?;
                config.h2(d.http2_protocol_options.as_ref()).at("http2_protocol_options").at(FIELD)?;
                config.protocol = HttpProtocol::Downstream;
            }
            Some(U::AutoConfig(auto)) => {
                const FIELD: &str = "auto_config";
                refuse(&[
                    (auto.http3_protocol_options.is_some(), "http3_protocol_options"),
                    (auto.alternate_protocols_cache_options.is_some(), "alternate_protocols_cache_options"),
                ])
                .at(FIELD)?;
                config.h1(auto.http_protocol_options.as_ref()).at("http_protocol_options").at(FIELD)?;
                config.h2(auto.http2_protocol_options.as_ref()).at("http2_protocol_options").at(FIELD)?;
                config.protocol = HttpProtocol::Auto;
            }
        }
        Ok(config)
    }

    fn common(&mut self, m: &core::HttpProtocolOptions) -> ConfigResult<()> {
        if let Some(idle) = duration(m.idle_timeout.as_ref()).at("idle_timeout")? {
            self.idle_timeout = (!idle.is_zero()).then_some(idle);
        }
        self.max_connection_duration = duration(m.max_connection_duration.as_ref())
            .at("max_connection_duration")?
            .filter(|d| !d.is_zero());
        self.max_stream_duration = duration(m.max_stream_duration.as_ref()).at("max_stream_duration")?;
        self.max_requests_per_connection = m.max_requests_per_connection.map_or(0, |v| v.value);
        if let Some(count) = m.max_headers_count {
            self.h1.max_headers = count.value as usize;
            self.h2.max_headers = count.value as usize;
        }
        if let Some(kb) = m.max_response_headers_kb {
            if kb.value == 0 || kb.value > 8192 {
                return Err(
                    ConfigError::new("value must be inside range (0, 8192]").at("max_response_headers_kb")
                );
            }
            self.h1.max_header_bytes = kb.value as usize * 1024;
            self.h2.max_header_bytes = kb.value * 1024;
        }
        Ok(())
    }

    fn upstream(&mut self, m: Option<&core::UpstreamHttpProtocolOptions>) -> ConfigResult<()> {
        let Some(m) = m else { return Ok(()) };
        if m.auto_san_validation && !m.auto_sni {
            return Err(ConfigError::new(
                "'auto_san_validation' may only be set in conjunction with 'auto_sni'",
            ));
        }
        self.auto_sni = m.auto_sni;
        self.auto_san_validation = m.auto_san_validation;
        self.auto_sni_header.clone_from(&m.override_auto_sni_header);
        Ok(())
    }

    fn h1(&mut self, m: Option<&core::Http1ProtocolOptions>) -> ConfigResult<()> {
        let Some(m) = m else { return Ok(()) };
        refuse(&[
            (m.allow_chunked_length, "allow_chunked_length"),
            (m.send_fully_qualified_url, "send_fully_qualified_url"),
            (!m.ignore_http_11_upgrade.is_empty(), "ignore_http_11_upgrade"),
        ])?;
        self.h1.enable_trailers = m.enable_trailers;
        self.h1.case = match m.header_key_format.as_ref().and_then(|f| f.header_format.as_ref()) {
            None => HeaderCase::Lower,
            Some(HeaderFormat::ProperCaseWords(_)) => HeaderCase::Proper,
            Some(HeaderFormat::StatefulFormatter(formatter)) => {
                preserve_case(formatter.typed_config.as_ref())
                    .at("header_key_format.stateful_formatter.typed_config")?
            }
        };
        Ok(())
    }

    fn h2(&mut self, m: Option<&core::Http2ProtocolOptions>) -> ConfigResult<()> {
        let Some(m) = m else { return Ok(()) };
        self.h2 = http2_options(m, &self.h2)?;
        Ok(())
    }
}

fn preserve_case(any: Option<&envoy_types::pb::google::protobuf::Any>) -> ConfigResult<HeaderCase> {
    use preserve::preserve_case_formatter_config::FormatterTypeOnEnvoyHeaders as F;
    let name = any.map(type_name).unwrap_or_default();
    if name != "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig" {
        return Err(ConfigError::unsupported(format!("header formatter {name:?}")));
    }
    let config: preserve::PreserveCaseFormatterConfig = unpack(any)?;
    Ok(match config.formatter_type_on_envoy_headers() {
        F::ProperCase => HeaderCase::PreserveOrProper,
        F::Default => HeaderCase::Preserve,
    })
}

fn refuse(fields: &[(bool, &str)]) -> ConfigResult<()> {
    match fields.iter().find(|(present, _)| *present) {
        Some((_, field)) => Err(ConfigError::unsupported(field).at(field)),
        None => Ok(()),
    }
}
