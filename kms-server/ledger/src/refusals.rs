//! Refusals are recorded, but no client can fill the disk with them: the first of a kind is written
//! at once. Those that follow within the period are counted, and written as one record.

use std::{
    collections::HashMap,
    mem,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use kms_domain::UnixMillis;
use kms_proto::v1::{AuditRecord, Refused, SecurityEvent, audit_record::Event};
use tokio::sync::Notify;

/// What was refused, to whom and why.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Refusal {
    pub(super) principal: String,
    pub(super) action: String,
    pub(super) reason: String,
    /// An attack or a fault, not only a missing permission.
    pub(super) security_event: bool,
}

/// Refusals since they were last written.
#[derive(Clone, Default)]
pub(super) struct Refusals {
    known: HashMap<Refusal, Counted>,
}

#[derive(Clone)]
struct Counted {
    unwritten: u64,
    first: UnixMillis,
    written: Option<Instant>,
}

impl Refusals {
    pub(super) fn note(&mut self, refusal: Refusal, now: UnixMillis) {
        self.count(refusal, 1, now);
    }

    /// Adds refusals that were counted elsewhere.
    pub(super) fn absorb(&mut self, others: Self) {
        for (refusal, counted) in others.known {
            self.count(refusal, counted.unwritten, counted.first);
        }
    }

    fn count(&mut self, refusal: Refusal, times: u64, first: UnixMillis) {
        let refusal = if self.known.contains_key(&refusal) { refusal } else { self.kind_of(refusal) };
        let counted = self.known.entry(refusal).or_insert(Counted { unwritten: 0, first, written: None });
        if counted.unwritten == 0 {
            counted.first = first;
        }
        counted.unwritten = counted.unwritten.saturating_add(times);
    }

    /// The kind under which a refusal is counted. Beyond the bounds, refusals that differ only in
    /// detail are counted together: for each principal, so that no principal hides what others do,
    /// and for each action, so that many reasons of one action do not hide another.
    fn kind_of(&self, refusal: Refusal) -> Refusal {
        let Refusal { principal, action, security_event, .. } = &refusal;
        let (mut of_one, mut of_action) = (0, 0);
        for known in
            self.known.keys().filter(|known| known.principal == *principal && known.security_event == *security_event)
        {
            of_one += 1;
            of_action += usize::from(known.action == *action);
        }
        let (full, most) =
            (self.known.len() >= MOST_KINDS, if *security_event { MOST_EVENTS } else { MOST_KINDS_OF_ONE });
        if full || of_one >= most {
            let principal = if full { String::new() } else { refusal.principal };
            return Refusal {
                principal,
                action: "any".to_owned(),
                reason: "more kinds of refusal than are counted apart".to_owned(),
                ..refusal
            };
        }
        if !security_event && of_action >= MOST_REASONS {
            return Refusal { reason: "more reasons than are counted apart".to_owned(), ..refusal };
        }
        refusal
    }

    /// The records that are due: of kinds that were never written, or not within the period.
    pub(super) fn due(&self, at: Instant) -> Vec<AuditRecord> {
        self.known
            .iter()
            .filter(|(_, counted)| counted.is_due(at))
            .map(|(refusal, counted)| refusal.record(counted))
            .collect()
    }

    /// Must be called when the records of [`Self::due`] are durable.
    pub(super) fn written(&mut self, at: Instant) {
        self.known.retain(|_, counted| {
            counted.unwritten > 0 || counted.written.is_some_and(|written| at.duration_since(written) < PERIOD)
        });
        for (refusal, counted) in &mut self.known {
            if counted.is_due(at) {
                let Refusal { principal, action, reason, .. } = refusal;
                tracing::info!(principal, action, reason, count = counted.unwritten, "refused");
                counted.unwritten = 0;
                counted.written = Some(at);
            }
        }
    }

    pub(super) fn any_due(&self, at: Instant) -> bool {
        self.known.values().any(|counted| counted.is_due(at))
    }
}

/// Refusals of calls that did not become an act, until the writer takes them. They have the same
/// bounds as those of the writer.
#[derive(Default)]
pub(super) struct Outside {
    refusals: Mutex<Refusals>,
    news: Notify,
}

impl Outside {
    pub(super) fn note(&self, refusal: Refusal, now: UnixMillis) {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner).note(refusal, now);
        self.news.notify_one();
    }

    /// Waits for a refusal.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }

    pub(super) fn take(&self) -> Refusals {
        mem::take(&mut *self.refusals.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Counted {
    fn is_due(&self, at: Instant) -> bool {
        self.unwritten > 0 && self.written.is_none_or(|written| at.duration_since(written) >= PERIOD)
    }
}

impl Refusal {
    fn record(&self, counted: &Counted) -> AuditRecord {
        let event = if self.security_event {
            Event::SecurityEvent(SecurityEvent {
                kind: self.action.clone(),
                detail: self.reason.clone(),
                meter: Default::default(),
            })
        } else {
            Event::Refused(Refused {
                action: self.action.clone(),
                reason: self.reason.clone(),
                count: counted.unwritten,
                first_ms: counted.first.0,
            })
        };
        AuditRecord { principal: self.principal.clone(), event: Some(event), ..Default::default() }
    }
}

const PERIOD: Duration = Duration::from_secs(60);
/// The most kinds of all principals together, and of one.
const MOST_KINDS: usize = 4_096;
const MOST_KINDS_OF_ONE: usize = 256;
/// The most reasons of one principal's action that are counted apart. An action has few, unless the
/// reason quotes what the caller chose.
const MOST_REASONS: usize = 4;
/// The most security events of one principal that are counted apart: each names its row.
const MOST_EVENTS: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(action: &str) -> Refusal {
        Refusal {
            principal: "urn:meterkms:dev:head-end:north".to_owned(),
            action: action.to_owned(),
            reason: "no policy".to_owned(),
            security_event: false,
        }
    }

    #[test]
    fn a_flood_is_two_records() {
        let start = Instant::now();
        let mut refusals = Refusals::default();
        refusals.note(refusal("a"), UnixMillis(1));
        assert_eq!(refusals.due(start).len(), 1);
        refusals.written(start);
        for at in 0..1_000 {
            refusals.note(refusal("a"), UnixMillis(at));
        }
        assert!(refusals.due(start).is_empty());
        let due = refusals.due(start + PERIOD);
        assert!(matches!(
            &due[..],
            [AuditRecord { event: Some(Event::Refused(Refused { count: 1_000, first_ms: 0, .. })), .. }]
        ));
    }

    #[test]
    fn what_was_counted_elsewhere_is_counted_once_and_together() {
        let (start, outside, mut refusals) = (Instant::now(), Outside::default(), Refusals::default());
        refusals.note(refusal("a"), UnixMillis(5));
        refusals.written(start);
        for at in 6..9 {
            outside.note(refusal("a"), UnixMillis(at));
        }
        outside.note(refusal("b"), UnixMillis(9));
        refusals.absorb(outside.take());
        refusals.absorb(outside.take());
        assert!(matches!(
            &refusals.due(start)[..],
            [AuditRecord { event: Some(Event::Refused(Refused { count: 1, first_ms: 9, .. })), .. }]
        ));
        refusals.written(start);
        assert!(matches!(
            &refusals.due(start + PERIOD)[..],
            [AuditRecord { event: Some(Event::Refused(Refused { count: 3, first_ms: 6, .. })), .. }]
        ));
    }

    #[test]
    fn ever_new_reasons_do_not_use_up_the_memory() {
        let mut refusals = Refusals::default();
        for number in 0..10_000 {
            refusals.note(refusal(&number.to_string()), UnixMillis(1));
        }
        assert!(refusals.known.len() <= MOST_KINDS_OF_ONE + 1);
    }

    #[test]
    fn many_reasons_of_one_action_hide_no_other() {
        let mut refusals = Refusals::default();
        for number in 0..10_000 {
            refusals.note(Refusal { reason: number.to_string(), ..refusal("protectFrame") }, UnixMillis(1));
        }
        refusals.note(refusal("addPrincipal"), UnixMillis(2));
        let due = refusals.due(Instant::now());
        assert_eq!(due.len(), MOST_REASONS + 2);
        let counted: u64 = due
            .iter()
            .map(|record| match &record.event {
                Some(Event::Refused(refused)) => refused.count,
                _ => 0,
            })
            .sum();
        assert_eq!(counted, 10_001);
        assert!(due.iter().any(|record| matches!(&record.event, Some(Event::Refused(refused)) if refused.action == "addPrincipal" && refused.count == 1)));
    }
}
