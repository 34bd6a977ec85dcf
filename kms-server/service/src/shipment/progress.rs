//! The progress of a shipment: what its row holds besides the columns, and how the contract shows
//! it.

use bytes::Bytes;
use kms_domain::PrincipalId;
use kms_proto::v1;
use kms_store::{ShipmentRow, ShipmentState, UploadId};
use prost::Message;

use kms_base::error::ServiceError;

/// The opaque part of a [`ShipmentRow`]. None of it is trusted: each call of an import verifies
/// signature, digest and count again, over the octets that it imports (I5).
#[derive(Clone, PartialEq, Message)]
pub(super) struct Progress {
    /// The manufacturer's URI, as the sender stated it.
    #[prost(string, tag = "1")]
    pub(super) manufacturer: String,
    /// The detached signature.
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) signature: Bytes,
    /// The head-end that imported meters are assigned to; empty for none.
    #[prost(string, tag = "3")]
    pub(super) head_end: String,
    /// Device lines of the file.
    #[prost(uint64, tag = "4")]
    pub(super) devices: u64,
    #[prost(uint64, tag = "5")]
    pub(super) unchanged: u64,
    #[prost(uint64, tag = "6")]
    pub(super) duplicates: u64,
    /// Why the whole file was refused.
    #[prost(string, tag = "7")]
    pub(super) refusal: String,
    /// The first duplicates, for repeated answers; at most [`Self::KEPT_DUPLICATES`].
    #[prost(message, repeated, tag = "8")]
    pub(super) duplicate_keys: Vec<v1::DuplicateKey>,
}

impl Progress {
    /// How many duplicates a repeated answer names. The meters' rows know all of them.
    pub(super) const KEPT_DUPLICATES: usize = 256;

    pub(super) fn of(row: &ShipmentRow) -> Result<Self, ServiceError> {
        Self::decode(row.progress.as_slice())
            .map_err(|_| ServiceError::Internal("the progress of a shipment does not decode".to_owned()))
    }

    pub(super) fn manufacturer(&self) -> Result<PrincipalId, ServiceError> {
        PrincipalId::parse(&self.manufacturer)
            .map_err(|_| ServiceError::Internal("the manufacturer of a shipment does not parse".to_owned()))
    }
}

/// The id of an upload: 12 octets of the file's SHA-256, and how often the file was refused before
/// (4 octets). So a file has one upload at a time, whoever sends it and to whichever server.
pub(super) fn upload_id(file_sha256: &[u8; 32], refused_before: u32) -> UploadId {
    let mut id = [0; 16];
    for (octet, value) in id.iter_mut().zip(file_sha256.iter().take(12).chain(&refused_before.to_be_bytes())) {
        *octet = *value;
    }
    UploadId(id)
}

/// The upload that follows a refused one.
pub(super) fn next_upload_id(refused: &ShipmentRow) -> Result<UploadId, ServiceError> {
    let [.., a, b, c, d] = refused.upload.0;
    match u32::from_be_bytes([a, b, c, d]).checked_add(1).filter(|number| *number < MOST_UPLOADS) {
        Some(number) => Ok(upload_id(&refused.sha256, number)),
        None => Err(ServiceError::FailedPrecondition {
            reason: format!("this file was refused {MOST_UPLOADS} times"),
            next_step: "ask the manufacturer for a new file with a new signature".to_owned(),
        }),
    }
}

/// The shipment as the contract shows it.
pub(super) fn to_proto(row: &ShipmentRow) -> Result<v1::Shipment, ServiceError> {
    let progress = Progress::of(row)?;
    Ok(v1::Shipment {
        file_sha256: row.sha256.to_vec().into(),
        file_length: row.size,
        // Nothing of a refused file is kept: it is sent again from its first octet.
        received: if row.state == ShipmentState::Refused { 0 } else { row.received },
        state: match row.state {
            ShipmentState::Receiving => "uploading",
            ShipmentState::Received => "uploaded",
            ShipmentState::Importing => "importing",
            ShipmentState::Imported => "imported",
            ShipmentState::Refused => "refused",
        }
        .to_owned(),
        batch: row.batch.clone(),
        manufacturer: progress.manufacturer,
        devices: progress.devices,
        imported: row.imported,
        unchanged: progress.unchanged,
        refused: row.refused,
        duplicates: progress.duplicates,
        refusal: progress.refusal,
    })
}

/// How often a file can be refused.
pub(super) const MOST_UPLOADS: u32 = 64;
