//! How much the acts of one principal may add to the log. This is bounded, because the log is never
//! truncated, and a full disk would stop all grants (I2).
//!
//! The count is in the writer's memory, for each server. A restart sets it to zero: no principal
//! can cause a restart.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use kms_domain::PrincipalId;
use kms_proto::v1::{AuditRecord, SecurityEvent, audit_record::Event};

use super::actor::Actor;
use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;

/// Octets of records that the acts of each principal added within its hour. The hour begins with
/// the principal's first record.
#[derive(Default)]
pub(super) struct Growth {
    of: HashMap<PrincipalId, Hour>,
}

#[derive(Clone, Copy)]
struct Hour {
    began: Instant,
    octets: u64,
    /// The highest alarm that was recorded.
    told: Option<Level>,
}

/// The levels that raise an alarm, each once an hour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Quarter,
    Full,
}

/// What a transaction adds to the log.
#[derive(Default)]
pub(super) struct Grown {
    octets: HashMap<PrincipalId, u64>,
    told: Vec<(PrincipalId, Level)>,
}

impl Grown {
    /// Counts a record of an act of this principal.
    pub(super) fn add(&mut self, principal: &PrincipalId, record: &[u8]) {
        let octets = u64::try_from(record.len()).unwrap_or(u64::MAX);
        match self.octets.get_mut(principal) {
            Some(sum) => *sum = sum.saturating_add(octets),
            None => {
                self.octets.insert(principal.clone(), octets);
            }
        }
    }
}

impl Growth {
    /// Whether an act may add to the log.
    ///
    /// # Errors
    /// The principal has added as much as it may within an hour.
    pub(super) fn permit(&self, actor: &Actor, limits: &Limits, at: Instant) -> Result<(), ServiceError> {
        let Some((principal, hour)) =
            actor.principal.as_ref().and_then(|principal| Some((principal, self.hour(principal, at)?)))
        else {
            return Ok(());
        };
        let bound = limits.log_octets_per_principal_and_hour;
        let limit = if BULK.contains(&actor.action) { bound } else { bound.saturating_add(bound / 4) };
        if hour.octets < limit || ALWAYS.contains(&actor.action) {
            return Ok(());
        }
        let what = format!(
            "the acts of {principal} have added {} octets to the audit log within an hour; a reserve is kept for transfers, revocations and acts of officers",
            hour.octets
        );
        Err(Bound::LogOctetsPerPrincipalAndHour.met(limits, &what, HOUR.saturating_sub(at.duration_since(hour.began))))
    }

    /// The alarms that the growth by a transaction raises.
    pub(super) fn alarms(&self, grown: &mut Grown, bound: u64, at: Instant) -> Vec<AuditRecord> {
        let mut alarms = Vec::new();
        for (principal, octets) in &grown.octets {
            let hour = self.hour(principal, at);
            let sum = hour.map_or(0, |hour| hour.octets).saturating_add(*octets);
            let Some(level) =
                Level::of(sum, bound).filter(|level| hour.and_then(|hour| hour.told).is_none_or(|told| told < *level))
            else {
                continue;
            };
            let detail = match level {
                Level::Quarter => {
                    format!("{sum} octets within an hour, a quarter of the {bound} that one principal may add")
                }
                Level::Full => {
                    format!(
                        "{sum} octets within an hour, all of the {bound} that one principal may add: its further sessions and frames are refused"
                    )
                }
            };
            tracing::warn!(%principal, detail, "the audit log grows by the acts of one principal");
            let event = SecurityEvent { kind: "log-growth".to_owned(), detail, meter: Default::default() };
            alarms.push(AuditRecord {
                principal: principal.to_string(),
                event: Some(Event::SecurityEvent(event)),
                ..Default::default()
            });
            grown.told.push((principal.clone(), level));
        }
        alarms
    }

    /// Must be called when the records of a transaction are durable.
    pub(super) fn written(&mut self, grown: Grown, at: Instant) {
        self.of.retain(|_, hour| at.duration_since(hour.began) < HOUR);
        for (principal, octets) in grown.octets {
            let hour = self.of.entry(principal).or_insert(Hour { began: at, octets: 0, told: None });
            hour.octets = hour.octets.saturating_add(octets);
        }
        for (principal, level) in grown.told {
            if let Some(hour) = self.of.get_mut(&principal) {
                hour.told = Some(level);
            }
        }
    }

    fn hour(&self, principal: &PrincipalId, at: Instant) -> Option<&Hour> {
        self.of.get(principal).filter(|hour| at.duration_since(hour.began) < HOUR)
    }
}

impl Level {
    const fn of(octets: u64, bound: u64) -> Option<Self> {
        if octets >= bound {
            Some(Self::Full)
        } else if octets >= bound / 4 {
            Some(Self::Quarter)
        } else {
            None
        }
    }
}

const HOUR: Duration = Duration::from_hours(1);
/// Actions that are requested by the thousand. All others may use a reserve of a quarter above the
/// bound, so that a head-end at the bound can still finish its transfers and revoke grants.
const BULK: [&str; 5] = ["openSession", "openGroupSession", "protectFrame", "unprotectFrame", "createWorkOrder"];

/// Actions that end a thief's access. They are never refused: there are few principals and
/// certificates to end.
const ALWAYS: [&str; 2] = ["disablePrincipal", "endCertificate"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_has_its_bound_its_alarms_and_its_end() {
        let principal = PrincipalId::parse("urn:meterkms:dev:head-end:north").unwrap();
        let actor =
            |action| Actor { principal: Some(principal.clone()), certificate_sha256: None, request: None, action };
        let limits = Limits { log_octets_per_principal_and_hour: 1_000, ..Limits::default() };
        let (mut growth, begin) = (Growth::default(), Instant::now());
        let mut alarms = Vec::new();
        for _ in 0..10 {
            let mut grown = Grown::default();
            grown.add(&principal, &[0; 100]);
            alarms.extend(growth.alarms(&mut grown, 1_000, begin));
            assert_eq!(growth.permit(&actor("openSession"), &limits, begin), Ok(()));
            growth.written(grown, begin);
        }
        assert_eq!(alarms.len(), 2, "{alarms:?}");
        let refused = growth.permit(&actor("openSession"), &limits, begin + HOUR / 2);
        match refused {
            Err(ServiceError::ResourceExhausted { reason, retry_after }) => {
                assert!(reason.contains("log_octets_per_principal_and_hour"), "{reason}");
                assert_eq!(retry_after, HOUR / 2);
            }
            other => panic!("{other:?}"),
        }
        // The reserve, and its end.
        assert_eq!(growth.permit(&actor("continueTransfer"), &limits, begin), Ok(()));
        let mut grown = Grown::default();
        grown.add(&principal, &[0; 250]);
        assert!(growth.alarms(&mut grown, 1_000, begin).is_empty());
        growth.written(grown, begin);
        assert!(growth.permit(&actor("continueTransfer"), &limits, begin).is_err());
        // Not refused: the end of a thief's access, the server itself, and the next hour.
        assert_eq!(growth.permit(&actor("disablePrincipal"), &limits, begin), Ok(()));
        assert_eq!(growth.permit(&Actor::server(crate::ServerAct::SCRUB), &limits, begin), Ok(()));
        assert_eq!(growth.permit(&actor("openSession"), &limits, begin + HOUR), Ok(()));
    }
}
