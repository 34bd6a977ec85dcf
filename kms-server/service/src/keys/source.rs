//! Where the HSM takes the value of a key version from.

use kms_domain::{KeyMaterial, KeyOrigin, KeyType, KeyVersion, Owner, ParseError, SecuritySetupId, Slot};
use kms_hsm::{KeySource, RootVersion};

use kms_base::error::ServiceError;

/// Where the HSM takes a key version from: a stored blob, or a derivation.
///
/// # Errors
/// The version is destroyed, so there is no key.
pub(crate) fn source(owner: Owner, slot: &Slot, version: &KeyVersion) -> Result<KeySource, ServiceError> {
    let fault = |error: ParseError| ServiceError::Internal(error.to_string());
    match (version.material(), version.origin()) {
        (KeyMaterial::Wrapped(wrapped), _) => Ok(KeySource::Stored {
            key_type: slot.key_type(),
            storage_kek_version: RootVersion::new(u32::from(wrapped.storage_kek_version())).map_err(fault)?,
            shape: wrapped.shape(),
            blob: wrapped.blob().to_vec(),
        }),
        (KeyMaterial::Derived, KeyOrigin::Diversified { root_version, derivation, length }) => {
            Ok(KeySource::Diversified {
                root_version: RootVersion::new(u32::from(root_version)).map_err(fault)?,
                derivation,
                context: slot.diversification(owner, version.number(), length),
            })
        }
        _ => Err(no_key(&[slot.key_type()], Some(slot.setup()))),
    }
}

/// There is no active key of these types.
pub(crate) fn no_key(key_types: &[KeyType], setup: Option<SecuritySetupId>) -> ServiceError {
    let names: Vec<String> = key_types.iter().map(ToString::to_string).collect();
    let place = setup.map(|setup| format!(" in security setup {setup}")).unwrap_or_default();
    ServiceError::FailedPrecondition {
        reason: format!("there is no active {}{place}", names.join(", ")),
        next_step: "look at the slots with `kms meter show` or `kms group show`".to_owned(),
    }
}
