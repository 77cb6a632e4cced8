//! A login, tried with the credential that an opening lends, and once more when the server refuses
//! that one and the source has another.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::backend::{Authenticated, LoginFault, LoginRequest, log_in};
use super::codec::Parameter;
use crate::core::Opening;
use crate::credential::{Attempt, Credential, Open};
use crate::upstream::{DialError, Link, Route};

impl From<Open> for LoginFault {
    fn from(open: Open) -> Self {
        Self::Held { retry: open.retry }
    }
}

/// Logs in for an opening. At most two logins, and none while the server is left alone.
pub(super) async fn log_in_for(
    opening: &Opening,
    parameters: &[Parameter],
) -> Result<Authenticated, LoginFault> {
    let credential = opening.credential();
    let attempt = match credential.breaker().enter().await {
        Ok(attempt) => attempt,
        // Somebody else may have found the new one while this login waited.
        Err(open) => match opening.adopt_newer() {
            Some(newer) => return once(opening, newer, parameters).await,
            None => return Err(open.into()),
        },
    };
    let fault = match try_with(opening, credential, &attempt, parameters).await {
        Ok(login) => {
            attempt.succeeded();
            return Ok(login);
        }
        Err(fault) => fault,
    };
    match fault {
        LoginFault::Refused { verdict, .. } => {
            // While the attempt lasts the others wait, and so they learn of what is found.
            let newer = opening.renew_credential().await;
            let meaning = attempt.refused(verdict);
            match newer {
                Some(newer) => once(opening, newer, parameters).await,
                None => {
                    opening.refused(meaning);
                    Err(fault)
                }
            }
        }
        LoginFault::Held { .. } => match opening.adopt_newer() {
            Some(newer) => once(opening, newer, parameters).await,
            None => Err(fault),
        },
        LoginFault::Dial(_)
        | LoginFault::Link(_)
        | LoginFault::Untrusted(_)
        | LoginFault::Server { .. }
        | LoginFault::Unproven(_) => Err(fault),
    }
}

async fn once(
    opening: &Opening,
    credential: &Arc<Credential>,
    parameters: &[Parameter],
) -> Result<Authenticated, LoginFault> {
    let attempt = credential.breaker().enter().await?;
    let answer = try_with(opening, credential, &attempt, parameters).await;
    if let Some(meaning) = conclude(attempt, &answer) {
        opening.refused(meaning);
    }
    answer
}

/// What a login's end says of the credential that it was tried with.
pub(super) fn conclude(
    attempt: Attempt<'_>,
    answer: &Result<Authenticated, LoginFault>,
) -> Option<crate::credential::Refused> {
    match answer {
        Ok(_) => {
            attempt.succeeded();
            None
        }
        Err(LoginFault::Refused { verdict, .. }) => Some(attempt.refused(*verdict)),
        Err(
            LoginFault::Dial(_)
            | LoginFault::Link(_)
            | LoginFault::Untrusted(_)
            | LoginFault::Held { .. }
            | LoginFault::Server { .. }
            | LoginFault::Unproven(_),
        ) => None,
    }
}

async fn try_with(
    opening: &Opening,
    credential: &Arc<Credential>,
    attempt: &Attempt<'_>,
    parameters: &[Parameter],
) -> Result<Authenticated, LoginFault> {
    let request = LoginRequest {
        connection: opening.connection(),
        credential,
        attempt,
        database: opening.database().as_str(),
        parameters,
    };
    dial_and_log_in(request).await
}

/// Dials a connection's server and logs in. A host whose server takes nobody now is passed over
/// for the next one, as libpq does since version 14.
///
/// Whoever answers can say so. It gains nothing by it: the next host is one of the configuration's,
/// and has to prove itself like the first; to say nothing would lead there too.
pub(super) async fn dial_and_log_in(
    request: LoginRequest<'_>,
) -> Result<Authenticated, LoginFault> {
    let mut route = Route::to(request.connection);
    let mut link = route.dial().await?;
    loop {
        let fault = match log_in_by(link, request).await {
            Err(fault) if fault.is_for_now() => fault,
            answer => return answer,
        };
        route.pass_host();
        link = match route.dial().await {
            Ok(next) => next,
            Err(untrusted @ DialError::Untrusted(_)) => return Err(untrusted.into()),
            // Nobody else is there, and what this one said will pass.
            Err(DialError::Unreachable(_)) => return Err(fault),
        };
    }
}

/// Logs in over a link. Where the TLS mode leaves a choice, a login that the server does not take
/// in one way is tried in the other, as libpq does (34.19.3).
async fn log_in_by(mut link: Link, request: LoginRequest<'_>) -> Result<Authenticated, LoginFault> {
    let otherwise = link.otherwise.take();
    let answer = log_in(link, request).await;
    match (answer, otherwise) {
        (Err(fault), Some(other)) if fault.is_no_entry() => match Link::dial_again(&other).await {
            Ok(link) => log_in(link, request).await,
            // What it said before is what can be mended.
            Err(_no_tls) => Err(fault),
        },
        (answer, _) => answer,
    }
}
