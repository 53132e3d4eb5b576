//! What a real istiod sent, checked without one: every resource is taken, or refused for what `istiod/sent/refused.yaml` names.
//!
//! A refusal shows the first fault only. What is refused is therefore checked again without that, until nothing is left to
//! refuse. An entry that refuses nothing any more fails the test, so that the list only shrinks.

#![allow(clippy::print_stdout, reason = "a test program reports on stdout")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use sampan_tests::error::{Context, Error, Result};
use sampan_tests::run::World;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What Sampan does not have yet.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gap {
    /// A message's full name, or a field's path or a part of it, as the refusal says it.
    what: String,
    #[allow(dead_code, reason = "for the reader")]
    why: String,
}

/// A file of resources: what stands more than once is a part, and `{"$": "3"}` stands for it.
#[derive(Deserialize)]
struct Sent {
    parts: BTreeMap<String, Value>,
    resources: Vec<Value>,
}

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAILED {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<usize> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(world) = World::from_environment(root)? else { return Ok(1) };
    let Some(sampan) = &world.sampan else { return Ok(0) };
    let folder = root.join("istiod/sent");
    let read = |name: &str| fs::read_to_string(folder.join(name)).trying(format!("read {name}"));
    let gaps: Vec<Gap> = serde_saphyr::from_str(&read("refused.yaml")?)
        .map_err(|e| Error::Case(format!("refused.yaml: {e}")))?;
    let mut hits = vec![0; gaps.len()];
    let (mut all, mut wrong) = (0, BTreeSet::new());
    for role in ["sidecar", "router"] {
        let sent: Sent = serde_json::from_str(&read(&format!("{role}.json"))?)
            .map_err(|e| Error::Case(format!("{role}.json: {e}")))?;
        let dir = world.dir.join(role);
        fs::create_dir_all(&dir).trying("make a folder")?;
        let mut resources: Vec<Value> = sent.resources.iter().map(|r| whole(r, &sent.parts)).collect();
        all += resources.len();
        // All of them each time: listeners name clusters.
        loop {
            let mut less = false;
            for (i, reason) in check(&sampan.binary, &dir, &resources)? {
                let known = gaps.iter().position(|gap| reason.contains(&gap.what));
                if known.is_some_and(|gap| {
                    hits[gap] += 1;
                    without(&mut resources[i], &gaps[gap].what)
                }) {
                    less = true;
                } else {
                    wrong.insert(format!("{role}: {reason}"));
                }
            }
            if !less {
                break;
            }
        }
    }
    for (gap, hits) in gaps.iter().zip(hits) {
        println!("{hits:4} resources refused for {}", gap.what);
        if hits == 0 {
            wrong.insert(format!("{} refuses nothing any more: take it out of refused.yaml", gap.what));
        }
    }
    wrong.iter().for_each(|line| println!("FAILED {line}"));
    println!("{all} resources of istiod, {} wrong", wrong.len());
    world.clean();
    Ok(wrong.len())
}

/// The resource with its parts in their places.
fn whole(packed: &Value, parts: &BTreeMap<String, Value>) -> Value {
    match packed {
        Value::Object(map) => match map.get("$").and_then(Value::as_str).and_then(|name| parts.get(name)) {
            Some(part) => whole(part, parts),
            None => map.iter().map(|(key, value)| (key.clone(), whole(value, parts))).collect(),
        },
        Value::Array(list) => list.iter().map(|value| whole(value, parts)).collect(),
        other => other.clone(),
    }
}

/// Which are refused, and why.
fn check(sampan: &Path, dir: &Path, resources: &[Value]) -> Result<Vec<(usize, String)>> {
    let files: Vec<PathBuf> = (0..resources.len()).map(|i| dir.join(format!("{i}.json"))).collect();
    for (file, resource) in files.iter().zip(resources) {
        fs::write(file, resource.to_string()).trying("write a resource")?;
    }
    let output = Command::new(sampan).arg("check").args(&files).output().trying("run sampan check")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let mut refused = Vec::new();
    for (i, file) in files.iter().enumerate() {
        let prefix = format!("{}: ", file.display());
        match said.lines().find_map(|line| line.strip_prefix(&prefix)) {
            Some("OK") => {}
            Some(reason) => refused.push((i, reason.to_owned())),
            None => return Err(Error::Subject(format!("sampan check says nothing of a resource: {said}"))),
        }
    }
    Ok(refused)
}

/// Takes away what is packed with this type, and fields of this name. Whether there was any.
fn without(value: &mut Value, what: &str) -> bool {
    let is = |value: &Value| {
        let config = &value["typed_config"];
        ["@type", "type_url"].iter().any(|key| config[key].as_str().is_some_and(|url| url.ends_with(what)))
    };
    match value {
        Value::Object(map) => {
            let before = map.len();
            *map = std::mem::take(map)
                .into_iter()
                .filter(|(key, value)| key != what && !is(value))
                .collect::<Map<_, _>>();
            let gone = map.len() < before;
            map.values_mut().fold(gone, |gone, value| without(value, what) | gone)
        }
        Value::Array(list) => {
            let before = list.len();
            list.retain(|value| !is(value));
            let gone = list.len() < before;
            list.iter_mut().fold(gone, |gone, value| without(value, what) | gone)
        }
        _ => false,
    }
}
