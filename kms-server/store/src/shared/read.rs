//! What a transaction reads. On PostgreSQL the rows are locked in order of their keys. The absence
//! of rows is locked too.

use futures::TryStreamExt;
use sqlx::Row as _;

use super::{CONCURRENT, Connection, Database, decode, exposure, keys, lock_stripes, work_orders};
use crate::{
    ReadSet, Reads, RowKind, StoreError,
    batch::RowBatch,
    error::Failure,
    row::RowLock,
    transaction::{LockRank, campaign_name},
};

/// Reads into the set. `reads` is sorted and names nothing that the set has.
pub(super) async fn into_set(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    set.locked = set.locked.max(reads.lock_ranks().last());
    if CONCURRENT && reads.spool {
        // Two servers that add a file to the spool each count the other's file.
        lock_stripes(connection, &[SPOOL]).await?;
    }
    if CONCURRENT {
        // Two servers that add a work order of one principal each count the other's order.
        let makers = reads.work_orders_of.iter().map(|maker| WORK_ORDERS + stripe(maker.to_string().as_bytes()));
        lock_stripes(connection, &stripes(makers)).await?;
        // I4: two servers that import the same key value at the same time must see each other's
        // rows.
        lock_stripes(connection, &stripes(reads.fingerprints.iter().map(|prefix| FINGERPRINTS + stripe(&prefix.0))))
            .await?;
    }
    meters(connection, reads, set).await?;
    sealed(connection, reads, set).await?;
    if CONCURRENT {
        absences(connection, reads, set).await?;
    }
    requests(connection, reads, set).await?;
    fingerprints(connection, reads, set).await?;
    grants(connection, reads, set).await?;
    shipments(connection, reads, set).await?;
    tasks(connection, reads, set).await?;
    if reads.spool {
        set.spool = Some(
            sqlx::query::<Database>(SPOOLED_FILES)
                .fetch_all(&mut *connection)
                .await?
                .iter()
                .map(decode::spooled)
                .collect::<Result<_, _>>()?,
        );
    }
    work_orders::count_of_makers(connection, &reads.work_orders_of, set).await?;
    exposure::into_set(connection, &reads.exposures, set).await?;
    if reads.clock {
        set.clock = Some(decode::millis(&sqlx::query::<Database>(CLOCK).fetch_one(&mut *connection).await?, 0)?);
    }
    audit_tails(connection, reads, set).await
}

/// Locks the part of the key space of every absent row, and reads again: the row may have been
/// inserted before the lock was acquired.
async fn absences(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    let absent = Reads {
        meters: reads
            .meters
            .iter()
            .filter(|title| set.meters.get(title).is_some_and(Option::is_none))
            .copied()
            .collect(),
        sealed: reads
            .sealed
            .iter()
            .filter(|name| set.sealed.get(*name).is_some_and(Option::is_none))
            .cloned()
            .collect(),
        campaigns: reads
            .campaigns
            .iter()
            .filter(|id| set.sealed.get(&campaign_name(**id)).is_some_and(Option::is_none))
            .copied()
            .collect(),
        ..Reads::default()
    };
    if absent.is_empty() {
        return Ok(());
    }
    set.locked = set.locked.max(Some(LockRank::Absences));
    let names: Vec<_> =
        absent.sealed.iter().cloned().chain(absent.campaigns.iter().copied().map(campaign_name)).collect();
    lock_insertions(connection, absent.meters.iter().copied(), names.iter()).await?;
    meters(connection, &absent, set).await?;
    sealed(connection, &absent, set).await
}

/// Locks the parts of the key space in which rows are, or will be, absent or inserted.
pub(super) async fn lock_insertions(
    connection: &mut Connection,
    meters: impl Iterator<Item = kms_domain::SystemTitle>,
    sealed: impl Iterator<Item = &(RowKind, Vec<u8>)>,
) -> Result<(), Failure> {
    let meters = meters.map(|title| METERS + stripe(&title.octets()));
    let sealed = sealed.map(|(kind, id)| SEALED + stripe(&[&[kind.number()], id.as_slice()].concat()));
    lock_stripes(connection, &stripes(meters.chain(sealed))).await
}

async fn meters(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    if reads.meters.is_empty() {
        return Ok(());
    }
    set.meters.extend(reads.meters.iter().map(|title| (*title, None)));
    let mut rows = sqlx::query::<Database>(METER_ROWS)
        .bind(keys(reads.meters.iter().map(|title| title.as_i64())))
        .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let meter = decode::meter(&row)?;
        set.meters.insert(meter.title, Some(meter.row));
    }
    Ok(())
}

async fn sealed(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    let mut names = reads.sealed.clone();
    // All campaigns are locked in one step and in one mode: otherwise two transactions that hold
    // one shared could wait for each other.
    let campaigns = if names.iter().any(|(kind, _)| kind.lock() == RowLock::Campaign) {
        SEALED_ROWS_EXCLUSIVE
    } else {
        SEALED_ROWS_SHARED
    };
    names.extend(reads.campaigns.iter().copied().map(campaign_name));
    names.sort_unstable();
    names.dedup();
    set.sealed.extend(names.iter().map(|name| (name.clone(), None)));
    for (lock, statement) in [
        (RowLock::Shared, SEALED_ROWS_SHARED),
        (RowLock::Exclusive, SEALED_ROWS_EXCLUSIVE),
        (RowLock::Campaign, campaigns),
    ] {
        let wanted: Vec<_> = names.iter().filter(|(kind, _)| kind.lock() == lock).collect();
        if wanted.is_empty() {
            continue;
        }
        let (json, blob) = RowBatch::of(wanted, |row, (kind, id)| {
            row.int(i64::from(kind.number())).octets(id);
        })
        .into_parameters();
        let mut rows = sqlx::query::<Database>(statement).bind(json).bind(blob).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            let number: i64 = row.try_get(0)?;
            let kind = RowKind::ALL
                .into_iter()
                .find(|kind| i64::from(kind.number()) == number)
                .ok_or_else(|| StoreError::corrupt("the kind of a sealed row"))?;
            set.sealed.insert((kind, row.try_get(1)?), Some(decode::sealed(&row, 2)?));
        }
    }
    Ok(())
}

/// Requests are not locked. If two servers execute the same request, the second conflicts when it
/// writes, and decides again.
pub(super) async fn requests(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    if reads.requests.is_empty() {
        return Ok(());
    }
    set.requests.extend(reads.requests.iter().map(|key| (key.clone(), None)));
    let (json, blob) = RowBatch::of(reads.requests.iter().enumerate(), |row, (index, key)| {
        row.unsigned(index as u64)
            .text(&key.principal.to_string())
            .octets(&key.request.octets())
            .int(i64::from(key.chunk));
    })
    .into_parameters();
    for row in sqlx::query::<Database>(REQUEST_ROWS).bind(json).bind(blob).fetch_all(connection).await? {
        let index =
            usize::try_from(row.try_get::<i64, _>(0)?).map_err(|_| StoreError::corrupt("the place of a request"))?;
        if let Some(key) = reads.requests.get(index) {
            set.requests.insert(key.clone(), Some(decode::request(&row, 1)?));
        }
    }
    Ok(())
}

async fn fingerprints(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    if reads.fingerprints.is_empty() {
        return Ok(());
    }
    set.fingerprints.extend(reads.fingerprints.iter().map(|prefix| (*prefix, Vec::new())));
    let mut rows = sqlx::query::<Database>(FINGERPRINT_ROWS)
        .bind(keys(reads.fingerprints.iter().map(|prefix| prefix.as_i64())))
        .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let (prefix, owner) = decode::fingerprint(&row)?;
        set.fingerprints.entry(prefix).or_default().push(owner);
    }
    Ok(())
}

async fn grants(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    if reads.grants.is_empty() {
        return Ok(());
    }
    set.grants.extend(reads.grants.iter().map(|id| (*id, None)));
    let (json, blob) = RowBatch::of(&reads.grants, |row, id| {
        row.octets(&id.octets());
    })
    .into_parameters();
    for row in sqlx::query::<Database>(GRANT_ROWS).bind(json).bind(blob).fetch_all(connection).await? {
        let grant = decode::grant(&row)?;
        set.grants.insert(grant.id, Some(grant));
    }
    Ok(())
}

async fn shipments(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    if reads.shipments.is_empty() {
        return Ok(());
    }
    set.shipments.extend(reads.shipments.iter().map(|upload| (*upload, None)));
    let (json, blob) = RowBatch::of(&reads.shipments, |row, upload| {
        row.octets(&upload.0);
    })
    .into_parameters();
    for row in sqlx::query::<Database>(SHIPMENT_ROWS).bind(json).bind(blob).fetch_all(connection).await? {
        let shipment = decode::shipment(&row)?;
        set.shipments.insert(shipment.upload, Some(shipment));
    }
    Ok(())
}

async fn tasks(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    if reads.tasks.is_empty() {
        return Ok(());
    }
    set.tasks.extend(reads.tasks.iter().map(|key| (*key, None)));
    let (json, blob) = RowBatch::of(&reads.tasks, |row, key| {
        row.octets(&key.campaign.octets()).int(key.meter.as_i64());
    })
    .into_parameters();
    let mut rows = sqlx::query::<Database>(TASK_ROWS).bind(json).bind(blob).fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let task = decode::task(&row)?;
        set.tasks.insert(task.key, Some(task));
    }
    Ok(())
}

async fn audit_tails(connection: &mut Connection, reads: &Reads, set: &mut ReadSet) -> Result<(), Failure> {
    for writer in &reads.audit_tails {
        let row = sqlx::query::<Database>(AUDIT_TAIL)
            .bind(writer.octets().as_slice())
            .fetch_optional(&mut *connection)
            .await?;
        set.audit_tails.insert(*writer, row.as_ref().map(decode::tail).transpose()?);
    }
    Ok(())
}

/// Sorted and without repetitions: all transactions lock in the same order.
fn stripes(stripes: impl Iterator<Item = i32>) -> Vec<i32> {
    let mut stripes: Vec<i32> = stripes.collect();
    stripes.sort_unstable();
    stripes.dedup();
    stripes
}

/// A number below [`STRIPES`], the same in every build.
fn stripe(octets: &[u8]) -> i32 {
    let sum = octets.iter().fold(0_u32, |sum, octet| sum.wrapping_mul(31).wrapping_add(u32::from(*octet)));
    (sum % STRIPES).cast_signed()
}

/// Few, so that a batch can lock all of them: PostgreSQL's table of locks is small.
const STRIPES: u32 = 64;
const METERS: i32 = 0;
const SEALED: i32 = 64;
const FINGERPRINTS: i32 = 128;
const SPOOL: i32 = 192;
const WORK_ORDERS: i32 = 193;

const METER_ROWS: &str = concat!(
    "SELECT m.title, m.generation, m.seal, m.body FROM ",
    keys!(),
    join!(),
    "meter AS m ON m.title = k.value",
    exclusive!("m", "m.title")
);

macro_rules! sealed_rows {
    ($lock:expr) => {
        concat!(
            "SELECT CAST(s.kind AS BIGINT), s.id, s.generation, s.seal, s.body FROM ",
            rows!(),
            join!(),
            "sealed AS s ON s.kind = ",
            int!(0),
            " AND s.id = ",
            octets!(1, 2),
            $lock
        )
    };
}
const SEALED_ROWS_SHARED: &str = sealed_rows!(shared!("s", "s.kind, s.id"));
const SEALED_ROWS_EXCLUSIVE: &str = sealed_rows!(exclusive!("s", "s.kind, s.id"));

const REQUEST_ROWS: &str = concat!(
    "SELECT ",
    int!(0),
    ", r.digest, r.outcome, r.expires_ms FROM ",
    rows!(),
    join!(),
    "term AS t ON t.kind = 5 AND t.text = ",
    text!(1),
    join!(),
    "request AS r ON r.request = ",
    octets!(2, 3),
    " AND r.principal = t.id AND r.chunk = ",
    int!(4)
);

const FINGERPRINT_ROWS: &str = concat!(
    "SELECT f.prefix, CAST(f.owner_kind AS BIGINT), f.owner, CAST(f.setup AS BIGINT), CAST(f.key_type AS BIGINT), f.version FROM ",
    keys!(),
    join!(),
    "fingerprint AS f ON f.prefix = k.value"
);

const GRANT_ROWS: &str = concat!(
    "SELECT ",
    grant_columns!(),
    " FROM ",
    rows!(),
    join!(),
    "key_grant AS g ON g.id = ",
    octets!(0, 1),
    grant_joins!(),
    exclusive!("g", "g.id")
);

const SHIPMENT_ROWS: &str = concat!(
    "SELECT ",
    shipment_columns!(),
    " FROM ",
    rows!(),
    join!(),
    "shipment AS p ON p.upload = ",
    octets!(0, 1),
    exclusive!("p", "p.upload")
);

/// States 1 to 3 are `Receiving`, `Received` and `Importing`. In other states no octets are kept.
const SPOOLED_FILES: &str = "SELECT upload, principal, size, received FROM shipment WHERE state IN (1, 2, 3)";

const TASK_ROWS: &str = concat!(
    "SELECT ",
    task_columns!(),
    " FROM ",
    rows!(),
    join!(),
    "task AS t ON t.campaign = ",
    octets!(0, 1),
    " AND t.meter = ",
    int!(2),
    task_joins!(),
    exclusive!("t", "t.campaign, t.meter")
);

const CLOCK: &str = concat!("SELECT ", now!());

const AUDIT_TAIL: &str = concat!(
    "SELECT s.writer, a.sequence, a.chain FROM server AS s",
    join!(),
    "audit AS a ON a.writer = s.number WHERE s.writer = $1 ORDER BY a.sequence DESC LIMIT 1"
);
