//! Fuzzing of what reads bytes from strangers: the HTTP/1 parser, the PROXY protocol, the substitution formatter.
//!
//! Each target takes seeds apart and puts them together in new ways for `FUZZ_SECONDS` (5 by default); nothing may
//! panic. The generator is seeded by `FUZZ_SEED` (the clock by default) and a failure prints seed and input, so that
//! it can be run again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime};

use sampan_core::format::{Extensions, Formatter};

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Bytes that parsers care about.
const INTERESTING: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"%",
    b"(",
    b")",
    b"?",
    b"=",
    b"chunked",
    b"0",
    b"-1",
    b"18446744073709551615",
    b"ffffffffffffffff",
    b"\xff\xff",
    b"\x7f",
    b"HTTP/1.1",
    b"HTTP/9.9",
];

fn mutate(random: &mut Random, seeds: &[&[u8]]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => {
                let end = at + random.below(bytes.len() - at + 1);
                bytes.drain(at..end);
            }
            2 => {
                let piece = INTERESTING[random.below(INTERESTING.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            3 => {
                let other = seeds[random.below(seeds.len())];
                let from = random.below(other.len() + 1);
                bytes.splice(at..at, other[from..].iter().copied());
            }
            4 => bytes.truncate(at),
            _ => bytes.insert(at, random.next() as u8),
        }
        bytes.truncate(16 * 1024);
    }
    bytes
}

/// Runs a target until the time is over; a panic fails with the input.
fn fuzz(seeds: &[&[u8]], target: impl Fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let seconds = number("FUZZ_SECONDS").unwrap_or(5);
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let seed = number("FUZZ_SEED").unwrap_or(clock);
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut runs = 0u64;
    while runs == 0 || Instant::now() < end {
        for _ in 0..100 {
            let input = mutate(&mut random, seeds);
            let outcome = catch_unwind(AssertUnwindSafe(|| target(&input)));
            assert!(outcome.is_ok(), "FUZZ_SEED={seed}, run {runs}: {}", input.escape_ascii());
            runs += 1;
        }
    }
    assert!(runs >= 100);
}

#[test]
fn http1() {
    let seeds: &[&[u8]] = &[
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /a?b=c HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nconnection: keep-alive, upgrade\r\n\r\nhello",
        b"POST / HTTP/1.0\r\nHost: [::1]:80\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n",
        b"GET http://u:p@a/b#c HTTP/1.1\r\nhost: x\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: a=b\r\n\r\nok",
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.0 204\r\n\r\n",
    ];
    fuzz(seeds, sampan_codec::h1::fuzz_parse);
}

#[test]
fn proxy_protocol() {
    let seeds: &[&[u8]] = &[
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 2000\r\nGET / HTTP/1.1\r\n",
        b"PROXY TCP6 ::1 fe80::1 65535 1\r\n",
        b"PROXY UNKNOWN\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\x03\xe8\x07\xd0",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x2b0123456789abcdef0123456789abcdef\0\x01\0\x02\x01\0\x04h2tt",
        b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
    ];
    fuzz(seeds, sampan_listener::fuzz_proxy_protocol);
}

#[test]
fn formatter() {
    let seeds: &[&[u8]] = &[
        b"[%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH):10% %PROTOCOL%\"",
        b"%RESPONSE_CODE% %RESPONSE_FLAGS% %DURATION% %COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%",
        b"%DYNAMIC_METADATA(a:b:c):5% %FILTER_STATE(k:PLAIN):3% %ENVIRONMENT(HOME)% %%",
        b"%DOWNSTREAM_PEER_CERT_V_START(%b %d %H:%M:%S %Y %Z)% %TRAILER(grpc-status)%",
    ];
    fuzz(seeds, |input| {
        let text = String::from_utf8_lossy(input);
        // The verdict does not matter here, only that there is one.
        let _ = Formatter::parse(&text, &Extensions::NONE);
    });
}
