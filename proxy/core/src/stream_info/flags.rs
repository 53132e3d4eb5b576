//! Response flags: why a response is not simply the upstream's.

use std::fmt;

macro_rules! flags {
    ($($bit:literal $variant:ident $short:literal $long:literal;)*) => {
        /// One response flag, Envoy's `CoreResponseFlag`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum ResponseFlag { $(#[doc = concat!("`", $short, "`: ", $long)] $variant = $bit,)* }

        const TABLE: &[(ResponseFlag, &str, &str)] = &[$((ResponseFlag::$variant, $short, $long),)*];
    };
}

flags! {
    0 FailedLocalHealthCheck "LH" "FailedLocalHealthCheck";
    1 NoHealthyUpstream "UH" "NoHealthyUpstream";
    2 UpstreamRequestTimeout "UT" "UpstreamRequestTimeout";
    3 LocalReset "LR" "LocalReset";
    4 UpstreamRemoteReset "UR" "UpstreamRemoteReset";
    5 UpstreamConnectionFailure "UF" "UpstreamConnectionFailure";
    6 UpstreamConnectionTermination "UC" "UpstreamConnectionTermination";
    7 UpstreamOverflow "UO" "UpstreamOverflow";
    8 NoRouteFound "NR" "NoRouteFound";
    9 DelayInjected "DI" "DelayInjected";
    10 FaultInjected "FI" "FaultInjected";
    11 RateLimited "RL" "RateLimited";
    12 UnauthorizedExternalService "UAEX" "UnauthorizedExternalService";
    13 RateLimitServiceError "RLSE" "RateLimitServiceError";
    14 DownstreamConnectionTermination "DC" "DownstreamConnectionTermination";
    15 UpstreamRetryLimitExceeded "URX" "UpstreamRetryLimitExceeded";
    16 StreamIdleTimeout "SI" "StreamIdleTimeout";
    17 InvalidEnvoyRequestHeaders "IH" "InvalidEnvoyRequestHeaders";
    18 DownstreamProtocolError "DPE" "DownstreamProtocolError";
    19 UpstreamMaxStreamDurationReached "UMSDR" "UpstreamMaxStreamDurationReached";
    20 ResponseFromCacheFilter "RFCF" "ResponseFromCacheFilter";
    21 NoFilterConfigFound "NFCF" "NoFilterConfigFound";
    22 DurationTimeout "DT" "DurationTimeout";
    23 UpstreamProtocolError "UPE" "UpstreamProtocolError";
    24 NoClusterFound "NC" "NoClusterFound";
    25 OverloadManager "OM" "OverloadManagerTerminated";
    26 DnsResolutionFailed "DF" "DnsResolutionFailed";
    27 DropOverload "DO" "DropOverload";
    28 DownstreamRemoteReset "DR" "DownstreamRemoteReset";
    29 UnconditionalDropOverload "UDO" "UnconditionalDropOverload";
}

/// A set of response flags that knows in which order they were set: so Envoy prints them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags {
    bits: u64,
    order: [u8; TABLE.len()],
}

impl ResponseFlags {
    /// Adds a flag.
    pub fn set(&mut self, flag: ResponseFlag) {
        if !self.has(flag) {
            self.order[self.bits.count_ones() as usize] = flag as u8;
            self.bits |= 1 << flag as u8;
        }
    }

    /// The flags as bits by their numbers.
    pub fn legacy_bits(self) -> i64 {
        self.bits as i64
    }

    /// Whether a flag is there.
    pub fn has(self, flag: ResponseFlag) -> bool {
        self.bits & (1 << flag as u8) != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.bits == 0
    }

    /// Whether any of the other set's flags is there.
    pub fn intersects(self, other: Self) -> bool {
        self.bits & other.bits != 0
    }

    /// The table's rows of the flags, in the order in which these were set.
    fn rows(self) -> impl Iterator<Item = &'static (ResponseFlag, &'static str, &'static str)> {
        let count = self.bits.count_ones() as usize;
        self.order.into_iter().take(count).map(|flag| &TABLE[usize::from(flag)])
    }

    /// `%RESPONSE_FLAGS_LONG%`: the long names joined by `,`; empty where there is none.
    pub fn long(self) -> impl Iterator<Item = &'static str> {
        self.rows().map(|(_, _, long)| *long)
    }

    /// The short names.
    pub fn short(self) -> impl Iterator<Item = &'static str> {
        self.rows().map(|(_, short, _)| *short)
    }
}

impl ResponseFlag {
    /// The flag of a short name (`UF`), as access log filters name it.
    pub fn from_short(name: &str) -> Option<Self> {
        TABLE.iter().find(|(_, short, _)| *short == name).map(|(flag, ..)| *flag)
    }
}

impl From<ResponseFlag> for ResponseFlags {
    fn from(flag: ResponseFlag) -> Self {
        let mut flags = Self::default();
        flags.set(flag);
        flags
    }
}

impl fmt::Display for ResponseFlags {
    /// `%RESPONSE_FLAGS%`: short names joined by `,`, `-` where there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (i, name) in self.short().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_envoy() {
        let mut flags = ResponseFlags::default();
        assert_eq!(flags.to_string(), "-");
        flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
        flags.set(ResponseFlag::UpstreamConnectionFailure);
        assert_eq!(flags.to_string(), "URX,UF");
        assert!(flags.has(ResponseFlag::from_short("URX").unwrap()));
    }
}
