//! Restored mode (I4): finds out that the database is older than what was served from it, and
//! raises all counters before any is dealt.
//!
//! Three things tell: the timeline of a PostgreSQL cluster is another one than the island's row
//! names; the log lacks a record that this server remembers in its watermark file; an operator says
//! so. The island's row then gets a higher [`CounterJump`], in one act with its record. That is all
//! that has to be written: each counter takes the jump at its next reservation.

use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use kms_domain::{CounterJump, DatabaseHistory, Island, IslandName, SealKey, SealKeys, Timeline, WriterId};
use kms_proto::v1::{SecurityEvent, audit_record::Event};
use serde::{Deserialize, Serialize};

use super::{Decision, view::View};
use kms_base::error::ServiceError;
use kms_base::files;

/// How a restored database is found, and what is done then.
#[derive(Clone, Debug)]
pub struct RestoreSettings {
    /// By how much a restore raises every counter: more than can have been dealt of one counter
    /// since the backup.
    pub counter_jump: NonZeroU32,
    /// Where this server remembers up to where it has seen the log. Without it only a changed
    /// timeline is noticed.
    pub watermark: Option<PathBuf>,
    /// An operator says that the database was restored.
    pub declared: bool,
}

impl RestoreSettings {
    /// 2²⁴ counters. A head-end that takes 1,000 counters each quarter of an hour uses them in 174
    /// days, and servers that take turns on a meter at each of 96 daily sessions, 65,536 counters a
    /// turn, in 2.6 days. After 204 restores and fail-overs 80 % of the counters are passed over.
    pub const DEFAULT_COUNTER_JUMP: NonZeroU32 = match NonZeroU32::new(1 << 24) {
        Some(jump) => jump,
        None => NonZeroU32::MIN,
    };
}

impl Default for RestoreSettings {
    fn default() -> Self {
        Self { counter_jump: Self::DEFAULT_COUNTER_JUMP, watermark: None, declared: false }
    }
}

impl RestoreSettings {
    /// The oldest seal key version that this server remembers as accepted in rows (I5): a row of
    /// the island that is sealed below it is refused at start, whatever it says of itself. 1: it
    /// remembers nothing, or an operator says that the database was restored. A file that does not
    /// read keeps the committer from settling, and so the server from serving.
    pub fn oldest_seal_key(&self, island: &IslandName, seal: &SealKeys) -> u8 {
        match &self.watermark {
            Some(path) if !self.declared => {
                Watermark::read(path, island, seal).ok().flatten().map_or(1, |mark| mark.oldest_seal_key)
            }
            _ => 1,
        }
    }
}

/// What a server remembers outside the database: its last record, the highest jump, and which seal
/// keys are retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watermark {
    pub(super) writer: WriterId,
    pub(super) sequence: u64,
    pub(super) jump: CounterJump,
    /// The oldest seal key version that is accepted in rows.
    pub(super) oldest_seal_key: u8,
}

impl Watermark {
    /// Reads the file; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not what a server of this island wrote: what to do about it.
    pub(super) fn read(path: &Path, island: &IslandName, seal: &SealKeys) -> Result<Option<Self>, String> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("the watermark file `{}` cannot be read ({error})", path.display())),
        };
        let refuse = || {
            format!(
                "the watermark file `{}` is not one of the island `{island}`, or was edited; correct `watermark`, or move the file away and run \
                 `kms-server restored`",
                path.display()
            )
        };
        let file: WatermarkFile = toml::from_str(&text).map_err(|_| refuse())?;
        let writer =
            hex::decode(&file.writer).ok().and_then(|octets| WriterId::from_octets(&octets).ok()).ok_or_else(refuse)?;
        let oldest_seal_key = file.oldest_seal_key.unwrap_or(1).max(1);
        let mark = Self { writer, sequence: file.sequence, jump: CounterJump::new(file.jump), oldest_seal_key };
        let stored = hex::decode(&file.seal).map_err(|_| refuse())?;
        if !seal.recognise(&stored, |seal| mark.seal(island, seal)) {
            return Err(refuse());
        }
        Ok(Some(mark))
    }

    /// Replaces the file.
    pub(super) fn write(&self, path: &Path, island: &IslandName, seal: &SealKey) -> io::Result<()> {
        let file = WatermarkFile {
            writer: hex::encode(self.writer.octets()),
            sequence: self.sequence,
            jump: self.jump.counters(),
            oldest_seal_key: (self.oldest_seal_key > 1).then_some(self.oldest_seal_key),
            seal: hex::encode(self.seal(island, seal)),
        };
        let text = toml::to_string(&file).map_err(io::Error::other)?;
        files::replace(path, format!("{EXPLANATION}{text}").as_bytes(), 0o600)
    }

    fn seal(&self, island: &IslandName, seal: &SealKey) -> [u8; 32] {
        seal.seal_watermark(island, self.writer, self.sequence, self.jump, self.oldest_seal_key)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WatermarkFile {
    writer: String,
    sequence: u64,
    jump: u64,
    /// None: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest_seal_key: Option<u8>,
    seal: String,
}

/// What was found when database and memory were compared.
#[derive(Clone, Debug)]
pub(super) struct Comparison {
    /// The timeline that the database writes now.
    pub(super) timeline: Option<Timeline>,
    /// The highest jump that is remembered outside the database.
    pub(super) remembered: CounterJump,
    /// Why the database counts as restored, whatever its row says of the timeline.
    pub(super) reasons: Vec<String>,
    /// By how much counters are raised then.
    pub(super) counter_jump: NonZeroU32,
}

impl Comparison {
    /// What the island's row should say, and why if that is a restore.
    pub(super) fn judge(&self, known: DatabaseHistory) -> (DatabaseHistory, Option<String>) {
        let mut reasons = self.reasons.clone();
        if let (Some(before), Some(now)) = (known.timeline, self.timeline)
            && before != now
        {
            reasons.push(format!("the database writes {now}, and wrote {before}"));
        }
        if self.remembered > known.jump {
            reasons.push("the database does not know of an earlier restore".to_owned());
        }
        if reasons.is_empty() {
            return (DatabaseHistory { timeline: self.timeline.or(known.timeline), ..known }, None);
        }
        (known.restored(self.timeline, self.remembered, self.counter_jump.get()), Some(reasons.join("; ")))
    }

    /// Brings the island's row up to date, with a record (I2).
    pub(super) fn settle(
        &self,
        view: &mut View<'_, '_>,
        island: &IslandName,
    ) -> Result<Decision<DatabaseHistory>, ServiceError> {
        let row = view
            .island(island)?
            .ok_or_else(|| ServiceError::Internal("the island's row is missing (I5)".to_owned()))?;
        // Judged again: another server may have been faster.
        let (history, restored) = self.judge(row.history);
        if history == row.history {
            return Ok(Decision::unchanged(history));
        }
        let (kind, detail) = match (restored, history.timeline) {
            (Some(reason), _) => {
                let raised = history.jump.beyond(row.history.jump);
                tracing::error!(
                    reason,
                    raised,
                    "the database was restored or failed over: all invocation counters are raised (I4)"
                );
                ("database-restored", format!("{reason}; all invocation counters are raised by {raised} (I4)"))
            }
            (None, Some(timeline)) => {
                ("database-timeline", format!("the database writes {timeline}: noted for the first time"))
            }
            (None, None) => ("database-timeline", "the database has no timeline".to_owned()),
        };
        let event = SecurityEvent { kind: kind.to_owned(), detail, meter: Default::default() };
        let entry = view.append(Event::SecurityEvent(event));
        view.put_island(Island { history, ..(*row).clone() })?;
        Ok(Decision::recorded(entry, history))
    }
}

const EXPLANATION: &str = "# Up to where this server has seen the log of its island. Not part of any backup: see docs/operations.md, Restore.\n";

#[cfg(test)]
mod tests {
    use super::*;
    use zeroize::Zeroizing;

    fn comparison(timeline: Option<u32>, remembered: u64, reasons: &[&str]) -> Comparison {
        Comparison {
            timeline: timeline.map(at),
            remembered: CounterJump::new(remembered),
            reasons: reasons.iter().map(ToString::to_string).collect(),
            counter_jump: NonZeroU32::new(100).unwrap(),
        }
    }

    const fn at(number: u32) -> Timeline {
        Timeline { cluster: 7, number }
    }

    #[test]
    fn another_timeline_raises_the_counters_once() {
        let known = DatabaseHistory { timeline: Some(at(1)), ..DatabaseHistory::default() };
        assert_eq!(comparison(Some(1), 0, &[]).judge(known), (known, None));
        let (raised, reason) = comparison(Some(2), 0, &[]).judge(known);
        assert_eq!(raised, DatabaseHistory { timeline: Some(at(2)), restores: 1, jump: CounterJump::new(100) });
        assert!(reason.unwrap().contains("timeline 2"));
        assert_eq!(comparison(Some(2), 0, &[]).judge(raised), (raised, None));
        let earlier = comparison(Some(1), 0, &[]).judge(raised).0;
        assert_eq!(earlier.jump, CounterJump::new(200), "a timeline that goes backwards is a restore as well");
    }

    #[test]
    fn a_timeline_that_was_not_known_is_noted_only() {
        let (noted, reason) = comparison(Some(3), 0, &[]).judge(DatabaseHistory::default());
        assert_eq!((noted.timeline, noted.jump, reason), (Some(at(3)), CounterJump::NONE, None));
    }

    #[test]
    fn an_earlier_jump_that_the_database_lost_is_not_used_again() {
        let (raised, _) = comparison(None, 300, &[]).judge(DatabaseHistory::default());
        assert_eq!(raised.jump, CounterJump::new(400));
        let (raised, reason) = comparison(None, 300, &["an operator said so"]).judge(raised);
        assert_eq!(
            (raised.jump, raised.restores, reason.as_deref()),
            (CounterJump::new(500), 2, Some("an operator said so"))
        );
    }

    #[test]
    fn a_watermark_comes_back_and_an_edited_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("watermark");
        let (island, other) = (IslandName::parse("north").unwrap(), IslandName::parse("south").unwrap());
        let seal = SealKey::new(1, &Zeroizing::new([5; 32]));
        let keys = SealKeys::from(SealKey::new(1, &Zeroizing::new([5; 32])));
        assert_eq!(Watermark::read(&path, &island, &keys), Ok(None));
        let mark = Watermark {
            writer: WriterId::from_octets(&[9; 16]).unwrap(),
            sequence: 41,
            jump: CounterJump::new(1 << 24),
            oldest_seal_key: 1,
        };
        mark.write(&path, &island, &seal).unwrap();
        assert_eq!(Watermark::read(&path, &island, &keys), Ok(Some(mark)));
        assert!(!std::fs::read_to_string(&path).unwrap().contains("oldest"), "as files of before");
        // I5: which seal keys are retired is remembered under the new one, and not lowered by hand.
        let next = SealKey::new(2, &Zeroizing::new([6; 32]));
        let both = keys.clone().with(SealKey::new(2, &Zeroizing::new([6; 32])));
        let retired = Watermark { oldest_seal_key: 2, ..mark };
        retired.write(&path, &island, &next).unwrap();
        let restore = RestoreSettings { watermark: Some(path.clone()), ..RestoreSettings::default() };
        assert_eq!(
            (Watermark::read(&path, &island, &both), restore.oldest_seal_key(&island, &both)),
            (Ok(Some(retired)), 2)
        );
        assert_eq!(RestoreSettings { declared: true, ..restore.clone() }.oldest_seal_key(&island, &both), 1);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("oldest_seal_key = 2", "oldest_seal_key = 1")).unwrap();
        assert!(Watermark::read(&path, &island, &both).is_err());
        mark.write(&path, &island, &seal).unwrap();
        assert!(Watermark::read(&path, &other, &keys).unwrap_err().contains("`south`"));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("sequence = 41", "sequence = 40")).unwrap();
        assert!(Watermark::read(&path, &island, &keys).unwrap_err().contains("was edited"));
    }
}
