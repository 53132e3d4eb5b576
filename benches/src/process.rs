//! What the kernel tells about a process, and which core it may use.
//!
//! * CPU time: the first field of `/proc/PID/task/*/schedstat`, nanoseconds on the CPU (user and kernel),
//!   summed over the threads. `/proc/PID/stat` counts the same in ticks of 10 ms, which is too coarse for a
//!   round of some seconds. A thread that ended takes its time with it; no subject ends threads under load.
//! * Memory: `VmRSS` of `/proc/PID/status`.
//! * Pinning: a child inherits the affinity of the thread that forks it, so the harness moves itself to the
//!   proxy's core for the moment of the fork. Thus every thread that the proxy will ever start is bound,
//!   and no external `taskset` is needed.

use std::fs;

use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

use crate::error::{BenchError, Result};

/// The core of the client and the backend.
pub const HARNESS_CORE: usize = 0;
/// The core of the proxy.
pub const PROXY_CORE: usize = 1;

/// Nanoseconds that all threads of `pid` have spent on a CPU.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let dir = format!("/proc/{pid}/task");
    let tasks = fs::read_dir(&dir).map_err(BenchError::io(&dir))?;
    let mut sum = 0;
    for task in tasks.flatten() {
        // A thread may end between the listing and the reading.
        if let Ok(text) = fs::read_to_string(task.path().join("schedstat")) {
            sum += text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(sum)
}

/// Resident memory of `pid` in KiB.
pub fn rss_kib(pid: u32) -> Result<u64> {
    status(pid, "VmRSS:")
}

/// The part of it that is no file's: without the pages of the program, which come and go by themselves.
pub fn rss_anonymous_kib(pid: u32) -> Result<u64> {
    status(pid, "RssAnon:")
}

fn status(pid: u32, line: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).map_err(BenchError::io(&path))?;
    text.lines()
        .find_map(|text| text.strip_prefix(line))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| BenchError::Subject(format!("{path} has no {line} the process has ended")))
}

/// Binds the calling thread, and what it forks, to one core.
pub fn pin_self(core: usize) -> Result<()> {
    let refused =
        |e: nix::errno::Errno| BenchError::Io { what: format!("bind to core {core}"), source: e.into() };
    let mut set = CpuSet::new();
    set.set(core).map_err(refused)?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(refused)
}

/// Runs `fork` (which must spawn on this thread) so that the child is bound to the proxy's core.
pub fn on_proxy_core<T>(fork: impl FnOnce() -> T) -> Result<T> {
    pin_self(PROXY_CORE)?;
    let value = fork();
    pin_self(HARNESS_CORE)?;
    Ok(value)
}

/// Raises the soft limit of open files to the hard one; children inherit it.
pub fn raise_file_limit() -> Result<u64> {
    let refused = |e: nix::errno::Errno| BenchError::Io { what: "RLIMIT_NOFILE".into(), source: e.into() };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(refused)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(refused)?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_has_time_and_memory() {
        let pid = std::process::id();
        let before = cpu_ns(pid).unwrap();
        let mut n = 0u64;
        while cpu_ns(pid).unwrap() < before + 5_000_000 {
            n += 1;
        }
        assert!(n > 0);
        assert!(rss_kib(pid).unwrap() > 500);
        assert!(rss_kib(u32::MAX).is_err());
    }
}
