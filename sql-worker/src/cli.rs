//! The command line: arguments → configuration → [`App`] → exit code.
//!
//! Standard output belongs to the protocol; everything for people goes to standard error.

use std::fmt::Display;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use crate::app::App;
use crate::broker::client::Remote;
use crate::config::{Config, InlineSecrets, ToolSet};
use crate::mcp::transport::{BindError, Choice, Transport};
use crate::socket::Listener;
use crate::{rpc, shutdown};

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
    /// Serve SQL by gRPC: credbroker.v1.SqlService.
    Serve(Serve),
}

#[derive(Debug, Args)]
struct Serve {
    /// Where: unix:PATH. Its clients are told apart by their uid.
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path)]
    listen: PathBuf,
    #[command(flatten)]
    place: Place,
}

/// What is the same however calls come in.
#[derive(Debug, Args)]
struct Place {
    /// The configuration file; without one everything has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The broker's runtime directory, as it is mounted here.
    #[arg(long, value_name = "DIRECTORY")]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Mcp {
    #[command(flatten)]
    transport: TransportArguments,
    /// Which tools are offered.
    #[arg(long, value_enum, default_value_t)]
    tools: ToolSet,
    /// Takes passwords as tool arguments: insecure, for they pass through the model.
    #[arg(long)]
    allow_inline_secrets: bool,
    #[command(flatten)]
    place: Place,
}

/// How calls come in: exactly one.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct TransportArguments {
    /// On standard input and output.
    #[arg(long)]
    stdio: bool,
    /// On a Unix socket; its clients are told apart by their uid.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// As streamable HTTP on a loopback address, such as 127.0.0.1:8765, path /mcp; its clients
    /// are told apart by the bearer tokens of `[http] bearers` in the configuration.
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Option<SocketAddr>,
}

impl From<TransportArguments> for Choice {
    fn from(arguments: TransportArguments) -> Self {
        match (arguments.unix, arguments.http) {
            (Some(path), _) => Self::Unix(path),
            (None, Some(address)) => Self::Http(address),
            (None, None) => Self::Stdio,
        }
    }
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
    let place = match &cli.command {
        Command::Mcp(arguments) => &arguments.place,
        Command::Serve(arguments) => &arguments.place,
    };
    let mut config = match place.config.as_deref().map(Config::load).transpose() {
        Ok(config) => config.unwrap_or_default(),
        Err(error) => return fail(CONFIGURATION, &error),
    };
    config.runtime_dir = place.runtime_dir.clone().or(config.runtime_dir);
    if let Command::Mcp(arguments) = &cli.command {
        config.tools = arguments.tools;
        if arguments.allow_inline_secrets {
            config.inline_secrets = InlineSecrets::Allowed;
        }
    }
    // sqlx reads it into every session and has no way to leave it out.
    if std::env::var_os("PGOPTIONS").is_some() {
        return fail(
            CONFIGURATION,
            &"PGOPTIONS is set, which would change every session: unset it",
        );
    }
    // Before there are threads.
    let edge = match Edge::bind(cli.command, &config) {
        Ok(edge) => edge,
        Err(error) => return fail(CONFIGURATION, &error),
    };
    start_logging(config.log_level);
    if cfg!(feature = "conformance-fixtures") {
        tracing::error!(
            conformance_fixtures = true,
            "THIS IS A TEST BUILD: it offers tools that nobody should use"
        );
    }
    if config.inline_secrets == InlineSecrets::Allowed {
        tracing::warn!(inline_secrets = "allowed", "passwords may pass through the model");
    }
    // One thread: a call waits for the client, the broker and the database in turn, and between
    // threads each of these would be a wake-up more.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(SOFTWARE, &error),
    };
    let result = runtime.block_on(serve(edge, config));
    // A thread may be blocked in a read of standard input for ever: it is left behind.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(SOFTWARE, &error),
    }
}

async fn serve(edge: Edge, config: Config) -> std::io::Result<()> {
    let stop = CancellationToken::new();
    let broker = Remote::new(config.runtime_dir.clone());
    let app = Arc::new(App::new(Arc::new(broker), config));
    let serving = async {
        let served = edge.serve(Arc::clone(&app), stop.clone()).await;
        stop.cancel();
        served
    };
    let signals = async {
        let signalled = shutdown::signalled().await;
        stop.cancel();
        signalled
    };
    let (signalled, served, ()) =
        tokio::join!(stop.run_until_cancelled(signals), serving, app.keep(&stop));
    // Revoking returns when the sessions are dead, and so are their statements.
    if timeout(CLOSE_TIMEOUT, app.close()).await.is_err() {
        tracing::warn!("the broker did not confirm in time that the handles are revoked");
    }
    served.and(signalled.unwrap_or(Ok(())))
}

/// How calls come in, bound and not served yet.
enum Edge {
    Mcp(Transport),
    Rpc(Listener),
}

impl Edge {
    fn bind(command: Command, config: &Config) -> Result<Self, BindError> {
        Ok(match command {
            Command::Mcp(arguments) => {
                Self::Mcp(Transport::bind(&arguments.transport.into(), config)?)
            }
            Command::Serve(arguments) => {
                Self::Rpc(Listener::bind(&arguments.listen, config.socket_group.as_deref())?)
            }
        })
    }

    async fn serve(self, app: Arc<App>, stop: CancellationToken) -> std::io::Result<()> {
        match self {
            Self::Mcp(transport) => transport.serve(app, stop).await,
            Self::Rpc(listener) => rpc::serve(listener, app, stop).await,
        }
    }
}

/// The path in `unix:PATH`, as gRPC names it: <https://github.com/grpc/grpc/blob/master/doc/naming.md>.
fn unix_path(text: &str) -> Result<PathBuf, &'static str> {
    let path = text.strip_prefix("unix:").ok_or("must be unix:PATH")?;
    // unix:///absolute is the same.
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.starts_with('/') { Ok(path.into()) } else { Err("the path must be absolute") }
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
        assert!(Cli::try_parse_from(["w", "mcp", "--allow-inline-secrets"]).is_err());
        assert!(Cli::try_parse_from(["w", "mcp", "--stdio", "--allow-inline-secrets"]).is_ok());
        assert!(Cli::try_parse_from(["w", "mcp", "--stdio", "--runtime-dir", "/x"]).is_ok());
        assert!(Cli::try_parse_from(["w", "mcp", "--stdio", "--unix", "/x/y"]).is_err());
        assert!(Cli::try_parse_from(["w", "mcp", "--http", "localhost"]).is_err());
        assert!(Cli::try_parse_from(["w", "mcp", "--http", "[::1]:0"]).is_ok());
    }

    #[test]
    fn a_service_listens_on_a_unix_socket_only() {
        let parsed = |listen| Cli::try_parse_from(["w", "serve", "--listen", listen]).is_ok();
        assert!(parsed("unix:/x/y") && parsed("unix:///x/y"));
        assert!(!parsed("unix:x/y") && !parsed("127.0.0.1:1") && !parsed("/x/y"));
        assert_eq!(unix_path("unix:///x/y"), Ok("/x/y".into()));
        assert!(Cli::try_parse_from(["w", "serve"]).is_err());
    }
}
