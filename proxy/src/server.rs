//! The life of the process: start, serve, drain, end.

use std::cell::{Cell, OnceCell};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sampan_admin::{Admin, AdminModel, DrainRequest, Listener};
use sampan_core::access_log::AccessLogger;
use sampan_core::drain::{Drain, Phase};
use sampan_core::error::AtField;
use sampan_core::log::{Component, Level};
use sampan_listener::Bound;
use tokio::runtime::LocalRuntime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Interval;

use crate::boot::{self, Boot, BootError};
use crate::cli::{Mode, Options};
use crate::listeners::{ListenerManager, Workers};
use crate::stats::ServerStats;
use crate::view::View;
use crate::worker::{Handle, Order};
use crate::xds::{Flags, Xds};

/// What ends or changes the service, from signals and the admin interface.
pub enum Command {
    /// Drain, then end.
    Shutdown,
    /// End now.
    Quit,
    /// Drain listeners and live on.
    DrainListeners(DrainRequest),
    /// Open log files anew.
    ReopenLogs,
}

/// A running process, as the control thread holds it.
pub struct Process {
    /// The command line.
    pub options: Options,
    /// The configuration.
    pub boot: Boot,
    /// The listeners.
    pub listeners: Rc<ListenerManager>,
    /// The drain of everything.
    pub drain: Drain,
    /// Since when.
    pub started: Instant,
    /// The same by the wall clock.
    pub started_at: std::time::SystemTime,
    /// The first clusters are warm.
    pub clusters_ready: Cell<bool>,
    /// All listeners accept.
    pub live: Cell<bool>,
    /// `/healthcheck/fail`
    pub failed: Cell<bool>,
    /// Commands to the main loop.
    pub commands: mpsc::UnboundedSender<Command>,
    /// `server.*`
    pub stats: ServerStats,
    /// What changes while serving; set once it has started.
    pub xds: OnceCell<Xds>,
    /// A graceful drain of listeners has begun; whether of inbound ones only.
    asked_to_go: Cell<Option<bool>>,
    workers: Workers,
}

fn control_runtime() -> Result<LocalRuntime, BootError> {
    LocalRuntime::new().map_err(|e| BootError::System("control thread".to_owned(), e))
}

/// `--mode validate`
pub fn validate(options: &Options) -> Result<(), BootError> {
    control_runtime()?.block_on(async {
        let boot = boot::load(options)?;
        let model = admin_model(&boot)?;
        admin_listener(&boot, &model).map(drop)
    })
}

/// Serves until told to end.
pub fn run(options: &Options) -> Result<(), BootError> {
    control_runtime()?.block_on(serve(options))
}

fn admin_model(boot: &Boot) -> Result<AdminModel, BootError> {
    match &boot.bootstrap.admin {
        Some(admin) => Ok(AdminModel::parse(admin).at("admin")?),
        None => Ok(AdminModel::default()),
    }
}

fn admin_listener(boot: &Boot, model: &AdminModel) -> Result<Option<Listener>, BootError> {
    let server = &boot.server;
    // First by itself: the listener would name its path within the connection manager.
    AccessLogger::list_from_proto(&model.access_log, "access_log", &server.access_logs, &server.runtime)
        .at("admin")?;
    Ok(Listener::new(model, server).at("admin")?)
}

/// For who asks which base id was taken; here it is the one that was given, and tells nobody apart.
fn write_base_id(options: &Options) {
    if let Some(path) = &options.base_id_path
        && std::fs::write(path, options.base_id.to_string()).is_err()
    {
        let path = path.display();
        sampan_core::log!(
            Component::Misc,
            Level::Critical,
            "cannot open base id output file {path} for writing."
        );
    }
}

async fn serve(options: &Options) -> Result<(), BootError> {
    write_base_id(options);
    let boot = boot::load(options)?;
    let model = admin_model(&boot)?;
    let count = options.concurrency.unwrap_or_else(hardware_threads).max(1) as usize;
    let mut bound = Vec::with_capacity(boot.listeners.len());
    for listener in &boot.listeners {
        bound.push(Bound::bind(listener.clone(), count)?);
    }
    let (commands, mut inbox) = mpsc::unbounded_channel();
    let stats = ServerStats::new(&boot.server.stats, count as u64);
    stats.concurrency.set(count as u64);
    stats.static_unknown_fields.add(boot.unknown_fields as u64);
    stats.version.set(boot.bootstrap.stats_server_version_override.map_or(0, |version| version.value));
    let workers = Workers::default();
    let listeners = ListenerManager::new(&boot.server, workers.clone(), count, options, bound);
    for _ in boot.listeners.len()..boot.parts.listeners.len() {
        listeners.stats.modified.inc();
    }
    let process = Rc::new(Process {
        options: options.clone(),
        stats,
        listeners: Rc::new(listeners),
        drain: boot.server.drain.clone(),
        boot,
        started: Instant::now(),
        started_at: std::time::SystemTime::now(),
        clusters_ready: Cell::new(false),
        live: Cell::new(false),
        failed: Cell::new(false),
        commands,
        xds: OnceCell::new(),
        asked_to_go: Cell::default(),
        workers,
    });
    process.read_flags();
    start_admin(&process, model)?;
    if options.mode == Mode::InitOnly {
        return Ok(());
    }
    watch_signals(&process)?;
    if let Some(overload) = process.boot.overload.take() {
        crate::overload::start(overload);
    }
    start_workers(&process, count)?;
    if !start_dynamic(&process, &mut inbox).await {
        finish(&process);
        return Ok(());
    }
    process.listeners.open().await?;
    process.live.set(true);
    process.stats.initialised(process.started.elapsed());
    tokio::task::spawn_local(give_back());
    sampan_core::log!(Component::Main, Level::Info, "starting main dispatch loop");
    main_loop(&process, inbox).await;
    finish(&process);
    Ok(())
}

/// How long a control plane usually needs to say all it has to say.
const SETTLED: Duration = Duration::from_secs(60);

/// Gives back what only the start needed: its own now, and what reading a control plane's first answers needed later.
async fn give_back() {
    for wait in [Duration::ZERO, SETTLED] {
        tokio::time::sleep(wait).await;
        match sampan_os::pages::release_program() {
            Ok(bytes) => {
                sampan_core::log!(
                    Component::Main,
                    Level::Debug,
                    "gave {bytes} bytes of the program's pages back"
                );
            }
            Err(error) => {
                sampan_core::log!(Component::Main, Level::Debug, "the program's pages stay: {error}");
            }
        }
    }
}

fn hardware_threads() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

fn start_admin(process: &Rc<Process>, model: AdminModel) -> Result<(), BootError> {
    let Some(listener) = admin_listener(&process.boot, &model)? else {
        sampan_core::log!(
            Component::Main,
            Level::Warn,
            "No admin address given, so no admin HTTP server started."
        );
        return Ok(());
    };
    let boot = &process.boot;
    let view = Rc::new(View::new(process.clone()));
    let admin = Admin::new(view, boot.server.stats.clone(), boot.server.runtime.clone(), model);
    let address = listener.serve(Rc::new(admin), boot.clusters.clusters())?;
    if let Some(path) = &process.options.admin_address_path {
        std::fs::write(path, address)
            .map_err(|e| BootError::System(format!("admin address path '{}'", path.display()), e))?;
    }
    Ok(())
}

fn start_workers(process: &Rc<Process>, count: usize) -> Result<(), BootError> {
    let mut workers = process.workers.borrow_mut();
    for id in 0..count as u32 {
        let boot = &process.boot;
        let clusters = boot.clusters.clusters();
        let worker = Handle::start(id, boot.server.clone(), clusters, process.drain.signal())
            .map_err(|e| BootError::System(format!("worker {id}"), e))?;
        workers.push(worker);
    }
    Ok(())
}

/// How long workers have to drop what is not served any more, before the control plane is told.
const LETTING_GO: Duration = Duration::from_millis(100);

/// Subscribes and waits; false: it was told to end meanwhile, and there is nothing to drain.
async fn start_dynamic(process: &Rc<Process>, inbox: &mut mpsc::UnboundedReceiver<Command>) -> bool {
    let mut started = std::pin::pin!(start_xds(process));
    loop {
        let command = tokio::select! {
            () = &mut started => return true,
            command = inbox.recv() => command,
        };
        match command {
            None | Some(Command::Quit | Command::Shutdown) => return false,
            Some(Command::DrainListeners(request)) => drain_listeners(process, request),
            Some(Command::ReopenLogs) => reopen_logs(process),
        }
    }
}

/// Subscribes; returns when all clusters are warm.
async fn start_xds(process: &Rc<Process>) {
    let boot = &process.boot;
    let flags = Flags {
        unknown: process.options.unknown_dynamic(),
        last_good: process.options.last_good_config_path.as_deref(),
    };
    let node = boot.bootstrap.node.clone().unwrap_or_default();
    let ready = || process.clusters_ready.set(true);
    let (clusters, server, listeners) = (&boot.clusters, &boot.server, &process.listeners);
    // Here before it is done: the admin interface shows what is awaited.
    let made = || Xds::new(&boot.xds, clusters, server, listeners, &node, &flags);
    process.xds.get_or_init(made).start(&boot.xds, clusters, server, listeners, ready).await;
    let mut replaced = boot.clusters.replaced();
    let process = process.clone();
    tokio::task::spawn_local(async move {
        loop {
            tokio::select! {
                changed = replaced.changed() => if changed.is_err() { return },
                () = process.listeners.drained() => {}
            }
            process.workers.borrow().iter().for_each(|worker| worker.order(Order::DropReplaced));
            // By then the workers have let go of what the listener or the cluster held.
            tokio::time::sleep(LETTING_GO).await;
            process.xds.get().into_iter().for_each(Xds::tidy);
        }
    });
}

fn watch_signals(process: &Rc<Process>) -> Result<(), BootError> {
    for (kind, name) in [
        (SignalKind::terminate(), "SIGTERM"),
        (SignalKind::interrupt(), "SIGINT"),
        (SignalKind::user_defined1(), "SIGUSR1"),
        (SignalKind::hangup(), "SIGHUP"),
    ] {
        let mut signals = signal(kind).map_err(|e| BootError::System(name.to_owned(), e))?;
        let commands = process.commands.clone();
        tokio::task::spawn_local(async move {
            while signals.recv().await.is_some() {
                sampan_core::log!(Component::Main, Level::Warn, "caught {name}");
                let command = match name {
                    "SIGUSR1" => Command::ReopenLogs,
                    "SIGHUP" => continue,
                    _ => Command::Shutdown,
                };
                // The main loop is gone only when the process is about to be.
                let _ = commands.send(command);
            }
        });
    }
    Ok(())
}

impl Process {
    /// Health checks fail from now on, or no longer.
    pub fn fail_health_check(&self, fail: bool) {
        self.failed.set(fail);
        self.boot.server.health_check_failed.store(fail, Ordering::Relaxed);
    }

    /// A file `drain` in `flags_path` has health checks fail from the start.
    fn read_flags(&self) {
        let folder = &self.boot.bootstrap.flags_path;
        if !folder.is_empty() && Path::new(folder).join("drain").exists() {
            sampan_core::log!(Component::Main, Level::Warn, "starting server in drain mode");
            self.fail_health_check(true);
        }
    }

    /// None: whoever asks for stats flushes them (`stats_flush_on_admin`).
    pub fn flush_interval(&self) -> Option<Duration> {
        let bootstrap = &self.boot.bootstrap;
        let configured = bootstrap.stats_flush_interval.as_ref().map(sampan_http::manager::duration);
        let interval = configured.unwrap_or(Duration::from_secs(5)).max(Duration::from_millis(1));
        bootstrap.stats_flush.is_none().then_some(interval)
    }
}

/// Never without an interval.
async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

async fn main_loop(process: &Rc<Process>, mut inbox: mpsc::UnboundedReceiver<Command>) {
    let mut flush = process.flush_interval().map(tokio::time::interval);
    let mut draining = false;
    loop {
        let command = tokio::select! {
            command = inbox.recv() => command,
            () = tick(&mut flush) => {
                process.boot.server.stats.flush();
                continue;
            }
            () = drained(process), if draining => return,
        };
        match command {
            None | Some(Command::Quit) => return,
            // A second wish to end does not wait.
            Some(Command::Shutdown) if draining => return,
            Some(Command::Shutdown) => {
                draining = true;
                process.drain.advance(Phase::Draining);
                process.listeners.stop(false);
            }
            Some(Command::DrainListeners(request)) => drain_listeners(process, request),
            Some(Command::ReopenLogs) => reopen_logs(process),
        }
    }
}

/// How long connections have to end themselves behind the deadline.
const CLOSING: Duration = Duration::from_millis(500);

/// Returns when nothing is in flight any more, or at the deadline.
async fn drained(process: &Process) {
    let deadline = process.options.drain_time;
    if tokio::time::timeout(deadline, process.drain.idle()).await.is_err() {
        let left = process.drain.active();
        sampan_core::log!(Component::Main, Level::Warn, "drain time is over with {left} connections open");
        process.drain.advance(Phase::Closing);
        // Each connection ends itself and accounts for what it carried. What does not goes with its worker.
        let _ = tokio::time::timeout(CLOSING, process.drain.idle()).await;
    }
}

fn drain_listeners(process: &Rc<Process>, request: DrainRequest) {
    if request.graceful {
        // What is asked of the same listeners twice is asked once, whatever was to follow.
        let widest = process.asked_to_go.get();
        if widest.is_some_and(|inbound_only| !inbound_only || request.inbound_only) {
            return;
        }
        process.asked_to_go.set(Some(request.inbound_only));
        process.listeners.leave(request.inbound_only);
        if request.skip_exit {
            return;
        }
        let process = process.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(process.options.drain_time).await;
            process.listeners.stop(request.inbound_only);
        });
    } else {
        process.listeners.stop(request.inbound_only);
    }
}

fn reopen_logs(process: &Process) {
    process.boot.server.access_logs.reopen();
    if let Err(error) = sampan_core::log::reopen() {
        sampan_core::log!(Component::Main, Level::Error, "cannot reopen the log: {error}");
    }
}

fn finish(process: &Process) {
    process.xds.get().into_iter().for_each(Xds::keep);
    for worker in process.workers.take() {
        worker.end();
    }
    process.boot.server.access_logs.flush();
    sampan_core::log!(Component::Main, Level::Info, "exiting");
}
