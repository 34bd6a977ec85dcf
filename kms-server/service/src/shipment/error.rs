//! Refusals that several steps of a shipment have in common.

use kms_domain::{PrincipalId, ShipmentLineError};

use kms_base::error::ServiceError;

pub(super) fn no_shipment_key(manufacturer: &PrincipalId) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("`{manufacturer}` is not an enabled manufacturer with a shipment key"),
        next_step: "register it with `kms principal add`".to_owned(),
    }
}

pub(super) fn unknown(file_sha256: &[u8; 32]) -> ServiceError {
    ServiceError::NotFound { what: format!("shipment {}", hex::encode(file_sha256)) }
}

pub(super) fn overtaken() -> ServiceError {
    ServiceError::Aborted {
        reason: "another call is importing or sending this shipment".to_owned(),
        next_step: "ask GetShipment for its progress; call again if it does not advance".to_owned(),
    }
}

/// The refusal of one line.
pub(super) fn refuse(field: &str, reason: String) -> ShipmentLineError {
    ShipmentLineError { field: field.to_owned(), reason }
}
