//! The owned handle: it is revoked when its owner is done with it, over the socket that it came
//! from.
//!
//! Invariant: a [`Handle`] that goes out of scope other than by [`Handle::into_token`] is
//! revoked: for certain by [`Handle::revoke`], and on drop as well as that can be done
//! without waiting.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use credbroker_proto::v1;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode, utf8_percent_encode};
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::background::Background;
use crate::{Client, EndpointInfo, Error, HandleInfo, KeepAlive, PacketClient, Token};

/// Everything but the unreserved characters of RFC 3986 §2.3.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// In a query `/` stands for itself (RFC 3986 §3.4), so the path of the door stays readable.
const PATH_IN_QUERY: &AsciiSet = &COMPONENT.remove(b'/');

/// A short-lived right to use one connection, revoked when it is dropped.
///
/// Dropping revokes in the background, on the runtime in which the client connected and as
/// long as that runs; [`Client::close`] waits for it, and [`Handle::revoke`] makes it
/// certain. A handle that neither reaches dies when it expires.
#[must_use = "a handle is revoked when it is dropped"]
pub struct Handle {
    origin: Origin,
    shared: Arc<Shared>,
    endpoint: EndpointInfo,
    id: String,
    connection: String,
    on_drop: OnDrop,
}

/// The client that a handle came from, and that ends it.
#[derive(Clone)]
pub(crate) enum Origin {
    Rpc(Client),
    Packet(PacketClient),
}

impl Origin {
    pub(crate) async fn renew(
        &self,
        token: &Token,
        ttl: Option<Duration>,
    ) -> Result<HandleInfo, Error> {
        match self {
            Self::Rpc(client) => client.renew(token, ttl).await,
            Self::Packet(client) => client.renew(token, ttl).await,
        }
    }

    async fn revoke_id(&self, id: &str) -> Result<u32, Error> {
        match self {
            Self::Rpc(client) => client.revoke_id(id).await,
            Self::Packet(client) => client.revoke_id(id).await,
        }
    }

    pub(crate) fn background(&self) -> &Background {
        match self {
            Self::Rpc(client) => client.background(),
            Self::Packet(client) => client.background(),
        }
    }
}

/// What renewal in the background has in common with the owner.
pub(crate) struct Shared {
    pub(crate) token: Token,
    pub(crate) info: watch::Sender<HandleInfo>,
}

enum OnDrop {
    Revoke,
    Nothing,
}

impl Handle {
    pub(crate) fn from_wire(
        origin: Origin,
        issued: v1::IssueHandleResponse,
        runtime_dir: &Path,
    ) -> Result<Self, Error> {
        let token = Zeroizing::new(issued.token);
        let token =
            Token::parse(&token).map_err(|_invalid| Error::protocol("its token is not one"))?;
        let info = HandleInfo::from_wire(issued.handle)?;
        let endpoint = EndpointInfo::from_wire(issued.endpoint, runtime_dir)?;
        Ok(Self {
            origin,
            endpoint,
            id: info.id.clone(),
            connection: info.connection.clone(),
            shared: Arc::new(Shared { token, info: watch::Sender::new(info) }),
            on_drop: OnDrop::Revoke,
        })
    }

    /// Public identifier: `hdl_` and 16 characters of lower-case base32. May be logged.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bearer form: the password for the door. Never log it.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.shared.token
    }

    /// What the broker said of the handle at its issue or last renewal.
    #[must_use]
    pub fn info(&self) -> HandleInfo {
        self.shared.info.borrow().clone()
    }

    /// Name of the connection.
    #[must_use]
    pub fn connection(&self) -> &str {
        &self.connection
    }

    /// Where to use it.
    #[must_use]
    pub fn endpoint(&self) -> &EndpointInfo {
        &self.endpoint
    }

    /// `postgresql:///DATABASE?host=DIRECTORY&user=NAME&password=TOKEN`, percent-encoded: the
    /// form that most drivers take. It contains the token: never log it.
    #[must_use]
    pub fn url(&self) -> String {
        format_url(&self.endpoint, self.token())
    }

    /// Gives the handle `ttl` to live from now; `None` is as long as at its issue.
    ///
    /// # Errors
    /// Those of [`Client::issue`].
    pub async fn renew(&self, ttl: Option<Duration>) -> Result<HandleInfo, Error> {
        let info = self.origin.renew(self.token(), ttl).await?;
        self.shared.info.send_replace(info.clone());
        Ok(info)
    }

    /// Renews in the background, at half of the time to live, until the returned value is
    /// dropped, the client is closed, or renewal fails for good.
    pub fn keep_alive(&self) -> KeepAlive {
        KeepAlive::start(&self.origin, Arc::clone(&self.shared))
    }

    /// Ends the handle and says how many live sessions were cut. When this returns, they are
    /// dead.
    ///
    /// # Errors
    /// Those of [`Client::issue`]; another attempt is then made in the background.
    pub async fn revoke(mut self) -> Result<u32, Error> {
        let cut = self.origin.revoke_id(&self.id).await?;
        self.on_drop = OnDrop::Nothing;
        Ok(cut)
    }

    /// Gives up ownership, to hand the token on: nothing revokes the handle any more but its
    /// expiry, or [`Client::revoke_id`].
    #[must_use = "without its token the handle can only be revoked by its id"]
    pub fn into_token(mut self) -> Token {
        self.on_drop = OnDrop::Nothing;
        self.shared.token.duplicate()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        match self.on_drop {
            OnDrop::Nothing => {}
            OnDrop::Revoke => {
                let origin = self.origin.clone();
                let id = std::mem::take(&mut self.id);
                self.origin.background().run(async move {
                    // Nobody is left to hear of a failure; the handle then dies at its expiry.
                    let _sessions_cut = origin.revoke_id(&id).await;
                });
            }
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("info", &*self.shared.info.borrow())
            .field("token", self.token())
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

fn format_url(endpoint: &EndpointInfo, token: &Token) -> String {
    format!(
        "postgresql:///{database}?host={door}&user={user}&password={token}",
        database = utf8_percent_encode(&endpoint.database, COMPONENT),
        door = percent_encode(endpoint.door.as_os_str().as_bytes(), PATH_IN_QUERY),
        user = utf8_percent_encode(&endpoint.user, COMPONENT),
        token = utf8_percent_encode(token.expose(), COMPONENT),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "cbh_0123456789-abcdefghijklmnopqrstuvwxyz_ABCDE";

    fn url(door: &str, database: &str, user: &str) -> String {
        let endpoint =
            EndpointInfo { door: door.into(), database: database.into(), user: user.into() };
        format_url(&endpoint, &Token::parse(TOKEN).unwrap())
    }

    #[test]
    fn a_plain_url_is_readable() {
        assert_eq!(
            url("/run/credbroker/postgres", "mydb", "main_db"),
            format!(
                "postgresql:///mydb?host=/run/credbroker/postgres&user=main_db&password={TOKEN}"
            )
        );
    }

    #[test]
    fn names_cannot_break_out_of_their_place() {
        assert_eq!(
            url("/srv/a b&c", "my/db?x=1#y", "a&host=/tmp"),
            format!(
                "postgresql:///my%2Fdb%3Fx%3D1%23y?host=/srv/a%20b%26c\
                 &user=a%26host%3D%2Ftmp&password={TOKEN}"
            )
        );
    }
}
