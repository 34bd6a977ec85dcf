//! Enrols meters whose keys this island makes.

use async_recursion::async_recursion as boxed;
use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt, TryStreamExt, stream};
use kms_domain::{
    DeviceProfile, DeviceProfileName, FlagId, KeyOrigin, KeyShape, KeyState, Meter, MeterClass, MeterStatus, OwnerKind,
    Shipped, Slots, SystemTitle, UnixMillis, WrappedKey,
};
use kms_proto::v1;
use kms_store::Reads;

use super::{
    super::{group_names::Naming, keys::recipe::Recipe},
    ChunkOutcome, Code, MeterService, NOT_PERMITTED, Request,
    change::record,
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::Decision;

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
    /// Registers meters whose keys this island makes: diversified or generated, as the device
    /// profile says. If the module cannot derive keys, diversified keys are generated instead. The
    /// first version of each key is active: the meter is set up with it. Keys of groups and device
    /// types get no slot here: they have commands of their own. Secrets get none either, since only
    /// a shipment brings them: no HSM makes a secret in their encoding, and it must not be made
    /// outside (I1). The meters are in stock until they are assigned.
    ///
    /// # Errors
    /// An unknown device profile, or one whose meters need a secret; a request id that was used for
    /// another request; or the HSM or the database cannot be reached.
    #[boxed]
    pub async fn enrol(
        &self,
        caller: &Caller,
        request: Request,
        enrolment: Enrolment,
    ) -> Result<v1::ChangeMetersResponse, ServiceError> {
        let Some(profile) = self.island.profiles.get(&enrolment.device_profile) else {
            return Err(ServiceError::invalid(
                "device_profile",
                format!("`{}` is not a device profile of this server", enrolment.device_profile),
            ));
        };
        let keys = profile.setups.iter().flat_map(|setup| setup.keys.iter());
        if let Some(secret) = keys
            .filter(|key| key.owner == OwnerKind::Meter)
            .find(|key| key.shape == KeyShape::Secret && key.shipped == Shipped::Required)
        {
            let name = profile.key_type_name(secret.key_type);
            return Err(ServiceError::FailedPrecondition {
                reason: format!(
                    "meters of device profile `{}` need a {name}, which only a shipment can bring: the HSM cannot make a secret, and it must not be made outside",
                    profile.name
                ),
                next_step: format!(
                    "import the meters with a shipment that has the secret, or set `shipped = \"optional\"` for {name} in the profile"
                ),
            });
        }
        let keys = Arc::new(self.recipes(profile));
        let enrolment = Arc::new(enrolment);
        let mut response = v1::ChangeMetersResponse::default();
        for (index, meters) in (0..).zip(enrolment.meters.chunks(CHUNK)) {
            self.enrol_chunk(caller, request, index, meters.to_vec(), &enrolment, profile, keys.clone())
                .await?
                .add_to(&mut response);
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
    ) -> Result<ChunkOutcome, ServiceError> {
        let action = Action::EnrolMeters;
        let class = MeterClass {
            vendor: enrolment.manufacturer,
            profile: enrolment.device_profile.clone(),
            status: MeterStatus::InStock,
            groups: Vec::new(),
            head_end: None,
        };
        let names: BTreeSet<&str> = meters.iter().flat_map(|meter| meter.groups.iter().map(String::as_str)).collect();
        // Refused before the HSM makes a key.
        self.island.asker(caller).await?.require(&action, &Resource::Meters(&class))?;
        let naming = Naming { caller, request: Some(request.id), action: &action, class: Some(&class) };
        let groups = self.groups.resolve(&self.island, &naming, &names, profile.suite).await?;
        let generated = self.generate(caller, &recipes, meters.len()).await?;
        let client_titles = self.island.client_titles().await?;
        let (enrolment, suite, other_flag_ids) = (enrolment.clone(), profile.suite, profile.other_flag_ids.clone());
        let reads = Reads { meters: meters.iter().map(|meter| meter.title).collect(), ..Reads::default() };
        self.change_chunk(caller, action, request, index, reads, move |view, permit| {
            let mut outcome = ChunkOutcome::default();
            let mut added = Vec::new();
            for (new, keys) in meters.iter().zip(&generated) {
                let title = new.title;
                let [first, second, third, ..] = title.octets();
                if enrolment.manufacturer.octets() != [first, second, third]
                    && !other_flag_ids.iter().any(|other| other.octets() == [first, second, third])
                {
                    outcome.problem(
                        title,
                        Code::Title,
                        format!("it does not start with the FLAG id of {}", enrolment.manufacturer),
                    );
                    continue;
                }
                // I4: under one key, frames of a client with the meter's title would repeat the
                // nonces of the meter's own answers.
                if client_titles.contains(&title) {
                    outcome.problem(
                        title,
                        Code::Title,
                        "it is a client title of this island, in a principal or a device profile",
                    );
                    continue;
                }
                let mut class = class.clone();
                let Some(numbers) = new.groups.iter().map(|name| groups.get(name).copied()).collect::<Option<Vec<_>>>()
                else {
                    outcome.problem(
                        title,
                        Code::Group,
                        "one of its groups is of another security suite, or the island has no room for more groups",
                    );
                    continue;
                };
                class.groups = numbers;
                class.groups.sort_unstable();
                if !permit.permits(&Action::EnrolMeters, &Resource::Meters(&class)) {
                    view.refuse("not permitted for a meter of the request".to_owned());
                    outcome.problem(title, Code::NotPermitted, NOT_PERMITTED);
                    continue;
                }
                match view.meter(title) {
                    Ok(None) => {}
                    Ok(Some(known))
                        if known.class.vendor == class.vendor
                            && known.class.profile == class.profile
                            && known.serial == new.serial
                            && made_here(&known) =>
                    {
                        outcome.unchanged += 1;
                        continue;
                    }
                    _ => {
                        outcome.problem(
                            title,
                            Code::KnownOtherwise,
                            "it is already registered, as another meter or with keys of its vendor",
                        );
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
                    retired: None,
                    slots,
                    sequence: 0,
                    transfer: None,
                    shared: Vec::new(),
                };
                view.put_meter(meter, true)?;
                added.push(title);
            }
            let profile = enrolment.device_profile.to_string();
            let entry = record(view, &mut outcome, "enrolled", &added, profile, String::new());
            Ok(Decision::of(entry, outcome))
        })
        .await
    }

    /// How each key of a profile is made.
    fn recipes(&self, profile: &DeviceProfile) -> Vec<Recipe> {
        let keys = profile.setups.iter().flat_map(|setup| setup.keys.iter().map(move |key| (setup.id, key)));
        keys.filter(|(_, key)| key.owner == OwnerKind::Meter)
            .filter_map(|(setup, key)| Recipe::of(&self.island, setup, key))
            .collect()
    }

    /// The generated keys of so many meters, each wrapped under its storage KEK inside the HSM.
    async fn generate(
        &self,
        caller: &Caller,
        recipes: &[Recipe],
        meters: usize,
    ) -> Result<Vec<Vec<WrappedKey>>, ServiceError> {
        let hsm = &self.island.hsm_for(caller);
        let generated: Vec<Recipe> =
            recipes.iter().filter(|recipe| recipe.origin == KeyOrigin::Generated).cloned().collect();
        let each = generated.len();
        let keys: Vec<WrappedKey> = stream::iter((0..meters).flat_map(|_| generated.clone()))
            .map(|recipe| async move {
                recipe
                    .generate(hsm)
                    .await?
                    .ok_or_else(|| ServiceError::Internal("a generated key is missing".to_owned()))
            })
            .buffered(KEYS_AT_ONCE)
            .try_collect()
            .await?;
        Ok(if each == 0 { vec![Vec::new(); meters] } else { keys.chunks(each).map(<[WrappedKey]>::to_vec).collect() })
    }
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
        slots.push(recipe.slot(wrapped, KeyState::Active, now)?);
    }
    Slots::new(slots).map_err(|error| fault(&error))
}

/// Whether a meter's first keys were made here.
fn made_here(meter: &Meter) -> bool {
    meter
        .slots
        .iter()
        .all(|slot| slot.versions().first().is_some_and(|version| version.origin() != KeyOrigin::Imported))
}

/// Meters of one transaction: fewer than elsewhere, because the HSM makes their keys first.
const CHUNK: usize = 250;
const KEYS_AT_ONCE: usize = 16;
