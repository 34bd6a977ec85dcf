//! The tasks of a wave by their states: how many are open, and how the others ended.

use crate::{ParseError, UnixMillis};

/// The state of a task.
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
    /// Given up; the meter holds the key that it held before.
    Failed,
    /// Given up; it is in doubt what the meter holds.
    InDoubt,
    /// Not executed.
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

    pub(super) const fn is_leased(self) -> bool {
        matches!(self, Self::Leased | Self::UnderWay)
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
    /// Given up; the meter holds the key that it held before.
    pub failed: u64,
    /// Given up; it is in doubt what the meter holds.
    pub in_doubt: u64,
    /// Not executed: the meter has no head-end, is out of service, or has no such key any more.
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

    /// Tasks that failed or are in doubt.
    pub const fn failures(&self) -> u64 {
        self.failed + self.in_doubt
    }
}

/// The result of a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaveResult {
    /// When it began.
    pub started: UnixMillis,
    /// When its last task ended.
    pub ended: UnixMillis,
    /// How many meters ended how, by vendor and reason.
    pub tallies: Vec<WaveTally>,
    /// How many had succeeded at which time, in order: for plots.
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
