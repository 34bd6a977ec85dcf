//! Sessions: the token of each, its objects, and its operations under way.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cryptoki_sys::*;

use crate::attribute::Flags;
use crate::cache::ObjectCache;
use crate::cipher::CipherOperation;
use crate::error::{Result, Rv, fail};
use crate::message::MessageOperation;
use crate::object::Object;
use crate::signature::SignatureOperation;
use crate::token::{Login, Token};

/// A session.
///
/// Each session has its own cache lines: one thread opens many sessions, and many threads use them.
#[repr(align(128))]
pub(crate) struct Session {
    /// The handle by which the caller names it.
    pub(crate) handle: CK_SESSION_HANDLE,
    /// Its token.
    pub(crate) token: Arc<Token>,
    /// Whether it may change token objects.
    pub(crate) read_write: bool,
    operations: Mutex<Operations>,
    objects: Mutex<Owned>,
    cache: Arc<ObjectCache>,
    closed: AtomicBool,
}

/// The objects that end with the session, and its handles that are left for new objects.
#[derive(Default)]
struct Owned {
    handles: HashSet<CK_OBJECT_HANDLE>,
    unused: Range<CK_OBJECT_HANDLE>,
}

/// The operations that a session has begun: at most one of each kind.
#[derive(Default)]
pub(crate) struct Operations {
    pub(crate) find: Option<std::vec::IntoIter<CK_OBJECT_HANDLE>>,
    pub(crate) encrypt: Option<CipherOperation>,
    pub(crate) decrypt: Option<CipherOperation>,
    pub(crate) digest: Option<DigestOperation>,
    pub(crate) sign: Option<SignatureOperation>,
    pub(crate) verify: Option<SignatureOperation>,
    pub(crate) message_encrypt: Option<MessageOperation>,
    pub(crate) message_decrypt: Option<MessageOperation>,
}

/// A digest that is being computed.
pub(crate) struct DigestOperation {
    pub(crate) context: aws_lc_rs::digest::Context,
    /// C_DigestUpdate or C_DigestKey was called.
    pub(crate) in_parts: bool,
}

impl Session {
    pub(crate) fn new(handle: CK_SESSION_HANDLE, token: Arc<Token>, read_write: bool) -> Self {
        let cache = Arc::default();
        token.watch(&cache);
        Self {
            handle,
            token,
            read_write,
            operations: Mutex::default(),
            objects: Mutex::default(),
            cache,
            closed: AtomicBool::new(false),
        }
    }

    /// The operations. The lock is the session's own: other sessions never wait for it.
    pub(crate) fn operations(&self) -> MutexGuard<'_, Operations> {
        self.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object with this handle, if it can be seen now; otherwise `missing`.
    pub(crate) fn object(&self, handle: CK_OBJECT_HANDLE, missing: CK_RV) -> Result<Arc<Object>> {
        match self.cache.get(handle, &self.token.objects) {
            Some(object) if self.sees(&object) => Ok(object),
            _ => fail(missing),
        }
    }

    /// Whether an object can be seen now.
    pub(crate) fn sees(&self, object: &Object) -> bool {
        !object.flags.has(Flags::PRIVATE) || self.token.login_state() == Login::User
    }

    /// The object with this handle, not a copy: [`Token::change`] compares with it.
    pub(crate) fn object_to_change(&self, handle: CK_OBJECT_HANDLE, missing: CK_RV) -> Result<Arc<Object>> {
        self.object(handle, missing)?;
        self.token.objects.get(handle).ok_or(Rv(missing))
    }

    /// Adds a new object to the session or to the token, as its flags say.
    pub(crate) fn add(&self, mut object: Object) -> Result<CK_OBJECT_HANDLE> {
        self.check_write(object.flags)?;
        let of_session = !object.flags.has(Flags::TOKEN);
        object.session = if of_session { self.handle } else { 0 };
        object.id = None;
        object.handle = self.new_handle(of_session);
        let handle = object.handle;
        self.token.add(object)?;
        // The session may have been closed in between. Then nothing else removes the object.
        if of_session && self.closed.load(Ordering::SeqCst) {
            self.token.objects.remove(handle);
            return fail(CKR_SESSION_HANDLE_INVALID);
        }
        Ok(handle)
    }

    /// Removes an object.
    pub(crate) fn remove(&self, object: &Object) -> Result<()> {
        if object.session == self.handle {
            self.owned().handles.remove(&object.handle);
        }
        self.token.remove(object)
    }

    /// Whether this session may make or change an object with these flags.
    pub(crate) fn check_write(&self, flags: Flags) -> Result<()> {
        if flags.has(Flags::PRIVATE) && self.token.login_state() != Login::User {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        if flags.has(Flags::TOKEN) && !self.read_write {
            return fail(CKR_SESSION_READ_ONLY);
        }
        Ok(())
    }

    /// Ends the session. Its objects and operations are gone when this returns.
    pub(crate) fn end(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.destroy_objects();
        self.cache.clear();
        *self.operations() = Operations::default();
    }

    /// The state that C_GetSessionInfo shows.
    pub(crate) fn state(&self) -> CK_STATE {
        match (self.token.login_state(), self.read_write) {
            (Login::Public, false) => CKS_RO_PUBLIC_SESSION,
            (Login::Public, true) => CKS_RW_PUBLIC_SESSION,
            (Login::User, false) => CKS_RO_USER_FUNCTIONS,
            (Login::User, true) => CKS_RW_USER_FUNCTIONS,
            (Login::SecurityOfficer, _) => CKS_RW_SO_FUNCTIONS,
        }
    }

    /// A handle for a new object. An object that ends with the session is noted here.
    fn new_handle(&self, of_session: bool) -> CK_OBJECT_HANDLE {
        let mut owned = self.owned();
        let handle = owned.unused.next().unwrap_or_else(|| {
            owned.unused = self.token.next_handles();
            owned.unused.next().unwrap_or_default()
        });
        if of_session {
            owned.handles.insert(handle);
        }
        handle
    }

    fn owned(&self) -> MutexGuard<'_, Owned> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn destroy_objects(&self) {
        for handle in std::mem::take(&mut self.owned().handles) {
            self.token.objects.remove(handle);
        }
    }
}
