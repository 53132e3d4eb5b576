//! Makes `src/schema.bin` out of the descriptor set in the sources of `envoy-types`, and proves that the committed
//! file is what that gives. `UPDATE_SCHEMA=1 cargo test -p sampan-config --test schema` writes it anew.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

mod blob;
mod descriptor;
mod extra;

use std::{path::PathBuf, process::Command};

/// The set that `envoy-types` was generated from; the crate does not export it, its sources hold it.
fn descriptor_set() -> Vec<u8> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // One platform only: the sources of the others need not have been downloaded.
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--format-version",
            "1",
            "--offline",
            "--filter-platform",
            &platform,
            "--manifest-path",
        ])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let package = metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .find(|package| package["name"] == "envoy-types")
        .expect("envoy-types is a dependency");
    let manifest = PathBuf::from(package["manifest_path"].as_str().expect("manifest path"));
    let set = manifest.parent().expect("a folder").join("src/generated/types.bin");
    std::fs::read(&set).unwrap_or_else(|error| panic!("{}: {error}", set.display()))
}

#[test]
fn committed_schema_is_current() {
    let mut types = descriptor::Types::read(&descriptor_set());
    extra::add(&mut types);
    let built = blob::build(types);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/schema.bin");
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(path, &built).expect("schema.bin can be written");
    }
    let committed = std::fs::read(path).unwrap_or_default();
    assert!(committed == built, "schema.bin is out of date: run this test with UPDATE_SCHEMA=1");
}
