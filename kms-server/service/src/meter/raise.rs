//! Raises a counter further than the device profile's cap, if the meter really is that far ahead.
//! Two people decide it (I4, I6).

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    CounterKey, CounterOwnership, CounterPlace, CounterState, KeyState, KeyType, KeyVersionNumber, Meter, ProposalId,
    ProposedAction, Quorum, RaiseCounter, SecuritySetupId, SystemTitle,
};
use kms_proto::v1::{self, CounterRaised, audit_record::Event};
use kms_store::Reads;

use super::{MeterService, Request};
use crate::island::IslandContext;
use crate::{
    keys::{counter::counter_key, setup::setup_record},
    proposal::{NewProposal, Propose},
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Permit, View};

/// A counter that is to be raised.
#[derive(Clone, Debug)]
pub struct CounterRaise {
    /// Of which meter.
    pub meter: SystemTitle,
    /// Of which security setup; `None`: the meter's first.
    pub setup: Option<SecuritySetupId>,
    /// Of which encryption key: GUEK, or GBEK.
    pub key_type: KeyType,
    /// Of which version; `None`: the one that the meter holds, as far as is known.
    pub version: Option<KeyVersionNumber>,
    /// Of which client title.
    pub client_title: SystemTitle,
    /// The lowest counter that may be used afterwards.
    pub to: u32,
    /// Why.
    pub reason: String,
    /// How many people must approve.
    pub quorum: Quorum,
}

impl MeterService {
    /// Proposes to raise a counter further than the device profile's cap. It is raised when another
    /// person has approved the proposal, and an officer executes it.
    ///
    /// # Errors
    /// Not permitted, which is also the answer for an unknown meter; a head-end counts, or the
    /// counter is as high already; or the database cannot be reached.
    #[boxed]
    pub async fn propose_raise(
        &self,
        caller: &Caller,
        request: Request,
        new: CounterRaise,
    ) -> Result<v1::Proposal, ServiceError> {
        let (island, meter) = (self.island.clone(), new.meter);
        let propose = Propose::new(request.id, Action::RaiseCounter, Reads::default(), move |view| {
            let meter = view.meter(new.meter)?.ok_or_else(|| denied(new.meter))?;
            let raise = named(&meter, &new)?;
            Raise::of(view, &island, &meter, &raise)?;
            let action = ProposedAction::RaiseCounter(raise);
            Ok(NewProposal { action, reason: new.reason.clone(), quorum: new.quorum })
        });
        Ok(self.island.door.act(caller, request, propose.about(meter)).await?.value)
    }
}

/// Raises a counter as approved, if the proposal still fits. Never lowers it (I4).
///
/// # Errors
/// Not permitted; the key version does not exist any more; a head-end counts now; or the counter is
/// as high already.
pub(crate) fn raise_counter(
    view: &mut View<'_, '_>,
    island: &IslandContext,
    permit: &Permit,
    raise: &RaiseCounter,
    proposal: ProposalId,
) -> Result<(), ServiceError> {
    let meter = view.meter(raise.meter)?.ok_or_else(|| denied(raise.meter))?;
    if !permit.permits(&Action::RaiseCounter, &Resource::Meters(&meter.class)) {
        return Err(denied(raise.meter));
    }
    let Raise { key, from } = Raise::of(view, island, &meter, raise)?;
    let mut changed = (*meter).clone();
    let fault = |error: &dyn std::fmt::Display| ServiceError::Internal(error.to_string());
    let version = changed
        .slots
        .get_mut(raise.setup, raise.key_type)
        .and_then(|slot| slot.version_mut(raise.version))
        .map_err(|error| fault(&error))?;
    match version.domain() {
        None => {
            version
                .counters_mut()
                .and_then(|counters| counters.raise_floor(key, raise.to.into(), None))
                .map_err(|error| fault(&error))?;
            view.put_meter(changed, false)?;
        }
        Some(id) => {
            let mut domain = view.domain(id)?.ok_or_else(|| fault(&"a counter domain is missing (I5)"))?;
            Arc::make_mut(&mut domain)
                .counters
                .raise_floor(key, raise.to.into(), None)
                .map_err(|error| fault(&error))?;
            view.put_domain((*domain).clone())?;
        }
    }
    view.append(Event::CounterRaised(CounterRaised {
        meter: u64::from_be_bytes(raise.meter.octets()),
        security_setup: setup_record(raise.setup),
        key_type: raise.key_type.to_string(),
        key_version: raise.version.number(),
        client_title: raise.client_title.octets().to_vec().into(),
        from,
        to: raise.to.into(),
        proposal_id: proposal.octets().to_vec().into(),
    }));
    Ok(())
}

/// A raise that fits the present row of the meter.
struct Raise {
    key: CounterKey,
    /// The lowest counter that may be used now, as the row says: see [`v1::CounterRaised`].
    from: u64,
}

impl Raise {
    fn of(
        view: &mut View<'_, '_>,
        island: &IslandContext,
        meter: &Meter,
        raise: &RaiseCounter,
    ) -> Result<Self, ServiceError> {
        let refuse = |reason: String, next_step: &str| {
            Err(ServiceError::FailedPrecondition { reason, next_step: next_step.to_owned() })
        };
        let key = counter_key(island, meter, raise.setup, raise.client_title)?;
        let version = meter.slots.get(raise.setup, raise.key_type).and_then(|slot| slot.version(raise.version));
        let Some(version) = version.filter(|version| version.state() != KeyState::Destroyed) else {
            return refuse(
                format!(
                    "the meter has no {} version {} in security setup {}",
                    raise.key_type, raise.version, raise.setup
                ),
                "check it with `kms meter show`",
            );
        };
        let state = match version.counters() {
            CounterPlace::Own(counters) => counters.get(key).cloned(),
            CounterPlace::Domain(id) => view.domain(*id)?.and_then(|domain| domain.counters.get(key).cloned()),
        };
        if let Some(CounterOwnership::HeadEnd(head_end)) = state.as_ref().map(CounterState::ownership) {
            return refuse(
                format!("the head-end `{head_end}` keeps this counter"),
                "adopt it with its floor: `kms meter adopt`",
            );
        }
        let to = u64::from(raise.to);
        let first = u64::from(CounterState::FIRST);
        let (usable, bound) = state.map_or((first, first), |state| (state.unallocated_from(), state.bound()));
        // I4: never lower. Inside the chunk that a server allocates from, the floor makes it
        // continue above.
        if to <= usable {
            return refuse(
                format!("counters below {usable} are already used up, so {to} raises nothing"),
                "check it with `kms meter show`",
            );
        }
        let from = if to > bound { bound } else { usable };
        Ok(Self { key, from })
    }
}

/// The raise with the names that the request left out.
fn named(meter: &Meter, new: &CounterRaise) -> Result<RaiseCounter, ServiceError> {
    let setup = new
        .setup
        .or_else(|| meter.slots.iter().find(|slot| slot.key_type() == new.key_type).map(kms_domain::Slot::setup));
    let slot = setup.and_then(|setup| meter.slots.get(setup, new.key_type));
    let held = slot.and_then(kms_domain::Slot::held).map(kms_domain::KeyVersion::number);
    let (Some(slot), Some(version)) = (slot, new.version.or(held)) else {
        return Err(ServiceError::FailedPrecondition {
            reason: format!("the meter has no {} of its own", new.key_type),
            next_step: "check it with `kms meter show`".to_owned(),
        });
    };
    Ok(RaiseCounter {
        meter: new.meter,
        setup: slot.setup(),
        key_type: new.key_type,
        version,
        client_title: new.client_title,
        to: new.to,
    })
}

/// The same answer for an unknown meter and for one whose counters the principal may not raise.
fn denied(title: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("raiseCounter with meter {title}"))
}
