//! What fuzzing calls.

use sampan_core::header::Spelling;

use super::{Framing, Head, Limits, framing, request, response, trailers};
use crate::error::CodecError;

/// Parses bytes as a request, a response and trailers, whole and cut off at `cut`. What is
/// complete in a part must be the same in the whole, and whether spellings are kept must not matter. Returns what
/// tells one outcome from another.
pub fn fuzz_parse(bytes: &[u8], cut: usize) -> u64 {
    let kept = fuzz_with(bytes, cut, Spelling::Kept);
    assert_eq!(kept, fuzz_with(bytes, cut, Spelling::Unknown), "the verdict hangs on the spelling");
    kept
}

fn fuzz_with(bytes: &[u8], cut: usize, spelling: Spelling) -> u64 {
    let limits = Limits { max_bytes: 1 << 14, max_headers: 100, spelling, allow_custom_methods: true };
    let part = &bytes[..cut.min(bytes.len())];
    let mut outcome = 0;
    for (parse, is_request) in
        [(request as fn(&[u8], &Limits) -> _, true), (response as fn(&[u8], &Limits) -> _, false)]
    {
        let whole: Result<Option<Head>, CodecError> = parse(bytes, &limits);
        if let Ok(Some(first)) = parse(part, &limits) {
            let len = whole.as_ref().ok().and_then(Option::as_ref).map(|head| head.len);
            assert_eq!(len, Some(first.len), "a head that was complete is another with more behind it");
        }
        outcome = outcome * 31
            + match whole {
                Err(error) => error.details.len() as u64,
                Ok(None) => 1,
                Ok(Some(mut head)) => match framing(&mut head.headers, false, is_request) {
                    Ok(Some(Framing::Length(_))) => 2,
                    Ok(Some(_)) => 3,
                    Ok(None) => 4 + head.headers.len().min(8) as u64,
                    Err(error) => 16 + error.details.len() as u64,
                },
            };
    }
    outcome * 3 + trailers(bytes, &limits).map_or(0, |found| 1 + u64::from(found.is_some()))
}
