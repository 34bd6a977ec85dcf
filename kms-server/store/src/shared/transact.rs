//! The transaction: read, decide, write, and begin again where another transaction came in between.

use std::time::Duration;

use sqlx::{Connection as _, Row as _};

use super::{
    BEGIN, CONCURRENT, Connection, Database, Engine, decode, keys, read,
    swap::{Stopped, Table},
    write,
};
use crate::{Changes, Committed, Decision, ReadSet, Reads, RowName, StoreError, batch::RowBatch, error::Failure};

pub(super) type Decide<'d> = &'d mut (dyn for<'a> FnMut(&'a ReadSet) -> Decision + Send);

/// Reads, decides and writes. Begins again if the transaction of another server came in between.
pub(super) async fn transact(engine: &Engine, mut reads: Reads, decide: Decide<'_>) -> Result<Committed, StoreError> {
    let (mut attempts, mut restarts) = (0, 0);
    loop {
        match attempt_once(engine, &mut reads, decide).await {
            Ok(committed) => return Ok(committed),
            Err(Failure::Fatal(error)) => return Err(error),
            Err(Failure::OutOfOrder) if restarts < ROUNDS => restarts += 1,
            Err(Failure::OutOfOrder) => return Err(too_many_rounds()),
            Err(Failure::Retry) if attempts < ATTEMPTS => {
                tokio::time::sleep(BACK_OFF * (1 << attempts)).await;
                attempts += 1;
            }
            Err(Failure::Retry) => return Err(StoreError::Contention { attempts }),
        }
    }
}

/// Makes one attempt. `reads` grows by what the decision requests, so that the next attempt locks
/// everything at once and in order.
async fn attempt_once(engine: &Engine, reads: &mut Reads, decide: Decide<'_>) -> Result<Committed, Failure> {
    let mut writer = engine.writer().await?;
    let mut transaction = writer.begin_with(BEGIN).await?;
    let mut set = ReadSet::default();
    let mut wanted = reads.clone();
    wanted.normalise(&set);
    for _ in 0..ROUNDS {
        read::into_set(&mut transaction, &wanted, &mut set).await?;
        match decide(&set) {
            Decision::More(more) => {
                reads.extend(&more);
                wanted = *more;
                wanted.normalise(&set);
                if CONCURRENT && wanted.lock_ranks().next().is_some_and(|first| Some(first) <= set.locked) {
                    // More locks now could deadlock, which PostgreSQL notices after a second. Begin
                    // again, with all locks in order.
                    transaction.rollback().await?;
                    return Err(Failure::OutOfOrder);
                }
            }
            Decision::Abandon => {
                transaction.rollback().await?;
                return Ok(Committed::Nothing);
            }
            Decision::Commit(changes) => {
                return match write::apply(&mut transaction, &engine.names, &changes).await {
                    Ok(numbers) => {
                        transaction.commit().await?;
                        engine.names.learn(numbers);
                        engine.committed();
                        Ok(Committed::Written)
                    }
                    Err(Stopped::Failed(failure)) => Err(failure),
                    Err(Stopped::Mismatch(table)) => {
                        transaction.rollback().await?;
                        Err(explain(&mut writer, table, &changes, &set).await?)
                    }
                };
            }
        }
    }
    Err(too_many_rounds().into())
}

fn too_many_rounds() -> StoreError {
    StoreError::Invalid { what: "decision", reason: format!("it requested more rows {ROUNDS} times") }
}

/// Names a row that was not in the state that the changes replace. Called after the rollback.
async fn explain(
    connection: &mut Connection,
    table: Table,
    changes: &Changes,
    set: &ReadSet,
) -> Result<Failure, Failure> {
    let row = match table {
        Table::Meters => wrong_meter(connection, changes).await?,
        Table::Sealed => wrong_sealed(connection, changes).await?,
        Table::Requests => {
            let mut found = ReadSet::default();
            let mut reads =
                Reads { requests: changes.requests.iter().map(|put| put.key.clone()).collect(), ..Reads::default() };
            reads.normalise(&found);
            read::requests(connection, &reads, &mut found).await?;
            let known: Vec<_> = reads.requests.iter().filter(|key| found.request(key).present().is_some()).collect();
            // Another server executed the same request after it was read as absent. The next
            // decision sees its outcome.
            if !known.is_empty() && known.iter().all(|key| matches!(set.requests.get(key), Some(None))) {
                return Ok(Failure::Retry);
            }
            known.first().copied().or(reads.requests.first()).map(|key| RowName::Request(key.request, key.chunk))
        }
        Table::Audit => wrong_audit(connection, changes).await?,
        Table::Grants => changes.grants.first().map(|grant| RowName::Grant(grant.id)),
        Table::Revocations => changes.revocations.first().map(|revocation| RowName::Grant(revocation.id)),
        Table::Fingerprints => changes.fingerprints.first().map(|put| RowName::Fingerprint(put.prefix)),
        Table::Exposures => None,
        Table::Tasks => changes.tasks.first().map(|row| RowName::Task(row.key)),
        Table::Shipments => changes
            .shipments
            .first()
            .map(|row| row.upload)
            .or(changes.refusals.first().map(|refusal| refusal.upload))
            .map(RowName::Shipment),
    };
    let row = row.ok_or_else(|| StoreError::corrupt("a statement wrote fewer rows than it was given"))?;
    Ok(Failure::Fatal(StoreError::Conflict { row }))
}

async fn wrong_meter(connection: &mut Connection, changes: &Changes) -> Result<Option<RowName>, Failure> {
    let rows = sqlx::query::<Database>(METER_GENERATIONS)
        .bind(keys(changes.meters.iter().map(|put| put.title.as_i64())))
        .fetch_all(connection)
        .await?;
    let mut found = std::collections::HashMap::new();
    for row in rows {
        found.insert(row.try_get::<i64, _>(0)?, decode::unsigned(&row, 1)?);
    }
    let wrong = changes
        .meters
        .iter()
        .find(|put| found.get(&put.title.as_i64()).copied().unwrap_or_default() != put.row.generation - 1);
    Ok(wrong.or(changes.meters.first()).map(|put| RowName::Meter(put.title)))
}

async fn wrong_sealed(connection: &mut Connection, changes: &Changes) -> Result<Option<RowName>, Failure> {
    let (json, blob) = RowBatch::of(changes.sealed.iter().enumerate(), |row, (index, put)| {
        row.unsigned(index as u64).int(i64::from(put.kind.number())).octets(&put.id);
    })
    .into_parameters();
    let mut found = std::collections::HashMap::new();
    for row in sqlx::query::<Database>(SEALED_GENERATIONS).bind(json).bind(blob).fetch_all(connection).await? {
        found.insert(decode::unsigned(&row, 0)?, decode::unsigned(&row, 1)?);
    }
    let wrong = changes
        .sealed
        .iter()
        .zip(0..)
        .find(|(put, index)| found.get(index).copied().unwrap_or_default() != put.row.generation - 1);
    Ok(wrong.map(|(put, _)| put).or(changes.sealed.first()).map(|put| RowName::Sealed(put.kind, put.id.clone())))
}

async fn wrong_audit(connection: &mut Connection, changes: &Changes) -> Result<Option<RowName>, Failure> {
    for record in &changes.audit {
        let taken = sqlx::query::<Database>(
            "SELECT 1 FROM audit WHERE writer = (SELECT number FROM server WHERE writer = $1) AND sequence = $2",
        )
        .bind(record.writer.octets().as_slice())
        .bind(record.sequence.cast_signed())
        .fetch_optional(&mut *connection)
        .await?;
        if taken.is_some() {
            return Ok(Some(RowName::Audit(record.writer, record.sequence)));
        }
    }
    Ok(changes.audit.first().map(|record| RowName::Audit(record.writer, record.sequence)))
}

const METER_GENERATIONS: &str =
    concat!("SELECT m.title, m.generation FROM ", keys!(), join!(), "meter AS m ON m.title = k.value");

const SEALED_GENERATIONS: &str = concat!(
    "SELECT ",
    int!(0),
    ", s.generation FROM ",
    rows!(),
    join!(),
    "sealed AS s ON s.kind = ",
    int!(1),
    " AND s.id = ",
    octets!(2, 3)
);

const ATTEMPTS: u32 = 8;
/// How often a decision may request more rows.
const ROUNDS: u32 = 16;
const BACK_OFF: Duration = Duration::from_millis(2);
