//! Campaigns: an approved plan that rotates the keys of many meters, in waves, and pauses when too
//! many fail.
//!
//! People approve the *content*: what is done to which meters, in which order, at which times, and
//! when the campaign pauses. Its digest covers the plan, which pins every meter, so nothing that
//! was approved can change later (I6). This module is pure: it takes counts and returns decisions.

pub(crate) mod action;
pub(crate) mod plan;
pub(crate) mod task;
pub(crate) mod terms;
pub(crate) mod wave;
pub(crate) mod window;

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};

use self::{
    action::{CampaignAction, TaskStep, TaskWork},
    plan::{CampaignSelection, Plan, PlannedWave},
    terms::{CampaignName, CampaignTerms},
    wave::{WaveCounts, WaveResult},
};
use crate::{
    Approval, ApprovalError, ApprovalTerms, Approvals, CampaignId, Meter, ParseError, PersonName, PrincipalId,
    SecuritySetupId, UnixMillis,
};

/// A campaign: what was approved, by whom, and how far it is. One sealed row (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Campaign {
    /// Its id: the id of the request that made it.
    pub id: CampaignId,
    /// What is approved. It never changes.
    pub content: CampaignContent,
    /// Who approved it, in order.
    pub approvals: Approvals,
    /// Its state.
    pub state: CampaignState,
    /// Why it was paused or aborted. Empty otherwise.
    pub reason: String,
    /// When it entered that state.
    pub since: UnixMillis,
    /// The wave under way, from 1; 0 before the first. A canary cohort is wave 1.
    pub wave: u32,
    /// When that wave began.
    pub wave_started: UnixMillis,
    /// How many chunks of the plan were searched for the tasks of this wave.
    pub expanded: u64,
    /// Failures of this wave that an officer accepted by resuming the campaign.
    pub accepted_failures: u64,
    /// The results of the earlier waves, in order.
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
    /// Order, speed, and when it pauses.
    pub terms: CampaignTerms,
    /// The officer who made it.
    pub requester: PrincipalId,
    /// I6: the person behind the officer. This person cannot approve it.
    pub requester_person: PersonName,
    /// When it was made.
    pub created: UnixMillis,
    /// Which meters were found, and in which waves they are.
    pub plan: Plan,
}

/// The state of a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CampaignState {
    /// Made, and waiting for approvals.
    Draft,
    /// Enough people have approved it.
    Approved,
    /// Head-ends lease tasks.
    Running,
    /// No task can be leased; tasks under way continue to their end.
    Paused,
    /// Ended early, for good.
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

impl Campaign {
    /// I6: whether the approved content contains this step. The row of a task says which step is
    /// next; this decides whether the step was approved.
    pub fn plans(&self, step: &TaskStep) -> bool {
        self.content.action.plans(self.content.setup, step)
    }

    /// As [`Self::plans`], for a task whose mark does not bind its step
    /// ([`crate::SealKey::seal_former_task`]): the step must be the one that the approved content
    /// gives for this meter. A take-over has several steps: any imported key was approved, in any
    /// order.
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

/// What follows from the counts of the wave under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaveDecision {
    /// Go on.
    Wait,
    /// The wave has reached its threshold: the next wave begins.
    NextWave,
    /// Too many meters have failed.
    Pause {
        /// What failed, for people.
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

    /// I6: whether enough people have approved it. Approvals are counted again whenever a task is
    /// leased, not only when the last one is given.
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

    /// Pauses the campaign: no task can be leased.
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

    /// Resumes the campaign. The failures of this wave so far are accepted.
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

    /// Aborts the campaign, for good.
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

    /// What follows from the counts of the wave under way. It changes nothing; [`Self::end_wave`]
    /// and [`Self::pause`] do.
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

    /// Ends the wave under way. Begins the next wave, or finishes the campaign.
    ///
    /// # Errors
    /// It does not run.
    pub fn end_wave(&mut self, result: WaveResult, now: UnixMillis) -> Result<(), CampaignError> {
        if self.state != CampaignState::Running {
            return Err(self.wrong_state("moved to the next wave"));
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

    /// Whether a task may be begun now.
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

/// Why a campaign refuses a change.
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
    /// The approval is refused.
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

#[cfg(test)]
mod tests;
