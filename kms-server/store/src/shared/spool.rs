//! Shipments in the spool: their octets arrive first, and any server imports them later.

use sqlx::{Connection as _, Pool, Row as _};

use kms_domain::{PrincipalId, UnixMillis};

use super::{
    BEGIN, Connection, Database, Engine, decode,
    swap::{Stopped, Table, put},
};
use crate::{Changes, RowName, ShipmentRefusal, ShipmentRow, StoreError, UploadId, batch::RowBatch};

type Readers = Pool<Database>;

pub(super) async fn shipment(readers: &Readers, upload: UploadId) -> Result<Option<ShipmentRow>, StoreError> {
    let row = sqlx::query::<Database>(SHIPMENT).bind(upload.0.as_slice()).fetch_optional(readers).await?;
    row.as_ref().map(decode::shipment).transpose()
}

pub(super) async fn shipments_of_file(
    readers: &Readers,
    principal: &PrincipalId,
    sha256: &[u8; 32],
) -> Result<Vec<ShipmentRow>, StoreError> {
    let rows = sqlx::query::<Database>(SHIPMENTS_OF_FILE)
        .bind(sha256.as_slice())
        .bind(principal.to_string())
        .fetch_all(readers)
        .await?;
    rows.iter().map(decode::shipment).collect()
}

pub(super) async fn shipment_page(
    readers: &Readers,
    after: Option<UploadId>,
    limit: u32,
) -> Result<Vec<ShipmentRow>, StoreError> {
    let after = after.map(|upload| upload.0.to_vec()).unwrap_or_default();
    sqlx::query::<Database>(SHIPMENT_PAGE)
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(readers)
        .await?
        .iter()
        .map(decode::shipment)
        .collect()
}

pub(super) async fn append_chunk(
    engine: &Engine,
    upload: UploadId,
    position: u64,
    octets: Vec<u8>,
    now: UnixMillis,
) -> Result<u64, StoreError> {
    let conflict = || StoreError::Conflict { row: RowName::Shipment(upload) };
    let length = i64::try_from(octets.len()).map_err(|_| conflict())?;
    let position = i64::try_from(position).map_err(|_| conflict())?;
    let mut writer = engine.writer().await?;
    let mut transaction = writer.begin_with(BEGIN).await?;
    let received: Option<i64> = sqlx::query_scalar::<Database, i64>(ADVANCE)
        .bind(length)
        .bind(now.0)
        .bind(upload.0.as_slice())
        .bind(position)
        .fetch_optional(&mut *transaction)
        .await?;
    let received = received.ok_or_else(conflict)?;
    if length > 0 {
        sqlx::query::<Database>("INSERT INTO shipment_chunk (upload, position, octets) VALUES ($1, $2, $3)")
            .bind(upload.0.as_slice())
            .bind(position)
            .bind(octets)
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await?;
    engine.committed();
    u64::try_from(received).map_err(|_| StoreError::corrupt("the length of a shipment"))
}

pub(super) async fn chunk(
    readers: &Readers,
    upload: UploadId,
    position: u64,
) -> Result<Option<(u64, Vec<u8>)>, StoreError> {
    let position = i64::try_from(position).unwrap_or(i64::MAX);
    let Some(row) =
        sqlx::query::<Database>(CHUNK).bind(upload.0.as_slice()).bind(position).fetch_optional(readers).await?
    else {
        return Ok(None);
    };
    let (begin, octets): (i64, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
    let end = begin.saturating_add(i64::try_from(octets.len()).unwrap_or(i64::MAX));
    Ok((position < end).then_some((begin.cast_unsigned(), octets)))
}

pub(super) async fn delete_chunks(engine: &Engine, upload: UploadId, limit: u32) -> Result<u64, StoreError> {
    let done = sqlx::query::<Database>(DELETE_CHUNKS)
        .bind(upload.0.as_slice())
        .bind(i64::from(limit))
        .execute(&mut *engine.writer().await?)
        .await?;
    engine.committed();
    Ok(done.rows_affected())
}

pub(super) async fn refusals(
    readers: &Readers,
    upload: UploadId,
    after_line: u64,
    limit: u32,
) -> Result<Vec<ShipmentRefusal>, StoreError> {
    let rows = sqlx::query::<Database>(REFUSALS)
        .bind(upload.0.as_slice())
        .bind(i64::try_from(after_line).unwrap_or(i64::MAX))
        .bind(i64::from(limit))
        .fetch_all(readers)
        .await?;
    rows.iter()
        .map(|row| {
            Ok(ShipmentRefusal {
                upload,
                line: decode::unsigned(row, 0)?,
                field: row.try_get(1)?,
                reason: row.try_get(2)?,
            })
        })
        .collect()
}

/// Writes the shipments and refused lines of a transaction.
pub(super) async fn write(connection: &mut Connection, changes: &Changes) -> Result<(), Stopped> {
    let (new, old): (Vec<_>, Vec<_>) = changes.shipments.iter().partition(|shipment| shipment.generation == 1);
    for (puts, statement) in [(new, INSERT_SHIPMENTS), (old, UPDATE_SHIPMENTS)] {
        let batch = RowBatch::of(puts, |row, shipment| {
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
    let batch = RowBatch::of(&changes.refusals, |row, refusal| {
        row.octets(&refusal.upload.0).unsigned(refusal.line).text(&refusal.field).text(&refusal.reason);
    });
    put(connection, INSERT_REFUSALS, batch, Table::Shipments).await
}

const SHIPMENT: &str = concat!("SELECT ", shipment_columns!(), " FROM shipment AS p WHERE p.upload = $1");

const SHIPMENTS_OF_FILE: &str = concat!(
    "SELECT ",
    shipment_columns!(),
    " FROM shipment AS p WHERE p.sha256 = $1 AND p.principal = $2 ORDER BY p.created_ms DESC, p.upload LIMIT 100"
);

const SHIPMENT_PAGE: &str =
    concat!("SELECT ", shipment_columns!(), " FROM shipment AS p WHERE p.upload > $1 ORDER BY p.upload LIMIT $2");

/// State 1 is `Receiving`.
const ADVANCE: &str = "UPDATE shipment SET received = received + $1, updated_ms = $2 WHERE upload = $3 AND received = $4 AND state = 1 RETURNING received";

const CHUNK: &str =
    "SELECT position, octets FROM shipment_chunk WHERE upload = $1 AND position <= $2 ORDER BY position DESC LIMIT 1";

const DELETE_CHUNKS: &str = "DELETE FROM shipment_chunk WHERE upload = $1 AND position IN \
     (SELECT position FROM shipment_chunk WHERE upload = $1 ORDER BY position LIMIT $2)";

const REFUSALS: &str =
    "SELECT line, field, reason FROM shipment_refusal WHERE upload = $1 AND line > $2 ORDER BY line LIMIT $3";

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

/// The values that the sender announced are not changed.
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
