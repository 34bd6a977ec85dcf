//! Names of rows in the store.

use kms_domain::PrincipalId;
use kms_store::RowKind;

/// The name of the row of what a principal has used of its quotas.
pub fn quota_use_row(id: &PrincipalId) -> (RowKind, Vec<u8>) {
    (RowKind::QuotaUse, id.to_string().into_bytes())
}

/// The name of a principal's row in the store.
pub fn principal_row(id: &PrincipalId) -> (RowKind, Vec<u8>) {
    (RowKind::Principal, id.to_string().into_bytes())
}
