//! Maintenance beside the writing task: heartbeats, and the removal of requests that can no longer
//! be repeated.

use std::{
    sync::{Weak, atomic::Ordering},
    time::Duration,
};

use super::shared::Shared;
use kms_base::clock::now;

/// Writes heartbeats, and removes expired requests, a bounded number at a time so that acts do not
/// wait. Ends with the committer.
pub(super) async fn maintain(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(PURGE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for tick in 0_u64.. {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.store.purge_requests(now(), PURGED_AT_ONCE).await {
            tracing::warn!(%error, "expired requests could not be removed");
            // A new connection may lead to another database.
            shared.compare.store(true, Ordering::Relaxed);
        }
        if tick.is_multiple_of(HEARTBEAT_TICKS) {
            shared.compare.store(true, Ordering::Relaxed);
        }
        if let Some(writer) = shared.writer().filter(|_| tick.is_multiple_of(HEARTBEAT_TICKS))
            && let Err(error) = shared.store.heartbeat(writer).await
        {
            tracing::warn!(%error, "no heartbeat could be written");
        }
    }
}

const PURGE_EVERY: Duration = Duration::from_secs(1);
/// Single grants do not reach this rate in a second.
const PURGED_AT_ONCE: u32 = 20_000;
/// After how many purges the server writes a heartbeat.
const HEARTBEAT_TICKS: u64 = 10;
