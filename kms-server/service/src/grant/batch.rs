//! The bounds on batches of one principal: the meters of all its unfinished calls, and the chunks
//! that run at once. A principal with many batches waits only for its own.

use async_recursion::async_recursion as boxed;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kms_domain::PrincipalId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;

/// The unfinished batches of all principals.
#[derive(Clone, Debug, Default)]
pub(super) struct Batches(Arc<Mutex<HashMap<PrincipalId, Lane>>>);

#[derive(Debug)]
struct Lane {
    /// Meters of the calls that are not answered yet.
    meters: usize,
    calls: usize,
    chunks: Arc<Semaphore>,
}

/// An unfinished batch, until it is dropped.
#[derive(Debug)]
pub struct Batch {
    batches: Batches,
    principal: PrincipalId,
    meters: usize,
    chunks: Arc<Semaphore>,
}

impl Batches {
    /// Begins a batch of this many meters.
    ///
    /// # Errors
    /// The principal's unanswered calls name too many already. A single call is always taken.
    pub(super) fn begin(&self, principal: &PrincipalId, meters: usize, limits: &Limits) -> Result<Batch, ServiceError> {
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lanes.get(principal).map_or(0, |lane| lane.meters);
        if known > 0 && known.saturating_add(meters) > limits.number(Bound::BatchMetersPerPrincipal) {
            let what = format!("the unfinished batches of {principal} name {known} meters; wait for their answers");
            return Err(Bound::BatchMetersPerPrincipal.met(limits, &what, RETRY_AFTER));
        }
        let lane = lanes.entry(principal.clone()).or_insert_with(|| Lane {
            meters: 0,
            calls: 0,
            chunks: Arc::new(Semaphore::new(limits.number(Bound::BatchChunksPerPrincipal))),
        });
        lane.meters += meters;
        lane.calls += 1;
        Ok(Batch { batches: self.clone(), principal: principal.clone(), meters, chunks: lane.chunks.clone() })
    }
}

impl Batch {
    /// Waits until a chunk of the principal's batches may run, first come, first served.
    #[boxed]
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        // Nobody closes the semaphore.
        self.chunks.clone().acquire_owned().await.ok()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let mut lanes = self.batches.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get_mut(&self.principal) {
            lane.meters = lane.meters.saturating_sub(self.meters);
            lane.calls = lane.calls.saturating_sub(1);
            if lane.calls == 0 {
                lanes.remove(&self.principal);
            }
        }
    }
}

/// After this time a caller whose batches name too many meters may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_principal_has_its_bounds_and_no_share_in_those_of_others() {
        let (batches, limits) = (Batches::default(), Limits::default());
        let [flood, neighbour] =
            ["north", "south"].map(|name| PrincipalId::parse(&format!("urn:meterkms:dev:head-end:{name}")).unwrap());
        let mut calls: Vec<Batch> = (0..100).map(|_| batches.begin(&flood, 10_000, &limits).unwrap()).collect();
        let refused = batches.begin(&flood, 1, &limits).unwrap_err();
        assert!(
            matches!(&refused, ServiceError::ResourceExhausted { reason, .. } if reason.contains("batch_meters_per_principal")),
            "{refused}"
        );
        let mut turns = Vec::new();
        for call in calls.iter().take(limits.number(Bound::BatchChunksPerPrincipal)) {
            turns.push(call.turn().await.unwrap());
        }
        let mut next = Box::pin(calls[9].turn());
        assert!(futures::poll!(next.as_mut()).is_pending(), "it waits for itself");
        assert!(batches.begin(&neighbour, 10_000, &limits).unwrap().turn().await.is_some());
        turns.pop();
        assert!(futures::poll!(next.as_mut()).is_ready());
        drop(next);
        calls.pop();
        drop(batches.begin(&flood, 10_000, &limits).unwrap());
        drop((calls, turns));
        assert!(batches.0.lock().unwrap().is_empty());
    }
}
