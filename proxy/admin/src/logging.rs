//! `/logging`.

use std::fmt::Write;

use sampan_core::log::{self, Component, LEVELS, Level, LevelError};

use crate::{Admin, Query, Reply};

pub(crate) fn logging(_: &Admin, query: &Query) -> Reply {
    let result = change(query);
    let mut out = String::new();
    if let Err(reason) = &result {
        let levels: String = LEVELS.iter().map(|level| format!("{} ", level.name())).collect();
        let _ = write!(
            out,
            "error: {reason}\n\nusage: /logging?<name>=<level> (change single level)\n\
             usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)\n\
             usage: /logging?level=<level> (change all levels)\n\
             usage: /logging?group=<group_name>:<level> (change group of loggers)\nlevels: {levels}\n"
        );
    }
    out.push_str("active loggers:\n");
    for component in Component::ALL {
        let _ = writeln!(out, "  {}: {}", component.name(), log::level(*component).name());
    }
    out.push('\n');
    Reply { status: if result.is_ok() { 200 } else { 400 }, ..Reply::text(out) }
}

fn change(query: &Query) -> Result<(), String> {
    // The form of the home page always sends its fields, empty or not.
    let form = |key: &str| matches!(key, "level" | "paths" | "group");
    let mut given = query.first_values();
    given.retain(|(key, value)| !(form(key) && value.is_empty()));
    let (key, value) = match given.as_slice() {
        [] => return Ok(()),
        [one] => *one,
        _ => return Err("invalid number of parameters".into()),
    };
    let changed = match key {
        "level" => Level::parse(value).map(log::set_all).ok_or(LevelError::Level),
        "group" => return Err("group parameter requires fine-grain logging to be enabled".into()),
        "paths" => log::set_levels(value),
        name if Level::parse(value).is_none() => {
            let _ = name;
            Err(LevelError::Level)
        }
        name => log::set_levels(&format!("{name}:{value}")),
    };
    changed.map_err(|e| e.to_string())
}
