//! What a connection's frames tell: floods, resets, and how many bytes each stream has had on the wire.
//!
//! The crate `h2` answers for the protocol; it does not tell which flood ended a connection, nor what a stream
//! weighed. [`Wire`] is fed the heads of all frames by the transport that the crate reads and writes through
//! ([`super::guard`]) and keeps Envoy's books:
//!
//! - **Floods.** Envoy's `ProtocolConstraints`: frames without payload in a row, PRIORITY frames per stream opened,
//!   WINDOW_UPDATE frames per DATA frame sent; and the codec's own, settings per SETTINGS frame. The frame that
//!   breaks a limit is not given to the codec any more; whoever drives the connection asks for [`Wire::flood`] and
//!   ends it. Queues of outbound frames (`max_outbound_frames`, `max_outbound_control_frames`) need no limit: the
//!   crate reads nothing while it cannot write, so that a peer who does not read its answers cannot ask for more of them.
//! - **Meters.** A stream has one from its first HEADERS until whoever serves it takes it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::scan::{Head, kind};
use super::stats::CodecStats;
use crate::error::ResetReason;

const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 7;
/// How many settings a frame may hold, and their size (`nghttp2`'s limit).
const MAX_SETTINGS: u32 = 32;
const SETTING: u32 = 6;
/// How many streams may come before those that came are served: else a client that opens and resets them could make
/// the crate hold thousands at once.
const MAX_FRESH: u32 = 64;

/// Envoy's limits on what a peer may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// `max_consecutive_inbound_frames_with_empty_payload`
    pub empty_frames: u32,
    /// `max_inbound_priority_frames_per_stream`
    pub priority_per_stream: u32,
    /// `max_inbound_window_update_frames_per_data_frame_sent`
    pub window_updates_per_data: u32,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self { empty_frames: 1, priority_per_stream: 100, window_updates_per_data: 10 }
    }
}

/// A limit that the peer broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// Frames without payload in a row.
    EmptyFrames,
    /// PRIORITY.
    Priority,
    /// WINDOW_UPDATE.
    WindowUpdate,
    /// Settings of one frame.
    Settings,
}

impl Flood {
    /// The response code details of the streams it ends.
    pub fn details(self) -> &'static str {
        match self {
            Self::EmptyFrames => "http2.inbound_empty_frames_flood",
            Self::Priority => "codec_error:Too_many_PRIORITY_frames",
            Self::WindowUpdate => "codec_error:Too_many_WINDOW_UPDATE_frames",
            Self::Settings => "codec_error:The_user_callback_function_failed",
        }
    }
}

/// What a stream has had on the wire so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Meter {
    /// Bytes of all frames received.
    pub received: u64,
    /// Bytes of all frames sent.
    pub sent: u64,
    /// Of these, HEADERS and CONTINUATION.
    pub header_received: u64,
    /// See `header_received`.
    pub header_sent: u64,
    /// Our side has ended: END_STREAM or RST_STREAM was sent.
    pub ended: bool,
    /// How the peer has reset the stream.
    pub reset_by_peer: Option<ResetReason>,
    /// The peer's side has ended: END_STREAM or RST_STREAM came.
    ended_by_peer: bool,
    /// Of these, the last head or trailers.
    last_head: u64,
    /// Data that was handed to the codec and not yet sent.
    pending: u64,
    /// Somebody serves the stream and will take the meter.
    taken_on: bool,
}

/// Stream ids spread well enough as they are.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 << 8) | u64::from(*byte);
        }
    }

    fn write_u32(&mut self, id: u32) {
        self.0 = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[derive(Default)]
struct State {
    streams: HashMap<u32, Meter, BuildHasherDefault<IdHasher>>,
    highest: u32,
    /// Streams that came since the codec last had none to hand out.
    fresh: u32,
    opened: u64,
    empty: u32,
    priority: u64,
    window_updates: u64,
    data_sent: u64,
    pending: u64,
    pending_shown: u64,
}

/// The books of one connection.
pub struct Wire {
    stats: Arc<CodecStats>,
    limits: FrameLimits,
    server: bool,
    max_streams: usize,
    state: RefCell<State>,
    flood: Cell<Option<Flood>>,
    frames: Cell<u64>,
    /// The first stream that was turned away for what it sent.
    malformed: Cell<Option<u32>>,
    /// Those that the codec reset before it handed them out. Where it was the head that was wrong it never will.
    unseen: RefCell<Vec<u32>>,
    told_to_go: Cell<bool>,
    closed_by_peer: Cell<bool>,
}

impl Wire {
    pub(super) fn new(stats: Arc<CodecStats>, limits: FrameLimits, server: bool, max_streams: u32) -> Self {
        Self {
            stats,
            limits,
            server,
            // Streams that the codec refuses or ignores have a meter for a while too.
            max_streams: 2 * max_streams as usize + 256,
            state: RefCell::default(),
            flood: Cell::new(None),
            frames: Cell::new(0),
            malformed: Cell::new(None),
            unseen: RefCell::default(),
            told_to_go: Cell::default(),
            closed_by_peer: Cell::default(),
        }
    }

    /// The first stream whose message was malformed.
    pub(super) fn malformed(&self) -> Option<u32> {
        self.malformed.get().into_iter().chain(self.unseen.borrow().iter().copied()).min()
    }

    /// How many streams the codec has reset for their heads since this was last asked. To be asked when the codec has
    /// none left to hand out.
    pub(super) fn take_unseen(&self) -> usize {
        let unseen = self.unseen.take();
        for id in &unseen {
            self.note_malformed(*id);
            self.close(*id);
        }
        unseen.len()
    }

    /// Whether the peer has sent GOAWAY.
    pub(super) fn is_told_to_go(&self) -> bool {
        self.told_to_go.get()
    }

    /// The peer has closed its side.
    pub(super) fn note_closed(&self) {
        self.closed_by_peer.set(true);
    }

    /// Whether the peer has left and owes the end of a stream.
    pub(super) fn is_cut_off(&self) -> bool {
        self.closed_by_peer.get() && self.state.borrow().streams.values().any(|meter| !meter.ended_by_peer)
    }

    /// How many streams have come that nobody serves.
    pub(super) fn unserved(&self) -> usize {
        self.state.borrow().streams.values().filter(|meter| !meter.taken_on).count()
    }

    /// A stream's message is malformed.
    pub(super) fn note_malformed(&self, id: u32) {
        self.stats.rx_messaging_error.inc();
        self.malformed.set(Some(self.malformed.get().map_or(id, |first| first.min(id))));
    }

    /// The codec's stats.
    pub fn stats(&self) -> &CodecStats {
        &self.stats
    }

    /// The limit that the peer broke.
    pub fn flood(&self) -> Option<Flood> {
        self.flood.get()
    }

    /// How many frames have come, answers to pings left out: a sign of life.
    pub fn frames_received(&self) -> u64 {
        self.frames.get()
    }

    /// How many streams were opened.
    pub(super) fn opened(&self) -> u64 {
        self.state.borrow().opened
    }

    /// The last stream that the peer has opened.
    pub(super) fn highest(&self) -> u32 {
        self.state.borrow().highest
    }

    /// A stream that the client opened.
    pub(super) fn open(&self, id: u32) {
        let mut state = self.state.borrow_mut();
        state.opened += 1;
        state.streams.insert(id, Meter { taken_on: true, ..Meter::default() });
        self.stats.streams_active.inc();
    }

    /// Somebody serves the stream from now on.
    pub(super) fn take_on(&self, id: u32) {
        if let Some(meter) = self.state.borrow_mut().streams.get_mut(&id) {
            meter.taken_on = true;
        }
        self.unseen.borrow_mut().retain(|unseen| *unseen != id);
    }

    /// Whether so many streams have come that they should be looked at before more is read.
    pub(super) fn is_full(&self) -> bool {
        self.state.borrow().fresh >= MAX_FRESH
    }

    /// All streams that came were handed out.
    pub(super) fn drained(&self) {
        self.state.borrow_mut().fresh = 0;
    }

    /// The stream's meter as it stands.
    pub fn meter(&self, id: u32) -> Meter {
        self.state.borrow().streams.get(&id).copied().unwrap_or(Meter { ended: true, ..Meter::default() })
    }

    /// The last head breaks a limit: it does not count.
    pub(super) fn refuse_head(&self, id: u32) {
        if let Some(meter) = self.state.borrow_mut().streams.get_mut(&id) {
            let bytes = std::mem::take(&mut meter.last_head);
            meter.received -= bytes;
            meter.header_received -= bytes;
        }
    }

    /// The stream is over; its meter goes.
    pub fn close(&self, id: u32) -> Meter {
        let mut state = self.state.borrow_mut();
        self.remove(&mut state, id).unwrap_or_default()
    }

    fn remove(&self, state: &mut State, id: u32) -> Option<Meter> {
        let meter = state.streams.remove(&id)?;
        state.pending -= meter.pending;
        self.stats.streams_active.dec();
        Some(meter)
    }

    /// Data was handed to the codec.
    pub(super) fn queued(&self, id: u32, bytes: usize) {
        let mut state = self.state.borrow_mut();
        if let Some(meter) = state.streams.get_mut(&id) {
            meter.pending += bytes as u64;
            state.pending += bytes as u64;
        }
    }

    /// How much of that the codec still has.
    pub(super) fn pending(&self, id: u32) -> u64 {
        self.state.borrow().streams.get(&id).map_or(0, |meter| meter.pending)
    }

    /// Shows in the stats what has piled up; called when the connection waits.
    pub(super) fn settle(&self) {
        let mut state = self.state.borrow_mut();
        if state.pending != state.pending_shown {
            self.stats.pending_send_bytes.add(state.pending);
            self.stats.pending_send_bytes.sub(state.pending_shown);
            state.pending_shown = state.pending;
        }
    }

    /// A frame from the peer; whether the codec may see it.
    pub(super) fn received(&self, head: &Head) -> bool {
        if self.flood.get().is_some() {
            return false;
        }
        if !head.is_pong() {
            self.frames.set(self.frames.get() + 1);
        }
        let state = &mut *self.state.borrow_mut();
        let flood = match head.kind {
            kind::DATA | kind::HEADERS | kind::CONTINUATION => {
                if head.payload() > 0 || head.ends_stream() {
                    state.empty = 0;
                } else {
                    state.empty += 1;
                }
                (state.empty > self.limits.empty_frames).then_some(Flood::EmptyFrames)
            }
            kind::PRIORITY => {
                state.priority += 1;
                let most = u64::from(self.limits.priority_per_stream) * (1 + state.opened);
                (state.priority > most).then_some(Flood::Priority)
            }
            kind::WINDOW_UPDATE => {
                state.window_updates += 1;
                let per_data = u64::from(self.limits.window_updates_per_data) * state.data_sent;
                (state.window_updates > 5 + 2 * (state.opened + per_data)).then_some(Flood::WindowUpdate)
            }
            kind::SETTINGS => (head.length > MAX_SETTINGS * SETTING).then_some(Flood::Settings),
            kind::GOAWAY => {
                self.told_to_go.set(true);
                None
            }
            _ => None,
        };
        if let Some(flood) = flood {
            match flood {
                Flood::EmptyFrames => self.stats.inbound_empty_frames_flood.inc(),
                Flood::Priority => self.stats.inbound_priority_frames_flood.inc(),
                Flood::WindowUpdate => self.stats.inbound_window_update_frames_flood.inc(),
                // It is no flood of Envoy's own.
                Flood::Settings => {}
            }
            self.flood.set(Some(flood));
            return false;
        }
        if head.stream != 0 {
            self.meter_received(state, head);
        }
        true
    }

    fn meter_received(&self, state: &mut State, head: &Head) {
        let new = self.server
            && head.kind == kind::HEADERS
            && head.stream > state.highest
            && state.streams.len() < self.max_streams;
        if new {
            state.highest = head.stream;
            state.fresh += 1;
            state.opened += 1;
            state.streams.insert(head.stream, Meter::default());
            self.stats.streams_active.inc();
        }
        let Some(meter) = state.streams.get_mut(&head.stream) else { return };
        meter.ended_by_peer |= head.ends_stream();
        match head.kind {
            kind::DATA => meter.received += head.wire(),
            kind::HEADERS => {
                meter.received += head.wire();
                meter.header_received += head.wire();
                meter.last_head = head.wire();
                if self.server && !new {
                    self.stats.trailers.inc();
                }
            }
            // Envoy counts a head's frames as one.
            kind::CONTINUATION => {
                meter.received += u64::from(head.length);
                meter.header_received += u64::from(head.length);
                meter.last_head += u64::from(head.length);
            }
            kind::RST_STREAM => {
                meter.received += head.wire();
                meter.ended_by_peer = true;
                meter.reset_by_peer = Some(match head.code {
                    PROTOCOL_ERROR => ResetReason::ProtocolError,
                    REFUSED_STREAM => ResetReason::RemoteRefused,
                    _ => ResetReason::RemoteReset,
                });
                self.stats.rx_reset.inc();
            }
            _ => {}
        }
    }

    /// A frame to the peer.
    pub(super) fn sent(&self, head: &Head) {
        if head.stream == 0 {
            return;
        }
        let state = &mut *self.state.borrow_mut();
        if head.kind == kind::RST_STREAM {
            self.stats.tx_reset.inc();
        }
        let Some(meter) = state.streams.get_mut(&head.stream) else { return };
        meter.sent += head.wire();
        meter.ended |= head.ends_stream();
        match head.kind {
            kind::DATA => {
                state.data_sent += 1;
                let payload = u64::from(head.payload()).min(meter.pending);
                meter.pending -= payload;
                state.pending -= payload;
            }
            kind::HEADERS | kind::CONTINUATION => meter.header_sent += head.wire(),
            kind::RST_STREAM => {
                meter.ended = true;
                if !meter.taken_on {
                    // The codec turned it away by itself.
                    if head.code == REFUSED_STREAM {
                        self.stats.stream_refused_errors.inc();
                        self.remove(state, head.stream);
                    } else {
                        self.unseen.borrow_mut().push(head.stream);
                    }
                }
            }
            _ => {}
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        self.stats.pending_send_bytes.sub(state.pending_shown);
        for _ in 0..state.streams.len() {
            self.stats.streams_active.dec();
        }
    }
}

#[cfg(test)]
mod tests;
