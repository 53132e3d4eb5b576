//! gRPC messages of scripted upstreams, in JSON.

use sampan_config::schema::Message;
use sampan_config::{Format, PrintOptions, UnknownFields, to_json};
use serde_json::Value;

use crate::error::{Result, case_error};

/// The messages of a body.
pub fn messages(type_name: &str, body: &[u8]) -> Vec<Value> {
    decoded(body, |message| shown(type_name, message).unwrap_or_else(|e| format!("{e}").into()))
}

/// The messages of a body, each as `show` has it.
pub fn decoded(body: &[u8], mut show: impl FnMut(&[u8]) -> Value) -> Vec<Value> {
    let mut rest = body;
    let mut found = Vec::new();
    while let Some((prefix, after)) = rest.split_first_chunk::<5>() {
        let size = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        let Some((message, after)) = after.split_at_checked(size) else { break };
        found.push(show(message));
        rest = after;
    }
    if !rest.is_empty() {
        found.push(format!("{} bytes more", rest.len()).into());
    }
    found
}

/// A message, framed.
pub fn framed(type_name: &str, message: &Value) -> Result<Vec<u8>> {
    let Some(schema) = Message::find(type_name) else { return case_error(format!("no message {type_name}")) };
    let text = message.to_string();
    let encoded = sampan_config::encode(schema, Format::Json, text.as_bytes(), UnknownFields::Reject);
    match encoded {
        Ok((bytes, _)) => {
            let size = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            Ok([&[0][..], &size.to_be_bytes(), &bytes].concat())
        }
        Err(error) => case_error(format!("{type_name}: {error}")),
    }
}

fn shown(type_name: &str, bytes: &[u8]) -> Result<Value> {
    let Some(schema) = Message::find(type_name) else { return case_error(format!("no message {type_name}")) };
    let text = to_json(schema, bytes, PrintOptions::default()).or_else(|e| case_error(e.to_string()))?;
    serde_json::from_str(&text).or_else(|e| case_error(e.to_string()))
}
