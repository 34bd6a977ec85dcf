//! A token on disk: one folder with the token's record, one file per token object, a lock and a
//! change counter.
//!
//! Every file is written under another name, synced, and renamed. So each file is the old one or
//! the new one at every moment, also if the process dies. Object files are in a folder that is
//! named after the token's epoch. C_InitToken changes the epoch, so the rename of the record
//! removes all old objects at once.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cryptoki_sys::{CKR_CANT_LOCK, CKR_DEVICE_ERROR};

use crate::crypto::random;
use crate::error::{Result, Rv, fail};
use crate::hex::{hex, unhex};
use crate::object::ObjectId;
use crate::pin::PinRecord;

/// The folder of one token.
pub(crate) struct Store {
    folder: PathBuf,
}

/// The properties of a token, without its objects.
#[derive(Clone)]
pub(crate) struct Record {
    /// Changes with every C_InitToken; names the folder of the objects.
    pub(crate) epoch: [u8; 8],
    /// The serial number: 16 characters.
    pub(crate) serial: String,
    /// The label, blank padded.
    pub(crate) label: [u8; 32],
    /// The master key under the SO PIN.
    pub(crate) so: PinRecord,
    /// The master key under the user PIN, once it is set.
    pub(crate) user: Option<PinRecord>,
    /// Wrong SO PINs in a row.
    pub(crate) so_failures: u32,
    /// Wrong user PINs in a row.
    pub(crate) user_failures: u32,
}

/// An object file that was found: its name, and the stamp of its version.
pub(crate) struct Found {
    /// The object.
    pub(crate) id: ObjectId,
    /// Changes whenever the file is written.
    pub(crate) stamp: Stamp,
}

/// Tells versions of a file apart: inode, size, and time of the last change.
pub(crate) type Stamp = (u64, u64, i64, i64);

/// Keeps other processes from writing to the token, until it is dropped.
pub(crate) struct Locked {
    _file: File,
}

impl Store {
    /// The store in `folder`, which need not exist yet.
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Waits until no other process writes.
    pub(crate) fn lock(&self) -> Result<Locked> {
        create_folder(&self.folder)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(self.folder.join("lock"))?;
        // The lock ends when the file is closed or the process dies.
        file.lock().map_err(|_| Rv(CKR_CANT_LOCK))?;
        Ok(Locked { _file: file })
    }

    /// A number that changes with every write of any process. `None`: nothing was ever written.
    pub(crate) fn generation(&self) -> Option<u64> {
        let bytes = fs::read(self.folder.join("generation")).ok()?;
        bytes.as_slice().try_into().map(u64::from_le_bytes).ok()
    }

    /// Tells other processes that something was written. Returns the new number.
    pub(crate) fn advance(&self, _locked: &Locked) -> Result<u64> {
        let next = self.generation().unwrap_or(0).wrapping_add(1);
        // In place and without sync: only processes that live now compare it.
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(self.folder.join("generation"))?;
        file.write_all(&next.to_le_bytes())?;
        Ok(next)
    }

    /// The token's record; `None` when there is no initialised token.
    pub(crate) fn record(&self) -> Result<Option<Record>> {
        match fs::read_to_string(self.folder.join("token")) {
            Ok(text) => Record::parse(&text).map(Some).ok_or(Rv(CKR_DEVICE_ERROR)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the token's record.
    pub(crate) fn write_record(&self, record: &Record, _locked: &Locked) -> Result<()> {
        create_folder(&self.objects_folder(record.epoch))?;
        self.replace_file(&self.folder, "token", record.to_text().as_bytes())
    }

    /// Removes the token from the slot.
    pub(crate) fn wipe(&self, _locked: &Locked) -> Result<()> {
        match fs::remove_file(self.folder.join("token")) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => sync_folder(&self.folder)?,
        }
        self.sweep(None)
    }

    /// Removes files of an interrupted write, and objects of an earlier token.
    pub(crate) fn sweep(&self, epoch: Option<[u8; 8]>) -> Result<()> {
        let current = epoch.map(|epoch| self.objects_folder(epoch));
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with("objects-") && current.as_ref() != Some(&path) {
                fs::remove_dir_all(&path)?;
            } else if name.ends_with(TEMPORARY) {
                fs::remove_file(&path)?;
            }
        }
        if let Some(current) = current {
            for entry in fs::read_dir(&current)? {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "new") {
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(())
    }

    /// All object files.
    pub(crate) fn objects(&self, epoch: [u8; 8]) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        let entries = match fs::read_dir(self.objects_folder(epoch)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error.into()),
        };
        for entry in entries {
            let entry = entry?;
            if let Some(id) = entry.file_name().to_str().and_then(parse_object_name) {
                match entry.metadata() {
                    Ok(metadata) => found.push(Found { id, stamp: stamp(&metadata) }),
                    // Another process has just removed it.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        found.sort_unstable_by_key(|found| found.id);
        Ok(found)
    }

    /// The content of an object file; `None` when it is gone.
    pub(crate) fn read_object(&self, epoch: [u8; 8], id: ObjectId) -> Result<Option<Vec<u8>>> {
        match fs::read(self.objects_folder(epoch).join(object_name(id))) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes an object file. Returns its stamp.
    pub(crate) fn write_object(&self, epoch: [u8; 8], id: ObjectId, bytes: &[u8], _locked: &Locked) -> Result<Stamp> {
        let folder = self.objects_folder(epoch);
        let name = object_name(id);
        self.replace_file(&folder, &name, bytes)?;
        Ok(stamp(&fs::metadata(folder.join(name))?))
    }

    /// Removes an object file.
    pub(crate) fn remove_object(&self, epoch: [u8; 8], id: ObjectId, _locked: &Locked) -> Result<()> {
        let folder = self.objects_folder(epoch);
        match fs::remove_file(folder.join(object_name(id))) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => sync_folder(&folder),
        }
    }

    fn objects_folder(&self, epoch: [u8; 8]) -> PathBuf {
        self.folder.join(format!("objects-{}", hex(&epoch)))
    }

    fn replace_file(&self, folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
        let temporary = folder.join(format!("{name}{TEMPORARY}"));
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(FILE_MODE).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, folder.join(name))?;
        sync_folder(folder)
    }
}

impl Record {
    /// The record of a new token with a serial number of its own.
    pub(crate) fn new(label: [u8; 32], serial: Option<String>, so: PinRecord, epoch: [u8; 8]) -> Result<Self> {
        let serial = match serial {
            Some(serial) => serial,
            None => {
                let mut bytes = [0; 8];
                random(&mut bytes)?;
                hex(&bytes)
            }
        };
        Ok(Self { epoch, serial, label, so, user: None, so_failures: 0, user_failures: 0 })
    }

    fn to_text(&self) -> String {
        let user = self.user.as_ref().map(|user| format!("user = {}\n", user.to_text())).unwrap_or_default();
        format!(
            "format = {FORMAT}\nepoch = {}\nserial = {}\nlabel = {}\nso = {}\n{user}so_failures = {}\nuser_failures = {}\n",
            hex(&self.epoch),
            self.serial,
            hex(&self.label),
            self.so.to_text(),
            self.so_failures,
            self.user_failures,
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().filter_map(|line| line.split_once(" = ")).find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        if field("format")? != FORMAT {
            return None;
        }
        let user = match field("user") {
            Some(value) => Some(PinRecord::parse(value)?),
            None => None,
        };
        Some(Self {
            epoch: unhex(field("epoch")?)?.try_into().ok()?,
            serial: field("serial").filter(|serial| serial.len() == 16 && serial.is_ascii())?.to_owned(),
            label: unhex(field("label")?)?.try_into().ok()?,
            so: PinRecord::parse(field("so")?)?,
            user,
            so_failures: field("so_failures")?.parse().ok()?,
            user_failures: field("user_failures")?.parse().ok()?,
        })
    }
}

fn object_name(id: ObjectId) -> String {
    format!("{}.object", hex(&id))
}

fn parse_object_name(name: &str) -> Option<ObjectId> {
    unhex(name.strip_suffix(".object")?)?.try_into().ok()
}

fn stamp(metadata: &fs::Metadata) -> Stamp {
    (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec())
}

fn create_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    match folder.parent() {
        Some(parent) => sync_folder(parent),
        None => fail(CKR_DEVICE_ERROR),
    }
}

/// A rename or a removal is durable only after the sync of its folder.
fn sync_folder(folder: &Path) -> Result<()> {
    Ok(File::open(folder)?.sync_all()?)
}

/// Changes when a token of an earlier version could not be read.
const FORMAT: &str = "2";
const TEMPORARY: &str = ".new";
const FILE_MODE: u32 = 0o600;
