//! Prints the verdict on each bootstrap file given: `cargo run -p sampan-config --example validate -- FILE…`

#![allow(clippy::print_stdout)]

use std::path::Path;

use sampan_config::{LoadOptions, load_bootstrap};

fn main() {
    for file in std::env::args().skip(1) {
        match load_bootstrap(Some(Path::new(&file)), None, &LoadOptions::default()) {
            Ok(loaded) => println!("OK {file} {} bytes", loaded.bytes().len()),
            Err(error) => println!("FAIL {error}"),
        }
    }
}
