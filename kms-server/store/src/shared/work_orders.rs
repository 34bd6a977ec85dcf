//! The search columns of work orders: which orders there are, and how many of each maker.

use kms_domain::{PrincipalId, UnixMillis, WorkOrder, WorkOrderId, WorkOrderState};
use sqlx::{Pool, QueryBuilder, Row as _};

use super::{
    Connection, Database, Engine, decode,
    names::{Numbers, TermKind},
};
use crate::{
    ReadSet, StoreError, WorkOrderColumns, WorkOrderCount, WorkOrderFilter, WorkOrderRow, batch::RowBatch,
    error::Failure, row::WorkOrderEnding,
};

type Readers = Pool<Database>;

/// Writes the columns of orders, whatever was there: the order's sealed row is written in the same
/// transaction, over the generation before it.
pub(super) async fn write(
    connection: &mut Connection,
    rows: &[WorkOrderColumns],
    numbers: &Numbers,
) -> Result<(), Failure> {
    let batch = batch(rows, |row| numbers.term(TermKind::Principal, &row.maker.to_string()));
    if batch.rows() == 0 {
        return Ok(());
    }
    let (json, blob) = batch.into_parameters();
    sqlx::query::<Database>(PUT).bind(json).bind(blob).execute(connection).await?;
    Ok(())
}

/// Adds missing columns, and returns how many. The makers of orders have numbers: each has made a
/// request.
pub(super) async fn complete(engine: &Engine, rows: &[WorkOrderColumns]) -> Result<u64, StoreError> {
    let mut makers = std::collections::HashMap::new();
    for row in rows {
        let text = row.maker.to_string();
        if makers.contains_key(&text) {
            continue;
        }
        let number: Option<i64> = sqlx::query_scalar::<Database, i64>(TERM)
            .bind(TermKind::Principal.number())
            .bind(text.as_str())
            .fetch_optional(&engine.readers)
            .await?;
        makers.insert(text, number);
    }
    let known = rows.iter().filter(|row| makers.get(&row.maker.to_string()).is_some_and(Option::is_some));
    let batch = batch(known, |row| makers.get(&row.maker.to_string()).copied().flatten().unwrap_or_default());
    if batch.rows() == 0 {
        return Ok(0);
    }
    let (json, blob) = batch.into_parameters();
    let missing: i64 = sqlx::query_scalar::<Database, i64>(COUNT_MISSING)
        .bind(json.as_str())
        .bind(blob.as_slice())
        .fetch_one(&engine.readers)
        .await?;
    if missing == 0 {
        return Ok(0);
    }
    let done = sqlx::query::<Database>(COMPLETE).bind(json).bind(blob).execute(&mut *engine.writer().await?).await?;
    engine.committed();
    Ok(done.rows_affected())
}

/// How many orders of these makers count, by the database's clock.
pub(super) async fn count_of_makers(
    connection: &mut Connection,
    makers: &[PrincipalId],
    set: &mut ReadSet,
) -> Result<(), Failure> {
    for maker in makers {
        let row = sqlx::query::<Database>(COUNT_OF_MAKER)
            .bind(TermKind::Principal.number())
            .bind(maker.to_string())
            .bind(WorkOrder::COUNTED_MS)
            .fetch_one(&mut *connection)
            .await?;
        let first_until = row.try_get::<Option<i64>, _>(1)?.map(UnixMillis);
        let count = WorkOrderCount { orders: decode::unsigned(&row, 0)?, first_until };
        set.work_orders_of.insert(maker.clone(), count);
    }
    Ok(())
}

/// A page of orders in the order of their begin, with their sealed rows.
pub(super) async fn page(
    readers: &Readers,
    filter: &WorkOrderFilter,
    after: Option<(UnixMillis, WorkOrderId)>,
    limit: u32,
) -> Result<Vec<WorkOrderRow>, StoreError> {
    let mut query = QueryBuilder::<Database>::new(PAGE);
    query.push_bind(i64::from(crate::RowKind::WorkOrder.number()));
    if let Some(technician) = &filter.technician {
        query.push(" AND w.technician = ").push_bind(technician.clone());
    }
    if let Some(maker) = &filter.maker {
        query.push(" AND w.maker = (SELECT id FROM term WHERE kind = ").push_bind(TermKind::Principal.number());
        query.push(" AND text = ").push_bind(maker.to_string()).push(")");
    }
    if let Some((state, now)) = filter.state {
        let ending = match state {
            WorkOrderState::Completed => WorkOrderEnding::Completed,
            WorkOrderState::Cancelled => WorkOrderEnding::Cancelled,
            WorkOrderState::Planned | WorkOrderState::Open | WorkOrderState::Expired => WorkOrderEnding::None,
        };
        query.push(" AND w.state = ").push_bind(ending.number());
        match state {
            WorkOrderState::Planned => {
                query.push(" AND w.from_ms > ").push_bind(now.0);
            }
            WorkOrderState::Open => {
                query.push(" AND w.from_ms <= ").push_bind(now.0);
                ends_after(&mut query, now);
            }
            WorkOrderState::Expired => {
                query.push(" AND w.until_ms <= ").push_bind(now.0);
            }
            WorkOrderState::Completed | WorkOrderState::Cancelled => {}
        }
    }
    if let Some(time) = filter.ends_after {
        ends_after(&mut query, time);
    }
    if let Some(time) = filter.begins_before {
        query.push(" AND w.from_ms < ").push_bind(time.0);
    }
    if let Some((from, id)) = after {
        query.push(" AND (w.from_ms, w.id) > (").push_bind(from.0);
        query.push(", ").push_bind(id.as_str().as_bytes().to_vec()).push(")");
    }
    query.push(" ORDER BY w.from_ms, w.id LIMIT ").push_bind(i64::from(limit));
    let rows = query.build().fetch_all(readers).await?;
    rows.iter()
        .map(|row| {
            let id = String::from_utf8(row.try_get(0)?).ok().and_then(|id| WorkOrderId::parse(&id).ok());
            let id = id.ok_or_else(|| StoreError::corrupt("the id of a work order"))?;
            Ok(WorkOrderRow { id, from: decode::millis(row, 1)?, row: decode::sealed(row, 2)? })
        })
        .collect()
}

/// An order has a longest time: so the walk does not begin with the first order that there ever
/// was.
fn ends_after(query: &mut QueryBuilder<Database>, time: UnixMillis) {
    query.push(" AND w.until_ms > ").push_bind(time.0);
    query.push(" AND w.from_ms > ").push_bind(time.after(-WorkOrder::LONGEST_MS - 1).0);
}

fn batch<'a>(
    rows: impl IntoIterator<Item = &'a WorkOrderColumns>,
    maker: impl Fn(&WorkOrderColumns) -> i64,
) -> RowBatch {
    RowBatch::of(rows, |batch, row| {
        batch
            .octets(row.id.as_str().as_bytes())
            .int(maker(row))
            .text(&row.technician)
            .int(row.end.number())
            .int(row.from.0)
            .int(row.until.0);
    })
}

macro_rules! insert {
    ($conflict:literal) => {
        concat!(
            "INSERT INTO work_order (id, maker, technician, state, from_ms, until_ms) SELECT ",
            octets!(0, 1),
            ", ",
            int!(2),
            ", ",
            text!(3),
            ", ",
            int!(4),
            ", ",
            int!(5),
            ", ",
            int!(6),
            " FROM ",
            rows!(),
            " WHERE true ON CONFLICT (id) DO ",
            $conflict
        )
    };
}

const PUT: &str = insert!(
    "UPDATE SET maker = excluded.maker, technician = excluded.technician, state = excluded.state, from_ms = excluded.from_ms, until_ms = excluded.until_ms"
);

const COMPLETE: &str = insert!("NOTHING");

const COUNT_MISSING: &str = concat!(
    "SELECT count(*) FROM ",
    rows!(),
    " WHERE NOT EXISTS (SELECT 1 FROM work_order AS w WHERE w.id = ",
    octets!(0, 1),
    ")"
);

const TERM: &str = "SELECT CAST(id AS BIGINT) FROM term WHERE kind = $1 AND text = $2";

// All states are named, so that the index `work_order_unended` finds the rows. The time is a query
// of its own: PostgreSQL compares an index with nothing that changes within a statement.
const COUNT_OF_MAKER: &str = concat!(
    "SELECT count(*), min(until_ms) FROM work_order WHERE maker = (SELECT id FROM term WHERE kind = $1 AND text = $2) AND state IN (0, 1, 2) AND until_ms > (SELECT ",
    now!(),
    " - $3)"
);

const PAGE: &str = concat!(
    "SELECT w.id, w.from_ms, s.generation, s.seal, s.body FROM work_order AS w",
    join!(),
    "sealed AS s ON s.id = w.id WHERE s.kind = "
);
