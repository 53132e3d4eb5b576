//! `Http2ProtocolOptions`, the same for clients and hosts.
//!
//! `max_outbound_frames` and `max_outbound_control_frames` are taken and have no effect: they bound queues that do
//! not grow here, since nothing is read from a peer who does not read.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf::{BoolValue, UInt32Value};
use sampan_codec::h2::{FrameLimits, KeepaliveOptions, Options};
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use super::duration;

const MAX: u32 = i32::MAX as u32;

/// Lays the message over `default`.
pub fn http2_options(message: &core::Http2ProtocolOptions, default: &Options) -> ConfigResult<Options> {
    let off = |value: &Option<BoolValue>| value.is_some_and(|v| !v.value);
    let on = |value: &Option<BoolValue>| value.is_some_and(|v| v.value);
    for (set, field) in [
        (message.allow_metadata, "allow_metadata"),
        (!message.custom_settings_parameters.is_empty(), "custom_settings_parameters"),
        (off(&message.enable_huffman_encoding), "enable_huffman_encoding"),
        (on(&message.disallow_obs_text), "disallow_obs_text"),
        (message.stream_reset_burst.is_some(), "stream_reset_burst"),
        (message.stream_reset_rate.is_some(), "stream_reset_rate"),
    ] {
        if set {
            return Err(ConfigError::unsupported(field).at(field));
        }
    }
    let frames = FrameLimits::default();
    let stream_errors = match message.override_stream_error_on_invalid_http_message {
        Some(value) => value.value,
        #[allow(deprecated, reason = "Envoy 1.40 still takes it")]
        None => message.stream_error_on_invalid_http_messaging || default.stream_errors,
    };
    Ok(Options {
        max_concurrent_streams: number(
            &message.max_concurrent_streams,
            "max_concurrent_streams",
            1,
            default.max_concurrent_streams,
        )?,
        stream_window: number(
            &message.initial_stream_window_size,
            "initial_stream_window_size",
            65_535,
            default.stream_window,
        )?,
        connection_window: number(
            &message.initial_connection_window_size,
            "initial_connection_window_size",
            65_535,
            default.connection_window,
        )?,
        header_table_size: message.hpack_table_size.map_or(default.header_table_size, |v| v.value),
        allow_connect: message.allow_connect,
        frames: FrameLimits {
            empty_frames: message
                .max_consecutive_inbound_frames_with_empty_payload
                .map_or(frames.empty_frames, |v| v.value),
            priority_per_stream: message
                .max_inbound_priority_frames_per_stream
                .map_or(frames.priority_per_stream, |v| v.value),
            window_updates_per_data: number(
                &message.max_inbound_window_update_frames_per_data_frame_sent,
                "max_inbound_window_update_frames_per_data_frame_sent",
                1,
                frames.window_updates_per_data,
            )?,
        },
        max_field_bytes: message.max_header_field_size_kb.map(|v| v.value as usize * 1024),
        keepalive: message
            .connection_keepalive
            .as_ref()
            .map(keepalive)
            .transpose()
            .at("connection_keepalive")?,
        stream_errors,
        ..default.clone()
    })
}

fn number(value: &Option<UInt32Value>, field: &str, min: u32, default: u32) -> ConfigResult<u32> {
    let value = value.map_or(default, |v| v.value);
    if (min..=MAX).contains(&value) {
        Ok(value)
    } else {
        Err(ConfigError::new(format!("value must be inside range [{min}, {MAX}]")).at(field))
    }
}

fn keepalive(message: &core::KeepaliveSettings) -> ConfigResult<KeepaliveOptions> {
    let some = |d: Option<Duration>| d.filter(|d| !d.is_zero());
    let timeout = some(duration(message.timeout.as_ref()).at("timeout")?);
    Ok(KeepaliveOptions {
        interval: some(duration(message.interval.as_ref()).at("interval")?),
        timeout: timeout.ok_or_else(|| ConfigError::missing("timeout"))?,
        jitter: message.interval_jitter.as_ref().map_or(15.0, |p| p.value),
        idle_interval: some(
            duration(message.connection_idle_interval.as_ref()).at("connection_idle_interval")?,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepalive_wants_a_timeout_and_has_its_jitter() {
        let settings = |timeout| core::Http2ProtocolOptions {
            connection_keepalive: Some(core::KeepaliveSettings { timeout, ..Default::default() }),
            ..Default::default()
        };
        let default = Options::default();
        let error = http2_options(&settings(None), &default).unwrap_err().to_string();
        assert!(error.contains("connection_keepalive.timeout"), "{error}");
        let second = envoy_types::pb::google::protobuf::Duration { seconds: 1, nanos: 0 };
        let options = http2_options(&settings(Some(second)), &default).unwrap();
        assert_eq!(options.keepalive.map(|k| (k.jitter, k.interval)), Some((15.0, None)));
    }

    #[test]
    fn windows_have_bounds() {
        let message = core::Http2ProtocolOptions {
            initial_stream_window_size: Some(UInt32Value { value: 1000 }),
            ..Default::default()
        };
        let error = http2_options(&message, &Options::default()).unwrap_err().to_string();
        assert!(error.contains("initial_stream_window_size"), "{error}");
    }
}
