//! The nonce watcher: notes which nonce protected what under which key, in all processes that share
//! a folder. For tests.
//!
//! One nonce under two contents breaks AES-GCM (SP 800-38D, section 8). A system that counts nonces
//! outside the token shows only here, where key values are known, that it never repeats one. The
//! README says how it is switched on and what a note looks like.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use aws_lc_rs::digest::{Context, SHA256, digest};

use crate::crypto::random;

/// Octets of the SHA-256 digests that are kept: enough to tell keys and contents apart, and half
/// the memory.
const KEPT: usize = 16;

type Digest = [u8; KEPT];

/// What a nonce is repeated under: the digest of a key's value, and the IV.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Place {
    key: Digest,
    iv: Vec<u8>,
}

/// Of this process; set by the first C_Initialize.
static WATCH: OnceLock<Option<Watch>> = OnceLock::new();

/// The notes of one process.
struct Watch {
    folder: PathBuf,
    notes: File,
    seen: Mutex<HashMap<Place, Digest>>,
}

/// Begins to watch, unless this process has begun before. `None`: it never does.
pub(crate) fn begin(folder: Option<&Path>) -> Result<(), String> {
    if WATCH.get().is_none() {
        let watch = folder.map(Watch::open).transpose()?;
        // Another thread may have been first: then its notes go on.
        drop(WATCH.set(watch));
    }
    Ok(())
}

/// The name of a key in notes; `None` while nothing is watched. The key of the published examples,
/// 00 01 02 and so on, is nobody's secret, and is tried with one nonce by known-answer tests: it is
/// not watched.
pub(crate) fn key_name(value: &[u8]) -> Option<[u8; KEPT]> {
    WATCH
        .get()?
        .as_ref()
        .filter(|_| value.iter().zip(0..).any(|(octet, example)| *octet != example))
        .map(|_| kept(digest(&SHA256, value).as_ref()))
}

impl Watch {
    fn open(folder: &Path) -> Result<Self, String> {
        let refuse =
            |error: &dyn std::fmt::Display| format!("the folder of the nonce watcher, `{}`: {error}", folder.display());
        std::fs::create_dir_all(folder).map_err(|error| refuse(&error))?;
        let mut salt = [0; 8];
        random(&mut salt).map_err(|_| refuse(&"no random number"))?;
        let name = format!("{NOTES}{}-{}", std::process::id(), hex(&salt));
        let mut notes =
            OpenOptions::new().append(true).create_new(true).open(folder.join(name)).map_err(|error| refuse(&error))?;
        let arguments: Vec<String> = std::env::args_os().map(|argument| format!("{argument:?}")).collect();
        writeln!(notes, "# {}", arguments.join(" ")).map_err(|error| refuse(&error))?;
        Ok(Self { folder: folder.to_owned(), notes, seen: Mutex::default() })
    }

    fn note(&self, place: Place, content: Digest) {
        let line = format!("{} {} {}\n", hex(&place.key), hex(&place.iv), hex(&content));
        let known = match self.seen.lock().unwrap_or_else(PoisonError::into_inner).entry(place) {
            Entry::Occupied(known) => Some(*known.get()),
            Entry::Vacant(place) => {
                place.insert(content);
                None
            }
        };
        if known == Some(content) {
            return;
        }
        // At once: a process that is killed has noted what it gave out.
        let mut written = (&self.notes).write_all(line.as_bytes());
        if known.is_some() {
            eprint!("hsm-sim: a nonce protects a second content: {line}");
            let violations = OpenOptions::new().append(true).create(true).open(self.folder.join(VIOLATIONS));
            written = written.and(violations.and_then(|mut file| file.write_all(line.as_bytes())));
        }
        if let Err(error) = written {
            eprintln!("hsm-sim: the nonce watcher cannot write into `{}`: {error}", self.folder.display());
        }
    }
}

/// An encryption under way: noted when it ends, if anything of it was given out.
pub(crate) struct Note {
    place: Place,
    aad: Context,
    data: Context,
    given_out: AtomicBool,
}

impl Note {
    /// `key` is the name of the key; `None`: nothing is watched.
    pub(crate) fn of(key: Option<[u8; KEPT]>, iv: &[u8]) -> Option<Box<Self>> {
        let place = Place { key: key?, iv: iv.to_vec() };
        Some(Box::new(Self {
            place,
            aad: Context::new(&SHA256),
            data: Context::new(&SHA256),
            given_out: AtomicBool::new(false),
        }))
    }

    /// More associated data.
    pub(crate) fn authenticate(&mut self, aad: &[u8]) {
        self.aad.update(aad);
    }

    /// The next part of the plaintext, whose ciphertext is given out.
    pub(crate) fn encrypt(&mut self, plaintext: &[u8]) {
        self.data.update(plaintext);
        self.give_out();
    }

    /// The tag is given out.
    pub(crate) fn give_out(&self) {
        self.given_out.store(true, Ordering::Relaxed);
    }

    fn content(&self) -> Digest {
        let both = [self.aad.clone().finish(), self.data.clone().finish()];
        kept(digest(&SHA256, &[both[0].as_ref(), both[1].as_ref()].concat()).as_ref())
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if self.given_out.load(Ordering::Relaxed)
            && let Some(Some(watch)) = WATCH.get()
        {
            watch.note(self.place.clone(), self.content());
        }
    }
}

/// What the notes of a folder say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// How many different nonces were noted, of all processes together.
    pub nonces: usize,
    /// Nonces that protected two contents. Empty is as it should be.
    pub repeated: Vec<RepeatedNonce>,
}

/// A nonce that protected two contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepeatedNonce {
    /// The first 16 octets of SHA-256 of the key's value, in hexadecimal.
    pub key: String,
    /// The IV, in hexadecimal.
    pub iv: String,
    /// The arguments of the processes that noted the one and the other.
    pub processes: [String; 2],
}

impl Notes {
    /// Reads what all processes have noted in a folder; one that does not exist has no notes.
    ///
    /// # Errors
    /// A file cannot be read, or a line of it is no note.
    pub fn read(folder: &Path) -> std::io::Result<Self> {
        let mut seen: HashMap<String, (String, String)> = HashMap::new();
        let mut repeated = Vec::new();
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files.collect::<Result<Vec<_>, _>>()?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        for file in files.iter().filter(|file| file.file_name().to_string_lossy().starts_with(NOTES)) {
            let mut text = String::new();
            File::open(file.path())?.read_to_string(&mut text)?;
            let mut process = String::new();
            for line in text.lines() {
                if line.starts_with('#') {
                    line.clone_into(&mut process);
                    continue;
                }
                let Some((place, content)) = line.rsplit_once(' ').filter(|(_, content)| content.len() == 2 * KEPT)
                else {
                    // The last line of a process that was killed while it wrote.
                    if !text.ends_with('\n') && text.ends_with(line) {
                        continue;
                    }
                    return Err(std::io::Error::other(format!("`{line}` in `{}` is no note", file.path().display())));
                };
                match seen.entry(place.to_owned()) {
                    Entry::Vacant(new) => drop(new.insert((content.to_owned(), process.clone()))),
                    Entry::Occupied(known) if known.get().0 == content => {}
                    Entry::Occupied(known) => {
                        let (key, iv) = place.split_once(' ').unwrap_or_default();
                        let processes = [known.get().1.clone(), process.clone()];
                        repeated.push(RepeatedNonce { key: key.to_owned(), iv: iv.to_owned(), processes });
                    }
                }
            }
        }
        Ok(Self { nonces: seen.len(), repeated })
    }
}

fn kept(digest: &[u8]) -> Digest {
    digest.first_chunk().copied().unwrap_or_default()
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

const NOTES: &str = "notes-";
const VIOLATIONS: &str = "violations";

#[cfg(test)]
mod tests {
    use super::*;

    fn place(octet: u8) -> Place {
        Place { key: [octet; KEPT], iv: vec![octet; 12] }
    }

    #[test]
    fn two_contents_are_found_in_one_process_and_across_processes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/nonces");
        assert_eq!(Notes::read(&path).unwrap(), Notes::default());
        let processes = [Watch::open(&path).unwrap(), Watch::open(&path).unwrap()];
        for process in &processes {
            for _ in 0..2 {
                process.note(place(1), [1; KEPT]);
            }
        }
        assert_eq!(Notes::read(&path).unwrap(), Notes { nonces: 1, repeated: Vec::new() });
        assert!(!path.join(VIOLATIONS).exists());
        // Seen by the process itself.
        processes[0].note(place(1), [2; KEPT]);
        assert!(std::fs::read_to_string(path.join(VIOLATIONS)).unwrap().starts_with(&"01".repeat(KEPT)));
        assert!(!Notes::read(&path).unwrap().repeated.is_empty());
        // Seen only by who looks at both.
        let other = folder.path().join("other");
        for (content, process) in
            [[3; KEPT], [4; KEPT]].into_iter().zip([Watch::open(&other).unwrap(), Watch::open(&other).unwrap()])
        {
            process.note(place(2), content);
        }
        assert!(!other.join(VIOLATIONS).exists());
        let notes = Notes::read(&other).unwrap();
        assert_eq!((notes.nonces, notes.repeated.len()), (1, 1));
        assert_eq!((&notes.repeated[0].key, &notes.repeated[0].iv), (&"02".repeat(KEPT), &"02".repeat(12)));
    }
}
