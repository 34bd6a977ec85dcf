//! What the tables hold: opaque sealed rows, the log, and the other rows of the server.

use kms_domain::{
    CampaignId, GrantId, KeyType, KeyVersionNumber, Owner, PrincipalId, RequestId, SealKey, SecuritySetupId,
    SystemTitle, Task, TaskState, UnixMillis, WorkOrderId, WorkOrderState, WriterId,
};

/// A sealed row as it is stored. The store does not read its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedRow {
    /// Grows by one with each write, from 1.
    pub generation: u64,
    /// `format(1) ‖ seal key version(1) ‖ MAC(16)` (docs/formats.md, *Sealed rows*).
    pub seal: [u8; 18],
    /// The protobuf that the seal covers.
    pub body: Vec<u8>,
}

/// A meter and its row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeterRow {
    /// The meter.
    pub title: SystemTitle,
    /// Its row.
    pub row: SealedRow,
}

/// The kinds of sealed rows other than meters'; the numbers of docs/formats.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RowKind {
    /// A group of meters.
    Group,
    /// A device type.
    DeviceType,
    /// A principal.
    Principal,
    /// A counter domain.
    CounterDomain,
    /// The island.
    Island,
    /// What a principal has used of its quotas.
    QuotaUse,
    /// A campaign.
    Campaign,
    /// The rotation to a version of a root.
    RootRotation,
    /// A proposal.
    Proposal,
    /// The last invitation of a handheld.
    Invitation,
    /// A work order.
    WorkOrder,
}

impl RowKind {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Group,
        Self::DeviceType,
        Self::Principal,
        Self::CounterDomain,
        Self::Island,
        Self::QuotaUse,
        Self::Campaign,
        Self::RootRotation,
        Self::Proposal,
        Self::Invitation,
        Self::WorkOrder,
    ];

    /// The kind's number in the seal's input and in the database.
    pub const fn number(self) -> u8 {
        match self {
            Self::Group => 2,
            Self::DeviceType => 3,
            Self::Principal => 4,
            Self::CounterDomain => 5,
            Self::Island => 6,
            Self::QuotaUse => 7,
            Self::Campaign => 8,
            Self::RootRotation => 9,
            Self::Proposal => 12,
            Self::Invitation => 13,
            Self::WorkOrder => 14,
        }
    }

    /// The kind in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::DeviceType => "device type",
            Self::Principal => "principal",
            Self::CounterDomain => "counter domain",
            Self::Island => "island",
            Self::QuotaUse => "quota use",
            Self::Campaign => "campaign",
            Self::RootRotation => "root rotation",
            Self::Proposal => "proposal",
            Self::Invitation => "invitation",
            Self::WorkOrder => "work order",
        }
    }

    /// How a transaction locks the rows of this kind that it reads.
    pub(crate) const fn lock(self) -> RowLock {
        match self {
            Self::CounterDomain
            | Self::QuotaUse
            | Self::RootRotation
            | Self::Proposal
            | Self::Invitation
            | Self::WorkOrder => RowLock::Exclusive,
            Self::Campaign => RowLock::Campaign,
            _ => RowLock::Shared,
        }
    }
}

/// How a transaction locks sealed rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowLock {
    /// Many transactions read them, and few write them: transactions of several servers may lock
    /// them together.
    Shared,
    /// They are read to be written: one transaction at a time.
    Exclusive,
    /// Shared or exclusive, as the transaction requests.
    Campaign,
}

/// The search columns of a meter, which repeat parts of its sealed body. They are for finding,
/// never for deciding (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeterProjection {
    /// The manufacturer's FLAG id.
    pub vendor: String,
    /// The device profile's name.
    pub profile: String,
    /// The status, as the caller numbers it.
    pub status: u8,
    /// The assigned head-end's URI.
    pub head_end: Option<String>,
    /// The shipment's batch.
    pub batch: Option<String>,
    /// The numbers of its groups, each once.
    pub groups: Vec<u64>,
}

/// Selects meters. Empty: all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MeterFilter {
    /// Of this manufacturer.
    pub vendor: Option<String>,
    /// With this device profile.
    pub profile: Option<String>,
    /// In this status.
    pub status: Option<u8>,
    /// By the assigned head-end.
    pub head_end: Assigned,
    /// Of this batch.
    pub batch: Option<String>,
    /// In the group with this number.
    pub group: Option<u64>,
}

/// Selects meters by their head-end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Assigned {
    /// Assigned or not.
    #[default]
    Any,
    /// To no head-end.
    ToNone,
    /// To the head-end with this URI.
    To(String),
}

/// The search columns of a work order, which repeat parts of its sealed body. They are for finding,
/// never for deciding (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkOrderColumns {
    /// The order.
    pub id: WorkOrderId,
    /// The principal that made it.
    pub maker: PrincipalId,
    /// The technician, as [`kms_domain::PersonName::folded`] writes the name.
    pub technician: String,
    /// Whether it has ended.
    pub end: WorkOrderEnding,
    /// The begin of its time.
    pub from: UnixMillis,
    /// The end of its time.
    pub until: UnixMillis,
}

/// A work order and its row, with its place in the order of [`crate::Store::work_order_page`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkOrderRow {
    /// The order.
    pub id: WorkOrderId,
    /// The begin of its time, as the search columns have it.
    pub from: UnixMillis,
    /// Its row.
    pub row: SealedRow,
}

/// The work orders of a principal that count under its bound: their time is not over, or has been
/// for less than [`kms_domain::WorkOrder::COUNTED_MS`], whether they ended or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkOrderCount {
    /// How many.
    pub orders: u64,
    /// The first end of their times; `None`: there is none.
    pub first_until: Option<UnixMillis>,
}

/// Whether a work order has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkOrderEnding {
    /// It has not.
    None,
    /// It was completed.
    Completed,
    /// It was cancelled.
    Cancelled,
}

impl WorkOrderEnding {
    pub(crate) const fn number(self) -> i64 {
        match self {
            Self::None => 0,
            Self::Completed => 1,
            Self::Cancelled => 2,
        }
    }
}

/// Selects work orders. Empty: all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkOrderFilter {
    /// Of this technician, as [`kms_domain::PersonName::folded`] writes the name.
    pub technician: Option<String>,
    /// Made by this principal.
    pub maker: Option<PrincipalId>,
    /// In this state at this time.
    pub state: Option<(WorkOrderState, UnixMillis)>,
    /// Whose time ends after this moment.
    pub ends_after: Option<UnixMillis>,
    /// Whose time begins before this moment.
    pub begins_before: Option<UnixMillis>,
}

/// A record to append to the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditAppend {
    /// The run of the server that writes it.
    pub writer: WriterId,
    /// Its number in that run, from 0.
    pub sequence: u64,
    /// When it was made.
    pub time: UnixMillis,
    /// The kind of record, as the caller numbers it: for searching only.
    pub kind: u16,
    /// The encoded record.
    pub record: Vec<u8>,
    /// The chain value after it (docs/formats.md, *Audit records*).
    pub chain: [u8; 32],
}

/// A record of the log, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRow {
    /// Its place in the order of [`crate::Store::audit_page`].
    pub cursor: AuditCursor,
    /// The record.
    pub record: AuditAppend,
}

/// A place in the order of the log, which does not depend on the clocks of servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AuditCursor(
    /// The record's number in this database: records are numbered as they are written.
    pub i64,
);

/// Selects records of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Of this kind.
    pub kind: Option<u16>,
    /// Of this writer.
    pub writer: Option<WriterId>,
    /// The newest first.
    pub newest_first: bool,
}

/// The last record of a writer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditTail {
    /// The writer.
    pub writer: WriterId,
    /// The last record's sequence.
    pub sequence: u64,
    /// The chain value after it.
    pub chain: [u8; 32],
}

/// Names one chunk of an idempotent request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey {
    /// The caller.
    pub principal: PrincipalId,
    /// The id that the caller gave.
    pub request: RequestId,
    /// The chunk of a batch, from 0.
    pub chunk: u32,
}

/// What was answered to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRow {
    /// Digest of the request: another request under the same id is refused.
    pub digest: [u8; 32],
    /// What a replay needs. Never wrapped keys.
    pub outcome: Vec<u8>,
    /// After this time the row may be removed.
    pub expires: UnixMillis,
}

/// A grant, as the list of grants shows it. What it exposed is in the sealed rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantRow {
    /// The grant: a UUID version 7, so that grants are stored in order of time.
    pub id: GrantId,
    /// The grantee.
    pub principal: PrincipalId,
    /// The purpose that was stated.
    pub purpose: String,
    /// When it was issued.
    pub issued: UnixMillis,
    /// When it ends.
    pub not_after: UnixMillis,
    /// Where its record is in the log (I2).
    pub audit: AuditReference,
    /// How many meters it covers.
    pub meters: u32,
    /// When it was revoked.
    pub revoked: Option<UnixMillis>,
}

/// Names a record of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AuditReference {
    /// The writer.
    pub writer: WriterId,
    /// The record's number.
    pub sequence: u64,
}

/// Selects grants, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrantFilter {
    /// Of this principal.
    pub principal: Option<PrincipalId>,
    /// Issued from then on.
    pub issued_from: Option<UnixMillis>,
    /// Issued before.
    pub issued_before: Option<UnixMillis>,
    /// Not revoked, and ending after this time.
    pub live_at: Option<UnixMillis>,
}

/// The first 8 octets of a key fingerprint (docs/formats.md, *Key fingerprints*). Different keys
/// can have the same prefix: compare the whole fingerprint, which the owners' rows hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FingerprintPrefix(pub [u8; 8]);

impl FingerprintPrefix {
    /// The prefix of a fingerprint.
    pub const fn of(fingerprint: &[u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = *fingerprint;
        Self([a, b, c, d, e, f, g, h])
    }

    pub(crate) const fn as_i64(self) -> i64 {
        i64::from_be_bytes(self.0)
    }
}

/// A key version whose fingerprint is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FingerprintOwner {
    /// The owner of the key.
    pub owner: Owner,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key's type.
    pub key_type: KeyType,
    /// The key's version.
    pub version: KeyVersionNumber,
}

/// Names one upload of a shipment: a UUID's octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UploadId(pub [u8; 16]);

/// The progress of a shipment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ShipmentState {
    /// Octets are being received.
    Receiving,
    /// All octets were received. Nothing is verified.
    Received,
    /// Signature, digest and count were verified. Devices are being imported.
    Importing,
    /// Every line was imported or refused.
    Imported,
    /// The whole file was refused.
    Refused,
}

impl ShipmentState {
    pub(crate) const fn number(self) -> i64 {
        match self {
            Self::Receiving => 1,
            Self::Received => 2,
            Self::Importing => 3,
            Self::Imported => 4,
            Self::Refused => 5,
        }
    }

    pub(crate) fn from_number(number: i64) -> Option<Self> {
        [Self::Receiving, Self::Received, Self::Importing, Self::Imported, Self::Refused]
            .into_iter()
            .find(|state| state.number() == number)
    }
}

/// A shipment in the spool, from which any server can resume it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShipmentRow {
    /// The upload.
    pub upload: UploadId,
    /// Grows by one with each write, from 1: two servers cannot import the same lines.
    pub generation: u64,
    /// SHA-256 of the file, as the sender announced it.
    pub sha256: [u8; 32],
    /// Length of the file in octets, as the sender announced it.
    pub size: u64,
    /// The batch that the header names; empty while it is not known.
    pub batch: String,
    /// The principal that uploads it.
    pub principal: PrincipalId,
    /// Its progress.
    pub state: ShipmentState,
    /// Octets in the spool.
    pub received: u64,
    /// The line that is imported next.
    pub next_line: u64,
    /// Devices imported.
    pub imported: u64,
    /// Lines refused.
    pub refused: u64,
    /// When the upload began.
    pub created: UnixMillis,
    /// When it last advanced.
    pub updated: UnixMillis,
    /// What else the importer needs to resume. The store does not read it.
    pub progress: Vec<u8>,
}

/// A file whose octets are, or will be, in the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpooledFile {
    /// The upload.
    pub upload: UploadId,
    /// The principal that uploads it.
    pub principal: PrincipalId,
    /// Its length in octets, as the sender announced it.
    pub size: u64,
    /// Octets that have arrived.
    pub received: u64,
}

/// A line of a shipment that was not imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShipmentRefusal {
    /// The upload.
    pub upload: UploadId,
    /// The line, from 1.
    pub line: u64,
    /// The field at fault.
    pub field: String,
    /// Why.
    pub reason: String,
}

/// Names a task: a meter of a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskKey {
    /// The campaign.
    pub campaign: CampaignId,
    /// The meter.
    pub meter: SystemTitle,
}

/// A task of a campaign for one meter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskRow {
    /// Its name.
    pub key: TaskKey,
    /// Grows by one with each write, from 1.
    pub generation: u64,
    /// The wave, from 1.
    pub wave: u32,
    /// The FLAG id of the meter's vendor.
    pub vendor: String,
    /// The URI of the head-end that the meter is assigned to.
    pub head_end: Option<String>,
    /// Binds the row: see [`Self::mark_by`].
    pub mark: [u8; 16],
    /// Its work and state.
    pub task: Task,
}

impl TaskRow {
    /// The mark of this row as it is.
    pub fn mark_by(&self, key: &SealKey) -> [u8; 16] {
        let head_end = self.head_end.as_deref().unwrap_or_default();
        key.seal_task(self.key.campaign, self.key.meter, self.wave, self.generation, head_end, &self.task)
    }

    /// The mark of rows of earlier servers, which binds campaign, meter and wave only.
    pub fn former_mark_by(&self, key: &SealKey) -> [u8; 16] {
        key.seal_former_task(self.key.campaign, self.key.meter, self.wave)
    }
}

/// Selects tasks of a campaign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskFilter {
    /// All.
    #[default]
    All,
    /// In this state.
    State(TaskState),
    /// It is in doubt what the meter holds, or will be if the present step has no result.
    InDoubt,
}

/// The number of tasks with the same wave, vendor, state and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskTally {
    /// The wave, from 1.
    pub wave: u32,
    /// The FLAG id of the vendor.
    pub vendor: String,
    /// Their state.
    pub state: TaskState,
    /// Why the last attempt failed; empty if it did not.
    pub reason: String,
    /// How many.
    pub tasks: u64,
}

/// The load of a head-end in a campaign, by the database's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskLoad {
    /// Tasks whose lease it holds.
    pub in_flight: u64,
    /// Tasks that it leased within the last minute.
    pub leased_in_minute: u64,
}

/// A PIN that a token refused. It is not tried again until it is changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinFailure {
    /// The token's serial number and label.
    pub token: String,
    /// CKU_SO or CKU_USER.
    pub user_type: u8,
    /// Argon2id of the PIN in PHC string format, with a salt of its own.
    pub phc: String,
    /// When it failed.
    pub time: UnixMillis,
}

/// A run of a server. Times are the database's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerRow {
    /// The run.
    pub writer: WriterId,
    /// The server's name.
    pub name: String,
    /// When it registered.
    pub started: UnixMillis,
    /// The time of its last heartbeat.
    pub heartbeat: UnixMillis,
    /// Milliseconds since then by the database's clock.
    pub silent_ms: i64,
}

/// The size of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tables and indexes, octets.
    pub database: u64,
    /// The write-ahead log, octets; 0 if the database does not report it.
    pub log: u64,
}
