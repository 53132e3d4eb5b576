//! The load generator: a fixed number of exchanges over persistent connections, counted exactly.
//!
//! A [`Load`] is opened once per subject and case and then run as often as wanted. Opening makes the
//! connections and sends a few exchanges over each, so that connection set-up, pools and first-use
//! allocations are paid before anything is counted. [`Load::run`] does `n` exchanges, not about `n`: figures
//! are a difference divided by a count, so the count must be true. Every answer is checked (status and
//! length); one wrong answer fails the run, since a proxy that answers errors is cheap.

mod http1;
mod http2;
mod tcp;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

pub use self::http1::{Http1Connection, Request};
use crate::error::{BenchError, Result};

/// What a case does over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// `GET /b/N` over kept connections.
    Http1 {
        /// Size of the answer.
        size: usize,
    },
    /// `POST` with a body of this size, answered with 1 KiB.
    Http1Post {
        /// Size of the request body.
        size: usize,
    },
    /// `GET /b/N` over HTTP/2 with prior knowledge.
    Http2 {
        /// Size of the answer.
        size: usize,
    },
    /// `GET /b/N` in HTTP/1 over kept TLS connections.
    TlsKept {
        /// Size of the answer.
        size: usize,
    },
    /// A new TLS connection without resumption and one `GET` of 1 KiB.
    TlsHandshake,
    /// A MiB from the backend to the client.
    TcpBulk,
    /// A new TCP connection, eight bytes there, 64 back, closed by the client.
    TcpConnection,
}

/// HTTP/1 and TLS: connections at a time. HTTP/2: 8 connections of 8 streams. Both as in the reference runs.
const CONNECTIONS: usize = 64;
const HTTP2_CONNECTIONS: usize = 8;
const HTTP2_STREAMS: usize = 8;
/// New connections that are under way at a time, and bulk connections.
const HANDSHAKES: usize = 16;
const BULK_CONNECTIONS: usize = 4;

/// Anything that an exchange can run over.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// An open set of connections with a workload.
pub struct Load {
    addr: SocketAddr,
    limit: Duration,
    kind: Kind,
}

enum Kind {
    Http1(Vec<Http1Connection>),
    Http2(Vec<http2::Http2Connection>),
    Handshake(TlsConnector),
    Bulk(Vec<TcpStream>),
    Connection,
}

impl Load {
    /// Opens the connections to the proxy at `addr` and warms them up. No single run may last longer than `limit`.
    pub async fn open(
        workload: Workload,
        addr: SocketAddr,
        tls: &TlsConnector,
        limit: Duration,
    ) -> Result<Self> {
        let kind = match workload {
            Workload::Http1 { size } => Kind::Http1(open_http1(addr, None, &Request::get(size)).await?),
            Workload::Http1Post { size } => {
                Kind::Http1(open_http1(addr, None, &Request::post(size, 1024)).await?)
            }
            Workload::TlsKept { size } => {
                Kind::Http1(open_http1(addr, Some(tls), &Request::get(size)).await?)
            }
            Workload::Http2 { size } => {
                let mut all = Vec::new();
                for _ in 0..HTTP2_CONNECTIONS {
                    all.push(http2::Http2Connection::open(addr, size).await?);
                }
                Kind::Http2(all)
            }
            Workload::TlsHandshake => Kind::Handshake(tls.clone()),
            Workload::TcpBulk => {
                let mut all = Vec::new();
                for _ in 0..BULK_CONNECTIONS {
                    all.push(connect(addr).await?);
                }
                Kind::Bulk(all)
            }
            Workload::TcpConnection => Kind::Connection,
        };
        let mut load = Self { addr, limit, kind };
        let warm_up = load.width() * 3;
        load.run(warm_up).await?;
        Ok(load)
    }

    /// How many exchanges are under way at a time.
    fn width(&self) -> usize {
        match &self.kind {
            Kind::Http1(all) => all.len(),
            Kind::Http2(all) => all.len() * HTTP2_STREAMS,
            Kind::Handshake(_) | Kind::Connection => HANDSHAKES,
            Kind::Bulk(all) => all.len(),
        }
    }

    /// Does exactly `n` exchanges and waits for the last.
    pub async fn run(&mut self, n: usize) -> Result<()> {
        let limit = self.limit;
        timeout(limit, self.run_unlimited(n))
            .await
            .map_err(|_| BenchError::protocol(format!("{n} exchanges took longer than {limit:?}")))?
    }

    async fn run_unlimited(&mut self, n: usize) -> Result<()> {
        let shares = shares(n, self.width());
        let addr = self.addr;
        match &mut self.kind {
            Kind::Http1(all) => {
                let connections = std::mem::take(all);
                *all = in_parallel(connections.into_iter().zip(shares).map(
                    |(mut connection, share)| async move {
                        for _ in 0..share {
                            connection.exchange().await?;
                        }
                        Ok(connection)
                    },
                ))
                .await?;
            }
            Kind::Http2(all) => {
                let streams = all.iter().flat_map(|c| std::iter::repeat_n(c.clone(), HTTP2_STREAMS));
                in_parallel(streams.zip(shares).map(|(mut connection, share)| async move {
                    for _ in 0..share {
                        connection.exchange().await?;
                    }
                    Ok(())
                }))
                .await?;
            }
            Kind::Handshake(tls) => {
                in_parallel(shares.into_iter().map(|share| {
                    let tls = tls.clone();
                    async move {
                        let request = Request::get(1024).closing();
                        for _ in 0..share {
                            let io = connect_tls(addr, &tls).await?;
                            Http1Connection::new(io, request.clone()).exchange().await?;
                        }
                        Ok(())
                    }
                }))
                .await?;
            }
            Kind::Bulk(all) => {
                let connections = std::mem::take(all);
                *all = in_parallel(connections.into_iter().zip(shares).map(
                    |(mut connection, share)| async move {
                        tcp::fetch(&mut connection, share as u64 * 1024 * 1024).await?;
                        Ok(connection)
                    },
                ))
                .await?;
            }
            Kind::Connection => {
                in_parallel(shares.into_iter().map(|share| async move {
                    for _ in 0..share {
                        tcp::once(addr).await?;
                    }
                    Ok(())
                }))
                .await?;
            }
        }
        Ok(())
    }
}

/// `n` cut into `parts` that sum to `n` and differ by at most one.
fn shares(n: usize, parts: usize) -> Vec<usize> {
    (0..parts).map(|i| n / parts + usize::from(i < n % parts)).collect()
}

/// Runs all, and gives their values in order or the first error.
async fn in_parallel<T, F>(futures: impl Iterator<Item = F>) -> Result<Vec<T>>
where
    F: Future<Output = Result<T>> + Send + 'static,
    T: Send + 'static,
{
    // A dropped JoinSet aborts what is left, so that a failed run leaves no client behind.
    let mut tasks = tokio::task::JoinSet::new();
    for (index, future) in futures.enumerate() {
        tasks.spawn(async move { future.await.map(|value| (index, value)) });
    }
    let mut values = Vec::with_capacity(tasks.len());
    while let Some(joined) = tasks.join_next().await {
        values.push(joined.map_err(|e| BenchError::protocol(e.to_string()))??);
    }
    values.sort_by_key(|(index, _)| *index);
    Ok(values.into_iter().map(|(_, value)| value).collect())
}

/// Opens connections and makes one exchange on each; at most [`HANDSHAKES`] at a time.
async fn open_http1(
    addr: SocketAddr,
    tls: Option<&TlsConnector>,
    request: &Request,
) -> Result<Vec<Http1Connection>> {
    let mut all = Vec::new();
    while all.len() < CONNECTIONS {
        all.extend(open_some(addr, tls, request, HANDSHAKES.min(CONNECTIONS - all.len())).await?);
    }
    Ok(all)
}

/// Opens `n` connections at the same time and makes one exchange on each.
pub async fn open_some(
    addr: SocketAddr,
    tls: Option<&TlsConnector>,
    request: &Request,
    n: usize,
) -> Result<Vec<Http1Connection>> {
    let opening = std::iter::repeat_with(|| {
        let (tls, request) = (tls.cloned(), request.clone());
        async move {
            let io: Box<dyn Io> = match tls {
                None => Box::new(connect(addr).await?),
                Some(tls) => connect_tls(addr, &tls).await?,
            };
            let mut connection = Http1Connection::new(io, request);
            connection.exchange().await?;
            Ok(connection)
        }
    });
    in_parallel(opening.take(n)).await
}

async fn connect(addr: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(addr).await.map_err(BenchError::io(format!("connect to {addr}")))?;
    stream.set_nodelay(true).map_err(BenchError::io("TCP_NODELAY"))?;
    Ok(stream)
}

async fn connect_tls(addr: SocketAddr, tls: &TlsConnector) -> Result<Box<dyn Io>> {
    let name = rustls::pki_types::ServerName::try_from(crate::identity::SERVER_NAME)
        .map_err(|e| BenchError::protocol(e.to_string()))?;
    let stream = connect(addr).await?;
    let stream = tls.connect(name, stream).await.map_err(BenchError::io("TLS handshake"))?;
    Ok(Box::new(stream))
}

/// Shared bytes of a request.
type Baked = Arc<[u8]>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_sum_up() {
        for (n, parts) in [(0, 3), (1, 64), (64, 64), (1000, 64), (7, 2)] {
            let all = shares(n, parts);
            assert_eq!(all.len(), parts);
            assert_eq!(all.iter().sum::<usize>(), n);
            assert!(all.iter().max().unwrap() - all.iter().min().unwrap() <= 1);
        }
    }

    /// Every workload without TLS works straight against the backend, so what fails later is the proxy's.
    #[tokio::test]
    async fn workloads_run_against_the_backend() {
        let backends = crate::backend::start().await.unwrap();
        let tls = crate::identity::Identity::generate().unwrap().connector().unwrap();
        for (workload, addr) in [
            (Workload::Http1 { size: 1024 }, backends.http1),
            (Workload::Http1 { size: 100 * 1024 }, backends.http1),
            (Workload::Http1Post { size: 40 * 1024 }, backends.http1),
            (Workload::Http2 { size: 10 * 1024 }, backends.http2),
            (Workload::TcpBulk, backends.tcp),
            (Workload::TcpConnection, backends.tcp),
        ] {
            let mut load = Load::open(workload, addr, &tls, Duration::from_secs(10)).await.unwrap();
            load.run(130).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_wrong_answer_fails_the_run() {
        let backends = crate::backend::start().await.unwrap();
        let tls = crate::identity::Identity::generate().unwrap().connector().unwrap();
        // HTTP/1 spoken to the HTTP/2 listener.
        let wrong = Workload::Http1 { size: 1024 };
        assert!(Load::open(wrong, backends.http2, &tls, Duration::from_secs(10)).await.is_err());
    }
}
