//! `cluster_manager.outlier_detection.event_log_path`: a line of JSON for each ejection and each return.
//!
//! The lines are Envoy's: `envoy.data.cluster.v3.OutlierDetectionEvent` with its primitive fields always printed, so
//! that a return has a type and is not enforced. A fault that `enforcing_*` let pass is logged too.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use sampan_core::access_log::LogFile;
use sampan_core::format::write_json_string;

use super::monitor::State;
use super::{Ejection, SuccessRates};
use crate::cluster::Cluster;
use crate::host::Host;

/// The log; clusters share it.
pub struct EventLog(Arc<LogFile>);

/// What is told of an ejection besides the host.
pub(super) struct Ejected {
    pub(super) why: Ejection,
    pub(super) enforced: bool,
    /// The host's own, in per cent.
    pub(super) rate: f64,
    pub(super) rates: SuccessRates,
}

impl EventLog {
    /// A log in this file.
    pub fn new(file: Arc<LogFile>) -> Self {
        Self(file)
    }

    pub(super) fn ejected(&self, cluster: &Cluster, host: &Host, state: &State, ejected: &Ejected) {
        // Envoy writes whole numbers; what is not known is below zero.
        let (rate, rates) = (ejected.rate as u32, ejected.rates);
        let event = match ejected.why {
            Ejection::SuccessRate | Ejection::LocalOriginSuccessRate => format!(
                "\"eject_success_rate_event\":{{\"host_success_rate\":{rate},\"cluster_average_success_rate\":{},\
                 \"cluster_success_rate_ejection_threshold\":{}}}",
                rates.average as u32, rates.threshold as u32
            ),
            Ejection::FailurePercentage | Ejection::LocalOriginFailurePercentage => {
                format!("\"eject_failure_percentage_event\":{{\"host_success_rate\":{rate}}}")
            }
            _ => "\"eject_consecutive_event\":{}".to_owned(),
        };
        let rest = format!("\"enforced\":{},{event}", ejected.enforced);
        self.line(cluster, host, (name(ejected.why), "EJECT"), (state.returned, state.ejections), &rest);
    }

    pub(super) fn returned(&self, cluster: &Cluster, host: &Host, state: &State) {
        let last = (state.ejected, state.ejections);
        self.line(cluster, host, ("CONSECUTIVE_5XX", "UNEJECT"), last, "\"enforced\":false");
    }

    fn line(
        &self,
        cluster: &Cluster,
        host: &Host,
        (kind, action): (&str, &str),
        (last, ejections): (Option<Instant>, u32),
        rest: &str,
    ) {
        // Envoy's clock has milliseconds here, and protobuf prints none where there are none.
        let now = jiff::Timestamp::now();
        let digits = if now.subsec_millisecond() == 0 { 0 } else { 3 };
        let now = format!("{now:.digits$}");
        let since = last.map(|at| format!("\"secs_since_last_action\":\"{}\",", at.elapsed().as_secs()));
        let since = since.unwrap_or_default();
        let text = |text: &str| {
            let mut out = Vec::new();
            write_json_string(text, &mut out);
            String::from_utf8_lossy(&out).into_owned()
        };
        let (name, url) = (text(cluster.name()), text(&host.address().to_string()));
        self.0.write_with(|out| {
            // A buffer in memory takes everything.
            let _ = writeln!(
                out,
                "{{\"type\":\"{kind}\",\"timestamp\":\"{now}\",{since}\"cluster_name\":{name},\
                 \"upstream_url\":{url},\"action\":\"{action}\",\"num_ejections\":{ejections},{rest}}}"
            );
        });
    }
}

fn name(why: Ejection) -> &'static str {
    match why {
        Ejection::Consecutive5xx => "CONSECUTIVE_5XX",
        Ejection::ConsecutiveGatewayFailure => "CONSECUTIVE_GATEWAY_FAILURE",
        Ejection::ConsecutiveLocalOriginFailure => "CONSECUTIVE_LOCAL_ORIGIN_FAILURE",
        Ejection::SuccessRate => "SUCCESS_RATE",
        Ejection::LocalOriginSuccessRate => "SUCCESS_RATE_LOCAL_ORIGIN",
        Ejection::FailurePercentage => "FAILURE_PERCENTAGE",
        Ejection::LocalOriginFailurePercentage => "FAILURE_PERCENTAGE_LOCAL_ORIGIN",
    }
}
