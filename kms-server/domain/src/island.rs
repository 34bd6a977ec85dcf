//! An island: its kind and history, and the life of its roots' versions, from made to destroyed. It
//! is a sealed row (I5).

use crate::{
    DatabaseHistory, IslandName, KeyClass, KeyDerivation, RootEntry, RootError, RootId, RootLedger, RootPurpose,
    RootStanding, UnixMillis,
};

/// An island and its roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Island {
    /// Its name.
    pub name: IslandName,
    /// Whether it may carry real keys.
    pub kind: IslandKind,
    /// The roots of each class in [`KeyClass::WITH_ROOTS`] that was made, each class once.
    pub classes: Vec<ClassRoots>,
    /// The version of the seal root that rows are sealed under, from 1.
    pub seal_key_version: u8,
    /// SHA-256 of the escrow public key's SubjectPublicKeyInfo; `None` if the roots were never
    /// escrowed.
    pub escrow_fingerprint: Option<[u8; 32]>,
    /// What is known of the database's history (I4).
    pub history: DatabaseHistory,
    /// Versions of roots that were made after the ceremony, and which are in use.
    pub ledger: RootLedger,
    /// How many principals were added after the ceremony. If this number has not changed since an
    /// act read all principals, the act knows all of them.
    pub principals_added: u64,
    /// The index of exposures has repeated all sealed rows once. What it lacks from then on,
    /// somebody has taken from it.
    pub exposures_indexed: bool,
    /// When the ceremony made it.
    pub created: UnixMillis,
}

/// Whether an island is for trials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IslandKind {
    /// Made by `kms-dev`. A production configuration refuses it.
    Development,
    /// Made by a ceremony.
    Production,
}

/// The roots of one key class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassRoots {
    /// The class.
    pub class: KeyClass,
    /// The diversification roots that keys were derived from, oldest first; empty if the module
    /// cannot derive keys.
    pub diversification: Vec<DiversificationRoot>,
    /// The version of the storage KEK that wraps new keys, from 1.
    pub storage_kek_version: u8,
}

impl ClassRoots {
    /// The root that new keys are derived from.
    pub fn current(&self) -> Option<DiversificationRoot> {
        self.diversification.last().copied()
    }
}

/// A diversification root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiversificationRoot {
    /// Its version, from 1.
    pub version: u8,
    /// How it derives.
    pub derivation: KeyDerivation,
}

impl Island {
    /// The roots of a class.
    pub fn roots(&self, class: KeyClass) -> Option<&ClassRoots> {
        self.classes.iter().find(|roots| roots.class == class)
    }

    /// All versions of a root that were made, oldest first.
    pub fn root_versions(&self, purpose: RootPurpose) -> Vec<RootId> {
        let first = match purpose {
            RootPurpose::Diversification(class) => {
                self.roots(class).is_some_and(|roots| roots.diversification.iter().any(|root| root.version == 1))
            }
            RootPurpose::StorageKek(class) => self.roots(class).is_some(),
            RootPurpose::Seal | RootPurpose::VendorTransport => true,
        };
        let later =
            self.ledger.entries.iter().map(|entry| entry.id).filter(|id| id.purpose == purpose && id.version > 1);
        first.then_some(RootId { purpose, version: 1 }).into_iter().chain(later).collect()
    }

    /// The version that new keys and seals use.
    pub fn current_root(&self, purpose: RootPurpose) -> Option<u8> {
        match purpose {
            RootPurpose::Diversification(class) => {
                self.roots(class).and_then(ClassRoots::current).map(|root| root.version)
            }
            RootPurpose::StorageKek(class) => self.roots(class).map(|roots| roots.storage_kek_version),
            RootPurpose::Seal => Some(self.seal_key_version),
            RootPurpose::VendorTransport => Some(self.ledger.vendor_transport_version),
        }
    }

    /// The entry of a version.
    pub fn root_entry(&self, id: RootId) -> Option<&RootEntry> {
        self.ledger.entries.iter().find(|entry| entry.id == id)
    }

    /// The state of a version; none if it was never made.
    pub fn root_standing(&self, id: RootId) -> Option<RootStanding> {
        if !self.root_versions(id.purpose).contains(&id) {
            return None;
        }
        if self.root_entry(id).is_some_and(|entry| entry.destroyed.is_some()) {
            return Some(RootStanding::Destroyed);
        }
        let current = self.current_root(id.purpose).unwrap_or_default();
        let oldest = match id.purpose {
            RootPurpose::Seal => self.ledger.oldest_seal_key_version,
            RootPurpose::VendorTransport => self.ledger.oldest_vendor_transport_version,
            _ => 1,
        };
        Some(match id.version {
            version if version > current => RootStanding::Made,
            version if version == current => RootStanding::Current,
            version if version < oldest => RootStanding::Retired,
            _ => RootStanding::Replaced,
        })
    }

    /// Whether a key may be stored that needs this version: it was made, and its destruction was
    /// not decided (I3).
    pub fn may_store_under(&self, id: RootId) -> bool {
        !matches!(self.root_standing(id), None | Some(RootStanding::Destroyed))
    }

    /// The version that is made next. While a version is made and not current yet, no other can be
    /// made.
    ///
    /// # Errors
    /// The island has no such root, it has had 255 versions, or the newest is not current yet.
    pub fn next_root(&self, purpose: RootPurpose) -> Result<RootId, RootError> {
        let newest = self
            .root_versions(purpose)
            .into_iter()
            .map(|id| id.version)
            .max()
            .ok_or(RootError::NoSuchRoot { purpose })?;
        let newest = RootId { purpose, version: newest };
        if self.root_standing(newest) == Some(RootStanding::Made) {
            return Err(RootError::Needed { id: newest, standing: RootStanding::Made });
        }
        let version = newest.version.checked_add(1).ok_or(RootError::NoMoreVersions { purpose })?;
        Ok(RootId { purpose, version })
    }

    /// Notes a version that was made and escrowed.
    ///
    /// # Errors
    /// It is not [`Self::next_root`].
    pub fn add_root(&mut self, entry: RootEntry) -> Result<(), RootError> {
        if self.next_root(entry.id.purpose)? != entry.id {
            return Err(RootError::NotNext { id: entry.id });
        }
        self.ledger.entries.push(entry);
        self.ledger.entries.sort_by_key(|entry| entry.id);
        Ok(())
    }

    /// Makes a version current. Returns the version that was current before. `settling_ms` is how
    /// long ago it must have been made, so that every server knows it.
    ///
    /// # Errors
    /// It is not a version that is made and not in use yet, or it was made too recently.
    pub fn activate_root(&mut self, id: RootId, settling_ms: i64, now: UnixMillis) -> Result<u8, RootError> {
        let standing = self.root_standing(id).ok_or(RootError::NoSuchVersion { id })?;
        let (RootStanding::Made, Some(entry), Some(from)) =
            (standing, self.root_entry(id).cloned(), self.current_root(id.purpose))
        else {
            return Err(RootError::NotMade { id, standing });
        };
        if entry.made.after(settling_ms) > now {
            return Err(RootError::NotSettled {
                id,
                seconds: (now.0 - entry.made.0) / 1_000,
                settling: settling_ms / 1_000,
            });
        }
        match id.purpose {
            RootPurpose::Seal => self.seal_key_version = id.version,
            RootPurpose::VendorTransport => self.ledger.vendor_transport_version = id.version,
            RootPurpose::Diversification(class) | RootPurpose::StorageKek(class) => {
                let roots = self
                    .classes
                    .iter_mut()
                    .find(|roots| roots.class == class)
                    .ok_or(RootError::NoSuchRoot { purpose: id.purpose })?;
                match (id.purpose, entry.derivation) {
                    (RootPurpose::Diversification(_), Some(derivation)) => {
                        roots.diversification.push(DiversificationRoot { version: id.version, derivation })
                    }
                    (RootPurpose::Diversification(_), None) => return Err(RootError::NotMade { id, standing }),
                    _ => roots.storage_kek_version = id.version,
                }
            }
        }
        Ok(from)
    }

    /// Ends the acceptance of all versions of the seal key or of the vendor transport key before
    /// the current one.
    ///
    /// # Errors
    /// The root is of another purpose: its versions are needed until nothing refers to them.
    pub const fn retire_roots(&mut self, purpose: RootPurpose) -> Result<(), RootError> {
        match purpose {
            RootPurpose::Seal => self.ledger.oldest_seal_key_version = self.seal_key_version,
            RootPurpose::VendorTransport => {
                self.ledger.oldest_vendor_transport_version = self.ledger.vendor_transport_version
            }
            RootPurpose::Diversification(_) | RootPurpose::StorageKek(_) => {
                return Err(RootError::NoSuchRoot { purpose });
            }
        }
        Ok(())
    }

    /// Decides that a version is destroyed. The caller has checked that nothing refers to it, and
    /// that people approved the destruction (I6). A version that was made and never used can be
    /// destroyed too; then another can be made.
    ///
    /// # Errors
    /// It does not exist, or is current or still accepted.
    pub fn destroy_root(&mut self, id: RootId, now: UnixMillis) -> Result<(), RootError> {
        let standing = self.root_standing(id).ok_or(RootError::NoSuchVersion { id })?;
        if standing == RootStanding::Destroyed {
            return Err(RootError::Destroyed { id });
        }
        let replaced = matches!(id.purpose, RootPurpose::Diversification(_) | RootPurpose::StorageKek(_));
        if !(matches!(standing, RootStanding::Made | RootStanding::Retired)
            || (standing == RootStanding::Replaced && replaced))
        {
            return Err(RootError::Needed { id, standing });
        }
        match self.ledger.entries.iter_mut().find(|entry| entry.id == id) {
            Some(entry) => entry.destroyed = Some(now),
            None => {
                // A version of the ceremony.
                let entry = RootEntry {
                    id,
                    derivation: None,
                    made: self.created,
                    fingerprint: Vec::new(),
                    destroyed: Some(now),
                };
                self.ledger.entries.push(entry);
                self.ledger.entries.sort_by_key(|entry| entry.id);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000_000);

    fn island() -> Island {
        let roots = |class| ClassRoots {
            class,
            diversification: vec![DiversificationRoot { version: 1, derivation: KeyDerivation::Sp800108Cmac }],
            storage_kek_version: 1,
        };
        Island {
            name: IslandName::parse("north").unwrap(),
            kind: IslandKind::Development,
            classes: KeyClass::WITH_ROOTS.map(roots).to_vec(),
            seal_key_version: 1,
            escrow_fingerprint: None,
            history: DatabaseHistory::default(),
            ledger: RootLedger::default(),
            principals_added: 0,
            exposures_indexed: true,
            created: NOW,
        }
    }

    fn entry(purpose: RootPurpose, version: u8) -> RootEntry {
        let derivation = matches!(purpose, RootPurpose::Diversification(_)).then_some(KeyDerivation::Sp800108Cmac);
        RootEntry {
            id: RootId { purpose, version },
            derivation,
            made: NOW,
            fingerprint: vec![1, 2, 3],
            destroyed: None,
        }
    }

    #[test]
    fn a_version_is_made_becomes_current_is_replaced_and_destroyed() {
        for purpose in RootPurpose::ALL {
            let mut island = island();
            let (first, second) = (RootId { purpose, version: 1 }, RootId { purpose, version: 2 });
            assert_eq!(island.root_standing(first), Some(RootStanding::Current));
            assert_eq!(island.activate_root(second, 0, NOW), Err(RootError::NoSuchVersion { id: second }));
            assert_eq!(
                island.add_root(entry(purpose, 3)),
                Err(RootError::NotNext { id: RootId { purpose, version: 3 } })
            );
            island.add_root(entry(purpose, 2)).unwrap();
            assert_eq!(island.root_standing(second), Some(RootStanding::Made));
            // A version that was made and is not in use stands in the way of another.
            assert!(island.next_root(purpose).is_err());
            assert!(matches!(island.activate_root(second, 5_000, NOW.after(4_999)), Err(RootError::NotSettled { .. })));
            assert_eq!(island.activate_root(second, 5_000, NOW.after(5_000)), Ok(1));
            assert_eq!(
                (island.current_root(purpose), island.root_standing(first)),
                (Some(2), Some(RootStanding::Replaced))
            );
            assert!(island.activate_root(second, 0, NOW.after(5_000)).is_err());

            assert!(
                matches!(island.destroy_root(second, NOW), Err(RootError::Needed { .. })),
                "{purpose}: the current one"
            );
            if matches!(purpose, RootPurpose::Seal | RootPurpose::VendorTransport) {
                assert!(
                    matches!(island.destroy_root(first, NOW), Err(RootError::Needed { .. })),
                    "{purpose}: it is accepted still"
                );
                island.retire_roots(purpose).unwrap();
                assert_eq!(island.root_standing(first), Some(RootStanding::Retired));
            } else {
                assert!(island.retire_roots(purpose).is_err());
            }
            island.destroy_root(first, NOW).unwrap();
            assert_eq!(island.root_standing(first), Some(RootStanding::Destroyed));
            assert!(island.destroy_root(first, NOW).is_err());
            assert_eq!(island.next_root(purpose), Ok(RootId { purpose, version: 3 }));
            assert_eq!(Island::from_row(island.name.clone(), island.to_row().into()).unwrap(), island);
        }
    }

    #[test]
    fn a_module_that_derives_nothing_has_no_diversification_roots() {
        let mut island = island();
        island.classes.iter_mut().for_each(|roots| roots.diversification.clear());
        let purpose = RootPurpose::Diversification(KeyClass::Kek);
        assert_eq!(island.next_root(purpose), Err(RootError::NoSuchRoot { purpose }));
    }

    #[test]
    fn a_version_that_was_never_used_is_given_up_and_the_next_takes_its_place() {
        for purpose in RootPurpose::ALL {
            let mut island = island();
            let (second, third) = (RootId { purpose, version: 2 }, RootId { purpose, version: 3 });
            assert!(!island.may_store_under(second));
            island.add_root(entry(purpose, 2)).unwrap();
            assert!(island.may_store_under(second));
            island.destroy_root(second, NOW).unwrap();
            assert_eq!(
                (island.root_standing(second), island.current_root(purpose)),
                (Some(RootStanding::Destroyed), Some(1))
            );
            assert!(!island.may_store_under(second) && island.may_store_under(RootId { purpose, version: 1 }));
            assert!(island.activate_root(second, 0, NOW).is_err());
            island.add_root(entry(purpose, 3)).unwrap();
            assert_eq!(island.activate_root(third, 0, NOW), Ok(1));
            assert!(
                matches!(island.destroy_root(third, NOW), Err(RootError::Needed { .. })),
                "{purpose}: the current one"
            );
        }
    }
}
