//! Hash functions (FIPS 180-4) and HMAC (FIPS 198-1).

use aws_lc_rs::{digest, hmac};
use cryptoki_sys::*;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// The hash function that the mechanism `CKM_SHA_1`, `CKM_SHA224`, … names.
    pub(crate) fn from_mechanism(mechanism: CK_MECHANISM_TYPE) -> Option<Self> {
        match mechanism {
            CKM_SHA_1 => Some(Self::Sha1),
            CKM_SHA224 => Some(Self::Sha224),
            CKM_SHA256 => Some(Self::Sha256),
            CKM_SHA384 => Some(Self::Sha384),
            CKM_SHA512 => Some(Self::Sha512),
            _ => None,
        }
    }

    /// The hash function of a `CKG_MGF1_` number.
    pub(crate) fn from_mask_generator(mgf: CK_RSA_PKCS_MGF_TYPE) -> Option<Self> {
        match mgf {
            CKG_MGF1_SHA1 => Some(Self::Sha1),
            CKG_MGF1_SHA224 => Some(Self::Sha224),
            CKG_MGF1_SHA256 => Some(Self::Sha256),
            CKG_MGF1_SHA384 => Some(Self::Sha384),
            CKG_MGF1_SHA512 => Some(Self::Sha512),
            _ => None,
        }
    }

    /// The length of the digest in bytes.
    pub(crate) fn length(self) -> usize {
        self.algorithm().output_len()
    }

    pub(crate) fn algorithm(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha224 => &digest::SHA224,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }

    pub(crate) fn hmac_algorithm(self) -> hmac::Algorithm {
        match self {
            Self::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha224 => hmac::HMAC_SHA224,
            Self::Sha256 => hmac::HMAC_SHA256,
            Self::Sha384 => hmac::HMAC_SHA384,
            Self::Sha512 => hmac::HMAC_SHA512,
        }
    }

    /// The digest of the concatenated parts.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> digest::Digest {
        let mut context = digest::Context::new(self.algorithm());
        for part in parts {
            context.update(part);
        }
        context.finish()
    }
}
