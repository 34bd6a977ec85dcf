//! The function lists and interfaces: what a program finds when it loads the module.

use core::cell::UnsafeCell;

use cryptoki_sys::*;

use super::absent::*;
use super::digests::*;
use super::encryption::*;
use super::key_management::*;
use super::memory::{read, write};
use super::messages::*;
use super::objects::*;
use super::sessions::*;
use super::signatures::*;
use super::slots::*;
use super::state::{C_Finalize, C_Initialize, protect};
use crate::error::fail;

/// Data that C only reads, though its pointers are mutable.
#[repr(transparent)]
struct Constant<T>(UnsafeCell<T>);

// SAFETY: nothing here writes to it, and the standard forbids callers to.
unsafe impl<T> Sync for Constant<T> {}

macro_rules! function_lists {
    (both [$($both:ident,)+] only_3_0 [$($new:ident,)+]) => {
        static LIST_2_40: Constant<CK_FUNCTION_LIST> = Constant(UnsafeCell::new(CK_FUNCTION_LIST {
            version: CK_VERSION { major: 2, minor: 40 },
            $($both: Some($both),)+
        }));

        static LIST_3_0: Constant<CK_FUNCTION_LIST_3_0> = Constant(UnsafeCell::new(CK_FUNCTION_LIST_3_0 {
            version: CK_VERSION { major: 3, minor: 0 },
            $($both: Some($both),)+
            $($new: Some($new),)+
        }));
    };
}

function_lists! {
    both [
    C_Initialize, C_Finalize, C_GetInfo, C_GetFunctionList, C_GetSlotList, C_GetSlotInfo, C_GetTokenInfo,
    C_GetMechanismList, C_GetMechanismInfo, C_InitToken, C_InitPIN, C_SetPIN, C_OpenSession, C_CloseSession,
    C_CloseAllSessions, C_GetSessionInfo, C_GetOperationState, C_SetOperationState, C_Login, C_Logout, C_CreateObject,
    C_CopyObject, C_DestroyObject, C_GetObjectSize, C_GetAttributeValue, C_SetAttributeValue, C_FindObjectsInit,
    C_FindObjects, C_FindObjectsFinal, C_EncryptInit, C_Encrypt, C_EncryptUpdate, C_EncryptFinal, C_DecryptInit,
    C_Decrypt, C_DecryptUpdate, C_DecryptFinal, C_DigestInit, C_Digest, C_DigestUpdate, C_DigestKey, C_DigestFinal,
    C_SignInit, C_Sign, C_SignUpdate, C_SignFinal, C_SignRecoverInit, C_SignRecover, C_VerifyInit, C_Verify,
    C_VerifyUpdate, C_VerifyFinal, C_VerifyRecoverInit, C_VerifyRecover, C_DigestEncryptUpdate, C_DecryptDigestUpdate,
    C_SignEncryptUpdate, C_DecryptVerifyUpdate, C_GenerateKey, C_GenerateKeyPair, C_WrapKey, C_UnwrapKey, C_DeriveKey,
    C_SeedRandom, C_GenerateRandom, C_GetFunctionStatus, C_CancelFunction, C_WaitForSlotEvent,
    ]
    only_3_0 [
    C_GetInterfaceList, C_GetInterface, C_LoginUser, C_SessionCancel, C_MessageEncryptInit, C_EncryptMessage,
    C_EncryptMessageBegin, C_EncryptMessageNext, C_MessageEncryptFinal, C_MessageDecryptInit, C_DecryptMessage,
    C_DecryptMessageBegin, C_DecryptMessageNext, C_MessageDecryptFinal, C_MessageSignInit, C_SignMessage,
    C_SignMessageBegin, C_SignMessageNext, C_MessageSignFinal, C_MessageVerifyInit, C_VerifyMessage,
    C_VerifyMessageBegin, C_VerifyMessageNext, C_MessageVerifyFinal,
    ]
}

/// The newest first: it is the default.
static INTERFACES: Constant<[CK_INTERFACE; 2]> = Constant(UnsafeCell::new([
    CK_INTERFACE { pInterfaceName: NAME.as_ptr().cast_mut().cast(), pFunctionList: LIST_3_0.0.get().cast(), flags: 0 },
    CK_INTERFACE { pInterfaceName: NAME.as_ptr().cast_mut().cast(), pFunctionList: LIST_2_40.0.get().cast(), flags: 0 },
]));

/// C_GetFunctionList: the functions of version 2.40.
///
/// # Safety
/// `list` is `NULL` (then `CKR_ARGUMENTS_BAD`) or points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    // SAFETY: the caller's pointer, by the standard.
    protect(|| unsafe { write(list, LIST_2_40.0.get()) })
}

/// C_GetInterfaceList: the interface `PKCS 11` in versions 3.0 and 2.40.
///
/// # Safety
/// `interfaces` is `NULL` (a question for the count) or has room for `*count` interfaces; `count`
/// points to a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetInterfaceList(interfaces: *mut CK_INTERFACE, count: *mut CK_ULONG) -> CK_RV {
    protect(|| {
        // SAFETY: the caller's pointer, by the standard.
        let available = unsafe { read(count) }?;
        // SAFETY: as above.
        unsafe { write(count, 2) }?;
        if interfaces.is_null() {
            return Ok(());
        }
        if available < 2 {
            return fail(CKR_BUFFER_TOO_SMALL);
        }
        // SAFETY: no one writes to the constant.
        for (place, interface) in unsafe { &*INTERFACES.0.get() }.iter().enumerate() {
            // SAFETY: the array has room for two: its length was compared.
            unsafe { write(interfaces.add(place), *interface) }?;
        }
        Ok(())
    })
}

/// C_GetInterface: the interface with this name, version and these flags; `NULL` stands for any
/// name or version.
///
/// # Safety
/// `name` is `NULL` or a C string, `version` is `NULL` or points to a version, `interface` points
/// to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetInterface(
    name: *mut CK_UTF8CHAR,
    version: *mut CK_VERSION,
    interface: *mut *mut CK_INTERFACE,
    flags: CK_FLAGS,
) -> CK_RV {
    protect(|| {
        if interface.is_null() {
            return fail(CKR_ARGUMENTS_BAD);
        }
        // SAFETY: not NULL: a C string by the standard.
        let known = name.is_null() || unsafe { core::ffi::CStr::from_ptr(name.cast()) } == NAME;
        let place = match (version.is_null(), known) {
            (_, false) => None,
            (true, true) => Some(0),
            (false, true) => {
                // SAFETY: not NULL: a version by the standard.
                let version = unsafe { read(version) }?;
                match (version.major, version.minor) {
                    (3, 0) => Some(0),
                    (2, 40) => Some(1),
                    _ => None,
                }
            }
        };
        match place {
            // No interface of this module has flags.
            Some(place) if flags == 0 => {
                // SAFETY: `place` is 0 or 1, and there are two.
                let found = unsafe { INTERFACES.0.get().cast::<CK_INTERFACE>().add(place) };
                // SAFETY: the caller's pointer, by the standard.
                unsafe { write(interface, found) }
            }
            _ => fail(CKR_ARGUMENTS_BAD),
        }
    })
}

const NAME: &core::ffi::CStr = c"PKCS 11";
