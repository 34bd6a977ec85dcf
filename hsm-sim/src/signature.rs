//! Signatures and message authentication codes, in one part or several.

use std::sync::Arc;

use aws_lc_rs::{digest, hmac};
use cryptoki_sys::*;
use subtle::ConstantTimeEq;

use crate::attribute::Flags;
use crate::buffer::{Buffer, Output, Room};
use crate::crypto::aes::CmacState;
use crate::crypto::digest::Hash;
use crate::crypto::gcm::Gcm;
use crate::crypto::rsa::Scheme;
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters};
use crate::object::{Material, Object};

/// A signature that is being made or checked.
pub(crate) struct SignatureOperation {
    key: Arc<Object>,
    kind: Kind,
    in_parts: bool,
    /// The key requires the PIN before each use (`CKA_ALWAYS_AUTHENTICATE`).
    pub(crate) locked: bool,
}

enum Kind {
    Cmac { state: Box<CmacState>, length: usize },
    Hmac { context: Box<hmac::Context>, length: usize },
    Gmac { state: Box<Gcm> },
    Ecdsa { input: Input },
    Rsa { scheme: Scheme, input: Input },
}

/// The data that an asymmetric key signs.
enum Input {
    /// The data itself: a digest that the caller computed.
    Raw,
    /// The digest of the data.
    Digest(digest::Context),
}

impl SignatureOperation {
    /// Begins to sign (or to verify), after checking that key and mechanism fit.
    pub(crate) fn new(key: Arc<Object>, mechanism: &Mechanism<'_>, sign: bool) -> Result<Self> {
        if !key.flags.has(if sign { Flags::SIGN } else { Flags::VERIFY }) {
            return fail(CKR_KEY_FUNCTION_NOT_PERMITTED);
        }
        key.allows(mechanism.kind)?;
        let kind = Kind::new(&key, mechanism, sign)?;
        let locked = sign && key.flags.has(Flags::ALWAYS_AUTHENTICATE);
        Ok(Self { key, kind, in_parts: false, locked })
    }

    /// Signs everything at once.
    pub(crate) fn sign(&mut self, data: &[u8], room: Room) -> Result<Output> {
        if self.in_parts {
            return fail(CKR_OPERATION_NOT_INITIALIZED);
        }
        if let Some(answer) = room.settle(self.length()?) {
            return Ok(answer);
        }
        self.compute(data).map(Output::Data)
    }

    /// The next part of the data.
    pub(crate) fn update(&mut self, data: &[u8]) -> Result<()> {
        if self.locked {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        match &mut self.kind {
            Kind::Cmac { state, .. } => state.update(data),
            Kind::Hmac { context, .. } => context.update(data),
            Kind::Gmac { state } => state.authenticate(data)?,
            Kind::Ecdsa { input: Input::Digest(context) } | Kind::Rsa { input: Input::Digest(context), .. } => {
                context.update(data)
            }
            // PKCS#11 2.40, tables 1 and 23: single-part operations only.
            Kind::Ecdsa { .. } | Kind::Rsa { .. } => return fail(CKR_FUNCTION_NOT_SUPPORTED),
        }
        self.in_parts = true;
        Ok(())
    }

    /// Signs the data that came in parts.
    pub(crate) fn sign_final(&mut self, room: Room) -> Result<Output> {
        if let Some(answer) = room.settle(self.length()?) {
            return Ok(answer);
        }
        self.compute(&[]).map(Output::Data)
    }

    /// Checks a signature over everything at once.
    pub(crate) fn verify(&mut self, data: &[u8], signature: &[u8]) -> Result<()> {
        if self.in_parts {
            return fail(CKR_OPERATION_NOT_INITIALIZED);
        }
        self.check(data, signature)
    }

    /// Checks a signature over the data that came in parts.
    pub(crate) fn verify_final(&mut self, signature: &[u8]) -> Result<()> {
        self.check(&[], signature)
    }

    /// The length of a signature.
    fn length(&self) -> Result<usize> {
        match (&self.kind, &*self.key.material) {
            (Kind::Cmac { length, .. } | Kind::Hmac { length, .. }, _) => Ok(*length),
            (Kind::Gmac { .. }, _) => Ok(16),
            (_, Material::EcPrivate(key)) => Ok(2 * key.curve.length()),
            (_, Material::EcPublic(key)) => Ok(2 * key.curve.length()),
            (_, Material::RsaPrivate(key)) => Ok(key.modulus().len()),
            (_, Material::RsaPublic(key)) => Ok(key.modulus().len()),
            _ => fail(CKR_KEY_TYPE_INCONSISTENT),
        }
    }

    fn compute(&mut self, data: &[u8]) -> Result<Buffer> {
        if self.locked {
            return fail(CKR_USER_NOT_LOGGED_IN);
        }
        match (&mut self.kind, &*self.key.material) {
            (Kind::Cmac { state, length }, _) => {
                state.update(data);
                let mac = CmacState::clone(state).finish();
                Ok(Buffer::copy_of(mac.get(..*length).unwrap_or_default()))
            }
            (Kind::Hmac { context, length }, _) => {
                context.update(data);
                let mac = hmac::Context::clone(context).sign();
                Ok(Buffer::copy_of(mac.as_ref().get(..*length).unwrap_or_default()))
            }
            (Kind::Gmac { state }, _) => {
                state.authenticate(data)?;
                Ok(Buffer::copy_of(&state.tag()))
            }
            (Kind::Ecdsa { input }, Material::EcPrivate(key)) => match input {
                Input::Raw => key.sign(data),
                Input::Digest(context) => {
                    context.update(data);
                    key.sign(context.clone().finish().as_ref())
                }
            },
            (Kind::Rsa { scheme, input }, Material::RsaPrivate(key)) => match input {
                Input::Raw => key.sign(scheme, data),
                Input::Digest(context) => {
                    context.update(data);
                    key.sign(scheme, context.clone().finish().as_ref())
                }
            },
            _ => fail(CKR_KEY_TYPE_INCONSISTENT),
        }
    }

    fn check(&mut self, data: &[u8], signature: &[u8]) -> Result<()> {
        if signature.len() != self.length()? {
            return fail(CKR_SIGNATURE_LEN_RANGE);
        }
        match (&mut self.kind, &*self.key.material) {
            (Kind::Ecdsa { input }, Material::EcPublic(key)) => match input {
                Input::Raw => key.verify(data, signature),
                Input::Digest(context) => {
                    context.update(data);
                    key.verify(context.clone().finish().as_ref(), signature)
                }
            },
            (Kind::Rsa { scheme, input }, Material::RsaPublic(key)) => match input {
                Input::Raw => key.verify(scheme, data, signature),
                Input::Digest(context) => {
                    context.update(data);
                    key.verify(scheme, context.clone().finish().as_ref(), signature)
                }
            },
            _ => {
                let wanted = self.compute(data)?;
                if bool::from(wanted.ct_eq(signature)) { Ok(()) } else { fail(CKR_SIGNATURE_INVALID) }
            }
        }
    }
}

impl Kind {
    fn new(key: &Object, mechanism: &Mechanism<'_>, sign: bool) -> Result<Self> {
        let kind = mechanism.kind;
        if let Some((hash, general)) = hmac_of(kind) {
            let accepted = match key.key_type {
                CKK_GENERIC_SECRET => true,
                CKK_SHA_1_HMAC => hash == Hash::Sha1,
                CKK_SHA224_HMAC => hash == Hash::Sha224,
                CKK_SHA256_HMAC => hash == Hash::Sha256,
                CKK_SHA384_HMAC => hash == Hash::Sha384,
                CKK_SHA512_HMAC => hash == Hash::Sha512,
                _ => false,
            };
            let secret = key.secret(CKR_KEY_TYPE_INCONSISTENT)?;
            if !accepted {
                return fail(CKR_KEY_TYPE_INCONSISTENT);
            }
            let length = mac_length(&mechanism.parameters, general, hash.length())?;
            let context = hmac::Context::with_key(&hmac::Key::new(hash.hmac_algorithm(), secret.bytes()));
            return Ok(Self::Hmac { context: Box::new(context), length });
        }
        match kind {
            CKM_AES_CMAC | CKM_AES_CMAC_GENERAL => {
                let length = mac_length(&mechanism.parameters, kind == CKM_AES_CMAC_GENERAL, 16)?;
                let state = CmacState::new(&key.aes(CKR_KEY_TYPE_INCONSISTENT)?.cipher);
                Ok(Self::Cmac { state: Box::new(state), length })
            }
            CKM_AES_GMAC => {
                let Parameters::Bytes(iv) = mechanism.parameters else { return fail(CKR_MECHANISM_PARAM_INVALID) };
                let schedule = key.aes(CKR_KEY_TYPE_INCONSISTENT)?;
                let state = if sign {
                    Gcm::to_encrypt(schedule, iv, &[])?
                } else {
                    Gcm::new(&schedule.cipher, schedule.hash(), iv, &[])?
                };
                Ok(Self::Gmac { state: Box::new(state) })
            }
            CKM_ECDSA | CKM_ECDSA_SHA1 | CKM_ECDSA_SHA224 | CKM_ECDSA_SHA256 | CKM_ECDSA_SHA384 | CKM_ECDSA_SHA512 => {
                if !matches!(mechanism.parameters, Parameters::None) {
                    return fail(CKR_MECHANISM_PARAM_INVALID);
                }
                check_class(key, sign, CKK_EC)?;
                let hash = match kind {
                    CKM_ECDSA => return Ok(Self::Ecdsa { input: Input::Raw }),
                    CKM_ECDSA_SHA1 => Hash::Sha1,
                    CKM_ECDSA_SHA224 => Hash::Sha224,
                    CKM_ECDSA_SHA256 => Hash::Sha256,
                    CKM_ECDSA_SHA384 => Hash::Sha384,
                    _ => Hash::Sha512,
                };
                Ok(Self::Ecdsa { input: Input::Digest(digest::Context::new(hash.algorithm())) })
            }
            _ => {
                let (scheme, hash) = Scheme::new(kind, &mechanism.parameters)?;
                check_class(key, sign, CKK_RSA)?;
                let input = hash.map_or(Input::Raw, |hash| Input::Digest(digest::Context::new(hash.algorithm())));
                Ok(Self::Rsa { scheme, input })
            }
        }
    }
}

fn check_class(key: &Object, sign: bool, key_type: CK_KEY_TYPE) -> Result<()> {
    let class = if sign { CKO_PRIVATE_KEY } else { CKO_PUBLIC_KEY };
    if key.class == class && key.key_type == key_type { Ok(()) } else { fail(CKR_KEY_TYPE_INCONSISTENT) }
}

/// The hash of an HMAC mechanism, and whether its length is a parameter.
fn hmac_of(kind: CK_MECHANISM_TYPE) -> Option<(Hash, bool)> {
    match kind {
        CKM_SHA_1_HMAC => Some((Hash::Sha1, false)),
        CKM_SHA224_HMAC => Some((Hash::Sha224, false)),
        CKM_SHA256_HMAC => Some((Hash::Sha256, false)),
        CKM_SHA384_HMAC => Some((Hash::Sha384, false)),
        CKM_SHA512_HMAC => Some((Hash::Sha512, false)),
        CKM_SHA_1_HMAC_GENERAL => Some((Hash::Sha1, true)),
        CKM_SHA224_HMAC_GENERAL => Some((Hash::Sha224, true)),
        CKM_SHA256_HMAC_GENERAL => Some((Hash::Sha256, true)),
        CKM_SHA384_HMAC_GENERAL => Some((Hash::Sha384, true)),
        CKM_SHA512_HMAC_GENERAL => Some((Hash::Sha512, true)),
        _ => None,
    }
}

fn mac_length(parameters: &Parameters<'_>, general: bool, full: usize) -> Result<usize> {
    match (parameters, general) {
        (Parameters::None, false) => Ok(full),
        (Parameters::Length(length), true) => usize::try_from(*length)
            .ok()
            .filter(|length| (1..=full).contains(length))
            .ok_or(Rv(CKR_MECHANISM_PARAM_INVALID)),
        _ => fail(CKR_MECHANISM_PARAM_INVALID),
    }
}
