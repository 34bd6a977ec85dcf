//! Groups of meters and device types: their list, and the first version of each of their keys.
//!
//! A shipment carries only keys of meters, so these keys are made here. A key that the meters do
//! not hold yet is pre-active and is not issued (I3).

mod rotation;
#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    DeviceProfile, DeviceProfileName, DeviceType, DeviceTypeId, FlagId, GroupId, KeyOrigin, KeyProfile, KeyState,
    KeyType, KeyVersionNumber, Owner, OwnerKind, RequestId, SecuritySetupId, Slots, WrappedKey,
};
use kms_proto::v1::{self, DeviceTypeAdded, KeyCreated, audit_record::Event};
use kms_store::{Reads, RowKind};

pub(crate) use self::rotation::NewGroupVersion;
pub use self::rotation::{BehindPage, NamedGroupKey, Switch};
use super::{
    group_names::Groups,
    meter::{Request, Shown, shown_version},
};
use crate::island::IslandContext;
use crate::keys::{recipe::Recipe, setup::setup_record};
use kms_authz::facts;
use kms_authz::{Action, Caller, DeviceTypeFacts, GroupFacts, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Never, OwnerRow, Permit, Remembered, View};

/// Groups and device types of an island. Clones share the cache of group names.
#[derive(Clone)]
pub struct OwnerService {
    island: Arc<IslandContext>,
    groups: Arc<Groups>,
}

/// The first version of a key, to make.
#[derive(Clone, Debug)]
pub struct NewOwnerKey {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type: its name, which a device profile may have given.
    pub key_type: String,
    /// Whether the meters already hold the key. It is active at once then.
    pub held_by_meters: bool,
}

/// A device type to be added.
#[derive(Clone, Debug)]
pub struct NewDeviceType {
    /// Its name: 1–64 octets of a–z, 0–9 and `-`, starting with a letter.
    pub name: String,
    /// Its manufacturer.
    pub manufacturer: FlagId,
    /// The device profile of its meters.
    pub device_profile: DeviceProfileName,
}

/// A page of groups.
#[derive(Clone, Debug, Default)]
pub struct GroupPage {
    /// The groups.
    pub groups: Vec<v1::Group>,
    /// Where the next page begins; `None` behind the last.
    pub next: Option<GroupId>,
}

impl OwnerService {
    /// Groups and device types of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, groups: Arc::default() }
    }

    /// Groups, in the order of their numbers.
    ///
    /// # Errors
    /// Not permitted, a row that does not verify, or the database is unavailable.
    #[boxed]
    pub async fn groups(&self, caller: &Caller, after: Option<GroupId>, limit: u32) -> Result<GroupPage, ServiceError> {
        self.island.require(caller, &Action::ListGroups).await?;
        let after = after.map(|id| id.0.to_be_bytes());
        let rows =
            self.island.store.sealed_page(RowKind::Group, after.as_ref().map(<[u8; 8]>::as_slice), limit).await?;
        let mut page = GroupPage::default();
        for (id, row) in &rows {
            let id = GroupId(number_of(id)?);
            let group = match self.island.committer.open_group(id, row) {
                Ok(group) => group,
                // Another server may have written the row after it was read here, so it is read
                // once more.
                Err(_) => self.island.group(id).await?.ok_or_else(|| no_such_group(&id.0.to_string()))?.0,
            };
            page.groups.push(v1::Group {
                number: id.0,
                name: group.name.clone(),
                security_suite: u32::from(group.suite.number()),
                switch_threshold_percent: u32::from(group.switch_at.percent()),
                ..v1::Group::default()
            });
            page.next = Some(id);
        }
        if rows.len() < usize::try_from(limit).unwrap_or(usize::MAX) {
            page.next = None;
        }
        Ok(page)
    }

    /// One group: slots, versions, counters and exposures; never a key.
    ///
    /// # Errors
    /// Not permitted, no such group, a row that does not verify, or the database is unavailable.
    #[boxed]
    pub async fn group(&self, caller: &Caller, name: &str) -> Result<v1::Group, ServiceError> {
        self.island.require(caller, &Action::ListGroups).await?;
        let missing = || no_such_group(name);
        let id = self.groups.find(&self.island, name).await?.ok_or_else(missing)?;
        let (group, generation) = self.island.group(id).await?.ok_or_else(missing)?;
        Ok(v1::Group {
            number: id.0,
            name: group.name.clone(),
            security_suite: u32::from(group.suite.number()),
            security_setups: Shown { profile: None, slots: &group.slots, domains: Vec::new() }.setups(),
            generation,
            switch_threshold_percent: u32::from(group.switch_at.percent()),
            rotations: self.rotations(&group).await?,
        })
    }

    /// Makes version 1 of a key of a group, as the device profile says. Without a profile, all
    /// profiles of the group's suite that give groups this key must agree.
    ///
    /// # Errors
    /// Not permitted; no such group; the group already has the key; no profile, or profiles that
    /// differ; a request id that was used for another request; or the HSM or the database is
    /// unavailable.
    #[boxed]
    pub async fn create_group_key(
        &self,
        caller: &Caller,
        request: Request,
        name: &str,
        new: NewOwnerKey,
        profile: Option<&DeviceProfileName>,
    ) -> Result<v1::CreateKeyResponse, ServiceError> {
        let principal = self.island.principal(caller).await?;
        let unknown = || {
            ServiceError::denied(format!(
                "createGroupKey with group {name}, which is unknown, or not yours to give keys"
            ))
        };
        let id = self.groups.find(&self.island, name).await?.ok_or_else(unknown)?;
        let (group, _) = self.island.group(id).await?.ok_or_else(unknown)?;
        let key_type = self.group_key_type(&new.key_type, profile)?;
        let action = Action::CreateGroupKey { key_type, held_by_meters: new.held_by_meters };
        // Policy is checked before the HSM makes a key.
        let group_facts = GroupFacts::from(&*group);
        self.island.policy.load().require(&facts(&principal), &action, &Resource::Group(&group_facts))?;
        let recipe = self.group_recipe(&group_facts, new.setup, key_type, profile)?;
        self.create(caller, request, action, Owner::Group(id), recipe, new.held_by_meters).await
    }

    /// The key type of this name. The profile may define key types of its own.
    fn group_key_type(&self, name: &str, profile: Option<&DeviceProfileName>) -> Result<KeyType, ServiceError> {
        match profile {
            Some(profile) => self.profile(profile)?.parse_key_type(name),
            None => KeyType::parse(name),
        }
        .map_err(ServiceError::parse("key_type"))
    }

    fn profile(&self, name: &DeviceProfileName) -> Result<&DeviceProfile, ServiceError> {
        self.island
            .profiles
            .get(name)
            .ok_or_else(|| ServiceError::invalid("device_profile", format!("`{name}` is not known here")))
    }

    fn group_recipe(
        &self,
        group: &GroupFacts,
        setup: SecuritySetupId,
        key_type: KeyType,
        profile: Option<&DeviceProfileName>,
    ) -> Result<Recipe, ServiceError> {
        let profiles = match profile {
            Some(name) => vec![self.profile(name)?],
            None => self.island.profiles.all(),
        };
        let of_group = |profile: &&DeviceProfile| profile.suite.number() == group.suite;
        let keys: Vec<&KeyProfile> = profiles
            .into_iter()
            .filter(of_group)
            .filter_map(|profile| profile.key(setup, key_type))
            .filter(|key| key.owner == OwnerKind::Group)
            .collect();
        let Some(first) = keys.first() else {
            let which = profile.map_or_else(
                || "no device profile".to_owned(),
                |profile| format!("device profile `{profile}` is of another suite, or not one that"),
            );
            return Err(ServiceError::FailedPrecondition {
                reason: format!("{which} gives groups of security suite {} a {key_type} in security setup {setup}", group.suite),
                next_step: "say `owner = \"group\"` for the key in the profile of the members, or name another profile, security setup or key type".to_owned(),
            });
        };
        if keys.iter().any(|key| (key.origin, key.shape) != (first.origin, first.shape)) {
            return Err(ServiceError::invalid(
                "device_profile",
                format!("the device profiles that give groups a {key_type} make it in different ways: name one"),
            ));
        }
        Recipe::of(&self.island, setup, first).ok_or_else(|| not_made_here(key_type))
    }

    /// All device types, in the order of their numbers.
    ///
    /// # Errors
    /// Not permitted, a row that does not verify, or the database is unavailable.
    #[boxed]
    pub async fn device_types(&self, caller: &Caller) -> Result<Vec<v1::DeviceType>, ServiceError> {
        self.island.require(caller, &Action::ListDeviceTypes).await?;
        Ok(self.all_device_types().await?.iter().map(|(device_type, _)| summary(device_type)).collect())
    }

    /// One device type: slots, versions and exposures; never a key.
    ///
    /// # Errors
    /// Not permitted, no such device type, a row that does not verify, or the database is
    /// unavailable.
    #[boxed]
    pub async fn device_type(&self, caller: &Caller, name: &str) -> Result<v1::DeviceType, ServiceError> {
        self.island.require(caller, &Action::ListDeviceTypes).await?;
        let all = self.all_device_types().await?;
        let (device_type, generation) = all
            .iter()
            .find(|(known, _)| known.name == name)
            .ok_or_else(|| ServiceError::NotFound { what: format!("device type `{name}`") })?;
        let shown = Shown {
            profile: self.island.profiles.get(&device_type.profile),
            slots: &device_type.slots,
            domains: Vec::new(),
        };
        Ok(v1::DeviceType { security_setups: shown.setups(), generation: *generation, ..summary(device_type) })
    }

    /// Adds a device type. A repetition changes nothing.
    ///
    /// # Errors
    /// Not permitted; the name is another device type's; an unknown device profile; or the database
    /// is unavailable.
    #[boxed]
    pub async fn add_device_type(
        &self,
        caller: &Caller,
        request: RequestId,
        new: NewDeviceType,
    ) -> Result<v1::DeviceType, ServiceError> {
        self.profile(&new.device_profile)?;
        let known = u64::try_from(self.all_device_types().await?.len()).unwrap_or(u64::MAX);
        Ok(self.island.door.act(caller, Some(request), AddDeviceType { known, new }).await?.value)
    }

    /// Makes version 1 of a key of a device type, as its device profile says.
    ///
    /// # Errors
    /// As [`Self::create_group_key`].
    #[boxed]
    pub async fn create_device_type_key(
        &self,
        caller: &Caller,
        request: Request,
        name: &str,
        new: NewOwnerKey,
    ) -> Result<v1::CreateKeyResponse, ServiceError> {
        let principal = self.island.principal(caller).await?;
        let unknown = || {
            ServiceError::denied(format!(
                "createDeviceTypeKey with device type {name}, which is unknown, or not yours to give keys"
            ))
        };
        let all = self.all_device_types().await?;
        let (device_type, _) = all.iter().find(|(known, _)| known.name == name).ok_or_else(unknown)?;
        let profile = self.profile(&device_type.profile)?;
        let key_type = profile.parse_key_type(&new.key_type).map_err(ServiceError::parse("key_type"))?;
        let action = Action::CreateDeviceTypeKey { key_type, held_by_meters: new.held_by_meters };
        let device_type_facts = DeviceTypeFacts::from(&**device_type);
        self.island.policy.load().require(&facts(&principal), &action, &Resource::DeviceType(&device_type_facts))?;
        let key = profile.key(new.setup, key_type).filter(|key| key.owner == OwnerKind::DeviceType).ok_or_else(|| ServiceError::FailedPrecondition {
            reason: format!("device profile `{}` gives device types no {} in security setup {}", profile.name, new.key_type, new.setup),
            next_step: "say `owner = \"device-type\"` for the key in the profile, or name another security setup or key type".to_owned(),
        })?;
        let recipe = Recipe::of(&self.island, new.setup, key).ok_or_else(|| not_made_here(key_type))?;
        self.create(caller, request, action, Owner::DeviceType(device_type.id), recipe, new.held_by_meters).await
    }

    /// Makes the key, or returns what this request made before.
    async fn create(
        &self,
        caller: &Caller,
        request: Request,
        action: Action,
        owner: Owner,
        recipe: Recipe,
        held_by_meters: bool,
    ) -> Result<v1::CreateKeyResponse, ServiceError> {
        let wrapped = recipe.generate(&self.island.hsm_for(caller)).await?;
        let act = CreateKey { action, owner, recipe, wrapped, held_by_meters };
        Ok(self.island.door.act(caller, request, act).await?.value)
    }

    /// Verified rows, each with its generation.
    async fn all_device_types(&self) -> Result<Vec<(Arc<DeviceType>, u64)>, ServiceError> {
        let mut all = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.island.store.sealed_page(RowKind::DeviceType, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(all) };
            after = Some(last.clone());
            for (id, row) in &page {
                all.push((self.island.committer.open_device_type(DeviceTypeId(number_of(id)?), row)?, row.generation));
            }
        }
    }
}

/// A new device type.
struct AddDeviceType {
    /// The number of device types before the act.
    known: u64,
    new: NewDeviceType,
}

impl Act for AddDeviceType {
    type Answer = v1::DeviceType;
    // The name identifies a device type: a repeated request finds its row.
    type Past = Never;

    fn name(&self) -> &'static str {
        Action::AddDeviceType.name()
    }

    fn reads(&self) -> Reads {
        let numbers = 1..=self.known.saturating_add(2);
        let sealed = numbers.map(|number| (RowKind::DeviceType, number.to_be_bytes().to_vec())).collect();
        Reads { sealed, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let facts = DeviceTypeFacts {
            name: self.new.name.clone(),
            manufacturer: self.new.manufacturer.to_string(),
            device_profile: self.new.device_profile.to_string(),
        };
        asker.require(&Action::AddDeviceType, &Resource::DeviceType(&facts))
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::DeviceType>, ServiceError> {
        let new = &self.new;
        for number in 1..=MOST_DEVICE_TYPES {
            let Some(other) = view.device_type(DeviceTypeId(number))? else {
                let device_type = DeviceType {
                    id: DeviceTypeId(number),
                    vendor: new.manufacturer,
                    name: new.name.clone(),
                    profile: new.device_profile.clone(),
                    added: view.now(),
                    slots: Slots::default(),
                };
                view.put_device_type(device_type.clone())?;
                let entry = view.append(Event::DeviceTypeAdded(DeviceTypeAdded {
                    number,
                    name: new.name.clone(),
                    manufacturer: new.manufacturer.to_string(),
                    device_profile: new.device_profile.to_string(),
                }));
                return Ok(Decision::recorded(entry, summary(&device_type)));
            };
            if other.name == new.name {
                if other.vendor == new.manufacturer && other.profile == new.device_profile {
                    return Ok(Decision::unchanged(summary(&other)));
                }
                return Err(ServiceError::FailedPrecondition {
                    reason: format!(
                        "`{}` is a device type of {} with device profile `{}` already",
                        other.name, other.vendor, other.profile
                    ),
                    next_step: "choose another name: names are not used again".to_owned(),
                });
            }
        }
        Err(ServiceError::FailedPrecondition {
            reason: format!("the island has {MOST_DEVICE_TYPES} device types, which is the limit"),
            next_step: "meters of one firmware are one device type".to_owned(),
        })
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<v1::DeviceType, ServiceError> {
        match never {}
    }
}

/// Version 1 of a key of a group or device type.
struct CreateKey {
    action: Action,
    owner: Owner,
    recipe: Recipe,
    wrapped: Option<WrappedKey>,
    held_by_meters: bool,
}

impl CreateKey {
    fn row(&self, view: &mut View<'_, '_>) -> Result<OwnerRow, ServiceError> {
        view.owner(self.owner)?.ok_or_else(|| ServiceError::denied(self.action.to_string()))
    }
}

impl Act for CreateKey {
    type Answer = v1::CreateKeyResponse;
    type Past = Remembered<v1::CreateKeyResponse>;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        let sealed = match self.owner {
            Owner::DeviceType(id) => vec![(RowKind::DeviceType, id.0.to_be_bytes().to_vec())],
            Owner::Group(id) => vec![(RowKind::Group, id.0.to_be_bytes().to_vec())],
            // Keys of meters come with the meter.
            Owner::Meter(_) => Vec::new(),
        };
        Reads { sealed, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        match self.row(view)? {
            OwnerRow::Group(group) => asker.require(&self.action, &Resource::Group(&GroupFacts::from(&*group))),
            OwnerRow::DeviceType(device_type) => {
                asker.require(&self.action, &Resource::DeviceType(&DeviceTypeFacts::from(&*device_type)))
            }
            OwnerRow::Meter(_) => Err(ServiceError::denied(self.action.to_string())),
        }
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::CreateKeyResponse>, ServiceError> {
        let Self { recipe, owner, .. } = self;
        let mut row = self.row(view)?;
        let name = match &row {
            OwnerRow::Group(group) => group.name.clone(),
            OwnerRow::DeviceType(device_type) => device_type.name.clone(),
            OwnerRow::Meter(meter) => meter.title.to_string(),
        };
        if let Some(slot) = row.slots().get(recipe.setup, recipe.key_type) {
            return Err(ServiceError::FailedPrecondition {
                reason: format!(
                    "`{name}` has a {} in security setup {} already, with {} versions",
                    recipe.key_type,
                    recipe.setup,
                    slot.versions().len()
                ),
                next_step: "later versions are made by rotations".to_owned(),
            });
        }
        // I3: a key that the meters do not hold yet is no candidate and is not issued.
        let state = if self.held_by_meters { KeyState::Active } else { KeyState::PreActive };
        let slot = recipe.slot(self.wrapped.clone(), state, view.now())?;
        let version = slot.version(KeyVersionNumber::FIRST).map(shown_version);
        row.slots_mut().insert(slot).map_err(|error| ServiceError::Internal(error.to_string()))?;
        if let (OwnerRow::Group(group), false) = (&mut row, self.held_by_meters) {
            Arc::make_mut(group).roll_out(recipe.setup, recipe.key_type, KeyVersionNumber::FIRST, None, view.now());
        }
        let entry = view.append(Event::KeyCreated(KeyCreated {
            // Kinds of sealed rows are numbered from 1, kinds of owners from 0.
            owner_kind: u32::from(owner.kind().number()) + 1,
            owner: u64::from_be_bytes(owner.id()),
            owner_name: name,
            security_setup: setup_record(recipe.setup),
            key_type: recipe.key_type.to_string(),
            version: KeyVersionNumber::FIRST.number(),
            state: state.to_string(),
            origin: if recipe.origin == KeyOrigin::Generated { "generated" } else { "diversified" }.to_owned(),
        }));
        view.put_owner(row)?;
        Ok(Decision::recorded(entry, v1::CreateKeyResponse { version }))
    }

    fn again(
        &self,
        Remembered(answer): Remembered<v1::CreateKeyResponse>,
        _: &Permit,
        _: &mut View<'_, '_>,
    ) -> Result<v1::CreateKeyResponse, ServiceError> {
        Ok(answer)
    }
}

fn summary(device_type: &DeviceType) -> v1::DeviceType {
    v1::DeviceType {
        number: device_type.id.0,
        name: device_type.name.clone(),
        manufacturer: device_type.vendor.to_string(),
        device_profile: device_type.profile.to_string(),
        ..v1::DeviceType::default()
    }
}

fn number_of(id: &[u8]) -> Result<u64, ServiceError> {
    id.try_into()
        .map(u64::from_be_bytes)
        .map_err(|_| ServiceError::Internal("a sealed row has an id of another form than its kind's".to_owned()))
}

fn no_such_group(name: &str) -> ServiceError {
    ServiceError::NotFound { what: format!("group `{name}`") }
}

fn not_made_here(key_type: KeyType) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!(
            "{key_type} is a secret, and secrets are not made here: the HSM cannot, and no other place may (I1)"
        ),
        next_step: "have the vendor deliver it".to_owned(),
    }
}

const PAGE: u32 = 256;
const MOST_DEVICE_TYPES: u64 = 1_000;
