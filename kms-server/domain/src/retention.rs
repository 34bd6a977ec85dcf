//! What is destroyed, and when: old key versions after the retention time, and all keys of a meter
//! whose identity has ended.

use crate::{
    Group, KeyState, KeyType, KeyVersion, KeyVersionNumber, Meter, ParseError, SecuritySetupId, Slot, Slots, UnixMillis,
};

/// How long key versions are kept when they are out of use: whole days, at most 36,525 (100 years).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Retention(u16);

impl Retention {
    /// 90 days: longer than database backups are usually kept.
    pub const DEFAULT: Self = Self(90);

    /// This many days. 0 destroys at once, for trials only.
    ///
    /// # Errors
    /// More than 36,525.
    pub fn from_days(days: u32) -> Result<Self, ParseError> {
        match u16::try_from(days) {
            Ok(days) if days <= MOST_DAYS => Ok(Self(days)),
            _ => Err(ParseError::new("retention", format!("`{days}` is not 0 to {MOST_DAYS} days"))),
        }
    }

    /// The days.
    pub const fn days(self) -> u16 {
        self.0
    }

    /// The same in milliseconds.
    pub const fn milliseconds(self) -> i64 {
        // Widening: `i64::from` is not const.
        self.0 as i64 * DAY
    }

    /// Whether it has passed since `moment`.
    pub const fn passed(self, moment: UnixMillis, now: UnixMillis) -> bool {
        moment.after(self.milliseconds()).0 <= now.0
    }
}

/// The versions of one slot whose retention time has passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpiredKeys {
    /// The slot's security setup.
    pub setup: SecuritySetupId,
    /// The slot's key type.
    pub key_type: KeyType,
    /// Versions that are not candidates any more (I3), in order.
    pub released: Vec<KeyVersionNumber>,
    /// Versions that are destroyed, in order.
    pub destroyed: Vec<KeyVersionNumber>,
}

impl Slot {
    /// Releases candidates as [`Self::release_candidates`] says, and destroys every deactivated or
    /// compromised version that is no candidate and has been in its state for the retention time.
    /// `None`: nothing is due.
    pub fn expire(&mut self, retention: Retention, now: UnixMillis) -> Option<ExpiredKeys> {
        let candidates = self.candidate_numbers();
        // I3: only after a later version was proven and the retention time has passed.
        self.release_candidates(retention.milliseconds(), now);
        let mut destroyed = self.numbers(|version| {
            matches!(version.state, KeyState::Deactivated | KeyState::Compromised)
                && !version.candidate
                && retention.passed(version.since, now)
        });
        // I3: the transition refuses a candidate.
        destroyed.retain(|number| self.transition(*number, KeyState::Destroyed, now).is_ok());
        self.expired(candidates, destroyed)
    }

    /// Destroys every version, candidates too: for an owner whose identity has ended, and whose
    /// keys nobody needs any more.
    fn expire_all(&mut self, now: UnixMillis) -> Option<ExpiredKeys> {
        let candidates = self.candidate_numbers();
        let mut destroyed = self.numbers(|version| version.state != KeyState::Destroyed);
        destroyed.retain(|number| {
            if let Ok(version) = self.version_mut(*number) {
                version.candidate = false;
            }
            // SP 800-57: a key in use is deactivated first.
            let _ = self.transition(*number, KeyState::Deactivated, now);
            self.transition(*number, KeyState::Destroyed, now).is_ok()
        });
        self.expired(candidates, destroyed)
    }

    fn expired(&self, candidates: Vec<KeyVersionNumber>, destroyed: Vec<KeyVersionNumber>) -> Option<ExpiredKeys> {
        let still = self.candidate_numbers();
        let released: Vec<_> = candidates.into_iter().filter(|number| !still.contains(number)).collect();
        let any = !released.is_empty() || !destroyed.is_empty();
        any.then(|| ExpiredKeys { setup: self.setup(), key_type: self.key_type(), released, destroyed })
    }

    fn candidate_numbers(&self) -> Vec<KeyVersionNumber> {
        self.numbers(KeyVersion::candidate)
    }

    fn numbers(&self, condition: impl Fn(&KeyVersion) -> bool) -> Vec<KeyVersionNumber> {
        self.versions().iter().filter(|version| condition(version)).map(KeyVersion::number).collect()
    }
}

impl Slots {
    /// [`Slot::expire`] in every slot.
    pub fn expire(&mut self, retention: Retention, now: UnixMillis) -> Vec<ExpiredKeys> {
        self.iter_mut().filter_map(|slot| slot.expire(retention, now)).collect()
    }
}

impl Group {
    /// Releases and destroys versions whose retention time has passed. Empty: nothing is due, and
    /// nothing was changed.
    pub fn expire_keys(&mut self, retention: Retention, now: UnixMillis) -> Vec<ExpiredKeys> {
        self.slots.expire(retention, now)
    }
}

impl Meter {
    /// Ends what the retention time has ended: old versions, and of a retired meter everything.
    /// Empty: nothing is due, and nothing is changed.
    ///
    /// A destroyed version keeps its number, state, counters and exposures. It has no key any more:
    /// neither a wrapped one nor one that the HSM would derive.
    pub fn expire_keys(&mut self, retention: Retention, now: UnixMillis) -> Vec<ExpiredKeys> {
        match self.retired {
            // I3: a candidate goes without a later proof only here. The identity is gone, so no
            // later version is ever proven; a retired meter never comes back under its title, and
            // its keys were kept for the retention time since.
            Some(retired) if retention.passed(retired, now) => {
                self.slots.iter_mut().filter_map(|slot| slot.expire_all(now)).collect()
            }
            // Until then nothing of it is touched: someone may find that the wrong meter was
            // retired.
            Some(_) => Vec::new(),
            None => {
                let held_back = self.held_back(now);
                let free = self.slots.iter_mut().filter(|slot| !held_back.contains(&slot.setup()));
                free.filter_map(|slot| slot.expire(retention, now)).collect()
            }
        }
    }
}

const DAY: i64 = 86_400_000;
const MOST_DAYS: u16 = 36_525;
