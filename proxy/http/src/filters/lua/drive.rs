//! Runs a script while a message's head stands before it: to its end, or until it only waits for what passes later.

use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use mlua::thread::ThreadStatus;
use mlua::{IntoLuaMulti, MultiValue, Thread, Value};
use sampan_codec::{Body, BodyError, Frame};
use sampan_core::clock;
use sampan_core::header::HeaderId;
use sampan_core::log::Level;

use super::body::Passing;
use super::config::{Config, PerRoute};
use super::handle::{Handle, object};
use super::headers::Buffer;
use super::object::{Object, script_log};
use super::session::{Asked, Facts, Live, Session, Way};
use super::vm::Vm;
use super::{Followers, call};
use crate::filter::{LocalReply, Outcome, Response, State, Step};
use crate::filters::buffer::{Buffered, broken, too_large};
use crate::stream::Stream;

/// What a script says went wrong.
pub(super) fn message(error: &Value) -> String {
    match error {
        Value::String(text) => text.to_string_lossy(),
        Value::Integer(number) => number.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Error(error) => error.to_string(),
        _ => "unspecified lua error".to_owned(),
    }
}

/// A script under way.
pub(super) struct Script {
    config: Arc<Config>,
    pub(super) vm: Rc<Vm>,
    thread: Thread,
    pub(super) session: Rc<Session>,
}

impl Script {
    /// Lets it run on to its next wait; what it asks for then. The stream's parts must be lent.
    pub(super) fn resume(&self, values: impl IntoLuaMulti) -> Asked {
        let session = &self.session;
        session.live.borrow_mut().asked = Asked::Nothing;
        let result = values.into_lua_multi(&self.vm.lua).and_then(|mut values| {
            values.push_front(Value::Thread(self.thread.clone()));
            session.running.set(true);
            self.vm.resume.call::<(bool, Value)>(values)
        });
        session.running.set(false);
        let mut live = session.live.borrow_mut();
        let asked = std::mem::take(&mut live.asked);
        if !matches!(asked, Asked::Route(_)) {
            session.turn.set(session.turn.get().wrapping_add(1));
            live.metadata_of = None;
            live.key_of_turn = None;
            live.header_iterator = None;
            live.trailer_iterator = None;
        }
        drop(live);
        match result {
            Err(error) => self.fail(&error.to_string()),
            Ok((false, error)) => self.fail(&message(&error)),
            Ok((true, _)) if self.thread.status() != ThreadStatus::Resumable => Asked::Nothing,
            Ok((true, _)) if matches!(asked, Asked::Nothing) => {
                self.fail("script performed an unexpected yield")
            }
            Ok((true, _)) => asked,
        }
    }

    fn fail(&self, text: &str) -> Asked {
        self.config.errors.inc();
        script_log(Level::Error, text);
        Asked::Nothing
    }

    /// A value as the script is resumed with it; none where the interpreter cannot make it.
    pub(super) fn value(&self, value: mlua::Result<Value>) -> MultiValue {
        value.map(|value| MultiValue::from_vec(vec![value])).unwrap_or_default()
    }
}

/// A script and the stream that it runs for.
pub(super) struct Run<'a> {
    stream: &'a mut Stream,
    response: Option<&'a mut Response>,
    state: &'a mut State,
    script: Script,
}

impl<'a> Run<'a> {
    /// Starts the message's function.
    pub(super) fn start(
        config: &Arc<Config>,
        vm: Rc<Vm>,
        stream: &'a mut Stream,
        response: Option<&'a mut Response>,
        state: &'a mut State,
        way: Way,
    ) -> Step<'a> {
        let function = if way == Way::Request { &vm.on_request } else { &vm.on_response };
        let thread = function.as_ref().and_then(|function| vm.lua.create_thread(function.clone()).ok());
        let Some(thread) = thread else { return Step::Continue };
        config.executions.inc();
        let end = response.as_ref().map_or(&stream.body, |response| &response.body).is_end();
        let context = stream.route_config::<PerRoute>(&config.name);
        let session = Rc::new(Session {
            way,
            clears_route: config.clears_route,
            filter_name: config.name.clone(),
            worker: stream.worker.clone(),
            running: false.into(),
            turn: 0.into(),
            live: Live::new(Facts::of(stream), context, end).into(),
        });
        let handle = Object::new(&session, Handle);
        let script = Script { config: config.clone(), vm, thread, session };
        let mut run = Run { stream, response, state, script };
        match run.resume(handle) {
            Asked::Nothing => {
                run.settle();
                Step::Continue
            }
            asked => Step::Wait(Box::pin(run.go(asked))),
        }
    }

    fn live(&self) -> std::cell::RefMut<'_, Live> {
        self.script.session.live.borrow_mut()
    }

    fn body(&mut self) -> &mut Body {
        self.response.as_mut().map_or(&mut self.stream.body, |response| &mut response.body)
    }

    fn exchange(&mut self) {
        self.script.session.exchange(self.stream, self.response.as_deref_mut());
    }

    fn resume(&mut self, values: impl IntoLuaMulti) -> Asked {
        self.exchange();
        let asked = self.script.resume(values);
        self.exchange();
        let host = self.live().override_host.take();
        if host.is_some() {
            self.stream.override_host = host;
        }
        asked
    }

    async fn go(mut self, mut asked: Asked) -> Outcome {
        loop {
            asked = match asked {
                Asked::Nothing => break,
                Asked::Reply(reply) => {
                    return Outcome::Reply(reply);
                }
                Asked::Route(again) => {
                    self.refresh_route();
                    self.exchange();
                    let value = again(&self.script.vm.lua, &self.script.session);
                    self.exchange();
                    self.resume(self.script.value(value))
                }
                Asked::Body => {
                    if let Err(outcome) = self.read_all().await {
                        return outcome;
                    }
                    let Script { vm, session, .. } = &self.script;
                    let there = session.live.borrow().body.is_some();
                    let buffer = there.then(|| object(&vm.lua, session, Buffer));
                    self.resume(buffer.map(|buffer| self.script.value(buffer)).unwrap_or_default())
                }
                Asked::Call(call) => {
                    let repeated = call.repeated;
                    let answer = call::send(self.stream.worker.clone(), call).await;
                    if let Err(outcome) = self.read_ready() {
                        return outcome;
                    }
                    let values = call::values(&self.script.vm.lua, &answer, repeated);
                    self.resume(values.unwrap_or_default())
                }
                asked @ (Asked::Chunk | Asked::Trailers) => {
                    self.settle();
                    self.follow(asked);
                    return Outcome::Continue;
                }
            }
        }
        // What the script made of a body is held back no less than what came.
        let made = self.live().body.as_ref().map_or(0, Bytes::len);
        if made > self.stream.buffer_limit() {
            return self.grown();
        }
        self.settle();
        Outcome::Continue
    }

    fn refresh_route(&mut self) {
        self.stream.refresh_route();
        let mut live = self.script.session.live.borrow_mut();
        live.route_stale = false;
        live.facts = Facts::of(self.stream);
    }

    /// What a frame of the body means to a script that holds the message back: whether it was the last.
    fn hold(
        &mut self,
        frame: Option<Result<Frame, BodyError>>,
        data: &mut BytesMut,
    ) -> Result<bool, Outcome> {
        let request = self.response.is_none();
        let end = match frame {
            None => true,
            Some(Ok(Frame::Data(more))) => {
                clock::tick();
                self.stream.timer.touch();
                let length = data.len() + more.len();
                if request {
                    self.stream.timer.set_received(length as u64);
                }
                if length > self.stream.buffer_limit() {
                    return Err(if request { too_large(self.stream) } else { self.response_too_large() });
                }
                data.extend_from_slice(&more);
                self.live().saw_body = true;
                false
            }
            Some(Ok(Frame::Trailers(trailers))) => {
                self.live().trailers = Some(trailers);
                true
            }
            Some(Err(error)) if request => return Err(broken(self.stream, &error)),
            Some(Err(_)) => return Err(Outcome::Reset),
        };
        if end {
            *self.body() = Body::Empty;
            self.live().end = true;
            if request {
                self.stream.info.last_downstream_rx = Some(clock::recent());
                self.stream.timer.request_done();
            }
        }
        Ok(end)
    }

    /// What a message ends with of which the script made too much.
    fn grown(&self) -> Outcome {
        if self.response.is_some() {
            return self.response_too_large();
        }
        self.stream.manager.stats.downstream_rq_too_large.inc();
        LocalReply::new(413, "request_payload_too_large").body("Payload Too Large").outcome()
    }

    fn response_too_large(&self) -> Outcome {
        self.stream.manager.stats.rs_too_large.inc();
        LocalReply::new(500, "response_payload_too_large").body("Internal Server Error").outcome()
    }

    /// Reads all of the body, for `body()`.
    async fn read_all(&mut self) -> Result<(), Outcome> {
        let mut data = BytesMut::new();
        loop {
            let frame = self.body().frame().await;
            if self.hold(frame, &mut data)? {
                break;
            }
        }
        let mut live = self.live();
        live.saw_body = true;
        let nothing = data.is_empty() && live.trailers.is_some();
        live.came = data.len() as u64;
        live.body = Some(data.freeze()).filter(|_| !nothing);
        Ok(())
    }

    /// Takes what has come of the body while the script waited for something else.
    fn read_ready(&mut self) -> Result<(), Outcome> {
        if self.live().end {
            return Ok(());
        }
        let mut data = BytesMut::from(self.live().body.take().unwrap_or_default());
        while let Some(frame) = self.body().frame().now_or_never() {
            if self.hold(frame, &mut data)? {
                self.live().saw_body = true;
                break;
            }
        }
        let mut live = self.live();
        live.came = data.len() as u64;
        live.body = Some(data.freeze()).filter(|data| !data.is_empty());
        Ok(())
    }

    /// The head goes on: with what was held of the body, on the route that its headers mean.
    fn settle(&mut self) {
        let (data, trailers, stale, changed) = {
            let mut live = self.live();
            live.continued = true;
            let data = live.body.take().filter(|data| !data.is_empty());
            live.went = data.as_ref().map_or(0, Bytes::len) as u64;
            (data, live.trailers.take(), live.route_stale, live.went != live.came)
        };
        if changed {
            self.stay();
        }
        if data.is_some() || trailers.is_some() {
            self.body().wrap(|rest| Buffered { data, trailers, rest });
        }
        if stale {
            self.refresh_route();
        }
        if let Some(response) = &mut self.response
            && let Some(status) = response.headers.get_str(HeaderId::STATUS).and_then(|s| s.parse().ok())
        {
            response.status = status;
        }
    }

    /// Keeps the session for the stream's end.
    fn stay(&mut self) {
        let followers = self.state.get_or_insert_with(|| Box::new(Followers::new()));
        if let Some(followers) = followers.downcast_mut::<Followers>() {
            followers.push(self.script.session.clone());
        }
    }

    /// Lets the script look on while the body passes, with copies of what it may ask for.
    fn follow(mut self, asked: Asked) {
        self.stay();
        let Self { stream, mut response, script, .. } = self;
        let session = &script.session;
        {
            let mut live = session.live.borrow_mut();
            let headers = response.as_ref().map_or(&stream.request, |response| &response.headers);
            live.headers = headers.clone();
            live.metadata.clone_from(&stream.info.dynamic_metadata);
            live.filter_state.clone_from(&stream.info.filter_state);
        }
        let protocol = match &response {
            None => stream.info.protocol,
            Some(response) if response.local => None,
            Some(_) => stream.info.upstream.as_ref().and_then(|upstream| upstream.protocol),
        };
        let body = response.as_mut().map_or(&mut stream.body, |response| &mut response.body);
        body.wrap(|body| Passing::new(body, script, asked, protocol));
    }
}
