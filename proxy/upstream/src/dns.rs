//! DNS on the control thread: one task per name.
//!
//! Names are asked of the system's resolvers; `/etc/hosts` and `localhost` are answered without them. A failure
//! leaves the hosts as they are and is tried again after `dns_failure_refresh_rate` (with a growing, jittered
//! back-off) or, where that is absent, after the refresh rate.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use hickory_resolver::net::NetError;
use sampan_core::Address;

use crate::cluster::Cluster;
use crate::config::{Discovery, DnsConfig, EndpointTarget, LookupFamily};
use crate::manager::Warming;

/// One resolver per lookup family, made when the first name needs it.
#[derive(Clone, Default)]
pub(crate) struct SharedResolver(Arc<[OnceLock<Option<TokioResolver>>; 5]>);

impl SharedResolver {
    fn get(&self, family: LookupFamily) -> Option<&TokioResolver> {
        self.0[family as usize].get_or_init(|| build(family)).as_ref()
    }

    /// The addresses of a name, each once, and how long they hold.
    pub(crate) async fn look_up(
        &self,
        family: LookupFamily,
        name: &str,
    ) -> Result<(Vec<IpAddr>, Duration), NetError> {
        let Some(resolver) = self.get(family) else {
            return Err(NetError::from("no system resolver configuration"));
        };
        let answer = resolver.lookup_ip(name).await?;
        let mut ips: Vec<IpAddr> = Vec::new();
        for ip in answer.iter() {
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
        Ok((ips, answer.valid_until().saturating_duration_since(Instant::now())))
    }
}

fn build(family: LookupFamily) -> Option<TokioResolver> {
    let mut builder = TokioResolver::builder_tokio().ok()?;
    let options = builder.options_mut();
    options.ip_strategy = match family {
        LookupFamily::Auto => LookupIpStrategy::Ipv6thenIpv4,
        LookupFamily::V4Only => LookupIpStrategy::Ipv4Only,
        LookupFamily::V6Only => LookupIpStrategy::Ipv6Only,
        LookupFamily::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
        LookupFamily::All => LookupIpStrategy::Ipv4AndIpv6,
    };
    // The refresh rate, not a cache, says when to ask again.
    options.cache_size = 0;
    builder.build().ok()
}

/// Starts the tasks of a cluster's names.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    config: &Arc<DnsConfig>,
    resolver: &SharedResolver,
    warming: &Warming,
) {
    for (l, locality) in cluster.config().load_assignment.localities.iter().enumerate() {
        for (e, endpoint) in locality.endpoints.iter().enumerate() {
            let EndpointTarget::Name(name, port) = &endpoint.target else { continue };
            let target = Target {
                cluster: Arc::downgrade(cluster),
                config: config.clone(),
                resolver: resolver.clone(),
                name: name.clone(),
                port: *port,
                at: (l, e),
            };
            let task = tokio::spawn(target.run(warming.clone()));
            cluster.own_task(task.abort_handle());
        }
    }
}

struct Target {
    cluster: std::sync::Weak<Cluster>,
    config: Arc<DnsConfig>,
    resolver: SharedResolver,
    name: Arc<str>,
    port: u16,
    at: (usize, usize),
}

impl Target {
    async fn run(self, warming: Warming) {
        let mut warming = Some(warming);
        let mut failures = 0;
        loop {
            let Some(cluster) = self.cluster.upgrade() else { return };
            cluster.stats().update_attempt.inc();
            drop(cluster);
            let answer = self.resolve().await;
            let Some(cluster) = self.cluster.upgrade() else { return };
            let wait = match answer {
                Ok((addresses, ttl)) => {
                    failures = 0;
                    self.apply(&cluster, addresses);
                    if self.config.respect_ttl {
                        ttl.max(self.config.min_refresh_rate)
                    } else {
                        self.config.refresh_rate
                    }
                }
                Err(_) => {
                    cluster.stats().update_failure.inc();
                    failures += 1;
                    self.back_off(failures)
                }
            };
            drop(cluster);
            drop(warming.take());
            sampan_core::time::sleep(wait + jitter(self.config.jitter)).await;
        }
    }

    fn apply(&self, cluster: &Cluster, addresses: Vec<Address>) {
        let stats = cluster.stats();
        stats.update_success.inc();
        let changed = match (&cluster.config().discovery, addresses.first()) {
            (Discovery::LogicalDns(_), Some(first)) => cluster.set_logical_address(first.clone()),
            // Without an address the logical host stays where it was.
            (Discovery::LogicalDns(_), None) => false,
            _ => cluster.set_resolved(self.at.0, self.at.1, addresses),
        };
        if !changed {
            stats.update_no_rebuild.inc();
        }
    }

    fn back_off(&self, failures: u32) -> Duration {
        self.config.failure_rate.map_or(self.config.refresh_rate, |rate| back_off(rate, failures))
    }

    /// The addresses and how long they hold.
    async fn resolve(&self) -> Result<(Vec<Address>, Duration), NetError> {
        if let Ok(ip) = self.name.parse::<IpAddr>() {
            return Ok((vec![Address::Ip(SocketAddr::new(ip, self.port))], self.config.refresh_rate));
        }
        match self.resolver.look_up(self.config.family, &self.name).await {
            Ok((ips, ttl)) => {
                let address = |ip| Address::Ip(SocketAddr::new(ip, self.port));
                Ok((ips.into_iter().map(address).collect(), ttl))
            }
            // "There is no such name" and "it has no address" are answers: the hosts go away.
            Err(e) if e.is_no_records_found() || e.is_nx_domain() => {
                Ok((Vec::new(), self.config.refresh_rate))
            }
            Err(e) => Err(e),
        }
    }
}

/// How long is waited after so many failures in a row.
pub(crate) fn back_off((base, max): (Duration, Duration), failures: u32) -> Duration {
    let ceiling = base.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(max);
    jitter(ceiling).max(Duration::from_millis(1))
}

fn jitter(up_to: Duration) -> Duration {
    up_to.mul_f64(rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn localhost(family: LookupFamily) -> Vec<IpAddr> {
        let target = Target {
            cluster: std::sync::Weak::new(),
            config: Arc::new(DnsConfig {
                refresh_rate: Duration::from_secs(5),
                failure_rate: None,
                respect_ttl: false,
                min_refresh_rate: Duration::from_secs(1),
                jitter: Duration::ZERO,
                family,
            }),
            resolver: SharedResolver::default(),
            name: "localhost".into(),
            port: 80,
            at: (0, 0),
        };
        let (addresses, _) = target.resolve().await.expect("localhost is always known");
        addresses.iter().map(|a| a.ip().expect("an IP")).collect()
    }

    /// As Envoy's c-ares answers, whatever /etc/hosts says.
    #[tokio::test]
    async fn localhost_needs_no_server() {
        let (v4, v6) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1u16]));
        assert_eq!(localhost(LookupFamily::V4Only).await, [v4]);
        assert_eq!(localhost(LookupFamily::V6Only).await, [v6]);
        assert_eq!(localhost(LookupFamily::Auto).await, [v6]);
        assert_eq!(localhost(LookupFamily::V4Preferred).await, [v4]);
    }
}
