//! A layer that is a folder: a file's path below it, with dots for slashes, is the key, its text the value. Lines that
//! begin with `#` do not count.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use envoy_types::pb::envoy::config::bootstrap::v3::runtime_layer::DiskLayer;

use super::Value;
use crate::error::{ConfigError, ConfigResult};

const MAX_DEPTH: u32 = 16;

/// A folder of values.
#[derive(Debug, Clone, Default)]
pub(super) struct Folder {
    /// `symlink_root`: what is moved to another place as a whole.
    pub(super) root: PathBuf,
    path: PathBuf,
}

impl Folder {
    pub(super) fn from_proto(message: &DiskLayer, service_cluster: &str) -> ConfigResult<Self> {
        let text = &message.symlink_root;
        let watched = match text.rfind('/') {
            Some(0) => "/",
            Some(at) => &text[..at],
            None => ".",
        };
        if !Path::new(watched).is_dir() {
            let reason = format!("unable to add filesystem watch for file {text}: No such file or directory");
            return Err(ConfigError::new(reason).at("symlink_root"));
        }
        let mut path = format!("{text}/{}", message.subdirectory);
        if message.append_service_cluster {
            path = format!("{path}/{service_cluster}");
        }
        Ok(Self { root: text.into(), path: path.into() })
    }

    pub(super) fn exists(&self) -> bool {
        self.path.is_dir()
    }

    pub(super) fn read(&self) -> io::Result<BTreeMap<String, Value>> {
        let mut values = BTreeMap::new();
        walk(&self.path, "", 1, &mut values)?;
        Ok(values)
    }
}

fn walk(path: &Path, prefix: &str, depth: u32, values: &mut BTreeMap<String, Value>) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other(format!("Walk recursion depth exceeded {MAX_DEPTH}")));
    }
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let key = if prefix.is_empty() { name.into_owned() } else { format!("{prefix}.{name}") };
        // Links count as what they lead to.
        let kind = std::fs::metadata(entry.path())?;
        if kind.is_dir() {
            walk(&entry.path(), &key, depth + 1, values)?;
        } else if kind.is_file() {
            let text = String::from_utf8_lossy(&std::fs::read(entry.path())?).into_owned();
            values.insert(key, Value::from_yaml(&without_comments(&text)));
        }
    }
    Ok(())
}

fn without_comments(text: &str) -> String {
    let lines: Vec<&str> = text.split('\n').filter(|line| !line.is_empty()).collect();
    let mut value = String::new();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| !line.starts_with('#')) {
        if at + 1 == lines.len() {
            value.push_str(line.trim_end());
        } else {
            value.push_str(line);
            value.push('\n');
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_comments_do_not_count() {
        assert_eq!(without_comments("# why\n7  \n"), "7");
        assert_eq!(without_comments("a\n# b\n\nc"), "a\nc");
        assert_eq!(without_comments("# only"), "");
    }
}
