//! [`Store`]: everything that the server asks of its database.

use async_trait::async_trait;
use kms_domain::{
    CampaignId, GrantId, PrincipalId, SystemTitle, TaskState, Timeline, UnixMillis, WorkOrderId, WriterId,
};

use crate::{
    AuditAppend, AuditCursor, AuditFilter, AuditRow, AuditTail, Committed, Decision, ExposureCursor, ExposureOwner,
    ExposureParty, ExposureRow, ExposureTotals, FingerprintOwner, FingerprintPrefix, GrantFilter, GrantRow,
    MeterFilter, MeterRow, PinFailure, ReadSet, Reads, RowKind, SealedRow, ServerRow, ShipmentRefusal, ShipmentRow,
    Sizes, StoreError, TaskFilter, TaskLoad, TaskRow, TaskTally, UploadId, WorkOrderColumns, WorkOrderFilter,
    WorkOrderRow,
};

/// The database of one island.
///
/// Every call answers within [`crate::StoreConfig::call_timeout`], with [`StoreError::Unavailable`]
/// if the database does not (I2: a stuck log makes the server not ready, it does not hang callers).
#[async_trait]
pub trait Store: Send + Sync {
    /// Whether several servers may use the database at once. An SQLite database belongs to one
    /// process.
    fn is_shared(&self) -> bool;

    /// Reads rows and writes what `decide` returns, in one transaction: what was read has not
    /// changed when the changes are written, and absent rows are still absent. When this returns
    /// [`Committed::Written`], the changes are on disk (I2, I3, I4).
    ///
    /// `decide` is called again after [`Decision::More`], and from the start when the transaction
    /// of another server came in between. It must depend on the [`ReadSet`] only. The database
    /// waits meanwhile, so it should take microseconds for each row.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a row is not in the generation before the one that is written,
    /// or exists although it must not; [`StoreError::Contention`] after several attempts that
    /// conflicted with other servers; [`StoreError::Unavailable`], after which it is not known
    /// whether the changes are durable.
    async fn transact(
        &self,
        reads: Reads,
        decide: &mut (dyn for<'a> FnMut(&'a ReadSet) -> Decision + Send),
    ) -> Result<Committed, StoreError>;

    /// The rows of meters, in order of their titles as signed integers; unknown ones are left out.
    async fn meters(&self, titles: &[SystemTitle]) -> Result<Vec<MeterRow>, StoreError>;

    /// Reads what [`Self::sealed`] and [`Self::meters`] read, in one statement. A statement costs
    /// more than its rows, and a call that only reads needs the row of its caller and those of its
    /// meters.
    async fn sealed_and_meters(
        &self,
        kind: RowKind,
        id: &[u8],
        titles: &[SystemTitle],
    ) -> Result<(Option<SealedRow>, Vec<MeterRow>), StoreError>;

    /// Up to `limit` meters after a title, in order of titles as signed integers. With an empty
    /// filter: what the scrubber walks (I5).
    async fn meter_page(
        &self,
        filter: &MeterFilter,
        after: Option<SystemTitle>,
        limit: u32,
    ) -> Result<Vec<MeterRow>, StoreError>;

    /// Adds missing search columns that say which meters are in which groups, each meter with the
    /// number of one group. Returns how many were missing. Transactions that write meters write
    /// these columns: this repairs columns that were lost, or that an earlier version did not
    /// write.
    async fn complete_group_members(&self, members: &[(SystemTitle, u64)]) -> Result<u64, StoreError>;

    /// The number of meters that match. Reads an index or the whole table.
    async fn meter_count(&self, filter: &MeterFilter) -> Result<u64, StoreError>;

    /// One sealed row other than a meter's.
    async fn sealed(&self, kind: RowKind, id: &[u8]) -> Result<Option<SealedRow>, StoreError>;

    /// Up to `limit` sealed rows of a kind after an id, in order of ids.
    async fn sealed_page(
        &self,
        kind: RowKind,
        after: Option<&[u8]>,
        limit: u32,
    ) -> Result<Vec<(Vec<u8>, SealedRow)>, StoreError>;

    /// The key versions with these fingerprint prefixes.
    async fn fingerprints(
        &self,
        prefixes: &[FingerprintPrefix],
    ) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError>;

    /// Up to `limit` owners of fingerprints after one, in the database's own order: what the
    /// scrubber walks.
    async fn fingerprint_page(
        &self,
        after: Option<(FingerprintPrefix, FingerprintOwner)>,
        limit: u32,
    ) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError>;

    /// Up to `limit` owners after one, of which the index of exposures says that a party could know
    /// keys: by their own rows, or by a key value that it knows by another slot. In order of kinds
    /// and ids. With `since`, owners of which it came to know a key then or later.
    async fn exposed_owners(
        &self,
        party: &ExposureParty,
        since: Option<UnixMillis>,
        after: Option<ExposureOwner>,
        limit: u32,
    ) -> Result<Vec<ExposureOwner>, StoreError>;

    /// How much the index of exposures says of a party. With `since`, the sums over those owners of
    /// which it came to know a key then or later.
    async fn exposure_totals(
        &self,
        party: &ExposureParty,
        since: Option<UnixMillis>,
    ) -> Result<ExposureTotals, StoreError>;

    /// The rows among `expected` that the index of exposures has not, or not so. For the scrubber,
    /// and for the pass that completes the index.
    async fn missing_exposures(&self, expected: &[ExposureRow]) -> Result<Vec<ExposureRow>, StoreError>;

    /// Up to `limit` rows of the index of exposures after a place, in the database's own order:
    /// what the scrubber walks. `None` instead of a row that no server wrote.
    async fn exposure_page(
        &self,
        after: Option<ExposureCursor>,
        limit: u32,
    ) -> Result<Vec<(ExposureCursor, Option<ExposureRow>)>, StoreError>;

    /// Whether the index of exposures repeats all sealed rows, also those that were written before
    /// there was an index.
    async fn exposures_are_complete(&self) -> Result<bool, StoreError>;

    /// Notes that the index of exposures repeats all sealed rows.
    async fn note_exposures_complete(&self) -> Result<(), StoreError>;

    /// Up to `limit` audit records after the cursor `after`, in the order of the log or in reverse.
    /// The records of each server come in the order of its chain. If several servers write, a
    /// record can still appear before the cursor, for as long as a call may take: use
    /// [`Self::audit_of_writer`] to get every record.
    async fn audit_page(
        &self,
        filter: &AuditFilter,
        after: Option<AuditCursor>,
        limit: u32,
    ) -> Result<Vec<AuditRow>, StoreError>;

    /// The first and the last place in the log of records whose time is at or after `from` and
    /// before `before`. None: there is no such record. If a clock jumped, there can be records of
    /// other times between them.
    async fn audit_range(
        &self,
        from: Option<UnixMillis>,
        before: Option<UnixMillis>,
    ) -> Result<Option<(AuditCursor, AuditCursor)>, StoreError>;

    /// Up to `limit` records of one writer from a sequence on. There is no gap unless rows were
    /// deleted.
    async fn audit_of_writer(
        &self,
        writer: WriterId,
        from_sequence: u64,
        limit: u32,
    ) -> Result<Vec<AuditAppend>, StoreError>;

    /// The last record of each writer that has written one.
    async fn audit_tails(&self) -> Result<Vec<AuditTail>, StoreError>;

    /// One grant.
    async fn grant(&self, id: GrantId) -> Result<Option<GrantRow>, StoreError>;

    /// Up to `limit` grants before an id, newest first.
    async fn grant_page(
        &self,
        filter: &GrantFilter,
        before: Option<GrantId>,
        limit: u32,
    ) -> Result<Vec<GrantRow>, StoreError>;

    /// Removes up to `limit` requests that expired before `now`. Returns how many.
    async fn purge_requests(&self, now: UnixMillis, limit: u32) -> Result<u64, StoreError>;

    /// One shipment.
    async fn shipment(&self, upload: UploadId) -> Result<Option<ShipmentRow>, StoreError>;

    /// Shipments of a file, by the SHA-256 that its sender announced.
    async fn shipments_of_file(
        &self,
        principal: &PrincipalId,
        sha256: &[u8; 32],
    ) -> Result<Vec<ShipmentRow>, StoreError>;

    /// Up to `limit` shipments after an upload id, in order of ids.
    async fn shipment_page(&self, after: Option<UploadId>, limit: u32) -> Result<Vec<ShipmentRow>, StoreError>;

    /// Appends octets to a shipment in state [`crate::ShipmentState::Receiving`]. They begin at
    /// `position` of the file. Returns how many octets are in the spool now.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the spool does not end at `position`: read [`Self::shipment`]
    /// and continue from `received`.
    async fn append_shipment_chunk(
        &self,
        upload: UploadId,
        position: u64,
        octets: Vec<u8>,
        now: UnixMillis,
    ) -> Result<u64, StoreError>;

    /// The chunk of a shipment that holds octet `position` of the file, and the position where it
    /// begins. None: `position` is after the end.
    async fn shipment_chunk(&self, upload: UploadId, position: u64) -> Result<Option<(u64, Vec<u8>)>, StoreError>;

    /// Removes up to `limit` chunks of a shipment. Returns how many.
    async fn delete_shipment_chunks(&self, upload: UploadId, limit: u32) -> Result<u64, StoreError>;

    /// Up to `limit` refused lines of a shipment after a line, in order.
    async fn shipment_refusals(
        &self,
        upload: UploadId,
        after_line: u64,
        limit: u32,
    ) -> Result<Vec<ShipmentRefusal>, StoreError>;

    /// Stores a chunk of a campaign's plan.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if there is one with this number.
    async fn put_campaign_chunk(&self, campaign: CampaignId, number: u64, titles: &[u8]) -> Result<(), StoreError>;

    /// A chunk of a campaign's plan.
    async fn campaign_chunk(&self, campaign: CampaignId, number: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// Removes the plan of a campaign that has no sealed row. Returns how many chunks.
    async fn delete_unused_chunks(&self, campaign: CampaignId) -> Result<u64, StoreError>;

    /// Removes the plans of all campaigns before this one, by id, that have no sealed row, because
    /// they were never stored. Returns how many chunks.
    async fn purge_unused_chunks(&self, before: CampaignId) -> Result<u64, StoreError>;

    /// Up to `limit` meters of a head-end whose tasks can be leased now, by the database's clock.
    /// Those that have waited longest come first.
    async fn due_tasks(&self, campaign: CampaignId, head_end: &str, limit: u32)
    -> Result<Vec<SystemTitle>, StoreError>;

    /// The load of a head-end in a campaign.
    async fn task_load(&self, campaign: CampaignId, head_end: &str) -> Result<TaskLoad, StoreError>;

    /// The numbers of tasks of a campaign, or of one wave of it, by their state.
    async fn task_tallies(&self, campaign: CampaignId, wave: Option<u32>) -> Result<Vec<TaskTally>, StoreError>;

    /// Up to `limit` tasks of a campaign after a meter, in order of titles as signed integers.
    async fn task_page(
        &self,
        campaign: CampaignId,
        filter: TaskFilter,
        after: Option<SystemTitle>,
        limit: u32,
    ) -> Result<Vec<TaskRow>, StoreError>;

    /// The numbers of tasks of a wave that succeeded in each span of `span_ms` of Unix time, with
    /// the span's first moment, in order. Spans without any are left out.
    async fn task_timeline(
        &self,
        campaign: CampaignId,
        wave: u32,
        span_ms: i64,
    ) -> Result<Vec<(UnixMillis, u64)>, StoreError>;

    /// Removes up to `limit` tasks in this state of the waves before `before_wave`. Returns how
    /// many.
    async fn delete_tasks(
        &self,
        campaign: CampaignId,
        before_wave: u32,
        state: TaskState,
        limit: u32,
    ) -> Result<u64, StoreError>;

    /// Up to `limit` work orders that match, with their sealed rows, in the order of their begin
    /// and then of their ids, after the order with this begin and id.
    async fn work_order_page(
        &self,
        filter: &WorkOrderFilter,
        after: Option<(UnixMillis, WorkOrderId)>,
        limit: u32,
    ) -> Result<Vec<WorkOrderRow>, StoreError>;

    /// Adds missing search columns of work orders. Returns how many were missing. Transactions that
    /// write orders write these columns: this repairs columns that were lost.
    async fn complete_work_orders(&self, orders: &[WorkOrderColumns]) -> Result<u64, StoreError>;

    /// The PIN of a token and user that failed last. None: none failed, or another PIN was accepted
    /// since.
    async fn pin_failure(&self, token: &str, user_type: u8) -> Result<Option<PinFailure>, StoreError>;

    /// Stores a PIN that failed.
    async fn put_pin_failure(&self, failure: &PinFailure) -> Result<(), StoreError>;

    /// Removes a PIN that failed, when another one was accepted.
    async fn clear_pin_failure(&self, token: &str, user_type: u8) -> Result<(), StoreError>;

    /// Registers this run of a server, by the database's clock.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the writer id is in use: ids are random and never reused.
    async fn register_server(&self, writer: WriterId, name: &str) -> Result<(), StoreError>;

    /// Writes that this run is alive, by the database's clock.
    async fn heartbeat(&self, writer: WriterId) -> Result<(), StoreError>;

    /// All runs of servers, the latest first.
    async fn servers(&self) -> Result<Vec<ServerRow>, StoreError>;

    /// The database's clock.
    async fn now(&self) -> Result<UnixMillis, StoreError>;

    /// Whether the database takes writes and its settings are still safe. For readiness.
    async fn check(&self) -> Result<(), StoreError>;

    /// The timeline of the cluster. None with SQLite, which cannot notice that its file was
    /// replaced by an older one.
    async fn timeline(&self) -> Result<Option<Timeline>, StoreError>;

    /// The size of the database.
    async fn sizes(&self) -> Result<Sizes, StoreError>;

    /// Ends all connections. Later calls return [`StoreError::Unavailable`].
    async fn close(&self);
}
