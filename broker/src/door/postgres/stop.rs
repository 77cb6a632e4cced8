//! Ending what a server still does for a session that is over: ask it to cancel the query, and
//! if a block of code traps that, terminate the backend through a login of the same role.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{debug, warn};

use super::backend::{LoginFault, LoginRequest, Messages, ServerKey, log_in};
use super::{cancel, codec};
use crate::core::Session;
use crate::upstream::{Link, Remote};

/// From the cut to a backend that is gone for certain.
const STOPPED_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks at whether a backend is gone.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_millis(200);

/// The server's end of a session.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) remote: Remote,
    /// Absent when the server gave none; then its end cannot be hastened.
    pub(super) key: Option<ServerKey>,
}

impl Server {
    /// Returns when the backend is gone, or cannot be reached.
    pub(super) async fn stop(&self, session: &Session) {
        let Some(key) = &self.key else { return };
        let since = Instant::now();
        cancel::send(&self.remote, &codec::cancel_request(key.pid, &key.secret)).await;
        match timeout(STOPPED_WITHIN, self.terminate(key.pid, session, since)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(session = %session.id(), connection = %session.connection().name, %error, "could not make sure that the backend is gone");
            }
            Err(_elapsed) => {
                warn!(session = %session.id(), connection = %session.connection().name, "the backend is not gone in time");
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
            database: &session.connection().database,
            parameters: &[("application_name".to_owned(), "credbroker".to_owned())],
        };
        let login = log_in(link, request).await?;
        let mut messages = Messages::new(login.stream);
        let mut pause = LOOK_AGAIN;
        loop {
            // A process id may be given to another session as soon as it is free; one that began
            // after the cut is not ours to end.
            let milliseconds = since.elapsed().as_millis();
            let sql = format!(
                "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
                 WHERE pid = {pid} AND usename = current_user \
                 AND backend_start < pg_catalog.clock_timestamp() - interval '{milliseconds} milliseconds'"
            );
            messages.send(&codec::query(&sql)).await?;
            if !any_rows(&mut messages).await? {
                return Ok(());
            }
            debug!(session = %session.id(), "terminated a backend that did not end by itself");
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
