//! One module per kind of figure. Each takes subjects and gives numbers; the report knows what they mean.

pub mod callgrind;
pub mod cpu;
pub mod memory;
pub mod start;
pub mod strace;

use std::time::Duration;

use crate::{
    case::Case,
    error::Result,
    lab::Lab,
    load::Load,
    subject::{Running, Subject},
};

/// How long a native proxy may take to start, and how long one run of a load may last.
pub const NATIVE_LIMIT: Duration = Duration::from_secs(60);

/// Starts a subject for a case and opens the load.
async fn begin(
    lab: &Lab,
    subject: &Subject,
    case: &Case,
    wrapper: &[String],
    limit: Duration,
) -> Result<(Running, Load)> {
    let setup = lab.setup(case.front, case.upstream)?;
    let mut running = subject.spawn(&setup, wrapper)?;
    running.wait_ready(limit)?;
    match Load::open(case.workload, running.listen(), &lab.tls, limit).await {
        Ok(load) => Ok((running, load)),
        Err(error) => Err(running.blame(error)),
    }
}

/// The middle value; the mean of the two middle ones for an even count. `None` of nothing.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }
}
