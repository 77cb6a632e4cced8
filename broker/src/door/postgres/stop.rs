//! Ending what a server still does for sessions that are over.
//!
//! Backends are terminated, through a login of the same role, until they are gone. A cancel request
//! alone would not do: what the client had pipelined runs on behind a cancelled statement, and a
//! block of code can trap the cancellation. It is sent when no login can be had.
//!
//! One login ends all that are to end on the same server, database and role: a thousand sessions
//! that are cut at once cost one, and one query for each look.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, error};

use super::attempt::conclude;
use super::backend::{LoginFault, LoginRequest, Messages, ServerKey, log_in};
use super::{cancel, codec};
use crate::connection::Connection;
use crate::core::{Core, Session};
use crate::credential::Credential;
use crate::door::wire::Reader;
use crate::upstream::{Link, Remote};

/// From the cut to a backend that is gone for certain.
const STOPPED_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks at whether backends are gone, and between two attempts to log in.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_millis(500);
/// How long a login stays for more orders.
const STAY: Duration = Duration::from_millis(100);
/// Orders that one look takes up; the rest wait for the next.
const BATCH: usize = 2048;
/// Settings of a startup message go before those that a session may have given its own role, and
/// with which it could blind or hinder this login. Only such as every server knows: one that it
/// does not know would end the login.
const OWN_SETTINGS: &str = "-c search_path=pg_catalog -c role=none -c statement_timeout=0 \
    -c lock_timeout=0 -c default_transaction_read_only=off";

/// The server's end of a session.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) remote: Remote,
    /// Absent when the server gave none; then its end cannot be hastened.
    pub(super) key: Option<ServerKey>,
}

/// What is known of a backend in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The server itself says that it is gone.
    Gone,
    /// Nobody could be asked: it may still be at work.
    Unconfirmed,
}

/// Ends backends, many with one login. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Terminator {
    core: Core,
    workers: Arc<Mutex<HashMap<Site, mpsc::UnboundedSender<Order>>>>,
}

/// What a login is good for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Site {
    address: String,
    database: String,
    /// A credential by its place in memory, which it keeps for as long as somebody refers to it,
    /// and orders do.
    credential: usize,
}

/// One backend that is to end.
#[derive(Debug)]
struct Order {
    pid: u32,
    cancel_request: Vec<u8>,
    since: Instant,
    remote: Remote,
    connection: Arc<Connection>,
    /// What the session logged in with.
    credential: Arc<Credential>,
    gone: oneshot::Sender<()>,
}

impl Terminator {
    pub(super) fn new(core: Core) -> Self {
        Self { core, workers: Arc::default() }
    }

    /// Returns when the session's backend is gone, or it has taken too long to find out.
    pub(super) async fn stop(&self, server: Server, session: &Session) -> Stopped {
        let Some(key) = server.key else { return Stopped::Unconfirmed };
        let (gone, is_gone) = oneshot::channel();
        let credential = Arc::clone(session.credential());
        let site = Site {
            address: server.remote.to_string(),
            database: session.database().as_str().to_owned(),
            credential: Arc::as_ptr(&credential).addr(),
        };
        self.order(
            site,
            Order {
                pid: key.pid,
                cancel_request: codec::cancel_request(key.pid, &key.secret),
                since: Instant::now(),
                remote: server.remote,
                connection: Arc::clone(session.connection()),
                credential,
                gone,
            },
        );
        match timeout(STOPPED_WITHIN, is_gone).await {
            Ok(Ok(())) => Stopped::Gone,
            Ok(Err(_)) | Err(_) => {
                error!(session = %session.id(), connection = %session.connection().name, pid = key.pid, "a backend of a session that is over may still be at work: end it by hand");
                Stopped::Unconfirmed
            }
        }
    }

    fn order(&self, site: Site, order: Order) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let order = match workers.entry(site.clone()) {
            Entry::Occupied(worker) => match worker.get().send(order) {
                Ok(()) => return,
                // It was just about to leave.
                Err(mpsc::error::SendError(order)) => order,
            },
            Entry::Vacant(_) => order,
        };
        // Each order is of a session, and sessions are limited.
        let (sender, orders) = mpsc::unbounded_channel();
        let _own = sender.send(order);
        workers.insert(site.clone(), sender);
        let this = self.clone();
        self.core.tasks().spawn(async move { this.work(site, orders).await });
    }

    /// Serves one site until nobody has ordered anything for a while.
    async fn work(&self, site: Site, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut doomed = Vec::new();
        let mut pause = LOOK_AGAIN;
        while self.take_orders(&site, &mut orders, &mut doomed).await {
            let Err(error) = terminate(&self.core, &site, &mut orders, &mut doomed).await else {
                pause = LOOK_AGAIN;
                continue;
            };
            debug!(%error, sessions = doomed.len(), "cannot log in to end backends: asking them to cancel");
            // Whoever gave an order waits no longer than this, and nobody else does.
            doomed.retain(|order: &Order| {
                order.since.elapsed() < STOPPED_WITHIN && !order.gone.is_closed()
            });
            for order in &doomed {
                cancel::send(&order.remote, &order.cancel_request).await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_AGAIN_AT_MOST);
        }
    }

    /// Waits for work. `false` when there was none for a while: the worker must go, and its place
    /// is free.
    async fn take_orders(
        &self,
        site: &Site,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        doomed: &mut Vec<Order>,
    ) -> bool {
        if doomed.is_empty() {
            match timeout(STAY, orders.recv()).await {
                Ok(Some(order)) => doomed.push(order),
                Ok(None) | Err(_) => {
                    let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
                    // Under the lock under which orders are given: none can slip in between.
                    match orders.try_recv() {
                        Ok(order) => doomed.push(order),
                        Err(_) => {
                            orders.close();
                            workers.remove(site);
                            return false;
                        }
                    }
                }
            }
        }
        drain(orders, doomed);
        true
    }
}

fn drain(orders: &mut mpsc::UnboundedReceiver<Order>, doomed: &mut Vec<Order>) {
    while doomed.len() < BATCH
        && let Ok(order) = orders.try_recv()
    {
        doomed.push(order);
    }
}

/// Logs in and terminates until none of the doomed is left.
async fn terminate(
    core: &Core,
    site: &Site,
    orders: &mut mpsc::UnboundedReceiver<Order>,
    doomed: &mut Vec<Order>,
) -> Result<(), LoginFault> {
    let Some(order) = doomed.first() else { return Ok(()) };
    let remote = order.remote.clone();
    // A rotation may be what the sessions are over for, and then their own password is worth
    // nothing any more.
    let username = order.credential.username();
    let credential = core.credential_in_force(&order.connection, username);
    let credential = credential.unwrap_or_else(|| Arc::clone(&order.credential));
    // A server that refuses it is not asked again and again for this either.
    let attempt = credential.breaker().enter().await?;
    let link = Link::dial_again(&remote).await?;
    let request = LoginRequest {
        connection: &order.connection,
        credential: &credential,
        attempt: &attempt,
        database: &site.database,
        parameters: &[
            ("application_name".to_owned(), b"credbroker".to_vec()),
            ("options".to_owned(), OWN_SETTINGS.into()),
        ],
    };
    let login = log_in(link, request).await;
    if let Some(meaning) = conclude(attempt, &login) {
        core.refused_by_server(&order.connection.name, &credential, meaning);
    }
    let mut messages = Messages::new(login?.stream);
    let mut pause = LOOK_AGAIN;
    loop {
        let before = doomed.len();
        drain(orders, doomed);
        if doomed.len() > before {
            pause = LOOK_AGAIN;
        }
        messages.send(&codec::query(&look_at(doomed))).await?;
        let there = rows(&mut messages).await?;
        let mut left = Vec::with_capacity(there.len());
        for order in doomed.drain(..) {
            if there.contains(&order.pid) {
                left.push(order);
            } else {
                // Whoever ordered it may have given up.
                let _ = order.gone.send(());
            }
        }
        *doomed = left;
        doomed.retain(|order| !order.gone.is_closed());
        if doomed.is_empty() && orders.is_empty() {
            return Ok(());
        }
        rest(orders, doomed, pause).await;
        pause = (pause * 2).min(LOOK_AGAIN_AT_MOST);
    }
}

/// Waits for the time of the next look: at the latest when `pause` is over, and soon after another
/// order has come, for that backend still works.
async fn rest(
    orders: &mut mpsc::UnboundedReceiver<Order>,
    doomed: &mut Vec<Order>,
    pause: Duration,
) {
    tokio::time::sleep(LOOK_AGAIN).await;
    if let Ok(Some(order)) = timeout(pause.saturating_sub(LOOK_AGAIN), orders.recv()).await {
        doomed.push(order);
    }
}

/// Terminates those of the doomed that are still there, and names them.
///
/// A process id may be given to another session as soon as it is free; one that began after the
/// cut is not ours to end. Operators are named with their schema: a role's own would otherwise be
/// found.
fn look_at(doomed: &[Order]) -> String {
    let mut sql = String::from(
        "SELECT activity.pid, pg_catalog.pg_terminate_backend(activity.pid) FROM (VALUES ",
    );
    for (index, order) in doomed.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let milliseconds = order.since.elapsed().as_millis();
        // Writing to a string does not fail.
        let _ = write!(sql, "{comma}({},{milliseconds}::pg_catalog.int8)", order.pid);
    }
    sql.push_str(
        ") AS doomed (pid, age) JOIN pg_catalog.pg_stat_activity AS activity \
         ON activity.pid OPERATOR(pg_catalog.=) doomed.pid \
         WHERE activity.usename OPERATOR(pg_catalog.=) session_user \
         AND activity.backend_start OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp() \
         OPERATOR(pg_catalog.-) (doomed.age OPERATOR(pg_catalog.*) '1 millisecond'::pg_catalog.interval))",
    );
    sql
}

/// The process ids that a query gave: those backends were still there.
async fn rows(messages: &mut Messages) -> Result<Vec<u32>, LoginFault> {
    let mut pids = Vec::new();
    loop {
        let (tag, body) = messages.next().await?;
        match tag {
            b'D' => pids.extend(first_column(&body)),
            b'Z' => return Ok(pids),
            b'E' => {
                let sqlstate =
                    codec::sqlstate(&body).map(|code| String::from_utf8_lossy(&code).into_owned());
                return Err(LoginFault::Server {
                    sqlstate: sqlstate.unwrap_or_default(),
                    message: Vec::new(),
                });
            }
            _ => {}
        }
    }
}

/// The first column of a DataRow (protocol 55.7) as a number.
fn first_column(body: &[u8]) -> Option<u32> {
    let mut reader = Reader::new(body);
    let _columns: [u8; 2] = reader.array().ok()?;
    let length = usize::try_from(reader.u32().ok()?).ok()?;
    std::str::from_utf8(reader.take(length).ok()?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_column_is_a_number_or_nothing() {
        let row = [0, 2, 0, 0, 0, 3, b'1', b'2', b'3', 0, 0, 0, 1, b't'];
        assert_eq!(first_column(&row), Some(123));
        for bad in [&row[..8], &[], &[0, 1, 0xff, 0xff, 0xff, 0xff]] {
            assert_eq!(first_column(bad), None, "{bad:?}");
        }
    }
}
