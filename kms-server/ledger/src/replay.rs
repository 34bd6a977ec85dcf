//! What a repeated request gets: the same answer again, or a refusal. It is decided here for every
//! call that takes a request id, and nowhere else.
//!
//! A caller repeats a request when it does not know whether it was answered. The door decides on
//! the caller and the policy anew, since a repetition is no right (I8). Then it asks
//! [`View::asked`], in the transaction that would act, and remembers with [`View::answered`] or
//! [`View::answered_with`] what the act came to: as the act's [`crate::Past`] says. Where keys or
//! frames leave, the answer is the audit record itself (I2): [`View::replay`]. It is compared with
//! what would be answered now, and whatever differs is a refusal: a counter goes out again with the
//! same octets only (I4).
//!
//! | the request id is | the repetition gets |
//! |---|---|
//! | known, with the same digest, and answered within the window | the same answer, after the caller's permission was decided on again |
//! | known, with another digest | `INVALID_ARGUMENT`: an id names one request |
//! | known, and answered before the window, or by a version that did not seal the time | `ABORTED` |
//! | known, and its row does not verify | `PERMISSION_DENIED`, and a security event (I5) |
//! | unknown | a decision as for the first time. So does a request of which everything was refused: nothing left, so nothing is remembered |
//!
//! Calls that cannot do a thing twice are not remembered, since their rows say that it is done:
//! revoking a grant, reporting or withdrawing a step of a transfer (steps are numbered), switching
//! a group's key, and what is named by its content or name (shipments, device types).
//!
//! The age of an answer is in the seal of the request's row: one that was put back after its time
//! is too old still.

use kms_domain::{RequestId, UnixMillis, WriterId};
use kms_proto::v1::AuditRecord;
use kms_store::{AuditReference, RequestKey, RequestRow, Store};
use prost::Message;

use super::{AuditLeaf, View};
use kms_authz::Caller;
use kms_base::error::ServiceError;

/// How long a request can be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// 15 minutes: what leaves are keys or frames.
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
    /// A request of this caller. `digest` is over all that is asked, without the id.
    pub fn new(caller: &Caller, id: RequestId, digest: [u8; 32], window: Window) -> Self {
        Self { key: RequestKey { principal: caller.principal.clone(), request: id, chunk: 0 }, digest, window }
    }

    /// One chunk of it, from 0: what is answered and remembered on its own.
    #[must_use]
    pub fn chunk(mut self, chunk: u32) -> Self {
        self.key.chunk = chunk;
        self
    }

    /// What the transaction has to read for it.
    pub fn reads(&self) -> Vec<RequestKey> {
        vec![self.key.clone()]
    }
}

/// Whether a request came before.
#[derive(Debug)]
pub enum Asked {
    /// It is decided on now.
    First,
    /// It was answered; the caller is not given anything new for it.
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
    /// It does not decode: another version of the server wrote it.
    pub fn message<M: Message + Default>(&self) -> Result<M, ServiceError> {
        M::decode(self.outcome.as_slice())
            .map_err(|_| ServiceError::Internal("a remembered answer does not decode".to_owned()))
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
            .ok_or_else(|| ServiceError::Internal("the outcome of a past request does not read".to_owned()))
    }
}

/// Names the record that tells what was answered: `writer(16) ‖ sequence(8) ‖ leaf(32)`.
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
    /// It is gone or was changed, or the database is away.
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

/// How an act goes on whose answer is its audit record.
#[derive(Debug)]
pub(super) enum Replay {
    /// It is decided on now.
    First,
    /// It was answered: the act is over, its record is read, and another act decides with it.
    Read(RecordName),
    /// It was answered as the record tells; the rows are looked at once more beside it.
    Again,
}

impl View<'_, '_> {
    /// Whether this request was answered before.
    ///
    /// # Errors
    /// Its id was used for another request, it is too old to be repeated, its row does not verify,
    /// or was not read yet.
    pub fn asked(&mut self, asking: &Asking) -> Result<Asked, ServiceError> {
        let Some(remembered) = self.request(&asking.key)? else { return Ok(Asked::First) };
        if remembered.digest != asking.digest {
            return Err(used_for_another());
        }
        // By the time that is sealed: a row that was put back after it was purged is as old as it
        // was (I4, I5).
        if remembered.expires.is_none_or(|expires| self.now() > expires) {
            return Err(ServiceError::Aborted {
                reason: "this request was answered too long ago to be repeated".to_owned(),
                next_step: "ask again with a new request id".to_owned(),
            });
        }
        Ok(Asked::Before(Answered { outcome: remembered.outcome }))
    }

    /// As [`Self::asked`], for an act whose answer is its audit record: `past` is that, once it was
    /// read.
    ///
    /// # Errors
    /// As [`Self::asked`]; the request is being executed at this moment; or `past` is not the
    /// record of this request any more.
    pub(super) fn replay(&mut self, asking: &Asking, past: Option<&PastRecord>) -> Result<Replay, ServiceError> {
        match (self.asked(asking)?, past) {
            (Asked::First, None) => Ok(Replay::First),
            (Asked::Before(answered), None) => answered.record().map(Replay::Read),
            (Asked::Before(answered), Some(past)) if answered.record()? == past.name => Ok(Replay::Again),
            // Its row was purged between the two acts, or somebody removed it.
            (_, Some(_)) => Err(overtaken("the answer was forgotten")),
        }
    }

    /// Remembers that this request was answered by the first record of this act.
    pub fn answered(&mut self, asking: &Asking) {
        self.remember(asking, Vec::new(), true);
    }

    /// Remembers the answer itself. It never holds a key.
    pub fn answered_with(&mut self, asking: &Asking, answer: &impl Message) {
        self.remember(asking, answer.encode_to_vec(), false);
    }

    fn remember(&mut self, asking: &Asking, outcome: Vec<u8>, by_record: bool) {
        let expires = self.now().after(asking.window.milliseconds());
        self.put_request(asking.key.clone(), RequestRow { digest: asking.digest, outcome, expires }, by_record);
    }

    /// A mark of what was protected under a counter, for its record: a keyed digest, since who
    /// reads the log must not be able to guess at it.
    pub fn mark_content(&self, content: &[u8]) -> [u8; 16] {
        self.base.seal.current().mark_content(content)
    }

    /// Whether a recorded mark is of this content.
    pub fn is_marked(&self, mark: &[u8], content: &[u8]) -> bool {
        self.base.seal.accept(mark, |seal| seal.mark_content(content))
    }
}

/// What a request's row says, once its seal was verified.
pub(super) struct Remembered {
    pub(super) digest: [u8; 32],
    pub(super) outcome: Vec<u8>,
    /// Until when it can be repeated; `None` in a row of a version that did not seal it.
    pub(super) expires: Option<UnixMillis>,
}

/// An id names one request.
pub fn used_for_another() -> ServiceError {
    ServiceError::invalid("request_id", "it was used for another request; make a new one for each request")
}

/// The refusal of a repetition that could not be answered with the same again.
pub fn overtaken(what: &str) -> ServiceError {
    ServiceError::Aborted {
        reason: format!("{what} since this request was answered"),
        next_step: "ask again with a new request id".to_owned(),
    }
}

/// The refusal of a part that was refused when the request was answered: whatever has changed, a
/// repetition gives nothing new (I2, I8).
pub fn refused_before() -> ServiceError {
    ServiceError::Aborted {
        reason: "this was refused when the request was answered first".to_owned(),
        next_step: "ask again for what was refused, with a new request id".to_owned(),
    }
}
