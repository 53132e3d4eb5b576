//! Objects in a script's hands, and the way from its calls to ours.
//!
//! A method is a plain function over [`Args`]; what it returns goes through `prelude.lua`, which raises its errors as
//! Lua texts and makes it wait. An object lives until its script waits or ends, as in Envoy, and says so afterwards;
//! the stream's handle lives as long as its stream, but only its own script may use it.

use std::marker::PhantomData;
use std::rc::Rc;

use mlua::{
    AnyUserData, Function, IntoLua, Lua, LuaString, MultiValue, Table, UserData, UserDataFields, UserDataRef,
    Value,
};
use sampan_core::log;
use sampan_core::log::{Component, Level};

use super::session::Session;

/// Why a call failed, in Envoy's words.
pub(super) struct Fail(pub(super) String);

impl<T: Into<String>> From<T> for Fail {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

/// How a method ends.
pub(super) enum Return {
    /// With values.
    Values(MultiValue),
    /// Later: the script waits for what the session was asked.
    Wait,
}

impl Return {
    /// Without a value; not the same as nil where it is an argument.
    pub(super) fn none() -> Result<Self, Fail> {
        Ok(Self::Values(MultiValue::new()))
    }

    pub(super) fn value(lua: &Lua, value: impl IntoLua) -> Result<Self, Fail> {
        let value = value.into_lua(lua).map_err(internal)?;
        Ok(Self::Values(MultiValue::from_vec(vec![value])))
    }

    /// A text, or nothing.
    pub(super) fn text(lua: &Lua, text: Option<&[u8]>) -> Result<Self, Fail> {
        match text {
            Some(text) => Self::value(lua, lua.create_string(text).map_err(internal)?),
            None => Self::none(),
        }
    }

    /// An object of this session.
    pub(super) fn object<K: Kind>(lua: &Lua, session: &Rc<Session>, own: K) -> Result<Self, Fail> {
        Self::value(lua, Object::new(session, own))
    }
}

/// What the interpreter could not do; memory is what it mostly lacks then.
pub(super) fn internal(error: mlua::Error) -> Fail {
    Fail(error.to_string())
}

/// A method: of an object's type, or a plain function of the prelude.
pub(super) type Method = fn(&Lua, &Args) -> Result<Return, Fail>;

/// What a method is called with; the object itself is argument 0.
pub(super) struct Args<'a> {
    lua: &'a Lua,
    name: &'static str,
    values: MultiValue,
}

impl Args<'_> {
    pub(super) fn len(&self) -> usize {
        self.values.len().saturating_sub(1)
    }

    pub(super) fn value(&self, n: usize) -> Option<&Value> {
        self.values.get(n)
    }

    /// The object, alive.
    pub(super) fn this<K: Kind>(&self) -> Result<UserDataRef<Object<K>>, Fail> {
        let object = match self.value(0) {
            Some(Value::UserData(data)) => data.borrow::<Object<K>>().ok(),
            _ => None,
        };
        let object = object.ok_or_else(|| self.expected(0, K::NAME))?;
        if object.is_dead() {
            return Err(Fail::from("object used outside of proper scope"));
        }
        Ok(object)
    }

    pub(super) fn expected(&self, n: usize, what: &str) -> Fail {
        let got = match self.value(n) {
            None => "no value",
            Some(value) => type_name(value),
        };
        // What is no object cannot have been called with a colon.
        self.bad(n.max(1), &format!("{what} expected, got {got}"))
    }

    pub(super) fn bad(&self, n: usize, why: &str) -> Fail {
        Fail(format!("bad argument #{n} to '{}' ({why})", self.name))
    }

    /// A text; a number becomes one.
    pub(super) fn bytes(&self, n: usize) -> Result<LuaString, Fail> {
        match self.value(n) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(number @ (Value::Number(_) | Value::Integer(_))) => {
                let text = self.lua.coerce_string(number.clone()).map_err(internal)?;
                text.ok_or_else(|| self.expected(n, "string"))
            }
            _ => Err(self.expected(n, "string")),
        }
    }

    /// A text up to its first NUL.
    pub(super) fn text(&self, n: usize) -> Result<Vec<u8>, Fail> {
        let bytes = self.bytes(n)?;
        Ok(up_to_nul(&bytes.as_bytes()).to_vec())
    }

    /// A name, of metadata or a cluster.
    pub(super) fn name(&self, n: usize) -> Result<String, Fail> {
        Ok(String::from_utf8_lossy(&self.text(n)?).into_owned())
    }

    pub(super) fn number(&self, n: usize) -> Result<f64, Fail> {
        let number = match self.value(n) {
            Some(Value::Integer(number)) => Some(*number as f64),
            Some(Value::Number(number)) => Some(*number),
            Some(text @ Value::String(_)) => self.lua.coerce_number(text.clone()).map_err(internal)?,
            _ => None,
        };
        number.ok_or_else(|| self.expected(n, "number"))
    }

    /// A number as C makes an `int` of it.
    pub(super) fn int(&self, n: usize) -> Result<i32, Fail> {
        Ok(self.number(n)? as i32)
    }

    pub(super) fn boolean(&self, n: usize) -> Result<bool, Fail> {
        match self.value(n) {
            Some(Value::Boolean(value)) => Ok(*value),
            _ => Err(self.expected(n, "boolean")),
        }
    }

    pub(super) fn table(&self, n: usize) -> Result<&Table, Fail> {
        match self.value(n) {
            Some(Value::Table(table)) => Ok(table),
            _ => Err(self.expected(n, "table")),
        }
    }
}

pub(super) fn up_to_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Nil => "nil",
        Value::Boolean(_) => "boolean",
        Value::LightUserData(_) | Value::UserData(_) | Value::Error(_) => "userdata",
        Value::Integer(_) | Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Table(_) => "table",
        Value::Function(_) => "function",
        Value::Thread(_) => "thread",
        _ => "cdata",
    }
}

/// A type of object.
pub(super) trait Kind: 'static {
    /// Its name in errors, and of its method table in the registry.
    const NAME: &'static str;
    /// Its methods; `__pairs` among them.
    const METHODS: &'static [(&'static str, Method)];
    /// Whether it lives as long as its stream.
    const LASTS: bool = false;
}

/// An object of a type, in one script's hands.
pub(super) struct Object<K> {
    pub(super) session: Rc<Session>,
    pub(super) own: K,
    turn: u32,
}

impl<K: Kind> Object<K> {
    pub(super) fn new(session: &Rc<Session>, own: K) -> Self {
        Self { session: session.clone(), own, turn: session.turn.get() }
    }

    fn is_dead(&self) -> bool {
        if K::LASTS { !self.session.running.get() } else { self.turn != self.session.turn.get() }
    }
}

impl<K: Kind> UserData for Object<K> {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        fields.add_meta_field_with("__index", |lua| lua.named_registry_value::<Table>(K::NAME));
        if K::METHODS.iter().any(|(name, _)| *name == "__pairs") {
            fields.add_meta_field_with("__pairs", |lua| {
                lua.named_registry_value::<Table>(K::NAME)?.raw_get::<Function>("__pairs")
            });
        }
    }
}

/// A method as a Lua function.
pub(super) fn function(
    lua: &Lua,
    wrap: &Function,
    name: &'static str,
    method: Method,
) -> mlua::Result<Function> {
    let raw = lua.create_function(move |lua, values: MultiValue| {
        Ok(match method(lua, &Args { lua, name, values }) {
            Ok(Return::Values(mut values)) => {
                values.push_front(Value::Integer(0));
                values
            }
            Err(Fail(text)) => {
                MultiValue::from_vec(vec![Value::Integer(1), Value::String(lua.create_string(text)?)])
            }
            Ok(Return::Wait) => MultiValue::from_vec(vec![Value::Integer(2)]),
        })
    })?;
    wrap.call(raw)
}

/// Makes a type known to a state.
pub(super) fn register<K: Kind>(lua: &Lua, wrap: &Function) -> mlua::Result<()> {
    let methods = lua.create_table()?;
    for (name, method) in K::METHODS.iter().chain(Logs::<K>::METHODS) {
        methods.raw_set(*name, function(lua, wrap, name, *method)?)?;
    }
    lua.set_named_registry_value(K::NAME, methods)
}

/// `logTrace` and its siblings, which every object has.
struct Logs<K>(PhantomData<K>);

macro_rules! logs {
    ($($name:ident $method:literal $level:ident),*) => {
        impl<K: Kind> Logs<K> {
            const METHODS: &'static [(&'static str, Method)] = &[$(($method, Self::$name)),*];
            $(fn $name(_: &Lua, args: &Args) -> Result<Return, Fail> {
                args.this::<K>()?;
                script_log(Level::$level, &args.bytes(1)?.to_string_lossy());
                Return::none()
            })*
        }
    };
}

logs!(trace "logTrace" Trace, debug "logDebug" Debug, info "logInfo" Info, warn "logWarn" Warn, err "logErr" Error,
    critical "logCritical" Critical);

/// A script's own line in the proxy's log.
pub(super) fn script_log(level: Level, text: &str) {
    log!(Component::Lua, level, "script log: {text}");
}

/// The object that a value is, for iterators.
pub(super) fn object_of(value: &AnyUserData) -> Value {
    Value::UserData(value.clone())
}
