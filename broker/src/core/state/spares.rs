//! Which spares there are: links that the broker has logged in ahead of a client. What takes a
//! right away finds them here, those that are being dialled included.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use crate::connection::ConnectionName;
use crate::session::{Cut, CutMeanwhile, CutReason, Lifeline};

/// Names a spare for one start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SpareId(u64);

#[derive(Debug)]
struct Entry {
    connection: ConnectionName,
    credential_version: u64,
    cut: Arc<Cut>,
    ready: bool,
}

/// All spares: plain data, no lock of its own.
#[derive(Debug, Default)]
pub(crate) struct Spares {
    next: u64,
    entries: HashMap<SpareId, Entry>,
}

impl Spares {
    /// Enters a spare that is to be dialled, if the connection has fewer than `most`.
    pub(in crate::core) fn enter(
        &mut self,
        connection: &ConnectionName,
        credential_version: u64,
        most: usize,
    ) -> Option<(SpareId, Arc<Cut>)> {
        let of_it = self.entries.values().filter(|entry| entry.connection == *connection).count();
        if of_it >= most {
            return None;
        }
        self.next += 1;
        let (id, cut) = (SpareId(self.next), Arc::new(Cut::default()));
        let entry = Entry {
            connection: connection.clone(),
            credential_version,
            cut: Arc::clone(&cut),
            ready: false,
        };
        self.entries.insert(id, entry);
        Some((id, cut))
    }

    /// It is logged in, unless something took its right away meanwhile.
    pub(in crate::core) fn commit(
        &mut self,
        id: SpareId,
        lifeline: Lifeline,
    ) -> Result<(), CutMeanwhile> {
        let entry = self.entries.get_mut(&id).ok_or(CutMeanwhile(CutReason::Closed))?;
        match entry.cut.reason() {
            Some(reason) => Err(CutMeanwhile(reason)),
            None => {
                entry.cut.hold(lifeline);
                entry.ready = true;
                Ok(())
            }
        }
    }

    /// It was taken by a session, or is gone.
    pub(in crate::core) fn leave(&mut self, id: SpareId) {
        if let Some(entry) = self.entries.remove(&id) {
            entry.cut.end();
        }
    }

    /// Marks the spares of the connections that `which` picks, on credentials older than `version`.
    #[must_use]
    pub(in crate::core) fn mark(
        &mut self,
        reason: CutReason,
        version: u64,
        which: impl Fn(&ConnectionName) -> bool,
    ) -> Vec<Arc<Cut>> {
        let picked = self
            .entries
            .values()
            .filter(|entry| which(&entry.connection) && entry.credential_version < version);
        picked
            .map(|entry| {
                entry.cut.mark(reason);
                Arc::clone(&entry.cut)
            })
            .collect()
    }

    /// How many wait for a client.
    pub(in crate::core) fn ready(&self, connection: &ConnectionName) -> usize {
        let of_it = self.entries.values().filter(|entry| entry.connection == *connection);
        of_it.filter(|entry| entry.ready).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ConnectionName {
        ConnectionName::parse(text).unwrap()
    }

    fn lifeline() -> Lifeline {
        Lifeline::Relayed(std::os::unix::net::UnixStream::pair().unwrap().0.into(), None)
    }

    #[test]
    fn no_more_than_there_may_be_and_none_that_was_marked() {
        let mut spares = Spares::default();
        let (first, _) = spares.enter(&name("a"), 1, 2).unwrap();
        let (second, _) = spares.enter(&name("a"), 2, 2).unwrap();
        assert!(spares.enter(&name("a"), 2, 2).is_none());
        let (other, _) = spares.enter(&name("b"), 1, 1).unwrap();
        let marked = spares.mark(CutReason::Rotated, 2, |connection| *connection == name("a"));
        assert_eq!(marked.len(), 1, "the one of the older version");
        assert_eq!(spares.commit(first, lifeline()), Err(CutMeanwhile(CutReason::Rotated)));
        assert_eq!(spares.commit(second, lifeline()), Ok(()));
        assert_eq!(spares.commit(other, lifeline()), Ok(()));
        assert_eq!((spares.ready(&name("a")), spares.ready(&name("b"))), (1, 1));
        spares.leave(first);
        assert!(spares.enter(&name("a"), 2, 2).is_some(), "its place is free again");
    }
}
