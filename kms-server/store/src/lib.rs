//! The only SQL of the server: SQLite and PostgreSQL behind one [`Store`].
//!
//! The store keeps sealed rows as opaque octets (I5): it has no keys and decides nothing. Its
//! central verb is [`Store::transact`]: read rows, let the caller decide, write what the caller
//! answers, all in one transaction.
//!
//! SQLite is for one server: a lock file keeps a second one out. PostgreSQL is for several: rows
//! that a transaction reads are locked in one order, and every write names the generation that it
//! replaces.
//!
//! How the code is laid out: `shared/` holds the statements and is compiled twice, once inside
//! `sqlite` and once inside `postgres`, which differ in how they connect, lock and
//! check the database.

#[macro_use]
mod batch;
mod error;
mod postgres;
mod row;
mod schema;
mod sqlite;
mod transaction;

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use kms_domain::{CampaignId, GrantId, PrincipalId, SystemTitle, TaskState, UnixMillis, WriterId};

pub use error::{RowName, StoreError};
pub use kms_domain::Timeline;
pub use row::{
    Assigned, AuditAppend, AuditCursor, AuditFilter, AuditReference, AuditRow, AuditTail, FingerprintOwner,
    FingerprintPrefix, GrantFilter, GrantRow, MeterFilter, MeterProjection, MeterRow, PinFailure, RequestKey,
    RequestRow, RowKind, SealedRow, ServerRow, ShipmentRefusal, ShipmentRow, ShipmentState, Sizes, SpooledFile,
    TaskFilter, TaskKey, TaskLoad, TaskRow, TaskTally, UploadId,
};
pub use transaction::{
    Changes, Committed, Decision, FingerprintPut, GrantRevocation, Lookup, MeterPut, ReadSet, Reads, RequestPut,
    SealedPut,
};

/// The database of one island.
///
/// Every call answers within [`StoreConfig::call_timeout`], with [`StoreError::Unavailable`] if the
/// database does not (I2: a stuck log makes the server not ready, it does not hang callers).
#[async_trait]
pub trait Store: Send + Sync {
    /// Whether several servers may use the database at once. An SQLite database belongs to one
    /// process.
    fn is_shared(&self) -> bool;

    /// Reads rows and writes what `decide` answers, in one transaction: what was read, absence
    /// included, is unchanged when it is written. When this returns [`Committed::Written`], the
    /// changes are on disk (I2, I3, I4).
    ///
    /// `decide` is called again after [`Decision::More`], and from the start when another server's
    /// transaction got in between: it must depend on the [`ReadSet`] only. It runs while the
    /// database waits, so it should take microseconds a row.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a row is not in the generation before the one that is put, or
    /// exists already where it may not; [`StoreError::Contention`] after several attempts that lost
    /// against other servers; [`StoreError::Unavailable`], after which it is not known whether the
    /// changes are durable.
    async fn transact(
        &self,
        reads: Reads,
        decide: &mut (dyn for<'a> FnMut(&'a ReadSet) -> Decision + Send),
    ) -> Result<Committed, StoreError>;

    /// The rows of meters, in order of their titles as signed integers; unknown ones are left out.
    async fn meters(&self, titles: &[SystemTitle]) -> Result<Vec<MeterRow>, StoreError>;

    /// What [`Self::sealed`] and [`Self::meters`] read, in one statement: a statement costs more
    /// than its rows, and a call that reads asks for its caller and its meters.
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

    /// Adds what is missing of the search columns that say which meters are in which groups, each
    /// meter with one group's number; how many were missing. Acts keep them by themselves: this is
    /// for what was lost, or written before there were such columns.
    async fn complete_group_members(&self, members: &[(SystemTitle, u64)]) -> Result<u64, StoreError>;

    /// How many meters match. Reads an index or the whole table.
    async fn meter_count(&self, filter: &MeterFilter) -> Result<u64, StoreError>;

    /// One sealed row that is no meter's.
    async fn sealed(&self, kind: RowKind, id: &[u8]) -> Result<Option<SealedRow>, StoreError>;

    /// Up to `limit` sealed rows of a kind after an id, in order of ids.
    async fn sealed_page(
        &self,
        kind: RowKind,
        after: Option<&[u8]>,
        limit: u32,
    ) -> Result<Vec<(Vec<u8>, SealedRow)>, StoreError>;

    /// Who has keys with these fingerprint prefixes.
    async fn fingerprints(
        &self,
        prefixes: &[FingerprintPrefix],
    ) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError>;

    /// Up to `limit` owners of fingerprints after one, in an order of the database's own: what the
    /// scrubber walks.
    async fn fingerprint_page(
        &self,
        after: Option<(FingerprintPrefix, FingerprintOwner)>,
        limit: u32,
    ) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError>;

    /// Up to `limit` audit records in the log's own order, or against it, behind `after`. Each
    /// server's records come as they are chained. Where several servers write, a record can still
    /// appear behind the cursor for as long as a call may take: who needs every record walks
    /// [`Self::audit_of_writer`].
    async fn audit_page(
        &self,
        filter: &AuditFilter,
        after: Option<AuditCursor>,
        limit: u32,
    ) -> Result<Vec<AuditRow>, StoreError>;

    /// The first and the last place in the log of records whose time is at or after `from` and
    /// before `before`; none: there is no such record. Between them there may be records of other
    /// times, where a clock jumped.
    async fn audit_range(
        &self,
        from: Option<UnixMillis>,
        before: Option<UnixMillis>,
    ) -> Result<Option<(AuditCursor, AuditCursor)>, StoreError>;

    /// Up to `limit` records of one writer from a sequence on, without gaps unless rows were
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

    /// Removes up to `limit` requests that expired before `now`; how many it were.
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

    /// Appends octets to a shipment in state [`ShipmentState::Receiving`]; they begin at `position`
    /// of the file. Answers how many octets are in the spool now.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the spool does not end at `position`: read [`Self::shipment`]
    /// and go on from `received`.
    async fn append_shipment_chunk(
        &self,
        upload: UploadId,
        position: u64,
        octets: Vec<u8>,
        now: UnixMillis,
    ) -> Result<u64, StoreError>;

    /// The chunk of a shipment that holds octet `position` of the file, and the position where it
    /// begins; none behind the end.
    async fn shipment_chunk(&self, upload: UploadId, position: u64) -> Result<Option<(u64, Vec<u8>)>, StoreError>;

    /// Removes up to `limit` chunks of a shipment; how many it were.
    async fn delete_shipment_chunks(&self, upload: UploadId, limit: u32) -> Result<u64, StoreError>;

    /// Up to `limit` refused lines of a shipment after a line, in order.
    async fn shipment_refusals(
        &self,
        upload: UploadId,
        after_line: u64,
        limit: u32,
    ) -> Result<Vec<ShipmentRefusal>, StoreError>;

    /// Keeps a chunk of a campaign's plan.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if there is one with this number.
    async fn put_campaign_chunk(&self, campaign: CampaignId, number: u64, titles: &[u8]) -> Result<(), StoreError>;

    /// A chunk of a campaign's plan.
    async fn campaign_chunk(&self, campaign: CampaignId, number: u64) -> Result<Option<Vec<u8>>, StoreError>;

    /// Removes the plan of a campaign that has no sealed row; how many chunks it were.
    async fn delete_unused_chunks(&self, campaign: CampaignId) -> Result<u64, StoreError>;

    /// Removes the plans of all campaigns before this one, by id, that have no sealed row: nobody
    /// stored them. How many chunks it were.
    async fn purge_unused_chunks(&self, before: CampaignId) -> Result<u64, StoreError>;

    /// Up to `limit` meters of a head-end whose tasks can be leased now, by the database's clock;
    /// those that have waited longest first.
    async fn due_tasks(&self, campaign: CampaignId, head_end: &str, limit: u32)
    -> Result<Vec<SystemTitle>, StoreError>;

    /// How much a head-end has to do in a campaign.
    async fn task_load(&self, campaign: CampaignId, head_end: &str) -> Result<TaskLoad, StoreError>;

    /// How many tasks of a campaign, or of one wave of it, stand how.
    async fn task_tallies(&self, campaign: CampaignId, wave: Option<u32>) -> Result<Vec<TaskTally>, StoreError>;

    /// Up to `limit` tasks of a campaign after a meter, in order of titles as signed integers.
    async fn task_page(
        &self,
        campaign: CampaignId,
        filter: TaskFilter,
        after: Option<SystemTitle>,
        limit: u32,
    ) -> Result<Vec<TaskRow>, StoreError>;

    /// How many tasks of a wave succeeded in which span of `span_ms` of Unix time, by the span's
    /// first moment, in order; spans without any are left out.
    async fn task_timeline(
        &self,
        campaign: CampaignId,
        wave: u32,
        span_ms: i64,
    ) -> Result<Vec<(UnixMillis, u64)>, StoreError>;

    /// Removes up to `limit` tasks of the waves before `wave` that are in this state; how many it
    /// were.
    async fn delete_tasks(
        &self,
        campaign: CampaignId,
        before_wave: u32,
        state: TaskState,
        limit: u32,
    ) -> Result<u64, StoreError>;

    /// The PIN of a token and user that failed last, if one did and it was not changed since.
    async fn pin_failure(&self, token: &str, user_type: u8) -> Result<Option<PinFailure>, StoreError>;

    /// Remembers a PIN that failed.
    async fn put_pin_failure(&self, failure: &PinFailure) -> Result<(), StoreError>;

    /// Forgets a PIN that failed, when another one was accepted.
    async fn clear_pin_failure(&self, token: &str, user_type: u8) -> Result<(), StoreError>;

    /// Registers this run of a server, by the database's clock.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the writer id is in use: ids are random and never reused.
    async fn register_server(&self, writer: WriterId, name: &str) -> Result<(), StoreError>;

    /// Says that this run is alive, by the database's clock.
    async fn heartbeat(&self, writer: WriterId) -> Result<(), StoreError>;

    /// All runs of servers, the latest first.
    async fn servers(&self) -> Result<Vec<ServerRow>, StoreError>;

    /// The database's clock.
    async fn now(&self) -> Result<UnixMillis, StoreError>;

    /// Whether the database takes writes and its settings are still safe. For readiness.
    async fn check(&self) -> Result<(), StoreError>;

    /// Where the cluster's history stands; none with SQLite, which cannot know that its file was
    /// replaced by an older one.
    async fn timeline(&self) -> Result<Option<Timeline>, StoreError>;

    /// How large the database is.
    async fn sizes(&self) -> Result<Sizes, StoreError>;

    /// Ends all connections. Later calls answer [`StoreError::Unavailable`].
    async fn close(&self);
}

/// Where the database is, and how to use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Where it is.
    pub database: DatabaseLocation,
    /// The longest that a call waits, in a queue or for the database. Default 10 s.
    pub call_timeout: Duration,
    /// Connections to use at most, at least 2. Default 8.
    pub connections: u32,
    /// PostgreSQL: `application_name`s of asynchronous standbys that are never failed over to.
    /// Others are refused.
    pub read_replicas: Vec<String>,
}

/// Where a database is.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// A file, made if it is missing.
    Sqlite(PathBuf),
    /// A libpq URI. It may hold a password, so it is never printed.
    Postgres(String),
}

impl std::fmt::Debug for DatabaseLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(_) => f.write_str("postgres://…"),
        }
    }
}

impl StoreConfig {
    /// A configuration with defaults, from `sqlite:PATH` or `postgres://…` (also `postgresql://…`).
    ///
    /// # Errors
    /// Another form.
    pub fn parse(address: &str) -> Result<Self, StoreError> {
        let database = match address.split_once(':') {
            Some(("sqlite", path)) if !path.is_empty() => {
                DatabaseLocation::Sqlite(path.strip_prefix("//").unwrap_or(path).into())
            }
            Some(("postgres" | "postgresql", _)) => DatabaseLocation::Postgres(address.to_owned()),
            _ => {
                return Err(StoreError::Invalid {
                    what: "database address",
                    reason: "it is neither sqlite:PATH nor postgres://USER@HOST/DATABASE".into(),
                });
            }
        };
        Ok(Self::new(database))
    }

    /// A configuration with defaults.
    pub const fn new(database: DatabaseLocation) -> Self {
        Self { database, call_timeout: Duration::from_secs(10), connections: 8, read_replicas: Vec::new() }
    }
}

/// Opens a database: checks its settings, brings its schema up to date, refuses a newer one.
///
/// # Errors
/// [`StoreError::InUse`], [`StoreError::UnsafeSetting`], [`StoreError::NewerSchema`],
/// [`StoreError::Unavailable`], [`StoreError::Corrupt`].
pub async fn open(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    if config.connections < 2 {
        return Err(StoreError::Invalid {
            what: "number of database connections",
            reason: "at least 2 are needed".into(),
        });
    }
    Ok(match &config.database {
        DatabaseLocation::Sqlite(path) => Arc::new(sqlite::Engine::open(path, config).await?),
        DatabaseLocation::Postgres(url) => Arc::new(postgres::Engine::open(url, config).await?),
    })
}
