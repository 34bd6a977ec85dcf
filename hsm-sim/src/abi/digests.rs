//! Digests: the chapter on message digesting.

use cryptoki_sys::*;

use super::calls::{on_session, results, start_or_cancel, transforms, updates};
use super::parameters::mechanism;
use crate::function::Function;
use crate::session::Session;

pub(super) unsafe extern "C" fn C_DigestInit(session: CK_SESSION_HANDLE, pointer: *mut CK_MECHANISM) -> CK_RV {
    on_session(Function::C_DigestInit, session, |session| {
        start_or_cancel(session, pointer, CKF_DIGEST, || {
            // SAFETY: the caller's pointer, by the standard.
            session.digest_init(&unsafe { mechanism(pointer) }?)
        })
    })
}

pub(super) unsafe extern "C" fn C_DigestKey(session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE) -> CK_RV {
    on_session(Function::C_DigestKey, session, |session| session.digest_key(key))
}

transforms! { C_Digest: Session::digest; }
updates! { C_DigestUpdate: Session::digest_update; }
results! { C_DigestFinal: Session::digest_final; }
