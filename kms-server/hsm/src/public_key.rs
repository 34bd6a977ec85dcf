//! Public keys as the token has them: the point of a P-256 key, the DER of an RSA key.

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::RsaPublicKeyComponents;
use cryptoki_sys::*;

use crate::error::HsmError;
use crate::raw::{Object, Session};

/// The uncompressed point of a P-256 public key object.
pub(crate) fn public_point(session: &Session, object: Object) -> Result<[u8; 65], HsmError> {
    let value = session
        .attribute(object, CKA_EC_POINT)?
        .ok_or_else(|| HsmError::call("C_GetAttributeValue", CKR_ATTRIBUTE_TYPE_INVALID))?;
    // CKA_EC_POINT is the DER of an OCTET STRING; a few modules give the bare point.
    let point = value.strip_prefix(&[0x04, 65]).unwrap_or(&value);
    point.try_into().map_err(|_| HsmError::call("C_GetAttributeValue", CKR_ATTRIBUTE_VALUE_INVALID))
}

/// The DER (SubjectPublicKeyInfo) of an RSA public key object.
pub(crate) fn rsa_public_key_der(session: &Session, object: Object) -> Result<Option<Vec<u8>>, HsmError> {
    let (modulus, exponent) =
        (session.attribute(object, CKA_MODULUS)?, session.attribute(object, CKA_PUBLIC_EXPONENT)?);
    let (Some(n), Some(e)) = (modulus, exponent) else { return Ok(None) };
    let trimmed = |octets: &[u8]| octets.iter().copied().skip_while(|octet| *octet == 0).collect::<Vec<u8>>();
    let components = RsaPublicKeyComponents { n: trimmed(&n), e: trimmed(&e) };
    Ok(components.as_der().ok().map(|der| der.as_ref().to_vec()))
}

/// DER of the OID of P-256 (RFC 5480): CKA_EC_PARAMS.
pub(crate) const P256_OID: &[u8] = &[0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07];
