//! Telling the service manager how far we are (sd_notify(3)). Without one, nothing happens.

#![forbid(unsafe_code)]

use sd_notify::NotifyState;
use tracing::debug;

/// The broker serves.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The broker shuts down.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The broker reads its configuration again; [`ready`] follows (systemd.service(5),
/// Type=notify-reload).
pub(crate) fn reloading() {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        tell(&[NotifyState::Reloading, now]);
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "the service manager could not be told");
    }
}
