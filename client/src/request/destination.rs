//! What a connection leads to, for who knows that and not its name.

use credbroker_proto::v1;

/// A destination, to be found among the caller's connections; what is not set matches as the
/// broker's defaults say.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Destination(v1::ResolveConnectionRequest);

impl Destination {
    /// `host` as the broker's configuration has it: a name, an address, or the directory of a
    /// Unix socket.
    pub fn new(host: impl Into<String>) -> Self {
        Self(v1::ResolveConnectionRequest { host: host.into(), ..Default::default() })
    }

    /// Its type, such as `postgresql`. Default: any.
    pub fn kind(mut self, kind: impl Into<String>) -> Self {
        self.0.r#type = kind.into();
        self
    }

    /// Default: the usual port of the type.
    pub fn port(mut self, port: u16) -> Self {
        self.0.port = Some(port.into());
        self
    }

    /// Default: the connection's own.
    pub fn database(mut self, database: impl Into<String>) -> Self {
        self.0.database = database.into();
        self
    }

    pub(crate) fn into_wire(self) -> v1::ResolveConnectionRequest {
        self.0
    }
}
