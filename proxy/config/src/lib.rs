//! Bootstrap and xDS bytes to checked messages.
//!
//! ```text
//! JSON ──┐                 ┌─ check ─> constraints, unknown and deprecated fields
//! YAML ──┴─> tape ─> bytes ┤
//! text protobuf ───────^   ├─ prost ─> message
//! binary protobuf ─────^   └─ print ─> JSON, for the admin interface
//! ```
//!
//! Everything runs on the encoded message and a compact [`schema`] that is part of the program's image; there is no
//! descriptor pool and no tree of the document. What Envoy accepts is accepted, what it refuses is refused with the
//! path of the field, the reason and what was expected. See [`load_bootstrap`], [`check()`], [`any::unpack`].

pub mod any;
pub mod check;
mod encode;
mod error;
mod group;
pub mod istio;
mod json;
pub mod last_good;
mod load;
mod print;
pub mod schema;
mod tape;
mod text;
mod time;
pub mod wire;
mod yaml;

pub use check::{CheckOptions, Report, Runtime, check};
pub use encode::UnknownFields;
pub use error::{ErrorKind, LoadError, Path, Position};
pub use load::{
    BootstrapParts, DiscoveryFile, Format, LoadOptions, Loaded, Resource, decode, encode, load_bootstrap,
    load_discovery_file, load_file, load_text, split_bootstrap, with_node,
};
pub use print::{PrintOptions, any_to_json, to_json};
