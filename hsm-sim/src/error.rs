//! Return codes. The whole module uses the standard's `CKR_` values: there is no other error type.

use cryptoki_sys::{CK_RV, CKR_DEVICE_ERROR, CKR_DEVICE_MEMORY};

/// A return code other than `CKR_OK` (PKCS#11 section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rv(pub(crate) CK_RV);

/// What every inner function returns.
pub(crate) type Result<T> = core::result::Result<T, Rv>;

/// The result of a failed call, short to write.
pub(crate) fn fail<T>(code: CK_RV) -> Result<T> {
    Err(Rv(code))
}

impl From<std::io::Error> for Rv {
    /// A failing disk is a failing device; a full one has no memory left.
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self(CKR_DEVICE_MEMORY),
            _ => Self(CKR_DEVICE_ERROR),
        }
    }
}
