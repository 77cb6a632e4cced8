//! `notifications/progress`: that a call still runs, and for how long.
//!
//! Invariants: nothing is sent unless the request asked for it; the numbers only rise, one a
//! second; nothing is sent once the answer is on its way.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use rmcp::RoleServer;
use rmcp::model::ProgressNotificationParam;
use rmcp::service::RequestContext;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// The first comes after this, and each other this much later.
const INTERVAL: Duration = Duration::from_secs(1);

/// Runs `call`, and meanwhile reports to a client that asked for reports.
pub(super) async fn reported<F: Future>(
    context: &RequestContext<RoleServer>,
    call: F,
) -> F::Output {
    let Some(token) = context.meta.get_progress_token() else {
        return call.await;
    };
    let mut call = pin!(call);
    let started = Instant::now();
    let mut ticks = interval_at(started + INTERVAL, INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            output = &mut call => return output,
            _ = ticks.tick() => {}
        }
        let seconds = started.elapsed().as_secs();
        let report = ProgressNotificationParam::new(token.clone(), Seconds(seconds).into())
            .with_message(format!("running for {seconds} s"));
        let mut report = pin!(context.peer.notify_progress(report));
        tokio::select! {
            biased;
            // Whether it arrived is the transport's matter.
            _sent = &mut report => {}
            output = &mut call => {
                // Begun, so it must be out before the answer, which takes the same way. A client
                // that reads neither has no call to wait for.
                tokio::select! {
                    _sent = report => {}
                    () = context.ct.cancelled() => {}
                }
                return output;
            }
        }
    }
}

struct Seconds(u64);

impl From<Seconds> for f64 {
    fn from(Seconds(seconds): Seconds) -> Self {
        // 136 years.
        Self::from(u32::try_from(seconds).unwrap_or(u32::MAX))
    }
}
