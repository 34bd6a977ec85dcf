//! Work orders: who may work at which meters, for which tasks, and when. A workforce system or an
//! officer makes them; what a technician's handheld gets follows from them.

use std::fmt;

use crate::{ParseError, PersonName, PrincipalId, SystemTitle, UnixMillis, WorkOrderId};

/// A work order: a sealed row (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkOrder {
    /// The id that the workforce system gave it.
    pub id: WorkOrderId,
    /// From 1, one more with each change, the end included. A change names the revision that it
    /// was made for.
    pub revision: u32,
    /// The principal that made it.
    pub maker: PrincipalId,
    /// What is ordered.
    pub content: WorkOrderContent,
    /// As long as there is a place. It is no part of the content: what is ordered is the same with
    /// another one.
    pub(crate) salt: Option<PlaceSalt>,
    /// When it was made.
    pub created: UnixMillis,
    /// How it ended; `None`: it was neither completed nor cancelled.
    pub end: Option<WorkOrderEnd>,
}

/// What is ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkOrderContent {
    /// Who does the work.
    pub technician: PersonName,
    /// The meters, 1 to [`WorkOrder::MOST_METERS`], ascending, each once.
    pub(crate) meters: Vec<SystemTitle>,
    /// What is done at each of them: one task or more.
    pub tasks: WorkOrderTasks,
    /// From then on.
    pub from: UnixMillis,
    /// Until then, not included.
    pub until: UnixMillis,
    /// Where. It is in no audit record, and is removed some time after the order's end.
    pub place: Place,
}

impl WorkOrderContent {
    /// An order's content. The meters are sorted.
    ///
    /// # Errors
    /// No meter, too many, or one twice; no task; or a time that does not end after its begin, or
    /// that is longer than [`WorkOrder::LONGEST_MS`].
    pub fn new(
        technician: PersonName,
        mut meters: Vec<SystemTitle>,
        tasks: WorkOrderTasks,
        (from, until): (UnixMillis, UnixMillis),
        place: Place,
    ) -> Result<Self, ParseError> {
        meters.sort_unstable();
        let content = Self { technician, meters, tasks, from, until, place };
        content.check()?;
        Ok(content)
    }

    /// The meters, ascending.
    pub fn meters(&self) -> &[SystemTitle] {
        &self.meters
    }

    /// Whether the order is for this meter.
    pub fn has(&self, meter: SystemTitle) -> bool {
        self.meters.binary_search(&meter).is_ok()
    }

    fn check(&self) -> Result<(), ParseError> {
        let count = self.meters.len();
        if !(1..=WorkOrder::MOST_METERS).contains(&count) {
            return Err(ParseError::new(
                "meters",
                format!("{count} meters; a work order has 1 to {}", WorkOrder::MOST_METERS),
            ));
        }
        for (meter, next) in self.meters.iter().zip(self.meters.iter().skip(1)) {
            if meter == next {
                return Err(ParseError::new("meters", format!("{meter} occurs twice")));
            }
            if meter > next {
                return Err(ParseError::new("meters", "they are not in order"));
            }
        }
        if self.tasks.is_empty() {
            return Err(ParseError::new("tasks", "there is no task"));
        }
        if self.until <= self.from {
            return Err(ParseError::new("until", "the end is not after the begin"));
        }
        if self.until.0.saturating_sub(self.from.0) > WorkOrder::LONGEST_MS {
            let days = WorkOrder::LONGEST_MS / DAY_MS;
            return Err(ParseError::new("until", format!("the end is more than {days} days after the begin")));
        }
        Ok(())
    }

    /// Whether both order the same. Case and the number of spaces of the technician's name do not
    /// matter.
    pub fn is_same(&self, other: &Self) -> bool {
        let Self { technician, meters, tasks, from, until, place } = self;
        technician.is_same(&other.technician)
            && *meters == other.meters
            && *tasks == other.tasks
            && (*from, *until) == (other.from, other.until)
            && *place == other.place
    }

    /// Checks the times of content that is new at `now`.
    ///
    /// # Errors
    /// The end has passed, or the begin is too far ahead.
    pub fn check_new(&self, now: UnixMillis) -> Result<(), ParseError> {
        if self.until <= now {
            return Err(ParseError::new("until", "the end has passed"));
        }
        if self.from.0.saturating_sub(now.0) > WorkOrder::FARTHEST_MS {
            let days = WorkOrder::FARTHEST_MS / DAY_MS;
            return Err(ParseError::new("from", format!("the begin is more than {days} days from now")));
        }
        Ok(())
    }
}

/// How a work order ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkOrderEnd {
    /// The work was done; otherwise the order was cancelled.
    pub completed: bool,
    /// By whom.
    pub principal: PrincipalId,
    /// When.
    pub time: UnixMillis,
}

/// The state of a work order at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkOrderState {
    /// Its time has not come yet.
    Planned,
    /// Its time has come.
    Open,
    /// Its time is over, and it was neither completed nor cancelled. It can be changed, so that it
    /// is planned or open again.
    Expired,
    /// The work was done.
    Completed,
    /// It was cancelled.
    Cancelled,
}

impl WorkOrderState {
    /// All states.
    pub const ALL: [Self; 5] = [Self::Planned, Self::Open, Self::Expired, Self::Completed, Self::Cancelled];

    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Open => "open",
            Self::Expired => "expired",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The state of this name.
    ///
    /// # Errors
    /// No state has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        let known = Self::ALL.into_iter().find(|state| state.name() == name);
        known.ok_or_else(|| ParseError::new("state", "it is not planned, open, expired, completed or cancelled"))
    }
}

impl fmt::Display for WorkOrderState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl WorkOrder {
    /// The most meters of an order.
    pub const MOST_METERS: usize = 5_000;
    /// The longest time of an order, in milliseconds: 31 days. Rights that follow from an order do
    /// not last for ever.
    pub const LONGEST_MS: i64 = 31 * DAY_MS;
    /// For how long an order counts for its maker after the end of its time, in milliseconds: 7
    /// days. An order of some seconds, or one that is cancelled at once, is never deleted either.
    pub const COUNTED_MS: i64 = 7 * DAY_MS;
    /// How far ahead an order may begin, in milliseconds: a year.
    const FARTHEST_MS: i64 = 366 * DAY_MS;

    /// A new order. `salt` is new random octets for its place.
    ///
    /// # Errors
    /// Its time is over, or too far ahead.
    pub fn new(
        id: WorkOrderId,
        maker: PrincipalId,
        content: WorkOrderContent,
        salt: PlaceSalt,
        now: UnixMillis,
    ) -> Result<Self, ParseError> {
        content.check_new(now)?;
        let salt = Some(salt).filter(|_| !content.place.is_empty());
        Ok(Self { id, revision: 1, maker, content, salt, created: now, end: None })
    }

    /// Checks what is always true of an order.
    pub(crate) fn check(&self) -> Result<(), ParseError> {
        if self.revision == 0 {
            return Err(ParseError::new("revision", "revisions start at 1"));
        }
        if self.salt.is_none() != self.content.place.is_empty() {
            return Err(ParseError::new("salt", "an order has one if it has a place, and only then"));
        }
        self.content.check()
    }

    /// Its state.
    pub fn state(&self, now: UnixMillis) -> WorkOrderState {
        match &self.end {
            Some(WorkOrderEnd { completed: true, .. }) => WorkOrderState::Completed,
            Some(_) => WorkOrderState::Cancelled,
            None if now < self.content.from => WorkOrderState::Planned,
            None if now < self.content.until => WorkOrderState::Open,
            None => WorkOrderState::Expired,
        }
    }

    /// Whether the order is this technician's. Case and the number of spaces do not matter.
    pub fn is_of(&self, technician: &PersonName) -> bool {
        self.content.technician.is_same(technician)
    }

    /// Whether the technician may do this task at this meter at this moment, by the verified row;
    /// policy decides beside it. Bundles for technicians will ask this. Nothing does yet: an order
    /// gives nobody a key or a frame.
    ///
    /// # Errors
    /// The first reason why not.
    pub fn permits(
        &self,
        technician: &PersonName,
        meter: SystemTitle,
        task: WorkOrderTask,
        at: UnixMillis,
    ) -> Result<(), NotOrdered> {
        let state = self.state(at);
        if state != WorkOrderState::Open {
            return Err(NotOrdered::State(state));
        }
        if !self.is_of(technician) {
            return Err(NotOrdered::Technician);
        }
        if !self.content.tasks.contains(task) {
            return Err(NotOrdered::Task(task));
        }
        if !self.content.has(meter) {
            return Err(NotOrdered::Meter(meter));
        }
        Ok(())
    }

    /// Replaces the content. `seen` is the revision that the change was made for, and `salt` is new
    /// random octets, for another place. False: the content is the same, and nothing changed.
    ///
    /// # Errors
    /// The order has ended, has another revision than `seen`, or the new time is over or too far
    /// ahead.
    pub fn change(
        &mut self,
        seen: u32,
        content: WorkOrderContent,
        salt: PlaceSalt,
        now: UnixMillis,
    ) -> Result<bool, WorkOrderError> {
        self.refuse_after_end(now)?;
        if seen != self.revision {
            return Err(WorkOrderError::OtherRevision { seen, is: self.revision });
        }
        if content == self.content {
            return Ok(false);
        }
        content.check_new(now)?;
        if content.place != self.content.place {
            self.salt = Some(salt).filter(|_| !content.place.is_empty());
        }
        self.content = content;
        self.revision = self.revision.saturating_add(1);
        Ok(true)
    }

    /// Ends the order: the work was done, or it is cancelled. Orders whose time is over can be
    /// ended too: a technician comes back late.
    ///
    /// # Errors
    /// It has ended.
    pub fn end(&mut self, completed: bool, principal: PrincipalId, now: UnixMillis) -> Result<(), WorkOrderError> {
        self.refuse_after_end(now)?;
        self.end = Some(WorkOrderEnd { completed, principal, time: now });
        self.revision = self.revision.saturating_add(1);
        Ok(())
    }

    /// Since when nothing can be done with the order as it is: since its end, or since its time was
    /// over. `None`: something can.
    fn over_since(&self, now: UnixMillis) -> Option<UnixMillis> {
        match &self.end {
            Some(end) => Some(end.time),
            None => Some(self.content.until).filter(|until| *until <= now),
        }
    }

    /// Removes the place of an order that has been over for `after_ms`. False: there is nothing to
    /// remove. The revision stays: what is ordered does not change.
    pub fn remove_place(&mut self, after_ms: i64, now: UnixMillis) -> bool {
        let due = self.over_since(now).is_some_and(|since| since.after(after_ms) <= now);
        let has_place = !self.content.place.is_empty();
        if due && has_place {
            self.content.place = Place::default();
            self.salt = None;
        }
        due && has_place
    }

    fn refuse_after_end(&self, now: UnixMillis) -> Result<(), WorkOrderError> {
        if self.end.is_some() { Err(WorkOrderError::Ended(self.state(now))) } else { Ok(()) }
    }
}

/// Why a work order refuses a change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkOrderError {
    /// It was completed or cancelled.
    #[error("the work order is {0}: it does not change any more")]
    Ended(WorkOrderState),
    /// Somebody changed it since the caller looked.
    #[error("the change was made for revision {seen}, and the work order has revision {is}: it changed since")]
    OtherRevision {
        /// The revision that the caller saw.
        seen: u32,
        /// Its revision.
        is: u32,
    },
    /// The new content is refused.
    #[error(transparent)]
    Content(#[from] ParseError),
}

/// Why a work order does not permit some work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotOrdered {
    /// Its time has not come, is over, or the order has ended.
    #[error("the work order is {0}")]
    State(WorkOrderState),
    /// It is another technician's.
    #[error("the work order is of another technician")]
    Technician,
    /// It has other tasks.
    #[error("the work order does not have the task `{0}`")]
    Task(WorkOrderTask),
    /// It is for other meters.
    #[error("the work order is not for meter {0}")]
    Meter(SystemTitle),
}

/// One kind of work at a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkOrderTask {
    /// Reading registers, profiles and events.
    Read,
    /// Setting parameters, tariffs and the clock.
    Configure,
    /// Switching the supply on or off.
    ControlSupply,
    /// Replacing the meter by another one.
    Replace,
    /// Firmware: transfer and activation.
    Firmware,
    /// Putting a meter into service.
    Commission,
}

impl WorkOrderTask {
    /// All tasks.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Configure, Self::ControlSupply, Self::Replace, Self::Firmware, Self::Commission];

    /// The name in policies, files and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Configure => "configure",
            Self::ControlSupply => "control-supply",
            Self::Replace => "replace",
            Self::Firmware => "firmware",
            Self::Commission => "commission",
        }
    }

    /// The task of this name.
    ///
    /// # Errors
    /// No task has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|task| task.name() == name).ok_or_else(|| {
            ParseError::new(
                "task",
                format!(
                    "`{}` is not read, configure, control-supply, replace, firmware or commission",
                    crate::id::excerpt(name)
                ),
            )
        })
    }

    /// Its bit in rows.
    const fn bit(self) -> u32 {
        match self {
            Self::Read => 1,
            Self::Configure => 1 << 1,
            Self::ControlSupply => 1 << 2,
            Self::Replace => 1 << 3,
            Self::Firmware => 1 << 4,
            Self::Commission => 1 << 5,
        }
    }
}

impl fmt::Display for WorkOrderTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of tasks.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct WorkOrderTasks(u32);

impl WorkOrderTasks {
    /// The set of these bits, as rows hold it.
    ///
    /// # Errors
    /// A bit that no task has: a newer version of the server wrote it.
    pub fn from_bits(bits: u32) -> Result<Self, ParseError> {
        let known: Self = WorkOrderTask::ALL.into_iter().collect();
        if bits & !known.0 != 0 {
            return Err(ParseError::new("tasks", format!("the tasks {bits:#b} are not all known")));
        }
        Ok(Self(bits))
    }

    /// The bits that rows hold: 1 read, 2 configure, 4 control-supply, 8 replace, 16 firmware,
    /// 32 commission.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether the task is in the set.
    pub const fn contains(self, task: WorkOrderTask) -> bool {
        self.0 & task.bit() != 0
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The tasks, in the order of [`WorkOrderTask::ALL`].
    pub fn iter(self) -> impl Iterator<Item = WorkOrderTask> {
        WorkOrderTask::ALL.into_iter().filter(move |task| self.contains(*task))
    }

    /// Their names.
    pub fn names(self) -> Vec<String> {
        self.iter().map(|task| task.name().to_owned()).collect()
    }
}

impl FromIterator<WorkOrderTask> for WorkOrderTasks {
    fn from_iter<I: IntoIterator<Item = WorkOrderTask>>(tasks: I) -> Self {
        Self(tasks.into_iter().fold(0, |bits, task| bits | task.bit()))
    }
}

impl fmt::Debug for WorkOrderTasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Where the work is: free text of at most 256 octets of UTF-8 without control characters; may be
/// empty. It often names a person's home, so it is in no audit record and is not printed for
/// debugging.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Place(String);

impl Place {
    /// The longest place, in octets.
    const LONGEST: usize = 256;

    /// The place of this text.
    ///
    /// # Errors
    /// It is too long, or has control characters.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if text.len() > Self::LONGEST || text.chars().any(char::is_control) {
            return Err(ParseError::new(
                "place",
                format!("not at most {} octets without control characters", Self::LONGEST),
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({} octets)", self.0.len())
    }
}

/// 16 random octets in the row of an order that has a place, made anew with each place. The digest
/// of a row in audit records has no key, and a reader of the log knows the rest of the row: without
/// these octets that reader could try addresses until the digest fits.
#[derive(Clone, PartialEq, Eq)]
pub struct PlaceSalt([u8; 16]);

impl PlaceSalt {
    /// These octets, from a random generator.
    pub const fn new(random: [u8; 16]) -> Self {
        Self(random)
    }

    /// The salt of a row; empty is none.
    pub(crate) fn from_octets(octets: &[u8]) -> Result<Option<Self>, ParseError> {
        if octets.is_empty() {
            return Ok(None);
        }
        let octets = octets.try_into().map_err(|_| ParseError::new("salt", "it is not 16 octets"))?;
        Ok(Some(Self(octets)))
    }

    pub(crate) const fn octets(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for PlaceSalt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PlaceSalt(16 octets)")
    }
}

const DAY_MS: i64 = 24 * 3_600 * 1_000;
