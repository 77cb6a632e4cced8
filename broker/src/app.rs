//! The composition root. [`start`] is the table of contents of the broker: what it does, in the
//! order in which it must be done.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::runtime::Runtime;
use tracing::{error, info};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use self::runtime_dir::RuntimeDir;
use self::start_error::StartError;
use crate::arena::Arena;
use crate::audit::{Audit, Event, Outcome, Record};
use crate::cli::{Command, HealthArgs};
use crate::config::{Config, Places};
use crate::connection::{Hosts, Tls};
use crate::core::{Core, Parts, Reloading, Settings, SuspensionFile};
use crate::credential::Credentials;
use crate::door::ends::Ends;
use crate::door::postgres::Door;
use crate::door::postgres::handoff::Handoffs;
use crate::door::relay::workers::Workers;
use crate::exit::Exit;
use crate::handle::ExpiryQueue;
use crate::harden::{self, Inherited, Paths};
use crate::health;
use crate::keeper::Keeper;
use crate::metrics::{self, Metrics};
use crate::packet::{Closing, Edge};
use crate::peer::{Listener, SocketAccess};
use crate::posture::Posture;
use crate::rpc::Audience;
use crate::shutdown::{Asked, Signals};
use crate::{notify, rpc, sys};

mod runtime_dir;
mod start_error;

/// The names of the sockets that a service manager may pass (FileDescriptorName=).
const BROKER: &str = "broker";
const PACKET: &str = "packet";
const POSTGRES: &str = "postgres";
const ADMIN: &str = "admin";
const ADMIN_PACKET: &str = "admin-packet";
/// After the last session is gone: for records, answers and closing sockets.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);

/// Everything is bound, loaded and locked down; nothing is served yet.
struct App {
    config: Config,
    core: Core,
    expiry: ExpiryQueue,
    listeners: Listeners,
    arena: Arena,
    keeper: Keeper,
    metrics: Option<metrics::Server>,
    /// Held for as long as the sockets are ours.
    _directories: Directories,
}

struct Listeners {
    broker: Listener,
    packet: Listener,
    admin_packet: Listener,
    postgres: Listener,
    admin: Listener,
}

/// The directories that sockets were bound in; absent where they are the service manager's.
#[derive(Debug)]
struct Directories {
    _runtime: Option<RuntimeDir>,
    _admin: Option<RuntimeDir>,
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
    let served = serve(app, &runtime).map_err(StartError::Runtime);
    // A read that hangs, as on a dead network disk, does not keep the process.
    runtime.shutdown_timeout(SETTLE_WITHIN);
    served
}

/// From nothing to a broker that could serve. No thread is started in here but the one that
/// writes the audit log, when the sandbox stands.
fn start(places: &Places) -> Result<App, StartError> {
    let inherited = harden::early()?;
    let mut config = Config::load(places)?;
    let keeper = Keeper::fork(config.commands())?;
    let arena = Arena::map(config.arena.backend, config.arena.capacity)?;
    let mut posture = Posture::find(&config, &arena);
    posture.keeper = Some(keeper.sandbox());
    let audit = Audit::open(&config.audit, &arena)?;
    let suspensions = SuspensionFile::open(&config.state_dir)?;
    let (listeners, directories) = Listeners::open(&config, inherited)?;
    let metrics = config.metrics.as_ref().map(metrics::Server::bind).transpose()?;
    config.load_client_keys(&arena)?;
    let credentials = Credentials::load(&config, &arena, &keeper)?;
    let sandbox = sandbox_paths(&config);
    posture.sandbox = Some(harden::late(&sandbox)?);

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
    let (core, expiry) = Core::new(Parts {
        reloading: Reloading::new(places.clone(), &config, sandbox, sandbox_paths),
        metrics: Metrics::new(config.connections.keys().cloned()),
        settings: Settings::of(&mut config),
        credentials,
        audit,
        suspensions,
        posture: posture.facts(),
    });
    Ok(App { config, core, expiry, listeners, arena, keeper, metrics, _directories: directories })
}

fn serve(app: App, runtime: &Runtime) -> std::io::Result<()> {
    let App { config, core, expiry, listeners, arena, keeper, metrics, _directories } = app;
    runtime.block_on(async {
        let mut signals = Signals::install()?;
        let (reporter, health) = tonic_health::server::health_reporter();
        let (broker, postgres) = (listeners.broker.serve()?, listeners.postgres.serve()?);
        let admin = listeners.admin.serve()?;
        let admin_packet = listeners.admin_packet.serve()?;
        let (workers, _running) = Workers::start()?;
        let packet = listeners.packet.serve()?;
        let tasks = core.tasks().clone();
        let (holding, queue) = keeper.hold_sockets();
        let handoffs = Handoffs { holding, ends: Ends::new()?, closer: Closing::start()? };
        let (ends, closing) = (handoffs.ends.clone(), handoffs.closer.clone());
        let door = Door::new(core.clone(), workers, handoffs);
        let edge = Edge::start(core.clone(), door.clone(), closing)?;
        tasks.spawn(queue.run());
        tasks.spawn(ends.run(core.until_stopped()));
        tasks.spawn(core.clone().run_expiry(expiry));
        tasks.spawn(core.clone().run_refresh());
        tasks.spawn(rpc::run_health(core.clone(), reporter));
        tasks.spawn(rpc::serve(broker, Audience::Workloads, core.clone(), health.clone()));
        tasks.spawn(rpc::serve(admin, Audience::Operators, core.clone(), health));
        tasks.spawn(edge.clone().serve(packet, Audience::Workloads));
        tasks.spawn(edge.serve(admin_packet, Audience::Operators));
        tasks.spawn(door.serve(postgres));
        if let Some(server) = metrics {
            tasks.spawn(serve_metrics(server, core.clone(), arena));
        }
        info!(connections = config.connections.len(), runtime_dir = %config.runtime_dir.display(), "ready");
        notify::ready();

        while signals.next().await == Asked::Reload {
            notify::reloading();
            // What was wrong is in the log, and in GetStatus.
            let _told = core.reload(None).await;
            notify::ready();
        }
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

/// Answers scrapes until the core drains, and looks at the arena's canaries at each.
async fn serve_metrics(server: metrics::Server, core: Core, arena: Arena) {
    let (metrics, tasks) = (core.metrics().clone(), core.tasks().clone());
    let snapshot = {
        let core = core.clone();
        move || {
            arena.check();
            core.snapshot(&arena)
        }
    };
    if let Err(error) = metrics::serve(server, metrics, snapshot, tasks, core.draining()).await {
        error!(%error, "metrics cannot be served");
    }
}

impl Listeners {
    /// Takes what the service manager passed, and binds the rest. The directory is prepared only
    /// for what is bound here: one that the service manager made may not be ours to write in.
    fn open(config: &Config, mut inherited: Inherited) -> Result<(Self, Directories), StartError> {
        let passed = |names: &[&str]| names.iter().all(|name| inherited.has(name));
        let runtime = if passed(&[BROKER, PACKET, POSTGRES]) {
            None
        } else {
            Some(RuntimeDir::prepare(config)?)
        };
        let admin_dir = if passed(&[ADMIN, ADMIN_PACKET]) {
            None
        } else {
            Some(RuntimeDir::prepare_admin(config)?)
        };
        let access =
            |dir: &Option<RuntimeDir>| dir.as_ref().map_or(SocketAccess::Owner, RuntimeDir::access);
        let mut open = |name: &str, path: PathBuf, dir| match inherited.take(name) {
            Some(socket) => Listener::from_service_manager(socket, name),
            None => Listener::bind(&path, access(dir)),
        };
        let broker = open(BROKER, config.broker_socket(), &runtime)?;
        let postgres = open(POSTGRES, config.postgres_socket(), &runtime)?;
        let admin = open(ADMIN, config.admin_socket(), &admin_dir)?;
        let mut open_packet = |name: &str, path: PathBuf, dir| match inherited.take(name) {
            Some(socket) => Listener::packet_from_service_manager(socket, name),
            None => Listener::bind_packet(&path, access(dir)),
        };
        let packet = open_packet(PACKET, config.packet_socket(), &runtime)?;
        let admin_packet = open_packet(ADMIN_PACKET, config.admin_packet_socket(), &admin_dir)?;
        match inherited.left().first() {
            // An unknown socket would be open to callers and served by nobody.
            Some(unknown) => Err(StartError::UnknownSocket((*unknown).to_owned())),
            None => {
                let directories = Directories { _runtime: runtime, _admin: admin_dir };
                Ok((Self { broker, postgres, packet, admin, admin_packet }, directories))
            }
        }
    }
}

/// The files, directories and ports that serving needs.
fn sandbox_paths(config: &Config) -> Paths {
    let mut paths = Paths {
        write: vec![config.runtime_dir.clone(), config.admin_dir.clone(), config.state_dir.clone()],
        ..Paths::default()
    };
    paths.write.extend(config.audit.file.as_deref().and_then(Path::parent).map(Path::to_owned));
    // The directory: editors and package managers replace the file, and conf.d is in there.
    paths.read.extend(config.file.parent().map(Path::to_owned));
    if config.reads_proc() {
        paths.read.push(PathBuf::from("/proc"));
    }
    paths.read.extend(config.secret_directories());
    paths.read.extend(config.referred_directories());
    // Where the environment says that the system's roots are, for the reload that reads them.
    let roots = ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(std::env::var_os);
    paths.read.extend(roots.map(PathBuf::from));
    for configured in config.connections.values() {
        match &configured.connection.hosts {
            Hosts::Tcp(hosts) => paths.connect.extend(hosts.iter().map(|host| host.port)),
            Hosts::Unix { sockets, .. } => {
                paths.read.extend(sockets.iter().map(|socket| socket.directory.clone()));
            }
        }
        // A reload reads the roots again, and a renewed file is another one of that name.
        if let Tls::Required { ca_file: Some(file), .. } = &configured.connection.tls {
            paths.read.extend(file.parent().map(Path::to_owned));
        }
    }
    paths
}

fn posture(places: &Places) -> Result<(), StartError> {
    let _none_of_ours = harden::early()?;
    let config = Config::load(places)?;
    let keeper = Keeper::fork(config.commands())?;
    let arena = Arena::map(config.arena.backend, config.arena.capacity)?;
    let mut posture = Posture::find(&config, &arena);
    posture.keeper = Some(keeper.sandbox());
    posture.sandbox = Some(harden::late(&sandbox_paths(&config))?);
    print(&posture.to_string());
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
