//! Invocation counters (I4): no (key value, client system title, counter) is allocated twice.
//!
//! A sealed row says up to where counters are reserved, and which server holds the last chunk. The
//! holder allocates leases from memory. Another server never continues a chunk: it reserves the
//! next chunk, above, and becomes the holder. So a crash skips counters and never repeats them, and
//! a newer lease always starts above every older lease.
//!
//! After a backup is restored, the rows know too little. The island's [`CounterJump`] then grows by
//! more than can have been allocated since the backup. Each counter adds the jump before its next
//! reservation. A counter without a state adds the whole jump: its state may be what was lost, and
//! a key that is made again can have a value that was used before.
//!
//! A floor inside the reserved chunk is in the row. The holder reads the row in the transaction of
//! each lease, so it continues above the floor at once. It skips no counter that the floor does not
//! forbid.
//!
//! Two limits keep a key from being used up. Sessions and frames may reserve [`CounterCap`]
//! counters of a counter in an hour; what a meter's unauthenticated answer skips counts too. The
//! last [`CounterState::RESERVE`] counters are for the system's own transfers only, which bring the
//! next key. A transfer reserves exactly what it uses ([`ChunkSize::serving`]), so no lease is
//! allocated from counters that were not counted.

pub(crate) mod chunk;
pub(crate) mod state;

use self::{
    chunk::{ChunkSize, Reservation},
    state::{CounterCap, CounterError, CounterKey, CounterOwnership, CounterState, CounterUse, HourlyUse},
};
use crate::{CounterDomainId, CounterJump, Exposure, PrincipalId, UnixMillis, WriterId, exposure::learn};

/// The counters of one key version or of one counter domain.
///
/// Either one counter for all client titles or one per title, never both: a counter for all titles
/// would meet those of single titles at the same (key value, title, counter).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counters(Vec<CounterState>);

impl Counters {
    /// The counters of a row.
    ///
    /// # Errors
    /// Two of them are the same counter, or one for all titles stands beside others.
    pub fn from_states(states: Vec<CounterState>) -> Result<Self, CounterError> {
        let has_setup = states.iter().any(|state| state.key == CounterKey::Setup);
        let duplicate =
            states.iter().enumerate().any(|(at, state)| states.iter().take(at).any(|earlier| earlier.key == state.key));
        if duplicate || (has_setup && states.len() > 1) {
            return Err(CounterError::Overlapping);
        }
        Ok(Self(states))
    }

    /// The single counters.
    pub fn states(&self) -> &[CounterState] {
        &self.0
    }

    /// The counter that serves this key: its own, or the one for all client titles where there is
    /// one.
    pub fn get(&self, key: CounterKey) -> Option<&CounterState> {
        self.0.iter().find(|state| state.key == key || state.key == CounterKey::Setup)
    }

    /// The highest bound of any counter; 0 without counters.
    pub fn highest_bound(&self) -> u64 {
        self.0.iter().map(|state| state.bound).max().unwrap_or(0)
    }

    /// Reserves the next `chunk` counters for `holder`, all at or above `at_least`; fewer at the
    /// end of the counter space. `jump` is the island's: the counter first adds what it lacks of
    /// it. A chunk for frames ends the leases of the chunk before it ([`CounterState::leased`]):
    /// the caller has made sure that they may end.
    ///
    /// The caller stores the changed row before it allocates from the reservation. // I4: durable
    /// first, then allocated.
    ///
    /// # Errors
    /// The counters belong to a head-end, or none are left for this use.
    pub fn reserve(
        &mut self,
        key: CounterKey,
        counter_use: CounterUse,
        holder: WriterId,
        chunk: ChunkSize,
        at_least: u64,
        jump: CounterJump,
    ) -> Result<Reservation, CounterError> {
        let state = self.state_mut(key);
        if let CounterOwnership::HeadEnd(head_end) = &state.ownership {
            return Err(CounterError::OwnedByHeadEnd { head_end: head_end.clone() });
        }
        // I4: a reservation starts at the bound of all earlier reservations, whoever held them,
        // including those that a restore lost. Every floor is below the bound.
        let mut first = state.bound_after(jump).max(at_least);
        let chunk = u64::from(chunk.get());
        let mut end = CounterState::SESSIONS_END;
        if counter_use == CounterUse::Transfer && first + chunk > end {
            // A chunk never crosses the start of the reserve.
            (first, end) = (first.max(end), CounterState::END);
        }
        if first >= end {
            return Err(CounterError::exhausted(key, counter_use));
        }
        let first_counter = u32::try_from(first).map_err(|_| CounterError::exhausted(key, counter_use))?;
        state.bound = (first + chunk).min(end);
        state.holder = Some(holder);
        state.floor = 0;
        state.jumped = state.jumped.max(jump);
        state.leased = counter_use == CounterUse::Lease;
        Ok(Reservation {
            key: state.key,
            first: first_counter,
            bound: state.bound,
            holder,
            rotation_due: state.rotation_due(),
        })
    }

    /// Counts a reservation into the hour of `now`, in the row that it is stored with. True if the
    /// use of the hour has reached half of the cap with it: a caller asks for more counters than a
    /// meter can use.
    ///
    /// # Errors
    /// Not a transfer, and the cap is met: nothing of the reservation may be stored.
    pub fn count_into_hour(
        &mut self,
        reserved: Reservation,
        counter_use: CounterUse,
        cap: CounterCap,
        now: UnixMillis,
    ) -> Result<bool, CounterError> {
        let taken = reserved.bound.saturating_sub(u64::from(reserved.first));
        self.count(reserved.key, taken, Some(cap).filter(|_| counter_use != CounterUse::Transfer), cap, now)
    }

    /// Counts what is taken of a counter into the hour of `now`, unless that exceeds `most`. True
    /// if the use of the hour has reached half of `cap` with it.
    fn count(
        &mut self,
        key: CounterKey,
        taken: u64,
        most: Option<CounterCap>,
        cap: CounterCap,
        now: UnixMillis,
    ) -> Result<bool, CounterError> {
        let state = self.state_mut(key);
        let before = state.hourly.at(now);
        let counters = before.counters.saturating_add(taken);
        if let Some(cap) = most.filter(|most| counters > u64::from(most.get())) {
            return Err(CounterError::CapMet { key: state.key, cap, free: before.hour.end() });
        }
        state.hourly = HourlyUse { counters, ..before };
        let half = u64::from(cap.get()) / 2;
        Ok(before.counters < half && counters >= half)
    }

    /// Notes that a lease is allocated from a chunk that was reserved for frames. The caller stores
    /// the changed row with the grant.
    pub fn mark_leased(&mut self, key: CounterKey) {
        self.state_mut(key).leased = true;
    }

    /// Makes `floor` the lowest counter that may still be used, also inside a chunk that is in use.
    /// A lower floor than the present one changes nothing. `jump_cap` bounds how far a floor from
    /// an unauthenticated source may move the bound (a spoofed FFFFFFFF would use up the key).
    ///
    /// # Errors
    /// The jump is longer than the cap.
    pub fn raise_floor(&mut self, key: CounterKey, floor: u64, jump_cap: Option<u32>) -> Result<(), CounterError> {
        let floor = floor.min(CounterState::END);
        let state = self.state_mut(key);
        if floor < state.bound {
            // I4: the holder reads the row before it allocates, and skips what is below the floor.
            // Without a holder nothing below the bound is allocated.
            if state.holder.is_some() {
                state.floor = state.floor.max(floor);
            }
            return Ok(());
        }
        if let Some(cap) = jump_cap
            && floor - state.bound > u64::from(cap)
        {
            return Err(CounterError::JumpTooFar { from: state.bound, to: floor, cap });
        }
        state.bound = floor;
        // I4: a chunk that was reserved before ends at or below the floor, and its holder must not
        // allocate from it any more.
        state.end_chunk();
        Ok(())
    }

    /// Follows a meter that says without proof that `floor` is the lowest counter that it accepts.
    /// As [`Self::raise_floor`], with two more limits on what forged answers can skip: in all no
    /// more counters than sessions may reserve in the hour of `now`, and none of the
    /// [`CounterState::RESERVE`], because those bring the new key. True if the use of the hour has
    /// reached half of the cap with it.
    ///
    /// # Errors
    /// The floor is in the reserve, the jump is longer than `jump_cap`, or the hour's cap is met.
    /// Nothing has changed then.
    pub fn follow(
        &mut self,
        key: CounterKey,
        floor: u64,
        jump_cap: u32,
        cap: CounterCap,
        now: UnixMillis,
    ) -> Result<bool, CounterError> {
        let mut followed = self.clone();
        let bound = followed.state_mut(key).bound;
        if floor > bound.max(CounterState::SESSIONS_END) {
            return Err(CounterError::FloorInReserve { floor });
        }
        followed.raise_floor(key, floor, Some(jump_cap))?;
        // What lies below the bound was counted when it was reserved.
        let many = if floor > bound { followed.count(key, floor - bound, Some(cap), cap, now)? } else { false };
        *self = followed;
        Ok(many)
    }

    /// Gives the ownership of a counter to a head-end that counts by itself.
    pub fn leave_to(&mut self, key: CounterKey, head_end: PrincipalId) {
        let state = self.state_mut(key);
        state.ownership = CounterOwnership::HeadEnd(head_end);
        state.end_chunk();
    }

    /// Takes the ownership of a counter from its head-end, which has stopped using it. `floor` is
    /// the lowest counter that the head-end never used.
    pub fn take_over(&mut self, key: CounterKey, floor: u64) {
        let state = self.state_mut(key);
        state.ownership = CounterOwnership::Kms;
        state.bound = state.bound.max(floor.min(CounterState::END));
        state.end_chunk();
        state.leased = false;
    }

    /// The state of this counter, added if there is none. For the one counter of all titles, the
    /// counters of single titles become one.
    fn state_mut(&mut self, key: CounterKey) -> &mut CounterState {
        if key == CounterKey::Setup && !matches!(self.0.as_slice(), [] | [CounterState { key: CounterKey::Setup, .. }])
        {
            self.collapse();
        }
        let at = match self.0.iter().position(|state| state.key == key || state.key == CounterKey::Setup) {
            Some(at) => at,
            None => {
                self.0.push(CounterState {
                    key,
                    bound: u64::from(CounterState::FIRST),
                    holder: None,
                    ownership: CounterOwnership::Kms,
                    jumped: CounterJump::NONE,
                    leased: false,
                    floor: 0,
                    hourly: HourlyUse::default(),
                });
                self.0.sort_by_key(|state| state.key);
                self.0.iter().position(|state| state.key == key).unwrap_or_default()
            }
        };
        #[expect(clippy::indexing_slicing, reason = "the position was just found in this vector")]
        &mut self.0[at]
    }

    /// Turns all counters into the one for all client titles, above every one of them. A head-end's
    /// ownership stays, and so do leases.
    fn collapse(&mut self) {
        let leased = self.0.iter().any(|state| state.leased);
        let bound = self.highest_bound().max(u64::from(CounterState::FIRST));
        let hourly = self
            .0
            .iter()
            .map(|state| state.hourly)
            .max_by_key(|hourly| (hourly.hour, hourly.counters))
            .unwrap_or_default();
        // The least of them: a jump that is added twice skips counters, and a jump that is not
        // added repeats them.
        let jumped = self.0.iter().map(|state| state.jumped).min().unwrap_or_default();
        let ownership = self
            .0
            .drain(..)
            .map(|state| state.ownership)
            .find(|ownership| *ownership != CounterOwnership::Kms)
            .unwrap_or(CounterOwnership::Kms);
        self.0.push(CounterState {
            key: CounterKey::Setup,
            bound,
            holder: None,
            ownership,
            jumped,
            leased,
            floor: 0,
            hourly,
        });
    }

    /// Merges the counters of another slot with the same key value: afterwards every bound is at
    /// least as high as in either.
    fn absorb(&mut self, other: &Self) {
        for theirs in &other.0 {
            let known = self.get(theirs.key).is_some();
            let state = self.state_mut(theirs.key);
            state.bound = state.bound.max(theirs.bound);
            state.jumped = if known { state.jumped.min(theirs.jumped) } else { theirs.jumped };
            // Above every floor of both, which are below their bounds.
            state.end_chunk();
            state.leased |= theirs.leased;
            if (theirs.hourly.hour, theirs.hourly.counters) > (state.hourly.hour, state.hourly.counters) {
                state.hourly = theirs.hourly;
            }
            if state.ownership == CounterOwnership::Kms {
                // How far a head-end has counted by itself is unknown here, so one such member
                // stops the leases of all.
                state.ownership.clone_from(&theirs.ownership);
            }
        }
    }
}

/// The counters of a key value that several slots share (I4), a sealed row of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CounterDomain {
    /// The fingerprint of the key value.
    pub id: CounterDomainId,
    /// The counters.
    pub counters: Counters,
    /// How many slots have joined. For information only: no decision depends on it.
    pub members: u64,
    /// Who could know the value, through any of its slots. It contains the exposures of each slot's
    /// key version.
    pub exposures: Vec<Exposure>,
}

impl CounterDomain {
    /// A domain without members.
    pub fn new(id: CounterDomainId) -> Self {
        Self { id, counters: Counters::default(), members: 0, exposures: Vec::new() }
    }

    /// Lets a slot join: the domain's counters end up above those of the slot. In the same
    /// transaction the slot's key version names this domain instead of holding counters
    /// ([`crate::Slot::join_domain`]).
    pub fn join(&mut self, counters: &Counters) {
        self.counters.absorb(counters);
        self.members = self.members.saturating_add(1);
    }

    /// Notes who could know the value. Returns whether one of the exposures is new: the row is
    /// written only then.
    pub fn learn(&mut self, exposures: &[Exposure]) -> bool {
        learn(&mut self.exposures, exposures)
    }
}

#[cfg(test)]
mod tests;
