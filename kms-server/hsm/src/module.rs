//! PKCS#11 modules (shared libraries) and the tokens in their slots.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error as CryptokiError, RvError};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki_sys::CKU_SO;

use crate::error::HsmError;
use crate::pin::Pin;
use crate::raw::{Functions, Session};

/// A loaded and initialised module. One exists per process and path: PKCS#11 knows one
/// `C_Initialize` per process, and some modules crash when two threads initialise at once. It is
/// never finalised.
pub struct Module {
    path: PathBuf,
    context: Pkcs11,
    functions: &'static Functions,
    /// Manufacturer and description of the library, with its version.
    description: String,
}

/// Names a token by its label, and also by its serial number if two tokens have one label. Slot
/// numbers can change between starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSelector {
    /// CKA label of the token, without the padding.
    pub label: String,
    /// Serial number, where the label alone is not enough.
    pub serial: Option<String>,
}

/// A token that was found.
#[derive(Clone, Debug)]
pub(crate) struct FoundToken {
    pub(crate) slot: Slot,
    pub(crate) info: TokenInfo,
}

impl Module {
    /// The module of this path, loaded and initialised on the first call.
    ///
    /// # Errors
    /// The library cannot be loaded, is no PKCS#11 module, or `C_Initialize` fails. The next call
    /// tries again.
    pub fn load(path: &Path) -> Result<Arc<Self>, HsmError> {
        static MODULES: OnceLock<Mutex<HashMap<PathBuf, Arc<Module>>>> = OnceLock::new();
        let key = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let mut modules = MODULES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&key) {
            return Ok(Arc::clone(module));
        }
        let module = Arc::new(Self::initialise(&key)?);
        modules.insert(key, Arc::clone(&module));
        Ok(module)
    }

    /// What the library says of itself: manufacturer, description, version.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The path that the module was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Initialises a token in a free slot, with SO PIN and user PIN. A token that has the label
    /// already is an error: nothing is ever wiped here.
    ///
    /// # Errors
    /// No free slot, a label that is taken or longer than 32 octets, or a PIN that the module
    /// refuses.
    pub fn init_token(&self, label: &str, so_pin: &Pin, user_pin: &Pin) -> Result<(), HsmError> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if label.is_empty() || label.len() > 32 {
            return Err(HsmError::invalid("token label", format!("`{label}` is not 1 to 32 octets long")));
        }
        let selector = TokenSelector { label: label.to_owned(), serial: None };
        if !self.tokens()?.iter().all(|token| token.info.label() != label) {
            return Err(HsmError::invalid(
                "token label",
                format!(
                    "a token labelled `{label}` exists already; choose another label or remove that token by the HSM's own tool"
                ),
            ));
        }
        let free = self
            .slots()?
            .into_iter()
            .find(|slot| self.context.get_token_info(*slot).is_ok_and(|info| !info.token_initialized()));
        let Some(slot) = free else {
            return Err(HsmError::Module {
                module: self.path.display().to_string(),
                reason: "no slot has an uninitialised token; make one by the HSM's own tool".to_owned(),
            });
        };
        self.context.init_token(slot, &so_pin.for_cryptoki(), label).map_err(|error| self.error(&error))?;
        // Some modules move a token to another slot when it is initialised.
        let token = self.find(&selector)?.ok_or_else(|| HsmError::KeyMissing { label: label.to_owned() })?;
        let session = self.open(token.slot)?;
        let result = session.login(CKU_SO, so_pin.octets()).and_then(|()| {
            let set = session.inner().init_pin(&user_pin.for_cryptoki()).map_err(|error| self.error(&error));
            let out = session.inner().logout().map_err(|error| self.error(&error));
            set.and(out)
        });
        session.close();
        result
    }

    /// Whether a token of this selector is there.
    ///
    /// # Errors
    /// The module cannot list its slots, or two tokens match.
    pub fn has_token(&self, selector: &TokenSelector) -> Result<bool, HsmError> {
        Ok(self.find(selector)?.is_some())
    }

    /// The token that matches, if it is there.
    pub(crate) fn find(&self, selector: &TokenSelector) -> Result<Option<FoundToken>, HsmError> {
        let mut matching = self.tokens()?.into_iter().filter(|token| {
            token.info.label() == selector.label
                && selector.serial.as_deref().is_none_or(|serial| serial == token.info.serial_number())
        });
        let first = matching.next();
        if matching.next().is_some() {
            return Err(HsmError::invalid(
                "token",
                format!("more than one token is labelled `{}`; name the serial number too", selector.label),
            ));
        }
        Ok(first)
    }

    /// Opens a read-write session that is not closed on drop.
    pub(crate) fn open(&self, slot: Slot) -> Result<Session, HsmError> {
        let inner = self.context.open_rw_session_no_drop(slot).map_err(|error| self.error(&error))?;
        Ok(Session::new(self.functions, inner))
    }

    /// The mechanisms that a slot lists.
    pub(crate) fn mechanisms(&self, slot: Slot) -> Result<Vec<cryptoki_sys::CK_MECHANISM_TYPE>, HsmError> {
        self.functions.mechanisms(slot.id())
    }

    pub(crate) fn error(&self, error: &CryptokiError) -> HsmError {
        HsmError::from_cryptoki(error, &self.path.display().to_string())
    }

    fn initialise(path: &Path) -> Result<Self, HsmError> {
        let refuse = |reason: String| HsmError::Module { module: path.display().to_string(), reason };
        if !path.exists() {
            return Err(refuse(
                "there is no such file; install the HSM's PKCS#11 module (for SoftHSM: `apt-get install softhsm2`) or correct the path".to_owned(),
            ));
        }
        let context = Pkcs11::new(path).map_err(|error| refuse(error.to_string()))?;
        let functions = Box::leak(Box::new(Functions::load(path)?));
        match context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) | Err(CryptokiError::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
            Err(error) => {
                return Err(refuse(format!("C_Initialize failed ({error}); check the module's own configuration")));
            }
        }
        let info = context.get_library_info().map_err(|error| refuse(error.to_string()))?;
        let version = info.library_version();
        let description = format!(
            "{} {} {}.{}",
            info.manufacturer_id(),
            info.library_description(),
            version.major(),
            version.minor()
        );
        Ok(Self { path: path.to_owned(), context, functions, description })
    }

    fn slots(&self) -> Result<Vec<Slot>, HsmError> {
        self.context.get_slots_with_token().map_err(|error| self.error(&error))
    }

    fn tokens(&self) -> Result<Vec<FoundToken>, HsmError> {
        let mut tokens = Vec::new();
        for slot in self.slots()? {
            // A slot whose token is being removed counts as empty.
            let Ok(info) = self.context.get_token_info(slot) else { continue };
            if info.token_initialized() {
                tokens.push(FoundToken { slot, info });
            }
        }
        Ok(tokens)
    }
}
