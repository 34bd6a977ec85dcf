//! Keys that come from outside: from a vendor's batch key to storage wrapping, inside the HSM.

use kms_domain::{KeyClass, KeyLength, KeyShape, KeyType};

use crate::batch_key::BatchKey;
use crate::error::{HsmError, concerns_all};
use crate::key_source::KeySource;
use crate::label::{Purpose, RootVersion, TokenKey};
use crate::template::Handling;
use crate::worker::{Worker, unwrapped_octets};

/// One key of a shipment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportJob {
    /// The key's type: its class says which storage KEK wraps it.
    pub key_type: KeyType,
    /// What it is.
    pub shape: KeyShape,
    /// RFC 3394 wrap under the batch key.
    pub wrapped: Vec<u8>,
}

/// A key that is stored as a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// RFC 3394 wrap under the storage KEK of the key's class.
    pub blob: Vec<u8>,
    /// Version of that KEK.
    pub storage_kek_version: RootVersion,
    /// W of docs/formats.md, *Key fingerprints*: RFC 3394 wrap under the fingerprint KEK. Equal
    /// keys have equal wraps.
    pub fingerprint_wrap: Vec<u8>,
}

/// The versions of the storage KEKs that new keys are wrapped under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StorageKekVersions([RootVersion; KeyClass::WITH_ROOTS.len()]);

impl StorageKekVersions {
    /// The first of each class.
    pub(crate) const FIRST: Self = Self([RootVersion::FIRST; KeyClass::WITH_ROOTS.len()]);

    /// The version of a class.
    pub(crate) fn of(self, class: KeyClass) -> RootVersion {
        KeyClass::WITH_ROOTS
            .into_iter()
            .zip(self.0)
            .find(|(known, _)| *known == class)
            .map_or(RootVersion::FIRST, |(_, version)| version)
    }

    /// Sets the version of a class.
    pub(crate) fn set(&mut self, class: KeyClass, version: RootVersion) {
        for (known, place) in KeyClass::WITH_ROOTS.into_iter().zip(&mut self.0) {
            if known == class {
                *place = version;
            }
        }
    }
}

/// Why one key of a shipment is refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ImportRefusal {
    /// The wrapped key has a length that its shape cannot have.
    #[error("{0}")]
    Length(String),
    /// The HSM refuses to unwrap it: damaged, or wrapped under another batch key.
    #[error("the key does not unwrap under the batch key: it is damaged, or wrapped under another key")]
    WrappedKeyInvalid,
    /// Anything else that concerns this key only.
    #[error(transparent)]
    Hsm(HsmError),
}

impl Worker {
    /// Imports a batch, with one result for each job. A failing HSM stops the batch, and nothing of
    /// it has an effect.
    pub(crate) fn import_keys(
        &self,
        batch: &BatchKey,
        jobs: &[ImportJob],
        storage_keks: StorageKekVersions,
    ) -> Result<Vec<Result<StoredKey, ImportRefusal>>, HsmError> {
        let batch_key = self.batch_key(batch)?;
        let mut results = Vec::with_capacity(jobs.len());
        for job in jobs {
            let octets = match unwrapped_octets(job.shape, &job.wrapped) {
                Ok(octets) => octets,
                Err(error) => {
                    results.push(Err(ImportRefusal::Length(error.to_string())));
                    continue;
                }
            };
            let result = self.unwrap_key(batch_key, job.shape, &job.wrapped, Handling::Wrap).and_then(|key| {
                self.store(key.object(), octets, job.key_type.class(), storage_keks.of(job.key_type.class()))
            });
            results.push(match result {
                Ok(stored) => Ok(stored),
                Err(error) if concerns_all(&error) => return Err(error),
                Err(HsmError::WrappedKeyInvalid { .. }) => Err(ImportRefusal::WrappedKeyInvalid),
                Err(error) => Err(ImportRefusal::Hsm(error)),
            });
        }
        Ok(results)
    }

    /// A new AES key, stored.
    pub(crate) fn generate_stored(
        &self,
        key_type: KeyType,
        length: KeyLength,
        storage_kek_version: RootVersion,
    ) -> Result<StoredKey, HsmError> {
        let key = self.generate(length, Handling::Wrap)?;
        self.store(key.object(), length.octets(), key_type.class(), storage_kek_version)
    }

    /// The key of `source` wrapped anew under another version of its class's storage KEK.
    pub(crate) fn rewrap(&self, source: &KeySource, storage_kek_version: RootVersion) -> Result<StoredKey, HsmError> {
        let (key, octets) = self.key(source, Handling::Wrap)?;
        let stored = self.store(key.object(), octets, source.class(), storage_kek_version)?;
        drop(key);
        // The old wrap will be deleted. So the new one is unwrapped first, and must give the same
        // key (I3).
        let shape = match source {
            KeySource::Diversified { context, .. } => KeyShape::Aes(context.length),
            KeySource::Stored { shape, .. } => *shape,
            KeySource::Fresh(length) => KeyShape::Aes(*length),
        };
        let kek =
            self.token_key(TokenKey { purpose: Purpose::StorageKek(source.class()), version: storage_kek_version })?;
        let opened = self.unwrap_key(kek, shape, &stored.blob, Handling::Wrap)?;
        let fingerprint_kek = self.token_key(TokenKey::first(Purpose::FingerprintKek))?;
        if self.wrap(fingerprint_kek, opened.object(), octets)? != stored.fingerprint_wrap {
            return Err(HsmError::invalid(
                "storage KEK",
                "a key that was wrapped under it did not come out as the same key; do not use it",
            ));
        }
        Ok(stored)
    }

    fn store(
        &self,
        key: crate::raw::Object,
        octets: usize,
        class: KeyClass,
        storage_kek_version: RootVersion,
    ) -> Result<StoredKey, HsmError> {
        let kek = self.token_key(TokenKey { purpose: Purpose::StorageKek(class), version: storage_kek_version })?;
        let fingerprint_kek = self.token_key(TokenKey::first(Purpose::FingerprintKek))?;
        Ok(StoredKey {
            blob: self.wrap(kek, key, octets)?,
            storage_kek_version,
            fingerprint_wrap: self.wrap(fingerprint_kek, key, octets)?,
        })
    }
}
