//! Acts that wait for the writer: those of each principal in a lane of their own, served in turn by
//! what they cost, small before large.
//!
//! The acts of one principal stay in their order: a replay comes after what it repeats, and leases
//! follow each other as they were asked for. One that floods waits for itself: another one's act
//! waits for the transaction that is under way, and comes into the next.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kms_domain::{PrincipalId, Turns};
use tokio::sync::Notify;

use super::{
    bounds::{MOST_ACTS, MOST_WORK, MOST_WORK_OF_ONE, NOT_ALONE, RETRY_AFTER, SMALL},
    committer::Queued,
};
use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;
use kms_base::metrics;

/// Whose lane; none is the server's own.
type Payer = Option<PrincipalId>;

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    limits: Arc<Limits>,
}

struct State {
    turns: Turns<Payer, Box<dyn Queued>>,
    closed: bool,
    /// Who sent the last act, the server itself apart.
    last: Payer,
    /// When it was another one than the time before.
    changed: Option<Instant>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end that acts go into. The queue ends when it is dropped.
pub(super) struct Sender(Arc<Shared>);

/// The writer's end. When it is dropped, what waits is given up.
pub(super) struct Receiver(Arc<Shared>);

/// A queue.
pub(super) fn queue(limits: Arc<Limits>) -> (Sender, Receiver) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State { turns: Turns::new(), closed: false, last: None, changed: None }),
        changed: Notify::new(),
        limits,
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl Sender {
    /// Puts an act behind those of its principal.
    ///
    /// # Errors
    /// A bound is met, which the refusal names; or the server is stopping.
    pub(super) fn push(&self, act: Box<dyn Queued>) -> Result<(), ServiceError> {
        let (payer, cost, limits) = (act.payer(), act.cost(), &*self.0.limits);
        let mut state = self.0.state();
        if state.closed {
            return Err(ServiceError::unavailable("the server is stopping"));
        }
        if let Some(principal) = &payer {
            let refuse = |bound: Bound, what: &str| Err(bound.met(limits, what, RETRY_AFTER));
            if state.turns.len() >= limits.number(Bound::ActsWaiting) {
                return refuse(
                    Bound::ActsWaiting,
                    "the server has as many acts waiting as it takes; the database may be slow",
                );
            }
            let waiting = state.turns.waiting(&payer);
            if waiting.items >= limits.number(Bound::ActsWaitingPerPrincipal) {
                return refuse(
                    Bound::ActsWaitingPerPrincipal,
                    &format!("{principal} sends more calls than the writer takes; send fewer at a time"),
                );
            }
            if waiting.items > 0 && waiting.work.saturating_add(cost) > limits.meters_in_flight_per_principal {
                let what = format!(
                    "{principal} has acts waiting that name {} meters, keys and tasks; send fewer or smaller calls at a time",
                    waiting.work
                );
                return refuse(Bound::MetersInFlightPerPrincipal, &what);
            }
        }
        if payer.is_some() && payer != state.last {
            state.changed = state.last.is_some().then(Instant::now);
            state.last.clone_from(&payer);
        }
        state.turns.push(payer, cost, act);
        drop(state);
        metrics().act_queued();
        self.0.changed.notify_one();
        Ok(())
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_one();
    }
}

impl Receiver {
    /// Waits until an act waits: true; or the queue has ended: false.
    pub(super) async fn ready(&self) -> bool {
        loop {
            {
                let state = self.0.state();
                if !state.turns.is_empty() {
                    return true;
                }
                if state.closed {
                    return false;
                }
            }
            self.0.changed.notified().await;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.state().turns.is_empty()
    }

    /// What one transaction takes of the acts that wait.
    pub(super) fn take(&self) -> Vec<Box<dyn Queued>> {
        let mut state = self.0.state();
        let mut taken: Vec<Box<dyn Queued>> = Vec::new();
        let mut of_one: HashMap<Payer, u64> = HashMap::new();
        let (mut all, mut largest) = (0, u64::MAX);
        let alone = state.changed.is_none_or(|changed| changed.elapsed() > NOT_ALONE);
        let most_of_one = if alone { MOST_WORK } else { MOST_WORK_OF_ONE };
        while taken.len() < MOST_ACTS {
            let fits = |payer: &Payer, cost: u64| {
                let work = of_one.get(payer).copied().unwrap_or_default();
                taken.is_empty() || (cost <= largest && all + cost <= MOST_WORK && work + cost <= most_of_one)
            };
            let Some((payer, cost, act)) = state.turns.pop_where(fits) else { break };
            if taken.is_empty() && cost <= SMALL {
                largest = SMALL;
            }
            all += cost;
            *of_one.entry(payer).or_default() += cost;
            taken.push(act);
        }
        drop(state);
        metrics().acts_taken(taken.len());
        taken
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        // Dropping an act answers it.
        let given_up: Vec<_> = state.turns.drain().collect();
        drop(state);
        metrics().acts_taken(given_up.len());
    }
}
