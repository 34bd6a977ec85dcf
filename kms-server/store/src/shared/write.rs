//! What a transaction writes: a few statements, whatever the number of rows. Each statement counts
//! its rows: a missing one means that another transaction wrote it first.

use super::{
    CONCURRENT, Connection, Database, Engine, exposure, keys,
    names::{Names, Numbers, TermKind},
    read, spool,
    swap::{Stopped, Table, count, put},
    task, work_orders,
};
use kms_domain::SystemTitle;

use crate::{Changes, MeterPut, RowKind, StoreError, batch::RowBatch};

/// Writes all changes, each over the generation before it. The numbers of names must be remembered
/// once the transaction is committed.
pub(super) async fn apply(connection: &mut Connection, names: &Names, changes: &Changes) -> Result<Numbers, Stopped> {
    check(changes)?;
    let numbers = names.resolve(connection, changes).await?;
    if CONCURRENT {
        let sealed: Vec<(RowKind, Vec<u8>)> =
            changes.sealed.iter().filter(|put| put.row.generation == 1).map(|put| (put.kind, put.id.clone())).collect();
        let meters = changes.meters.iter().filter(|put| put.row.generation == 1).map(|put| put.title);
        read::lock_insertions(connection, meters, sealed.iter()).await?;
    }
    meters(connection, changes, &numbers).await?;
    sealed(connection, changes).await?;
    work_orders::write(connection, &changes.work_orders, &numbers).await?;
    fingerprints(connection, changes).await?;
    spool::write(connection, changes).await?;
    task::write(connection, changes, &numbers).await?;
    exposure::write(connection, changes, &numbers).await?;
    requests(connection, changes, &numbers).await?;
    grants(connection, changes, &numbers).await?;
    audit(connection, changes, &numbers).await?;
    Ok(numbers)
}

/// Refuses changes that no caller may request.
fn check(changes: &Changes) -> Result<(), StoreError> {
    let generations =
        changes.meters.iter().map(|put| put.row.generation).chain(changes.sealed.iter().map(|put| put.row.generation));
    let generations = generations
        .chain(changes.shipments.iter().map(|row| row.generation))
        .chain(changes.tasks.iter().map(|row| row.generation));
    if generations.into_iter().any(|generation| generation == 0 || i64::try_from(generation).is_err()) {
        return Err(StoreError::Invalid { what: "generation", reason: "generations start at 1".into() });
    }
    if changes.meters.iter().any(|put| put.row.generation == 1 && put.projection.is_none()) {
        return Err(StoreError::Invalid {
            what: "meter row",
            reason: "the first generation needs its search columns".into(),
        });
    }
    Ok(())
}

async fn meters(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let (new, old): (Vec<_>, Vec<_>) = changes.meters.iter().partition(|put| put.row.generation == 1);
    let (projected, plain): (Vec<_>, Vec<_>) = old.into_iter().partition(|put| put.projection.is_some());
    let full = |puts: Vec<&MeterPut>| {
        RowBatch::of(puts, |row, put| {
            row.int(put.title.as_i64()).unsigned(put.row.generation).octets(&put.row.seal).octets(&put.row.body);
            if let Some(projection) = &put.projection {
                row.int(numbers.term(TermKind::Vendor, &projection.vendor))
                    .int(numbers.term(TermKind::Profile, &projection.profile))
                    .int(i64::from(projection.status))
                    .int(numbers.optional_term(TermKind::HeadEnd, projection.head_end.as_deref()))
                    .int(numbers.optional_term(TermKind::Batch, projection.batch.as_deref()));
            }
        })
    };
    put(connection, INSERT_METERS, full(new), Table::Meters).await?;
    put(connection, UPDATE_METERS, full(plain), Table::Meters).await?;
    put(connection, UPDATE_PROJECTED_METERS, full(projected), Table::Meters).await?;
    group_members(connection, changes).await
}

/// The groups of the meters whose search columns are written. Only the transaction that writes a
/// meter's row writes its groups.
async fn group_members(connection: &mut Connection, changes: &Changes) -> Result<(), Stopped> {
    let projected = changes.meters.iter().filter_map(|put| Some((put, put.projection.as_ref()?)));
    let before = RowBatch::of(projected.clone().filter(|(put, _)| put.row.generation > 1), |row, (put, _)| {
        row.int(put.title.as_i64());
    });
    if before.rows() > 0 {
        sqlx::query::<Database>(DELETE_GROUP_MEMBERS)
            .bind(before.into_parameters().0)
            .execute(&mut *connection)
            .await?;
    }
    let members =
        projected.flat_map(|(put, projection)| projection.groups.iter().map(move |group| (put.title, *group)));
    let batch = RowBatch::of(members, |row, (title, group)| {
        row.unsigned(group).int(title.as_i64());
    });
    let rows = batch.rows();
    if rows == 0 {
        return Ok(());
    }
    let done =
        sqlx::query::<Database>(INSERT_GROUP_MEMBERS).bind(batch.into_parameters().0).execute(connection).await?;
    count(rows, done.rows_affected(), Table::Meters)
}

/// Adds missing members, and returns how many. Members are counted first, so that a check of
/// millions takes no lock.
pub(super) async fn complete_group_members(engine: &Engine, members: &[(SystemTitle, u64)]) -> Result<u64, StoreError> {
    let mut titles: Vec<i64> = members.iter().map(|(title, _)| title.as_i64()).collect();
    titles.dedup();
    let counted: i64 =
        sqlx::query_scalar::<Database, i64>(COUNT_GROUP_MEMBERS).bind(keys(titles)).fetch_one(&engine.readers).await?;
    if u64::try_from(counted).unwrap_or_default() >= members.len() as u64 {
        return Ok(0);
    }
    let batch = RowBatch::of(members, |row, (title, group)| {
        row.unsigned(*group).int(title.as_i64());
    });
    let done = sqlx::query::<Database>(COMPLETE_GROUP_MEMBERS)
        .bind(batch.into_parameters().0)
        .execute(&mut *engine.writer().await?)
        .await?;
    engine.committed();
    Ok(done.rows_affected())
}

async fn sealed(connection: &mut Connection, changes: &Changes) -> Result<(), Stopped> {
    let (new, old): (Vec<_>, Vec<_>) = changes.sealed.iter().partition(|put| put.row.generation == 1);
    for (puts, statement) in [(new, INSERT_SEALED), (old, UPDATE_SEALED)] {
        let batch = RowBatch::of(puts, |row, put| {
            row.int(i64::from(put.kind.number()))
                .octets(&put.id)
                .unsigned(put.row.generation)
                .octets(&put.row.seal)
                .octets(&put.row.body);
        });
        put(connection, statement, batch, Table::Sealed).await?;
    }
    Ok(())
}

async fn fingerprints(connection: &mut Connection, changes: &Changes) -> Result<(), Stopped> {
    let batch = RowBatch::of(&changes.fingerprints, |row, put| {
        row.int(put.prefix.as_i64())
            .int(i64::from(put.owner.owner.kind().number()))
            .int(i64::from_be_bytes(put.owner.owner.id()))
            .int(i64::from(u16::from_be_bytes(put.owner.setup.octets())))
            .int(i64::from(put.owner.key_type.number()))
            .int(i64::from(put.owner.version.number()));
    });
    if batch.rows() == 0 {
        return Ok(());
    }
    let rows = batch.rows();
    let done = sqlx::query::<Database>(INSERT_FINGERPRINTS).bind(batch.into_parameters().0).execute(connection).await?;
    count(rows, done.rows_affected(), Table::Fingerprints)
}

async fn requests(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let batch = RowBatch::of(&changes.requests, |row, put| {
        row.octets(&put.key.request.octets())
            .int(numbers.term(TermKind::Principal, &put.key.principal.to_string()))
            .int(i64::from(put.key.chunk))
            .octets(&put.row.digest)
            .octets(&put.row.outcome)
            .int(put.row.expires.0);
    });
    put(connection, INSERT_REQUESTS, batch, Table::Requests).await
}

async fn grants(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let batch = RowBatch::of(&changes.grants, |row, grant| {
        row.octets(&grant.id.octets())
            .int(numbers.term(TermKind::Principal, &grant.principal.to_string()))
            .int(numbers.term(TermKind::Purpose, &grant.purpose))
            .int(grant.issued.0)
            .int(grant.not_after.0)
            .int(numbers.writer(grant.audit.writer))
            .unsigned(grant.audit.sequence)
            .int(i64::from(grant.meters))
            .optional(grant.revoked.map(|time| time.0));
    });
    put(connection, INSERT_GRANTS, batch, Table::Grants).await?;
    let batch = RowBatch::of(&changes.revocations, |row, revocation| {
        row.octets(&revocation.id.octets()).int(revocation.revoked.0);
    });
    put(connection, REVOKE_GRANTS, batch, Table::Revocations).await
}

async fn audit(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let batch = RowBatch::of(&changes.audit, |row, record| {
        row.int(numbers.writer(record.writer))
            .unsigned(record.sequence)
            .int(record.time.0)
            .int(i64::from(record.kind))
            .octets(&record.chain)
            .octets(&record.record);
    });
    put(connection, INSERT_AUDIT, batch, Table::Audit).await
}

const INSERT_METERS: &str = concat!(
    "INSERT INTO meter (title, generation, seal, body, vendor, profile, status, head_end, batch) SELECT ",
    int!(0),
    ", ",
    int!(1),
    ", ",
    octets!(2, 3),
    ", ",
    octets!(4, 5),
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
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (title) DO NOTHING"
);

const UPDATE_METERS: &str = concat!(
    "UPDATE meter SET generation = v.generation, seal = v.seal, body = v.body FROM (SELECT ",
    int!(0),
    " AS title, ",
    int!(1),
    " AS generation, ",
    octets!(2, 3),
    " AS seal, ",
    octets!(4, 5),
    " AS body FROM ",
    rows!(),
    ") AS v WHERE meter.title = v.title AND meter.generation = v.generation - 1"
);

const UPDATE_PROJECTED_METERS: &str = concat!(
    "UPDATE meter SET generation = v.generation, seal = v.seal, body = v.body, vendor = v.vendor, profile = v.profile, status = v.status, head_end = v.head_end, ",
    "batch = v.batch FROM (SELECT ",
    int!(0),
    " AS title, ",
    int!(1),
    " AS generation, ",
    octets!(2, 3),
    " AS seal, ",
    octets!(4, 5),
    " AS body, ",
    int!(6),
    " AS vendor, ",
    int!(7),
    " AS profile, ",
    int!(8),
    " AS status, ",
    int!(9),
    " AS head_end, ",
    int!(10),
    " AS batch FROM ",
    rows!(),
    ") AS v WHERE meter.title = v.title AND meter.generation = v.generation - 1"
);

const DELETE_GROUP_MEMBERS: &str =
    concat!("DELETE FROM group_member WHERE meter IN (SELECT ", int!(0), " FROM ", rows!(), ")");

const COUNT_GROUP_MEMBERS: &str =
    concat!("SELECT count(*) FROM ", keys!(), join!(), "group_member AS g ON g.meter = k.value");

const INSERT_GROUP_MEMBERS: &str =
    concat!("INSERT INTO group_member (group_number, meter) SELECT ", int!(0), ", ", int!(1), " FROM ", rows!());

const COMPLETE_GROUP_MEMBERS: &str = concat!(
    "INSERT INTO group_member (group_number, meter) SELECT ",
    int!(0),
    ", ",
    int!(1),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (group_number, meter) DO NOTHING"
);

const INSERT_SEALED: &str = concat!(
    "INSERT INTO sealed (kind, id, generation, seal, body) SELECT ",
    int!(0),
    ", ",
    octets!(1, 2),
    ", ",
    int!(3),
    ", ",
    octets!(4, 5),
    ", ",
    octets!(6, 7),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (kind, id) DO NOTHING"
);

const UPDATE_SEALED: &str = concat!(
    "UPDATE sealed SET generation = v.generation, seal = v.seal, body = v.body FROM (SELECT ",
    int!(0),
    " AS kind, ",
    octets!(1, 2),
    " AS id, ",
    int!(3),
    " AS generation, ",
    octets!(4, 5),
    " AS seal, ",
    octets!(6, 7),
    " AS body FROM ",
    rows!(),
    ") AS v WHERE sealed.kind = v.kind AND sealed.id = v.id AND sealed.generation = v.generation - 1"
);

const INSERT_FINGERPRINTS: &str = concat!(
    "INSERT INTO fingerprint (prefix, owner_kind, owner, setup, key_type, version) SELECT ",
    int!(0),
    ", ",
    int!(1),
    ", ",
    int!(2),
    ", ",
    int!(3),
    ", ",
    int!(4),
    ", ",
    int!(5),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (prefix, owner_kind, owner, setup, key_type, version) DO NOTHING"
);

const INSERT_REQUESTS: &str = concat!(
    "INSERT INTO request (request, principal, chunk, digest, outcome, expires_ms) SELECT ",
    octets!(0, 1),
    ", ",
    int!(2),
    ", ",
    int!(3),
    ", ",
    octets!(4, 5),
    ", ",
    octets!(6, 7),
    ", ",
    int!(8),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (request, principal, chunk) DO NOTHING"
);

const INSERT_GRANTS: &str = concat!(
    "INSERT INTO key_grant (id, principal, purpose, issued_ms, not_after_ms, writer, sequence, meters, revoked_ms) SELECT ",
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
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (id) DO NOTHING"
);

const REVOKE_GRANTS: &str = concat!(
    "UPDATE key_grant SET revoked_ms = v.revoked_ms FROM (SELECT ",
    octets!(0, 1),
    " AS id, ",
    int!(2),
    " AS revoked_ms FROM ",
    rows!(),
    ") AS v WHERE key_grant.id = v.id AND key_grant.revoked_ms IS NULL"
);

/// I2: UNIQUE (writer, sequence) makes two processes that use one writer id collide.
const INSERT_AUDIT: &str = concat!(
    "INSERT INTO audit (writer, sequence, time_ms, kind, chain, record) SELECT ",
    int!(0),
    ", ",
    int!(1),
    ", ",
    int!(2),
    ", ",
    int!(3),
    ", ",
    octets!(4, 5),
    ", ",
    octets!(6, 7),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (writer, sequence) DO NOTHING"
);
