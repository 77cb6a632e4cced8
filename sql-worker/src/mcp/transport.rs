//! How MCP calls come in: standard streams, a Unix socket, or loopback HTTP.
//!
//! Invariants: each transport makes its [`Principal`]s itself, from what the kernel or a checked
//! bearer says; both protocol eras are spoken on all three; a socket is bound, and everything
//! that could be wrong with it found, before anything is served.

pub mod http;
pub(super) mod lines;
mod message;
mod stdio;
mod unix;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::app::{App, Principal};
use crate::config::Config;
use crate::socket;

/// The longest message that is read, in bytes.
const MAX_MESSAGE: usize = 1 << 20;

/// Which transport is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// Standard input and output.
    Stdio,
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// Streamable HTTP at this loopback address.
    Http(SocketAddr),
}

/// A transport that is ready to serve.
#[derive(Debug)]
pub enum Transport {
    /// Standard input and output.
    Stdio,
    /// A bound Unix socket.
    Unix(socket::Listener),
    /// A bound loopback address.
    Http(http::Listener),
}

/// Why a transport cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The Unix socket.
    #[error(transparent)]
    Unix(#[from] socket::BindError),
    /// The HTTP listener.
    #[error(transparent)]
    Http(#[from] http::BindError),
}

impl Transport {
    /// Binds what is wanted. To be called while the process has one thread: the umask of a Unix
    /// socket is the whole process's.
    ///
    /// # Errors
    /// When it cannot be bound, or would not be safe; the text says what to do.
    pub fn bind(choice: &Choice, config: &Config) -> Result<Self, BindError> {
        Ok(match choice {
            Choice::Stdio => Self::Stdio,
            Choice::Unix(path) => {
                Self::Unix(socket::Listener::bind(path, config.socket_group.as_deref())?)
            }
            Choice::Http(address) => Self::Http(http::Listener::bind(*address, config)?),
        })
    }

    /// Serves until `stop` fires or, on standard streams, the client is gone.
    ///
    /// # Errors
    /// When a listener cannot be handed to the runtime.
    pub async fn serve(self, app: Arc<App>, stop: CancellationToken) -> io::Result<()> {
        match self {
            Self::Stdio => {
                super::serve(app, Principal::stdio(), stdio::streams(), None, stop).await;
                Ok(())
            }
            Self::Unix(listener) => unix::serve(listener, app, stop).await,
            Self::Http(listener) => listener.serve(app, stop).await,
        }
    }
}
