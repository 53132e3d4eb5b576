//! Whether the bytes of a message keep the schema and its constraints.
//!
//! One walk over the wire bytes does what Envoy does in three over the message: fields that it does not know,
//! deprecated fields and values, durations that are negative or overflow nanoseconds, and the constraints of
//! protoc-gen-validate. What stands in an `Any` is walked too if its type is known; whether an unknown type may stand
//! there is for the user of the message to say.
//!
//! Envoy checks an `Any` when the extension it configures is created, so an `Any` that nothing uses is never checked
//! there. Here it is.

mod rules;

use std::{cell::RefCell, collections::HashMap, rc::Rc};

use foldhash::fast::FixedState;

use crate::{
    any,
    encode::UnknownFields,
    error::{ErrorKind, LoadError, Path},
    group::{self, Grouped, default_of},
    schema::{Enum, Field, Kind, Message, WellKnown},
    wire::{Value, WireError},
};

/// Depth that protobuf readers allow.
const MAX_DEPTH: usize = 100;
/// Seconds whose nanoseconds fit 64 bits, as Envoy bounds durations.
const MAX_SECONDS: i64 = (i64::MAX - 999_999_999) / 1_000_000_000;

/// What runtime says about a key: true, false or nothing.
pub type Runtime<'a> = dyn Fn(&str) -> Option<bool> + 'a;

/// How to check.
#[derive(Clone, Copy)]
pub struct CheckOptions<'a> {
    /// What to do with fields that a message does not have.
    pub unknown: UnknownFields,
    /// Whether to look into `Any`.
    pub recurse_any: bool,
    /// What runtime says about a key, for deprecated features that are refused by default.
    pub runtime: Option<&'a Runtime<'a>>,
    /// Whether runtime is asked within `Any` only: Envoy reads a bootstrap before it has a runtime, so that a
    /// deprecated field in the bootstrap itself is never refused, one in an extension's configuration may be.
    pub runtime_in_any_only: bool,
}

impl Default for CheckOptions<'_> {
    fn default() -> Self {
        Self { unknown: UnknownFields::Reject, recurse_any: true, runtime: None, runtime_in_any_only: false }
    }
}

impl std::fmt::Debug for CheckOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckOptions").field("unknown", &self.unknown).finish_non_exhaustive()
    }
}

/// What is not wrong but worth a warning, in Envoy's words.
#[derive(Debug, Default, Clone)]
pub struct Report {
    /// Fields that a message does not have. Envoy counts each distinct one in `server.static_unknown_fields` or
    /// `server.dynamic_unknown_fields`.
    pub unknown: Vec<LoadError>,
    /// Uses of deprecated fields and values. Envoy counts them in `runtime.deprecated_feature_use`.
    pub deprecated: Vec<LoadError>,
    /// Uses of work in progress. Envoy counts them in `server.wip_protos`.
    pub work_in_progress: Vec<LoadError>,
}

/// Checks `bytes` as `message`.
pub fn check(message: Message, bytes: &[u8], options: &CheckOptions<'_>) -> Result<Report, LoadError> {
    let mut walk = Walk { options, report: Report::default(), within: 0 };
    walk.message(message, bytes, &Path::ROOT, 0)?;
    Ok(walk.report)
}

struct Walk<'o> {
    options: &'o CheckOptions<'o>,
    report: Report,
    /// How many `Any` we are in.
    within: usize,
}

fn broken(path: &Path<'_>, message: Message, error: WireError) -> LoadError {
    path.error(ErrorKind::Syntax, format!("{}: {error}", message.name()))
}

impl Walk<'_> {
    fn message(
        &mut self,
        message: Message,
        bytes: &[u8],
        path: &Path<'_>,
        depth: usize,
    ) -> Result<(), LoadError> {
        if depth > MAX_DEPTH {
            return Err(path.error(ErrorKind::TooLarge, format!("more than {MAX_DEPTH} levels of messages")));
        }
        match message.well_known() {
            WellKnown::Any => return self.any(bytes, path, depth),
            WellKnown::Duration => check_duration(message, bytes, path)?,
            _ => {}
        }
        let fields = Grouped::read(message, bytes).map_err(|e| broken(path, message, e))?;
        if !fields.unknown.is_empty() {
            self.unknown(message, &fields.unknown, path)?;
        }
        if message.is_work_in_progress() {
            let reason = format!("message '{}' is marked as work-in-progress", message.name());
            self.report.work_in_progress.push(path.error(ErrorKind::Deprecated, reason));
        }
        let checked = message.is_checked();
        let mut oneofs = 0u64;
        let absences = absences(message);
        let mut absences = absences.iter().copied().peekable();
        for (position, group) in fields.present() {
            while let Some(absent) = absences.next_if(|absent| *absent < position) {
                self.field(message, message.field_at(usize::from(absent)), &[], path, depth, checked)?;
            }
            absences.next_if_eq(&position);
            let field = message.field_at(usize::from(position));
            if let Some(oneof) = field.oneof() {
                oneofs |= 1 << (oneof & 63);
            }
            self.field(message, field, group, path, depth, checked)?;
        }
        for absent in absences {
            self.field(message, message.field_at(usize::from(absent)), &[], path, depth, checked)?;
        }
        if checked {
            check_oneofs(message, oneofs, path)?;
        }
        Ok(())
    }

    fn unknown(&mut self, message: Message, numbers: &[u32], path: &Path<'_>) -> Result<(), LoadError> {
        let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
        let reason = format!("{} has no field with number {}", message.name(), numbers.join(", "));
        let error = path.error(ErrorKind::UnknownField, reason);
        match self.options.unknown {
            UnknownFields::Reject => return Err(error),
            UnknownFields::Warn => self.report.unknown.push(error),
            UnknownFields::Ignore => {}
        }
        Ok(())
    }

    fn field(
        &mut self,
        message: Message,
        field: Field,
        group: &[(u16, Value<'_>)],
        path: &Path<'_>,
        depth: usize,
        checked: bool,
    ) -> Result<(), LoadError> {
        let rules = if checked { field.rules() } else { &[] };
        let path = path.known(field);
        if let (Some(values), false) = (field.enumeration(), field.is_repeated()) {
            let number = match group.last() {
                Some((_, Value::Varint(number))) => *number as i32,
                _ => 0,
            };
            self.deprecated_value(message, field, values, number, &path)?;
        }
        if group.is_empty() {
            return rules::absent(field, rules, &path);
        }
        if field.is_deprecated() {
            self.deprecated(message, field, &path)?;
        }
        if field.is_work_in_progress() {
            let reason = format!("field '{}.{}' is marked as work-in-progress", message.name(), field.name());
            self.report.work_in_progress.push(path.error(ErrorKind::Deprecated, reason));
        }
        if field.is_map() {
            return self.map(field, group, rules, &path, depth);
        }
        if field.is_repeated() {
            return self.repeated(field, group, rules, &path, depth);
        }
        if let Some(inner) = field.message() {
            return self.nested(inner, &group::merged(group), rules, &path, depth);
        }
        match group.last() {
            Some((_, value)) => scalar(field, value, rules, &path),
            None => Ok(()),
        }
    }

    fn nested(
        &mut self,
        message: Message,
        bytes: &[u8],
        rules: &[u8],
        path: &Path<'_>,
        depth: usize,
    ) -> Result<(), LoadError> {
        if !rules.is_empty() && !rules::message(message, bytes, rules, path)? {
            return Ok(());
        }
        self.message(message, bytes, path, depth + 1)
    }

    fn repeated(
        &mut self,
        field: Field,
        group: &[(u16, Value<'_>)],
        rules: &[u8],
        path: &Path<'_>,
        depth: usize,
    ) -> Result<(), LoadError> {
        let limits = rules::Repeated::read(rules);
        let mut elements = limits.unique.then(std::collections::HashSet::new);
        let mut count = 0;
        let visit = |index: usize, value: Value<'_>| -> Result<(), Fault> {
            count = index + 1;
            let path = path.index(index);
            if elements.as_mut().is_some_and(|seen| !seen.insert(rules::bits(&value))) {
                return Err(path
                    .error(ErrorKind::Constraint, "repeated value must contain unique items")
                    .into());
            }
            match (field.message(), value) {
                (Some(inner), Value::Bytes(bytes)) => {
                    self.nested(inner, bytes, limits.items, &path, depth)?
                }
                _ => scalar(field, &value, limits.items, &path)?,
            }
            Ok(())
        };
        group::each_element(field, group, visit).map_err(|fault| fault.at(path))?;
        limits.check(count, path)
    }

    fn map(
        &mut self,
        field: Field,
        group: &[(u16, Value<'_>)],
        rules: &[u8],
        path: &Path<'_>,
        depth: usize,
    ) -> Result<(), LoadError> {
        let Some(entry) = field.message() else { return Ok(()) };
        let (Some(key_field), Some(value_field)) = (entry.field(1), entry.field(2)) else { return Ok(()) };
        let limits = rules::Map::read(rules);
        for (_, value) in group {
            let Value::Bytes(bytes) = value else { continue };
            let parts = group::map_entry(entry, bytes).map_err(|e| broken(path, entry, e))?;
            let key = parts.key.unwrap_or(default_of(key_field));
            let name = rules::show(key_field, &key);
            let path = path.key(&name);
            scalar(key_field, &key, limits.keys, &path)?;
            match (value_field.message(), parts.message) {
                (Some(inner), content) => {
                    self.nested(inner, &content.unwrap_or_default(), limits.values, &path, depth)?;
                }
                (None, _) => scalar(
                    value_field,
                    &parts.value.unwrap_or(default_of(value_field)),
                    limits.values,
                    &path,
                )?,
            }
        }
        limits.check(group.len(), path)
    }

    fn any(&mut self, bytes: &[u8], path: &Path<'_>, depth: usize) -> Result<(), LoadError> {
        let Some((type_url, value)) = any::parts(bytes) else {
            return Err(path.error(ErrorKind::Syntax, "not a google.protobuf.Any"));
        };
        if !self.options.recurse_any {
            return Ok(());
        }
        let mut left_out = Vec::new();
        let (type_url, value) = any::resolve_at(type_url, value, self.options.unknown, &mut left_out, path)?;
        self.report.unknown.append(&mut left_out);
        let Some(inner) = Message::of_type_url(&type_url) else { return Ok(()) };
        self.within += 1;
        self.message(inner, &value, path, depth + 1)?;
        self.within -= 1;
        Ok(())
    }

    fn runtime(&self, key: &str) -> Option<bool> {
        self.options.runtime.and_then(|runtime| runtime(key))
    }

    fn deprecated(&mut self, message: Message, field: Field, path: &Path<'_>) -> Result<(), LoadError> {
        let name = format!("{}.{}", message.name(), field.name());
        let what = format!("deprecated option '{name}' from file {}", message.file());
        self.feature(message, &name, &what, field.is_disallowed(), path)
    }

    fn deprecated_value(
        &mut self,
        message: Message,
        field: Field,
        values: Enum,
        number: i32,
        path: &Path<'_>,
    ) -> Result<(), LoadError> {
        let Some(value) = values.value(number).filter(|value| value.is_deprecated()) else { return Ok(()) };
        let scope = values.name().rsplit_once('.').map_or("", |(scope, _)| scope);
        let name = format!("{scope}.{}", value.name());
        let default = if number == 0 { "the default now-" } else { "" };
        let what = format!(
            "{default}deprecated value {} for enum '{}.{}' from file {}",
            value.name(),
            message.name(),
            field.name(),
            message.file()
        );
        self.feature(message, &name, &what, value.is_disallowed(), path)
    }

    fn feature(
        &mut self,
        message: Message,
        name: &str,
        what: &str,
        disallowed: bool,
        path: &Path<'_>,
    ) -> Result<(), LoadError> {
        let text = format!(
            "type {} Using {what}. This configuration will be removed from Envoy soon. Please see \
             https://www.envoyproxy.io/docs/envoy/latest/version_history/version_history for details. If continued \
             use of this field is absolutely necessary, see https://www.envoyproxy.io/docs/envoy/latest/configuration/\
             operations/runtime#using-runtime-overrides-for-deprecated-features for how to apply a temporary and \
             highly discouraged override.",
            message.name()
        );
        let error = path.error(ErrorKind::Deprecated, text);
        let strict = self.runtime("envoy.features.fail_on_any_deprecated_feature").unwrap_or(false);
        let allowed = match self.runtime(&format!("envoy.deprecated_features:{name}")) {
            Some(allowed) => allowed,
            None => {
                self.runtime("envoy.features.enable_all_deprecated_features").unwrap_or(false)
                    || !strict && !disallowed
            }
        };
        let asked = !self.options.runtime_in_any_only || self.within > 0;
        if asked && !allowed {
            return Err(error);
        }
        self.report.deprecated.push(error);
        Ok(())
    }
}

/// The positions of those fields of a message of whose absence there is something to say: that breaks a rule, or stands for
/// a deprecated value. Most fields may be absent, and most of them are.
fn absences(message: Message) -> Rc<[u16]> {
    thread_local! {
        static KNOWN: RefCell<HashMap<Message, Rc<[u16]>, FixedState>> = const {
            RefCell::new(HashMap::with_hasher(FixedState::with_seed(0)))
        };
    }
    let telling = |field: Field| {
        let rules = if message.is_checked() { field.rules() } else { &[] };
        let deprecated = |values: Enum| values.value(0).is_some_and(|value| value.is_deprecated());
        (!field.is_repeated() && field.enumeration().is_some_and(deprecated))
            || rules::absent(field, rules, &Path::ROOT).is_err()
    };
    let find = || {
        let fields = message.fields().enumerate().filter(|(_, field)| telling(*field));
        fields.map(|(position, _)| position as u16).collect()
    };
    KNOWN.with_borrow_mut(|known| known.entry(message).or_insert_with(find).clone())
}

/// A fault met while elements of a packed field are read.
enum Fault {
    Wire(WireError),
    Load(LoadError),
}

impl Fault {
    fn at(self, path: &Path<'_>) -> LoadError {
        match self {
            Self::Wire(error) => path.error(ErrorKind::Syntax, error.to_string()),
            Self::Load(error) => error,
        }
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl From<LoadError> for Fault {
    fn from(error: LoadError) -> Self {
        Self::Load(error)
    }
}

fn scalar(field: Field, value: &Value<'_>, rules: &[u8], path: &Path<'_>) -> Result<(), LoadError> {
    if let (Kind::String, Value::Bytes(bytes)) = (field.kind(), value)
        && std::str::from_utf8(bytes).is_err()
    {
        return Err(path.error(ErrorKind::Syntax, "the string is not UTF-8"));
    }
    if rules.is_empty() {
        return Ok(());
    }
    rules::scalar(field, value, rules, path)
}

fn check_oneofs(message: Message, set: u64, path: &Path<'_>) -> Result<(), LoadError> {
    for (index, oneof) in message.oneofs().enumerate() {
        if oneof.is_required() && set & 1 << (index & 63) == 0 {
            let members: Vec<&str> = message
                .fields()
                .filter(|field| field.oneof() == Some(index))
                .map(|field| field.name())
                .collect();
            let reason = format!("is required: one of {}", members.join(", "));
            return Err(path.field(oneof.name()).error(ErrorKind::Constraint, reason));
        }
    }
    Ok(())
}

/// Envoy refuses durations that are negative or whose nanoseconds overflow, wherever they stand.
fn check_duration(message: Message, bytes: &[u8], path: &Path<'_>) -> Result<(), LoadError> {
    let (seconds, nanos) = rules::time_of(message, bytes).map_err(|e| broken(path, message, e))?;
    if seconds < 0 || nanos < 0 {
        return Err(path.error(ErrorKind::Constraint, "Invalid duration: Expected positive duration"));
    }
    if seconds > MAX_SECONDS || nanos > 999_999_999 {
        return Err(path.error(ErrorKind::Constraint, "Invalid duration: Duration out-of-range"));
    }
    Ok(())
}
