//! Where and on what it was measured.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::binaries;
use crate::postgres::programs;

/// What figures depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    lines: Vec<(String, String)>,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn here() -> Self {
        let of = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output();
            let text = output.map(|output| output.stdout).unwrap_or_default();
            String::from_utf8_lossy(&text).lines().next().unwrap_or("unknown").to_owned()
        };
        let file = |path: &str, key: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("unknown");
            line.trim_matches([':', ' ', '\t']).to_owned()
        };
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let postgres = programs().join("postgres");
        let broker = binaries::credbrokerd();
        let text = |path: &std::path::Path| path.display().to_string();
        let line = |name: &str, value: String| (name.to_owned(), value);
        Self {
            lines: vec![
                line("processor", format!("{cores} × {}", file("/proc/cpuinfo", "model name"))),
                line("memory", file("/proc/meminfo", "MemTotal")),
                line("kernel", of("uname", &["-sr"])),
                line("broker", of(&text(&broker), &["--version"])),
                line("PostgreSQL", of(&text(&postgres), &["--version"])),
                line("pgbouncer", of("/usr/sbin/pgbouncer", &["--version"])),
                line("Rust", of("rustc", &["--version"])),
            ],
        }
    }

    /// Name and value, in order.
    pub(super) fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}
