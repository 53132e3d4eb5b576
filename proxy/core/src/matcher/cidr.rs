//! Sets of CIDR ranges.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3 as pb;
use envoy_types::pb::xds::core::v3 as xds;
use ipnet::IpNet;

use crate::error::{AtField, ConfigError, ConfigResult};

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CidrRange(IpNet);

impl CidrRange {
    /// From the message; a missing length is 0, one that is too long is the longest, bits behind it are dropped.
    pub fn from_proto(message: &pb::CidrRange) -> ConfigResult<Self> {
        Self::new(&message.address_prefix, message.prefix_len.as_ref().map_or(0, |l| l.value))
    }

    /// From an address and a length.
    pub fn new(address: &str, length: u32) -> ConfigResult<Self> {
        let ip: IpAddr = address
            .parse()
            .map_err(|_| ConfigError::new(format!("malformed IP address: {address}")).at("address_prefix"))?;
        let longest: u8 = if ip.is_ipv4() { 32 } else { 128 };
        let length = u8::try_from(length).unwrap_or(longest).min(longest);
        let net = IpNet::new(ip, length).map_err(|e| ConfigError::new(e.to_string()).at("prefix_len"))?;
        Ok(Self(net.trunc()))
    }

    /// Whether the address lies in the range. An IPv4 range does not take IPv4-mapped IPv6 addresses.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }

    /// The range's network.
    pub fn net(&self) -> IpNet {
        self.0
    }
}

/// Several ranges, by family sorted and merged: looking one up is a binary search.
#[derive(Debug, Clone, Default)]
pub struct CidrSet {
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
    invert: bool,
}

impl CidrSet {
    /// A set of ranges.
    pub fn new(ranges: impl IntoIterator<Item = CidrRange>) -> Self {
        let mut set = Self::default();
        for CidrRange(net) in ranges {
            match net {
                IpNet::V4(n) => set.v4.push((n.network().into(), n.broadcast().into())),
                IpNet::V6(n) => set.v6.push((n.network().into(), n.broadcast().into())),
            }
        }
        merge(&mut set.v4);
        merge(&mut set.v6);
        set
    }

    /// From a repeated field.
    pub fn from_proto(ranges: &[pb::CidrRange]) -> ConfigResult<Self> {
        let parse = |(i, r)| CidrRange::from_proto(r).map_err(|e| e.index(i));
        Ok(Self::new(ranges.iter().enumerate().map(parse).collect::<ConfigResult<Vec<_>>>()?))
    }

    /// From `xds.core.v3.CidrRange`s, as an `AddressMatcher` holds them.
    pub fn from_xds(ranges: &[xds::CidrRange], invert: bool) -> ConfigResult<Self> {
        let length = |r: &xds::CidrRange| r.prefix_len.as_ref().map_or(0, |l| l.value);
        let parse = |(i, r): (usize, &xds::CidrRange)| {
            CidrRange::new(&r.address_prefix, length(r)).at_index("ranges", i)
        };
        let ranges = ranges.iter().enumerate().map(parse).collect::<ConfigResult<Vec<_>>>()?;
        Ok(Self { invert, ..Self::new(ranges) })
    }

    /// Whether no range was given.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// Whether the address lies in one of the ranges (or in none, where inverted).
    pub fn contains(&self, ip: IpAddr) -> bool {
        let hit = match ip {
            IpAddr::V4(ip) => holds(&self.v4, ip.into()),
            IpAddr::V6(ip) => holds(&self.v6, ip.into()),
        };
        hit != self.invert
    }
}

fn merge<T: Ord + Copy>(ranges: &mut Vec<(T, T)>) {
    ranges.sort_unstable();
    // Ranges of CIDRs nest or are apart: one that begins inside the kept one ends inside it.
    ranges.dedup_by(|next, kept| {
        next.0 <= kept.1 && {
            kept.1 = kept.1.max(next.1);
            true
        }
    });
}

fn holds<T: Ord + Copy>(ranges: &[(T, T)], ip: T) -> bool {
    let at = ranges.partition_point(|(first, _)| *first <= ip);
    at > 0 && ip <= ranges[at - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_and_separate_ranges() {
        let ranges =
            [("10.0.0.0", 8), ("10.1.0.0", 16), ("192.168.1.7", 24), ("::1", 128), ("2001:db8::", 32)];
        let set = CidrSet::new(ranges.map(|(a, l)| CidrRange::new(a, l).unwrap()));
        for (ip, expected) in [
            ("10.200.0.1", true),
            ("10.1.0.1", true),
            ("192.168.1.255", true),
            ("192.168.2.0", false),
            ("11.0.0.0", false),
            ("9.255.255.255", false),
            ("::1", true),
            ("::2", false),
            ("2001:db8:ffff::1", true),
            ("::ffff:10.0.0.1", false),
        ] {
            assert_eq!(set.contains(ip.parse().unwrap()), expected, "{ip}");
        }
    }

    #[test]
    fn a_length_that_is_missing_takes_all() {
        assert!(CidrRange::new("1.2.3.4", 0).unwrap().contains("9.9.9.9".parse().unwrap()));
        assert!(CidrRange::new("1.2.3.4", 99).unwrap().contains("1.2.3.4".parse().unwrap()));
        assert!(CidrRange::new("1.2.3", 8).is_err());
    }
}
