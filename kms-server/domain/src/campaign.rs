//! Campaigns: an approved plan that rotates keys of many meters, in waves, and stops by itself when
//! too much fails.
//!
//! What people approve is the *content*: what is done to which meters, in which order, at which
//! times, and when it stops. Its digest covers the plan, which pins every meter, so nothing that
//! was approved can change later (I6). Everything here is pure: counts go in, decisions come out.

mod plan;
mod task;
mod window;

use std::{
    fmt,
    num::{NonZeroU8, NonZeroU32},
};

use aws_lc_rs::digest::{SHA256, digest};

pub use self::{
    plan::{CampaignSelection, Plan, PlanChain, PlannedWave, WavePlanner, WaveSize},
    task::{Task, TaskEnd, TaskError, TaskState, TaskStep, TaskWork},
    window::{MaintenanceWindow, MaintenanceWindows, Weekdays},
};
use crate::{
    Approval, ApprovalError, ApprovalTerms, Approvals, CampaignId, KeyType, KeyVersion, Meter, ParseError, PersonName,
    PrincipalId, Quorum, SecuritySetupId, UnixMillis,
};

/// A campaign: what was approved, by whom, and how far it is. One sealed row (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Campaign {
    /// Its id: that of the request that made it.
    pub id: CampaignId,
    /// What is approved. Never changes.
    pub content: CampaignContent,
    /// Who approved it, in order.
    pub approvals: Approvals,
    /// Where it stands in its life.
    pub state: CampaignState,
    /// Why it is in that state: what paused or aborted it. Empty otherwise.
    pub reason: String,
    /// When it came into that state.
    pub since: UnixMillis,
    /// The wave under way, from 1; 0 before the first. Where there is a canary cohort, it is wave
    /// 1.
    pub wave: u32,
    /// When that wave began.
    pub wave_started: UnixMillis,
    /// How many chunks of the plan were looked through for the tasks of this wave.
    pub expanded: u64,
    /// Failures of this wave that an officer has seen and accepted by resuming.
    pub accepted_failures: u64,
    /// What became of the waves before, in order.
    pub results: Vec<WaveResult>,
    /// When it was started.
    pub started: Option<UnixMillis>,
}

/// What people approve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CampaignContent {
    /// The name, for people.
    pub name: CampaignName,
    /// What is done to each meter.
    pub action: CampaignAction,
    /// In which security setup; `None` is the meter's first that has the key.
    pub setup: Option<SecuritySetupId>,
    /// Which meters were asked for.
    pub selection: CampaignSelection,
    /// Order, speed, and when it stops.
    pub terms: CampaignTerms,
    /// The officer who made it.
    pub requester: PrincipalId,
    /// I6: the person behind the officer, who approves nothing of it.
    pub requester_person: PersonName,
    /// When it was made.
    pub created: UnixMillis,
    /// Which meters were found, and in which waves they are.
    pub plan: Plan,
}

/// What is done to each meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CampaignAction {
    /// A new version of one key. A KEK is a compound transfer with the GUEK that proves it.
    Rotate(KeyType),
    /// An exchange that shows which keys the meter holds. No key leaves.
    Probe,
    /// Take-over: the KEK (compound), then the GAK, then the other keys of DLMS that were imported.
    TakeOver,
}

impl CampaignAction {
    /// The name in output: `rotate`, `probe`, `take-over`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rotate(_) => "rotate",
            Self::Probe => "probe",
            Self::TakeOver => "take-over",
        }
    }

    /// The rotation of one type of key.
    ///
    /// # Errors
    /// It is none of the keys that `key_transfer` of class 64 could bring
    /// ([`KeyType::is_transferable`]). Which of the others than KEK, GUEK, GBEK and GAK a meter
    /// takes is said by its device profile.
    pub fn rotate(key_type: KeyType) -> Result<Self, ParseError> {
        if key_type.is_transferable() {
            Ok(Self::Rotate(key_type))
        } else {
            Err(ParseError::new(
                "key type",
                format!("a {key_type} is not brought by key_transfer, which carries wrapped AES keys only"),
            ))
        }
    }

    /// What is to be done first with a meter; `None` if it has no such key.
    pub fn first_step(self, meter: &Meter, setup: Option<SecuritySetupId>) -> Option<TaskStep> {
        match self {
            Self::Rotate(key_type) => {
                let slot = meter
                    .slots
                    .iter()
                    .find(|slot| slot.key_type() == key_type && setup.is_none_or(|setup| slot.setup() == setup));
                let of_group = key_type == KeyType::GBEK && !meter.class.groups.is_empty();
                match slot {
                    Some(slot) => Some(TaskStep {
                        setup: slot.setup(),
                        work: TaskWork::Rotate(key_type),
                        from: active_number(slot),
                    }),
                    None if of_group => Some(TaskStep {
                        setup: setup.or_else(|| first_setup(meter))?,
                        work: TaskWork::Rotate(key_type),
                        from: 0,
                    }),
                    None => None,
                }
            }
            Self::Probe => {
                Some(TaskStep { setup: setup.or_else(|| first_setup(meter))?, work: TaskWork::Probe, from: 0 })
            }
            Self::TakeOver => take_over_steps(meter, setup).next(),
        }
    }

    /// What follows a step that ended well; `None` if the meter is done.
    pub fn next_step(self, meter: &Meter, setup: Option<SecuritySetupId>, done: TaskStep) -> Option<TaskStep> {
        match self {
            Self::Rotate(_) | Self::Probe => None,
            Self::TakeOver => {
                // Only what comes later in the order: a key that could not be replaced is not tried
                // for ever.
                let place = |step: &TaskStep| {
                    (step.setup, TAKE_OVER_ORDER.iter().position(|key_type| step.work == TaskWork::Rotate(*key_type)))
                };
                take_over_steps(meter, setup).find(|step| place(step) > place(&done))
            }
        }
    }
}

impl CampaignAction {
    /// Whether a campaign of this action, limited to `setup` where it names one, ever does this.
    fn plans(self, setup: Option<SecuritySetupId>, step: &TaskStep) -> bool {
        let work = match (self, step.work) {
            (Self::Rotate(approved), TaskWork::Rotate(key_type)) => approved == key_type,
            (Self::TakeOver, TaskWork::Rotate(key_type)) => TAKE_OVER_ORDER.contains(&key_type),
            (Self::Probe, TaskWork::Probe) => true,
            _ => false,
        };
        work && setup.is_none_or(|setup| setup == step.setup)
    }
}

impl Campaign {
    /// I6: whether what was approved has this step in it. The row of a task says which step is at
    /// hand; this says that it may be.
    pub fn plans(&self, step: &TaskStep) -> bool {
        self.content.action.plans(self.content.setup, step)
    }

    /// The same of a task whose mark does not bind its step ([`crate::SealKey::seal_former_task`]):
    /// the one step of the meter that the approved content leads to. Of a take-over, which has
    /// several, a key that came from somebody else: that is what was approved, in whatever order.
    pub fn plans_for(&self, meter: &Meter, step: &TaskStep) -> bool {
        let expected = match self.content.action {
            CampaignAction::TakeOver => {
                let TaskWork::Rotate(key_type) = step.work else { return false };
                let versions = meter.slots.get(step.setup, key_type).map(crate::Slot::versions).unwrap_or_default();
                versions.iter().any(|version| {
                    version.number().number() == step.from && version.origin() == crate::KeyOrigin::Imported
                })
            }
            action => action
                .first_step(meter, self.content.setup)
                .is_some_and(|first| (first.setup, first.work) == (step.setup, step.work)),
        };
        expected && self.plans(step)
    }
}

impl fmt::Display for CampaignAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rotate(key_type) => write!(f, "rotate {key_type}"),
            _ => f.write_str(self.name()),
        }
    }
}

/// Order, speed, and when a campaign stops by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CampaignTerms {
    /// How many people must approve (I6).
    pub quorum: Quorum,
    /// Meters of the canary cohort, which is the first wave; 0 for none. At least so many: cohorts
    /// are cut at a few meters' precision.
    pub canary: u32,
    /// Sizes of the waves after it; the last is repeated until every meter has its wave. Not empty.
    pub waves: Vec<WaveSize>,
    /// Percent of a wave's meters, 1–100, that must succeed. The campaign pauses as soon as that
    /// cannot be reached.
    pub success_threshold: u8,
    /// The campaign pauses when more meters of a wave than this have failed or are in doubt for
    /// good.
    pub failure_limit: u64,
    /// When work may be begun.
    pub windows: MaintenanceWindows,
    /// How many tasks a head-end gets within a minute; `None`: as many as it asks for.
    pub starts_per_minute: Option<NonZeroU32>,
    /// How many tasks a head-end has at once.
    pub in_flight: NonZeroU32,
    /// How often a task is tried, 1–20.
    pub attempts: NonZeroU8,
    /// Seconds until the second attempt, 1–86,400; doubled with each further one, up to a day.
    pub back_off_seconds: u32,
}

impl CampaignTerms {
    /// What holds of all terms.
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

    /// Milliseconds until the next attempt, after so many.
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
                "not 1 to 64 octets without control characters and white space around",
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

/// Where a campaign stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CampaignState {
    /// Made, and waiting for approvals.
    Draft,
    /// Enough people have approved it.
    Approved,
    /// Tasks are given out.
    Running,
    /// No task is given out; what is under way ends.
    Paused,
    /// Ended before its time.
    Aborted,
    /// Every wave has ended.
    Finished,
}

impl CampaignState {
    /// All states.
    pub const ALL: [Self; 6] =
        [Self::Draft, Self::Approved, Self::Running, Self::Paused, Self::Aborted, Self::Finished];

    /// The number in rows, from 1.
    pub const fn number(self) -> u32 {
        match self {
            Self::Draft => 1,
            Self::Approved => 2,
            Self::Running => 3,
            Self::Paused => 4,
            Self::Aborted => 5,
            Self::Finished => 6,
        }
    }

    /// The state with this number.
    ///
    /// # Errors
    /// No state has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|state| state.number() == number)
            .ok_or_else(|| ParseError::new("campaign state", format!("`{number}` is not 1 to 6")))
    }

    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Draft => "draft",
            Self::Approved => "approved",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Aborted => "aborted",
            Self::Finished => "finished",
        }
    }

    /// Whether nothing comes after it.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Aborted | Self::Finished)
    }
}

impl fmt::Display for CampaignState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many tasks of a wave are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WaveCounts {
    /// Waiting to be leased.
    pub pending: u64,
    /// Leased, and not begun.
    pub leased: u64,
    /// A transfer or probe has begun.
    pub under_way: u64,
    /// Done.
    pub succeeded: u64,
    /// Given up; the meter holds what it held.
    pub failed: u64,
    /// Given up; it is in doubt what the meter holds.
    pub in_doubt: u64,
    /// Not to be done: no head-end, out of service, or the key is gone.
    pub skipped: u64,
}

impl WaveCounts {
    /// Counts tasks of a state.
    pub const fn add(&mut self, state: TaskState, tasks: u64) {
        let count = match state {
            TaskState::Pending => &mut self.pending,
            TaskState::Leased => &mut self.leased,
            TaskState::UnderWay => &mut self.under_way,
            TaskState::Succeeded => &mut self.succeeded,
            TaskState::Failed => &mut self.failed,
            TaskState::InDoubt => &mut self.in_doubt,
            TaskState::Skipped => &mut self.skipped,
        };
        *count += tasks;
    }

    /// Tasks that have not ended.
    pub const fn open(&self) -> u64 {
        self.pending + self.leased + self.under_way
    }

    /// Tasks that ended badly.
    pub const fn failures(&self) -> u64 {
        self.failed + self.in_doubt
    }
}

/// What became of a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaveResult {
    /// When it began.
    pub started: UnixMillis,
    /// When its last task ended.
    pub ended: UnixMillis,
    /// How many meters ended how, by vendor and reason.
    pub tallies: Vec<WaveTally>,
    /// How many had succeeded by when: for plots, in order.
    pub timeline: Vec<(UnixMillis, u64)>,
}

/// Meters of one vendor that ended in the same way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WaveTally {
    /// The vendor's FLAG id.
    pub vendor: String,
    /// How the tasks ended.
    pub state: TaskState,
    /// Why; empty for success.
    pub reason: String,
    /// How many.
    pub tasks: u64,
}

impl WaveResult {
    /// How many tasks ended how.
    pub fn counts(&self) -> WaveCounts {
        let mut counts = WaveCounts::default();
        self.tallies.iter().for_each(|tally| counts.add(tally.state, tally.tasks));
        counts
    }
}

/// What follows from the counts of the wave under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaveDecision {
    /// Go on.
    Wait,
    /// The wave has ended well enough: the next one begins.
    NextWave,
    /// Too much has failed.
    Pause {
        /// What, for people.
        reason: String,
    },
    /// The last wave has ended.
    Finish,
}

impl Campaign {
    /// A draft.
    ///
    /// # Errors
    /// The terms are out of range, or the plan has no meters.
    pub fn draft(id: CampaignId, content: CampaignContent) -> Result<Self, ParseError> {
        content.terms.check()?;
        if content.plan.meters == 0 {
            return Err(ParseError::new("selection", "no meter matches"));
        }
        let since = content.created;
        Ok(Self {
            id,
            content,
            approvals: Approvals::default(),
            state: CampaignState::Draft,
            reason: String::new(),
            since,
            wave: 0,
            wave_started: UnixMillis(0),
            expanded: 0,
            accepted_failures: 0,
            results: Vec::new(),
            started: None,
        })
    }

    /// I6: what approvals are given to. SHA-256 of `"meterkms/campaign" ‖ id(16) ‖ content`, the
    /// content as it stands in the sealed row.
    pub fn content_digest(&self) -> [u8; 32] {
        let octets = [b"meterkms/campaign".as_slice(), &self.id.octets(), &self.content.to_octets()].concat();
        let mut result = [0; 32];
        result.copy_from_slice(digest(&SHA256, &octets).as_ref());
        result
    }

    /// Approves the content with this digest.
    ///
    /// # Errors
    /// It is not waiting for approvals, has another content, or the person has made or approved it.
    pub fn approve(
        &mut self,
        principal: PrincipalId,
        person: PersonName,
        content_digest: &[u8; 32],
        now: UnixMillis,
    ) -> Result<(), CampaignError> {
        if self.state != CampaignState::Draft {
            return Err(self.wrong_state("approved"));
        }
        let mut approvals = self.approvals.clone();
        approvals.add(&self.approval_terms(), Approval { principal, person, time: now }, content_digest)?;
        self.approvals = approvals;
        if self.is_approved() {
            self.enter(CampaignState::Approved, String::new(), now);
        }
        Ok(())
    }

    /// I6: whether enough people have approved it. Counted anew wherever work is given out, not
    /// only when the last of them did.
    pub fn is_approved(&self) -> bool {
        self.approvals.suffice(&self.approval_terms())
    }

    fn approval_terms(&self) -> ApprovalTerms<'_> {
        ApprovalTerms {
            content_sha256: self.content_digest(),
            requester: &self.content.requester,
            requester_person: &self.content.requester_person,
            beneficiary: None,
            quorum: self.content.terms.quorum,
            expires: None,
        }
    }

    /// Begins the first wave.
    ///
    /// # Errors
    /// It is not approved.
    pub fn start(&mut self, now: UnixMillis) -> Result<(), CampaignError> {
        if self.state != CampaignState::Approved || !self.is_approved() {
            return Err(self.wrong_state("started"));
        }
        self.started = Some(now);
        self.enter(CampaignState::Running, String::new(), now);
        self.begin_wave(1, now);
        Ok(())
    }

    /// Gives out no more work.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&mut self, reason: String, now: UnixMillis) -> Result<(), CampaignError> {
        if self.state != CampaignState::Running {
            return Err(self.wrong_state("paused"));
        }
        self.enter(CampaignState::Paused, reason, now);
        Ok(())
    }

    /// Goes on; the failures so far in this wave are accepted.
    ///
    /// # Errors
    /// It is not paused.
    pub fn resume(&mut self, counts: &WaveCounts, now: UnixMillis) -> Result<(), CampaignError> {
        if self.state != CampaignState::Paused {
            return Err(self.wrong_state("resumed"));
        }
        self.accepted_failures = counts.failures();
        self.enter(CampaignState::Running, String::new(), now);
        Ok(())
    }

    /// Ends it before its time, for good.
    ///
    /// # Errors
    /// It has ended.
    pub fn abort(&mut self, reason: String, now: UnixMillis) -> Result<(), CampaignError> {
        if self.state.is_final() {
            return Err(self.wrong_state("aborted"));
        }
        self.enter(CampaignState::Aborted, reason, now);
        Ok(())
    }

    /// What follows from the counts of the wave under way. Looks only; [`Self::end_wave`] and
    /// [`Self::pause`] act.
    pub fn decide(&self, counts: &WaveCounts) -> WaveDecision {
        if self.state != CampaignState::Running {
            return WaveDecision::Wait;
        }
        let terms = &self.content.terms;
        let failures = counts.failures().saturating_sub(self.accepted_failures);
        if failures > terms.failure_limit {
            return WaveDecision::Pause {
                reason: format!(
                    "wave {}: {failures} meters failed or are in doubt, more than the limit of {}",
                    self.wave, terms.failure_limit
                ),
            };
        }
        let planned = self.planned_wave().map_or(0, |wave| wave.meters);
        let counted =
            planned.saturating_sub(counts.skipped).saturating_sub(counts.failures().min(self.accepted_failures));
        let best = counted.saturating_sub(failures);
        if u128::from(best) * 100 < u128::from(counted) * u128::from(terms.success_threshold) {
            return WaveDecision::Pause {
                reason: format!(
                    "wave {}: {failures} of {counted} meters failed or are in doubt, so {} % cannot succeed",
                    self.wave, terms.success_threshold
                ),
            };
        }
        if !self.is_expanded() || counts.open() > 0 {
            return WaveDecision::Wait;
        }
        if self.content.plan.waves.len() > usize::try_from(self.wave).unwrap_or(usize::MAX) {
            WaveDecision::NextWave
        } else {
            WaveDecision::Finish
        }
    }

    /// Ends the wave under way, and begins the next, or finishes.
    ///
    /// # Errors
    /// It does not run.
    pub fn end_wave(&mut self, result: WaveResult, now: UnixMillis) -> Result<(), CampaignError> {
        if self.state != CampaignState::Running {
            return Err(self.wrong_state("led on"));
        }
        self.results.push(result);
        if self.content.plan.waves.len() > usize::try_from(self.wave).unwrap_or(usize::MAX) {
            self.begin_wave(self.wave + 1, now);
        } else {
            self.enter(CampaignState::Finished, String::new(), now);
        }
        Ok(())
    }

    /// The plan of the wave under way.
    pub fn planned_wave(&self) -> Option<&PlannedWave> {
        self.content.plan.waves.get(usize::try_from(self.wave.checked_sub(1)?).ok()?)
    }

    /// Whether all tasks of the wave under way exist.
    pub const fn is_expanded(&self) -> bool {
        self.expanded >= self.content.plan.chunks
    }

    /// Whether work may be begun now.
    pub fn is_open_at(&self, now: UnixMillis) -> bool {
        self.state == CampaignState::Running && self.is_approved() && self.content.terms.windows.is_open_at(now)
    }

    fn begin_wave(&mut self, wave: u32, now: UnixMillis) {
        self.wave = wave;
        self.wave_started = now;
        self.expanded = 0;
        self.accepted_failures = 0;
    }

    fn enter(&mut self, state: CampaignState, reason: String, now: UnixMillis) {
        self.state = state;
        self.reason = reason;
        self.since = now;
    }

    fn wrong_state(&self, wanted: &'static str) -> CampaignError {
        CampaignError::State { state: self.state, wanted, missing: self.approvals.missing(&self.approval_terms()) }
    }
}

/// Why a campaign does not do what is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CampaignError {
    /// Its state forbids it.
    #[error("the campaign is {state} and cannot be {wanted}{}", hint(*state, *missing))]
    State {
        /// Its state.
        state: CampaignState,
        /// What was asked for.
        wanted: &'static str,
        /// Approvals that are missing.
        missing: usize,
    },
    /// The approval does not count.
    #[error(transparent)]
    Approval(#[from] ApprovalError),
}

fn hint(state: CampaignState, missing: usize) -> String {
    match (state, missing) {
        (CampaignState::Draft, 1) => ": one approval is missing".to_owned(),
        (CampaignState::Draft, missing) if missing > 1 => format!(": {missing} approvals are missing"),
        _ => String::new(),
    }
}

fn first_setup(meter: &Meter) -> Option<SecuritySetupId> {
    meter.slots.iter().next().map(crate::Slot::setup)
}

fn active_number(slot: &crate::Slot) -> u32 {
    slot.active().map_or(0, |version| version.number().number())
}

/// The keys of a meter that somebody else made and that key_transfer can replace, in the order of a
/// take-over.
fn take_over_steps(meter: &Meter, setup: Option<SecuritySetupId>) -> impl Iterator<Item = TaskStep> {
    let mut setups: Vec<SecuritySetupId> =
        meter.slots.iter().map(crate::Slot::setup).filter(|one| setup.is_none_or(|setup| *one == setup)).collect();
    setups.sort_unstable();
    setups.dedup();
    setups.into_iter().flat_map(|setup| TAKE_OVER_ORDER.into_iter().map(move |key_type| (setup, key_type))).filter_map(
        |(setup, key_type)| {
            let slot = meter.slots.get(setup, key_type)?;
            let imported =
                slot.active().or_else(|| slot.held()).map(KeyVersion::origin) == Some(crate::KeyOrigin::Imported);
            imported.then(|| TaskStep { setup, work: TaskWork::Rotate(key_type), from: active_number(slot) })
        },
    )
}

/// A new KEK brings a new GUEK with it; then what else was imported.
const TAKE_OVER_ORDER: [KeyType; 4] = [KeyType::KEK, KeyType::GAK, KeyType::GUEK, KeyType::GBEK];

#[cfg(test)]
mod tests;
