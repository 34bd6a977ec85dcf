//! Keys wrapped for meters: what `key_transfer` brings (IEC 62056-6-2, class 64).

use kms_domain::{KeyShape, KeyType};

use crate::error::HsmError;
use crate::template::Handling;
use crate::worker::{KeySource, Worker};

/// A key to be wrapped under a meter's KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferJob {
    /// The meter's KEK.
    pub kek: KeySource,
    /// The key that the meter is to get.
    pub key: KeySource,
}

impl Worker {
    /// The key wrapped under the meter's KEK by RFC 3394: 24 or 40 octets. Wrapping is
    /// deterministic, so the same job gives the same octets.
    ///
    /// I1: the KEK is a sensitive session object that wraps and does nothing else, and lives for
    /// this call.
    pub(crate) fn wrap_for_meter(&self, job: &TransferJob) -> Result<Vec<u8>, HsmError> {
        if job.kek.key_type() != KeyType::KEK {
            return Err(HsmError::invalid(
                "KEK",
                format!("a key of type {} wraps nothing for a meter", job.kek.key_type()),
            ));
        }
        if matches!(job.key, KeySource::Stored { shape: KeyShape::Secret, .. } | KeySource::Fresh(_)) {
            return Err(HsmError::invalid("key", "key_transfer brings AES keys that have a slot"));
        }
        let (kek, _) = self.key(&job.kek, Handling::WrapOthers)?;
        let (key, octets) = self.key(&job.key, Handling::Wrap)?;
        self.wrap(kek.object(), key.object(), octets)
    }
}
