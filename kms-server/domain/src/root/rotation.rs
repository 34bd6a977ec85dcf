//! The rotation of a storage KEK or of the seal root: a pass over all rows.

use super::RootId;
use crate::{ParseError, PrincipalId, UnixMillis, WriterId};

/// The position of a pass over all rows. Meters come first, then rows of other kinds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RowPlace {
    /// Which kind of rows: 0 meters, then the kinds that the pass looks at, in order.
    pub stage: u32,
    /// The id of the last row that was read; empty: no row of this kind yet.
    pub after: Vec<u8>,
}

/// The state of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootRotationState {
    /// The pass runs.
    Running,
    /// An officer stopped the pass, or rows were refused.
    Paused,
    /// A whole round found nothing to do.
    Finished,
}

impl RootRotationState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Running, Self::Paused, Self::Finished];

    /// The number in rows, from 1.
    pub const fn number(self) -> u32 {
        match self {
            Self::Running => 1,
            Self::Paused => 2,
            Self::Finished => 3,
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
            .ok_or_else(|| ParseError::new("root rotation state", format!("`{number}` is not 1 to 3")))
    }

    /// The name in output and records.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Finished => "finished",
        }
    }
}

/// The pass that moves all rows to a version of a storage KEK or of the seal root. It is a row,
/// from which every server can continue the pass.
///
/// A pass runs in rounds. It ends after a round that changed no row and skipped none: this proves
/// that nothing uses earlier versions. After any other round comes one more. So the pass also finds
/// rows that a server wrote behind it before that server knew the new version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootRotation {
    /// To which version.
    pub to: RootId,
    /// Its state.
    pub state: RootRotationState,
    /// Since when.
    pub since: UnixMillis,
    /// Why it is paused. Of a finished one: why the old seal key is still accepted.
    pub reason: String,
    /// Who began it.
    pub requested_by: PrincipalId,
    /// When.
    pub began: UnixMillis,
    /// The most rows that the pass reads in a second.
    pub rows_per_second: u32,
    /// How many rows there were when it began.
    pub rows: u64,
    /// The number of the round, from 1.
    pub round: u32,
    /// Where the round is.
    pub place: RowPlace,
    /// Rows that this round has read.
    pub looked: u64,
    /// Rows that this round has written.
    pub changed: u64,
    /// Rows that this round skipped: they did not verify, or the HSM refused their keys.
    pub refused: u64,
    /// Rows that all rounds have written.
    pub all_changed: u64,
    /// Keys that all rounds have wrapped anew.
    pub keys: u64,
    /// Which run of a server leads the pass, and until when.
    pub lead: Option<(WriterId, UnixMillis)>,
}

/// The result of one page of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassPage {
    /// Where the page began: the row must have this position.
    pub from: RowPlace,
    /// Where the page ended; none: after the last row of the last kind.
    pub next: Option<RowPlace>,
    /// Rows that were read.
    pub looked: u64,
    /// Rows that were written.
    pub changed: u64,
    /// Rows that were skipped.
    pub refused: u64,
    /// Keys that were wrapped anew.
    pub keys: u64,
}

impl RootRotation {
    /// A rotation that begins.
    pub fn new(to: RootId, requested_by: PrincipalId, rows_per_second: u32, rows: u64, now: UnixMillis) -> Self {
        Self {
            to,
            state: RootRotationState::Running,
            since: now,
            reason: String::new(),
            requested_by,
            began: now,
            rows_per_second,
            rows,
            round: 1,
            place: RowPlace::default(),
            looked: 0,
            changed: 0,
            refused: 0,
            all_changed: 0,
            keys: 0,
            lead: None,
        }
    }

    /// Whether this run of a server may lead the pass now.
    pub fn may_lead(&self, writer: WriterId, now: UnixMillis) -> bool {
        self.lead.is_none_or(|(leader, until)| leader == writer || until <= now)
    }

    /// Counts a page, in the act that writes its rows. False: another server was faster, and
    /// nothing may be written.
    pub fn advance(&mut self, page: &PassPage, writer: WriterId, lead_ms: i64, now: UnixMillis) -> bool {
        if self.state != RootRotationState::Running || self.place != page.from {
            return false;
        }
        self.lead = Some((writer, now.after(lead_ms)));
        self.looked += page.looked;
        self.changed += page.changed;
        self.refused += page.refused;
        self.all_changed += page.changed;
        self.keys += page.keys;
        match &page.next {
            Some(next) => self.place = next.clone(),
            None => self.end_round(now),
        }
        true
    }

    fn end_round(&mut self, now: UnixMillis) {
        self.place = RowPlace::default();
        self.lead = None;
        if self.refused > 0 {
            let rows = if self.refused == 1 { "1 row".to_owned() } else { format!("{} rows", self.refused) };
            self.move_to(RootRotationState::Paused, format!("{rows} skipped: unreadable, or refused by the HSM"), now);
        } else if self.changed == 0 {
            self.move_to(RootRotationState::Finished, String::new(), now);
            return;
        }
        self.round += 1;
        (self.looked, self.changed, self.refused) = (0, 0, 0);
    }

    /// Pauses the pass.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&mut self, reason: String, now: UnixMillis) -> Result<(), RootRotationState> {
        if self.state != RootRotationState::Running {
            return Err(self.state);
        }
        self.move_to(RootRotationState::Paused, reason, now);
        Ok(())
    }

    /// Continues where the pass stopped, at this rate. A finished pass reads all rows once more.
    ///
    /// # Errors
    /// It runs.
    pub fn resume(&mut self, rows_per_second: Option<u32>, now: UnixMillis) -> Result<(), RootRotationState> {
        match self.state {
            RootRotationState::Running => return Err(self.state),
            RootRotationState::Paused => {}
            RootRotationState::Finished => {
                self.round += 1;
                (self.looked, self.changed, self.refused) = (0, 0, 0);
            }
        }
        self.rows_per_second = rows_per_second.unwrap_or(self.rows_per_second);
        self.move_to(RootRotationState::Running, String::new(), now);
        Ok(())
    }

    fn move_to(&mut self, state: RootRotationState, reason: String, now: UnixMillis) {
        self.state = state;
        self.reason = reason;
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IslandName, KeyClass, Role, RootPurpose};

    const NOW: UnixMillis = UnixMillis(1_000_000);
    const STORAGE: RootPurpose = RootPurpose::StorageKek(KeyClass::Session);

    fn writer(number: u8) -> WriterId {
        WriterId::from_octets(&[number; 16]).unwrap()
    }

    fn rotation() -> RootRotation {
        let officer = PrincipalId::new(IslandName::parse("north").unwrap(), Role::Officer, "ada").unwrap();
        RootRotation::new(RootId { purpose: STORAGE, version: 2 }, officer, 500, 10, NOW)
    }

    fn at(number: u8) -> RowPlace {
        RowPlace { stage: 0, after: vec![number] }
    }

    #[test]
    fn a_pass_ends_after_a_round_that_found_nothing() {
        let mut rotation = rotation();
        let first = PassPage { next: Some(at(5)), looked: 5, changed: 5, keys: 20, ..PassPage::default() };
        assert!(rotation.advance(&first, writer(1), 1_000, NOW));
        // The same page again, by a server that was slower or after a crash: nothing is counted
        // twice.
        assert!(!rotation.advance(&first, writer(2), 1_000, NOW));
        assert!(
            rotation.may_lead(writer(1), NOW)
                && !rotation.may_lead(writer(2), NOW)
                && rotation.may_lead(writer(2), NOW.after(1_000))
        );
        assert!(rotation.advance(&PassPage { from: at(5), looked: 5, ..PassPage::default() }, writer(2), 1_000, NOW));
        assert_eq!(
            (rotation.state, rotation.round, rotation.all_changed, rotation.keys),
            (RootRotationState::Running, 2, 5, 20)
        );
        assert!(rotation.advance(&PassPage { looked: 10, ..PassPage::default() }, writer(2), 1_000, NOW));
        assert_eq!((rotation.state, rotation.round, rotation.looked), (RootRotationState::Finished, 2, 10));
        assert!(!rotation.advance(&PassPage { looked: 10, ..PassPage::default() }, writer(2), 1_000, NOW));
        // Something was found afterwards that uses an earlier version: all rows are looked at once
        // more.
        rotation.resume(None, NOW).unwrap();
        assert_eq!((rotation.state, rotation.round, rotation.looked), (RootRotationState::Running, 3, 0));
        assert_eq!(rotation.resume(None, NOW), Err(RootRotationState::Running));
    }

    #[test]
    fn rows_that_had_to_be_left_pause_it() {
        let mut rotation = rotation();
        assert!(rotation.advance(&PassPage { looked: 10, refused: 1, ..PassPage::default() }, writer(1), 1_000, NOW));
        assert_eq!(
            (rotation.state, rotation.reason.as_str()),
            (RootRotationState::Paused, "1 row skipped: unreadable, or refused by the HSM")
        );
        assert_eq!(rotation.pause("again".to_owned(), NOW), Err(RootRotationState::Paused));
        rotation.resume(Some(9), NOW).unwrap();
        assert_eq!(
            (rotation.state, rotation.round, rotation.rows_per_second, rotation.refused),
            (RootRotationState::Running, 2, 9, 0)
        );
    }
}
