//! The algorithms, over plain bytes. Nothing here knows of sessions, objects or attributes.
//!
//! Digests, HMAC, elliptic curves and RSA are aws-lc-rs; AES and its modes are RustCrypto.

pub(crate) mod aes;
pub(crate) mod digest;
pub(crate) mod ec;
pub(crate) mod gcm;
pub(crate) mod kdf;
pub(crate) mod rsa;

use cryptoki_sys::CKR_FUNCTION_FAILED;

use crate::error::{Result, Rv};

/// Fills `bytes` from the random generator of aws-lc.
pub(crate) fn random(bytes: &mut [u8]) -> Result<()> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| Rv(CKR_FUNCTION_FAILED))
}
