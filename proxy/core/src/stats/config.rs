//! `stats_config` of the bootstrap: tags, which stats exist, histogram buckets.

use std::sync::OnceLock;

use envoy_types::pb::envoy::config::metrics::v3 as pb;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher_pb;

use super::histogram::DEFAULT_BUCKETS;
use super::tags::Tags;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::matcher::StringMatcher;

/// The checked `stats_config`.
#[derive(Debug, Default)]
pub struct StatsModel {
    tags: OnceLock<Tags>,
    matcher: Matcher,
    buckets: Vec<(StringMatcher, Vec<f64>)>,
}

/// `stats_matcher`: which stats come into being.
#[derive(Debug, Default)]
enum Matcher {
    #[default]
    All,
    None,
    Only(Vec<StringMatcher>),
    AllBut(Vec<StringMatcher>),
}

impl StatsModel {
    /// Checks the message.
    pub fn parse(config: &pb::StatsConfig) -> ConfigResult<Self> {
        use pb::stats_matcher::StatsMatcher as M;
        let defaults = config.use_all_default_tags.as_ref().is_none_or(|b| b.value);
        let tags = Tags::new(defaults, &config.stats_tags)?;
        let list = |l: &matcher_pb::ListStringMatcher, field| {
            let patterns = l.patterns.iter().enumerate();
            patterns
                .map(|(i, p)| StringMatcher::from_proto(p).at_index("patterns", i))
                .collect::<ConfigResult<Vec<_>>>()
                .at(field)
                .at("stats_matcher")
        };
        let matcher = match config.stats_matcher.as_ref().and_then(|m| m.stats_matcher.as_ref()) {
            None | Some(M::RejectAll(false)) => Matcher::All,
            Some(M::RejectAll(true)) => Matcher::None,
            Some(M::InclusionList(l)) => Matcher::Only(list(l, "inclusion_list")?),
            Some(M::ExclusionList(l)) => Matcher::AllBut(list(l, "exclusion_list")?),
        };
        let mut buckets = Vec::new();
        for (i, setting) in config.histogram_bucket_settings.iter().enumerate() {
            let parsed = bucket_setting(setting).at_index("histogram_bucket_settings", i)?;
            // A setting with `bins` alone only sizes Envoy's memory.
            buckets.extend(parsed.filter(|(_, b)| !b.is_empty()));
        }
        Ok(Self { tags: OnceLock::from(tags), matcher, buckets })
    }

    /// The tag rules.
    pub fn tags(&self) -> &Tags {
        self.tags.get_or_init(Tags::default)
    }

    /// The upper bounds of a histogram's buckets.
    pub fn buckets(&self, name: &str) -> &[f64] {
        let found = self.buckets.iter().find(|(matcher, _)| matcher.matches(name));
        found.map_or(&DEFAULT_BUCKETS, |(_, buckets)| buckets)
    }

    /// Whether any stat could be rejected.
    pub fn rejects_some(&self) -> bool {
        !matches!(self.matcher, Matcher::All)
    }

    /// Whether the stat of that full name must not exist.
    pub fn rejects(&self, name: &str) -> bool {
        match &self.matcher {
            Matcher::All => false,
            Matcher::None => true,
            Matcher::Only(list) => !list.iter().any(|m| m.matches(name)),
            Matcher::AllBut(list) => list.iter().any(|m| m.matches(name)),
        }
    }
}

/// `stats_sinks` of the bootstrap: none is implemented, so each is refused by its type.
pub fn refuse_sinks(sinks: &[pb::StatsSink]) -> ConfigResult<()> {
    match sinks.first() {
        None => Ok(()),
        Some(sink) => {
            let error = match &sink.config_type {
                Some(pb::stats_sink::ConfigType::TypedConfig(any)) => {
                    ConfigError::unsupported(&any.type_url).at("typed_config")
                }
                None => ConfigError::unsupported(&sink.name).at("name"),
            };
            Err(error.index(0).at("stats_sinks"))
        }
    }
}

fn bucket_setting(setting: &pb::HistogramBucketSettings) -> ConfigResult<Option<(StringMatcher, Vec<f64>)>> {
    let Some(matcher) = &setting.r#match else { return Err(ConfigError::missing("match")) };
    let matcher = StringMatcher::from_proto(matcher).at("match")?;
    if setting.buckets.iter().any(|b| b.is_nan() || *b <= 0.0) {
        return Err(ConfigError::new("value must be greater than 0").at("buckets"));
    }
    let mut buckets = setting.buckets.clone();
    buckets.sort_by(f64::total_cmp);
    if buckets.windows(2).any(|w| w[0] == w[1]) {
        return Err(ConfigError::new("repeated value must contain unique items").at("buckets"));
    }
    Ok(Some((matcher, buckets)))
}
