//! From rows of the database to types. A value that does not fit was not written by this server.

use kms_domain::{
    CampaignId, DeviceTypeId, GrantId, GroupId, KeyType, KeyVersionNumber, Owner, PrincipalId, SecuritySetupId,
    SystemTitle, Task, TaskState, TaskStep, TaskWork, UnixMillis, WriterId,
};
use sqlx::Row as _;

use super::Row;
use crate::{
    AuditAppend, AuditReference, AuditTail, FingerprintOwner, FingerprintPrefix, GrantRow, MeterRow, RequestRow,
    SealedRow, ShipmentRow, ShipmentState, SpooledFile, StoreError, TaskKey, TaskRow, UploadId,
};

pub(super) fn unsigned(row: &Row, index: usize) -> Result<u64, StoreError> {
    u64::try_from(row.try_get::<i64, _>(index)?).map_err(|_| StoreError::corrupt(format!("column {index} is negative")))
}

pub(super) fn array<const N: usize>(row: &Row, index: usize) -> Result<[u8; N], StoreError> {
    row.try_get::<&[u8], _>(index)?
        .try_into()
        .map_err(|_| StoreError::corrupt(format!("column {index} is not {N} octets long")))
}

pub(super) fn millis(row: &Row, index: usize) -> Result<UnixMillis, StoreError> {
    Ok(UnixMillis(row.try_get(index)?))
}

/// Columns: generation, seal, body.
pub(super) fn sealed(row: &Row, first: usize) -> Result<SealedRow, StoreError> {
    Ok(SealedRow { generation: unsigned(row, first)?, seal: array(row, first + 1)?, body: row.try_get(first + 2)? })
}

/// Columns: title, generation, seal, body.
pub(super) fn meter(row: &Row) -> Result<MeterRow, StoreError> {
    let title = SystemTitle::from_i64(row.try_get(0)?).map_err(|error| StoreError::corrupt(error.to_string()))?;
    Ok(MeterRow { title, row: sealed(row, 1)? })
}

/// Columns: digest, outcome, expires_ms.
pub(super) fn request(row: &Row, first: usize) -> Result<RequestRow, StoreError> {
    Ok(RequestRow { digest: array(row, first)?, outcome: row.try_get(first + 1)?, expires: millis(row, first + 2)? })
}

/// Columns: prefix, owner_kind, owner, setup, key_type, version.
pub(super) fn fingerprint(row: &Row) -> Result<(FingerprintPrefix, FingerprintOwner), StoreError> {
    let number = |index| row.try_get::<i64, _>(index);
    let wrong = |what: &str| StoreError::corrupt(format!("the {what} of a fingerprint"));
    let id = number(2)?;
    let owner = match number(1)? {
        0 => Owner::Meter(SystemTitle::from_i64(id).map_err(|_| wrong("owner"))?),
        1 => Owner::Group(GroupId(id.cast_unsigned())),
        2 => Owner::DeviceType(DeviceTypeId(id.cast_unsigned())),
        _ => return Err(wrong("owner")),
    };
    let setup = u16::try_from(number(3)?).map_err(|_| wrong("setup"))?;
    let key_type = u8::try_from(number(4)?)
        .ok()
        .and_then(|number| KeyType::from_number(number).ok())
        .ok_or_else(|| wrong("key type"))?;
    let version = u32::try_from(number(5)?)
        .ok()
        .and_then(|number| KeyVersionNumber::new(number).ok())
        .ok_or_else(|| wrong("version"))?;
    let owner = FingerprintOwner { owner, setup: SecuritySetupId::from_octets(setup.to_be_bytes()), key_type, version };
    Ok((FingerprintPrefix(number(0)?.to_be_bytes()), owner))
}

/// Columns of `grant_columns!`.
pub(super) fn grant(row: &Row) -> Result<GrantRow, StoreError> {
    Ok(GrantRow {
        id: GrantId::from_octets(row.try_get(0)?).map_err(|error| StoreError::corrupt(error.to_string()))?,
        principal: principal(row.try_get(1)?)?,
        purpose: row.try_get(2)?,
        issued: millis(row, 3)?,
        not_after: millis(row, 4)?,
        audit: AuditReference { writer: writer(row, 5)?, sequence: unsigned(row, 6)? },
        meters: u32::try_from(row.try_get::<i64, _>(7)?)
            .map_err(|_| StoreError::corrupt("the number of meters of a grant"))?,
        revoked: row.try_get::<Option<i64>, _>(8)?.map(UnixMillis),
    })
}

/// Columns of `audit_columns!`.
pub(super) fn audit(row: &Row) -> Result<(i64, AuditAppend), StoreError> {
    let record = AuditAppend {
        writer: writer(row, 1)?,
        sequence: unsigned(row, 2)?,
        time: millis(row, 3)?,
        kind: u16::try_from(row.try_get::<i64, _>(4)?)
            .map_err(|_| StoreError::corrupt("the kind of an audit record"))?,
        chain: array(row, 5)?,
        record: row.try_get(6)?,
    };
    Ok((row.try_get(0)?, record))
}

/// Columns: writer, sequence, chain.
pub(super) fn tail(row: &Row) -> Result<AuditTail, StoreError> {
    Ok(AuditTail { writer: writer(row, 0)?, sequence: unsigned(row, 1)?, chain: array(row, 2)? })
}

/// Columns of `shipment_columns!`.
pub(super) fn shipment(row: &Row) -> Result<ShipmentRow, StoreError> {
    Ok(ShipmentRow {
        upload: UploadId(array(row, 0)?),
        generation: unsigned(row, 1)?,
        sha256: array(row, 2)?,
        size: unsigned(row, 3)?,
        batch: row.try_get(4)?,
        principal: principal(row.try_get(5)?)?,
        state: ShipmentState::from_number(row.try_get(6)?)
            .ok_or_else(|| StoreError::corrupt("the state of a shipment"))?,
        received: unsigned(row, 7)?,
        next_line: unsigned(row, 8)?,
        imported: unsigned(row, 9)?,
        refused: unsigned(row, 10)?,
        created: millis(row, 11)?,
        updated: millis(row, 12)?,
        progress: row.try_get(13)?,
    })
}

/// Columns: upload, principal, size, received.
pub(super) fn spooled(row: &Row) -> Result<SpooledFile, StoreError> {
    Ok(SpooledFile {
        upload: UploadId(array(row, 0)?),
        principal: principal(row.try_get(1)?)?,
        size: unsigned(row, 2)?,
        received: unsigned(row, 3)?,
    })
}

/// Columns of `task_columns!`.
pub(super) fn task(row: &Row) -> Result<TaskRow, StoreError> {
    let wrong = |what: &str| StoreError::corrupt(format!("the {what} of a task"));
    let small = |index, what| u32::try_from(row.try_get::<i64, _>(index)?).map_err(|_| wrong(what));
    let setup = u16::try_from(row.try_get::<i64, _>(6)?).map_err(|_| wrong("setup"))?;
    let work = match u8::try_from(row.try_get::<i64, _>(7)?) {
        Ok(0) => TaskWork::Probe,
        Ok(number) => TaskWork::Rotate(KeyType::from_number(number).map_err(|_| wrong("key type"))?),
        Err(_) => return Err(wrong("key type")),
    };
    Ok(TaskRow {
        key: TaskKey {
            campaign: CampaignId::from_octets(row.try_get(0)?)
                .map_err(|error| StoreError::corrupt(error.to_string()))?,
            meter: SystemTitle::from_i64(row.try_get(1)?).map_err(|error| StoreError::corrupt(error.to_string()))?,
        },
        generation: unsigned(row, 2)?,
        wave: small(3, "wave")?,
        vendor: row.try_get(4)?,
        head_end: row.try_get(5)?,
        mark: array(row, 17)?,
        task: Task {
            step: TaskStep {
                setup: SecuritySetupId::from_octets(setup.to_be_bytes()),
                work,
                from: small(8, "version")?,
            },
            state: task_state(row, 9)?,
            probe: row.try_get::<i64, _>(10)? != 0,
            attempts: small(11, "number of attempts")?,
            due: millis(row, 12)?,
            fence: unsigned(row, 13)?,
            leased: millis(row, 14)?,
            ended: millis(row, 15)?,
            reason: row.try_get(16)?,
        },
    })
}

pub(super) fn task_state(row: &Row, index: usize) -> Result<TaskState, StoreError> {
    let number = u32::try_from(row.try_get::<i64, _>(index)?).unwrap_or_default();
    TaskState::from_number(number).map_err(|error| StoreError::corrupt(error.to_string()))
}

pub(super) fn writer(row: &Row, index: usize) -> Result<WriterId, StoreError> {
    WriterId::from_octets(row.try_get(index)?).map_err(|error| StoreError::corrupt(error.to_string()))
}

fn principal(uri: &str) -> Result<PrincipalId, StoreError> {
    PrincipalId::parse(uri).map_err(|_| StoreError::corrupt("the URI of a principal"))
}
