//! Mechanisms that own what their parameters point to.

use std::ptr::null_mut;

use cryptoki_sys::*;

/// A mechanism type and its parameter block. The bytes that the block points to are kept beside it.
pub(crate) struct Mechanism {
    kind: CK_MECHANISM_TYPE,
    block: Vec<u8>,
    kept: Vec<Box<[u8]>>,
}

impl Mechanism {
    /// Without parameters.
    pub(crate) fn plain(kind: CK_MECHANISM_TYPE) -> Self {
        Self::with_bytes(kind, &[])
    }

    /// The parameter is these bytes: an IV, or whatever a hostile caller says.
    pub(crate) fn with_bytes(kind: CK_MECHANISM_TYPE, parameter: &[u8]) -> Self {
        Self { kind, block: parameter.to_vec(), kept: Vec::new() }
    }

    pub(crate) fn with_ulong(kind: CK_MECHANISM_TYPE, value: CK_ULONG) -> Self {
        Self::with_bytes(kind, &value.to_ne_bytes())
    }

    pub(crate) fn gcm(iv: &[u8], aad: &[u8], tag_bits: usize) -> Self {
        Self::build(CKM_AES_GCM, |keep| CK_GCM_PARAMS {
            pIv: keep(iv),
            ulIvLen: iv.len() as CK_ULONG,
            ulIvBits: iv.len() as CK_ULONG * 8,
            pAAD: keep(aad),
            ulAADLen: aad.len() as CK_ULONG,
            ulTagBits: tag_bits as CK_ULONG,
        })
    }

    pub(crate) fn ctr(block: [u8; 16], bits: CK_ULONG) -> Self {
        Self::build(CKM_AES_CTR, |_| CK_AES_CTR_PARAMS { ulCounterBits: bits, cb: block })
    }

    /// `public` as it stands: a raw point or a DER OCTET STRING.
    pub(crate) fn ecdh(kdf: CK_EC_KDF_TYPE, public: &[u8], shared: &[u8]) -> Self {
        Self::build(CKM_ECDH1_DERIVE, |keep| CK_ECDH1_DERIVE_PARAMS {
            kdf,
            ulSharedDataLen: shared.len() as CK_ULONG,
            pSharedData: keep(shared),
            ulPublicDataLen: public.len() as CK_ULONG,
            pPublicData: keep(public),
        })
    }

    pub(crate) fn ecb_data(data: &[u8]) -> Self {
        Self::build(CKM_AES_ECB_ENCRYPT_DATA, |keep| CK_KEY_DERIVATION_STRING_DATA {
            pData: keep(data),
            ulLen: data.len() as CK_ULONG,
        })
    }

    pub(crate) fn cbc_data(iv: [u8; 16], data: &[u8]) -> Self {
        Self::build(CKM_AES_CBC_ENCRYPT_DATA, |keep| CK_AES_CBC_ENCRYPT_DATA_PARAMS {
            iv,
            pData: keep(data),
            length: data.len() as CK_ULONG,
        })
    }

    /// SP 800-108, counter of `bits` before `fixed`, big-endian.
    pub(crate) fn sp800_108(prf: CK_MECHANISM_TYPE, bits: CK_ULONG, fixed: &[u8]) -> Self {
        Self::build(CKM_SP800_108_COUNTER_KDF, |keep| {
            let counter = CK_SP800_108_COUNTER_FORMAT { bLittleEndian: CK_FALSE, ulWidthInBits: bits };
            let fields = [
                CK_PRF_DATA_PARAM {
                    type_: CK_SP800_108_ITERATION_VARIABLE,
                    pValue: keep(&bytes_of(&counter)).cast(),
                    ulValueLen: size_of_val(&counter) as CK_ULONG,
                },
                CK_PRF_DATA_PARAM {
                    type_: CK_SP800_108_BYTE_ARRAY,
                    pValue: keep(fixed).cast(),
                    ulValueLen: fixed.len() as CK_ULONG,
                },
            ];
            CK_SP800_108_KDF_PARAMS {
                prfType: prf,
                ulNumberOfDataParams: 2,
                pDataParams: keep(&bytes_of(&fields)).cast(),
                ulAdditionalDerivedKeys: 0,
                pAdditionalDerivedKeys: null_mut(),
            }
        })
    }

    pub(crate) fn hkdf(extract: bool, expand: bool, hash: CK_MECHANISM_TYPE, salt: Option<&[u8]>, info: &[u8]) -> Self {
        Self::build(CKM_HKDF_DERIVE, |keep| CK_HKDF_PARAMS {
            bExtract: u8::from(extract),
            bExpand: u8::from(expand),
            prfHashMechanism: hash,
            ulSaltType: if salt.is_some() { CKF_HKDF_SALT_DATA } else { CKF_HKDF_SALT_NULL },
            pSalt: salt.map_or(null_mut(), &mut *keep),
            ulSaltLen: salt.map_or(0, |salt| salt.len() as CK_ULONG),
            hSaltKey: 0,
            pInfo: keep(info),
            ulInfoLen: info.len() as CK_ULONG,
        })
    }

    pub(crate) fn oaep(hash: CK_MECHANISM_TYPE, mask: CK_RSA_PKCS_MGF_TYPE, label: &[u8]) -> Self {
        Self::build(CKM_RSA_PKCS_OAEP, |keep| CK_RSA_PKCS_OAEP_PARAMS {
            hashAlg: hash,
            mgf: mask,
            source: CKZ_DATA_SPECIFIED,
            pSourceData: keep(label).cast(),
            ulSourceDataLen: label.len() as CK_ULONG,
        })
    }

    pub(crate) fn pss(
        kind: CK_MECHANISM_TYPE,
        hash: CK_MECHANISM_TYPE,
        mask: CK_RSA_PKCS_MGF_TYPE,
        salt: usize,
    ) -> Self {
        Self::build(kind, |_| CK_RSA_PKCS_PSS_PARAMS { hashAlg: hash, mgf: mask, sLen: salt as CK_ULONG })
    }

    /// The same parameters under another mechanism type.
    pub(crate) fn with_kind(mut self, kind: CK_MECHANISM_TYPE) -> Self {
        self.kind = kind;
        self
    }

    /// The structure for one C call; valid while `self` is.
    pub(crate) fn raw(&self) -> CK_MECHANISM {
        CK_MECHANISM {
            mechanism: self.kind,
            pParameter: if self.block.is_empty() { null_mut() } else { self.block.as_ptr().cast_mut().cast() },
            ulParameterLen: self.block.len() as CK_ULONG,
        }
    }

    /// `make` builds the parameter structure; what it points to it gives to `keep`, which returns
    /// where that is.
    fn build<T: Copy>(kind: CK_MECHANISM_TYPE, make: impl FnOnce(&mut dyn FnMut(&[u8]) -> *mut u8) -> T) -> Self {
        let mut kept: Vec<Box<[u8]>> = Vec::new();
        let block = make(&mut |bytes: &[u8]| {
            if bytes.is_empty() {
                return null_mut();
            }
            kept.push(bytes.into());
            kept.last_mut().map_or(null_mut(), |bytes| bytes.as_mut_ptr())
        });
        Self { kind, block: bytes_of(&block), kept }
    }
}

/// The bytes of a C structure, padding as zeros where the compiler left it so.
fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    let mut bytes = vec![0_u8; size_of::<T>()];
    // SAFETY: source and target are valid for so many bytes; a C structure of plain data may be
    // copied bytewise.
    unsafe { std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), bytes.as_mut_ptr(), bytes.len()) };
    bytes
}
