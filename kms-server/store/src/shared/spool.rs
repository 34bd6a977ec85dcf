//! Shipments on their way in: octets first, import later, by any server.

use sqlx::{Connection as _, Pool, Row as _};

use kms_domain::{PrincipalId, UnixMillis};

use super::{BEGIN, Database, Engine, decode};
use crate::{RowName, ShipmentRefusal, ShipmentRow, StoreError, UploadId};

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
