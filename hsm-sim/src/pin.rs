//! PINs: each one opens the token's master key, which encrypts the private objects and
//! authenticates all of them.

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use cryptoki_sys::{CKR_DEVICE_ERROR, CKR_FUNCTION_FAILED};
use zeroize::Zeroizing;

use crate::crypto::random;
use crate::error::{Result, Rv};
use crate::hex::{hex, unhex};
use crate::settings::Settings;

/// The key that encrypts a token's private objects, and authenticates the public ones.
#[derive(Clone)]
pub(crate) struct MasterKey(Zeroizing<[u8; 32]>);

/// The master key, encrypted under Argon2id of a PIN.
#[derive(Clone)]
pub(crate) struct PinRecord {
    memory: u32,
    passes: u32,
    salt: [u8; 16],
    wrapped: Vec<u8>,
}

/// The role that a PIN belongs to. It is authenticated with the record, so that the record of one
/// role cannot replace the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The security officer.
    SecurityOfficer,
    /// The normal user.
    User,
}

impl MasterKey {
    /// A new random key.
    pub(crate) fn generate() -> Result<Self> {
        let mut key = Zeroizing::new([0; 32]);
        random(&mut *key)?;
        Ok(Self(key))
    }

    /// Encrypts and authenticates `plaintext` (AES-256-GCM: nonce ‖ ciphertext ‖ tag).
    pub(crate) fn seal(&self, context: &[u8], plaintext: &[u8]) -> Result<Vec<u8>> {
        seal(&self.0, context, plaintext)
    }

    /// Undoes [`MasterKey::seal`]. `None`: it was not sealed with this key for this context.
    pub(crate) fn open(&self, context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        open(&self.0, context, sealed)
    }

    /// The proof that a caller who knew a PIN wrote `public` for this context: AES-256-GCM of an
    /// empty plaintext, with both as associated data (nonce ‖ tag).
    pub(crate) fn authenticate(&self, context: &[u8], public: &[u8]) -> Result<Vec<u8>> {
        seal(&self.0, &public_context(context, public), &[])
    }

    /// Whether [`MasterKey::authenticate`] made `code` for the same context and content.
    pub(crate) fn is_authentic(&self, context: &[u8], public: &[u8], code: &[u8; AUTHENTICATOR]) -> bool {
        open(&self.0, &public_context(context, public), code).is_some()
    }
}

impl PinRecord {
    /// Encrypts `master` under `pin`, for the token of this `epoch`.
    pub(crate) fn new(master: &MasterKey, pin: &[u8], role: Role, epoch: [u8; 8], settings: &Settings) -> Result<Self> {
        let mut salt = [0; 16];
        random(&mut salt)?;
        let mut record = Self { memory: settings.memory, passes: settings.passes, salt, wrapped: Vec::new() };
        record.wrapped = seal(&*record.stretch(pin)?, &context(role, epoch), &*master.0)?;
        Ok(record)
    }

    /// The master key, if the PIN is right.
    pub(crate) fn open(&self, pin: &[u8], role: Role, epoch: [u8; 8]) -> Result<Option<MasterKey>> {
        let opened = open(&*self.stretch(pin)?, &context(role, epoch), &self.wrapped);
        Ok(opened.and_then(|bytes| bytes.as_slice().try_into().ok()).map(|key| MasterKey(Zeroizing::new(key))))
    }

    pub(crate) fn to_text(&self) -> String {
        format!("{} {} {} {}", self.memory, self.passes, hex(&self.salt), hex(&self.wrapped))
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split(' ');
        let memory = fields.next()?.parse().ok()?;
        let passes = fields.next()?.parse().ok()?;
        let salt = unhex(fields.next()?)?.try_into().ok()?;
        let wrapped = unhex(fields.next()?)?;
        fields.next().is_none().then_some(Self { memory, passes, salt, wrapped })
    }

    fn stretch(&self, pin: &[u8]) -> Result<Zeroizing<[u8; 32]>> {
        let params = Params::new(self.memory, self.passes, 1, Some(32)).map_err(|_| Rv(CKR_DEVICE_ERROR))?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(pin, &self.salt, &mut *key)
            .map_err(|_| Rv(CKR_DEVICE_ERROR))?;
        Ok(key)
    }
}

/// The associated data differ from those of sealed objects, so that one can never replace the
/// other.
fn public_context(context: &[u8], public: &[u8]) -> Vec<u8> {
    [b"hsm-sim public ".as_slice(), context, public].concat()
}

fn context(role: Role, epoch: [u8; 8]) -> Vec<u8> {
    let role: &[u8] = match role {
        Role::SecurityOfficer => b"hsm-sim so ",
        Role::User => b"hsm-sim user ",
    };
    [role, &epoch].concat()
}

fn cipher(key: &[u8; 32]) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, key).ok().map(LessSafeKey::new)
}

fn seal(key: &[u8; 32], context: &[u8], plaintext: &[u8]) -> Result<Vec<u8>> {
    let mut nonce = [0; NONCE_LEN];
    random(&mut nonce)?;
    let cipher = cipher(key).ok_or(Rv(CKR_FUNCTION_FAILED))?;
    let mut data = Zeroizing::new(plaintext.to_vec());
    let tag = cipher
        .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut data)
        .map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
    Ok([&nonce, data.as_slice(), tag.as_ref()].concat())
}

fn open(key: &[u8; 32], context: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
    let mut data = Zeroizing::new(sealed.to_vec());
    let length = cipher(key)?
        .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(context), &mut data)
        .ok()
        .map(|plaintext| plaintext.len())?;
    data.truncate(length);
    Some(data)
}

/// Length of the proof of a public object: nonce and tag.
pub(crate) const AUTHENTICATOR: usize = NONCE_LEN + 16;
