//! Start time, and memory with a large configuration.
//!
//! From before the fork until the admin interface answers `/ready` with 200 (Envoy, Sampan) or the listener
//! accepts (HAProxy, nginx, which have no such interface), looked at every 0.2 ms. The subjects take turns; the
//! figure is the median. Memory is read a second after the last of the starts was ready, without any request.

use std::{thread, time::Duration};

use crate::{
    config::{Front, Upstream},
    error::{BenchError, Result},
    lab::Lab,
    measure::{NATIVE_LIMIT, median},
    process::rss_kib,
    report::Value,
    subject::{Kind, Subject},
};

/// Start time in ms and resident memory in MiB.
pub type Start = (Value, Value);

/// Starts each subject `times` times with this front.
pub fn measure(lab: &Lab, subjects: &[&Subject], front: Front, times: usize) -> Vec<(Kind, Result<Start>)> {
    let mut seen: Vec<Result<(Vec<f64>, f64)>> = subjects.iter().map(|_| Ok((Vec::new(), 0.0))).collect();
    for turn in 0..times {
        for (subject, seen) in subjects.iter().zip(&mut seen) {
            let Ok((times_ms, memory)) = seen else { continue };
            match once(lab, subject, front, turn + 1 == times) {
                Ok((ms, rss)) => {
                    times_ms.push(ms);
                    *memory = rss;
                }
                Err(error) => *seen = Err(error),
            }
        }
    }
    let value = |value, detail| Value { value, ratio: None, detail };
    let figures = |(times_ms, memory): (Vec<f64>, f64)| {
        let middle = median(&times_ms).ok_or_else(|| BenchError::Usage("no starts".into()))?;
        let detail = serde_json::json!({ "starts": times_ms });
        Ok((value(middle, detail), value(memory, serde_json::Value::Null)))
    };
    subjects.iter().zip(seen).map(|(subject, seen)| (subject.kind, seen.and_then(figures))).collect()
}

fn once(lab: &Lab, subject: &Subject, front: Front, with_memory: bool) -> Result<(f64, f64)> {
    let setup = lab.setup(front, Upstream::Http1)?;
    let mut running = subject.spawn(&setup, &[])?;
    let elapsed = running.wait_ready(NATIVE_LIMIT)?;
    let mut rss = 0.0;
    if with_memory {
        thread::sleep(Duration::from_secs(1));
        rss = rss_kib(running.pid())? as f64 / 1024.0;
    }
    Ok((elapsed.as_secs_f64() * 1000.0, rss))
}
