//! `httpCall()`: requests of a script's own.

use std::rc::Rc;
use std::time::Duration;

use mlua::{Lua, MultiValue, Table, Value};
use sampan_core::header::HeaderId;
use sampan_listener::Worker;

use super::handle::{headers_of, optional, session};
use super::object::{Args, Fail, Return, internal};
use super::session::{Asked, Call, CallRequest};
use crate::router::callout::{self, Answer};

/// What the call is told besides its request.
#[derive(Default)]
struct Options {
    asynchronous: bool,
    timeout: Option<Duration>,
    repeated: bool,
    forwarded: bool,
}

fn timeout(milliseconds: i32) -> Result<Option<Duration>, Fail> {
    let milliseconds =
        u64::try_from(milliseconds).map_err(|_| Fail::from("http call timeout must be >= 0"))?;
    Ok(Some(Duration::from_millis(milliseconds)).filter(|timeout| !timeout.is_zero()))
}

fn truth(value: &Value) -> bool {
    !matches!(value, Value::Nil | Value::Boolean(false))
}

fn options(lua: &Lua, args: &Args) -> Result<Options, Fail> {
    let mut options = Options { forwarded: true, ..Options::default() };
    let Some(Value::Table(table)) = args.value(4) else {
        if !matches!(args.value(5), None | Some(Value::Boolean(_))) {
            return Err(Fail::from("http call asynchronous flag must be 'true', 'false', or empty"));
        }
        options.timeout = timeout(args.int(4)?)?;
        options.asynchronous = args.value(5).is_some_and(truth);
        return Ok(options);
    };
    for pair in table.clone().pairs::<Value, Value>() {
        let (key, value) = pair.map_err(internal)?;
        let key = lua.coerce_string(key).map_err(internal)?.map(|key| key.to_string_lossy());
        match key.as_deref() {
            Some("asynchronous") => options.asynchronous = truth(&value),
            Some("timeout_ms") => {
                let number = lua.coerce_number(value).map_err(internal)?;
                options.timeout = timeout(number.ok_or_else(|| args.expected(4, "number"))? as i32)?;
            }
            // Which spans are sampled is their parent's choice here.
            Some("trace_sampled") => {}
            Some("return_duplicate_headers") => options.repeated = truth(&value),
            Some("send_xff") => options.forwarded = truth(&value),
            key => {
                let key = key.unwrap_or_default();
                return Err(Fail(format!("\"{key}\" is not valid key for httpCall() options")));
            }
        }
    }
    Ok(options)
}

pub(super) fn http_call(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let options = options(lua, args)?;
    let cluster = args.name(1)?;
    args.table(2)?;
    if session.worker.clusters.get(&cluster).is_none() {
        return Err(Fail::from("http call cluster invalid. Must be configured"));
    }
    let mut headers = headers_of(lua, args, 2)?;
    headers.remove_broken();
    if ![HeaderId::PATH, HeaderId::METHOD, HeaderId::AUTHORITY].iter().all(|id| headers.contains(*id)) {
        return Err(Fail::from("http call headers must include ':path', ':method', and ':authority'"));
    }
    let body = optional(args, 3)?;
    if let Some(body) = &body {
        headers.set(HeaderId::CONTENT_LENGTH, body.len().to_string());
    }
    if let Some(trace) = &session.live()?.trace {
        trace.inject(&mut headers);
    }
    let request = CallRequest {
        headers,
        body: body.unwrap_or_default(),
        timeout: options.timeout,
        forwarded: options.forwarded,
    };
    let call = Box::new(Call { cluster, request, repeated: options.repeated });
    if options.asynchronous {
        let worker = session.worker.clone();
        tokio::task::spawn_local(send(worker, call));
        return Return::none();
    }
    session.ask(Asked::Call(call))
}

/// Sends the request; whatever becomes of it is an answer.
pub(super) async fn send(worker: Rc<Worker>, mut call: Box<Call>) -> Answer {
    callout::answer(&worker.clusters, call.request()).await
}

/// An answer as the script gets it: headers and body.
pub(super) fn values(lua: &Lua, answer: &Answer, repeated: bool) -> mlua::Result<MultiValue> {
    let headers = lua.create_table()?;
    for (_, name, value) in answer.headers.iter() {
        let (name, value) = (lua.create_string(name)?, lua.create_string(value)?);
        match headers.raw_get::<Value>(&name)? {
            Value::Table(values) if repeated => values.raw_push(value)?,
            Value::String(first) if repeated => {
                let values: Table = lua.create_sequence_from([first, value])?;
                headers.raw_set(name, values)?;
            }
            _ => headers.raw_set(name, value)?,
        }
    }
    let body = match &*answer.body {
        [] => Value::Nil,
        body => Value::String(lua.create_string(body)?),
    };
    Ok(MultiValue::from_vec(vec![Value::Table(headers), body]))
}
