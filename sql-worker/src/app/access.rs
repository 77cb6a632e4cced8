//! A connection under a handle that the worker issues, renews and replaces itself.
//!
//! A handle dies with the broker, at its longest lifetime, or by an operator's hand. It is
//! asked for again only when a login is refused, before any statement was sent; whether the
//! caller still may is then the broker's to say. A handle on a login that the caller brought is
//! not asked for again: the login is not kept.

use std::sync::{Arc, Mutex, PoisonError};

use super::{App, Principal};
use crate::broker::{Held, Issued};
use crate::error::{Code, Failure};
use crate::sql::{Lease, Pool, Target};

/// A right to a connection, on behalf of one principal.
#[derive(Debug)]
pub(super) struct Access {
    principal: Principal,
    connection: String,
    origin: Origin,
    live: tokio::sync::Mutex<Option<Arc<Live>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// On the connection's own credential: can be had again.
    Issued,
    /// On a login that the caller brought, once.
    Registered,
}

/// One handle, and the sessions opened with it.
#[derive(Debug)]
struct Live {
    pool: Pool,
    held: Mutex<Option<Box<dyn Held>>>,
}

impl Access {
    pub(super) fn new(principal: Principal, connection: String) -> Self {
        let live = tokio::sync::Mutex::default();
        Self { principal, connection, origin: Origin::Issued, live }
    }

    /// Under a handle that was registered.
    pub(super) fn registered(
        app: &App,
        principal: Principal,
        connection: String,
        issued: Issued,
    ) -> Self {
        let live = tokio::sync::Mutex::new(Some(Arc::new(Live::new(app, &connection, issued))));
        Self { principal, connection, origin: Origin::Registered, live }
    }

    /// A session, under a handle that is made when there is none.
    pub(super) async fn lease(&self, app: &App) -> Result<Lease, Failure> {
        let live = self.live(app).await?;
        match live.pool.lease().await {
            Err(failure) if failure.code() == Code::HandleInvalid => {
                self.forget(&live).await;
                self.live(app).await?.pool.lease().await
            }
            other => other,
        }
    }

    /// Ends the handle and its sessions.
    pub(super) async fn end(&self) {
        if let Some(live) = self.live.lock().await.take() {
            live.pool.close();
            if let Some(held) = live.held() {
                held.revoke().await;
            }
        }
    }

    /// Whether there is no handle, and none being made.
    pub(super) fn is_vacant(&self) -> bool {
        self.live.try_lock().is_ok_and(|live| live.is_none())
    }

    /// The name of the connection.
    pub(super) fn connection(&self) -> &str {
        &self.connection
    }

    pub(super) fn belongs_to(&self, principal: &Principal) -> bool {
        self.principal == *principal
    }

    pub(super) fn sweep(&self) {
        if let Ok(live) = self.live.try_lock()
            && let Some(live) = live.as_ref()
        {
            live.pool.sweep();
        }
    }

    /// Closes the sessions that nobody uses; gives how many there were.
    pub(super) fn release_idle(&self) -> usize {
        let live = self.live.try_lock().ok();
        live.and_then(|live| live.as_ref().map(|live| live.pool.release_idle())).unwrap_or(0)
    }

    async fn live(&self, app: &App) -> Result<Arc<Live>, Failure> {
        let mut slot = self.live.lock().await;
        if let Some(live) = slot.as_ref() {
            return Ok(Arc::clone(live));
        }
        if self.origin == Origin::Registered {
            return Err(Failure::handle_invalid());
        }
        let issued = app.broker.issue(&self.connection, self.principal.subject()).await?;
        let live = Arc::new(Live::new(app, &self.connection, issued));
        *slot = Some(Arc::clone(&live));
        Ok(live)
    }

    /// Gives up `dead`, unless another call already did.
    async fn forget(&self, dead: &Arc<Live>) {
        let mut slot = self.live.lock().await;
        if slot.as_ref().is_some_and(|live| Arc::ptr_eq(live, dead)) {
            dead.pool.close();
            *slot = None;
        }
    }
}

impl Live {
    fn new(app: &App, connection: &str, issued: Issued) -> Self {
        let configured = app.config.connection(connection);
        let target = Target::door(
            &issued.door.directory,
            &issued.door.database,
            &issued.door.user,
            issued.token.expose(),
            &configured.limits,
        )
        .with_policy(Arc::clone(&configured.policy));
        Self { pool: Pool::new(target, app.config.pool), held: Mutex::new(Some(issued.held)) }
    }

    fn held(&self) -> Option<Box<dyn Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
