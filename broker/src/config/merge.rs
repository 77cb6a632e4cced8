//! `broker.toml` and the files of `conf.d` as one configuration: connections and grants add up,
//! every other table stands in one file only.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::file::Written;
use super::parse::At;
use super::raw::{Connection, Grant, Raw};

/// All files, put together.
#[derive(Debug)]
pub(super) struct Merged {
    /// The tables that stand in one file; no connections and no grants.
    pub(super) raw: Raw,
    pub(super) files: Files,
    pub(super) parts: Vec<Part>,
}

/// Which table stands in which file.
#[derive(Debug)]
pub(super) struct Files {
    main: PathBuf,
    tables: BTreeMap<&'static str, PathBuf>,
}

/// What one file adds.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: PathBuf,
    /// What unnamed grants are called after; nothing for those of `broker.toml`.
    pub(super) label: Option<String>,
    pub(super) connections: BTreeMap<String, Connection>,
    pub(super) grants: Vec<Grant>,
}

impl Files {
    /// A key, in the file that has its table.
    pub(super) fn at(&self, key: &str) -> At<'_> {
        let table = key.split('.').next().unwrap_or(key);
        At::new(self.tables.get(table).unwrap_or(&self.main), key)
    }

    /// Says that `file` has the table. `false` when it has not.
    fn claim(
        &mut self,
        table: &'static str,
        file: &Path,
        has: &[String],
    ) -> Result<bool, ConfigError> {
        if !has.iter().any(|name| name == table) {
            return Ok(false);
        }
        match self.tables.insert(table, file.to_owned()) {
            None => Ok(true),
            Some(first) => Err(At::new(file, table)
                .wrong(format!("is also in {}: keep it in one of them", first.display()))),
        }
    }
}

/// `main` is the file that everything is in that no other file has.
pub(super) fn merge(main: &Path, written: Vec<Written>) -> Result<Merged, ConfigError> {
    let mut all = Raw::default();
    let mut files = Files { main: main.to_owned(), tables: BTreeMap::new() };
    let mut parts = Vec::new();
    for Written { file, raw, tables: has } in written {
        // A table that is missing here does not compile.
        let Raw {
            config_version,
            broker,
            arena,
            audit,
            handles,
            limits,
            metrics,
            connections,
            grants,
        } = raw;
        if let Some(version) = config_version.filter(|version| *version != 1) {
            return Err(At::new(&file, "config_version")
                .wrong(format!("is {version} and this broker reads version 1")));
        }
        if files.claim("broker", &file, &has)? {
            all.broker = broker;
        }
        if files.claim("arena", &file, &has)? {
            all.arena = arena;
        }
        if files.claim("audit", &file, &has)? {
            all.audit = audit;
        }
        if files.claim("handles", &file, &has)? {
            all.handles = handles;
        }
        if files.claim("limits", &file, &has)? {
            all.limits = limits;
        }
        if files.claim("metrics", &file, &has)? {
            all.metrics = metrics;
        }
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let label = (file != main).then_some(name);
        parts.push(Part { file, label, connections, grants });
    }
    Ok(Merged { raw: all, files, parts })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::parse_toml;

    fn merged(texts: &[(&str, &str)]) -> Result<Merged, String> {
        let files = texts.iter().map(|(file, text)| parse_toml(text, Path::new(file)).unwrap());
        merge(Path::new("/etc/broker.toml"), files.collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn tables_come_from_whichever_file_has_them() {
        let all = merged(&[
            ("/etc/broker.toml", "[broker]\ndrain = \"3s\"\n"),
            ("/etc/conf.d/a.toml", "config_version = 1\n[limits]\nsessions = 7\n"),
            ("/etc/conf.d/b.toml", "[[grants]]\nconnections = [\"x\"]\n"),
        ])
        .unwrap();
        assert_eq!(all.raw.broker.drain.as_deref(), Some("3s"));
        assert_eq!(all.raw.limits.sessions, Some(7));
        assert_eq!(all.files.at("limits.sessions").file, Path::new("/etc/conf.d/a.toml"));
        assert_eq!(all.files.at("handles.max_ttl").file, Path::new("/etc/broker.toml"));
        assert_eq!(all.parts.iter().map(|part| part.grants.len()).sum::<usize>(), 1);
        assert_eq!(all.parts.last().unwrap().label.as_deref(), Some("b.toml"));
    }

    #[test]
    fn a_table_in_two_files_names_both() {
        for table in ["broker", "arena", "audit", "handles", "limits", "metrics"] {
            let text = format!("[{table}]\n");
            let refused =
                merged(&[("/etc/broker.toml", &text), ("/etc/conf.d/a.toml", &text)]).unwrap_err();
            assert_eq!(
                refused,
                format!(
                    "/etc/conf.d/a.toml: {table}: is also in /etc/broker.toml: keep it in one of them"
                )
            );
        }
    }

    #[test]
    fn each_file_has_a_version_that_is_known() {
        let refused =
            merged(&[("/etc/broker.toml", ""), ("/etc/conf.d/a.toml", "config_version = 2")]);
        assert_eq!(
            refused.unwrap_err(),
            "/etc/conf.d/a.toml: config_version: is 2 and this broker reads version 1"
        );
    }
}
