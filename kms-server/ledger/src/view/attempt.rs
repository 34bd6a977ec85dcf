//! One item of an act, decided for itself: either all that it stages is kept, or nothing.
//!
//! An act on many meters answers for each of them. An item that fails must leave nothing behind: no
//! changed row, and no event of a change that did not happen (I2). A log of the earlier state
//! undoes what was staged, so an item that succeeds costs a few lengths and no copy.

use super::View;

impl View<'_, '_> {
    /// Tries one item of an act. If the item fails, all that it has staged is undone: rows, tasks,
    /// events, requests, grants, fingerprints and the rest. Items may contain items.
    ///
    /// Counters are not given back: those that were allocated to a failed item are skipped (I4).
    /// Refusals that the item counted stay on the record.
    ///
    /// # Errors
    /// What `item` returned.
    pub fn attempt<T, E>(&mut self, item: impl FnOnce(&mut Self) -> Result<T, E>) -> Result<T, E> {
        let before = self.staged.savepoint();
        let outcome = item(self);
        if outcome.is_err() {
            for (name, until) in self.staged.undo(&before) {
                if let Some(held) = self.held_mut(&name) {
                    held.leased_until = until;
                }
            }
        }
        outcome
    }
}
