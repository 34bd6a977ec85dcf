//! Refusals are recorded, but no client can fill the disk with them: the first of a kind is written at once, those that follow within
//! the period are counted and written as one.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use kms_domain::UnixMillis;
use kms_proto::v1::{AuditRecord, Refused, SecurityEvent, audit_record::Event};

/// What was refused, to whom and why.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Refusal {
    pub(super) principal: String,
    pub(super) action: String,
    pub(super) reason: String,
    /// Set for what is an attack or a fault rather than a missing permission.
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
        // Past the bounds, what differs in detail is counted together: for each principal by itself, so that none hides what others do.
        let kin = |known: &&Refusal| known.principal == refusal.principal && known.security_event == refusal.security_event;
        let most = if refusal.security_event { MOST_EVENTS } else { MOST_KINDS_OF_ONE };
        let refusal = if self.known.contains_key(&refusal) || (self.known.len() < MOST_KINDS && self.known.keys().filter(kin).count() < most) {
            refusal
        } else {
            let principal = if self.known.len() < MOST_KINDS { refusal.principal } else { String::new() };
            Refusal {
                principal,
                action: "any".to_owned(),
                reason: "more kinds of refusal than are counted apart".to_owned(),
                security_event: refusal.security_event,
            }
        };
        let counted = self.known.entry(refusal).or_insert(Counted { unwritten: 0, first: now, written: None });
        if counted.unwritten == 0 {
            counted.first = now;
        }
        counted.unwritten += 1;
    }

    /// The records that are due: kinds never written, and kinds last written more than the period ago.
    pub(super) fn due(&self, at: Instant) -> Vec<AuditRecord> {
        self.known.iter().filter(|(_, counted)| counted.is_due(at)).map(|(refusal, counted)| refusal.record(counted)).collect()
    }

    /// To be called when the records of [`Self::due`] are durable.
    pub(super) fn written(&mut self, at: Instant) {
        self.known.retain(|_, counted| counted.unwritten > 0 || counted.written.is_some_and(|written| at.duration_since(written) < PERIOD));
        for counted in self.known.values_mut() {
            if counted.is_due(at) {
                counted.unwritten = 0;
                counted.written = Some(at);
            }
        }
    }

    pub(super) fn any_due(&self, at: Instant) -> bool {
        self.known.values().any(|counted| counted.is_due(at))
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
            Event::SecurityEvent(SecurityEvent { kind: self.action.clone(), detail: self.reason.clone(), meter: Default::default() })
        } else {
            Event::Refused(Refused { action: self.action.clone(), reason: self.reason.clone(), count: counted.unwritten, first_ms: counted.first.0 })
        };
        AuditRecord { principal: self.principal.clone(), event: Some(event), ..Default::default() }
    }
}

const PERIOD: Duration = Duration::from_secs(60);
/// Kinds of all principals together, and of one.
const MOST_KINDS: usize = 4_096;
const MOST_KINDS_OF_ONE: usize = 32;
/// Security events of one principal that are told apart: each names its row.
const MOST_EVENTS: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(action: &str) -> Refusal {
        Refusal { principal: "urn:meterkms:dev:head-end:north".to_owned(), action: action.to_owned(), reason: "no policy".to_owned(), security_event: false }
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
        assert!(matches!(&due[..], [AuditRecord { event: Some(Event::Refused(Refused { count: 1_000, first_ms: 0, .. })), .. }]));
    }

    #[test]
    fn ever_new_reasons_do_not_use_up_the_memory() {
        let mut refusals = Refusals::default();
        for number in 0..10_000 {
            refusals.note(refusal(&number.to_string()), UnixMillis(1));
        }
        assert!(refusals.known.len() <= MOST_KINDS_OF_ONE + 1);
    }
}
