//! The library's state between C_Initialize and C_Finalize.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cryptoki_sys::*;

use crate::control::{Command, Control};
use crate::error::{Result, Rv, fail};
use crate::function::Function;
use crate::nonces;
use crate::pin::Role;
use crate::session::{Operations, Session};
use crate::settings::Settings;
use crate::store::Store;
use crate::table::Table;
use crate::token::{Login, Token};

/// Everything that C_Initialize makes.
pub(crate) struct Module {
    tokens: Vec<Arc<Token>>,
    sessions: Table<Session>,
    next_session: AtomicU64,
    control: Option<Control>,
    // Opening, closing, login and logout exclude each other: each reads what the others write.
    order: Mutex<()>,
}

impl Module {
    /// The module as the environment configures it. The reason of a failure goes to standard error:
    /// the standard has no other place for it.
    pub(crate) fn new() -> Result<Self> {
        let refuse = |reason: String| {
            eprintln!("hsm-sim: {reason}");
            Rv(CKR_GENERAL_ERROR)
        };
        let settings = Settings::from_environment().map_err(refuse)?;
        nonces::begin(settings.nonce_watch.as_deref()).map_err(refuse)?;
        let settings = Arc::new(settings);
        let next_object = Arc::new(AtomicU64::new(1));
        let tokens = (0..settings.slots).map(|slot| {
            let store = Store::new(settings.directory.join(format!("slot-{slot}")));
            Arc::new(Token::new(CK_SLOT_ID::from(slot), store, Arc::clone(&settings), Arc::clone(&next_object)))
        });
        let tokens: Vec<_> = tokens.collect();
        for token in &tokens {
            token.recover()?;
        }
        let module = Self {
            tokens,
            sessions: Table::new(1),
            next_session: AtomicU64::new(1),
            control: settings.control.clone().map(Control::new),
            order: Mutex::new(()),
        };
        // Commands that are in the control file now count as executed.
        module.poll_control();
        Ok(module)
    }

    /// Every function calls this first: it executes the control file's commands and applies its
    /// rules.
    pub(crate) fn enter(&self, function: Function) -> Result<()> {
        self.poll_control();
        self.control.as_ref().map_or(Ok(()), |control| control.apply_rules(function))
    }

    /// Whether a control file is configured: then tokens can be removed.
    pub(crate) fn has_control(&self) -> bool {
        self.control.is_some()
    }

    /// Executes the new commands of the control file. Functions that wait call this, too.
    pub(crate) fn poll_control(&self) {
        for command in self.control.iter().flat_map(Control::poll) {
            self.execute(&command);
        }
    }

    /// All slots.
    pub(crate) fn tokens(&self) -> &[Arc<Token>] {
        &self.tokens
    }

    /// The slot with this number.
    pub(crate) fn slot(&self, slot: CK_SLOT_ID) -> Result<&Arc<Token>> {
        let place = usize::try_from(slot).ok();
        place.and_then(|place| self.tokens.get(place)).ok_or(Rv(CKR_SLOT_ID_INVALID))
    }

    /// The session with this handle.
    pub(crate) fn session(&self, handle: CK_SESSION_HANDLE) -> Result<Arc<Session>> {
        self.sessions.get(handle).ok_or(Rv(CKR_SESSION_HANDLE_INVALID))
    }

    /// C_InitToken.
    pub(crate) fn initialise_token(&self, slot: CK_SLOT_ID, pin: &[u8], label: [u8; 32]) -> Result<()> {
        let token = self.slot(slot)?;
        token.check_present()?;
        let _order = self.order();
        if token.sessions.load(Ordering::Acquire) > 0 {
            return fail(CKR_SESSION_EXISTS);
        }
        token.initialise(pin, label)
    }

    /// C_OpenSession.
    pub(crate) fn open_session(&self, slot: CK_SLOT_ID, flags: CK_FLAGS) -> Result<CK_SESSION_HANDLE> {
        let token = self.slot(slot)?;
        if flags & CKF_SERIAL_SESSION == 0 {
            return fail(CKR_SESSION_PARALLEL_NOT_SUPPORTED);
        }
        token.check_present()?;
        if token.record()?.is_none() {
            return fail(CKR_TOKEN_NOT_RECOGNIZED);
        }
        let _order = self.order();
        if self
            .control
            .as_ref()
            .and_then(Control::session_limit)
            .is_some_and(|limit| token.sessions.load(Ordering::Acquire) >= limit)
        {
            return fail(CKR_SESSION_COUNT);
        }
        let read_write = flags & CKF_RW_SESSION != 0;
        if !read_write && token.login_state() == Login::SecurityOfficer {
            return fail(CKR_SESSION_READ_WRITE_SO_EXISTS);
        }
        let handle = self.next_session.fetch_add(1, Ordering::Relaxed);
        token.sessions.fetch_add(1, Ordering::AcqRel);
        if read_write {
            token.read_write_sessions.fetch_add(1, Ordering::AcqRel);
        }
        self.sessions.insert(handle, Arc::new(Session::new(handle, Arc::clone(token), read_write)));
        Ok(handle)
    }

    /// C_CloseSession. Closing the last session of a token logs out.
    pub(crate) fn close_session(&self, handle: CK_SESSION_HANDLE) -> Result<()> {
        let _order = self.order();
        let session = self.sessions.remove(handle).ok_or(Rv(CKR_SESSION_HANDLE_INVALID))?;
        Self::end(&session);
        Ok(())
    }

    /// C_CloseAllSessions.
    pub(crate) fn close_all_sessions(&self, slot: CK_SLOT_ID) -> Result<()> {
        let token = self.slot(slot)?;
        self.drop_sessions(Some(token));
        Ok(())
    }

    /// Ends the sessions of one token, or all.
    pub(crate) fn drop_sessions(&self, token: Option<&Arc<Token>>) {
        let _order = self.order();
        for (_, session) in
            self.sessions.remove_if(|session| token.is_none_or(|token| Arc::ptr_eq(token, &session.token)))
        {
            Self::end(&session);
        }
    }

    /// C_Login.
    pub(crate) fn log_in(&self, handle: CK_SESSION_HANDLE, user: CK_USER_TYPE, pin: &[u8]) -> Result<()> {
        let session = self.session(handle)?;
        session.token.check_present()?;
        if user == CKU_CONTEXT_SPECIFIC {
            return session.authenticate(pin);
        }
        let _order = self.order();
        let role = match user {
            CKU_USER => Role::User,
            CKU_SO => {
                let token = &session.token;
                // The SO has no read-only state.
                if token.sessions.load(Ordering::Acquire) > token.read_write_sessions.load(Ordering::Acquire) {
                    return fail(CKR_SESSION_READ_ONLY_EXISTS);
                }
                Role::SecurityOfficer
            }
            _ => return fail(CKR_USER_TYPE_INVALID),
        };
        session.token.log_in(role, pin)
    }

    /// C_Logout: ends the operations of all sessions with the token and destroys their private
    /// objects.
    pub(crate) fn log_out(&self, handle: CK_SESSION_HANDLE) -> Result<()> {
        let session = self.session(handle)?;
        let _order = self.order();
        if session.token.login_state() == Login::Public {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        session.token.log_out();
        for (_, other) in self.sessions.collect(|other| Arc::ptr_eq(&other.token, &session.token)) {
            *other.operations() = Operations::default();
        }
        Ok(())
    }

    /// C_InitPIN.
    pub(crate) fn initialise_pin(&self, handle: CK_SESSION_HANDLE, pin: &[u8]) -> Result<()> {
        let session = self.session(handle)?;
        if session.token.login_state() != Login::SecurityOfficer {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        session.token.set_user_pin(pin)
    }

    /// C_SetPIN: sets the PIN of the role that is logged in; of the user if none is.
    pub(crate) fn set_pin(&self, handle: CK_SESSION_HANDLE, old: &[u8], new: &[u8]) -> Result<()> {
        let session = self.session(handle)?;
        if !session.read_write {
            return fail(CKR_SESSION_READ_ONLY);
        }
        let role = match session.token.login_state() {
            Login::SecurityOfficer => Role::SecurityOfficer,
            Login::User | Login::Public => Role::User,
        };
        session.token.change_pin(role, old, new)
    }

    fn execute(&self, command: &Command) {
        let (wanted, action): (_, fn(&Self, &Arc<Token>)) = match command {
            Command::DropSessions => return self.drop_sessions(None),
            Command::RemoveToken(wanted) => (wanted, |module, token| {
                token.present.store(false, Ordering::Release);
                token.changed.store(true, Ordering::Release);
                module.drop_sessions(Some(token));
            }),
            Command::InsertToken(wanted) => (wanted, |_, token| {
                token.present.store(true, Ordering::Release);
                token.changed.store(true, Ordering::Release);
            }),
            Command::WipeToken(wanted) => (wanted, |module, token| {
                module.drop_sessions(Some(token));
                if let Err(Rv(code)) = token.wipe() {
                    eprintln!("hsm-sim: the token in slot {} cannot be wiped: {code:#x}", token.slot);
                }
            }),
        };
        let mut found = false;
        for token in self.tokens() {
            let label = token.record().ok().flatten().map(|record| record.label);
            let label = label.as_ref().map(|label| label.trim_ascii_end());
            if wanted.parse() == Ok(token.slot) || label == Some(wanted.as_bytes()) {
                action(self, token);
                found = true;
            }
        }
        if !found {
            eprintln!("hsm-sim: the control file names `{wanted}`, which is neither a slot number nor a token label");
        }
    }

    fn order(&self) -> std::sync::MutexGuard<'_, ()> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(session: &Session) {
        session.end();
        let token = &session.token;
        if session.read_write {
            token.read_write_sessions.fetch_sub(1, Ordering::AcqRel);
        }
        if token.sessions.fetch_sub(1, Ordering::AcqRel) == 1 {
            token.log_out();
        }
    }
}
