//! Invocation counters (I4): no (key value, client system title, counter) is handed out twice.
//!
//! A sealed row says up to where counters were reserved, and which server holds the last chunk. The
//! holder deals leases from memory. Another server never continues a chunk: it reserves the next
//! one, above, and becomes the holder. So a crash skips counters and never repeats them, and a
//! newer lease always starts higher than every older one.
//!
//! After a restored backup the rows say too little. The island's [`CounterJump`] then grows by more
//! than can have been dealt since the backup, and each counter takes the jump before its next
//! reservation; a counter without a state takes it whole, since its state may be what was lost, and
//! since a key that is made again can have a value that was used before.
//!
//! A floor that lies inside the reserved chunk stands in the row. The holder reads the row in the
//! transaction of each lease, so it goes on above the floor at once, and no counter is skipped that
//! the floor does not forbid.
//!
//! Nobody uses up a key in passing: sessions and frames may reserve [`CounterCap`] counters of a
//! counter in an hour, what a meter's unauthenticated word skips included, and the last
//! [`CounterState::RESERVE`] counters are there for the system's own transfers alone, which bring
//! the next key. A transfer reserves what it uses and no more ([`ChunkSize::serving`]), so no lease
//! is dealt from what is not counted.

use std::{fmt, num::NonZeroU32};

use crate::{
    CounterDomainId, CounterJump, Exposure, ParseError, PrincipalId, QuotaHour, SystemTitle, UnixMillis, WriterId,
    exposure::learn,
};

/// What a meter counts: one sequence per client system title, or one for all clients of the
/// security setup. A device profile says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CounterScope {
    /// One counter per client system title.
    ClientTitle,
    /// One counter for the whole security setup: a session of one client ends those of the others.
    Setup,
}

impl CounterScope {
    /// The counter that a client with this title uses.
    pub const fn key(self, title: SystemTitle) -> CounterKey {
        match self {
            Self::ClientTitle => CounterKey::ClientTitle(title),
            Self::Setup => CounterKey::Setup,
        }
    }
}

/// Which counter of a key version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CounterKey {
    /// The counter of one client system title.
    ClientTitle(SystemTitle),
    /// The one counter of all client system titles.
    Setup,
}

impl fmt::Display for CounterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientTitle(title) => title.fmt(f),
            Self::Setup => f.write_str("all client titles"),
        }
    }
}

/// Who hands out the counters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CounterOwnership {
    /// This system.
    Kms,
    /// A head-end that used the key before it came here, and still counts by itself: no leases, no
    /// frames in the HSM.
    HeadEnd(PrincipalId),
}

/// What counters are reserved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CounterUse {
    /// A lease: a grantee uses them by itself, for a time that the row does not tell.
    Lease,
    /// Frames that this system protects: they are used up when they are dealt.
    Frames,
    /// The system's own transfers and probes: frames, and the only use that the last
    /// [`CounterState::RESERVE`] counters have.
    Transfer,
}

/// How many counters sessions and frames may reserve of one counter in one hour of UTC, and a
/// meter's unauthenticated word may skip. Transfers are counted and never refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CounterCap(NonZeroU32);

impl CounterCap {
    /// 4,000,000 counters: what a meter can be sent in an hour is far below, and 2³² of them take
    /// 44 days. Fifty changes of the server that deals (65,536 counters each) fit in.
    pub const DEFAULT: Self = match NonZeroU32::new(4_000_000) {
        Some(counters) => Self(counters),
        None => Self(NonZeroU32::MIN),
    };

    /// The lowest that can be set: the longest lease, [`Self::LEAST`], must fit in.
    pub const LEAST: u32 = 1_000_000;

    /// A cap of so many counters an hour.
    ///
    /// # Errors
    /// They are fewer than [`Self::LEAST`].
    pub fn new(counters: u32) -> Result<Self, ParseError> {
        let refuse = || {
            ParseError::new(
                "counters_per_hour",
                format!("`{counters}` is not {} to {} counters", Self::LEAST, u32::MAX),
            )
        };
        NonZeroU32::new(counters).filter(|cap| cap.get() >= Self::LEAST).map(Self).ok_or_else(refuse)
    }

    /// The number of counters.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl Default for CounterCap {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What a counter has reserved in one hour of UTC, and which hour that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HourlyUse {
    /// The hour.
    pub hour: QuotaHour,
    /// Counters; 0 if nothing was reserved yet.
    pub counters: u64,
}

impl HourlyUse {
    /// The use in the hour that `now` is in. Where another server's clock was ahead by up to an
    /// hour, its hour goes on, so that no cap is free twice; an hour further ahead was a clock that
    /// was wrong.
    fn at(self, now: UnixMillis) -> Self {
        let hour = QuotaHour::of(now);
        if self.hour == hour || self.hour.number() == hour.number().saturating_add(1) {
            self
        } else {
            Self { hour, counters: 0 }
        }
    }
}

/// One invocation counter, as the sealed row keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CounterState {
    key: CounterKey,
    bound: u64,
    holder: Option<WriterId>,
    ownership: CounterOwnership,
    jumped: CounterJump,
    lent: bool,
    floor: u64,
    hourly: HourlyUse,
}

impl CounterState {
    /// The first counter of a fresh key. Meters refuse a counter that is not above the last one,
    /// and start at 0.
    pub const FIRST: u32 = 1;

    /// The exclusive end of all counters: the DLMS invocation counter has 32 bits.
    pub const END: u64 = 1 << 32;

    /// The last 2²⁴ counters: only transfers and probes use them. A rotation takes about ten, so
    /// that they last, whatever else happened.
    pub const RESERVE: u64 = 1 << 24;

    /// The exclusive end of the counters of leases and frames.
    pub const SESSIONS_END: u64 = Self::END - Self::RESERVE;

    /// Half of all counters: long before a key is due.
    pub const HALF: u64 = Self::END / 2;

    /// The bound from which a new key is due: 80 % of all counters.
    pub const ROTATION_DUE: u64 = Self::END / 5 * 4;

    /// A counter of which everything below `bound` counts as used. `lent` is what [`Self::lent`]
    /// tells.
    ///
    /// # Errors
    /// The bound is above [`Self::END`].
    pub fn new(
        key: CounterKey,
        bound: u64,
        holder: Option<WriterId>,
        ownership: CounterOwnership,
        lent: bool,
    ) -> Result<Self, CounterError> {
        if bound > Self::END {
            return Err(CounterError::OutOfRange { bound });
        }
        Ok(Self {
            key,
            bound,
            holder,
            ownership,
            jumped: CounterJump::NONE,
            lent,
            floor: 0,
            hourly: HourlyUse::default(),
        })
    }

    /// The same, with so much of the island's jump in its bound.
    #[must_use]
    pub fn with_jumped(self, jumped: CounterJump) -> Self {
        Self { jumped, ..self }
    }

    /// The same, with a floor inside its chunk ([`Self::floor`]).
    ///
    /// # Errors
    /// The floor is not below the bound, or nobody holds the chunk: the bound alone is the floor
    /// then.
    pub fn with_floor(self, floor: u64) -> Result<Self, CounterError> {
        if floor != 0 && (floor >= self.bound || self.holder.is_none()) {
            return Err(CounterError::FloorOutOfChunk { floor, bound: self.bound });
        }
        Ok(Self { floor, ..self })
    }

    /// The same, with what was taken in an hour.
    #[must_use]
    pub fn with_hourly(self, hourly: HourlyUse) -> Self {
        Self { hourly, ..self }
    }

    /// What was taken in the hour that was last counted.
    pub const fn hourly(&self) -> HourlyUse {
        self.hourly
    }

    /// Whose counter it is.
    pub const fn key(&self) -> CounterKey {
        self.key
    }

    /// The exclusive upper end of what was ever reserved, at most [`Self::END`]. Nothing below it
    /// is reserved again.
    pub const fn bound(&self) -> u64 {
        self.bound
    }

    /// The server run that holds the chunk that ends at the bound; `None` if nobody may deal below
    /// the bound.
    pub const fn holder(&self) -> Option<WriterId> {
        self.holder
    }

    /// Who hands out the counters.
    pub const fn ownership(&self) -> &CounterOwnership {
        &self.ownership
    }

    /// How much of the island's jump is in the bound.
    pub const fn jumped(&self) -> CounterJump {
        self.jumped
    }

    /// The bound with the whole of the island's jump: where the next reservation starts, at most
    /// [`Self::END`].
    pub fn bound_after(&self, jump: CounterJump) -> u64 {
        self.bound.saturating_add(jump.beyond(self.jumped)).min(Self::END)
    }

    /// Whether leases were dealt from the chunk that ends at the bound: a grantee may still use
    /// counters below it, and a meter that saw a higher one would refuse them. Only the holder
    /// knows until when; for every other server a lease may be live.
    pub const fn lent(&self) -> bool {
        self.lent
    }

    /// The lowest counter that the holder may still deal from the chunk that ends at the bound; 0
    /// if it may deal what is left of it. Always below the bound, and 0 without a holder: the next
    /// reservation starts at the bound then.
    pub const fn floor(&self) -> u64 {
        self.floor
    }

    /// A counter below which nothing is dealt any more, as far as the row tells: it does not know
    /// how much of its chunk the holder has dealt.
    pub fn dealt_from(&self) -> u64 {
        if self.holder.is_some() { self.floor.max(u64::from(Self::FIRST)) } else { self.bound }
    }

    /// Nobody deals from the chunk any more: the next counter comes from a new reservation, at or
    /// above the bound.
    const fn end_chunk(&mut self) {
        self.holder = None;
        self.floor = 0;
    }

    /// Whether 80 % of the counters are used: the key asks for its rotation.
    pub const fn rotation_due(&self) -> bool {
        self.bound >= Self::ROTATION_DUE
    }
}

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
    /// end of the counter space. `jump` is the island's: what the counter lacks of it is taken
    /// first. A chunk for frames ends the leases of the chunk before it ([`CounterState::lent`]):
    /// the caller has made sure that they may end.
    ///
    /// The caller stores the changed row before it deals from the reservation. // I4: durable
    /// first, then handed out.
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
        // I4: a reservation starts at the bound of all earlier ones, whoever held them, those that
        // a restore lost included. Every floor is below it.
        let mut first = state.bound_after(jump).max(at_least);
        let chunk = u64::from(chunk.get());
        let mut end = CounterState::SESSIONS_END;
        if counter_use == CounterUse::Transfer && first + chunk > end {
            // A chunk never straddles the edge.
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
        state.lent = counter_use == CounterUse::Lease;
        Ok(Reservation {
            key: state.key,
            first: first_counter,
            bound: state.bound,
            holder,
            rotation_due: state.rotation_due(),
        })
    }

    /// Counts a reservation into the hour of `now`, in the row that it is stored with. True if half
    /// of the cap was reached by it: something asks for more counters than a meter can use.
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
    /// if half of `cap` was reached by it.
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

    /// Notes that a lease is dealt from a chunk that was reserved for frames. The caller stores the
    /// changed row with the grant.
    pub fn mark_lent(&mut self, key: CounterKey) {
        self.state_mut(key).lent = true;
    }

    /// Makes `floor` the lowest counter that may still be used, inside a chunk that is being dealt
    /// from too; a lower floor than the present one changes nothing. `jump_cap` bounds how far a
    /// floor from an unauthenticated source may move the bound (a spoofed FFFFFFFF would use up the
    /// key).
    ///
    /// # Errors
    /// The jump is longer than the cap.
    pub fn raise_floor(&mut self, key: CounterKey, floor: u64, jump_cap: Option<u32>) -> Result<(), CounterError> {
        let floor = floor.min(CounterState::END);
        let state = self.state_mut(key);
        if floor < state.bound {
            // I4: the holder reads the row before it deals, and skips what is below. Without a
            // holder nothing below the bound is dealt.
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
        // I4: a chunk reserved before ends at or below the floor, and its holder must not go on
        // dealing from it.
        state.end_chunk();
        Ok(())
    }

    /// Follows a meter that says without proof that `floor` is the lowest counter that it takes: as
    /// [`Self::raise_floor`], and whoever forges such answers skips no more of the counters in all
    /// than sessions may reserve in the hour of `now`, and none of the [`CounterState::RESERVE`]:
    /// they bring the key that heals it. True if half of the hour's cap was reached by it.
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

    /// Leaves a counter to a head-end that counts by itself.
    pub fn leave_to(&mut self, key: CounterKey, head_end: PrincipalId) {
        let state = self.state_mut(key);
        state.ownership = CounterOwnership::HeadEnd(head_end);
        state.end_chunk();
    }

    /// Takes a counter over from its head-end, which has stopped using it; `floor` is the lowest
    /// counter that it never used.
    pub fn take_over(&mut self, key: CounterKey, floor: u64) {
        let state = self.state_mut(key);
        state.ownership = CounterOwnership::Kms;
        state.bound = state.bound.max(floor.min(CounterState::END));
        state.end_chunk();
        state.lent = false;
    }

    /// The counter of this key, made when it is new. Asking for the one counter of all titles joins
    /// those of single titles.
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
                    lent: false,
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
        let lent = self.0.iter().any(|state| state.lent);
        let bound = self.highest_bound().max(u64::from(CounterState::FIRST));
        let hourly = self
            .0
            .iter()
            .map(|state| state.hourly)
            .max_by_key(|hourly| (hourly.hour, hourly.counters))
            .unwrap_or_default();
        // The least of them: a jump that is taken twice skips counters, one that is left out
        // repeats them.
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
            lent,
            floor: 0,
            hourly,
        });
    }

    /// Takes in the counters of another slot with the same key value: every bound at least as high
    /// as the other's.
    fn absorb(&mut self, other: &Self) {
        for theirs in &other.0 {
            let known = self.get(theirs.key).is_some();
            let state = self.state_mut(theirs.key);
            state.bound = state.bound.max(theirs.bound);
            state.jumped = if known { state.jumped.min(theirs.jumped) } else { theirs.jumped };
            // Above every floor of both, which are below their bounds.
            state.end_chunk();
            state.lent |= theirs.lent;
            if (theirs.hourly.hour, theirs.hourly.counters) > (state.hourly.hour, state.hourly.counters) {
                state.hourly = theirs.hourly;
            }
            if state.ownership == CounterOwnership::Kms {
                // What a head-end counts by itself is unknown here, so one such member stops the
                // leases of all.
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
    /// How many slots joined so far. Informational: it never decides.
    pub members: u64,
    /// Who could know the value, by whichever slot: what each slot's key version has, at least.
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

    /// Notes who could know the value. Returns whether anything of it is new: the row is written
    /// only then.
    pub fn learn(&mut self, exposures: &[Exposure]) -> bool {
        learn(&mut self.exposures, exposures)
    }
}

/// How many counters a server reserves at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize(NonZeroU32);

impl ChunkSize {
    /// 2¹⁶ counters.
    ///
    /// With leases of 1,000 counters a chunk serves 65 sessions, so 1 session in 65 writes the
    /// meter's row: 430 rows a second at 28,000 sessions a second, and one write in 16 hours for a
    /// meter that is read each 15 minutes. The price is what a change of holder throws away, at
    /// most one chunk: a meter has 65,536 of them, enough for 179 years of daily restarts. Two
    /// servers that take turns on a meter at each of 96 daily sessions would use them up in 683
    /// days (80 % in 546); where callers do not stay with one server, 2¹³ is the better size (15
    /// years, a write each 8 sessions).
    pub const DEFAULT: Self = match NonZeroU32::new(1 << 16) {
        Some(size) => Self(size),
        None => Self(NonZeroU32::MIN),
    };

    /// A chunk of this many counters.
    pub const fn new(counters: NonZeroU32) -> Self {
        Self(counters)
    }

    /// What is reserved where `count` counters are wanted. A transfer writes the meter's row in
    /// each step anyway, so it reserves what it uses: the rest would be counters that no hour's cap
    /// has seen, and each change of the server that deals would throw it away.
    #[must_use]
    pub fn serving(self, counter_use: CounterUse, count: NonZeroU32) -> Self {
        match counter_use {
            CounterUse::Lease | CounterUse::Frames => self.max(Self(count)),
            CounterUse::Transfer => Self(count),
        }
    }

    /// The number of counters.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Counters `first..bound` that a server run reserved; worth something only after the row is
/// stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Which counter.
    pub key: CounterKey,
    /// The first reserved counter.
    pub first: u32,
    /// The exclusive end, which the row now carries.
    pub bound: u64,
    /// The server run that may deal from it.
    pub holder: WriterId,
    /// Whether 80 % of the key's counters are used: it asks for its rotation.
    pub rotation_due: bool,
}

/// Counters `first .. first + count` that a grantee may use, each once, upwards. The newest lease
/// ends all older ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The first counter.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Lease {
    /// The last counter of the lease.
    pub const fn last(self) -> u32 {
        // A lease is never empty and ends within 32 bits, by `LiveChunk::deal`.
        self.first.saturating_add(self.count.saturating_sub(1))
    }
}

/// A reserved chunk in its holder's memory, dealt from the bottom up.
///
/// Not `Clone`: two copies would deal the same counters twice.
#[derive(Debug, PartialEq, Eq)]
pub struct LiveChunk {
    holder: WriterId,
    next: u64,
    bound: u64,
}

impl LiveChunk {
    /// Whether it has counters for this use: those at the end of the counter space are for
    /// transfers alone.
    pub const fn serves(&self, counter_use: CounterUse) -> bool {
        self.bound <= CounterState::SESSIONS_END || matches!(counter_use, CounterUse::Transfer)
    }

    /// The chunk of a reservation whose row is durable.
    pub fn new(stored: Reservation) -> Self {
        Self { holder: stored.holder, next: u64::from(stored.first), bound: stored.bound }
    }

    /// Deals the next `count` counters at or above the row's floor.
    ///
    /// `row` is the counter as read in the transaction that records the grant, and that transaction
    /// must fail if the row changed meanwhile. // I4: else a server that lost the chunk could deal
    /// a lower lease after a higher one.
    ///
    /// # Errors
    /// The chunk is spent (reserve the next one), or the row no longer names it (another server
    /// took over, a floor was raised, the counter was left to a head-end) or lacks something of the
    /// island's `jump` (the database was restored): drop this chunk and reserve the next one.
    pub fn deal(&mut self, row: &CounterState, count: NonZeroU32, jump: CounterJump) -> Result<Lease, DealError> {
        if jump.beyond(row.jumped) > 0
            || row.holder != Some(self.holder)
            || row.bound != self.bound
            || row.ownership != CounterOwnership::Kms
        {
            return Err(DealError::Superseded);
        }
        // I4: a floor binds the holder too, whoever raised it and on whichever server.
        let start = self.next.max(row.floor);
        let end = start + u64::from(count.get());
        if end > self.bound {
            return Err(DealError::Spent);
        }
        let first = u32::try_from(start).map_err(|_| DealError::Spent)?;
        self.next = end;
        Ok(Lease { first, count: count.get() })
    }

    /// How many counters are left.
    pub const fn remaining(&self) -> u64 {
        self.bound - self.next
    }

    /// The exclusive end of what this server knows as reserved: what a following reservation passes
    /// as `at_least`, so that an older row cannot bring reserved counters back.
    pub const fn bound(&self) -> u64 {
        self.bound
    }
}

/// Why a chunk deals nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DealError {
    /// Too few counters are left in it.
    #[error("the counter chunk is spent")]
    Spent,
    /// The row no longer names this chunk.
    #[error("the counter chunk was superseded")]
    Superseded,
}

/// Why a counter cannot do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CounterError {
    /// All counters up to [`CounterState::SESSIONS_END`] are used: leases and frames have none
    /// left.
    #[error(
        "the invocation counter of {key} has none left for sessions and frames: the last {} are for transfers of keys",
        CounterState::RESERVE
    )]
    SessionsExhausted {
        /// Which counter.
        key: CounterKey,
    },
    /// All counters up to [`CounterState::END`] are used: a transfer has none left either.
    #[error(
        "the invocation counter of {key} is used up: no request with this key and client title reaches the meter any more"
    )]
    Exhausted {
        /// Which counter.
        key: CounterKey,
    },
    /// What may be taken of a counter in this hour was taken.
    #[error(
        "the {} invocation counters of {key} that sessions and frames may reserve in an hour, and a meter's word may skip, are taken (counters_per_hour)",
        .cap.get()
    )]
    CapMet {
        /// Which counter.
        key: CounterKey,
        /// The cap.
        cap: CounterCap,
        /// When it is free again.
        free: UnixMillis,
    },
    /// A head-end hands out these counters itself.
    #[error("the invocation counter is still owned by `{head_end}`: take it over with a floor first")]
    OwnedByHeadEnd {
        /// The head-end.
        head_end: PrincipalId,
    },
    /// A floor would move the counter further than the device profile allows.
    #[error("a jump of the invocation counter from {from} to {to} is longer than the cap of {cap}")]
    JumpTooFar {
        /// The present bound.
        from: u64,
        /// The floor that was asked for.
        to: u64,
        /// The longest jump allowed.
        cap: u32,
    },
    /// A floor that nobody has proven would take counters away from transfers.
    #[error(
        "a floor of {floor} is above {}: the counters from there on bring the next key",
        CounterState::SESSIONS_END
    )]
    FloorInReserve {
        /// The floor.
        floor: u64,
    },
    /// The slot's counters are kept in a domain.
    #[error("the invocation counters are in counter domain {domain}")]
    InDomain {
        /// The domain.
        domain: CounterDomainId,
    },
    /// A bound above 2³².
    #[error("a counter bound of {bound} is above 2^32")]
    OutOfRange {
        /// The bound.
        bound: u64,
    },
    /// A floor that is not inside a chunk.
    #[error("a counter floor of {floor} is not inside a reserved chunk that ends at {bound}")]
    FloorOutOfChunk {
        /// The floor.
        floor: u64,
        /// The bound.
        bound: u64,
    },
    /// Two counters for one client title.
    #[error("two invocation counters cover one client title")]
    Overlapping,
}

impl CounterError {
    /// No counter is left for this use.
    pub const fn exhausted(key: CounterKey, counter_use: CounterUse) -> Self {
        match counter_use {
            CounterUse::Lease | CounterUse::Frames => Self::SessionsExhausted { key },
            CounterUse::Transfer => Self::Exhausted { key },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IslandName, Role};

    const NONE: CounterJump = CounterJump::NONE;

    fn title(last: u8) -> SystemTitle {
        SystemTitle::from_octets(&[0x4D, 0x4D, 0x4D, 0, 0, 0, 0, last]).unwrap()
    }

    fn server(number: u8) -> WriterId {
        WriterId::from_octets(&[number; 16]).unwrap()
    }

    fn chunk(counters: u32) -> ChunkSize {
        ChunkSize::new(NonZeroU32::new(counters).unwrap())
    }

    fn count(counters: u32) -> NonZeroU32 {
        NonZeroU32::new(counters).unwrap()
    }

    fn head_end() -> PrincipalId {
        PrincipalId::new(IslandName::parse("dev").unwrap(), Role::HeadEnd, "hes").unwrap()
    }

    #[test]
    fn another_holder_reserves_above_and_ends_the_older_chunk() {
        let key = CounterKey::ClientTitle(title(1));
        let mut counters = Counters::default();
        let mut first =
            LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap());
        assert_eq!(first.deal(counters.get(key).unwrap(), count(60), NONE), Ok(Lease { first: 1, count: 60 }));
        assert_eq!(first.deal(counters.get(key).unwrap(), count(41), NONE), Err(DealError::Spent));
        let mut second =
            LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(2), chunk(100), 0, NONE).unwrap());
        assert_eq!(first.deal(counters.get(key).unwrap(), count(1), NONE), Err(DealError::Superseded));
        assert_eq!(second.deal(counters.get(key).unwrap(), count(1), NONE), Ok(Lease { first: 101, count: 1 }));
    }

    #[test]
    fn the_counter_space_ends_and_warns_before() {
        let key = CounterKey::Setup;
        let mut counters = Counters::default();
        counters.raise_floor(key, CounterState::ROTATION_DUE - 200, None).unwrap();
        assert!(!counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().rotation_due);
        assert!(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().rotation_due);
        counters.raise_floor(key, CounterState::SESSIONS_END - 10, None).unwrap();
        let last = counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap();
        assert_eq!(last.bound, CounterState::SESSIONS_END);
        let lease = LiveChunk::new(last).deal(counters.get(key).unwrap(), count(10), NONE).unwrap();
        assert_eq!(u64::from(lease.last()), CounterState::SESSIONS_END - 1);
        for counter_use in [CounterUse::Lease, CounterUse::Frames] {
            assert_eq!(
                counters.reserve(key, counter_use, server(1), chunk(1), 0, NONE),
                Err(CounterError::SessionsExhausted { key })
            );
        }
    }

    #[test]
    fn the_last_counters_are_for_transfers_alone() {
        let key = CounterKey::Setup;
        let next = |from: u64, counter_use| {
            let mut counters = Counters::default();
            counters.raise_floor(key, from, None).unwrap();
            let chunk = ChunkSize::DEFAULT.serving(counter_use, count(2));
            counters
                .reserve(key, counter_use, server(1), chunk, 0, NONE)
                .map(|reserved| (u64::from(reserved.first), reserved.bound))
        };
        let end = CounterState::SESSIONS_END;
        for counter_use in [CounterUse::Lease, CounterUse::Frames] {
            assert_eq!(next(end - 1, counter_use), Ok((end - 1, end)));
            assert_eq!(next(end, counter_use), Err(CounterError::SessionsExhausted { key }));
        }
        // A transfer reserves what it uses, and never across the edge.
        for (from, first) in [(1, 1), (end - 2, end - 2), (end - 1, end), (end, end), (end + 7, end + 7)] {
            assert_eq!(next(from, CounterUse::Transfer), Ok((first, first + 2)));
        }
        assert_eq!(next(CounterState::END - 1, CounterUse::Transfer), Ok((CounterState::END - 1, CounterState::END)));
        assert_eq!(next(CounterState::END, CounterUse::Transfer), Err(CounterError::Exhausted { key }));
        // Who holds a transfer's chunk there deals nothing else from it.
        let mut counters = Counters::default();
        counters.raise_floor(key, end, None).unwrap();
        let held = LiveChunk::new(counters.reserve(key, CounterUse::Transfer, server(1), chunk(1), 0, NONE).unwrap());
        let uses = [CounterUse::Transfer, CounterUse::Frames, CounterUse::Lease];
        assert_eq!(uses.map(|counter_use| held.serves(counter_use)), [true, false, false]);
        let mut counters = Counters::default();
        let held = LiveChunk::new(counters.reserve(key, CounterUse::Transfer, server(1), chunk(1), 0, NONE).unwrap());
        assert!(uses.iter().all(|counter_use| held.serves(*counter_use)));
    }

    #[test]
    fn an_hour_has_its_counters_and_the_next_one_again() {
        const HOUR: i64 = 3_600_000;
        let key = CounterKey::ClientTitle(title(1));
        let cap = CounterCap::new(1_000_000).unwrap();
        let mut counters = Counters::default();
        let mut reserve = |size: u32, counter_use, now: i64| -> Result<bool, CounterError> {
            // As the caller does: what is refused is not stored.
            let mut changed = counters.clone();
            let reserved = changed.reserve(key, counter_use, server(1), chunk(size), 0, NONE).unwrap();
            let half = changed.count_into_hour(reserved, counter_use, cap, UnixMillis(now))?;
            counters = changed;
            Ok(half)
        };
        let met: Result<bool, CounterError> = Err(CounterError::CapMet { key, cap, free: UnixMillis(5 * HOUR) });
        assert_eq!(reserve(499_999, CounterUse::Lease, 4 * HOUR), Ok(false));
        assert_eq!(reserve(1, CounterUse::Frames, 4 * HOUR + 1), Ok(true), "half of it, once");
        assert_eq!(reserve(500_001, CounterUse::Lease, 4 * HOUR + 2), met.clone());
        assert_eq!(reserve(500_000, CounterUse::Lease, 4 * HOUR + 3), Ok(false));
        assert_eq!(reserve(1, CounterUse::Frames, 5 * HOUR - 1), met.clone());
        // A transfer goes on. A clock that is behind by less than an hour opens nothing.
        assert_eq!(reserve(1, CounterUse::Transfer, 5 * HOUR - 1), Ok(false));
        assert_eq!(reserve(1, CounterUse::Lease, 3 * HOUR), met);
        assert_eq!(reserve(1_000_000, CounterUse::Lease, 5 * HOUR), Ok(true));
        // An hour far ahead was a wrong clock, and locks nobody out.
        assert_eq!(reserve(1_000_000, CounterUse::Lease, 50 * HOUR), Ok(true));
        assert_eq!(reserve(1_000_000, CounterUse::Lease, 6 * HOUR), Ok(true));
        assert!(CounterCap::new(999_999).is_err() && CounterCap::new(u32::MAX).is_ok());
    }

    // A12: `D8 01 06` with a counter is anyone's to forge, as often as a head-end that may probe
    // likes.
    #[test]
    fn a_meter_s_word_takes_no_more_than_the_hour_has_and_nothing_of_the_reserve() {
        const HOUR: i64 = 3_600_000;
        const JUMP: u32 = 100_000;
        let key = CounterKey::ClientTitle(title(1));
        let cap = CounterCap::new(1_000_000).unwrap();
        let mut counters = Counters::default();
        let mut halves = 0;
        let mut forge = |counters: &mut Counters, now: i64| {
            let bound = counters.get(key).map_or(1, CounterState::bound);
            let half = counters.follow(key, bound + u64::from(JUMP), JUMP, cap, UnixMillis(now))?;
            halves += u32::from(half);
            Ok::<_, CounterError>(())
        };
        let met = |hour| Err(CounterError::CapMet { key, cap, free: UnixMillis(hour * HOUR) });
        for answer in 0..20 {
            assert_eq!(forge(&mut counters, 4 * HOUR + answer), if answer < 10 { Ok(()) } else { met(5) });
        }
        assert_eq!(counters.highest_bound(), 1_000_001);
        // Sessions and answers have one hour; a transfer goes on, and so does who repeats a counter
        // that was dealt.
        let reserved = counters.clone().reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap();
        assert!(counters.clone().count_into_hour(reserved, CounterUse::Lease, cap, UnixMillis(4 * HOUR)).is_err());
        assert!(counters.count_into_hour(reserved, CounterUse::Transfer, cap, UnixMillis(4 * HOUR)).is_ok());
        let before = counters.clone();
        assert_eq!(counters.follow(key, 1_000_001, JUMP, cap, UnixMillis(4 * HOUR)), Ok(false));
        assert_eq!(
            counters.follow(key, 1_100_002, JUMP, cap, UnixMillis(5 * HOUR)),
            Err(CounterError::JumpTooFar { from: 1_000_001, to: 1_100_002, cap: JUMP })
        );
        assert_eq!(counters, before, "what is refused changes nothing");
        assert_eq!(forge(&mut counters, 5 * HOUR), Ok(()));
        assert_eq!(halves, 1);

        // The reserve is for transfers, whatever a meter says; two people may raise the counter
        // there.
        let end = CounterState::SESSIONS_END;
        counters.raise_floor(key, end - 5, None).unwrap();
        for floor in [end + 1, end + 2, CounterState::END - 1, CounterState::END] {
            assert_eq!(
                counters.follow(key, floor, u32::MAX, cap, UnixMillis(6 * HOUR)),
                Err(CounterError::FloorInReserve { floor })
            );
        }
        assert_eq!(counters.follow(key, end, JUMP, cap, UnixMillis(6 * HOUR)), Ok(false));
        for step in 0..100 {
            let two = ChunkSize::DEFAULT.serving(CounterUse::Transfer, count(2));
            let reserved = counters.reserve(key, CounterUse::Transfer, server(step % 2 + 1), two, 0, NONE).unwrap();
            assert_eq!(u64::from(reserved.first), end + u64::from(step) * 2, "an answer takes nothing away");
            assert_eq!(
                counters.follow(key, reserved.bound + 1, JUMP, cap, UnixMillis(6 * HOUR)),
                Err(CounterError::FloorInReserve { floor: reserved.bound + 1 })
            );
            assert_eq!(
                counters.follow(key, reserved.bound, JUMP, cap, UnixMillis(6 * HOUR)),
                Ok(false),
                "the last counter that was sent"
            );
        }
        assert_eq!(counters.raise_floor(key, end + 5_000, None), Ok(()));
    }

    #[test]
    fn the_counters_of_an_hour_are_not_forgotten_when_counters_join() {
        let key = CounterKey::ClientTitle(title(1));
        let mut counters = Counters::default();
        let reserved = counters.reserve(key, CounterUse::Lease, server(1), chunk(900), 0, NONE).unwrap();
        counters.count_into_hour(reserved, CounterUse::Lease, CounterCap::DEFAULT, UnixMillis(7)).unwrap();
        let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
        domain.join(&counters);
        assert_eq!(domain.counters.get(key).unwrap().hourly().counters, 900);
        counters.raise_floor(CounterKey::Setup, 5, None).unwrap();
        assert_eq!(counters.get(key).unwrap().hourly().counters, 900);
    }

    #[test]
    fn a_floor_inside_the_chunk_binds_its_holder_and_wastes_nothing() {
        let key = CounterKey::ClientTitle(title(1));
        let mut counters = Counters::default();
        let mut held =
            LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap());
        let mut deal = |counters: &Counters, leased| {
            held.deal(counters.get(key).unwrap(), count(leased), NONE).map(|lease| lease.first)
        };
        assert_eq!(deal(&counters, 10), Ok(1));
        // A meter repeats a low counter, again and again.
        for floor in [5, 11, 3, 11] {
            counters.raise_floor(key, floor, Some(0)).unwrap();
        }
        assert_eq!(deal(&counters, 10), Ok(11));
        counters.raise_floor(key, 51, Some(0)).unwrap();
        assert_eq!(deal(&counters, 10), Ok(51));
        assert_eq!(deal(&counters, 10), Ok(61));
        // The last counter of the chunk, and the first above it.
        counters.raise_floor(key, 100, Some(0)).unwrap();
        assert_eq!(deal(&counters, 2), Err(DealError::Spent));
        assert_eq!(deal(&counters, 1), Ok(100));
        counters.raise_floor(key, 101, Some(0)).unwrap();
        assert_eq!(deal(&counters, 1), Err(DealError::Superseded));
        assert_eq!(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().first, 101);
        assert_eq!(counters.get(key).unwrap().floor(), 0);
    }

    #[test]
    fn a_floor_inside_a_chunk_holds_in_a_domain_for_all_titles_and_after_a_take_over() {
        let key = CounterKey::ClientTitle(title(1));
        let mut counters = Counters::default();
        counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap();
        counters.raise_floor(key, 60, None).unwrap();
        assert_eq!(counters.get(key).unwrap().floor(), 60);
        let next = |counters: &Counters| {
            let mut counters = counters.clone();
            let first = counters.reserve(key, CounterUse::Lease, server(2), chunk(10), 0, NONE).unwrap().first;
            (first, counters.get(key).unwrap().floor())
        };
        assert_eq!(next(&counters), (101, 0), "another server reserves above the chunk");
        let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
        domain.join(&counters);
        assert_eq!(next(&domain.counters), (101, 0));
        let mut all = counters.clone();
        all.raise_floor(CounterKey::Setup, 70, None).unwrap();
        assert_eq!(next(&all), (101, 0));
        counters.leave_to(key, head_end());
        counters.take_over(key, 80);
        assert_eq!(next(&counters), (101, 0));
        counters.raise_floor(key, 90, None).unwrap();
        assert_eq!(counters.get(key).unwrap().floor(), 0, "without a holder the bound is the floor");
    }

    #[test]
    fn a_spoofed_counter_cannot_use_up_the_key() {
        let key = CounterKey::Setup;
        let mut counters = Counters::default();
        assert!(matches!(counters.raise_floor(key, 0xFFFF_FFFF, Some(100_000)), Err(CounterError::JumpTooFar { .. })));
        assert_eq!(counters.highest_bound(), u64::from(CounterState::FIRST));
        assert_eq!(counters.raise_floor(key, 5_000, Some(100_000)), Ok(()));
        assert_eq!(counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 5_000);
    }

    #[test]
    fn a_head_end_keeps_its_counter_until_it_is_taken_over() {
        let key = CounterKey::ClientTitle(title(1));
        let mut counters = Counters::default();
        counters.leave_to(key, head_end());
        assert_eq!(
            counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE),
            Err(CounterError::OwnedByHeadEnd { head_end: head_end() })
        );
        assert!(
            counters
                .reserve(CounterKey::ClientTitle(title(2)), CounterUse::Lease, server(1), chunk(1), 0, NONE)
                .is_ok()
        );
        counters.take_over(key, 1_200);
        assert_eq!(counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 1_200);
    }

    #[test]
    fn a_domain_starts_above_every_member() {
        let [mine, other] = [CounterKey::ClientTitle(title(1)), CounterKey::ClientTitle(title(2))];
        let mut first = Counters::default();
        let mut second = Counters::default();
        first.raise_floor(mine, 500, None).unwrap();
        second.raise_floor(mine, 900, None).unwrap();
        second.raise_floor(other, 40, None).unwrap();
        let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
        domain.join(&first);
        domain.join(&second);
        assert_eq!(domain.counters.reserve(mine, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 900);
        assert_eq!(domain.counters.reserve(other, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 40);

        let mut whole_setup = Counters::default();
        whole_setup.raise_floor(CounterKey::Setup, 20, None).unwrap();
        domain.join(&whole_setup);
        assert_eq!(domain.counters.states().len(), 1);
        assert_eq!(domain.counters.reserve(other, CounterUse::Lease, server(1), chunk(1), 0, NONE).unwrap().first, 901);
    }

    #[test]
    fn a_member_counted_by_a_head_end_stops_the_whole_domain() {
        let key = CounterKey::ClientTitle(title(1));
        let mut owned = Counters::default();
        owned.leave_to(key, head_end());
        let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
        domain.join(&Counters::default());
        domain.join(&owned);
        assert!(matches!(
            domain.counters.reserve(key, CounterUse::Lease, server(1), chunk(1), 0, NONE),
            Err(CounterError::OwnedByHeadEnd { .. })
        ));
    }

    #[test]
    fn after_a_restore_every_counter_starts_above_what_may_have_been_dealt() {
        let [known, lost] = [CounterKey::ClientTitle(title(1)), CounterKey::ClientTitle(title(2))];
        let mut backup = Counters::default();
        backup.reserve(known, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap();
        // After the backup: more of the known counter, and the first of another.
        let mut served = backup.clone();
        assert_eq!(served.reserve(known, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().bound, 201);
        assert_eq!(served.reserve(lost, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap().bound, 101);

        let jump = NONE.raised_by(1_000);
        let mut restored = backup;
        let reservation = restored.reserve(known, CounterUse::Lease, server(2), chunk(100), 0, jump).unwrap();
        assert_eq!((reservation.first, reservation.bound), (1_101, 1_201));
        assert_eq!(restored.reserve(lost, CounterUse::Lease, server(2), chunk(100), 0, jump).unwrap().first, 1_001);
        assert_eq!(
            restored.reserve(known, CounterUse::Lease, server(2), chunk(100), 0, jump).unwrap().first,
            1_201,
            "a jump is taken once"
        );
        assert_eq!(
            restored.reserve(known, CounterUse::Lease, server(2), chunk(100), 0, jump.raised_by(500)).unwrap().first,
            1_801,
            "and the next one by what is new"
        );
    }

    #[test]
    fn a_chunk_from_before_a_restore_is_not_dealt_from() {
        let key = CounterKey::ClientTitle(title(1));
        let mut counters = Counters::default();
        let mut held =
            LiveChunk::new(counters.reserve(key, CounterUse::Lease, server(1), chunk(100), 0, NONE).unwrap());
        assert_eq!(held.deal(counters.get(key).unwrap(), count(1), NONE.raised_by(1)), Err(DealError::Superseded));
    }

    #[test]
    fn a_jump_is_not_lost_when_counters_join() {
        let [own, other] = [CounterKey::ClientTitle(title(1)), CounterKey::ClientTitle(title(2))];
        let jump = NONE.raised_by(1_000);
        let mut raised = Counters::default();
        raised.reserve(own, CounterUse::Lease, server(1), chunk(10), 0, jump).unwrap();
        let mut unraised = Counters::default();
        unraised.reserve(own, CounterUse::Lease, server(1), chunk(50), 0, NONE).unwrap();
        unraised.reserve(other, CounterUse::Lease, server(1), chunk(50), 0, NONE).unwrap();
        let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
        domain.join(&raised);
        assert_eq!(domain.counters.get(own).unwrap().jumped(), jump);
        domain.join(&unraised);
        assert_eq!(domain.counters.reserve(own, CounterUse::Lease, server(1), chunk(1), 0, jump).unwrap().first, 2_011);
        assert_eq!(
            domain.counters.reserve(other, CounterUse::Lease, server(1), chunk(1), 0, jump).unwrap().first,
            1_051
        );
        unraised.raise_floor(CounterKey::Setup, 60, None).unwrap();
        assert_eq!(unraised.reserve(own, CounterUse::Lease, server(1), chunk(1), 0, jump).unwrap().first, 1_060);
    }

    #[test]
    fn a_chunk_says_whether_leases_were_dealt_from_it() {
        let key = CounterKey::ClientTitle(title(1));
        let lent = |counters: &Counters| counters.get(key).unwrap().lent();
        let mut counters = Counters::default();
        counters.reserve(key, CounterUse::Frames, server(1), chunk(10), 0, NONE).unwrap();
        assert!(!lent(&counters));
        counters.mark_lent(key);
        assert!(lent(&counters));
        // The chunk of another server for frames is above every lease: they have ended.
        counters.reserve(key, CounterUse::Frames, server(2), chunk(10), 0, NONE).unwrap();
        assert!(!lent(&counters));
        counters.reserve(key, CounterUse::Lease, server(2), chunk(10), 0, NONE).unwrap();
        // A floor, a jump, a domain or the one counter of all titles leave the grantee in the
        // belief that it may count on.
        counters.raise_floor(key, 1_000, None).unwrap();
        assert!(lent(&counters));
        let mut domain = CounterDomain::new(CounterDomainId([7; 16]));
        domain.join(&counters);
        assert!(lent(&domain.counters));
        let mut whole_setup = Counters::default();
        whole_setup.raise_floor(CounterKey::Setup, 20, None).unwrap();
        domain.join(&whole_setup);
        assert!(domain.counters.get(CounterKey::Setup).unwrap().lent());
        // What this system lent before the counter was a head-end's is forgotten with it.
        counters.leave_to(key, head_end());
        counters.take_over(key, 2_000);
        assert!(!lent(&counters));
    }

    #[test]
    fn overlapping_counters_are_refused() {
        let state = |key| CounterState::new(key, 1, None, CounterOwnership::Kms, false).unwrap();
        let own = CounterKey::ClientTitle(title(1));
        assert_eq!(Counters::from_states(vec![state(own), state(own)]), Err(CounterError::Overlapping));
        assert_eq!(Counters::from_states(vec![state(own), state(CounterKey::Setup)]), Err(CounterError::Overlapping));
        assert!(CounterState::new(own, CounterState::END + 1, None, CounterOwnership::Kms, false).is_err());
    }
}
