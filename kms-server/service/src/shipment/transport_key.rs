//! The vendor transport key, as shipments need it: which versions are accepted, which one vendors
//! are given, and with which OAEP hashes.

use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use kms_domain::OaepHash;
use kms_hsm::RootVersion;

use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// The version of the vendor transport key that vendors are given.
pub(super) fn offered_version(island: &IslandContext) -> Result<RootVersion, ServiceError> {
    root_version(island.row().ledger.vendor_transport_version)
}

/// The accepted version of the vendor transport key whose SPKI has this SHA-256. The newest is
/// tried first.
pub(super) async fn accepted_version(
    island: &IslandContext,
    wanted: &[u8],
) -> Result<Option<RootVersion>, ServiceError> {
    let row = island.row();
    for version in (row.ledger.oldest_vendor_transport_version..=row.ledger.vendor_transport_version).rev() {
        let version = root_version(version)?;
        if digest(&SHA256, &island.hsm.transport_key_spki(version).await?).as_ref() == wanted {
            return Ok(Some(version));
        }
    }
    Ok(None)
}

/// The OAEP hashes that batch keys may use: SHA-256, and SHA-1 only where the module has nothing
/// else.
pub(super) async fn oaep_hashes(island: &IslandContext) -> Result<Vec<OaepHash>, ServiceError> {
    let capabilities = island.hsm.usable(HSM_WAIT).await?;
    Ok(capabilities.oaep_hash().into_iter().collect())
}

fn root_version(version: u8) -> Result<RootVersion, ServiceError> {
    RootVersion::new(u32::from(version)).map_err(|error| ServiceError::Internal(error.to_string()))
}

const HSM_WAIT: Duration = Duration::from_secs(5);
