//! Files of the access log: buffers per thread, one thread that writes.
//!
//! A line goes into the buffer that the calling thread has for the file. Its lock is taken by nobody else but
//! the writer, for the moment in which it swaps the buffer for an empty one. The writer wakes when a buffer has
//! grown past the limit, when the interval is over, and to reopen; it writes whole buffers, so whole lines.
//! Lines of one thread keep their order; lines of two threads may not.
//!
//! When a file cannot be written to, what was to be written is dropped and counted: a full disk must not
//! become a full memory.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;

use crate::error::{ConfigError, ConfigResult};
use crate::export::Exporters;
use crate::stats::{Counter, Gauge, Scope};

/// How much spare room a thread's buffer keeps after it was written.
const SPARE: usize = 16 << 10;

/// How long the writer waits for a pipe that is full before it drops what it has.
const PIPE_PATIENCE: Duration = Duration::from_secs(1);

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// When buffers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushPolicy {
    /// A buffer that holds more than this is written at once (`--file-flush-min-size-kb`).
    pub min_size: usize,
    /// Any buffer is written after this (`--file-flush-interval-msec`).
    pub interval: Duration,
}

impl Default for FlushPolicy {
    fn default() -> Self {
        Self { min_size: 64 << 10, interval: Duration::from_secs(10) }
    }
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A file, opened for appending.
    Path(String),
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Target {
    fn open(&self) -> io::Result<File> {
        match self {
            Self::Path(path) => OpenOptions::new().append(true).create(true).open(path),
            Self::Stdout => io::stdout().as_fd().try_clone_to_owned().map(File::from),
            Self::Stderr => io::stderr().as_fd().try_clone_to_owned().map(File::from),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Path(path) => path,
            Self::Stdout => "/dev/stdout",
            Self::Stderr => "/dev/stderr",
        }
    }
}

#[derive(Clone)]
struct FileStats {
    write_buffered: Counter,
    write_completed: Counter,
    write_failed: Counter,
    flushed_by_timer: Counter,
    reopen_failed: Counter,
    write_total_buffered: Gauge,
}

type Buffer = Arc<Mutex<Vec<u8>>>;

/// One open file.
pub struct LogFile {
    id: u64,
    target: Target,
    /// The descriptor; also what keeps two flushes from mixing their lines.
    sink: Mutex<File>,
    buffers: Mutex<Vec<Buffer>>,
    reopen: AtomicBool,
    stats: FileStats,
    min_size: usize,
    wake: Arc<Wake>,
}

/// What the writer sleeps on.
#[derive(Default)]
struct Wake {
    state: Mutex<WakeState>,
    condition: Condvar,
}

#[derive(Default)]
struct WakeState {
    wanted: bool,
    over: bool,
}

thread_local! {
    /// This thread's buffers, by the file's id.
    static MINE: RefCell<Vec<(u64, Buffer)>> = const { RefCell::new(Vec::new()) };
}

/// All log files and exporters of a process; clones are handles to the same.
#[derive(Clone)]
pub struct AccessLogManager(Arc<Inner>);

struct Inner {
    files: Mutex<HashMap<Target, Arc<LogFile>>>,
    stats: FileStats,
    policy: FlushPolicy,
    wake: Arc<Wake>,
    started: AtomicBool,
    exporters: Exporters,
}

/// A lock whose data stays good when a holder panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wake {
    fn notify(&self) {
        lock(&self.state).wanted = true;
        self.condition.notify_one();
    }

    /// Sleeps until someone notifies or the time is over; tells whether the end has come.
    fn sleep(&self, until: Instant) -> bool {
        let mut state = lock(&self.state);
        while !state.wanted && !state.over {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let (next, _) = self.condition.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
        state.wanted = false;
        state.over
    }
}

impl AccessLogManager {
    /// A manager without files; its stats (`filesystem.…`) are made in `root`.
    pub fn new(root: &Scope, policy: FlushPolicy) -> Self {
        let scope = root.scope("filesystem");
        let stats = FileStats {
            write_buffered: scope.counter("write_buffered"),
            write_completed: scope.counter("write_completed"),
            write_failed: scope.counter("write_failed"),
            flushed_by_timer: scope.counter("flushed_by_timer"),
            reopen_failed: scope.counter("reopen_failed"),
            write_total_buffered: scope.gauge("write_total_buffered"),
        };
        Self(Arc::new(Inner {
            files: Mutex::default(),
            stats,
            policy,
            wake: Arc::default(),
            started: AtomicBool::new(false),
            exporters: Exporters::new(root),
        }))
    }

    /// Who this proxy is, for collectors; the first who says so counts.
    pub fn set_node(&self, node: Node) {
        self.0.exporters.set_node(node);
    }

    /// Those who send, to collectors.
    pub fn exporters(&self) -> &Exporters {
        &self.0.exporters
    }

    /// The file of a target; it is opened once and stays open.
    pub fn open(&self, target: Target) -> ConfigResult<Arc<LogFile>> {
        let mut files = lock(&self.0.files);
        if let Some(file) = files.get(&target) {
            return Ok(file.clone());
        }
        let sink = target.open().map_err(|e| {
            let reason = e.to_string();
            let reason = reason.split(" (os error").next().unwrap_or_default();
            ConfigError::new(format!("unable to open file '{}': {reason}", target.name()))
        })?;
        let file = Arc::new(LogFile {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            target: target.clone(),
            sink: Mutex::new(sink),
            buffers: Mutex::default(),
            reopen: AtomicBool::new(false),
            stats: self.0.stats.clone(),
            min_size: self.0.policy.min_size,
            wake: self.0.wake.clone(),
        });
        files.insert(target, file.clone());
        drop(files);
        self.start();
        Ok(file)
    }

    /// Starts the writer with the first file. Where no thread can be had, lines wait for [`Self::flush`].
    fn start(&self) {
        if self.0.started.swap(true, Ordering::Relaxed) {
            return;
        }
        let (manager, wake) = (Arc::downgrade(&self.0), self.0.wake.clone());
        let interval = self.0.policy.interval.max(Duration::from_millis(1));
        let body = move || writer(&manager, &wake, interval);
        if thread::Builder::new().name("AccessLogFlush".to_owned()).spawn(body).is_err() {
            self.0.started.store(false, Ordering::Relaxed);
        }
    }

    /// Asks for every file to be closed and opened anew (SIGUSR1): after it was moved away, the next lines go
    /// into a new one. What is buffered goes there too.
    pub fn reopen(&self) {
        for file in lock(&self.0.files).values() {
            file.reopen.store(true, Ordering::Release);
        }
        self.0.wake.notify();
    }

    /// Writes everything that is buffered and returns when it is written; for the end of the process.
    pub fn flush(&self) {
        self.0.flush();
    }
}

impl Inner {
    fn flush(&self) {
        let files: Vec<_> = lock(&self.files).values().cloned().collect();
        for file in files {
            file.flush();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        lock(&self.wake.state).over = true;
        self.wake.condition.notify_one();
        self.flush();
    }
}

fn writer(manager: &Weak<Inner>, wake: &Wake, interval: Duration) {
    let mut due = Instant::now() + interval;
    while !wake.sleep(due) {
        let Some(manager) = manager.upgrade() else { return };
        if Instant::now() >= due {
            due = Instant::now() + interval;
            let files = lock(&manager.files).len() as u64;
            manager.stats.flushed_by_timer.add(files);
        }
        manager.flush();
    }
}

impl LogFile {
    /// Lets `line` append to this thread's buffer. A panic in it leaves the buffer as it was.
    pub fn write_with(&self, line: impl FnOnce(&mut Vec<u8>)) {
        MINE.with_borrow_mut(|mine| {
            let buffer = self.buffer_of(mine);
            let mut guard = Line { buffer: lock(buffer), begin: 0, done: false };
            guard.begin = guard.buffer.len();
            line(&mut guard.buffer);
            guard.done = true;
            let (begin, end) = (guard.begin, guard.buffer.len());
            drop(guard);
            self.stats.write_buffered.inc();
            self.stats.write_total_buffered.add((end - begin) as u64);
            if begin <= self.min_size && end > self.min_size {
                self.wake.notify();
            }
        });
    }

    fn buffer_of<'a>(&self, mine: &'a mut Vec<(u64, Buffer)>) -> &'a Buffer {
        let index = match mine.iter().position(|(id, _)| *id == self.id) {
            Some(index) => index,
            None => {
                let buffer = Buffer::default();
                lock(&self.buffers).push(buffer.clone());
                mine.push((self.id, buffer));
                mine.len() - 1
            }
        };
        &mine[index].1
    }

    /// Reopens where asked to, then writes what all threads have buffered.
    fn flush(&self) {
        let mut sink = lock(&self.sink);
        if self.reopen.swap(false, Ordering::AcqRel) {
            match self.target.open() {
                Ok(file) => *sink = file,
                // The old file serves on, and the next flush tries again.
                Err(_) => {
                    self.stats.reopen_failed.inc();
                    self.reopen.store(true, Ordering::Release);
                }
            }
        }
        let buffers = lock(&self.buffers).clone();
        for buffer in &buffers {
            let full = std::mem::take(&mut *lock(buffer));
            if full.is_empty() {
                continue;
            }
            match write_all(&mut sink, &full) {
                Ok(()) => self.stats.write_completed.inc(),
                Err(_) => self.stats.write_failed.inc(),
            }
            self.stats.write_total_buffered.sub(full.len() as u64);
            give_back(buffer, full);
        }
        drop(buffers);
        // Buffers of threads that are gone.
        lock(&self.buffers).retain(|b| Arc::strong_count(b) > 1 || !lock(b).is_empty());
    }
}

/// Puts the emptied memory back, unless the thread has begun a new buffer or the old one was unusually large.
fn give_back(buffer: &Buffer, mut spare: Vec<u8>) {
    spare.clear();
    spare.shrink_to(SPARE);
    let mut current = lock(buffer);
    if current.capacity() == 0 {
        *current = spare;
    }
}

/// Writes all; a pipe in non-blocking mode that is full is waited for, for a while.
fn write_all(sink: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    let mut patience = PIPE_PATIENCE;
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !patience.is_zero() => {
                let pause = Duration::from_millis(10);
                thread::sleep(pause);
                patience = patience.saturating_sub(pause);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A line being written: cut off again if it was not finished.
struct Line<'a> {
    buffer: MutexGuard<'a, Vec<u8>>,
    begin: usize,
    done: bool,
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if !self.done {
            let begin = self.begin;
            self.buffer.truncate(begin);
        }
    }
}
