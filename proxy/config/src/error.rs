//! What can be wrong with a configuration, and where.

use std::fmt;

use crate::schema::Field;

/// A place in a text: line and column count from one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column in characters.
    pub column: u32,
}

impl Position {
    /// The place of byte `offset` in `text`.
    pub fn of(text: &str, offset: usize) -> Self {
        let offset = offset.min(text.len());
        let before = text.as_bytes().get(..offset).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count();
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        // Continuation bytes of UTF-8 start no character.
        let column = before[start..].iter().filter(|byte| **byte & 0xc0 != 0x80).count();
        Self { line: line as u32 + 1, column: column as u32 + 1 }
    }
}

/// The kind of an error: what a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The file could not be read.
    Io,
    /// Not JSON, YAML, text or binary protobuf.
    Syntax,
    /// A field that the message does not have.
    UnknownField,
    /// A value that does not fit the field's type.
    Type,
    /// A type URL that is not known.
    UnknownType,
    /// A constraint does not hold.
    Constraint,
    /// A deprecated field or value that runtime does not allow.
    Deprecated,
    /// Nesting or expansion beyond the bounds.
    TooLarge,
}

/// Why a configuration was refused: source, place, field path, reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// What kind of fault.
    pub kind: ErrorKind,
    /// File, or another name of the source.
    pub source: Option<String>,
    /// Line and column, where the source is a text and the fault lies in one place of it.
    pub position: Option<Position>,
    /// Path of the field from the message that was loaded, as in `static_resources.clusters[0].name`.
    pub path: String,
    /// What is wrong and what was expected.
    pub reason: String,
}

impl LoadError {
    /// An error without a place yet.
    pub fn new(kind: ErrorKind, reason: impl Into<String>) -> Self {
        Self { kind, source: None, position: None, path: String::new(), reason: reason.into() }
    }

    /// The same with a field path.
    #[must_use]
    pub fn at(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }

    /// The same with the name of its source, unless it has one.
    #[must_use]
    pub fn in_source(mut self, source: &str) -> Self {
        self.source.get_or_insert_with(|| source.to_owned());
        self
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{source}:")?;
        }
        if let Some(position) = self.position {
            write!(f, "{}:{}:", position.line, position.column)?;
        }
        if self.source.is_some() || self.position.is_some() {
            f.write_str(" ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.reason)
    }
}

impl std::error::Error for LoadError {}

/// A field path as a chain on the stack: nothing is allocated until an error needs the text.
#[derive(Debug, Clone, Copy)]
pub struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Root,
    /// A field whose name is looked up when it is needed.
    Known(Field),
    Field(&'a str),
    Index(usize),
    Key(&'a str),
}

impl<'a> Path<'a> {
    /// The path of the message itself.
    pub const ROOT: Path<'static> = Path { parent: None, step: Step::Root };

    /// A field of the message at `self`.
    pub fn known(&'a self, field: Field) -> Path<'a> {
        Path { parent: Some(self), step: Step::Known(field) }
    }

    /// A member of the message at `self` by a name that need not be a field's.
    pub fn field(&'a self, name: &'a str) -> Path<'a> {
        Path { parent: Some(self), step: Step::Field(name) }
    }

    /// An element of the repeated field at `self`.
    pub fn index(&'a self, index: usize) -> Path<'a> {
        Path { parent: Some(self), step: Step::Index(index) }
    }

    /// A value of the map at `self`.
    pub fn key(&'a self, key: &'a str) -> Path<'a> {
        Path { parent: Some(self), step: Step::Key(key) }
    }

    /// An error at this place.
    pub fn error(&self, kind: ErrorKind, reason: impl Into<String>) -> LoadError {
        LoadError::new(kind, reason).at(self.to_string())
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}")?;
        }
        let dot = if self.parent.is_some_and(|parent| matches!(parent.step, Step::Root)) { "" } else { "." };
        match self.step {
            Step::Root => Ok(()),
            Step::Known(field) => write!(f, "{dot}{}", field.name()),
            Step::Field(name) => write!(f, "{dot}{name}"),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Key(key) => write!(f, "[{key:?}]"),
        }
    }
}
