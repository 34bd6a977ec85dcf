//! The terms of a campaign: order, speed, and when it pauses. Also its name.

use std::{
    fmt,
    num::{NonZeroU8, NonZeroU32},
};

use crate::{MaintenanceWindows, ParseError, Quorum, WaveSize};

/// Order and speed of a campaign, and when it pauses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CampaignTerms {
    /// How many people must approve (I6).
    pub quorum: Quorum,
    /// The least number of meters in the canary cohort, which is the first wave; 0 for none. The
    /// cohort may have a few meters more.
    pub canary: u32,
    /// Sizes of the waves after the canary; the last size is repeated until every meter is in a
    /// wave. Not empty.
    pub waves: Vec<WaveSize>,
    /// Percent of a wave's meters, 1–100, that must succeed. The campaign pauses as soon as this
    /// can no longer be reached.
    pub success_threshold: u8,
    /// The campaign pauses when more than this many meters of a wave have finally failed or are in
    /// doubt.
    pub failure_limit: u64,
    /// When tasks may be begun.
    pub windows: MaintenanceWindows,
    /// How many tasks a head-end gets within a minute; `None`: no limit.
    pub starts_per_minute: Option<NonZeroU32>,
    /// How many tasks a head-end has at once.
    pub in_flight: NonZeroU32,
    /// How often a task is tried, 1–20.
    pub attempts: NonZeroU8,
    /// Seconds until the second attempt, 1–86,400. Doubled for each further attempt, up to a day.
    pub back_off_seconds: u32,
}

impl CampaignTerms {
    /// Checks the range of each number.
    ///
    /// # Errors
    /// A number is out of its range.
    pub fn check(&self) -> Result<(), ParseError> {
        let within = |what: &'static str, value: u64, least: u64, most: u64| match value {
            value if (least..=most).contains(&value) => Ok(()),
            value => Err(ParseError::new(what, format!("`{value}` is not {least} to {most}"))),
        };
        within("success threshold", self.success_threshold.into(), 1, 100)?;
        within("attempts", self.attempts.get().into(), 1, 20)?;
        within("back-off", self.back_off_seconds.into(), 1, 86_400)?;
        within("number of wave sizes", self.waves.len() as u64, 1, 100)?;
        within("canary", self.canary.into(), 0, 1_000_000)
    }

    /// Milliseconds until the next attempt, after this number of attempts.
    pub const fn back_off_ms(&self, attempts: u32) -> i64 {
        let doubled = if attempts > 17 { 86_400 } else { (self.back_off_seconds as i64) << attempts.saturating_sub(1) };
        (if doubled > 86_400 { 86_400 } else { doubled }) * 1_000
    }
}

/// A campaign's name: 1–64 octets of UTF-8 without control characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CampaignName(String);

impl CampaignName {
    /// The campaign of this name.
    ///
    /// # Errors
    /// The name is empty, longer than 64 octets, starts or ends with white space, or has control
    /// characters.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if !(1..=64).contains(&text.len()) || text.trim() != text || text.chars().any(char::is_control) {
            return Err(ParseError::new(
                "campaign name",
                "not 1 to 64 octets without control characters, and without white space at the ends",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CampaignName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
