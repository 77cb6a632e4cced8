//! The handles of a command: issued before it starts, renewed while it lives, revoked at its
//! end.

use std::time::Duration;

use credbroker_client::{Bind, Client, Error, Handle, IssueRequest, Reason, RenewalEnd};
use tokio::task::JoinSet;

use super::environment::View;
use crate::failure::Failure;
use crate::output::Output;

/// What all handles have in common.
pub(crate) struct Wanted {
    pub(crate) ttl: Option<Duration>,
    pub(crate) purpose: String,
}

/// A handle for each name, in their order; revoked when dropped.
pub(crate) struct Logins(Vec<Handle>);

/// Renewal of all handles; yields each that has come to its end.
pub(crate) type Renewals = JoinSet<Ended>;

/// A handle that is not renewed any more.
pub(crate) struct Ended {
    connection: String,
    id: String,
    why: RenewalEnd,
}

impl Logins {
    pub(crate) async fn issue(
        client: &Client,
        names: &[String],
        wanted: &Wanted,
        output: Output,
    ) -> Result<Self, Failure> {
        let mut handles = Vec::with_capacity(names.len());
        for name in names {
            let issued = issue_bound(client, name, wanted, output).await;
            handles.push(issued.map_err(|error| Failure::from(error).about(name))?);
        }
        Ok(Self(handles))
    }

    pub(crate) fn views(&self) -> Vec<View<'_>> {
        self.0.iter().map(view).collect()
    }

    pub(crate) fn renewals(&self) -> Renewals {
        let mut renewals = JoinSet::new();
        for handle in &self.0 {
            let (connection, id) = (handle.connection().to_owned(), handle.id().to_owned());
            let ended = handle.keep_alive().ended();
            renewals.spawn(async move { Ended { connection, id, why: ended.await } });
        }
        renewals
    }

    /// Revokes all at once, and says which could not be.
    pub(crate) async fn revoke(self, output: Output) {
        let mut revocations = JoinSet::new();
        for handle in self.0 {
            let (connection, expires) = (handle.connection().to_owned(), handle.info().expires);
            revocations.spawn(async move { (handle.revoke().await, connection, expires) });
        }
        while let Some(done) = revocations.join_next().await {
            let Ok((Err(error), connection, expires)) = done else { continue };
            if !is_dead(&error) {
                let expires = crate::output::rfc3339(expires);
                output.warn(&format!(
                    "{connection}: the handle could not be revoked and lives at most until \
                     {expires}: {error}"
                ));
            }
        }
    }
}

impl Ended {
    pub(crate) fn report(&self, output: Output) {
        let Self { connection, id, why } = self;
        output.warn(&format!(
            "{connection}: handle {id} is not renewed any more: {why}; the command keeps running"
        ));
    }
}

fn view(handle: &Handle) -> View<'_> {
    let endpoint = handle.endpoint();
    View {
        name: handle.connection(),
        host: endpoint.door.as_os_str(),
        user: &endpoint.user,
        database: &endpoint.database,
        token: handle.token().expose(),
        url: handle.url(),
    }
}

/// Binds the handle to the life of this process, where the broker's kernel can do that.
async fn issue_bound(
    client: &Client,
    name: &str,
    wanted: &Wanted,
    output: Output,
) -> Result<Handle, Error> {
    let request = |bind| {
        let request = IssueRequest::new(name).purpose(&wanted.purpose).bind(bind);
        if let Some(ttl) = wanted.ttl { request.ttl(ttl) } else { request }
    };
    match client.issue(request(Bind::Lifetime)).await {
        Err(error) if error.reason() == Some(Reason::Unsupported) => {
            let handle = client.issue(request(Bind::None)).await?;
            output.warn(&format!(
                "{name}: the broker cannot tie the handle to this process; if this is killed, \
                 the handle lives until it expires"
            ));
            Ok(handle)
        }
        issued => issued,
    }
}

/// Whether the handle is gone anyway.
fn is_dead(error: &Error) -> bool {
    matches!(error.reason(), Some(Reason::HandleInvalid | Reason::HandleExpired))
}
