//! Puts jumps of the wall clock on the record: times of records, and decisions by time, are as good
//! as the clock was.
//!
//! The wall clock is compared with three others: with the monotonic clock of this process, which
//! nobody can set; at start with the newest record and heartbeat; and with the database's clock,
//! which all servers of an island share. Records keep the order of the log, whatever their times.

use std::time::{Duration, Instant};

use kms_domain::UnixMillis;
use kms_proto::v1::{AuditRecord, ClockJumped, audit_record::Event};
use kms_store::StoreError;

use kms_base::metrics;

/// Watches the wall clock for the writer of the log.
pub(super) struct ClockWatch {
    /// One moment by both clocks. It is renewed each hour, and after a jump.
    anchor: (UnixMillis, Instant),
    /// The time of the last record.
    last: Option<UnixMillis>,
    /// How far this clock was ahead of the database's at the last comparison that was reported.
    ahead_of_database: i64,
    compared_with_log: bool,
    /// Not written yet.
    news: Vec<ClockJumped>,
}

impl ClockWatch {
    pub(super) const fn new(now: UnixMillis, at: Instant) -> Self {
        Self { anchor: (now, at), last: None, ahead_of_database: 0, compared_with_log: false, news: Vec::new() }
    }

    /// Compares the clock with the time that has passed. Returns the time for records made now: the
    /// clock's time, but not a little before the last record. So the times of a chain go backwards
    /// only after a record that says so.
    pub(super) fn look(&mut self, now: UnixMillis, at: Instant) -> UnixMillis {
        let (anchor, since) = self.anchor;
        let passed = at.saturating_duration_since(since);
        let expected = anchor.after(millis(passed));
        let jumped = apart(now, expected) > TOLERANCE_MS;
        if jumped {
            self.tell("process", expected, now);
        }
        if jumped || passed > ANCHORED_FOR {
            self.anchor = (now, at);
        }
        match self.last {
            Some(last) if now < last && apart(now, last) <= TOLERANCE_MS => last,
            _ => now,
        }
    }

    /// Compares the clock, once, with the last record and the newest heartbeat in the database.
    pub(super) async fn compare_with_log<F>(
        &mut self,
        now: UnixMillis,
        signs: impl FnOnce() -> F,
    ) -> Result<(), StoreError>
    where
        F: Future<Output = Result<Option<(UnixMillis, UnixMillis)>, StoreError>>,
    {
        if self.compared_with_log {
            return Ok(());
        }
        if let Some((record, sign)) = signs().await? {
            if now < record && apart(now, record) > CLOCKS_APART_MS {
                self.tell("log", record, now);
            } else if now > sign && apart(now, sign) > SILENT_MS {
                self.tell("log", sign, now);
            }
        }
        self.compared_with_log = true;
        Ok(())
    }

    /// Compares the clock with the database's.
    pub(super) fn compare_with_database(&mut self, now: UnixMillis, database: UnixMillis) {
        let ahead = now.0.saturating_sub(database.0);
        if ahead.abs_diff(self.ahead_of_database) > CLOCKS_APART_MS.unsigned_abs() {
            self.ahead_of_database = ahead;
            // If the clock is within bounds again, the jump that brought it there was reported.
            if ahead.abs() > CLOCKS_APART_MS {
                self.tell("database", database, now);
            }
        }
    }

    pub(super) fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// The records of jumps that are not written yet.
    pub(super) fn news(&self) -> impl Iterator<Item = AuditRecord> {
        self.news
            .iter()
            .map(|jump| AuditRecord { event: Some(Event::ClockJumped(jump.clone())), ..AuditRecord::default() })
    }

    /// Must be called when the records of [`Self::news`] are durable, with the time of these
    /// records.
    pub(super) fn written(&mut self, now: UnixMillis) {
        metrics().refused(0, self.news.len() as u64);
        self.news.clear();
        self.last = Some(now);
    }

    fn tell(&mut self, compared_with: &str, expected: UnixMillis, observed: UnixMillis) {
        tracing::error!(compared_with, expected_ms = expected.0, observed_ms = observed.0, "the clock jumped");
        // If many jumps cannot be written, the last one replaces the one before it.
        self.news.truncate(MOST_NEWS - 1);
        self.news.push(ClockJumped {
            compared_with: compared_with.to_owned(),
            expected_ms: expected.0,
            observed_ms: observed.0,
        });
    }
}

fn apart(one: UnixMillis, other: UnixMillis) -> i64 {
    one.0.saturating_sub(other.0).saturating_abs()
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// More than NTP slews a clock in an hour (500 ppm: 1.8 s), and than a leap second.
const TOLERANCE_MS: i64 = 5_000;
/// How long one moment is kept for comparison, so that small steps are seen when they add up.
const ANCHORED_FOR: Duration = Duration::from_hours(1);
/// How far the clocks of servers and databases may differ.
const CLOCKS_APART_MS: i64 = 60_000;
/// A week: after that, either no server ran or the clock was set ahead.
const SILENT_MS: i64 = 7 * 86_400_000;
/// The most jumps that wait to be written while the database is away.
const MOST_NEWS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    fn jumps(watch: &ClockWatch) -> Vec<(&str, i64)> {
        watch.news.iter().map(|jump| (jump.compared_with.as_str(), jump.observed_ms - jump.expected_ms)).collect()
    }

    #[test]
    fn jumps_either_way_are_told_and_slewing_is_not() {
        let start = Instant::now();
        let mut watch = ClockWatch::new(NOW, start);
        for second in 1..20_000_u32 {
            // 400 ppm too fast.
            let wall = NOW.after(i64::from(second) * 1_000 + i64::from(second) * 4 / 10);
            watch.look(wall, start + SECOND * second);
        }
        assert_eq!(jumps(&watch), []);

        let mut watch = ClockWatch::new(NOW, start);
        watch.look(NOW.after(86_401_000), start + SECOND);
        watch.look(NOW.after(86_402_000), start + SECOND * 2);
        watch.look(NOW.after(3_000), start + SECOND * 3);
        assert_eq!(jumps(&watch), [("process", 86_400_000), ("process", -86_400_000)]);

        // Steps that are each within the tolerance are seen together.
        let mut watch = ClockWatch::new(NOW, start);
        for step in 1..=4_u32 {
            watch.look(NOW.after(i64::from(step) * 3_000), start + SECOND * step);
        }
        assert_eq!(jumps(&watch), [("process", 6_000)]);
    }

    #[test]
    fn a_chain_goes_backwards_only_behind_a_record_that_says_so() {
        let start = Instant::now();
        let mut watch = ClockWatch::new(NOW, start);
        let last = watch.look(NOW.after(100), start);
        watch.written(last);
        assert_eq!(watch.look(NOW.after(-900), start), last);
        assert!(!watch.has_news());
        assert_eq!(watch.look(NOW.after(-10_000), start), NOW.after(-10_000));
        assert!(watch.has_news());
        watch.written(NOW.after(-10_000));
        assert!(!watch.has_news());
    }

    #[tokio::test]
    async fn the_log_and_the_database_tell_too() {
        let start = Instant::now();
        let signs = |record: i64, sign: i64| async move { Ok(Some((NOW.after(record), NOW.after(sign)))) };
        let day = 86_400_000;
        for (record, sign, told) in [
            (0, 0, None),
            (day, day, Some(-day)),
            (-30 * day, -1_000, None),
            (-30 * day, -8 * day, Some(8 * day)),
            (-1, day, None),
        ] {
            let mut watch = ClockWatch::new(NOW, start);
            watch.compare_with_log(NOW, || signs(record, sign)).await.unwrap();
            watch.compare_with_log(NOW, || signs(day, day)).await.unwrap();
            assert_eq!(jumps(&watch), told.map(|by| ("log", by)).into_iter().collect::<Vec<_>>(), "{record} {sign}");
        }
        let mut watch = ClockWatch::new(NOW, start);
        for ahead in [0, 30_000, day, day + 1_000, 0, -day] {
            watch.compare_with_database(NOW.after(ahead), NOW);
        }
        assert_eq!(jumps(&watch), [("database", day), ("database", -day)]);
    }

    #[test]
    fn what_cannot_be_written_is_bounded() {
        let start = Instant::now();
        let mut watch = ClockWatch::new(NOW, start);
        for number in 0..1_000 {
            watch.look(NOW.after(if number % 2 == 0 { 86_400_000 } else { 0 }), start);
        }
        assert_eq!(watch.news.len(), MOST_NEWS);
    }
}
