//! The statements, and the [`Store`] that they implement. Compiled once for each database: the
//! parent module defines `Database`, `Writer` and the macros `rows!`, `keys!`, `join!`,
//! `exclusive!`, `shared!` and `now!`.

/// Columns of grants `g` with [`grant_joins!`].
macro_rules! grant_columns {
    () => {
        "g.id, gt.text, gp.text, g.issued_ms, g.not_after_ms, gs.writer, g.sequence, g.meters, g.revoked_ms"
    };
}

/// Joins to the names of grants `g`.
macro_rules! grant_joins {
    () => {
        concat!(
            join!(),
            "term AS gt ON gt.id = g.principal",
            join!(),
            "term AS gp ON gp.id = g.purpose",
            join!(),
            "server AS gs ON gs.number = g.writer"
        )
    };
}

/// Columns of audit records `a` of servers `s`.
macro_rules! audit_columns {
    () => {
        "a.id, s.writer, a.sequence, a.time_ms, CAST(a.kind AS BIGINT), a.chain, a.record"
    };
}

/// Columns of shipments `p`.
macro_rules! shipment_columns {
    () => {
        concat!(
            "p.upload, p.generation, p.sha256, p.size, p.batch, p.principal, CAST(p.state AS BIGINT), p.received, p.next_line, p.imported, p.refused, ",
            "p.created_ms, p.updated_ms, p.progress"
        )
    };
}

/// Columns of tasks `t` with [`task_joins!`].
macro_rules! task_columns {
    () => {
        concat!(
            "t.campaign, t.meter, t.generation, t.wave, tv.text, th.text, CAST(t.setup AS BIGINT), CAST(t.key_type AS BIGINT), t.from_version, ",
            "CAST(t.state AS BIGINT), CAST(t.probe AS BIGINT), t.attempts, t.due_ms, t.fence, t.leased_ms, t.ended_ms, t.reason, t.mark"
        )
    };
}

/// Joins to the names of tasks `t`; a task may have no head-end.
macro_rules! task_joins {
    () => {
        concat!(join!(), "term AS tv ON tv.id = t.vendor LEFT JOIN term AS th ON th.id = t.head_end")
    };
}

mod decode;
mod exposure;
mod list;
pub(super) mod names;
mod read;
mod spool;
mod swap;
mod task;
mod transact;
mod work_orders;
mod write;

use std::future::Future;

use async_trait::async_trait;
use kms_domain::{CampaignId, GrantId, PrincipalId, SystemTitle, TaskState, UnixMillis, WorkOrderId, WriterId};
use sqlx::{Connection as _, Row as _};

use super::{
    BEGIN, CONCURRENT, Connection, Database, Engine, MIGRATION_BEGIN, MIGRATION_LOCK, MIGRATION_LOCKED, Row, keys,
    lock_stripes,
};
use crate::{
    AuditAppend, AuditCursor, AuditFilter, AuditRow, AuditTail, Committed, Decision, ExposureCursor, ExposureOwner,
    ExposureParty, ExposureRow, ExposureTotals, FingerprintOwner, FingerprintPrefix, GrantFilter, GrantRow,
    MeterFilter, MeterRow, PinFailure, ReadSet, Reads, RowKind, SealedRow, ServerRow, ShipmentRefusal, ShipmentRow,
    Sizes, Store, StoreError, TaskFilter, TaskLoad, TaskRow, TaskTally, Timeline, UploadId, WorkOrderColumns,
    WorkOrderFilter, WorkOrderRow,
    schema::{self, Migration},
};

#[async_trait]
impl Store for Engine {
    fn is_shared(&self) -> bool {
        CONCURRENT
    }

    async fn transact(
        &self,
        reads: Reads,
        decide: &mut (dyn for<'a> FnMut(&'a ReadSet) -> Decision + Send),
    ) -> Result<Committed, StoreError> {
        self.within(transact::transact(self, reads, decide)).await
    }

    async fn meters(&self, titles: &[SystemTitle]) -> Result<Vec<MeterRow>, StoreError> {
        self.within(list::meters(&self.readers, titles)).await
    }

    async fn sealed_and_meters(
        &self,
        kind: RowKind,
        id: &[u8],
        titles: &[SystemTitle],
    ) -> Result<(Option<SealedRow>, Vec<MeterRow>), StoreError> {
        self.within(list::sealed_and_meters(&self.readers, kind, id, titles)).await
    }

    async fn meter_page(
        &self,
        filter: &MeterFilter,
        after: Option<SystemTitle>,
        limit: u32,
    ) -> Result<Vec<MeterRow>, StoreError> {
        self.within(list::meter_page(&self.readers, filter, after, limit)).await
    }

    async fn complete_group_members(&self, members: &[(SystemTitle, u64)]) -> Result<u64, StoreError> {
        self.within(write::complete_group_members(self, members)).await
    }

    async fn meter_count(&self, filter: &MeterFilter) -> Result<u64, StoreError> {
        self.within(list::meter_count(&self.readers, filter)).await
    }

    async fn sealed(&self, kind: RowKind, id: &[u8]) -> Result<Option<SealedRow>, StoreError> {
        self.within(list::sealed(&self.readers, kind, id)).await
    }

    async fn sealed_page(
        &self,
        kind: RowKind,
        after: Option<&[u8]>,
        limit: u32,
    ) -> Result<Vec<(Vec<u8>, SealedRow)>, StoreError> {
        self.within(list::sealed_page(&self.readers, kind, after, limit)).await
    }

    async fn fingerprints(
        &self,
        prefixes: &[FingerprintPrefix],
    ) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError> {
        self.within(list::fingerprints(&self.readers, prefixes)).await
    }

    async fn fingerprint_page(
        &self,
        after: Option<(FingerprintPrefix, FingerprintOwner)>,
        limit: u32,
    ) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError> {
        self.within(list::fingerprint_page(&self.readers, after, limit)).await
    }

    async fn exposed_owners(
        &self,
        party: &ExposureParty,
        since: Option<UnixMillis>,
        after: Option<ExposureOwner>,
        limit: u32,
    ) -> Result<Vec<ExposureOwner>, StoreError> {
        self.within(exposure::owners(&self.readers, party, since, after, limit)).await
    }

    async fn exposure_totals(
        &self,
        party: &ExposureParty,
        since: Option<UnixMillis>,
    ) -> Result<ExposureTotals, StoreError> {
        self.within(exposure::totals(&self.readers, party, since)).await
    }

    async fn missing_exposures(&self, expected: &[ExposureRow]) -> Result<Vec<ExposureRow>, StoreError> {
        self.within(exposure::missing(&self.readers, expected)).await
    }

    async fn exposure_page(
        &self,
        after: Option<ExposureCursor>,
        limit: u32,
    ) -> Result<Vec<(ExposureCursor, Option<ExposureRow>)>, StoreError> {
        self.within(exposure::page(&self.readers, after, limit)).await
    }

    async fn exposures_are_complete(&self) -> Result<bool, StoreError> {
        self.within(exposure::is_complete(&self.readers)).await
    }

    async fn note_exposures_complete(&self) -> Result<(), StoreError> {
        self.within(exposure::note_complete(self)).await
    }

    async fn audit_page(
        &self,
        filter: &AuditFilter,
        after: Option<AuditCursor>,
        limit: u32,
    ) -> Result<Vec<AuditRow>, StoreError> {
        self.within(list::audit_page(&self.readers, filter, after, limit)).await
    }

    async fn audit_range(
        &self,
        from: Option<UnixMillis>,
        before: Option<UnixMillis>,
    ) -> Result<Option<(AuditCursor, AuditCursor)>, StoreError> {
        self.within(list::audit_range(&self.readers, from, before)).await
    }

    async fn audit_of_writer(
        &self,
        writer: WriterId,
        from_sequence: u64,
        limit: u32,
    ) -> Result<Vec<AuditAppend>, StoreError> {
        self.within(list::audit_of_writer(&self.readers, writer, from_sequence, limit)).await
    }

    async fn audit_tails(&self) -> Result<Vec<AuditTail>, StoreError> {
        self.within(list::audit_tails(&self.readers)).await
    }

    async fn grant(&self, id: GrantId) -> Result<Option<GrantRow>, StoreError> {
        self.within(list::grant(&self.readers, id)).await
    }

    async fn grant_page(
        &self,
        filter: &GrantFilter,
        before: Option<GrantId>,
        limit: u32,
    ) -> Result<Vec<GrantRow>, StoreError> {
        self.within(list::grant_page(&self.readers, filter, before, limit)).await
    }

    async fn purge_requests(&self, now: UnixMillis, limit: u32) -> Result<u64, StoreError> {
        let purge = async {
            let query = sqlx::query::<Database>(PURGE_REQUESTS).bind(now.0).bind(i64::from(limit));
            Ok(query.execute(&mut *self.writer().await?).await?.rows_affected())
        };
        self.within(purge).await
    }

    async fn shipment(&self, upload: UploadId) -> Result<Option<ShipmentRow>, StoreError> {
        self.within(spool::shipment(&self.readers, upload)).await
    }

    async fn shipments_of_file(
        &self,
        principal: &PrincipalId,
        sha256: &[u8; 32],
    ) -> Result<Vec<ShipmentRow>, StoreError> {
        self.within(spool::shipments_of_file(&self.readers, principal, sha256)).await
    }

    async fn shipment_page(&self, after: Option<UploadId>, limit: u32) -> Result<Vec<ShipmentRow>, StoreError> {
        self.within(spool::shipment_page(&self.readers, after, limit)).await
    }

    async fn append_shipment_chunk(
        &self,
        upload: UploadId,
        position: u64,
        octets: Vec<u8>,
        now: UnixMillis,
    ) -> Result<u64, StoreError> {
        self.within(spool::append_chunk(self, upload, position, octets, now)).await
    }

    async fn shipment_chunk(&self, upload: UploadId, position: u64) -> Result<Option<(u64, Vec<u8>)>, StoreError> {
        self.within(spool::chunk(&self.readers, upload, position)).await
    }

    async fn delete_shipment_chunks(&self, upload: UploadId, limit: u32) -> Result<u64, StoreError> {
        self.within(spool::delete_chunks(self, upload, limit)).await
    }

    async fn shipment_refusals(
        &self,
        upload: UploadId,
        after_line: u64,
        limit: u32,
    ) -> Result<Vec<ShipmentRefusal>, StoreError> {
        self.within(spool::refusals(&self.readers, upload, after_line, limit)).await
    }

    async fn put_campaign_chunk(&self, campaign: CampaignId, number: u64, titles: &[u8]) -> Result<(), StoreError> {
        self.within(task::put_chunk(self, campaign, number, titles)).await
    }

    async fn campaign_chunk(&self, campaign: CampaignId, number: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.within(task::chunk(&self.readers, campaign, number)).await
    }

    async fn delete_unused_chunks(&self, campaign: CampaignId) -> Result<u64, StoreError> {
        self.within(task::delete_unused(self, campaign)).await
    }

    async fn purge_unused_chunks(&self, before: CampaignId) -> Result<u64, StoreError> {
        self.within(task::purge_unused(self, before)).await
    }

    async fn due_tasks(
        &self,
        campaign: CampaignId,
        head_end: &str,
        limit: u32,
    ) -> Result<Vec<SystemTitle>, StoreError> {
        self.within(task::due(&self.readers, campaign, head_end, limit)).await
    }

    async fn task_load(&self, campaign: CampaignId, head_end: &str) -> Result<TaskLoad, StoreError> {
        self.within(task::load(&self.readers, campaign, head_end)).await
    }

    async fn task_tallies(&self, campaign: CampaignId, wave: Option<u32>) -> Result<Vec<TaskTally>, StoreError> {
        self.within(task::tallies(&self.readers, campaign, wave)).await
    }

    async fn task_page(
        &self,
        campaign: CampaignId,
        filter: TaskFilter,
        after: Option<SystemTitle>,
        limit: u32,
    ) -> Result<Vec<TaskRow>, StoreError> {
        self.within(task::page(&self.readers, campaign, filter, after, limit)).await
    }

    async fn task_timeline(
        &self,
        campaign: CampaignId,
        wave: u32,
        span_ms: i64,
    ) -> Result<Vec<(UnixMillis, u64)>, StoreError> {
        self.within(task::timeline(&self.readers, campaign, wave, span_ms)).await
    }

    async fn delete_tasks(
        &self,
        campaign: CampaignId,
        before_wave: u32,
        state: TaskState,
        limit: u32,
    ) -> Result<u64, StoreError> {
        self.within(task::delete(self, campaign, before_wave, state, limit)).await
    }

    async fn work_order_page(
        &self,
        filter: &WorkOrderFilter,
        after: Option<(UnixMillis, WorkOrderId)>,
        limit: u32,
    ) -> Result<Vec<WorkOrderRow>, StoreError> {
        self.within(work_orders::page(&self.readers, filter, after, limit)).await
    }

    async fn complete_work_orders(&self, orders: &[WorkOrderColumns]) -> Result<u64, StoreError> {
        self.within(work_orders::complete(self, orders)).await
    }

    async fn pin_failure(&self, token: &str, user_type: u8) -> Result<Option<PinFailure>, StoreError> {
        let read = async {
            let row =
                sqlx::query::<Database>("SELECT phc, time_ms FROM pin_failure WHERE token = $1 AND user_type = $2")
                    .bind(token)
                    .bind(i64::from(user_type))
                    .fetch_optional(&self.readers)
                    .await?;
            let Some(row) = row else { return Ok(None) };
            Ok(Some(PinFailure {
                token: token.to_owned(),
                user_type,
                phc: row.try_get(0)?,
                time: decode::millis(&row, 1)?,
            }))
        };
        self.within(read).await
    }

    async fn put_pin_failure(&self, failure: &PinFailure) -> Result<(), StoreError> {
        let put = async {
            sqlx::query::<Database>(PUT_PIN_FAILURE)
                .bind(failure.token.as_str())
                .bind(i64::from(failure.user_type))
                .bind(failure.phc.as_str())
                .bind(failure.time.0)
                .execute(&mut *self.writer().await?)
                .await?;
            Ok(())
        };
        self.within(put).await
    }

    async fn clear_pin_failure(&self, token: &str, user_type: u8) -> Result<(), StoreError> {
        let clear = async {
            let query = sqlx::query::<Database>("DELETE FROM pin_failure WHERE token = $1 AND user_type = $2")
                .bind(token)
                .bind(i64::from(user_type));
            query.execute(&mut *self.writer().await?).await?;
            Ok(())
        };
        self.within(clear).await
    }

    async fn register_server(&self, writer: WriterId, name: &str) -> Result<(), StoreError> {
        let register = async {
            let query = sqlx::query::<Database>(REGISTER_SERVER).bind(writer.octets().to_vec()).bind(name);
            match query.execute(&mut *self.writer().await?).await?.rows_affected() {
                1 => Ok(()),
                _ => Err(StoreError::Invalid {
                    what: "writer id",
                    reason: format!("`{writer}` is in use; ids are random and never reused"),
                }),
            }
        };
        self.within(register).await
    }

    async fn heartbeat(&self, writer: WriterId) -> Result<(), StoreError> {
        let beat = async {
            let query = sqlx::query::<Database>(HEARTBEAT).bind(writer.octets().to_vec());
            match query.execute(&mut *self.writer().await?).await?.rows_affected() {
                1 => Ok(()),
                _ => Err(StoreError::Invalid { what: "writer id", reason: format!("`{writer}` was never registered") }),
            }
        };
        self.within(beat).await
    }

    async fn servers(&self) -> Result<Vec<ServerRow>, StoreError> {
        self.within(list::servers(&self.readers)).await
    }

    async fn now(&self) -> Result<UnixMillis, StoreError> {
        self.within(list::now(&self.readers)).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        let check = async {
            self.settings().await?;
            sqlx::query::<Database>("UPDATE schema_version SET name = name WHERE version = 1")
                .execute(&mut *self.writer().await?)
                .await?;
            Ok(())
        };
        self.within(check).await
    }

    async fn timeline(&self) -> Result<Option<Timeline>, StoreError> {
        self.within(self.history()).await
    }

    async fn sizes(&self) -> Result<Sizes, StoreError> {
        self.within(self.measure()).await
    }

    async fn close(&self) {
        self.shut().await;
    }
}

impl Engine {
    /// Bounds a call in time (I2).
    async fn within<T>(&self, work: impl Future<Output = Result<T, StoreError>> + Send) -> Result<T, StoreError> {
        match tokio::time::timeout(self.call_timeout, work).await {
            Ok(result) => result,
            Err(_) => {
                self.timed_out();
                Err(StoreError::timed_out(self.call_timeout))
            }
        }
    }
}

/// Brings the schema up to date in one transaction, one server at a time. A step takes as long as
/// it needs: an index of a large table is made in minutes, and a step that is ended halfway would
/// be begun again at each start, for ever.
pub(super) async fn migrate(connection: &mut Connection, migrations: &'static [Migration]) -> Result<(), StoreError> {
    let mut transaction = connection.begin_with(BEGIN).await?;
    sqlx::raw_sql(MIGRATION_BEGIN).execute(&mut *transaction).await?;
    sqlx::query::<Database>(MIGRATION_LOCK).execute(&mut *transaction).await?;
    sqlx::raw_sql(MIGRATION_LOCKED).execute(&mut *transaction).await?;
    sqlx::raw_sql(SCHEMA_VERSION).execute(&mut *transaction).await?;
    let rows = sqlx::query::<Database>("SELECT version, sha256 FROM schema_version ORDER BY version")
        .fetch_all(&mut *transaction)
        .await?;
    let applied = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .collect::<Result<Vec<(i64, String)>, StoreError>>()?;
    let missing: Vec<&Migration> = schema::missing(migrations, &applied)?.collect();
    let Some(to) = missing.last().map(|migration| migration.version) else {
        return Ok(transaction.commit().await?);
    };
    let from = applied.last().map_or(0, |(version, _)| *version);
    let begun = std::time::Instant::now();
    tracing::info!(from, to, "migrating the database: other servers wait until its schema is changed");
    for migration in missing {
        tracing::info!(version = migration.version, name = migration.name, "changing the schema of the database");
        sqlx::raw_sql(migration.sql).execute(&mut *transaction).await?;
        sqlx::query::<Database>(APPLIED)
            .bind(migration.version)
            .bind(migration.name)
            .bind(migration.digest())
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await?;
    tracing::info!(from, to, seconds = begun.elapsed().as_secs(), "the database was migrated");
    Ok(())
}

const SCHEMA_VERSION: &str = "CREATE TABLE IF NOT EXISTS schema_version (version BIGINT PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, applied_ms BIGINT NOT NULL)";

const APPLIED: &str =
    concat!("INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES ($1, $2, $3, ", now!(), ")");

const PURGE_REQUESTS: &str = "DELETE FROM request WHERE (request, principal, chunk) IN \
     (SELECT request, principal, chunk FROM request WHERE expires_ms < $1 ORDER BY expires_ms LIMIT $2)";

const PUT_PIN_FAILURE: &str = "INSERT INTO pin_failure (token, user_type, phc, time_ms) VALUES ($1, $2, $3, $4) \
     ON CONFLICT (token, user_type) DO UPDATE SET phc = excluded.phc, time_ms = excluded.time_ms";

const REGISTER_SERVER: &str = concat!(
    "INSERT INTO server (writer, name, started_ms, heartbeat_ms) VALUES ($1, $2, ",
    now!(),
    ", ",
    now!(),
    ") ON CONFLICT (writer) DO NOTHING"
);

const HEARTBEAT: &str = concat!("UPDATE server SET heartbeat_ms = ", now!(), " WHERE writer = $1");
