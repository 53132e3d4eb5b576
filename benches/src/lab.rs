//! What a run needs once: backends, identity, a scratch directory, ports.

use std::{
    cell::Cell,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
};

use tokio_rustls::TlsConnector;

use crate::{
    backend::{self, Backends},
    config::{Front, Setup, Upstream},
    error::{BenchError, Result},
    identity::Identity,
};

/// First port that is tried. Below the ephemeral range, so that no client connection sits on it.
const FIRST_PORT: u16 = 21_000;
const LAST_PORT: u16 = 31_000;

/// The surroundings of all measurements.
pub struct Lab {
    /// The upstreams.
    pub backends: Backends,
    /// A client for the TLS cases.
    pub tls: TlsConnector,
    identity: Identity,
    dir: PathBuf,
    next_port: Cell<u16>,
    keep: bool,
}

impl Lab {
    /// Starts the backends. `keep` leaves the scratch directory (configurations, logs, profiles) behind.
    pub async fn new(keep: bool) -> Result<Self> {
        let identity = Identity::generate()?;
        let tls = identity.connector()?;
        let id = std::process::id();
        let dir = std::env::temp_dir().join(format!("sampan-benches-{id}"));
        fs::create_dir_all(&dir).map_err(BenchError::io("scratch directory"))?;
        // Two runs side by side begin at different ports.
        let first = FIRST_PORT + u16::try_from(id % 100).unwrap_or(0) * 50;
        Ok(Self { backends: backend::start().await?, tls, identity, dir, next_port: Cell::new(first), keep })
    }

    /// The scratch directory.
    #[must_use]
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// A set-up with its own directory and ports.
    pub fn setup(&self, front: Front, upstream: Upstream) -> Result<Setup> {
        let (listen, admin) = (self.free_port()?, self.free_port()?);
        let dir = self.dir.join(listen.port().to_string());
        fs::create_dir_all(&dir).map_err(BenchError::io("scratch directory"))?;
        self.identity.write(&dir)?;
        let backend = match upstream {
            Upstream::Http1 => self.backends.http1,
            Upstream::Http2 => self.backends.http2,
            Upstream::Tcp => self.backends.tcp,
        };
        Ok(Setup { listen, admin, backend, front, upstream, dir })
    }

    fn free_port(&self) -> Result<SocketAddr> {
        for _ in FIRST_PORT..LAST_PORT {
            let port = self.next_port.get();
            self.next_port.set(if port + 1 < LAST_PORT { port + 1 } else { FIRST_PORT });
            let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            if TcpListener::bind(addr).is_ok() {
                return Ok(addr);
            }
        }
        Err(BenchError::Subject(format!("no free port from {FIRST_PORT} to {LAST_PORT}")))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
