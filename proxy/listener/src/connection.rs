//! A connection from accept to close, as one function of named phases:
//!
//! listener filters -> hand-off to the original destination's listener -> filter chain match -> TLS -> network
//! filters, of which the last one serves.
//!
//! A connection that has nothing to wait for before it is served becomes the serving future at once; the phases
//! before live in a box of their own that is gone while the connection is served.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use sampan_core::stream_info::{ConnectionInfo, ResponseFlag, StreamInfo};
use sampan_core::time::timeout;
use sampan_tls::Transport;
use tokio::task::spawn_local;

use crate::accept::{Open, WorkerListener};
use crate::chain::Match;
use crate::config::{FilterChain, ListenerConfig};
use crate::context::Worker;
use crate::filters::{Accepted, Step};
use crate::network::{Downstream, Held, TerminalFilter, Verdict, ended, log};
use crate::peek;

type Ready = (Arc<dyn TerminalFilter>, Downstream);

/// Starts a connection's task.
pub(crate) fn start(open: Open, transport: Transport, accepted: Accepted) {
    let listener = open.0.clone();
    let worker = listener.worker.clone();
    if !listener.config.filters.is_empty() {
        serve_after(Box::pin(filtered(open, transport, accepted, true)), worker);
        return;
    }
    let Some((chain, downstream)) = established(open, transport, accepted) else { return };
    let model = chain.of(&listener.config);
    if model.tls.is_some() || !model.filters.is_empty() {
        serve_after(Box::pin(secured(chain, downstream)), worker);
    } else if let Some(terminal) = model.terminal.clone() {
        let drain = downstream.drain.clone();
        spawn_local(drain.until_closing(terminal.serve(downstream, worker)));
    }
}

/// The phases before are dropped with their box as soon as the connection is served.
fn serve_after(setup: Pin<Box<impl Future<Output = Option<Ready>> + 'static>>, worker: Rc<Worker>) {
    spawn_local(async move {
        let ready = setup.await;
        if let Some((terminal, downstream)) = ready {
            let drain = downstream.drain.clone();
            drain.until_closing(terminal.serve(downstream, worker)).await;
        }
    });
}

/// Which chain serves. `Default` is given only for a listener that has one.
#[derive(Clone, Copy)]
enum Chain {
    Index(usize),
    Default,
}

impl Chain {
    fn of(self, config: &ListenerConfig) -> &FilterChain {
        match (self, &config.default_chain) {
            (Self::Default, Some(chain)) => chain,
            (Self::Default, None) => &config.chains[0],
            (Self::Index(index), _) => &config.chains[index],
        }
    }
}

/// All phases of a connection that has listener filters.
async fn filtered(
    open: Open,
    transport: Transport,
    mut accepted: Accepted,
    may_hand_off: bool,
) -> Option<Ready> {
    let config = open.0.config.clone();
    let counters = &config.stats.counters;
    let outcome = {
        let _pre = Pre::new(&config);
        let filters = listener_filters(&open, &transport, &mut accepted);
        match config.filters_timeout {
            None => Ok(filters.await),
            Some(limit) => timeout(limit, filters).await,
        }
    };
    let transport = match outcome {
        Ok(true) => transport,
        Ok(false) => return refused(&config, accepted.info, |_| {}),
        Err(_elapsed) => {
            counters.downstream_pre_cx_timeout.inc();
            if !config.continue_on_timeout {
                return refused(&config, accepted.info, |_| {});
            }
            peek::rearm(transport).ok()?
        }
    };
    if may_hand_off && let Some(target) = hand_off(&open, &accepted) {
        return Box::pin(filtered(open.handed_to(&target), transport, accepted, false)).await;
    }
    let (chain, downstream) = established(open, transport, accepted)?;
    secured(chain, downstream).await
}

/// Counts a connection that is not established yet.
struct Pre<'a>(&'a ListenerConfig);

impl<'a> Pre<'a> {
    fn new(config: &'a ListenerConfig) -> Self {
        config.stats.counters.downstream_pre_cx_active.inc();
        Self(config)
    }
}

impl Drop for Pre<'_> {
    fn drop(&mut self) {
        self.0.stats.counters.downstream_pre_cx_active.dec();
    }
}

/// Runs the listener filters; false: the connection is to be closed.
async fn listener_filters(open: &Open, transport: &Transport, accepted: &mut Accepted) -> bool {
    let counters = &open.0.config.stats.counters;
    let scratch = &open.0.all.scratch;
    for entry in &open.0.config.filters {
        let Some(filter) = entry.filter() else {
            counters.extension_config_missing.inc();
            return false;
        };
        if !entry.applies(&accepted.info) || !filter.on_accept(transport, accepted) {
            continue;
        }
        let mut seen = 0;
        loop {
            match peek::more(transport, seen, filter.max_bytes(), scratch).await {
                Ok(0) => {
                    counters.downstream_listener_filter_remote_close.inc();
                    return false;
                }
                Ok(n) => seen = n,
                Err(_) => {
                    counters.downstream_listener_filter_error.inc();
                    return false;
                }
            }
            let step = filter.on_data(&scratch.borrow()[..seen], accepted);
            match step {
                Step::More => {}
                Step::Close => return false,
                Step::Done { consume } => {
                    if peek::consume(transport, consume, scratch).is_err() {
                        counters.downstream_listener_filter_error.inc();
                        return false;
                    }
                    break;
                }
            }
        }
    }
    true
}

/// `use_original_dst`: the listener of the restored address takes the connection over, once.
fn hand_off(open: &Open, accepted: &Accepted) -> Option<Rc<WorkerListener>> {
    if !open.0.config.use_original_dst || !accepted.info.local_restored {
        return None;
    }
    let target = open.0.all.by_address(&accepted.info.local)?;
    (!Rc::ptr_eq(&target, &open.0)).then_some(target)
}

/// Finds the filter chain and counts the connection.
fn established(open: Open, transport: Transport, accepted: Accepted) -> Option<(Chain, Downstream)> {
    let config = &open.0.config;
    let Accepted { mut info, metadata } = accepted;
    let chain = match config.matcher.find(&info) {
        Match::Chain(index) => Chain::Index(index),
        Match::Nothing if config.default_chain.is_some() => Chain::Default,
        Match::Nothing | Match::Nobody => {
            config.stats.counters.no_filter_chain_match.inc();
            return refused(config, info, |stream| {
                stream.flags.set(ResponseFlag::NoRouteFound);
                stream.details = Some("filter_chain_not_found".into());
            });
        }
    };
    info.listener = config.name.clone();
    info.filter_chain = chain.of(config).name.clone();
    let drain = chain.of(config).drain.signal();
    let mut downstream = Downstream {
        buffer_limit: config.buffer_limit,
        transport,
        metadata: (!metadata.is_empty()).then(|| Box::new(metadata)),
        held: Held::new(open, drain.guard(), info.start),
        info: Rc::new(info),
        refusal: None,
        over: false,
        drain,
    };
    downstream.held.log_at_end(&downstream.info);
    Some((chain, downstream))
}

/// Writes to the listener's access log of a connection that is closed before it was established.
fn refused<T>(
    config: &ListenerConfig,
    info: ConnectionInfo,
    more: impl FnOnce(&mut StreamInfo),
) -> Option<T> {
    if !config.access_log.is_empty() {
        let mut stream = ended(Rc::new(info));
        more(&mut stream);
        log(config, &stream);
    }
    None
}

/// Ends TLS and runs the filters before the last.
async fn secured(chain: Chain, mut downstream: Downstream) -> Option<Ready> {
    let worker = downstream.held.open.0.worker.clone();
    let config = downstream.held.open.0.config.clone();
    let chain = chain.of(&config);
    if let Some(tls) = &chain.tls {
        let handshake = tls.accept(downstream.transport);
        let done = match chain.connect_timeout {
            None => handshake.await,
            Some(limit) => match timeout(limit, handshake).await {
                Ok(done) => done,
                Err(_elapsed) => {
                    config.stats.counters.downstream_cx_transport_socket_connect_timeout.inc();
                    let mut info = ended(downstream.info.clone());
                    info.termination_details = Some("transport socket timeout was reached".into());
                    info.downstream_local_close_reason = Some("transport_socket_timeout".into());
                    downstream.held.log(&info);
                    return None;
                }
            },
        };
        let info = Rc::make_mut(&mut downstream.info);
        match done {
            Ok((transport, tls)) => {
                downstream.transport = transport;
                info.tls = Some(Rc::new(tls));
                info.handshake_done = Some(Instant::now());
            }
            Err(failure) => {
                info.transport_failure = Some(failure.0);
                downstream.held.log_at_end(&downstream.info);
                return None;
            }
        }
        downstream.held.log_at_end(&downstream.info);
    }
    for filter in &chain.filters {
        let verdict = filter.on_new_connection(&mut downstream, &worker).await;
        downstream.held.observed(&downstream.info);
        match verdict {
            Verdict::Continue => {}
            Verdict::Close => return None,
            Verdict::Over => {
                downstream.over = true;
                break;
            }
        }
    }
    let terminal = chain.terminal.clone()?;
    if downstream.over && !terminal.serves_refused() {
        return None;
    }
    if let Some(refusal) = &downstream.refusal
        && !terminal.serves_refused()
    {
        refusal.in_force(&mut downstream.transport, false).await;
        return None;
    }
    Some((terminal, downstream))
}
