//! The file of a device: AES-256-GCM under a key that Argon2id derives from the technician's PIN.
//!
//! `magic(8) ‖ version(1) ‖ salt(16) ‖ nonce(12) ‖ ciphertext ‖ tag(16)`. The first 37 octets are
//! associated data, so each octet of the file is authenticated. The version fixes the parameters of
//! Argon2id: the file cannot ask for weaker ones.

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand,
};
use zeroize::Zeroizing;

use crate::profile::{create_private_directory, write_private_file};

/// A technician's PIN or pass phrase: 6–128 octets without control characters. Each attempt to
/// guess it costs a thief of the file a fraction of a second and 64 MiB.
pub struct Pin(Zeroizing<String>);

impl Pin {
    /// The PIN of this text.
    ///
    /// # Errors
    /// It is shorter than 6 octets, longer than 128, or has control characters.
    pub fn new(text: &str) -> Result<Self, VaultError> {
        if !(6..=128).contains(&text.len()) || text.chars().any(char::is_control) {
            return Err(VaultError::PinForm);
        }
        let mut pin = Zeroizing::new(String::with_capacity(text.len()));
        pin.push_str(text);
        Ok(Self(pin))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pin(..)")
    }
}

/// The open file of a device.
pub(super) struct Vault {
    directory: PathBuf,
    salt: [u8; SALT],
    key: LessSafeKey,
}

/// A file that the PIN has opened, and its content.
type Opened = (Vault, Zeroizing<Vec<u8>>);

impl Vault {
    /// Prepares the file of a new device in a directory, which is made.
    ///
    /// # Errors
    /// The directory has a device, or cannot be written.
    pub(super) fn create(directory: PathBuf, pin: &Pin) -> Result<Self, VaultError> {
        if Self::is_in(&directory) {
            return Err(VaultError::Exists { directory });
        }
        let mut salt = [0; SALT];
        rand::fill(&mut salt).map_err(|_| VaultError::Cryptography)?;
        let vault = Self { key: derive(pin, &salt)?, directory, salt };
        create_private_directory(&vault.directory).map_err(|error| vault.unwritable(error))?;
        Ok(vault)
    }

    /// Opens the file of an enrolment that has no answer yet: its content, and the file of the
    /// device to be. `None`: there is none.
    ///
    /// # Errors
    /// The directory has a device; the PIN is another one, or the file was changed.
    pub(super) fn open_pending(directory: &Path, pin: &Pin) -> Result<Option<Opened>, VaultError> {
        if Self::is_in(directory) {
            return Err(VaultError::Exists { directory: directory.to_owned() });
        }
        match Self::open_file(directory.to_owned(), PENDING, pin) {
            Ok(opened) => Ok(Some(opened)),
            Err(VaultError::None { .. }) => Ok(None),
            Err(VaultError::Wrong) => Err(VaultError::Pending { path: directory.join(PENDING) }),
            Err(other) => Err(other),
        }
    }

    /// Opens the file of a device: its content.
    ///
    /// # Errors
    /// There is none; the PIN is wrong, or the file was changed.
    pub(super) fn open(directory: PathBuf, pin: &Pin) -> Result<Opened, VaultError> {
        Self::open_file(directory, FILE, pin)
    }

    fn open_file(directory: PathBuf, name: &str, pin: &Pin) -> Result<Opened, VaultError> {
        let path = directory.join(name);
        let mut octets = Zeroizing::new(Vec::new());
        let file = fs::File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => VaultError::None { directory: directory.clone() },
            _ => VaultError::Read { path: path.clone(), error },
        })?;
        file.take(LARGEST).read_to_end(&mut octets).map_err(|error| VaultError::Read { path, error })?;
        let salt = salt(&octets)?;
        let key = derive(pin, &salt)?;
        let content = unseal(&key, &octets)?;
        Ok((Self { directory, salt, key }, content))
    }

    /// Whether these octets are a file under the same key.
    #[cfg(test)]
    pub(super) fn opens(&self, octets: &[u8]) -> bool {
        // Another salt makes another key.
        salt(octets).is_ok_and(|salt| salt == self.salt) && unseal(&self.key, octets).is_ok()
    }

    /// Whether there is a file of a device.
    pub(super) fn is_in(directory: &Path) -> bool {
        directory.join(FILE).exists()
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes the file of the device, whole or not at all. An enrolment has its answer then.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn write(&self, content: &[u8]) -> Result<(), VaultError> {
        self.write_file(FILE, content)?;
        // It has no keys but those of the device, so one that stays does no harm.
        drop(fs::remove_file(self.directory.join(PENDING)));
        Ok(())
    }

    /// Writes the file of an enrolment that has no answer yet, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn write_pending(&self, content: &[u8]) -> Result<(), VaultError> {
        self.write_file(PENDING, content)
    }

    fn write_file(&self, name: &str, content: &[u8]) -> Result<(), VaultError> {
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(|_| VaultError::Cryptography)?;
        let mut file = [&MAGIC[..], &[VERSION], &self.salt, &nonce].concat();
        let mut sealed = Zeroizing::new(Vec::with_capacity(content.len() + AES_256_GCM.tag_len()));
        sealed.extend_from_slice(content);
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(&file), &mut *sealed)
            .map_err(|_| VaultError::Cryptography)?;
        file.extend_from_slice(&sealed);
        write_private_file(&self.directory.join(name), &file).map_err(|error| self.unwritable(error))
    }

    fn unwritable(&self, error: io::Error) -> VaultError {
        VaultError::Write { directory: self.directory.clone(), error }
    }
}

/// The salt of a file.
fn salt(octets: &[u8]) -> Result<[u8; SALT], VaultError> {
    let (header, _) = octets.split_at_checked(HEADER).ok_or(VaultError::Wrong)?;
    let (start, rest) = header.split_at(MAGIC.len() + 1);
    match start.split_last() {
        Some((&VERSION, magic)) if magic == MAGIC => {}
        Some((_, magic)) if magic == MAGIC => return Err(VaultError::Newer),
        _ => return Err(VaultError::Wrong),
    }
    rest.first_chunk().copied().ok_or(VaultError::Wrong)
}

/// The content of a file.
fn unseal(key: &LessSafeKey, octets: &[u8]) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let (header, sealed) = octets.split_at_checked(HEADER).ok_or(VaultError::Wrong)?;
    let nonce = header.last_chunk::<NONCE_LEN>().ok_or(VaultError::Wrong)?;
    let mut content = Zeroizing::new(sealed.to_vec());
    let opened = key.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(header), &mut content);
    let length = opened.map_err(|_| VaultError::Wrong)?.len();
    content.truncate(length);
    Ok(content)
}

/// RFC 9106, 4: the second recommended option. The tag of the file says whether the PIN is right.
fn derive(pin: &Pin, salt: &[u8; SALT]) -> Result<LessSafeKey, VaultError> {
    let wrong = |_| VaultError::Cryptography;
    let params = Params::new(MEMORY_KIB, PASSES, LANES, Some(KEY)).map_err(wrong)?;
    let mut key = Zeroizing::new([0; KEY]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(pin.0.as_bytes(), salt, &mut *key)
        .map_err(wrong)?;
    Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*key).map_err(|_| VaultError::Cryptography)?))
}

/// Why the file of a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// A PIN of another form.
    #[error("the PIN is not 6 to 128 octets without control characters; choose four words rather than six digits")]
    PinForm,
    /// There is a device already.
    #[error("`{}` has a device already: choose another profile, or remove the folder if its handheld is handed over or disabled", .directory.display())]
    Exists {
        /// The directory.
        directory: PathBuf,
    },
    /// There is no device.
    #[error("`{}` has no device: enrol one with `kms field enrol`", .directory.display())]
    None {
        /// The directory.
        directory: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read `{}`: {error}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        error: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write into `{}`: {error}", .directory.display())]
    Write {
        /// The directory.
        directory: PathBuf,
        /// What the operating system says.
        error: io::Error,
    },
    /// The file of an enrolment that has no answer yet does not open.
    #[error(
        "an enrolment was begun here with another PIN: type that one; if you do not know it, ask the officer for a new code, and remove `{}` first", .path.display()
    )]
    Pending {
        /// The file.
        path: PathBuf,
    },
    /// It does not open.
    #[error(
        "the PIN is wrong, or the file of the device was changed; if the PIN is forgotten, an officer hands the handheld over again: `kms handheld hand-over`"
    )]
    Wrong,
    /// Another version wrote it.
    #[error("the file of the device is of another version of this program: use that version")]
    Newer,
    /// The cryptographic library failed.
    #[error("the cryptographic library failed; is there enough memory? 64 MiB are needed")]
    Cryptography,
}

const FILE: &str = "device.sealed";
/// Of an enrolment that has no answer yet.
const PENDING: &str = "enrolment.sealed";
const MAGIC: &[u8; 8] = b"KMSFIELD";
const VERSION: u8 = 1;
const SALT: usize = 16;
const HEADER: usize = MAGIC.len() + 1 + SALT + NONCE_LEN;
const KEY: usize = 32;
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 3;
const LANES: u32 = 4;
/// Of the file.
const LARGEST: u64 = 1 << 20;
