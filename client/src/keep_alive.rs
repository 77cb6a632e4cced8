//! Renews a handle in the background.
//!
//! Invariants: renewal never outlives the [`KeepAlive`]; it is tried until the handle is
//! dead, unless the broker's answer says that no attempt can help any more.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::handle::{Origin, Shared};
use crate::{Error, HandleInfo};

/// Not sooner than this after a failed attempt, unless the broker names a time itself.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Keeps a handle with hardly any time to live from being renewed in a busy loop.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);

/// Renewal in the background, until this is dropped.
#[must_use = "renewal stops when this is dropped"]
pub struct KeepAlive {
    stopped: CancellationToken,
    _stop: DropGuard,
    end: oneshot::Receiver<RenewalEnd>,
}

/// Why a handle is not renewed any more. Its `Display` fits after "not renewed: ".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RenewalEnd {
    /// The broker refused for good, or could not be reached before the handle expired.
    #[error(transparent)]
    Failed(#[from] Error),
    /// The handle has reached the end of its lifetime: it works until then, and no longer.
    #[error("it has reached the end of its lifetime")]
    LifetimeReached(SystemTime),
    /// The client was closed.
    #[error("the client was closed")]
    Closed,
}

impl KeepAlive {
    pub(crate) fn start(origin: &Origin, handle: Arc<Shared>) -> Self {
        let stopped = origin.background().closing();
        let (tell, end) = oneshot::channel();
        let work = {
            let (origin, stopped) = (origin.clone(), stopped.clone());
            async move {
                let renewal = renew_until_end(&origin, &handle);
                let ended = stopped.run_until_cancelled(renewal).await;
                // Nobody listens when the owner has dropped its side, and that is fine.
                let _unheard = tell.send(ended.unwrap_or(RenewalEnd::Closed));
                stopped.cancel();
            }
        };
        origin.background().run(work);
        Self { _stop: stopped.clone().drop_guard(), stopped, end }
    }

    /// Whether renewal has come to its end.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.stopped.is_cancelled()
    }

    /// Waits until renewal has come to its end. Dropping the future stops renewal.
    pub async fn ended(mut self) -> RenewalEnd {
        (&mut self.end).await.unwrap_or(RenewalEnd::Closed)
    }
}

impl fmt::Debug for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAlive").field("has_ended", &self.has_ended()).finish_non_exhaustive()
    }
}

async fn renew_until_end(origin: &Origin, handle: &Shared) -> RenewalEnd {
    let ttl = {
        let info = handle.info.borrow();
        info.remaining(info.issued)
    };
    loop {
        let info = handle.info.borrow().clone();
        if info.is_at_its_last() {
            return RenewalEnd::LifetimeReached(info.expires);
        }
        sleep(until_renewal(&info, ttl, SystemTime::now())).await;
        match renew_while_alive(origin, handle).await {
            Ok(info) => handle.info.send_replace(info),
            Err(error) => return RenewalEnd::Failed(error),
        };
    }
}

async fn renew_while_alive(origin: &Origin, handle: &Shared) -> Result<HandleInfo, Error> {
    loop {
        let error = match origin.renew(&handle.token, None).await {
            Ok(info) => return Ok(info),
            Err(error) => error,
        };
        let remaining = handle.info.borrow().remaining(SystemTime::now());
        if !error.is_retryable() || remaining.is_zero() {
            return Err(error);
        }
        sleep(until_retry(&error, remaining)).await;
    }
}

/// Half of what remains; never more than half of the time to live, so that a clock that was
/// set back does not let the handle expire.
fn until_renewal(info: &HandleInfo, ttl: Duration, now: SystemTime) -> Duration {
    (info.remaining(now).min(ttl) / 2).max(SHORTEST_WAIT)
}

/// What the broker asks for, within what remains, so that the last attempt is not missed.
fn until_retry(error: &Error, remaining: Duration) -> Duration {
    let wished = error.retry_after().unwrap_or(RETRY_AFTER);
    wished.min(remaining / 2).max(SHORTEST_WAIT)
}

#[cfg(test)]
mod tests {
    use credbroker_proto::v1;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn info(issued: i64, expires: i64) -> HandleInfo {
        let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let handle =
            v1::Handle { issued: time(issued), expires: time(expires), ..Default::default() };
        HandleInfo::from_wire(Some(handle)).unwrap()
    }

    #[test]
    fn renewal_is_at_half_time() {
        let ttl = Duration::from_secs(60);
        let handle = info(100, 160);
        assert_eq!(until_renewal(&handle, ttl, at(100)), Duration::from_secs(30));
        assert_eq!(until_renewal(&handle, ttl, at(140)), Duration::from_secs(10));
        assert_eq!(until_renewal(&handle, ttl, at(200)), SHORTEST_WAIT, "expired");
        assert_eq!(until_renewal(&handle, ttl, at(0)), ttl / 2, "clock set back");
    }

    #[test]
    fn retries_honour_the_broker_and_the_expiry() {
        let refused = |retry_after| Error::Refused {
            reason: crate::Reason::LimitReached,
            message: String::new(),
            reference: None,
            retry_after,
        };
        let long = Duration::from_secs(600);
        assert_eq!(until_retry(&Error::Disconnected, long), RETRY_AFTER);
        let asked = Duration::from_secs(7);
        assert_eq!(until_retry(&refused(Some(asked)), long), asked);
        assert_eq!(until_retry(&refused(Some(long)), asked), asked / 2);
        assert_eq!(until_retry(&refused(None), Duration::from_millis(2)), SHORTEST_WAIT);
    }
}
