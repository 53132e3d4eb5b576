//! A script's interpreter: one for each script and thread.
//!
//! Envoy runs LuaJIT 2.1 with the 5.2 extensions, and so does this: `mlua` (MIT, kept up since 2019) with the LuaJIT
//! that it brings, linked statically. Its safe half is all that is used, so that scripts have the standard library but
//! for `ffi`, `debug` (of which there is `traceback`) and modules written in C. A script that loops for ever holds its
//! worker up for ever, as in Envoy. Making an interpreter runs the whole of the script: at configuration once, where a
//! mistake refuses the configuration, and on each worker when a request first needs it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use mlua::{Function, Lua, Table, Value};
use sampan_core::log::Level;
use sampan_core::stats::Gauge;

use super::crypto::PublicKey;
use super::handle::Handle;
use super::headers::{Buffer, OfHead, OfTrailers};
use super::object::{register, script_log};
use super::{info, ssl};

/// In the registry: binds a function to its first argument.
pub(super) const BIND: &str = "bind";
/// In the registry: Lua's own `next`.
pub(super) const NEXT: &str = "next";

/// A script that was found good, and what it defines.
pub(super) struct Setup {
    id: u64,
    code: String,
    pub(super) on_request: bool,
    pub(super) on_response: bool,
    /// `lua.lua_vm_count`; none of what a route brings.
    count: Option<Gauge>,
    alive: Arc<()>,
}

/// An interpreter that has run the script.
pub(super) struct Vm {
    pub(super) lua: Lua,
    /// Lua's own `coroutine.resume`, which adds nothing to errors.
    pub(super) resume: Function,
    pub(super) on_request: Option<Function>,
    pub(super) on_response: Option<Function>,
    count: Option<Gauge>,
}

type Known = HashMap<u64, (Weak<()>, Option<Rc<Vm>>)>;

thread_local! {
    static VMS: RefCell<Known> = RefCell::default();
}

impl Setup {
    /// Tries a script.
    pub(super) fn new(code: String, count: Option<Gauge>) -> Result<Self, String> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let vm = Vm::new(&code, None)?;
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            code,
            on_request: vm.on_request.is_some(),
            on_response: vm.on_response.is_some(),
            count,
            alive: Arc::new(()),
        })
    }

    /// This thread's interpreter; none where the script that was good then fails now.
    pub(super) fn vm(&self) -> Option<Rc<Vm>> {
        VMS.with_borrow_mut(|known| {
            if let Some((_, vm)) = known.get(&self.id) {
                return vm.clone();
            }
            // Whose configuration is gone is only noticed when another comes.
            known.retain(|_, (alive, _)| alive.strong_count() > 0);
            let made = Vm::new(&self.code, self.count.clone());
            let vm = made.inspect_err(|error| script_log(Level::Error, error)).ok().map(Rc::new);
            known.insert(self.id, (Arc::downgrade(&self.alive), vm.clone()));
            vm
        })
    }
}

impl Vm {
    fn new(code: &str, count: Option<Gauge>) -> Result<Self, String> {
        let failed = |error: mlua::Error| format!("script load error: {error}");
        let lua = Lua::new();
        let resume = prepare(&lua).map_err(failed)?;
        let script = lua.load(code).set_name(code).into_function().map_err(|error| match error {
            mlua::Error::SyntaxError { message, .. } => format!("script load error: {message}"),
            error => failed(error),
        })?;
        let (done, result): (bool, Value) =
            resume.call((lua.create_thread(script).map_err(failed)?,)).map_err(failed)?;
        if !done {
            return Err(format!("script load error: {}", super::drive::message(&result)));
        }
        let globals = lua.globals();
        let function = |name: &str| globals.get::<Function>(name).ok();
        let (on_request, on_response) = (function("envoy_on_request"), function("envoy_on_response"));
        let units = lua.create_table_from([("MILLISECOND", 0), ("MICROSECOND", 1)]).map_err(failed)?;
        globals.set("EnvoyTimestampResolution", units).map_err(failed)?;
        if let Some(count) = &count {
            count.inc();
        }
        Ok(Self { lua, resume, on_request, on_response, count })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(count) = &self.count {
            count.dec();
        }
    }
}

/// Makes our types known, before the script can touch anything that they are made of.
fn prepare(lua: &Lua) -> mlua::Result<Function> {
    let (wrap, bind): (Function, Function) = lua.load(include_str!("prelude.lua")).eval()?;
    let globals = lua.globals();
    lua.set_named_registry_value(BIND, bind)?;
    lua.set_named_registry_value(NEXT, globals.get::<Function>("next")?)?;
    register::<Handle>(lua, &wrap)?;
    register::<OfHead>(lua, &wrap)?;
    register::<OfTrailers>(lua, &wrap)?;
    register::<Buffer>(lua, &wrap)?;
    register::<info::Metadata>(lua, &wrap)?;
    register::<info::VirtualHost>(lua, &wrap)?;
    register::<info::RouteOfStream>(lua, &wrap)?;
    register::<info::StreamInfo>(lua, &wrap)?;
    register::<info::DynamicMetadata>(lua, &wrap)?;
    register::<info::FilterState>(lua, &wrap)?;
    register::<info::Connection>(lua, &wrap)?;
    register::<info::ConnectionStreamInfo>(lua, &wrap)?;
    register::<PublicKey>(lua, &wrap)?;
    register::<ssl::Ssl>(lua, &wrap)?;
    register::<ssl::ParsedName>(lua, &wrap)?;
    let debug = lua.create_table()?;
    debug.set(
        "traceback",
        lua.create_function(|lua, (text, _): (Value, Value)| match &text {
            Value::Nil => lua.traceback(None, 1).map(Value::String),
            Value::String(words) => lua.traceback(Some(&words.to_string_lossy()), 1).map(Value::String),
            _ => Ok(text),
        })?,
    )?;
    globals.set("debug", debug)?;
    globals.get::<Table>("coroutine")?.get("resume")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(code: &str) -> Result<Setup, String> {
        Setup::new(code.to_owned(), None)
    }

    #[test]
    fn what_a_script_defines_is_known() {
        let setup = load("function envoy_on_request() end").unwrap();
        assert!(setup.on_request && !setup.on_response);
        assert!(!load("envoy_on_response = 1").unwrap().on_response);
        assert!(setup.vm().unwrap().on_request.is_some());
    }

    #[test]
    fn mistakes_are_told_in_luas_words() {
        let error = |code| load(code).err().unwrap();
        assert_eq!(error("("), "script load error: [string \"(\"]:1: unexpected symbol near '<eof>'");
        assert_eq!(error("error('no')"), "script load error: [string \"error('no')\"]:1: no");
        assert_eq!(error("error({})"), "script load error: unspecified lua error");
    }

    #[test]
    fn an_interpreter_goes_when_another_comes_for_a_new_script() {
        let (old, kept) = (load("x = 1").unwrap(), load("x = 2").unwrap());
        let gone = Rc::downgrade(&old.vm().unwrap());
        let kept = kept.vm().map(|vm| (Rc::downgrade(&vm), kept)).unwrap();
        drop(old);
        assert!(gone.upgrade().is_some());
        assert!(load("x = 3").unwrap().vm().is_some());
        assert!(gone.upgrade().is_none());
        assert!(kept.0.upgrade().is_some());
    }

    #[test]
    fn scripts_cannot_reach_the_process_memory() {
        for code in [
            "not pcall(require, 'ffi')",
            "not ffi",
            "not debug.sethook",
            "not pcall(package.loadlib, 'a.so', '*')",
        ] {
            assert_eq!(load(&format!("assert({code})")).err(), None, "{code}");
        }
        assert_eq!(load("assert(debug.traceback('x'):find('stack traceback'))").err(), None);
    }
}
