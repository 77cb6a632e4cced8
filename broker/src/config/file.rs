//! Reading configuration files: which there are, who may write them, how long they may be, and which key is wrong.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::ConfigError;
use super::raw::{ConnectionsFile, Raw};
use crate::trusted::distrust;

const MAX_LEN: u64 = 1024 * 1024;
/// More is a mistake, or somebody's attempt.
const MAX_FILES: usize = 256;
const CONF_D: &str = "conf.d";

/// One file, as it is written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) file: PathBuf,
    pub(super) raw: Raw,
    /// The names of the tables that stand in it.
    pub(super) tables: Vec<String>,
}

/// The directory beside the configuration file whose files add to it.
pub(super) fn conf_d(main: &Path) -> PathBuf {
    main.parent().unwrap_or(Path::new("/")).join(CONF_D)
}

/// `main`, and then `conf.d/*.toml` beside it in the order of their names.
pub(super) fn read_all(main: &Path) -> Result<Vec<Written>, ConfigError> {
    let mut files = vec![main.to_owned()];
    files.extend(list(&conf_d(main))?);
    files.into_iter().map(|file| parse_toml(&read(&file)?, &file)).collect()
}

/// What a text says, decided without looking at anything else.
pub(super) fn parse_toml(text: &str, file: &Path) -> Result<Written, ConfigError> {
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
    let document = || {
        toml::Deserializer::parse(text)
            .map_err(|error| syntax(line_of(&error), String::new(), error.message()))
    };
    let raw = deserialize(document()?)
        .map_err(|(key, error)| syntax(line_of(&error), key, error.message()))?;
    let table: toml::Table = deserialize(document()?)
        .map_err(|(key, error)| syntax(line_of(&error), key, error.message()))?;
    Ok(Written { file: file.to_owned(), raw, tables: table.keys().cloned().collect() })
}

/// The files of a directory that is as trustworthy as they must be, in the order of their names.
fn list(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { file: directory.to_owned(), source };
    let untrusted = |why: String| ConfigError::Untrusted { file: directory.to_owned(), why };
    // Who can add a file adds grants, so the directory is as much a part of it as they are.
    let metadata = match fs::metadata(directory) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.is_dir() {
        return Err(untrusted("is not a directory".into()));
    }
    if let Some(why) = distrust(&metadata) {
        return Err(untrusted(why));
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(b".") || !bytes.ends_with(b".toml") {
            continue;
        }
        if names.len() == MAX_FILES {
            return Err(untrusted(format!("has more than {MAX_FILES} files")));
        }
        names.push(name);
    }
    names.sort();
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
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
