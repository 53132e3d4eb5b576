//! Who speaks, how grave it is, and from which level on it is written.

use std::sync::atomic::{AtomicU8, Ordering};

/// How grave a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Every step.
    Trace,
    /// For who looks for an error.
    Debug,
    /// Milestones.
    Info,
    /// Something to look at.
    Warn,
    /// Something failed.
    Error,
    /// The process cannot go on.
    Critical,
    /// Nothing is logged.
    Off,
}

/// The levels in order, as Envoy prints them.
pub const LEVELS: [Level; 7] =
    [Level::Trace, Level::Debug, Level::Info, Level::Warn, Level::Error, Level::Critical, Level::Off];

impl Level {
    /// The name that Envoy prints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Off => "off",
        }
    }

    /// From a name; `warn` is taken for `warning`.
    pub fn parse(name: &str) -> Option<Self> {
        if name == "warn" {
            return Some(Self::Warn);
        }
        LEVELS.into_iter().find(|l| l.name() == name)
    }
}

macro_rules! components {
    ($($variant:ident $name:literal,)*) => {
        /// Which part of the proxy speaks. Envoy's loggers, in its order; some stand for parts that Sampan does
        /// not have (yet) so that tools which set their level do not fail.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Component { $($variant,)* }

        impl Component {
            /// All components.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Envoy's name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

components! {
    A2a "a2a", Admin "admin", AiProtocolManager "ai_protocol_manager",
    AlternateProtocolsCache "alternate_protocols_cache", Aws "aws", Assert "assert", Backtrace "backtrace",
    BasicAuth "basic_auth", CacheFilter "cache_filter", Client "client", Config "config",
    Connection "connection", ConnHandler "conn_handler", Compression "compression",
    CredentialInjector "credential_injector", Decompression "decompression", Dns "dns", Dubbo "dubbo",
    EnvoyBug "envoy_bug", ExtAuthz "ext_authz", ExtProc "ext_proc", Rocketmq "rocketmq", File "file",
    Filter "filter", ForwardProxy "forward_proxy", Geolocation "geolocation", Grpc "grpc",
    HappyEyeballs "happy_eyeballs", Hc "hc", HealthChecker "health_checker", Http "http", Http2 "http2",
    Hystrix "hystrix", Init "init", Io "io", Jwt "jwt", JsonRpc "json_rpc", Kafka "kafka",
    KeyValueStore "key_value_store", Lua "lua", LocalRateLimit "local_rate_limit", Main "main",
    Matcher "matcher", Mcp "mcp", Misc "misc", Mongo "mongo", MultiConnection "multi_connection",
    Notification "notification", Oauth2 "oauth2", Quic "quic", QuicStream "quic_stream", Pool "pool",
    RateLimitQuota "rate_limit_quota", Rbac "rbac", Rds "rds", Redis "redis", Router "router",
    Runtime "runtime", Stats "stats", Secret "secret", Sse "sse", Tap "tap", Testing "testing",
    Thrift "thrift", Tracing "tracing", Upstream "upstream", Udp "udp", Wasm "wasm", Websocket "websocket",
    Golang "golang", StatsSinks "stats_sinks", DynamicModules "dynamic_modules", IpTagging "ip_tagging",
}

const COUNT: usize = Component::ALL.len();

static LEVEL: [AtomicU8; COUNT] = [const { AtomicU8::new(Level::Info as u8) }; COUNT];

/// The level that applies to a component.
pub fn level(component: Component) -> Level {
    LEVELS[usize::from(LEVEL[component as usize].load(Ordering::Relaxed)) % LEVELS.len()]
}

/// Whether a line would be written.
#[inline]
pub fn enabled(component: Component, level: Level) -> bool {
    level as u8 >= LEVEL[component as usize].load(Ordering::Relaxed)
}

/// Sets one component's level.
pub fn set_level(component: Component, level: Level) {
    LEVEL[component as usize].store(level as u8, Ordering::Relaxed);
}

/// Sets every component's level (`-l`).
pub fn set_all(level: Level) {
    Component::ALL.iter().for_each(|c| set_level(*c, level));
}

/// Why levels could not be set.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum LevelError {
    /// No such level.
    #[error("unknown logger level")]
    Level,
    /// No such component.
    #[error("unknown logger name")]
    Component,
    /// `name` or `:level` is missing.
    #[error("empty logger name or empty logger level")]
    Empty,
}

/// Sets levels given as `upstream:debug,http:trace`; all or none.
pub fn set_levels(pairs: &str) -> Result<(), LevelError> {
    let mut changes = Vec::new();
    for pair in pairs.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (name, level) = pair.split_once(':').unwrap_or((pair, ""));
        if name.is_empty() || level.is_empty() {
            return Err(LevelError::Empty);
        }
        changes.push((name, Level::parse(level).ok_or(LevelError::Level)?));
    }
    let mut found = Vec::new();
    for (name, level) in changes {
        let component = Component::ALL.iter().find(|c| c.name() == name).ok_or(LevelError::Component)?;
        found.push((*component, level));
    }
    found.into_iter().for_each(|(component, level)| set_level(component, level));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_set_all_or_none() {
        assert_eq!(set_levels("sse:debug,nosuch:debug"), Err(LevelError::Component));
        assert_eq!(set_levels("sse:x"), Err(LevelError::Level));
        assert_eq!(set_levels("sse"), Err(LevelError::Empty));
        assert!(!enabled(Component::Sse, Level::Debug));
        set_levels("sse:debug,tap:off").unwrap();
        assert!(enabled(Component::Sse, Level::Debug) && !enabled(Component::Tap, Level::Critical));
        assert_eq!((level(Component::Sse), level(Component::Tap)), (Level::Debug, Level::Off));
    }
}
