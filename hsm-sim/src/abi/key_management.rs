//! Keys that the token generates, wraps, unwraps and derives, and random numbers: the chapters on
//! key management and on random number generation.

use cryptoki_sys::*;

use super::calls::{check_target, on_session, produce};
use super::memory::{bytes, copy, size, template, write};
use super::parameters::{additional_handles, mechanism};
use crate::crypto;
use crate::error::fail;
use crate::function::Function;

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
