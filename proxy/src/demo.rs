//! What runs without arguments: two small upstreams, a canary split between them, a route with an injected fault,
//! and the admin interface. Everything listens on the loopback interface.

use std::net::TcpListener;
use std::process::ExitCode;

use crate::cli::{self, Command};

const BOOTSTRAP: &str = include_str!("demo.yaml");

/// The upstreams: name, version, port.
const UPSTREAMS: [(&str, &str, u16); 2] = [("httptest", "v1", 18001), ("httptest-canary", "v2", 18002)];

/// Starts the demonstration and serves until it is interrupted.
pub fn run() -> ExitCode {
    for (name, version, port) in UPSTREAMS {
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(listener) => {
                std::thread::spawn(move || upstream(&listener, name, version));
            }
            Err(error) => {
                crate::complain(&format!("error: port {port} for the upstream {name}: {error}"));
                return ExitCode::FAILURE;
            }
        }
    }
    crate::say(
        "Sampan serves a demonstration mesh: httptest (v1) and httptest-canary (v2) behind one listener.\n\n\
         \x20 curl -i http://127.0.0.1:10000/          half of the answers come from v1, half from v2\n\
         \x20 curl -i http://127.0.0.1:10000/fault     status 599: an injected fault (response flag FI)\n\
         \x20 curl -s http://127.0.0.1:9901/clusters   who is behind it\n\
         \x20 curl -s http://127.0.0.1:9901/stats?filter=upstream_rq_total\n\
         \x20 curl -s http://127.0.0.1:9901/help       everything that the admin interface knows\n\n\
         The access log follows; Ctrl-C ends.",
    );
    let flags = [
        "--config-yaml",
        BOOTSTRAP,
        "--concurrency",
        "1",
        "-l",
        "warning",
        "--drain-time-s",
        "5",
        "--file-flush-interval-msec",
        "100",
    ];
    match cli::parse(flags.map(str::to_owned)) {
        Ok(Command::Run(options)) => crate::run(&options),
        Ok(Command::Print(_)) => ExitCode::SUCCESS,
        Err(error) => {
            crate::complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// A server that answers every request with its name.
fn upstream(listener: &TcpListener, name: &'static str, version: &'static str) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || answer(stream, name, version));
    }
}

fn answer(mut stream: std::net::TcpStream, name: &str, version: &str) {
    use std::io::{BufRead as _, BufReader, Write as _};
    let Ok(clone) = stream.try_clone() else { return };
    let mut lines = BufReader::new(clone).lines();
    loop {
        // A head ends with an empty line; the proxy sends this server no bodies that it would have to skip.
        loop {
            match lines.next() {
                Some(Ok(line)) if line.is_empty() => break,
                Some(Ok(_)) => {}
                _ => return,
            }
        }
        let body = format!("hello from {name} {version}\n");
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nx-version: {version}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(head.as_bytes()).is_err() {
            return;
        }
    }
}
