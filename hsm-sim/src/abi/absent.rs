//! The functions that this module does not have: signatures with recovery, two operations at once,
//! message-based signatures, and parallel calls.

use cryptoki_sys::*;

use super::calls::{Void, refusals};

refusals! { CKR_FUNCTION_NOT_SUPPORTED:
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

refusals! { CKR_FUNCTION_NOT_PARALLEL:
    C_GetFunctionStatus();
    C_CancelFunction();
}
