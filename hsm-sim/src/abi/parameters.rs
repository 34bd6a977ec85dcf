//! Reading `CK_MECHANISM`.

use cryptoki_sys::*;

use super::memory::{bytes, read, size, template};
use crate::crypto::digest::Hash;
use crate::crypto::kdf::{Field, Integer, LengthOf};
use crate::error::{Result, Rv, fail};
use crate::mechanism::{self, Mechanism, Parameters, Salt};
use crate::message::MessageParameters;

/// The mechanism behind the caller's pointer.
pub(super) unsafe fn mechanism<'a>(pointer: *const CK_MECHANISM) -> Result<Mechanism<'a>> {
    // SAFETY: as for this function.
    let raw = unsafe { read(pointer) }?;
    // SAFETY: the parameter is valid for its length by the standard.
    let parameters = unsafe { parameters(&raw) }.map_err(|error| match error {
        // A bad pointer inside the parameter is a bad parameter.
        Rv(CKR_ARGUMENTS_BAD) => Rv(CKR_MECHANISM_PARAM_INVALID),
        other => other,
    })?;
    Ok(Mechanism { kind: raw.mechanism, parameters })
}

/// The mechanism alone. Message operations get their parameters with each message.
pub(super) unsafe fn mechanism_kind(pointer: *const CK_MECHANISM) -> Result<CK_MECHANISM_TYPE> {
    // SAFETY: as for this function.
    Ok(unsafe { read(pointer) }?.mechanism)
}

/// The parameters of one message of AES-GCM, and where the token writes what it makes.
pub(super) struct Message<'a> {
    pub(super) parameters: MessageParameters<'a>,
    pub(super) iv: *mut u8,
    pub(super) tag: *mut u8,
}

/// Reads `CK_GCM_MESSAGE_PARAMS`. The tag is read only for decryption.
pub(super) unsafe fn message<'a>(
    pointer: *const core::ffi::c_void,
    length: CK_ULONG,
    decrypt: bool,
) -> Result<Message<'a>> {
    if pointer.is_null() || size(length)? != size_of::<CK_GCM_MESSAGE_PARAMS>() {
        return fail(CKR_MECHANISM_PARAM_INVALID);
    }
    // SAFETY: the length is that of the structure.
    let raw: CK_GCM_MESSAGE_PARAMS = unsafe { read(pointer.cast()) }?;
    let invalid = |_| Rv(CKR_MECHANISM_PARAM_INVALID);
    // SAFETY: valid for its length by the standard.
    let iv = unsafe { bytes(raw.pIv, raw.ulIvLen) }.map_err(invalid)?;
    // SAFETY: valid for its length by the standard.
    let tag = if decrypt { unsafe { bytes(raw.pTag, raw.ulTagBits.div_ceil(8)) }.map_err(invalid)? } else { &[] };
    if raw.pTag.is_null() {
        return fail(CKR_MECHANISM_PARAM_INVALID);
    }
    let parameters = MessageParameters {
        iv,
        fixed_bits: raw.ulIvFixedBits,
        generator: raw.ivGenerator,
        tag,
        tag_bits: raw.ulTagBits,
    };
    Ok(Message { parameters, iv: raw.pIv, tag: raw.pTag })
}

unsafe fn parameters<'a>(raw: &CK_MECHANISM) -> Result<Parameters<'a>> {
    // SAFETY: valid for its length by the standard.
    let plain = unsafe { bytes(raw.pParameter.cast(), raw.ulParameterLen) }?;
    let exact = |wanted: usize| if plain.len() == wanted { Ok(()) } else { fail(CKR_MECHANISM_PARAM_INVALID) };
    /// Reads the structure after comparing its length.
    macro_rules! structure {
        ($type:ty) => {{
            exact(size_of::<$type>())?;
            // SAFETY: the parameter has the length of the structure.
            unsafe { read::<$type>(raw.pParameter.cast()) }?
        }};
    }
    match raw.mechanism {
        CKM_AES_CBC | CKM_AES_CBC_PAD => {
            Ok(Parameters::Iv(plain.try_into().map_err(|_| Rv(CKR_MECHANISM_PARAM_INVALID))?))
        }
        CKM_AES_CTR => {
            let raw = structure!(CK_AES_CTR_PARAMS);
            Ok(Parameters::Counter { bits: raw.ulCounterBits, block: raw.cb })
        }
        CKM_AES_GCM if plain.is_empty() => Ok(Parameters::None),
        CKM_AES_GCM => {
            let raw = structure!(CK_GCM_PARAMS);
            // SAFETY: valid for its length by the standard.
            let iv = unsafe { bytes(raw.pIv, raw.ulIvLen) }?;
            // SAFETY: valid for its length by the standard.
            let aad = unsafe { bytes(raw.pAAD, raw.ulAADLen) }?;
            Ok(Parameters::Gcm { iv, aad, tag_bits: raw.ulTagBits })
        }
        CKM_AES_GMAC => Ok(Parameters::Bytes(plain)),
        CKM_AES_CMAC_GENERAL
        | CKM_SHA_1_HMAC_GENERAL
        | CKM_SHA224_HMAC_GENERAL
        | CKM_SHA256_HMAC_GENERAL
        | CKM_SHA384_HMAC_GENERAL
        | CKM_SHA512_HMAC_GENERAL => Ok(Parameters::Length(structure!(CK_ULONG))),
        CKM_AES_KEY_WRAP | CKM_AES_KEY_WRAP_KWP => match plain {
            // An initial value of the caller's own is allowed by the standard; this module knows
            // that of the RFCs only.
            [] => Ok(Parameters::None),
            [0xA6, 0xA6, 0xA6, 0xA6, 0xA6, 0xA6, 0xA6, 0xA6] if raw.mechanism == CKM_AES_KEY_WRAP => {
                Ok(Parameters::None)
            }
            [0xA6, 0x59, 0x59, 0xA6] if raw.mechanism == CKM_AES_KEY_WRAP_KWP => Ok(Parameters::None),
            _ => fail(CKR_MECHANISM_PARAM_INVALID),
        },
        CKM_AES_ECB_ENCRYPT_DATA => {
            let raw = structure!(CK_KEY_DERIVATION_STRING_DATA);
            // SAFETY: valid for its length by the standard.
            Ok(Parameters::Bytes(unsafe { bytes(raw.pData, raw.ulLen) }?))
        }
        CKM_AES_CBC_ENCRYPT_DATA => {
            let raw = structure!(CK_AES_CBC_ENCRYPT_DATA_PARAMS);
            // SAFETY: valid for its length by the standard.
            Ok(Parameters::CbcData { iv: raw.iv, data: unsafe { bytes(raw.pData, raw.length) }? })
        }
        CKM_ECDH1_DERIVE | CKM_ECDH1_COFACTOR_DERIVE => {
            let raw = structure!(CK_ECDH1_DERIVE_PARAMS);
            // SAFETY: valid for its length by the standard.
            let shared = unsafe { bytes(raw.pSharedData, raw.ulSharedDataLen) }?;
            // SAFETY: valid for its length by the standard.
            let public = unsafe { bytes(raw.pPublicData, raw.ulPublicDataLen) }?;
            Ok(Parameters::Ecdh { kdf: raw.kdf, shared, public })
        }
        CKM_RSA_PKCS_OAEP => {
            let raw = structure!(CK_RSA_PKCS_OAEP_PARAMS);
            // SAFETY: valid for its length by the standard.
            let label = unsafe { bytes(raw.pSourceData.cast(), raw.ulSourceDataLen) }?;
            match (Hash::from_mechanism(raw.hashAlg), Hash::from_mask_generator(raw.mgf), raw.source) {
                (Some(hash), Some(mask), CKZ_DATA_SPECIFIED) => Ok(Parameters::Oaep { hash, mask, label }),
                (Some(hash), Some(mask), 0) if label.is_empty() => Ok(Parameters::Oaep { hash, mask, label }),
                _ => fail(CKR_MECHANISM_PARAM_INVALID),
            }
        }
        CKM_RSA_PKCS_PSS
        | CKM_SHA1_RSA_PKCS_PSS
        | CKM_SHA224_RSA_PKCS_PSS
        | CKM_SHA256_RSA_PKCS_PSS
        | CKM_SHA384_RSA_PKCS_PSS
        | CKM_SHA512_RSA_PKCS_PSS => {
            let raw = structure!(CK_RSA_PKCS_PSS_PARAMS);
            match (Hash::from_mechanism(raw.hashAlg), Hash::from_mask_generator(raw.mgf)) {
                (Some(hash), Some(mask)) => Ok(Parameters::Pss { hash, mask, salt: size(raw.sLen)? }),
                _ => fail(CKR_MECHANISM_PARAM_INVALID),
            }
        }
        CKM_SP800_108_COUNTER_KDF => {
            let raw = structure!(CK_SP800_108_KDF_PARAMS);
            // SAFETY: the arrays are valid for their counts by the standard.
            unsafe { counter_kdf(&raw) }
        }
        CKM_HKDF_DERIVE | CKM_HKDF_DATA => {
            let raw = structure!(CK_HKDF_PARAMS);
            let hash = Hash::from_mechanism(raw.prfHashMechanism).ok_or(Rv(CKR_MECHANISM_PARAM_INVALID))?;
            let (extract, expand) = (raw.bExtract != CK_FALSE, raw.bExpand != CK_FALSE);
            let salt = match raw.ulSaltType {
                _ if !extract => Salt::None,
                CKF_HKDF_SALT_NULL => Salt::None,
                // SAFETY: valid for its length by the standard.
                CKF_HKDF_SALT_DATA => Salt::Data(unsafe { bytes(raw.pSalt, raw.ulSaltLen) }?),
                CKF_HKDF_SALT_KEY => Salt::Key(raw.hSaltKey),
                _ => return fail(CKR_MECHANISM_PARAM_INVALID),
            };
            if !extract && !expand {
                return fail(CKR_MECHANISM_PARAM_INVALID);
            }
            // SAFETY: valid for its length by the standard.
            Ok(Parameters::Hkdf { extract, expand, hash, salt, info: unsafe { bytes(raw.pInfo, raw.ulInfoLen) }? })
        }
        // Whoever is asked for it will say that there is no such mechanism.
        unknown if mechanism::info(unknown).is_none() => Ok(Parameters::None),
        // No other mechanism of this module has parameters.
        _ => exact(0).map(|()| Parameters::None),
    }
}

/// Where the handles of additional derived keys go.
pub(super) unsafe fn additional_handles(pointer: *const CK_MECHANISM) -> Result<Vec<*mut CK_OBJECT_HANDLE>> {
    // SAFETY: as for this function: the mechanism was read before, with all checks.
    let raw = unsafe { read(pointer) }?;
    if raw.mechanism != CKM_SP800_108_COUNTER_KDF {
        return Ok(Vec::new());
    }
    // SAFETY: as above.
    let raw: CK_SP800_108_KDF_PARAMS = unsafe { read(raw.pParameter.cast()) }?;
    // SAFETY: within the count that the caller gave, which was checked.
    (0..size(raw.ulAdditionalDerivedKeys)?)
        .map(|place| Ok(unsafe { read(raw.pAdditionalDerivedKeys.add(place)) }?.phKey))
        .collect()
}

unsafe fn counter_kdf<'a>(raw: &CK_SP800_108_KDF_PARAMS) -> Result<Parameters<'a>> {
    let invalid = Rv(CKR_MECHANISM_PARAM_INVALID);
    let count = |count: CK_ULONG, null: bool| {
        let count = size(count)?;
        if count > MAX_PARTS || (null && count > 0) { Err(invalid) } else { Ok(count) }
    };
    let mut fields = Vec::new();
    for place in 0..count(raw.ulNumberOfDataParams, raw.pDataParams.is_null())? {
        // SAFETY: within the count that the caller gave.
        let part = unsafe { read(raw.pDataParams.add(place)) }?;
        // SAFETY: valid for its length by the standard.
        let value = unsafe { bytes(part.pValue.cast(), part.ulValueLen) }?;
        fields.push(match part.type_ {
            CK_SP800_108_ITERATION_VARIABLE => {
                if value.len() != size_of::<CK_SP800_108_COUNTER_FORMAT>() {
                    return Err(invalid);
                }
                // SAFETY: the value has the length of the structure.
                let format: CK_SP800_108_COUNTER_FORMAT = unsafe { read(part.pValue.cast()) }?;
                if !matches!(format.ulWidthInBits, 8 | 16 | 24 | 32) {
                    return Err(invalid);
                }
                Field::Counter(integer(format.ulWidthInBits, format.bLittleEndian)?)
            }
            CK_SP800_108_DKM_LENGTH => {
                if value.len() != size_of::<CK_SP800_108_DKM_LENGTH_FORMAT>() {
                    return Err(invalid);
                }
                // SAFETY: the value has the length of the structure.
                let format: CK_SP800_108_DKM_LENGTH_FORMAT = unsafe { read(part.pValue.cast()) }?;
                let of = match format.dkmLengthMethod {
                    CK_SP800_108_DKM_LENGTH_SUM_OF_KEYS => LengthOf::Keys,
                    CK_SP800_108_DKM_LENGTH_SUM_OF_SEGMENTS => LengthOf::Segments,
                    _ => return Err(invalid),
                };
                Field::Length(integer(format.ulWidthInBits, format.bLittleEndian)?, of)
            }
            CK_SP800_108_BYTE_ARRAY => Field::Bytes(value.to_vec()),
            _ => return Err(invalid),
        });
    }
    let mut additional = Vec::new();
    for place in 0..count(raw.ulAdditionalDerivedKeys, raw.pAdditionalDerivedKeys.is_null())? {
        // SAFETY: within the count that the caller gave.
        let key = unsafe { read(raw.pAdditionalDerivedKeys.add(place)) }?;
        if key.phKey.is_null() {
            return Err(invalid);
        }
        // SAFETY: valid for its count by the standard.
        additional.push(unsafe { template(key.pTemplate, key.ulAttributeCount) }?);
    }
    Ok(Parameters::CounterKdf { prf: raw.prfType, fields, additional })
}

fn integer(bits: CK_ULONG, little_endian: CK_BBOOL) -> Result<Integer> {
    match (bits, usize::try_from(bits / 8)) {
        (8 | 16 | 24 | 32 | 40 | 48 | 56 | 64, Ok(width)) => {
            Ok(Integer { width, little_endian: little_endian != CK_FALSE })
        }
        _ => fail(CKR_MECHANISM_PARAM_INVALID),
    }
}

/// More parts than any real derivation has.
const MAX_PARTS: usize = 256;
