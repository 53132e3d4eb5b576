//! The workloads of the mesh and the load on it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use crate::error::{Context, Result};
use crate::http1::{Body, Head};
use crate::net::{Stream, Wire};

/// Serves HTTP/1 at an address; each answer is `body`.
pub async fn workload(address: &str, body: &'static str) -> Result<()> {
    let listener = TcpListener::bind(address).await.trying(format!("listen at {address}"))?;
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut wire = Wire::new(Stream::Tcp(stream));
                while let Some(head) = Head::read(&mut wire).await {
                    Body::of_request(&mut wire, &head).await;
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    wire.send(answer.as_bytes()).await;
                }
            });
        }
    });
    Ok(())
}

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where requests go.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The address that is connected to.
    pub to: &'static str,
    /// The local address.
    pub source: &'static str,
    /// The authority.
    pub host: &'static str,
    /// The path.
    pub path: &'static str,
}

/// How often each answer came: the body for 200, otherwise the status, or what went wrong.
pub type Tally = BTreeMap<String, usize>;

/// One request on a connection of its own.
pub async fn ask(target: &Target) -> String {
    let mut wire = None;
    request(target, &mut wire).await
}

/// One request on the connection that is there, or a new one, which is left behind unless it was closed.
async fn request(target: &Target, kept: &mut Option<Wire>) -> String {
    let mut wire = match kept.take() {
        Some(wire) => wire,
        None => match timeout(PATIENCE, Stream::connect(target.to, Some(target.source))).await {
            Ok(Ok(stream)) => Wire::new(stream),
            Ok(Err(error)) => return format!("connect: {:?}", error.kind()),
            Err(_) => return "connect: no answer".into(),
        },
    };
    let head = format!("GET {} HTTP/1.1\r\nhost: {}\r\n\r\n", target.path, target.host);
    wire.send(head.as_bytes()).await;
    let answer = async {
        let head = Head::read(&mut wire).await?;
        let body = Body::of_response(&mut wire, &head, "GET").await;
        body.complete.then_some((head, body))
    };
    match timeout(PATIENCE, answer).await {
        Ok(Some((head, body))) => {
            if !head.get("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")) {
                *kept = Some(wire);
            }
            match head.status() {
                200 => String::from_utf8_lossy(&body.bytes).into_owned(),
                status => status.to_string(),
            }
        }
        Ok(None) => "closed without an answer".into(),
        Err(_) => "no answer".into(),
    }
}

/// Asks until the answer is this one, for at most ten seconds; the last answer.
pub async fn until(target: &Target, wanted: &str) -> String {
    let mut answer = String::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        answer = ask(target).await;
        if answer == wanted {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    answer
}

/// Counts the answers of so many requests, each on a connection of its own.
pub async fn tally(target: &Target, count: usize) -> Tally {
    let mut tally = Tally::new();
    for _ in 0..count {
        *tally.entry(ask(target).await).or_default() += 1;
    }
    tally
}

/// Requests one after another on several connections until it is stopped.
pub struct Load {
    stopped: Rc<Cell<bool>>,
    seen: Rc<RefCell<Tally>>,
    running: Rc<Cell<usize>>,
}

impl Load {
    /// Starts `connections` of them; each waits a little between two requests, so that the machine is not what is measured.
    pub fn start(target: Target, connections: usize) -> Load {
        let load =
            Load { stopped: Rc::default(), seen: Rc::default(), running: Rc::new(Cell::new(connections)) };
        for _ in 0..connections {
            let (stopped, seen, running) =
                (Rc::clone(&load.stopped), Rc::clone(&load.seen), Rc::clone(&load.running));
            spawn_local(async move {
                let mut wire = None;
                while !stopped.get() {
                    let answer = request(&target, &mut wire).await;
                    *seen.borrow_mut().entry(answer).or_default() += 1;
                    sleep(Duration::from_millis(2)).await;
                }
                running.set(running.get() - 1);
            });
        }
        load
    }

    /// What came since it was last asked.
    pub fn take(&self) -> Tally {
        std::mem::take(&mut self.seen.borrow_mut())
    }

    /// Ends it; what came since it was last asked.
    pub async fn stop(self) -> Tally {
        self.stopped.set(true);
        while self.running.get() > 0 {
            sleep(Duration::from_millis(5)).await;
        }
        self.take()
    }
}
