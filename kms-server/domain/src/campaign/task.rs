//! Tasks: what a campaign has to do with one meter, leased to the meter's head-end.
//!
//! A lease ends by itself. Each lease has a fencing token that is one higher than the last, so that
//! who has lost a lease is told apart from who holds it. Times are those of the database's clock,
//! which all servers share.

use crate::{Campaign, CampaignState, KeyType, Meter, Outcome, ParseError, SecuritySetupId, UnixMillis};

/// What is to be done with one meter, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The step at hand. Take-over has several.
    pub step: TaskStep,
    /// Where it stands.
    pub state: TaskState,
    /// It is in doubt what the meter holds: it is probed before anything is tried again, if an
    /// exchange can show it.
    pub probe: bool,
    /// Attempts of this step that ended badly.
    pub attempts: u32,
    /// A pending task may be leased from this moment on; a lease ends at it. Far away when the task
    /// has ended.
    pub due: UnixMillis,
    /// The fencing token of the last lease; 0 before the first.
    pub fence: u64,
    /// When it was leased last; 0 for never.
    pub leased: UnixMillis,
    /// When it ended; 0 before.
    pub ended: UnixMillis,
    /// Why the last attempt ended badly; empty otherwise.
    pub reason: String,
}

/// One thing to do with a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaskStep {
    /// The security setup.
    pub setup: SecuritySetupId,
    /// What.
    pub work: TaskWork,
    /// The number of the version that was active before; 0 for none.
    pub from: u32,
}

impl TaskStep {
    /// Whether it concerns keys of the meter itself; else a key of its group.
    pub fn is_own(&self, meter: &Meter) -> bool {
        match self.work {
            TaskWork::Probe => true,
            TaskWork::Rotate(key_type) => meter.slots.get(self.setup, key_type).is_some(),
        }
    }
}

/// What a head-end has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskWork {
    /// An exchange that shows which keys the meter holds.
    Probe,
    /// A transfer of a new version. A KEK goes together with a GUEK.
    Rotate(KeyType),
}

impl std::fmt::Display for TaskWork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Probe => f.write_str("probe"),
            Self::Rotate(key_type) => write!(f, "rotate {key_type}"),
        }
    }
}

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TaskState {
    /// Waiting to be leased.
    Pending,
    /// Leased, and not begun.
    Leased,
    /// A transfer or probe has begun.
    UnderWay,
    /// Done.
    Succeeded,
    /// Given up; the meter holds what it held.
    Failed,
    /// Given up; it is in doubt what the meter holds.
    InDoubt,
    /// Not to be done.
    Skipped,
}

impl TaskState {
    /// All states.
    pub const ALL: [Self; 7] =
        [Self::Pending, Self::Leased, Self::UnderWay, Self::Succeeded, Self::Failed, Self::InDoubt, Self::Skipped];

    /// The number in rows, from 1.
    pub const fn number(self) -> u32 {
        match self {
            Self::Pending => 1,
            Self::Leased => 2,
            Self::UnderWay => 3,
            Self::Succeeded => 4,
            Self::Failed => 5,
            Self::InDoubt => 6,
            Self::Skipped => 7,
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
            .ok_or_else(|| ParseError::new("task state", format!("`{number}` is not 1 to 7")))
    }

    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Leased => "leased",
            Self::UnderWay => "under-way",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::InDoubt => "in-doubt",
            Self::Skipped => "skipped",
        }
    }

    /// The state of this name.
    ///
    /// # Errors
    /// No state has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|state| state.name() == name).ok_or_else(|| {
            ParseError::new(
                "task state",
                format!(
                    "`{}` is not pending, leased, under-way, succeeded, failed, in-doubt or skipped",
                    name.escape_debug()
                ),
            )
        })
    }

    /// Whether nothing comes after it.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::InDoubt | Self::Skipped)
    }

    const fn is_leased(self) -> bool {
        matches!(self, Self::Leased | Self::UnderWay)
    }
}

/// What the end of an attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskEnd {
    /// The task had ended before; nothing was changed.
    Unchanged,
    /// It is tried again, or the next step follows.
    GoesOn,
    /// It has ended.
    Ended,
}

/// Why a lease is not good for what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    /// The lease is over: another one was given out, it ran out, or the task has ended.
    #[error("the lease of this task is not held any more: it ran out, was given back, or another one was given out")]
    NotHeld,
    /// The task asks for something else.
    #[error("the task is to {wanted}")]
    OtherWork {
        /// What it asks for.
        wanted: TaskWork,
    },
}

impl Task {
    /// A task that waits.
    pub const fn new(step: TaskStep, now: UnixMillis) -> Self {
        Self {
            step,
            state: TaskState::Pending,
            probe: false,
            attempts: 0,
            due: now,
            fence: 0,
            leased: UnixMillis(0),
            ended: UnixMillis(0),
            reason: String::new(),
        }
    }

    /// A task that is not to be done.
    pub fn skipped(step: TaskStep, reason: &str, now: UnixMillis) -> Self {
        let mut task = Self::new(step, now);
        task.skip(reason, now);
        task
    }

    /// Ends the task: it is not to be done, or not any more. A meter that may hold another key by
    /// now stays in doubt.
    pub fn skip(&mut self, reason: &str, now: UnixMillis) {
        self.reason = reason.to_owned();
        // After a probe it is still in doubt which KEK the meter holds: no exchange shows it.
        let hidden = self.step.work == TaskWork::Rotate(KeyType::KEK);
        let in_doubt = self.state == TaskState::UnderWay || ((self.probe || hidden) && self.attempts > 0);
        self.finish(if in_doubt { TaskState::InDoubt } else { TaskState::Skipped }, now);
    }

    /// What is to be done now.
    pub const fn work(&self) -> TaskWork {
        match self.step.work {
            TaskWork::Rotate(key_type) if self.probe && key_type.is_shown_by_exchanges() => TaskWork::Probe,
            work => work,
        }
    }

    /// Whether it can be leased: it waits and its time has come, or its lease has run out.
    pub const fn is_due(&self, now: UnixMillis) -> bool {
        !self.state.is_final() && self.due.0 <= now.0
    }

    /// Leases it for `lease_ms`. A lease that ran out before counts as an attempt, so that a task
    /// that nobody ends comes to an end. Whether it was leased; if not, it has ended.
    ///
    /// # Errors
    /// It is not due.
    pub fn lease(&mut self, campaign: &Campaign, lease_ms: i64, now: UnixMillis) -> Result<bool, TaskError> {
        if !self.is_due(now) {
            return Err(TaskError::NotHeld);
        }
        if self.state.is_leased() && self.ran_out(campaign, now) {
            return Ok(false);
        }
        self.state = TaskState::Leased;
        self.fence += 1;
        self.leased = now;
        self.due = now.after(lease_ms);
        Ok(true)
    }

    /// Whether the lease with this fencing token is held.
    ///
    /// # Errors
    /// It is not.
    pub const fn check(&self, fence: u64, now: UnixMillis) -> Result<(), TaskError> {
        if self.state.is_leased() && self.fence == fence && now.0 < self.due.0 {
            Ok(())
        } else {
            Err(TaskError::NotHeld)
        }
    }

    /// Renews the lease for `lease_ms`.
    ///
    /// # Errors
    /// It is not held.
    pub const fn renew(&mut self, fence: u64, lease_ms: i64, now: UnixMillis) -> Result<(), TaskError> {
        if self.check(fence, now).is_err() {
            return Err(TaskError::NotHeld);
        }
        self.due = now.after(lease_ms);
        Ok(())
    }

    /// Gives the lease back. With a reason it counts as an attempt; without one it costs nothing,
    /// unless something has begun.
    ///
    /// # Errors
    /// It is not held.
    pub fn release(&mut self, campaign: &Campaign, fence: u64, reason: &str, now: UnixMillis) -> Result<(), TaskError> {
        self.check(fence, now)?;
        let begun = self.state == TaskState::UnderWay;
        if begun || !reason.is_empty() {
            self.fail(campaign, if reason.is_empty() { "given back" } else { reason }, begun, now);
        } else {
            self.state = TaskState::Pending;
            self.due = now;
        }
        Ok(())
    }

    /// Ends the lease, because the meter has become another head-end's. What has begun may have
    /// left a key there, so the meter is probed.
    pub const fn pass_on(&mut self, now: UnixMillis) {
        if self.state.is_leased() {
            self.probe |= matches!(self.state, TaskState::UnderWay);
            self.wait(now);
        }
    }

    /// Begins a transfer or probe. A probe may be begun at any time: it harms nothing.
    ///
    /// # Errors
    /// The lease is not held, or the task asks for something else.
    pub fn begin(
        &mut self,
        fence: u64,
        setup: SecuritySetupId,
        work: TaskWork,
        now: UnixMillis,
    ) -> Result<(), TaskError> {
        self.check(fence, now)?;
        let fits = setup == self.step.setup && (work == self.work() || work == TaskWork::Probe);
        if !fits {
            return Err(TaskError::OtherWork { wanted: self.work() });
        }
        self.state = TaskState::UnderWay;
        Ok(())
    }

    /// Takes the outcome of a transfer or probe. `meter` is as it stands after it. What a transfer
    /// has shown is a fact, so it counts whether the lease is still held or not.
    pub fn end(
        &mut self,
        campaign: &Campaign,
        outcome: Outcome,
        reason: &str,
        meter: &Meter,
        now: UnixMillis,
    ) -> TaskEnd {
        let reached = self.is_reached(meter);
        if self.state.is_final() && !(self.state == TaskState::InDoubt && reached) {
            return TaskEnd::Unchanged;
        }
        let why = if reason.is_empty() { outcome.name() } else { reason };
        match outcome {
            Outcome::Proven | Outcome::Acknowledged | Outcome::Attested => self.succeed(campaign, meter, now),
            Outcome::Probed if self.step.work == TaskWork::Probe || reached => self.succeed(campaign, meter, now),
            // What an exchange can show is known now, be it an earlier key: the transfer can be
            // tried.
            Outcome::Probed => {
                self.probe = false;
                self.wait(now);
                TaskEnd::GoesOn
            }
            Outcome::InDoubt => self.fail(campaign, why, true, now),
            Outcome::NotApplied | Outcome::Withdrawn => self.fail(campaign, why, self.is_unresolved(meter), now),
        }
    }

    /// Whether the meter's row says that the key is rotated: a later version than before is active,
    /// and it is not in doubt. That counts, whatever the task's own row says, which may be an older
    /// one that somebody put back (I5). Keys of groups are not looked at: one version is brought
    /// again.
    pub fn is_reached(&self, meter: &Meter) -> bool {
        match self.step.work {
            TaskWork::Probe => false,
            TaskWork::Rotate(key_type) => meter.slots.get(self.step.setup, key_type).is_some_and(|slot| {
                !slot.in_doubt() && slot.active().is_some_and(|version| version.number().number() > self.step.from)
            }),
        }
    }

    fn is_unresolved(&self, meter: &Meter) -> bool {
        match self.step.work {
            TaskWork::Probe => false,
            TaskWork::Rotate(key_type) => {
                meter.slots.get(self.step.setup, key_type).is_some_and(crate::Slot::unresolved)
            }
        }
    }

    fn succeed(&mut self, campaign: &Campaign, meter: &Meter, now: UnixMillis) -> TaskEnd {
        self.probe = false;
        self.reason.clear();
        match campaign.content.action.next_step(meter, campaign.content.setup, self.step) {
            Some(next) if !campaign.state.is_final() => {
                self.step = next;
                self.attempts = 0;
                self.wait(now);
                TaskEnd::GoesOn
            }
            _ => self.finish(TaskState::Succeeded, now),
        }
    }

    fn fail(&mut self, campaign: &Campaign, reason: &str, in_doubt: bool, now: UnixMillis) -> TaskEnd {
        self.attempts = self.attempts.saturating_add(1);
        self.reason = reason.to_owned();
        self.probe |= in_doubt;
        if self.attempts >= u32::from(campaign.content.terms.attempts.get()) || campaign.state == CampaignState::Aborted
        {
            let state =
                if self.probe && self.step.work != TaskWork::Probe { TaskState::InDoubt } else { TaskState::Failed };
            return self.finish(state, now);
        }
        self.wait(now.after(campaign.content.terms.back_off_ms(self.attempts)));
        TaskEnd::GoesOn
    }

    /// A lease that ended without a word. Whether the task has ended with it.
    fn ran_out(&mut self, campaign: &Campaign, now: UnixMillis) -> bool {
        let begun = self.state == TaskState::UnderWay;
        self.fail(campaign, "the lease ran out", begun, now) == TaskEnd::Ended
    }

    const fn wait(&mut self, due: UnixMillis) {
        self.state = TaskState::Pending;
        self.due = due;
    }

    const fn finish(&mut self, state: TaskState, now: UnixMillis) -> TaskEnd {
        self.state = state;
        self.due = NEVER;
        self.ended = now;
        TaskEnd::Ended
    }
}

/// Due of a task that has ended.
const NEVER: UnixMillis = UnixMillis(i64::MAX);
