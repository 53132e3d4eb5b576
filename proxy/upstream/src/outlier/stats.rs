//! `cluster.NAME.outlier_detection.*`

use sampan_core::stats::{Counter, Gauge, Scope};

use super::Ejection;

macro_rules! outlier_stats {
    ($($counter:ident)*) => {
        /// The field is Envoy's stat of that name.
        #[allow(dead_code, reason = "what is not detected here is shown too")]
        pub(crate) struct OutlierStats {
            $(pub(super) $counter: Counter,)*
            pub(super) ejections_active: Gauge,
        }

        impl OutlierStats {
            /// The stats in the cluster's scope.
            pub(crate) fn new(cluster: &Scope) -> Self {
                let scope = cluster.scope("outlier_detection");
                Self {
                    $($counter: scope.counter(stringify!($counter)),)*
                    ejections_active: scope.gauge("ejections_active"),
                }
            }
        }
    };
}

outlier_stats! {
    ejections_consecutive_5xx ejections_detected_degradation
    ejections_detected_consecutive_5xx ejections_enforced_consecutive_5xx
    ejections_detected_consecutive_gateway_failure ejections_enforced_consecutive_gateway_failure
    ejections_detected_consecutive_local_origin_failure ejections_enforced_consecutive_local_origin_failure
    ejections_detected_success_rate ejections_enforced_success_rate
    ejections_detected_local_origin_success_rate ejections_enforced_local_origin_success_rate
    ejections_detected_failure_percentage ejections_enforced_failure_percentage
    ejections_detected_local_origin_failure_percentage ejections_enforced_local_origin_failure_percentage
    ejections_enforced_total ejections_overflow ejections_success_rate ejections_total
}

impl OutlierStats {
    pub(super) fn detected(&self, why: Ejection) {
        let counter = match why {
            Ejection::Consecutive5xx => {
                self.ejections_consecutive_5xx.inc();
                &self.ejections_detected_consecutive_5xx
            }
            Ejection::ConsecutiveGatewayFailure => &self.ejections_detected_consecutive_gateway_failure,
            Ejection::ConsecutiveLocalOriginFailure => {
                &self.ejections_detected_consecutive_local_origin_failure
            }
            Ejection::SuccessRate => &self.ejections_detected_success_rate,
            Ejection::LocalOriginSuccessRate => &self.ejections_detected_local_origin_success_rate,
            Ejection::FailurePercentage => &self.ejections_detected_failure_percentage,
            Ejection::LocalOriginFailurePercentage => {
                &self.ejections_detected_local_origin_failure_percentage
            }
        };
        counter.inc();
    }

    pub(super) fn enforced(&self, why: Ejection) {
        self.ejections_enforced_total.inc();
        let counter = match why {
            Ejection::Consecutive5xx => &self.ejections_enforced_consecutive_5xx,
            Ejection::ConsecutiveGatewayFailure => &self.ejections_enforced_consecutive_gateway_failure,
            Ejection::ConsecutiveLocalOriginFailure => {
                &self.ejections_enforced_consecutive_local_origin_failure
            }
            Ejection::SuccessRate => &self.ejections_enforced_success_rate,
            Ejection::LocalOriginSuccessRate => &self.ejections_enforced_local_origin_success_rate,
            Ejection::FailurePercentage => &self.ejections_enforced_failure_percentage,
            Ejection::LocalOriginFailurePercentage => {
                &self.ejections_enforced_local_origin_failure_percentage
            }
        };
        counter.inc();
    }
}
