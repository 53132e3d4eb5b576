//! An attempt that brought no response: what it counts, and what it means to the client.

use std::borrow::Cow;
use std::sync::Arc;

use sampan_codec::{BodyError, ResetReason};
use sampan_core::header::{HeaderId, HeaderName};
use sampan_core::stream_info::ResponseFlag;
use sampan_upstream::{ConnectFailure, PoolError};

use super::{End, Forward, codes};
use crate::filter::LocalReply;

/// Why an attempt brought no response.
#[derive(Debug)]
pub(super) enum Failure {
    Overflow,
    /// There is no host, for this reason if the cluster gives one; that is never tried again.
    NoHost(Option<Arc<str>>),
    Connect(ConnectFailure),
    /// The upstream reset the stream before it did anything.
    Refused,
    /// The stream ended; whether anything of the request may have been processed.
    Reset {
        reason: ResetReason,
        sent: bool,
    },
    Protocol,
    PerTryTimeout,
    PerTryIdleTimeout,
    Timeout,
    /// The client's side failed.
    Downstream(BodyError),
}

impl Failure {
    pub(super) fn of_pool(error: PoolError) -> Self {
        match error {
            PoolError::Overflow | PoolError::OtherProtocol => Self::Overflow,
            PoolError::Connect(failure) => Self::Connect(failure),
        }
    }

    pub(super) fn request_sent(&self) -> bool {
        !matches!(
            self,
            Self::Overflow
                | Self::NoHost(_)
                | Self::Connect(_)
                | Self::Refused
                | Self::Reset { sent: false, .. }
        )
    }

    /// What an attempt that ended so counts as, where another goes on.
    pub(super) fn status(&self) -> u16 {
        if matches!(self, Self::Protocol) { 502 } else { 503 }
    }

    /// Envoy's word for it.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Overflow => "overflow",
            Self::Connect(failure) => failure.reset_reason(),
            Self::Refused => ResetReason::RemoteRefused.as_str(),
            Self::Reset { reason, .. } => reason.as_str(),
            _ => "protocol_error",
        }
    }

    /// What a client reads of it.
    pub(super) fn body(&self, retried: bool) -> String {
        let retried = if retried { "retried and the latest " } else { "" };
        let reason = self.reason().replace('_', " ");
        format!("upstream connect error or disconnect/reset before headers. {retried}reset reason: {reason}")
    }
}

impl Forward<'_> {
    /// Counts a timeout where it happens, whatever becomes of the request.
    pub(super) fn charge_failed(&self, failure: &Failure) {
        let stats = self.cluster.stats();
        match failure {
            Failure::Timeout => {
                stats.upstream_rq_timeout.inc();
                self.counters.inc(|counters| &counters.timeout);
            }
            Failure::PerTryTimeout => stats.upstream_rq_per_try_timeout.inc(),
            Failure::PerTryIdleTimeout => stats.upstream_rq_per_try_idle_timeout.inc(),
            _ => return,
        }
        if let Some(host) = &self.host {
            host.host.stats.rq_timeout.inc();
        }
    }

    /// What a failure means to the client.
    pub(super) fn fail(&mut self, failure: Failure) -> End {
        if let Failure::Downstream(error) = failure {
            let reply = LocalReply::to_broken_body(&error, &mut self.stream.info);
            return reply.map_or(End::Reset, End::from);
        }
        if self.config.dynamic_stats
            && !matches!(failure, Failure::Overflow | Failure::NoHost(_))
            && let Some(host) = &self.host
        {
            host.host.stats.rq_error.inc();
        }
        let info = &mut self.stream.info;
        let (flag, transport) = match &failure {
            Failure::NoHost(details) => return self.no_healthy_upstream(details.as_deref()),
            Failure::Timeout => {
                return self.timed_out("response_timeout");
            }
            Failure::PerTryTimeout => {
                return self.timed_out("upstream_per_try_timeout");
            }
            Failure::PerTryIdleTimeout => {
                return self.timed_out("upstream_per_try_idle_timeout");
            }
            Failure::Overflow => (ResponseFlag::UpstreamOverflow, None),
            Failure::Connect(failure) => (
                ResponseFlag::UpstreamConnectionFailure,
                Some(failure.reason.clone()).filter(|r| !r.is_empty()),
            ),
            Failure::Refused => (ResponseFlag::UpstreamRemoteReset, None),
            Failure::Reset { reason, .. } => (reset_flag(*reason), None),
            Failure::Protocol => (ResponseFlag::UpstreamProtocolError, None),
            Failure::Downstream(_) => return End::Reset,
        };
        info.flags.set(flag);
        let status = failure.status();
        let mut details = failure.reason().to_owned();
        let body = failure.body(info.attempts > 1);
        if let Some(transport) = transport {
            details = format!("{details}|{transport}");
            info.upstream_mut().transport_failure = Some(transport);
        }
        let when = if self.informed { "after" } else { "before" };
        let details = format!("upstream_reset_{when}_response_started{{{}}}", details.replace(' ', "_"));
        let overloaded = matches!(failure, Failure::Overflow) && !self.config.suppress_envoy_headers;
        // Where an informational head has been the answer has begun, and is charged no more.
        if !self.informed {
            self.charge_local(status);
        }
        if matches!(failure, Failure::Overflow) && self.config.dynamic_stats {
            self.cluster.cluster().dropped().inc();
        }
        let mut reply = LocalReply::new(status, details).body(body);
        if overloaded {
            reply = reply.header(HeaderId::X_ENVOY_OVERLOADED, "true");
        }
        reply.into()
    }

    /// The answer to a request that the cluster's `drop_overloads` chose to drop.
    pub(super) fn drop_overload(&self) -> Option<LocalReply> {
        let share = self.cluster.cluster().drop_share();
        if share == 0.0 {
            return None;
        }
        let (details, body, flag, header) = if share == 1.0 {
            (
                "unconditional_drop_overload",
                "unconditional drop overload",
                ResponseFlag::UnconditionalDropOverload,
                "x-envoy-unconditional-drop-overload",
            )
        } else if (self.stream.worker.random() as f64) < f64::from(share) * u64::MAX as f64 {
            ("drop_overload", "drop overload", ResponseFlag::DropOverload, "x-envoy-drop-overload")
        } else {
            return None;
        };
        self.charge_local(503);
        self.cluster.cluster().count_overload_drop();
        let reply = LocalReply::new(503, details).body(body).flag(flag);
        let quiet = self.config.suppress_envoy_headers;
        Some(if quiet { reply } else { reply.header(HeaderName::new(header), "true") })
    }

    fn no_healthy_upstream(&mut self, details: Option<&str>) -> End {
        self.charge_local(503);
        let details = details.map_or(Cow::Borrowed("no_healthy_upstream"), |d| d.to_owned().into());
        LocalReply::new(503, details).body("no healthy upstream").flag(ResponseFlag::NoHealthyUpstream).into()
    }

    fn timed_out(&mut self, details: &'static str) -> End {
        let status = self.timeouts.status();
        self.charge_local(status);
        let reply = LocalReply::new(status, details).flag(ResponseFlag::UpstreamRequestTimeout);
        if status == 204 { reply.into() } else { reply.body("upstream request timeout").into() }
    }

    /// A local reply in the upstream's place counts as its code.
    pub(super) fn charge_local(&self, status: u16) {
        if self.config.dynamic_stats {
            codes::charge(
                self.cluster.cluster(),
                status,
                codes::Kind { internal: self.internal, canary: false },
            );
            self.counters.charge(status);
        }
    }
}

pub(super) fn reset(reason: ResetReason, sent: bool) -> Failure {
    match reason {
        ResetReason::RemoteRefused => Failure::Refused,
        ResetReason::ProtocolError => Failure::Protocol,
        reason => Failure::Reset { reason, sent },
    }
}

fn reset_flag(reason: ResetReason) -> ResponseFlag {
    match reason {
        ResetReason::LocalReset => ResponseFlag::LocalReset,
        ResetReason::RemoteReset | ResetReason::RemoteRefused => ResponseFlag::UpstreamRemoteReset,
        ResetReason::ConnectionFailure => ResponseFlag::UpstreamConnectionFailure,
        ResetReason::ConnectionTermination => ResponseFlag::UpstreamConnectionTermination,
        ResetReason::Overflow => ResponseFlag::UpstreamOverflow,
        ResetReason::ProtocolError => ResponseFlag::UpstreamProtocolError,
    }
}
