//! What a transaction reads, what it finds, and what it writes.

use std::collections::HashMap;

use kms_domain::{CampaignId, GrantId, PrincipalId, SystemTitle, UnixMillis, WriterId};

use crate::{
    AuditAppend, AuditTail, ExposureCursor, ExposureRow, FingerprintOwner, FingerprintPrefix, GrantRow,
    MeterProjection, RequestKey, RequestRow, RowKind, SealedRow, ShipmentRefusal, ShipmentRow, SpooledFile, TaskKey,
    TaskRow, UploadId, WorkOrderColumns, WorkOrderCount, row::RowLock,
};

/// Rows to read in a transaction. Naming a row twice is harmless.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Meters' rows, up to 10,000.
    pub meters: Vec<SystemTitle>,
    /// Other sealed rows.
    pub sealed: Vec<(RowKind, Vec<u8>)>,
    /// Campaigns that are read and not written: transactions of several servers may lock them
    /// together. A campaign that is written is named in `sealed`.
    pub campaigns: Vec<CampaignId>,
    /// Requests that may have been executed already.
    pub requests: Vec<RequestKey>,
    /// Owners of keys that may have these fingerprints.
    pub fingerprints: Vec<FingerprintPrefix>,
    /// Grants.
    pub grants: Vec<GrantId>,
    /// Shipments in the spool.
    pub shipments: Vec<UploadId>,
    /// Every file in the spool: uploads, and files that are not imported yet. Only one transaction
    /// at a time reads them, so it alone adds a file.
    pub spool: bool,
    /// Tasks of campaigns.
    pub tasks: Vec<TaskKey>,
    /// How many work orders these principals have made whose time is not over and that have not
    /// ended. Only one transaction at a time reads the number of a principal, so it alone adds an
    /// order.
    pub work_orders_of: Vec<PrincipalId>,
    /// Rows that the index of exposures should have. Only a transaction that has read their sealed
    /// rows knows that nobody changes them.
    pub exposures: Vec<ExposureRow>,
    /// The last audit records of these writers.
    pub audit_tails: Vec<WriterId>,
    /// The database's clock.
    pub clock: bool,
}

impl Reads {
    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self == &Self::default()
    }

    /// Adds the rows of `more`.
    pub fn extend(&mut self, more: &Self) {
        self.meters.extend_from_slice(&more.meters);
        self.sealed.extend_from_slice(&more.sealed);
        self.campaigns.extend_from_slice(&more.campaigns);
        self.requests.extend_from_slice(&more.requests);
        self.fingerprints.extend_from_slice(&more.fingerprints);
        self.grants.extend_from_slice(&more.grants);
        self.shipments.extend_from_slice(&more.shipments);
        self.tasks.extend_from_slice(&more.tasks);
        self.work_orders_of.extend_from_slice(&more.work_orders_of);
        self.exposures.extend_from_slice(&more.exposures);
        self.audit_tails.extend_from_slice(&more.audit_tails);
        self.clock |= more.clock;
        self.spool |= more.spool;
    }

    /// Drops rows that were read already, and sorts the rest: all transactions lock in one order.
    pub(crate) fn normalise(&mut self, known: &ReadSet) {
        tidy(&mut self.meters, |title| known.meters.contains_key(title));
        tidy(&mut self.sealed, |name| known.sealed.contains_key(name));
        tidy(&mut self.campaigns, |id| known.sealed.contains_key(&campaign_name(*id)));
        tidy(&mut self.requests, |key| known.requests.contains_key(key));
        tidy(&mut self.fingerprints, |prefix| known.fingerprints.contains_key(prefix));
        tidy(&mut self.grants, |id| known.grants.contains_key(id));
        tidy(&mut self.shipments, |upload| known.shipments.contains_key(upload));
        tidy(&mut self.tasks, |key| known.tasks.contains_key(key));
        tidy(&mut self.work_orders_of, |maker| known.work_orders_of.contains_key(maker));
        tidy(&mut self.exposures, |row| known.exposures.contains_key(row));
        self.clock &= known.clock.is_none();
        self.spool &= known.spool.is_none();
        tidy(&mut self.audit_tails, |writer| known.audit_tails.contains_key(writer));
    }

    /// The ranks of the locks that these reads take, in the one order in which all transactions
    /// lock.
    pub(crate) fn lock_ranks(&self) -> impl Iterator<Item = LockRank> {
        let sealed = |lock| self.sealed.iter().any(|(kind, _)| kind.lock() == lock);
        [
            (LockRank::Spool, self.spool),
            (LockRank::WorkOrderCounts, !self.work_orders_of.is_empty()),
            (LockRank::Fingerprints, !self.fingerprints.is_empty()),
            (LockRank::Meters, !self.meters.is_empty()),
            (LockRank::SharedRows, sealed(RowLock::Shared)),
            (LockRank::ExclusiveRows, sealed(RowLock::Exclusive)),
            (LockRank::Campaigns, sealed(RowLock::Campaign) || !self.campaigns.is_empty()),
            (LockRank::Grants, !self.grants.is_empty()),
            (LockRank::Shipments, !self.shipments.is_empty()),
            (LockRank::Tasks, !self.tasks.is_empty()),
        ]
        .into_iter()
        .filter_map(|(rank, locked)| locked.then_some(rank))
    }
}

/// The order in which transactions lock. Transactions that keep it do not deadlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LockRank {
    Spool,
    WorkOrderCounts,
    Fingerprints,
    Meters,
    SharedRows,
    ExclusiveRows,
    Campaigns,
    Absences,
    Grants,
    Shipments,
    Tasks,
}

/// One row of a [`ReadSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup<'a, T> {
    /// It was not read: name it in [`Decision::More`].
    NotRead,
    /// It does not exist.
    Absent,
    /// It exists.
    Present(&'a T),
}

impl<'a, T> Lookup<'a, T> {
    /// The row, if it was read and exists.
    pub const fn present(self) -> Option<&'a T> {
        match self {
            Self::Present(row) => Some(row),
            Self::NotRead | Self::Absent => None,
        }
    }

    fn of<K: Eq + std::hash::Hash>(rows: &'a HashMap<K, Option<T>>, key: &K) -> Self {
        match rows.get(key) {
            None => Self::NotRead,
            Some(None) => Self::Absent,
            Some(Some(row)) => Self::Present(row),
        }
    }
}

/// What a transaction has read. The rows do not change in the database until the transaction ends,
/// and absent rows stay absent.
#[derive(Debug, Default)]
pub struct ReadSet {
    pub(crate) meters: HashMap<SystemTitle, Option<SealedRow>>,
    pub(crate) sealed: HashMap<(RowKind, Vec<u8>), Option<SealedRow>>,
    pub(crate) requests: HashMap<RequestKey, Option<RequestRow>>,
    pub(crate) fingerprints: HashMap<FingerprintPrefix, Vec<FingerprintOwner>>,
    pub(crate) grants: HashMap<GrantId, Option<GrantRow>>,
    pub(crate) shipments: HashMap<UploadId, Option<ShipmentRow>>,
    pub(crate) tasks: HashMap<TaskKey, Option<TaskRow>>,
    pub(crate) work_orders_of: HashMap<PrincipalId, WorkOrderCount>,
    pub(crate) exposures: HashMap<ExposureRow, bool>,
    pub(crate) audit_tails: HashMap<WriterId, Option<AuditTail>>,
    pub(crate) clock: Option<UnixMillis>,
    pub(crate) spool: Option<Vec<SpooledFile>>,
    /// The rank of the last lock.
    pub(crate) locked: Option<LockRank>,
}

impl ReadSet {
    /// A meter's row.
    pub fn meter(&self, title: SystemTitle) -> Lookup<'_, SealedRow> {
        Lookup::of(&self.meters, &title)
    }

    /// All meters that were read, in no order.
    pub fn meters(&self) -> impl Iterator<Item = (SystemTitle, Lookup<'_, SealedRow>)> {
        self.meters.iter().map(|(title, row)| (*title, row.as_ref().map_or(Lookup::Absent, Lookup::Present)))
    }

    /// Another sealed row.
    pub fn sealed(&self, kind: RowKind, id: &[u8]) -> Lookup<'_, SealedRow> {
        Lookup::of(&self.sealed, &(kind, id.to_vec()))
    }

    /// A request's outcome.
    pub fn request(&self, key: &RequestKey) -> Lookup<'_, RequestRow> {
        Lookup::of(&self.requests, key)
    }

    /// The key versions with this fingerprint prefix. `None`: it was not read. Empty: there are
    /// none.
    pub fn fingerprint_owners(&self, prefix: FingerprintPrefix) -> Option<&[FingerprintOwner]> {
        self.fingerprints.get(&prefix).map(Vec::as_slice)
    }

    /// A grant.
    pub fn grant(&self, id: GrantId) -> Lookup<'_, GrantRow> {
        Lookup::of(&self.grants, &id)
    }

    /// A shipment.
    pub fn shipment(&self, upload: UploadId) -> Lookup<'_, ShipmentRow> {
        Lookup::of(&self.shipments, &upload)
    }

    /// The files in the spool. `None`: they were not read.
    pub fn spool(&self) -> Option<&[SpooledFile]> {
        self.spool.as_deref()
    }

    /// A task.
    pub fn task(&self, key: TaskKey) -> Lookup<'_, TaskRow> {
        Lookup::of(&self.tasks, &key)
    }

    /// How many work orders of a principal count. `None`: it was not read.
    pub fn work_orders_of(&self, maker: &PrincipalId) -> Option<WorkOrderCount> {
        self.work_orders_of.get(maker).copied()
    }

    /// Whether the index of exposures has exactly this row. `None`: it was not read.
    pub fn has_exposure(&self, row: &ExposureRow) -> Option<bool> {
        self.exposures.get(row).copied()
    }

    /// The database's clock when the rows were read. `None`: it was not read.
    pub const fn clock(&self) -> Option<UnixMillis> {
        self.clock
    }

    /// The last audit record of a writer; absent if it has written none.
    pub fn audit_tail(&self, writer: WriterId) -> Lookup<'_, AuditTail> {
        Lookup::of(&self.audit_tails, &writer)
    }
}

/// What the caller decides on the rows that were read.
#[derive(Debug)]
pub enum Decision {
    /// Read these too, then decide again. Rows that were read before are kept.
    More(Box<Reads>),
    /// Write, in the same transaction.
    Commit(Box<Changes>),
    /// End without writing.
    Abandon,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// Everything in [`Changes`] is durable.
    Written,
    /// The decision was [`Decision::Abandon`].
    Nothing,
}

/// What a transaction writes: all of it, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Meters' rows.
    pub meters: Vec<MeterPut>,
    /// Other sealed rows.
    pub sealed: Vec<SealedPut>,
    /// Requests executed.
    pub requests: Vec<RequestPut>,
    /// Grants issued. A conflict if an id exists.
    pub grants: Vec<GrantRow>,
    /// Grants revoked.
    pub revocations: Vec<GrantRevocation>,
    /// Fingerprints of new keys.
    pub fingerprints: Vec<FingerprintPut>,
    /// Shipments' progress. Generation 1 inserts a shipment. Others are written only over the
    /// generation before.
    pub shipments: Vec<ShipmentRow>,
    /// Refused lines.
    pub refusals: Vec<ShipmentRefusal>,
    /// Tasks. Generation 1 inserts a task. Others are written only over the generation before.
    pub tasks: Vec<TaskRow>,
    /// The search columns of the work orders among the sealed rows.
    pub work_orders: Vec<WorkOrderColumns>,
    /// Rows of the index of exposures: they repeat rows that this transaction writes, or has read.
    pub exposures: Vec<ExposureRow>,
    /// Rows of the index that repeat nothing.
    pub exposures_gone: Vec<ExposureCursor>,
    /// I2: the records of all these changes.
    pub audit: Vec<AuditAppend>,
}

/// A meter's new row. It is written only over the generation before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeterPut {
    pub(crate) title: SystemTitle,
    pub(crate) row: SealedRow,
    pub(crate) projection: Option<MeterProjection>,
}

impl MeterPut {
    /// A meter that is not known yet; `row.generation` is 1.
    pub const fn insert(title: SystemTitle, row: SealedRow, projection: MeterProjection) -> Self {
        Self { title, row, projection: Some(projection) }
    }

    /// A new generation, the usual case. The search columns stay as they are, which saves two index
    /// pages for each row.
    pub const fn update(title: SystemTitle, row: SealedRow) -> Self {
        Self { title, row, projection: None }
    }

    /// A new generation with new search columns.
    pub const fn update_projection(title: SystemTitle, row: SealedRow, projection: MeterProjection) -> Self {
        Self { title, row, projection: Some(projection) }
    }

    /// The meter.
    pub const fn title(&self) -> SystemTitle {
        self.title
    }

    /// The row.
    pub const fn row(&self) -> &SealedRow {
        &self.row
    }
}

/// A new generation of a sealed row other than a meter's. Generation 1 inserts it. Others are
/// written only over the generation before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedPut {
    /// Its kind.
    pub kind: RowKind,
    /// Its id within the kind.
    pub id: Vec<u8>,
    /// The row.
    pub row: SealedRow,
}

/// A request that was executed. A conflict if its key exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestPut {
    /// The request.
    pub key: RequestKey,
    /// Its outcome.
    pub row: RequestRow,
}

/// A revocation. A conflict if the grant does not exist or was revoked already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantRevocation {
    /// The grant.
    pub id: GrantId,
    /// When it was revoked.
    pub revoked: UnixMillis,
}

/// A new key's fingerprint. A conflict if the same owner has it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FingerprintPut {
    /// The fingerprint's prefix.
    pub prefix: FingerprintPrefix,
    /// The key version.
    pub owner: FingerprintOwner,
}

/// The name of a campaign's row.
pub(crate) fn campaign_name(id: CampaignId) -> (RowKind, Vec<u8>) {
    (RowKind::Campaign, id.octets().to_vec())
}

fn tidy<T: Ord>(names: &mut Vec<T>, known: impl Fn(&T) -> bool) {
    names.retain(|name| !known(name));
    names.sort_unstable();
    names.dedup();
}
