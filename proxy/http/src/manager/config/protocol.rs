//! What the codecs are told, and how long things may take.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::Percent;
use sampan_codec::h1::{HeaderCase, ServerOptions, Underscores};
use sampan_codec::h2;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::matcher::StringMatcher;
use sampan_upstream::config::http2_options;

use super::{duration, flag, number, or_never, refuse};

/// Timeouts and counts; `None` is never.
#[derive(Debug, Clone)]
pub struct Limits {
    /// `common_http_protocol_options.idle_timeout`
    pub idle_timeout: Option<Duration>,
    /// `common_http_protocol_options.max_connection_duration`; [`Limits::connection_duration`] adds its jitter.
    max_connection_duration: Option<Jittered>,
    /// `http1_safe_max_connection_duration`
    pub http1_safe_max_connection_duration: bool,
    /// `common_http_protocol_options.max_stream_duration`
    pub max_stream_duration: Option<Duration>,
    /// `common_http_protocol_options.max_requests_per_connection`; 0 is no limit.
    pub max_requests_per_connection: u32,
    /// `stream_idle_timeout`
    pub stream_idle_timeout: Option<Duration>,
    /// `stream_flush_timeout`
    pub stream_flush_timeout: Option<Duration>,
    /// `request_timeout`
    pub request_timeout: Option<Duration>,
    /// `request_headers_timeout`
    pub request_headers_timeout: Option<Duration>,
    /// `drain_timeout`; [`Limits::drain_timeout`] adds its jitter.
    drain_timeout: Jittered,
    /// `delayed_close_timeout`
    pub delayed_close_timeout: Duration,
}

/// A time that is longer for each connection by a random share of itself, up to this.
#[derive(Debug, Clone, Copy)]
struct Jittered {
    time: Duration,
    jitter: f64,
}

impl Jittered {
    fn new(time: Duration, jitter: Option<Percent>) -> Self {
        Self { time, jitter: jitter.map_or(0.0, |percent| percent.value / 100.0) }
    }

    fn of(self, random: impl FnOnce() -> u64) -> Duration {
        if self.jitter == 0.0 {
            return self.time;
        }
        self.time.mul_f64(1.0 + self.jitter * (random() as f64 / u64::MAX as f64))
    }
}

impl Limits {
    /// How long a connection may live.
    pub fn connection_duration(&self, random: impl FnOnce() -> u64) -> Option<Duration> {
        self.max_connection_duration.map(|time| time.of(random))
    }

    /// How long a client that is asked to go has.
    pub fn drain_timeout(&self, random: impl FnOnce() -> u64) -> Duration {
        self.drain_timeout.of(random)
    }
}

pub(super) fn limits(message: &pb::HttpConnectionManager, common: &core::HttpProtocolOptions) -> Limits {
    let seconds = |s| Some(Duration::from_secs(s));
    let stream_idle_timeout = or_never(message.stream_idle_timeout.as_ref(), seconds(300));
    Limits {
        idle_timeout: or_never(common.idle_timeout.as_ref(), seconds(3600)),
        max_connection_duration: or_never(common.max_connection_duration.as_ref(), None)
            .map(|time| Jittered::new(time, common.max_connection_duration_jitter)),
        http1_safe_max_connection_duration: message.http1_safe_max_connection_duration,
        max_stream_duration: or_never(common.max_stream_duration.as_ref(), None),
        max_requests_per_connection: number(common.max_requests_per_connection, 0),
        stream_idle_timeout,
        stream_flush_timeout: or_never(message.stream_flush_timeout.as_ref(), stream_idle_timeout),
        request_timeout: or_never(message.request_timeout.as_ref(), None),
        request_headers_timeout: or_never(message.request_headers_timeout.as_ref(), None),
        drain_timeout: Jittered::new(
            message.drain_timeout.as_ref().map_or(Duration::from_secs(5), duration),
            message.drain_timeout_jitter,
        ),
        delayed_close_timeout: message
            .delayed_close_timeout
            .as_ref()
            .map_or(Duration::from_secs(1), duration),
    }
}

/// The spelling of header names from `header_key_format`.
pub fn header_case(
    format: Option<&core::http1_protocol_options::HeaderKeyFormat>,
) -> ConfigResult<HeaderCase> {
    use core::http1_protocol_options::header_key_format::HeaderFormat;
    use envoy_types::pb::envoy::extensions::http::header_formatters::preserve_case::v3 as preserve;
    match format.and_then(|f| f.header_format.as_ref()) {
        None => Ok(HeaderCase::Lower),
        Some(HeaderFormat::ProperCaseWords(_)) => Ok(HeaderCase::Proper),
        Some(HeaderFormat::StatefulFormatter(extension)) => {
            let any = extension.typed_config.clone().unwrap_or_default();
            let name = crate::filter::message_name(&any);
            if name != "envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig"
            {
                return Err(ConfigError::unsupported(format!("header formatter type {:?}", any.type_url))
                    .at("stateful_formatter"));
            }
            let config: preserve::PreserveCaseFormatterConfig = crate::filter::decode(&any)?;
            refuse(config.forward_reason_phrase, "stateful_formatter.typed_config.forward_reason_phrase")?;
            Ok(match config.formatter_type_on_envoy_headers() {
                preserve::preserve_case_formatter_config::FormatterTypeOnEnvoyHeaders::ProperCase => {
                    HeaderCase::PreserveOrProper
                }
                preserve::preserve_case_formatter_config::FormatterTypeOnEnvoyHeaders::Default => {
                    HeaderCase::Preserve
                }
            })
        }
    }
}

pub(super) fn http1(
    message: &pb::HttpConnectionManager,
    common: &core::HttpProtocolOptions,
) -> ConfigResult<ServerOptions> {
    let h1 = message.http_protocol_options.clone().unwrap_or_default();
    let ignored = h1.ignore_http_11_upgrade.iter().enumerate();
    let ignored =
        ignored.map(|(i, one)| StringMatcher::from_proto(one).at_index("ignore_http_11_upgrade", i));
    Ok(ServerOptions {
        refuse_https: message.use_remote_address.is_some_and(|b| b.value),
        max_header_bytes: number(message.max_request_headers_kb, 60) as usize * 1024,
        max_headers: number(common.max_headers_count, 100) as usize,
        accept_http10: h1.accept_http_10,
        default_host: Some(h1.default_host_for_http_10).filter(|h| !h.is_empty()),
        allow_absolute_url: flag(h1.allow_absolute_url, true),
        allow_chunked_length: h1.allow_chunked_length,
        enable_trailers: h1.enable_trailers,
        allow_custom_methods: h1.allow_custom_methods,
        ignore_upgrades: ignored.collect::<ConfigResult<_>>().at("http_protocol_options")?,
        case: header_case(h1.header_key_format.as_ref())
            .at("header_key_format")
            .at("http_protocol_options")?,
        underscores: underscores(common),
    })
}

pub(super) fn h1_stream_errors(message: &pb::HttpConnectionManager) -> bool {
    let own = message.http_protocol_options.as_ref();
    let own = own.and_then(|h1| h1.override_stream_error_on_invalid_http_message);
    flag(own.or(message.stream_error_on_invalid_http_message), false)
}

fn underscores(common: &core::HttpProtocolOptions) -> Underscores {
    use core::http_protocol_options::HeadersWithUnderscoresAction as Action;
    match common.headers_with_underscores_action() {
        Action::Allow => Underscores::Allow,
        Action::RejectRequest => Underscores::Reject,
        Action::DropHeader => Underscores::Drop,
    }
}

pub(super) fn http2(
    message: &pb::HttpConnectionManager,
    common: &core::HttpProtocolOptions,
) -> ConfigResult<h2::Options> {
    let h2 = message.http2_protocol_options.clone().unwrap_or_default();
    let default = h2::Options {
        max_header_bytes: number(message.max_request_headers_kb, 60) * 1024,
        max_headers: number(common.max_headers_count, 100) as usize,
        underscores: underscores(common),
        stream_errors: flag(message.stream_error_on_invalid_http_message, false),
        ..h2::Options::default()
    };
    http2_options(&h2, &default).at("http2_protocol_options")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_adds_up_to_its_share() {
        let time = Duration::from_secs(10);
        let half = Jittered::new(time, Some(Percent { value: 50.0 }));
        assert_eq!((half.of(|| 0), half.of(|| u64::MAX)), (time, Duration::from_secs(15)));
        assert_eq!(Jittered::new(time, None).of(|| u64::MAX), time);
    }
}
