//! The bounded queue that feeds a token's worker threads: items of several payers, served in turn.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use kms_domain::Turns;

/// For whom a job is done: a name that only tells one from the other; none is the server itself.
pub(crate) type Payer = Option<Arc<str>>;

/// Many senders, many receivers, never longer than its limits.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    limits: QueueLimits,
}

/// How long a queue may become.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    /// Items of all payers.
    pub(crate) all: usize,
    /// Items of one payer; the server's own have no limit but the other one.
    pub(crate) of_one: usize,
}

struct State<T> {
    turns: Turns<Payer, T>,
    closed: bool,
}

/// What a receiver got.
pub(crate) enum Received<T> {
    Item(T),
    /// Nothing came for the time given.
    Idle,
    /// The queue is closed and empty.
    Closed,
}

/// Why an item was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// So many items wait, of all payers; or the queue is closed.
    All(usize),
    /// So many items of the payer wait.
    OfOne(usize),
}

impl<T> Queue<T> {
    pub(crate) fn new(limits: QueueLimits) -> Self {
        let limits = QueueLimits { all: limits.all.max(1), of_one: limits.of_one.max(1) };
        Self { state: Mutex::new(State { turns: Turns::new(), closed: false }), changed: Condvar::new(), limits }
    }

    /// Adds an item of this cost, or says why not.
    pub(crate) fn push(&self, payer: &Payer, cost: u64, item: T) -> Result<(), Full> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed || state.turns.len() >= self.limits.all {
            return Err(Full::All(self.limits.all));
        }
        if payer.is_some() && state.turns.waiting(payer).items >= self.limits.of_one {
            return Err(Full::OfOne(self.limits.of_one));
        }
        state.turns.push(payer.clone(), cost, item);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// The item whose turn it is, waiting for one at most `idle`.
    pub(crate) fn pop(&self, idle: Duration) -> Received<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some((_, _, item)) = state.turns.pop() {
                return Received::Item(item);
            }
            if state.closed {
                return Received::Closed;
            }
            let (next, waited) = self.changed.wait_timeout(state, idle).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.turns.is_empty() && !state.closed {
                return Received::Idle;
            }
        }
    }

    /// Takes no more items; receivers get what is left.
    pub(crate) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_takes_nothing_more() {
        let queue = Queue::new(QueueLimits { all: 2, of_one: 2 });
        assert_eq!((queue.push(&None, 1, 1), queue.push(&None, 1, 2), queue.push(&None, 1, 3)), (Ok(()), Ok(()), Err(Full::All(2))));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(1)));
        assert_eq!(queue.push(&None, 1, 3), Ok(()));
        queue.close();
        assert_eq!(queue.push(&None, 1, 4), Err(Full::All(2)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(2)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(3)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Closed));
    }

    #[test]
    fn one_payer_leaves_room_for_others() {
        let (queue, flood, neighbour) = (Queue::new(QueueLimits { all: 4, of_one: 2 }), Some("flood".into()), Some("neighbour".into()));
        assert_eq!((queue.push(&flood, 500, 1), queue.push(&flood, 500, 2), queue.push(&flood, 1, 3)), (Ok(()), Ok(()), Err(Full::OfOne(2))));
        assert_eq!(queue.push(&neighbour, 1, 4), Ok(()));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(4)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(1)));
    }
}
