//! One invocation counter, as the sealed row keeps it: what it counts, who allocates from it, and
//! how far it is reserved.

use std::{fmt, num::NonZeroU32};

use crate::{CounterDomainId, CounterJump, ParseError, PrincipalId, QuotaHour, SystemTitle, UnixMillis, WriterId};

/// What a meter counts: one sequence per client system title, or one for all clients of the
/// security setup. The device profile says which.
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

/// Who allocates the counters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CounterOwnership {
    /// This system.
    Kms,
    /// A head-end that used the key before it came to this system, and still counts by itself: no
    /// leases, and no frames in the HSM.
    HeadEnd(PrincipalId),
}

/// What counters are reserved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CounterUse {
    /// A lease: a grantee uses them by itself, for a time that the row does not hold.
    Lease,
    /// Frames that this system protects: the counters are used when they are allocated.
    Frames,
    /// The system's own transfers and probes: frames. The last [`CounterState::RESERVE`] counters
    /// are for these only.
    Transfer,
}

/// How many counters sessions and frames may reserve of one counter in one hour of UTC, including
/// what a meter's unauthenticated answer may skip. Transfers are counted and never refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CounterCap(NonZeroU32);

impl CounterCap {
    /// 4,000,000 counters. A meter can be sent far fewer requests in an hour, and at this rate 2³²
    /// counters last 44 days. Fifty changes of the server that allocates (65,536 counters each)
    /// fit.
    pub const DEFAULT: Self = match NonZeroU32::new(4_000_000) {
        Some(counters) => Self(counters),
        None => Self(NonZeroU32::MIN),
    };

    /// The lowest cap that can be set: the longest lease, [`Self::LEAST`] counters, must fit.
    pub const LEAST: u32 = 1_000_000;

    /// A cap of this many counters an hour.
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
    /// The use in the hour that `now` is in. If another server's clock was ahead by up to an hour,
    /// its hour continues, so that no cap is free twice. An hour further ahead came from a wrong
    /// clock and is dropped.
    pub(super) fn at(self, now: UnixMillis) -> Self {
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
    pub(super) key: CounterKey,
    pub(super) bound: u64,
    pub(super) holder: Option<WriterId>,
    pub(super) ownership: CounterOwnership,
    pub(super) jumped: CounterJump,
    pub(super) leased: bool,
    pub(super) floor: u64,
    pub(super) hourly: HourlyUse,
}

impl CounterState {
    /// The first counter of a fresh key. Meters refuse a counter that is not above the last one,
    /// and start at 0.
    pub const FIRST: u32 = 1;

    /// The exclusive end of all counters: the DLMS invocation counter has 32 bits.
    pub const END: u64 = 1 << 32;

    /// The last 2²⁴ counters: only transfers and probes use them. A rotation takes about ten, so
    /// they are enough in any case.
    pub const RESERVE: u64 = 1 << 24;

    /// The exclusive end of the counters of leases and frames.
    pub const SESSIONS_END: u64 = Self::END - Self::RESERVE;

    /// Half of all counters: long before a rotation is due.
    pub const HALF: u64 = Self::END / 2;

    /// The bound from which a new key is due: 80 % of all counters.
    pub const ROTATION_DUE: u64 = Self::END / 5 * 4;

    /// A counter of which everything below `bound` counts as used. `leased` is the value of
    /// [`Self::leased`].
    ///
    /// # Errors
    /// The bound is above [`Self::END`].
    pub fn new(
        key: CounterKey,
        bound: u64,
        holder: Option<WriterId>,
        ownership: CounterOwnership,
        leased: bool,
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
            leased,
            floor: 0,
            hourly: HourlyUse::default(),
        })
    }

    /// The same, with this much of the island's jump in its bound.
    #[must_use]
    pub fn with_jumped(self, jumped: CounterJump) -> Self {
        Self { jumped, ..self }
    }

    /// The same, with a floor inside its chunk ([`Self::floor`]).
    ///
    /// # Errors
    /// The floor is not below the bound, or nobody holds the chunk: then the bound is the floor.
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

    /// Which counter it is.
    pub const fn key(&self) -> CounterKey {
        self.key
    }

    /// The exclusive upper end of what was ever reserved, at most [`Self::END`]. Nothing below it
    /// is reserved again.
    pub const fn bound(&self) -> u64 {
        self.bound
    }

    /// The server run that holds the chunk that ends at the bound; `None` if nobody may allocate
    /// below the bound.
    pub const fn holder(&self) -> Option<WriterId> {
        self.holder
    }

    /// Who allocates the counters.
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

    /// Whether leases were allocated from the chunk that ends at the bound. A grantee may then
    /// still use counters below the bound, and a meter that saw a higher counter would refuse them.
    /// Only the holder knows until when; every other server must assume that a lease is live.
    pub const fn leased(&self) -> bool {
        self.leased
    }

    /// The lowest counter that the holder may still allocate from the chunk that ends at the bound;
    /// 0 if it may allocate all that is left. Always below the bound. Without a holder it is 0: the
    /// next reservation starts at the bound.
    pub const fn floor(&self) -> u64 {
        self.floor
    }

    /// A counter below which nothing is allocated any more, as far as the row knows. The row does
    /// not know how much of its chunk the holder has allocated.
    pub fn unallocated_from(&self) -> u64 {
        if self.holder.is_some() { self.floor.max(u64::from(Self::FIRST)) } else { self.bound }
    }

    /// Nobody allocates from the chunk any more: the next counter comes from a new reservation, at
    /// or above the bound.
    pub(super) const fn end_chunk(&mut self) {
        self.holder = None;
        self.floor = 0;
    }

    /// Whether 80 % of the counters are used: a rotation of the key is due.
    pub const fn rotation_due(&self) -> bool {
        self.bound >= Self::ROTATION_DUE
    }
}

/// Why a counter cannot do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CounterError {
    /// All counters up to [`CounterState::SESSIONS_END`] are used: leases and frames have none
    /// left.
    #[error(
        "the invocation counter of {key} has none left for sessions and frames: the last {} are for transfers",
        CounterState::RESERVE
    )]
    SessionsExhausted {
        /// Which counter.
        key: CounterKey,
    },
    /// All counters up to [`CounterState::END`] are used: a transfer has none left either.
    #[error(
        "the invocation counter of {key} is used up: the meter accepts no request with this key and this counter any more"
    )]
    Exhausted {
        /// Which counter.
        key: CounterKey,
    },
    /// The hour's cap of a counter is used up.
    #[error(
        "the limit `counters_per_hour` of {} invocation counters of {key} is used up for this hour: sessions, frames or unauthenticated answers of the meter took them",
        .cap.get()
    )]
    CapMet {
        /// Which counter.
        key: CounterKey,
        /// The cap.
        cap: CounterCap,
        /// When the next hour begins.
        free: UnixMillis,
    },
    /// A head-end allocates these counters itself.
    #[error("the head-end `{head_end}` still owns the invocation counter: take the counter over with a floor first")]
    OwnedByHeadEnd {
        /// The head-end.
        head_end: PrincipalId,
    },
    /// A floor would move the counter further than the device profile allows.
    #[error(
        "the invocation counter would jump from {from} to {to}, further than `jump_cap` of the device profile ({cap})"
    )]
    JumpTooFar {
        /// The present bound.
        from: u64,
        /// The floor that was asked for.
        to: u64,
        /// The longest jump allowed.
        cap: u32,
    },
    /// An unproven floor would take counters away from transfers.
    #[error(
        "the unproven counter floor {floor} is above {}: the counters above that are for transfers of the next key only",
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
    #[error("the counter bound {bound} is above 2^32")]
    OutOfRange {
        /// The bound.
        bound: u64,
    },
    /// A floor that is not inside a chunk.
    #[error("the counter floor {floor} is not inside a reserved chunk that ends at {bound}")]
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
