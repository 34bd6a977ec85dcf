//! The nonce watcher, for tests. It notes each nonce with its key and the content that it
//! protected, in all processes that share a folder.
//!
//! One nonce under two contents breaks AES-GCM (SP 800-38D, section 8). If a system counts nonces
//! outside the token, only the token can show that it never repeats one, because only the token
//! knows the values of keys. The README describes how to switch the watcher on, and the form of a
//! note.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use aws_lc_rs::digest::{Context, SHA256, digest};

use crate::crypto::random;
use crate::hex::hex;

/// Octets of the SHA-256 digests that are kept: enough to tell keys and contents apart, and half
/// the memory.
const KEPT: usize = 16;

type Digest = [u8; KEPT];

/// A nonce of a key, which must not protect two contents: the digest of a key's value, and the IV.
#[derive(Clone, PartialEq, Eq, Hash)]
struct KeyedNonce {
    key: Digest,
    iv: Vec<u8>,
}

/// The watcher of this process; set by the first C_Initialize.
static WATCH: OnceLock<Option<Watch>> = OnceLock::new();

/// The notes of one process.
struct Watch {
    folder: PathBuf,
    notes: File,
    seen: Mutex<HashMap<KeyedNonce, Digest>>,
}

/// Begins to watch, if no earlier call has decided it. `None`: this process never watches.
pub(crate) fn begin(folder: Option<&Path>) -> Result<(), String> {
    if WATCH.get().is_none() {
        let watch = folder.map(Watch::open).transpose()?;
        // Another thread may have been first: then its notes continue.
        drop(WATCH.set(watch));
    }
    Ok(())
}

/// The name of a key in notes; `None` while nothing is watched. The key of published examples, 00
/// 01 02 and so on, is not watched: it is no secret, and known-answer tests use it with one nonce.
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

    fn note(&self, nonce: KeyedNonce, content: Digest) {
        let line = format!("{} {} {}\n", hex(&nonce.key), hex(&nonce.iv), hex(&content));
        let known = match self.seen.lock().unwrap_or_else(PoisonError::into_inner).entry(nonce) {
            Entry::Occupied(known) => Some(*known.get()),
            Entry::Vacant(nonce) => {
                nonce.insert(content);
                None
            }
        };
        if known == Some(content) {
            return;
        }
        // Written at once, so that a killed process has noted everything that has left it.
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

/// An encryption under way. It is noted when it ends, if any of its output has left the token.
pub(crate) struct Note {
    nonce: KeyedNonce,
    aad: Context,
    data: Context,
    has_left: AtomicBool,
}

impl Note {
    /// `key` is the name of the key; `None`: nothing is watched.
    pub(crate) fn of(key: Option<[u8; KEPT]>, iv: &[u8]) -> Option<Box<Self>> {
        let nonce = KeyedNonce { key: key?, iv: iv.to_vec() };
        Some(Box::new(Self {
            nonce,
            aad: Context::new(&SHA256),
            data: Context::new(&SHA256),
            has_left: AtomicBool::new(false),
        }))
    }

    /// More associated data.
    pub(crate) fn authenticate(&mut self, aad: &[u8]) {
        self.aad.update(aad);
    }

    /// The next part of the plaintext, whose ciphertext leaves the token.
    pub(crate) fn encrypt(&mut self, plaintext: &[u8]) {
        self.data.update(plaintext);
        self.leave();
    }

    /// The tag leaves the token.
    pub(crate) fn leave(&self) {
        self.has_left.store(true, Ordering::Relaxed);
    }

    fn content(&self) -> Digest {
        let both = [self.aad.clone().finish(), self.data.clone().finish()];
        kept(digest(&SHA256, &[both[0].as_ref(), both[1].as_ref()].concat()).as_ref())
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if self.has_left.load(Ordering::Relaxed)
            && let Some(Some(watch)) = WATCH.get()
        {
            watch.note(self.nonce.clone(), self.content());
        }
    }
}

/// The content of the notes of a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The number of different nonces that all processes together have noted.
    pub nonces: usize,
    /// Nonces that protected two contents. It should be empty.
    pub repeated: Vec<RepeatedNonce>,
}

/// A nonce that protected two contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepeatedNonce {
    /// The first 16 octets of SHA-256 of the key's value, in hexadecimal.
    pub key: String,
    /// The IV, in hexadecimal.
    pub iv: String,
    /// The arguments of the processes that noted the two contents.
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
                let Some((nonce, content)) = line.rsplit_once(' ').filter(|(_, content)| content.len() == 2 * KEPT)
                else {
                    // The last line of a process that was killed while it wrote.
                    if !text.ends_with('\n') && text.ends_with(line) {
                        continue;
                    }
                    return Err(std::io::Error::other(format!("`{line}` in `{}` is no note", file.path().display())));
                };
                match seen.entry(nonce.to_owned()) {
                    Entry::Vacant(new) => drop(new.insert((content.to_owned(), process.clone()))),
                    Entry::Occupied(known) if known.get().0 == content => {}
                    Entry::Occupied(known) => {
                        let (key, iv) = nonce.split_once(' ').unwrap_or_default();
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

const NOTES: &str = "notes-";
const VIOLATIONS: &str = "violations";

#[cfg(test)]
mod tests {
    use super::*;

    fn nonce(octet: u8) -> KeyedNonce {
        KeyedNonce { key: [octet; KEPT], iv: vec![octet; 12] }
    }

    #[test]
    fn two_contents_are_found_in_one_process_and_across_processes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/nonces");
        assert_eq!(Notes::read(&path).unwrap(), Notes::default());
        let processes = [Watch::open(&path).unwrap(), Watch::open(&path).unwrap()];
        for process in &processes {
            for _ in 0..2 {
                process.note(nonce(1), [1; KEPT]);
            }
        }
        assert_eq!(Notes::read(&path).unwrap(), Notes { nonces: 1, repeated: Vec::new() });
        assert!(!path.join(VIOLATIONS).exists());
        // Seen by the process itself.
        processes[0].note(nonce(1), [2; KEPT]);
        assert!(std::fs::read_to_string(path.join(VIOLATIONS)).unwrap().starts_with(&"01".repeat(KEPT)));
        assert!(!Notes::read(&path).unwrap().repeated.is_empty());
        // Seen only by a reader of both notes.
        let other = folder.path().join("other");
        for (content, process) in
            [[3; KEPT], [4; KEPT]].into_iter().zip([Watch::open(&other).unwrap(), Watch::open(&other).unwrap()])
        {
            process.note(nonce(2), content);
        }
        assert!(!other.join(VIOLATIONS).exists());
        let notes = Notes::read(&other).unwrap();
        assert_eq!((notes.nonces, notes.repeated.len()), (1, 1));
        assert_eq!((&notes.repeated[0].key, &notes.repeated[0].iv), (&"02".repeat(KEPT), &"02".repeat(12)));
    }
}
