//! Counts what still uses each version of each root.

use async_recursion::async_recursion as boxed;
use std::{collections::BTreeMap, sync::Arc};

use kms_domain::{
    DeviceType, Group, KeyMaterial, KeyOrigin, Meter, RootId, RootPurpose, RootStanding, RowSeal, Slots, SystemTitle,
    UnixMillis,
};
use kms_proto::v1;
use kms_store::{MeterFilter, RowKind, SealedRow};
use tokio::sync::mpsc;

use super::RootService;
use crate::keys::seal::FINGERPRINT_KEY_VERSION;
use crate::row_id::row_id;
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;

/// The number of keys or rows that use each version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootReferences {
    /// Key versions (diversification roots, storage KEKs) or rows (seal root), by root version.
    /// Unused versions are not listed.
    pub references: BTreeMap<RootId, u64>,
    /// When the last key that was derived from a diversification root was destroyed: an earlier
    /// backup still has the key.
    pub last_uses: BTreeMap<RootId, UnixMillis>,
    /// Rows that were read.
    pub rows: u64,
    /// Rows that cannot be read: it is unknown what they use.
    pub unreadable: u64,
}

impl RootReferences {
    /// The number of users of a version.
    pub fn of(&self, id: RootId) -> u64 {
        self.references.get(&id).copied().unwrap_or_default()
    }

    /// When the last key of a diversification root was destroyed.
    pub fn last_use(&self, id: RootId) -> Option<UnixMillis> {
        self.last_uses.get(&id).copied()
    }

    fn add(&mut self, root: RootId) {
        *self.references.entry(root).or_default() += 1;
    }

    fn add_slots(&mut self, slots: &Slots) {
        for slot in slots.iter() {
            let class = slot.key_type().class();
            for version in slot.versions() {
                match (RootId::needed_by(slot.key_type(), version), version.material(), version.origin()) {
                    (Some(root), ..) => self.add(root),
                    (None, KeyMaterial::Destroyed, KeyOrigin::Diversified { root_version, .. }) => {
                        let id = RootId { purpose: RootPurpose::Diversification(class), version: root_version };
                        let last = self.last_uses.entry(id).or_insert(version.since());
                        *last = version.since().max(*last);
                    }
                    // A destroyed version has no wrap left.
                    _ => {}
                }
            }
        }
    }
}

impl RootService {
    /// Counts for a caller and reports the progress.
    ///
    /// # Errors
    /// Not permitted, or the database is unavailable.
    #[boxed]
    pub async fn count_for(
        &self,
        caller: &Caller,
    ) -> Result<mpsc::Receiver<Result<v1::CountRootReferencesResponse, ServiceError>>, ServiceError> {
        self.island.require(caller, &Action::ListRoots).await?;
        let rows = self.island.store.meter_count(&MeterFilter::default()).await?;
        let (answers, receiver) = mpsc::channel(4);
        let service = self.clone();
        tokio::spawn(async move {
            let told = answers.clone();
            let counted = service.count(|read| {
                let progress = v1::CountRootReferencesResponse {
                    rows_read: read,
                    rows,
                    ..v1::CountRootReferencesResponse::default()
                };
                told.try_send(Ok(progress)).is_ok() || !told.is_closed()
            });
            let last = counted.await.map(|counts| service.references(&counts, rows));
            // The caller may be gone.
            let _ = answers.send(last).await;
        });
        Ok(receiver)
    }

    /// Reads all rows once. `progress` is called with the number of rows read; if it returns false,
    /// the count ends early with an error.
    ///
    /// # Errors
    /// The database is unavailable.
    pub async fn count(&self, mut progress: impl FnMut(u64) -> bool + Send) -> Result<RootReferences, ServiceError> {
        let (store, name) = (&self.island.store, self.island.name());
        let mut counts = RootReferences::default();
        let mut after: Option<SystemTitle> = None;
        loop {
            let page = store.meter_page(&MeterFilter::default(), after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.title);
            for row in page {
                counts.read(&row.row, |body| Meter::from_row(row.title, name, body).ok().map(|meter| meter.slots));
            }
            if !progress(counts.rows) {
                return Err(ServiceError::unavailable("the count was ended: its caller is gone"));
            }
        }
        for kind in RowKind::ALL {
            let mut after: Option<Vec<u8>> = None;
            loop {
                let page = store.sealed_page(kind, after.as_deref(), PAGE).await?;
                let Some((last, _)) = page.last() else { break };
                after = Some(last.clone());
                for (id, row) in &page {
                    let id = row_id(kind.number(), id, name);
                    counts.read(row, |body| match id? {
                        kms_domain::RowId::Group(group) => {
                            Group::from_row(group, name, body).ok().map(|group| group.slots)
                        }
                        kms_domain::RowId::DeviceType(number) => {
                            DeviceType::from_row(number, name, body).ok().map(|device_type| device_type.slots)
                        }
                        _ => Some(Slots::default()),
                    });
                }
            }
        }
        Ok(counts)
    }

    fn references(&self, counts: &RootReferences, rows: u64) -> v1::CountRootReferencesResponse {
        let row: Arc<kms_domain::Island> = self.island.row();
        let ids = RootPurpose::ALL.into_iter().flat_map(|purpose| row.root_versions(purpose));
        let references = ids.map(|id| v1::RootReferences {
            root: id.purpose.to_string(),
            version: id.version.into(),
            references: counts.of(id),
            needed_for: needed_for(id, row.root_standing(id)).to_owned(),
        });
        v1::CountRootReferencesResponse {
            rows_read: counts.rows,
            rows,
            unreadable: counts.unreadable,
            references: references.collect(),
            finished: true,
        }
    }
}

impl RootReferences {
    fn read(&mut self, row: &SealedRow, slots: impl FnOnce(bytes::Bytes) -> Option<Slots>) {
        self.rows += 1;
        match (RowSeal::from_octets(&row.seal), slots(bytes::Bytes::copy_from_slice(&row.body))) {
            (Ok(seal), Some(slots)) => {
                self.add(RootId { purpose: RootPurpose::Seal, version: seal.key_version() });
                self.add_slots(&slots);
            }
            _ => self.unreadable += 1,
        }
    }
}

/// What a version is needed for, besides the counted users.
pub(super) fn needed_for(id: RootId, standing: Option<RootStanding>) -> &'static str {
    match (id.purpose, standing) {
        (_, Some(RootStanding::Made)) => "the next rotation",
        (RootPurpose::Seal, Some(_)) if id.version == FINGERPRINT_KEY_VERSION => {
            "the audit log and fingerprints of keys"
        }
        (RootPurpose::VendorTransport, Some(RootStanding::Current | RootStanding::Replaced)) => "shipments",
        (RootPurpose::Seal, Some(RootStanding::Current)) => "new rows and records",
        (_, Some(RootStanding::Current)) => "new keys",
        (RootPurpose::Seal, Some(RootStanding::Replaced)) => "the audit log and requests that can still be repeated",
        (RootPurpose::Seal, Some(RootStanding::Retired)) => "the audit log",
        _ => "",
    }
}

const PAGE: u32 = 1_000;

#[cfg(test)]
mod tests {
    use kms_domain::{KeyClass, KeyDerivation, KeyLength, KeyState, KeyType, NewKeyVersion, SecuritySetupId, Slot};

    use super::*;

    #[test]
    fn a_derived_key_uses_its_root_until_it_is_destroyed_and_backups_have_it_until_then() {
        let root = RootId { purpose: RootPurpose::Diversification(KeyClass::Session), version: 1 };
        let origin = KeyOrigin::Diversified {
            root_version: 1,
            derivation: KeyDerivation::Sp800108Cmac,
            length: KeyLength::Aes128,
        };
        let mut slot = Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK);
        let new = NewKeyVersion { state: KeyState::PreActive, origin, wrapped: None, fingerprint: None };
        let number = slot.add_version(new, UnixMillis(1_000)).unwrap();
        let counted = |slot: &Slot| {
            let mut slots = Slots::default();
            slots.insert(slot.clone()).unwrap();
            let mut counts = RootReferences::default();
            counts.add_slots(&slots);
            (counts.of(root), counts.last_use(root))
        };
        assert_eq!(counted(&slot), (1, None));
        slot.transition(number, KeyState::Destroyed, UnixMillis(5_000)).unwrap();
        assert_eq!(counted(&slot), (0, Some(UnixMillis(5_000))));
    }
}
