use sampan_core::stats::Store;

use super::super::scan::Scanner;
use super::*;

struct Peer {
    wire: Wire,
    inbound: Scanner,
    outbound: Scanner,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

impl Peer {
    fn new(limits: FrameLimits) -> Self {
        let stats = Arc::new(CodecStats::new(&Store::new().root()));
        let wire = Wire::new(stats, limits, true, 100);
        Self { wire, inbound: Scanner::default(), outbound: Scanner::default() }
    }

    /// Whether the frame was let through.
    fn receive(&mut self, frame: &[u8]) -> bool {
        self.inbound.scan(frame, |head| self.wire.received(head)).is_none()
    }

    fn send(&mut self, frame: &[u8]) {
        self.outbound.scan(frame, |head| {
            self.wire.sent(head);
            true
        });
    }
}

const END_STREAM: u8 = 1;

#[test]
fn frames_without_payload_in_a_row_are_a_flood() {
    let mut peer = Peer::new(FrameLimits { empty_frames: 2, ..FrameLimits::default() });
    let empty = frame(kind::DATA, 0, 1, b"");
    assert!(peer.receive(&frame(kind::HEADERS, 4, 1, b"x")));
    assert!(peer.receive(&empty) && peer.receive(&empty));
    assert!(peer.receive(&frame(kind::DATA, 0, 1, b"x")), "the row is broken");
    assert!(peer.receive(&empty) && peer.receive(&empty));
    assert!(peer.receive(&frame(kind::DATA, END_STREAM, 1, b"")), "an end is no flood");
    assert!(peer.receive(&empty) && peer.receive(&empty) && !peer.receive(&empty));
    assert_eq!(peer.wire.flood(), Some(Flood::EmptyFrames));
    assert_eq!(peer.wire.stats().inbound_empty_frames_flood.value(), 1);
}

#[test]
fn padding_is_no_payload() {
    let mut peer = Peer::new(FrameLimits::default());
    let padded = frame(kind::DATA, 8, 1, &[3, 0, 0, 0]);
    assert!(peer.receive(&padded) && !peer.receive(&padded));
}

/// CVE-2020-11080
#[test]
fn more_settings_than_a_frame_may_hold() {
    let mut peer = Peer::new(FrameLimits::default());
    assert!(peer.receive(&frame(kind::SETTINGS, 0, 0, &[0; 32 * 6])));
    assert!(!peer.receive(&frame(kind::SETTINGS, 0, 0, &[0; 33 * 6])));
    assert_eq!(peer.wire.flood(), Some(Flood::Settings));
}

#[test]
fn priorities_and_window_updates_have_budgets_that_streams_raise() {
    let limits = FrameLimits { priority_per_stream: 2, ..FrameLimits::default() };
    let mut peer = Peer::new(limits);
    let priority = frame(kind::PRIORITY, 0, 1, &[0; 5]);
    assert!(peer.receive(&priority) && peer.receive(&priority));
    assert!(peer.receive(&frame(kind::HEADERS, 4, 1, b"x")));
    assert!(peer.receive(&priority) && peer.receive(&priority) && !peer.receive(&priority));
    assert_eq!(peer.wire.flood(), Some(Flood::Priority));

    let mut peer = Peer::new(limits);
    let update = frame(kind::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
    assert!((0..5).all(|_| peer.receive(&update)));
    assert!(!peer.receive(&update));
    assert_eq!(peer.wire.flood(), Some(Flood::WindowUpdate));
}

#[test]
fn a_stream_has_its_frames_bytes() {
    let mut peer = Peer::new(FrameLimits::default());
    peer.receive(&frame(kind::HEADERS, 0, 1, b"12345"));
    peer.receive(&frame(kind::CONTINUATION, 4, 1, b"678"));
    peer.wire.take_on(1);
    peer.receive(&frame(kind::DATA, 0, 1, b"body"));
    peer.send(&frame(kind::HEADERS, 4, 1, b"12"));
    peer.wire.queued(1, 3);
    peer.wire.settle();
    assert_eq!(peer.wire.stats().pending_send_bytes.value(), 3);
    assert!(!peer.wire.meter(1).ended);
    peer.send(&frame(kind::DATA, END_STREAM, 1, b"abc"));
    peer.wire.settle();
    assert_eq!(peer.wire.stats().pending_send_bytes.value(), 0);
    let meter = peer.wire.close(1);
    assert!(meter.ended);
    assert_eq!((meter.received, meter.header_received), (17 + 13, 17));
    assert_eq!((meter.sent, meter.header_sent), (11 + 12, 11));
    assert_eq!(peer.wire.stats().streams_active.value(), 0);
}

#[test]
fn streams_that_the_codec_turns_away_leave_no_meter() {
    let mut peer = Peer::new(FrameLimits::default());
    peer.receive(&frame(kind::HEADERS, 4, 1, b"x"));
    peer.receive(&frame(kind::HEADERS, 4, 3, b"x"));
    assert_eq!(peer.wire.stats().streams_active.value(), 2);
    peer.send(&frame(kind::RST_STREAM, 0, 1, &[0, 0, 0, 7]));
    peer.send(&frame(kind::RST_STREAM, 0, 3, &[0, 0, 0, 1]));
    assert_eq!((peer.wire.malformed(), peer.wire.take_unseen(), peer.wire.take_unseen()), (Some(3), 1, 0));
    let stats = peer.wire.stats();
    assert_eq!(stats.streams_active.value(), 0);
    assert_eq!((stats.stream_refused_errors.value(), stats.rx_messaging_error.value()), (1, 1));
}
