//! The buckets of one configuration, or of one connection: the default one, one for each descriptor, and for a
//! descriptor that leaves values open one for each value that came lately.
//!
//! A request takes from every bucket that one of its descriptors finds, the slowest first, until one is empty; then
//! from the default bucket. The buckets of open descriptors are found under a lock: which of them was used least is
//! shared by all workers, and is what `max_dynamic_descriptors` goes by. Nothing else is locked.
//!
//! Source: `LocalRateLimiterImpl`; tried beside Envoy 1.40 (cases `filters/local_ratelimit_*`).

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use envoy_types::pb::envoy::config::route::v3::rate_limit::XRateLimitOption;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3 as pb;
use foldhash::fast::FixedState;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use smallvec::SmallVec;

use super::bucket::{Refused, Size, TokenBucket};
use crate::route::{Descriptor, Entry};

/// What is limited how: the model that limiters are made of.
pub(super) struct Limits {
    default: Option<Size>,
    always_default: bool,
    descriptors: Vec<Limit>,
    /// Hashes of the entries of descriptors without open values, to their places.
    exact: HashMap<u64, SmallVec<[u32; 1]>>,
    /// Places of descriptors with open values.
    open: Vec<u32>,
    max_dynamic: usize,
}

struct Limit {
    entries: Vec<(String, String)>,
    size: Size,
    shadow: bool,
}

/// Buckets.
pub(super) struct Limiter {
    limits: Arc<Limits>,
    default: Option<Arc<TokenBucket>>,
    /// By place; those of open descriptors stay full.
    fixed: Vec<Arc<TokenBucket>>,
    /// In the order of `Limits::open`.
    dynamic: Vec<Mutex<Recent>>,
}

/// The buckets of an open descriptor, by the values that came.
#[derive(Default)]
struct Recent {
    buckets: HashMap<Arc<[u8]>, (u64, Arc<TokenBucket>)>,
    by_use: BTreeMap<u64, Arc<[u8]>>,
    next: u64,
}

/// What becomes of a request.
pub(super) struct Verdict {
    /// It may pass.
    pub(super) allowed: bool,
    /// It passes only because the empty bucket's descriptor is in `shadow_mode`.
    pub(super) shadow: bool,
    /// The bucket to tell of.
    pub(super) bucket: Option<Arc<TokenBucket>>,
    /// What the descriptor says of telling.
    pub(super) headers: XRateLimitOption,
}

/// A bucket that a descriptor found.
struct Matched {
    bucket: Arc<TokenBucket>,
    shadow: bool,
    hits: u64,
    negative: bool,
    headers: XRateLimitOption,
}

impl Matched {
    fn new(bucket: Arc<TokenBucket>, shadow: bool, by: &Descriptor<'_>) -> Self {
        Self { bucket, shadow, hits: by.hits.unwrap_or(1), negative: by.negative, headers: by.headers }
    }
}

impl Limits {
    pub(super) fn from_proto(message: &pb::LocalRateLimit) -> ConfigResult<Self> {
        let default = match message.token_bucket.as_ref().map(Size::from_proto) {
            // Envoy goes without a bucket whose interval rounds to nothing.
            None | Some(Err(Refused::Zero)) => None,
            Some(Ok(size)) => Some(size),
            Some(Err(Refused::TooShort)) => {
                return Err(ConfigError::new("local rate limit token bucket fill timer must be >= 50ms")
                    .at("fill_interval")
                    .at("token_bucket"));
            }
        };
        let mut limits = Self {
            default,
            always_default: message.always_consume_default_token_bucket.is_none_or(|a| a.value),
            descriptors: Vec::with_capacity(message.descriptors.len()),
            exact: HashMap::new(),
            open: Vec::new(),
            max_dynamic: message.max_dynamic_descriptors.map_or(20, |m| m.value.max(1) as usize),
        };
        for (i, descriptor) in message.descriptors.iter().enumerate() {
            let size = descriptor.token_bucket.as_ref().map_or(Err(Refused::Zero), Size::from_proto);
            let size = size.map_err(|_| {
                ConfigError::new("local rate limit descriptor token bucket fill timer must be >= 50ms")
                    .at("fill_interval")
                    .at("token_bucket")
            });
            let size = size.at_index("descriptors", i)?;
            let entries = descriptor.entries.iter().map(|e| (e.key.clone(), e.value.clone())).collect();
            limits.add(Limit { entries, size, shadow: descriptor.shadow_mode }).at_index("descriptors", i)?;
        }
        Ok(limits)
    }

    fn add(&mut self, limit: Limit) -> ConfigResult<()> {
        let place = self.descriptors.len() as u32;
        let known = |place: &u32| self.descriptors[*place as usize].entries == limit.entries;
        let open = limit.entries.iter().any(|(_, value)| value.is_empty());
        let hash = hash(limit.entries.iter().map(|(k, v)| (k.as_bytes(), v.as_bytes())));
        let duplicate = if open {
            self.open.iter().any(known)
        } else {
            self.exact.get(&hash).is_some_and(|s| s.iter().any(known))
        };
        if duplicate {
            let text: Vec<_> = limit.entries.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let text = text.join(", ");
            return Err(ConfigError::new(format!(
                "duplicate descriptor in the local rate descriptor: {text}"
            )));
        }
        if open {
            self.open.push(place);
        } else {
            self.exact.entry(hash).or_default().push(place);
        }
        self.descriptors.push(limit);
        Ok(())
    }

    /// Whether anything asks for a request's descriptors.
    pub(super) fn has_descriptors(&self) -> bool {
        !self.descriptors.is_empty()
    }

    /// The descriptor with just these entries.
    fn find(&self, entries: &[Entry<'_>]) -> Option<usize> {
        let places = self.exact.get(&hash(entries.iter().map(|(k, v)| (k.as_bytes(), &**v))))?;
        places.iter().map(|p| *p as usize).find(|p| self.descriptors[*p].takes(entries))
    }
}

impl Limit {
    /// Whether the entries are these, open values aside.
    fn takes(&self, entries: &[Entry<'_>]) -> bool {
        let same = |((key, value), (k, v)): (&(String, String), &Entry<'_>)| {
            key == k && (value.is_empty() || value.as_bytes() == &**v)
        };
        self.entries.len() == entries.len() && self.entries.iter().zip(entries).all(same)
    }
}

fn hash<'e>(entries: impl Iterator<Item = (&'e [u8], &'e [u8])>) -> u64 {
    let mut hasher = FixedState::default().build_hasher();
    for entry in entries {
        entry.hash(&mut hasher);
    }
    hasher.finish()
}

impl Recent {
    fn bucket(&mut self, entries: &[Entry<'_>], size: Size, max: usize, now: Instant) -> Arc<TokenBucket> {
        let mut key: SmallVec<[u8; 64]> = SmallVec::new();
        for (_, value) in entries {
            key.extend_from_slice(&(value.len() as u64).to_le_bytes());
            key.extend_from_slice(value);
        }
        self.next += 1;
        if let Some((used, bucket)) = self.buckets.get_mut(&key[..]) {
            if let Some(key) = self.by_use.remove(used) {
                self.by_use.insert(self.next, key);
            }
            *used = self.next;
            return bucket.clone();
        }
        let key: Arc<[u8]> = key[..].into();
        let bucket = Arc::new(TokenBucket::new(size, now));
        self.by_use.insert(self.next, key.clone());
        self.buckets.insert(key, (self.next, bucket.clone()));
        if self.buckets.len() > max
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.buckets.remove(&oldest);
        }
        bucket
    }
}

impl Limiter {
    pub(super) fn new(limits: Arc<Limits>, now: Instant) -> Self {
        Self {
            default: limits.default.map(|size| Arc::new(TokenBucket::new(size, now))),
            fixed: limits.descriptors.iter().map(|d| Arc::new(TokenBucket::new(d.size, now))).collect(),
            dynamic: limits.open.iter().map(|_| Mutex::default()).collect(),
            limits,
        }
    }

    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }

    fn find(&self, descriptor: &Descriptor<'_>, now: Instant) -> Option<Matched> {
        let entries = &descriptor.entries;
        if let Some(place) = self.limits.find(entries) {
            let shadow = self.limits.descriptors[place].shadow;
            return Some(Matched::new(self.fixed[place].clone(), shadow, descriptor));
        }
        let open = self.limits.open.iter().map(|place| &self.limits.descriptors[*place as usize]);
        let (limit, recent) = open.zip(&self.dynamic).find(|(limit, _)| limit.takes(entries))?;
        let mut recent = recent.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = recent.bucket(entries, limit.size, self.limits.max_dynamic, now);
        Some(Matched::new(bucket, limit.shadow, descriptor))
    }

    /// Takes a request's tokens.
    pub(super) fn take(&self, descriptors: &[Descriptor<'_>], now: Instant) -> Verdict {
        let mut matched: SmallVec<[Matched; 2]> =
            descriptors.iter().filter_map(|d| self.find(d, now)).collect();
        matched.sort_by(|a, b| a.bucket.size.rate.total_cmp(&b.bucket.size.rate));
        let mut shadowed = None;
        for (i, one) in matched.iter().enumerate() {
            if one.negative {
                one.bucket.give(one.hits, now);
            } else if !one.bucket.take(one.hits, now) {
                if !one.shadow {
                    return Verdict::of(false, one);
                }
                shadowed.get_or_insert(i);
            }
        }
        let told = shadowed.map(|i| &matched[i]).or(matched.first());
        if told.is_none() || self.limits.always_default {
            let taken = self.default.as_ref().map(|bucket| (bucket.take(1, now), bucket));
            match (taken, told) {
                (Some((false, bucket)), _) => return Verdict::of_default(false, Some(bucket)),
                (Some((true, bucket)), None) => return Verdict::of_default(true, Some(bucket)),
                (None, None) => return Verdict::of_default(true, None),
                (_, Some(_)) => {}
            }
        }
        match told {
            Some(one) => Verdict { shadow: shadowed.is_some(), ..Verdict::of(true, one) },
            None => Verdict::of_default(true, None),
        }
    }
}

impl Verdict {
    fn of(allowed: bool, one: &Matched) -> Self {
        Self { allowed, shadow: false, bucket: Some(one.bucket.clone()), headers: one.headers }
    }

    fn of_default(allowed: bool, bucket: Option<&Arc<TokenBucket>>) -> Self {
        Self { allowed, shadow: false, bucket: bucket.cloned(), headers: XRateLimitOption::Unspecified }
    }
}

#[cfg(test)]
mod tests;
