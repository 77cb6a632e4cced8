//! The file as it is written, before anything in it is believed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::app::Name;
use crate::sql::{Access, Limits, MAX_ROWS_CEILING};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    pub(super) runtime_dir: Option<PathBuf>,
    pub(super) limits: RawLimits,
    pub(super) http: RawHttp,
    pub(super) unix: RawUnix,
    pub(super) log: RawLog,
    pub(super) defaults: RawDefaults,
    pub(super) connections: BTreeMap<String, RawConnection>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLimits {
    pub(super) max_rows: usize,
    pub(super) max_bytes: Size,
    pub(super) max_cell_bytes: Size,
    pub(super) statement_timeout: Span,
    pub(super) pool_timeout: Span,
    pub(super) concurrency: usize,
    pub(super) calls_per_second: u32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawHttp {
    bearers: BTreeMap<String, PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawUnix {
    pub(super) group: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawDefaults {
    pub(super) access: RawAccess,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConnection {
    pub(super) access: Option<RawAccess>,
    pub(super) allow_roles: Vec<String>,
    pub(super) mask: Vec<String>,
    pub(super) tables: Option<Vec<String>>,
    pub(super) limits: RawConnectionLimits,
}

/// Those of one connection; what is absent is as for all.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawConnectionLimits {
    pub(super) max_rows: Option<usize>,
    pub(super) max_bytes: Option<Size>,
    pub(super) max_cell_bytes: Option<Size>,
    pub(super) statement_timeout: Option<Span>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RawAccess {
    #[default]
    ReadOnly,
    ReadWrite,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawLog {
    pub(super) level: RawLevel,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

impl From<RawAccess> for Access {
    fn from(raw: RawAccess) -> Self {
        match raw {
            RawAccess::ReadOnly => Self::ReadOnly,
            RawAccess::ReadWrite => Self::ReadWrite,
        }
    }
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
            calls_per_second: 50,
        }
    }
}

impl RawLimits {
    pub(super) fn check(&self) -> Result<Limits, String> {
        span("limits.pool_timeout", self.pool_timeout)?;
        number("limits.concurrency", self.concurrency, 1, 1024)?;
        if !(1..=100_000).contains(&self.calls_per_second) {
            return Err("limits.calls_per_second: it must be between 1 and 100000".to_owned());
        }
        in_range("limits", self.limits())
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            max_rows: self.max_rows,
            max_bytes: self.max_bytes.0,
            max_cell_bytes: self.max_cell_bytes.0,
            statement_timeout: self.statement_timeout.0,
        }
    }
}

/// Principals of `--http`; each costs the time of one comparison in every request.
const MAX_BEARERS: usize = 256;

impl RawHttp {
    pub(super) fn check(&self) -> Result<BTreeMap<Name, PathBuf>, String> {
        if self.bearers.len() > MAX_BEARERS {
            return Err(format!("http.bearers: there may be {MAX_BEARERS}"));
        }
        let parsed = self.bearers.iter().map(|(name, file)| {
            let name = Name::parse(name).ok_or_else(|| {
                "http.bearers: a name is 1 to 64 letters, digits, dots, hyphens and underscores"
                    .to_owned()
            })?;
            if !file.is_absolute() {
                return Err(format!("http.bearers.{}: the path must be absolute", name.as_str()));
            }
            Ok((name, file.clone()))
        });
        parsed.collect()
    }
}

impl RawConnectionLimits {
    /// Those of the connection `name`, where `all` has what it leaves out.
    pub(super) fn check(&self, name: &str, all: Limits) -> Result<Limits, String> {
        let limits = Limits {
            max_rows: self.max_rows.unwrap_or(all.max_rows),
            max_bytes: self.max_bytes.map_or(all.max_bytes, |size| size.0),
            max_cell_bytes: self.max_cell_bytes.map_or(all.max_cell_bytes, |size| size.0),
            statement_timeout: self.statement_timeout.map_or(all.statement_timeout, |span| span.0),
        };
        in_range(&format!("connections.{name}.limits"), limits)
    }
}

fn in_range(table: &str, limits: Limits) -> Result<Limits, String> {
    number(&format!("{table}.max_rows"), limits.max_rows, 1, MAX_ROWS_CEILING)?;
    number(&format!("{table}.max_bytes"), limits.max_bytes, 1 << 10, 64 << 20)?;
    number(&format!("{table}.max_cell_bytes"), limits.max_cell_bytes, 64, 16 << 20)?;
    span(&format!("{table}.statement_timeout"), Span(limits.statement_timeout))?;
    Ok(limits)
}

fn number(key: &str, value: usize, low: usize, high: usize) -> Result<(), String> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(format!("{key}: {value} is not between {low} and {high}"))
}

fn span(key: &str, value: Span) -> Result<(), String> {
    if (Duration::from_millis(10)..=Duration::from_secs(3600)).contains(&value.0) {
        return Ok(());
    }
    Err(format!("{key}: it must be between 10ms and 1h"))
}

/// Bytes: a number, or a text such as `"1MiB"`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size(pub(super) usize);

/// A duration such as `"30s"`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span(pub(super) Duration);

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
