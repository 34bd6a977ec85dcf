//! Log lines that are not repeated.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Keeps a repeated message from filling the log.
#[derive(Debug, Default)]
pub struct Repetition {
    last: Option<(String, Instant)>,
}

impl Repetition {
    /// Whether to log `message`: it differs from the last one, or the last one was logged ten
    /// minutes ago.
    pub fn is_news(&mut self, message: &str) -> bool {
        if self.last.as_ref().is_some_and(|(last, at)| last == message && at.elapsed() < REMINDER) {
            return false;
        }
        self.last = Some((message.to_owned(), Instant::now()));
        true
    }
}

/// Keeps lines that strangers cause from filling the log: a line is written at intervals, with the
/// number of those that were not.
#[derive(Debug, Default)]
pub struct Seldom {
    state: Mutex<(Option<Instant>, u64)>,
}

impl Seldom {
    /// Writes the line, with the number of lines since the last one that were not written; or only
    /// counts it.
    pub fn say(&self, line: impl FnOnce(u64)) {
        let unsaid = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let (last, unsaid) = *state;
            if last.is_some_and(|last| last.elapsed() < SELDOM) {
                state.1 = unsaid.saturating_add(1);
                return;
            }
            *state = (Some(Instant::now()), 0);
            unsaid
        };
        line(unsaid);
    }
}

const REMINDER: Duration = Duration::from_mins(10);
/// The shortest interval between two lines that strangers cause.
const SELDOM: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_message_is_told_once_until_it_changes() {
        let mut repetition = Repetition::default();
        assert_eq!(
            ["away", "away", "another reason", "another reason", "away"].map(|message| repetition.is_news(message)),
            [true, false, true, false, true]
        );
    }
}
