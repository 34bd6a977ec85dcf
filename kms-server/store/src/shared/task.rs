//! Plans and tasks of campaigns.

use kms_domain::{CampaignId, SystemTitle, TaskState, TaskWork, UnixMillis};
use sqlx::{Pool, QueryBuilder, Row as _};

use super::{
    Connection, Database, Engine, decode,
    names::{Numbers, TermKind},
    swap::{Stopped, Table, put},
};
use crate::{Changes, RowKind, RowName, StoreError, TaskFilter, TaskLoad, TaskRow, TaskTally, batch::RowBatch};

type Readers = Pool<Database>;

pub(super) async fn put_chunk(
    engine: &Engine,
    campaign: CampaignId,
    number: u64,
    titles: &[u8],
) -> Result<(), StoreError> {
    let conflict = || StoreError::Conflict { row: RowName::Sealed(RowKind::Campaign, campaign.octets().to_vec()) };
    let done = sqlx::query::<Database>("INSERT INTO campaign_chunk (campaign, number, titles) VALUES ($1, $2, $3) ON CONFLICT (campaign, number) DO NOTHING")
        .bind(campaign.octets().to_vec())
        .bind(i64::try_from(number).map_err(|_| conflict())?)
        .bind(titles)
        .execute(&mut *engine.writer().await?)
        .await?;
    engine.committed();
    if done.rows_affected() == 1 { Ok(()) } else { Err(conflict()) }
}

pub(super) async fn chunk(readers: &Readers, campaign: CampaignId, number: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let row = sqlx::query::<Database>("SELECT titles FROM campaign_chunk WHERE campaign = $1 AND number = $2")
        .bind(campaign.octets().to_vec())
        .bind(i64::try_from(number).unwrap_or(i64::MAX))
        .fetch_optional(readers)
        .await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

pub(super) async fn delete_unused(engine: &Engine, campaign: CampaignId) -> Result<u64, StoreError> {
    let query = sqlx::query::<Database>(DELETE_UNUSED)
        .bind(campaign.octets().to_vec())
        .bind(i64::from(RowKind::Campaign.number()));
    let done = query.execute(&mut *engine.writer().await?).await?;
    engine.committed();
    Ok(done.rows_affected())
}

pub(super) async fn purge_unused(engine: &Engine, before: CampaignId) -> Result<u64, StoreError> {
    let query = sqlx::query::<Database>(PURGE_UNUSED)
        .bind(before.octets().to_vec())
        .bind(i64::from(RowKind::Campaign.number()));
    let done = query.execute(&mut *engine.writer().await?).await?;
    engine.committed();
    Ok(done.rows_affected())
}

pub(super) async fn due(
    readers: &Readers,
    campaign: CampaignId,
    head_end: &str,
    limit: u32,
) -> Result<Vec<SystemTitle>, StoreError> {
    let rows = sqlx::query::<Database>(DUE)
        .bind(campaign.octets().to_vec())
        .bind(TermKind::HeadEnd.number())
        .bind(head_end)
        .bind(i64::from(limit))
        .fetch_all(readers)
        .await?;
    rows.iter()
        .map(|row| SystemTitle::from_i64(row.try_get(0)?).map_err(|error| StoreError::corrupt(error.to_string())))
        .collect()
}

pub(super) async fn load(readers: &Readers, campaign: CampaignId, head_end: &str) -> Result<TaskLoad, StoreError> {
    let row = sqlx::query::<Database>(LOAD)
        .bind(campaign.octets().to_vec())
        .bind(TermKind::HeadEnd.number())
        .bind(head_end)
        .fetch_one(readers)
        .await?;
    Ok(TaskLoad { in_flight: decode::unsigned(&row, 0)?, leased_in_minute: decode::unsigned(&row, 1)? })
}

pub(super) async fn tallies(
    readers: &Readers,
    campaign: CampaignId,
    wave: Option<u32>,
) -> Result<Vec<TaskTally>, StoreError> {
    let mut query = QueryBuilder::<Database>::new(TALLIES);
    query.push_bind(campaign.octets().to_vec());
    if let Some(wave) = wave {
        query.push(" AND wave = ").push_bind(i64::from(wave));
    }
    query.push(TALLY_GROUPS);
    let rows = query.build().fetch_all(readers).await?;
    rows.iter()
        .map(|row| {
            Ok(TaskTally {
                wave: u32::try_from(row.try_get::<i64, _>(0)?)
                    .map_err(|_| StoreError::corrupt("the wave of a task"))?,
                vendor: row.try_get(1)?,
                state: decode::task_state(row, 2)?,
                reason: row.try_get(3)?,
                tasks: decode::unsigned(row, 4)?,
            })
        })
        .collect()
}

pub(super) async fn page(
    readers: &Readers,
    campaign: CampaignId,
    filter: TaskFilter,
    after: Option<SystemTitle>,
    limit: u32,
) -> Result<Vec<TaskRow>, StoreError> {
    let mut query = QueryBuilder::<Database>::new(concat!(
        "SELECT ",
        task_columns!(),
        " FROM task AS t",
        task_joins!(),
        " WHERE t.campaign = "
    ));
    query.push_bind(campaign.octets().to_vec());
    match filter {
        TaskFilter::All => {}
        TaskFilter::State(state) => {
            query.push(" AND t.state = ").push_bind(i64::from(state.number()));
        }
        // 3 under way, 6 in doubt; 1 and 2 wait for a probe or have it leased.
        TaskFilter::InDoubt => {
            query.push(" AND (t.state IN (3, 6) OR (t.state IN (1, 2) AND t.probe <> 0))");
        }
    }
    if let Some(after) = after {
        query.push(" AND t.meter > ").push_bind(after.as_i64());
    }
    query.push(" ORDER BY t.meter LIMIT ").push_bind(i64::from(limit));
    query.build().fetch_all(readers).await?.iter().map(decode::task).collect()
}

pub(super) async fn timeline(
    readers: &Readers,
    campaign: CampaignId,
    wave: u32,
    span_ms: i64,
) -> Result<Vec<(UnixMillis, u64)>, StoreError> {
    let span = span_ms.max(1);
    let rows = sqlx::query::<Database>(TIMELINE)
        .bind(campaign.octets().to_vec())
        .bind(i64::from(wave))
        .bind(span)
        .fetch_all(readers)
        .await?;
    rows.iter()
        .map(|row| Ok((UnixMillis(row.try_get::<i64, _>(0)?.saturating_mul(span)), decode::unsigned(row, 1)?)))
        .collect()
}

pub(super) async fn delete(
    engine: &Engine,
    campaign: CampaignId,
    before_wave: u32,
    state: TaskState,
    limit: u32,
) -> Result<u64, StoreError> {
    let done = sqlx::query::<Database>(DELETE)
        .bind(campaign.octets().to_vec())
        .bind(i64::from(before_wave))
        .bind(i64::from(state.number()))
        .bind(i64::from(limit))
        .execute(&mut *engine.writer().await?)
        .await?;
    engine.committed();
    Ok(done.rows_affected())
}

/// Writes the tasks of a transaction.
pub(super) async fn write(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let (new, old): (Vec<_>, Vec<_>) = changes.tasks.iter().partition(|row| row.generation == 1);
    for (puts, statement) in [(new, INSERT_TASKS), (old, UPDATE_TASKS)] {
        let batch = RowBatch::of(puts, |row, put| {
            let task = &put.task;
            row.octets(&put.key.campaign.octets())
                .int(put.key.meter.as_i64())
                .unsigned(put.generation)
                .int(i64::from(put.wave))
                .int(numbers.term(TermKind::Vendor, &put.vendor))
                .int(numbers.optional_term(TermKind::HeadEnd, put.head_end.as_deref()))
                .int(i64::from(u16::from_be_bytes(task.step.setup.octets())))
                .int(match task.step.work {
                    TaskWork::Probe => 0,
                    TaskWork::Rotate(key_type) => i64::from(key_type.number()),
                })
                .int(i64::from(task.step.from))
                .int(i64::from(task.state.number()))
                .int(i64::from(task.probe))
                .int(i64::from(task.attempts))
                .int(task.due.0)
                .unsigned(task.fence)
                .int(task.leased.0)
                .int(task.ended.0)
                .text(&task.reason)
                .octets(&put.mark);
        });
        put(connection, statement, batch, Table::Tasks).await?;
    }
    Ok(())
}

const DELETE_UNUSED: &str = "DELETE FROM campaign_chunk WHERE campaign = $1 AND NOT EXISTS (SELECT 1 FROM sealed AS s WHERE s.kind = $2 AND s.id = campaign_chunk.campaign)";

const PURGE_UNUSED: &str = "DELETE FROM campaign_chunk WHERE campaign < $1 AND NOT EXISTS (SELECT 1 FROM sealed AS s WHERE s.kind = $2 AND s.id = campaign_chunk.campaign)";

/// States 1 to 3 have not ended.
const DUE: &str = concat!(
    "SELECT meter FROM task WHERE campaign = $1 AND head_end = (SELECT id FROM term WHERE kind = $2 AND text = $3) AND state <= 3 AND due_ms <= ",
    now!(),
    " ORDER BY due_ms LIMIT $4"
);

/// States 2 and 3 are leased.
const LOAD: &str = concat!(
    "SELECT (SELECT count(*) FROM task WHERE campaign = $1 AND head_end = h.id AND state IN (2, 3) AND due_ms > ",
    now!(),
    "), (SELECT count(*) FROM task WHERE campaign = $1 AND head_end = h.id AND leased_ms > ",
    now!(),
    " - 60000) FROM (SELECT coalesce((SELECT id FROM term WHERE kind = $2 AND text = $3), -1) AS id) AS h"
);

const TALLIES: &str = "SELECT g.wave, v.text, CAST(g.state AS BIGINT), g.reason, g.tasks FROM \
     (SELECT wave, state, vendor, reason, count(*) AS tasks FROM task WHERE campaign = ";
const TALLY_GROUPS: &str = " GROUP BY wave, state, vendor, reason) AS g JOIN term AS v ON v.id = g.vendor ORDER BY g.wave, g.state, v.text, g.reason";

/// State 4 is success.
const TIMELINE: &str = "SELECT ended_ms / $3, count(*) FROM task WHERE campaign = $1 AND wave = $2 AND state = 4 GROUP BY ended_ms / $3 ORDER BY ended_ms / $3";

const DELETE: &str = "DELETE FROM task WHERE campaign = $1 AND meter IN \
     (SELECT meter FROM task WHERE campaign = $1 AND wave < $2 AND state = $3 LIMIT $4)";

const INSERT_TASKS: &str = concat!(
    "INSERT INTO task (campaign, meter, generation, wave, vendor, head_end, setup, key_type, from_version, state, probe, attempts, due_ms, fence, leased_ms, ",
    "ended_ms, reason, mark) SELECT ",
    octets!(0, 1),
    ", ",
    int!(2),
    ", ",
    int!(3),
    ", ",
    int!(4),
    ", ",
    int!(5),
    ", ",
    int!(6),
    ", ",
    int!(7),
    ", ",
    int!(8),
    ", ",
    int!(9),
    ", ",
    int!(10),
    ", ",
    int!(11),
    ", ",
    int!(12),
    ", ",
    int!(13),
    ", ",
    int!(14),
    ", ",
    int!(15),
    ", ",
    int!(16),
    ", ",
    text!(17),
    ", ",
    octets!(18, 19),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (campaign, meter) DO NOTHING"
);

/// Wave and vendor are not changed.
const UPDATE_TASKS: &str = concat!(
    "UPDATE task SET generation = v.generation, head_end = v.head_end, setup = v.setup, key_type = v.key_type, from_version = v.from_version, ",
    "state = v.state, probe = v.probe, attempts = v.attempts, due_ms = v.due_ms, fence = v.fence, leased_ms = v.leased_ms, ended_ms = v.ended_ms, ",
    "reason = v.reason, mark = v.mark FROM (SELECT ",
    octets!(0, 1),
    " AS campaign, ",
    int!(2),
    " AS meter, ",
    int!(3),
    " AS generation, ",
    int!(6),
    " AS head_end, ",
    int!(7),
    " AS setup, ",
    int!(8),
    " AS key_type, ",
    int!(9),
    " AS from_version, ",
    int!(10),
    " AS state, ",
    int!(11),
    " AS probe, ",
    int!(12),
    " AS attempts, ",
    int!(13),
    " AS due_ms, ",
    int!(14),
    " AS fence, ",
    int!(15),
    " AS leased_ms, ",
    int!(16),
    " AS ended_ms, ",
    text!(17),
    " AS reason, ",
    octets!(18, 19),
    " AS mark FROM ",
    rows!(),
    ") AS v WHERE task.campaign = v.campaign AND task.meter = v.meter AND task.generation = v.generation - 1 AND task.fence <= v.fence"
);
