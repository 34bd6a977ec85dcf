//! The sealed rows of owners, verified, and the rows of the key values that they share.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::Arc,
};

use kms_domain::{
    CounterDomainId, DeviceType, Exposure, Group, KeyType, KeyVersion, KeyVersionId, KnownBy, KnownKey, Meter, Owner,
    Party, SharedExposures, Slot, Slots, SystemTitle,
};
use kms_store::{MeterRow, RowKind, SealedRow};

use super::query::ExposedKey;
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// Rows that were read for one page.
pub(super) struct OwnerRows<'a> {
    island: &'a IslandContext,
    rows: Vec<OwnerContent>,
    unreadable: Vec<(Owner, String)>,
    /// Of groups and device types only these versions, and what follows from them; `None`: all.
    delivered: Option<HashSet<KeyVersionId>>,
}

/// A verified row.
enum OwnerContent {
    Meter(Arc<Meter>),
    Group(Arc<Group>),
    DeviceType(Arc<DeviceType>),
}

impl OwnerContent {
    fn owner(&self) -> Owner {
        match self {
            Self::Meter(meter) => meter.owner(),
            Self::Group(group) => group.owner(),
            Self::DeviceType(device_type) => device_type.owner(),
        }
    }

    fn slots(&self) -> &Slots {
        match self {
            Self::Meter(meter) => &meter.slots,
            Self::Group(group) => &group.slots,
            Self::DeviceType(device_type) => &device_type.slots,
        }
    }

    fn known_keys(&self, party: Option<&Party>, shared: &SharedExposures) -> Vec<KnownKey> {
        match self {
            Self::Meter(meter) => meter.known_keys(party, shared),
            Self::Group(group) => group.known_keys(party, shared),
            Self::DeviceType(device_type) => device_type.known_keys(party, shared),
        }
    }
}

impl<'a> OwnerRows<'a> {
    pub(super) const fn new(island: &'a IslandContext) -> Self {
        Self { island, rows: Vec::new(), unreadable: Vec::new(), delivered: None }
    }

    /// Reads these owners. One that does not exist is left out.
    pub(super) async fn read(&mut self, owners: &[Owner]) -> Result<(), ServiceError> {
        let titles: Vec<SystemTitle> = owners
            .iter()
            .filter_map(|owner| if let Owner::Meter(title) = owner { Some(*title) } else { None })
            .collect();
        if !titles.is_empty() {
            let rows = self.island.store.meters(&titles).await?;
            self.open_meters(rows).await?;
        }
        for owner in owners {
            let read = match owner {
                Owner::Meter(_) => continue,
                Owner::Group(id) => {
                    self.island.group(*id).await.map(|group| group.map(|(group, _)| OwnerContent::Group(group)))
                }
                Owner::DeviceType(id) => {
                    let open = |row: &SealedRow| self.island.committer.open_device_type(*id, row);
                    let read = self.island.open_twice(RowKind::DeviceType, &id.0.to_be_bytes(), open).await;
                    read.map(|read| read.map(|(device_type, _)| OwnerContent::DeviceType(device_type)))
                }
            };
            match read {
                Ok(content) => self.rows.extend(content),
                Err(error) => self.refused(*owner, error)?,
            }
        }
        Ok(())
    }

    /// Opens meters' rows that were read.
    pub(super) async fn open_meters(&mut self, rows: Vec<MeterRow>) -> Result<(), ServiceError> {
        for row in rows {
            // Once more, as [`IslandContext::open_twice`] does it.
            let opened = match self.island.committer.open_meter(row.title, &row.row) {
                Ok(meter) => Ok(Some(meter)),
                Err(_) => self.island.meter(row.title).await,
            };
            match opened {
                Ok(meter) => self.rows.extend(meter.map(OwnerContent::Meter)),
                Err(error) => self.refused(Owner::Meter(row.title), error)?,
            }
        }
        Ok(())
    }

    /// Keeps these meters only: the search columns found them, and their rows decide (I5).
    pub(super) fn retain_meters(&mut self, keep: impl Fn(&Meter) -> bool) {
        self.rows.retain(|row| match row {
            OwnerContent::Meter(meter) => keep(meter),
            OwnerContent::Group(_) | OwnerContent::DeviceType(_) => true,
        });
    }

    /// Reads the groups and device types whose keys left for the meters that were read.
    pub(super) async fn read_groups_of_meters(&mut self) -> Result<(), ServiceError> {
        let mut owners: Vec<Owner> = self
            .rows
            .iter()
            .filter_map(|row| if let OwnerContent::Meter(meter) = row { Some(meter) } else { None })
            .flat_map(|meter| meter.shared.iter().map(|key| key.owner).chain(groups_of(meter)))
            .collect();
        owners.sort_unstable();
        owners.dedup();
        self.read(&owners).await
    }

    /// Reads the groups and device types whose keys left for the meters that were read under a KEK
    /// that the vendor knows. Of these keys only, [`Self::known_keys`] tells: other versions may
    /// have left for the meters of another vendor.
    pub(super) async fn read_groups_under_vendors_keks(&mut self) -> Result<(), ServiceError> {
        let mut delivered = HashSet::new();
        for row in &self.rows {
            let OwnerContent::Meter(meter) = row else { continue };
            if meter.shared.is_empty() {
                continue;
            }
            let known = meter.known_keys(Some(&Party::Vendor), &SharedExposures::new());
            for kek in known.iter().filter(|known| known.key_type == KeyType::KEK) {
                let under = meter.shared.iter().filter(|key| (key.setup, key.kek) == (kek.setup, kek.version));
                delivered.extend(under.map(|key| KeyVersionId {
                    owner: key.owner,
                    setup: key.setup,
                    key_type: key.key_type,
                    version: key.version,
                }));
            }
        }
        let owners: HashSet<Owner> = delivered.iter().map(|key| key.owner).collect();
        let mut owners: Vec<Owner> = owners.into_iter().collect();
        owners.sort_unstable();
        self.read(&owners).await?;
        self.delivered = Some(delivered);
        Ok(())
    }

    /// Whether [`Self::read_groups_under_vendors_keks`] leaves this key in the answer.
    fn tells(&self, owner: Owner, key: &KnownKey) -> bool {
        let Some(delivered) = self.delivered.as_ref().filter(|_| !matches!(owner, Owner::Meter(_))) else {
            return true;
        };
        let has = |key_type, version| delivered.contains(&KeyVersionId { owner, setup: key.setup, key_type, version });
        has(key.key_type, key.version)
            || key
                .ways
                .iter()
                .filter_map(|way| KnownBy::through(*way))
                .any(|(key_type, version)| has(key_type, version))
    }

    /// What a party could know of these owners; `None`: all parties. And the owners whose rows, or
    /// the rows of whose key values, do not verify.
    pub(super) async fn known_keys(
        mut self,
        party: Option<&Party>,
    ) -> Result<(Vec<ExposedKey>, Vec<(Owner, String)>), ServiceError> {
        let (mut domains, mut keys) = (HashMap::new(), Vec::new());
        for row in std::mem::take(&mut self.rows) {
            let shared = match self.shared(&row, &mut domains).await {
                Ok(shared) => shared,
                Err(error) => {
                    self.refused(row.owner(), error)?;
                    continue;
                }
            };
            let (name, status) = match &row {
                OwnerContent::Meter(meter) => (String::new(), Some(meter.class.status)),
                OwnerContent::Group(group) => (group.name.clone(), None),
                OwnerContent::DeviceType(device_type) => (device_type.name.clone(), None),
            };
            let owner = row.owner();
            let known = row.known_keys(party, &shared).into_iter().filter(|key| self.tells(owner, key));
            keys.extend(known.map(|key| ExposedKey { owner, name: name.clone(), status, key }));
        }
        Ok((keys, self.unreadable))
    }

    /// Who knows the values of an owner's keys that other slots have too. Such keys are rare.
    async fn shared(
        &self,
        row: &OwnerContent,
        known: &mut HashMap<CounterDomainId, Vec<Exposure>>,
    ) -> Result<SharedExposures, ServiceError> {
        let mut shared = SharedExposures::new();
        for id in row.slots().iter().flat_map(Slot::versions).filter_map(KeyVersion::domain) {
            let exposures = match known.entry(id) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => place.insert(self.of_value(id).await?),
            };
            shared.insert(id, exposures.clone());
        }
        Ok(shared)
    }

    /// Who knows a key value.
    async fn of_value(&self, id: CounterDomainId) -> Result<Vec<Exposure>, ServiceError> {
        let open = |row: &SealedRow| self.island.committer.open_domain(id, row);
        let read = self.island.open_twice(RowKind::CounterDomain, &id.0, open).await?;
        Ok(read.map(|(domain, _)| domain.exposures.clone()).unwrap_or_default())
    }

    /// Notes an owner whose row does not verify.
    ///
    /// # Errors
    /// The error is another one.
    fn refused(&mut self, owner: Owner, error: ServiceError) -> Result<(), ServiceError> {
        match error {
            ServiceError::FailedPrecondition { reason, .. } => {
                self.unreadable.push((owner, reason));
                Ok(())
            }
            other => Err(other),
        }
    }
}

fn groups_of(meter: &Meter) -> impl Iterator<Item = Owner> {
    meter.class.groups.iter().copied().map(Owner::Group)
}
