//! The mechanisms: their parameters in safe types, and the table of mechanisms that the token has.

use cryptoki_sys::*;

use crate::crypto::digest::Hash;
use crate::crypto::kdf::Field;
use crate::template::Template;

/// A mechanism with its parameters.
pub(crate) struct Mechanism<'a> {
    /// Which one.
    pub(crate) kind: CK_MECHANISM_TYPE,
    /// Its parameters.
    pub(crate) parameters: Parameters<'a>,
}

/// The parameters of a mechanism. They borrow the caller's bytes during the call.
pub(crate) enum Parameters<'a> {
    /// None.
    None,
    /// The initialization vector of CBC.
    Iv([u8; 16]),
    /// Bytes whose meaning depends on the mechanism: an alternative initial value of key wrapping,
    /// the data that AES_ECB_ENCRYPT_DATA encrypts, or an IV of GMAC.
    Bytes(&'a [u8]),
    /// The counter block of AES_CTR and the width of its counter in bits.
    Counter { bits: u64, block: [u8; 16] },
    /// AES_GCM.
    Gcm { iv: &'a [u8], aad: &'a [u8], tag_bits: u64 },
    /// The length of a shortened MAC.
    Length(u64),
    /// AES_CBC_ENCRYPT_DATA.
    CbcData { iv: [u8; 16], data: &'a [u8] },
    /// ECDH.
    Ecdh { kdf: CK_EC_KDF_TYPE, shared: &'a [u8], public: &'a [u8] },
    /// RSA PSS.
    Pss { hash: Hash, mask: Hash, salt: usize },
    /// RSA OAEP.
    Oaep { hash: Hash, mask: Hash, label: &'a [u8] },
    /// SP800_108_COUNTER_KDF.
    CounterKdf { prf: CK_SP800_108_PRF_TYPE, fields: Vec<Field>, additional: Vec<Template<'a>> },
    /// HKDF.
    Hkdf { extract: bool, expand: bool, hash: Hash, salt: Salt<'a>, info: &'a [u8] },
}

/// The salt of HKDF.
pub(crate) enum Salt<'a> {
    /// None: zeros, of the length of the hash.
    None,
    /// These bytes.
    Data(&'a [u8]),
    /// The value of this key.
    Key(CK_OBJECT_HANDLE),
}

/// The answer of C_GetMechanismInfo: the range of key sizes in the unit of the standard, and `CKF_`
/// flags.
pub(crate) fn info(kind: CK_MECHANISM_TYPE) -> Option<CK_MECHANISM_INFO> {
    TABLE.iter().find(|row| row.0 == kind).map(|row| CK_MECHANISM_INFO {
        ulMinKeySize: row.1,
        ulMaxKeySize: row.2,
        flags: row.3,
    })
}

/// All mechanisms of the token.
pub(crate) fn all() -> impl ExactSizeIterator<Item = CK_MECHANISM_TYPE> {
    TABLE.iter().map(|row| row.0)
}

const CIPHER: CK_FLAGS = CKF_ENCRYPT | CKF_DECRYPT;
const CIPHER_AND_WRAP: CK_FLAGS = CIPHER | CKF_WRAP | CKF_UNWRAP;
const MAC: CK_FLAGS = CKF_SIGN | CKF_VERIFY;
const CURVES: CK_FLAGS = CKF_EC_F_P | CKF_EC_OID | CKF_EC_CURVENAME | CKF_EC_UNCOMPRESS;
const MESSAGE: CK_FLAGS = CKF_MESSAGE_ENCRYPT | CKF_MESSAGE_DECRYPT;

static TABLE: &[(CK_MECHANISM_TYPE, CK_ULONG, CK_ULONG, CK_FLAGS)] = &[
    (CKM_AES_KEY_GEN, 16, 32, CKF_GENERATE),
    (CKM_AES_ECB, 16, 32, CIPHER_AND_WRAP),
    (CKM_AES_CBC, 16, 32, CIPHER_AND_WRAP),
    (CKM_AES_CBC_PAD, 16, 32, CIPHER_AND_WRAP),
    (CKM_AES_CTR, 16, 32, CIPHER),
    (CKM_AES_GCM, 16, 32, CIPHER_AND_WRAP | MESSAGE),
    (CKM_AES_GMAC, 16, 32, MAC),
    (CKM_AES_CMAC, 16, 32, MAC),
    (CKM_AES_CMAC_GENERAL, 16, 32, MAC),
    (CKM_AES_KEY_WRAP, 16, 32, CIPHER_AND_WRAP),
    (CKM_AES_KEY_WRAP_KWP, 16, 32, CIPHER_AND_WRAP),
    (CKM_AES_ECB_ENCRYPT_DATA, 16, 32, CKF_DERIVE),
    (CKM_AES_CBC_ENCRYPT_DATA, 16, 32, CKF_DERIVE),
    (CKM_GENERIC_SECRET_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_SHA_1, 0, 0, CKF_DIGEST),
    (CKM_SHA224, 0, 0, CKF_DIGEST),
    (CKM_SHA256, 0, 0, CKF_DIGEST),
    (CKM_SHA384, 0, 0, CKF_DIGEST),
    (CKM_SHA512, 0, 0, CKF_DIGEST),
    (CKM_SHA_1_HMAC, 1, 4096, MAC),
    (CKM_SHA224_HMAC, 1, 4096, MAC),
    (CKM_SHA256_HMAC, 1, 4096, MAC),
    (CKM_SHA384_HMAC, 1, 4096, MAC),
    (CKM_SHA512_HMAC, 1, 4096, MAC),
    (CKM_SHA_1_HMAC_GENERAL, 1, 4096, MAC),
    (CKM_SHA224_HMAC_GENERAL, 1, 4096, MAC),
    (CKM_SHA256_HMAC_GENERAL, 1, 4096, MAC),
    (CKM_SHA384_HMAC_GENERAL, 1, 4096, MAC),
    (CKM_SHA512_HMAC_GENERAL, 1, 4096, MAC),
    (CKM_SHA_1_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_SHA224_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_SHA256_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_SHA384_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_SHA512_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_SP800_108_COUNTER_KDF, 1, 4096, CKF_DERIVE),
    (CKM_HKDF_KEY_GEN, 1, 4096, CKF_GENERATE),
    (CKM_HKDF_DERIVE, 1, 4096, CKF_DERIVE),
    (CKM_HKDF_DATA, 1, 4096, CKF_DERIVE),
    (CKM_EC_KEY_PAIR_GEN, 256, 521, CKF_GENERATE_KEY_PAIR | CURVES),
    (CKM_ECDSA, 256, 521, MAC | CURVES),
    (CKM_ECDSA_SHA1, 256, 521, MAC | CURVES),
    (CKM_ECDSA_SHA224, 256, 521, MAC | CURVES),
    (CKM_ECDSA_SHA256, 256, 521, MAC | CURVES),
    (CKM_ECDSA_SHA384, 256, 521, MAC | CURVES),
    (CKM_ECDSA_SHA512, 256, 521, MAC | CURVES),
    (CKM_ECDH1_DERIVE, 256, 521, CKF_DERIVE | CURVES),
    (CKM_ECDH1_COFACTOR_DERIVE, 256, 521, CKF_DERIVE | CURVES),
    (CKM_RSA_PKCS_KEY_PAIR_GEN, 1024, 4096, CKF_GENERATE_KEY_PAIR),
    (CKM_RSA_PKCS, 1024, 4096, CIPHER_AND_WRAP | MAC),
    (CKM_RSA_PKCS_OAEP, 1024, 4096, CIPHER_AND_WRAP),
    (CKM_RSA_PKCS_PSS, 1024, 4096, MAC),
    (CKM_SHA1_RSA_PKCS, 1024, 4096, MAC),
    (CKM_SHA224_RSA_PKCS, 1024, 4096, MAC),
    (CKM_SHA256_RSA_PKCS, 1024, 4096, MAC),
    (CKM_SHA384_RSA_PKCS, 1024, 4096, MAC),
    (CKM_SHA512_RSA_PKCS, 1024, 4096, MAC),
    (CKM_SHA1_RSA_PKCS_PSS, 1024, 4096, MAC),
    (CKM_SHA224_RSA_PKCS_PSS, 1024, 4096, MAC),
    (CKM_SHA256_RSA_PKCS_PSS, 1024, 4096, MAC),
    (CKM_SHA384_RSA_PKCS_PSS, 1024, 4096, MAC),
    (CKM_SHA512_RSA_PKCS_PSS, 1024, 4096, MAC),
];
