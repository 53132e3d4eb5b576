//! Fuzzing of what reads bytes from strangers: HTTP/1's heads and chunks, HTTP/2's frames and heads, what listener
//! filters look at, the PROXY protocol, the substitution formatter, tokens and their keys; and of the file of the last good
//! configuration.
//!
//! Each target takes seeds apart and puts them together in new ways for `FUZZ_SECONDS` (5 by default). Nothing may
//! panic, and what was read of a part must hold for the whole. A target tells what it did, and an input with a new
//! outcome becomes a seed: that leads the search without instrumented code, which libFuzzer would need (of every
//! crate, in a build of its own, and with a C++ compiler). The generator is seeded by `FUZZ_SEED` (the clock by default) and a failure prints seed and input, so that
//! it can be run again.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime};

use sampan_config::last_good::{KeptResource, LastGood, LastGoodError, Subscription, seal};
use sampan_core::format::{Extensions, Formatter};
use sampan_http::jwt::{Jwks, Jwt};

/// So many inputs are kept as seeds.
const MAX_SEEDS: usize = 2000;

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

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
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
                let other = &seeds[random.below(seeds.len())];
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

/// Runs a target until the time is over; a panic fails with the input. The target is given a place to cut the input at
/// and tells by a number what it did: an input that did something new is a seed from then on.
fn fuzz(seeds: &[&[u8]], target: impl Fn(&[u8], usize) -> u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let seconds = number("FUZZ_SECONDS").unwrap_or(5);
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let seed = number("FUZZ_SEED").unwrap_or(clock);
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seeds: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.to_vec()).collect();
    let mut outcomes: HashSet<u64> = seeds.iter().map(|seed| target(seed, seed.len())).collect();
    let mut runs = 0u64;
    while runs == 0 || Instant::now() < end {
        for _ in 0..100 {
            let input = mutate(&mut random, &seeds);
            let cut = random.below(input.len() + 1);
            let outcome = catch_unwind(AssertUnwindSafe(|| target(&input, cut)));
            let Ok(outcome) = outcome else {
                panic!("FUZZ_SEED={seed}, run {runs}, cut at {cut}: {}", input.escape_ascii());
            };
            if seeds.len() < MAX_SEEDS && outcomes.insert(outcome) {
                seeds.push(input);
            }
            runs += 1;
        }
    }
    assert!(runs >= 100 && outcomes.len() > 1, "{runs} runs, {} outcomes", outcomes.len());
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
fn http1_chunks() {
    let seeds: &[&[u8]] = &[
        b"5\r\nhello\r\n0\r\n\r\n",
        b"1;a=b\r\nx\r\n00\r\nx: y\r\nz: 1\r\n\r\n",
        b"a ;x\r\n0123456789\n1\r\n.\r\n0\r\n\r\nGET / HTTP/1.1\r\n",
        b"ffffffffffffffff\r\n",
    ];
    fuzz(seeds, |input, _| sampan_codec::h1::fuzz_chunks(input));
}

#[test]
fn http2_heads() {
    let seeds: &[&[u8]] = &[
        b"GET\nhttp://a/b?c\n\nx:y\ncookie:a=b\ncookie:c=d",
        b"CONNECT\na:443\n\nhost:a",
        b"CONNECT\nhttps://a/chat\nwebsocket\nsec-websocket-version:13\nx_y:z",
        b"POST\n/only/path\n\nhost:b\nte:trailers\ncontent-length:5\nx-request-id:1",
    ];
    fuzz(seeds, |input, _| sampan_codec::h2::fuzz_head(input));
}

#[test]
fn http2_frames() {
    let seeds: &[&[u8]] = &[
        b"\0\0\0\x04\0\0\0\0\0\0\0\x06\x01\x05\0\0\0\x01\x82\x84\x86A\x01a",
        b"\0\0\x03\0\x08\0\0\0\x01\x02\0\0\0\0\x01\0\x01\0\0\0\x01x",
        b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08\0\0\x08\x06\x01\0\0\0\0\x0001234567",
        b"\0\0\x04\x08\0\0\0\0\0\0\0\0\x01\0\0\x05\x02\0\0\0\0\x01\0\0\0\0\x10",
    ];
    fuzz(seeds, sampan_codec::h2::fuzz_frames);
}

#[test]
fn tls_inspector() {
    let mut hello = b"\x03\x0301234567890123456789012345678901\0\0\x02\x13\x01\x01\0".to_vec();
    let name = b"\0\0\0\x0b\0\x09\0\0\x06a.test";
    let alpn = b"\0\x10\0\x0e\0\x0c\x02h2\x08http/1.1";
    hello.extend(((name.len() + alpn.len()) as u16).to_be_bytes());
    hello.extend(name.iter().chain(alpn));
    let mut message = vec![1, 0, 0, hello.len() as u8];
    message.extend(&hello);
    let record = |payload: &[u8]| [&[22, 3, 1, 0, payload.len() as u8], payload].concat();
    let whole = record(&message);
    let split = [record(&message[..7]), record(&message[7..])].concat();
    fuzz(&[&whole, &split, b"\x15\x03\x03\0\x02\x02\x28"], sampan_listener::fuzz_tls_inspector);
}

#[test]
fn http_inspector() {
    let seeds: &[&[u8]] = &[
        b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"CONNECT a:1 HTTP/1.0\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /old\r\n",
    ];
    fuzz(seeds, sampan_listener::fuzz_http_inspector);
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
    fuzz(seeds, |input, _| sampan_listener::fuzz_proxy_protocol(input));
}

#[test]
fn formatter() {
    let seeds: &[&[u8]] = &[
        b"[%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH):10% %PROTOCOL%\"",
        b"%RESPONSE_CODE% %RESPONSE_FLAGS% %DURATION% %COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%",
        b"%DYNAMIC_METADATA(a:b:c):5% %FILTER_STATE(k:PLAIN):3% %ENVIRONMENT(HOME)% %%",
        b"%DOWNSTREAM_PEER_CERT_V_START(%b %d %H:%M:%S %Y %Z)% %TRAILER(grpc-status)%",
    ];
    fuzz(seeds, |input, _| match Formatter::parse(&String::from_utf8_lossy(input), &Extensions::NONE) {
        Ok(_) => 0,
        // Which mistake it was, without the text that it names.
        Err(error) => 1 + error.to_string().bytes().take(12).map(u64::from).sum::<u64>(),
    });
}

/// The header refuses nearly everything, so that each input is tried with a true one too.
#[test]
fn last_good() {
    let resource = |value: &'static [u8]| KeptResource { version: "1".into(), value: value.into() };
    let subscription = |name: &str, resources| Subscription {
        source: "ads".into(),
        type_url: "type.googleapis.com/a.B".into(),
        name: name.into(),
        version: "2".into(),
        resources,
    };
    let subscriptions =
        vec![subscription("", vec![resource(b"x"), resource(b"")]), subscription("a", Vec::new())];
    let whole = LastGood { node_id: "n".into(), node_cluster: "c".into(), saved_at: 1, subscriptions };
    let empty = LastGood { node_id: "n".into(), node_cluster: "c".into(), ..LastGood::default() };
    fuzz(&[&whole.write(), &empty.write(), b"SampanLG"], |input, _| {
        let read = |file: &[u8]| LastGood::read(file.to_vec().into(), "n", "c");
        let mut sealed = input.to_vec();
        seal(&mut sealed);
        let results = [read(input), read(&sealed)];
        for kept in results.iter().flatten() {
            assert_eq!(read(&kept.write()).as_ref(), Ok(kept));
        }
        let outcome = |result: &Result<LastGood, LastGoodError>| match result {
            Ok(kept) => {
                let resources: usize = kept.subscriptions.iter().map(|s| s.resources.len()).sum();
                8 + 8 * kept.subscriptions.len().min(20) as u64 + 256 * resources.min(20) as u64
            }
            Err(LastGoodError::Foreign) => 0,
            Err(LastGoodError::Form(_)) => 1,
            Err(LastGoodError::Length { .. }) => 2,
            Err(LastGoodError::Large(_)) => 3,
            Err(LastGoodError::Checksum) => 4,
            Err(LastGoodError::Decode(_)) => 5,
            Err(LastGoodError::Node { .. }) => 6,
        };
        outcome(&results[0]) << 32 | outcome(&results[1])
    });
}

/// An HMAC key and `{"iss":"me"}` signed with it.
const KEYS: &[u8] = br#"{"keys":[{"kty":"oct","k":"c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0MTI"}]}"#;
const TOKEN: &str = "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJtZSJ9.Xieqwzk1bVfeRT8yjshp0SB8COXgntKksu-ZcqrxbDQ";

/// What verifies says what was signed.
#[test]
fn tokens() {
    let keys = Jwks::parse(KEYS).expect("a key set");
    let good = Jwt::parse(TOKEN).expect("a token");
    assert_eq!(keys.verify(&good), Ok(()));
    fuzz(&[TOKEN.as_bytes()], |input, _| match Jwt::parse(&String::from_utf8_lossy(input)) {
        Ok(jwt) if keys.verify(&jwt).is_ok() => {
            assert_eq!((&jwt.header, &jwt.payload), (&good.header, &good.payload));
            200
        }
        Ok(_) => 100,
        Err(status) => status.code().into(),
    });
}

/// No key set but one with the key verifies the token.
#[test]
fn key_sets() {
    let good = Jwt::parse(TOKEN).expect("a token");
    let seeds: &[&[u8]] = &[
        KEYS,
        br#"{"keys":[{"kty":"RSA","kid":"a","alg":"RS256","n":"xqvZQEiJ0EMyWWGZ4cB6UpP111nddO41PJ3su7IF-7pzZtG5Gta080A2sv54QJ1D4ngk15YM8VHhY1dl05kBev_pjhSOUEBC-NfxKLnjWxqkeXCawv8sjpf9cNYr6sbP0-P_QxNiIOeWamE2hi8faMi4K4UcR-xB3W0lRf8Ozd6wuFx4EJ9_PT8eNRzhzSkim7KbowC9Hl4BwAx47GLaSyywV47hrOFKl5W7nCOX-UZL1yqiKhFCpQaAiFRjRYh2Hp9BIrqnVzg2de51YkmkFIQ5LwYXLaZtBNY69WeDAdnexEpqD3YdRbDLfNvohE95CYsP81_gQlQMcAcjLzLflQ","e":"AQAB"}]}"#,
        br#"{"keys":[{"kty":"EC","crv":"P-256","x":"65e8WUmkkqFxsAE6f_m5y4hzw92KgY0sgaAveWoUl-c","y":"4Vqlz-dK1ETsaYimrUBA_dUt-fsl6_GX9OQ_v6oqsQ8"},{"kty":"OKP","crv":"Ed25519","x":"runse9bQb3Idlrc8B7B7qzp9gdCM8rKTKyISdwTAPjA"}]}"#,
        b"{\"1\": \"-----BEGIN CERTIFICATE-----\\nMIICkzCCAXugAwIBAgIBATANBgkqhkiG9w0BAQsFADAMMQowCAYDVQQDDAFrMCAX\\nDTIwMDEwMTAwMDAwMFoYDzIwOTAwMTAxMDAwMDAwWjAMMQowCAYDVQQDDAFrMIIB\\nIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAxqvZQEiJ0EMyWWGZ4cB6UpP1\\n11nddO41PJ3su7IF+7pzZtG5Gta080A2sv54QJ1D4ngk15YM8VHhY1dl05kBev/p\\njhSOUEBC+NfxKLnjWxqkeXCawv8sjpf9cNYr6sbP0+P/QxNiIOeWamE2hi8faMi4\\nK4UcR+xB3W0lRf8Ozd6wuFx4EJ9/PT8eNRzhzSkim7KbowC9Hl4BwAx47GLaSyyw\\nV47hrOFKl5W7nCOX+UZL1yqiKhFCpQaAiFRjRYh2Hp9BIrqnVzg2de51YkmkFIQ5\\nLwYXLaZtBNY69WeDAdnexEpqD3YdRbDLfNvohE95CYsP81/gQlQMcAcjLzLflQID\\nAQABMA0GCSqGSIb3DQEBCwUAA4IBAQBckYUKKb6KRgqcKBlTFudk+C/MjlLK+4hr\\nZ8UNDGEmFAZm4AoN4pA/LSANlTDhCiDpogXdZYRqi0EUlzRXHoCpxAS4hP4dNN8/\\nt7Y0vxpXFZUpN3bOnZghu28ebosimXhjWLlz33Y+HjKAdwFwakUkLoP2C2wUSX8d\\nq2IIrySOHblMT55oHfAHbRVjyvynlJKMYqx0qP5QOF3o+czrxOHfFXrjI7ILXlwE\\ndLAOVfiwo9KSjJUB3TZ+HVFMc/NuBCE7F/1ybN5IG42Wt8ouXMH0LC/9JYfDfy7a\\nqLMebsxJm8FgcTI1bihu0x2xRbmRs6AoxkRRuEtS5dOduDxAZBsb\\n-----END CERTIFICATE-----\\n\"}",
    ];
    fuzz(seeds, |input, _| match Jwks::parse(input) {
        Ok(keys) => match keys.verify(&good) {
            Ok(()) => {
                let secret = b"c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0MT";
                // Keys may be folded over lines.
                let input: Vec<u8> = input.iter().copied().filter(|c| *c > b' ').collect();
                assert!(input.windows(secret.len()).any(|part| part == secret), "another key");
                200
            }
            Err(status) => 100 + u64::from(status.code()),
        },
        Err(status) => status.code().into(),
    });
}
