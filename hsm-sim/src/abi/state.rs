//! C_Initialize and C_Finalize, and the guard around every function.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use arc_swap::ArcSwapOption;
use cryptoki_sys::*;

use super::memory::read;
use crate::error::{Result, Rv, fail};
use crate::function::Function;
use crate::module::Module;

/// Present between C_Initialize and C_Finalize. A call keeps its module until it returns, also if
/// another thread finalizes meanwhile.
static MODULE: ArcSwapOption<Module> = ArcSwapOption::const_empty();
/// C_Initialize and C_Finalize exclude each other.
static ORDER: Mutex<()> = Mutex::new(());
/// This process was forked from one that had called C_Initialize, and has not called it itself.
static FORKED: AtomicBool = AtomicBool::new(false);
static FORK_HANDLER: Once = Once::new();

/// Runs a function of the standard: nothing unwinds into C.
pub(super) fn guard(function: Function, body: impl FnOnce(&Arc<Module>) -> Result<()>) -> CK_RV {
    protect(|| {
        let module = MODULE.load();
        let module = match &*module {
            Some(module) if !FORKED.load(Ordering::Relaxed) => module,
            _ => return fail(CKR_CRYPTOKI_NOT_INITIALIZED),
        };
        module.enter(function)?;
        body(module)
    })
}

/// Whether the module is still (or again) the one that a waiting function started with.
pub(super) fn is_current(module: &Arc<Module>) -> bool {
    MODULE.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, module))
}

/// Runs `body`; a panic becomes a return code.
pub(super) fn protect(body: impl FnOnce() -> Result<()>) -> CK_RV {
    // A panic leaves no inconsistent state: objects are replaced as a whole, and locks ignore
    // poison.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => CKR_OK,
        Ok(Err(Rv(code))) => code,
        Err(_) => CKR_GENERAL_ERROR,
    }
}

pub(super) unsafe extern "C" fn C_Initialize(arguments: *mut core::ffi::c_void) -> CK_RV {
    protect(|| {
        if !arguments.is_null() {
            // SAFETY: not NULL: it is a CK_C_INITIALIZE_ARGS by the standard.
            check_arguments(&unsafe { read::<CK_C_INITIALIZE_ARGS>(arguments.cast()) }?)?;
        }
        let _order = ORDER.lock().unwrap_or_else(PoisonError::into_inner);
        if FORKED.load(Ordering::Relaxed) {
            // The module belongs to the parent process. Its locks may be held by threads that do
            // not exist here, so it is not touched.
            std::mem::forget(MODULE.swap(None));
            FORKED.store(false, Ordering::Relaxed);
        }
        if MODULE.load().is_some() {
            return fail(CKR_CRYPTOKI_ALREADY_INITIALIZED);
        }
        FORK_HANDLER.call_once(|| {
            // SAFETY: the handler only sets a flag. The C library forgets it when this library is
            // unloaded.
            let _ = unsafe { pthread_atfork(None, None, Some(forked)) };
        });
        MODULE.store(Some(Arc::new(Module::new()?)));
        Ok(())
    })
}

pub(super) unsafe extern "C" fn C_Finalize(reserved: *mut core::ffi::c_void) -> CK_RV {
    protect(|| {
        if !reserved.is_null() {
            return fail(CKR_ARGUMENTS_BAD);
        }
        let _order = ORDER.lock().unwrap_or_else(PoisonError::into_inner);
        if FORKED.load(Ordering::Relaxed) {
            return fail(CKR_CRYPTOKI_NOT_INITIALIZED);
        }
        match MODULE.swap(None) {
            Some(module) => {
                module.drop_sessions(None);
                Ok(())
            }
            None => fail(CKR_CRYPTOKI_NOT_INITIALIZED),
        }
    })
}

/// PKCS#11 2.40, section 5.4: all four mutex functions or none. The module uses those of the
/// operating system.
fn check_arguments(arguments: &CK_C_INITIALIZE_ARGS) -> Result<()> {
    let given = [
        arguments.CreateMutex.is_some(),
        arguments.DestroyMutex.is_some(),
        arguments.LockMutex.is_some(),
        arguments.UnlockMutex.is_some(),
    ];
    let all = given.iter().all(|given| *given);
    let any = given.iter().any(|given| *given);
    if !arguments.pReserved.is_null() || any != all {
        return fail(CKR_ARGUMENTS_BAD);
    }
    // The caller insists on its own mutexes.
    if all && arguments.flags & CKF_OS_LOCKING_OK == 0 {
        return fail(CKR_CANT_LOCK);
    }
    Ok(())
}

unsafe extern "C" fn forked() {
    FORKED.store(true, Ordering::Relaxed);
}

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<unsafe extern "C" fn()>,
        parent: Option<unsafe extern "C" fn()>,
        child: Option<unsafe extern "C" fn()>,
    ) -> core::ffi::c_int;
}
