//! Well-known header names.

use std::fmt;

/// The id of a well-known header name, or [`HeaderId::CUSTOM`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HeaderId(u16);

/// A header name in a configuration: an id, or the lower-case bytes of a name that has none.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum HeaderName {
    /// A well-known name.
    Known(HeaderId),
    /// Any other, in lower case.
    Custom(Box<[u8]>),
}

impl HeaderName {
    /// The name in any spelling; ASCII upper case is lowered.
    pub fn new(name: impl AsRef<[u8]>) -> Self {
        let lower = name.as_ref().to_ascii_lowercase();
        match HeaderId::from_lower(&lower) {
            HeaderId::CUSTOM => Self::Custom(lower.into_boxed_slice()),
            id => Self::Known(id),
        }
    }

    /// The id, or [`HeaderId::CUSTOM`].
    pub fn id(&self) -> HeaderId {
        match self {
            Self::Known(id) => *id,
            Self::Custom(_) => HeaderId::CUSTOM,
        }
    }

    /// The lower-case name.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Known(id) => id.name().as_bytes(),
            Self::Custom(name) => name,
        }
    }

    /// The lower-case name as text; a custom name that is not UTF-8 reads as empty.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl From<HeaderId> for HeaderName {
    fn from(id: HeaderId) -> Self {
        Self::Known(id)
    }
}

impl fmt::Debug for HeaderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_bytes().escape_ascii().to_string())
    }
}

impl fmt::Debug for HeaderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of well-known names ([`HeaderId::CUSTOM`] stands for all others).
#[derive(Clone, Copy, Default, Debug)]
pub struct HeaderSet([u64; HeaderId::COUNT.div_ceil(64)]);

impl HeaderSet {
    /// No name.
    pub const EMPTY: Self = Self([0; HeaderId::COUNT.div_ceil(64)]);

    /// These names.
    pub const fn of(ids: &[HeaderId]) -> Self {
        let mut set = Self::EMPTY;
        let mut i = 0;
        while i < ids.len() {
            let index = ids[i].0 as usize;
            set.0[index / 64] |= 1 << (index % 64);
            i += 1;
        }
        set
    }

    /// Adds a name; tells whether it is new.
    pub fn add(&mut self, id: HeaderId) -> bool {
        let (word, bit) = (&mut self.0[id.index() / 64], 1 << (id.index() % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Takes a name out.
    pub fn remove(&mut self, id: HeaderId) {
        self.0[id.index() / 64] &= !(1 << (id.index() % 64));
    }

    /// Whether a name is in the set.
    pub fn contains(&self, id: HeaderId) -> bool {
        self.0[id.index() / 64] & (1 << (id.index() % 64)) != 0
    }

    /// Whether the two have a name in common.
    pub fn meets(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).any(|(a, b)| a & b != 0)
    }
}

/// One line a name: the constant, the text, the text as bytes (a pattern cannot convert one). The pseudo headers come first: [`HeaderId::is_pseudo`] relies on it.
macro_rules! well_known {
    ($($index:literal $constant:ident $name:literal $bytes:literal;)*) => {
        impl HeaderId {
            /// A name without an id.
            pub const CUSTOM: Self = Self(0);
            $(#[doc = concat!("`", $name, "`")] pub const $constant: Self = Self($index);)*

            /// The id of a lower-case name.
            pub fn from_lower(name: &[u8]) -> Self {
                Self(Self::index_of(name))
            }

            fn index_of(name: &[u8]) -> u16 {
                match name { $($bytes => $index,)* _ => 0 }
            }
        }

        static NAMES: &[&str] = &["", $($name,)*];
        /// As HTTP/1 begins a header's line.
        static LINES: &[&str] = &["", $(concat!($name, ": "),)*];
    };
}

impl HeaderId {
    /// The lower-case name; empty for [`HeaderId::CUSTOM`].
    pub fn name(self) -> &'static str {
        NAMES[usize::from(self.0)]
    }

    /// The lower-case name, `: ` behind it: how HTTP/1 begins a header's line.
    pub fn line_start(self) -> &'static str {
        LINES[usize::from(self.0)]
    }

    /// A small number of its own, below [`HeaderId::COUNT`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// All ids, in the order of [`HeaderId::index`].
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(|i| Self(i as _))
    }

    /// How many ids there are, [`HeaderId::CUSTOM`] among them.
    pub const COUNT: usize = NAMES.len();

    /// Whether this is `:method`, `:path` and so on.
    pub fn is_pseudo(self) -> bool {
        self.0 >= 1 && self.0 <= Self::PSEUDO_PROTOCOL.0
    }
}

well_known! {
    1 METHOD ":method" b":method";
    2 PATH ":path" b":path";
    3 AUTHORITY ":authority" b":authority";
    4 SCHEME ":scheme" b":scheme";
    5 STATUS ":status" b":status";
    6 PSEUDO_PROTOCOL ":protocol" b":protocol";
    7 HOST "host" b"host";
    8 CONTENT_LENGTH "content-length" b"content-length";
    9 TRANSFER_ENCODING "transfer-encoding" b"transfer-encoding";
    10 CONNECTION "connection" b"connection";
    11 KEEP_ALIVE "keep-alive" b"keep-alive";
    12 PROXY_CONNECTION "proxy-connection" b"proxy-connection";
    13 TE "te" b"te";
    14 TRAILER "trailer" b"trailer";
    15 UPGRADE "upgrade" b"upgrade";
    16 HTTP2_SETTINGS "http2-settings" b"http2-settings";
    17 EXPECT "expect" b"expect";
    18 CONTENT_TYPE "content-type" b"content-type";
    19 CONTENT_ENCODING "content-encoding" b"content-encoding";
    20 ACCEPT "accept" b"accept";
    21 ACCEPT_ENCODING "accept-encoding" b"accept-encoding";
    22 ACCEPT_LANGUAGE "accept-language" b"accept-language";
    23 USER_AGENT "user-agent" b"user-agent";
    24 REFERER "referer" b"referer";
    25 ORIGIN "origin" b"origin";
    26 COOKIE "cookie" b"cookie";
    27 SET_COOKIE "set-cookie" b"set-cookie";
    28 AUTHORIZATION "authorization" b"authorization";
    29 PROXY_AUTHORIZATION "proxy-authorization" b"proxy-authorization";
    30 CACHE_CONTROL "cache-control" b"cache-control";
    31 DATE "date" b"date";
    32 SERVER "server" b"server";
    33 LOCATION "location" b"location";
    34 VIA "via" b"via";
    35 ETAG "etag" b"etag";
    36 LAST_MODIFIED "last-modified" b"last-modified";
    37 VARY "vary" b"vary";
    38 AGE "age" b"age";
    39 EXPIRES "expires" b"expires";
    40 RANGE "range" b"range";
    41 CONTENT_RANGE "content-range" b"content-range";
    42 IF_NONE_MATCH "if-none-match" b"if-none-match";
    43 IF_MODIFIED_SINCE "if-modified-since" b"if-modified-since";
    44 PRAGMA "pragma" b"pragma";
    45 ALLOW "allow" b"allow";
    46 X_FORWARDED_FOR "x-forwarded-for" b"x-forwarded-for";
    47 X_FORWARDED_PROTO "x-forwarded-proto" b"x-forwarded-proto";
    48 X_FORWARDED_HOST "x-forwarded-host" b"x-forwarded-host";
    49 X_FORWARDED_PORT "x-forwarded-port" b"x-forwarded-port";
    50 X_FORWARDED_CLIENT_CERT "x-forwarded-client-cert" b"x-forwarded-client-cert";
    51 FORWARDED "forwarded" b"forwarded";
    52 X_REQUEST_ID "x-request-id" b"x-request-id";
    53 X_REAL_IP "x-real-ip" b"x-real-ip";
    54 X_ENVOY_EXTERNAL_ADDRESS "x-envoy-external-address" b"x-envoy-external-address";
    55 X_ENVOY_INTERNAL "x-envoy-internal" b"x-envoy-internal";
    56 X_ENVOY_UPSTREAM_SERVICE_TIME "x-envoy-upstream-service-time" b"x-envoy-upstream-service-time";
    57 X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS "x-envoy-upstream-rq-timeout-ms" b"x-envoy-upstream-rq-timeout-ms";
    58 X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS "x-envoy-upstream-rq-per-try-timeout-ms" b"x-envoy-upstream-rq-per-try-timeout-ms";
    59 X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE "x-envoy-upstream-rq-timeout-alt-response" b"x-envoy-upstream-rq-timeout-alt-response";
    60 X_ENVOY_UPSTREAM_STREAM_DURATION_MS "x-envoy-upstream-stream-duration-ms" b"x-envoy-upstream-stream-duration-ms";
    61 X_ENVOY_EXPECTED_RQ_TIMEOUT_MS "x-envoy-expected-rq-timeout-ms" b"x-envoy-expected-rq-timeout-ms";
    62 X_ENVOY_MAX_RETRIES "x-envoy-max-retries" b"x-envoy-max-retries";
    63 X_ENVOY_RETRY_ON "x-envoy-retry-on" b"x-envoy-retry-on";
    64 X_ENVOY_RETRY_GRPC_ON "x-envoy-retry-grpc-on" b"x-envoy-retry-grpc-on";
    65 X_ENVOY_RETRIABLE_STATUS_CODES "x-envoy-retriable-status-codes" b"x-envoy-retriable-status-codes";
    66 X_ENVOY_RETRIABLE_HEADER_NAMES "x-envoy-retriable-header-names" b"x-envoy-retriable-header-names";
    67 X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT "x-envoy-hedge-on-per-try-timeout" b"x-envoy-hedge-on-per-try-timeout";
    68 X_ENVOY_ATTEMPT_COUNT "x-envoy-attempt-count" b"x-envoy-attempt-count";
    69 X_ENVOY_ORIGINAL_PATH "x-envoy-original-path" b"x-envoy-original-path";
    70 X_ENVOY_ORIGINAL_HOST "x-envoy-original-host" b"x-envoy-original-host";
    71 X_ENVOY_ORIGINAL_METHOD "x-envoy-original-method" b"x-envoy-original-method";
    72 X_ENVOY_ORIGINAL_DST_HOST "x-envoy-original-dst-host" b"x-envoy-original-dst-host";
    73 X_ENVOY_DECORATOR_OPERATION "x-envoy-decorator-operation" b"x-envoy-decorator-operation";
    74 X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER "x-envoy-downstream-service-cluster" b"x-envoy-downstream-service-cluster";
    75 X_ENVOY_DOWNSTREAM_SERVICE_NODE "x-envoy-downstream-service-node" b"x-envoy-downstream-service-node";
    76 X_ENVOY_UPSTREAM_ALT_STAT_NAME "x-envoy-upstream-alt-stat-name" b"x-envoy-upstream-alt-stat-name";
    77 X_ENVOY_UPSTREAM_CANARY "x-envoy-upstream-canary" b"x-envoy-upstream-canary";
    78 X_ENVOY_UPSTREAM_HEALTHCHECKED_CLUSTER "x-envoy-upstream-healthchecked-cluster" b"x-envoy-upstream-healthchecked-cluster";
    79 X_ENVOY_IMMEDIATE_HEALTH_CHECK_FAIL "x-envoy-immediate-health-check-fail" b"x-envoy-immediate-health-check-fail";
    80 X_ENVOY_OVERLOADED "x-envoy-overloaded" b"x-envoy-overloaded";
    81 X_ENVOY_DEGRADED "x-envoy-degraded" b"x-envoy-degraded";
    82 X_ENVOY_RATELIMITED "x-envoy-ratelimited" b"x-envoy-ratelimited";
    83 X_ENVOY_FORCE_TRACE "x-envoy-force-trace" b"x-envoy-force-trace";
    84 X_ENVOY_IP_TAGS "x-envoy-ip-tags" b"x-envoy-ip-tags";
    85 X_ENVOY_IS_TIMEOUT_RETRY "x-envoy-is-timeout-retry" b"x-envoy-is-timeout-retry";
    86 X_ENVOY_LOCAL_OVERLOADED "x-envoy-local-overloaded" b"x-envoy-local-overloaded";
    87 X_ENVOY_UPSTREAM_RQ_TIMEOUT "x-envoy-upstream-rq-timeout" b"x-envoy-upstream-rq-timeout";
    88 X_ENVOY_FAULT_DELAY_REQUEST "x-envoy-fault-delay-request" b"x-envoy-fault-delay-request";
    89 X_ENVOY_FAULT_ABORT_REQUEST "x-envoy-fault-abort-request" b"x-envoy-fault-abort-request";
    90 X_ENVOY_FAULT_ABORT_GRPC_REQUEST "x-envoy-fault-abort-grpc-request" b"x-envoy-fault-abort-grpc-request";
    91 X_ENVOY_FAULT_THROUGHPUT_RESPONSE "x-envoy-fault-throughput-response" b"x-envoy-fault-throughput-response";
    92 X_ENVOY_FAULT_DELAY_REQUEST_PERCENTAGE "x-envoy-fault-delay-request-percentage" b"x-envoy-fault-delay-request-percentage";
    93 X_ENVOY_FAULT_ABORT_REQUEST_PERCENTAGE "x-envoy-fault-abort-request-percentage" b"x-envoy-fault-abort-request-percentage";
    94 X_ENVOY_FAULT_THROUGHPUT_RESPONSE_PERCENTAGE "x-envoy-fault-throughput-response-percentage" b"x-envoy-fault-throughput-response-percentage";
    95 X_ENVOY_PEER_METADATA "x-envoy-peer-metadata" b"x-envoy-peer-metadata";
    96 X_ENVOY_PEER_METADATA_ID "x-envoy-peer-metadata-id" b"x-envoy-peer-metadata-id";
    97 X_CLIENT_TRACE_ID "x-client-trace-id" b"x-client-trace-id";
    98 X_RATELIMIT_LIMIT "x-ratelimit-limit" b"x-ratelimit-limit";
    99 X_RATELIMIT_REMAINING "x-ratelimit-remaining" b"x-ratelimit-remaining";
    100 X_RATELIMIT_RESET "x-ratelimit-reset" b"x-ratelimit-reset";
    101 GRPC_STATUS "grpc-status" b"grpc-status";
    102 GRPC_MESSAGE "grpc-message" b"grpc-message";
    103 GRPC_TIMEOUT "grpc-timeout" b"grpc-timeout";
    104 GRPC_ACCEPT_ENCODING "grpc-accept-encoding" b"grpc-accept-encoding";
    105 GRPC_ENCODING "grpc-encoding" b"grpc-encoding";
    106 GRPC_STATUS_DETAILS_BIN "grpc-status-details-bin" b"grpc-status-details-bin";
    107 ACCESS_CONTROL_REQUEST_HEADERS "access-control-request-headers" b"access-control-request-headers";
    108 ACCESS_CONTROL_REQUEST_METHOD "access-control-request-method" b"access-control-request-method";
    109 ACCESS_CONTROL_REQUEST_PRIVATE_NETWORK "access-control-request-private-network" b"access-control-request-private-network";
    110 ACCESS_CONTROL_ALLOW_ORIGIN "access-control-allow-origin" b"access-control-allow-origin";
    111 ACCESS_CONTROL_ALLOW_HEADERS "access-control-allow-headers" b"access-control-allow-headers";
    112 ACCESS_CONTROL_ALLOW_METHODS "access-control-allow-methods" b"access-control-allow-methods";
    113 ACCESS_CONTROL_ALLOW_PRIVATE_NETWORK "access-control-allow-private-network" b"access-control-allow-private-network";
    114 ACCESS_CONTROL_EXPOSE_HEADERS "access-control-expose-headers" b"access-control-expose-headers";
    115 ACCESS_CONTROL_MAX_AGE "access-control-max-age" b"access-control-max-age";
    116 ACCESS_CONTROL_ALLOW_CREDENTIALS "access-control-allow-credentials" b"access-control-allow-credentials";
    117 X_B3_TRACEID "x-b3-traceid" b"x-b3-traceid";
    118 X_B3_SPANID "x-b3-spanid" b"x-b3-spanid";
    119 X_B3_PARENTSPANID "x-b3-parentspanid" b"x-b3-parentspanid";
    120 X_B3_SAMPLED "x-b3-sampled" b"x-b3-sampled";
    121 X_B3_FLAGS "x-b3-flags" b"x-b3-flags";
    122 B3 "b3" b"b3";
    123 TRACEPARENT "traceparent" b"traceparent";
    124 TRACESTATE "tracestate" b"tracestate";
    125 X_OT_SPAN_CONTEXT "x-ot-span-context" b"x-ot-span-context";
    126 X_CLOUD_TRACE_CONTEXT "x-cloud-trace-context" b"x-cloud-trace-context";
    127 STRICT_TRANSPORT_SECURITY "strict-transport-security" b"strict-transport-security";
    128 CONTENT_SECURITY_POLICY "content-security-policy" b"content-security-policy";
    129 X_CONTENT_TYPE_OPTIONS "x-content-type-options" b"x-content-type-options";
    130 X_FRAME_OPTIONS "x-frame-options" b"x-frame-options";
    131 ACCEPT_RANGES "accept-ranges" b"accept-ranges";
    132 RETRY_AFTER "retry-after" b"retry-after";
    133 WWW_AUTHENTICATE "www-authenticate" b"www-authenticate";
    134 SEC_WEBSOCKET_KEY "sec-websocket-key" b"sec-websocket-key";
    135 SEC_WEBSOCKET_ACCEPT "sec-websocket-accept" b"sec-websocket-accept";
    136 SEC_WEBSOCKET_VERSION "sec-websocket-version" b"sec-websocket-version";
    137 SEC_FETCH_MODE "sec-fetch-mode" b"sec-fetch-mode";
    138 SEC_FETCH_SITE "sec-fetch-site" b"sec-fetch-site";
    139 SEC_FETCH_DEST "sec-fetch-dest" b"sec-fetch-dest";
    140 DNT "dnt" b"dnt";
    141 IF_MATCH "if-match" b"if-match";
    142 IF_RANGE "if-range" b"if-range";
    143 IF_UNMODIFIED_SINCE "if-unmodified-since" b"if-unmodified-since";
    144 MAX_FORWARDS "max-forwards" b"max-forwards";
    145 FROM "from" b"from";
    146 CONTENT_DISPOSITION "content-disposition" b"content-disposition";
    147 CONTENT_LANGUAGE "content-language" b"content-language";
    148 CONTENT_LOCATION "content-location" b"content-location";
    149 X_ENVOY_ORIGINAL_URL "x-envoy-original-url" b"x-envoy-original-url";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_finds_its_id() {
        for (index, name) in NAMES.iter().enumerate().skip(1) {
            let id = HeaderId::from_lower(name.as_bytes());
            assert_eq!(usize::from(id.0), index);
            assert_eq!(id.is_pseudo(), name.starts_with(':'));
        }
        assert_eq!(HeaderId::from_lower(b"x-unknown"), HeaderId::CUSTOM);
    }
}
