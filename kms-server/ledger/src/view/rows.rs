//! Sealed rows, as an act sees and changes them (I5), with the two rules that hold for every write
//! of keys: no key under a destroyed root (I3), and equal keys share their exposures.

use std::sync::Arc;

use kms_domain::{
    Campaign, CampaignId, CounterDomain, CounterDomainId, DeviceType, DeviceTypeId, Exposure, Group, GroupId,
    Invitation, Island, IslandName, Meter, Owner, Principal, PrincipalId, Proposal, ProposalId, QuotaUse, RootId,
    RootRotation, RowId, Slot, Slots, SystemTitle, WorkOrder, WorkOrderId,
};

use super::{View, not_read};
use crate::{
    draft::OpenError,
    owner_row::OwnerRow,
    sealed::{Opened, RowContent, Value},
    staged::StagedChange,
};
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_store::WorkOrderCount;

impl View<'_, '_> {
    /// The caller's principal, if it is enabled and may use this certificate now (I5, I8).
    ///
    /// # Errors
    /// [`ServiceError::Unauthenticated`]: it is not, or not any more.
    pub fn caller(&mut self, caller: &Caller) -> Result<Arc<Principal>, ServiceError> {
        let now = self.now();
        match self.principal(&caller.principal)? {
            Some(principal) if principal.accepts(&caller.certificate_sha256, now) => Ok(principal),
            _ => Err(ServiceError::unauthenticated(
                "the certificate is not one of an enabled principal of this island; ask a security officer",
            )),
        }
    }

    /// A principal.
    ///
    /// # Errors
    /// The row was not read yet (the transaction reads it and decides again), or does not verify.
    pub fn principal(&mut self, id: &PrincipalId) -> Result<Option<Arc<Principal>>, ServiceError> {
        self.get(id.clone())
    }

    /// Writes a principal.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_principal(&mut self, principal: Principal) -> Result<(), ServiceError> {
        self.put(Arc::new(principal))
    }

    /// A meter.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn meter(&mut self, title: SystemTitle) -> Result<Option<Arc<Meter>>, ServiceError> {
        self.get(title)
    }

    /// Writes a meter. `reprojected` says that its search columns have changed.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_meter(&mut self, meter: Meter, reprojected: bool) -> Result<(), ServiceError> {
        self.put_row(Arc::new(meter), reprojected)
    }

    /// A group of meters.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn group(&mut self, id: GroupId) -> Result<Option<Arc<Group>>, ServiceError> {
        self.get(id)
    }

    /// Writes a group.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_group(&mut self, group: Group) -> Result<(), ServiceError> {
        self.put(Arc::new(group))
    }

    /// A device type.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn device_type(&mut self, id: DeviceTypeId) -> Result<Option<Arc<DeviceType>>, ServiceError> {
        self.get(id)
    }

    /// Writes a device type.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_device_type(&mut self, device_type: DeviceType) -> Result<(), ServiceError> {
        self.put(Arc::new(device_type))
    }

    /// The row of an owner of keys.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn owner(&mut self, owner: Owner) -> Result<Option<OwnerRow>, ServiceError> {
        Ok(match owner {
            Owner::Meter(title) => self.meter(title)?.map(OwnerRow::Meter),
            Owner::Group(id) => self.group(id)?.map(OwnerRow::Group),
            Owner::DeviceType(id) => self.device_type(id)?.map(OwnerRow::DeviceType),
        })
    }

    /// Writes the row of an owner whose keys changed, and nothing that search columns show.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_owner(&mut self, row: OwnerRow) -> Result<(), ServiceError> {
        match row {
            OwnerRow::Meter(meter) => self.put(meter),
            OwnerRow::Group(group) => self.put(group),
            OwnerRow::DeviceType(device_type) => self.put(device_type),
        }
    }

    /// A counter domain.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn domain(&mut self, id: CounterDomainId) -> Result<Option<Arc<CounterDomain>>, ServiceError> {
        self.get(id)
    }

    /// Writes a counter domain.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_domain(&mut self, domain: CounterDomain) -> Result<(), ServiceError> {
        self.put(Arc::new(domain))
    }

    /// The island's own row.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn island(&mut self, name: &IslandName) -> Result<Option<Arc<Island>>, ServiceError> {
        self.get(name.clone())
    }

    /// Writes the island's own row.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_island(&mut self, island: Island) -> Result<(), ServiceError> {
        self.put(Arc::new(island))
    }

    /// What a principal has used of its quotas; nothing, if it never used one.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn quota_use(&mut self, principal: &PrincipalId) -> Result<QuotaUse, ServiceError> {
        let used = self.get::<QuotaUse>(principal.clone())?;
        Ok(used.map_or_else(|| QuotaUse::new(principal.clone()), Arc::unwrap_or_clone))
    }

    /// Writes what a principal has used of its quotas.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_quota_use(&mut self, used: QuotaUse) -> Result<(), ServiceError> {
        self.put(Arc::new(used))
    }

    /// A campaign.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn campaign(&mut self, id: CampaignId) -> Result<Option<Arc<Campaign>>, ServiceError> {
        self.get(id)
    }

    /// Writes a campaign.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_campaign(&mut self, campaign: Campaign) -> Result<(), ServiceError> {
        self.put(Arc::new(campaign))
    }

    /// A proposal.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn proposal(&mut self, id: ProposalId) -> Result<Option<Arc<Proposal>>, ServiceError> {
        self.get(id)
    }

    /// Writes a proposal.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_proposal(&mut self, proposal: Proposal) -> Result<(), ServiceError> {
        self.put(Arc::new(proposal))
    }

    /// The rotation to a version of a root.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn root_rotation(&mut self, to: RootId) -> Result<Option<Arc<RootRotation>>, ServiceError> {
        self.get(to)
    }

    /// Writes the rotation to a version of a root.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_root_rotation(&mut self, rotation: RootRotation) -> Result<(), ServiceError> {
        self.put(Arc::new(rotation))
    }

    /// A work order.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn work_order(&mut self, id: &WorkOrderId) -> Result<Option<Arc<WorkOrder>>, ServiceError> {
        self.get(id.clone())
    }

    /// Writes a work order, with its search columns.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_work_order(&mut self, order: WorkOrder) -> Result<(), ServiceError> {
        self.put(Arc::new(order))
    }

    /// How many work orders of this principal count, with those that this transaction adds.
    ///
    /// # Errors
    /// The number was not read yet.
    pub fn work_orders_of(&mut self, maker: &PrincipalId) -> Result<WorkOrderCount, ServiceError> {
        let Some(stored) = self.draft.read.work_orders_of(maker) else {
            self.draft.missing.work_orders_of.push(maker.clone());
            return Err(not_read());
        };
        // An order that this act has changed stands in both maps.
        let staged = &self.staged.rows;
        let before = self.draft.rows.iter().filter(|(id, _)| !staged.contains_key(*id));
        let added = before.chain(staged).filter(|(_, opened)| {
            opened.generation.is_none()
                && matches!(&opened.value, Some(Value::WorkOrder(order)) if order.maker == *maker)
        });
        Ok(WorkOrderCount { orders: stored.orders.saturating_add(added.count() as u64), ..stored })
    }

    /// The last invitation of a handheld.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn invitation(&mut self, handheld: &PrincipalId) -> Result<Option<Arc<Invitation>>, ServiceError> {
        self.get(handheld.clone())
    }

    /// Writes an invitation.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_invitation(&mut self, invitation: Invitation) -> Result<(), ServiceError> {
        self.put(Arc::new(invitation))
    }

    /// Writes a row unchanged, so that it gets the seal of the current seal key. False: there is no
    /// such row.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn seal_again(&mut self, id: RowId) -> Result<bool, ServiceError> {
        let Some(value) = self.open(id.clone())? else { return Ok(false) };
        self.put_value(id, value, false)?;
        Ok(true)
    }

    /// Notes in the rows of counter domains who could know the keys of a meter, as an island of an
    /// earlier version has not done. True: that was news.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn share_exposures_of(&mut self, meter: &Meter) -> Result<bool, ServiceError> {
        let mut news = false;
        for version in meter.slots.iter().flat_map(Slot::versions) {
            if let Some(id) = version.domain() {
                news |= self.learn(id, version.exposures())?;
            }
        }
        Ok(news)
    }

    /// The content of a sealed row, if there is one.
    fn get<T: RowContent>(&mut self, key: T::Key) -> Result<Option<Arc<T>>, ServiceError> {
        self.open(T::row(key)).map(|value| value.and_then(T::of))
    }

    /// Writes a sealed row.
    pub(super) fn put<T: RowContent>(&mut self, content: Arc<T>) -> Result<(), ServiceError> {
        self.put_row(content, false)
    }

    fn put_row<T: RowContent>(&mut self, content: Arc<T>, reprojected: bool) -> Result<(), ServiceError> {
        self.put_value(content.own_row(), content.value(), reprojected)
    }

    fn open(&mut self, id: RowId) -> Result<Option<Value>, ServiceError> {
        if let Some(opened) = self.staged.rows.get(&id).or_else(|| self.draft.rows.get(&id)) {
            return Ok(opened.value.clone());
        }
        let opened = self.draft.open(&id).map_err(|error| match error {
            OpenError::NotRead => not_read(),
            OpenError::Refused(reason) => {
                // I5: for the caller the row is like an absent one. The officers get an event.
                self.note_refused_row(reason.clone());
                tracing::error!(row = %id, reason, "a sealed row was refused");
                ServiceError::denied(self.actor.action)
            }
        })?;
        let value = opened.value.clone();
        self.draft.rows.insert(id, opened);
        Ok(value)
    }

    fn put_value(&mut self, id: RowId, value: Value, reprojected: bool) -> Result<(), ServiceError> {
        let known = self.open(id.clone())?;
        self.may_store(known.as_ref().and_then(Value::slots), value.slots())?;
        self.share_exposures(known.as_ref().and_then(Value::slots), value.slots())?;
        let value = match (value, known) {
            // An earlier copy does not remove exposures that were noted since.
            (Value::CounterDomain(mut domain), Some(Value::CounterDomain(known))) => {
                Arc::make_mut(&mut domain).learn(&known.exposures);
                Value::CounterDomain(domain)
            }
            (value, _) => value,
        };
        let before = self.staged.rows.get(&id).or_else(|| self.draft.rows.get(&id));
        let generation = before.and_then(|opened| opened.generation);
        let original = before.and_then(|opened| opened.original.clone());
        let reprojected = reprojected || before.is_some_and(|opened| opened.changed && opened.reprojected);
        let opened = Opened { generation, value: Some(value), original, changed: true, reprojected };
        let before = self.staged.rows.insert(id.clone(), opened);
        self.staged.log.push(StagedChange::Row(id, before));
        Ok(())
    }

    /// Whoever comes to know the key of a slot knows it in every slot with the same value: the
    /// value's counter domain notes that in the same transaction. This happens here, so that no use
    /// case can forget it.
    fn share_exposures(&mut self, known: Option<&Slots>, new: Option<&Slots>) -> Result<(), ServiceError> {
        for slot in new.into_iter().flat_map(Slots::iter) {
            let before = known.and_then(|known| known.get(slot.setup(), slot.key_type()));
            for version in slot.versions() {
                let Some(id) = version.domain() else { continue };
                let same = before
                    .and_then(|before| before.version(version.number()))
                    .is_some_and(|before| before.exposures() == version.exposures());
                if !same && !version.exposures().is_empty() {
                    self.learn(id, version.exposures())?;
                }
            }
        }
        Ok(())
    }

    /// Notes in a domain's row, if there is one, who could know its value.
    fn learn(&mut self, id: CounterDomainId, exposures: &[Exposure]) -> Result<bool, ServiceError> {
        let Some(mut domain) = self.domain(id)? else { return Ok(false) };
        let news = Arc::make_mut(&mut domain).learn(exposures);
        if news {
            self.put(domain)?;
        }
        Ok(news)
    }

    /// I3: no key is stored that needs a root whose destruction was decided, however long ago the
    /// HSM made it. The island's row is read in the same transaction, so that the decision comes
    /// before or after the whole transaction. Keys of this kind that the row has already stay.
    fn may_store(&mut self, known: Option<&Slots>, new: Option<&Slots>) -> Result<(), ServiceError> {
        for slot in new.into_iter().flat_map(Slots::iter) {
            let before = known.and_then(|known| known.get(slot.setup(), slot.key_type()));
            for version in slot.versions() {
                let Some(root) = RootId::needed_by(slot.key_type(), version) else { continue };
                let stored = before
                    .and_then(|before| before.version(version.number()))
                    .and_then(|before| RootId::needed_by(slot.key_type(), before));
                if stored == Some(root) {
                    continue;
                }
                let name = self.draft.island;
                // Before the ceremony has ended there are neither a row of the island nor meters.
                if self.island(name)?.is_some_and(|island| !island.may_store_under(root)) {
                    return Err(ServiceError::Aborted {
                        reason: format!(
                            "the root `{root}` was destroyed or is not known: a key that was made under it is not stored"
                        ),
                        next_step: "try again: the key is made under the current root".to_owned(),
                    });
                }
            }
        }
        Ok(())
    }
}
