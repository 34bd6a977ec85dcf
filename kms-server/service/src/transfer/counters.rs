//! The counters of a step (I4): they are allocated from the row, and raised if the meter names a
//! higher one.

use std::{num::NonZeroU32, sync::Arc};

use kms_domain::{CounterPlace, KeyPair, KeyType, Meter, Observation, Owner, Stage, Transfer, TransferError};
use kms_proto::v1::{SecurityEvent, audit_record::Event};

use super::{emit, error::refused, rows::own_meter};
use crate::island::IslandContext;
use crate::keys::counter::{counter_key, on_new_key};
use kms_base::error::ServiceError;
use kms_ledger::{CounterOf, View};

/// Allocates the counters of the present step and stores the meter. I4: the step's octets are made
/// with these counters only.
///
/// The view writes the reservation to its own copy of the row. It is copied from there into
/// `meter`, or it would be lost when `meter` is put.
pub(super) fn allocate_counters(
    view: &mut View<'_, '_>,
    island: &IslandContext,
    mut meter: Meter,
) -> Result<Arc<Meter>, ServiceError> {
    let Some(transfer) = meter.transfer.clone() else { return Err(refused(&TransferError::NotUnderWay)) };
    let wanted = match &transfer.stage {
        Stage::Associate { .. } | Stage::Deliver { pair: Some(_) } => 1,
        Stage::Authenticate { .. } => 2,
        Stage::Deliver { pair: None } => 0,
    };
    let mut counters = Vec::new();
    if let (Some(pair), Some(wanted)) = (transfer.pair(), NonZeroU32::new(wanted)) {
        let of = step_counter(island, &meter, &transfer, pair)?;
        let lease = view.transfer_counters(of, wanted)?;
        counters.extend(lease.first..=lease.last());
        // The view's row has the new reservation.
        let fault = |error: &dyn std::fmt::Display| ServiceError::Internal(error.to_string());
        let stored = own_meter(view, meter.title)?;
        let reserved = stored.slots.get(transfer.setup, KeyType::GUEK).and_then(|slot| slot.version(pair.encryption));
        let reserved = reserved.ok_or_else(|| fault(&"a key version of the step is missing"))?.counters().clone();
        let version = meter
            .slots
            .get_mut(transfer.setup, KeyType::GUEK)
            .and_then(|slot| slot.version_mut(pair.encryption))
            .map_err(|error| fault(&error))?;
        if let CounterPlace::Own(reserved) = reserved {
            *version.counters_mut().map_err(|error| fault(&error))? = reserved;
        }
    }
    let pinned = (!counters.is_empty()).then(|| emit::pinned(island, &meter)).transpose()?;
    if let Some(transfer) = &mut meter.transfer {
        transfer.counters = counters;
        transfer.pinned = pinned;
    }
    view.put_meter(meter.clone(), false)?;
    Ok(Arc::new(meter))
}

/// I4: the meter names a counter in an answer that is not authenticated. The reservation follows it
/// within the bounds of [`View::follow_counter`] only.
pub(super) fn follow_counter(
    view: &mut View<'_, '_>,
    island: &IslandContext,
    meter: &mut Arc<Meter>,
    transfer: &Transfer,
    last_accepted: u32,
) -> Result<Observation, ServiceError> {
    let Some(pair) = transfer.pair() else { return Ok(Observation::Refusal) };
    let jump_cap = island
        .profiles
        .get(&meter.class.profile)
        .and_then(|profile| profile.setup(transfer.setup))
        .map_or(0, |setup| setup.counter.jump_cap);
    let of = step_counter(island, meter, transfer, pair)?;
    let followed = view.follow_counter(of, u64::from(last_accepted) + 1, jump_cap)?;
    let (kind, detail, observation) = match followed {
        Ok(()) => (
            "counter-followed",
            format!("the meter states that it accepted counter {last_accepted}; the reservation was raised above it"),
            Observation::CounterFollowed,
        ),
        Err(error) => (
            "counter-jump-refused",
            format!(
                "the meter states that it accepted counter {last_accepted}; the statement was not followed: {error}"
            ),
            Observation::Refusal,
        ),
    };
    view.append(Event::SecurityEvent(SecurityEvent {
        kind: kind.to_owned(),
        detail,
        meter: meter.title.octets().to_vec().into(),
    }));
    // The row has the raised floor now, if the counter is the meter's own.
    *meter = own_meter(view, meter.title)?;
    Ok(observation)
}

/// The counter that the requests of a step use.
fn step_counter(
    island: &IslandContext,
    meter: &Meter,
    transfer: &Transfer,
    pair: KeyPair,
) -> Result<CounterOf, ServiceError> {
    Ok(CounterOf {
        owner: Owner::Meter(meter.title),
        setup: transfer.setup,
        key_type: KeyType::GUEK,
        version: pair.encryption,
        counter: counter_key(island, meter, transfer.setup, transfer.client_title)?,
        on_new_key: on_new_key(island, meter, transfer.setup),
    })
}
