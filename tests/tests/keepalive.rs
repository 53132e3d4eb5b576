//! The race of keep-alive: a host closes idle connections while requests are on their way to it.
//!
//! A close that was there to be seen before the request must cost nothing. One that crosses a request costs an attempt,
//! which may be made again where the route says so: a host that closed has not served it. In neither case may the
//! host serve a request twice.

#![allow(clippy::disallowed_methods, reason = "for the threads of the proxy's workers")]
#![allow(clippy::print_stdout, reason = "a test program reports on stdout")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use sampan_tests::case::Case;
use sampan_tests::error::{Context, Error, Result};
use sampan_tests::net::{Stream, Wire};
use sampan_tests::run::World;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

/// How often each request was served, by its path.
type Served = Rc<RefCell<BTreeMap<String, u32>>>;

fn main() -> ExitCode {
    match run(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        Ok(faults) if faults.is_empty() => ExitCode::SUCCESS,
        Ok(faults) => {
            faults.iter().take(20).for_each(|fault| println!("{fault}"));
            println!("FAILED keepalive: {} faults", faults.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("FAILED {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(root: &Path) -> Result<Vec<String>> {
    let Some(world) = World::from_environment(root)? else { return Ok(vec!["nothing to test".into()]) };
    let Some(subject) = &world.sampan else { return Ok(Vec::new()) };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().trying("start a runtime")?;
    let faults = tokio::task::LocalSet::new().block_on(&runtime, async {
        let (served, port) = host().await?;
        let stage = world.stage(&case(port)?, subject).await?;
        let to = format!("127.0.0.1:{}", stage.names.get("listener.main")?);
        let mut faults = known(&to).await?;
        for client in join_all((0..CLIENTS).map(|n| load(&to, n))).await {
            faults.extend(client?);
        }
        let total = served.borrow().len();
        let twice = served
            .borrow()
            .iter()
            .filter(|(_, times)| **times != 1)
            .map(|(path, times)| format!("{path}: {times} times"))
            .collect::<Vec<_>>();
        println!("{total} requests served, {} faults", faults.len() + twice.len());
        if total != KNOWN + CLIENTS * REQUESTS {
            faults.push(format!("{total} served"));
        }
        faults.extend(twice);
        let (_, stats) =
            stage.subject.admin_call("GET", "/stats?filter=^cluster.a.upstream_rq_retry$").await?;
        println!("{}", stats.trim());
        // Without a race nothing was shown.
        if stats.trim().ends_with(": 0") {
            faults.push("no close has crossed a request".into());
        }
        stage.subject.stop().await;
        Ok::<_, Error>(faults)
    })?;
    world.clean();
    Ok(faults)
}

const KNOWN: usize = 200;
const CLIENTS: usize = 16;
const REQUESTS: usize = 150;

fn case(port: u16) -> Result<Case> {
    let endpoint = json!({ "endpoint": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } } } });
    let assignment = json!({ "cluster_name": "a", "endpoints": [{ "lb_endpoints": [endpoint] }] });
    let again = json!({ "retry_on": "reset", "num_retries": 20,
        "retry_back_off": { "base_interval": "0.001s", "max_interval": "0.002s" } });
    let tree = json!({
        "about": "the race of keep-alive",
        "upstreams": { "a": {} },
        "config": {
            "clusters": { "a": { "load_assignment": assignment, "circuit_breakers": { "thresholds": [{ "max_retries": 1000 }] } } },
            "routes": [
                { "match": { "prefix": "/load" }, "route": { "cluster": "a", "retry_policy": again } },
                { "match": { "prefix": "/" }, "route": { "cluster": "a" } },
            ],
        },
        "expect": { "none": null },
    });
    let mut case: Case = serde_json::from_value(tree).map_err(|e| Error::Case(e.to_string()))?;
    case.name = "keepalive".to_owned();
    Ok(case)
}

/// A host that closes behind every response (`/known`), or when it pleases.
async fn host() -> Result<(Served, u16)> {
    let listener = TcpListener::bind("127.0.0.1:0").await.trying("listen")?;
    let port = listener.local_addr().trying("listen")?.port();
    let served = Served::default();
    let all = served.clone();
    spawn_local(async move {
        let mut seed = 1u64;
        while let Ok((stream, _)) = listener.accept().await {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            spawn_local(serve(stream, seed >> 33, all.clone()));
        }
    });
    Ok((served, port))
}

/// What comes behind the last request is not read any more.
async fn serve(mut stream: TcpStream, seed: u64, served: Served) {
    let mut buffer = Vec::new();
    let mut round = 0;
    // Up to 7 requests, then the end.
    let last = seed % 7 + 1;
    loop {
        let mut patience = Duration::from_secs(10);
        if round == last {
            match seed / 7 % 3 {
                // Whenever the clock says: before the next request, beside it, or behind it.
                0 => patience = Duration::from_micros(seed % 3000),
                // When the next request is there, so that the close has surely crossed it: with RST, for it is not read.
                1 => return drop(stream.readable().await),
                // Likewise, and FIN comes before the RST.
                _ => {
                    let _ = stream.readable().await;
                    let _ = stream.shutdown().await;
                    return sleep(Duration::from_micros(seed % 1000)).await;
                }
            }
        }
        match timeout(patience, head(&mut stream, &mut buffer)).await {
            Ok(Some(path)) => {
                *served.borrow_mut().entry(path.clone()).or_default() += 1;
                let reply = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{path}", path.len());
                if stream.write_all(reply.as_bytes()).await.is_err() || path.starts_with("/known") {
                    return;
                }
            }
            Ok(None) | Err(_) => return,
        }
        round += 1;
    }
}

/// The path of the next request; its body, which is one byte long, is read too.
async fn head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<String> {
    use tokio::io::AsyncReadExt;
    loop {
        let text = String::from_utf8_lossy(buffer).into_owned();
        if let Some(end) = text.find("\r\n\r\n") {
            let body = usize::from(text.starts_with("POST"));
            if buffer.len() >= end + 4 + body {
                buffer.drain(..end + 4 + body);
                return text.split(' ').nth(1).map(str::to_owned);
            }
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// One request at a time, so late that the host's close must have been seen: none may fail.
async fn known(to: &str) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut wire = Wire::new(Stream::connect(to, None).await.trying("connect")?);
    for n in 0..KNOWN {
        ask(&mut wire, &format!("/known/{n}"), n, &mut faults).await;
        sleep(Duration::from_millis(5)).await;
    }
    Ok(faults)
}

async fn load(to: &str, client: usize) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut wire = Wire::new(Stream::connect(to, None).await.trying("connect")?);
    for n in 0..REQUESTS {
        ask(&mut wire, &format!("/load/{client}/{n}"), n, &mut faults).await;
        // Pauses of all lengths around the host's.
        sleep(Duration::from_micros((n * 37 % 40 * 100) as u64)).await;
    }
    Ok(faults)
}

async fn ask(wire: &mut Wire, path: &str, n: usize, faults: &mut Vec<String>) {
    let request = if n.is_multiple_of(2) {
        format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")
    } else {
        format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx")
    };
    wire.send(request.as_bytes()).await;
    let status = wire.line().await.unwrap_or_default();
    let mut length = 0;
    while let Some(line) = wire.line().await {
        let line = String::from_utf8_lossy(&line).trim().to_owned();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap_or_default();
        }
    }
    let body = wire.take(length).await;
    if !status.starts_with(b"HTTP/1.1 200") || body != path.as_bytes() {
        let words = |b: &[u8]| String::from_utf8_lossy(b).trim().to_owned();
        faults.push(format!("{path}: {} {}", words(&status), words(&body)));
    }
}
