//! Keys from other keys: C_DeriveKey.

use cryptoki_sys::*;

use crate::attribute::{Flags, MAY_UNWRAP};
use crate::buffer::Buffer;
use crate::creation::{Birth, MAX_SECRET, is_secret, length_fits, merge};
use crate::crypto::aes::BLOCK;
use crate::crypto::digest::Hash;
use crate::crypto::ec::raw_point;
use crate::crypto::kdf::{self, Prf};
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters, Salt};
use crate::object::{Material, NO_KEY_TYPE, Object, Secret};
use crate::session::Session;
use crate::template::{Draft, Item, Template};

impl Session {
    /// C_DeriveKey. More than one key comes from SP800_108_COUNTER_KDF with additional keys.
    pub(crate) fn derive_key(
        &self,
        mechanism: &Mechanism<'_>,
        base: CK_OBJECT_HANDLE,
        template: &[Item<'_>],
    ) -> Result<Vec<CK_OBJECT_HANDLE>> {
        let base = self.object(base, CKR_KEY_HANDLE_INVALID)?;
        if !base.flags.has(Flags::DERIVE) {
            return fail(CKR_KEY_FUNCTION_NOT_PERMITTED);
        }
        base.allows(mechanism.kind)?;
        let nested = base.template(CKA_DERIVE_TEMPLATE);
        let none = Vec::new();
        let templates = match &mechanism.parameters {
            Parameters::CounterKdf { additional, .. } => additional.as_slice(),
            _ => &[],
        };
        let mut merged = vec![merge(template, nested.unwrap_or(&none))?];
        for template in templates {
            merged.push(merge(template, nested.unwrap_or(&none))?);
        }
        let implied = if mechanism.kind == CKM_HKDF_DATA { CKO_DATA } else { CKO_SECRET_KEY };
        let mut plans = Vec::with_capacity(merged.len());
        for template in &merged {
            // HKDF_DATA makes a data object, whose length the template still has to say.
            let length_item = template.iter().find(|item| item.kind == CKA_VALUE_LEN && implied == CKO_DATA);
            let without: Template<'_> =
                template.iter().filter(|item| length_item.is_none() || item.kind != CKA_VALUE_LEN).cloned().collect();
            let draft = Draft::new(&without, Some(implied), MAY_UNWRAP)?;
            let length = match length_item {
                Some(item) => Some(crate::template::number(item.plain()?)?),
                None => draft.number(CKA_VALUE_LEN)?,
            };
            let length = length.map(usize::try_from).transpose().map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
            let key_type = if implied == CKO_DATA {
                NO_KEY_TYPE
            } else {
                draft.number(CKA_KEY_TYPE)?.unwrap_or(CKK_GENERIC_SECRET)
            };
            if implied == CKO_SECRET_KEY && !is_secret(key_type) {
                return fail(CKR_TEMPLATE_INCONSISTENT);
            }
            if length.is_some_and(|length| {
                length > MAX_SECRET || (implied == CKO_SECRET_KEY && !length_fits(key_type, length))
            }) {
                return fail(CKR_ATTRIBUTE_VALUE_INVALID);
            }
            self.check_new(&draft)?;
            plans.push((draft, key_type, length));
        }
        let lengths: Vec<_> = plans.iter().map(|(_, key_type, length)| (*key_type, *length)).collect();
        let values = self.derive_values(mechanism, &base, &lengths)?;
        let mut objects = Vec::with_capacity(plans.len());
        for ((draft, key_type, _), value) in plans.iter().zip(values) {
            let object = if implied == CKO_DATA {
                let mut object = self.build(draft, *key_type, Material::None, &Birth::Foreign)?;
                object.store(CKA_VALUE, &value);
                object
            } else {
                if !length_fits(*key_type, value.len()) {
                    return fail(CKR_TEMPLATE_INCOMPLETE);
                }
                self.build(draft, *key_type, Material::Secret(Secret::new(value)), &Birth::Derived(base.flags))?
            };
            objects.push(object);
        }
        let mut handles = Vec::with_capacity(objects.len());
        for object in objects {
            match self.add(object) {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    for handle in handles {
                        if let Ok(object) = self.object(handle, CKR_OBJECT_HANDLE_INVALID) {
                            let _ = self.remove(&object);
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(handles)
    }

    fn derive_values(
        &self,
        mechanism: &Mechanism<'_>,
        base: &Object,
        lengths: &[(CK_KEY_TYPE, Option<usize>)],
    ) -> Result<Vec<Buffer>> {
        let wrong = CKR_KEY_TYPE_INCONSISTENT;
        let (_, length) = *lengths.first().ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?;
        // The encrypted data, of which the first bytes are the key.
        let head = |mut data: Buffer| match length {
            Some(length) if length > data.len() => fail(CKR_MECHANISM_PARAM_INVALID),
            Some(length) => {
                data.truncate(length);
                Ok(vec![data])
            }
            None => Ok(vec![data]),
        };
        match (mechanism.kind, &mechanism.parameters) {
            (CKM_AES_ECB_ENCRYPT_DATA, Parameters::Bytes(data)) => {
                check_blocks(data)?;
                let mut data = Buffer::copy_of(data);
                base.aes(wrong)?.cipher.ecb(true, &mut data);
                head(data)
            }
            (CKM_AES_CBC_ENCRYPT_DATA, Parameters::CbcData { iv, data }) => {
                check_blocks(data)?;
                let mut data = Buffer::copy_of(data);
                base.aes(wrong)?.cipher.cbc(true, &mut iv.clone(), &mut data);
                head(data)
            }
            (CKM_ECDH1_DERIVE | CKM_ECDH1_COFACTOR_DERIVE, Parameters::Ecdh { kdf, shared, public }) => {
                let Material::EcPrivate(key) = &*base.material else { return fail(wrong) };
                let secret = key.agree(raw_point(key.curve, public))?;
                ecdh_kdf(*kdf, secret, shared, length).map(|value| vec![value])
            }
            (CKM_SP800_108_COUNTER_KDF, Parameters::CounterKdf { prf, fields, .. }) => {
                let prf = match *prf {
                    CKM_AES_CMAC => Prf::Cmac(Box::new(base.aes(wrong)?.cipher.clone())),
                    kind => {
                        let hash = hash_of_prf(kind).ok_or(Rv(CKR_MECHANISM_PARAM_INVALID))?;
                        let key = aws_lc_rs::hmac::Key::new(hash.hmac_algorithm(), base.secret(wrong)?.bytes());
                        Prf::Hmac(Box::new(key))
                    }
                };
                let wanted: Option<Vec<usize>> = lengths.iter().map(|(_, length)| *length).collect();
                kdf::counter_mode(&prf, fields, &wanted.ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?)
            }
            (CKM_HKDF_DERIVE | CKM_HKDF_DATA, Parameters::Hkdf { extract, expand, hash, salt, info }) => {
                let mut key = Buffer::copy_of(base.secret(wrong)?.bytes());
                if *extract {
                    let object;
                    let zeros = Buffer::zeros(hash.length());
                    let salt = match salt {
                        Salt::None => &*zeros,
                        Salt::Data(salt) => salt,
                        Salt::Key(handle) => {
                            object = self.object(*handle, CKR_KEY_HANDLE_INVALID)?;
                            object.secret(wrong)?.bytes()
                        }
                    };
                    key = kdf::hkdf_extract(*hash, salt, &key);
                }
                if *expand {
                    key = kdf::hkdf_expand(*hash, &key, info, length.ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?)?;
                }
                head(key)
            }
            (
                CKM_AES_ECB_ENCRYPT_DATA
                | CKM_AES_CBC_ENCRYPT_DATA
                | CKM_ECDH1_DERIVE
                | CKM_ECDH1_COFACTOR_DERIVE
                | CKM_SP800_108_COUNTER_KDF
                | CKM_HKDF_DERIVE
                | CKM_HKDF_DATA,
                _,
            ) => fail(CKR_MECHANISM_PARAM_INVALID),
            _ => fail(CKR_MECHANISM_INVALID),
        }
    }
}

fn ecdh_kdf(kdf: CK_EC_KDF_TYPE, mut secret: Buffer, shared: &[u8], length: Option<usize>) -> Result<Buffer> {
    let (hash, x963) = match kdf {
        CKD_NULL => {
            if !shared.is_empty() {
                return fail(CKR_MECHANISM_PARAM_INVALID);
            }
            // PKCS#11 2.40, 2.3.8: bytes are removed from the leading end.
            let surplus = match length {
                None => 0,
                Some(length) => secret.len().checked_sub(length).ok_or(Rv(CKR_DATA_LEN_RANGE))?,
            };
            if surplus > 0 {
                secret = Buffer::copy_of(secret.get(surplus..).unwrap_or_default());
            }
            return Ok(secret);
        }
        CKD_SHA1_KDF => (Hash::Sha1, true),
        CKD_SHA224_KDF => (Hash::Sha224, true),
        CKD_SHA256_KDF => (Hash::Sha256, true),
        CKD_SHA384_KDF => (Hash::Sha384, true),
        CKD_SHA512_KDF => (Hash::Sha512, true),
        CKD_SHA1_KDF_SP800 => (Hash::Sha1, false),
        CKD_SHA224_KDF_SP800 => (Hash::Sha224, false),
        CKD_SHA256_KDF_SP800 => (Hash::Sha256, false),
        CKD_SHA384_KDF_SP800 => (Hash::Sha384, false),
        CKD_SHA512_KDF_SP800 => (Hash::Sha512, false),
        _ => return fail(CKR_MECHANISM_PARAM_INVALID),
    };
    let length = length.unwrap_or(hash.length());
    Ok(if x963 { kdf::x963(hash, &secret, shared, length) } else { kdf::one_step(hash, &secret, shared, length) })
}

fn hash_of_prf(prf: CK_SP800_108_PRF_TYPE) -> Option<Hash> {
    match prf {
        CKM_SHA_1_HMAC => Some(Hash::Sha1),
        CKM_SHA224_HMAC => Some(Hash::Sha224),
        CKM_SHA256_HMAC => Some(Hash::Sha256),
        CKM_SHA384_HMAC => Some(Hash::Sha384),
        CKM_SHA512_HMAC => Some(Hash::Sha512),
        _ => None,
    }
}

fn check_blocks(data: &[u8]) -> Result<()> {
    if !data.is_empty() && data.len().is_multiple_of(BLOCK) { Ok(()) } else { fail(CKR_MECHANISM_PARAM_INVALID) }
}
