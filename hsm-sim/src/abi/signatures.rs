//! Signatures and MACs: the chapters on signing and on verifying.

use cryptoki_sys::*;

use super::calls::{on_session, results, starts, transforms, updates};
use super::memory::bytes;
use crate::function::Function;
use crate::session::Session;

starts! {
    C_SignInit, cancelled by CKF_SIGN: |session, mechanism, key| session.signature_init(mechanism, key, true);
    C_VerifyInit, cancelled by CKF_VERIFY: |session, mechanism, key| session.signature_init(mechanism, key, false);
}

transforms! { C_Sign: Session::sign; }

updates! {
    C_SignUpdate: |session, data| session.signature_update(true, data);
    C_VerifyUpdate: |session, data| session.signature_update(false, data);
    C_VerifyFinal: Session::verify_final;
}

results! { C_SignFinal: Session::sign_final; }

pub(super) unsafe extern "C" fn C_Verify(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    signature: *mut u8,
    signature_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_Verify, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        let (data, signature) = unsafe { (bytes(input, input_length)?, bytes(signature, signature_length)?) };
        session.verify(data, signature)
    })
}
