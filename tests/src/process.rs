//! The subjects: starting Envoy or Sampan on a configuration, asking its admin interface, ending it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::error::{Context, Error, Result};
use crate::http1::{Body, Head};
use crate::net::{Stream, Wire, text};

/// One of the two proxies.
#[derive(Debug, Clone)]
pub struct Subject {
    /// `envoy` or `sampan`.
    pub name: &'static str,
    /// The binary.
    pub binary: PathBuf,
}

/// A started subject. It dies with this value.
pub struct Running {
    child: Child,
    subject: Subject,
    config: PathBuf,
    args: Vec<String>,
    admin: String,
    stderr: PathBuf,
}

impl Subject {
    /// The verdict of `--mode validate` and what was said.
    pub async fn validate(&self, config: &Path) -> Result<(bool, String)> {
        let output = Command::new(&self.binary)
            .args(["--mode", "validate", "--disable-hot-restart", "-l", "error", "-c"])
            .arg(config)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = timeout(Duration::from_secs(20), output)
            .await
            .map_err(|_| Error::Subject("--mode validate did not end".into()))?
            .trying(format!("run {}", self.binary.display()))?;
        let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
        Ok((output.status.success(), said))
    }

    /// Starts it and waits until its admin interface says it is ready, or only answers where that is enough.
    pub async fn start(&self, config: &Path, admin: String, args: &[String], ready: bool) -> Result<Running> {
        let stderr = config.with_file_name("stderr");
        let mut running = Running {
            child: self.spawn(config, args, &stderr)?,
            subject: self.clone(),
            config: config.to_path_buf(),
            args: args.to_vec(),
            admin,
            stderr,
        };
        running.answers(ready).await?;
        Ok(running)
    }

    fn spawn(&self, config: &Path, args: &[String], stderr: &Path) -> Result<Child> {
        let file = std::fs::File::create(stderr).trying("create the error log")?;
        let again = file.try_clone().trying("create the error log")?;
        let one: &[&str] =
            if args.iter().any(|arg| arg == "--concurrency") { &[] } else { &["--concurrency", "1"] };
        Command::new(&self.binary)
            .args(one)
            .args(["--disable-hot-restart", "-l", "error", "--file-flush-interval-msec", "20"])
            .args(args)
            .arg("-c")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(again)
            .kill_on_drop(true)
            .spawn()
            .trying(format!("run {}", self.binary.display()))
    }
}

impl Running {
    /// Starts it once more, ended or not, as it was started before.
    pub async fn restart(&mut self, ready: bool) -> Result<()> {
        let _ = self.child.kill().await;
        self.child = self.subject.spawn(&self.config, &self.args, &self.stderr)?;
        self.answers(ready).await
    }

    async fn answers(&mut self, ready: bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let name = self.subject.name;
            if let Some(status) = self.child.try_wait().trying("wait for the subject")? {
                return Err(Error::Subject(format!("{name} ended with {status}:\n{}", self.said())));
            }
            match self.admin_call("GET", "/ready").await {
                Ok((head, _)) if head.status() == 200 || !ready => return Ok(()),
                _ if Instant::now() > deadline => {
                    return Err(Error::Subject(format!("{name} is not ready:\n{}", self.said())));
                }
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// What it wrote to stdout and stderr.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// One call of the admin interface.
    pub async fn admin_call(&self, method: &str, path: &str) -> Result<(Head, String)> {
        let mut wire =
            Wire::new(Stream::connect(&self.admin, None).await.trying("connect to the admin port")?);
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        wire.send(request.as_bytes()).await;
        let answer = async {
            let head = Head::read(&mut wire).await?;
            let body = Body::of_response(&mut wire, &head, method).await;
            Some((head, String::from_utf8_lossy(&body.bytes).into_owned()))
        };
        // One thread answers and takes configuration over: a debug build is busy with a mesh's listeners for a second and a half, on a
        // busy machine for several times that.
        match timeout(Duration::from_secs(20), answer).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => {
                Err(Error::Subject(format!("{method} {path}: the admin port closed without an answer")))
            }
            Err(_) => {
                Err(Error::Subject(format!("no answer to {method} {path} from the admin port in 20 s")))
            }
        }
    }

    /// Sends a signal by its name without `SIG`.
    pub fn signal(&self, name: &str) -> Result<()> {
        let signal: Signal =
            format!("SIG{name}").parse().map_err(|_| Error::Case(format!("no signal is called {name}")))?;
        let pid = self.child.id().ok_or_else(|| Error::Subject("it has ended already".into()))?;
        kill(Pid::from_raw(pid.cast_signed()), signal).map_err(std::io::Error::from).trying("send a signal")
    }

    /// Waits for its exit: the exit code, `signal`, or `running`.
    pub async fn exit(&mut self, limit: Duration) -> String {
        match timeout(limit, self.child.wait()).await {
            Ok(Ok(status)) => status.code().map_or("signal".into(), |code| code.to_string()),
            _ => "running".into(),
        }
    }

    /// Ends it at once. True when it had ended by itself before.
    pub async fn stop(mut self) -> bool {
        let gone = matches!(self.child.try_wait(), Ok(Some(_)));
        let _ = self.child.kill().await;
        gone
    }
}
