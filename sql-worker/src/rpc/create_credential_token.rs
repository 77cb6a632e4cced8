//! `CreateCredentialToken`: a handle on a connection's own credential, for the caller.

use std::ops::RangeInclusive;
use std::time::Duration;

use credbroker_proto::v1::{CreateCredentialTokenRequest, CreateCredentialTokenResponse};

use crate::app::{App, Principal};
use crate::error::Failure;

const TTL: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(86_400);
const DEFAULT_TTL: Duration = Duration::from_secs(1800);

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: CreateCredentialTokenRequest,
) -> Result<CreateCredentialTokenResponse, Failure> {
    let ttl = ttl(request.ttl)?;
    let (token, expires, _masked) = app.create_token(caller, &request.connection, ttl).await?;
    Ok(CreateCredentialTokenResponse {
        credential_token: token.expose().to_owned(),
        expires: Some(expires.into()),
    })
}

fn ttl(given: Option<prost_types::Duration>) -> Result<Duration, Failure> {
    let ttl = given.map_or(Ok(DEFAULT_TTL), Duration::try_from).ok();
    ttl.filter(|ttl| TTL.contains(ttl))
        .ok_or_else(|| Failure::invalid("ttl must be between 1 minute and 24 hours"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_has_a_default_and_bounds() {
        let seconds = |seconds| ttl(Some(prost_types::Duration { seconds, nanos: 0 })).ok();
        assert_eq!(ttl(None), Ok(DEFAULT_TTL));
        assert_eq!(seconds(60), Some(Duration::from_secs(60)));
        assert_eq!(seconds(86_400), Some(Duration::from_secs(86_400)));
        assert_eq!((seconds(59), seconds(86_401), seconds(-1)), (None, None, None));
    }
}
