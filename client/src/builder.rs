//! Where the broker is, and whom to accept as its server.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::path::{self, Path, PathBuf};
use std::time::Duration;

use credbroker_proto::{
    ADMIN_DIR_ENV, ADMIN_DIR_SUFFIX, ADMIN_PACKET_SOCKET, ADMIN_SOCKET, BROKER_SOCKET,
    DEFAULT_RUNTIME_DIR, PACKET_SOCKET, RUNTIME_DIR_ENV,
};

use crate::connector::{Connector, Trust};
use crate::{AdminClient, AdminPacketClient, Client, Error, PacketClient};

const SERVER_UID_ENV: &str = "CREDBROKER_SERVER_UID";
const USER_RUNTIME_DIR_ENV: &str = "XDG_RUNTIME_DIR";
const USER_RUNTIME_SUBDIR: &str = "credbroker";
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Operators ask for what takes long: everything on a connection cut, a login tried.
const DEFAULT_ADMIN_TIMEOUT: Duration = Duration::from_secs(30);

/// How to reach the broker. Everything has a default; made by [`Client::builder`].
///
/// What is set here wins over the environment (`CREDBROKER_RUNTIME_DIR`,
/// `CREDBROKER_ADMIN_DIR`, `CREDBROKER_SERVER_UID`), and that over the defaults.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct ClientBuilder {
    runtime_dir: Option<PathBuf>,
    admin_dir: Option<PathBuf>,
    server_uids: Option<BTreeSet<u32>>,
    timeout: Option<Duration>,
}

impl ClientBuilder {
    /// The directory that holds `broker.sock`, `packet.sock` and the doors, as this process sees
    /// it.
    ///
    /// Default: `/run/credbroker` where it exists or the caller is root, else
    /// `$XDG_RUNTIME_DIR/credbroker`.
    pub fn runtime_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(directory.into());
        self
    }

    /// The directory that holds `admin.sock` and `admin-packet.sock`, as this process sees it.
    ///
    /// Default: the runtime directory's path with `-admin` behind it.
    pub fn admin_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.admin_dir = Some(directory.into());
        self
    }

    /// Accepts this uid, and no other, as the server; more calls add more uids.
    ///
    /// Default: uid 0, the caller's own, and the owner of the socket.
    pub fn server_uid(self, uid: u32) -> Self {
        self.server_uids([uid])
    }

    /// [`ClientBuilder::server_uid`] for each of `uids`.
    pub fn server_uids(mut self, uids: impl IntoIterator<Item = u32>) -> Self {
        self.server_uids.get_or_insert_default().extend(uids);
        self
    }

    /// How long to wait for the connection, and then for each request. Default: 10 s, and 30 s
    /// on the admin sockets.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Connects to `broker.sock`. The tokio runtime of the caller is kept for work in the
    /// background.
    ///
    /// # Errors
    /// [`Error::Connect`] when no broker listens, [`Error::ServerUntrusted`] when somebody
    /// else does, [`Error::Timeout`], and [`Error::Configuration`] for an environment
    /// variable that cannot be understood.
    pub async fn connect(self) -> Result<Client, Error> {
        let runtime_dir = self.find_runtime_dir()?;
        let connector = self.connector(runtime_dir.join(BROKER_SOCKET))?;
        Client::open(connector, runtime_dir, self.timeout.unwrap_or(DEFAULT_TIMEOUT)).await
    }

    /// Connects to `packet.sock`.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect_packet(self) -> Result<PacketClient, Error> {
        let runtime_dir = self.find_runtime_dir()?;
        let connector = self.connector(runtime_dir.join(PACKET_SOCKET))?;
        PacketClient::over(connector, runtime_dir, self.timeout.unwrap_or(DEFAULT_TIMEOUT)).await
    }

    /// Connects to `admin.sock`.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect_admin(self) -> Result<AdminClient, Error> {
        let connector = self.connector(self.find_admin_dir()?.join(ADMIN_SOCKET))?;
        AdminClient::open(connector, self.timeout.unwrap_or(DEFAULT_ADMIN_TIMEOUT)).await
    }

    /// Connects to `admin-packet.sock`.
    ///
    /// # Errors
    /// Those of [`ClientBuilder::connect`].
    pub async fn connect_admin_packet(self) -> Result<AdminPacketClient, Error> {
        let connector = self.connector(self.find_admin_dir()?.join(ADMIN_PACKET_SOCKET))?;
        AdminPacketClient::open(connector, self.timeout.unwrap_or(DEFAULT_ADMIN_TIMEOUT)).await
    }

    fn connector(&self, socket: PathBuf) -> Result<Connector, Error> {
        let trust = match (&self.server_uids, env::var_os(SERVER_UID_ENV)) {
            (Some(uids), _) => Trust::Only(uids.clone()),
            (None, Some(text)) if !text.is_empty() => Trust::Only(parse_uids(&text)?),
            (None, _) => Trust::Usual,
        };
        Ok(Connector::new(socket, trust))
    }

    fn find_runtime_dir(&self) -> Result<PathBuf, Error> {
        let runtime_dir = match &self.runtime_dir {
            Some(directory) => directory.clone(),
            None => {
                let is_root = rustix::process::geteuid().is_root();
                let system_exists = Path::new(DEFAULT_RUNTIME_DIR).is_dir();
                default_runtime_dir(|name| env::var_os(name), is_root || system_exists)
            }
        };
        // Doors are told to others, who may have another working directory.
        path::absolute(&runtime_dir).map_err(|error| Error::Configuration {
            message: format!("runtime directory {}: {error}", runtime_dir.display()),
        })
    }

    fn find_admin_dir(&self) -> Result<PathBuf, Error> {
        let told = self.admin_dir.clone().map(PathBuf::into_os_string);
        match told.or_else(|| env::var_os(ADMIN_DIR_ENV)).filter(|told| !told.is_empty()) {
            Some(directory) => Ok(directory.into()),
            None => self.find_runtime_dir().map(|directory| default_admin_dir(&directory)),
        }
    }
}

fn default_admin_dir(runtime_dir: &Path) -> PathBuf {
    // Without a slash at its end.
    let mut directory = runtime_dir.components().as_path().as_os_str().to_owned();
    directory.push(ADMIN_DIR_SUFFIX);
    directory.into()
}

fn default_runtime_dir(
    variable: impl Fn(&str) -> Option<OsString>,
    prefer_system: bool,
) -> PathBuf {
    let variable = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(directory) = variable(RUNTIME_DIR_ENV) {
        return directory.into();
    }
    match variable(USER_RUNTIME_DIR_ENV) {
        Some(directory) if !prefer_system => Path::new(&directory).join(USER_RUNTIME_SUBDIR),
        _ => DEFAULT_RUNTIME_DIR.into(),
    }
}

fn parse_uids(text: &OsString) -> Result<BTreeSet<u32>, Error> {
    let parse = |text: &str| text.split(',').map(|uid| uid.trim().parse::<u32>().ok()).collect();
    text.to_str().and_then(parse).ok_or_else(|| Error::Configuration {
        message: format!("{SERVER_UID_ENV} must be one numeric uid or several separated by commas"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(variables: &[(&str, &str)], prefer_system: bool) -> PathBuf {
        let look_up = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        };
        default_runtime_dir(look_up, prefer_system)
    }

    #[test]
    fn the_runtime_dir_is_found_in_order() {
        let ours = (RUNTIME_DIR_ENV, "/srv/broker");
        let user = (USER_RUNTIME_DIR_ENV, "/run/user/1000");
        let system = Path::new(DEFAULT_RUNTIME_DIR);
        assert_eq!(choose(&[ours, user], true), Path::new("/srv/broker"));
        assert_eq!(choose(&[ours, user], false), Path::new("/srv/broker"));
        assert_eq!(choose(&[user], true), system);
        assert_eq!(choose(&[user], false), Path::new("/run/user/1000/credbroker"));
        assert_eq!(choose(&[(RUNTIME_DIR_ENV, ""), (USER_RUNTIME_DIR_ENV, "")], false), system);
        assert_eq!(choose(&[], false), system);
    }

    #[test]
    fn the_admin_dir_is_beside_the_runtime_dir() {
        for runtime_dir in ["/run/credbroker", "/run/credbroker/"] {
            let expected = Path::new("/run/credbroker-admin");
            assert_eq!(default_admin_dir(Path::new(runtime_dir)), expected);
        }
    }

    #[test]
    fn server_uids_are_numbers_between_commas() {
        let parse = |text: &str| parse_uids(&text.into());
        assert_eq!(parse("0").unwrap(), BTreeSet::from([0]));
        assert_eq!(parse("0, 71,71").unwrap(), BTreeSet::from([0, 71]));
        for wrong in ["root", "0,", "-1", "4294967296", "0;1"] {
            let error = parse(wrong).unwrap_err();
            assert!(error.to_string().contains(SERVER_UID_ENV), "{error}");
        }
    }
}
