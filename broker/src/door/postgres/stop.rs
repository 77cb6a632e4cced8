//! Ending what a server still does for a session that is over.
//!
//! The backend is terminated, through a login of the same role, until it is gone. A cancel request
//! alone would not do: what the client had pipelined runs on behind a cancelled statement, and a
//! block of code can trap the cancellation. It is sent when no login can be had.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{debug, error};

use super::backend::{LoginFault, LoginRequest, Messages, ServerKey, log_in};
use super::{cancel, codec};
use crate::core::Session;
use crate::upstream::{Link, Remote};

/// From the cut to a backend that is gone for certain.
const STOPPED_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks at whether a backend is gone, and between two attempts to log in.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_millis(500);
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

impl Server {
    /// Returns when the backend is gone, or it has taken too long to find out.
    pub(super) async fn stop(&self, session: &Session) -> Stopped {
        let Some(key) = &self.key else { return Stopped::Unconfirmed };
        let since = Instant::now();
        let stopped = timeout(STOPPED_WITHIN, async {
            let mut pause = LOOK_AGAIN;
            loop {
                let Err(error) = self.terminate(key.pid, session, since).await else { return };
                debug!(session = %session.id(), %error, "cannot log in to end a backend: asking it to cancel");
                cancel::send(&self.remote, &codec::cancel_request(key.pid, &key.secret)).await;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LOOK_AGAIN_AT_MOST);
            }
        });
        match stopped.await {
            Ok(()) => Stopped::Gone,
            Err(_elapsed) => {
                error!(session = %session.id(), connection = %session.connection().name, pid = key.pid, "a backend of a session that is over may still be at work: end it by hand");
                Stopped::Unconfirmed
            }
        }
    }

    async fn terminate(
        &self,
        pid: u32,
        session: &Session,
        since: Instant,
    ) -> Result<(), LoginFault> {
        let link = Link::dial_again(&self.remote).await?;
        let request = LoginRequest {
            credential: session.credential(),
            database: session.database().as_str(),
            parameters: &[
                ("application_name".to_owned(), "credbroker".to_owned()),
                ("options".to_owned(), OWN_SETTINGS.to_owned()),
            ],
        };
        let login = log_in(link, request).await?;
        let mut messages = Messages::new(login.stream);
        let mut pause = LOOK_AGAIN;
        loop {
            // A process id may be given to another session as soon as it is free; one that began
            // after the cut is not ours to end. Operators are named with their schema: a role's
            // own would otherwise be found.
            let milliseconds = since.elapsed().as_millis();
            let sql = format!(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                 WHERE pid OPERATOR(pg_catalog.=) {pid} AND usename OPERATOR(pg_catalog.=) session_user \
                 AND backend_start OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp() \
                 OPERATOR(pg_catalog.-) '{milliseconds} milliseconds'::pg_catalog.interval)"
            );
            messages.send(&codec::query(&sql)).await?;
            if !any_rows(&mut messages).await? {
                return Ok(());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_AGAIN_AT_MOST);
        }
    }
}

/// Whether the query gave a row: the backend was still there.
async fn any_rows(messages: &mut Messages) -> Result<bool, LoginFault> {
    let mut any = false;
    loop {
        let (tag, body) = messages.next().await?;
        match tag {
            b'D' => any = true,
            b'Z' => return Ok(any),
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
