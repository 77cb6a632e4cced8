//! What a server says between letting us in and being ready, kept for the client.

#![forbid(unsafe_code)]

use super::{LoginFault, codec};
use crate::door::wire::{Reader, Writer};

/// All that a server may say between AuthenticationOk and ReadyForQuery.
pub(super) const MAX_PRELUDE: usize = 128 * 1024;

/// What the server said from AuthenticationOk to ReadyForQuery.
#[derive(Debug, Default)]
pub(crate) struct Prelude {
    /// The messages as they came, but for BackendKeyData.
    before_key: Vec<u8>,
    after_key: Vec<u8>,
    key: Option<ServerKey>,
}

/// What a query of this session is cancelled with. Never leaves the broker.
#[derive(Debug)]
pub(crate) struct ServerKey {
    pub(crate) pid: u32,
    pub(crate) secret: Vec<u8>,
}

impl Prelude {
    /// The bytes for the client, with its own key in place of the server's.
    pub(crate) fn for_client(&self, key: &crate::session::ClientKey) -> Vec<u8> {
        let mut bytes = codec::authentication_ok();
        bytes.extend_from_slice(&self.before_key);
        if self.key.is_some() {
            bytes.extend_from_slice(&codec::backend_key_data(key));
        }
        bytes.extend_from_slice(&self.after_key);
        bytes
    }

    /// Adds whole messages that came after it.
    pub(crate) fn said_meanwhile(&mut self, messages: &[u8]) {
        self.after_key.extend_from_slice(messages);
    }

    pub(crate) fn take_key(&mut self) -> Option<ServerKey> {
        self.key.take()
    }

    /// BackendKeyData (protocol 55.7), of which there is one at most.
    pub(super) fn take_in_key(&mut self, body: &[u8]) -> Result<(), LoginFault> {
        let malformed = || LoginFault::Untrusted("it sent a malformed BackendKeyData");
        let mut reader = Reader::new(body);
        let pid = reader.u32().map_err(|_malformed| malformed())?;
        let secret = reader.rest();
        if self.key.is_some() || !(4..=256).contains(&secret.len()) {
            return Err(malformed());
        }
        self.key = Some(ServerKey { pid, secret: secret.to_vec() });
        Ok(())
    }

    pub(super) fn push(&mut self, tag: u8, body: &[u8]) -> Result<(), LoginFault> {
        let bytes = if self.key.is_some() { &mut self.after_key } else { &mut self.before_key };
        if bytes.len() + body.len() > MAX_PRELUDE {
            return Err(LoginFault::Untrusted("it goes on and on before it is ready"));
        }
        bytes.extend_from_slice(&Writer::tagged(tag).bytes(body).finish());
        Ok(())
    }
}
