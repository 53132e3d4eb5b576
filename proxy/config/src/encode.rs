//! A [`Tape`] to the bytes of a message: protobuf's JSON mapping, driven by the schema.
//!
//! Envoy uses protobuf's JSON parser in its lenient mode; so beyond the specification a single value may stand for a
//! list of one, nested lists are flattened, `"true"` is a boolean, a null element is a default value, and a duration
//! or wrapper may be written as an object of its fields. Enum names are compared without case.
//!
//! The message is written in one pass into one buffer. Scalars without presence that have their default value are
//! left out, as every protobuf writer does. Constraints are not looked at here: [`crate::check`] reads the bytes.
//!
//! A `TypedStruct` within an `Any` is turned into the message that it names if the schema has it, so that nothing
//! behind this crate needs to know that form.

mod scalar;
mod well_known;

use crate::{
    error::{ErrorKind, LoadError, Path},
    json,
    schema::{Field, Kind, Message, WellKnown},
    tape::{NodeKind, Tape},
    wire,
};

/// What to do with members that the message does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownFields {
    /// Refuse the document.
    #[default]
    Reject,
    /// Leave them out and say so.
    Warn,
    /// Leave them out.
    Ignore,
}

/// More nodes than this through aliases is an attack, not a configuration.
const MAX_ALIASED_NODES: usize = 1_000_000;
/// And more bytes than this.
const MAX_ALIASED_BYTES: usize = 64 << 20;

/// Writes documents as messages.
pub(crate) struct Encoder<'t> {
    tape: &'t Tape<'t>,
    out: Vec<u8>,
    unknown: UnknownFields,
    warnings: Vec<LoadError>,
    nodes: usize,
    depth: usize,
}

type Done = Result<(), LoadError>;

/// The bytes, and the unknown fields that were left out.
pub(crate) type Encoded = (Vec<u8>, Vec<LoadError>);

/// Where a value stands: its path and its node.
#[derive(Clone, Copy)]
struct Place<'p> {
    path: &'p Path<'p>,
    node: usize,
}

impl<'t> Encoder<'t> {
    pub(crate) fn new(tape: &'t Tape<'t>, unknown: UnknownFields) -> Self {
        let out = Vec::with_capacity(tape.source().len() / 2);
        let nodes = tape.len() + MAX_ALIASED_NODES;
        Self { tape, out, unknown, warnings: Vec::new(), nodes, depth: 0 }
    }

    /// Encodes the whole document as `message`.
    pub(crate) fn document(mut self, message: Message) -> Result<Encoded, LoadError> {
        if self.tape.is_empty() {
            return Err(LoadError::new(ErrorKind::Syntax, "the document is empty"));
        }
        let node = self.tape.resolve(0);
        self.content(message, Place { path: &Path::ROOT, node })?;
        Ok((self.out, self.warnings))
    }

    /// Encodes the value at `node` as `message`.
    pub(crate) fn node(
        mut self,
        message: Message,
        path: &Path<'_>,
        node: usize,
    ) -> Result<Encoded, LoadError> {
        let node = self.tape.resolve(node);
        self.content(message, Place { path, node })?;
        Ok((self.out, self.warnings))
    }

    fn fail(&self, place: Place<'_>, kind: ErrorKind, reason: impl Into<String>) -> LoadError {
        let mut error = place.path.error(kind, reason);
        error.position = Some(self.tape.position(place.node));
        error
    }

    /// Counts a node against the bounds; `raw` is its index before aliases were followed.
    fn visit(&mut self, raw: usize, place: Place<'_>) -> Done {
        self.nodes = self.nodes.saturating_sub(1);
        let aliased = raw != place.node && self.out.len() > MAX_ALIASED_BYTES + self.tape.source().len() * 2;
        if self.nodes == 0 || aliased {
            return Err(self.fail(place, ErrorKind::TooLarge, "aliases expand beyond all bounds"));
        }
        Ok(())
    }

    fn enter(&mut self, place: Place<'_>) -> Done {
        self.depth += 1;
        if self.depth > json::MAX_DEPTH {
            let reason = format!("more than {} levels of nesting", json::MAX_DEPTH);
            return Err(self.fail(place, ErrorKind::TooLarge, reason));
        }
        Ok(())
    }

    /// Writes the content of `message` from any value that the JSON mapping allows for it.
    fn content(&mut self, message: Message, place: Place<'_>) -> Done {
        let object = self.tape.kind(place.node) == NodeKind::Object;
        match message.well_known() {
            WellKnown::Any => self.any(message, place),
            WellKnown::Value => self.value(place),
            WellKnown::Struct => self.structure(message, place),
            // Lenient mode: the fields of such a message may be spelled out.
            _ if object => self.object(message, place, None),
            WellKnown::List => self.list(message, place),
            WellKnown::Wrapper => match message.fields().next() {
                Some(field) => self.singular(field, place),
                None => Ok(()),
            },
            WellKnown::Duration => self.duration(place),
            WellKnown::Timestamp => self.timestamp(place),
            WellKnown::FieldMask => self.field_mask(place),
            WellKnown::No => Err(self.mismatch(place, "an object")),
        }
    }

    fn mismatch(&self, place: Place<'_>, expected: &str) -> LoadError {
        let found = match self.tape.kind(place.node) {
            NodeKind::Null => "null".to_owned(),
            NodeKind::True => "true".to_owned(),
            NodeKind::False => "false".to_owned(),
            NodeKind::Number => self.tape.text(place.node).to_owned(),
            NodeKind::String => format!("the string {:?}", shorten(self.tape.text(place.node))),
            NodeKind::Array => "a list".to_owned(),
            NodeKind::Object | NodeKind::Alias => "an object".to_owned(),
        };
        self.fail(place, ErrorKind::Type, format!("expected {expected}, found {found}"))
    }

    /// Members of an object as fields of `message`; `skip` is a member that is not a field.
    fn object(&mut self, message: Message, place: Place<'_>, skip: Option<&str>) -> Done {
        self.enter(place)?;
        let tape = self.tape;
        // No message of the API has more oneofs than bits here; the schema's test holds this.
        let mut oneofs = 0u64;
        for (key, raw) in tape.pairs(place.node) {
            let name = tape.text(key);
            if skip == Some(name) {
                continue;
            }
            let path = place.path.field(name);
            let Some(field) = message.field_by_name(name) else {
                self.unknown_field(message, name, Place { path: &path, node: key })?;
                continue;
            };
            let path = place.path.known(field);
            let inner = Place { path: &path, node: tape.resolve(raw) };
            self.visit(raw, inner)?;
            if let (Some(oneof), false) = (field.oneof(), tape.kind(inner.node) == NodeKind::Null) {
                let bit = 1u64 << (oneof & 63);
                if oneofs & bit != 0 {
                    let reason = format!("oneof '{}' has been set already", message.oneof_at(oneof).name());
                    return Err(self.fail(inner, ErrorKind::Type, reason));
                }
                oneofs |= bit;
            }
            self.field(field, inner)?;
        }
        self.depth -= 1;
        Ok(())
    }

    fn unknown_field(&mut self, message: Message, name: &str, place: Place<'_>) -> Done {
        let reason = match nearest(message, name) {
            Some(near) => format!("no such field '{name}' in {}, did you mean '{near}'?", message.name()),
            None => format!("no such field '{name}' in {}", message.name()),
        };
        let error = self.fail(place, ErrorKind::UnknownField, reason);
        match self.unknown {
            UnknownFields::Reject => Err(error),
            UnknownFields::Warn => {
                self.warnings.push(error);
                Ok(())
            }
            UnknownFields::Ignore => Ok(()),
        }
    }

    fn field(&mut self, field: Field, place: Place<'_>) -> Done {
        let kind = self.tape.kind(place.node);
        if field.is_map() {
            return if kind == NodeKind::Null { Ok(()) } else { self.map(field, place) };
        }
        if field.is_repeated() {
            return match kind {
                NodeKind::Null => Ok(()),
                NodeKind::Array => self.repeated(field, place),
                // Lenient mode: one element without its list.
                _ => self.element(field, place),
            };
        }
        self.singular(field, place)
    }

    /// One value of a field that has at most one.
    fn singular(&mut self, field: Field, place: Place<'_>) -> Done {
        if self.tape.kind(place.node) == NodeKind::Null {
            return self.null(field);
        }
        if let Some(message) = field.message() {
            return self.nested(field, message, place);
        }
        let Some(value) = self.scalar(field, place)? else { return Ok(()) };
        if field.has_presence() || !value.is_default() {
            value.put(&mut self.out, field.number());
        }
        Ok(())
    }

    /// Null leaves a field alone, except where null is a value.
    fn null(&mut self, field: Field) -> Done {
        let is_value = field.message().is_some_and(|m| m.well_known() == WellKnown::Value);
        if is_value {
            // Value { null_value: NULL_VALUE }
            wire::put_bytes(&mut self.out, field.number(), &[0x08, 0x00]);
        } else if field.enumeration().is_some_and(|e| e.name() == "google.protobuf.NullValue")
            && field.has_presence()
        {
            wire::put_tag(&mut self.out, field.number(), 0);
            self.out.push(0);
        }
        Ok(())
    }

    fn nested(&mut self, field: Field, message: Message, place: Place<'_>) -> Done {
        let hole = wire::open(&mut self.out, field.number(), self.tape.extent(place.node) / 2);
        self.content(message, place)?;
        wire::close(&mut self.out, hole);
        Ok(())
    }

    /// One value of a repeated field.
    fn element(&mut self, field: Field, place: Place<'_>) -> Done {
        if let Some(message) = field.message() {
            if self.tape.kind(place.node) == NodeKind::Null && message.well_known() != WellKnown::Value {
                // Lenient mode: a null element is an empty message.
                wire::put_bytes(&mut self.out, field.number(), &[]);
                return Ok(());
            }
            return self.nested(field, message, place);
        }
        if let Some(value) = self.element_scalar(field, place)? {
            value.put(&mut self.out, field.number());
        }
        Ok(())
    }

    fn element_scalar(
        &mut self,
        field: Field,
        place: Place<'_>,
    ) -> Result<Option<scalar::Scalar<'t>>, LoadError> {
        if self.tape.kind(place.node) == NodeKind::Null {
            return Ok(Some(scalar::Scalar::default_of(field.kind())));
        }
        self.scalar(field, place)
    }

    fn repeated(&mut self, field: Field, place: Place<'_>) -> Done {
        if field.is_packed() {
            let before = self.out.len();
            let hole = wire::open(&mut self.out, field.number(), self.tape.extent(place.node) / 2);
            let start = self.out.len();
            self.packed(field, place)?;
            if self.out.len() == start {
                self.out.truncate(before);
            } else {
                wire::close(&mut self.out, hole);
            }
            return Ok(());
        }
        self.enter(place)?;
        let tape = self.tape;
        let flatten =
            !field.message().is_some_and(|m| matches!(m.well_known(), WellKnown::Value | WellKnown::List));
        for (index, raw) in tape.elements(place.node).enumerate() {
            let path = place.path.index(index);
            let inner = Place { path: &path, node: tape.resolve(raw) };
            self.visit(raw, inner)?;
            if flatten && tape.kind(inner.node) == NodeKind::Array {
                self.repeated(field, inner)?;
            } else {
                self.element(field, inner)?;
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn packed(&mut self, field: Field, place: Place<'_>) -> Done {
        self.enter(place)?;
        let tape = self.tape;
        for (index, raw) in tape.elements(place.node).enumerate() {
            let path = place.path.index(index);
            let inner = Place { path: &path, node: tape.resolve(raw) };
            self.visit(raw, inner)?;
            if tape.kind(inner.node) == NodeKind::Array {
                self.packed(field, inner)?;
            } else if let Some(value) = self.element_scalar(field, inner)? {
                value.put_bare(&mut self.out);
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn map(&mut self, field: Field, place: Place<'_>) -> Done {
        let tape = self.tape;
        if tape.kind(place.node) != NodeKind::Object {
            return Err(self.mismatch(place, "an object"));
        }
        let Some((key_field, value_field)) =
            field.message().and_then(|entry| Some((entry.field(1)?, entry.field(2)?)))
        else {
            return Ok(());
        };
        self.enter(place)?;
        let mut seen = std::collections::HashSet::new();
        for (key, raw) in tape.pairs(place.node) {
            let name = tape.text(key);
            let path = place.path.key(name);
            let inner = Place { path: &path, node: tape.resolve(raw) };
            self.visit(raw, inner)?;
            if !seen.insert(name) {
                return Err(self.fail(inner, ErrorKind::Type, format!("the key {name:?} stands twice")));
            }
            let hole = wire::open(&mut self.out, field.number(), tape.extent(inner.node) / 2 + name.len());
            self.map_key(key_field, Place { path: &path, node: key })?;
            self.singular(value_field, inner)?;
            wire::close(&mut self.out, hole);
        }
        self.depth -= 1;
        Ok(())
    }

    fn map_key(&mut self, field: Field, place: Place<'_>) -> Done {
        let text = self.tape.text(place.node);
        if field.kind() == Kind::Bool && !matches!(text, "true" | "false") {
            return Err(self.fail(
                place,
                ErrorKind::Type,
                format!("expected true or false as key, found {text:?}"),
            ));
        }
        if let Some(value) = self.scalar(field, place)? {
            value.put(&mut self.out, field.number());
        }
        Ok(())
    }
}

/// A text short enough for an error message.
fn shorten(text: &str) -> &str {
    match text.char_indices().nth(60) {
        Some((at, _)) => &text[..at],
        None => text,
    }
}

/// A field whose name differs from `name` by a typing error.
fn nearest(message: Message, name: &str) -> Option<&'static str> {
    if name.len() > 64 {
        return None;
    }
    let limit = if name.len() < 5 { 1 } else { 2 };
    message
        .fields()
        .map(|field| (distance(field.name(), name), field.name()))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

/// Edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
