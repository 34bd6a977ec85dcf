//! Elliptic curve keys: P-256, P-384 and P-521 (FIPS 186-5), ECDSA on a digest, and ECDH (SP
//! 800-56A).

use std::sync::OnceLock;

use aws_lc_rs::agreement::{self, UnparsedPublicKey};
use aws_lc_rs::digest::Digest;
use aws_lc_rs::encoding::{AsBigEndian, AsDer, EcPrivateKeyBin};
use aws_lc_rs::signature::{self, EcdsaKeyPair, EcdsaSigningAlgorithm, EcdsaVerificationAlgorithm, ParsedPublicKey};
use cryptoki_sys::*;

use crate::buffer::Buffer;
use crate::crypto::digest::Hash;
use crate::error::{Result, Rv, fail};

/// A named curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Curve {
    P256,
    P384,
    P521,
}

impl Curve {
    /// The curve that `CKA_EC_PARAMS` names: an object identifier or a `PrintableString` curve
    /// name, in DER.
    pub(crate) fn from_parameters(parameters: &[u8]) -> Result<Self> {
        for curve in [Self::P256, Self::P384, Self::P521] {
            let name = match parameters.split_first_chunk::<2>() {
                Some(([0x13, length], name)) if usize::from(*length) == name.len() => Some(name),
                _ => None,
            };
            if parameters == curve.parameters() || name.is_some_and(|name| curve.names().contains(&name)) {
                return Ok(curve);
            }
        }
        // Explicit parameters and other curves are well formed, but this module does not have them.
        // Everything else is malformed.
        match parameters.first() {
            Some(0x06 | 0x13 | 0x30) => fail(CKR_CURVE_NOT_SUPPORTED),
            _ => fail(CKR_DOMAIN_PARAMS_INVALID),
        }
    }

    /// The object identifier in DER: the value of `CKA_EC_PARAMS`.
    pub(crate) fn parameters(self) -> &'static [u8] {
        match self {
            Self::P256 => &[0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07],
            Self::P384 => &[0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x22],
            Self::P521 => &[0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x23],
        }
    }

    fn names(self) -> [&'static [u8]; 2] {
        match self {
            Self::P256 => [b"secp256r1", b"prime256v1"],
            Self::P384 => [b"secp384r1", b"P-384"],
            Self::P521 => [b"secp521r1", b"P-521"],
        }
    }

    /// The length of a coordinate, of a private key and of a shared secret, in bytes.
    pub(crate) fn length(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
            Self::P521 => 66,
        }
    }

    fn agreement(self) -> &'static agreement::Algorithm {
        match self {
            Self::P256 => &agreement::ECDH_P256,
            Self::P384 => &agreement::ECDH_P384,
            Self::P521 => &agreement::ECDH_P521,
        }
    }

    fn signing(self) -> &'static EcdsaSigningAlgorithm {
        match self {
            Self::P256 => &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            Self::P384 => &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
            Self::P521 => &signature::ECDSA_P521_SHA512_FIXED_SIGNING,
        }
    }

    fn verification(self) -> &'static EcdsaVerificationAlgorithm {
        match self {
            Self::P256 => &signature::ECDSA_P256_SHA256_FIXED,
            Self::P384 => &signature::ECDSA_P384_SHA384_FIXED,
            Self::P521 => &signature::ECDSA_P521_SHA512_FIXED,
        }
    }

    /// The digest as ECDSA on this curve takes it. FIPS 186-5 (6.4.1) uses the leftmost bits of a
    /// longer digest, and a shorter one as a number: with zeros in front it is the same number.
    fn digest(self, value: &[u8]) -> Result<Digest> {
        let hash = match self {
            Self::P256 => Hash::Sha256,
            Self::P384 => Hash::Sha384,
            Self::P521 => Hash::Sha512,
        };
        let mut padded = [0; 64];
        let padded = padded.get_mut(..hash.length()).unwrap_or_default();
        match padded.len().checked_sub(value.len()) {
            Some(zeros) => {
                for (place, byte) in padded.iter_mut().skip(zeros).zip(value) {
                    *place = *byte;
                }
            }
            // The order of P-521 is longer than 64 bytes: a longer value cannot be cut to the right
            // bits.
            None if self == Self::P521 => return fail(CKR_DATA_LEN_RANGE),
            None => {
                for (place, byte) in padded.iter_mut().zip(value) {
                    *place = *byte;
                }
            }
        }
        Digest::import_less_safe(padded, hash.algorithm()).map_err(|_| Rv(CKR_DATA_LEN_RANGE))
    }
}

/// A private key, with a form for each use that is made once.
pub(crate) struct EcPrivate {
    pub(crate) curve: Curve,
    scalar: Buffer,
    agreement: OnceLock<agreement::PrivateKey>,
    signer: OnceLock<EcdsaKeyPair>,
}

impl EcPrivate {
    /// A new key pair: the private key and the uncompressed public point.
    pub(crate) fn generate(curve: Curve) -> Result<(Self, Vec<u8>)> {
        let failed = |_| Rv(CKR_FUNCTION_FAILED);
        let key = agreement::PrivateKey::generate(curve.agreement()).map_err(failed)?;
        let scalar: EcPrivateKeyBin<'_> = key.as_be_bytes().map_err(failed)?;
        let scalar = Buffer::copy_of(scalar.as_ref());
        let point = key.compute_public_key().map_err(failed)?.as_ref().to_vec();
        Ok((Self { curve, scalar, agreement: key.into(), signer: OnceLock::new() }, point))
    }

    /// The private key with the number `scalar` (big endian, of any length that holds it).
    pub(crate) fn from_scalar(curve: Curve, scalar: &[u8]) -> Result<Self> {
        let zeros = scalar.iter().take_while(|byte| **byte == 0).count();
        let digits = scalar.get(zeros..).unwrap_or_default();
        let padding = curve.length().checked_sub(digits.len()).ok_or(Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        let mut fixed = Buffer::zeros(padding);
        fixed.extend(digits);
        let key = agreement::PrivateKey::from_private_key(curve.agreement(), &fixed)
            .map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        Ok(Self { curve, scalar: fixed, agreement: key.into(), signer: OnceLock::new() })
    }

    /// The private key in a PKCS#8 or RFC 5915 structure, on `curve`.
    pub(crate) fn from_der(curve: Curve, der: &[u8]) -> Result<Self> {
        let key = agreement::PrivateKey::from_private_key_der(curve.agreement(), der)
            .map_err(|_| Rv(CKR_WRAPPED_KEY_INVALID))?;
        let scalar: EcPrivateKeyBin<'_> = key.as_be_bytes().map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
        let scalar = Buffer::copy_of(scalar.as_ref());
        Ok(Self { curve, scalar, agreement: key.into(), signer: OnceLock::new() })
    }

    /// The curve and the key in a PKCS#8 structure.
    pub(crate) fn from_pkcs8(der: &[u8]) -> Result<Self> {
        [Curve::P256, Curve::P384, Curve::P521]
            .into_iter()
            .find_map(|curve| Self::from_der(curve, der).ok())
            .ok_or(Rv(CKR_WRAPPED_KEY_INVALID))
    }

    /// The number, big endian, as long as a coordinate.
    pub(crate) fn scalar(&self) -> &[u8] {
        &self.scalar
    }

    /// PKCS#8 (RFC 5958) with the RFC 5915 structure inside.
    pub(crate) fn to_pkcs8(&self) -> Result<Buffer> {
        let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> =
            self.agreement()?.as_der().map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
        Ok(Buffer::copy_of(der.as_ref()))
    }

    /// The uncompressed public point.
    pub(crate) fn point(&self) -> Result<Vec<u8>> {
        Ok(self.agreement()?.compute_public_key().map_err(|_| Rv(CKR_FUNCTION_FAILED))?.as_ref().to_vec())
    }

    /// Signs a digest: r and s, each as long as a coordinate.
    pub(crate) fn sign(&self, digest: &[u8]) -> Result<Buffer> {
        let digest = self.curve.digest(digest)?;
        let signature = self.signer()?.sign_digest(&digest).map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
        Ok(Buffer::copy_of(signature.as_ref()))
    }

    /// The shared secret with the peer's public point (any encoding of SEC 1): the x coordinate.
    pub(crate) fn agree(&self, point: &[u8]) -> Result<Buffer> {
        // aws-lc-rs would also take a SubjectPublicKeyInfo here.
        let expected = match point.first() {
            Some(&UNCOMPRESSED) => 2 * self.curve.length() + 1,
            Some(0x02 | 0x03) => self.curve.length() + 1,
            _ => 0,
        };
        if point.len() != expected {
            return fail(CKR_MECHANISM_PARAM_INVALID);
        }
        let peer = UnparsedPublicKey::new(self.curve.agreement(), point);
        agreement::agree(self.agreement()?, peer, Rv(CKR_MECHANISM_PARAM_INVALID), |secret| Ok(Buffer::copy_of(secret)))
    }

    fn agreement(&self) -> Result<&agreement::PrivateKey> {
        if let Some(key) = self.agreement.get() {
            return Ok(key);
        }
        let key = agreement::PrivateKey::from_private_key(self.curve.agreement(), &self.scalar);
        let key = key.map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
        Ok(self.agreement.get_or_init(|| key))
    }

    fn signer(&self) -> Result<&EcdsaKeyPair> {
        if let Some(signer) = self.signer.get() {
            return Ok(signer);
        }
        let signer = EcdsaKeyPair::from_private_key_and_public_key(self.curve.signing(), &self.scalar, &self.point()?);
        let signer = signer.map_err(|_| Rv(CKR_FUNCTION_FAILED))?;
        Ok(self.signer.get_or_init(|| signer))
    }
}

/// A public key.
pub(crate) struct EcPublic {
    pub(crate) curve: Curve,
    point: Vec<u8>,
    verifier: ParsedPublicKey,
}

impl EcPublic {
    /// The key with this uncompressed point (SEC 1), alone or in a DER `OCTET STRING`.
    pub(crate) fn new(curve: Curve, point: &[u8]) -> Result<Self> {
        let point = raw_point(curve, point);
        if point.len() != 2 * curve.length() + 1 || point.first() != Some(&UNCOMPRESSED) {
            return fail(CKR_ATTRIBUTE_VALUE_INVALID);
        }
        let verifier =
            ParsedPublicKey::new(curve.verification(), point).map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
        Ok(Self { curve, point: point.to_vec(), verifier })
    }

    /// The uncompressed point.
    pub(crate) fn point(&self) -> &[u8] {
        &self.point
    }

    /// Checks a signature of r and s over a digest.
    pub(crate) fn verify(&self, digest: &[u8], signature: &[u8]) -> Result<()> {
        if signature.len() != 2 * self.curve.length() {
            return fail(CKR_SIGNATURE_LEN_RANGE);
        }
        let digest = self.curve.digest(digest)?;
        self.verifier.verify_digest_sig(&digest, signature).map_err(|_| Rv(CKR_SIGNATURE_INVALID))
    }
}

/// `point` without the DER `OCTET STRING` around it, if there is one.
///
/// A raw uncompressed point starts with the same byte as an `OCTET STRING`: it is one only if the
/// length fits to the end.
pub(crate) fn raw_point(curve: Curve, point: &[u8]) -> &[u8] {
    let raw = [2 * curve.length() + 1, curve.length() + 1];
    if raw.contains(&point.len()) && !matches!(point, [0x04, length, ..] if usize::from(*length) + 2 == point.len()) {
        return point;
    }
    let inner = match point {
        [0x04, 0x81, length, rest @ ..] if usize::from(*length) == rest.len() => Some(rest),
        [0x04, length, rest @ ..] if usize::from(*length) == rest.len() && *length < 0x80 => Some(rest),
        _ => None,
    };
    inner.filter(|inner| raw.contains(&inner.len())).unwrap_or(point)
}

/// A point in a DER `OCTET STRING`: the value of `CKA_EC_POINT`.
pub(crate) fn encoded_point(point: &[u8]) -> Vec<u8> {
    let mut encoded = vec![0x04];
    match u8::try_from(point.len()) {
        Ok(length @ 0..0x80) => encoded.push(length),
        Ok(length) => encoded.extend([0x81, length]),
        Err(_) => return Vec::new(),
    }
    encoded.extend(point);
    encoded
}

const UNCOMPRESSED: u8 = 0x04;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_found_with_and_without_their_octet_string() {
        for curve in [Curve::P256, Curve::P384, Curve::P521] {
            let (private, point) = EcPrivate::generate(curve).unwrap();
            assert_eq!(raw_point(curve, &point), point.as_slice());
            assert_eq!(raw_point(curve, &encoded_point(&point)), point.as_slice());
            assert_eq!(private.point().unwrap(), point);
            assert_eq!(EcPublic::new(curve, &encoded_point(&point)).unwrap().point(), point.as_slice());
            assert_eq!(EcPrivate::from_pkcs8(&private.to_pkcs8().unwrap()).unwrap().scalar(), private.scalar());
        }
    }

    #[test]
    fn digests_of_every_length_can_be_signed() {
        for curve in [Curve::P256, Curve::P384, Curve::P521] {
            let (private, point) = EcPrivate::generate(curve).unwrap();
            let public = EcPublic::new(curve, &point).unwrap();
            for hash in [Hash::Sha1, Hash::Sha224, Hash::Sha256, Hash::Sha384, Hash::Sha512] {
                let digest = hash.digest(&[b"data"]);
                let signature = private.sign(digest.as_ref()).unwrap();
                public.verify(digest.as_ref(), &signature).unwrap();
                assert_eq!(
                    public.verify(hash.digest(&[b"other"]).as_ref(), &signature),
                    Err(Rv(CKR_SIGNATURE_INVALID))
                );
            }
        }
    }
}
