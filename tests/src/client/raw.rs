//! Bytes by script.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Client, Connected};
use crate::case::{Act, RawStep};
use crate::error::Result;
use crate::net::text;
use crate::upstream::run_script;

/// Runs the script, then reads until the peer closes or the time is over.
pub(super) async fn exchange(client: &Client<'_>, step: &RawStep) -> Result<Value> {
    let (mut wire, tls) = match client.connect(&step.to, step.source.as_deref(), step.tls.as_ref()).await? {
        Connected::Wire(wire, tls) => (wire, tls),
        Connected::Failed(error) => return Ok(json!({ "error": error })),
    };
    let mut acts = step.acts.clone();
    for act in &mut acts {
        if let Act::Send(bytes) = act {
            *bytes = client.names.fill(bytes)?;
        }
    }
    let over = run_script(&mut wire, &acts, "client").await;
    let end = if over { "us" } else { wire.drain(Duration::from_millis(step.limit_ms)).await.name() };
    let mut seen = json!({ "received": text(&wire.seen), "end": end });
    if let Some(tls) = tls {
        seen["tls"] = tls;
    }
    Ok(seen)
}
