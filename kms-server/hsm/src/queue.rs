//! The bounded queue that feeds a token's worker threads: items of several payers, served in turn.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kms_domain::Turns;

/// The principal that a job is done for. The name only tells payers apart; `None` is the server
/// itself.
pub(crate) type Payer = Option<Arc<str>>;

/// Many senders, many receivers, never longer than its limits.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    limits: QueueLimits,
    not_alone: Duration,
}

/// The limits of a queue's length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    /// Items of all payers.
    pub(crate) all: usize,
    /// Items of one payer. For items of the server itself, only the limit `all` counts.
    pub(crate) of_one: usize,
}

struct State<T> {
    turns: Turns<Payer, T>,
    closed: bool,
    receivers: usize,
    /// Items of each payer that receivers work on.
    taken: HashMap<Payer, usize>,
    /// Receivers that wait, because there is no item, or none that they may take.
    waiting: usize,
    /// The payer of the last item, where the server itself does not count, and when the payer last
    /// changed.
    last: Payer,
    changed: Option<Instant>,
}

/// What a receiver got.
pub(crate) enum Received<'q, T> {
    /// An item. The receiver drops the turn when the work on the item is done.
    Item(T, Turn<'q, T>),
    /// No item came within the given time.
    Idle,
    /// The queue is closed and empty.
    Closed,
}

/// A receiver's work on one item of a payer.
pub(crate) struct Turn<'q, T> {
    queue: &'q Queue<T>,
    payer: Payer,
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        if let Some(taken) = state.taken.get_mut(&self.payer) {
            *taken -= 1;
            if *taken == 0 {
                state.taken.remove(&self.payer);
            }
        }
        // No receiver is woken: the one that drops the turn calls `pop` next, and takes its own
        // place.
    }
}

/// Why an item was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// This number of items waits, of all payers, or the queue is closed.
    All(usize),
    /// This number of items of the payer waits.
    OfOne(usize),
}

impl<T> Queue<T> {
    pub(crate) fn new(limits: QueueLimits) -> Self {
        let limits = QueueLimits { all: limits.all.max(1), of_one: limits.of_one.max(1) };
        let state = State {
            turns: Turns::new(),
            closed: false,
            receivers: 1,
            taken: HashMap::new(),
            waiting: 0,
            last: None,
            changed: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), limits, not_alone: NOT_ALONE }
    }

    /// Sets the number of receivers that take items.
    pub(crate) fn set_receivers(&self, receivers: usize) {
        self.state().receivers = receivers;
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an item of this cost.
    pub(crate) fn push(&self, payer: &Payer, cost: u64, item: T) -> Result<(), Full> {
        let mut state = self.state();
        if state.closed || state.turns.len() >= self.limits.all {
            return Err(Full::All(self.limits.all));
        }
        if payer.is_some() && state.turns.waiting(payer).items >= self.limits.of_one {
            return Err(Full::OfOne(self.limits.of_one));
        }
        if payer.is_some() && *payer != state.last {
            state.changed = state.last.is_some().then(Instant::now);
            state.last.clone_from(payer);
        }
        state.turns.push(payer.clone(), cost, item);
        // To wake a receiver for an item that it may not take would cost two thread switches.
        let fits = state.fits(payer, self.not_alone);
        drop(state);
        if fits {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// The next item in turn, after waiting for one at most `idle`. A receiver that drops a turn
    /// must call this again: no other receiver is woken for its place.
    pub(crate) fn pop(&self, idle: Duration) -> Received<'_, T> {
        let mut state = self.state();
        let mut timed_out = false;
        loop {
            if let Some((payer, item)) = state.next(self.not_alone) {
                *state.taken.entry(payer.clone()).or_default() += 1;
                // No receiver was woken for an item that had no place when it came. It may have one
                // now: wake another receiver for it.
                let more = state.waiting > 0 && state.any_fits(self.not_alone);
                drop(state);
                if more {
                    self.changed.notify_one();
                }
                return Received::Item(item, Turn { queue: self, payer });
            }
            if state.closed && state.turns.is_empty() {
                return Received::Closed;
            }
            if timed_out {
                return Received::Idle;
            }
            state.waiting += 1;
            let (next, waited) = self.changed.wait_timeout(state, idle).unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.waiting -= 1;
            timed_out = waited.timed_out();
        }
    }

    /// Refuses new items. Receivers still get the items that wait.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }
}

impl<T> State<T> {
    /// The next item in turn. While several payers send items, none of them may have all receivers:
    /// one receiver stays free for the others. Otherwise they would wait for a part of a batch.
    fn next(&mut self, not_alone: Duration) -> Option<(Payer, T)> {
        let alone = self.is_alone(not_alone);
        let (taken, receivers) = (&self.taken, self.receivers);
        let fits = |payer: &Payer, _| alone || has_place(taken, payer, receivers);
        self.turns.pop_where(fits).map(|(payer, _, item)| (payer, item))
    }

    /// Whether [`Self::next`] would take an item of this payer.
    fn fits(&self, payer: &Payer, not_alone: Duration) -> bool {
        self.is_alone(not_alone) || has_place(&self.taken, payer, self.receivers)
    }

    /// Whether [`Self::next`] would take an item.
    fn any_fits(&self, not_alone: Duration) -> bool {
        let alone = self.is_alone(not_alone);
        self.turns.any_where(|payer, _| alone || has_place(&self.taken, payer, self.receivers))
    }

    /// Whether a payer may have all receivers. It may when the queue is closed: no other payer can
    /// come.
    fn is_alone(&self, not_alone: Duration) -> bool {
        self.closed || self.receivers < 2 || self.changed.is_none_or(|changed| changed.elapsed() > not_alone)
    }
}

/// Whether a receiver stays free for others when one more works for this payer.
fn has_place(taken: &HashMap<Payer, usize>, payer: &Payer, receivers: usize) -> bool {
    taken.get(payer).copied().unwrap_or_default() < receivers - 1
}

/// How long a payer counts as not alone after an item of another payer.
const NOT_ALONE: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_takes_nothing_more() {
        let queue = Queue::new(QueueLimits { all: 2, of_one: 2 });
        assert_eq!(
            (queue.push(&None, 1, 1), queue.push(&None, 1, 2), queue.push(&None, 1, 3)),
            (Ok(()), Ok(()), Err(Full::All(2)))
        );
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(1, _)));
        assert_eq!(queue.push(&None, 1, 3), Ok(()));
        queue.close();
        assert_eq!(queue.push(&None, 1, 4), Err(Full::All(2)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(2, _)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(3, _)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Closed));
    }

    #[test]
    fn one_payer_leaves_room_for_others() {
        let (queue, flood, neighbour) =
            (Queue::new(QueueLimits { all: 4, of_one: 2 }), Some("flood".into()), Some("neighbour".into()));
        assert_eq!(
            (queue.push(&flood, 500, 1), queue.push(&flood, 500, 2), queue.push(&flood, 1, 3)),
            (Ok(()), Ok(()), Err(Full::OfOne(2)))
        );
        assert_eq!(queue.push(&neighbour, 1, 4), Ok(()));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(4, _)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(1, _)));
    }

    /// Nobody sleeps for ever beside items, although not every item wakes somebody.
    #[test]
    fn every_item_is_taken_and_nobody_has_all_receivers() {
        const RECEIVERS: usize = 3;
        for not_alone in [Duration::ZERO, Duration::from_millis(1), Duration::MAX] {
            let mut queue = Queue::new(QueueLimits { all: 10_000, of_one: 10_000 });
            queue.not_alone = not_alone;
            queue.set_receivers(RECEIVERS);
            let (done, of_one) = (Mutex::new(Vec::new()), Mutex::new(HashMap::<u8, (usize, usize)>::new()));
            std::thread::scope(|scope| {
                for _ in 0..RECEIVERS {
                    scope.spawn(|| {
                        // Nobody is woken by time alone.
                        while let Received::Item((payer, item), turn) = queue.pop(Duration::from_secs(60)) {
                            let now = |step: isize| {
                                let mut of_one = of_one.lock().unwrap();
                                let (at_once, most) = of_one.entry(payer).or_default();
                                *at_once = at_once.saturating_add_signed(step);
                                *most = (*most).max(*at_once);
                            };
                            now(1);
                            std::thread::yield_now();
                            now(-1);
                            drop(turn);
                            done.lock().unwrap().push((payer, item));
                        }
                    });
                }
                let payers = [Some("flood".into()), Some("neighbour".into())];
                for item in 0..3_000 {
                    let payer = u8::from(item % 7 == 0);
                    queue.push(&payers[usize::from(payer)], 1, (payer, item)).unwrap();
                }
                while done.lock().unwrap().len() < 3_000 {
                    std::thread::yield_now();
                }
                queue.close();
            });
            if not_alone == Duration::MAX {
                assert!(of_one.lock().unwrap().values().all(|(_, most)| *most < RECEIVERS), "one had all receivers");
            }
        }
    }

    #[test]
    fn a_receiver_is_free_for_others() {
        let (mut queue, flood, neighbour) =
            (Queue::new(QueueLimits { all: 9, of_one: 9 }), Some("flood".into()), Some("neighbour".into()));
        queue.not_alone = Duration::MAX;
        queue.set_receivers(2);
        (1..4).for_each(|item| queue.push(&flood, 500, item).unwrap());
        // One that is alone has all.
        let (Received::Item(1, first), Received::Item(2, second)) =
            (queue.pop(Duration::ZERO), queue.pop(Duration::ZERO))
        else {
            panic!("not alone")
        };
        drop(first);
        queue.push(&neighbour, 1, 4).unwrap();
        let Received::Item(4, small) = queue.pop(Duration::ZERO) else { panic!("the neighbour waits") };
        drop(small);
        // One is at work still.
        assert!(matches!(queue.pop(Duration::ZERO), Received::Idle));
        drop(second);
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(3, _)));
        queue.close();
        assert!(matches!(queue.pop(Duration::ZERO), Received::Closed));
    }
}
