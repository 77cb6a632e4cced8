//! A broker that issues handles to nothing, and remembers what it was asked.
//!
//! It serves broker.sock and admin.sock. The name of a connection decides the answer: `denied`, `busy`, `stuck` and `no_pidfd` do
//! what they say, and every other name is granted.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use credbroker_proto::v1::admin_service_server::AdminServiceServer;
use credbroker_proto::v1::handle_service_server::{HandleService, HandleServiceServer};
use credbroker_proto::v1::revoke_handle_request::Handle as Which;
use credbroker_proto::{ERROR_DOMAIN, v1};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::admin::Admin;

pub(crate) const DEFAULT_TTL: Duration = Duration::from_secs(1800);
pub(crate) const SESSIONS_CUT: u32 = 2;
pub(crate) const REFERENCE: u64 = 81;
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(250);

/// How long a test waits for a phase before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running broker in a runtime directory of its own.
pub(crate) struct Broker {
    directory: TempDir,
    state: Arc<State>,
    running: Option<Running>,
}

/// The thread that serves. It has a runtime of its own, so that all connections end with it.
struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

/// What was asked and granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Issued {
        request: v1::IssueHandleRequest,
        id: String,
        token: String,
        pid: i32,
    },
    Renewed {
        id: String,
        at: SystemTime,
    },
    RenewalRefused {
        id: String,
    },
    Revoked {
        id: String,
    },
    /// What an operator asked for, as its messages are printed.
    Asked(String),
}

#[derive(Default)]
pub(crate) struct State {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    live: HashMap<String, Live>,
    log: Vec<Event>,
    issued: u32,
}

struct Live {
    token: String,
    ttl: Duration,
    handle: v1::Handle,
}

impl Broker {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut broker = Self { directory, state: Arc::default(), running: None };
        fs::create_dir(broker.runtime_dir()).unwrap();
        fs::create_dir(broker.admin_dir()).unwrap();
        broker.resume();
        broker
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// Where it is looked for by who knows the other alone.
    pub(crate) fn admin_dir(&self) -> PathBuf {
        self.directory.path().join("run-admin")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.runtime_dir().join(credbroker_proto::BROKER_SOCKET)
    }

    fn admin_socket(&self) -> PathBuf {
        self.admin_dir().join(credbroker_proto::ADMIN_SOCKET)
    }

    /// Ends at once, with all its connections and handles.
    pub(crate) fn kill(&mut self) {
        self.stop();
        fs::remove_file(self.socket()).unwrap();
        fs::remove_file(self.admin_socket()).unwrap();
        self.state.inner.lock().unwrap().live.clear();
    }

    /// Listens (again).
    pub(crate) fn resume(&mut self) {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (listener, admin_listener) = {
            let _inside = runtime.enter();
            (bind(&self.socket()), bind(&self.admin_socket()))
        };
        let service = HandleServiceServer::new(Service(Arc::clone(&self.state)));
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        let admin = AdminServiceServer::new(Admin(Arc::clone(&self.state)));
        let admin_server = Server::builder()
            .add_service(admin)
            .serve_with_incoming(UnixListenerStream::new(admin_listener));
        let (stop, stopped) = oneshot::channel();
        let serve = async {
            tokio::select! {
                ended = server => ended.unwrap(),
                ended = admin_server => ended.unwrap(),
                _ = stopped => {},
            }
        };
        let thread = thread::spawn(move || runtime.block_on(serve));
        self.running = Some(Running { stop, thread });
    }

    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            let _ended_before = running.stop.send(());
            running.thread.join().unwrap();
        }
    }

    /// Forgets a handle, as an operator would have it.
    pub(crate) fn forget(&self, id: &str) {
        self.state.inner.lock().unwrap().live.remove(id).unwrap();
    }

    pub(crate) fn live_handles(&self) -> usize {
        self.state.inner.lock().unwrap().live.len()
    }

    pub(crate) fn log(&self) -> Vec<Event> {
        self.state.inner.lock().unwrap().log.clone()
    }

    /// Waits for the first entry for which `pick` gives something.
    pub(crate) fn wait_for<T>(&self, what: &str, pick: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut inner = self.state.inner.lock().unwrap();
        loop {
            if let Some(found) = inner.log.iter().find_map(&pick) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "not seen in time: {what}; log: {:#?}", inner.log);
            inner = self.state.changed.wait_timeout(inner, left).unwrap().0;
        }
    }

    /// Waits for an issue and gives the id and the pid of the asking process.
    pub(crate) fn wait_for_issue(&self) -> (String, i32) {
        self.wait_for("issue", |event| match event {
            Event::Issued { id, pid, .. } => Some((id.clone(), *pid)),
            _ => None,
        })
    }

    pub(crate) fn wait_for_revocation(&self, of: &str) {
        self.wait_for("revocation", |event| {
            matches!(event, Event::Revoked { id } if id == of).then_some(())
        });
    }
}

impl State {
    pub(crate) fn note(&self, asked: impl std::fmt::Debug) {
        self.inner.lock().unwrap().log.push(Event::Asked(format!("{asked:?}")));
        self.changed.notify_all();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop();
    }
}

#[expect(clippy::disallowed_methods, reason = "the directory is this test's own")]
fn bind(socket: &Path) -> UnixListener {
    UnixListener::bind(socket).unwrap()
}

struct Service(Arc<State>);

impl Service {
    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let result = work(&mut self.0.inner.lock().unwrap());
        self.0.changed.notify_all();
        result
    }
}

#[tonic::async_trait]
impl HandleService for Service {
    type WatchHandleStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<v1::HandleEvent, Status>>>;

    /// All that can become of a handle, one after the other, and something of the future.
    async fn watch_handle(
        &self,
        request: Request<v1::WatchHandleRequest>,
    ) -> Result<Response<Self::WatchHandleStream>, Status> {
        use v1::handle_event::Event;

        let which = Which::Token(request.into_inner().token);
        let expires = self.with(|inner| {
            let id = inner.find(&which)?;
            Ok::<_, Status>(inner.live[&id].handle.expires)
        })?;
        let events = [
            Some(Event::Expiring(v1::HandleExpiring { expires })),
            None,
            Some(Event::Rotated(v1::HandleRotated { credential_version: 2 })),
            Some(Event::Ended(v1::HandleEnded { reason: "suspended".into() })),
        ];
        let events: Vec<_> = events.map(|event| Ok(v1::HandleEvent { event })).into();
        Ok(Response::new(tokio_stream::iter(events)))
    }

    async fn resolve_connection(
        &self,
        request: Request<v1::ResolveConnectionRequest>,
    ) -> Result<Response<v1::ResolveConnectionResponse>, Status> {
        let expected = v1::ResolveConnectionRequest {
            r#type: "postgresql".into(),
            host: "db.internal".into(),
            port: Some(5432),
            database: "mydb".into(),
        };
        if request.into_inner() != expected {
            return Err(refuse(Code::PermissionDenied, "ACCESS_DENIED", None));
        }
        Ok(Response::new(v1::ResolveConnectionResponse { name: "main_db".into() }))
    }

    async fn issue_handle(
        &self,
        request: Request<v1::IssueHandleRequest>,
    ) -> Result<Response<v1::IssueHandleResponse>, Status> {
        let peer = request.extensions().get::<UdsConnectInfo>().unwrap().peer_cred.unwrap();
        let request = request.into_inner();
        match request.connection.as_str() {
            "denied" => return Err(refuse(Code::PermissionDenied, "ACCESS_DENIED", None)),
            "busy" => {
                return Err(refuse(Code::ResourceExhausted, "LIMIT_REACHED", Some(RETRY_AFTER)));
            }
            "no_pidfd" if request.bind() == v1::Bind::Lifetime => {
                return Err(refuse(Code::Unimplemented, "UNSUPPORTED", None));
            }
            "stuck" => std::future::pending().await,
            _ => {}
        }
        Ok(Response::new(self.with(|inner| inner.issue(request, peer.uid(), peer.pid().unwrap()))))
    }

    async fn renew_handle(
        &self,
        request: Request<v1::RenewHandleRequest>,
    ) -> Result<Response<v1::RenewHandleResponse>, Status> {
        let request = request.into_inner();
        let handle = self.with(|inner| inner.renew(&request))?;
        Ok(Response::new(v1::RenewHandleResponse { handle: Some(handle) }))
    }

    async fn revoke_handle(
        &self,
        request: Request<v1::RevokeHandleRequest>,
    ) -> Result<Response<v1::RevokeHandleResponse>, Status> {
        let which = request.into_inner().handle.unwrap();
        self.with(|inner| {
            let id = inner.find(&which)?;
            inner.live.remove(&id);
            inner.log.push(Event::Revoked { id });
            Ok(Response::new(v1::RevokeHandleResponse { sessions_cut: SESSIONS_CUT }))
        })
    }

    async fn describe_handle(
        &self,
        request: Request<v1::DescribeHandleRequest>,
    ) -> Result<Response<v1::DescribeHandleResponse>, Status> {
        let which = Which::Token(request.into_inner().token);
        self.with(|inner| {
            let id = inner.find(&which)?;
            let handle = Some(inner.live[&id].handle.clone());
            Ok(Response::new(v1::DescribeHandleResponse { handle }))
        })
    }

    async fn list_handles(
        &self,
        _request: Request<v1::ListHandlesRequest>,
    ) -> Result<Response<v1::ListHandlesResponse>, Status> {
        let mut handles: Vec<_> =
            self.with(|inner| inner.live.values().map(|live| live.handle.clone()).collect());
        handles.sort_by(|a: &v1::Handle, b| a.id.cmp(&b.id));
        Ok(Response::new(v1::ListHandlesResponse { handles, truncated: true }))
    }

    async fn list_connections(
        &self,
        _request: Request<v1::ListConnectionsRequest>,
    ) -> Result<Response<v1::ListConnectionsResponse>, Status> {
        let connection = v1::Connection {
            name: "main_db".into(),
            r#type: "postgresql".into(),
            target: "db.internal:5432/mydb".into(),
            may: vec!["issue".into(), "open".into()],
            has_credential: true,
            endpoint: Some(endpoint("main_db")),
        };
        Ok(Response::new(v1::ListConnectionsResponse { connections: vec![connection] }))
    }

    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let peer = request.extensions().get::<UdsConnectInfo>().unwrap().peer_cred.unwrap();
        Ok(Response::new(v1::WhoAmIResponse {
            uid: peer.uid(),
            gid: peer.gid(),
            groups: vec![7, 8],
            pid: peer.pid().and_then(|pid| pid.try_into().ok()),
            grants: vec!["worker".into()],
            operator: false,
            warnings: vec!["You and the broker have the same uid.".into()],
            broker_version: "0.0.0-test".into(),
        }))
    }
}

impl Inner {
    fn issue(
        &mut self,
        request: v1::IssueHandleRequest,
        holder: u32,
        pid: i32,
    ) -> v1::IssueHandleResponse {
        self.issued += 1;
        let id = format!("hdl_{:a>16}", self.issued);
        let token = format!("cbh_{:A>43}", self.issued);
        let ttl = request.ttl.map_or(DEFAULT_TTL, |ttl| ttl.try_into().unwrap());
        let now = SystemTime::now();
        let handle = v1::Handle {
            id: id.clone(),
            connection: request.connection.clone(),
            holder,
            redeemer: request.redeemer,
            issued: Some(now.into()),
            expires: Some((now + ttl).into()),
            never_after: None,
            uses_left: request.max_uses,
            subject: request.subject.clone(),
            purpose: request.purpose.clone(),
            sessions: 0,
            bind: request.bind,
        };
        let endpoint = Some(endpoint(&request.connection));
        let live = Live { token: token.clone(), ttl, handle: handle.clone() };
        self.live.insert(id.clone(), live);
        self.log.push(Event::Issued { request, id, token: token.clone(), pid });
        v1::IssueHandleResponse { handle: Some(handle), token, endpoint }
    }

    fn renew(&mut self, request: &v1::RenewHandleRequest) -> Result<v1::Handle, Status> {
        let now = SystemTime::now();
        let id = self.find(&Which::Token(request.token.clone()))?;
        let live = self.live.get_mut(&id).unwrap();
        if SystemTime::try_from(live.handle.expires.unwrap()).unwrap() < now {
            self.log.push(Event::RenewalRefused { id });
            return Err(refuse(Code::FailedPrecondition, "HANDLE_EXPIRED", None));
        }
        let ttl = request.ttl.map_or(live.ttl, |ttl| ttl.try_into().unwrap());
        live.handle.expires = Some((now + ttl).into());
        self.log.push(Event::Renewed { id, at: now });
        Ok(live.handle.clone())
    }

    fn find(&self, which: &Which) -> Result<String, Status> {
        let matches = |(id, live): &(&String, &Live)| match which {
            Which::Id(wanted) => *id == wanted,
            Which::Token(wanted) => live.token == *wanted,
        };
        let found = self.live.iter().find(matches).map(|(id, _)| id.clone());
        found.ok_or_else(|| refuse(Code::NotFound, "HANDLE_INVALID", None))
    }
}

fn endpoint(connection: &str) -> v1::Endpoint {
    v1::Endpoint { door: "postgres".into(), database: "mydb".into(), user: connection.into() }
}

pub(crate) fn refuse(code: Code, reason: &str, retry_after: Option<Duration>) -> Status {
    let metadata = HashMap::from([("ref".to_owned(), REFERENCE.to_string())]);
    let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
    if retry_after.is_some() {
        details.set_retry_info(retry_after);
    }
    Status::with_error_details(code, "as the test wants it", details)
}
