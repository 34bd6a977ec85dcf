//! Tokens: login, PINs, and the objects, in memory and on disk.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cryptoki_sys::*;

use crate::attribute::Flags;
use crate::cache::ObjectCache;
use crate::crypto::random;
use crate::error::{Result, Rv, fail};
use crate::object::{Object, ObjectId};
use crate::pin::{AUTHENTICATOR, MasterKey, PinRecord, Role};
use crate::settings::Settings;
use crate::store::{Locked, Record, Stamp, Store};
use crate::table::Table;

/// A slot and the token in it.
pub(crate) struct Token {
    /// The slot's number.
    pub(crate) slot: CK_SLOT_ID,
    /// All objects that can be used now, of all sessions.
    pub(crate) objects: Table<Object>,
    /// Open sessions, and how many of them are read/write.
    pub(crate) sessions: AtomicUsize,
    pub(crate) read_write_sessions: AtomicUsize,
    /// False while a command of the control file has removed the token.
    pub(crate) present: AtomicBool,
    /// The token was removed or inserted, and C_WaitForSlotEvent has not reported it yet.
    pub(crate) changed: AtomicBool,
    login: AtomicU8,
    settings: Arc<Settings>,
    store: Store,
    state: Mutex<State>,
    /// Of the open sessions.
    caches: Mutex<Vec<Weak<ObjectCache>>>,
    next_handle: Arc<AtomicU64>,
}

/// Who is logged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Login {
    /// No one.
    Public,
    /// The user.
    User,
    /// The security officer.
    SecurityOfficer,
}

#[derive(Default)]
struct State {
    record: Option<Record>,
    master: Option<MasterKey>,
    known: HashMap<ObjectId, Known>,
    generation: Option<u64>,
}

/// What this process knows of an object file. A handle stays the same as long as the process lives.
#[derive(Clone, Copy)]
struct Known {
    handle: CK_OBJECT_HANDLE,
    stamp: Stamp,
    loaded: bool,
    /// The master key has authenticated it. A public object that was loaded before any login is not
    /// authenticated.
    authentic: bool,
}

impl Token {
    pub(crate) fn new(slot: CK_SLOT_ID, store: Store, settings: Arc<Settings>, next_handle: Arc<AtomicU64>) -> Self {
        Self {
            slot,
            objects: Table::new(HANDLE_BLOCK),
            sessions: AtomicUsize::new(0),
            read_write_sessions: AtomicUsize::new(0),
            present: AtomicBool::new(true),
            changed: AtomicBool::new(false),
            login: AtomicU8::new(0),
            settings,
            store,
            state: Mutex::default(),
            caches: Mutex::default(),
            next_handle,
        }
    }

    /// Who is logged in.
    pub(crate) fn login_state(&self) -> Login {
        match self.login.load(Ordering::Acquire) {
            1 => Login::User,
            2 => Login::SecurityOfficer,
            _ => Login::Public,
        }
    }

    /// `CKR_TOKEN_NOT_PRESENT` while the token is removed.
    pub(crate) fn check_present(&self) -> Result<()> {
        if self.present.load(Ordering::Acquire) { Ok(()) } else { fail(CKR_TOKEN_NOT_PRESENT) }
    }

    /// Removes, at the start, files of an interrupted write.
    pub(crate) fn recover(&self) -> Result<()> {
        if self.store.record()?.is_none() {
            return Ok(());
        }
        let locked = self.store.lock()?;
        let epoch = self.refreshed_under(&locked)?.record.as_ref().map(|record| record.epoch);
        self.store.sweep(epoch)
    }

    /// The record of the initialised token.
    pub(crate) fn record(&self) -> Result<Option<Record>> {
        Ok(self.refreshed()?.record.clone())
    }

    /// Reads what other processes have written.
    pub(crate) fn refresh(&self) -> Result<()> {
        self.refreshed().map(|_| ())
    }

    /// Allocates a block of new object handles.
    pub(crate) fn next_handles(&self) -> Range<CK_OBJECT_HANDLE> {
        let first = self.next_handle.fetch_add(HANDLE_BLOCK, Ordering::Relaxed);
        first..first.saturating_add(HANDLE_BLOCK)
    }

    /// From now on, the token empties this cache when a token object changes or is removed, until
    /// the cache is dropped.
    pub(crate) fn watch(&self, cache: &Arc<ObjectCache>) {
        let mut caches = self.lock_caches();
        // Only when the list would grow, so that thousands of sessions can be opened cheaply.
        if caches.len() == caches.capacity() {
            caches.retain(|cache| cache.strong_count() > 0);
        }
        caches.push(Arc::downgrade(cache));
    }

    /// The flags of CK_TOKEN_INFO.
    pub(crate) fn flags(&self, record: Option<&Record>) -> CK_FLAGS {
        let mut flags = CKF_RNG | CKF_LOGIN_REQUIRED | CKF_RESTORE_KEY_NOT_NEEDED;
        let Some(record) = record else { return flags };
        flags |= CKF_TOKEN_INITIALIZED;
        if record.user.is_some() {
            flags |= CKF_USER_PIN_INITIALIZED;
        }
        let count = |failures: u32, low, last, locked| match self.settings.attempts.saturating_sub(failures) {
            0 => locked,
            1 => low | last,
            _ if failures > 0 => low,
            _ => 0,
        };
        flags |= count(record.user_failures, CKF_USER_PIN_COUNT_LOW, CKF_USER_PIN_FINAL_TRY, CKF_USER_PIN_LOCKED);
        flags | count(record.so_failures, CKF_SO_PIN_COUNT_LOW, CKF_SO_PIN_FINAL_TRY, CKF_SO_PIN_LOCKED)
    }

    /// C_InitToken: a new, empty token. An old token is overwritten only with its SO PIN.
    pub(crate) fn initialise(&self, pin: &[u8], label: [u8; 32]) -> Result<()> {
        check_length(pin)?;
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        let mut serial = None;
        if let Some(record) = state.record.clone() {
            self.open_pin(&mut state, Role::SecurityOfficer, pin, &locked)?;
            serial = Some(record.serial);
        }
        let mut epoch = [0; 8];
        random(&mut epoch)?;
        let master = MasterKey::generate()?;
        let so = PinRecord::new(&master, pin, Role::SecurityOfficer, epoch, &self.settings)?;
        let record = Record::new(label, serial, so, epoch)?;
        self.store.write_record(&record, &locked)?;
        self.store.sweep(Some(epoch))?;
        state.generation = Some(self.store.advance(&locked)?);
        self.forget(&mut state);
        state.record = Some(record);
        Ok(())
    }

    /// Makes the slot hold no token.
    pub(crate) fn wipe(&self) -> Result<()> {
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        self.store.wipe(&locked)?;
        state.generation = Some(self.store.advance(&locked)?);
        self.forget(&mut state);
        Ok(())
    }

    /// C_Login, as far as the token is concerned.
    pub(crate) fn log_in(&self, role: Role, pin: &[u8]) -> Result<()> {
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        match (self.login_state(), role) {
            (Login::Public, _) => {}
            (Login::User, Role::User) | (Login::SecurityOfficer, Role::SecurityOfficer) => {
                return fail(CKR_USER_ALREADY_LOGGED_IN);
            }
            _ => return fail(CKR_USER_ANOTHER_ALREADY_LOGGED_IN),
        }
        let master = self.open_pin(&mut state, role, pin, &locked)?;
        state.master = Some(master);
        // Now public objects can be authenticated, too. Those whose files were changed disappear.
        if let Err(error) = self.load(&mut state) {
            state.master = None;
            return Err(error);
        }
        self.login.store(if role == Role::User { 1 } else { 2 }, Ordering::Release);
        Ok(())
    }

    /// Checks the PIN of the role that is logged in, for a key that requires it at each use.
    pub(crate) fn authenticate(&self, pin: &[u8]) -> Result<()> {
        let role = match self.login_state() {
            Login::Public => return fail(CKR_USER_NOT_LOGGED_IN),
            Login::User => Role::User,
            Login::SecurityOfficer => Role::SecurityOfficer,
        };
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        self.open_pin(&mut state, role, pin, &locked).map(|_| ())
    }

    /// C_Logout, as far as the token is concerned. Returns false when no one was logged in.
    pub(crate) fn log_out(&self) -> bool {
        let mut state = self.lock_state();
        let was = self.login.swap(0, Ordering::AcqRel);
        state.master = None;
        self.objects.remove_if(|object| object.flags.has(Flags::PRIVATE));
        self.empty_caches();
        for known in state.known.values_mut() {
            // Objects that were removed here are read again when they are needed.
            known.loaded = known.loaded && self.objects.get(known.handle).is_some();
        }
        was != 0
    }

    /// C_InitPIN: the security officer sets the user PIN.
    pub(crate) fn set_user_pin(&self, pin: &[u8]) -> Result<()> {
        check_length(pin)?;
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        let (Some(mut record), Some(master)) = (state.record.clone(), state.master.clone()) else {
            return fail(CKR_USER_NOT_LOGGED_IN);
        };
        record.user = Some(PinRecord::new(&master, pin, Role::User, record.epoch, &self.settings)?);
        record.user_failures = 0;
        self.save_record(&mut state, record, &locked)
    }

    /// C_SetPIN: a caller who knows the old PIN sets a new one.
    pub(crate) fn change_pin(&self, role: Role, old: &[u8], new: &[u8]) -> Result<()> {
        check_length(new)?;
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        let master = self.open_pin(&mut state, role, old, &locked)?;
        let Some(mut record) = state.record.clone() else { return fail(CKR_TOKEN_NOT_RECOGNIZED) };
        let pin = PinRecord::new(&master, new, role, record.epoch, &self.settings)?;
        match role {
            Role::SecurityOfficer => record.so = pin,
            Role::User => record.user = Some(pin),
        }
        self.save_record(&mut state, record, &locked)
    }

    /// Puts a new object into the token, under the handle that it has. A token object is on disk
    /// when this returns.
    pub(crate) fn add(&self, mut object: Object) -> Result<()> {
        let handle = object.handle;
        if object.flags.has(Flags::TOKEN) {
            let locked = self.store.lock()?;
            let mut state = self.refreshed_under(&locked)?;
            let mut id = [0; 16];
            random(&mut id)?;
            object.id = Some(id);
            self.save(&mut state, &object, id, &locked)?;
            self.objects.insert(handle, Arc::new(object));
        } else {
            self.objects.insert(handle, Arc::new(object));
        }
        Ok(())
    }

    /// Replaces `old` by `new`. Fails if another thread or process has changed or removed it.
    pub(crate) fn change(&self, old: &Arc<Object>, new: Object) -> Result<()> {
        let Some(id) = old.id else {
            let replaced = self.objects.replace(old.handle, old, Arc::new(new));
            return if replaced { Ok(()) } else { fail(CKR_OBJECT_HANDLE_INVALID) };
        };
        let locked = self.store.lock()?;
        let mut state = self.refreshed_under(&locked)?;
        // Another process or thread has changed it: the caller's view is stale.
        if !self.objects.get(old.handle).is_some_and(|current| Arc::ptr_eq(&current, old)) {
            return fail(CKR_FUNCTION_FAILED);
        }
        self.save(&mut state, &new, id, &locked)?;
        self.objects.insert(old.handle, Arc::new(new));
        self.empty_caches();
        Ok(())
    }

    /// Removes an object.
    pub(crate) fn remove(&self, object: &Object) -> Result<()> {
        if let Some(id) = object.id {
            let locked = self.store.lock()?;
            let mut state = self.refreshed_under(&locked)?;
            let Some(epoch) = state.record.as_ref().map(|record| record.epoch) else {
                return fail(CKR_OBJECT_HANDLE_INVALID);
            };
            self.store.remove_object(epoch, id, &locked)?;
            state.generation = Some(self.store.advance(&locked)?);
            state.known.remove(&id);
        }
        let removed = self.objects.remove(object.handle);
        if object.id.is_some() {
            self.empty_caches();
        }
        if removed.is_some() { Ok(()) } else { fail(CKR_OBJECT_HANDLE_INVALID) }
    }

    fn lock_state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, after reading what other processes have written.
    fn refreshed(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock_state();
        let generation = self.store.generation();
        if generation.is_none() || generation != state.generation {
            self.reload(&mut state, generation)?;
        }
        Ok(state)
    }

    /// The same while the folder is locked. The folder is always locked first: otherwise two
    /// threads could wait for each other for ever.
    fn refreshed_under(&self, _locked: &Locked) -> Result<MutexGuard<'_, State>> {
        self.refreshed()
    }

    fn reload(&self, state: &mut State, generation: Option<u64>) -> Result<()> {
        let record = self.store.record()?;
        let same = match (&record, &state.record) {
            (Some(new), Some(old)) => new.epoch == old.epoch,
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.forget(state);
        }
        state.record = record;
        self.load(state)?;
        state.generation = generation;
        Ok(())
    }

    /// Another token is in the slot: forget everything about the former one.
    fn forget(&self, state: &mut State) {
        self.login.store(0, Ordering::Release);
        *state = State { generation: state.generation, ..State::default() };
        self.objects.remove_if(|object| object.id.is_some() || object.flags.has(Flags::PRIVATE));
        self.empty_caches();
    }

    /// Replaces the objects in memory by those on disk that can be read.
    fn load(&self, state: &mut State) -> Result<()> {
        let Some(record) = state.record.clone() else { return Ok(()) };
        let found = self.store.objects(record.epoch)?;
        let mut handles = 0..0;
        let gone: Vec<ObjectId> = state
            .known
            .keys()
            .filter(|id| found.binary_search_by_key(*id, |found| found.id).is_err())
            .copied()
            .collect();
        for id in gone {
            if let Some(known) = state.known.remove(&id) {
                self.objects.remove(known.handle);
            }
        }
        for file in found {
            let known = state.known.get(&file.id).copied();
            if known.is_some_and(|known| {
                known.loaded && known.stamp == file.stamp && (known.authentic || state.master.is_none())
            }) {
                continue;
            }
            let handle = match known {
                Some(known) => known.handle,
                None => handles.next().unwrap_or_else(|| {
                    handles = self.next_handles();
                    handles.next().unwrap_or_default()
                }),
            };
            let Some(bytes) = self.store.read_object(record.epoch, file.id)? else { continue };
            // A damaged or forged file is ignored and stays: it must not make the other objects
            // unusable.
            let object = match open_object(&bytes, &record, file.id, state.master.as_ref()) {
                Opened::Plain(plain) => Object::decode(&plain, handle, file.id).ok(),
                Opened::Hidden | Opened::Damaged => None,
            };
            let loaded = object.is_some();
            match object {
                Some(object) => self.objects.insert(handle, Arc::new(object)),
                // The file has changed: forget its former content.
                None => drop(self.objects.remove(handle)),
            }
            state.known.insert(file.id, Known { handle, stamp: file.stamp, loaded, authentic: state.master.is_some() });
        }
        self.empty_caches();
        Ok(())
    }

    /// Called after every change of a token object in the table, before the function that changed
    /// it returns: from then on all sessions see it, and no copy of a destroyed key is left.
    fn empty_caches(&self) {
        for cache in self.lock_caches().iter().filter_map(Weak::upgrade) {
            cache.clear();
        }
    }

    fn lock_caches(&self) -> MutexGuard<'_, Vec<Weak<ObjectCache>>> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, state: &mut State, object: &Object, id: ObjectId, locked: &Locked) -> Result<()> {
        let record = state.record.as_ref().ok_or(Rv(CKR_TOKEN_NOT_RECOGNIZED))?;
        let plain = object.encode()?;
        // Public objects need the login, too: only a caller who knows a PIN can write an object
        // that a later login accepts.
        let master = state.master.as_ref().ok_or(Rv(CKR_USER_NOT_LOGGED_IN))?;
        let context = object_context(record, id);
        let bytes = if object.flags.has(Flags::PRIVATE) {
            [&[SEALED], master.seal(&context, &plain)?.as_slice()].concat()
        } else {
            [&[OPEN], master.authenticate(&context, &plain)?.as_slice(), &plain].concat()
        };
        let stamp = self.store.write_object(record.epoch, id, &bytes, locked)?;
        state.known.insert(id, Known { handle: object.handle, stamp, loaded: true, authentic: true });
        state.generation = Some(self.store.advance(locked)?);
        Ok(())
    }

    fn save_record(&self, state: &mut State, record: Record, locked: &Locked) -> Result<()> {
        self.store.write_record(&record, locked)?;
        state.generation = Some(self.store.advance(locked)?);
        state.record = Some(record);
        Ok(())
    }

    /// Opens the master key. A failure is written to disk before the PIN is tried, so that a power
    /// cut gives no free attempt.
    fn open_pin(&self, state: &mut State, role: Role, pin: &[u8], locked: &Locked) -> Result<MasterKey> {
        let Some(mut record) = state.record.clone() else { return fail(CKR_TOKEN_NOT_RECOGNIZED) };
        let (stored, failures) = match role {
            Role::SecurityOfficer => (Some(record.so.clone()), &mut record.so_failures),
            Role::User => (record.user.clone(), &mut record.user_failures),
        };
        let stored = stored.ok_or(Rv(CKR_USER_PIN_NOT_INITIALIZED))?;
        if *failures >= self.settings.attempts {
            return fail(CKR_PIN_LOCKED);
        }
        *failures += 1;
        self.save_record(state, record.clone(), locked)?;
        match stored.open(pin, role, record.epoch)? {
            Some(master) => {
                match role {
                    Role::SecurityOfficer => record.so_failures = 0,
                    Role::User => record.user_failures = 0,
                }
                self.save_record(state, record, locked)?;
                Ok(master)
            }
            None => fail(CKR_PIN_INCORRECT),
        }
    }
}

enum Opened {
    Plain(zeroize::Zeroizing<Vec<u8>>),
    Hidden,
    Damaged,
}

fn open_object(bytes: &[u8], record: &Record, id: ObjectId, master: Option<&MasterKey>) -> Opened {
    let context = object_context(record, id);
    match (bytes.split_first(), master) {
        (Some((&SEALED, sealed)), Some(master)) => master.open(&context, sealed).map_or(Opened::Damaged, Opened::Plain),
        (Some((&SEALED, _)), None) => Opened::Hidden,
        (Some((&OPEN, rest)), master) => match rest.split_first_chunk::<AUTHENTICATOR>() {
            // Before a login there is no key to authenticate the object with. The login does that
            // later.
            Some((code, plain)) if master.is_none_or(|master| master.is_authentic(&context, plain, code)) => {
                Opened::Plain(zeroize::Zeroizing::new(plain.to_vec()))
            }
            _ => Opened::Damaged,
        },
        _ => Opened::Damaged,
    }
}

/// The context that an object file is authenticated with: it cannot be moved to another token or
/// name.
fn object_context(record: &Record, id: ObjectId) -> Vec<u8> {
    [b"hsm-sim object ".as_slice(), &record.epoch, &id].concat()
}

fn check_length(pin: &[u8]) -> Result<()> {
    if (MIN_PIN..=MAX_PIN).contains(&pin.len()) { Ok(()) } else { fail(CKR_PIN_LEN_RANGE) }
}

/// The shortest PIN, in bytes.
pub(crate) const MIN_PIN: usize = 4;
/// The longest PIN, in bytes.
pub(crate) const MAX_PIN: usize = 255;

/// The number of handles that a session allocates at once, so that sessions rarely change the same
/// counter.
const HANDLE_BLOCK: u64 = 1024;

/// The first byte of an object file: encrypted and authenticated.
const SEALED: u8 = 1;
/// The first byte of an object file: authenticated, and to be read before the login.
const OPEN: u8 = 2;
