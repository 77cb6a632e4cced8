//! Sessions that a caller opens, names and closes: `connect_storage` and what is like it.

use std::sync::Arc;

use super::access::Access;
use super::{App, Principal};
use crate::broker::{Connection, Destination, Login};
use crate::error::{Code, Failure};
use crate::sql::Left;

impl App {
    /// Opens a connection under a handle of its own, and names it for the caller.
    ///
    /// # Errors
    /// The broker's, those of opening a session, and `LIMIT_REACHED`.
    pub async fn connect(&self, caller: &Principal, connection: &str) -> Result<String, Failure> {
        self.keep_open(caller, Access::new(caller.clone(), connection.to_owned())).await
    }

    /// As [`connect`](Self::connect), with a login that the caller brings to a connection that
    /// has none. The reference ends with its handle: the worker does not have the password.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect).
    pub async fn connect_with(
        &self,
        caller: &Principal,
        connection: &str,
        login: Login,
    ) -> Result<String, Failure> {
        let issued = self.broker.register(connection, login, caller.subject()).await?;
        let access = Access::registered(self, caller.clone(), connection.to_owned(), issued);
        self.keep_open(caller, access).await
    }

    /// Opens a session and names what it is opened under.
    async fn keep_open(&self, caller: &Principal, access: Access) -> Result<String, Failure> {
        let access = Arc::new(access);
        let lease = match self.with_room(|| access.lease(self)).await {
            Err(refused) if refused.code() == Code::UpstreamRefused => {
                self.require_credential(access.connection()).await?;
                return Err(refused);
            }
            other => other?,
        };
        // Kept for the first query.
        lease.give_back(Left::Nothing);
        match self.references.insert(caller, Arc::clone(&access)) {
            Ok(id) => Ok(id),
            Err(failure) => {
                access.end().await;
                Err(failure)
            }
        }
    }

    /// Finds the caller's connection to a destination by the broker's configuration, opens it
    /// and names it for the caller. Returns the name, and the connection, masked.
    ///
    /// # Errors
    /// `ACCESS_DENIED` when the broker has no such connection for this worker; else those of
    /// [`connect`](Self::connect).
    pub async fn connect_to(
        &self,
        caller: &Principal,
        destination: &Destination,
        login: Option<Login>,
    ) -> Result<(String, Connection), Failure> {
        let name = self.broker.resolve(destination).await?;
        let masked = self.connection(&name).await?;
        let id = match login {
            None => self.connect(caller, &name).await?,
            Some(login) => self.connect_with(caller, &name, login).await?,
        };
        Ok((id, masked))
    }

    /// Ends what [`connect`](Self::connect) made.
    ///
    /// # Errors
    /// `INVALID_REQUEST` when the caller has no such reference.
    pub async fn disconnect(&self, caller: &Principal, id: &str) -> Result<(), Failure> {
        self.references.remove(caller, id)?.end().await;
        Ok(())
    }
}
