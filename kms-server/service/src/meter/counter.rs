//! Counters that head-ends used before this system: adopted with floors, or left with the head-ends
//! (I4).

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    CounterKey, CounterOwnership, CounterPlace, Counters, KeyState, KeyType, Meter, PrincipalId, Role, SecuritySetupId,
    SystemTitle,
};
use kms_proto::v1;
use kms_store::Reads;

use super::{
    CHUNK, ChunkOutcome, Code, MeterService, Request,
    change::{permitted, record},
};
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, View};

/// The floor of a counter, and who counts.
#[derive(Clone, Debug)]
pub struct CounterFloor {
    /// Of which meter.
    pub meter: SystemTitle,
    /// Of which security setup.
    pub setup: SecuritySetupId,
    /// Of which client title.
    pub client_title: SystemTitle,
    /// The lowest counter that may still be used.
    pub floor: u32,
    /// The head-end that keeps counting; `None`: this system counts from now on.
    pub owned_by: Option<PrincipalId>,
}

impl MeterService {
    /// Adopts counters, or leaves them with the head-end that counts today. This applies to every
    /// version of the encryption keys (GUEK, GBEK) of the security setup that is not destroyed. A
    /// counter that is new here, or that a head-end gives up, may jump to any floor. A counter of
    /// this system jumps no further than the device profile's cap, because a wrong floor uses up
    /// the key.
    ///
    /// # Errors
    /// Unknown caller, a head-end of another island, a request id that was used for another
    /// request, or the database cannot be reached.
    #[boxed]
    pub async fn adopt(
        &self,
        caller: &Caller,
        request: Request,
        floors: Vec<CounterFloor>,
    ) -> Result<v1::ChangeMetersResponse, ServiceError> {
        for (index, floor) in floors.iter().enumerate() {
            if let Some(owner) = &floor.owned_by
                && (owner.role() != Role::HeadEnd || owner.island() != self.island.name())
            {
                return Err(ServiceError::invalid(
                    format!("floors[{index}].owned_by"),
                    format!("`{owner}` is no head-end of this island"),
                ));
            }
        }
        let mut response = v1::ChangeMetersResponse::default();
        for (index, floors) in (0..).zip(floors.chunks(CHUNK).map(<[CounterFloor]>::to_vec)) {
            let island = self.island.clone();
            let reads = Reads { meters: floors.iter().map(|floor| floor.meter).collect(), ..Reads::default() };
            let outcome = self
                .change_chunk(caller, Action::AdoptCounters, request, index, reads, move |view, permit| {
                    let mut outcome = ChunkOutcome::default();
                    let mut changed = Vec::new();
                    for floor in &floors {
                        let Some(mut meter) =
                            permitted(view, permit, &Action::AdoptCounters, floor.meter, &mut outcome)
                        else {
                            continue;
                        };
                        let profile =
                            island.profiles.get(&meter.class.profile).and_then(|profile| profile.setup(floor.setup));
                        let Some(counter) = profile.map(|setup| setup.counter) else {
                            outcome.problem(
                                floor.meter,
                                Code::SecuritySetup,
                                format!(
                                    "its device profile `{}` has no security setup {}",
                                    meter.class.profile, floor.setup
                                ),
                            );
                            continue;
                        };
                        let adoption =
                            Adoption { floor, key: counter.scope.key(floor.client_title), jump_cap: counter.jump_cap };
                        match view.attempt(|view| adoption.apply(view, Arc::make_mut(&mut meter))) {
                            Ok(true) => {
                                view.put_meter((*meter).clone(), false)?;
                                changed.push(floor.meter);
                            }
                            Ok(false) => outcome.unchanged += 1,
                            Err((code, reason)) => outcome.problem(floor.meter, code, reason),
                        }
                    }
                    let value = floors
                        .iter()
                        .map(|floor| format!("{} {} {} {}", floor.meter, floor.setup, floor.client_title, floor.floor))
                        .collect::<Vec<_>>()
                        .join("; ");
                    let entry = record(view, &mut outcome, "adopted", &changed, value, String::new());
                    Ok(Decision::of(entry, outcome))
                })
                .await?;
            outcome.add_to(&mut response);
        }
        Ok(response)
    }
}

/// One floor, on a meter of a known profile.
struct Adoption<'a> {
    floor: &'a CounterFloor,
    key: CounterKey,
    jump_cap: u32,
}

impl Adoption<'_> {
    /// Changes all versions or none. True if anything changed.
    fn apply(&self, view: &mut View<'_, '_>, meter: &mut Meter) -> Result<bool, (Code, String)> {
        let fault = |error: &dyn std::fmt::Display| (Code::Counter, error.to_string());
        let mut adopted = meter.clone();
        let (mut found, mut changed) = (false, false);
        let mut domains = Vec::new();
        for key_type in [KeyType::GUEK, KeyType::GBEK] {
            let Ok(slot) = adopted.slots.get_mut(self.floor.setup, key_type) else { continue };
            let live: Vec<_> = slot
                .versions()
                .iter()
                .filter(|version| version.state() != KeyState::Destroyed)
                .map(kms_domain::KeyVersion::number)
                .collect();
            for number in live {
                let version = slot.version_mut(number).map_err(|error| fault(&error))?;
                found = true;
                match version.counters() {
                    CounterPlace::Own(_) => {
                        changed |= self.raise(version.counters_mut().map_err(|error| fault(&error))?)?
                    }
                    CounterPlace::Domain(id) => {
                        let id = *id;
                        let known = view.domain(id).map_err(|error| fault(&error))?.ok_or_else(|| {
                            (Code::Counter, format!("its counter domain {id} is missing (I5); run `kms audit scrub`"))
                        })?;
                        let mut domain = (*known).clone();
                        if self.raise(&mut domain.counters)? {
                            changed = true;
                            domains.push(domain);
                        }
                    }
                }
            }
        }
        if !found {
            return Err((
                Code::SecuritySetup,
                format!("it has no encryption key in security setup {}", self.floor.setup),
            ));
        }
        for domain in domains {
            view.put_domain(domain).map_err(|error| fault(&error))?;
        }
        if changed {
            *meter = adopted;
        }
        Ok(changed)
    }

    fn raise(&self, counters: &mut Counters) -> Result<bool, (Code, String)> {
        let refuse = |error: kms_domain::CounterError| (Code::Counter, error.to_string());
        let before = counters.get(self.key).cloned();
        let floor = u64::from(self.floor.floor);
        match (before.as_ref().map(kms_domain::CounterState::ownership), &self.floor.owned_by) {
            (Some(CounterOwnership::HeadEnd(_)), None) => counters.take_over(self.key, floor),
            (Some(CounterOwnership::Kms), _) => {
                counters.raise_floor(self.key, floor, Some(self.jump_cap)).map_err(refuse)?
            }
            (None | Some(CounterOwnership::HeadEnd(_)), _) => {
                counters.raise_floor(self.key, floor, None).map_err(refuse)?
            }
        }
        if let Some(head_end) = &self.floor.owned_by
            && counters.get(self.key).map(kms_domain::CounterState::ownership)
                != Some(&CounterOwnership::HeadEnd(head_end.clone()))
        {
            counters.leave_to(self.key, head_end.clone());
        }
        Ok(counters.get(self.key) != before.as_ref())
    }
}
