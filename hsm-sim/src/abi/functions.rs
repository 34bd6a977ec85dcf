//! The functions of the standard, in its order: read the arguments, call the module, write the
//! answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cryptoki_sys::*;

use super::memory::{bytes, copy, deliver, fill, room, size, template, write};
use super::parameters::{additional_handles, mechanism, mechanism_kind, message};
use super::state::{guard, is_current};
use crate::buffer::{Output, Room};
use crate::crypto;
use crate::error::{Result, fail};
use crate::function::Function;
use crate::mechanism;
use crate::module::Module;
use crate::object::ulong;
use crate::session::Session;
use crate::token::{MAX_PIN, MIN_PIN};

type Void = core::ffi::c_void;

pub(super) unsafe extern "C" fn C_GetInfo(info: *mut CK_INFO) -> CK_RV {
    guard(Function::C_GetInfo, |_| {
        let value = CK_INFO {
            cryptokiVersion: CK_VERSION { major: 3, minor: 0 },
            manufacturerID: padded(MANUFACTURER),
            flags: 0,
            libraryDescription: padded("hsm-sim"),
            libraryVersion: VERSION,
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_GetSlotList(
    present: CK_BBOOL,
    slots: *mut CK_SLOT_ID,
    count: *mut CK_ULONG,
) -> CK_RV {
    guard(Function::C_GetSlotList, |module| {
        let wanted = module.tokens().iter().filter(|token| present == CK_FALSE || token.check_present().is_ok());
        let wanted: Vec<_> = wanted.map(|token| token.slot).collect();
        // SAFETY: the caller's pointers, by the standard.
        unsafe { deliver_list(&wanted, slots, count) }
    })
}

pub(super) unsafe extern "C" fn C_GetSlotInfo(slot: CK_SLOT_ID, info: *mut CK_SLOT_INFO) -> CK_RV {
    guard(Function::C_GetSlotInfo, |module| {
        let token = module.slot(slot)?;
        let present = if token.check_present().is_ok() { CKF_TOKEN_PRESENT } else { 0 };
        let value = CK_SLOT_INFO {
            slotDescription: padded(&format!("hsm-sim slot {slot}")),
            manufacturerID: padded(MANUFACTURER),
            flags: present | if module.has_control() { CKF_REMOVABLE_DEVICE } else { 0 },
            hardwareVersion: VERSION,
            firmwareVersion: VERSION,
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_GetTokenInfo(slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO) -> CK_RV {
    guard(Function::C_GetTokenInfo, |module| {
        let token = module.slot(slot)?;
        token.check_present()?;
        let record = token.record()?;
        let value = CK_TOKEN_INFO {
            label: record.as_ref().map_or_else(|| padded(""), |record| record.label),
            manufacturerID: padded(MANUFACTURER),
            model: padded("hsm-sim"),
            serialNumber: padded(record.as_ref().map_or("", |record| &record.serial)),
            flags: token.flags(record.as_ref()),
            ulMaxSessionCount: CK_EFFECTIVELY_INFINITE,
            ulSessionCount: ulong(token.sessions.load(Ordering::Acquire)),
            ulMaxRwSessionCount: CK_EFFECTIVELY_INFINITE,
            ulRwSessionCount: ulong(token.read_write_sessions.load(Ordering::Acquire)),
            ulMaxPinLen: ulong(MAX_PIN),
            ulMinPinLen: ulong(MIN_PIN),
            ulTotalPublicMemory: CK_UNAVAILABLE_INFORMATION,
            ulFreePublicMemory: CK_UNAVAILABLE_INFORMATION,
            ulTotalPrivateMemory: CK_UNAVAILABLE_INFORMATION,
            ulFreePrivateMemory: CK_UNAVAILABLE_INFORMATION,
            hardwareVersion: VERSION,
            firmwareVersion: VERSION,
            utcTime: padded(""),
        };
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(info, value) }
    })
}

pub(super) unsafe extern "C" fn C_GetMechanismList(
    slot: CK_SLOT_ID,
    list: *mut CK_MECHANISM_TYPE,
    count: *mut CK_ULONG,
) -> CK_RV {
    guard(Function::C_GetMechanismList, |module| {
        module.slot(slot)?.check_present()?;
        let all: Vec<_> = mechanism::all().collect();
        // SAFETY: the caller's pointers, by the standard.
        unsafe { deliver_list(&all, list, count) }
    })
}

pub(super) unsafe extern "C" fn C_GetMechanismInfo(
    slot: CK_SLOT_ID,
    kind: CK_MECHANISM_TYPE,
    info: *mut CK_MECHANISM_INFO,
) -> CK_RV {
    guard(Function::C_GetMechanismInfo, |module| {
        module.slot(slot)?.check_present()?;
        match mechanism::info(kind) {
            // SAFETY: the caller's pointer, by the standard.
            Some(value) => unsafe { write(info, value) },
            None => fail(CKR_MECHANISM_INVALID),
        }
    })
}

pub(super) unsafe extern "C" fn C_InitToken(slot: CK_SLOT_ID, pin: *mut u8, length: CK_ULONG, label: *mut u8) -> CK_RV {
    guard(Function::C_InitToken, |module| {
        // SAFETY: the caller's pointers, by the standard: a label has 32 bytes.
        let (pin, label) = unsafe { (pin_bytes(pin, length)?, bytes(label, 32)?) };
        let label: [u8; 32] = label.try_into().unwrap_or([b' '; 32]);
        module.initialise_token(slot, pin, label)
    })
}

pub(super) unsafe extern "C" fn C_InitPIN(session: CK_SESSION_HANDLE, pin: *mut u8, length: CK_ULONG) -> CK_RV {
    // SAFETY: the caller's pointer, by the standard.
    guard(Function::C_InitPIN, |module| module.initialise_pin(session, unsafe { pin_bytes(pin, length) }?))
}

pub(super) unsafe extern "C" fn C_SetPIN(
    session: CK_SESSION_HANDLE,
    old: *mut u8,
    old_length: CK_ULONG,
    new: *mut u8,
    new_length: CK_ULONG,
) -> CK_RV {
    guard(Function::C_SetPIN, |module| {
        // SAFETY: the caller's pointers, by the standard.
        let (old, new) = unsafe { (pin_bytes(old, old_length)?, pin_bytes(new, new_length)?) };
        module.set_pin(session, old, new)
    })
}

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

pub(super) unsafe extern "C" fn C_GetOperationState(
    session: CK_SESSION_HANDLE,
    _state: *mut u8,
    _length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_GetOperationState, session, |_| fail(CKR_FUNCTION_NOT_SUPPORTED))
}

pub(super) unsafe extern "C" fn C_SetOperationState(
    session: CK_SESSION_HANDLE,
    _state: *mut u8,
    _length: CK_ULONG,
    _encryption_key: CK_OBJECT_HANDLE,
    _authentication_key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_SetOperationState, session, |_| fail(CKR_FUNCTION_NOT_SUPPORTED))
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

pub(super) unsafe extern "C" fn C_CreateObject(
    session: CK_SESSION_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    object: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_CreateObject, session, |session| {
        check_target(object)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe { write(object, session.create_object(&template(attributes, count)?)?) }
    })
}

pub(super) unsafe extern "C" fn C_CopyObject(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    copy: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_CopyObject, session, |session| {
        check_target(copy)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe { write(copy, session.copy_object(object, &template(attributes, count)?)?) }
    })
}

pub(super) unsafe extern "C" fn C_DestroyObject(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE) -> CK_RV {
    on_session(Function::C_DestroyObject, session, |session| session.destroy_object(object))
}

pub(super) unsafe extern "C" fn C_GetObjectSize(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_GetObjectSize, session, |session| {
        let object = session.object(object, CKR_OBJECT_HANDLE_INVALID)?;
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(length, ulong(object.size())) }
    })
}

pub(super) unsafe extern "C" fn C_GetAttributeValue(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_GetAttributeValue, session, |session| {
        let mut found = session.object(object, CKR_OBJECT_HANDLE_INVALID)?;
        if found.id.is_some() {
            // Another process may have changed it.
            session.token.refresh()?;
            found = session.object(object, CKR_OBJECT_HANDLE_INVALID)?;
        }
        // SAFETY: the caller's pointer, by the standard.
        unsafe { fill(&found, attributes, count) }
    })
}

pub(super) unsafe extern "C" fn C_SetAttributeValue(
    session: CK_SESSION_HANDLE,
    object: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_SetAttributeValue, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.set_attributes(object, &unsafe { template(attributes, count) }?)
    })
}

pub(super) unsafe extern "C" fn C_FindObjectsInit(
    session: CK_SESSION_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_FindObjectsInit, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.find_init(&unsafe { template(attributes, count) }?)
    })
}

pub(super) unsafe extern "C" fn C_FindObjects(
    session: CK_SESSION_HANDLE,
    objects: *mut CK_OBJECT_HANDLE,
    limit: CK_ULONG,
    count: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_FindObjects, session, |session| {
        check_target(count)?;
        if objects.is_null() && limit > 0 {
            return fail(CKR_ARGUMENTS_BAD);
        }
        let found = session.find(size(limit)?)?;
        for (place, handle) in found.iter().enumerate() {
            // SAFETY: the caller's array has room for `limit` handles.
            unsafe { write(objects.add(place), *handle) }?;
        }
        // SAFETY: the caller's pointer, by the standard.
        unsafe { write(count, ulong(found.len())) }
    })
}

pub(super) unsafe extern "C" fn C_FindObjectsFinal(session: CK_SESSION_HANDLE) -> CK_RV {
    on_session(Function::C_FindObjectsFinal, session, Session::find_final)
}

pub(super) unsafe extern "C" fn C_EncryptInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_EncryptInit, session, |session| {
        if pointer.is_null() {
            session.cancel(CKF_ENCRYPT);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.cipher_init(&unsafe { mechanism(pointer) }?, key, true)
    })
}

pub(super) unsafe extern "C" fn C_Encrypt(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_Encrypt, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { transform(input, input_length, output, output_length, |data, room| session.cipher(true, data, room)) }
    })
}

pub(super) unsafe extern "C" fn C_EncryptUpdate(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_EncryptUpdate, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            transform(input, input_length, output, output_length, |data, room| session.cipher_update(true, data, room))
        }
    })
}

pub(super) unsafe extern "C" fn C_EncryptFinal(
    session: CK_SESSION_HANDLE,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_EncryptFinal, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { produce(output, output_length, |room| session.cipher_final(true, room)) }
    })
}

pub(super) unsafe extern "C" fn C_DecryptInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_DecryptInit, session, |session| {
        if pointer.is_null() {
            session.cancel(CKF_DECRYPT);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.cipher_init(&unsafe { mechanism(pointer) }?, key, false)
    })
}

pub(super) unsafe extern "C" fn C_Decrypt(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_Decrypt, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { transform(input, input_length, output, output_length, |data, room| session.cipher(false, data, room)) }
    })
}

pub(super) unsafe extern "C" fn C_DecryptUpdate(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_DecryptUpdate, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            transform(input, input_length, output, output_length, |data, room| session.cipher_update(false, data, room))
        }
    })
}

pub(super) unsafe extern "C" fn C_DecryptFinal(
    session: CK_SESSION_HANDLE,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_DecryptFinal, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { produce(output, output_length, |room| session.cipher_final(false, room)) }
    })
}

pub(super) unsafe extern "C" fn C_DigestInit(session: CK_SESSION_HANDLE, pointer: *mut CK_MECHANISM) -> CK_RV {
    on_session(Function::C_DigestInit, session, |session| {
        if pointer.is_null() {
            session.cancel(CKF_DIGEST);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.digest_init(&unsafe { mechanism(pointer) }?)
    })
}

pub(super) unsafe extern "C" fn C_Digest(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_Digest, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { transform(input, input_length, output, output_length, |data, room| session.digest(data, room)) }
    })
}

pub(super) unsafe extern "C" fn C_DigestUpdate(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_DigestUpdate, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.digest_update(unsafe { bytes(input, input_length) }?)
    })
}

pub(super) unsafe extern "C" fn C_DigestKey(session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE) -> CK_RV {
    on_session(Function::C_DigestKey, session, |session| session.digest_key(key))
}

pub(super) unsafe extern "C" fn C_DigestFinal(
    session: CK_SESSION_HANDLE,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_DigestFinal, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { produce(output, output_length, |room| session.digest_final(room)) }
    })
}

pub(super) unsafe extern "C" fn C_SignInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_SignInit, session, |session| {
        if pointer.is_null() {
            session.cancel(CKF_SIGN);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.signature_init(&unsafe { mechanism(pointer) }?, key, true)
    })
}

pub(super) unsafe extern "C" fn C_Sign(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_Sign, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { transform(input, input_length, output, output_length, |data, room| session.sign(data, room)) }
    })
}

pub(super) unsafe extern "C" fn C_SignUpdate(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_SignUpdate, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.signature_update(true, unsafe { bytes(input, input_length) }?)
    })
}

pub(super) unsafe extern "C" fn C_SignFinal(
    session: CK_SESSION_HANDLE,
    output: *mut u8,
    output_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_SignFinal, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe { produce(output, output_length, |room| session.sign_final(room)) }
    })
}

pub(super) unsafe extern "C" fn C_VerifyInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_VerifyInit, session, |session| {
        if pointer.is_null() {
            session.cancel(CKF_VERIFY);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.signature_init(&unsafe { mechanism(pointer) }?, key, false)
    })
}

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

pub(super) unsafe extern "C" fn C_VerifyUpdate(
    session: CK_SESSION_HANDLE,
    input: *mut u8,
    input_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_VerifyUpdate, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.signature_update(false, unsafe { bytes(input, input_length) }?)
    })
}

pub(super) unsafe extern "C" fn C_VerifyFinal(
    session: CK_SESSION_HANDLE,
    signature: *mut u8,
    signature_length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_VerifyFinal, session, |session| {
        // SAFETY: the caller's pointer, by the standard.
        session.verify_final(unsafe { bytes(signature, signature_length) }?)
    })
}

pub(super) unsafe extern "C" fn C_GenerateKey(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_GenerateKey, session, |session| {
        check_target(key)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe { write(key, session.generate_key(&mechanism(pointer)?, &template(attributes, count)?)?) }
    })
}

pub(super) unsafe extern "C" fn C_GenerateKeyPair(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    public_attributes: *mut CK_ATTRIBUTE,
    public_count: CK_ULONG,
    private_attributes: *mut CK_ATTRIBUTE,
    private_count: CK_ULONG,
    public_key: *mut CK_OBJECT_HANDLE,
    private_key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_GenerateKeyPair, session, |session| {
        check_target(public_key)?;
        check_target(private_key)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let public = template(public_attributes, public_count)?;
            let private = template(private_attributes, private_count)?;
            let (public, private) = session.generate_key_pair(&mechanism(pointer)?, &public, &private)?;
            write(public_key, public)?;
            write(private_key, private)
        }
    })
}

pub(super) unsafe extern "C" fn C_WrapKey(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    wrapping_key: CK_OBJECT_HANDLE,
    key: CK_OBJECT_HANDLE,
    wrapped: *mut u8,
    wrapped_length: *mut CK_ULONG,
) -> CK_RV {
    on_session(Function::C_WrapKey, session, |session| {
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let mechanism = mechanism(pointer)?;
            produce(wrapped, wrapped_length, |room| session.wrap_key(&mechanism, wrapping_key, key, room))
        }
    })
}

pub(super) unsafe extern "C" fn C_UnwrapKey(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    unwrapping_key: CK_OBJECT_HANDLE,
    wrapped: *mut u8,
    wrapped_length: CK_ULONG,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_UnwrapKey, session, |session| {
        check_target(key)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let (mechanism, wrapped) = (mechanism(pointer)?, bytes(wrapped, wrapped_length)?);
            write(key, session.unwrap_key(&mechanism, unwrapping_key, wrapped, &template(attributes, count)?)?)
        }
    })
}

pub(super) unsafe extern "C" fn C_DeriveKey(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    base_key: CK_OBJECT_HANDLE,
    attributes: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_DeriveKey, session, |session| {
        check_target(key)?;
        // SAFETY: the caller's pointers, by the standard.
        unsafe {
            let mechanism = mechanism(pointer)?;
            let targets = additional_handles(pointer)?;
            let handles = session.derive_key(&mechanism, base_key, &template(attributes, count)?)?;
            for (target, handle) in core::iter::once(key).chain(targets).zip(handles) {
                write(target, handle)?;
            }
            Ok(())
        }
    })
}

pub(super) unsafe extern "C" fn C_SeedRandom(session: CK_SESSION_HANDLE, seed: *mut u8, length: CK_ULONG) -> CK_RV {
    // The generator seeds itself from the operating system: a caller's seed could add nothing, and
    // is not needed.
    on_session(Function::C_SeedRandom, session, |_| {
        // SAFETY: the caller's pointer, by the standard.
        unsafe { bytes(seed, length) }.map(|_| ())
    })
}

pub(super) unsafe extern "C" fn C_GenerateRandom(
    session: CK_SESSION_HANDLE,
    target: *mut u8,
    length: CK_ULONG,
) -> CK_RV {
    on_session(Function::C_GenerateRandom, session, |_| {
        let length = size(length)?;
        if target.is_null() && length > 0 {
            return fail(CKR_ARGUMENTS_BAD);
        }
        let mut random = [0; 4096];
        for start in (0..length).step_by(random.len()) {
            let part = random.get_mut(..(length - start).min(4096)).unwrap_or_default();
            crypto::random(part)?;
            // SAFETY: within the length that the caller gave.
            unsafe { copy(part, target.add(start)) };
        }
        zeroize::Zeroize::zeroize(&mut random);
        Ok(())
    })
}

pub(super) unsafe extern "C" fn C_GetFunctionStatus(session: CK_SESSION_HANDLE) -> CK_RV {
    on_session(Function::C_GetFunctionStatus, session, |_| fail(CKR_FUNCTION_NOT_PARALLEL))
}

pub(super) unsafe extern "C" fn C_CancelFunction(session: CK_SESSION_HANDLE) -> CK_RV {
    on_session(Function::C_CancelFunction, session, |_| fail(CKR_FUNCTION_NOT_PARALLEL))
}

pub(super) unsafe extern "C" fn C_WaitForSlotEvent(
    flags: CK_FLAGS,
    slot: *mut CK_SLOT_ID,
    reserved: *mut Void,
) -> CK_RV {
    guard(Function::C_WaitForSlotEvent, |module| {
        if !reserved.is_null() {
            return fail(CKR_ARGUMENTS_BAD);
        }
        check_target(slot)?;
        loop {
            if let Some(token) = module.tokens().iter().find(|token| token.changed.swap(false, Ordering::AcqRel)) {
                // SAFETY: the caller's pointer, by the standard.
                return unsafe { write(slot, token.slot) };
            }
            if flags & CKF_DONT_BLOCK != 0 {
                return fail(CKR_NO_EVENT);
            }
            std::thread::sleep(EVENT_POLL);
            if !is_current(module) {
                return fail(CKR_CRYPTOKI_NOT_INITIALIZED);
            }
            module.poll_control();
        }
    })
}

pub(super) unsafe extern "C" fn C_SessionCancel(session: CK_SESSION_HANDLE, flags: CK_FLAGS) -> CK_RV {
    on_session(Function::C_SessionCancel, session, |session| {
        session.cancel(flags);
        Ok(())
    })
}

pub(super) unsafe extern "C" fn C_MessageEncryptInit(
    session: CK_SESSION_HANDLE,
    pointer: *mut CK_MECHANISM,
    key: CK_OBJECT_HANDLE,
) -> CK_RV {
    on_session(Function::C_MessageEncryptInit, session, |session| {
        if pointer.is_null() {
            session.cancel(CKF_MESSAGE_ENCRYPT);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.message_init(unsafe { mechanism_kind(pointer) }?, key, true)
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
        if pointer.is_null() {
            session.cancel(CKF_MESSAGE_DECRYPT);
            return Ok(());
        }
        // SAFETY: the caller's pointer, by the standard.
        session.message_init(unsafe { mechanism_kind(pointer) }?, key, false)
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

/// Functions that this module does not have: they check the session, as the others do.
macro_rules! unsupported {
    ($($name:ident($($type:ty),*);)+) => {
        $(pub(super) unsafe extern "C" fn $name(session: CK_SESSION_HANDLE $(, _: $type)*) -> CK_RV {
            on_session(Function::$name, session, |_| fail(CKR_FUNCTION_NOT_SUPPORTED))
        })+
    };
}

unsupported! {
    C_SignRecoverInit(*mut CK_MECHANISM, CK_OBJECT_HANDLE);
    C_SignRecover(*mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_VerifyRecoverInit(*mut CK_MECHANISM, CK_OBJECT_HANDLE);
    C_VerifyRecover(*mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_DigestEncryptUpdate(*mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_DecryptDigestUpdate(*mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_SignEncryptUpdate(*mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_DecryptVerifyUpdate(*mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_MessageSignInit(*mut CK_MECHANISM, CK_OBJECT_HANDLE);
    C_SignMessage(*mut Void, CK_ULONG, *mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_SignMessageBegin(*mut Void, CK_ULONG);
    C_SignMessageNext(*mut Void, CK_ULONG, *mut u8, CK_ULONG, *mut u8, *mut CK_ULONG);
    C_MessageSignFinal();
    C_MessageVerifyInit(*mut CK_MECHANISM, CK_OBJECT_HANDLE);
    C_VerifyMessage(*mut Void, CK_ULONG, *mut u8, CK_ULONG, *mut u8, CK_ULONG);
    C_VerifyMessageBegin(*mut Void, CK_ULONG);
    C_VerifyMessageNext(*mut Void, CK_ULONG, *mut u8, CK_ULONG, *mut u8, CK_ULONG);
    C_MessageVerifyFinal();
}

/// Runs a function that belongs to a session.
fn on_session(function: Function, handle: CK_SESSION_HANDLE, body: impl FnOnce(&Session) -> Result<()>) -> CK_RV {
    guard(function, |module: &Arc<Module>| body(&*module.session(handle)?))
}

/// Bytes in, bytes out.
unsafe fn transform(
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

/// Bytes out.
unsafe fn produce(
    output: *mut u8,
    output_length: *mut CK_ULONG,
    step: impl FnOnce(Room) -> Result<Output>,
) -> Result<()> {
    // SAFETY: the caller's pointers, by the standard.
    unsafe { deliver(&step(room(output, output_length)?)?, output, output_length) }
}

/// Writes a list by the two-call convention.
unsafe fn deliver_list(list: &[CK_ULONG], target: *mut CK_ULONG, count: *mut CK_ULONG) -> Result<()> {
    // SAFETY: the caller's pointers, by the standard.
    let available = unsafe { super::memory::read(count) }?;
    // SAFETY: as above.
    unsafe { write(count, ulong(list.len())) }?;
    if target.is_null() {
        return Ok(());
    }
    if available < ulong(list.len()) {
        return fail(CKR_BUFFER_TOO_SMALL);
    }
    for (place, value) in list.iter().enumerate() {
        // SAFETY: the array has room: its length was compared.
        unsafe { write(target.add(place), *value) }?;
    }
    Ok(())
}

/// A PIN. There is no other way to enter one: `NULL` is refused.
unsafe fn pin_bytes<'a>(pointer: *const u8, length: CK_ULONG) -> Result<&'a [u8]> {
    if pointer.is_null() {
        return fail(CKR_ARGUMENTS_BAD);
    }
    // SAFETY: the caller's pointer, by the standard.
    unsafe { bytes(pointer, length) }
}

/// Where an answer goes is checked before anything is done.
fn check_target<T>(pointer: *mut T) -> Result<()> {
    if pointer.is_null() { fail(CKR_ARGUMENTS_BAD) } else { Ok(()) }
}

/// Text as the standard wants it: cut or filled with blanks.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (place, byte) in field.iter_mut().zip(text.bytes()) {
        *place = byte;
    }
    field
}

const MANUFACTURER: &str = "meterkms";
const VERSION: CK_VERSION = CK_VERSION { major: 0, minor: 1 };
const EVENT_POLL: Duration = Duration::from_millis(10);
