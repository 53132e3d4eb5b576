//! Side-by-side measurements of Sampan, Envoy, HAProxy and nginx in one run.
//!
//! The proxy has one worker and is bound to core 1; this program, which is both client and backend, is bound to
//! core 0. Absolute times are the machine's; what counts are the ratios to Envoy in the same run, and the counts
//! of instructions and system calls, which hardly depend on the machine.
//!
//! | Figure | Taken by | Told in |
//! |---|---|---|
//! | CPU time per exchange | nanoseconds on the CPU from `/proc`, interleaved rounds, medians | [`measure::cpu`] |
//! | user instructions per exchange | callgrind, two counts differenced | [`measure::callgrind`] |
//! | system calls per exchange | strace, two counts differenced | [`measure::strace`] |
//! | memory idle, per connection, after closing | `VmRSS` | [`measure::memory`] |
//! | start until ready | `/ready` or an accepting listener | [`measure::start`] |
//! | costs of a control plane | all of the above and the wall clock | [`xds`] |
//!
//! A measurement goes this way: [`args`] → [`run`] → [`case`] (what traffic, what target) → [`config`] (the
//! set-up in each subject's language) → [`subject`] (start, probe, stop) → [`load`] and [`backend`] (exactly so
//! many exchanges, each checked) → [`measure`] → [`report`].
//!
//! A full run takes about half an hour, most of it under valgrind; `--quick --only cpu` a quarter of a minute.
//! Needs two cores; valgrind (with `vgdb`) and strace for the two counts. What is not there is named in the report.

#![allow(clippy::disallowed_methods, reason = "for the threads of the proxy's workers")]

pub mod args;
pub mod backend;
pub mod case;
pub mod config;
pub mod error;
pub mod identity;
pub mod lab;
pub mod load;
pub mod measure;
pub mod process;
pub mod report;
pub mod run;
pub mod subject;
pub mod xds;
