//! The stream's handle: what `envoy_on_request` and `envoy_on_response` are called with.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use mlua::{Function, Lua, Table, Value};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};

use super::headers::{Buffer, OfHead, OfTrailers, append, name_of};
use super::info::{
    Connection, ConnectionStreamInfo, Fields, Metadata, RouteOfStream, StreamInfo, VirtualHost,
};
use super::object::{Args, Fail, Kind, Method, Object, Return, internal};
use super::session::{Asked, Session, Way};
use crate::filter::LocalReply;

/// See the module.
pub(super) struct Handle;

impl Kind for Handle {
    const NAME: &'static str = "handle";
    const LASTS: bool = true;
    const METHODS: &'static [(&'static str, Method)] = &[
        ("headers", headers),
        ("body", body),
        ("bodyChunks", body_chunks),
        ("__chunk", chunk),
        ("trailers", trailers),
        ("respond", respond),
        ("httpCall", super::call::http_call),
        ("metadata", metadata),
        ("virtualHost", |lua, args| Return::object(lua, &session(args)?, VirtualHost)),
        ("route", |lua, args| Return::object(lua, &session(args)?, RouteOfStream)),
        ("streamInfo", |lua, args| Return::object(lua, &session(args)?, StreamInfo)),
        ("connection", |lua, args| Return::object(lua, &session(args)?, Connection)),
        ("connectionStreamInfo", |lua, args| Return::object(lua, &session(args)?, ConnectionStreamInfo)),
        ("filterContext", filter_context),
        ("clearRouteCache", clear_route_cache),
        ("setUpstreamOverrideHost", set_upstream_override_host),
        ("importPublicKey", super::crypto::import_public_key),
        ("verifySignature", super::crypto::verify_signature),
        ("base64Escape", base64_escape),
        ("timestamp", timestamp),
        ("timestampString", timestamp_string),
    ];
}

pub(super) fn session(args: &Args) -> Result<Rc<Session>, Fail> {
    Ok(args.this::<Handle>()?.session.clone())
}

pub(super) fn object<K: Kind>(lua: &Lua, session: &Rc<Session>, own: K) -> mlua::Result<Value> {
    mlua::IntoLua::into_lua(Object::new(session, own), lua)
}

fn headers(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    Return::object(lua, &session(args)?, OfHead)
}

fn body(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let always = args.len() > 0 && args.boolean(1)?;
    let mut live = session.live()?;
    if !live.end {
        if live.saw_body {
            return Err(Fail::from("cannot call body() after body streaming has started"));
        }
        live.buffered = true;
        live.asked = Asked::Body;
        return Ok(Return::Wait);
    }
    if !live.buffered && live.saw_body {
        return Err(Fail::from("cannot call body() after body has been streamed"));
    }
    if live.body.is_none() {
        if !always {
            return Return::none();
        }
        live.body = Some(Bytes::new());
    }
    drop(live);
    Return::object(lua, &session, Buffer)
}

fn body_chunks(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    if session(args)?.live()?.saw_body {
        return Err(Fail::from("cannot call bodyChunks after body processing has begun"));
    }
    let bind: Function = lua.named_registry_value(super::vm::BIND).map_err(internal)?;
    let methods: Table = lua.named_registry_value(Handle::NAME).map_err(internal)?;
    let chunk: Function = methods.raw_get("__chunk").map_err(internal)?;
    let iterator: Function = bind.call((chunk, args.value(0).cloned())).map_err(internal)?;
    Return::value(lua, iterator)
}

fn chunk(_: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    if session.live()?.end {
        return Return::none();
    }
    session.ask(Asked::Chunk)
}

fn trailers(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let live = session.live()?;
    if live.trailers.is_some() {
        drop(live);
        return Return::object(lua, &session, OfTrailers);
    }
    if live.end {
        return Return::none();
    }
    drop(live);
    session.ask(Asked::Trailers)
}

/// The only thing here that has the route picked anew where headers have changed; the others see the old one.
fn metadata(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let live = session.live()?;
    if live.route_stale && live.metadata_of.is_none() {
        drop(live);
        return session.ask(Asked::Route(metadata_of_route));
    }
    drop(live);
    let value = metadata_of_route(lua, &session).map_err(internal)?;
    Return::value(lua, value)
}

/// The route's metadata under the filter's name, or else under the usual one.
fn metadata_of_route(lua: &Lua, session: &Rc<Session>) -> mlua::Result<Value> {
    let mut live = session.live.borrow_mut();
    let all = live.facts.route_metadata.clone();
    let (all, name) = live.metadata_of.get_or_insert_with(|| {
        let own = all.as_ref().is_some_and(|all| all.contains_key(&*session.filter_name));
        let name = if own { &session.filter_name } else { "envoy.filters.http.lua" };
        (all, name.into())
    });
    let fields = all.clone().map_or(Fields::None, |all| Fields::Of(all, name.clone()));
    drop(live);
    object(lua, session, Metadata(fields))
}

fn filter_context(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let context = session.live()?.context.clone();
    Return::object(lua, &session, Metadata(context.map_or(Fields::None, Fields::Context)))
}

fn clear_route_cache(_: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let mut live = session.live()?;
    live.route_stale |= session.way == Way::Request && !live.continued;
    Return::none()
}

/// For requests; a response has its host already.
fn set_upstream_override_host(_: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let host = args.name(1)?;
    if host.parse::<IpAddr>().is_err() && host.parse::<SocketAddr>().is_err() {
        return Err(Fail::from("host is not a valid IP address"));
    }
    let strict = args.len() >= 2 && args.boolean(2)?;
    if session.way == Way::Request {
        session.live()?.override_host = Some((host.into(), strict));
    }
    Return::none()
}

/// Headers from a table: of texts, numbers, or lists of them.
pub(super) fn headers_of(lua: &Lua, args: &Args, n: usize) -> Result<HeaderMap, Fail> {
    let mut headers = HeaderMap::new();
    let text = |value: Value| match &value {
        Value::String(_) | Value::Number(_) | Value::Integer(_) => {
            lua.coerce_string(value).map_err(internal)?.ok_or_else(|| Fail::from("no string"))
        }
        // What Envoy says counts the arguments of its own stack.
        other => Err(args.bad(n, &format!("string expected, got {}", super::object::type_name(other)))),
    };
    for pair in args.table(n)?.clone().pairs::<Value, Value>() {
        let (key, value) = pair.map_err(internal)?;
        let key = text(key)?;
        let key = &name_of(super::object::up_to_nul(&key.as_bytes()))?;
        if let Value::Table(values) = value {
            for value in values.pairs::<Value, Value>() {
                let value = text(value.map_err(internal)?.1)?;
                append(&mut headers, key, super::object::up_to_nul(&value.as_bytes()));
            }
        } else {
            append(&mut headers, key, super::object::up_to_nul(&text(value)?.as_bytes()));
        }
    }
    Ok(headers)
}

/// A text that need not be there.
pub(super) fn optional(args: &Args, n: usize) -> Result<Option<Bytes>, Fail> {
    match args.value(n) {
        None | Some(Value::Nil) => Ok(None),
        Some(_) => Ok(Some(Bytes::copy_from_slice(&args.bytes(n)?.as_bytes()))),
    }
}

fn respond(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    if session.live()?.continued {
        return Err(Fail::from("respond() cannot be called if headers have been continued"));
    }
    args.table(1)?;
    let body = optional(args, 2)?;
    let headers = headers_of(lua, args, 1)?;
    let status = headers.get_str(HeaderId::STATUS).and_then(|status| status.parse().ok());
    let status: u16 = status
        .filter(|status| (200..600).contains(status))
        .ok_or_else(|| Fail::from(":status must be between 200-599"))?;
    if session.way == Way::Response {
        return Err(Fail::from("respond not currently supported in the response path"));
    }
    let body = body.map(|body| String::from_utf8_lossy(&body).into_owned());
    let mut reply = LocalReply::new(status, "lua_response").body(body.unwrap_or_default());
    for (id, name, value) in headers.iter() {
        if id != HeaderId::STATUS && (id != HeaderId::CONTENT_LENGTH || reply.body.is_empty()) {
            reply.headers.push((HeaderName::new(name), value.to_vec()));
        }
    }
    session.ask(Asked::Reply(Box::new(reply)))
}

fn base64_escape(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    session(args)?;
    Return::value(lua, STANDARD.encode(&*args.bytes(1)?.as_bytes()))
}

/// Which unit of time is asked for: 0 for milliseconds, 1 for microseconds.
fn resolution(args: &Args) -> Result<Option<u8>, Fail> {
    let text = optional(args, 1)?.unwrap_or_default();
    let text = std::str::from_utf8(&text).unwrap_or("?").trim();
    Ok(if text.is_empty() { Some(0) } else { text.parse().ok() })
}

fn since_epoch() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn timestamp(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    session(args)?;
    match resolution(args)? {
        Some(0) => Return::value(lua, since_epoch().as_millis() as f64),
        _ => Err(Fail::from("timestamp format must be MILLISECOND.")),
    }
}

fn timestamp_string(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    session(args)?;
    let now = since_epoch();
    match resolution(args)? {
        Some(0) => Return::value(lua, now.as_millis().to_string()),
        Some(1) => Return::value(lua, now.as_micros().to_string()),
        _ => Err(Fail::from("timestamp format must be MILLISECOND or MICROSECOND.")),
    }
}
