//! What an act sees and changes: rows that are opened and verified (I5), and changes that are
//! staged until the whole act is decided.

mod attempt;
pub(super) mod counters;
mod plain;
pub(super) mod requests;
mod rows;
mod tasks;

use kms_domain::{UnixMillis, WriterId};
use kms_proto::v1::{SecurityEvent, audit_record::Event};

use super::{
    actor::Actor,
    decision::{Decision, Entry},
    draft::TransactionDraft,
    refusals::Refusal,
    staged::Staged,
};
use kms_base::error::ServiceError;

/// One act's view of the rows that were read, with the changes of the acts before it in the same
/// transaction.
///
/// For a caller, a row that does not verify is like an absent one. The security officers get an
/// event (I5).
pub struct View<'v, 'b> {
    draft: &'v mut TransactionDraft<'b>,
    actor: &'v Actor,
    staged: Staged,
}

impl<'v, 'b> View<'v, 'b> {
    pub(super) fn new(draft: &'v mut TransactionDraft<'b>, actor: &'v Actor) -> Self {
        Self { draft, actor, staged: Staged::default() }
    }

    /// What the act has staged.
    pub(super) fn into_staged(self) -> Staged {
        self.staged
    }
}

impl View<'_, '_> {
    /// The time of the transaction.
    pub fn now(&self) -> UnixMillis {
        self.draft.now
    }

    /// SHA-256 of the certificate that the act is requested with. `None`: the server itself acts.
    pub const fn acting_certificate(&self) -> Option<[u8; 32]> {
        self.actor.certificate_sha256
    }

    /// The run of the server that writes the transaction's records.
    pub const fn writer(&self) -> WriterId {
        self.draft.writer
    }

    /// The database's clock, which all servers share. Task leases run by it.
    ///
    /// # Errors
    /// It was not read yet.
    pub fn clock(&mut self) -> Result<UnixMillis, ServiceError> {
        self.draft.read.clock().ok_or_else(|| {
            self.draft.missing.clock = true;
            not_read()
        })
    }

    /// A mark of what was protected under a counter, for its record. It is a keyed digest, so that
    /// a reader of the log cannot guess the content.
    pub fn mark_content(&self, content: &[u8]) -> [u8; 16] {
        self.draft.seal.current().mark_content(content)
    }

    /// Whether a recorded mark is the mark of this content.
    pub fn is_marked(&self, mark: &[u8], content: &[u8]) -> bool {
        self.draft.seal.accept(mark, |seal| seal.mark_content(content))
    }

    /// Records an event (I2). The rows that the act writes are named in its first record.
    pub fn append(&mut self, event: Event) -> Entry {
        self.staged.events.push(event);
        Entry(())
    }

    /// The proof that the act has recorded something so far. None: it has not.
    pub fn entry(&self) -> Option<Entry> {
        (!self.staged.events.is_empty()).then_some(Entry(()))
    }

    /// Records an event for the security officers, after the other events of the act.
    pub fn alert(&mut self, event: SecurityEvent) {
        self.staged.alerts.push(Event::SecurityEvent(event));
    }

    /// Records an event for the security officers although the act is refused. Repetitions are
    /// counted, as refusals are.
    pub fn alert_refused(&mut self, kind: &str, detail: String) {
        self.draft.refusals.push(Refusal {
            principal: self.actor.principal_text(),
            action: kind.to_owned(),
            reason: detail,
            security_event: true,
        });
    }

    /// Counts a refusal of a part of the act. A refusal of the whole act is counted by itself.
    pub fn refuse(&mut self, reason: String) {
        self.draft.refusals.push(Refusal {
            principal: self.actor.principal_text(),
            action: self.actor.action.to_owned(),
            reason,
            security_event: false,
        });
    }

    /// Counts a row that was refused (I5), for the security officers.
    fn note_refused_row(&mut self, reason: String) {
        self.alert_refused("sealed-row-refused", reason);
    }

    /// The ending that follows from what a test has staged.
    pub(super) fn ended_in_test<T>(&self, answer: T) -> Decision<T> {
        let in_progress = !self.staged.shipments.is_empty() || !self.staged.tasks.is_empty();
        match self.entry() {
            Some(entry) => Decision::recorded(entry, answer),
            None if in_progress => Decision::progress(answer),
            None => Decision::unchanged(answer),
        }
    }
}

/// This error means "read this too". It never reaches a caller: the transaction reads what is
/// missing and decides again.
fn not_read() -> ServiceError {
    ServiceError::Internal("a row was used before it was read".to_owned())
}
