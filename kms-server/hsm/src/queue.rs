//! The bounded queue that feeds a token's worker threads.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Many senders, many receivers, never longer than its limit.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    limit: usize,
}

struct State<T> {
    items: VecDeque<T>,
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

impl<T> Queue<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { state: Mutex::new(State { items: VecDeque::new(), closed: false }), changed: Condvar::new(), limit: limit.max(1) }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Adds an item, or gives it back if the queue is full or closed.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed || state.items.len() >= self.limit {
            return Err(item);
        }
        state.items.push_back(item);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// The next item, waiting for it at most `idle`.
    pub(crate) fn pop(&self, idle: Duration) -> Received<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(item) = state.items.pop_front() {
                return Received::Item(item);
            }
            if state.closed {
                return Received::Closed;
            }
            let (next, waited) = self.changed.wait_timeout(state, idle).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if waited.timed_out() && state.items.is_empty() && !state.closed {
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
    fn a_full_queue_gives_the_item_back() {
        let queue = Queue::new(2);
        assert_eq!((queue.push(1), queue.push(2), queue.push(3)), (Ok(()), Ok(()), Err(3)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(1)));
        assert_eq!(queue.push(3), Ok(()));
        queue.close();
        assert_eq!(queue.push(4), Err(4));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(2)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Item(3)));
        assert!(matches!(queue.pop(Duration::ZERO), Received::Closed));
    }
}
