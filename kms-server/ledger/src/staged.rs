//! What one act has staged: the changes that become part of the transaction if the act succeeds,
//! and how the changes of a failed item are undone.

use std::collections::{BTreeMap, HashMap};

use kms_domain::{RowId, UnixMillis};
use kms_proto::v1::audit_record::Event;
use kms_store::{
    FingerprintOwner, FingerprintPrefix, GrantRevocation, GrantRow, RequestKey, RequestRow, ShipmentRefusal,
    ShipmentRow, TaskKey, TaskRow,
};

use super::{chunks::ChunkName, decision::Kind, sealed::Opened};

/// What one act has staged. It is dropped if the act fails.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) rows: HashMap<RowId, Opened>,
    pub(super) events: Vec<Event>,
    /// Events that are recorded after the others: grants and requests refer to the first event of
    /// an act.
    pub(super) alerts: Vec<Event>,
    pub(super) requests: Vec<StagedRequest>,
    pub(super) grants: Vec<GrantRow>,
    pub(super) revocations: Vec<GrantRevocation>,
    pub(super) fingerprints: BTreeMap<FingerprintPrefix, Vec<FingerprintOwner>>,
    pub(super) shipments: Vec<ShipmentRow>,
    pub(super) refused_lines: Vec<ShipmentRefusal>,
    pub(super) tasks: HashMap<TaskKey, TaskRow>,
    /// The earlier state of what was replaced: [`Self::undo`] needs it.
    pub(super) log: Vec<StagedChange>,
}

/// What was answered to a request.
pub(super) struct StagedRequest {
    pub(super) key: RequestKey,
    pub(super) row: RequestRow,
    /// The outcome is the act's first record.
    pub(super) by_record: bool,
}

/// A change of something that is not only appended, with what was there before.
pub(super) enum StagedChange {
    /// A row was staged.
    Row(RowId, Option<Opened>),
    /// A task was staged.
    Task(TaskKey, Option<TaskRow>),
    /// A fingerprint was added.
    Fingerprint(FingerprintPrefix),
    /// Counters of a chunk were leased. The time is the end of the lease before.
    Lease(ChunkName, UnixMillis),
}

/// How much an act had staged at one moment.
pub(super) struct Savepoint {
    log: usize,
    events: usize,
    alerts: usize,
    requests: usize,
    grants: usize,
    revocations: usize,
    shipments: usize,
    refused_lines: usize,
}

impl Staged {
    /// I2: compares what is staged with the ending that the act has chosen. Whatever leaves the
    /// server, and every change of keys, rights and principals, must be on the record.
    pub(super) fn fault(&self, kind: Kind) -> Option<&'static str> {
        let of_right = !self.grants.is_empty()
            || !self.revocations.is_empty()
            || !self.refused_lines.is_empty()
            || self.log.iter().any(|change| !matches!(change, StagedChange::Task(..)));
        let in_progress = !self.tasks.is_empty() || !self.shipments.is_empty();
        match kind {
            Kind::Recorded if self.events.is_empty() => Some("is declared as recorded, but its entry was undone"),
            Kind::Progress if of_right => {
                Some("is declared as progress, but changes more than uploads and tasks, without a record")
            }
            Kind::Unchanged | Kind::Forgotten if of_right || in_progress || !self.events.is_empty() => {
                Some("is declared as unchanged, but changes something")
            }
            Kind::Recorded | Kind::Progress | Kind::Unchanged | Kind::Forgotten => None,
        }
    }

    pub(super) fn savepoint(&self) -> Savepoint {
        Savepoint {
            log: self.log.len(),
            events: self.events.len(),
            alerts: self.alerts.len(),
            requests: self.requests.len(),
            grants: self.grants.len(),
            revocations: self.revocations.len(),
            shipments: self.shipments.len(),
            refused_lines: self.refused_lines.len(),
        }
    }

    /// Undoes all that was staged since the savepoint. Returns the earlier ends of leases, newest
    /// change first: the chunks are not staged, so the caller puts these back.
    pub(super) fn undo(&mut self, before: &Savepoint) -> Vec<(ChunkName, UnixMillis)> {
        let mut leases = Vec::new();
        for change in self.log.drain(before.log..).rev() {
            match change {
                StagedChange::Row(id, Some(opened)) => drop(self.rows.insert(id, opened)),
                StagedChange::Row(id, None) => drop(self.rows.remove(&id)),
                StagedChange::Task(_, Some(row)) => drop(self.tasks.insert(row.key, row)),
                StagedChange::Task(key, None) => drop(self.tasks.remove(&key)),
                StagedChange::Fingerprint(prefix) => drop(self.fingerprints.get_mut(&prefix).and_then(Vec::pop)),
                StagedChange::Lease(name, until) => leases.push((name, until)),
            }
        }
        self.events.truncate(before.events);
        self.alerts.truncate(before.alerts);
        self.requests.truncate(before.requests);
        self.grants.truncate(before.grants);
        self.revocations.truncate(before.revocations);
        self.shipments.truncate(before.shipments);
        self.refused_lines.truncate(before.refused_lines);
        leases
    }
}
