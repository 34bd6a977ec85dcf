//! The invocation counters of a lease.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kms_domain::{KeyVersionNumber, SystemTitle, UnixMillis};

/// The invocation counters that this grantee may use with one key version under one client title:
/// each is allocated once (I4).
///
/// Not `Clone`, and safe to share between threads: two tasks that talk to the same meter use
/// the same object. A process that ends loses the counters that it has not used; it asks for a new
/// session, whose lease starts higher.
#[derive(Debug)]
pub struct Counters {
    client_title: SystemTitle,
    key_version: KeyVersionNumber,
    not_after: UnixMillis,
    /// The next counter. It has 64 bits, because it is 2^32 after the last counter.
    next: AtomicU64,
    end: u64,
}

impl Counters {
    /// The lease of `count` counters from `first` on; the last one must be a 32-bit number.
    pub(crate) fn new(
        client_title: SystemTitle,
        key_version: KeyVersionNumber,
        first: u32,
        count: u32,
        not_after: UnixMillis,
    ) -> Option<Self> {
        let end = u64::from(first) + u64::from(count);
        (count > 0 && end <= u64::from(u32::MAX) + 1).then(|| Self {
            client_title,
            key_version,
            not_after,
            next: AtomicU64::new(first.into()),
            end,
        })
    }

    /// The next counter. It is never allocated again.
    ///
    /// # Errors
    /// All counters are used, or the grant has expired by this machine's clock.
    pub fn allocate(&self) -> Result<u32, CountersEnded> {
        self.allocate_at(now())
    }

    /// [`Self::allocate`] at a stated time.
    ///
    /// # Errors
    /// As [`Self::allocate`].
    pub fn allocate_at(&self, now: UnixMillis) -> Result<u32, CountersEnded> {
        if now >= self.not_after {
            return Err(CountersEnded::Expired);
        }
        // I4: one atomic step, so that two threads never get the same counter.
        let allocated =
            self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next < self.end).then_some(next + 1));
        allocated.ok().and_then(|counter| u32::try_from(counter).ok()).ok_or(CountersEnded::UsedUp)
    }

    /// How many counters are left.
    pub fn remaining(&self) -> u32 {
        u32::try_from(self.end.saturating_sub(self.next.load(Ordering::Relaxed))).unwrap_or(u32::MAX)
    }

    /// The counter that would be allocated next; `None` when all are used.
    pub fn next(&self) -> Option<u32> {
        let next = self.next.load(Ordering::Relaxed);
        if next < self.end { u32::try_from(next).ok() } else { None }
    }

    /// The client system title that must be in every frame with these counters.
    pub const fn client_title(&self) -> SystemTitle {
        self.client_title
    }

    /// The version of the encryption key that the counters belong to.
    pub const fn key_version(&self) -> KeyVersionNumber {
        self.key_version
    }

    /// When the lease ends.
    pub const fn not_after(&self) -> UnixMillis {
        self.not_after
    }
}

/// Why no counter is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CountersEnded {
    /// All are used.
    #[error(
        "all invocation counters of the lease are used: open a new session, and request more counters if this happens often"
    )]
    UsedUp,
    /// The grant has expired.
    #[error("the grant of these invocation counters has expired: open a new session")]
    Expired,
}

/// This machine's time.
pub(crate) fn now() -> UnixMillis {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UnixMillis(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn counters(first: u32, count: u32) -> Option<Counters> {
        Counters::new(
            SystemTitle::parse("4D4D4D0000000001").unwrap(),
            KeyVersionNumber::FIRST,
            first,
            count,
            UnixMillis(1_000),
        )
    }

    #[test]
    fn each_counter_is_dealt_once_up_to_the_last_32_bit_number() {
        let lease = counters(u32::MAX - 1, 2).unwrap();
        assert_eq!((lease.remaining(), lease.next()), (2, Some(u32::MAX - 1)));
        assert_eq!(
            [lease.allocate_at(UnixMillis(0)), lease.allocate_at(UnixMillis(0)), lease.allocate_at(UnixMillis(0))],
            [Ok(u32::MAX - 1), Ok(u32::MAX), Err(CountersEnded::UsedUp)]
        );
        assert_eq!((lease.remaining(), lease.next()), (0, None));
        assert!(counters(u32::MAX, 2).is_none() && counters(7, 0).is_none());
    }

    #[test]
    fn threads_share_a_lease_without_repeating() {
        let lease = counters(100, 40_000).unwrap();
        let allocated = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| std::iter::from_fn(|| lease.allocate_at(UnixMillis(0)).ok()).collect::<Vec<_>>())
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(allocated.len(), 40_000);
        assert_eq!(allocated.iter().collect::<HashSet<_>>().len(), 40_000);
    }

    #[test]
    fn nothing_is_dealt_after_the_grant_has_expired() {
        let lease = counters(1, 2).unwrap();
        assert_eq!(lease.allocate_at(UnixMillis(1_000)), Err(CountersEnded::Expired));
        assert_eq!(lease.allocate_at(UnixMillis(999)), Ok(1));
    }
}
