//! What all test binaries share: the module loaded as a stranger would load it, fresh tokens, and a
//! thin layer over the C functions that keeps their exact return codes and lengths (the `cryptoki`
//! crate hides some of both).
#![allow(dead_code, unused_macros, reason = "each test binary uses a part of this")]
#![expect(unsafe_code, reason = "calls into a C interface")]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test helpers: a failure is to stop the test"
)]

pub(crate) mod mechanism;
pub(crate) mod template;
pub(crate) mod vectors;

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cryptoki_sys::*;
pub(crate) use mechanism::Mechanism;
pub(crate) use template::Template;

/// A failed call is its return code.
pub(crate) type Result<T> = core::result::Result<T, CK_RV>;
pub(crate) type Session = CK_SESSION_HANDLE;
pub(crate) type Object = CK_OBJECT_HANDLE;

/// `call!(module, C_Name, arguments…)`: one C function by its name in the 2.40 list, its return
/// code as a [`Result`].
macro_rules! call {
    ($module:expr, $name:ident $(, $argument:expr)* $(,)?) => {
        // SAFETY: the pointers among the arguments are valid for the call, or are the hostile ones
        // that a test is about.
        $crate::common::check(unsafe { $module.list.$name.expect(stringify!($name))($($argument),*) })
    };
}

/// `call3!(module, C_Name, arguments…)`: the same for a function of the 3.0 list.
macro_rules! call3 {
    ($module:expr, $name:ident $(, $argument:expr)* $(,)?) => {
        // SAFETY: as in `call!`.
        $crate::common::check(unsafe { $module.list3().$name.expect(stringify!($name))($($argument),*) })
    };
}

/// `CKR_OK` or the code.
pub(crate) fn check(code: CK_RV) -> Result<()> {
    if code == CKR_OK { Ok(()) } else { Err(code) }
}

/// A loaded PKCS#11 module.
pub(crate) struct Module {
    library: Pkcs11,
    pub(crate) list: CK_FUNCTION_LIST,
    list3: Option<CK_FUNCTION_LIST_3_0>,
}

// SAFETY: function pointers of a library that is never unloaded; PKCS#11 modules initialised with
// CKF_OS_LOCKING_OK may be called from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// hsm-sim: `HSM_SIM_MODULE`, else the cdylib that cargo built beside this test.
    pub(crate) fn hsm_sim_path() -> PathBuf {
        std::env::var_os("HSM_SIM_MODULE").map_or_else(
            || {
                let mut path = std::env::current_exe().unwrap();
                path.set_file_name("libhsm_sim.so");
                path
            },
            PathBuf::from,
        )
    }

    pub(crate) fn load(path: &Path) -> Self {
        // SAFETY: loading runs the library's initialisers; these are the modules under test.
        let library = unsafe { Pkcs11::new(path) }.unwrap_or_else(|e| panic!("cannot load `{}`: {e}", path.display()));
        let mut list: CK_FUNCTION_LIST_PTR = null_mut();
        // SAFETY: `list` is a valid place for the answer.
        check(unsafe { library.C_GetFunctionList(&raw mut list) }).expect("C_GetFunctionList");
        // SAFETY: the module answered with a pointer to its static list.
        let list = unsafe { *list };
        let list3 = library.C_GetInterface.as_ref().ok().and_then(|get| {
            let (mut interface, mut version) = (null_mut(), CK_VERSION { major: 3, minor: 0 });
            let mut name = *b"PKCS 11\0";
            // SAFETY: name and version live for the call; the answer points to static data of the
            // module.
            unsafe {
                check(get(name.as_mut_ptr(), &raw mut version, &raw mut interface, 0)).ok()?;
                Some(*(*interface).pFunctionList.cast::<CK_FUNCTION_LIST_3_0>())
            }
        });
        Self { library, list, list3 }
    }

    pub(crate) fn list3(&self) -> &CK_FUNCTION_LIST_3_0 {
        self.list3.as_ref().expect("C_GetInterface gives no 3.0 list")
    }

    /// The dynamic symbols, for the functions that are no members of a list.
    pub(crate) fn library(&self) -> &Pkcs11 {
        &self.library
    }

    pub(crate) fn initialize(&self) -> Result<()> {
        let mut arguments = CK_C_INITIALIZE_ARGS {
            CreateMutex: None,
            DestroyMutex: None,
            LockMutex: None,
            UnlockMutex: None,
            flags: CKF_OS_LOCKING_OK,
            pReserved: null_mut(),
        };
        call!(self, C_Initialize, (&raw mut arguments).cast())
    }

    pub(crate) fn slots(&self, with_token: bool) -> Vec<CK_SLOT_ID> {
        let mut count = 0;
        call!(self, C_GetSlotList, u8::from(with_token), null_mut(), &raw mut count).unwrap();
        let mut slots = vec![0; usize::try_from(count).unwrap()];
        call!(self, C_GetSlotList, u8::from(with_token), slots.as_mut_ptr(), &raw mut count).unwrap();
        slots.truncate(usize::try_from(count).unwrap());
        slots
    }

    pub(crate) fn token_info(&self, slot: CK_SLOT_ID) -> Result<CK_TOKEN_INFO> {
        let mut info = CK_TOKEN_INFO::default();
        call!(self, C_GetTokenInfo, slot, &raw mut info).map(|()| info)
    }

    pub(crate) fn mechanisms(&self, slot: CK_SLOT_ID) -> Vec<CK_MECHANISM_TYPE> {
        let mut count = 0;
        call!(self, C_GetMechanismList, slot, null_mut(), &raw mut count).unwrap();
        let mut mechanisms = vec![0; usize::try_from(count).unwrap()];
        call!(self, C_GetMechanismList, slot, mechanisms.as_mut_ptr(), &raw mut count).unwrap();
        mechanisms
    }

    pub(crate) fn init_token(&self, slot: CK_SLOT_ID, so_pin: &str, label: &str) -> Result<()> {
        let mut padded = [b' '; 32];
        padded[..label.len()].copy_from_slice(label.as_bytes());
        let mut pin = so_pin.as_bytes().to_vec();
        call!(self, C_InitToken, slot, pin.as_mut_ptr(), pin.len() as CK_ULONG, padded.as_mut_ptr())
    }

    /// The slot of the token with this label.
    pub(crate) fn slot_of(&self, label: &str) -> Option<CK_SLOT_ID> {
        self.slots(true).into_iter().find(|slot| {
            self.token_info(*slot).is_ok_and(|info| {
                String::from_utf8_lossy(&info.label).trim_end() == label && info.flags & CKF_TOKEN_INITIALIZED != 0
            })
        })
    }

    pub(crate) fn open(&self, slot: CK_SLOT_ID, flags: CK_FLAGS) -> Result<Session> {
        let mut session = 0;
        call!(self, C_OpenSession, slot, flags | CKF_SERIAL_SESSION, null_mut(), None, &raw mut session)
            .map(|()| session)
    }

    pub(crate) fn open_rw(&self, slot: CK_SLOT_ID) -> Result<Session> {
        self.open(slot, CKF_RW_SESSION)
    }

    pub(crate) fn close(&self, session: Session) -> Result<()> {
        call!(self, C_CloseSession, session)
    }

    pub(crate) fn session_state(&self, session: Session) -> Result<CK_STATE> {
        let mut info = CK_SESSION_INFO::default();
        call!(self, C_GetSessionInfo, session, &raw mut info).map(|()| info.state)
    }

    pub(crate) fn login(&self, session: Session, user: CK_USER_TYPE, pin: &str) -> Result<()> {
        let mut pin = pin.as_bytes().to_vec();
        call!(self, C_Login, session, user, pin.as_mut_ptr(), pin.len() as CK_ULONG)
    }

    pub(crate) fn logout(&self, session: Session) -> Result<()> {
        call!(self, C_Logout, session)
    }

    pub(crate) fn init_pin(&self, session: Session, pin: &str) -> Result<()> {
        let mut pin = pin.as_bytes().to_vec();
        call!(self, C_InitPIN, session, pin.as_mut_ptr(), pin.len() as CK_ULONG)
    }

    pub(crate) fn set_pin(&self, session: Session, old: &str, new: &str) -> Result<()> {
        let (mut old, mut new) = (old.as_bytes().to_vec(), new.as_bytes().to_vec());
        call!(self, C_SetPIN, session, old.as_mut_ptr(), old.len() as CK_ULONG, new.as_mut_ptr(), new.len() as CK_ULONG)
    }

    pub(crate) fn create(&self, session: Session, template: &Template) -> Result<Object> {
        let (mut attributes, mut object) = (template.attributes(), 0);
        call!(self, C_CreateObject, session, attributes.as_mut_ptr(), attributes.len() as CK_ULONG, &raw mut object)
            .map(|()| object)
    }

    pub(crate) fn copy(&self, session: Session, object: Object, template: &Template) -> Result<Object> {
        let (mut attributes, mut copy) = (template.attributes(), 0);
        call!(self, C_CopyObject, session, object, attributes.as_mut_ptr(), attributes.len() as CK_ULONG, &raw mut copy)
            .map(|()| copy)
    }

    pub(crate) fn destroy(&self, session: Session, object: Object) -> Result<()> {
        call!(self, C_DestroyObject, session, object)
    }

    pub(crate) fn set(&self, session: Session, object: Object, template: &Template) -> Result<()> {
        let mut attributes = template.attributes();
        call!(self, C_SetAttributeValue, session, object, attributes.as_mut_ptr(), attributes.len() as CK_ULONG)
    }

    /// One attribute, by the two-call convention.
    pub(crate) fn get(&self, session: Session, object: Object, kind: CK_ATTRIBUTE_TYPE) -> Result<Vec<u8>> {
        let mut attribute = CK_ATTRIBUTE { type_: kind, pValue: null_mut(), ulValueLen: 0 };
        call!(self, C_GetAttributeValue, session, object, &raw mut attribute, 1)?;
        let mut value = vec![0_u8; usize::try_from(attribute.ulValueLen).unwrap()];
        attribute.pValue = value.as_mut_ptr().cast();
        call!(self, C_GetAttributeValue, session, object, &raw mut attribute, 1)?;
        value.truncate(usize::try_from(attribute.ulValueLen).unwrap());
        Ok(value)
    }

    pub(crate) fn get_bool(&self, session: Session, object: Object, kind: CK_ATTRIBUTE_TYPE) -> Result<bool> {
        self.get(session, object, kind).map(|value| value == [1])
    }

    pub(crate) fn get_ulong(&self, session: Session, object: Object, kind: CK_ATTRIBUTE_TYPE) -> Result<CK_ULONG> {
        self.get(session, object, kind).map(|value| CK_ULONG::from_ne_bytes(value.try_into().unwrap()))
    }

    pub(crate) fn find(&self, session: Session, template: &Template) -> Result<Vec<Object>> {
        let (mut attributes, mut found) = (template.attributes(), Vec::new());
        call!(self, C_FindObjectsInit, session, attributes.as_mut_ptr(), attributes.len() as CK_ULONG)?;
        loop {
            let (mut part, mut count) = ([0; 50], 0);
            call!(self, C_FindObjects, session, part.as_mut_ptr(), 50, &raw mut count)?;
            if count == 0 {
                break;
            }
            found.extend_from_slice(&part[..usize::try_from(count).unwrap()]);
        }
        call!(self, C_FindObjectsFinal, session)?;
        Ok(found)
    }

    pub(crate) fn generate_key(&self, session: Session, mechanism: &Mechanism, template: &Template) -> Result<Object> {
        let (mut mechanism, mut attributes, mut key) = (mechanism.raw(), template.attributes(), 0);
        call!(
            self,
            C_GenerateKey,
            session,
            &raw mut mechanism,
            attributes.as_mut_ptr(),
            attributes.len() as CK_ULONG,
            &raw mut key
        )
        .map(|()| key)
    }

    /// (public, private)
    pub(crate) fn generate_key_pair(
        &self,
        session: Session,
        mechanism: &Mechanism,
        public: &Template,
        private: &Template,
    ) -> Result<(Object, Object)> {
        let (mut mechanism, mut first, mut second) = (mechanism.raw(), public.attributes(), private.attributes());
        let (mut public, mut private) = (0, 0);
        call!(
            self,
            C_GenerateKeyPair,
            session,
            &raw mut mechanism,
            first.as_mut_ptr(),
            first.len() as CK_ULONG,
            second.as_mut_ptr(),
            second.len() as CK_ULONG,
            &raw mut public,
            &raw mut private
        )
        .map(|()| (public, private))
    }

    pub(crate) fn wrap(&self, session: Session, mechanism: &Mechanism, kek: Object, key: Object) -> Result<Vec<u8>> {
        let mut mechanism = mechanism.raw();
        into_buffer(8192, |data, length| call!(self, C_WrapKey, session, &raw mut mechanism, kek, key, data, length))
    }

    pub(crate) fn unwrap(
        &self,
        session: Session,
        mechanism: &Mechanism,
        kek: Object,
        wrapped: &[u8],
        template: &Template,
    ) -> Result<Object> {
        let (mut mechanism, mut wrapped, mut attributes, mut key) =
            (mechanism.raw(), wrapped.to_vec(), template.attributes(), 0);
        call!(
            self,
            C_UnwrapKey,
            session,
            &raw mut mechanism,
            kek,
            wrapped.as_mut_ptr(),
            wrapped.len() as CK_ULONG,
            attributes.as_mut_ptr(),
            attributes.len() as CK_ULONG,
            &raw mut key
        )
        .map(|()| key)
    }

    pub(crate) fn derive(
        &self,
        session: Session,
        mechanism: &Mechanism,
        base: Object,
        template: &Template,
    ) -> Result<Object> {
        let (mut mechanism, mut attributes, mut key) = (mechanism.raw(), template.attributes(), 0);
        call!(
            self,
            C_DeriveKey,
            session,
            &raw mut mechanism,
            base,
            attributes.as_mut_ptr(),
            attributes.len() as CK_ULONG,
            &raw mut key
        )
        .map(|()| key)
    }

    pub(crate) fn encrypt(&self, session: Session, mechanism: &Mechanism, key: Object, data: &[u8]) -> Result<Vec<u8>> {
        let (mut mechanism, mut input) = (mechanism.raw(), data.to_vec());
        call!(self, C_EncryptInit, session, &raw mut mechanism, key)?;
        into_buffer(data.len() + 1024, |output, length| {
            call!(self, C_Encrypt, session, input.as_mut_ptr(), input.len() as CK_ULONG, output, length)
        })
    }

    pub(crate) fn decrypt(&self, session: Session, mechanism: &Mechanism, key: Object, data: &[u8]) -> Result<Vec<u8>> {
        let (mut mechanism, mut input) = (mechanism.raw(), data.to_vec());
        call!(self, C_DecryptInit, session, &raw mut mechanism, key)?;
        into_buffer(data.len() + 1024, |output, length| {
            call!(self, C_Decrypt, session, input.as_mut_ptr(), input.len() as CK_ULONG, output, length)
        })
    }

    /// In parts of these lengths, the rest in one.
    pub(crate) fn encrypt_in_parts(
        &self,
        session: Session,
        mechanism: &Mechanism,
        key: Object,
        data: &[u8],
        parts: &[usize],
    ) -> Result<Vec<u8>> {
        let mut mechanism = mechanism.raw();
        call!(self, C_EncryptInit, session, &raw mut mechanism, key)?;
        let mut result = Vec::new();
        for part in split(data, parts) {
            let mut part = part.to_vec();
            result.extend(into_buffer(data.len() + 1024, |output, length| {
                call!(self, C_EncryptUpdate, session, part.as_mut_ptr(), part.len() as CK_ULONG, output, length)
            })?);
        }
        result.extend(into_buffer(data.len() + 1024, |output, length| {
            call!(self, C_EncryptFinal, session, output, length)
        })?);
        Ok(result)
    }

    pub(crate) fn decrypt_in_parts(
        &self,
        session: Session,
        mechanism: &Mechanism,
        key: Object,
        data: &[u8],
        parts: &[usize],
    ) -> Result<Vec<u8>> {
        let mut mechanism = mechanism.raw();
        call!(self, C_DecryptInit, session, &raw mut mechanism, key)?;
        let mut result = Vec::new();
        for part in split(data, parts) {
            let mut part = part.to_vec();
            result.extend(into_buffer(data.len() + 1024, |output, length| {
                call!(self, C_DecryptUpdate, session, part.as_mut_ptr(), part.len() as CK_ULONG, output, length)
            })?);
        }
        result.extend(into_buffer(data.len() + 1024, |output, length| {
            call!(self, C_DecryptFinal, session, output, length)
        })?);
        Ok(result)
    }

    pub(crate) fn sign(&self, session: Session, mechanism: &Mechanism, key: Object, data: &[u8]) -> Result<Vec<u8>> {
        let (mut mechanism, mut input) = (mechanism.raw(), data.to_vec());
        call!(self, C_SignInit, session, &raw mut mechanism, key)?;
        into_buffer(1024, |output, length| {
            call!(self, C_Sign, session, input.as_mut_ptr(), input.len() as CK_ULONG, output, length)
        })
    }

    pub(crate) fn sign_in_parts(
        &self,
        session: Session,
        mechanism: &Mechanism,
        key: Object,
        data: &[u8],
        parts: &[usize],
    ) -> Result<Vec<u8>> {
        let mut mechanism = mechanism.raw();
        call!(self, C_SignInit, session, &raw mut mechanism, key)?;
        for part in split(data, parts) {
            let mut part = part.to_vec();
            call!(self, C_SignUpdate, session, part.as_mut_ptr(), part.len() as CK_ULONG)?;
        }
        into_buffer(1024, |output, length| call!(self, C_SignFinal, session, output, length))
    }

    pub(crate) fn verify(
        &self,
        session: Session,
        mechanism: &Mechanism,
        key: Object,
        data: &[u8],
        signature: &[u8],
    ) -> Result<()> {
        let (mut mechanism, mut data, mut signature) = (mechanism.raw(), data.to_vec(), signature.to_vec());
        call!(self, C_VerifyInit, session, &raw mut mechanism, key)?;
        call!(
            self,
            C_Verify,
            session,
            data.as_mut_ptr(),
            data.len() as CK_ULONG,
            signature.as_mut_ptr(),
            signature.len() as CK_ULONG
        )
    }

    pub(crate) fn digest(&self, session: Session, mechanism: &Mechanism, data: &[u8]) -> Result<Vec<u8>> {
        let (mut mechanism, mut input) = (mechanism.raw(), data.to_vec());
        call!(self, C_DigestInit, session, &raw mut mechanism)?;
        into_buffer(64, |output, length| {
            call!(self, C_Digest, session, input.as_mut_ptr(), input.len() as CK_ULONG, output, length)
        })
    }

    pub(crate) fn random(&self, session: Session, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        call!(self, C_GenerateRandom, session, bytes.as_mut_ptr(), length as CK_ULONG).map(|()| bytes)
    }
}

/// One call with a buffer that is large enough.
pub(crate) fn into_buffer(size: usize, function: impl FnOnce(*mut u8, *mut CK_ULONG) -> Result<()>) -> Result<Vec<u8>> {
    let (mut buffer, mut length) = (vec![0_u8; size], size as CK_ULONG);
    function(buffer.as_mut_ptr(), &raw mut length)?;
    buffer.truncate(usize::try_from(length).unwrap());
    Ok(buffer)
}

fn split<'a>(data: &'a [u8], parts: &[usize]) -> Vec<&'a [u8]> {
    let (mut rest, mut result) = (data, Vec::new());
    for length in parts {
        let (part, after) = rest.split_at((*length).min(rest.len()));
        result.push(part);
        rest = after;
    }
    result.push(rest);
    result
}

/// The one hsm-sim of this process, initialised over an empty folder.
pub(crate) fn hsm_sim() -> &'static Module {
    static MODULE: OnceLock<Module> = OnceLock::new();
    MODULE.get_or_init(|| {
        let module = Module::load(&Module::hsm_sim_path());
        configure(folder());
        module.initialize().expect("C_Initialize");
        module
    })
}

/// The folder of the tokens of this process; a child process is given its parent's.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| match std::env::var_os(CHILD_FOLDER) {
        Some(folder) => PathBuf::from(folder),
        // A folder by the process's number under cargo's own. Statics are not dropped: the next run
        // removes it.
        None => {
            let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
            for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let process = name.to_str().and_then(|name| name.strip_prefix("hsm-sim-"));
                if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
                    let _ = std::fs::remove_dir_all(entry.path());
                }
            }
            let folder = parent.join(format!("hsm-sim-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            folder
        }
    })
}

/// Tells hsm-sim where its tokens are. PIN stretching is made cheap: these tests log in hundreds of
/// times.
pub(crate) fn configure(folder: &Path) {
    let file = folder.join("hsm-sim.conf");
    if !file.exists() {
        let text = "directory = tokens\ncontrol = control\nslots = 64\npin_attempts = 5\nargon2_memory_kib = 8\nargon2_passes = 1\n";
        std::fs::write(&file, text).unwrap();
    }
    set_environment("HSM_SIM_CONF", &file);
}

/// SoftHSM2 beside it, over a folder of its own. It must be there: a comparison that did not run
/// proves nothing.
pub(crate) fn softhsm2() -> &'static Module {
    static MODULE: OnceLock<Module> = OnceLock::new();
    MODULE.get_or_init(|| {
        let path = std::env::var_os("SOFTHSM2_MODULE")
            .map_or_else(|| PathBuf::from("/usr/lib/softhsm/libsofthsm2.so"), PathBuf::from);
        assert!(
            path.exists(),
            "no SoftHSM2 at `{}`: run `apt install softhsm2`, or set SOFTHSM2_MODULE",
            path.display()
        );
        let tokens = folder().join("softhsm2");
        std::fs::create_dir_all(&tokens).unwrap();
        let file = folder().join("softhsm2.conf");
        std::fs::write(
            &file,
            format!(
                "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
                tokens.display()
            ),
        )
        .unwrap();
        set_environment("SOFTHSM2_CONF", &file);
        let module = Module::load(&path);
        module.initialize().expect("C_Initialize of SoftHSM2");
        module
    })
}

/// Has hsm-sim note the nonces of this process in a folder of that name beside its tokens. To be
/// called before anything else.
pub(crate) fn watch_nonces(name: &str) {
    set_environment("HSM_SIM_NONCE_WATCH", &folder().join(name));
}

fn set_environment(name: &str, value: &Path) {
    // SAFETY: called once for each name, before a module reads its environment; nothing else in
    // these tests writes it.
    unsafe { std::env::set_var(name, value) };
}

/// Wrong PINs in a row that lock a PIN, as configured above.
pub(crate) const PIN_ATTEMPTS: usize = 5;

/// The environment variable by which a child process of a test gets its parent's folder.
pub(crate) const CHILD_FOLDER: &str = "HSM_SIM_TEST_CHILD_FOLDER";

/// Runs one test of this binary again in a process of its own, over `folder`, with more
/// environment.
pub(crate) fn child(test: &str, folder: &Path, environment: &[(&str, &str)]) -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--ignored", "--test-threads", "1"]);
    command.env(CHILD_FOLDER, folder).envs(environment.iter().copied());
    command
}

/// A token of its own for a test, with an anchor session that is logged in as the user.
pub(crate) struct Token {
    pub(crate) module: &'static Module,
    pub(crate) slot: CK_SLOT_ID,
    /// Stays open, so that the login stays.
    pub(crate) session: Session,
}

pub(crate) const SO_PIN: &str = "12345678";
pub(crate) const USER_PIN: &str = "87654321";

impl Token {
    /// A freshly initialised token, the user logged in.
    pub(crate) fn fresh(label: &str) -> Self {
        let module = hsm_sim();
        let slot = Self::initialised(module, label);
        let session = module.open_rw(slot).unwrap();
        module.login(session, CKU_USER, USER_PIN).unwrap();
        Self { module, slot, session }
    }

    /// A freshly initialised token with both PINs, no session open.
    pub(crate) fn initialised(module: &Module, label: &str) -> CK_SLOT_ID {
        let _one_at_a_time = lock();
        let free = module
            .slots(true)
            .into_iter()
            .find(|slot| module.token_info(*slot).is_ok_and(|info| info.flags & CKF_TOKEN_INITIALIZED == 0))
            .expect("a slot with an uninitialised token");
        module.init_token(free, SO_PIN, label).unwrap();
        let slot = module.slot_of(label).unwrap();
        let session = module.open_rw(slot).unwrap();
        module.login(session, CKU_SO, SO_PIN).unwrap();
        module.init_pin(session, USER_PIN).unwrap();
        module.logout(session).unwrap();
        module.close(session).unwrap();
        slot
    }

    /// An AES key with this value and these attributes over: session object, sensitive=false,
    /// extractable, all uses.
    pub(crate) fn aes(&self, value: &[u8], more: Template) -> Object {
        self.module.create(self.session, &Template::aes(value).with(more)).unwrap()
    }

    pub(crate) fn generic(&self, value: &[u8], more: Template) -> Object {
        self.module.create(self.session, &Template::generic(value).with(more)).unwrap()
    }

    pub(crate) fn value(&self, object: Object) -> Vec<u8> {
        self.module.get(self.session, object, CKA_VALUE).unwrap()
    }
}

fn lock() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of a return code, for messages.
pub(crate) fn name(code: CK_RV) -> String {
    NAMES.iter().find(|(known, _)| *known == code).map_or_else(|| format!("{code:#x}"), |(_, name)| (*name).to_owned())
}

macro_rules! names {
    ($($name:ident)*) => { &[$(($name, stringify!($name))),*] };
}

const NAMES: &[(CK_RV, &str)] = names! {
    CKR_OK CKR_CANCEL CKR_HOST_MEMORY CKR_SLOT_ID_INVALID CKR_GENERAL_ERROR CKR_FUNCTION_FAILED CKR_ARGUMENTS_BAD
    CKR_ATTRIBUTE_READ_ONLY CKR_ATTRIBUTE_SENSITIVE CKR_ATTRIBUTE_TYPE_INVALID CKR_ATTRIBUTE_VALUE_INVALID
    CKR_ACTION_PROHIBITED CKR_DATA_INVALID CKR_DATA_LEN_RANGE CKR_DEVICE_ERROR CKR_DEVICE_MEMORY CKR_DEVICE_REMOVED
    CKR_ENCRYPTED_DATA_INVALID CKR_ENCRYPTED_DATA_LEN_RANGE CKR_FUNCTION_NOT_SUPPORTED CKR_KEY_HANDLE_INVALID
    CKR_KEY_SIZE_RANGE CKR_KEY_TYPE_INCONSISTENT CKR_KEY_FUNCTION_NOT_PERMITTED CKR_KEY_NOT_WRAPPABLE CKR_KEY_UNEXTRACTABLE
    CKR_KEY_NEEDED CKR_KEY_INDIGESTIBLE CKR_MECHANISM_INVALID CKR_MECHANISM_PARAM_INVALID CKR_OBJECT_HANDLE_INVALID
    CKR_OPERATION_ACTIVE CKR_OPERATION_NOT_INITIALIZED CKR_PIN_INCORRECT CKR_PIN_INVALID CKR_PIN_LEN_RANGE CKR_PIN_LOCKED
    CKR_SESSION_CLOSED CKR_SESSION_COUNT CKR_SESSION_HANDLE_INVALID CKR_SESSION_PARALLEL_NOT_SUPPORTED CKR_SESSION_READ_ONLY
    CKR_SESSION_EXISTS CKR_SESSION_READ_ONLY_EXISTS CKR_SESSION_READ_WRITE_SO_EXISTS CKR_SIGNATURE_INVALID
    CKR_SIGNATURE_LEN_RANGE CKR_TEMPLATE_INCOMPLETE CKR_TEMPLATE_INCONSISTENT CKR_TOKEN_NOT_PRESENT CKR_TOKEN_NOT_RECOGNIZED
    CKR_TOKEN_WRITE_PROTECTED CKR_UNWRAPPING_KEY_HANDLE_INVALID CKR_UNWRAPPING_KEY_SIZE_RANGE
    CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT CKR_USER_ALREADY_LOGGED_IN CKR_USER_NOT_LOGGED_IN CKR_USER_PIN_NOT_INITIALIZED
    CKR_USER_TYPE_INVALID CKR_USER_ANOTHER_ALREADY_LOGGED_IN CKR_WRAPPED_KEY_INVALID CKR_WRAPPED_KEY_LEN_RANGE
    CKR_WRAPPING_KEY_HANDLE_INVALID CKR_WRAPPING_KEY_SIZE_RANGE CKR_WRAPPING_KEY_TYPE_INCONSISTENT CKR_RANDOM_SEED_NOT_SUPPORTED
    CKR_DOMAIN_PARAMS_INVALID CKR_CURVE_NOT_SUPPORTED CKR_BUFFER_TOO_SMALL CKR_SAVED_STATE_INVALID CKR_STATE_UNSAVEABLE
    CKR_CRYPTOKI_NOT_INITIALIZED CKR_CRYPTOKI_ALREADY_INITIALIZED CKR_FUNCTION_REJECTED CKR_OPERATION_CANCEL_FAILED
};

/// A pointer that is no one's.
pub(crate) fn nowhere() -> *mut c_void {
    null_mut()
}

/// C_EncryptInit alone, for tests of what happens between the calls.
pub(crate) fn begin_encryption(module: &Module, session: Session, mechanism: &Mechanism, key: Object) -> Result<()> {
    let mut mechanism = mechanism.raw();
    call!(module, C_EncryptInit, session, &raw mut mechanism, key)
}

/// C_Encrypt alone.
pub(crate) fn finish_encryption(module: &Module, session: Session, data: &[u8]) -> Result<Vec<u8>> {
    let mut data = data.to_vec();
    into_buffer(data.len() + 64, |output, length| {
        call!(module, C_Encrypt, session, data.as_mut_ptr(), data.len() as CK_ULONG, output, length)
    })
}

/// C_GetAttributeValue over a template as it stands.
pub(crate) fn get_attributes(
    module: &Module,
    session: Session,
    object: Object,
    template: &mut [CK_ATTRIBUTE],
) -> Result<()> {
    call!(module, C_GetAttributeValue, session, object, template.as_mut_ptr(), template.len() as CK_ULONG)
}
