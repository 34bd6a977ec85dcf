//! Names of roots in a token.

use kms_domain::{RootId, RootPurpose};
use kms_hsm::{Purpose, RootVersion, TokenKey};

use kms_base::error::ServiceError;

/// The name of a root's version in the token.
///
/// # Errors
/// The version is 0.
pub(crate) fn token_key(id: RootId) -> Result<TokenKey, ServiceError> {
    let purpose = match id.purpose {
        RootPurpose::Diversification(class) => Purpose::Diversification(class),
        RootPurpose::StorageKek(class) => Purpose::StorageKek(class),
        RootPurpose::Seal => Purpose::Seal,
        RootPurpose::VendorTransport => Purpose::VendorTransport,
    };
    Ok(TokenKey { purpose, version: root_version(id.version)? })
}

/// A version as the HSM takes it.
///
/// # Errors
/// The version is 0.
pub(crate) fn root_version(version: u8) -> Result<RootVersion, ServiceError> {
    RootVersion::new(u32::from(version)).map_err(|error| ServiceError::Internal(error.to_string()))
}
