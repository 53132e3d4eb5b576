//! The header object (headers and trailers) and the buffer object.

use std::cell::RefMut;
use std::rc::Rc;

use bytes::Bytes;
use mlua::{Function, Lua, MultiValue, Value};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stream_info::Protocol;

use super::object::{Args, Fail, Kind, Method, Return, internal, object_of};
use super::session::{Headers, Live, Session, Way};
use crate::filters::mutation_rules::name_is_valid;
use crate::route::{as_stored, is_inline};

/// `headers()`
pub(super) struct OfHead;
/// `trailers()`
pub(super) struct OfTrailers;

/// Which of the two.
trait Part: Kind + Sized {
    const TRAILERS: bool;

    fn map(live: &mut Live) -> Option<(&mut HeaderMap, &mut Option<Headers>)> {
        if Self::TRAILERS {
            Some((live.trailers.as_mut()?, &mut live.trailer_iterator))
        } else {
            Some((&mut live.headers, &mut live.header_iterator))
        }
    }
}

impl Part for OfHead {
    const TRAILERS: bool = false;
}

impl Part for OfTrailers {
    const TRAILERS: bool = true;
}

impl Kind for OfHead {
    const NAME: &'static str = "headers";
    const METHODS: &'static [(&'static str, Method)] = Methods::<Self>::ALL;
}

impl Kind for OfTrailers {
    const NAME: &'static str = "trailers";
    const METHODS: &'static [(&'static str, Method)] = Methods::<Self>::ALL;
}

struct Methods<P>(std::marker::PhantomData<P>);

impl<P: Part> Methods<P> {
    const ALL: &'static [(&'static str, Method)] = &[
        ("add", add::<P>),
        ("get", get::<P>),
        ("getAtIndex", get_at_index::<P>),
        ("getNumValues", get_num_values::<P>),
        ("remove", remove::<P>),
        ("replace", replace::<P>),
        ("setHttp1ReasonPhrase", set_reason_phrase::<P>),
        ("__pairs", pairs::<P>),
        ("__next", next::<P>),
    ];
}

fn read<P: Part, R>(args: &Args, f: impl FnOnce(&HeaderMap) -> R) -> Result<R, Fail> {
    let this = args.this::<P>()?;
    let mut live = this.session.live()?;
    let (map, _) = P::map(&mut live).ok_or_else(|| Fail::from("no trailers"))?;
    Ok(f(map))
}

/// Lets a change through, or says why there can be none.
fn change<P: Part>(args: &Args, f: impl FnOnce(&mut HeaderMap)) -> Result<Return, Fail> {
    let this = args.this::<P>()?;
    let session: &Rc<Session> = &this.session;
    let mut live: RefMut<'_, Live> = session.live()?;
    let live = &mut *live;
    if !P::TRAILERS && live.header_iterator.is_some() || P::TRAILERS && live.trailer_iterator.is_some() {
        return Err(Fail::from("header map cannot be modified while iterating"));
    }
    if !P::TRAILERS {
        if live.continued {
            return Err(Fail::from("header map can no longer be modified"));
        }
        live.route_stale |= session.way == Way::Request && session.clears_route;
    }
    let (map, _) = P::map(live).ok_or_else(|| Fail::from("no trailers"))?;
    f(map);
    Return::none()
}

/// A name that can be sent: what a script takes from a client must not end the line.
pub(super) fn name_of(text: &[u8]) -> Result<HeaderName, Fail> {
    if !text.starts_with(b":") && !name_is_valid(text) {
        return Err(Fail::from("header name is not valid"));
    }
    Ok(as_stored(&HeaderName::new(text)).clone())
}

fn name(args: &Args) -> Result<HeaderName, Fail> {
    name_of(&args.text(1)?)
}

fn whole_name(args: &Args) -> Result<HeaderName, Fail> {
    Ok(as_stored(&HeaderName::new(&*args.bytes(1)?.as_bytes())).clone())
}

/// Another value of a header; what there can only be one of grows by a comma.
pub(super) fn append(headers: &mut HeaderMap, name: &HeaderName, value: &[u8]) {
    match name.id() {
        id if is_inline(id) => headers.append_to_value(id, ",", value),
        _ => headers.append_name(name, value),
    }
}

fn add<P: Part>(_: &Lua, args: &Args) -> Result<Return, Fail> {
    // What may not be changed is told before what is wrong with the arguments.
    change::<P>(args, |_| {})?;
    let (name, value) = (name(args)?, args.text(2)?);
    change::<P>(args, |headers| append(headers, &name, &value))
}

fn replace<P: Part>(_: &Lua, args: &Args) -> Result<Return, Fail> {
    change::<P>(args, |_| {})?;
    let (name, value) = (name(args)?, args.text(2)?);
    change::<P>(args, |headers| {
        if is_inline(name.id()) {
            headers.set_name(&name, &value);
        } else {
            headers.remove_name(&name);
            headers.append_name(&name, &value);
        }
    })
}

fn remove<P: Part>(_: &Lua, args: &Args) -> Result<Return, Fail> {
    change::<P>(args, |_| {})?;
    let name = name(args)?;
    change::<P>(args, |headers| {
        headers.remove_name(&name);
    })
}

fn get<P: Part>(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    args.this::<P>()?;
    let name = whole_name(args)?;
    let value = read::<P, _>(args, |headers| headers.joined(&name).map(|value| lua.create_string(value)))?;
    match value {
        Some(value) => Return::value(lua, value.map_err(internal)?),
        None => Return::none(),
    }
}

fn get_at_index<P: Part>(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    args.this::<P>()?;
    let (name, index) = (whole_name(args)?, args.int(2)?);
    let Ok(index) = usize::try_from(index) else { return Return::none() };
    let value = read::<P, _>(args, |headers| headers.get_all_name(&name).nth(index).map(<[u8]>::to_vec))?;
    Return::text(lua, value.as_deref())
}

fn get_num_values<P: Part>(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    args.this::<P>()?;
    let name = whole_name(args)?;
    let count = read::<P, _>(args, |headers| headers.get_all_name(&name).count())?;
    Return::value(lua, count as f64)
}

/// There are reason phrases of one's own only where HTTP/1 keeps the spelling of names, which this is not wired to.
fn set_reason_phrase<P: Part>(_: &Lua, args: &Args) -> Result<Return, Fail> {
    change::<P>(args, |_| {})?;
    args.bytes(1)?;
    Err(Fail::from("setHttp1ReasonPhrase() is not supported"))
}

fn pairs<P: Part>(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let this = args.this::<P>()?;
    let mut live = this.session.live()?;
    let http1 = live.facts.protocol < Some(Protocol::Http2);
    let (map, iterator) = P::map(&mut live).ok_or_else(|| Fail::from("no trailers"))?;
    if iterator.is_some() {
        return Err(Fail::from("cannot create a second iterator before completing the first"));
    }
    *iterator = Some(in_order(map, http1).into_iter());
    drop(live);
    let methods: mlua::Table = lua.named_registry_value(P::NAME).map_err(internal)?;
    let next: Function = methods.raw_get("__next").map_err(internal)?;
    let Some(Value::UserData(this)) = args.value(0) else { return Return::none() };
    Ok(Return::Values(MultiValue::from_vec(vec![Value::Function(next), object_of(this)])))
}

/// All headers in Envoy's order: it makes the pseudo headers of an HTTP/1 request in one of its own, and leaves those of
/// HTTP/2 in the client's, of which the usual one is taken.
fn in_order(map: &HeaderMap, http1: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    const HTTP1: [HeaderId; 4] = [HeaderId::AUTHORITY, HeaderId::PATH, HeaderId::METHOD, HeaderId::SCHEME];
    const HTTP2: [HeaderId; 4] = [HeaderId::METHOD, HeaderId::SCHEME, HeaderId::AUTHORITY, HeaderId::PATH];
    let first = if http1 { HTTP1 } else { HTTP2 };
    let pseudo = first.iter().flat_map(|id| map.get_all(*id).map(|value| (id.name().as_bytes(), value)));
    let rest = map.iter().filter(|(id, ..)| !first.contains(id)).map(|(_, name, value)| (name, value));
    pseudo.chain(rest).map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

fn next<P: Part>(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let this = args.this::<P>()?;
    let mut live = this.session.live()?;
    let Some((_, iterator)) = P::map(&mut live) else { return Return::none() };
    let Some((name, value)) = iterator.as_mut().and_then(Iterator::next) else {
        *iterator = None;
        return Return::none();
    };
    drop(live);
    let text = |bytes: Vec<u8>| lua.create_string(bytes).map(Value::String).map_err(internal);
    Ok(Return::Values(MultiValue::from_vec(vec![text(name)?, text(value)?])))
}

/// A body, or a piece of one.
pub(super) struct Buffer;

impl Kind for Buffer {
    const NAME: &'static str = "buffer";
    const METHODS: &'static [(&'static str, Method)] =
        &[("length", length), ("getBytes", get_bytes), ("setBytes", set_bytes)];
}

fn length(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let this = args.this::<Buffer>()?;
    let length = this.session.live()?.body.as_ref().map_or(0, Bytes::len);
    Return::value(lua, length as f64)
}

fn get_bytes(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let this = args.this::<Buffer>()?;
    let (index, length) = (args.int(1)?, args.int(2)?);
    let body = this.session.live()?.body.clone().unwrap_or_default();
    let part = usize::try_from(index)
        .ok()
        .zip(usize::try_from(length).ok())
        .and_then(|(index, length)| body.get(index..index.checked_add(length)?));
    let part = part
        .ok_or_else(|| Fail::from("index/length must be >= 0 and (index + length) must be <= buffer size"))?;
    Return::text(lua, Some(part))
}

fn set_bytes(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let this = args.this::<Buffer>()?;
    let mut live = this.session.live()?;
    // As in Envoy, what was there is gone even where nothing comes in its place.
    live.body = Some(Bytes::new());
    let bytes = Bytes::copy_from_slice(&args.bytes(1)?.as_bytes());
    let length = bytes.len();
    live.headers.set(HeaderId::CONTENT_LENGTH, length.to_string());
    live.body = Some(bytes);
    drop(live);
    Return::value(lua, length as f64)
}
