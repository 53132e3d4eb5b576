//! The trace context that a request carries: B3 (Zipkin) or W3C (OpenTelemetry). What the peer sent is continued; what
//! it sent wrongly is passed on untouched, without a span of ours.

use sampan_core::header::{HeaderId, HeaderMap, HeaderName};

use super::Provider;

/// This proxy's span in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    pub(super) high: u64,
    pub(super) low: u64,
    pub(super) span: u64,
    pub(super) parent: Option<u64>,
    pub(super) sampled: bool,
    /// The span of the request to the upstream, where it has one of its own and is reported.
    pub(super) child: Option<u64>,
    /// The operation, of a span that is reported.
    pub(super) name: String,
    /// The traffic is outbound.
    pub(super) outbound: bool,
    form: Form,
}

/// How it is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    /// `x-b3-*`
    B3,
    /// `b3`
    B3Single,
    /// `traceparent`, and the `tracestate` that came.
    W3c(Vec<u8>),
}

/// What the peer sent.
struct Remote {
    high: u64,
    low: u64,
    span: u64,
    parent: Option<u64>,
}

fn hex(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.len() <= 16 && text.iter().all(u8::is_ascii_hexdigit);
    u64::from_str_radix(std::str::from_utf8(text).ok().filter(|_| digits)?, 16).ok()
}

/// A trace id of up to 16 or of 32 digits.
fn trace_id(text: &[u8]) -> Option<(u64, u64)> {
    match text.split_at_checked(16) {
        Some((high, low)) if text.len() == 32 => Some((hex(high)?, hex(low)?)),
        _ => Some((0, hex(text)?)),
    }
}

impl Context {
    /// A span for a request; `None` where the peer's context cannot be read.
    pub fn begin(
        provider: Provider,
        headers: &HeaderMap,
        traced: bool,
        outbound: bool,
        random: impl Fn() -> u64,
    ) -> Option<Self> {
        match provider {
            Provider::Zipkin { wide, shared, child } => {
                let mut context = zipkin(headers, traced, wide, shared && !outbound, &random)?;
                if child {
                    context.parent = Some(context.span);
                    context.span = random();
                }
                Some(context)
            }
            Provider::OpenTelemetry => w3c(headers, traced, &random),
        }
    }

    /// The `tracestate` that came.
    pub(super) fn state(&self) -> String {
        match &self.form {
            Form::W3c(state) => sampan_core::custom_tag::sanitized(state).into_owned(),
            Form::B3 | Form::B3Single => String::new(),
        }
    }

    fn new((high, low): (u64, u64), span: u64, parent: Option<u64>, sampled: bool, form: Form) -> Self {
        Self { high, low, span, parent, sampled, child: None, name: String::new(), outbound: false, form }
    }

    /// The trace's id and the span's.
    pub fn ids(&self) -> (String, String) {
        let trace = if self.high == 0 && !matches!(self.form, Form::W3c(_)) {
            format!("{:016x}", self.low)
        } else {
            format!("{:016x}{:016x}", self.high, self.low)
        };
        (trace, format!("{:016x}", self.span))
    }

    /// Puts it into a request.
    pub fn inject(&self, headers: &mut HeaderMap) {
        let (trace, mut span) = self.ids();
        if let Some(child) = self.child {
            span = format!("{child:016x}");
        }
        // What was there goes; what comes stands at the end, as in Envoy.
        let mut set = |id: HeaderId, value: &[u8]| {
            headers.remove(id);
            headers.append(id, value);
        };
        match &self.form {
            Form::B3 => {
                set(HeaderId::X_B3_TRACEID, trace.as_bytes());
                set(HeaderId::X_B3_SPANID, span.as_bytes());
                if let Some(parent) = self.parent {
                    set(HeaderId::X_B3_PARENTSPANID, format!("{parent:016x}").as_bytes());
                }
                set(HeaderId::X_B3_SAMPLED, if self.sampled { b"1" } else { b"0" });
            }
            Form::B3Single => {
                let mut value = format!("{trace}-{span}-{}", u8::from(self.sampled));
                if let Some(parent) = self.parent {
                    value.push_str(&format!("-{parent:016x}"));
                }
                set(HeaderId::B3, value.as_bytes());
            }
            Form::W3c(state) => {
                let value = format!("00-{trace}-{span}-{:02x}", u8::from(self.sampled));
                set(HeaderId::TRACEPARENT, value.as_bytes());
                set(HeaderId::TRACESTATE, state);
            }
        }
    }
}

fn zipkin(
    headers: &HeaderMap,
    traced: bool,
    wide: bool,
    share: bool,
    random: &impl Fn() -> u64,
) -> Option<Context> {
    let single = headers.get(HeaderId::B3);
    let form = if single.is_some() { Form::B3Single } else { Form::B3 };
    let sampled = match single {
        Some(value) => single_sampled(value),
        None => match headers.get(HeaderId::X_B3_SAMPLED) {
            Some(sampled) => Some(matches!(sampled, b"1" | b"true")),
            None => (headers.get(HeaderId::X_B3_FLAGS) == Some(b"1")).then_some(true),
        },
    };
    let sampled = sampled.unwrap_or(traced);
    let remote = match single {
        Some(value) => single_remote(value)?,
        None => remote(headers)?,
    };
    Some(match remote {
        None => {
            let low = random();
            let high = if wide { random() } else { 0 };
            Context::new((high, low), low, None, sampled, form)
        }
        Some(Remote { high, low, span, parent }) if share => {
            Context::new((high, low), span, parent, sampled, form)
        }
        Some(Remote { high, low, span, .. }) => {
            Context::new((high, low), random(), Some(span), sampled, form)
        }
    })
}

/// `x-b3-traceid` and its like; the outer `None` is for what cannot be read.
fn remote(headers: &HeaderMap) -> Option<Option<Remote>> {
    let (Some(trace), Some(span)) = (headers.get(HeaderId::X_B3_TRACEID), headers.get(HeaderId::X_B3_SPANID))
    else {
        return Some(None);
    };
    let (high, low) = trace_id(trace)?;
    let parent = match headers.get(HeaderId::X_B3_PARENTSPANID).filter(|p| !p.is_empty()) {
        Some(parent) => Some(hex(parent)?),
        None => None,
    };
    Some(Some(Remote { high, low, span: hex(span)?, parent }))
}

/// The sampling state of a single header: all of it, or its third part.
fn single_sampled(value: &[u8]) -> Option<bool> {
    let state = match value {
        [one] => *one,
        _ => match value.split(|c| *c == b'-').nth(2)? {
            [one] => *one,
            _ => return None,
        },
    };
    match state {
        b'1' | b'd' => Some(true),
        b'0' => Some(false),
        _ => None,
    }
}

/// `TRACE-SPAN[-STATE[-PARENT]]`
fn single_remote(value: &[u8]) -> Option<Option<Remote>> {
    if value.len() == 1 {
        return Some(None);
    }
    let mut parts = value.split(|c| *c == b'-');
    let trace = parts.next().filter(|t| matches!(t.len(), 16 | 32))?;
    let span = parts.next().filter(|s| s.len() == 16)?;
    let parent = match parts.nth(1) {
        Some(parent) => Some(hex(parent)?),
        None => None,
    };
    let (high, low) = trace_id(trace)?;
    Some(Some(Remote { high, low, span: hex(span)?, parent }))
}

fn w3c(headers: &HeaderMap, traced: bool, random: &impl Fn() -> u64) -> Option<Context> {
    let Some(parent) = headers.get(HeaderId::TRACEPARENT) else {
        let form = Form::W3c(Vec::new());
        return Some(Context::new((random(), random()), random(), None, traced, form));
    };
    let mut parts = parent.split(|c| *c == b'-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if (version.len(), trace.len(), span.len(), flags.len()) != (2, 32, 16, 2) || parts.next().is_some() {
        return None;
    }
    hex(version)?;
    let ((high, low), span, flags) = (trace_id(trace)?, hex(span)?, hex(flags)?);
    if (high, low) == (0, 0) || span == 0 {
        return None;
    }
    let state = headers.joined(&HeaderName::Known(HeaderId::TRACESTATE)).unwrap_or_default().into_owned();
    let form = Form::W3c(state);
    Some(Context::new((high, low), random(), Some(span), flags & 1 == 1, form))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZIPKIN: Provider = Provider::Zipkin { wide: false, shared: false, child: false };

    fn sent(provider: Provider, headers: &[(HeaderId, &str)]) -> Vec<String> {
        let mut map = HeaderMap::new();
        headers.iter().for_each(|(id, value)| map.append(*id, value));
        let Some(context) = Context::begin(provider, &map, true, false, || 7) else { return Vec::new() };
        context.inject(&mut map);
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        map.iter().map(|(_, name, value)| format!("{}: {}", text(name), text(value))).collect()
    }

    #[test]
    fn contexts_begin_and_go_on() {
        let new = ["x-b3-traceid: 0000000000000007", "x-b3-spanid: 0000000000000007", "x-b3-sampled: 1"];
        assert_eq!(sent(ZIPKIN, &[]), new);
        let multi =
            [(HeaderId::X_B3_TRACEID, "bad"), (HeaderId::X_B3_SPANID, "1"), (HeaderId::X_B3_SAMPLED, "0")];
        let on = [
            "x-b3-traceid: 0000000000000bad",
            "x-b3-spanid: 0000000000000007",
            "x-b3-parentspanid: 0000000000000001",
            "x-b3-sampled: 0",
        ];
        assert_eq!(sent(ZIPKIN, &multi), on);
        let shared = Provider::Zipkin { wide: false, shared: true, child: false };
        assert_eq!(sent(shared, &multi)[1], "x-b3-spanid: 0000000000000001");
        let child = Provider::Zipkin { wide: false, shared: true, child: true };
        assert_eq!(sent(child, &multi)[2], "x-b3-parentspanid: 0000000000000001");
        let single = [(HeaderId::B3, "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-d")];
        let on = "b3: 80f198ee56343ba864fe8b2a57d3eff7-0000000000000007-1-e457b5a2e4d86bd1";
        assert_eq!(sent(ZIPKIN, &single), [on]);
        let w3c = [(HeaderId::TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")];
        let on = ["traceparent: 00-0af7651916cd43dd8448eb211c80319c-0000000000000007-00", "tracestate: "];
        assert_eq!(sent(Provider::OpenTelemetry, &w3c), on);
    }

    #[test]
    fn what_cannot_be_read_begins_nothing() {
        let none: Vec<String> = Vec::new();
        for bad in ["x", "00-0-0-0", "00-00000000000000000000000000000000-b7ad6b7169203331-00"] {
            assert_eq!(sent(Provider::OpenTelemetry, &[(HeaderId::TRACEPARENT, bad)]), none, "{bad}");
        }
        for bad in ["xx", "1-2-1", "80f198ee56343ba8-e457b5a2e4d86bdz-1"] {
            assert_eq!(sent(ZIPKIN, &[(HeaderId::B3, bad)]), none, "{bad}");
        }
    }
}
