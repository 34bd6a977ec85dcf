//! Tasks: what a campaign does to one meter, leased to the meter's head-end.
//!
//! A task lease ends at its time. Each lease has a fencing token that is one higher than the last,
//! so the server can tell a head-end that has lost its lease from the one that holds it. Times are
//! those of the database's clock, which all servers share.

use crate::{
    Campaign, CampaignState, KeyType, Meter, Outcome, SecuritySetupId, TaskState, TaskStep, TaskWork, UnixMillis,
};

/// What is done to one meter, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The present step. A take-over has several.
    pub step: TaskStep,
    /// Its state.
    pub state: TaskState,
    /// It is in doubt what the meter holds: the meter is probed before the step is tried again, if
    /// an exchange can show it.
    pub probe: bool,
    /// Attempts of this step that failed.
    pub attempts: u32,
    /// A pending task may be leased from this moment on; a lease ends at this moment. The end of
    /// time for a task that has ended.
    pub due: UnixMillis,
    /// The fencing token of the last lease; 0 before the first.
    pub fence: u64,
    /// When it was leased last; 0 for never.
    pub leased: UnixMillis,
    /// When it ended; 0 before.
    pub ended: UnixMillis,
    /// Why the last attempt failed; empty otherwise.
    pub reason: String,
}

/// The result of the end of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskEnd {
    /// The task had ended already; nothing was changed.
    Unchanged,
    /// It is tried again, or the next step follows.
    GoesOn,
    /// It has ended.
    Ended,
}

/// Why a task lease does not permit what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    /// The lease is over: it ran out, was released, was replaced by another lease, or the task has
    /// ended.
    #[error(
        "the lease of this task is over: it ran out, was released, or was replaced by another lease; lease tasks again"
    )]
    NotHeld,
    /// The task requires something else.
    #[error("the task requires another step: {wanted}")]
    OtherWork {
        /// What it requires.
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

    /// A task that is not executed.
    pub fn skipped(step: TaskStep, reason: &str, now: UnixMillis) -> Self {
        let mut task = Self::new(step, now);
        task.skip(reason, now);
        task
    }

    /// Ends the task without executing it. If the meter may hold another key by now, the task ends
    /// in doubt.
    pub fn skip(&mut self, reason: &str, now: UnixMillis) {
        self.reason = reason.to_owned();
        // A probe does not show which KEK the meter holds, so that stays in doubt.
        let hidden = self.step.work == TaskWork::Rotate(KeyType::KEK);
        let in_doubt = self.state == TaskState::UnderWay || ((self.probe || hidden) && self.attempts > 0);
        self.finish(if in_doubt { TaskState::InDoubt } else { TaskState::Skipped }, now);
    }

    /// What a head-end does next.
    pub const fn work(&self) -> TaskWork {
        match self.step.work {
            TaskWork::Rotate(key_type) if self.probe && key_type.is_shown_by_exchanges() => TaskWork::Probe,
            work => work,
        }
    }

    /// Whether it can be leased: it is pending and due, or its lease has run out.
    pub const fn is_due(&self, now: UnixMillis) -> bool {
        !self.state.is_final() && self.due.0 <= now.0
    }

    /// Leases it for `lease_ms`. A lease that ran out counts as an attempt, so that a task that no
    /// head-end ends still ends. Returns whether it was leased; if not, the task has ended.
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

    /// Releases the lease. With a reason this counts as an attempt; without one it does not, unless
    /// a transfer or probe has begun.
    ///
    /// # Errors
    /// It is not held.
    pub fn release(&mut self, campaign: &Campaign, fence: u64, reason: &str, now: UnixMillis) -> Result<(), TaskError> {
        self.check(fence, now)?;
        let begun = self.state == TaskState::UnderWay;
        if begun || !reason.is_empty() {
            self.fail(campaign, if reason.is_empty() { "released" } else { reason }, begun, now);
        } else {
            self.state = TaskState::Pending;
            self.due = now;
        }
        Ok(())
    }

    /// Ends the lease because the meter is assigned to another head-end now. A transfer that has
    /// begun may have left a key in the meter, so the meter is probed.
    pub const fn pass_on(&mut self, now: UnixMillis) {
        if self.state.is_leased() {
            self.probe |= matches!(self.state, TaskState::UnderWay);
            self.wait(now);
        }
    }

    /// Begins a transfer or probe. A probe may be begun at any time: it changes no key.
    ///
    /// # Errors
    /// The lease is not held, or the task requires something else.
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

    /// Notes the outcome of a transfer or probe. `meter` is the meter after it. What a transfer has
    /// shown is a fact, so it counts even if the lease is not held any more.
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
            // The probe has shown which key the meter holds, even if it is an earlier one: the
            // transfer can be tried.
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
    /// and nothing is in doubt. This counts more than the task's own row, which somebody may have
    /// replaced by an older one (I5). Keys of groups are not checked: the same version is delivered
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

    /// Ends an attempt whose lease ran out. Returns whether the task has ended with it.
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
