//! Small configurations, right and wrong, with the verdict on each. With `ENVOY` set to the program of Envoy 1.40 its
//! verdict is compared too.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::{path::Path, process::Command};

use sampan_config::{LoadOptions, load_bootstrap};

struct Case<'a> {
    name: &'a str,
    suffix: &'a str,
    accepted: bool,
    /// Envoy is known to differ.
    differs: bool,
    message: &'a str,
    text: String,
}

fn cases(source: &str) -> Vec<Case<'_>> {
    let mut out: Vec<Case<'_>> = Vec::new();
    for line in source.lines() {
        if let Some(head) = line.strip_prefix("== ") {
            let mut words = head.splitn(4, ' ');
            let mut word = || words.next().unwrap_or_default();
            let (name, suffix, verdict, message) = (word(), word(), word(), word());
            let accepted = verdict.starts_with("ok");
            out.push(Case {
                name,
                suffix,
                accepted,
                differs: verdict.ends_with('!'),
                message,
                text: String::new(),
            });
        } else if let Some(case) = out.last_mut() {
            case.text.push_str(line);
            case.text.push('\n');
        }
    }
    out
}

fn envoy_accepts(program: &str, file: &Path) -> bool {
    let output = Command::new(program)
        .args(["--mode", "validate", "--concurrency", "1", "--disable-hot-restart", "-l", "critical", "-c"])
        .arg(file)
        .output()
        .expect("Envoy runs");
    output.status.success()
}

#[test]
fn verdicts() {
    let folder = std::env::temp_dir().join(format!("sampan-verdicts-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let envoy = std::env::var("ENVOY").ok();
    let mut wrong = Vec::new();
    let source = include_str!("cases.txt");
    let cases = cases(source);
    assert!(cases.len() > 90, "{} cases", cases.len());
    for case in &cases {
        let file = folder.join(format!("{}{}", case.name, case.suffix));
        std::fs::write(&file, &case.text).unwrap();
        match load_bootstrap(Some(&file), None, &LoadOptions::default()) {
            Ok(loaded) => {
                if !case.accepted {
                    wrong.push(format!("{}: accepted", case.name));
                }
                loaded.decode().expect("what is accepted can be decoded");
            }
            Err(error) if case.accepted => wrong.push(format!("{}: refused: {error}", case.name)),
            Err(error) => {
                if !case.differs && !error.to_string().contains(case.message) {
                    wrong.push(format!("{}: refused otherwise: {error}", case.name));
                }
            }
        }
        if let Some(envoy) = &envoy
            && envoy_accepts(envoy, &file) != (case.accepted != case.differs)
        {
            wrong.push(format!("{}: Envoy says otherwise", case.name));
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
