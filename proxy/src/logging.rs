//! The program's own log, from the command line's flags.

use sampan_core::log::{self, Component, Format, Level};

use crate::cli::Options;

/// Sets levels, format and file.
pub fn start(options: &Options) -> Result<(), String> {
    log::set_all(Level::parse(&options.log_level).unwrap_or(Level::Info));
    if !options.component_log_level.is_empty() {
        log::set_levels(&options.component_log_level).map_err(|e| e.to_string())?;
    }
    if let Some(pattern) = &options.log_format {
        log::set_format(Format::parse(pattern).map_err(|e| e.to_string())?);
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
