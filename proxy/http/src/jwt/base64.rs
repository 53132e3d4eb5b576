//! base64url as Envoy reads it: padding may be there or not, bits behind the last byte count for nothing, white space is
//! skipped. What was signed are the characters as they came, so that none of this lets another text pass.

use std::borrow::Cow;

use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes; none where the text is no base64url.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let space = |c: char| c.is_ascii_whitespace();
    let text = if text.contains(space) { Cow::Owned(text.replace(space, "")) } else { Cow::Borrowed(text) };
    LENIENT.decode(&*text).ok()
}
