//! What a transaction writes: a few statements, whatever the number of rows. Each counts its rows;
//! one that is missing means that somebody else was there first.

use super::{
    CONCURRENT, Connection, Database, Engine, keys,
    names::{Names, Numbers, TermKind},
    read,
};
use kms_domain::{SystemTitle, TaskWork};

use crate::{Changes, MeterPut, RowKind, StoreError, batch::Batch, error::Failure};

/// Why the changes were not written.
#[derive(Debug)]
pub(super) enum Stopped {
    /// An error, or another transaction.
    Failed(Failure),
    /// Not every row of a table was as the changes say.
    Mismatch(Table),
}

/// Where a mismatch was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Meters,
    Sealed,
    Requests,
    Grants,
    Revocations,
    Fingerprints,
    Shipments,
    Tasks,
    Audit,
}

impl From<sqlx::Error> for Stopped {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Writes all changes, each over the generation before it. The numbers of names are to be learnt
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
    fingerprints(connection, changes).await?;
    shipments(connection, changes).await?;
    tasks(connection, changes, &numbers).await?;
    requests(connection, changes, &numbers).await?;
    grants(connection, changes, &numbers).await?;
    audit(connection, changes, &numbers).await?;
    Ok(numbers)
}

/// Refuses what no caller may ask for.
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
        Batch::of(puts, |row, put| {
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

/// The groups of the meters whose search columns are written. Only the row's writer comes here, so
/// nobody else writes them meanwhile.
async fn group_members(connection: &mut Connection, changes: &Changes) -> Result<(), Stopped> {
    let projected = changes.meters.iter().filter_map(|put| Some((put, put.projection.as_ref()?)));
    let before = Batch::of(projected.clone().filter(|(put, _)| put.row.generation > 1), |row, (put, _)| {
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
    let batch = Batch::of(members, |row, (title, group)| {
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

/// Adds missing members; how many. What is there is counted first, so that a look at millions takes
/// no lock.
pub(super) async fn complete_group_members(engine: &Engine, members: &[(SystemTitle, u64)]) -> Result<u64, StoreError> {
    let mut titles: Vec<i64> = members.iter().map(|(title, _)| title.as_i64()).collect();
    titles.dedup();
    let counted: i64 =
        sqlx::query_scalar::<Database, i64>(COUNT_GROUP_MEMBERS).bind(keys(titles)).fetch_one(&engine.readers).await?;
    if u64::try_from(counted).unwrap_or_default() >= members.len() as u64 {
        return Ok(0);
    }
    let batch = Batch::of(members, |row, (title, group)| {
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
        let batch = Batch::of(puts, |row, put| {
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
    let batch = Batch::of(&changes.fingerprints, |row, put| {
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

async fn shipments(connection: &mut Connection, changes: &Changes) -> Result<(), Stopped> {
    let (new, old): (Vec<_>, Vec<_>) = changes.shipments.iter().partition(|shipment| shipment.generation == 1);
    for (puts, statement) in [(new, INSERT_SHIPMENTS), (old, UPDATE_SHIPMENTS)] {
        let batch = Batch::of(puts, |row, shipment| {
            row.octets(&shipment.upload.0)
                .unsigned(shipment.generation)
                .octets(&shipment.sha256)
                .unsigned(shipment.size)
                .text(&shipment.batch)
                .text(&shipment.principal.to_string())
                .int(shipment.state.number())
                .unsigned(shipment.received)
                .unsigned(shipment.next_line)
                .unsigned(shipment.imported)
                .unsigned(shipment.refused)
                .int(shipment.created.0)
                .int(shipment.updated.0)
                .octets(&shipment.progress);
        });
        put(connection, statement, batch, Table::Shipments).await?;
    }
    let batch = Batch::of(&changes.refusals, |row, refusal| {
        row.octets(&refusal.upload.0).unsigned(refusal.line).text(&refusal.field).text(&refusal.reason);
    });
    put(connection, INSERT_REFUSALS, batch, Table::Shipments).await
}

async fn tasks(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let (new, old): (Vec<_>, Vec<_>) = changes.tasks.iter().partition(|row| row.generation == 1);
    for (puts, statement) in [(new, INSERT_TASKS), (old, UPDATE_TASKS)] {
        let batch = Batch::of(puts, |row, put| {
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

async fn requests(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let batch = Batch::of(&changes.requests, |row, put| {
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
    let batch = Batch::of(&changes.grants, |row, grant| {
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
    let batch = Batch::of(&changes.revocations, |row, revocation| {
        row.octets(&revocation.id.octets()).int(revocation.revoked.0);
    });
    put(connection, REVOKE_GRANTS, batch, Table::Revocations).await
}

async fn audit(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    let batch = Batch::of(&changes.audit, |row, record| {
        row.int(numbers.writer(record.writer))
            .unsigned(record.sequence)
            .int(record.time.0)
            .int(i64::from(record.kind))
            .octets(&record.chain)
            .octets(&record.record);
    });
    put(connection, INSERT_AUDIT, batch, Table::Audit).await
}

async fn put(connection: &mut Connection, statement: &'static str, batch: Batch, table: Table) -> Result<(), Stopped> {
    let rows = batch.rows();
    if rows == 0 {
        return Ok(());
    }
    let (json, blob) = batch.into_parameters();
    let done = sqlx::query::<Database>(statement).bind(json).bind(blob).execute(connection).await?;
    count(rows, done.rows_affected(), table)
}

/// I3, I4: compare and swap. A row that was not in the state that the change replaces was not
/// written.
const fn count(rows: u64, written: u64, table: Table) -> Result<(), Stopped> {
    if rows == written { Ok(()) } else { Err(Stopped::Mismatch(table)) }
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

const INSERT_SHIPMENTS: &str = concat!(
    "INSERT INTO shipment (upload, generation, sha256, size, batch, principal, state, received, next_line, imported, refused, created_ms, updated_ms, progress) SELECT ",
    octets!(0, 1),
    ", ",
    int!(2),
    ", ",
    octets!(3, 4),
    ", ",
    int!(5),
    ", ",
    text!(6),
    ", ",
    text!(7),
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
    octets!(15, 16),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (upload) DO NOTHING"
);

/// What was announced when the upload began stays.
const UPDATE_SHIPMENTS: &str = concat!(
    "UPDATE shipment SET generation = v.generation, batch = v.batch, state = v.state, next_line = v.next_line, imported = v.imported, refused = v.refused, ",
    "updated_ms = v.updated_ms, progress = v.progress FROM (SELECT ",
    octets!(0, 1),
    " AS upload, ",
    int!(2),
    " AS generation, ",
    text!(6),
    " AS batch, ",
    int!(8),
    " AS state, ",
    int!(9),
    " AS received, ",
    int!(10),
    " AS next_line, ",
    int!(11),
    " AS imported, ",
    int!(12),
    " AS refused, ",
    int!(14),
    " AS updated_ms, ",
    octets!(15, 16),
    " AS progress FROM ",
    rows!(),
    ") AS v WHERE shipment.upload = v.upload AND shipment.generation = v.generation - 1 AND shipment.received = v.received"
);

const INSERT_REFUSALS: &str = concat!(
    "INSERT INTO shipment_refusal (upload, line, field, reason) SELECT ",
    octets!(0, 1),
    ", ",
    int!(2),
    ", ",
    text!(3),
    ", ",
    text!(4),
    " FROM ",
    rows!(),
    " WHERE true ON CONFLICT (upload, line) DO NOTHING"
);

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

/// Wave and vendor stay.
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
