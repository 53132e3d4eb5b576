//! Resident memory: idle, per kept connection, and after all connections are gone.
//!
//! One subject at a time, HTTP/1. After the start and a second of rest: idle. Then some hundred requests over 16
//! connections, so that what is allocated at first use (upstream connections, routes, counters) is there, and
//! these connections are closed: the base. Then connections are opened, at most 16 requests at a time so that
//! the upstream pool stays small; each makes one request of 1 KiB and stays open. The figure per connection is
//! (RSS - base) / connections, with 2,000 and with 5,000. Then all are closed, and after a rest in which
//! allocators may give pages back (jemalloc's decay is ten seconds) the rest is read. Socket buffers are the
//! kernel's and not in RSS.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    config::{Front, Upstream},
    error::Result,
    lab::Lab,
    load::{Http1Connection, Request, open_some},
    measure::NATIVE_LIMIT,
    process::rss_kib,
    subject::{Running, Subject},
};

const AT_A_TIME: usize = 16;
const SETTLE: Duration = Duration::from_secs(1);

/// The figures of one subject.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// MiB after the start.
    pub idle: f64,
    /// KiB per connection with 2,000 open.
    pub per_connection_2000: f64,
    /// KiB per connection with 5,000 open.
    pub per_connection_5000: f64,
    /// MiB after all were closed.
    pub closed: f64,
}

/// Measures one subject; `rest` is the time between the close of the last connection and the last reading.
pub async fn measure(lab: &Lab, subject: &Subject, rest: Duration) -> Result<Memory> {
    let setup = lab.setup(Front::Http1, Upstream::Http1)?;
    let mut running = subject.spawn(&setup, &[])?;
    running.wait_ready(NATIVE_LIMIT)?;
    match figures(&running, rest).await {
        Ok(memory) => Ok(memory),
        Err(error) => Err(running.blame(error)),
    }
}

async fn figures(running: &Running, rest: Duration) -> Result<Memory> {
    let pid = running.pid();
    sleep(SETTLE).await;
    let idle = rss_kib(pid)?;
    let mut warm = grow(running, Vec::new(), AT_A_TIME).await?;
    for _ in 0..50 {
        for connection in &mut warm {
            connection.exchange().await?;
        }
    }
    drop(warm);
    sleep(SETTLE).await;
    let base = rss_kib(pid)?;
    let per = |rss: u64, n: usize| (rss as f64 - base as f64) / n as f64;

    let some = grow(running, Vec::new(), 2000).await?;
    sleep(SETTLE).await;
    let per_connection_2000 = per(rss_kib(pid)?, some.len());
    let all = grow(running, some, 5000).await?;
    sleep(SETTLE).await;
    let per_connection_5000 = per(rss_kib(pid)?, all.len());
    drop(all);
    sleep(rest).await;
    let closed = rss_kib(pid)? as f64 / 1024.0;
    Ok(Memory { idle: idle as f64 / 1024.0, per_connection_2000, per_connection_5000, closed })
}

/// Opens more connections until there are `n`; each has made one request.
async fn grow(running: &Running, mut open: Vec<Http1Connection>, n: usize) -> Result<Vec<Http1Connection>> {
    let request = Request::get(1024);
    while open.len() < n {
        let mut more = open_some(running.listen(), None, &request, AT_A_TIME.min(n - open.len())).await?;
        more.iter_mut().for_each(Http1Connection::rest);
        open.append(&mut more);
    }
    Ok(open)
}
