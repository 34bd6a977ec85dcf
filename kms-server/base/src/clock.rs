//! The wall clock of this process: the one place that asks the operating system for the time of
//! day.

use std::time::{SystemTime, UNIX_EPOCH};

use kms_domain::UnixMillis;

/// Now, by the wall clock. Somebody may set this clock. Code that must not depend on that uses
/// [`std::time::Instant`] or the database's clock. The writer of the audit log records jumps.
pub fn now() -> UnixMillis {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let millis = i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX);
    let millis = millis.saturating_add(testing::AHEAD_MS.load(std::sync::atomic::Ordering::Relaxed));
    UnixMillis(millis)
}

/// Only tests set the clock, each in its own process.
#[doc(hidden)]
pub mod testing {
    use std::sync::atomic::{AtomicI64, Ordering};

    pub(super) static AHEAD_MS: AtomicI64 = AtomicI64::new(0);

    /// Sets the clock this far ahead of the true time; behind it, if negative.
    pub fn set_ahead(millis: i64) {
        AHEAD_MS.store(millis, Ordering::SeqCst);
    }

    /// Sets the clock further ahead by this much.
    pub fn advance(millis: i64) {
        AHEAD_MS.fetch_add(millis, Ordering::SeqCst);
    }
}
