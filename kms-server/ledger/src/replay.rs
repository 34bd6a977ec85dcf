//! What a repeated request gets: the same answer again, or a refusal. This file decides it for
//! every call that takes a request id, and no other file does.
//!
//! A caller repeats a request when it does not know whether it was answered. The door checks the
//! caller and the policy again, because a repetition gives no right (I8). Then it looks for the
//! earlier answer with [`View::asked`], in the transaction that would act. It remembers a new
//! answer with [`View::answered`] or [`View::answered_with`], as the act's [`crate::Past`] says.
//! Where keys or frames leave, the answer is the audit record itself (I2): [`View::replay`]. It is
//! compared with what would be answered now, and any difference is a refusal: a counter leaves
//! again with the same octets only (I4).
//!
//! | the request id is | the repetition gets |
//! |---|---|
//! | known, with the same digest, and answered within the window | the same answer, after the caller's permission was decided on again |
//! | known, with another digest | `INVALID_ARGUMENT`: an id names one request |
//! | known, and answered before the window, or by a version that did not seal the time | `ABORTED` |
//! | known, and its row does not verify | `PERMISSION_DENIED`, and a security event (I5) |
//! | unknown | a decision as for the first time. The same holds if everything in the first request was refused: nothing left, so nothing is remembered |
//!
//! Calls that cannot do something twice are not remembered, because their rows say that it is done:
//! to revoke a grant, to report or withdraw a step of a transfer (steps are numbered), to switch a
//! group's key, and calls about things that have a name or a digest (device types, shipments).
//!
//! The age of an answer is in the seal of the request's row. A row that was put back after its time
//! is still too old.

use kms_domain::{RequestId, WriterId};
use kms_proto::v1::AuditRecord;
use kms_store::{AuditReference, RequestKey, RequestRow, Store};
use prost::Message;

use super::{chain::AuditLeaf, view::View};
use kms_authz::Caller;
use kms_base::error::ServiceError;

/// How long a request can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// 15 minutes: keys or frames leave.
    Keys,
    /// 24 hours: administration.
    Administration,
}

impl Window {
    const fn milliseconds(self) -> i64 {
        match self {
            Self::Keys => 15 * 60 * 1_000,
            Self::Administration => 24 * 3_600 * 1_000,
        }
    }
}

/// A request as its caller identifies it.
#[derive(Clone, Debug)]
pub struct Asking {
    key: RequestKey,
    digest: [u8; 32],
    window: Window,
}

impl Asking {
    /// A request of this caller. `digest` is over the whole request without its id.
    ///
    /// Public for tests on an island, which are in kms-service: use cases go through the door.
    #[doc(hidden)]
    pub fn new(caller: &Caller, id: RequestId, digest: [u8; 32], window: Window) -> Self {
        Self { key: RequestKey { principal: caller.principal.clone(), request: id, chunk: 0 }, digest, window }
    }

    /// One chunk of the request, from 0. Each chunk is answered and remembered on its own.
    #[must_use]
    pub fn chunk(mut self, chunk: u32) -> Self {
        self.key.chunk = chunk;
        self
    }

    /// The rows that the transaction has to read for it.
    pub fn reads(&self) -> Vec<RequestKey> {
        vec![self.key.clone()]
    }
}

/// Whether a request was answered before.
#[derive(Debug)]
pub enum Asked {
    /// It was not. It is decided on now.
    First,
    /// It was. The caller gets nothing new for it.
    Before(Answered),
}

/// What was answered to a request.
#[derive(Debug)]
pub struct Answered {
    outcome: Vec<u8>,
}

impl Answered {
    /// The message that [`View::answered_with`] remembered.
    ///
    /// # Errors
    /// It cannot be decoded: another version of the server wrote it.
    pub fn message<M: Message + Default>(&self) -> Result<M, ServiceError> {
        M::decode(self.outcome.as_slice())
            .map_err(|_| ServiceError::Internal("a remembered answer cannot be decoded".to_owned()))
    }

    /// The name of the record that [`View::answered`] remembered.
    ///
    /// # Errors
    /// The request is being executed at this moment, or the answer names no record.
    fn record(&self) -> Result<RecordName, ServiceError> {
        if self.outcome.is_empty() {
            return Err(ServiceError::Aborted {
                reason: "this request is being executed at this moment".to_owned(),
                next_step: "repeat it".to_owned(),
            });
        }
        RecordName::decode(&self.outcome)
            .ok_or_else(|| ServiceError::Internal("the outcome of a past request cannot be decoded".to_owned()))
    }
}

/// Names the record that says what was answered: `writer(16) ‖ sequence(8) ‖ leaf(32)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordName {
    pub(super) reference: AuditReference,
    pub(super) leaf: AuditLeaf,
}

impl RecordName {
    pub(super) fn encode(&self) -> Vec<u8> {
        [self.reference.writer.octets().as_slice(), &self.reference.sequence.to_be_bytes(), &self.leaf.0].concat()
    }

    fn decode(outcome: &[u8]) -> Option<Self> {
        let (writer, rest) = outcome.split_first_chunk::<16>()?;
        let (sequence, leaf) = rest.split_first_chunk::<8>()?;
        let reference =
            AuditReference { writer: WriterId::from_octets(writer).ok()?, sequence: u64::from_be_bytes(*sequence) };
        Some(Self { reference, leaf: AuditLeaf(leaf.try_into().ok()?) })
    }

    /// Reads the record as it was when the act was committed (I2, I5).
    ///
    /// # Errors
    /// The record is missing or was changed, or the database is away.
    pub async fn read(self, store: &dyn Store) -> Result<PastRecord, ServiceError> {
        let gone = || {
            ServiceError::Internal(
                "the audit record of a past request is missing or was changed (I2): run `kms audit scrub`".to_owned(),
            )
        };
        let Self { reference, leaf } = self;
        let rows = store.audit_of_writer(reference.writer, reference.sequence, 1).await?;
        let row = rows
            .first()
            .filter(|row| row.sequence == reference.sequence && AuditLeaf::of(&row.record) == leaf)
            .ok_or_else(gone)?;
        Ok(PastRecord { name: self, record: AuditRecord::decode(row.record.as_slice()).map_err(|_| gone())? })
    }
}

/// The record of a request that was answered before.
#[derive(Clone, Debug)]
pub struct PastRecord {
    name: RecordName,
    /// What was done.
    pub record: AuditRecord,
}

impl PastRecord {
    /// The leaf hash of the record.
    pub const fn leaf(&self) -> AuditLeaf {
        self.name.leaf
    }
}

/// How an act continues whose answer is its audit record.
#[derive(Debug)]
pub(super) enum Replay {
    /// It is decided on now.
    First,
    /// It was answered. This act ends, its record is read, and another act decides with the record.
    Read(RecordName),
    /// It was answered as the record says. The rows are compared with it once more.
    Again,
}

impl View<'_, '_> {
    /// Whether this request was answered before.
    ///
    /// # Errors
    /// Its id was used for another request, it is too old to be repeated, or its row does not
    /// verify or was not read yet.
    ///
    /// Public for tests on an island: the door calls it for every act.
    #[doc(hidden)]
    pub fn asked(&mut self, asking: &Asking) -> Result<Asked, ServiceError> {
        let Some(remembered) = self.request(&asking.key)? else { return Ok(Asked::First) };
        if remembered.digest != asking.digest {
            return Err(used_for_another());
        }
        // The sealed time counts: a row that was put back after it was purged is as old as before
        // (I4, I5).
        if remembered.expires.is_none_or(|expires| self.now() > expires) {
            return Err(ServiceError::Aborted {
                reason: "this request was answered too long ago to be repeated".to_owned(),
                next_step: "ask again with a new request id".to_owned(),
            });
        }
        Ok(Asked::Before(Answered { outcome: remembered.outcome }))
    }

    /// As [`Self::asked`], for an act whose answer is its audit record. `past` is the record, once
    /// it was read.
    ///
    /// # Errors
    /// As [`Self::asked`]; the request is being executed at this moment; or `past` is not the
    /// record of this request any more.
    pub(super) fn replay(&mut self, asking: &Asking, past: Option<&PastRecord>) -> Result<Replay, ServiceError> {
        match (self.asked(asking)?, past) {
            (Asked::First, None) => Ok(Replay::First),
            (Asked::Before(answered), None) => answered.record().map(Replay::Read),
            (Asked::Before(answered), Some(past)) if answered.record()? == past.name => Ok(Replay::Again),
            // The row was purged between the two acts, or somebody removed it.
            (_, Some(_)) => Err(overtaken("the answer was forgotten")),
        }
    }

    /// Remembers that the first record of this act is the answer to this request.
    ///
    /// Public for tests on an island: the door calls it as the act's [`crate::Past`] says.
    #[doc(hidden)]
    pub fn answered(&mut self, asking: &Asking) {
        self.remember(asking, Vec::new(), true);
    }

    /// Remembers the answer itself. It never holds a key.
    ///
    /// Public for tests on an island: the door calls it as the act's [`crate::Past`] says.
    #[doc(hidden)]
    pub fn answered_with(&mut self, asking: &Asking, answer: &impl Message) {
        self.remember(asking, answer.encode_to_vec(), false);
    }

    fn remember(&mut self, asking: &Asking, outcome: Vec<u8>, by_record: bool) {
        let expires = self.now().after(asking.window.milliseconds());
        self.put_request(asking.key.clone(), RequestRow { digest: asking.digest, outcome, expires }, by_record);
    }
}

/// The refusal of an id that was used before: an id names one request.
pub fn used_for_another() -> ServiceError {
    ServiceError::invalid("request_id", "it was used for another request; make a new one for each request")
}

/// The refusal of a repetition that cannot get the same answer again.
pub fn overtaken(what: &str) -> ServiceError {
    ServiceError::Aborted {
        reason: format!("{what} since this request was answered"),
        next_step: "ask again with a new request id".to_owned(),
    }
}

/// The refusal of a part that was refused when the request was answered first. Whatever has changed
/// since, a repetition gives nothing new (I2, I8).
pub fn refused_before() -> ServiceError {
    ServiceError::Aborted {
        reason: "this was refused when the request was answered first".to_owned(),
        next_step: "ask again for what was refused, with a new request id".to_owned(),
    }
}
