//! Sessions and logins: the chapter on session management.

use cryptoki_sys::*;

use super::calls::{Void, check_target, on_session, refusals};
use super::memory::{bytes, pin_bytes, write};
use super::state::guard;
use crate::error::fail;
use crate::function::Function;

pub(super) unsafe extern "C" fn C_OpenSession(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    _application: *mut Void,
    _notify: CK_NOTIFY,
    session: *mut CK_SESSION_HANDLE,
) -> CK_RV {
    guard(Function::C_OpenSession, |module| {
        check_target(session)?;
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(session, module.open_session(slot, flags)?) }
    })
}

pub(super) unsafe extern "C" fn C_CloseSession(session: CK_SESSION_HANDLE) -> CK_RV {
    guard(Function::C_CloseSession, |module| module.close_session(session))
}

pub(super) unsafe extern "C" fn C_CloseAllSessions(slot: CK_SLOT_ID) -> CK_RV {
    guard(Function::C_CloseAllSessions, |module| module.close_all_sessions(slot))
}

pub(super) unsafe extern "C" fn C_GetSessionInfo(session: CK_SESSION_HANDLE, info: *mut CK_SESSION_INFO) -> CK_RV {
    on_session(Function::C_GetSessionInfo, session, |session| {
        let read_write = if session.read_write { CKF_RW_SESSION } else { 0 };
        let value = CK_SESSION_INFO {
            slotID: session.token.slot,
            state: session.state(),
            flags: CKF_SERIAL_SESSION | read_write,
            ulDeviceError: 0,
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_SessionCancel(session: CK_SESSION_HANDLE, flags: CK_FLAGS) -> CK_RV {
    on_session(Function::C_SessionCancel, session, |session| {
        session.cancel(flags);
        Ok(())
    })
}

pub(super) unsafe extern "C" fn C_Login(
    session: CK_SESSION_HANDLE,
    user: CK_USER_TYPE,
    pin: *mut u8,
    length: CK_ULONG,
) -> CK_RV {
    // SAFETY: the caller's pointer, by the standard.
    guard(Function::C_Login, |module| module.log_in(session, user, unsafe { pin_bytes(pin, length) }?))
}

pub(super) unsafe extern "C" fn C_LoginUser(
    session: CK_SESSION_HANDLE,
    user: CK_USER_TYPE,
    pin: *mut u8,
    length: CK_ULONG,
    name: *mut u8,
    name_length: CK_ULONG,
) -> CK_RV {
    guard(Function::C_LoginUser, |module| {
        // SAFETY: the caller's pointers, by the standard.
        let (pin, name) = unsafe { (pin_bytes(pin, length)?, bytes(name, name_length)?) };
        // There is one user without a name.
        if name.is_empty() { module.log_in(session, user, pin) } else { fail(CKR_ARGUMENTS_BAD) }
    })
}

pub(super) unsafe extern "C" fn C_Logout(session: CK_SESSION_HANDLE) -> CK_RV {
    guard(Function::C_Logout, |module| module.log_out(session))
}

refusals! { CKR_FUNCTION_NOT_SUPPORTED:
    C_GetOperationState(*mut u8, *mut CK_ULONG);
    C_SetOperationState(*mut u8, CK_ULONG, CK_OBJECT_HANDLE, CK_OBJECT_HANDLE);
}
