//! The case file: what is configured, what is sent, what must be seen.
//!
//! A case is one YAML document (see `tests/README.md` for the whole language). It is read into the types below, which
//! refuse unknown keys, so that a misspelt expectation cannot pass silently. The configuration stays a tree; it is
//! assembled by [`crate::config`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::control_plane::{self, ControlPlane};
use crate::error::{Context, Error, Result, case_error};

/// One case.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// `area/name`, from the file's place.
    #[serde(skip)]
    pub name: String,
    /// What the case shows, in a sentence.
    pub about: String,
    /// Scripted upstreams by name.
    #[serde(default)]
    pub upstreams: BTreeMap<String, Upstream>,
    /// The parts of the configuration.
    #[serde(default)]
    pub config: Map<String, Value>,
    /// Files of dynamic resources, by name (see [`crate::xds`]).
    #[serde(default)]
    pub files: Map<String, Value>,
    /// A control plane that serves the subject (see [`crate::control_plane`]).
    pub control_plane: Option<ControlPlane>,
    /// More command line flags.
    #[serde(default)]
    pub args: Vec<String>,
    /// What the client does, in order.
    #[serde(default)]
    pub traffic: Vec<Step>,
    /// What Envoy must show: a partial tree laid over the observation.
    #[serde(default)]
    pub expect: Map<String, Value>,
    /// Stats that are compared between the subjects although nothing is expected of them.
    #[serde(default)]
    pub stats: Vec<String>,
    /// Replacements made in every observed string before anything is compared.
    #[serde(default)]
    pub mask: Vec<Mask>,
    /// Paths (`a/b/*/c`) left out of the comparison between the subjects.
    #[serde(default)]
    pub ignore: Vec<String>,
    /// Access log lines come in no fixed order.
    #[serde(default)]
    pub sort_log: bool,
    /// Why Sampan is known to differ; such a case must differ, and stand in `docs/divergences.md`.
    pub divergence: Option<String>,
    /// Where it may differ; everywhere when empty.
    #[serde(default)]
    pub diverges_at: Vec<String>,
    /// Why Envoy does not run it: the expectation is then what its source says, and Sampan alone must meet it.
    pub sampan_only: Option<String>,
    /// Configuration verdicts (`--mode validate`) instead of traffic.
    #[serde(default)]
    pub validate: Vec<Verdict>,
}

/// A replacement in observed strings.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mask {
    /// A regular expression.
    pub regex: String,
    /// What takes the place of each match.
    pub with: String,
}

/// One row of a table of configuration verdicts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// Name of the row.
    pub name: String,
    /// As in [`Case::config`].
    #[serde(default)]
    pub config: Map<String, Value>,
    /// The configuration file as text, for syntax and unknown fields.
    pub text: Option<String>,
    /// The end of the configuration file's name.
    #[serde(default = "json")]
    pub ext: String,
    /// Whether Envoy accepts it.
    pub accept: bool,
    /// What Envoy's message matches.
    pub envoy: Option<String>,
    /// What Sampan's message matches: the path of the field at least.
    pub sampan: Option<String>,
    /// Why Sampan's verdict is another one.
    pub divergence: Option<String>,
}

fn json() -> String {
    "json".into()
}

/// A scripted upstream.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// What it speaks.
    #[serde(default)]
    pub kind: UpstreamKind,
    /// Serve TLS.
    pub tls: Option<UpstreamTls>,
    /// First match answers; without a match the answer is 200 and the upstream's name.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// What a `tcp` upstream does on each connection, and an HTTP one before it reads.
    #[serde(default)]
    pub on_connect: Vec<Act>,
    /// Address to listen on.
    pub host: Option<String>,
    /// Record how each connection ended.
    #[serde(default)]
    pub conns: bool,
    /// The HTTP/2 server's limit of concurrent streams.
    pub max_streams: Option<u32>,
    /// It serves gRPC: the messages of what is asked and of what is answered.
    pub grpc: Option<Grpc>,
}

/// The full names of a gRPC method's messages.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grpc {
    /// What is asked; shown as `messages`.
    pub request: String,
    /// What an act `message` answers.
    pub response: String,
}

/// What an upstream speaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamKind {
    /// HTTP/1.
    #[default]
    Http1,
    /// HTTP/2 with prior knowledge (or over TLS).
    Http2,
    /// Bytes, by script.
    Tcp,
    /// Bytes, sent back.
    Echo,
}

/// TLS of an upstream.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamTls {
    /// Name of the certificate.
    pub cert: String,
    /// Protocols offered.
    #[serde(default)]
    pub alpn: Vec<String>,
    /// Demand a client certificate.
    #[serde(default)]
    pub client_auth: bool,
    /// So many bytes come before the handshake (a PROXY header).
    #[serde(default)]
    pub behind: usize,
}

/// How an upstream answers some requests.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Exact path, or a prefix when it ends with `*`.
    pub path: Option<String>,
    /// Request number on this upstream, from 1.
    pub nth: Option<usize>,
    /// Act as soon as the head is there.
    #[serde(default)]
    pub early: bool,
    /// The script.
    #[serde(rename = "do")]
    pub acts: Vec<Act>,
}

/// One act of an upstream or of a raw client.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Act {
    /// A well-formed response.
    Reply(Reply),
    /// A gRPC response of this message, with status 0.
    Message(Value),
    /// Raw bytes; each character is one byte.
    Send(String),
    /// Raw bytes and the close for writing, in one segment: the peer sees both at once.
    SendLast(String),
    /// So many times the letter x.
    Fill(usize),
    /// Raw bytes, so many times.
    Flood(usize, String),
    /// HTTP/2: open so many streams with `GET /` and reset each at once.
    OpenAndReset(u32),
    /// Wait some milliseconds.
    Sleep(u64),
    /// Read until what was received since the start matches.
    Until(String),
    /// Read this many bytes more.
    Read(usize),
    /// Read the request's body now.
    ReadBody,
    /// Close for writing.
    HalfClose,
    /// Close.
    Close,
    /// Close with RST, or reset the stream with this HTTP/2 code.
    Reset,
    /// Reset the HTTP/2 stream with this code.
    RstStream(u32),
    /// Send back what comes until the peer closes.
    Echo,
    /// Do nothing until the peer closes.
    Hang,
}

/// A well-formed response.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// Status code.
    #[serde(default = "ok")]
    pub status: u16,
    /// Headers in order.
    #[serde(default)]
    pub headers: Map<String, Value>,
    /// Body.
    #[serde(default)]
    pub body: String,
    /// A body of so many bytes.
    pub body_size: Option<usize>,
    /// Trailers, which make HTTP/1 chunked.
    #[serde(default)]
    pub trailers: Map<String, Value>,
    /// HTTP/1: chunked even without trailers.
    #[serde(default)]
    pub chunked: bool,
}

fn ok() -> u16 {
    200
}

/// One step of the client.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    /// A structured request.
    Http(Box<HttpStep>),
    /// Bytes by script.
    Raw(RawStep),
    /// A call of the admin interface.
    Admin(AdminStep),
    /// Set runtime values: an admin call whose answer is not observed.
    Runtime(Map<String, Value>),
    /// Wait some milliseconds.
    Sleep(u64),
    /// Wait until the stats have these values.
    WaitStats(Map<String, Value>),
    /// Move files of dynamic resources to their places, by name (see [`crate::xds`]).
    Write(Map<String, Value>),
    /// Serve another snapshot from the control plane: `version`, `versions`, `resources`.
    Push(Map<String, Value>),
    /// Make trouble at the control plane, or end it.
    ControlPlane(control_plane::Act),
    /// Wait until the control plane was asked this (a partial tree as in `expect: control_plane`).
    WaitControlPlane(Map<String, Value>),
    /// Close a named connection.
    Close(String),
    /// Send a signal to the subject.
    Signal(String),
    /// Wait for the subject's exit.
    Exit(String),
    /// End the subject, if it has not ended, and start it again; whether to wait until it is ready.
    Restart {
        /// Otherwise only until its admin interface answers.
        ready: bool,
    },
    /// Run lists of steps at once.
    Parallel(Vec<Vec<Step>>),
}

/// TLS of a client.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientTls {
    /// Server name; none sends no SNI.
    pub sni: Option<String>,
    /// Protocols offered.
    #[serde(default)]
    pub alpn: Vec<String>,
    /// Name of the client certificate.
    pub cert: Option<String>,
    /// `1.2` or `1.3`; both when absent.
    pub version: Option<String>,
    /// Resume, and keep to be resumed, the sessions of this name; shows whether it was `resumed`.
    pub session: Option<String>,
}

/// A structured request.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpStep {
    /// Key in the observation; `r1`, `r2`, … when absent.
    pub name: Option<String>,
    /// Listener name or address.
    #[serde(default = "main_listener")]
    pub to: String,
    /// Keep the connection under this name, or use the one kept.
    pub conn: Option<String>,
    /// `1.0`, `1.1` or `2`.
    #[serde(default = "http11")]
    pub version: String,
    /// Method.
    #[serde(default = "get")]
    pub method: String,
    /// Request target.
    #[serde(default = "slash")]
    pub path: String,
    /// Host; the empty string sends none.
    #[serde(default = "host")]
    pub host: String,
    /// HTTP/2 scheme.
    pub scheme: Option<String>,
    /// Headers in order; a list repeats the name.
    #[serde(default)]
    pub headers: Map<String, Value>,
    /// Body.
    pub body: Option<String>,
    /// A body of so many bytes.
    pub body_size: Option<usize>,
    /// Trailers.
    #[serde(default)]
    pub trailers: Map<String, Value>,
    /// HTTP/1: chunked.
    #[serde(default)]
    pub chunked: bool,
    /// Wait so many milliseconds between head and body.
    pub delay_body: Option<u64>,
    /// Over TLS.
    pub tls: Option<ClientTls>,
    /// Observe how the connection ends after the response.
    #[serde(default)]
    pub close: bool,
    /// Observe that the connection stays open after the response.
    #[serde(default)]
    pub keep: bool,
    /// Send it so many times.
    #[serde(default = "one")]
    pub repeat: usize,
    /// Count the values of this (`status`, `body`, or a header) over the repetitions.
    pub tally: Option<String>,
    /// Counts inside of these bounds show as `ok`.
    #[serde(default)]
    pub within: BTreeMap<String, (usize, usize)>,
    /// Give up after so many milliseconds.
    #[serde(default = "patience")]
    pub limit_ms: u64,
    /// Local address to bind.
    pub source: Option<String>,
}

fn main_listener() -> String {
    "main".into()
}
fn http11() -> String {
    "1.1".into()
}
fn get() -> String {
    "GET".into()
}
fn slash() -> String {
    "/".into()
}
fn host() -> String {
    "host.test".into()
}
fn one() -> usize {
    1
}
fn patience() -> u64 {
    5000
}

/// Bytes by script. At the end the client reads until the peer closes or `limit_ms` is over.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawStep {
    /// Key in the observation.
    pub name: Option<String>,
    /// Listener name or address.
    #[serde(default = "main_listener")]
    pub to: String,
    /// Over TLS.
    pub tls: Option<ClientTls>,
    /// Local address to bind.
    pub source: Option<String>,
    /// The script.
    #[serde(rename = "do")]
    pub acts: Vec<Act>,
    /// How long to wait for the end; what is still open then shows as `open`.
    #[serde(default = "short")]
    pub limit_ms: u64,
}

fn short() -> u64 {
    300
}

/// A call of the admin interface.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminStep {
    /// Key in the observation.
    pub name: Option<String>,
    /// Method.
    #[serde(default = "get")]
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Keep only the lines that match.
    pub grep: Option<String>,
    /// Keep only these JSON pointers.
    #[serde(default)]
    pub pick: Vec<String>,
}

impl Case {
    /// Reads one case file below `root`.
    pub fn load(root: &Path, file: &Path) -> Result<Case> {
        let text = std::fs::read_to_string(file).trying(format!("read {}", file.display()))?;
        let name = file.strip_prefix(root).unwrap_or(file).with_extension("").display().to_string();
        let wrong = |e: String| Error::Case(format!("{name}: {e}"));
        // `y` and `no` are header values here, not truths.
        let options = serde_saphyr::options! { strict_booleans: true };
        let tree: Value =
            serde_saphyr::from_str_with_options(&text, options).map_err(|e| wrong(e.to_string()))?;
        let mut case: Case = serde_json::from_value(tree).map_err(|e| wrong(e.to_string()))?;
        if case.validate.is_empty() && case.expect.is_empty() {
            return case_error(format!("{name}: expects nothing of Envoy"));
        }
        let draft = serde_json::to_string(&case.expect).unwrap_or_default().contains("\"?\"");
        if draft && std::env::var_os("SHOW").is_none() {
            return case_error(format!("{name}: has expectations that are not written yet"));
        }
        case.name = name;
        Ok(case)
    }

    /// All case files below `root`, in order of their names.
    pub fn find(root: &Path) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).trying(format!("list {}", folder.display()))? {
                let path = entry.trying("list cases")?.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "yaml") {
                    found.push(path);
                }
            }
        }
        found.sort();
        Ok(found)
    }
}
