//! A body that a script looks at while it passes (`bodyChunks()`), or whose trailers it waits for.
//!
//! As in Envoy, HTTP/1 tells the end of a body with an empty piece of its own, HTTP/2 with its last piece.

use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use mlua::MultiValue;
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::Protocol;

use super::call;
use super::drive::Script;
use super::handle::object;
use super::headers::{Buffer, OfTrailers};
use super::session::Asked;
use crate::router::callout::Answer;

type Answering = (LocalBoxFuture<'static, Answer>, bool);

/// See the module.
pub(super) struct Passing {
    inner: Body,
    script: Script,
    asked: Asked,
    /// A call that the script waits for; nothing passes until it is answered.
    call: Option<Answering>,
    ready: VecDeque<Frame>,
    /// The end comes by itself.
    bare_end: bool,
    over: bool,
}

impl Passing {
    pub(super) fn new(inner: Body, script: Script, asked: Asked, protocol: Option<Protocol>) -> Self {
        let bare_end = protocol.is_some_and(|protocol| protocol < Protocol::Http2);
        Self { inner, script, asked, call: None, ready: VecDeque::new(), bare_end, over: false }
    }

    fn resume(&mut self, values: MultiValue) {
        self.asked = self.script.resume(values);
        if matches!(self.asked, Asked::Call(_))
            && let Asked::Call(call) = std::mem::take(&mut self.asked)
        {
            let repeated = call.repeated;
            let worker = self.script.session.worker.clone();
            self.call = Some((call::send(worker, call).boxed_local(), repeated));
        }
    }

    fn data(&mut self, mut data: Bytes, end: bool) {
        let session = Rc::clone(&self.script.session);
        {
            let mut live = session.live.borrow_mut();
            live.end = end;
            live.saw_body = true;
        }
        let came = data.len() as u64;
        if matches!(self.asked, Asked::Chunk) {
            session.live.borrow_mut().body = Some(data);
            let chunk = object(&self.script.vm.lua, &session, Buffer);
            self.resume(self.script.value(chunk));
            data = session.live.borrow_mut().body.take().unwrap_or_default();
        } else if end && matches!(self.asked, Asked::Trailers) {
            self.resume(MultiValue::new());
        }
        let mut live = session.live.borrow_mut();
        live.came += came;
        live.went += data.len() as u64;
        if !data.is_empty() {
            self.ready.push_back(Frame::Data(data));
        }
    }

    /// What came while the script waited for a call passes it by.
    fn read_ready(&mut self, cx: &mut Context<'_>) -> Option<BodyError> {
        while !self.over
            && let Poll::Ready(frame) = self.inner.poll_frame(cx)
        {
            let mut live = self.script.session.live.borrow_mut();
            match frame {
                Some(Ok(frame @ Frame::Data(_))) => {
                    live.end = !self.bare_end && self.inner.is_end();
                    self.ready.push_back(frame);
                    continue;
                }
                Some(Ok(Frame::Trailers(trailers))) => live.trailers = Some(trailers),
                Some(Err(error)) => return Some(error),
                None => {}
            }
            live.end = true;
            self.over = true;
        }
        None
    }

    fn trailers(&mut self, trailers: HeaderMap) {
        let session = Rc::clone(&self.script.session);
        {
            let mut live = session.live.borrow_mut();
            live.end = true;
            live.trailers = Some(trailers);
        }
        if matches!(self.asked, Asked::Chunk) {
            self.resume(MultiValue::new());
        }
        if matches!(self.asked, Asked::Trailers) {
            let trailers = object(&self.script.vm.lua, &session, OfTrailers);
            self.resume(self.script.value(trailers));
        }
        self.over = true;
    }
}

impl BodyStream for Passing {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        loop {
            if let Some((call, repeated)) = &mut self.call {
                let (answer, repeated) = (ready!(call.poll_unpin(cx)), *repeated);
                self.call = None;
                if let Some(error) = self.read_ready(cx) {
                    return Poll::Ready(Some(Err(error)));
                }
                let values = call::values(&self.script.vm.lua, &answer, repeated);
                self.resume(values.unwrap_or_default());
                continue;
            }
            if let Some(frame) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(frame)));
            }
            if self.over {
                let trailers = self.script.session.live.borrow_mut().trailers.take();
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::Trailers(trailers))));
            }
            match ready!(self.inner.poll_frame(cx)) {
                Some(Ok(Frame::Data(data))) => {
                    let end = !self.bare_end && self.inner.is_end();
                    self.data(data, end);
                }
                Some(Ok(Frame::Trailers(trailers))) => self.trailers(trailers),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    self.over = true;
                    if !self.script.session.live.borrow().end {
                        self.data(Bytes::new(), true);
                    }
                }
            }
        }
    }

    fn is_end(&self) -> bool {
        let live = self.script.session.live.borrow();
        let told = live.end || matches!(self.asked, Asked::Nothing);
        let empty = self.call.is_none() && self.ready.is_empty() && live.trailers.is_none();
        told && empty && (self.over || self.inner.is_end())
    }
}
