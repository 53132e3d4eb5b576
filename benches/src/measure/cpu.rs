//! CPU time per request.
//!
//! All subjects of a case run at the same time, each with its open connections, all bound to the proxy's core;
//! only the one whose turn it is gets load. In each round every subject does the same count of exchanges; the
//! kernel's count of nanoseconds on the CPU is read before and after. The order turns by one place per round,
//! so that nobody is always first. The figure is the median over the rounds; the ratio is the median of the
//! round-by-round ratios to Envoy, which cancels what changes slowly on the machine (clock, neighbours).
//!
//! Time includes the kernel's work that is charged to the proxy (system calls, and the loopback receive path of
//! its own sends). With one client core the proxy is not always saturated, as in real life.

use crate::{
    case::Case,
    error::{BenchError, Result},
    lab::Lab,
    load::Load,
    measure::{NATIVE_LIMIT, begin, median},
    process::cpu_ns,
    report::Value,
    subject::{Kind, Running, Subject},
};

struct Contender {
    kind: Kind,
    running: Running,
    load: Load,
    /// µs per exchange, by round.
    rounds: Vec<f64>,
}

/// Measures one case with all subjects.
pub async fn measure(
    lab: &Lab,
    subjects: &[&Subject],
    case: &Case,
    rounds: usize,
    requests: usize,
) -> Vec<(Kind, Result<Value>)> {
    let mut results = Vec::new();
    let mut contenders = Vec::new();
    for subject in subjects {
        match begin(lab, subject, case, &[], NATIVE_LIMIT).await {
            Ok((running, load)) => {
                contenders.push(Contender { kind: subject.kind, running, load, rounds: Vec::new() });
            }
            Err(error) => results.push((subject.kind, Err(error))),
        }
    }
    for round in 0..rounds {
        let mut failed = Vec::new();
        for turn in 0..contenders.len() {
            let index = (turn + round) % contenders.len();
            if failed.iter().any(|(i, _)| *i == index) {
                continue;
            }
            if let Err(error) = one_round(&mut contenders[index], requests).await {
                failed.push((index, error));
            }
        }
        failed.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
        for (index, error) in failed {
            let mut out = contenders.remove(index);
            results.push((out.kind, Err(out.running.blame(error))));
        }
    }
    let envoy = contenders.iter().find(|c| c.kind == Kind::Envoy).map(|c| c.rounds.clone());
    for contender in contenders {
        let value =
            median(&contender.rounds).ok_or_else(|| BenchError::Usage("no rounds".into())).map(|value| {
                Value {
                    value,
                    ratio: envoy.as_ref().and_then(|envoy| ratio(&contender.rounds, envoy)),
                    detail: serde_json::json!({ "rounds": contender.rounds }),
                }
            });
        results.push((contender.kind, value));
    }
    results
}

async fn one_round(contender: &mut Contender, requests: usize) -> Result<()> {
    let before = cpu_ns(contender.running.pid())?;
    contender.load.run(requests).await?;
    let spent = cpu_ns(contender.running.pid())?.saturating_sub(before);
    contender.rounds.push(spent as f64 / 1000.0 / requests as f64);
    Ok(())
}

fn ratio(own: &[f64], envoy: &[f64]) -> Option<f64> {
    let ratios: Vec<f64> = own.iter().zip(envoy).map(|(own, envoy)| own / envoy).collect();
    median(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        // A machine that turns three times slower in the second round must not show.
        assert_eq!(ratio(&[20.0, 60.0, 20.0], &[100.0, 300.0, 100.0]), Some(0.2));
    }
}
