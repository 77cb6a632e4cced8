//! `Debug` for the messages that carry a handle token: everything but the token.

use std::fmt;

use crate::v1::{
    CreateCredentialTokenResponse, DescribeHandleRequest, ExecuteQueryRequest, IssueHandleResponse,
    OpenRequest, RenewHandleRequest, RevealRequest, RevokeCredentialTokenRequest,
    RevokeHandleRequest, WatchHandleRequest, revoke_handle_request,
};

const REDACTED: &str = "[REDACTED]";

impl fmt::Debug for IssueHandleResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssueHandleResponse")
            .field("handle", &self.handle)
            .field("token", &REDACTED)
            .field("endpoint", &self.endpoint)
            .finish()
    }
}

impl fmt::Debug for RenewHandleRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RenewHandleRequest")
            .field("token", &REDACTED)
            .field("ttl", &self.ttl)
            .finish()
    }
}

impl fmt::Debug for DescribeHandleRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DescribeHandleRequest").field("token", &REDACTED).finish()
    }
}

impl fmt::Debug for WatchHandleRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WatchHandleRequest").field("token", &REDACTED).finish()
    }
}

impl fmt::Debug for OpenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A startup parameter may say anything, a password in `options` included.
        f.debug_struct("OpenRequest")
            .field("token", &REDACTED)
            .field("database", &self.database)
            .field("startup", &self.startup.len())
            .finish()
    }
}

impl fmt::Debug for ExecuteQueryRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The statement and its parameters are the caller's own business too.
        f.debug_struct("ExecuteQueryRequest")
            .field("target", &REDACTED)
            .field("credential_token", &REDACTED)
            .field("sql", &self.sql.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for CreateCredentialTokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreateCredentialTokenResponse")
            .field("credential_token", &REDACTED)
            .field("expires", &self.expires)
            .finish()
    }
}

impl fmt::Debug for RevokeCredentialTokenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevokeCredentialTokenRequest").field("credential_token", &REDACTED).finish()
    }
}

impl fmt::Debug for RevealRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevealRequest").field("token", &REDACTED).finish()
    }
}

impl fmt::Debug for RevokeHandleRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevokeHandleRequest").field("handle", &self.handle).finish()
    }
}

impl fmt::Debug for revoke_handle_request::Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(_) => f.debug_tuple("Token").field(&REDACTED).finish(),
            Self::Id(id) => f.debug_tuple("Id").field(id).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "cbh_0123456789012345678901234567890123456789abc";

    #[test]
    fn no_token_is_printed() {
        let messages: [&dyn fmt::Debug; 10] = [
            &IssueHandleResponse { handle: None, token: TOKEN.into(), endpoint: None },
            &RenewHandleRequest { token: TOKEN.into(), ttl: None },
            &DescribeHandleRequest { token: TOKEN.into() },
            &WatchHandleRequest { token: TOKEN.into() },
            &OpenRequest { token: TOKEN.into(), ..Default::default() },
            &RevealRequest { token: TOKEN.into() },
            &ExecuteQueryRequest { credential_token: TOKEN.into(), ..Default::default() },
            &CreateCredentialTokenResponse { credential_token: TOKEN.into(), expires: None },
            &RevokeCredentialTokenRequest { credential_token: TOKEN.into() },
            &RevokeHandleRequest {
                handle: Some(revoke_handle_request::Handle::Token(TOKEN.into())),
            },
        ];
        for message in messages {
            let text = format!("{message:?}");
            assert!(!text.contains("cbh_"), "{text}");
            assert!(text.contains(REDACTED), "{text}");
        }
    }
}
