//! The draft of a transaction: what one attempt has read, and what its acts have changed so far.

use std::collections::{BTreeMap, HashMap};

use kms_domain::{ChunkSize, CounterCap, CounterJump, IslandName, RowId, SealKeys, UnixMillis, WriterId};
use kms_proto::v1::AuditRecord;
use kms_store::{
    FingerprintOwner, FingerprintPrefix, GrantRevocation, GrantRow, Lookup, ReadSet, Reads, RequestKey, RequestRow,
    ShipmentRefusal, ShipmentRow, TaskKey, TaskRow, UploadId,
};

use super::{
    actor::Actor,
    chunks::{ChunkName, Chunks, HeldChunk},
    decision::Kind,
    refusals::Refusal,
    sealed::{Opened, open_row, sealed_name},
    seen::Seen,
    shared::Shared,
    staged::Staged,
};
use kms_base::error::ServiceError;

/// What one attempt at a transaction has read, and what its acts have changed so far.
pub(super) struct TransactionDraft<'a> {
    pub(super) read: &'a ReadSet,
    pub(super) now: UnixMillis,
    pub(super) island: &'a IslandName,
    pub(super) seal: &'a SealKeys,
    pub(super) writer: WriterId,
    pub(super) chunk_size: ChunkSize,
    pub(super) counter_cap: CounterCap,
    /// By how much restores have raised all counters.
    pub(super) jump: CounterJump,
    pub(super) seen: &'a Seen,
    pub(super) chunks: &'a mut Chunks,
    /// Chunks whose reservation this transaction writes. Later transactions allocate from them only
    /// if it commits.
    pub(super) fresh_chunks: HashMap<ChunkName, HeldChunk>,
    pub(super) rows: HashMap<RowId, Opened>,
    /// What was used and not read: the transaction reads it and decides again.
    pub(super) missing: Reads,
    pub(super) events: Vec<RecordedEvent>,
    pub(super) requests: HashMap<RequestKey, RequestRow>,
    /// The first event of the act that executed the request.
    pub(super) request_events: HashMap<RequestKey, usize>,
    pub(super) grants: Vec<(GrantRow, usize)>,
    pub(super) revocations: Vec<GrantRevocation>,
    /// In order of prefixes: an import stages thousands, and the database inserts them faster in
    /// order.
    pub(super) fingerprints: BTreeMap<FingerprintPrefix, Vec<FingerprintOwner>>,
    pub(super) shipments: HashMap<UploadId, ShipmentRow>,
    pub(super) refused_lines: Vec<ShipmentRefusal>,
    /// Tasks in the generation that is to be written.
    pub(super) tasks: HashMap<TaskKey, TaskRow>,
    pub(super) refusals: Vec<Refusal>,
}

/// An event with the rows that its act wrote.
pub(super) struct RecordedEvent {
    pub(super) record: AuditRecord,
    pub(super) written: Vec<RowId>,
    /// The place of the act in the transaction.
    pub(super) act: usize,
}

/// Why a row cannot be used.
pub(super) enum OpenError {
    /// It was not read yet.
    NotRead,
    /// It was refused (I5), for this reason.
    Refused(String),
}

impl<'a> TransactionDraft<'a> {
    /// An empty draft over the rows that were read.
    pub(super) fn new(
        read: &'a ReadSet,
        now: UnixMillis,
        writer: WriterId,
        shared: &'a Shared,
        seal: &'a SealKeys,
        chunks: &'a mut Chunks,
    ) -> Self {
        Self {
            read,
            now,
            island: &shared.settings.island,
            seal,
            writer,
            chunk_size: shared.settings.chunk_size,
            counter_cap: shared.settings.limits.counter_cap(),
            jump: shared.history.borrow().map_or(CounterJump::NONE, |history| history.jump),
            seen: &shared.seen,
            chunks,
            fresh_chunks: HashMap::new(),
            rows: HashMap::new(),
            missing: Reads::default(),
            events: Vec::new(),
            requests: HashMap::new(),
            request_events: HashMap::new(),
            grants: Vec::new(),
            revocations: Vec::new(),
            fingerprints: BTreeMap::new(),
            shipments: HashMap::new(),
            refused_lines: Vec::new(),
            tasks: HashMap::new(),
            refusals: Vec::new(),
        }
    }

    /// Opens a row from the database: present in the generation that this server knows, or newer,
    /// and with a fitting seal (I5).
    pub(super) fn open(&mut self, id: &RowId) -> Result<Opened, OpenError> {
        let lookup = match id {
            RowId::Meter(title) => self.read.meter(*title),
            other => {
                let (kind, octets) = sealed_name(other);
                self.read.sealed(kind, &octets)
            }
        };
        let row = match lookup {
            Lookup::Present(row) => Some(row),
            Lookup::Absent => None,
            Lookup::NotRead => {
                match id {
                    RowId::Meter(title) => self.missing.meters.push(*title),
                    // An act that writes a campaign has named its row beforehand.
                    RowId::Campaign(id) => self.missing.campaigns.push(*id),
                    other => self.missing.sealed.push(sealed_name(other)),
                }
                return Err(OpenError::NotRead);
            }
        };
        open_row(id, row, self.seal, self.seen, self.island).map_err(OpenError::Refused)
    }

    /// Takes over what a decided act has staged.
    ///
    /// # Errors
    /// I2: what is staged does not fit the ending that the act has chosen.
    pub(super) fn accept(
        &mut self,
        number: usize,
        actor: &Actor,
        staged: Staged,
        kind: Kind,
    ) -> Result<(), ServiceError> {
        if let Some(fault) = staged.fault(kind) {
            return Err(ServiceError::Internal(format!("the act `{}` {fault} (I2)", actor.action)));
        }
        let mut written: Vec<RowId> = staged.rows.keys().cloned().collect();
        written.sort_by_cached_key(|id| (id.kind(), id.to_string()));
        self.rows.extend(staged.rows);
        let first_event = self.events.len();
        for (place, event) in staged.events.into_iter().chain(staged.alerts).enumerate() {
            let record = AuditRecord {
                principal: actor.principal_text(),
                certificate_sha256: actor.certificate_sha256.map(|digest| digest.to_vec().into()).unwrap_or_default(),
                request_id: actor.request.map(|id| id.octets().to_vec().into()).unwrap_or_default(),
                event: Some(event),
                ..AuditRecord::default()
            };
            // The first record of an act names the rows.
            let written = if place == 0 { std::mem::take(&mut written) } else { Vec::new() };
            self.events.push(RecordedEvent { record, written, act: number });
        }
        self.request_events.extend(
            staged
                .requests
                .iter()
                .filter(|request| request.by_record)
                .map(|request| (request.key.clone(), first_event)),
        );
        self.requests.extend(staged.requests.into_iter().map(|request| (request.key, request.row)));
        self.grants.extend(staged.grants.into_iter().map(|grant| (grant, first_event)));
        self.revocations.extend(staged.revocations);
        for (prefix, mut owners) in staged.fingerprints {
            self.fingerprints.entry(prefix).or_default().append(&mut owners);
        }
        self.shipments.extend(staged.shipments.into_iter().map(|row| (row.upload, row)));
        self.refused_lines.extend(staged.refused_lines);
        self.tasks.extend(staged.tasks);
        Ok(())
    }
}
