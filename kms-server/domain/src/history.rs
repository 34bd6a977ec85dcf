//! What the island's row knows of its database's history: restores, and by how much they raised all
//! counters (I4).

/// By how much every invocation counter of the island was raised since the ceremony, over all
/// restores. It only grows.
///
/// After a restore it is unknown which counters were allocated since the backup. So a restore
/// raises this one number, and each counter adds the difference at its next reservation
/// ([`crate::Counters::reserve`]). A restore writes nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CounterJump(u64);

impl CounterJump {
    /// Of an island that was never restored.
    pub const NONE: Self = Self(0);

    /// A jump of this many counters in all.
    pub const fn new(counters: u64) -> Self {
        Self(counters)
    }

    /// The number of counters.
    pub const fn counters(self) -> u64 {
        self.0
    }

    /// After one more restore that raises all counters by `counters`.
    #[must_use]
    pub const fn raised_by(self, counters: u32) -> Self {
        Self(self.0.saturating_add(counters as u64))
    }

    /// How much a counter that has added `taken` still lacks; 0 if nothing.
    pub const fn beyond(self, taken: Self) -> u64 {
        self.0.saturating_sub(taken.0)
    }
}

/// The position of a PostgreSQL cluster in its history. Another value than before means a fail-over
/// or a restored backup: restored mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timeline {
    /// The cluster's system identifier.
    pub cluster: i64,
    /// The timeline that the cluster writes, from 1.
    pub number: u32,
}

impl std::fmt::Display for Timeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "timeline {} of cluster {}", self.number, self.cluster.cast_unsigned())
    }
}

/// The database's history, as far as the island's row knows it. The default is that of a new
/// island.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DatabaseHistory {
    /// The timeline that was written last; `None` with SQLite, and before the first server started.
    pub timeline: Option<Timeline>,
    /// How many restores were noticed or declared.
    pub restores: u32,
    /// By how much they raised all counters.
    pub jump: CounterJump,
}

impl DatabaseHistory {
    /// The history after one more restore: all counters are raised by `counters`, from the highest
    /// jump that is known.
    #[must_use]
    pub fn restored(self, timeline: Option<Timeline>, remembered: CounterJump, counters: u32) -> Self {
        // I4: the row may be older than an earlier restore, whose jump is in use already.
        Self {
            timeline,
            restores: self.restores.saturating_add(1),
            jump: self.jump.max(remembered).raised_by(counters),
        }
    }
}
