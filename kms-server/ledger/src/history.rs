//! Restored mode (I4): finds out that the database is older than what was served from it, and
//! raises all counters before any is allocated.
//!
//! One of three signs is enough: the PostgreSQL cluster is on another timeline than the island's
//! row names; the log lacks a record that the watermark file of this server names; an operator says
//! that the database was restored. The island's row then gets a higher [`CounterJump`], in one act
//! with its record. Nothing else is written: each counter adds the jump at its next reservation.

use std::num::NonZeroU32;

use kms_domain::{CounterJump, DatabaseHistory, Island, IslandName, Timeline};
use kms_proto::v1::{SecurityEvent, audit_record::Event};

use super::{decision::Decision, view::View};
use kms_base::error::ServiceError;

/// What a comparison of the database with the memory of this server has found.
#[derive(Clone, Debug)]
pub(super) struct Comparison {
    /// The timeline that the database is on now.
    pub(super) timeline: Option<Timeline>,
    /// The highest jump that is remembered outside the database.
    pub(super) remembered: CounterJump,
    /// Why the database counts as restored, besides the timeline.
    pub(super) reasons: Vec<String>,
    /// By how much counters are raised in that case.
    pub(super) counter_jump: NonZeroU32,
}

impl Comparison {
    /// What the island's row should say, and the reason if that is a restore.
    pub(super) fn judge(&self, known: DatabaseHistory) -> (DatabaseHistory, Option<String>) {
        let mut reasons = self.reasons.clone();
        if let (Some(before), Some(now)) = (known.timeline, self.timeline)
            && before != now
        {
            reasons.push(format!("the database is on {now}, and was on {before}"));
        }
        if self.remembered > known.jump {
            reasons.push("the database lacks the record of an earlier restore".to_owned());
        }
        if reasons.is_empty() {
            return (DatabaseHistory { timeline: self.timeline.or(known.timeline), ..known }, None);
        }
        (known.restored(self.timeline, self.remembered, self.counter_jump.get()), Some(reasons.join("; ")))
    }

    /// Brings the island's row up to date, with a record (I2).
    pub(super) fn settle(
        &self,
        view: &mut View<'_, '_>,
        island: &IslandName,
    ) -> Result<Decision<DatabaseHistory>, ServiceError> {
        let row = view
            .island(island)?
            .ok_or_else(|| ServiceError::Internal("the island's row is missing (I5)".to_owned()))?;
        // Judged again: another server may have written the row meanwhile.
        let (history, restored) = self.judge(row.history);
        if history == row.history {
            return Ok(Decision::unchanged(history));
        }
        let (kind, detail) = match (restored, history.timeline) {
            (Some(reason), _) => {
                let raised = history.jump.beyond(row.history.jump);
                tracing::error!(
                    reason,
                    raised,
                    "the database was restored or failed over: all invocation counters are raised (I4)"
                );
                ("database-restored", format!("{reason}; all invocation counters are raised by {raised} (I4)"))
            }
            (None, Some(timeline)) => {
                ("database-timeline", format!("the database is on {timeline}, which is noted for the first time"))
            }
            (None, None) => ("database-timeline", "the database has no timeline".to_owned()),
        };
        let event = SecurityEvent { kind: kind.to_owned(), detail, meter: Default::default() };
        let entry = view.append(Event::SecurityEvent(event));
        view.put_island(Island { history, ..(*row).clone() })?;
        Ok(Decision::recorded(entry, history))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison(timeline: Option<u32>, remembered: u64, reasons: &[&str]) -> Comparison {
        Comparison {
            timeline: timeline.map(at),
            remembered: CounterJump::new(remembered),
            reasons: reasons.iter().map(ToString::to_string).collect(),
            counter_jump: NonZeroU32::new(100).unwrap(),
        }
    }

    const fn at(number: u32) -> Timeline {
        Timeline { cluster: 7, number }
    }

    #[test]
    fn another_timeline_raises_the_counters_once() {
        let known = DatabaseHistory { timeline: Some(at(1)), ..DatabaseHistory::default() };
        assert_eq!(comparison(Some(1), 0, &[]).judge(known), (known, None));
        let (raised, reason) = comparison(Some(2), 0, &[]).judge(known);
        assert_eq!(raised, DatabaseHistory { timeline: Some(at(2)), restores: 1, jump: CounterJump::new(100) });
        assert!(reason.unwrap().contains("timeline 2"));
        assert_eq!(comparison(Some(2), 0, &[]).judge(raised), (raised, None));
        let earlier = comparison(Some(1), 0, &[]).judge(raised).0;
        assert_eq!(earlier.jump, CounterJump::new(200), "a timeline that goes backwards is a restore as well");
    }

    #[test]
    fn a_timeline_that_was_not_known_is_noted_only() {
        let (noted, reason) = comparison(Some(3), 0, &[]).judge(DatabaseHistory::default());
        assert_eq!((noted.timeline, noted.jump, reason), (Some(at(3)), CounterJump::NONE, None));
    }

    #[test]
    fn an_earlier_jump_that_the_database_lost_is_not_used_again() {
        let (raised, _) = comparison(None, 300, &[]).judge(DatabaseHistory::default());
        assert_eq!(raised.jump, CounterJump::new(400));
        let (raised, reason) = comparison(None, 300, &["an operator said so"]).judge(raised);
        assert_eq!(
            (raised.jump, raised.restores, reason.as_deref()),
            (CounterJump::new(500), 2, Some("an operator said so"))
        );
    }
}
