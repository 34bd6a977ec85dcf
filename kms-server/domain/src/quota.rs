//! Quotas on critical commands: how many frames with critical commands a principal has had
//! protected in the present hour.
//!
//! The sealed row of a principal's use is written in the transaction of the frames' record, so the
//! count is valid for all servers of the island and after a restart. The limits are in a file
//! (`policies/quotas.toml`), not in the row.

use std::fmt;

use crate::{ParseError, PrincipalId, SystemTitle, UnixMillis, id::parse_name};

/// The name of a quota: 1–32 octets of a–z, 0–9 and `-`, starting with a letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuotaName(String);

impl QuotaName {
    /// The name in this text.
    ///
    /// # Errors
    /// The name has another form.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        parse_name("quota", text, 32)?;
        Ok(Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for QuotaName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a principal may have within an hour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuotaLimit {
    commands: u32,
    meters: Option<u16>,
}

impl QuotaLimit {
    /// The most commands of an hour that can be set.
    pub const MOST_COMMANDS: u32 = 1_000_000;

    /// The most distinct meters of an hour that can be set: their titles are kept in the row.
    pub const MOST_METERS: u16 = 1_000;

    /// No command at all.
    pub const NONE: Self = Self { commands: 0, meters: None };

    /// At most `commands` in an hour, 1 to [`Self::MOST_COMMANDS`], to at most `meters` distinct
    /// meters, 1 to [`Self::MOST_METERS`] and not more than the commands; `None`: as many meters as
    /// commands.
    ///
    /// # Errors
    /// A number is out of its range.
    pub fn new(commands: u32, meters: Option<u16>) -> Result<Self, ParseError> {
        if !(1..=Self::MOST_COMMANDS).contains(&commands) {
            return Err(ParseError::new(
                "commands",
                format!("`{commands}` is not 1 to {} an hour", Self::MOST_COMMANDS),
            ));
        }
        if let Some(meters) = meters
            && (!(1..=Self::MOST_METERS).contains(&meters) || u32::from(meters) > commands)
        {
            return Err(ParseError::new(
                "meters",
                format!("`{meters}` is not 1 to {} an hour, and not more than the commands", Self::MOST_METERS),
            ));
        }
        Ok(Self { commands, meters })
    }

    /// Commands of an hour; 0 for [`Self::NONE`].
    pub const fn commands(self) -> u32 {
        self.commands
    }

    /// Distinct meters of an hour, if they are limited.
    pub const fn meters(self) -> Option<u16> {
        self.meters
    }
}

/// One hour of UTC: hours since 1970-01-01T00:00Z. Each hour has its own quotas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuotaHour(u32);

impl QuotaHour {
    /// The hour of a moment.
    pub fn of(moment: UnixMillis) -> Self {
        Self(u32::try_from(moment.0 / HOUR_MS).unwrap_or_default())
    }

    /// When it ends.
    pub const fn end(self) -> UnixMillis {
        UnixMillis((self.0 as i64 + 1) * HOUR_MS)
    }

    /// The number that rows carry.
    pub const fn number(self) -> u32 {
        self.0
    }

    pub(crate) const fn from_number(number: u32) -> Self {
        Self(number)
    }
}

/// What a principal has used of its quotas in one hour, a sealed row of its own (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaUse {
    /// Whose.
    pub principal: PrincipalId,
    pub(crate) hour: QuotaHour,
    pub(crate) used: Vec<UsedQuota>,
}

/// What was used of one quota.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UsedQuota {
    pub(crate) quota: QuotaName,
    pub(crate) commands: u32,
    /// In increasing order; empty where the quota does not limit them.
    pub(crate) meters: Vec<SystemTitle>,
}

impl QuotaUse {
    /// Nothing used yet.
    pub const fn new(principal: PrincipalId) -> Self {
        Self { principal, hour: QuotaHour(0), used: Vec::new() }
    }

    /// The commands that were counted in this hour.
    pub fn commands(&self, quota: &QuotaName, hour: QuotaHour) -> u32 {
        self.used.iter().find(|used| used.quota == *quota && self.hour >= hour).map_or(0, |used| used.commands)
    }

    /// Counts `commands` to a meter. After an error nothing must be stored of this value.
    ///
    /// `hour` is the server's. If another server's clock was ahead, its hour continues, so that no
    /// quota can be used twice.
    ///
    /// # Errors
    /// The quota does not allow them in this hour.
    pub fn count(
        &mut self,
        quota: &QuotaName,
        limit: QuotaLimit,
        hour: QuotaHour,
        meter: SystemTitle,
        commands: u32,
    ) -> Result<(), QuotaExceeded> {
        if hour > self.hour {
            self.hour = hour;
            self.used.clear();
        }
        let frees = self.hour.end();
        let at = match self.used.iter().position(|used| used.quota == *quota) {
            Some(at) => at,
            None => {
                self.used.push(UsedQuota { quota: quota.clone(), commands: 0, meters: Vec::new() });
                self.used.len() - 1
            }
        };
        #[expect(clippy::indexing_slicing, reason = "the position was just found in this vector")]
        let used = &mut self.used[at];
        used.commands = used.commands.saturating_add(commands);
        if used.commands > limit.commands {
            return Err(QuotaExceeded::Commands { most: limit.commands, frees });
        }
        if let Some(most) = limit.meters
            && let Err(place) = used.meters.binary_search(&meter)
        {
            used.meters.insert(place, meter);
            if used.meters.len() > usize::from(most) {
                return Err(QuotaExceeded::Meters { most, frees });
            }
        }
        Ok(())
    }
}

/// The quota is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuotaExceeded {
    /// The limit of commands.
    #[error("{most} commands an hour")]
    Commands {
        /// The limit.
        most: u32,
        /// When the next hour begins.
        frees: UnixMillis,
    },
    /// The limit of distinct meters.
    #[error("commands to {most} meters an hour")]
    Meters {
        /// The limit.
        most: u16,
        /// When the next hour begins.
        frees: UnixMillis,
    },
}

impl QuotaExceeded {
    /// When the next hour begins.
    pub const fn frees(self) -> UnixMillis {
        match self {
            Self::Commands { frees, .. } | Self::Meters { frees, .. } => frees,
        }
    }
}

const HOUR_MS: i64 = 3_600_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IslandName, Role};

    fn title(last: u8) -> SystemTitle {
        SystemTitle::from_octets(&[0x4B, 0x41, 0x4D, 0, 0, 0, 0, last]).unwrap()
    }

    fn fresh() -> QuotaUse {
        QuotaUse::new(PrincipalId::new(IslandName::parse("north").unwrap(), Role::HeadEnd, "hes-1").unwrap())
    }

    #[test]
    fn commands_are_counted_within_an_hour() {
        let quota = QuotaName::parse("supply-control").unwrap();
        let limit = QuotaLimit::new(3, None).unwrap();
        let now = QuotaHour::of(UnixMillis(1_795_165_200_000));
        let mut used = fresh();
        used.count(&quota, limit, now, title(1), 2).unwrap();
        let refused = used.clone().count(&quota, limit, now, title(1), 2).unwrap_err();
        assert_eq!(refused, QuotaExceeded::Commands { most: 3, frees: UnixMillis(1_795_168_800_000) });
        used.count(&quota, limit, now, title(1), 1).unwrap();
        assert_eq!(used.commands(&quota, now), 3);
        // Another quota has its own count, and the next hour begins anew.
        used.count(&QuotaName::parse("other").unwrap(), limit, now, title(1), 3).unwrap();
        let next = QuotaHour::of(now.end());
        assert_eq!(used.commands(&quota, next), 0);
        used.count(&quota, limit, next, title(1), 3).unwrap();
        // A server whose clock is behind does not free it.
        assert!(used.clone().count(&quota, limit, now, title(1), 1).is_err());
        assert!(fresh().count(&quota, QuotaLimit::NONE, now, title(1), 1).is_err());
    }

    #[test]
    fn distinct_meters_are_counted_once() {
        let quota = QuotaName::parse("supply-control").unwrap();
        let limit = QuotaLimit::new(10, Some(2)).unwrap();
        let mut used = fresh();
        for meter in [2, 1, 2, 1] {
            used.count(&quota, limit, QuotaHour(9), title(meter), 1).unwrap();
        }
        assert!(matches!(
            used.count(&quota, limit, QuotaHour(9), title(3), 1),
            Err(QuotaExceeded::Meters { most: 2, .. })
        ));
    }

    #[test]
    fn limits_that_cannot_be_are_refused() {
        for (commands, meters) in [(0, None), (1_000_001, None), (5, Some(0)), (5, Some(6)), (5_000, Some(1_001))] {
            assert!(QuotaLimit::new(commands, meters).is_err(), "{commands} {meters:?}");
        }
        assert!(QuotaName::parse("Supply").is_err() && QuotaName::parse("").is_err());
    }
}
