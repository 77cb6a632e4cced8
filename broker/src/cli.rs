//! The command line of credbrokerd.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Holds database credentials in locked memory and logs in on behalf of local processes, which
/// it knows from the kernel and which never see a password.
#[derive(Debug, Parser)]
#[command(name = "credbrokerd", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve until SIGTERM.
    Run(ConfigArgs),
    /// Read the configuration, say what is wrong with it, and print what it amounts to.
    CheckConfig(ConfigArgs),
    /// Ask a running broker whether it serves; for probes.
    Health(HealthArgs),
    /// Say what locked memory, identity and sandbox this machine gives a broker.
    Posture(ConfigArgs),
}

/// Where the configuration is.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// The configuration file [default: /etc/credbroker/broker.toml; for an ordinary user
    /// $XDG_CONFIG_HOME/credbroker/broker.toml].
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How to ask.
#[derive(Debug, Args)]
pub struct HealthArgs {
    /// The configuration file, to learn the runtime directory from.
    #[arg(long, value_name = "FILE", conflicts_with = "runtime_dir")]
    pub config: Option<PathBuf>,
    /// The runtime directory of the broker [default: $CREDBROKER_RUNTIME_DIR, else
    /// /run/credbroker if there is one, else the user's own].
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Ask again until it serves, for at most this long.
    #[arg(long, value_name = "SPAN", value_parser = humantime::parse_duration, num_args = 0..=1, default_missing_value = "30s")]
    pub wait: Option<Duration>,
}
