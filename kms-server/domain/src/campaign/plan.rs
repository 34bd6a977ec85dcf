//! Which meters a campaign selects, and in which waves they are: the plan that approvals pin.
//!
//! A plan is made in one pass over the meters, in memory that does not grow with their number. The
//! selected titles are written in chunks, and one chain of digests covers all chunks. A hash of
//! campaign and title gives the wave of a meter, so every cohort is a fair sample, and the plan
//! needs no second list.

use aws_lc_rs::{digest, hmac};

use crate::{
    CampaignAction, CampaignId, CounterDomainId, CounterPlace, CounterState, DeviceProfileName, ExposureReason, FlagId,
    GroupId, KeyOrigin, KeyVersion, Meter, ParseError, Party, PrincipalId, SecuritySetupId, SharedExposures,
    SystemTitle, TaskWork, UnixMillis,
};

/// Which meters a campaign selects: those that meet all conditions. Meters that are quarantined or
/// retired are never selected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CampaignSelection {
    /// Every meter of the island that meets the other conditions. Without this, at least one
    /// condition is needed, so that a forgotten condition does not select everything.
    pub whole_island: bool,
    /// Of this vendor.
    pub vendor: Option<FlagId>,
    /// With this device profile.
    pub profile: Option<DeviceProfileName>,
    /// In this group.
    pub group: Option<GroupId>,
    /// Assigned to this head-end.
    pub head_end: Option<PrincipalId>,
    /// Of this batch.
    pub batch: Option<String>,
    /// The active version has been active since before this moment.
    pub active_before: Option<UnixMillis>,
    /// This party could know the version that the meter holds, active or compromised.
    pub exposed_to: Option<Party>,
    /// The version that the meter holds was exposed in this way.
    pub exposed_by: Option<ExposureReason>,
    /// The active version was imported.
    pub imported: bool,
    /// At least so many percent of a counter of the active version are used, 1–100.
    pub counter_used: Option<u8>,
    /// How many meters were named; 0 for a selection by conditions alone. The plan has the titles.
    pub named: u64,
}

impl CampaignSelection {
    /// Checks what is always true of a selection.
    ///
    /// # Errors
    /// The selection has no condition and does not say `whole_island`, or the percentage is out of
    /// range.
    pub fn check(&self) -> Result<(), ParseError> {
        if *self == Self::default() {
            return Err(ParseError::new("selection", "it has no condition; set `whole_island` to select every meter"));
        }
        if self.counter_used.is_some_and(|percent| !(1..=100).contains(&percent)) {
            return Err(ParseError::new("selection", "the used part of the counters is not 1 to 100 percent"));
        }
        Ok(())
    }

    /// I5: whether a meter is selected, by its sealed row. `setup` and `action` say to which keys
    /// the conditions on keys apply.
    pub fn matches(&self, meter: &Meter, action: CampaignAction, setup: Option<SecuritySetupId>) -> bool {
        self.matches_knowing(meter, action, setup, &SharedExposures::new())
    }

    /// As [`Self::matches`], with what is known of key values that several slots share.
    pub fn matches_knowing(
        &self,
        meter: &Meter,
        action: CampaignAction,
        setup: Option<SecuritySetupId>,
        shared: &SharedExposures,
    ) -> bool {
        let class = &meter.class;
        class.status.may_grant()
            && self.vendor.is_none_or(|vendor| class.vendor == vendor)
            && self.profile.as_ref().is_none_or(|profile| class.profile == *profile)
            && self.group.is_none_or(|group| class.groups.contains(&group))
            && self.head_end.as_ref().is_none_or(|head_end| class.head_end.as_ref() == Some(head_end))
            && self.batch.as_ref().is_none_or(|batch| meter.batch == *batch)
            && action.first_step(meter, setup).is_some_and(|step| {
                // A group key is rotated for the whole group, so the selection must name the group.
                (self.group.is_some() || step.is_own(meter))
                    && (!self.is_about_keys() || self.matches_keys(meter, step.setup, step.work, shared))
            })
    }

    /// Whether a meter that meets the other conditions meets the condition on counters. `domains`
    /// gives the highest bound of a counter domain.
    pub fn matches_counters(
        &self,
        meter: &Meter,
        action: CampaignAction,
        setup: Option<SecuritySetupId>,
        domains: impl Fn(CounterDomainId) -> Option<u64>,
    ) -> bool {
        let (Some(percent), Some(step)) = (self.counter_used, action.first_step(meter, setup)) else {
            return self.counter_used.is_none();
        };
        let used = |version: &KeyVersion| match version.counters() {
            CounterPlace::Own(counters) => counters.highest_bound(),
            CounterPlace::Domain(domain) => domains(*domain).unwrap_or_default(),
        };
        slots_of(meter, step.setup, step.work)
            .filter_map(current)
            .any(|version| u128::from(used(version)) * 100 >= u128::from(CounterState::END) * u128::from(percent))
    }

    const fn is_about_keys(&self) -> bool {
        self.active_before.is_some() || self.exposed_to.is_some() || self.exposed_by.is_some() || self.imported
    }

    fn matches_keys(&self, meter: &Meter, setup: SecuritySetupId, work: TaskWork, shared: &SharedExposures) -> bool {
        slots_of(meter, setup, work)
            .filter_map(current)
            .any(|version| self.matches_version(meter, setup, version, shared))
    }

    fn matches_version(
        &self,
        meter: &Meter,
        setup: SecuritySetupId,
        version: &KeyVersion,
        shared: &SharedExposures,
    ) -> bool {
        let exposed = self.exposed_to.is_none() && self.exposed_by.is_none()
            || meter.slots.exposures_of(setup, version, shared).iter().any(|exposure| {
                self.exposed_to.as_ref().is_none_or(|party| exposure.party == *party)
                    && self.exposed_by.is_none_or(|reason| exposure.reason == reason)
            });
        exposed
            && self.active_before.is_none_or(|before| version.since() < before)
            && (!self.imported || version.origin() == KeyOrigin::Imported)
    }
}

/// The version that a campaign replaces: the active one, or a compromised one that the meter still
/// holds.
fn current(slot: &crate::Slot) -> Option<&KeyVersion> {
    slot.held().filter(|_| slot.compromised()).or_else(|| slot.active())
}

/// The slots that the work concerns: one, or all for a probe.
fn slots_of(meter: &Meter, setup: SecuritySetupId, work: TaskWork) -> impl Iterator<Item = &crate::Slot> {
    let one = match work {
        TaskWork::Rotate(key_type) => Some(key_type),
        TaskWork::Probe => None,
    };
    meter.slots.of_setup(setup).filter(move |slot| one.is_none_or(|key_type| slot.key_type() == key_type))
}

/// How many meters a wave has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WaveSize {
    /// This many meters, at least 1.
    Meters(u32),
    /// This many percent of all meters, 1–100.
    Percent(u8),
}

impl WaveSize {
    /// The size of this text: `500` or `10%`.
    ///
    /// # Errors
    /// The text has another form, or the number is 0 or above 100 percent.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let size = match text.trim().strip_suffix('%') {
            Some(percent) => {
                percent.trim().parse().ok().filter(|percent| (1..=100).contains(percent)).map(Self::Percent)
            }
            None => text.trim().parse().ok().filter(|meters| *meters > 0).map(Self::Meters),
        };
        size.ok_or_else(|| {
            ParseError::new(
                "wave size",
                format!("`{}` is neither a number of meters from 1 nor 1% to 100%", text.escape_debug()),
            )
        })
    }

    const fn of(self, total: u64) -> u64 {
        match self {
            Self::Meters(meters) => meters as u64,
            Self::Percent(percent) => {
                let part = (total as u128 * percent as u128).div_ceil(100);
                // At most `total`, because there are at most 100 percent.
                part as u64
            }
        }
    }
}

impl std::fmt::Display for WaveSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Meters(meters) => write!(f, "{meters}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// Which meters were found, and in which waves they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How many meters.
    pub meters: u64,
    /// In how many chunks their titles are kept.
    pub chunks: u64,
    /// The end of the chain over the chunks ([`PlanChain`]).
    pub digest: [u8; 32],
    /// The waves, in order; the canary cohort first where there is one.
    pub waves: Vec<PlannedWave>,
}

/// A wave of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedWave {
    /// How many meters.
    pub meters: u64,
    /// Meters whose bucket is below this, and not in an earlier wave.
    pub below: u32,
}

impl Plan {
    /// The wave of a meter, from 1.
    pub fn wave_of(&self, campaign: CampaignId, meter: SystemTitle) -> u32 {
        let bucket = bucket(&key(campaign), meter);
        let wave = self.waves.iter().position(|wave| bucket < wave.below).unwrap_or(self.waves.len().saturating_sub(1));
        u32::try_from(wave).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// As [`Self::wave_of`], for many meters.
    pub fn members(
        &self,
        campaign: CampaignId,
        wave: u32,
        meters: impl IntoIterator<Item = SystemTitle>,
    ) -> Vec<SystemTitle> {
        let key = key(campaign);
        let below = |wave: u32| {
            wave.checked_sub(1).and_then(|at| self.waves.get(usize::try_from(at).ok()?)).map_or(0, |wave| wave.below)
        };
        let (first, end) = (below(wave.saturating_sub(1)), below(wave));
        meters.into_iter().filter(|meter| (first..end).contains(&bucket(&key, *meter))).collect()
    }
}

/// Counts meters by the hash that orders them, in 4 MiB for any number of meters.
pub struct WavePlanner {
    key: hmac::Key,
    buckets: Vec<u32>,
    total: u64,
}

impl WavePlanner {
    /// A planner that has seen no meter.
    pub fn new(campaign: CampaignId) -> Self {
        Self { key: key(campaign), buckets: vec![0; BUCKETS], total: 0 }
    }

    /// Counts a meter.
    pub fn add(&mut self, meter: SystemTitle) {
        let bucket = bucket(&self.key, meter);
        if let Some(count) = usize::try_from(bucket).ok().and_then(|bucket| self.buckets.get_mut(bucket)) {
            *count = count.saturating_add(1);
            self.total += 1;
        }
    }

    /// How many meters were counted.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// The waves. A wave ends at the first bucket with which it reaches its size, so it is larger
    /// by less than a bucket, which has one meter in a million.
    pub fn waves(&self, canary: u32, sizes: &[WaveSize]) -> Vec<PlannedWave> {
        let canary = Some(u64::from(canary)).filter(|canary| *canary > 0);
        let last = sizes.last().copied().unwrap_or(WaveSize::Percent(100));
        let mut sizes = canary
            .into_iter()
            .chain(sizes.iter().copied().chain(std::iter::repeat(last)).map(|size| size.of(self.total).max(1)));
        let mut waves = Vec::new();
        let (mut meters, mut left, mut size) = (0, self.total, sizes.next().unwrap_or(u64::MAX));
        for (count, below) in self.buckets.iter().zip(1..) {
            meters += u64::from(*count);
            if *count > 0 && meters >= size && waves.len() + 1 < MOST_WAVES {
                left -= meters;
                waves.push(PlannedWave { meters, below });
                (meters, size) = (0, sizes.next().unwrap_or(u64::MAX));
                if left == 0 {
                    break;
                }
            }
        }
        if meters > 0 {
            waves.push(PlannedWave { meters, below: 0 });
        }
        if let Some(wave) = waves.last_mut() {
            wave.below = BUCKETS as u32;
        }
        waves
    }
}

/// The chain over a plan's chunks: `SHA-256("meterkms/plan" ‖ campaign(16))`, then `SHA-256(link
/// before ‖ titles)` for each chunk, where titles are 8 octets each, in order of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanChain([u8; 32]);

impl PlanChain {
    /// The most titles of a chunk.
    pub const CHUNK: usize = 10_000;

    /// Before the first chunk.
    pub fn new(campaign: CampaignId) -> Self {
        Self(sha256(&[b"meterkms/plan", &campaign.octets()]))
    }

    /// After the chunk whose link has this digest.
    pub const fn from_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// After a further chunk.
    #[must_use]
    pub fn link(self, titles: &[u8]) -> Self {
        Self(sha256(&[&self.0, titles]))
    }

    /// The digest so far.
    pub const fn digest(self) -> [u8; 32] {
        self.0
    }
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    parts.iter().for_each(|part| context.update(part));
    let mut result = [0; 32];
    result.copy_from_slice(context.finish().as_ref());
    result
}

fn key(campaign: CampaignId) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &campaign.octets())
}

/// The first 20 bits of HMAC-SHA-256(campaign, title).
fn bucket(key: &hmac::Key, meter: SystemTitle) -> u32 {
    let tag = hmac::sign(key, &meter.octets());
    let first = tag.as_ref().first_chunk::<4>().copied().unwrap_or_default();
    u32::from_be_bytes(first) >> 12
}

const BUCKETS: usize = 1 << 20;
/// A plan with more waves is a mistake; all further meters are in the last wave.
const MOST_WAVES: usize = 1_000;
