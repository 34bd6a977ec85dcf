//! What functions of the standard have in common: they run on a session, take octets and return
//! octets. Where several functions differ only in the step that the session executes, a macro here
//! writes all of them.

use std::sync::Arc;

use cryptoki_sys::*;

use super::memory::{bytes, deliver, room};
use super::state::guard;
use crate::buffer::{Output, Room};
use crate::error::{Result, fail};
use crate::function::Function;
use crate::module::Module;
use crate::session::Session;

/// `void`, as C names it.
pub(super) type Void = core::ffi::c_void;

/// Runs a function that belongs to a session.
pub(super) fn on_session(
    function: Function,
    handle: CK_SESSION_HANDLE,
    body: impl FnOnce(&Session) -> Result<()>,
) -> CK_RV {
    guard(function, |module: &Arc<Module>| body(&*module.session(handle)?))
}

/// Starts an operation, or cancels it (`operation` is its `CKF_` flag) if the mechanism is `NULL`.
pub(super) fn start_or_cancel(
    session: &Session,
    mechanism: *mut CK_MECHANISM,
    operation: CK_FLAGS,
    start: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if mechanism.is_null() {
        session.cancel(operation);
        return Ok(());
    }
    start()
}

/// Takes octets, and writes the octets that `step` makes of them.
pub(super) unsafe fn transform(
    input: *const u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
    step: impl FnOnce(&[u8], Room) -> Result<Output>,
) -> Result<()> {
    // SAFETY: the caller's pointers, by the standard.
    unsafe {
        let data = bytes(input, input_length)?;
        deliver(&step(data, room(output, output_length)?)?, output, output_length)
    }
}

/// Writes the octets that `step` returns.
pub(super) unsafe fn produce(
    output: *mut u8,
    output_length: *mut CK_ULONG,
    step: impl FnOnce(Room) -> Result<Output>,
) -> Result<()> {
    // SAFETY: the caller's pointers, by the standard.
    unsafe { deliver(&step(room(output, output_length)?)?, output, output_length) }
}

/// `CKR_ARGUMENTS_BAD` if there is no place for an answer. Called before anything is done.
pub(super) fn check_target<T>(pointer: *mut T) -> Result<()> {
    if pointer.is_null() { fail(CKR_ARGUMENTS_BAD) } else { Ok(()) }
}

/// Functions that start an operation with a mechanism and a key.
macro_rules! starts {
    ($($name:ident, cancelled by $operation:ident: $step:expr;)+) => {$(
        pub(super) unsafe extern "C" fn $name(
            session: CK_SESSION_HANDLE,
            pointer: *mut CK_MECHANISM,
            key: CK_OBJECT_HANDLE,
        ) -> CK_RV {
            let step: fn(&$crate::session::Session, &$crate::mechanism::Mechanism<'_>, CK_OBJECT_HANDLE) -> _ = $step;
            $crate::abi::calls::on_session($crate::function::Function::$name, session, |session| {
                $crate::abi::calls::start_or_cancel(session, pointer, $operation, || {
                    // SAFETY: the caller's pointer, by the standard.
                    step(session, &unsafe { $crate::abi::parameters::mechanism(pointer) }?, key)
                })
            })
        }
    )+};
}
pub(super) use starts;

/// Functions that take octets and return octets.
macro_rules! transforms {
    ($($name:ident: $step:expr;)+) => {$(
        pub(super) unsafe extern "C" fn $name(
            session: CK_SESSION_HANDLE,
            input: *mut u8,
            input_length: CK_ULONG,
            output: *mut u8,
            output_length: *mut CK_ULONG,
        ) -> CK_RV {
            let step: fn(&$crate::session::Session, &[u8], $crate::buffer::Room) -> _ = $step;
            $crate::abi::calls::on_session($crate::function::Function::$name, session, |session| {
                let step = |data: &[u8], room| step(session, data, room);
                // SAFETY: the caller's pointers, by the standard.
                unsafe { $crate::abi::calls::transform(input, input_length, output, output_length, step) }
            })
        }
    )+};
}
pub(super) use transforms;

/// Functions that only take octets.
macro_rules! updates {
    ($($name:ident: $step:expr;)+) => {$(
        pub(super) unsafe extern "C" fn $name(
            session: CK_SESSION_HANDLE,
            input: *mut u8,
            input_length: CK_ULONG,
        ) -> CK_RV {
            let step: fn(&$crate::session::Session, &[u8]) -> _ = $step;
            $crate::abi::calls::on_session($crate::function::Function::$name, session, |session| {
                // SAFETY: the caller's pointer, by the standard.
                step(session, unsafe { $crate::abi::memory::bytes(input, input_length) }?)
            })
        }
    )+};
}
pub(super) use updates;

/// Functions that only return octets.
macro_rules! results {
    ($($name:ident: $step:expr;)+) => {$(
        pub(super) unsafe extern "C" fn $name(
            session: CK_SESSION_HANDLE,
            output: *mut u8,
            output_length: *mut CK_ULONG,
        ) -> CK_RV {
            let step: fn(&$crate::session::Session, $crate::buffer::Room) -> _ = $step;
            $crate::abi::calls::on_session($crate::function::Function::$name, session, |session| {
                // SAFETY: the caller's pointers, by the standard.
                unsafe { $crate::abi::calls::produce(output, output_length, |room| step(session, room)) }
            })
        }
    )+};
}
pub(super) use results;

/// Functions that refuse with one return code. They check the session first, as all others do.
macro_rules! refusals {
    ($code:ident: $($name:ident($($type:ty),*);)+) => {
        $(pub(super) unsafe extern "C" fn $name(session: CK_SESSION_HANDLE $(, _: $type)*) -> CK_RV {
            $crate::abi::calls::on_session($crate::function::Function::$name, session, |_| $crate::error::fail($code))
        })+
    };
}
pub(super) use refusals;
