//! The program's own log, from the command line's flags.

use sampan_core::log::{self, Component, Format, Level};

use crate::cli::Options;

/// Sets levels, format and file.
pub fn start(options: &Options) -> Result<(), String> {
    log::set_all(Level::parse(&options.log_level).unwrap_or(Level::Info));
    if !options.component_log_level.is_empty() {
        check(&options.component_log_level)?;
        log::set_levels(&options.component_log_level).map_err(|e| e.to_string())?;
    }
    if let Some(pattern) = &options.log_format {
        log::set_format(Format::parse(pattern));
    }
    if options.log_format_escaped {
        log::escape();
    }
    if let Some(path) = &options.log_path {
        log::set_path(path.clone())
            .map_err(|e| format!("Failed to open log-file '{}': {e}", path.display()))?;
    }
    for flag in &options.without_effect {
        sampan_core::log!(Component::Main, Level::Warn, "{flag}");
    }
    Ok(())
}

/// Why the program ends.
pub fn critical(error: &dyn std::fmt::Display) {
    sampan_core::log!(Component::Main, Level::Critical, "error initializing configuration: {error}");
}

/// Envoy's words for what is no list of levels; the admin interface has others.
fn check(levels: &str) -> Result<(), String> {
    for pair in levels.split(',') {
        let Some((name, level)) = pair.split_once(':').filter(|(_, level)| !level.contains(':')) else {
            return Err(format!("component log level not correctly specified '{pair}'"));
        };
        if Level::parse(level).is_none() {
            return Err(format!("invalid log level specified '{level}'"));
        }
        if !Component::ALL.iter().any(|c| c.name() == name) {
            return Err(format!("invalid component specified '{name}'"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_refused_in_envoys_words() {
        assert_eq!(check("admin:debug,http:off"), Ok(()));
        for (levels, error) in [
            ("admin:debug,http:foo", "invalid log level specified 'foo'"),
            ("admin", "component log level not correctly specified 'admin'"),
            ("admin:debug,,http:debug", "component log level not correctly specified ''"),
            ("nope:debug", "invalid component specified 'nope'"),
        ] {
            assert_eq!(check(levels), Err(error.to_owned()), "{levels}");
        }
    }
}
