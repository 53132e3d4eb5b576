//! The proxies: finding, starting, probing and stopping them.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Serialize;

use crate::{
    config::Setup,
    error::{BenchError, Result},
    process,
};

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The measure of all ratios.
    Envoy,
    /// Ours; takes Envoy's file and flags.
    Sampan,
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
}

impl Kind {
    /// All, in the order of the tables' columns.
    pub const ALL: [Self; 4] = [Self::Envoy, Self::Sampan, Self::Haproxy, Self::Nginx];

    /// Name on the command line and in the tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Envoy => "envoy",
            Self::Sampan => "sampan",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    /// The reverse of [`Kind::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    fn has_admin(self) -> bool {
        matches!(self, Self::Envoy | Self::Sampan)
    }
}

/// A proxy that is there.
#[derive(Debug, Clone, Serialize)]
pub struct Subject {
    /// Which.
    pub kind: Kind,
    /// Its binary.
    #[serde(skip)]
    pub path: PathBuf,
    /// What it says of itself.
    pub version: String,
}

impl Subject {
    /// Finds a binary: the given path, or the name in `PATH`, or for Sampan beside this program. `Err` says why not.
    pub fn find(kind: Kind, given: Option<&Path>) -> std::result::Result<Self, String> {
        let path = match given {
            Some(path) => path.to_owned(),
            None if kind == Kind::Sampan => {
                std::env::current_exe().map_err(|e| format!("own path: {e}"))?.with_file_name("sampan")
            }
            None => PathBuf::from(kind.name()),
        };
        let flag = if kind.has_admin() { "--version" } else { "-v" };
        let output = Command::new(&path).arg(flag).output().map_err(|e| format!("{}: {e}", shown(&path)))?;
        // nginx answers on stderr.
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        if !output.status.success() {
            return Err(format!("{} {flag} ends with {}", shown(&path), output.status));
        }
        let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("(says nothing)");
        // Envoy and nginx put their name before a colon.
        let version = line.rsplit_once(": ").map_or(line, |(_, version)| version).trim();
        Ok(Self { kind, path, version: version.to_owned() })
    }

    /// Starts it on the proxy's core, behind `wrapper` (valgrind and its options) if that is not empty.
    pub fn spawn(&self, setup: &Setup, wrapper: &[String]) -> Result<Running> {
        let (file, text) = crate::config::write(self.kind, setup)
            .map_err(|why| BenchError::Subject(format!("{}: {why}", self.kind.name())))?;
        let config = setup.dir.join(file);
        fs::write(&config, text).map_err(BenchError::io(file))?;
        let log_path = setup.dir.join("log");
        let log = File::create(&log_path).map_err(BenchError::io("log"))?;
        let log_too = log.try_clone().map_err(BenchError::io("log"))?;

        let mut command = match wrapper {
            [] => Command::new(&self.path),
            [program, options @ ..] => {
                let mut command = Command::new(program);
                command.args(options).arg(&self.path);
                command
            }
        };
        self.add_arguments(&mut command, &config, setup);
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        let started = Instant::now();
        let child = process::on_proxy_core(|| command.spawn())?.map_err(BenchError::io(format!(
            "start {} {}",
            wrapper.join(" "),
            self.kind.name()
        )))?;
        Ok(Running { kind: self.kind, child, started, setup: setup.clone(), log_path })
    }

    fn add_arguments(&self, command: &mut Command, config: &Path, setup: &Setup) {
        match self.kind {
            Kind::Envoy | Kind::Sampan => {
                command.arg("-c").arg(config);
                command.args(["--concurrency", "1", "--disable-hot-restart", "-l", "error", "--base-id"]);
                command.arg(setup.listen.port().to_string());
            }
            Kind::Haproxy => {
                command.arg("-db").arg("-f").arg(config);
            }
            Kind::Nginx => {
                command.arg("-p").arg(&setup.dir).args(["-e", "stderr", "-c"]).arg(config);
            }
        }
    }
}

/// The last part of a path: reports must not tell where things lie.
fn shown(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A started proxy. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    kind: Kind,
    child: Child,
    started: Instant,
    setup: Setup,
    log_path: PathBuf,
}

impl Running {
    /// Its process id; also under valgrind, which becomes the program that it runs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the client connects.
    #[must_use]
    pub fn listen(&self) -> SocketAddr {
        self.setup.listen
    }

    /// Waits until `/ready` is 200 (Envoy, Sampan) or the listener accepts, looking every 0.2 ms; gives the time
    /// since the fork. Blocks the thread: nothing else may run in that time anyway.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        loop {
            let ready = self.is_ready()?;
            let elapsed = self.started.elapsed();
            if ready {
                return Ok(elapsed);
            }
            if elapsed > limit {
                return Err(BenchError::Subject(format!("not ready after {limit:?}: {}", self.log_tail())));
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether it serves by now. An error: it has ended.
    pub fn is_ready(&mut self) -> Result<bool> {
        let ready = if self.kind.has_admin() {
            admin_is_ready(self.setup.admin)
        } else {
            TcpStream::connect(self.setup.listen).is_ok()
        };
        match self.child.try_wait() {
            Ok(Some(status)) if !ready => {
                Err(BenchError::Subject(format!("ended with {status}: {}", self.log_tail())))
            }
            _ => Ok(ready),
        }
    }

    /// The end of what it printed, on one line.
    fn log_tail(&self) -> String {
        let text = fs::read(&self.log_path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // Under valgrind the proxy's last words stand before valgrind's.
        let of_proxy = |line: &&str| !line.trim().is_empty() && !line.starts_with("==");
        let lines: Vec<&str> = text.lines().filter(of_proxy).collect();
        let tail = lines[lines.len().saturating_sub(3)..].join(" / ");
        if tail.is_empty() { "it printed nothing".to_owned() } else { tail.chars().take(400).collect() }
    }

    /// Explains a failed run: the proxy's end, if that is the cause.
    pub fn blame(&mut self, error: BenchError) -> BenchError {
        match self.child.try_wait() {
            Ok(Some(status)) => {
                BenchError::Subject(format!("{error}; it ended with {status}: {}", self.log_tail()))
            }
            _ => error,
        }
    }
}

impl Drop for Running {
    /// SIGTERM, and SIGKILL after three seconds.
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let deadline = Instant::now() + Duration::from_secs(3);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn admin_is_ready(admin: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(admin) else { return false };
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let request = b"GET /ready HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n";
    let mut answer = [0; 12];
    stream.write_all(request).is_ok() && stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 200")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(Kind::from_name("apache"), None);
    }

    #[test]
    fn an_absent_binary_is_named() {
        let why = Subject::find(Kind::Nginx, Some(Path::new("/nowhere/nginx"))).unwrap_err();
        assert!(why.starts_with("nginx: "), "{why}");
    }
}
