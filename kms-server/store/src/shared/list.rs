//! Reads outside transactions: lists for people, and pages for the scrubber.

use kms_domain::{GrantId, SystemTitle, UnixMillis, WriterId};
use sqlx::{Pool, QueryBuilder, Row as _};

use super::{Database, decode, keys, names::TermKind};
use crate::{
    Assigned, AuditAppend, AuditCursor, AuditFilter, AuditRow, AuditTail, FingerprintOwner, FingerprintPrefix,
    GrantFilter, GrantRow, MeterFilter, MeterRow, RowKind, SealedRow, ServerRow, StoreError,
};

type Readers = Pool<Database>;

/// Each title once.
fn distinct(titles: &[SystemTitle]) -> Vec<i64> {
    let mut titles: Vec<i64> = titles.iter().map(|title| title.as_i64()).collect();
    titles.sort_unstable();
    titles.dedup();
    titles
}

pub(super) async fn sealed_and_meters(
    readers: &Readers,
    kind: RowKind,
    id: &[u8],
    titles: &[SystemTitle],
) -> Result<(Option<SealedRow>, Vec<MeterRow>), StoreError> {
    let rows = sqlx::query::<Database>(SEALED_AND_METERS)
        .bind(keys(distinct(titles)))
        .bind(i64::from(kind.number()))
        .bind(id)
        .fetch_all(readers)
        .await?;
    let (mut named, mut meters) = (None, Vec::with_capacity(rows.len()));
    for row in &rows {
        match row.try_get::<Option<i64>, _>(0)? {
            Some(_) => meters.push(decode::meter(row)?),
            None => named = Some(decode::sealed(row, 1)?),
        }
    }
    meters.sort_unstable_by_key(|meter| meter.title.as_i64());
    Ok((named, meters))
}

pub(super) async fn meters(readers: &Readers, titles: &[SystemTitle]) -> Result<Vec<MeterRow>, StoreError> {
    let mut meters: Vec<MeterRow> = sqlx::query::<Database>(METER_ROWS)
        .bind(keys(distinct(titles)))
        .fetch_all(readers)
        .await?
        .iter()
        .map(decode::meter)
        .collect::<Result<_, _>>()?;
    meters.sort_unstable_by_key(|meter| meter.title.as_i64());
    Ok(meters)
}

pub(super) async fn meter_page(
    readers: &Readers,
    filter: &MeterFilter,
    after: Option<SystemTitle>,
    limit: u32,
) -> Result<Vec<MeterRow>, StoreError> {
    let mut query = QueryBuilder::<Database>::new("SELECT title, generation, seal, body FROM ");
    query.push(from(filter));
    if !narrow(readers, &mut query, filter).await? {
        return Ok(Vec::new());
    }
    // The members of a group are walked in the order of their own table.
    let order = if filter.group.is_some() { "g.meter" } else { "title" };
    if let Some(after) = after {
        query.push(format!(" AND {order} > ")).push_bind(after.as_i64());
    }
    query.push(format!(" ORDER BY {order} LIMIT ")).push_bind(i64::from(limit));
    query.build().fetch_all(readers).await?.iter().map(decode::meter).collect()
}

pub(super) async fn meter_count(readers: &Readers, filter: &MeterFilter) -> Result<u64, StoreError> {
    let mut query = QueryBuilder::<Database>::new("SELECT count(*) FROM ");
    query.push(from(filter));
    if !narrow(readers, &mut query, filter).await? {
        return Ok(0);
    }
    decode::unsigned(&query.build().fetch_one(readers).await?, 0)
}

/// The tables in which a filter finds meters.
const fn from(filter: &MeterFilter) -> &'static str {
    if filter.group.is_some() {
        concat!("group_member AS g", join!(), "meter AS m ON m.title = g.meter WHERE true")
    } else {
        "meter WHERE true"
    }
}

/// Adds the conditions of the filter. False: no meter can match it.
async fn narrow(
    readers: &Readers,
    query: &mut QueryBuilder<Database>,
    filter: &MeterFilter,
) -> Result<bool, StoreError> {
    let head_end = match &filter.head_end {
        Assigned::Any | Assigned::ToNone => None,
        Assigned::To(uri) => Some(uri),
    };
    let terms = [
        (" AND vendor = ", TermKind::Vendor, filter.vendor.as_ref()),
        (" AND profile = ", TermKind::Profile, filter.profile.as_ref()),
        (" AND head_end = ", TermKind::HeadEnd, head_end),
        (" AND batch = ", TermKind::Batch, filter.batch.as_ref()),
    ];
    for (condition, kind, text) in terms {
        let Some(text) = text else { continue };
        let number: Option<i64> =
            sqlx::query_scalar::<Database, i64>("SELECT CAST(id AS BIGINT) FROM term WHERE kind = $1 AND text = $2")
                .bind(kind.number())
                .bind(text.as_str())
                .fetch_optional(readers)
                .await?;
        let Some(number) = number else { return Ok(false) };
        query.push(condition).push_bind(number);
    }
    if let Some(group) = filter.group {
        query.push(" AND g.group_number = ").push_bind(i64::try_from(group).unwrap_or(i64::MAX));
    }
    if filter.head_end == Assigned::ToNone {
        query.push(" AND head_end = 0");
    }
    if let Some(status) = filter.status {
        query.push(" AND status = ").push_bind(i64::from(status));
    }
    Ok(true)
}

pub(super) async fn sealed(readers: &Readers, kind: RowKind, id: &[u8]) -> Result<Option<SealedRow>, StoreError> {
    let row = sqlx::query::<Database>("SELECT generation, seal, body FROM sealed WHERE kind = $1 AND id = $2")
        .bind(i64::from(kind.number()))
        .bind(id)
        .fetch_optional(readers)
        .await?;
    row.as_ref().map(|row| decode::sealed(row, 0)).transpose()
}

pub(super) async fn sealed_page(
    readers: &Readers,
    kind: RowKind,
    after: Option<&[u8]>,
    limit: u32,
) -> Result<Vec<(Vec<u8>, SealedRow)>, StoreError> {
    let mut query = QueryBuilder::<Database>::new("SELECT id, generation, seal, body FROM sealed WHERE kind = ");
    query.push_bind(i64::from(kind.number()));
    if let Some(after) = after {
        query.push(" AND id > ").push_bind(after.to_vec());
    }
    query.push(" ORDER BY id LIMIT ").push_bind(i64::from(limit));
    query.build().fetch_all(readers).await?.iter().map(|row| Ok((row.try_get(0)?, decode::sealed(row, 1)?))).collect()
}

pub(super) async fn fingerprints(
    readers: &Readers,
    prefixes: &[FingerprintPrefix],
) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError> {
    let prefixes = keys(prefixes.iter().map(|prefix| prefix.as_i64()));
    sqlx::query::<Database>(FINGERPRINT_ROWS)
        .bind(prefixes)
        .fetch_all(readers)
        .await?
        .iter()
        .map(decode::fingerprint)
        .collect()
}

pub(super) async fn fingerprint_page(
    readers: &Readers,
    after: Option<(FingerprintPrefix, FingerprintOwner)>,
    limit: u32,
) -> Result<Vec<(FingerprintPrefix, FingerprintOwner)>, StoreError> {
    let mut query = QueryBuilder::<Database>::new(
        "SELECT prefix, CAST(owner_kind AS BIGINT), owner, CAST(setup AS BIGINT), CAST(key_type AS BIGINT), version FROM fingerprint",
    );
    if let Some((prefix, owner)) = after {
        let [b, e] = owner.setup.octets();
        query.push(" WHERE (prefix, owner_kind, owner, setup, key_type, version) > (").push_bind(prefix.as_i64());
        for number in [
            i64::from(owner.owner.kind().number()),
            i64::from_be_bytes(owner.owner.id()),
            i64::from(u16::from_be_bytes([b, e])),
            i64::from(owner.key_type.number()),
            i64::from(owner.version.number()),
        ] {
            query.push(", ").push_bind(number);
        }
        query.push(")");
    }
    query.push(" ORDER BY prefix, owner_kind, owner, setup, key_type, version LIMIT ").push_bind(i64::from(limit));
    query.build().fetch_all(readers).await?.iter().map(decode::fingerprint).collect()
}

pub(super) async fn audit_page(
    readers: &Readers,
    filter: &AuditFilter,
    after: Option<AuditCursor>,
    limit: u32,
) -> Result<Vec<AuditRow>, StoreError> {
    let mut query = QueryBuilder::<Database>::new(concat!(
        "SELECT ",
        audit_columns!(),
        " FROM audit AS a JOIN server AS s ON s.number = a.writer WHERE true"
    ));
    let (behind, order) = if filter.newest_first {
        (" AND a.id < ", " ORDER BY a.id DESC LIMIT ")
    } else {
        (" AND a.id > ", " ORDER BY a.id LIMIT ")
    };
    if let Some(AuditCursor(after)) = after {
        query.push(behind).push_bind(after);
    }
    if let Some(kind) = filter.kind {
        query.push(" AND a.kind = ").push_bind(i64::from(kind));
    }
    if let Some(writer) = filter.writer {
        query.push(" AND s.writer = ").push_bind(writer.octets().to_vec());
    }
    query.push(order).push_bind(i64::from(limit));
    let rows = query.build().fetch_all(readers).await?;
    rows.iter()
        .map(|row| {
            let (id, record) = decode::audit(row)?;
            Ok(AuditRow { cursor: AuditCursor(id), record })
        })
        .collect()
}

pub(super) async fn audit_range(
    readers: &Readers,
    from: Option<UnixMillis>,
    before: Option<UnixMillis>,
) -> Result<Option<(AuditCursor, AuditCursor)>, StoreError> {
    // An expression, so that no planner scans the table by number and tests the time of each
    // record: the index of times answers this query alone.
    let mut query = QueryBuilder::<Database>::new("SELECT min(id + 0), max(id + 0) FROM audit WHERE true");
    if let Some(from) = from {
        query.push(" AND time_ms >= ").push_bind(from.0);
    }
    if let Some(before) = before {
        query.push(" AND time_ms < ").push_bind(before.0);
    }
    let row = query.build().fetch_one(readers).await?;
    let (first, last): (Option<i64>, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    Ok(first.zip(last).map(|(first, last)| (AuditCursor(first), AuditCursor(last))))
}

pub(super) async fn audit_of_writer(
    readers: &Readers,
    writer: WriterId,
    from_sequence: u64,
    limit: u32,
) -> Result<Vec<AuditAppend>, StoreError> {
    // There is no record after the last number that a row can have.
    let Ok(from_sequence) = i64::try_from(from_sequence) else { return Ok(Vec::new()) };
    let rows = sqlx::query::<Database>(AUDIT_OF_WRITER)
        .bind(writer.octets().as_slice())
        .bind(from_sequence)
        .bind(i64::from(limit))
        .fetch_all(readers)
        .await?;
    rows.iter().map(|row| Ok(decode::audit(row)?.1)).collect()
}

pub(super) async fn audit_tails(readers: &Readers) -> Result<Vec<AuditTail>, StoreError> {
    sqlx::query::<Database>(AUDIT_TAILS).fetch_all(readers).await?.iter().map(decode::tail).collect()
}

pub(super) async fn grant(readers: &Readers, id: GrantId) -> Result<Option<GrantRow>, StoreError> {
    let row = sqlx::query::<Database>(GRANT).bind(id.octets().as_slice()).fetch_optional(readers).await?;
    row.as_ref().map(decode::grant).transpose()
}

pub(super) async fn grant_page(
    readers: &Readers,
    filter: &GrantFilter,
    before: Option<GrantId>,
    limit: u32,
) -> Result<Vec<GrantRow>, StoreError> {
    let mut query = QueryBuilder::<Database>::new(concat!(
        "SELECT ",
        grant_columns!(),
        " FROM key_grant AS g",
        grant_joins!(),
        " WHERE true"
    ));
    if let Some(principal) = &filter.principal {
        query.push(" AND g.principal = (SELECT id FROM term WHERE kind = ").push_bind(TermKind::Principal.number());
        query.push(" AND text = ").push_bind(principal.to_string()).push(")");
    }
    if let Some(before) = before {
        query.push(" AND g.id < ").push_bind(before.octets().to_vec());
    }
    if let Some(from) = filter.issued_from {
        query.push(" AND g.issued_ms >= ").push_bind(from.0);
    }
    if let Some(before) = filter.issued_before {
        query.push(" AND g.issued_ms < ").push_bind(before.0);
    }
    if let Some(time) = filter.live_at {
        query.push(" AND g.revoked_ms IS NULL AND g.not_after_ms > ").push_bind(time.0);
    }
    query.push(" ORDER BY g.id DESC LIMIT ").push_bind(i64::from(limit));
    query.build().fetch_all(readers).await?.iter().map(decode::grant).collect()
}

pub(super) async fn servers(readers: &Readers) -> Result<Vec<ServerRow>, StoreError> {
    let rows = sqlx::query::<Database>(SERVERS).fetch_all(readers).await?;
    rows.iter()
        .map(|row| {
            Ok(ServerRow {
                writer: decode::writer(row, 0)?,
                name: row.try_get(1)?,
                started: decode::millis(row, 2)?,
                heartbeat: decode::millis(row, 3)?,
                silent_ms: row.try_get(4)?,
            })
        })
        .collect()
}

pub(super) async fn now(readers: &Readers) -> Result<UnixMillis, StoreError> {
    decode::millis(&sqlx::query::<Database>(concat!("SELECT ", now!())).fetch_one(readers).await?, 0)
}

const FINGERPRINT_ROWS: &str = concat!(
    "SELECT f.prefix, CAST(f.owner_kind AS BIGINT), f.owner, CAST(f.setup AS BIGINT), CAST(f.key_type AS BIGINT), f.version FROM ",
    keys!(),
    join!(),
    "fingerprint AS f ON f.prefix = k.value"
);

const METER_ROWS: &str =
    concat!("SELECT m.title, m.generation, m.seal, m.body FROM ", keys!(), join!(), "meter AS m ON m.title = k.value");

/// The sealed row is the one without a title.
const SEALED_AND_METERS: &str = concat!(
    "SELECT m.title, m.generation, m.seal, m.body FROM ",
    keys!(),
    join!(),
    "meter AS m ON m.title = k.value UNION ALL ",
    "SELECT CAST(NULL AS BIGINT), s.generation, s.seal, s.body FROM sealed AS s WHERE s.kind = $2 AND s.id = $3"
);

const AUDIT_OF_WRITER: &str = concat!(
    "SELECT ",
    audit_columns!(),
    " FROM server AS s JOIN audit AS a ON a.writer = s.number WHERE s.writer = $1 AND a.sequence >= $2 ORDER BY a.sequence LIMIT $3"
);

const AUDIT_TAILS: &str = "SELECT s.writer, a.sequence, a.chain FROM server AS s JOIN audit AS a ON a.writer = s.number \
     WHERE a.sequence = (SELECT max(b.sequence) FROM audit AS b WHERE b.writer = s.number) ORDER BY s.number";

const GRANT: &str = concat!("SELECT ", grant_columns!(), " FROM key_grant AS g", grant_joins!(), " WHERE g.id = $1");

const SERVERS: &str = concat!(
    "SELECT writer, name, started_ms, heartbeat_ms, ",
    now!(),
    " - heartbeat_ms FROM server ORDER BY started_ms DESC, number DESC"
);
