//! The index of exposures: written with the sealed rows that it repeats, and read for questions.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use kms_domain::{PrincipalId, UnixMillis};
use sqlx::{Executor, Pool, QueryBuilder, Row as _};

use super::{
    Connection, Database, Engine, decode,
    names::{Numbers, TermKind},
    swap::{Stopped, Table, count},
};
use crate::{
    Changes, ExposureCursor, ExposureOwner, ExposureParty, ExposureRow, ExposureTotals, KeyValuePrefix, ReadSet,
    StoreError,
    batch::RowBatch,
    exposure::{ANYONE, KEY_VALUE, KEY_VALUE_OWNER, PRINCIPAL},
};

type Readers = Pool<Database>;

/// Writes rows of the index, over earlier ones. Only the transaction that writes, or has locked, a
/// sealed row writes its rows of the index.
pub(super) async fn write(connection: &mut Connection, changes: &Changes, numbers: &Numbers) -> Result<(), Stopped> {
    if !changes.exposures.is_empty() {
        let mut rows: Vec<_> = changes
            .exposures
            .iter()
            .map(|row| {
                let (kind, party) = match &row.party {
                    ExposureParty::Anyone => (ANYONE, 0),
                    ExposureParty::Principal(principal) => {
                        (PRINCIPAL, numbers.term(TermKind::Principal, &principal.to_string()))
                    }
                    ExposureParty::KeyValue(prefix) => (KEY_VALUE, i64::from_be_bytes(prefix.0)),
                };
                let (owner_kind, owner) = row.owner.numbers();
                (ExposureCursor { party_kind: kind, party, owner_kind, owner }, row)
            })
            .collect();
        rows.sort_unstable_by_key(|(place, _)| *place);
        rows.dedup_by_key(|(place, _)| *place);
        let written = rows.len() as u64;
        // The rows of one act differ by their owners only. These are in order of the index, so that
        // neighbours are written together.
        let mut groups: BTreeMap<_, Vec<i64>> = BTreeMap::new();
        for (place, row) in rows {
            let same = (place.party_kind, place.party, place.owner_kind, row.slots, row.open, row.newest.0);
            groups.entry(same).or_default().push(place.owner);
        }
        let batch = RowBatch::of(&groups, |to, ((party_kind, party, owner_kind, slots, open, newest), owners)| {
            to.int(*party_kind)
                .int(*party)
                .int(*owner_kind)
                .int(i64::from(*slots))
                .int(i64::from(*open))
                .int(*newest)
                .ints(owners);
        });
        let done =
            sqlx::query::<Database>(PUT_EXPOSURES).bind(batch.into_parameters().0).execute(&mut *connection).await?;
        count(written, done.rows_affected(), Table::Exposures)?;
    }
    if !changes.exposures_gone.is_empty() {
        let batch = RowBatch::of(&changes.exposures_gone, |to, place| {
            to.int(place.party_kind).int(place.party).int(place.owner_kind).int(place.owner);
        });
        sqlx::query::<Database>(DELETE_EXPOSURES).bind(batch.into_parameters().0).execute(connection).await?;
    }
    Ok(())
}

/// Owners of which a party could know keys, after one, in order of kinds and ids.
pub(super) async fn owners(
    readers: &Readers,
    party: &ExposureParty,
    since: Option<UnixMillis>,
    after: Option<ExposureOwner>,
    limit: u32,
) -> Result<Vec<ExposureOwner>, StoreError> {
    let Some((kind, number)) = number_of(readers, party).await? else { return Ok(Vec::new()) };
    let after = after.map_or((-1, 0), ExposureOwner::numbers);
    let mut own = QueryBuilder::<Database>::new(
        "SELECT CAST(e.owner_kind AS BIGINT), e.owner FROM exposure AS e WHERE e.party_kind = ",
    );
    own.push_bind(kind).push(" AND e.party = ").push_bind(number);
    own.push(" AND e.owner_kind < ").push_bind(KEY_VALUE_OWNER);
    if let Some(since) = since {
        own.push(" AND e.newest_ms >= ").push_bind(since.0);
    }
    after_owner(&mut own, "e", after);
    in_order(&mut own, "e", limit);
    let mut found: BTreeSet<(i64, i64)> = places(readers, own).await?;
    if shares_values(readers, kind, number, since).await? {
        let mut equal = QueryBuilder::<Database>::new(concat!(
            "SELECT CAST(m.owner_kind AS BIGINT), m.owner FROM exposure AS e",
            join!(),
            "exposure AS m ON m.party = e.owner WHERE m.party_kind = "
        ));
        equal.push_bind(KEY_VALUE).push(" AND e.party_kind = ").push_bind(kind);
        equal.push(" AND e.party = ").push_bind(number).push(" AND e.owner_kind = ").push_bind(KEY_VALUE_OWNER);
        if let Some(since) = since {
            equal.push(" AND e.newest_ms >= ").push_bind(since.0);
        }
        after_owner(&mut equal, "m", after);
        // Several values can lead to one owner.
        equal.push(" GROUP BY m.owner_kind, m.owner");
        in_order(&mut equal, "m", limit);
        found.append(&mut places(readers, equal).await?);
    }
    let found = found.into_iter().take(usize::try_from(limit).unwrap_or(usize::MAX));
    // A row that no server wrote is not left out silently: the page would look like the last one.
    let owner = |(kind, id)| {
        ExposureOwner::from_numbers(kind, id).ok_or_else(|| StoreError::corrupt("the owner of an exposure"))
    };
    found.map(owner).collect()
}

fn after_owner(query: &mut QueryBuilder<Database>, table: &str, after: (i64, i64)) {
    query.push(format!(" AND ({table}.owner_kind, {table}.owner) > (")).push_bind(after.0).push(", ");
    query.push_bind(after.1).push(")");
}

/// In the order of the index, by its columns and not by what is selected: so nothing is sorted.
fn in_order(query: &mut QueryBuilder<Database>, table: &str, limit: u32) {
    query.push(format!(" ORDER BY {table}.owner_kind, {table}.owner LIMIT ")).push_bind(i64::from(limit));
}

async fn places(readers: &Readers, mut query: QueryBuilder<Database>) -> Result<BTreeSet<(i64, i64)>, StoreError> {
    let rows = query.build().fetch_all(readers).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Whether the party knows a key value that several slots share. Such values are rare.
async fn shares_values(
    readers: &Readers,
    kind: i64,
    party: i64,
    since: Option<UnixMillis>,
) -> Result<bool, StoreError> {
    let found = sqlx::query::<Database>(SHARES_VALUES)
        .bind(kind)
        .bind(party)
        .bind(since.map_or(i64::MIN, |since| since.0))
        .fetch_optional(readers)
        .await?;
    Ok(found.is_some())
}

/// Sums of a party.
pub(super) async fn totals(
    readers: &Readers,
    party: &ExposureParty,
    since: Option<UnixMillis>,
) -> Result<ExposureTotals, StoreError> {
    let Some((kind, number)) = number_of(readers, party).await? else { return Ok(ExposureTotals::default()) };
    let since_ms = since.map_or(i64::MIN, |since| since.0);
    let row = sqlx::query::<Database>(TOTALS).bind(kind).bind(number).bind(since_ms).fetch_one(readers).await?;
    let mut totals = ExposureTotals {
        owners: decode::unsigned(&row, 0)?,
        slots: decode::unsigned(&row, 1)?,
        open: decode::unsigned(&row, 2)?,
        equal_keys: 0,
    };
    if shares_values(readers, kind, number, since).await? {
        let row = sqlx::query::<Database>(EQUAL_KEYS).bind(kind).bind(number).bind(since_ms).fetch_one(readers).await?;
        totals.equal_keys = decode::unsigned(&row, 0)?;
    }
    Ok(totals)
}

/// The rows among `expected` that the index has not, or not so.
pub(super) async fn missing(readers: &Readers, expected: &[ExposureRow]) -> Result<Vec<ExposureRow>, StoreError> {
    if expected.is_empty() {
        return Ok(Vec::new());
    }
    missing_on(&mut *readers.acquire().await?, expected).await
}

/// Reads into the set which of these rows the index has.
pub(super) async fn into_set(
    connection: &mut Connection,
    expected: &[ExposureRow],
    set: &mut ReadSet,
) -> Result<(), StoreError> {
    if !expected.is_empty() {
        let missing = missing_on(connection, expected).await?;
        set.exposures.extend(expected.iter().map(|row| (row.clone(), true)));
        set.exposures.extend(missing.into_iter().map(|row| (row, false)));
    }
    Ok(())
}

async fn missing_on(connection: &mut Connection, expected: &[ExposureRow]) -> Result<Vec<ExposureRow>, StoreError> {
    let mut terms: HashMap<&PrincipalId, Option<(i64, i64)>> = HashMap::new();
    for row in expected {
        if let ExposureParty::Principal(principal) = &row.party
            && !terms.contains_key(principal)
        {
            terms.insert(principal, number_of(&mut *connection, &row.party).await?);
        }
    }
    let batch = RowBatch::of(expected.iter().enumerate(), |to, (index, row)| {
        let (kind, party) = match &row.party {
            ExposureParty::Anyone => (ANYONE, 0),
            // A name that is not known names no row.
            ExposureParty::Principal(principal) => terms.get(principal).copied().flatten().unwrap_or((PRINCIPAL, 0)),
            ExposureParty::KeyValue(prefix) => (KEY_VALUE, i64::from_be_bytes(prefix.0)),
        };
        let (owner_kind, owner) = row.owner.numbers();
        to.unsigned(index as u64).int(kind).int(party).int(owner_kind).int(owner);
        to.int(i64::from(row.slots)).int(i64::from(row.open)).int(row.newest.0);
    });
    let rows = sqlx::query::<Database>(PRESENT).bind(batch.into_parameters().0).fetch_all(connection).await?;
    let present: HashSet<u64> = rows.iter().map(|row| decode::unsigned(row, 0)).collect::<Result<_, _>>()?;
    let absent = expected.iter().zip(0..).filter(|(_, index)| !present.contains(index));
    Ok(absent.map(|(row, _)| row.clone()).collect())
}

/// Rows after a place, in order. A row that no server wrote has only its place.
pub(super) async fn page(
    readers: &Readers,
    after: Option<ExposureCursor>,
    limit: u32,
) -> Result<Vec<(ExposureCursor, Option<ExposureRow>)>, StoreError> {
    let after = after.unwrap_or(ExposureCursor { party_kind: i64::from(i16::MIN), party: 0, owner_kind: 0, owner: 0 });
    let rows = sqlx::query::<Database>(PAGE)
        .bind(after.party_kind)
        .bind(after.party)
        .bind(after.owner_kind)
        .bind(after.owner)
        .bind(i64::from(limit))
        .fetch_all(readers)
        .await?;
    rows.iter()
        .map(|row| {
            let place = ExposureCursor {
                party_kind: row.try_get(0)?,
                party: row.try_get(1)?,
                owner_kind: row.try_get(2)?,
                owner: row.try_get(3)?,
            };
            let (slots, open) = (row.try_get::<i64, _>(4)?, row.try_get::<i64, _>(5)?);
            let (newest, name) = (decode::millis(row, 6)?, row.try_get::<Option<String>, _>(7)?);
            Ok((place, decoded(place, name.as_deref(), slots, open, newest)))
        })
        .collect()
}

fn decoded(
    place: ExposureCursor,
    name: Option<&str>,
    slots: i64,
    open: i64,
    newest: UnixMillis,
) -> Option<ExposureRow> {
    let party = match place.party_kind {
        ANYONE if place.party == 0 => ExposureParty::Anyone,
        PRINCIPAL => ExposureParty::Principal(PrincipalId::parse(name?).ok()?),
        KEY_VALUE => ExposureParty::KeyValue(KeyValuePrefix(place.party.to_be_bytes())),
        _ => return None,
    };
    Some(ExposureRow {
        party,
        owner: ExposureOwner::from_numbers(place.owner_kind, place.owner)?,
        slots: u32::try_from(slots).ok()?,
        open: u32::try_from(open).ok()?,
        newest,
    })
}

/// Whether the index names the rows of earlier versions too.
pub(super) async fn is_complete(readers: &Readers) -> Result<bool, StoreError> {
    let complete: Option<i64> =
        sqlx::query_scalar::<Database, i64>("SELECT CAST(complete AS BIGINT) FROM exposure_index WHERE number = 1")
            .fetch_optional(readers)
            .await?;
    Ok(complete == Some(1))
}

/// Notes that the index names all rows.
pub(super) async fn note_complete(engine: &Engine) -> Result<(), StoreError> {
    sqlx::query::<Database>("UPDATE exposure_index SET complete = 1 WHERE number = 1 AND complete <> 1")
        .execute(&mut *engine.writer().await?)
        .await?;
    engine.committed();
    Ok(())
}

/// Kind and number of a party; `None`: no row can name it.
async fn number_of(
    database: impl Executor<'_, Database = Database>,
    party: &ExposureParty,
) -> Result<Option<(i64, i64)>, StoreError> {
    Ok(match party {
        ExposureParty::Anyone => Some((ANYONE, 0)),
        ExposureParty::KeyValue(prefix) => Some((KEY_VALUE, i64::from_be_bytes(prefix.0))),
        ExposureParty::Principal(principal) => {
            sqlx::query_scalar::<Database, i64>("SELECT CAST(id AS BIGINT) FROM term WHERE kind = $1 AND text = $2")
                .bind(TermKind::Principal.number())
                .bind(principal.to_string())
                .fetch_optional(database)
                .await?
                .map(|number| (PRINCIPAL, number))
        }
    })
}

const PUT_EXPOSURES: &str = concat!(
    "INSERT INTO exposure (party_kind, party, owner_kind, owner, slots, open, newest_ms) WITH g AS MATERIALIZED (SELECT ",
    int!(0),
    " AS party_kind, ",
    int!(1),
    " AS party, ",
    int!(2),
    " AS owner_kind, ",
    int!(3),
    " AS slots, ",
    int!(4),
    " AS open, ",
    int!(5),
    " AS newest_ms, j.value->6 AS owners FROM ",
    rows!(),
    ") SELECT g.party_kind, g.party, g.owner_kind, CAST(i.value AS BIGINT), g.slots, g.open, g.newest_ms FROM g, ",
    integers!("g.owners"),
    " WHERE true ON CONFLICT (party_kind, party, owner_kind, owner) DO UPDATE SET slots = excluded.slots, open = excluded.open, newest_ms = excluded.newest_ms"
);

const DELETE_EXPOSURES: &str = concat!(
    "DELETE FROM exposure WHERE (party_kind, party, owner_kind, owner) IN (SELECT ",
    int!(0),
    ", ",
    int!(1),
    ", ",
    int!(2),
    ", ",
    int!(3),
    " FROM ",
    rows!(),
    ")"
);

const SHARES_VALUES: &str = "SELECT e.owner FROM exposure AS e WHERE e.party_kind = $1 AND e.party = $2 AND e.owner_kind = 3 AND e.newest_ms >= $3 LIMIT 1";

const TOTALS: &str = "SELECT count(*), CAST(coalesce(sum(e.slots), 0) AS BIGINT), CAST(coalesce(sum(e.open), 0) AS BIGINT) \
     FROM exposure AS e WHERE e.party_kind = $1 AND e.party = $2 AND e.owner_kind < 3 AND e.newest_ms >= $3";

const EQUAL_KEYS: &str = concat!(
    "SELECT count(*) FROM (SELECT DISTINCT m.owner_kind, m.owner FROM exposure AS e",
    join!(),
    "exposure AS m ON m.party_kind = 3 AND m.party = e.owner ",
    "WHERE e.party_kind = $1 AND e.party = $2 AND e.owner_kind = 3 AND e.newest_ms >= $3 ",
    "AND NOT EXISTS (SELECT 1 FROM exposure AS o WHERE o.party_kind = $1 AND o.party = $2 AND o.owner_kind = m.owner_kind AND o.owner = m.owner)) AS x"
);

const PRESENT: &str = concat!(
    "SELECT ",
    int!(0),
    " FROM ",
    rows!(),
    join!(),
    "exposure AS e ON e.party_kind = ",
    int!(1),
    " AND e.party = ",
    int!(2),
    " AND e.owner_kind = ",
    int!(3),
    " AND e.owner = ",
    int!(4),
    " WHERE e.slots = ",
    int!(5),
    " AND e.open = ",
    int!(6),
    " AND e.newest_ms = ",
    int!(7)
);

/// The name of a principal is joined to its rows only.
const PAGE: &str = "SELECT CAST(e.party_kind AS BIGINT), e.party, CAST(e.owner_kind AS BIGINT), e.owner, CAST(e.slots AS BIGINT), CAST(e.open AS BIGINT), \
     e.newest_ms, t.text FROM exposure AS e LEFT JOIN term AS t ON e.party_kind = 2 AND t.id = e.party AND t.kind = 5 \
     WHERE (e.party_kind, e.party, e.owner_kind, e.owner) > ($1, $2, $3, $4) \
     ORDER BY e.party_kind, e.party, e.owner_kind, e.owner LIMIT $5";
