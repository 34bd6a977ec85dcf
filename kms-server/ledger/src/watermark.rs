//! The watermark file: what a server remembers outside the database, so that it notices when an
//! older database was put in its place (I4, I5).

use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use kms_domain::{CounterJump, IslandName, SealKey, SealKeys, WriterId};
use serde::{Deserialize, Serialize};

use kms_base::files;

/// How a server notices that its database was restored, and by how much it then raises the
/// counters.
#[derive(Clone, Debug)]
pub struct RestoreSettings {
    /// By how much a restore raises every counter: more than can have been allocated of one counter
    /// since the backup.
    pub counter_jump: NonZeroU32,
    /// The watermark file. Without it this server notices only a changed timeline.
    pub watermark: Option<PathBuf>,
    /// An operator says that the database was restored.
    pub declared: bool,
}

impl RestoreSettings {
    /// 2²⁴ counters. A head-end that takes 1,000 counters each quarter of an hour uses them in 174
    /// days. Servers that alternate at each of 96 daily sessions with a meter reserve 65,536
    /// counters each time, and use them in 2.6 days. After 204 restores and fail-overs 80 % of the
    /// counters are skipped.
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
    /// The oldest seal key version that this server remembers as accepted in rows (I5). A row of
    /// the island that is sealed with an older version is refused at start. 1: the server remembers
    /// nothing, or an operator says that the database was restored. If the file cannot be read, the
    /// committer does not settle, and the server does not become ready.
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
    /// The file cannot be read, or no server of this island wrote it. The text says what to do.
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

const EXPLANATION: &str = "# Up to where this server has seen the log of its island. Not part of any backup: see docs/operations.md, Restore.\n";

#[cfg(test)]
mod tests {
    use super::*;
    use zeroize::Zeroizing;

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
