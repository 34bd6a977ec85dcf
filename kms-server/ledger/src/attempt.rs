//! One item of an act, decided for itself: it is staged as a whole, or nothing of it is.
//!
//! An act on many meters answers for each of them, so one that cannot be served must leave nothing
//! behind: no row that changed, and no event of a change that did not happen (I2). What was staged
//! is undone from a log, so that an item that succeeds costs a few lengths and no copy.

use kms_domain::{RowId, UnixMillis};
use kms_store::{FingerprintPrefix, TaskKey, TaskRow};

use super::view::{ChunkName, Opened, View};

impl View<'_, '_> {
    /// Tries one item of an act. If it fails, all that it has staged is undone: rows, tasks,
    /// events, requests, grants, fingerprints and the rest. Items may be tried within items.
    ///
    /// Counters are not taken back: those that a failed item was dealt are skipped (I4). Refusals
    /// that it counted stay on the record.
    ///
    /// # Errors
    /// What `item` returned.
    pub fn attempt<T, E>(&mut self, item: impl FnOnce(&mut Self) -> Result<T, E>) -> Result<T, E> {
        let before = self.savepoint();
        let outcome = item(self);
        if outcome.is_err() {
            self.undo(&before);
        }
        outcome
    }

    fn savepoint(&self) -> Savepoint {
        let staged = &self.staged;
        Savepoint {
            log: staged.log.len(),
            events: staged.events.len(),
            alerts: staged.alerts.len(),
            requests: staged.requests.len(),
            grants: staged.grants.len(),
            revocations: staged.revocations.len(),
            shipments: staged.shipments.len(),
            refused_lines: staged.refused_lines.len(),
        }
    }

    fn undo(&mut self, before: &Savepoint) {
        let staged = &mut self.staged;
        for change in staged.log.drain(before.log..).rev() {
            match change {
                Change::Row(id, Some(opened)) => drop(staged.rows.insert(id, opened)),
                Change::Row(id, None) => drop(staged.rows.remove(&id)),
                Change::Task(_, Some(row)) => drop(staged.tasks.insert(row.key, row)),
                Change::Task(key, None) => drop(staged.tasks.remove(&key)),
                Change::Fingerprint(prefix) => drop(staged.fingerprints.get_mut(&prefix).and_then(Vec::pop)),
                Change::Lent(name, until) => {
                    let held = match self.base.fresh_chunks.get_mut(&name) {
                        Some(held) => Some(held),
                        None => self.base.chunks.get_mut(&name),
                    };
                    if let Some(held) = held {
                        held.leased_until = until;
                    }
                }
            }
        }
        staged.events.truncate(before.events);
        staged.alerts.truncate(before.alerts);
        staged.requests.truncate(before.requests);
        staged.grants.truncate(before.grants);
        staged.revocations.truncate(before.revocations);
        staged.shipments.truncate(before.shipments);
        staged.refused_lines.truncate(before.refused_lines);
    }
}

/// A change of what is not merely appended, with what was there before.
pub(super) enum Change {
    /// A row was staged.
    Row(RowId, Option<Opened>),
    /// A task was staged.
    Task(TaskKey, Option<TaskRow>),
    /// A fingerprint was added.
    Fingerprint(FingerprintPrefix),
    /// Counters were lent; until when those before them were.
    Lent(ChunkName, UnixMillis),
}

/// How much was staged at a moment.
struct Savepoint {
    log: usize,
    events: usize,
    alerts: usize,
    requests: usize,
    grants: usize,
    revocations: usize,
    shipments: usize,
    refused_lines: usize,
}
