//! From files and command line to checked messages.
//!
//! The format follows from the file's name as in Envoy: `.pb` binary, `.pb_text` text, `.yaml` and `.yml` YAML, all
//! else JSON. `--config-yaml` is merged over the file as protobuf merges messages: scalars replace, lists append,
//! messages merge. For encoded messages that is to append one to the other.

use std::{marker::PhantomData, path::Path as FilePath};

use bytes::Bytes;
use envoy_types::pb::envoy::config::bootstrap::v3::{
    Bootstrap, LayeredRuntime, runtime_layer::LayerSpecifier,
};
use envoy_types::pb::envoy::service::discovery::v3::DiscoveryResponse;
use envoy_types::pb::google::protobuf::{Struct, value::Kind};

use crate::{
    check::{self, CheckOptions, Report, Runtime},
    encode::{Encoder, UnknownFields},
    error::{ErrorKind, LoadError},
    json,
    schema::Message,
    text,
    wire::{self, Value},
    yaml,
};

/// How to load a configuration.
#[derive(Clone, Copy, Default)]
pub struct LoadOptions<'a> {
    /// What to do with fields that a message does not have: `--allow-unknown-static-fields` is
    /// [`UnknownFields::Warn`].
    pub unknown: UnknownFields,
    /// Whether to leave `Any` unchecked: whoever unpacks one then has to check it.
    pub skip_any: bool,
    /// What runtime says about a key, for deprecated features that are refused by default. The static layers of a
    /// bootstrap's own runtime are asked where this says nothing.
    pub runtime: Option<&'a Runtime<'a>>,
}

impl std::fmt::Debug for LoadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadOptions").field("unknown", &self.unknown).finish_non_exhaustive()
    }
}

impl<'a> LoadOptions<'a> {
    fn check(&self) -> CheckOptions<'a> {
        CheckOptions {
            unknown: self.unknown,
            recurse_any: !self.skip_any,
            runtime: self.runtime,
            runtime_in_any_only: false,
        }
    }
}

/// The formats of a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Protobuf's binary form.
    Binary,
    /// Protobuf's text form.
    Text,
    /// JSON, leniently.
    Json,
    /// YAML.
    Yaml,
}

impl Format {
    /// The format of a file by its name, whatever the case.
    pub fn of_file(path: &FilePath) -> Self {
        let name = path.to_string_lossy().to_ascii_lowercase();
        if name.ends_with(".pb") {
            Self::Binary
        } else if name.ends_with(".pb_text") {
            Self::Text
        } else if name.ends_with(".yaml") || name.ends_with(".yml") {
            Self::Yaml
        } else {
            Self::Json
        }
    }
}

/// A message in its encoded form, checked.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    bytes: Bytes,
    /// What is worth a warning.
    pub report: Report,
    message: PhantomData<T>,
}

impl<T: prost::Message + Default> Loaded<T> {
    /// The encoded message. It may hold fields in any order and in pieces.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The message itself. Large lists cost much memory in that form: see [`split_bootstrap`].
    pub fn decode(&self) -> Result<T, LoadError> {
        decode(self.bytes.clone())
    }
}

/// Decodes bytes that have been checked.
pub fn decode<T: prost::Message + Default>(bytes: Bytes) -> Result<T, LoadError> {
    // From a slice, as everywhere: each kind of buffer would have its own copy of every decoder.
    T::decode(&*bytes).map_err(|e| LoadError::new(ErrorKind::Syntax, e.to_string()))
}

fn find(message: &str) -> Result<Message, LoadError> {
    Message::find(message)
        .ok_or_else(|| LoadError::new(ErrorKind::UnknownType, format!("unknown message type '{message}'")))
}

/// Encodes a text or binary document as `message` without checking its constraints. Gives the bytes and the unknown
/// fields that were left out.
pub fn encode(
    message: Message,
    format: Format,
    source: &[u8],
    unknown: UnknownFields,
) -> Result<(Vec<u8>, Vec<LoadError>), LoadError> {
    if format == Format::Binary {
        return Ok((source.to_vec(), Vec::new()));
    }
    let source = std::str::from_utf8(source).map_err(|e| {
        LoadError::new(ErrorKind::Syntax, format!("the file is not UTF-8 from byte {} on", e.valid_up_to()))
    })?;
    match format {
        Format::Yaml => Encoder::new(&yaml::parse(source)?, unknown).document(message),
        Format::Json => Encoder::new(&json::parse(source)?, unknown).document(message),
        Format::Text | Format::Binary => Ok((text::parse(message, source)?, Vec::new())),
    }
}

/// Reads and encodes a file as `message`, without checking its constraints.
fn encode_file(
    message: Message,
    path: &FilePath,
    unknown: UnknownFields,
) -> Result<(Vec<u8>, Vec<LoadError>), LoadError> {
    let name = path.display().to_string();
    let source = std::fs::read(path)
        .map_err(|e| LoadError::new(ErrorKind::Io, format!("unable to read file: {e}")).in_source(&name))?;
    encode(message, Format::of_file(path), &source, unknown).map_err(|e| e.in_source(&name))
}

fn checked<T>(
    message: Message,
    bytes: Vec<u8>,
    left_out: Vec<LoadError>,
    options: &CheckOptions<'_>,
) -> Result<Loaded<T>, LoadError> {
    let mut report = check::check(message, &bytes, options)?;
    report.unknown.splice(0..0, left_out);
    Ok(Loaded { bytes: bytes.into(), report, message: PhantomData })
}

/// Loads the bootstrap from a file, from a YAML text, or from the text merged over the file.
pub fn load_bootstrap(
    path: Option<&FilePath>,
    yaml: Option<&str>,
    options: &LoadOptions<'_>,
) -> Result<Loaded<Bootstrap>, LoadError> {
    const YAML_SOURCE: &str = "--config-yaml";
    let message = find("envoy.config.bootstrap.v3.Bootstrap")?;
    let yaml = yaml.filter(|yaml| !yaml.is_empty());
    if path.is_none() && yaml.is_none() {
        let reason =
            "At least one of --config-path or --config-yaml or Options::configProto() should be non-empty";
        return Err(LoadError::new(ErrorKind::Io, reason));
    }
    let (mut bytes, mut left_out) = match path {
        Some(path) => encode_file(message, path, options.unknown)?,
        None => Default::default(),
    };
    if let Some(yaml) = yaml {
        let (over, more) = encode(message, Format::Yaml, yaml.as_bytes(), options.unknown)
            .map_err(|e| e.in_source(YAML_SOURCE))?;
        bytes.extend_from_slice(&over);
        left_out.extend(more);
    }
    let layers = static_runtime(&bytes);
    let runtime =
        |key: &str| options.runtime.and_then(|outer| outer(key)).or_else(|| layers.get(key).copied());
    let options = CheckOptions {
        unknown: options.unknown,
        recurse_any: !options.skip_any,
        runtime: Some(&runtime),
        runtime_in_any_only: true,
    };
    let name = path.map_or_else(|| YAML_SOURCE.to_owned(), |path| path.display().to_string());
    checked(message, bytes, left_out, &options).map_err(|e| e.in_source(&name))
}

/// Loads one message of any type from a file.
pub fn load_file<T: prost::Message + prost::Name + Default>(
    path: &FilePath,
    options: &LoadOptions<'_>,
) -> Result<Loaded<T>, LoadError> {
    let message = find(&T::full_name())?;
    let (bytes, left_out) = encode_file(message, path, options.unknown)?;
    let options = options.check();
    checked(message, bytes, left_out, &options).map_err(|e| e.in_source(&path.display().to_string()))
}

/// Loads one message from a text.
pub fn load_text<T: prost::Message + prost::Name + Default>(
    format: Format,
    source: &str,
    options: &LoadOptions<'_>,
) -> Result<Loaded<T>, LoadError> {
    let message = find(&T::full_name())?;
    let (bytes, left_out) = encode(message, format, source.as_bytes(), options.unknown)?;
    let options = options.check();
    checked(message, bytes, left_out, &options)
}

/// A resource out of a file of a filesystem subscription, not checked yet.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Its type.
    pub type_url: String,
    /// The encoded message.
    pub value: Bytes,
}

/// What a file of a filesystem subscription holds.
#[derive(Debug, Clone)]
pub struct DiscoveryFile {
    /// `version_info`.
    pub version: String,
    /// The resources, each to be checked by itself.
    pub resources: Vec<Resource>,
    /// Members that no message has.
    pub unknown: Vec<LoadError>,
}

/// Loads the `DiscoveryResponse` that a file holds.
pub fn load_discovery_file(path: &FilePath, options: &LoadOptions<'_>) -> Result<DiscoveryFile, LoadError> {
    let outer = LoadOptions { skip_any: true, ..*options };
    let loaded = load_file::<DiscoveryResponse>(path, &outer)?;
    let response = loaded.decode()?;
    let resources = response.resources.into_iter();
    let resources =
        resources.map(|any| Resource { type_url: any.type_url, value: any.value.into() }).collect();
    Ok(DiscoveryFile { version: response.version_info, resources, unknown: loaded.report.unknown })
}

/// Booleans of the static layers of a bootstrap's runtime, later layers over earlier ones. What is broken here is
/// reported by the check that follows.
fn static_runtime(bootstrap: &[u8]) -> std::collections::HashMap<String, bool> {
    const LAYERED_RUNTIME: u32 = 17;
    let mut out = std::collections::HashMap::new();
    let mut merged = Vec::new();
    for (number, value) in wire::Reader::new(bootstrap).map_while(Result::ok) {
        if let (LAYERED_RUNTIME, Value::Bytes(bytes)) = (number, value) {
            merged.extend_from_slice(bytes);
        }
    }
    let Ok(runtime) = <LayeredRuntime as prost::Message>::decode(&*merged) else { return out };
    for layer in runtime.layers {
        if let Some(LayerSpecifier::StaticLayer(layer)) = layer.layer_specifier {
            flatten(&layer, "", &mut out);
        }
    }
    out
}

/// Nested structures spell keys with periods; text counts as it would in a runtime file.
fn flatten(layer: &Struct, prefix: &str, out: &mut std::collections::HashMap<String, bool>) {
    for (key, value) in &layer.fields {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match &value.kind {
            Some(Kind::BoolValue(value)) => {
                out.insert(key, *value);
            }
            Some(Kind::StringValue(text)) if text.eq_ignore_ascii_case("true") => {
                out.insert(key, true);
            }
            Some(Kind::StringValue(text)) if text.eq_ignore_ascii_case("false") => {
                out.insert(key, false);
            }
            Some(Kind::StructValue(inner)) => flatten(inner, &key, out),
            _ => {}
        }
    }
}

/// A bootstrap in parts: its static resources stay encoded until someone needs them.
#[derive(Debug, Clone, Default)]
pub struct BootstrapParts {
    /// All but the static resources.
    pub bootstrap: Bootstrap,
    /// Encoded `Listener`s.
    pub listeners: Vec<Bytes>,
    /// Encoded `Cluster`s.
    pub clusters: Vec<Bytes>,
    /// Encoded `Secret`s.
    pub secrets: Vec<Bytes>,
}

/// Splits a checked bootstrap. The parts share its memory.
pub fn split_bootstrap(bytes: &Bytes) -> Result<BootstrapParts, LoadError> {
    const STATIC_RESOURCES: u32 = 2;
    let broken = |e: wire::WireError| LoadError::new(ErrorKind::Syntax, e.to_string());
    let mut out = BootstrapParts::default();
    let mut rest = Vec::new();
    let mut reader = wire::Reader::new(bytes);
    loop {
        let before = reader.rest();
        let Some(field) = reader.next() else { break };
        match field.map_err(broken)? {
            (STATIC_RESOURCES, Value::Bytes(resources)) => {
                for field in wire::Reader::new(resources) {
                    match field.map_err(broken)? {
                        (1, Value::Bytes(listener)) => out.listeners.push(bytes.slice_ref(listener)),
                        (2, Value::Bytes(cluster)) => out.clusters.push(bytes.slice_ref(cluster)),
                        (3, Value::Bytes(secret)) => out.secrets.push(bytes.slice_ref(secret)),
                        _ => {}
                    }
                }
            }
            _ => rest.extend_from_slice(&before[..before.len() - reader.rest().len()]),
        }
    }
    out.bootstrap = decode(rest.into())?;
    Ok(out)
}

/// A bootstrap's bytes with another node; all else stays as it was written.
///
/// # Errors
/// The bytes are no message.
pub fn with_node(bytes: &Bytes, node: &[u8]) -> Result<Bytes, LoadError> {
    const NODE: u32 = 1;
    let mut out = Vec::with_capacity(bytes.len() + node.len() + 8);
    prost::encoding::encode_key(NODE, prost::encoding::WireType::LengthDelimited, &mut out);
    prost::encoding::encode_varint(node.len() as u64, &mut out);
    out.extend_from_slice(node);
    let mut reader = wire::Reader::new(bytes);
    loop {
        let before = reader.rest();
        let Some(field) = reader.next() else { return Ok(out.into()) };
        let (number, _) = field.map_err(|e| LoadError::new(ErrorKind::Syntax, e.to_string()))?;
        if number != NODE {
            out.extend_from_slice(&before[..before.len() - reader.rest().len()]);
        }
    }
}
