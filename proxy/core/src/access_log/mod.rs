//! The access log: filters, formats, files and collectors.
//!
//! A [`AccessLogger`] is one `AccessLog` message made ready. Whoever ends a stream hands it a
//! [`FormatContext`]; if the filter lets it pass, the line is formatted straight into the calling thread's
//! buffer of the file. The [`AccessLogManager`] owns the files: one descriptor per path, opened for appending and
//! shared by all loggers that name it, and one thread that writes. Nothing on the request path touches a disk.
//!
//! The text format writes client bytes as they came, as Envoy does: a line stays a line because no header can
//! hold a line break and the requested server name is cleaned; who splits lines at quotes or spaces must use
//! JSON, whose values are escaped.
//!
//! Entries for collectors ([`grpc`], [`open_telemetry`]) go out by [`crate::export`].

mod file;
mod filter;
mod grpc;
mod open_telemetry;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use envoy_types::pb::envoy::config::core::v3::SubstitutionFormatString;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::{FileAccessLog, file_access_log};
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::{
    HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig,
};
use envoy_types::pb::envoy::extensions::access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig;
use envoy_types::pb::envoy::extensions::access_loggers::stream::v3::{
    StderrAccessLog, StdoutAccessLog, stderr_access_log, stdout_access_log,
};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use crate::error::{AtField, ConfigError, ConfigResult};
use crate::format::{Extensions, FormatContext, Formatter};
use crate::runtime::Runtime;

use self::grpc::GrpcLogger;
use self::open_telemetry::OpenTelemetryLogger;

pub use self::file::{AccessLogManager, FlushPolicy, LogFile, Target};
pub use self::filter::AccessLogFilter;

/// What a logger prints when its configuration has no format.
pub const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% \
     %PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
     %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
     \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// One configured access log.
pub struct AccessLogger {
    filter: Option<AccessLogFilter>,
    sink: Sink,
}

enum Sink {
    File { formatter: Formatter, file: Arc<LogFile> },
    Grpc(Box<GrpcLogger>),
    OpenTelemetry(Box<OpenTelemetryLogger>),
}

impl AccessLogger {
    /// From the message. Its file is opened here, so that one that cannot be opened refuses the configuration.
    pub fn from_proto(
        message: &pb::AccessLog,
        manager: &AccessLogManager,
        runtime: &Runtime,
    ) -> ConfigResult<Self> {
        let filter = match &message.filter {
            Some(filter) => Some(AccessLogFilter::from_proto(filter, runtime).at("filter")?),
            None => None,
        };
        let unknown = |url: &str| {
            ConfigError::new(format!(
                "Didn't find a registered implementation for '{}' with type URL: '{url}'",
                message.name
            ))
        };
        let Some(pb::access_log::ConfigType::TypedConfig(any)) = &message.config_type else {
            return Err(unknown(""));
        };
        let sink = match any.type_url.rsplit('/').next().unwrap_or_default() {
            url if url == FileAccessLog::full_name() => {
                let (target, formatter) = file_log(&decode(any)?).at("typed_config")?;
                Sink::file(target, formatter, manager)?
            }
            url if url == StdoutAccessLog::full_name() => {
                let message: StdoutAccessLog = decode(any)?;
                let format = message
                    .access_log_format
                    .map(|stdout_access_log::AccessLogFormat::LogFormat(format)| format);
                Sink::file(Target::Stdout, log_format(format.as_ref()).at("typed_config")?, manager)?
            }
            url if url == StderrAccessLog::full_name() => {
                let message: StderrAccessLog = decode(any)?;
                let format = message
                    .access_log_format
                    .map(|stderr_access_log::AccessLogFormat::LogFormat(format)| format);
                Sink::file(Target::Stderr, log_format(format.as_ref()).at("typed_config")?, manager)?
            }
            url if url == HttpGrpcAccessLogConfig::full_name() => {
                let logger = GrpcLogger::http(&decode(any)?, manager.exporters()).at("typed_config")?;
                Sink::Grpc(Box::new(logger))
            }
            url if url == TcpGrpcAccessLogConfig::full_name() => {
                let logger = GrpcLogger::tcp(&decode(any)?, manager.exporters()).at("typed_config")?;
                Sink::Grpc(Box::new(logger))
            }
            url if url == OpenTelemetryAccessLogConfig::full_name() => {
                let message: OpenTelemetryAccessLogConfig = decode(any)?;
                let logger = OpenTelemetryLogger::from_proto(&message, manager.exporters());
                Sink::OpenTelemetry(Box::new(logger.at("typed_config")?))
            }
            url => {
                let what = format!("access logger '{}' ({url})", message.name);
                return Err(ConfigError::unsupported(what).at("typed_config"));
            }
        };
        Ok(Self { filter, sink })
    }

    /// From a repeated field.
    pub fn list_from_proto(
        messages: &[pb::AccessLog],
        field: &str,
        manager: &AccessLogManager,
        runtime: &Runtime,
    ) -> ConfigResult<Vec<Self>> {
        let parse = |(i, m)| Self::from_proto(m, manager, runtime).at_index(field, i);
        messages.iter().enumerate().map(parse).collect()
    }

    /// Logs a stream, if the filter lets it pass.
    pub fn log(&self, context: &FormatContext<'_>) {
        if self.filter.as_ref().is_some_and(|f| !f.passes(context)) {
            return;
        }
        match &self.sink {
            Sink::File { formatter, file } => file.write_with(|out| formatter.write(context, out)),
            Sink::Grpc(logger) => logger.log(context),
            Sink::OpenTelemetry(logger) => logger.log(context),
        }
    }
}

impl Sink {
    fn file(target: Target, formatter: Formatter, manager: &AccessLogManager) -> ConfigResult<Self> {
        Ok(Self::File { formatter, file: manager.open(target).at("typed_config")? })
    }
}

fn decode<M: Message + Default>(any: &Any) -> ConfigResult<M> {
    M::decode(any.value.as_slice()).map_err(|e| ConfigError::new(e.to_string()).at("typed_config"))
}

#[allow(deprecated)] // Envoy 1.40 still takes the three old formats, and so do we.
fn file_log(message: &FileAccessLog) -> ConfigResult<(Target, Formatter)> {
    use file_access_log::AccessLogFormat as F;
    if message.path.is_empty() {
        return Err(ConfigError::new("value length must be at least 1 characters").at("path"));
    }
    let formatter = match &message.access_log_format {
        None => log_format(None)?,
        Some(F::LogFormat(format)) => log_format(Some(format))?,
        Some(F::Format(text)) if text.is_empty() => log_format(None)?,
        Some(F::Format(text)) => Formatter::parse(text, &Extensions::NONE).at("format")?,
        Some(F::JsonFormat(format)) => {
            Formatter::parse_json(format, false, &Extensions::NONE).at("json_format")?
        }
        Some(F::TypedJsonFormat(format)) => {
            Formatter::parse_json(format, false, &Extensions::NONE).at("typed_json_format")?
        }
    };
    Ok((Target::Path(message.path.clone()), formatter))
}

fn log_format(format: Option<&SubstitutionFormatString>) -> ConfigResult<Formatter> {
    match format {
        Some(format) => Formatter::from_proto(format).at("log_format"),
        None => Formatter::parse(DEFAULT_FORMAT, &Extensions::NONE),
    }
}
