//! `envoy.filters.http.grpc_stats`: counts gRPC calls and their messages below `cluster.NAME.grpc`.
//!
//! Messages are counted by their frames as bodies pass; a call's end by the `grpc-status` of its trailers, or of its
//! head where there are no trailers. A path that is not `/SERVICE/METHOD` is not counted. What `istio.stats` and logs
//! read of it is an object of the filter state, there with the first message.
//!
//! Envoy counts calls of the Connect protocol too, which are none to this filter.

use std::any::Any as StdAny;
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use envoy_types::pb::envoy::extensions::filters::http::grpc_stats::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use pb::filter_config::PerMethodStatSpecifier as Specifier;
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::error::ConfigResult;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stats::{Scope, Unit};
use sampan_core::stream_info::FilterStateObject;

use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, Response, State, Step, decode};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig";

/// The key of the object in the filter state.
const KEY: &str = "envoy.filters.http.grpc_stats";

struct GrpcStats {
    emit_filter_state: bool,
    upstream_stats: bool,
    methods: Methods,
}

/// Which calls have counters of their own.
enum Methods {
    All {
        replace_dots: bool,
    },
    /// `SERVICE/METHOD`
    Listed(HashSet<String>),
}

pub(super) fn make(any: &Any, _: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: pb::FilterConfig = decode(any)?;
    let methods = match message.per_method_stat_specifier {
        Some(Specifier::StatsForAllMethods(all)) if all.value => {
            Methods::All { replace_dots: message.replace_dots_in_grpc_service_name }
        }
        Some(Specifier::IndividualMethodStatsAllowlist(list)) => {
            let of_service =
                |service: &envoy_types::pb::envoy::config::core::v3::grpc_method_list::Service| {
                    let name = service.name.clone();
                    service.method_names.clone().into_iter().map(move |method| format!("{name}/{method}"))
                };
            Methods::Listed(list.services.iter().flat_map(of_service).collect())
        }
        _ => Methods::Listed(HashSet::new()),
    };
    Ok(HttpFilterKind::Filter(Arc::new(GrpcStats {
        emit_filter_state: message.emit_filter_state,
        upstream_stats: message.enable_upstream_stats,
        methods,
    })))
}

/// Messages of a stream, for the filter state.
#[derive(Default)]
struct Counts {
    request: Cell<u64>,
    response: Cell<u64>,
}

impl FilterStateObject for Counts {
    fn plain(&self) -> Option<Cow<'_, str>> {
        let (request, response) = (self.request.get(), self.response.get());
        // Before the first message there is no object.
        (request + response > 0).then(|| format!("{request},{response}").into())
    }

    fn typed(&self) -> Option<serde_json::Value> {
        self.plain()?;
        let mut map = serde_json::Map::new();
        for (name, count) in
            [("requestMessageCount", self.request.get()), ("responseMessageCount", self.response.get())]
        {
            if count > 0 {
                map.insert(name.into(), count.to_string().into());
            }
        }
        Some(map.into())
    }

    fn as_any(&self) -> &dyn StdAny {
        self
    }
}

/// One call.
struct Call {
    /// The cluster's scope and what stands before the counters' last parts; none where nothing is counted.
    counted: Option<(Scope, Cow<'static, str>)>,
    counts: Rc<Counts>,
    /// The response was complete.
    done: Cell<bool>,
}

impl Call {
    fn add(&self, what: &str, n: u64) {
        if let Some((scope, prefix)) = &self.counted {
            scope.counter(&format!("{prefix}.{what}")).add(n);
        }
    }

    /// The call's end, if these headers tell it.
    fn finish(&self, headers: &HeaderMap) {
        let Some(status) = headers.get(HeaderId::GRPC_STATUS) else { return };
        self.add(&String::from_utf8_lossy(status), 1);
        self.add(if status == b"0" { "success" } else { "failure" }, 1);
        self.add("total", 1);
    }
}

impl GrpcStats {
    /// What stands before the counters' last parts for a call of that path.
    fn prefix(&self, path: &[u8]) -> Option<Cow<'static, str>> {
        let path = path.split(|b| *b == b'?').next().unwrap_or_default();
        let mut parts = path.split(|b| *b == b'/').filter(|part| !part.is_empty());
        let (Some(service), Some(method), None) = (parts.next(), parts.next(), parts.next()) else {
            return None;
        };
        let (service, method) = (String::from_utf8_lossy(service), String::from_utf8_lossy(method));
        Some(match &self.methods {
            Methods::All { replace_dots: true } => {
                format!("grpc.{}.{method}", service.replace('.', "_")).into()
            }
            Methods::All { replace_dots: false } => format!("grpc.{service}.{method}").into(),
            Methods::Listed(list) if !list.is_empty() && list.contains(&format!("{service}/{method}")) => {
                format!("grpc.{service}.{method}").into()
            }
            Methods::Listed(_) => Cow::Borrowed("grpc"),
        })
    }

    fn call(&self, stream: &mut Stream, counted: Option<(Scope, Cow<'static, str>)>) -> Rc<Call> {
        let counts = Rc::<Counts>::default();
        if self.emit_filter_state {
            stream.info.set_state(KEY, counts.clone());
        }
        Rc::new(Call { counted, counts, done: Cell::new(false) })
    }
}

/// Whether a response is gRPC's, going by its head.
fn is_grpc(response: &Response) -> bool {
    response.status == 200 && Stream::is_grpc(&response.headers)
}

impl HttpFilter for GrpcStats {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        if !Stream::is_grpc(&stream.request) || !stream.request.contains(HeaderId::PATH) {
            return Step::Continue;
        }
        let prefix = self.prefix(stream.request.get(HeaderId::PATH).unwrap_or_default());
        let cluster = stream.info.cluster.as_deref().and_then(|name| stream.worker.clusters.get(name));
        let scope = cluster.map(|cluster| cluster.cluster().scope().clone());
        let call = self.call(stream, scope.zip(prefix));
        if !stream.body.is_end() {
            let call = call.clone();
            stream.body.wrap(|body| Counting { body, frames: Frames::default(), call, response: false });
        }
        *state = Some(Box::new(call));
        Step::Continue
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        let call = state.as_ref().and_then(|state| state.downcast_ref::<Rc<Call>>()).cloned();
        if let Some(call) = &call {
            call.finish(&response.headers);
        }
        if response.body.is_end() {
            call.inspect(|call| call.done.set(true));
            return Step::Continue;
        }
        // A response is counted by its own type, for the filter state even where the request is no call.
        let counts = is_grpc(response);
        let call = match call {
            Some(call) => call,
            None if counts && self.emit_filter_state => self.call(stream, None),
            None => return Step::Continue,
        };
        let frames = Frames { off: !counts, ..Frames::default() };
        response.body.wrap(|body| Counting { body, frames, call, response: true });
        Step::Continue
    }

    fn on_end(&self, stream: &mut Stream, state: &mut State) {
        let call = state.as_ref().and_then(|state| state.downcast_ref::<Rc<Call>>());
        let Some(call) = call.filter(|call| self.upstream_stats && call.done.get()) else { return };
        let Some(upstream) = &stream.info.upstream else { return };
        if let (Some((scope, prefix)), Some(sent), Some(received)) =
            (&call.counted, upstream.last_tx, upstream.last_rx)
        {
            let took = received.saturating_duration_since(sent).as_millis();
            let histogram = scope.histogram(&format!("{prefix}.upstream_rq_time"), Unit::Milliseconds);
            histogram.record(u64::try_from(took).unwrap_or(u64::MAX));
        }
    }
}

/// A body whose messages are counted.
struct Counting {
    body: Body,
    frames: Frames,
    call: Rc<Call>,
    response: bool,
}

impl BodyStream for Counting {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let frame = ready!(self.body.poll_frame(cx));
        match &frame {
            Some(Ok(Frame::Data(data))) => {
                let seen = self.frames.inspect(data);
                let counts = &self.call.counts;
                let (count, what) = if self.response {
                    (&counts.response, "response_message_count")
                } else {
                    (&counts.request, "request_message_count")
                };
                if seen > 0 {
                    count.set(count.get() + seen);
                    self.call.add(what, seen);
                }
            }
            Some(Ok(Frame::Trailers(trailers))) if self.response => {
                self.call.finish(trailers);
                self.call.done.set(true);
            }
            None if self.response => self.call.done.set(true),
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end(&self) -> bool {
        self.body.is_end()
    }
}

/// Where in the frames of a body its reader is: a flag, four bytes of length, so many bytes.
#[derive(Default)]
struct Frames {
    /// Nothing is counted.
    off: bool,
    /// Bytes of the frame's head that were read.
    head: u8,
    length: u32,
    /// Bytes of the frame that are still to come.
    rest: u32,
}

impl Frames {
    /// How many frames begin in these bytes.
    fn inspect(&mut self, mut data: &[u8]) -> u64 {
        let mut seen = 0;
        while let (false, Some((first, tail))) = (self.off, data.split_first()) {
            if self.rest > 0 {
                let skip = data.len().min(usize::try_from(self.rest).unwrap_or(usize::MAX));
                self.rest -= skip as u32;
                data = &data[skip..];
                continue;
            }
            if self.head == 0 {
                seen += 1;
            } else {
                self.length = self.length << 8 | u32::from(*first);
            }
            self.head += 1;
            if self.head == 5 {
                (self.head, self.rest, self.length) = (0, self.length, 0);
            }
            data = tail;
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let body = [&[0, 0, 0, 0, 3][..], b"abc", &[1, 0, 0, 0, 0], &[0, 0, 0, 1, 0], &[7; 256]].concat();
        for size in [1, 2, 3, 5, 7, 1000] {
            let mut frames = Frames::default();
            let seen: u64 = body.chunks(size).map(|chunk| frames.inspect(chunk)).sum();
            assert_eq!((seen, frames.head, frames.rest), (3, 0, 0), "{size}");
        }
    }

    #[test]
    fn which_calls_have_counters_of_their_own() {
        let filter = |methods| GrpcStats { emit_filter_state: false, upstream_stats: false, methods };
        let listed = filter(Methods::Listed(["a.B/c".to_owned()].into()));
        assert_eq!(listed.prefix(b"/a.B/c?x=/").as_deref(), Some("grpc.a.B.c"));
        assert_eq!(listed.prefix(b"/a.B/d").as_deref(), Some("grpc"));
        assert_eq!(listed.prefix(b"/a.B/c/d").as_deref(), None);
        assert_eq!(listed.prefix(b"/a").as_deref(), None);
        let dots = filter(Methods::All { replace_dots: true });
        assert_eq!(dots.prefix(b"/a.B/c").as_deref(), Some("grpc.a_B.c"));
    }
}
