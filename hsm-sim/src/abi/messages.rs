//! Encryption of many messages under one key: the chapters on message-based encryption and
//! decryption, which PKCS#11 3.0 added.

use cryptoki_sys::*;

use super::calls::{Void, on_session, start_or_cancel, transform};
use super::memory::{bytes, copy, deliver, room};
use super::parameters::{mechanism_kind, message};
use crate::function::Function;

pub(super) unsafe extern "C" fn C_MessageEncryptInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_MessageEncryptInit, session, |session| {
        start_or_cancel(session, pointer, CKF_MESSAGE_ENCRYPT, || {
            // SAFETY: the caller's pointer, by the standard.
            session.message_init(unsafe { mechanism_kind(pointer) }?, key, true)
        })
    })
}

pub(super) unsafe extern "C" fn C_EncryptMessage(
    session: CK_SESSION_HANDLE,
    parameter: *mut Void,
    parameter_length: CK_ULONG,
    aad: *mut u8,
    aad_length: CK_ULONG,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_EncryptMessage, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let message = message(parameter, parameter_length, false)?;
            let (aad, data) = (bytes(aad, aad_length)?, bytes(input, input_length)?);
            let room = room(output, output_length)?;
            let (answer, iv, tag) =
                session.message(true, |operation| operation.encrypt(&message.parameters, aad, data, room))?;
            if answer.is_data() {
                copy(&iv, message.iv);
                copy(&tag, message.tag);
            }
            deliver(&answer, output, output_length)
        }
    })
}

pub(super) unsafe extern "C" fn C_EncryptMessageBegin(
    session: CK_SESSION_HANDLE,
    parameter: *mut Void,
    parameter_length: CK_ULONG,
    aad: *mut u8,
    aad_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_EncryptMessageBegin, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let message = message(parameter, parameter_length, false)?;
            let aad = bytes(aad, aad_length)?;
            let iv = session.message(true, |operation| operation.begin(&message.parameters, aad))?;
            copy(&iv, message.iv);
            Ok(())
        }
    })
}

pub(super) unsafe extern "C" fn C_EncryptMessageNext(
    session: CK_SESSION_HANDLE,
    parameter: *mut Void,
    parameter_length: CK_ULONG,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
    flags: CK_FLAGS,
) -> CK_RV {
    on_session(Function::C_EncryptMessageNext, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let message = message(parameter, parameter_length, false)?;
            let data = bytes(input, input_length)?;
            let (last, room) = (flags & CKF_END_OF_MESSAGE != 0, room(output, output_length)?);
            let (answer, tag) =
                session.message(true, |operation| operation.encrypt_next(&message.parameters, data, last, room))?;
            if let Some(tag) = tag {
                copy(&tag, message.tag);
            }
            deliver(&answer, output, output_length)
        }
    })
}

pub(super) unsafe extern "C" fn C_MessageEncryptFinal(session: CK_SESSION_HANDLE) -> CK_RV {
    on_session(Function::C_MessageEncryptFinal, session, |session| session.message_final(true))
}

pub(super) unsafe extern "C" fn C_MessageDecryptInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_MessageDecryptInit, session, |session| {
        start_or_cancel(session, pointer, CKF_MESSAGE_DECRYPT, || {
            // SAFETY: the caller's pointer, by the standard.
            session.message_init(unsafe { mechanism_kind(pointer) }?, key, false)
        })
    })
}

pub(super) unsafe extern "C" fn C_DecryptMessage(
    session: CK_SESSION_HANDLE,
    parameter: *mut Void,
    parameter_length: CK_ULONG,
    aad: *mut u8,
    aad_length: CK_ULONG,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_DecryptMessage, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let message = message(parameter, parameter_length, true)?;
            let aad = bytes(aad, aad_length)?;
            transform(input, input_length, output, output_length, |data, room| {
                session.message(false, |operation| operation.decrypt(&message.parameters, aad, data, room))
            })
        }
    })
}

pub(super) unsafe extern "C" fn C_DecryptMessageBegin(
    session: CK_SESSION_HANDLE,
    parameter: *mut Void,
    parameter_length: CK_ULONG,
    aad: *mut u8,
    aad_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_DecryptMessageBegin, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let message = message(parameter, parameter_length, false)?;
            let aad = bytes(aad, aad_length)?;
            session.message(false, |operation| operation.begin(&message.parameters, aad)).map(|_| ())
        }
    })
}

pub(super) unsafe extern "C" fn C_DecryptMessageNext(
    session: CK_SESSION_HANDLE,
    parameter: *mut Void,
    parameter_length: CK_ULONG,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
    flags: CK_FLAGS,
) -> CK_RV {
    on_session(Function::C_DecryptMessageNext, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let last = flags & CKF_END_OF_MESSAGE != 0;
            let message = message(parameter, parameter_length, last)?;
            transform(input, input_length, output, output_length, |data, room| {
                session.message(false, |operation| operation.decrypt_next(&message.parameters, data, last, room))
            })
        }
    })
}

pub(super) unsafe extern "C" fn C_MessageDecryptFinal(session: CK_SESSION_HANDLE) -> CK_RV {
    on_session(Function::C_MessageDecryptFinal, session, |session| session.message_final(false))
}
