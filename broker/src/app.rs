//! The composition root. [`start`] is the table of contents of the broker: what it does, in the
//! order in which it must be done.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Runtime;
use tracing::{error, info};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use self::runtime_dir::{RuntimeDir, RuntimeDirError};
use crate::arena::{Arena, RegionError};
use crate::audit::{Audit, Event, Outcome, Record, SinkError};
use crate::cli::{Command, HealthArgs};
use crate::config::{Config, ConfigError, Places};
use crate::connection::Host;
use crate::core::Core;
use crate::credential::Credentials;
use crate::door;
use crate::exit::Exit;
use crate::handle::ExpiryQueue;
use crate::harden::{self, HardenError, Inherited, Paths};
use crate::health::{self, Unhealthy};
use crate::peer::{BindError, Listener, SocketAccess};
use crate::posture::Posture;
use crate::shutdown::Signals;
use crate::source::SourceError;
use crate::{notify, rpc, sys};

mod runtime_dir;

/// The names of the sockets that a service manager may pass (FileDescriptorName=).
const BROKER: &str = "broker";
const POSTGRES: &str = "postgres";
/// After the last session is gone: for records, answers and closing sockets.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);

/// Why the broker did not start, in one line.
#[derive(Debug, Error)]
enum StartError {
    #[error(transparent)]
    Harden(#[from] HardenError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Arena(#[from] RegionError),
    #[error(transparent)]
    Audit(#[from] SinkError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Unhealthy(#[from] Unhealthy),
    #[error(
        "the service manager passed a socket named {0:?}, which means nothing here: use FileDescriptorName=broker or postgres"
    )]
    UnknownSocket(String),
    #[error("the audit log cannot be written, so the broker does not start")]
    NoAudit,
    #[error("the runtime could not be started: {0}")]
    Runtime(#[source] std::io::Error),
}

/// Everything is bound, loaded and locked down; nothing is served yet.
struct App {
    config: Config,
    core: Core,
    expiry: ExpiryQueue,
    listeners: Listeners,
    /// Held for as long as the sockets are ours; absent when they are the service manager's.
    _runtime_dir: Option<RuntimeDir>,
}

struct Listeners {
    broker: Listener,
    postgres: Listener,
}

/// Runs a command to its end.
#[must_use]
pub fn main(command: &Command) -> Exit {
    log_to_stderr();
    let answer = match command {
        Command::Run(args) => run(&Places::find(args.config.clone())),
        Command::CheckConfig(args) => Config::load(&Places::find(args.config.clone()))
            .map(|config| print(&config.show()))
            .map_err(StartError::from),
        Command::Posture(args) => posture(&Places::find(args.config.clone())),
        Command::Health(args) => healthy(args),
    };
    match answer {
        Ok(()) => Exit::Ok,
        Err(why) => {
            complain(&why);
            why.exit()
        }
    }
}

fn run(places: &Places) -> Result<(), StartError> {
    let app = start(places)?;
    // One more thread for the blocking pool comes and goes; secrets' arithmetic is done there.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    serve(app, &runtime).map_err(StartError::Runtime)
}

/// From nothing to a broker that could serve. No thread is started in here but the one that
/// writes the audit log, when the sandbox stands.
fn start(places: &Places) -> Result<App, StartError> {
    let inherited = harden::early()?;
    let mut config = Config::load(places)?;
    let arena = Arena::map(config.arena.backend, config.arena.capacity)?;
    let mut posture = Posture::find(&config, &arena);
    let audit = Audit::open(&config.audit, &arena)?;
    let (listeners, runtime_dir) = Listeners::open(&config, inherited)?;
    let credentials = Credentials::load(&config, &arena)?;
    posture.sandbox = Some(harden::late(&sandbox_paths(&config))?);

    // The first record says under what circumstances all later ones came about.
    let mut started = Record::new(Event::BrokerStarted, Outcome::Done)
        .detail("version", env!("CARGO_PKG_VERSION"));
    for (fact, found) in posture.facts() {
        started = started.detail(fact, found);
    }
    audit.start().map_err(StartError::Runtime)?;
    audit.before_serving(started).map_err(|_unavailable| StartError::NoAudit)?;
    for line in posture.to_string().lines() {
        info!("{line}");
    }
    let (core, expiry) = Core::new(&mut config, credentials, audit);
    Ok(App { config, core, expiry, listeners, _runtime_dir: runtime_dir })
}

fn serve(app: App, runtime: &Runtime) -> std::io::Result<()> {
    let App { config, core, expiry, listeners, _runtime_dir } = app;
    runtime.block_on(async {
        let mut signals = Signals::install()?;
        let (reporter, health) = tonic_health::server::health_reporter();
        let (broker, postgres) = (listeners.broker.serve()?, listeners.postgres.serve()?);
        let tasks = core.tasks().clone();
        tasks.spawn(core.clone().run_expiry(expiry));
        tasks.spawn(rpc::run_health(core.clone(), reporter));
        tasks.spawn(rpc::serve(broker, core.clone(), health));
        tasks.spawn(door::postgres::serve(postgres, core.clone()));
        info!(connections = config.connections.len(), runtime_dir = %config.runtime_dir.display(), "ready");
        notify::ready();

        signals.end().await;
        notify::stopping();
        tokio::select! {
            () = core.drain(config.drain) => {}
            () = signals.end() => core.cut_all().await,
        }
        core.stop();
        tasks.close();
        if tokio::time::timeout(SETTLE_WITHIN, tasks.wait()).await.is_err() {
            error!("some tasks did not end in time");
        }
        core.stopped(SETTLE_WITHIN);
        Ok(())
    })
    // Here the last clone of the core goes, and with it every secret: slots wipe themselves,
    // and then the arena as a whole.
}

impl Listeners {
    /// Takes what the service manager passed, and binds the rest. The directory is prepared only
    /// for what is bound here: one that the service manager made may not be ours to write in.
    fn open(
        config: &Config,
        mut inherited: Inherited,
    ) -> Result<(Self, Option<RuntimeDir>), StartError> {
        let all_passed = inherited.has(BROKER) && inherited.has(POSTGRES);
        let dir = if all_passed { None } else { Some(RuntimeDir::prepare(config)?) };
        let access = dir.as_ref().map_or(SocketAccess::Owner, RuntimeDir::access);
        let mut open = |name: &str, path: PathBuf| match inherited.take(name) {
            Some(socket) => Listener::from_service_manager(socket, name),
            None => Listener::bind(&path, access),
        };
        let broker = open(BROKER, config.broker_socket())?;
        let postgres = open(POSTGRES, config.postgres_socket())?;
        match inherited.left().first() {
            // An unknown socket would be open to callers and served by nobody.
            Some(unknown) => Err(StartError::UnknownSocket((*unknown).to_owned())),
            None => Ok((Self { broker, postgres }, dir)),
        }
    }
}

/// The files, directories and ports that serving needs.
fn sandbox_paths(config: &Config) -> Paths {
    let mut paths = Paths {
        write: vec![config.runtime_dir.clone(), config.state_dir.clone()],
        ..Paths::default()
    };
    paths.write.extend(config.audit.file.as_deref().and_then(Path::parent).map(Path::to_owned));
    paths.read.push(config.file.clone());
    paths.read.extend(config.secret_files().filter_map(Path::parent).map(Path::to_owned));
    for configured in config.connections.values() {
        match &configured.connection.host {
            Host::Tcp { port, .. } => paths.connect.push(*port),
            Host::Unix { directory, .. } => paths.read.push(directory.clone()),
        }
    }
    paths
}

fn posture(places: &Places) -> Result<(), StartError> {
    let config = Config::load(places)?;
    let arena = Arena::map(config.arena.backend, config.arena.capacity)?;
    print(&Posture::find(&config, &arena).to_string());
    Ok(())
}

fn healthy(args: &HealthArgs) -> Result<(), StartError> {
    let dir = match (&args.config, &args.runtime_dir) {
        (Some(_), _) => Config::load(&Places::find(args.config.clone()))?.runtime_dir,
        (None, Some(dir)) => dir.clone(),
        (None, None) => usual_runtime_dir(),
    };
    let socket = dir.join(credbroker_proto::BROKER_SOCKET);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    Ok(runtime.block_on(health::check(&socket, args.wait.unwrap_or_default()))?)
}

/// Where clients look too: what the environment says, else the machine's broker, else the user's.
fn usual_runtime_dir() -> PathBuf {
    let machine = Path::new(credbroker_proto::DEFAULT_RUNTIME_DIR);
    match std::env::var_os(credbroker_proto::RUNTIME_DIR_ENV) {
        Some(dir) => PathBuf::from(dir),
        None if machine.exists() => machine.to_owned(),
        None => Places::find(None).runtime_dir,
    }
}

impl StartError {
    fn exit(&self) -> Exit {
        match self {
            Self::Config(error) if error.is_permission() => Exit::NoPermission,
            Self::Source(error) if error.fault.is_permission() => Exit::NoPermission,
            Self::RuntimeDir(error) if error.is_permission() => Exit::NoPermission,
            Self::Audit(error) if error.is_permission() => Exit::NoPermission,
            Self::Config(_)
            | Self::Source(_)
            | Self::RuntimeDir(RuntimeDirError::Config { .. })
            | Self::UnknownSocket(_) => Exit::Config,
            Self::Bind(BindError::PathTooLong { .. } | BindError::NotOurs { .. }) => Exit::Config,
            Self::Arena(RegionError::CapacityTooSmall { .. }) => Exit::Config,
            Self::Arena(_)
            | Self::Audit(_)
            | Self::NoAudit
            | Self::RuntimeDir(_)
            | Self::Bind(BindError::Bind { .. })
            | Self::Unhealthy(_) => Exit::Unavailable,
            Self::Harden(_) | Self::Runtime(_) => Exit::Software,
        }
    }
}

/// Only this program's own lines: what libraries log at lower levels is not ours to vouch for.
/// `CREDBROKERD_LOG` is one of error, warn, info, debug, trace.
fn log_to_stderr() {
    let level = std::env::var("CREDBROKERD_LOG").ok().and_then(|level| level.parse().ok());
    let own =
        Targets::new().with_target(env!("CARGO_CRATE_NAME"), level.unwrap_or(LevelFilter::INFO));
    let lines =
        tracing_subscriber::fmt::layer().with_writer(|| Stderr).with_ansi(false).with_target(false);
    tracing_subscriber::registry().with(lines.with_filter(own)).init();
}

/// Standard error, losing lines rather than waiting for whoever reads them.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let _ = sys::write_without_waiting(&std::io::stderr(), line);
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[expect(clippy::print_stdout, reason = "the answer of a command goes to standard output")]
fn print(text: &str) {
    print!("{text}");
}

#[expect(
    clippy::print_stderr,
    reason = "the one line that says why the process ends, in a form of its own"
)]
fn complain(why: &StartError) {
    let mut text = why.to_string();
    let mut cause = std::error::Error::source(why);
    while let Some(deeper) = cause {
        let more = deeper.to_string();
        // Some messages include their cause already.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = deeper.source();
    }
    eprintln!("credbrokerd: {text}");
}
