//! Prints the verdict on each bootstrap file given: `cargo run -p sampan-config --example validate -- FILE…`
//!
//! With `--time` it tells how long each file took and how much memory the process holds at most.

#![allow(clippy::print_stdout)]

use std::{path::Path, time::Instant};

use sampan_config::{LoadOptions, load_bootstrap};

fn main() {
    let mut files: Vec<String> = std::env::args().skip(1).collect();
    let timed = files.first().is_some_and(|first| first == "--time");
    if timed {
        files.remove(0);
    }
    for file in files {
        let start = Instant::now();
        let verdict = load_bootstrap(Some(Path::new(&file)), None, &LoadOptions::default());
        let took = start.elapsed();
        match verdict {
            Ok(loaded) => println!("OK {file} {} bytes", loaded.bytes().len()),
            Err(error) => println!("FAIL {error}"),
        }
        if timed {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            let memory: Vec<&str> = status
                .lines()
                .filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS"))
                .collect();
            println!("  {took:?} {}", memory.join(" "));
        }
    }
}
