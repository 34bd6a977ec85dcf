//! Reserved counters in the memory of their holder: it allocates leases from them, from the bottom
//! up.

use std::num::NonZeroU32;

use super::state::{CounterKey, CounterOwnership, CounterState, CounterUse};
use crate::{CounterJump, WriterId};

/// How many counters a server reserves at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize(NonZeroU32);

impl ChunkSize {
    /// 2¹⁶ counters.
    ///
    /// With leases of 1,000 counters a chunk serves 65 sessions, so 1 session in 65 writes the
    /// meter's row: 430 rows a second at 28,000 sessions a second, and one write in 16 hours for a
    /// meter that is read every 15 minutes.
    ///
    /// The cost is what a change of the holder skips, at most one chunk. A meter has 65,536 chunks,
    /// enough for 179 years of daily restarts. If two servers alternate on a meter at each of 96
    /// daily sessions, the chunks last 683 days (80 % of them 546 days). If callers do not stay
    /// with one server, 2¹³ is the better size: 15 years, and a write every 8 sessions.
    pub const DEFAULT: Self = match NonZeroU32::new(1 << 16) {
        Some(size) => Self(size),
        None => Self(NonZeroU32::MIN),
    };

    /// A chunk of this many counters.
    pub const fn new(counters: NonZeroU32) -> Self {
        Self(counters)
    }

    /// What is reserved if `count` counters are needed. A transfer writes the meter's row in each
    /// step anyway, so it reserves exactly what it uses. The rest would be counters that no cap of
    /// an hour has counted, and each change of the server that allocates would skip them.
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

/// Counters `first..bound` that a server run has reserved. They may be used only after the row is
/// stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Which counter.
    pub key: CounterKey,
    /// The first reserved counter.
    pub first: u32,
    /// The exclusive end, which the row now carries.
    pub bound: u64,
    /// The server run that may allocate from it.
    pub holder: WriterId,
    /// Whether 80 % of the key's counters are used: a rotation is due.
    pub rotation_due: bool,
}

/// Counters `first .. first + count` that a grantee may use, each once, upwards. The newest lease
/// ends all older leases.
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
        // A lease is never empty and ends within 32 bits, by `LiveChunk::allocate`.
        self.first.saturating_add(self.count.saturating_sub(1))
    }
}

/// A reserved chunk in its holder's memory, allocated from the bottom up.
///
/// Not `Clone`: two copies would allocate the same counters twice.
#[derive(Debug, PartialEq, Eq)]
pub struct LiveChunk {
    holder: WriterId,
    next: u64,
    bound: u64,
}

impl LiveChunk {
    /// Whether the chunk may serve this use: the counters at the end of the counter space are for
    /// transfers only.
    pub const fn serves(&self, counter_use: CounterUse) -> bool {
        self.bound <= CounterState::SESSIONS_END || matches!(counter_use, CounterUse::Transfer)
    }

    /// The chunk of a reservation whose row is durable.
    pub fn new(stored: Reservation) -> Self {
        Self { holder: stored.holder, next: u64::from(stored.first), bound: stored.bound }
    }

    /// Allocates the next `count` counters at or above the row's floor.
    ///
    /// `row` is the counter as read in the transaction that records the grant, and that transaction
    /// must fail if the row changed meanwhile. // I4: otherwise a server that lost the chunk could
    /// allocate a lower lease after a higher one.
    ///
    /// # Errors
    /// The chunk is spent: reserve the next one. Or the row no longer names it (another server took
    /// over, a floor was raised, a head-end owns the counter), or lacks a part of the island's
    /// `jump` (the database was restored): drop this chunk and reserve the next one.
    pub fn allocate(
        &mut self,
        row: &CounterState,
        count: NonZeroU32,
        jump: CounterJump,
    ) -> Result<Lease, AllocateError> {
        if jump.beyond(row.jumped) > 0
            || row.holder != Some(self.holder)
            || row.bound != self.bound
            || row.ownership != CounterOwnership::Kms
        {
            return Err(AllocateError::Superseded);
        }
        // I4: a floor binds the holder too, even if another server raised it.
        let start = self.next.max(row.floor);
        let end = start + u64::from(count.get());
        if end > self.bound {
            return Err(AllocateError::Spent);
        }
        let first = u32::try_from(start).map_err(|_| AllocateError::Spent)?;
        self.next = end;
        Ok(Lease { first, count: count.get() })
    }

    /// How many counters are left.
    pub const fn remaining(&self) -> u64 {
        self.bound - self.next
    }

    /// The exclusive end of what this server knows as reserved. The next reservation passes it as
    /// `at_least`, so that an older row cannot make reserved counters free again.
    pub const fn bound(&self) -> u64 {
        self.bound
    }
}

/// Why a chunk allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// Too few counters are left in the chunk.
    #[error("the counter chunk is spent")]
    Spent,
    /// The row no longer names this chunk.
    #[error("another reservation has replaced the counter chunk")]
    Superseded,
}
