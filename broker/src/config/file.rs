//! Reading configuration files: who may write them, how long they may be, and which key is wrong.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde::de::DeserializeOwned;

use super::ConfigError;
use super::raw::{ConnectionsFile, Raw};
use crate::trusted::distrust;

const MAX_LEN: u64 = 1024 * 1024;

pub(super) fn read_toml(file: &Path) -> Result<Raw, ConfigError> {
    let text = read(file)?;
    let syntax = |line, key: String, message: &str| ConfigError::Syntax {
        file: file.to_owned(),
        line,
        key,
        message: one_line(message),
    };
    let line_of = |error: &toml::de::Error| {
        let upto = text.get(..error.span()?.start)?;
        Some(upto.bytes().filter(|byte| *byte == b'\n').count() + 1)
    };
    let document = toml::Deserializer::parse(&text)
        .map_err(|error| syntax(line_of(&error), String::new(), error.message()))?;
    deserialize(document).map_err(|(key, error)| syntax(line_of(&error), key, error.message()))
}

pub(super) fn read_connections(file: &Path) -> Result<ConnectionsFile, ConfigError> {
    let text = read(file)?;
    let mut document = serde_json::Deserializer::from_str(&text);
    deserialize(&mut document).map_err(|(key, error)| {
        // serde_json repeats the position in its message; the line alone is enough.
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        ConfigError::Syntax {
            file: file.to_owned(),
            line: Some(error.line()),
            key,
            message: one_line(message),
        }
    })
}

/// The value, or the dotted key at which it went wrong.
fn deserialize<'de, D, T>(document: D) -> Result<T, (String, D::Error)>
where
    D: serde::Deserializer<'de>,
    T: DeserializeOwned,
{
    serde_path_to_error::deserialize(document).map_err(|error| {
        let path = error.path().to_string();
        let key = if path == "." { String::new() } else { path };
        (key, error.into_inner())
    })
}

/// The text of a file that only root or the broker can write.
fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { file: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    // Asked of the open file: what is checked is what is read.
    let metadata = file.metadata().map_err(failed)?;
    let untrusted = |why: String| ConfigError::Untrusted { file: path.to_owned(), why };
    if !metadata.is_file() {
        return Err(untrusted("is not a regular file".into()));
    }
    if let Some(why) = distrust(&metadata) {
        return Err(untrusted(why));
    }
    let mut text = String::new();
    let read = file.by_ref().take(MAX_LEN + 1).read_to_string(&mut text);
    read.map_err(|error: io::Error| failed(error))?;
    if text.len() as u64 > MAX_LEN {
        return Err(ConfigError::TooLong { file: path.to_owned(), limit: MAX_LEN });
    }
    Ok(text)
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
