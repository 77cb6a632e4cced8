//! The configuration file: read once, refused whole when anything in it is wrong.
//!
//! Invariant: a [`Config`] is in range everywhere. All of it is optional, and so is the file.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::sql::{Limits, MAX_ROWS_CEILING, PoolSettings};

/// What the worker runs with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the broker's sockets are, if not where the client library looks.
    pub runtime_dir: Option<PathBuf>,
    /// Bounds of one statement; a call may ask for its own `max_rows`.
    pub limits: Limits,
    /// Sessions of one handle.
    pub pool: PoolSettings,
    /// Statements at once, over all handles.
    pub concurrency: usize,
    /// What is logged.
    pub log_level: tracing::Level,
    /// Which tools are offered; from the command line.
    pub tools: ToolSet,
}

/// A choice of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ToolSet {
    /// All of them.
    #[default]
    Full,
    /// What a model needs that only reads and writes rows: the fewest tokens.
    Core,
}

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct ConfigError {
    file: PathBuf,
    problem: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    runtime_dir: Option<PathBuf>,
    limits: RawLimits,
    log: RawLog,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    max_rows: usize,
    max_bytes: Size,
    max_cell_bytes: Size,
    statement_timeout: Span,
    pool_timeout: Span,
    concurrency: usize,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    level: RawLevel,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

impl Default for RawLimits {
    fn default() -> Self {
        Self {
            max_rows: 1000,
            max_bytes: Size(1 << 20),
            max_cell_bytes: Size(64 << 10),
            statement_timeout: Span(Duration::from_secs(30)),
            pool_timeout: Span(Duration::from_secs(5)),
            concurrency: 16,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::from_raw(Raw::default())
    }
}

impl Config {
    /// Reads `file`.
    ///
    /// # Errors
    /// When it cannot be read, when others can write it, and when anything in it is unknown
    /// or out of range; the text names the file and the key or line.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let error = |problem: String| ConfigError { file: file.to_owned(), problem };
        let mut opened = File::open(file).map_err(|cause| error(cause.to_string()))?;
        // Of the open file, so that nobody can swap it in between.
        let metadata = opened.metadata().map_err(|cause| error(cause.to_string()))?;
        let own = rustix::process::geteuid().as_raw();
        if metadata.mode() & 0o022 != 0 || (metadata.uid() != 0 && metadata.uid() != own) {
            let problem = "others can write it: it must belong to root or to this user, mode 0644";
            return Err(error(problem.to_owned()));
        }
        let mut text = String::new();
        opened.read_to_string(&mut text).map_err(|cause| error(cause.to_string()))?;
        Self::parse(&text).map_err(error)
    }

    /// Parses the text of a configuration file; pure.
    ///
    /// # Errors
    /// A text that says which key or line is wrong, and what is wanted.
    pub fn parse(text: &str) -> Result<Self, String> {
        let raw: Raw = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
            format!("line {line}: {}", error.message())
        })?;
        raw.limits.check()?;
        Ok(Self::from_raw(raw))
    }

    fn from_raw(raw: Raw) -> Self {
        let RawLimits { max_rows, max_bytes, max_cell_bytes, .. } = raw.limits;
        Self {
            runtime_dir: raw.runtime_dir,
            limits: Limits {
                max_rows,
                max_bytes: max_bytes.0,
                max_cell_bytes: max_cell_bytes.0,
                statement_timeout: raw.limits.statement_timeout.0,
            },
            pool: PoolSettings {
                size: 4,
                wait: raw.limits.pool_timeout.0,
                idle: Duration::from_secs(60),
            },
            concurrency: raw.limits.concurrency,
            tools: ToolSet::default(),
            log_level: match raw.log.level {
                RawLevel::Error => tracing::Level::ERROR,
                RawLevel::Warn => tracing::Level::WARN,
                RawLevel::Info => tracing::Level::INFO,
                RawLevel::Debug => tracing::Level::DEBUG,
            },
        }
    }
}

impl RawLimits {
    fn check(&self) -> Result<(), String> {
        let number = |key: &str, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(format!("limits.{key}: {value} is not between {low} and {high}"))
        };
        let span = |key: &str, value: Span| {
            if (Duration::from_millis(10)..=Duration::from_secs(3600)).contains(&value.0) {
                return Ok(());
            }
            Err(format!("limits.{key}: it must be between 10ms and 1h"))
        };
        number("max_rows", self.max_rows, 1, MAX_ROWS_CEILING)?;
        number("max_bytes", self.max_bytes.0, 1 << 10, 64 << 20)?;
        number("max_cell_bytes", self.max_cell_bytes.0, 64, 16 << 20)?;
        span("statement_timeout", self.statement_timeout)?;
        span("pool_timeout", self.pool_timeout)?;
        number("concurrency", self.concurrency, 1, 1024)
    }
}

/// Bytes: a number, or a text such as `"1MiB"`.
#[derive(Debug, Clone, Copy)]
struct Size(usize);

/// A duration such as `"30s"`.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a size in bytes, or such as \"64KiB\" or \"1MiB\"")
            }
            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                let wrong = |_| E::invalid_value(de::Unexpected::Signed(bytes), &self);
                usize::try_from(bytes).map(Size).map_err(wrong)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                let (number, unit) = match (text.strip_suffix("KiB"), text.strip_suffix("MiB")) {
                    (Some(number), _) => (number, 1 << 10),
                    (_, Some(number)) => (number, 1 << 20),
                    (None, None) => (text, 1),
                };
                let number = number.trim().parse::<usize>().ok();
                number
                    .and_then(|number| number.checked_mul(unit))
                    .map(Size)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text)
            .map(Span)
            .map_err(|error| de::Error::custom(format!("{error}; wanted is such as \"30s\"")))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn everything_has_a_default() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.limits.max_rows, 1000);
        assert_eq!(config.limits.max_bytes, 1 << 20);
        assert_eq!(config.limits.statement_timeout, Duration::from_secs(30));
        assert_eq!(config.runtime_dir, None);
    }

    #[test]
    fn everything_can_be_set() {
        let config = Config::parse(
            "runtime_dir = \"/run/x\"\n[limits]\nmax_rows = 5\nmax_bytes = \"2MiB\"\n\
             max_cell_bytes = 100\nstatement_timeout = \"1m\"\npool_timeout = \"250ms\"\n\
             concurrency = 2\n[log]\nlevel = \"debug\"\n",
        )
        .unwrap();
        assert_eq!(config.runtime_dir.as_deref(), Some(Path::new("/run/x")));
        assert_eq!((config.limits.max_rows, config.limits.max_bytes), (5, 2 << 20));
        assert_eq!(config.limits.max_cell_bytes, 100);
        assert_eq!(config.limits.statement_timeout, Duration::from_secs(60));
        assert_eq!(config.pool.wait, Duration::from_millis(250));
        assert_eq!((config.concurrency, config.log_level), (2, tracing::Level::DEBUG));
    }

    #[test]
    fn faults_name_the_key_or_the_line() {
        let cases = [
            ("[limits]\nmax_rows = 0", "limits.max_rows: 0 is not between 1 and 50000"),
            ("[limits]\nmax_rows = 50001", "limits.max_rows: 50001 is not between 1 and 50000"),
            (
                "[limits]\nstatement_timeout = \"2h\"",
                "limits.statement_timeout: it must be between 10ms and 1h",
            ),
            ("\nrunime_dir = \"x\"", "line 2: unknown field `runime_dir`"),
            ("[limits]\nmax_bytes = \"1GB\"", "line 2: invalid value: string \"1GB\""),
            ("[log]\nlevel = \"trace\"", "line 2: unknown variant `trace`"),
            ("[limits]\npool_timeout = \"soon\"", "line 2: expected number at 0"),
        ];
        for (text, message) in cases {
            let error = Config::parse(text).unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("worker.toml");
        std::fs::write(&file, "[limits]\nmax_rows = 7\n").unwrap();
        for (mode, accepted) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(Config::load(&file).is_ok(), accepted, "{mode:o}");
        }
        let missing = Config::load(&directory.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("none: No such file"), "{missing}");
    }
}
