//! The error of this crate, and the table that says for each PKCS#11 return code what can be done.

use std::borrow::Cow;
use std::time::Duration;

use cryptoki::context::Function;
use cryptoki::error::{Error as CryptokiError, Rv, RvError};
use cryptoki_sys::CK_RV;
use kms_domain::KeyClass;

/// Why the HSM did not do what was asked. The text never contains a PIN, a key or wrapped key
/// octets.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HsmError {
    /// The token cannot be used at this moment. A later attempt can succeed without an operator.
    #[error("HSM token `{token}` is not available: {reason}; try again in {} ms", retry_after.as_millis())]
    Unavailable {
        /// Label of the token.
        token: String,
        /// What was found.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The queue of the token is full.
    #[error("HSM token `{token}` is overloaded: {limit} jobs wait already (bound `hsm_jobs`); try again in {} ms", retry_after.as_millis())]
    Overloaded {
        /// Label of the token.
        token: String,
        /// Length of the queue.
        limit: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// One payer has reached its limit of jobs in the token's queue.
    #[error("{limit} jobs of one principal wait already for HSM token `{token}` (bound `hsm_jobs_per_principal`); try again in {} ms", retry_after.as_millis())]
    TooManyOfOne {
        /// Label of the token.
        token: String,
        /// Jobs that one payer may have there.
        limit: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// The server has no token for keys of this class: another server of the island does this work.
    #[error("this server does not serve keys of the class `{class}`: no token is configured for it")]
    NotServed {
        /// The class.
        class: KeyClass,
    },
    /// The token stays unusable until an operator acts.
    #[error("HSM token `{token}` is unusable: {reason}; {next_step}")]
    Unusable {
        /// Label of the token.
        token: String,
        /// What was found.
        reason: String,
        /// What the operator should do.
        next_step: String,
    },
    /// A root or other token key is not in the token.
    #[error(
        "the HSM token holds no key labelled `{label}`; was the ceremony run for this island and token, or is the version wrong?"
    )]
    KeyMissing {
        /// CKA_LABEL that was looked for.
        label: String,
    },
    /// More than one token object has the label of a root, and the server cannot know which is
    /// right.
    #[error(
        "the HSM token holds {count} keys labelled `{label}`; remove the wrong one (compare check values with the ceremony's record)"
    )]
    KeyAmbiguous {
        /// CKA_LABEL that was looked for.
        label: String,
        /// How many were found.
        count: usize,
    },
    /// The HSM refused a wrapped key: it was altered, is wrapped under another key, or has another
    /// length.
    #[error("the HSM refuses the wrapped key (CKR {code:?}): it is damaged, or wrapped under another key")]
    WrappedKeyInvalid {
        /// The module's return code.
        code: RvError,
    },
    /// The authentication tag of a frame does not verify under these keys.
    #[error("the authentication tag of the frame does not verify: wrong key, system title, counter or content")]
    TagInvalid,
    /// A field or argument of the call is wrong.
    #[error("{what}: {reason}")]
    InvalidInput {
        /// The field or argument.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The module lacks a mechanism that the verb needs.
    #[error("the HSM module cannot do {what}; {instead}")]
    Unsupported {
        /// The mechanism or capability.
        what: &'static str,
        /// What to do instead.
        instead: &'static str,
    },
    /// A PKCS#11 function failed.
    #[error("PKCS#11 function {function} failed with CKR {code:?}: {}", advice(*code))]
    Call {
        /// Name of the function, for example `C_WrapKey`.
        function: &'static str,
        /// The module's return code.
        code: RvError,
    },
    /// The module could not be loaded or does not keep to the interface.
    #[error("PKCS#11 module `{module}`: {reason}")]
    Module {
        /// Path of the module.
        module: String,
        /// What went wrong.
        reason: String,
    },
    /// A ceremony cannot go on.
    #[error("the ceremony cannot go on: {reason}; {next_step}")]
    Ceremony {
        /// What was found.
        reason: String,
        /// What to do.
        next_step: String,
    },
}

/// What can be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A later attempt can succeed.
    Transient,
    /// An operator must act; the same request works afterwards.
    OperatorFixable,
    /// The same request fails always: a defect here, in the module, or in the request.
    Permanent,
    /// The data of the caller is refused: it was altered, or belongs to another key.
    DataRefused,
    /// Another server of the island does it.
    NotServed,
}

impl HsmError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable { .. } | Self::Overloaded { .. } | Self::TooManyOfOne { .. } => ErrorKind::Transient,
            Self::Unusable { .. }
            | Self::KeyMissing { .. }
            | Self::KeyAmbiguous { .. }
            | Self::Module { .. }
            | Self::Ceremony { .. } => ErrorKind::OperatorFixable,
            Self::NotServed { .. } => ErrorKind::NotServed,
            Self::WrappedKeyInvalid { .. } | Self::TagInvalid => ErrorKind::DataRefused,
            Self::InvalidInput { .. } | Self::Unsupported { .. } => ErrorKind::Permanent,
            Self::Call { code, .. } => meaning(*code).0,
        }
    }

    /// The time after which another attempt can succeed; `None`: none can.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. }
            | Self::Overloaded { retry_after, .. }
            | Self::TooManyOfOne { retry_after, .. } => Some(*retry_after),
            _ if self.kind() == ErrorKind::Transient => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// A short name of the error, for metrics: that of the PKCS#11 return code where one caused it,
    /// such as `DeviceError`.
    pub fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Unavailable { .. } => "unavailable".into(),
            Self::Overloaded { .. } => "overloaded".into(),
            Self::TooManyOfOne { .. } => "too-many-of-one".into(),
            Self::Unusable { .. } => "unusable".into(),
            Self::KeyMissing { .. } => "key-missing".into(),
            Self::KeyAmbiguous { .. } => "key-ambiguous".into(),
            Self::TagInvalid => "tag-invalid".into(),
            Self::InvalidInput { .. } => "invalid-input".into(),
            Self::Unsupported { .. } => "unsupported".into(),
            Self::Module { .. } => "module".into(),
            Self::Ceremony { .. } => "ceremony".into(),
            Self::NotServed { .. } => "not-served".into(),
            // All codes of vendors have one name, so that a module cannot produce new names without
            // end.
            Self::Call { code: RvError::VendorDefined(_), .. } => "VendorDefined".into(),
            Self::Call { code, .. } | Self::WrappedKeyInvalid { code } => format!("{code:?}").into(),
        }
    }

    /// The PKCS#11 return code, where one caused the error.
    pub fn code(&self) -> Option<RvError> {
        match self {
            Self::Call { code, .. } | Self::WrappedKeyInvalid { code } => Some(*code),
            _ => None,
        }
    }

    /// Whether sessions must be opened again, and handles found again, before anything else is
    /// tried.
    pub(crate) fn needs_repair(&self) -> bool {
        matches!(self, Self::Call { code, .. } if meaning(*code).1 == Repair::Reopen)
    }

    pub(crate) fn call(function: &'static str, code: CK_RV) -> Self {
        match Rv::from(code) {
            Rv::Error(code) => Self::Call { function, code },
            // Only reached with a code that is an error; a module that fails with CKR_OK has
            // failed.
            Rv::Ok => Self::Call { function, code: RvError::GeneralError },
        }
    }

    pub(crate) fn invalid(what: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidInput { what, reason: reason.into() }
    }

    pub(crate) fn from_cryptoki(error: &CryptokiError, module: &str) -> Self {
        match error {
            CryptokiError::Pkcs11(code, function) => Self::Call { function: function_name(*function), code: *code },
            other => Self::Module { module: module.to_owned(), reason: other.to_string() },
        }
    }
}

/// Whether an error at one key stops a whole batch. A failing HSM stops it; a refused or missing
/// key does not.
pub(crate) fn concerns_all(error: &HsmError) -> bool {
    error.needs_repair() || error.kind() == ErrorKind::Transient
}

/// Whether a code means that sessions and handles are invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    Keep,
    Reopen,
}

/// The one table of return codes: kind of error, whether to reopen sessions, and the advice in the
/// error text.
///
/// Codes that are not here are `Permanent`: the module does not accept a template, mechanism or
/// argument. On unwrapping, `GENERAL_ERROR`, `DEVICE_ERROR`, `ENCRYPTED_DATA_INVALID`,
/// `ENCRYPTED_DATA_LEN_RANGE`, `WRAPPED_KEY_INVALID` and `WRAPPED_KEY_LEN_RANGE` mean refused data
/// on one module or another: see [`refuses_wrapped_key`].
fn meaning(code: RvError) -> (ErrorKind, Repair) {
    use ErrorKind::{DataRefused, OperatorFixable, Permanent, Transient};
    use Repair::{Keep, Reopen};
    match code {
        RvError::SessionHandleInvalid | RvError::SessionClosed | RvError::UserNotLoggedIn => (Transient, Reopen),
        RvError::ObjectHandleInvalid
        | RvError::KeyHandleInvalid
        | RvError::WrappingKeyHandleInvalid
        | RvError::UnwrappingKeyHandleInvalid => (Transient, Reopen),
        RvError::DeviceError
        | RvError::DeviceRemoved
        | RvError::TokenNotPresent
        | RvError::TokenNotRecognized
        | RvError::SlotIdInvalid => (Transient, Reopen),
        RvError::GeneralError | RvError::FunctionFailed | RvError::CryptokiNotInitialized => (Transient, Reopen),
        // An operation that another job left active: a new session has none.
        RvError::OperationActive | RvError::OperationNotInitialized => (Transient, Reopen),
        RvError::HostMemory
        | RvError::DeviceMemory
        | RvError::SessionCount
        | RvError::FunctionCanceled
        | RvError::Cancel => (Transient, Keep),
        RvError::PinIncorrect
        | RvError::PinLocked
        | RvError::PinExpired
        | RvError::PinInvalid
        | RvError::PinLenRange => (OperatorFixable, Keep),
        RvError::UserPinNotInitialized | RvError::TokenWriteProtected | RvError::UserAnotherAlreadyLoggedIn => {
            (OperatorFixable, Keep)
        }
        RvError::EncryptedDataInvalid
        | RvError::EncryptedDataLenRange
        | RvError::WrappedKeyInvalid
        | RvError::WrappedKeyLenRange => (DataRefused, Keep),
        RvError::SignatureInvalid | RvError::SignatureLenRange => (DataRefused, Keep),
        _ => (Permanent, Keep),
    }
}

/// Whether the code of a failed `C_UnwrapKey` can mean that the wrapped key itself is wrong, and
/// how sure that is.
pub(crate) fn refuses_wrapped_key(code: RvError) -> Option<Certainty> {
    match code {
        RvError::WrappedKeyInvalid
        | RvError::WrappedKeyLenRange
        | RvError::EncryptedDataInvalid
        | RvError::EncryptedDataLenRange => Some(Certainty::Sure),
        // SoftHSM and openCryptoki answer GENERAL_ERROR, kryoptic DEVICE_ERROR.
        RvError::GeneralError | RvError::DeviceError | RvError::FunctionFailed => Some(Certainty::Ambiguous),
        _ => None,
    }
}

/// How sure a return code is about its cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certainty {
    Sure,
    Ambiguous,
}

fn advice(code: RvError) -> &'static str {
    match meaning(code) {
        (_, Repair::Reopen) => "the session, login or token was lost; the server opens it again, so try again",
        (ErrorKind::Transient, _) => "the HSM is short of resources; try again",
        (ErrorKind::OperatorFixable, _) => "check the token's PIN and state with `kms hsm check`",
        (ErrorKind::DataRefused, _) => "the data is damaged or belongs to another key",
        (ErrorKind::Permanent, _) => "the module does not accept this mechanism, template or key; see `kms hsm check`",
        (ErrorKind::NotServed, _) => "another server of the island does this work",
    }
}

fn function_name(function: Function) -> &'static str {
    match function {
        Function::Initialize => "C_Initialize",
        Function::GetSlotList => "C_GetSlotList",
        Function::GetTokenInfo => "C_GetTokenInfo",
        Function::InitToken => "C_InitToken",
        Function::InitPIN => "C_InitPIN",
        Function::OpenSession => "C_OpenSession",
        Function::GetSessionInfo => "C_GetSessionInfo",
        Function::CloseSession => "C_CloseSession",
        Function::Logout => "C_Logout",
        _ => "C_*",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptoki_sys::{CKR_MECHANISM_INVALID, CKR_PIN_INCORRECT, CKR_SESSION_HANDLE_INVALID};

    #[test]
    fn codes_mean_what_the_table_says() {
        let lost = HsmError::call("C_WrapKey", CKR_SESSION_HANDLE_INVALID);
        assert_eq!((lost.kind(), lost.needs_repair()), (ErrorKind::Transient, true));
        let pin = HsmError::call("C_Login", CKR_PIN_INCORRECT);
        assert_eq!((pin.kind(), pin.needs_repair()), (ErrorKind::OperatorFixable, false));
        let mechanism = HsmError::call("C_DeriveKey", CKR_MECHANISM_INVALID);
        assert_eq!((mechanism.kind(), mechanism.retry_after()), (ErrorKind::Permanent, None));
    }
}
