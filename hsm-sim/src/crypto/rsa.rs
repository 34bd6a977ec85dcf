//! RSA (RFC 8017): PKCS#1 v1.5 signatures and encryption, PSS and OAEP.
//!
//! aws-lc-rs generates the keys, and executes the private operations that it has: with keys of 2048
//! bits or more, and its own pairs of hash and padding. It does not sign data that is not a digest
//! (CKM_RSA_PKCS does), and does not accept smaller keys, other salt lengths or another hash for
//! the mask. For these, and for the public operations, the `rsa` crate is used, with blinding.

use std::sync::OnceLock;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OAEP_SHA384_MGF1SHA384, OAEP_SHA512_MGF1SHA512,
    OaepPrivateDecryptingKey, Pkcs1PrivateDecryptingKey, PrivateDecryptingKey,
};
use aws_lc_rs::signature::{
    RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding,
    RsaKeyPair,
};
use cryptoki_sys::*;
use rsa::pkcs1::der::Decode;
use rsa::pkcs1::{self, DecodeRsaPrivateKey, EncodeRsaPrivateKey, EncodeRsaPublicKey};
use rsa::pkcs8::{DecodePrivateKey, EncodePrivateKey};
use rsa::traits::{PaddingScheme, PublicKeyParts, SignatureScheme};
use rsa::{BoxedUint, Oaep, Pkcs1v15Encrypt, Pkcs1v15Sign, Pss, RsaPrivateKey, RsaPublicKey};
use sha1::Sha1;
use sha2::{Sha224, Sha256, Sha384, Sha512};

use crate::buffer::Buffer;
use crate::crypto::digest::Hash;
use crate::error::{Result, Rv, fail};
use crate::mechanism::Parameters;

/// How a plaintext is padded.
pub(crate) enum Padding {
    /// RSAES-PKCS1-v1_5.
    Pkcs1,
    /// RSAES-OAEP.
    Oaep { hash: Hash, mask: Hash, label: Vec<u8> },
}

impl Padding {
    /// The padding of an encryption mechanism.
    pub(crate) fn for_encryption(kind: CK_MECHANISM_TYPE, parameters: &Parameters<'_>) -> Result<Self> {
        match (kind, parameters) {
            (CKM_RSA_PKCS, Parameters::None) => Ok(Self::Pkcs1),
            (CKM_RSA_PKCS_OAEP, Parameters::Oaep { hash, mask, label }) => {
                // Other pairs are not supported: nobody uses them.
                if mask != hash && *mask != Hash::Sha1 {
                    return fail(CKR_MECHANISM_PARAM_INVALID);
                }
                Ok(Self::Oaep { hash: *hash, mask: *mask, label: label.to_vec() })
            }
            (CKM_RSA_PKCS | CKM_RSA_PKCS_OAEP, _) => fail(CKR_MECHANISM_PARAM_INVALID),
            _ => fail(CKR_MECHANISM_INVALID),
        }
    }

    fn overhead(&self) -> usize {
        match self {
            Self::Pkcs1 => 11,
            Self::Oaep { hash, .. } => 2 * hash.length() + 2,
        }
    }
}

/// How a signature is made.
#[derive(Clone, Copy)]
pub(crate) enum Scheme {
    /// RSASSA-PKCS1-v1_5 over data that the caller has put into a `DigestInfo` (or not).
    Pkcs1Raw,
    /// RSASSA-PKCS1-v1_5 over a digest.
    Pkcs1(Hash),
    /// RSASSA-PSS over a digest.
    Pss { hash: Hash, salt: usize },
}

impl Scheme {
    /// The scheme of a signature mechanism, and the hash that the token applies to the data first.
    pub(crate) fn new(kind: CK_MECHANISM_TYPE, parameters: &Parameters<'_>) -> Result<(Self, Option<Hash>)> {
        let hash = match kind {
            CKM_RSA_PKCS | CKM_RSA_PKCS_PSS => None,
            CKM_SHA1_RSA_PKCS | CKM_SHA1_RSA_PKCS_PSS => Some(Hash::Sha1),
            CKM_SHA224_RSA_PKCS | CKM_SHA224_RSA_PKCS_PSS => Some(Hash::Sha224),
            CKM_SHA256_RSA_PKCS | CKM_SHA256_RSA_PKCS_PSS => Some(Hash::Sha256),
            CKM_SHA384_RSA_PKCS | CKM_SHA384_RSA_PKCS_PSS => Some(Hash::Sha384),
            CKM_SHA512_RSA_PKCS | CKM_SHA512_RSA_PKCS_PSS => Some(Hash::Sha512),
            _ => return fail(CKR_MECHANISM_INVALID),
        };
        let pss = matches!(
            kind,
            CKM_RSA_PKCS_PSS
                | CKM_SHA1_RSA_PKCS_PSS
                | CKM_SHA224_RSA_PKCS_PSS
                | CKM_SHA256_RSA_PKCS_PSS
                | CKM_SHA384_RSA_PKCS_PSS
                | CKM_SHA512_RSA_PKCS_PSS
        );
        match (pss, parameters) {
            (false, Parameters::None) => Ok((hash.map_or(Self::Pkcs1Raw, Self::Pkcs1), hash)),
            (true, Parameters::Pss { hash: given, mask, salt })
                if mask == given && hash.is_none_or(|hash| hash == *given) =>
            {
                Ok((Self::Pss { hash: *given, salt: *salt }, hash))
            }
            _ => fail(CKR_MECHANISM_PARAM_INVALID),
        }
    }

    /// Whether a value of `length` bytes can be signed with a modulus of `modulus` bytes.
    fn check(self, length: usize, modulus: usize) -> Result<()> {
        let fits = match self {
            Self::Pkcs1Raw => length + 11 <= modulus,
            Self::Pkcs1(hash) => length == hash.length(),
            Self::Pss { hash, salt } => {
                if salt + hash.length() + 2 > modulus {
                    return fail(CKR_MECHANISM_PARAM_INVALID);
                }
                length == hash.length()
            }
        };
        if fits { Ok(()) } else { fail(CKR_DATA_LEN_RANGE) }
    }

    /// The same scheme in aws-lc-rs, if it has it.
    fn aws(self) -> Option<&'static dyn RsaEncoding> {
        match self {
            Self::Pkcs1(Hash::Sha256) => Some(&RSA_PKCS1_SHA256),
            Self::Pkcs1(Hash::Sha384) => Some(&RSA_PKCS1_SHA384),
            Self::Pkcs1(Hash::Sha512) => Some(&RSA_PKCS1_SHA512),
            Self::Pss { hash: Hash::Sha256, salt: 32 } => Some(&RSA_PSS_SHA256),
            Self::Pss { hash: Hash::Sha384, salt: 48 } => Some(&RSA_PSS_SHA384),
            Self::Pss { hash: Hash::Sha512, salt: 64 } => Some(&RSA_PSS_SHA512),
            _ => None,
        }
    }
}

/// Runs one expression with the `rsa` crate's form of a signature scheme: each is a type of its
/// own.
macro_rules! with_scheme {
    ($scheme:expr, $form:ident => $body:expr) => {
        match $scheme {
            Scheme::Pkcs1Raw => {
                let $form = Pkcs1v15Sign::new_unprefixed();
                $body
            }
            Scheme::Pkcs1(Hash::Sha1) => {
                let $form = Pkcs1v15Sign::new::<Sha1>();
                $body
            }
            Scheme::Pkcs1(Hash::Sha224) => {
                let $form = Pkcs1v15Sign::new::<Sha224>();
                $body
            }
            Scheme::Pkcs1(Hash::Sha256) => {
                let $form = Pkcs1v15Sign::new::<Sha256>();
                $body
            }
            Scheme::Pkcs1(Hash::Sha384) => {
                let $form = Pkcs1v15Sign::new::<Sha384>();
                $body
            }
            Scheme::Pkcs1(Hash::Sha512) => {
                let $form = Pkcs1v15Sign::new::<Sha512>();
                $body
            }
            Scheme::Pss { hash: Hash::Sha1, salt } => {
                let $form = Pss::<Sha1>::new_blinded_with_salt(*salt);
                $body
            }
            Scheme::Pss { hash: Hash::Sha224, salt } => {
                let $form = Pss::<Sha224>::new_blinded_with_salt(*salt);
                $body
            }
            Scheme::Pss { hash: Hash::Sha256, salt } => {
                let $form = Pss::<Sha256>::new_blinded_with_salt(*salt);
                $body
            }
            Scheme::Pss { hash: Hash::Sha384, salt } => {
                let $form = Pss::<Sha384>::new_blinded_with_salt(*salt);
                $body
            }
            Scheme::Pss { hash: Hash::Sha512, salt } => {
                let $form = Pss::<Sha512>::new_blinded_with_salt(*salt);
                $body
            }
        }
    };
}

/// Runs one expression with the `rsa` crate's form of a padding.
macro_rules! with_padding {
    ($padding:expr, $form:ident => $body:expr) => {
        match $padding {
            Padding::Pkcs1 => {
                let $form = Pkcs1v15Encrypt;
                $body
            }
            Padding::Oaep { hash, mask, label } => {
                let label = label.as_slice();
                match (hash, mask) {
                    (Hash::Sha1, _) => {
                        let $form = Oaep::<Sha1>::new_with_label(label);
                        $body
                    }
                    (Hash::Sha224, Hash::Sha1) => {
                        let $form = Oaep::<Sha224, Sha1>::new_with_mgf_hash_and_label(label);
                        $body
                    }
                    (Hash::Sha224, _) => {
                        let $form = Oaep::<Sha224>::new_with_label(label);
                        $body
                    }
                    (Hash::Sha256, Hash::Sha1) => {
                        let $form = Oaep::<Sha256, Sha1>::new_with_mgf_hash_and_label(label);
                        $body
                    }
                    (Hash::Sha256, _) => {
                        let $form = Oaep::<Sha256>::new_with_label(label);
                        $body
                    }
                    (Hash::Sha384, Hash::Sha1) => {
                        let $form = Oaep::<Sha384, Sha1>::new_with_mgf_hash_and_label(label);
                        $body
                    }
                    (Hash::Sha384, _) => {
                        let $form = Oaep::<Sha384>::new_with_label(label);
                        $body
                    }
                    (Hash::Sha512, Hash::Sha1) => {
                        let $form = Oaep::<Sha512, Sha1>::new_with_mgf_hash_and_label(label);
                        $body
                    }
                    (Hash::Sha512, _) => {
                        let $form = Oaep::<Sha512>::new_with_label(label);
                        $body
                    }
                }
            }
        }
    };
}

/// A private key.
pub(crate) struct RsaPrivate {
    key: RsaPrivateKey,
    components: Vec<(CK_ATTRIBUTE_TYPE, Buffer)>,
    signer: OnceLock<Option<RsaKeyPair>>,
    decrypter: OnceLock<Option<PrivateDecryptingKey>>,
}

impl RsaPrivate {
    /// A new key pair of `bits` bits (1024 to 4096, whole bytes) with this public exponent (65537
    /// when none is given).
    pub(crate) fn generate(bits: CK_ULONG, exponent: Option<&[u8]>) -> Result<(Self, RsaPublic)> {
        let usual = exponent.is_none_or(|exponent| trimmed(exponent) == [1, 0, 1]);
        let size = match bits {
            2048 => Some(KeySize::Rsa2048),
            3072 => Some(KeySize::Rsa3072),
            4096 => Some(KeySize::Rsa4096),
            _ => None,
        };
        let private = match size {
            Some(size) if usual => {
                let key = aws_lc_rs::rsa::KeyPair::generate(size).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
                let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = key.as_der().map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
                Self::from_pkcs8(der.as_ref())?
            }
            _ => {
                let bits = usize::try_from(bits)
                    .ok()
                    .filter(|bits| (MIN_BITS..=MAX_BITS).contains(bits) && bits.is_multiple_of(8));
                let bits = bits.ok_or(Rv(CKR_KEY_SIZE_RANGE))?;
                let exponent = number(exponent.unwrap_or(&[1, 0, 1]));
                let key = RsaPrivateKey::new_with_exp(&mut Random, bits, exponent)
                    .map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
                Self::new(key)?
            }
        };
        let public = RsaPublic::from_key(private.key.to_public_key());
        Ok((private, public))
    }

    /// The key with these components: modulus, both exponents, and the primes unless they can be
    /// computed.
    pub(crate) fn from_components<'a>(component: impl Fn(CK_ATTRIBUTE_TYPE) -> Option<&'a [u8]>) -> Result<Self> {
        let required = |kind| component(kind).map(number).ok_or(Rv(CKR_TEMPLATE_INCOMPLETE));
        let primes = [CKA_PRIME_1, CKA_PRIME_2].into_iter().filter_map(&component).map(number).collect();
        let key = RsaPrivateKey::from_components(
            required(CKA_MODULUS)?,
            required(CKA_PUBLIC_EXPONENT)?,
            required(CKA_PRIVATE_EXPONENT)?,
            primes,
        );
        Self::new(key.map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?)
    }

    /// The key in a PKCS#8 structure.
    pub(crate) fn from_pkcs8(der: &[u8]) -> Result<Self> {
        Self::new(RsaPrivateKey::from_pkcs8_der(der).map_err(|_| Rv(CKR_WRAPPED_KEY_INVALID))?)
    }

    /// The key in a PKCS#1 structure.
    pub(crate) fn from_der(der: &[u8]) -> Result<Self> {
        Self::new(RsaPrivateKey::from_pkcs1_der(der).map_err(|_| Rv(CKR_DEVICE_ERROR))?)
    }

    /// PKCS#8 (RFC 5958).
    pub(crate) fn to_pkcs8(&self) -> Result<Buffer> {
        self.key.to_pkcs8_der().map(|der| Buffer::copy_of(der.as_bytes())).map_err(|_| Rv(CKR_FUNCTION_FAILED))
    }

    /// PKCS#1 (RFC 8017, A.1.2).
    pub(crate) fn to_der(&self) -> Result<Buffer> {
        self.key.to_pkcs1_der().map(|der| Buffer::copy_of(der.as_bytes())).map_err(|_| Rv(CKR_FUNCTION_FAILED))
    }

    /// The modulus, big endian.
    pub(crate) fn modulus(&self) -> &[u8] {
        self.component(CKA_MODULUS).unwrap_or_default()
    }

    /// A component that is no secret.
    pub(crate) fn public_component(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<&[u8]> {
        matches!(kind, CKA_MODULUS | CKA_PUBLIC_EXPONENT).then(|| self.component(kind)).flatten()
    }

    /// A component that is a secret.
    pub(crate) fn private_component(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<&[u8]> {
        self.component(kind)
    }

    /// Signs a digest (for [`Scheme::Pkcs1Raw`]: any data).
    pub(crate) fn sign(&self, scheme: &Scheme, value: &[u8]) -> Result<Buffer> {
        scheme.check(value.len(), self.modulus().len())?;
        let hash = match scheme {
            Scheme::Pkcs1(hash) | Scheme::Pss { hash, .. } => Some(*hash),
            Scheme::Pkcs1Raw => None,
        };
        if let (Some(signer), Some(encoding), Some(hash)) = (self.signer(), scheme.aws(), hash) {
            let digest = aws_lc_rs::digest::Digest::import_less_safe(value, hash.algorithm())
                .map_err(|_| Rv(CKR_DATA_LEN_RANGE))?;
            let mut signature = Buffer::zeros(self.modulus().len());
            signer.sign_digest(encoding, &digest, &mut signature).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
            return Ok(signature);
        }
        with_scheme!(scheme, form => self.sign_with(form, value))
    }

    /// Decrypts; `invalid` is the answer to a ciphertext that was not made for this key.
    pub(crate) fn decrypt(&self, padding: &Padding, data: &[u8], invalid: CK_RV) -> Result<Buffer> {
        if data.len() != self.modulus().len() {
            return fail(if invalid == CKR_WRAPPED_KEY_INVALID {
                CKR_WRAPPED_KEY_LEN_RANGE
            } else {
                CKR_ENCRYPTED_DATA_LEN_RANGE
            });
        }
        let mut out = Buffer::zeros(data.len());
        if let Some(key) = self.decrypter() {
            let length = match padding {
                Padding::Pkcs1 => {
                    let key = Pkcs1PrivateDecryptingKey::new(key.clone()).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
                    Some(key.decrypt(data, &mut out).map(|plain| plain.len()))
                }
                Padding::Oaep { hash, mask, label } if hash == mask => {
                    let algorithm = match hash {
                        Hash::Sha1 => Some(&OAEP_SHA1_MGF1SHA1),
                        Hash::Sha256 => Some(&OAEP_SHA256_MGF1SHA256),
                        Hash::Sha384 => Some(&OAEP_SHA384_MGF1SHA384),
                        Hash::Sha512 => Some(&OAEP_SHA512_MGF1SHA512),
                        Hash::Sha224 => None,
                    };
                    let key = OaepPrivateDecryptingKey::new(key.clone()).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
                    let label = Some(label.as_slice()).filter(|label| !label.is_empty());
                    algorithm.map(|algorithm| key.decrypt(algorithm, data, &mut out, label).map(|plain| plain.len()))
                }
                Padding::Oaep { .. } => None,
            };
            if let Some(length) = length {
                out.truncate(length.map_err(|_| Rv(invalid))?);
                return Ok(out);
            }
        }
        with_padding!(padding, form => self.decrypt_with(form, data, invalid))
    }

    fn new(key: RsaPrivateKey) -> Result<Self> {
        let bits = usize::try_from(key.n().bits_vartime()).unwrap_or(0);
        if !(MIN_BITS..=MAX_BITS).contains(&bits) {
            return fail(CKR_KEY_SIZE_RANGE);
        }
        let der = key.to_pkcs1_der().map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        let parts = pkcs1::RsaPrivateKey::from_der(der.as_bytes()).map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        let components = [
            (CKA_MODULUS, parts.modulus),
            (CKA_PUBLIC_EXPONENT, parts.public_exponent),
            (CKA_PRIVATE_EXPONENT, parts.private_exponent),
            (CKA_PRIME_1, parts.prime1),
            (CKA_PRIME_2, parts.prime2),
            (CKA_EXPONENT_1, parts.exponent1),
            (CKA_EXPONENT_2, parts.exponent2),
            (CKA_COEFFICIENT, parts.coefficient),
        ];
        let components =
            components.map(|(kind, value): (_, pkcs1::UintRef<'_>)| (kind, Buffer::copy_of(value.as_bytes()))).into();
        Ok(Self { key, components, signer: OnceLock::new(), decrypter: OnceLock::new() })
    }

    fn component(&self, kind: CK_ATTRIBUTE_TYPE) -> Option<&[u8]> {
        self.components.iter().find(|(given, _)| *given == kind).map(|(_, value)| &**value)
    }

    fn signer(&self) -> Option<&RsaKeyPair> {
        self.signer.get_or_init(|| RsaKeyPair::from_der(&self.to_der().ok()?).ok()).as_ref()
    }

    fn decrypter(&self) -> Option<&PrivateDecryptingKey> {
        self.decrypter.get_or_init(|| PrivateDecryptingKey::from_pkcs8(&self.to_pkcs8().ok()?).ok()).as_ref()
    }

    fn sign_with(&self, form: impl SignatureScheme, value: &[u8]) -> Result<Buffer> {
        let signature = self.key.sign_with_rng(&mut Random, form, value).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
        Ok(Buffer::copy_of(&signature))
    }

    fn decrypt_with(&self, form: impl PaddingScheme, data: &[u8], invalid: CK_RV) -> Result<Buffer> {
        let plain = self.key.decrypt_blinded(&mut Random, form, data).map_err(|_| Rv(invalid))?;
        Ok(Buffer::copy_of(&zeroize::Zeroizing::new(plain)))
    }
}

/// A public key.
pub(crate) struct RsaPublic {
    key: RsaPublicKey,
    modulus: Vec<u8>,
    exponent: Vec<u8>,
}

impl RsaPublic {
    /// The key with these big-endian numbers.
    pub(crate) fn new(modulus: &[u8], exponent: &[u8]) -> Result<Self> {
        let key =
            RsaPublicKey::new_with_size_limits(number(modulus), number(exponent), MIN_PUBLIC_BITS..=MAX_PUBLIC_BITS);
        Ok(Self::from_key(key.map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?))
    }

    /// The key in a PKCS#1 structure.
    pub(crate) fn from_der(der: &[u8]) -> Result<Self> {
        let parts = pkcs1::RsaPublicKey::<pkcs1::UintRef<'_>>::from_der(der).map_err(|_| Rv(CKR_DEVICE_ERROR))?;
        Self::new(parts.modulus.as_bytes(), parts.public_exponent.as_bytes())
    }

    /// PKCS#1 (RFC 8017, A.1.1).
    pub(crate) fn to_der(&self) -> Result<Buffer> {
        self.key.to_pkcs1_der().map(|der| Buffer::copy_of(der.as_bytes())).map_err(|_| Rv(CKR_FUNCTION_FAILED))
    }

    /// The modulus, big endian.
    pub(crate) fn modulus(&self) -> &[u8] {
        &self.modulus
    }

    /// The public exponent, big endian.
    pub(crate) fn exponent(&self) -> &[u8] {
        &self.exponent
    }

    /// The length of the modulus in bits.
    pub(crate) fn bits(&self) -> usize {
        usize::try_from(self.key.n().bits_vartime()).unwrap_or(0)
    }

    /// The longest plaintext in bytes.
    pub(crate) fn capacity(&self, padding: &Padding) -> usize {
        self.modulus.len().saturating_sub(padding.overhead())
    }

    /// Encrypts.
    pub(crate) fn encrypt(&self, padding: &Padding, data: &[u8]) -> Result<Buffer> {
        if data.len() > self.capacity(padding) {
            return fail(CKR_DATA_LEN_RANGE);
        }
        let encrypted = with_padding!(padding, form => self.key.encrypt(&mut Random, form, data));
        Ok(Buffer::copy_of(&encrypted.map_err(|_| Rv(CKR_FUNCTION_FAILED))?))
    }

    /// Checks a signature over a digest (for [`Scheme::Pkcs1Raw`]: any data).
    pub(crate) fn verify(&self, scheme: &Scheme, value: &[u8], signature: &[u8]) -> Result<()> {
        scheme.check(value.len(), self.modulus.len())?;
        with_scheme!(scheme, form => self.key.verify(form, value, signature)).map_err(|_| Rv(CKR_SIGNATURE_INVALID))
    }

    fn from_key(key: RsaPublicKey) -> Self {
        let (modulus, exponent) = (key.n_bytes(), key.e_bytes());
        Self { modulus: trimmed(&modulus).to_vec(), exponent: trimmed(&exponent).to_vec(), key }
    }
}

/// The random generator of aws-lc, as the `rsa` crate wants it.
struct Random;

impl rsa::rand_core::TryRng for Random {
    type Error = core::convert::Infallible;

    fn try_next_u32(&mut self) -> core::result::Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> core::result::Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> core::result::Result<(), Self::Error> {
        if super::random(bytes).is_err() {
            // This is not reached: aws-lc itself ends the process when the operating system gives
            // no randomness.
            std::process::abort();
        }
        Ok(())
    }
}

impl rsa::rand_core::TryCryptoRng for Random {}

fn number(bytes: &[u8]) -> BoxedUint {
    BoxedUint::from_be_slice_vartime(trimmed(bytes))
}

/// Without zeros in front.
fn trimmed(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    bytes.get(zeros..).unwrap_or_default()
}

/// Keys below 2048 bits are for old programs and tests only.
const MIN_BITS: usize = 1024;
const MAX_BITS: usize = 4096;
/// Public keys may come from other systems, so that their signatures can be checked.
const MIN_PUBLIC_BITS: usize = 512;
const MAX_PUBLIC_BITS: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_implementations_read_each_other() {
        let (private, public) = RsaPrivate::generate(2048, None).unwrap();
        for hash in [Hash::Sha1, Hash::Sha224, Hash::Sha256, Hash::Sha384, Hash::Sha512] {
            let digest = hash.digest(&[b"data"]);
            let other = hash.digest(&[b"other"]);
            let length = hash.length();
            for scheme in [Scheme::Pkcs1(hash), Scheme::Pss { hash, salt: length }, Scheme::Pss { hash, salt: 0 }] {
                let signature = private.sign(&scheme, digest.as_ref()).unwrap();
                public.verify(&scheme, digest.as_ref(), &signature).unwrap();
                assert_eq!(public.verify(&scheme, other.as_ref(), &signature), Err(Rv(CKR_SIGNATURE_INVALID)));
            }
            for mask in [hash, Hash::Sha1] {
                let padding = Padding::Oaep { hash, mask, label: b"label".to_vec() };
                let mut encrypted = public.encrypt(&padding, b"secret").unwrap();
                assert_eq!(*private.decrypt(&padding, &encrypted, CKR_ENCRYPTED_DATA_INVALID).unwrap(), *b"secret");
                encrypted[100] ^= 1;
                let invalid = private.decrypt(&padding, &encrypted, CKR_ENCRYPTED_DATA_INVALID);
                assert_eq!(invalid.err(), Some(Rv(CKR_ENCRYPTED_DATA_INVALID)));
            }
        }
    }

    #[test]
    fn keys_survive_their_encodings() {
        let (private, public) = RsaPrivate::generate(1024, Some(&[3])).unwrap();
        assert_eq!(public.exponent(), [3]);
        let again = RsaPrivate::from_pkcs8(&private.to_pkcs8().unwrap()).unwrap();
        assert_eq!(again.component(CKA_COEFFICIENT), private.component(CKA_COEFFICIENT));
        let again = RsaPrivate::from_components(|kind| private.component(kind)).unwrap();
        let signature = again.sign(&Scheme::Pkcs1Raw, b"no digest").unwrap();
        RsaPublic::from_der(&public.to_der().unwrap())
            .unwrap()
            .verify(&Scheme::Pkcs1Raw, b"no digest", &signature)
            .unwrap();
    }
}
