//! The rotation of a group's key: a new version for all members, the members that have acknowledged
//! it, and the switch of broadcasts to it.
//!
//! A campaign begins the rotation, and one transfer for each member brings the key. The members
//! that have it are counted from their sealed rows: otherwise each transfer would have to write the
//! group's row. The group's row only keeps the results of the count.
//!
//! Broadcasts do not switch automatically. The head-end that broadcasts knows about unfinished
//! work, such as an image that half of the members have. So the head-end decides when to switch,
//! once the threshold is reached.

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Duration};

use kms_domain::{
    CampaignId, Group, GroupError, GroupId, GroupRotation, KeyState, KeyType, KeyVersionNumber, MemberCounts, Meter,
    NewKeyVersion, Owner, RequestId, RotationStage, SecuritySetupId, SwitchThreshold, SystemTitle,
};
use kms_proto::v1::{self, GroupKeyChanged, audit_record::Event};
use kms_store::{MeterFilter, Reads, RowKind};

use super::{OwnerService, no_such_group, number_of};
use crate::island::IslandContext;
use crate::keys::{group_rotation::rotation_message, recipe::Recipe, setup::setup_record};
use crate::request_digest::request_digest;
use kms_authz::facts;
use kms_authz::{Action, Caller, GroupFacts, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Known, Never, Permit, Request, ServerAct, View};

/// A key of a group, as a caller names it.
#[derive(Clone, Debug)]
pub struct NamedGroupKey {
    /// The group's name.
    pub group: String,
    /// The key type.
    pub key_type: KeyType,
    /// The security setup; `None`: the first that the group has the key in.
    pub setup: Option<SecuritySetupId>,
}

/// A request of a head-end or an officer to switch broadcasts to a new version.
#[derive(Clone, Debug)]
pub struct Switch {
    /// The key.
    pub key: NamedGroupKey,
    /// The version that is rolled out.
    pub version: KeyVersionNumber,
    /// Whether to switch below the threshold too.
    pub early: bool,
    /// Why.
    pub reason: String,
}

/// A page of the members that do not have the new version.
#[derive(Clone, Debug, Default)]
pub struct BehindPage {
    /// The members.
    pub members: Vec<v1::MemberBehind>,
    /// The last member of this page, if more pages follow.
    pub next: Option<SystemTitle>,
}

impl OwnerService {
    /// The state of the rotation of a group's key, with its members counted.
    ///
    /// # Errors
    /// Not permitted, no such group or key, or the database is unavailable.
    #[boxed]
    pub async fn rotation(&self, caller: &Caller, key: &NamedGroupKey) -> Result<v1::GroupRotation, ServiceError> {
        let group = self.permitted_group(caller, &key.group, &Action::ShowGroupRotation).await?;
        let setup = setup_of(&group, key.key_type, key.setup)?;
        self.counted(&group, setup, key.key_type).await
    }

    /// The members that have not acknowledged the new version, in the order of the database.
    ///
    /// # Errors
    /// As [`Self::rotation`].
    #[boxed]
    pub async fn members_behind(
        &self,
        caller: &Caller,
        key: &NamedGroupKey,
        after: Option<SystemTitle>,
        limit: usize,
    ) -> Result<BehindPage, ServiceError> {
        let group = self.permitted_group(caller, &key.group, &Action::ShowGroupRotation).await?;
        let setup = setup_of(&group, key.key_type, key.setup)?;
        let mut page = BehindPage::default();
        let Some(rotation) = group.rotation(setup, key.key_type) else { return Ok(page) };
        let mut members = Members::of(&self.island, group.id, after);
        while let Some(some) = members.next().await? {
            for member in some {
                let Member::Known(meter) = member else { continue };
                let acknowledged = meter.acknowledged(group.owner(), setup, key.key_type);
                if acknowledged.is_some_and(|acknowledged| acknowledged >= rotation.version) {
                    continue;
                }
                page.members.push(v1::MemberBehind {
                    meter: meter.title.octets().to_vec().into(),
                    manufacturer: meter.class.vendor.to_string(),
                    status: meter.class.status.to_string(),
                    head_end: meter.class.head_end.as_ref().map(ToString::to_string).unwrap_or_default(),
                    acknowledged_version: acknowledged.map_or(0, KeyVersionNumber::number),
                    delivered: has_left(&meter, group.owner(), rotation),
                    transfer_under_way: meter.transfer.is_some(),
                });
                if page.members.len() >= limit {
                    page.next = Some(meter.title);
                    return Ok(page);
                }
            }
        }
        Ok(page)
    }

    /// Switches broadcasts to the version that is rolled out.
    ///
    /// # Errors
    /// Not permitted, another version is rolled out or none, too few members have it, or the
    /// database is unavailable.
    #[boxed]
    pub async fn switch(
        &self,
        caller: &Caller,
        request: RequestId,
        switch: Switch,
    ) -> Result<v1::GroupRotation, ServiceError> {
        let Switch { key, version, early, reason } = switch;
        let action = Action::SwitchGroupKey { key_type: key.key_type, early };
        let group = self.permitted_group(caller, &key.group, &action).await?;
        let setup = setup_of(&group, key.key_type, key.setup)?;
        let (id, key_type) = (group.id, key.key_type);
        let counts = self.count(&group, setup, key_type, version).await?;
        let act = SwitchKey { group: id, setup, key_type, version, early, reason, counts };
        let group = self.island.door.act(caller, Some(request), act).await?.value;
        Ok(rotation_message(&group, setup, key_type, counts))
    }

    /// Sets how many members must have a new version before broadcasts may switch to it.
    ///
    /// # Errors
    /// Not permitted, no such group, or the database is unavailable.
    #[boxed]
    pub async fn set_switch_threshold(
        &self,
        caller: &Caller,
        request: RequestId,
        name: &str,
        threshold: SwitchThreshold,
    ) -> Result<v1::Group, ServiceError> {
        let action = Action::SetSwitchThreshold;
        let id = self.permitted_group(caller, name, &action).await?.id;
        let digest = request_digest(&[action.name().as_bytes(), name.as_bytes(), &[threshold.percent()]]);
        let act = SetThreshold { group: id, threshold };
        self.island.door.act(caller, Request { id: request, digest }, act).await?;
        self.group(caller, name).await
    }

    /// Follows unfinished rotations every `period`, until it is dropped or aborted. It records when
    /// the threshold is reached, and when every member has the new version.
    pub fn in_background(self, period: Duration) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(period).await;
                if let Err(error) = self.follow_rotations().await {
                    tracing::warn!(%error, "the rotations of groups' keys could not be followed; it is tried again");
                }
            }
        })
    }

    /// Checks all unfinished rotations once.
    ///
    /// # Errors
    /// The database is unavailable.
    #[boxed]
    pub async fn follow_rotations(&self) -> Result<(), ServiceError> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.island.store.sealed_page(RowKind::Group, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(last.clone());
            for (id, row) in &page {
                // The scrubber reports a row that does not verify (I5). A row that was written
                // meanwhile is checked in the next round.
                let Ok(group) = self.island.committer.open_group(GroupId(number_of(id)?), row) else { continue };
                let waits = |rotation: &&GroupRotation| {
                    matches!(rotation.stage(), RotationStage::RollingOut | RotationStage::Switched)
                };
                for rotation in group.rotations.iter().filter(waits) {
                    self.follow(&group, rotation).await?;
                }
            }
        }
    }

    async fn follow(&self, group: &Group, rotation: &GroupRotation) -> Result<(), ServiceError> {
        let (id, setup, key_type, version) = (group.id, rotation.setup, rotation.key_type, rotation.version);
        let counts = self.count(group, setup, key_type, version).await?;
        if !group.clone().note_members(setup, key_type, version, counts, IslandContext::now()) {
            return Ok(());
        }
        let reads = Reads { sealed: vec![group_row(id)], ..Reads::default() };
        let committed = self.island.committer.act(ServerAct::FOLLOW_ROTATION, reads, move |view| {
            let Some(mut group) = view.group(id)? else { return Ok(Decision::unchanged(())) };
            // Another server may have been faster.
            if !Arc::make_mut(&mut group).note_members(setup, key_type, version, counts, view.now()) {
                return Ok(Decision::unchanged(()));
            }
            let complete =
                group.rotation(setup, key_type).is_some_and(|rotation| rotation.stage() == RotationStage::Complete);
            let change = if complete { "complete" } else { "threshold-reached" };
            let entry = view.append(Event::GroupKeyChanged(record(&group, setup, key_type, version, change, counts)));
            view.put_group((*group).clone())?;
            Ok(Decision::recorded(entry, ()))
        });
        committed.await.map(drop)
    }

    /// The state of the rotation of each key of a group.
    pub(super) async fn rotations(&self, group: &Group) -> Result<Vec<v1::GroupRotation>, ServiceError> {
        let mut rotations = Vec::new();
        for slot in group.slots.iter() {
            rotations.push(self.counted(group, slot.setup(), slot.key_type()).await?);
        }
        Ok(rotations)
    }

    async fn counted(
        &self,
        group: &Group,
        setup: SecuritySetupId,
        key_type: KeyType,
    ) -> Result<v1::GroupRotation, ServiceError> {
        let version = group.rotation(setup, key_type).map(|rotation| rotation.version);
        let counts = self.count(group, setup, key_type, version.unwrap_or(KeyVersionNumber::FIRST)).await?;
        // A key that was never rolled out has no acknowledgements: the members were set up with it.
        let counts = if version.is_some() {
            counts
        } else {
            MemberCounts { members: counts.members, ..MemberCounts::default() }
        };
        Ok(rotation_message(group, setup, key_type, counts))
    }

    /// Counts the members by their sealed rows (I5).
    async fn count(
        &self,
        group: &Group,
        setup: SecuritySetupId,
        key_type: KeyType,
        version: KeyVersionNumber,
    ) -> Result<MemberCounts, ServiceError> {
        let mut counts = MemberCounts::default();
        let mut members = Members::of(&self.island, group.id, None);
        while let Some(some) = members.next().await? {
            for member in some {
                counts.members += 1;
                // I5: a row that was refused acknowledges nothing.
                let Member::Known(meter) = member else { continue };
                if meter
                    .acknowledged(group.owner(), setup, key_type)
                    .is_some_and(|acknowledged| acknowledged >= version)
                {
                    counts.acknowledged += 1;
                } else if meter.shared_of(group.owner(), setup, key_type).any(|key| key.version == version) {
                    counts.unacknowledged += 1;
                }
            }
        }
        Ok(counts)
    }

    /// A group, if policy permits the action on it. Only a caller that may list groups learns that
    /// there is no group of this name.
    async fn permitted_group(&self, caller: &Caller, name: &str, action: &Action) -> Result<Arc<Group>, ServiceError> {
        let principal = facts(&*self.island.principal(caller).await?);
        let policy = self.island.policy.load_full();
        let unknown = || match policy.permits(&principal, &Action::ListGroups, &Resource::Island).is_permit() {
            true => no_such_group(name),
            false => ServiceError::denied(action.to_string()),
        };
        let id = self.groups.find(&self.island, name).await?.ok_or_else(unknown)?;
        let (group, _) = self.island.group(id).await?.ok_or_else(unknown)?;
        policy.require(&principal, action, &Resource::Group(&GroupFacts::from(&*group)))?;
        Ok(group)
    }
}

/// A new version of a group's key, for the act that begins its rotation.
#[derive(Clone)]
pub(crate) struct NewGroupVersion {
    /// The group.
    pub(crate) group: GroupId,
    setup: SecuritySetupId,
    key_type: KeyType,
    new: NewKeyVersion,
}

impl NewGroupVersion {
    /// Makes a version in the same way as the version before; `None` if the group has no such key.
    ///
    /// # Errors
    /// A failure of the HSM or the database, or the group's row does not verify.
    pub(crate) async fn prepare(
        island: &IslandContext,
        id: GroupId,
        setup: Option<SecuritySetupId>,
        key_type: KeyType,
    ) -> Result<Option<Self>, ServiceError> {
        let Some((group, _)) = island.group(id).await? else { return Ok(None) };
        let mut slots = group.slots.iter().filter(|slot| slot.key_type() == key_type);
        let Some(slot) = slots.find(|slot| setup.is_none_or(|setup| slot.setup() == setup)) else { return Ok(None) };
        let recipe = Recipe::again(island, slot, group.suite);
        let new = recipe.version(recipe.generate(&island.hsm).await?, KeyState::PreActive);
        Ok(Some(Self { group: id, setup: slot.setup(), key_type, new }))
    }

    /// Begins the rotation, or continues the unfinished one.
    ///
    /// # Errors
    /// The group is gone, its row is refused or was not read yet, or its slot refuses the version.
    pub(crate) fn begin(&self, view: &mut View<'_, '_>, campaign: CampaignId) -> Result<(), ServiceError> {
        let mut group = view
            .group(self.group)?
            .ok_or_else(|| ServiceError::Internal("the group of a campaign is gone".to_owned()))?;
        let (setup, key_type, now) = (self.setup, self.key_type, view.now());
        let begun = Arc::make_mut(&mut group)
            .begin_rotation(setup, key_type, &self.new, Some(campaign), now)
            .map_err(refused)?;
        if let Some(given_up) = begun.given_up {
            view.append(Event::GroupKeyChanged(record(
                &group,
                setup,
                key_type,
                given_up,
                "given-up",
                MemberCounts::default(),
            )));
        }
        let event = record(&group, setup, key_type, begun.version, "begun", MemberCounts::default());
        let reason = if begun.made { String::new() } else { "this version was being rolled out already".to_owned() };
        view.append(Event::GroupKeyChanged(GroupKeyChanged {
            campaign_id: campaign.octets().to_vec().into(),
            reason,
            ..event
        }));
        view.put_group((*group).clone())
    }
}

/// The act that switches broadcasts to a group's key.
struct SwitchKey {
    group: GroupId,
    setup: SecuritySetupId,
    key_type: KeyType,
    version: KeyVersionNumber,
    early: bool,
    reason: String,
    counts: MemberCounts,
}

impl SwitchKey {
    const fn action(&self) -> Action {
        Action::SwitchGroupKey { key_type: self.key_type, early: self.early }
    }
}

impl Act for SwitchKey {
    type Answer = Arc<Group>;
    // A repeated request finds the key switched.
    type Past = Never;

    fn name(&self) -> &'static str {
        self.action().name()
    }

    fn reads(&self) -> Reads {
        Reads { sealed: vec![group_row(self.group)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        permit_on_group(asker, view, self.group, &self.action())
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Arc<Group>>, ServiceError> {
        let Self { setup, key_type, version, early, counts, .. } = *self;
        let mut group = view.group(self.group)?.ok_or_else(|| ServiceError::denied(self.action().to_string()))?;
        let switched = |rotation: &GroupRotation| rotation.version == version && rotation.switched.is_some();
        if group.rotation(setup, key_type).is_some_and(switched) {
            return Ok(Decision::unchanged(group));
        }
        let now = view.now();
        let changed = Arc::make_mut(&mut group);
        let mut steps = Vec::new();
        if changed.note_members(setup, key_type, version, counts, now) {
            steps.push(("threshold-reached", None));
        }
        let former = changed.switch(setup, key_type, version, early, now).map_err(refused)?;
        steps.push(("switched", former));
        if changed.note_members(setup, key_type, version, counts, now) {
            steps.push(("complete", None));
        }
        for (change, former) in steps {
            let reason = if change == "switched" { self.reason.clone() } else { String::new() };
            let former_version = former.map_or(0, KeyVersionNumber::number);
            view.append(Event::GroupKeyChanged(GroupKeyChanged {
                former_version,
                reason,
                ..record(&group, setup, key_type, version, change, counts)
            }));
        }
        view.put_group((*group).clone())?;
        Ok(Decision::of(view.entry(), group))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Arc<Group>, ServiceError> {
        match never {}
    }
}

/// The act that sets how many members must have a new version before broadcasts may switch to it.
struct SetThreshold {
    group: GroupId,
    threshold: SwitchThreshold,
}

impl Act for SetThreshold {
    type Answer = ();
    // A late repetition would undo a newer setting.
    type Past = Known;

    fn name(&self) -> &'static str {
        Action::SetSwitchThreshold.name()
    }

    fn reads(&self) -> Reads {
        Reads { sealed: vec![group_row(self.group)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        permit_on_group(asker, view, self.group, &Action::SetSwitchThreshold)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        let mut group = view.group(self.group)?.ok_or_else(|| ServiceError::denied(self.name()))?;
        if group.switch_at == self.threshold {
            return Ok(Decision::unchanged(()));
        }
        let changed = Arc::make_mut(&mut group);
        changed.switch_at = self.threshold;
        let entry = view.append(Event::GroupKeyChanged(GroupKeyChanged {
            group: self.group.0,
            group_name: changed.name.clone(),
            change: "threshold-set".to_owned(),
            threshold_percent: u32::from(self.threshold.percent()),
            ..GroupKeyChanged::default()
        }));
        view.put_group(changed.clone())?;
        Ok(Decision::recorded(entry, ()))
    }

    fn again(&self, _: Known, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        Ok(())
    }
}

/// Policy's permit for an action on a group. A group that is gone gets the same refusal.
fn permit_on_group(
    asker: Asker,
    view: &mut View<'_, '_>,
    id: GroupId,
    action: &Action,
) -> Result<Permit, ServiceError> {
    let group = view.group(id)?.ok_or_else(|| ServiceError::denied(action.to_string()))?;
    asker.require(action, &Resource::Group(&GroupFacts::from(&*group)))
}

/// The security setup that a group has a key in: the named one, or the first.
pub(crate) fn setup_of(
    group: &Group,
    key_type: KeyType,
    setup: Option<SecuritySetupId>,
) -> Result<SecuritySetupId, ServiceError> {
    let mut setups = group.slots.iter().filter(|slot| slot.key_type() == key_type).map(kms_domain::Slot::setup);
    setups.find(|known| setup.is_none_or(|setup| *known == setup)).ok_or_else(|| {
        let place = setup.map(|setup| format!(" in security setup {setup}")).unwrap_or_default();
        ServiceError::FailedPrecondition {
            reason: format!("group `{}` has no {key_type}{place}", group.name),
            next_step: "look at its keys with `kms group show`, or make the first version with `kms group key create`"
                .to_owned(),
        }
    })
}

fn record(
    group: &Group,
    setup: SecuritySetupId,
    key_type: KeyType,
    version: KeyVersionNumber,
    change: &str,
    counts: MemberCounts,
) -> GroupKeyChanged {
    GroupKeyChanged {
        group: group.id.0,
        group_name: group.name.clone(),
        security_setup: setup_record(setup),
        key_type: key_type.to_string(),
        version: version.number(),
        change: change.to_owned(),
        members: counts.members,
        acknowledged: counts.acknowledged,
        threshold_percent: u32::from(group.switch_at.percent()),
        ..GroupKeyChanged::default()
    }
}

fn has_left(meter: &Meter, owner: Owner, rotation: &GroupRotation) -> bool {
    meter.shared_of(owner, rotation.setup, rotation.key_type).any(|key| key.version == rotation.version)
}

fn refused(error: GroupError) -> ServiceError {
    let next_step = match &error {
        GroupError::NotRolledOut { .. } => "look at the rotation with `kms group rotation`",
        GroupError::TooFew { .. } => {
            "bring it to more members (`kms group rotation GROUP --behind`), or switch early where an officer decides so"
        }
        GroupError::Slot(_) => "look at the group with `kms group show`",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

fn group_row(id: GroupId) -> (RowKind, Vec<u8>) {
    (RowKind::Group, id.0.to_be_bytes().to_vec())
}

/// A meter that is in a group by its search columns.
enum Member {
    /// Its sealed row confirms the group.
    Known(Arc<Meter>),
    /// Its row was refused (I5).
    Refused,
}

/// Walks over the members of a group that can receive keys, page by page.
struct Members<'a> {
    island: &'a IslandContext,
    group: GroupId,
    after: Option<SystemTitle>,
}

impl<'a> Members<'a> {
    const fn of(island: &'a IslandContext, group: GroupId, after: Option<SystemTitle>) -> Self {
        Self { island, group, after }
    }

    /// The members of the next page; `None` after the last page.
    async fn next(&mut self) -> Result<Option<Vec<Member>>, ServiceError> {
        let filter = MeterFilter { group: Some(self.group.0), ..MeterFilter::default() };
        let page = self.island.store.meter_page(&filter, self.after, PAGE).await?;
        let Some(last) = page.last() else { return Ok(None) };
        self.after = Some(last.title);
        let mut members = Vec::with_capacity(page.len());
        for row in &page {
            let opened = match self.island.committer.open_meter(row.title, &row.row) {
                Ok(meter) => Some(meter),
                // Another server may have written the row after it was read here, so it is read
                // once more.
                Err(_) => self.island.meter(row.title).await.unwrap_or(None),
            };
            match opened {
                Some(meter) if !meter.class.groups.contains(&self.group) || !meter.class.status.may_grant() => {}
                Some(meter) => members.push(Member::Known(meter)),
                None => members.push(Member::Refused),
            }
        }
        Ok(Some(members))
    }
}

const PAGE: u32 = 500;
