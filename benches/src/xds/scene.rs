//! A proxy with its control plane, a client and two backends that say who they are.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use xds_client::{Variant, types};

use super::{
    resources::{self, Named},
    server::ControlPlane,
};
use crate::{
    config::{Front, Upstream},
    error::{BenchError, Result},
    lab::Lab,
    subject::{Running, Subject},
};

/// A started set-up.
pub struct Scene {
    /// The control plane.
    pub plane: ControlPlane,
    /// The proxy.
    pub running: Running,
    /// How long an answer may take.
    pub limit: Duration,
    backends: [Backend; 2],
    admin: SocketAddr,
}

/// An HTTP/1 server on all of loopback that answers with nothing.
#[derive(Clone)]
pub struct Backend {
    /// Its port.
    pub port: u16,
    first: Arc<Mutex<Option<Instant>>>,
}

impl Scene {
    /// Starts all of it and waits until the proxy serves. `services` have clusters and endpoints, the first `routed` of
    /// them a virtual host.
    pub async fn start(
        lab: &Lab,
        subject: &Subject,
        variant: Variant,
        (services, routed): (usize, usize),
        wrapper: &[String],
    ) -> Result<Self> {
        let routes = |listen| [resources::routes(routed, |i| i), resources::listener(listen)].to_vec();
        Self::with(lab, subject, variant, services, routes, wrapper).await
    }

    /// The same with `tables` route tables, in a scope each.
    pub async fn scoped(lab: &Lab, subject: &Subject, variant: Variant, tables: usize) -> Result<Self> {
        let routes = |listen| {
            let scopes = (0..tables).flat_map(resources::scope);
            scopes.chain([resources::scoped_listener(listen)]).collect()
        };
        Self::with(lab, subject, variant, 1, routes, &[]).await
    }

    async fn with(
        lab: &Lab,
        subject: &Subject,
        variant: Variant,
        services: usize,
        routes: impl FnOnce(SocketAddr) -> Vec<Named>,
        wrapper: &[String],
    ) -> Result<Self> {
        let backends = [Backend::start().await?, Backend::start().await?];
        let port = backends[0].port;
        let mut all: Vec<Named> = (0..services).map(resources::cluster).collect();
        all.extend((0..services).map(|i| resources::endpoints(i, port)));
        let mut setup = lab.setup(Front::Http1, Upstream::Http1)?;
        all.extend(routes(setup.listen));
        let plane = ControlPlane::start(all).await?;
        setup.front = Front::Xds { control_plane: plane.at, delta: variant == Variant::Delta };
        let limit = Duration::from_secs(if wrapper.is_empty() { 60 } else { 600 });
        let running = subject.spawn(&setup, wrapper)?;
        let mut scene = Self { plane, running, limit, backends, admin: setup.admin };
        let begun = Instant::now();
        while !scene.running.is_ready()? {
            if begun.elapsed() > limit {
                return Err(BenchError::Subject(format!("not ready after {limit:?}")));
            }
            sleep(Duration::from_millis(20)).await;
        }
        for kind in [types::CLUSTER, types::ENDPOINTS, types::LISTENER, types::ROUTES] {
            scene.plane.answered(kind, limit).await?;
        }
        Ok(scene)
    }

    /// The first is where everything goes at first.
    pub fn backend(&self, which: usize) -> &Backend {
        &self.backends[which % 2]
    }

    /// A client with an open connection.
    pub async fn client(&self) -> Result<Client> {
        let stream =
            TcpStream::connect(self.running.listen()).await.map_err(BenchError::io("client connection"))?;
        stream.set_nodelay(true).map_err(BenchError::io("client connection"))?;
        Ok(Client { stream, limit: self.limit })
    }

    /// The sum of all counters whose name ends so.
    pub async fn counted(&self, ending: &str) -> Result<u64> {
        let broken = || BenchError::io("admin");
        let mut stream = TcpStream::connect(self.admin).await.map_err(broken())?;
        let request =
            format!("GET /stats?filter={ending}$ HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.map_err(broken())?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.map_err(broken())?;
        Ok(text
            .lines()
            .filter_map(|l| l.split_once(&format!("{ending}: "))?.1.trim().parse::<u64>().ok())
            .sum())
    }
}

/// One connection to the proxy.
pub struct Client {
    stream: TcpStream,
    limit: Duration,
}

impl Client {
    /// One request, answered with 200 and no body.
    pub async fn ask(&mut self, host: &str) -> Result<()> {
        let broken = || BenchError::io("exchange");
        let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n");
        self.stream.write_all(request.as_bytes()).await.map_err(broken())?;
        let (mut buf, mut filled) = ([0; 4096], 0);
        let answer = async {
            while !buf[..filled].ends_with(b"\r\n\r\n") {
                match self.stream.read(&mut buf[filled..]).await.map_err(broken())? {
                    0 => return Err(BenchError::protocol("connection closed before the answer")),
                    n => filled += n,
                }
            }
            if buf.starts_with(b"HTTP/1.1 200 ") {
                return Ok(());
            }
            Err(BenchError::protocol(String::from_utf8_lossy(&buf[..filled]).into_owned()))
        };
        timeout(self.limit, answer).await.map_err(|_| BenchError::protocol("no answer"))?
    }
}

impl Backend {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0").await.map_err(BenchError::io("backend"))?;
        let port = listener.local_addr().map_err(BenchError::io("backend"))?.port();
        let first = Arc::new(Mutex::new(None));
        let this = Self { port, first: first.clone() };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(serve(stream, first.clone()));
            }
        });
        Ok(this)
    }

    /// When the first request came since the last call.
    pub fn take_first(&self) -> Option<Instant> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Requests have no bodies and come one after the other, each in one read.
async fn serve(mut stream: TcpStream, first: Arc<Mutex<Option<Instant>>>) {
    let mut buf = [0; 4096];
    while let Ok(1..) = stream.read(&mut buf).await {
        first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
        if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
            return;
        }
    }
}
