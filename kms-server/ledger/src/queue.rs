//! The queue of acts that wait for the writer. Each principal has its own lane; lanes are served in
//! turn by the cost of their acts, small acts before large ones.
//!
//! The acts of one principal stay in order: a replay comes after the request that it repeats, and
//! leases follow each other in the order of their requests. A principal that floods the server
//! waits for its own acts only: the act of another principal waits for the current transaction, and
//! enters the next one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kms_domain::{PrincipalId, Turns};
use tokio::sync::Notify;

use super::{
    queued::Queued,
    shares::{MOST_ACTS, MOST_WORK, MOST_WORK_OF_ONE, NOT_ALONE, RETRY_AFTER, SMALL},
};
use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;
use kms_base::metrics;

/// The principal of a lane. None: the server's own lane.
type Payer = Option<PrincipalId>;

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    limits: Arc<Limits>,
}

struct State {
    turns: Turns<Payer, Box<dyn Queued>>,
    closed: bool,
    /// The principal of the last act. Acts of the server itself do not count.
    last: Payer,
    /// When the last act came from another principal than the act before it.
    changed: Option<Instant>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending end. The queue ends when it is dropped.
pub(super) struct Sender(Arc<Shared>);

/// The writer's end. When it is dropped, the acts that wait are dropped too, which answers them.
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
    /// Adds an act to the lane of its principal.
    ///
    /// # Errors
    /// The act would exceed a bound, which the refusal names; or the server is stopping, or its
    /// writing task has failed.
    pub(super) fn push(&self, act: Box<dyn Queued>) -> Result<(), ServiceError> {
        let (payer, cost, limits) = (act.payer(), act.cost(), &*self.0.limits);
        let mut state = self.0.state();
        if state.closed {
            return Err(ServiceError::unavailable(ENDED));
        }
        if let Some(principal) = &payer {
            let refuse = |bound: Bound, what: &str| Err(bound.met(limits, what, RETRY_AFTER));
            if state.turns.len() >= limits.number(Bound::ActsWaiting) {
                return refuse(
                    Bound::ActsWaiting,
                    &format!("the request queue is full ({} waiting); the database may be slow", state.turns.len()),
                );
            }
            let waiting = state.turns.waiting(&payer);
            if waiting.items >= limits.number(Bound::ActsWaitingPerPrincipal) {
                return refuse(
                    Bound::ActsWaitingPerPrincipal,
                    &format!("{principal} has {} requests waiting; send fewer at a time", waiting.items),
                );
            }
            if waiting.items > 0 && waiting.work.saturating_add(cost) > limits.meters_in_flight_per_principal {
                let what = format!(
                    "{principal} has requests waiting that name {} meters, keys and tasks; send fewer or smaller requests at a time",
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
    /// Waits for an act. True: one waits. False: the queue has ended.
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

    /// Takes the acts of the next transaction.
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
        let dropped: Vec<_> = state.turns.drain().collect();
        drop(state);
        metrics().acts_taken(dropped.len());
    }
}

/// Why no act is taken any more.
pub(super) const ENDED: &str = "the server is stopping, or its writing task has failed, which its log says";
