//! Keys wrapped for meters, as `key_transfer` carries them (IEC 62056-6-2, class 64).

use kms_domain::{KeyShape, KeyType};

use crate::error::HsmError;
use crate::key_source::KeySource;
use crate::template::Handling;
use crate::worker::Worker;

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
                format!("a key of type {} cannot wrap a key for a meter; only a KEK can", job.kek.key_type()),
            ));
        }
        if matches!(job.key, KeySource::Stored { shape: KeyShape::Secret, .. } | KeySource::Fresh(_)) {
            return Err(HsmError::invalid("key", "only an AES key that has a slot can be transferred"));
        }
        let (kek, _) = self.key(&job.kek, Handling::WrapOthers)?;
        let (key, octets) = self.key(&job.key, Handling::Wrap)?;
        self.wrap(kek.object(), key.object(), octets)
    }
}
