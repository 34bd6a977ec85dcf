//! Counters of keys, as an act sees and changes them: leases, chunks, floors, and the row that
//! keeps them (I4).

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use kms_domain::{
    CounterDomainId, CounterError, CounterKey, CounterPlace, CounterState, CounterUse, Counters, KeyType, KeyVersion,
    KeyVersionNumber, Lease, LiveChunk, OnNewKey, Owner, SecuritySetupId, UnixMillis,
};
use kms_proto::v1::SecurityEvent;

use super::View;
use crate::{
    chunks::{ChunkName, HeldChunk},
    staged::StagedChange,
};
use kms_base::bounds::Bound;
use kms_base::error::ServiceError;

/// A counter of a key version.
#[derive(Clone, Copy, Debug)]
pub struct CounterOf {
    /// The owner of the key.
    pub owner: Owner,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The encryption key: GUEK, or GBEK.
    pub key_type: KeyType,
    /// Its version.
    pub version: KeyVersionNumber,
    /// The counter of a client title, or of the security setup (device profile).
    pub counter: CounterKey,
    /// What the meter's counter does when its key changes (device profile).
    pub on_new_key: OnNewKey,
}

/// A counter lease that its grantee may still use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveLease {
    /// This run of this server allocated it.
    Until(UnixMillis),
    /// Another server allocated it, or this server before its last start. The row says that there
    /// is a lease, but not when it ends.
    EndUnknown,
}

impl View<'_, '_> {
    /// The next lease of `count` counters (I4), until `until`. Reserves a chunk if the current one
    /// is used up or superseded, and notes in the row that leases are allocated from it.
    ///
    /// # Errors
    /// The counters belong to a head-end, they are used up, or the owner has no such key.
    pub fn lease(&mut self, of: CounterOf, count: NonZeroU32, until: UnixMillis) -> Result<Lease, ServiceError> {
        self.allocate(of, CounterUse::Lease, count, until)
    }

    /// The next `count` counters (I4), for frames that this server protects. This ends the live
    /// lease, if there is one: see [`Self::live_lease`].
    ///
    /// # Errors
    /// As [`Self::lease`].
    pub fn frame_counters(&mut self, of: CounterOf, count: NonZeroU32) -> Result<Lease, ServiceError> {
        self.allocate(of, CounterUse::Frames, count, UnixMillis(0))
    }

    /// The next `count` counters for requests of a transfer or a probe. As
    /// [`Self::frame_counters`], without the bounds of sessions and frames: a caller that used up a
    /// key cannot prevent the transfer of the next one.
    ///
    /// # Errors
    /// As [`Self::lease`].
    pub fn transfer_counters(&mut self, of: CounterOf, count: NonZeroU32) -> Result<Lease, ServiceError> {
        self.allocate(of, CounterUse::Transfer, count, UnixMillis(0))
    }

    fn allocate(
        &mut self,
        of: CounterOf,
        counter_use: CounterUse,
        count: NonZeroU32,
        until: UnixMillis,
    ) -> Result<Lease, ServiceError> {
        let (name, state) = self.counter(of)?;
        if let Some(lease) = self.allocate_from_chunk(name, counter_use, state.as_ref(), count, until) {
            if counter_use == CounterUse::Lease && state.is_some_and(|state| !state.leased()) {
                // Other servers, and this server after a restart, know of the lease only from the
                // row.
                self.change_counters(of, name, |counters| {
                    counters.mark_leased(of.counter);
                    Ok(())
                })?;
            }
            return Ok(lease);
        }
        let (writer, chunk) = (self.draft.writer, self.draft.chunk_size.serving(counter_use, count));
        let jump = self.draft.jump;
        let first = match of.on_new_key {
            // I4: above every other version too, because the meter continues its counter when its
            // key changes.
            OnNewKey::Continue => self.allocated_below(of)?,
            // Another key value has other nonces.
            OnNewKey::Reset(first) => u64::from(first),
        };
        // Also above a chunk that a failed item of this transaction reserved.
        let at_least =
            self.held(&name).map_or(0, |held| held.chunk.bound()).max(self.draft.chunks.bound(&name)).max(first);
        let known = state.as_ref().filter(|state| state.holder().is_some()).map_or(0, CounterState::bound);
        let (now, cap) = (self.now(), self.draft.counter_cap);
        let (reservation, many, state) = self.change_counters(of, name, |counters| {
            let reservation = counters.reserve(of.counter, counter_use, writer, chunk, at_least, jump)?;
            let many = counters.count_into_hour(reservation, counter_use, cap, now)?;
            Ok((reservation, many, counters.get(of.counter).cloned()))
        })?;
        // Each alarm once for a counter, when it passes the threshold. If it passes both at once,
        // the later one.
        let passes = |threshold| known < threshold && reservation.bound >= threshold;
        let alarm = if passes(CounterState::ROTATION_DUE) {
            Some("counter-rotation-due")
        } else {
            passes(CounterState::HALF).then_some("counter-half-used")
        };
        if let Some(kind) = alarm {
            self.alert(counter_event(of, kind, &used(of, reservation.bound)));
        }
        if many {
            self.alert_use_high(of);
        }
        self.draft
            .fresh_chunks
            .insert(name, HeldChunk { chunk: LiveChunk::new(reservation), leased_until: UnixMillis(0) });
        self.allocate_from_chunk(name, counter_use, state.as_ref(), count, until)
            .ok_or_else(|| counter_error(CounterError::exhausted(of.counter, counter_use), of, now))
    }

    /// Half of the counters that an hour has are taken.
    fn alert_use_high(&mut self, of: CounterOf) {
        let cap = self.draft.counter_cap.get();
        let detail = format!(
            "half of the {cap} invocation counters of {} that sessions and frames may have in an hour are reserved or skipped",
            of.counter
        );
        self.alert(counter_event(of, "counter-use-high", &detail));
    }

    /// I4: follows an unauthenticated response that names a counter, within `jump_cap`, the cap of
    /// the hour and [`CounterState::SESSIONS_END`]. Where a counter continues when the key changes,
    /// also as far as this system itself has counted under another version: the next reservation
    /// begins there anyway, so a forged response uses up no counters. The inner error says why the
    /// response is not accepted; nothing has changed then.
    ///
    /// # Errors
    /// As [`Self::lease`].
    pub fn follow_counter(
        &mut self,
        of: CounterOf,
        floor: u64,
        jump_cap: u32,
    ) -> Result<Result<(), CounterError>, ServiceError> {
        let own = of.on_new_key == OnNewKey::Continue && floor <= self.allocated_below(of)?;
        let (now, cap) = (self.now(), self.draft.counter_cap);
        let (name, _) = self.counter(of)?;
        let followed = self.try_change_counters(of, name, |counters| {
            if own {
                counters.raise_floor(of.counter, floor, None).map(|()| false)
            } else {
                counters.follow(of.counter, floor, jump_cap, cap, now)
            }
        })?;
        if matches!(followed, Ok(true)) {
            self.alert_use_high(of);
        }
        Ok(followed.map(|_| ()))
    }

    /// This system has allocated no counter at or above this one, under any version of the slot.
    /// Versions in a counter domain are counted there.
    ///
    /// # Errors
    /// A row was not read yet, or the owner is missing.
    fn allocated_below(&mut self, of: CounterOf) -> Result<u64, ServiceError> {
        let jump = self.draft.jump;
        let row = self.owner(of.owner)?.ok_or_else(|| no_such_key(of))?;
        let Some(slot) = row.slots().get(of.setup, of.key_type) else { return Ok(0) };
        let mut bound = slot.continued_counter(of.counter, jump);
        for id in slot.versions().iter().filter_map(KeyVersion::domain) {
            let domain = self.domain(id)?.ok_or_else(|| missing_domain(id))?;
            bound = bound.max(domain.counters.get(of.counter).map_or(0, |state| state.bound_after(jump)));
        }
        Ok(bound)
    }

    /// Changes the row that keeps a counter: the row of the owner, or of the counter domain.
    fn change_counters<T>(
        &mut self,
        of: CounterOf,
        name: ChunkName,
        change: impl FnOnce(&mut Counters) -> Result<T, CounterError>,
    ) -> Result<T, ServiceError> {
        let now = self.now();
        self.try_change_counters(of, name, change)?.map_err(|error| counter_error(error, of, now))
    }

    /// The same, with a refusal of the counters as the inner error. No row is written then.
    fn try_change_counters<T>(
        &mut self,
        of: CounterOf,
        name: ChunkName,
        change: impl FnOnce(&mut Counters) -> Result<T, CounterError>,
    ) -> Result<Result<T, CounterError>, ServiceError> {
        match name {
            ChunkName::Version { .. } => {
                let mut row = self.owner(of.owner)?.ok_or_else(|| no_such_key(of))?;
                let slot = row.slots_mut().get_mut(of.setup, of.key_type);
                let version = slot.and_then(|slot| slot.version_mut(of.version)).map_err(|_| no_such_key(of))?;
                let changed = version.counters_mut().and_then(change);
                if changed.is_ok() {
                    self.put_owner(row)?;
                }
                Ok(changed)
            }
            ChunkName::Domain { domain: id, .. } => {
                let mut domain = self.domain(id)?.ok_or_else(|| missing_domain(id))?;
                let changed = change(&mut Arc::make_mut(&mut domain).counters);
                if changed.is_ok() {
                    self.put(domain)?;
                }
                Ok(changed)
            }
        }
    }

    /// The lease of this counter that its grantee may still use, if there is one.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn live_lease(&mut self, of: CounterOf) -> Result<Option<LiveLease>, ServiceError> {
        let (name, state) = self.counter(of)?;
        let Some(state) = state else { return Ok(None) };
        let (now, writer) = (self.now(), self.draft.writer);
        let own = self.held(&name).filter(|held| state.holder() == Some(writer) && state.bound() == held.chunk.bound());
        Ok(match own {
            Some(held) => Some(LiveLease::Until(held.leased_until)).filter(|_| held.leased_until > now),
            None => state.leased().then_some(LiveLease::EndUnknown),
        })
    }

    /// Whether a lease is the newest that this server allocated of its counter, and since then no
    /// chunk was reserved above it and no floor was raised above its first counter.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn is_live(&mut self, of: CounterOf, lease: Lease) -> Result<bool, ServiceError> {
        let (name, state) = self.counter(of)?;
        let (Some(state), Some(HeldChunk { chunk, .. })) = (state, self.held(&name)) else { return Ok(false) };
        let newest = chunk.bound() - chunk.remaining() == u64::from(lease.last()) + 1;
        Ok(state.holder() == Some(self.draft.writer)
            && state.bound() == chunk.bound()
            && newest
            && u64::from(lease.first) >= state.floor())
    }

    /// Where the counter of a key version is kept, and what the row says of it.
    fn counter(&mut self, of: CounterOf) -> Result<(ChunkName, Option<CounterState>), ServiceError> {
        let row = self.owner(of.owner)?.ok_or_else(|| no_such_key(of))?;
        let version = row
            .slots()
            .get(of.setup, of.key_type)
            .and_then(|slot| slot.version(of.version))
            .ok_or_else(|| no_such_key(of))?;
        match version.counters() {
            CounterPlace::Own(counters) => {
                let name = ChunkName::Version {
                    owner: of.owner,
                    setup: of.setup,
                    key_type: of.key_type,
                    version: of.version,
                    counter: of.counter,
                };
                Ok((name, counters.get(of.counter).cloned()))
            }
            CounterPlace::Domain(id) => {
                let domain = self.domain(*id)?.ok_or_else(|| missing_domain(*id))?;
                Ok((ChunkName::Domain { domain: *id, counter: of.counter }, domain.counters.get(of.counter).cloned()))
            }
        }
    }

    fn held(&self, name: &ChunkName) -> Option<&HeldChunk> {
        self.draft.fresh_chunks.get(name).or_else(|| self.draft.chunks.get(name))
    }

    pub(super) fn held_mut(&mut self, name: &ChunkName) -> Option<&mut HeldChunk> {
        match self.draft.fresh_chunks.get_mut(name) {
            Some(held) => Some(held),
            None => self.draft.chunks.get_mut(name),
        }
    }

    fn allocate_from_chunk(
        &mut self,
        name: ChunkName,
        counter_use: CounterUse,
        state: Option<&CounterState>,
        count: NonZeroU32,
        until: UnixMillis,
    ) -> Option<Lease> {
        let jump = self.draft.jump;
        let held = self.held_mut(&name)?;
        if !held.chunk.serves(counter_use) {
            return None;
        }
        let lease = held.chunk.allocate(state?, count, jump).ok()?;
        let before = std::mem::replace(&mut held.leased_until, until);
        self.staged.log.push(StagedChange::Lease(name, before));
        Some(lease)
    }
}

/// How much of a counter is used, and how to get new counters.
fn used(of: CounterOf, bound: u64) -> String {
    let percent = bound * 100 / CounterState::END;
    let remedy = match of.on_new_key {
        OnNewKey::Reset(_) => "rotate the key",
        OnNewKey::Continue => "a new key continues above them (on_new_key = \"continue\"), so find out who uses them",
    };
    format!("{percent} % of the invocation counters of {} are used: {remedy}", of.counter)
}

/// A security event of a counter.
fn counter_event(of: CounterOf, kind: &str, detail: &str) -> SecurityEvent {
    let (owner, meter) = match of.owner {
        Owner::Meter(title) => (format!("meter {title}"), title.octets().to_vec()),
        Owner::Group(group) => (format!("group {}", group.0), Vec::new()),
        Owner::DeviceType(device_type) => (format!("device type {}", device_type.0), Vec::new()),
    };
    SecurityEvent {
        kind: kind.to_owned(),
        detail: format!("{} version {} of {owner}, security setup {}: {detail}", of.key_type, of.version, of.setup),
        meter: meter.into(),
    }
}

fn no_such_key(of: CounterOf) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("there is no {} version {} in security setup {}", of.key_type, of.version, of.setup),
        next_step: "list the key versions of the meter or group".to_owned(),
    }
}

fn missing_domain(id: CounterDomainId) -> ServiceError {
    ServiceError::Internal(format!("the row of counter domain {id} is missing (I5)"))
}

fn counter_error(error: CounterError, of: CounterOf, now: UnixMillis) -> ServiceError {
    let next_step = match error {
        CounterError::CapMet { free, .. } => {
            Bound::CountersPerHour.count();
            let wait = u64::try_from(free.0.saturating_sub(now.0)).unwrap_or_default();
            let moment = jiff::Timestamp::from_millisecond(free.0).map(|moment| moment.to_string()).unwrap_or_default();
            return ServiceError::ResourceExhausted {
                reason: format!("{error}; counters are free again at {moment}"),
                retry_after: Duration::from_millis(wait),
            };
        }
        CounterError::OwnedByHeadEnd { .. } => "adopt the counter with its floor, or use another client title",
        CounterError::SessionsExhausted { .. } => match (of.on_new_key, of.counter) {
            (OnNewKey::Reset(_), _) => "rotate the key: the next one starts low",
            (OnNewKey::Continue, CounterKey::ClientTitle(_)) => {
                "use another client title, which has counters of its own. A rotation alone gives none back, because the device profile says \
                 `on_new_key = \"continue\"`; if the meters start again with a new key, let it say `reset`, and rotate the key"
            }
            (OnNewKey::Continue, CounterKey::Setup) => {
                "if the meters start again with a new key, let their device profile say `on_new_key = \"reset\"`, and rotate the key; else replace \
                 the meter. A rotation alone gives no counters back"
            }
        },
        CounterError::Exhausted { .. } => match of.counter {
            CounterKey::ClientTitle(_) => {
                "order the transfer under another client title, which has counters of its own; else change the key on site"
            }
            CounterKey::Setup => {
                "no rotation reaches the meter over the air: visit it and change the key on site, or replace it"
            }
        },
        _ => "look at the meter's counters",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}
