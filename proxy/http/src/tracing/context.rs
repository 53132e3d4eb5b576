//! The trace context that a request carries: B3 (Zipkin) or W3C (OpenTelemetry). What the peer sent is continued; what
//! it sent wrongly is passed on untouched, without a span of ours.

use std::time::{SystemTime, UNIX_EPOCH};

use sampan_core::header::{HeaderId, HeaderMap, HeaderName};

use super::Provider;
use super::sampler::Sampler;
use super::zipkin::Zipkin;

/// This proxy's span in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    pub(super) high: u64,
    pub(super) low: u64,
    pub(super) span: u64,
    pub(super) parent: Option<u64>,
    pub(super) sampled: bool,
    /// The span of the request to the upstream, where it has one of its own.
    pub(super) child: Option<u64>,
    /// Whether that is sampled.
    pub(super) child_sampled: bool,
    /// The operation, of a span that is reported.
    pub(super) name: String,
    /// The traffic is outbound.
    pub(super) outbound: bool,
    form: Form,
    /// B3 goes on with a `traceparent` beside it.
    with_w3c: bool,
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
#[derive(Debug, Clone, Copy)]
struct Remote {
    high: u64,
    low: u64,
    span: u64,
    parent: Option<u64>,
    /// What it decided, where the form tells.
    sampled: Option<bool>,
}

/// What is known of a request whose span begins.
#[derive(Debug, Clone, Copy)]
pub struct Beginning<'a> {
    /// Its head.
    pub headers: &'a HeaderMap,
    /// It is traced unless the peer has decided otherwise.
    pub traced: bool,
    /// It leaves this workload.
    pub outbound: bool,
    /// When it came.
    pub start: SystemTime,
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
    pub fn begin(provider: &Provider, request: Beginning<'_>, random: impl Fn() -> u64) -> Option<Self> {
        match provider {
            Provider::Zipkin(config) => zipkin(config, request, &random),
            Provider::OpenTelemetry(sampler) => w3c(sampler.as_ref(), request, &random),
        }
    }

    /// The request to the upstream has a span of its own.
    pub fn start_child(&mut self, random: impl FnOnce() -> u64) {
        if self.child.is_none() {
            self.child = Some(random());
        }
    }

    /// A span of it goes to the collector.
    pub(super) fn is_reported(&self) -> bool {
        self.sampled || self.child.is_some() && self.child_sampled
    }

    /// The `tracestate` that came.
    pub(super) fn state(&self) -> String {
        match &self.form {
            Form::W3c(state) => sampan_core::custom_tag::sanitized(state).into_owned(),
            Form::B3 | Form::B3Single => String::new(),
        }
    }

    fn new((high, low): (u64, u64), span: u64, parent: Option<u64>, sampled: bool, form: Form) -> Self {
        Self {
            high,
            low,
            span,
            parent,
            sampled,
            child: None,
            child_sampled: sampled,
            name: String::new(),
            outbound: false,
            form,
            with_w3c: false,
        }
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
        let (trace, _) = self.ids();
        let (span, parent) = self.child.map_or((self.span, self.parent), |child| (child, Some(self.span)));
        let parent = parent.map(|parent| format!("{parent:016x}"));
        let sampled = if self.child.is_some() { self.child_sampled } else { self.sampled };
        let (span, sampled) = (format!("{span:016x}"), u8::from(sampled));
        // What was there goes; what comes stands at the end, as in Envoy.
        let mut set = |id: HeaderId, value: &[u8]| {
            headers.remove(id);
            headers.append(id, value);
        };
        match &self.form {
            Form::B3 => {
                set(HeaderId::X_B3_TRACEID, trace.as_bytes());
                set(HeaderId::X_B3_SPANID, span.as_bytes());
                if let Some(parent) = parent {
                    set(HeaderId::X_B3_PARENTSPANID, parent.as_bytes());
                }
                set(HeaderId::X_B3_SAMPLED, if sampled == 1 { b"1" } else { b"0" });
            }
            Form::B3Single => {
                let parent = parent.map(|parent| format!("-{parent}")).unwrap_or_default();
                set(HeaderId::B3, format!("{trace}-{span}-{sampled}{parent}").as_bytes());
            }
            Form::W3c(_) => {}
        }
        if self.with_w3c || matches!(self.form, Form::W3c(_)) {
            let value = format!("00-{:016x}{:016x}-{span}-{sampled:02x}", self.high, self.low);
            set(HeaderId::TRACEPARENT, value.as_bytes());
        }
        if let Form::W3c(state) = &self.form {
            set(HeaderId::TRACESTATE, state);
        }
    }
}

fn zipkin(config: &Zipkin, request: Beginning<'_>, random: &impl Fn() -> u64) -> Option<Context> {
    let headers = request.headers;
    let single = headers.get(HeaderId::B3);
    let form = if single.is_some() { Form::B3Single } else { Form::B3 };
    let told = headers.get(HeaderId::X_B3_SAMPLED).map(|told| matches!(told, b"1" | b"true"));
    let foreign = || w3c_remote(headers.get(HeaderId::TRACEPARENT).filter(|_| config.w3c)?);
    let (remote, sampled) = match single {
        Some(value) => {
            let (remote, sampled) = b3(value)?;
            (remote, sampled.unwrap_or(request.traced))
        }
        None => match remote(headers)? {
            Some(remote) => {
                let sampled = told.or_else(|| foreign()?.sampled);
                (Some(remote), sampled.unwrap_or(request.traced))
            }
            None => {
                let foreign = foreign();
                let theirs = foreign.and_then(|foreign| foreign.sampled);
                // A caller that samples is not outvoted by `x-b3-sampled`.
                let sampled = told.map(|told| told || theirs == Some(true));
                (foreign, sampled.or(theirs).unwrap_or(request.traced))
            }
        },
    };
    let mut context = match remote {
        None => {
            let low = random();
            let (high, low, span) = match (config.timed, config.wide) {
                (false, false) => (0, low, low),
                (false, true) => (random(), low, low),
                (true, true) => (timed(request.start, random()), low, low),
                (true, false) => (0, timed(request.start, low), random()),
            };
            Context::new((high, low), span, None, sampled, form)
        }
        // A server's span is its caller's.
        Some(Remote { high, low, span, parent, .. })
            if config.shared && (config.hop || !request.outbound) =>
        {
            Context::new((high, low), span, parent, sampled, form)
        }
        Some(Remote { high, low, span, .. }) => {
            Context::new((high, low), random(), Some(span), sampled, form)
        }
    };
    context.with_w3c = config.w3c;
    Some(context)
}

/// Seconds since the epoch before 32 bits of chance.
fn timed(start: SystemTime, random: u64) -> u64 {
    let seconds = start.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    seconds << 32 | random & 0xffff_ffff
}

/// `x-b3-traceid` and its like; the outer `None` is for what cannot be read.
fn remote(headers: &HeaderMap) -> Option<Option<Remote>> {
    let (Some(trace), Some(span)) = (headers.get(HeaderId::X_B3_TRACEID), headers.get(HeaderId::X_B3_SPANID))
    else {
        return Some(None);
    };
    let (high, low) = trace_id(trace)?;
    let parent = match headers.get(HeaderId::X_B3_PARENTSPANID).filter(|p| !p.is_empty()) {
        Some(parent) => Some(hex(parent)?).filter(|parent| *parent != 0),
        None => None,
    };
    Some(Some(Remote { high, low, span: hex(span)?, parent, sampled: None }))
}

/// `STATE` or `TRACE-SPAN[-STATE[-PARENT]]`: who asked, and whether he samples.
fn b3(value: &[u8]) -> Option<(Option<Remote>, Option<bool>)> {
    let state = |state: &[u8]| match state {
        b"1" | b"d" => Some(true),
        b"0" => Some(false),
        _ => None,
    };
    if value.len() == 1 {
        return Some((None, Some(state(value)?)));
    }
    let mut parts = value.split(|c| *c == b'-');
    let trace = parts.next().filter(|t| matches!(t.len(), 16 | 32))?;
    let span = parts.next().filter(|s| s.len() == 16)?;
    let sampled = match parts.next() {
        Some(part) => Some(state(part)?),
        None => None,
    };
    let parent = match parts.next() {
        Some(parent) if parent.len() == 16 => Some(hex(parent)?).filter(|parent| *parent != 0),
        Some(_) => return None,
        None => None,
    };
    let (high, low) = trace_id(trace)?;
    let remote = Remote { high, low, span: hex(span)?, parent, sampled };
    parts.next().is_none().then_some((Some(remote), sampled))
}

/// `traceparent`
fn w3c_remote(parent: &[u8]) -> Option<Remote> {
    let mut parts = parent.split(|c| *c == b'-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if (version.len(), trace.len(), span.len(), flags.len()) != (2, 32, 16, 2) || parts.next().is_some() {
        return None;
    }
    hex(version)?;
    let ((high, low), span, flags) = (trace_id(trace)?, hex(span)?, hex(flags)?);
    let valid = (high, low) != (0, 0) && span != 0;
    valid.then_some(Remote { high, low, span, parent: None, sampled: Some(flags & 1 == 1) })
}

fn w3c(sampler: Option<&Sampler>, request: Beginning<'_>, random: &impl Fn() -> u64) -> Option<Context> {
    let parent = match request.headers.get(HeaderId::TRACEPARENT) {
        Some(parent) => Some(w3c_remote(parent)?),
        None => None,
    };
    let state = parent.and_then(|_| request.headers.joined(&HeaderName::Known(HeaderId::TRACESTATE)));
    let form = Form::W3c(state.unwrap_or_default().into_owned());
    let (high, low) = parent.map_or_else(|| (random(), random()), |parent| (parent.high, parent.low));
    let theirs = parent.and_then(|parent| parent.sampled);
    let told = sampler.map_or(theirs.unwrap_or(true), |sampler| sampler.samples(theirs, high));
    let sampled = request.traced && told;
    let mut context = Context::new((high, low), random(), parent.map(|parent| parent.span), sampled, form);
    context.child_sampled = sampler.map_or(sampled, |sampler| sampler.samples(Some(sampled), high));
    Some(context)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PLAIN: Zipkin = Zipkin { wide: false, shared: false, timed: false, w3c: false, hop: false };
    const OPEN_TELEMETRY: Provider = Provider::OpenTelemetry(None);
    const ZIPKIN: Provider = Provider::Zipkin(PLAIN);

    fn sent(provider: &Provider, headers: &[(HeaderId, &str)]) -> Vec<String> {
        let mut map = HeaderMap::new();
        headers.iter().for_each(|(id, value)| map.append(*id, value));
        let request = Beginning {
            headers: &map,
            traced: true,
            outbound: false,
            start: UNIX_EPOCH + Duration::new(2, 0),
        };
        let Some(context) = Context::begin(provider, request, || 7) else { return Vec::new() };
        context.inject(&mut map);
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        map.iter().map(|(_, name, value)| format!("{}: {}", text(name), text(value))).collect()
    }

    #[test]
    fn contexts_begin_and_go_on() {
        let new = ["x-b3-traceid: 0000000000000007", "x-b3-spanid: 0000000000000007", "x-b3-sampled: 1"];
        assert_eq!(sent(&ZIPKIN, &[]), new);
        let multi =
            [(HeaderId::X_B3_TRACEID, "bad"), (HeaderId::X_B3_SPANID, "1"), (HeaderId::X_B3_SAMPLED, "0")];
        let on = [
            "x-b3-traceid: 0000000000000bad",
            "x-b3-spanid: 0000000000000007",
            "x-b3-parentspanid: 0000000000000001",
            "x-b3-sampled: 0",
        ];
        assert_eq!(sent(&ZIPKIN, &multi), on);
        let shared = Provider::Zipkin(Zipkin { shared: true, ..PLAIN });
        assert_eq!(sent(&shared, &multi)[1], "x-b3-spanid: 0000000000000001");
        let timed = Provider::Zipkin(Zipkin { timed: true, ..PLAIN });
        assert_eq!(sent(&timed, &[])[0], "x-b3-traceid: 0000000200000007");
        let single = [(HeaderId::B3, "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-d")];
        let on = "b3: 80f198ee56343ba864fe8b2a57d3eff7-0000000000000007-1-e457b5a2e4d86bd1";
        assert_eq!(sent(&ZIPKIN, &single), [on]);
        let w3c = [(HeaderId::TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")];
        let on = ["traceparent: 00-0af7651916cd43dd8448eb211c80319c-0000000000000007-00", "tracestate: "];
        assert_eq!(sent(&OPEN_TELEMETRY, &w3c), on);
        let both = Provider::Zipkin(Zipkin { w3c: true, shared: true, ..PLAIN });
        let on = ["x-b3-traceid: 0af7651916cd43dd8448eb211c80319c", "x-b3-spanid: b7ad6b7169203331"];
        assert_eq!(sent(&both, &w3c)[..2], on);
        assert_eq!(
            sent(&both, &w3c)[2..],
            ["x-b3-sampled: 0".to_owned(), format!("traceparent: {}", w3c[0].1)]
        );
    }

    #[test]
    fn what_cannot_be_read_begins_nothing() {
        let none: Vec<String> = Vec::new();
        for bad in ["x", "00-0-0-0", "00-00000000000000000000000000000000-b7ad6b7169203331-00"] {
            assert_eq!(sent(&OPEN_TELEMETRY, &[(HeaderId::TRACEPARENT, bad)]), none, "{bad}");
        }
        for bad in [
            "",
            "x",
            "xx",
            "1-2-1",
            "80f198ee56343ba8-e457b5a2e4d86bdz-1",
            "80f198ee56343ba8-e457b5a2e4d86bd1-",
        ] {
            assert_eq!(sent(&ZIPKIN, &[(HeaderId::B3, bad)]), none, "{bad}");
        }
    }
}
