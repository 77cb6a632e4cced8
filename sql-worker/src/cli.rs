//! The command line: arguments → configuration → [`App`] → exit code.
//!
//! Standard output belongs to the protocol; everything for people goes to standard error.

use std::fmt::Display;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use crate::app::{App, Principal};
use crate::broker::client::Remote;
use crate::config::{Config, ToolSet};
use crate::{mcp, shutdown};

// sysexits(3).
const USAGE: u8 = 64;
const SOFTWARE: u8 = 70;
const CONFIGURATION: u8 = 78;

/// Half of the second in which the worker promises to be gone; the other half is for calls.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// SQL through the credential broker: handles instead of passwords.
#[derive(Debug, Parser)]
#[command(name = "credbroker-sql-worker", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the Model Context Protocol.
    Mcp(Mcp),
}

#[derive(Debug, Args)]
struct Mcp {
    /// On standard input and output.
    #[arg(long, required = true)]
    stdio: bool,
    /// Which tools are offered.
    #[arg(long, value_enum, default_value_t)]
    tools: ToolSet,
    /// The configuration file; without one everything has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The broker's runtime directory, as it is mounted here.
    #[arg(long, value_name = "DIRECTORY")]
    runtime_dir: Option<PathBuf>,
}

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // A closed terminal is no reason to fail differently.
            let _ = error.print();
            return code.into();
        }
    };
    let Command::Mcp(arguments) = cli.command;
    let mut config = match arguments.config.as_deref().map(Config::load).transpose() {
        Ok(config) => config.unwrap_or_default(),
        Err(error) => return fail(CONFIGURATION, &error),
    };
    config.tools = arguments.tools;
    config.runtime_dir = arguments.runtime_dir.or(config.runtime_dir);
    // sqlx reads it into every session and has no way to leave it out.
    if std::env::var_os("PGOPTIONS").is_some() {
        return fail(
            CONFIGURATION,
            &"PGOPTIONS is set, which would change every session: unset it",
        );
    }
    start_logging(config.log_level);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(SOFTWARE, &error),
    };
    let result = runtime.block_on(serve_stdio(config));
    // A thread may be blocked in a read of standard input for ever: it is left behind.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(SOFTWARE, &error),
    }
}

async fn serve_stdio(config: Config) -> std::io::Result<()> {
    let stop = CancellationToken::new();
    let broker = Remote::new(config.runtime_dir.clone());
    let app = Arc::new(App::new(Arc::new(broker), config));
    let (input, output) = rmcp::transport::io::stdio_pipes();
    let serving = async {
        mcp::serve(Arc::clone(&app), Principal::stdio(), input, output, stop.clone()).await;
        stop.cancel();
    };
    let signals = async {
        let signalled = shutdown::signalled().await;
        stop.cancel();
        signalled
    };
    let (signalled, (), ()) =
        tokio::join!(stop.run_until_cancelled(signals), serving, app.keep(&stop));
    // Revoking returns when the sessions are dead, and so are their statements.
    if timeout(CLOSE_TIMEOUT, app.close()).await.is_err() {
        tracing::warn!("the broker did not confirm in time that the handles are revoked");
    }
    signalled.unwrap_or(Ok(()))
}

/// JSON lines to standard error, from our own crates only: at `debug`, rmcp logs whole
/// requests, and with them statements, parameters and tokens.
fn start_logging(level: tracing::Level) {
    let level = LevelFilter::from_level(level);
    let ours = Targets::new()
        .with_target("credbroker_sql_worker", level)
        .with_target("credbroker_client", level);
    let lines = tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr);
    // Only the first subscriber of a process can be set.
    let _ = tracing_subscriber::registry().with(lines.with_filter(ours)).try_init();
    // A panic's text may hold whatever was being worked on; its place does not.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "panicked");
    }));
}

fn fail(code: u8, error: &dyn Display) -> ExitCode {
    // Nothing is left to tell it to if standard error is closed.
    let _ = writeln!(std::io::stderr(), "credbroker-sql-worker: {error}");
    code.into()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_transport_must_be_named() {
        assert!(Cli::try_parse_from(["w", "mcp"]).is_err());
        assert!(Cli::try_parse_from(["w", "mcp", "--stdio", "--allow-inline-secrets"]).is_err());
        assert!(Cli::try_parse_from(["w", "mcp", "--stdio", "--runtime-dir", "/x"]).is_ok());
    }
}
