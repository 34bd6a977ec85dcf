//! Meters whose keys this island makes.

use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt, TryStreamExt, stream};
use kms_domain::{
    DeviceProfile, DeviceProfileName, FlagId, KeyOrigin, KeyProfile, KeyShape, KeyState, KeyType, Meter, MeterClass, MeterStatus, NewKeyOrigin, NewKeyVersion,
    OwnerKind, SecuritySetupId, Slot, Slots, SystemTitle, UnixMillis, WrappedKey,
};
use kms_proto::v1;
use kms_store::Reads;

use super::{MeterService, NOT_PERMITTED, Outcome, Request, change::record};
use crate::{
    audit::Actor,
    authz::{Action, Caller, Resource},
    error::ServiceError,
    island::facts,
};

/// Meters to be registered.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Their manufacturer.
    pub manufacturer: FlagId,
    /// Their device profile.
    pub device_profile: DeviceProfileName,
    /// A name for the batch; empty for none.
    pub batch: String,
    /// The meters.
    pub meters: Vec<NewMeter>,
}

/// A meter to be registered.
#[derive(Clone, Debug)]
pub struct NewMeter {
    /// Its system title.
    pub title: SystemTitle,
    /// Its serial number.
    pub serial: String,
    /// Names of its groups.
    pub groups: Vec<String>,
}

impl MeterService {
    /// Registers meters whose keys this island makes: diversified or generated, as the device profile says; diversified ones become generated
    /// where the module derives nothing. The first version of each key is active: the meter is set up with it. Keys of groups and device types,
    /// and secrets that are no AES keys (the HSM makes none), get no slot here. The meters are in stock until they are assigned.
    ///
    /// # Errors
    /// An unknown device profile, a request id that was used for something else, or HSM or database are away.
    pub async fn enrol(&self, caller: &Caller, request: Request, enrolment: Enrolment) -> Result<v1::ChangeMetersResponse, ServiceError> {
        let Some(profile) = self.island.profiles.get(&enrolment.device_profile) else {
            return Err(ServiceError::invalid("device_profile", format!("`{}` is not known here", enrolment.device_profile)));
        };
        let keys = Arc::new(self.recipes(profile));
        let enrolment = Arc::new(enrolment);
        let mut response = v1::ChangeMetersResponse::default();
        for (index, meters) in (0..).zip(enrolment.meters.chunks(CHUNK)) {
            self.enrol_chunk(caller, request, index, meters.to_vec(), &enrolment, profile, keys.clone()).await?.add_to(&mut response);
        }
        Ok(response)
    }

    #[expect(clippy::too_many_arguments, reason = "one call, which only splits the request into chunks")]
    async fn enrol_chunk(
        &self,
        caller: &Caller,
        request: Request,
        index: u32,
        meters: Vec<NewMeter>,
        enrolment: &Arc<Enrolment>,
        profile: &DeviceProfile,
        recipes: Arc<Vec<Recipe>>,
    ) -> Result<Outcome, ServiceError> {
        let action = Action::EnrolMeters;
        let class = MeterClass {
            vendor: enrolment.manufacturer,
            profile: enrolment.device_profile.clone(),
            status: MeterStatus::InStock,
            groups: Vec::new(),
            head_end: None,
        };
        let (island, caller_again, class_again) = (self.island.clone(), caller.clone(), class.clone());
        let permit: super::super::group::Permit = Arc::new(move |view| {
            let principal = view.caller(&caller_again)?;
            island.policy.load().require(&facts(&principal), &Action::EnrolMeters, &Resource::Meters(&class_again))
        });
        let names: BTreeSet<&str> = meters.iter().flat_map(|meter| meter.groups.iter().map(String::as_str)).collect();
        // Denied before the HSM makes a key.
        let principal = self.island.principal(caller).await?;
        self.island.policy.load().require(&facts(&principal), &action, &Resource::Meters(&class))?;
        let groups = self.groups.resolve(&self.island, &Actor::caller(caller, Some(request.id), action.name()), &permit, &names, profile.suite).await?;
        let generated = self.generate(&recipes, meters.len()).await?;
        let (island, enrolment, suite, other_flag_ids) = (self.island.clone(), enrolment.clone(), profile.suite, profile.other_flag_ids.clone());
        let reads = Reads { meters: meters.iter().map(|meter| meter.title).collect(), ..Reads::default() };
        self.chunk(caller, &action, request, index, reads, move |view, principal| {
            let mut outcome = Outcome::default();
            let mut added = Vec::new();
            for (new, keys) in meters.iter().zip(&generated) {
                let title = new.title;
                let [first, second, third, ..] = title.octets();
                if enrolment.manufacturer.octets() != [first, second, third] && !other_flag_ids.iter().any(|other| other.octets() == [first, second, third]) {
                    outcome.problem(title, format!("it does not start with the FLAG id of {}", enrolment.manufacturer));
                    continue;
                }
                let mut class = class.clone();
                let Some(numbers) = new.groups.iter().map(|name| groups.get(name).copied()).collect::<Option<Vec<_>>>() else {
                    outcome.problem(title, "a group of it is of another security suite, or the island has no room for more groups");
                    continue;
                };
                class.groups = numbers;
                class.groups.sort_unstable();
                if !island.policy.load().permits(&facts(principal), &Action::EnrolMeters, &Resource::Meters(&class)).is_permit() {
                    view.refuse("not permitted for a meter of the request".to_owned());
                    outcome.problem(title, NOT_PERMITTED);
                    continue;
                }
                match view.meter(title) {
                    Ok(None) => {}
                    Ok(Some(known))
                        if known.class.vendor == class.vendor && known.class.profile == class.profile && known.serial == new.serial && made_here(&known) =>
                    {
                        outcome.unchanged += 1;
                        continue;
                    }
                    _ => {
                        outcome.problem(title, "it is known already, as another meter or with keys of its vendor");
                        continue;
                    }
                }
                let now = view.now();
                let slots = slots(&recipes, keys, now)?;
                let meter = Meter {
                    title,
                    class,
                    serial: new.serial.clone(),
                    suite,
                    batch: enrolment.batch.clone(),
                    added: now,
                    slots,
                    sequence: 0,
                    transfer: None,
                    shared: Vec::new(),
                };
                view.put_meter(meter, true)?;
                added.push(title);
            }
            record(view, &mut outcome, "enrolled", &added, enrolment.device_profile.to_string(), String::new());
            Ok(outcome)
        })
        .await
    }

    /// How each key of a profile is made.
    fn recipes(&self, profile: &DeviceProfile) -> Vec<Recipe> {
        let keys = profile.setups.iter().flat_map(|setup| setup.keys.iter().map(move |key| (setup.id, key)));
        keys.filter_map(|(setup, key)| self.recipe(setup, key)).collect()
    }

    fn recipe(&self, setup: SecuritySetupId, key: &KeyProfile) -> Option<Recipe> {
        let (OwnerKind::Meter, KeyShape::Aes(length)) = (key.owner, key.shape) else { return None };
        let root = self.island.row.roots(key.key_type.class()).and_then(kms_domain::ClassRoots::current);
        let origin = match (key.origin, root) {
            (NewKeyOrigin::Diversified, Some(root)) => KeyOrigin::Diversified { root_version: root.version, derivation: root.derivation, length },
            _ => KeyOrigin::Generated,
        };
        Some(Recipe { setup, key_type: key.key_type, length, origin })
    }

    /// The keys of `meters` meters that are made at random, each wrapped under its storage KEK inside the HSM.
    async fn generate(&self, recipes: &[Recipe], meters: usize) -> Result<Vec<Vec<WrappedKey>>, ServiceError> {
        let generated: Vec<Recipe> = recipes.iter().filter(|recipe| recipe.origin == KeyOrigin::Generated).cloned().collect();
        let each = generated.len();
        let keys: Vec<WrappedKey> = stream::iter((0..meters).flat_map(|_| generated.clone()))
            .map(|recipe| async move {
                let stored = self.island.hsm.generate_stored(recipe.key_type, recipe.length).await?;
                let version = u8::try_from(stored.storage_kek_version.number()).unwrap_or_default();
                WrappedKey::new(recipe.key_type, version, stored.blob.into()).map_err(|error| ServiceError::Internal(error.to_string()))
            })
            .buffered(KEYS_AT_ONCE)
            .try_collect()
            .await?;
        Ok(if each == 0 { vec![Vec::new(); meters] } else { keys.chunks(each).map(<[WrappedKey]>::to_vec).collect() })
    }
}

/// How a key of a new meter is made.
#[derive(Clone, Debug)]
struct Recipe {
    setup: SecuritySetupId,
    key_type: KeyType,
    length: kms_domain::KeyLength,
    origin: KeyOrigin,
}

fn slots(recipes: &[Recipe], generated: &[WrappedKey], now: UnixMillis) -> Result<Slots, ServiceError> {
    let fault = |error: &dyn std::fmt::Display| ServiceError::Internal(error.to_string());
    let mut generated = generated.iter();
    let mut slots = Vec::with_capacity(recipes.len());
    for recipe in recipes {
        let wrapped = match recipe.origin {
            KeyOrigin::Generated => Some(generated.next().ok_or_else(|| fault(&"a generated key is missing"))?.clone()),
            _ => None,
        };
        let mut slot = Slot::new(recipe.setup, recipe.key_type);
        slot.add_version(NewKeyVersion { state: KeyState::Active, origin: recipe.origin, wrapped, fingerprint: None }, now).map_err(|error| fault(&error))?;
        slots.push(slot);
    }
    Slots::new(slots).map_err(|error| fault(&error))
}

/// Whether a meter's first keys were made here.
fn made_here(meter: &Meter) -> bool {
    meter.slots.iter().all(|slot| slot.versions().first().is_some_and(|version| version.origin() != KeyOrigin::Imported))
}

/// Meters of one transaction: fewer than elsewhere, because the HSM makes their keys first.
const CHUNK: usize = 250;
const KEYS_AT_ONCE: usize = 16;
