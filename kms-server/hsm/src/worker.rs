//! A session of a worker thread, with its token keys' handles, live agreements and batch keys. All
//! of these end with the session.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use cryptoki_sys::*;
use kms_domain::{DiversificationContext, IslandName, KeyDerivation, KeyLength, KeyShape, KeyType};
use zeroize::Zeroizing;

use crate::agreement::AgreementCache;
use crate::batch_key::{BatchKey, BatchKeyRecipe};
use crate::capabilities::Capabilities;
use crate::error::{Certainty, HsmError, refuses_wrapped_key};
use crate::key_source::KeySource;
use crate::label::{Purpose, TokenKey};
use crate::raw::{Mechanism, Object, Session, Temporary};
use crate::template::{Handling, Template};

/// A session in use by one thread.
pub(crate) struct Worker {
    pub(crate) session: Session,
    pub(crate) island: IslandName,
    pub(crate) capabilities: Arc<Capabilities>,
    pub(crate) agreements: AgreementCache,
    token_keys: RefCell<HashMap<(TokenKey, CK_OBJECT_CLASS), Object>>,
    batch_keys: RefCell<HashMap<u64, (Weak<BatchKeyRecipe>, Object)>>,
}

impl Worker {
    pub(crate) fn new(
        session: Session,
        island: IslandName,
        capabilities: Arc<Capabilities>,
        agreements: AgreementCache,
    ) -> Self {
        Self {
            session,
            island,
            capabilities,
            agreements,
            token_keys: RefCell::default(),
            batch_keys: RefCell::default(),
        }
    }

    /// Destroys session objects that nothing needs any more.
    pub(crate) fn tidy(&self) {
        self.agreements.tidy(&self.session);
        self.batch_keys.borrow_mut().retain(|_, (recipe, object)| {
            let live = recipe.strong_count() > 0;
            if !live {
                drop(Temporary::new(&self.session, *object));
            }
            live
        });
    }

    /// The secret or private key of this name, found by its label once per session.
    pub(crate) fn token_key(&self, key: TokenKey) -> Result<Object, HsmError> {
        self.token_object(key, secret_class(key))
    }

    /// Whether the token holds the secret or private key of this name now. A handle that was found
    /// before does not tell: another session may have destroyed the key.
    pub(crate) fn holds(&self, key: TokenKey) -> Result<bool, HsmError> {
        match find_one(&self.session, &key.label(&self.island), secret_class(key)) {
            Ok(_) => Ok(true),
            Err(HsmError::KeyMissing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The public key of this name.
    pub(crate) fn public_key(&self, key: TokenKey) -> Result<Object, HsmError> {
        self.token_object(key, CKO_PUBLIC_KEY)
    }

    /// The key of `source` as a session object for `handling`, with its length in octets.
    pub(crate) fn key(&self, source: &KeySource, handling: Handling) -> Result<(Temporary<'_>, usize), HsmError> {
        match source {
            KeySource::Diversified { root_version, derivation, context } => {
                let root = self.token_key(TokenKey {
                    purpose: Purpose::Diversification(source.class()),
                    version: *root_version,
                })?;
                self.diversify(root, *derivation, context, handling).map(|key| (key, context.length.octets()))
            }
            KeySource::Stored { storage_kek_version, shape, blob, .. } => {
                let octets = unwrapped_octets(*shape, blob)?;
                let kek = self.token_key(TokenKey {
                    purpose: Purpose::StorageKek(source.class()),
                    version: *storage_kek_version,
                })?;
                self.unwrap_key(kek, *shape, blob, handling).map(|key| (key, octets))
            }
            KeySource::Fresh(length) => self.generate(*length, handling).map(|key| (key, length.octets())),
        }
    }

    /// Unwraps a meter key under an AES key (RFC 3394).
    pub(crate) fn unwrap_key(
        &self,
        kek: Object,
        shape: KeyShape,
        wrapped: &[u8],
        handling: Handling,
    ) -> Result<Temporary<'_>, HsmError> {
        let octets = wrapped.len().saturating_sub(8) as CK_ULONG;
        let mut template = handling.apply(Template::session_key(shape));
        if self.capabilities.unwrap_needs_value_len {
            template = template.number(CKA_VALUE_LEN, &octets);
        }
        self.unwrap(&Mechanism::Plain(CKM_AES_KEY_WRAP), kek, wrapped, template.as_slice())
    }

    /// Unwraps a key. The errors of refused data and of a failing HSM differ.
    pub(crate) fn unwrap(
        &self,
        mechanism: &Mechanism<'_>,
        kek: Object,
        wrapped: &[u8],
        template: &[crate::raw::Attribute<'_>],
    ) -> Result<Temporary<'_>, HsmError> {
        let error = match self.session.unwrap(mechanism, kek, wrapped, template) {
            Ok(object) => return Ok(Temporary::new(&self.session, object)),
            Err(error) => error,
        };
        match error.code().and_then(|code| Some((code, refuses_wrapped_key(code)?))) {
            Some((code, Certainty::Sure)) => Err(HsmError::WrappedKeyInvalid { code }),
            // Some modules answer GENERAL_ERROR or DEVICE_ERROR to wrong data; all modules do when
            // they fail. The data counts as refused only if the HSM refuses it again and again, and
            // unwraps a key of its own between any two refusals: an HSM that fails now and then
            // seldom fails just so.
            Some((code, Certainty::Ambiguous)) => {
                for _ in 1..REFUSALS {
                    if self.unwraps_a_key_of_its_own().is_err() {
                        return Err(error);
                    }
                    match self.session.unwrap(mechanism, kek, wrapped, template) {
                        Ok(object) => return Ok(Temporary::new(&self.session, object)),
                        Err(again) if again.code().and_then(refuses_wrapped_key).is_some() => {}
                        Err(again) => return Err(again),
                    }
                }
                Err(HsmError::WrappedKeyInvalid { code })
            }
            None => Err(error),
        }
    }

    /// Wraps `key`, of this many octets, by RFC 3394: `octets + 8` octets.
    pub(crate) fn wrap(&self, kek: Object, key: Object, octets: usize) -> Result<Vec<u8>, HsmError> {
        let mut buffer = [0; LONGEST_WRAPPED];
        let written = self.session.wrap(&Mechanism::Plain(CKM_AES_KEY_WRAP), kek, key, &mut buffer)?;
        // Some modules return the buffer size that they want instead of the number of octets
        // written. RFC 3394 adds 8 octets.
        match buffer.get(..octets + 8) {
            Some(wrapped) if written >= wrapped.len() => Ok(wrapped.to_vec()),
            _ => Err(HsmError::call("C_WrapKey", CKR_KEY_SIZE_RANGE)),
        }
    }

    /// A new AES key as a session object.
    pub(crate) fn generate(&self, length: KeyLength, handling: Handling) -> Result<Temporary<'_>, HsmError> {
        let octets = length.octets() as CK_ULONG;
        let template = handling.apply(Template::session_key(KeyShape::Aes(length)).number(CKA_VALUE_LEN, &octets));
        let object = self.session.generate(CKM_AES_KEY_GEN, template.as_slice())?;
        Ok(Temporary::new(&self.session, object))
    }

    /// The value of a GAK, for the associated data of one call.
    ///
    /// I1: the GAK is read as a session object that lives no longer than this function, into memory
    /// that is zeroized. Nothing but GAKs can be read by this path: they have roots and storage
    /// KEKs of their own, and the type is checked here.
    pub(crate) fn readable_gak(&self, source: &KeySource) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let shape_is_aes = !matches!(source, KeySource::Stored { shape: KeyShape::Secret, .. });
        if source.key_type() != KeyType::GAK || !shape_is_aes {
            return Err(HsmError::invalid(
                "authentication key",
                format!("a key of type {} is never read; only a GAK is", source.key_type()),
            ));
        }
        let (key, octets) = self.key(source, Handling::Read)?;
        let mut value = Zeroizing::new(vec![0; octets]);
        self.session.read_value(key.object(), &mut value)?;
        Ok(value)
    }

    /// The batch key of a shipment, unwrapped once per session.
    pub(crate) fn batch_key(&self, batch: &BatchKey) -> Result<Object, HsmError> {
        let recipe = batch.recipe();
        if let Some((_, object)) = self.batch_keys.borrow().get(&recipe.number) {
            return Ok(*object);
        }
        let transport =
            self.token_key(TokenKey { purpose: Purpose::VendorTransport, version: recipe.transport_version })?;
        let template = Template::session_secret(&CKK_AES).sensitive(false).usage(&[CKA_UNWRAP]);
        let object =
            self.unwrap(&Mechanism::Oaep(recipe.hash), transport, &recipe.ciphertext, template.as_slice())?.keep();
        self.batch_keys.borrow_mut().insert(recipe.number, (Arc::downgrade(recipe), object));
        Ok(object)
    }

    /// Destroys all token objects of a key's name, and forgets their handles.
    pub(crate) fn destroy_token_key(&self, key: TokenKey) -> Result<usize, HsmError> {
        let label = key.label(&self.island);
        let objects = self
            .session
            .find(Template::empty().flag(CKA_TOKEN, true).octets(CKA_LABEL, label.as_bytes()).as_slice())?;
        for object in &objects {
            self.session.destroy(*object)?;
        }
        self.token_keys.borrow_mut().retain(|(known, _), _| *known != key);
        Ok(objects.len())
    }

    fn diversify(
        &self,
        root: Object,
        derivation: KeyDerivation,
        context: &DiversificationContext,
        handling: Handling,
    ) -> Result<Temporary<'_>, HsmError> {
        let octets = context.length.octets() as CK_ULONG;
        let template =
            handling.apply(Template::session_key(KeyShape::Aes(context.length)).number(CKA_VALUE_LEN, &octets));
        let object = match derivation {
            KeyDerivation::Sp800108Cmac => {
                let mut fixed = [0; 17];
                let parts = context.label().into_iter().chain([0]).chain(context.context());
                fixed.iter_mut().zip(parts).for_each(|(place, octet)| *place = octet);
                self.session.derive(&Mechanism::CounterCmac { fixed: &fixed }, root, template.as_slice())?
            }
            KeyDerivation::AesCbcEncryptData => {
                let data = context.cbc_data();
                self.session.derive(&Mechanism::CbcEncryptData { data: &data }, root, template.as_slice())?
            }
        };
        Ok(Temporary::new(&self.session, object))
    }

    fn token_object(&self, key: TokenKey, class: CK_OBJECT_CLASS) -> Result<Object, HsmError> {
        if let Some(object) = self.token_keys.borrow().get(&(key, class)) {
            return Ok(*object);
        }
        let object = match find_one(&self.session, &key.label(&self.island), class) {
            // Without a login, private objects are invisible: the login is lost, and the key is not
            // missing.
            Err(HsmError::KeyMissing { .. }) if !self.session.is_logged_in() => {
                return Err(HsmError::call("C_FindObjects", CKR_USER_NOT_LOGGED_IN));
            }
            found => found?,
        };
        self.token_keys.borrow_mut().insert((key, class), object);
        Ok(object)
    }

    fn unwraps_a_key_of_its_own(&self) -> Result<(), HsmError> {
        let octets = KeyLength::Aes256.octets() as CK_ULONG;
        let template = Template::session_secret(&CKK_AES)
            .sensitive(false)
            .number(CKA_VALUE_LEN, &octets)
            .usage(&[CKA_WRAP, CKA_UNWRAP]);
        let kek = Temporary::new(&self.session, self.session.generate(CKM_AES_KEY_GEN, template.as_slice())?);
        let key = self.generate(KeyLength::Aes128, Handling::Wrap)?;
        let wrapped = self.wrap(kek.object(), key.object(), KeyLength::Aes128.octets())?;
        let template = Handling::Wrap.apply(Template::session_key(KeyShape::Aes(KeyLength::Aes128)));
        let again =
            self.session.unwrap(&Mechanism::Plain(CKM_AES_KEY_WRAP), kek.object(), &wrapped, template.as_slice())?;
        drop(Temporary::new(&self.session, again));
        Ok(())
    }
}

/// The class of the object of this name that must be kept secret.
const fn secret_class(key: TokenKey) -> CK_OBJECT_CLASS {
    if key.purpose.is_root() { CKO_SECRET_KEY } else { CKO_PRIVATE_KEY }
}

/// The one token object of this label and class.
pub(crate) fn find_one(session: &Session, label: &str, class: CK_OBJECT_CLASS) -> Result<Object, HsmError> {
    let mut template =
        Template::empty().flag(CKA_TOKEN, true).number(CKA_CLASS, &class).octets(CKA_LABEL, label.as_bytes());
    if class != CKO_PUBLIC_KEY {
        // I1: the ceremony makes all of these private. An object that is not private could have
        // been created without the PIN.
        template = template.flag(CKA_PRIVATE, true);
    }
    let found = session.find(template.as_slice())?;
    match found.as_slice() {
        [object] => Ok(*object),
        [] => Err(HsmError::KeyMissing { label: label.to_owned() }),
        several => Err(HsmError::KeyAmbiguous { label: label.to_owned(), count: several.len() }),
    }
}

/// How many octets a wrapped key of this shape holds.
///
/// # Errors
/// The length of `wrapped` does not belong to the shape.
pub(crate) fn unwrapped_octets(shape: KeyShape, wrapped: &[u8]) -> Result<usize, HsmError> {
    let octets = wrapped.len().saturating_sub(8);
    let fits = match shape {
        KeyShape::Aes(length) => octets == length.octets(),
        KeyShape::Secret => octets.is_multiple_of(8) && (SHORTEST_SECRET..=LONGEST_SECRET).contains(&octets),
    };
    if !fits {
        return Err(HsmError::invalid(
            "wrapped key",
            format!("{} octets do not fit {}", wrapped.len(), shape_name(shape)),
        ));
    }
    Ok(octets)
}

fn shape_name(shape: KeyShape) -> &'static str {
    match shape {
        KeyShape::Aes(KeyLength::Aes128) => "an AES-128 key (24 octets)",
        KeyShape::Aes(KeyLength::Aes256) => "an AES-256 key (40 octets)",
        KeyShape::Secret => "a secret (24 to 264 octets, a multiple of 8)",
    }
}

/// How often an HSM has to refuse a wrapped key before the key is to blame, if its answer can also
/// mean that the HSM fails.
const REFUSALS: usize = 3;
const SHORTEST_SECRET: usize = 16;
const LONGEST_SECRET: usize = 256;
const LONGEST_WRAPPED: usize = LONGEST_SECRET + 8 + 16;
