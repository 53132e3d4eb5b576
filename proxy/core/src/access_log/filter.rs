//! Which streams are logged.

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use envoy_types::pb::envoy::config::accesslog::v3::access_log_filter::FilterSpecifier as S;
use envoy_types::pb::envoy::config::accesslog::v3::comparison_filter::Op;
use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use envoy_types::pb::envoy::extensions::access_loggers::filters::cel::v3::ExpressionFilter;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use prost::{Message, Name};

use crate::cel::Expression;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::format::{FormatContext, grpc_status_of};
use crate::header::HeaderMap;
use crate::matcher::{HeaderMatcher, MetadataMatcher};
use crate::runtime::Runtime;
use crate::stream_info::{ResponseFlag, ResponseFlags};

/// How deep `and_filter` and `or_filter` may nest.
const MAX_DEPTH: usize = 32;

/// The digit in a request id that says a trace was forced by the service.
const TRACE_FORCED: u8 = b'a';

static NO_HEADERS: HeaderMap = HeaderMap::new();

/// A condition on a stream that has ended.
pub struct AccessLogFilter(What);

enum What {
    Status(Comparison),
    Duration(Comparison),
    NotHealthCheck,
    Traceable,
    Runtime {
        runtime: Runtime,
        key: Box<str>,
        numerator: u64,
        denominator: u64,
        independent: bool,
    },
    And(Vec<What>),
    Or(Vec<What>),
    Header(HeaderMatcher),
    /// Without flags: any.
    Flags(ResponseFlags),
    Grpc {
        statuses: Vec<i64>,
        exclude: bool,
    },
    Metadata {
        matcher: Option<MetadataMatcher>,
        if_missing: bool,
    },
    LogType {
        types: Vec<AccessLogType>,
        exclude: bool,
    },
    Cel(Box<Expression>),
}

struct Comparison {
    op: Op,
    value: u64,
    key: Option<(Box<str>, Runtime)>,
}

impl Comparison {
    fn from_proto(message: Option<&pb::ComparisonFilter>, runtime: &Runtime) -> ConfigResult<Self> {
        let message = message.ok_or_else(|| ConfigError::missing("comparison"))?;
        let op = Op::try_from(message.op)
            .map_err(|_| ConfigError::new("value must be one of the defined enum values").at("op"))
            .at("comparison")?;
        let value = message.value.clone().unwrap_or_default();
        let key = (!value.runtime_key.is_empty()).then(|| (value.runtime_key.into(), runtime.clone()));
        Ok(Self { op, value: value.default_value.into(), key })
    }

    fn holds(&self, left: u64) -> bool {
        let right = match &self.key {
            Some((key, runtime)) => runtime.integer(key, self.value),
            None => self.value,
        };
        match self.op {
            Op::Eq => left == right,
            Op::Ge => left >= right,
            Op::Le => left <= right,
            Op::Ne => left != right,
        }
    }
}

impl AccessLogFilter {
    /// From the message; filter extensions are refused by name.
    pub fn from_proto(message: &pb::AccessLogFilter, runtime: &Runtime) -> ConfigResult<Self> {
        What::from_proto(message, runtime, 0).map(Self)
    }

    /// Whether the stream is logged.
    pub fn passes(&self, context: &FormatContext<'_>) -> bool {
        self.0.passes(context)
    }
}

fn several(
    filters: &[pb::AccessLogFilter],
    runtime: &Runtime,
    depth: usize,
    field: &str,
) -> ConfigResult<Vec<What>> {
    if filters.len() < 2 {
        return Err(ConfigError::new("value must contain at least 2 item(s)").at("filters").at(field));
    }
    let parse = |(i, f)| What::from_proto(f, runtime, depth + 1).at_index("filters", i).at(field);
    filters.iter().enumerate().map(parse).collect()
}

impl What {
    fn from_proto(message: &pb::AccessLogFilter, runtime: &Runtime, depth: usize) -> ConfigResult<Self> {
        if depth > MAX_DEPTH {
            return Err(ConfigError::new("filters are nested too deep"));
        }
        let specifier =
            message.filter_specifier.as_ref().ok_or_else(|| ConfigError::missing("filter_specifier"))?;
        Ok(match specifier {
            S::StatusCodeFilter(f) => {
                Self::Status(Comparison::from_proto(f.comparison.as_ref(), runtime).at("status_code_filter")?)
            }
            S::DurationFilter(f) => {
                Self::Duration(Comparison::from_proto(f.comparison.as_ref(), runtime).at("duration_filter")?)
            }
            S::NotHealthCheckFilter(_) => Self::NotHealthCheck,
            S::TraceableFilter(_) => Self::Traceable,
            S::RuntimeFilter(f) => Self::runtime(f, runtime).at("runtime_filter")?,
            S::AndFilter(f) => Self::And(several(&f.filters, runtime, depth, "and_filter")?),
            S::OrFilter(f) => Self::Or(several(&f.filters, runtime, depth, "or_filter")?),
            S::HeaderFilter(f) => {
                let header = f.header.as_ref().ok_or_else(|| ConfigError::missing("header"));
                Self::Header(
                    header.and_then(|h| HeaderMatcher::from_proto(h).at("header")).at("header_filter")?,
                )
            }
            S::ResponseFlagFilter(f) => {
                let mut flags = ResponseFlags::default();
                for (i, name) in f.flags.iter().enumerate() {
                    let flag = ResponseFlag::from_short(name).ok_or_else(|| {
                        let e = ConfigError::new(format!("'{name}' is not a response flag"));
                        e.index(i).at("flags").at("response_flag_filter")
                    })?;
                    flags.set(flag);
                }
                Self::Flags(flags)
            }
            S::GrpcStatusFilter(f) => Self::Grpc {
                statuses: f.statuses.iter().map(|s| i64::from(*s)).collect(),
                exclude: f.exclude,
            },
            S::MetadataFilter(f) => {
                let matcher = match &f.matcher {
                    Some(m) => Some(MetadataMatcher::from_proto(m).at("matcher").at("metadata_filter")?),
                    None => None,
                };
                Self::Metadata {
                    matcher,
                    if_missing: f.match_if_key_not_found.as_ref().is_none_or(|b| b.value),
                }
            }
            S::LogTypeFilter(f) => Self::LogType { types: f.types().collect(), exclude: f.exclude },
            S::ExtensionFilter(f) => Self::extension(f).at("extension_filter")?,
        })
    }

    fn extension(message: &pb::ExtensionFilter) -> ConfigResult<Self> {
        let any = message.config_type.as_ref().map(|pb::extension_filter::ConfigType::TypedConfig(any)| any);
        match any.filter(|any| any.type_url.ends_with(&format!("/{}", ExpressionFilter::full_name()))) {
            Some(any) => {
                let filter = ExpressionFilter::decode(any.value.as_slice())
                    .map_err(|e| ConfigError::new(format!("malformed message: {e}")).at("typed_config"))?;
                let expression = Expression::parse(&filter.expression).at("expression").at("typed_config")?;
                Ok(Self::Cel(Box::new(expression)))
            }
            None => {
                Err(ConfigError::unsupported(format_args!("access log filter extension '{}'", message.name)))
            }
        }
    }

    fn runtime(message: &pb::RuntimeFilter, runtime: &Runtime) -> ConfigResult<Self> {
        if message.runtime_key.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("runtime_key"));
        }
        let percent = message.percent_sampled.unwrap_or_default();
        let denominator = match percent.denominator() {
            DenominatorType::Hundred => 100,
            DenominatorType::TenThousand => 10_000,
            DenominatorType::Million => 1_000_000,
        };
        Ok(Self::Runtime {
            runtime: runtime.clone(),
            key: message.runtime_key.as_str().into(),
            numerator: percent.numerator.into(),
            denominator,
            independent: message.use_independent_randomness,
        })
    }

    fn passes(&self, context: &FormatContext<'_>) -> bool {
        let info = context.info;
        match self {
            Self::Status(comparison) => comparison.holds(info.response_code.into()),
            Self::Duration(comparison) => {
                let duration = match info.end {
                    Some(end) => end.saturating_duration_since(info.start),
                    None => info.start.elapsed(),
                };
                comparison.holds(duration.as_millis() as u64)
            }
            Self::NotHealthCheck => !info.health_check,
            Self::Traceable => info.trace_reason == TRACE_FORCED,
            Self::Runtime { runtime, key, numerator, denominator, independent } => {
                let id = if *independent { None } else { info.request_id.as_deref() };
                let random = id.and_then(request_id_number).unwrap_or_else(rand::random);
                random % denominator < runtime.integer(key, *numerator)
            }
            Self::And(all) => all.iter().all(|f| f.passes(context)),
            Self::Or(all) => all.iter().any(|f| f.passes(context)),
            Self::Header(matcher) => matcher.matches(context.request.unwrap_or(&NO_HEADERS)),
            Self::Cel(expression) => expression.is_true(context),
            Self::Flags(flags) if flags.is_empty() => !info.flags.is_empty(),
            Self::Flags(flags) => info.flags.intersects(*flags),
            Self::Grpc { statuses, exclude } => {
                let status = match grpc_status_of(context) {
                    Some(known @ 0..=16) => known,
                    Some(_) => -1,
                    None => 2,
                };
                statuses.contains(&status) != *exclude
            }
            Self::Metadata { matcher, if_missing } => {
                let Some(matcher) = matcher else { return *if_missing };
                match matcher.find(info.dynamic_metadata.as_deref()) {
                    Some(value) if value.kind.is_some() => matcher.matches_value(value),
                    _ => *if_missing,
                }
            }
            Self::LogType { types, exclude } => types.contains(&context.log_type) != *exclude,
        }
    }
}

/// The number that makes sampling by request id agree on every hop: the first eight hex digits of its UUID.
fn request_id_number(id: &str) -> Option<u64> {
    (id.len() == 36).then(|| u64::from_str_radix(id.get(..8)?, 16).ok()).flatten()
}
