//! Making objects: create, copy, generate, wrap, unwrap, derive.

use std::sync::Arc;

use cryptoki_sys::*;

use crate::attribute::{Flags, MAY_CREATE, MAY_GENERATE, MAY_UNWRAP, Shape};
use crate::buffer::{Buffer, Output, Room};
use crate::cipher;
use crate::crypto::aes::BLOCK;
use crate::crypto::digest::Hash;
use crate::crypto::ec::{Curve, EcPrivate, EcPublic, raw_point};
use crate::crypto::gcm::{Gcm, tag_length};
use crate::crypto::kdf::{self, Prf};
use crate::crypto::random;
use crate::crypto::rsa::{Padding, RsaPrivate, RsaPublic};
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters, Salt};
use crate::object::{Material, NO_KEY_TYPE, Object, Secret, check_value};
use crate::session::Session;
use crate::template::{Draft, Item, Nested, Template, Value, check_change, truth};
use crate::token::Login;

/// Where a new object comes from: it decides what the token says about it.
enum Birth {
    /// C_CreateObject or C_UnwrapKey: the key was outside.
    Foreign,
    /// C_GenerateKey or C_GenerateKeyPair.
    Generated(CK_MECHANISM_TYPE),
    /// C_DeriveKey, from a key with these flags.
    Derived(Flags),
}

impl Session {
    /// C_CreateObject.
    pub(crate) fn create_object(&self, template: &[Item<'_>]) -> Result<CK_OBJECT_HANDLE> {
        let draft = Draft::new(template, None, MAY_CREATE)?;
        self.check_new(&draft)?;
        let (key_type, material) = self.given_material(&draft)?;
        let object = self.build(&draft, key_type, material, &Birth::Foreign)?;
        self.add(object)
    }

    /// C_CopyObject.
    pub(crate) fn copy_object(&self, handle: CK_OBJECT_HANDLE, template: &[Item<'_>]) -> Result<CK_OBJECT_HANDLE> {
        let old = self.object(handle, CKR_OBJECT_HANDLE_INVALID)?;
        if !old.flags.has(Flags::COPYABLE) {
            return fail(CKR_ACTION_PROHIBITED);
        }
        let new = self.changed(&old, template, true)?;
        // A private object must not become public by copying.
        if old.flags.has(Flags::PRIVATE) && !new.flags.has(Flags::PRIVATE) {
            return fail(CKR_TEMPLATE_INCONSISTENT);
        }
        self.add(new)
    }

    /// C_DestroyObject.
    pub(crate) fn destroy_object(&self, handle: CK_OBJECT_HANDLE) -> Result<()> {
        let object = self.object(handle, CKR_OBJECT_HANDLE_INVALID)?;
        self.check_write(object.flags)?;
        if !object.flags.has(Flags::DESTROYABLE) {
            return fail(CKR_ACTION_PROHIBITED);
        }
        self.remove(&object)
    }

    /// C_SetAttributeValue: all of the template or nothing.
    pub(crate) fn set_attributes(&self, handle: CK_OBJECT_HANDLE, template: &[Item<'_>]) -> Result<()> {
        self.token.refresh()?;
        let old = self.object_to_change(handle, CKR_OBJECT_HANDLE_INVALID)?;
        self.check_write(old.flags)?;
        if !old.flags.has(Flags::MODIFIABLE) {
            return fail(CKR_ACTION_PROHIBITED);
        }
        let new = self.changed(&old, template, false)?;
        self.token.change(&old, new)
    }

    /// C_GenerateKey.
    pub(crate) fn generate_key(&self, mechanism: &Mechanism<'_>, template: &[Item<'_>]) -> Result<CK_OBJECT_HANDLE> {
        if !matches!(mechanism.parameters, Parameters::None) {
            return fail(CKR_MECHANISM_PARAM_INVALID);
        }
        let (key_type, default) = match mechanism.kind {
            CKM_AES_KEY_GEN => (CKK_AES, None),
            CKM_GENERIC_SECRET_KEY_GEN => (CKK_GENERIC_SECRET, None),
            CKM_HKDF_KEY_GEN => (CKK_HKDF, None),
            CKM_SHA_1_KEY_GEN => (CKK_SHA_1_HMAC, Some(Hash::Sha1)),
            CKM_SHA224_KEY_GEN => (CKK_SHA224_HMAC, Some(Hash::Sha224)),
            CKM_SHA256_KEY_GEN => (CKK_SHA256_HMAC, Some(Hash::Sha256)),
            CKM_SHA384_KEY_GEN => (CKK_SHA384_HMAC, Some(Hash::Sha384)),
            CKM_SHA512_KEY_GEN => (CKK_SHA512_HMAC, Some(Hash::Sha512)),
            _ => return fail(CKR_MECHANISM_INVALID),
        };
        let draft = Draft::new(template, Some(CKO_SECRET_KEY), MAY_GENERATE)?;
        let given = draft.number(CKA_KEY_TYPE)?;
        // The key generation for generic secrets also makes keys that are used with HMAC.
        let key_type = match given {
            Some(given) if mechanism.kind == CKM_GENERIC_SECRET_KEY_GEN && is_generic(given) => given,
            Some(given) if given != key_type => return fail(CKR_TEMPLATE_INCONSISTENT),
            _ => key_type,
        };
        let length = match (draft.number(CKA_VALUE_LEN)?, default) {
            (Some(length), _) => usize::try_from(length).map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?,
            (None, Some(hash)) => hash.length(),
            (None, None) => return fail(CKR_TEMPLATE_INCOMPLETE),
        };
        if !length_fits(key_type, length) {
            return fail(CKR_ATTRIBUTE_VALUE_INVALID);
        }
        // What can be refused is refused before the key is made.
        self.check_new(&draft)?;
        let mut value = Buffer::zeros(length);
        random(&mut value)?;
        let object =
            self.build(&draft, key_type, Material::Secret(Secret::new(value)), &Birth::Generated(mechanism.kind))?;
        self.add(object)
    }

    /// C_GenerateKeyPair: the public and the private key.
    pub(crate) fn generate_key_pair(
        &self,
        mechanism: &Mechanism<'_>,
        public: &[Item<'_>],
        private: &[Item<'_>],
    ) -> Result<(CK_OBJECT_HANDLE, CK_OBJECT_HANDLE)> {
        if !matches!(mechanism.parameters, Parameters::None) {
            return fail(CKR_MECHANISM_PARAM_INVALID);
        }
        let key_type = match mechanism.kind {
            CKM_EC_KEY_PAIR_GEN => CKK_EC,
            CKM_RSA_PKCS_KEY_PAIR_GEN => CKK_RSA,
            _ => return fail(CKR_MECHANISM_INVALID),
        };
        let public = Draft::new(public, Some(CKO_PUBLIC_KEY), MAY_GENERATE)?;
        let private = Draft::new(private, Some(CKO_PRIVATE_KEY), MAY_GENERATE)?;
        for draft in [&public, &private] {
            if draft.number(CKA_KEY_TYPE)?.is_some_and(|given| given != key_type) {
                return fail(CKR_TEMPLATE_INCONSISTENT);
            }
            self.check_new(draft)?;
        }
        let (public_material, private_material) = if key_type == CKK_EC {
            let curve = Curve::from_parameters(public.required(CKA_EC_PARAMS)?)?;
            let (key, point) = EcPrivate::generate(curve)?;
            (Material::EcPublic(Box::new(EcPublic::new(curve, &point)?)), Material::EcPrivate(Box::new(key)))
        } else {
            let bits = public.number(CKA_MODULUS_BITS)?.ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?;
            let (key, public_key) = RsaPrivate::generate(bits, public.bytes(CKA_PUBLIC_EXPONENT))?;
            (Material::RsaPublic(Box::new(public_key)), Material::RsaPrivate(Box::new(key)))
        };
        let birth = Birth::Generated(mechanism.kind);
        let mut public_key = self.build(&public, key_type, public_material, &birth)?;
        let mut private_key = self.build(&private, key_type, private_material, &birth)?;
        if let Material::EcPublic(key) = &*public_key.material {
            let parameters = key.curve.parameters();
            public_key.store(CKA_EC_PARAMS, parameters);
            private_key.store(CKA_EC_PARAMS, parameters);
        }
        // The private key first: should the second write fail, nothing is lost that only the pair
        // would give.
        let private_handle = self.add(private_key)?;
        match self.add(public_key) {
            Ok(public_handle) => Ok((public_handle, private_handle)),
            Err(error) => {
                if let Ok(object) = self.object(private_handle, CKR_OBJECT_HANDLE_INVALID) {
                    let _ = self.remove(&object);
                }
                Err(error)
            }
        }
    }

    /// C_WrapKey.
    pub(crate) fn wrap_key(
        &self,
        mechanism: &Mechanism<'_>,
        wrapping: CK_OBJECT_HANDLE,
        key: CK_OBJECT_HANDLE,
        room: Room,
    ) -> Result<Output> {
        let wrapping = self.object(wrapping, CKR_WRAPPING_KEY_HANDLE_INVALID)?;
        let mut key = self.object(key, CKR_KEY_HANDLE_INVALID)?;
        if key.id.is_some() {
            // Another process may have made this key unextractable.
            self.token.refresh()?;
            key = self.object(key.handle, CKR_KEY_HANDLE_INVALID)?;
        }
        if !wrapping.flags.has(Flags::WRAP) {
            return fail(CKR_KEY_FUNCTION_NOT_PERMITTED);
        }
        wrapping.allows(mechanism.kind)?;
        if !matches!(key.class, CKO_SECRET_KEY | CKO_PRIVATE_KEY) {
            return fail(CKR_KEY_NOT_WRAPPABLE);
        }
        if !key.flags.has(Flags::EXTRACTABLE) {
            return fail(CKR_KEY_UNEXTRACTABLE);
        }
        if key.flags.has(Flags::WRAP_WITH_TRUSTED) && !wrapping.flags.has(Flags::TRUSTED) {
            return fail(CKR_KEY_NOT_WRAPPABLE);
        }
        if wrapping.template(CKA_WRAP_TEMPLATE).is_some_and(|template| !key.matches_nested(template)) {
            return fail(CKR_KEY_HANDLE_INVALID);
        }
        match &*key.material {
            Material::Secret(secret) => wrap_bytes(mechanism, &wrapping, secret.bytes(), room),
            Material::EcPrivate(private) => wrap_bytes(mechanism, &wrapping, &private.to_pkcs8()?, room),
            Material::RsaPrivate(private) => wrap_bytes(mechanism, &wrapping, &private.to_pkcs8()?, room),
            _ => fail(CKR_KEY_NOT_WRAPPABLE),
        }
    }

    /// C_UnwrapKey.
    pub(crate) fn unwrap_key(
        &self,
        mechanism: &Mechanism<'_>,
        unwrapping: CK_OBJECT_HANDLE,
        wrapped: &[u8],
        template: &[Item<'_>],
    ) -> Result<CK_OBJECT_HANDLE> {
        let unwrapping = self.object(unwrapping, CKR_UNWRAPPING_KEY_HANDLE_INVALID)?;
        if !unwrapping.flags.has(Flags::UNWRAP) {
            return fail(CKR_KEY_FUNCTION_NOT_PERMITTED);
        }
        unwrapping.allows(mechanism.kind)?;
        let nested = unwrapping.template(CKA_UNWRAP_TEMPLATE);
        let merged;
        let template = match nested {
            Some(nested) => {
                merged = merge(template, nested)?;
                merged.as_slice()
            }
            None => template,
        };
        let draft = Draft::new(template, None, MAY_UNWRAP)?;
        let key_type = draft.number(CKA_KEY_TYPE)?.ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?;
        self.check_new(&draft)?;
        let mut value = unwrap_bytes(mechanism, &unwrapping, wrapped)?;
        let material = match draft.class {
            CKO_SECRET_KEY => {
                if let Some(length) = draft.number(CKA_VALUE_LEN)? {
                    let length = usize::try_from(length).map_err(|_| Rv(CKR_ATTRIBUTE_VALUE_INVALID))?;
                    // ECB and CBC fill up with zeros: only there can the key be shorter than what
                    // was wrapped.
                    let padded = matches!(mechanism.kind, CKM_AES_ECB | CKM_AES_CBC) && length < value.len();
                    if length != value.len() && !padded {
                        return fail(CKR_TEMPLATE_INCONSISTENT);
                    }
                    value.truncate(length);
                }
                if !is_secret(key_type) {
                    return fail(CKR_TEMPLATE_INCONSISTENT);
                }
                if !length_fits(key_type, value.len()) {
                    return fail(CKR_WRAPPED_KEY_INVALID);
                }
                Material::Secret(Secret::new(value))
            }
            CKO_PRIVATE_KEY if key_type == CKK_EC => Material::EcPrivate(Box::new(EcPrivate::from_pkcs8(&value)?)),
            CKO_PRIVATE_KEY if key_type == CKK_RSA => Material::RsaPrivate(Box::new(RsaPrivate::from_pkcs8(&value)?)),
            _ => return fail(CKR_TEMPLATE_INCONSISTENT),
        };
        let mut object = self.build(&draft, key_type, material, &Birth::Foreign)?;
        if let Material::EcPrivate(key) = &*object.material {
            let parameters = key.curve.parameters();
            object.store(CKA_EC_PARAMS, parameters);
        }
        self.add(object)
    }

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

    /// The key in a C_CreateObject template.
    fn given_material(&self, draft: &Draft<'_>) -> Result<(CK_KEY_TYPE, Material)> {
        if matches!(draft.class, CKO_DATA | CKO_CERTIFICATE) {
            if draft.class == CKO_CERTIFICATE {
                match draft.number(CKA_CERTIFICATE_TYPE)? {
                    Some(CKC_X_509) => {}
                    Some(_) => return fail(CKR_ATTRIBUTE_VALUE_INVALID),
                    None => return fail(CKR_TEMPLATE_INCOMPLETE),
                }
                draft.required(CKA_SUBJECT)?;
                if draft.bytes(CKA_URL).is_none_or(<[u8]>::is_empty) {
                    draft.required(CKA_VALUE)?;
                }
            }
            return Ok((NO_KEY_TYPE, Material::None));
        }
        let key_type = draft.number(CKA_KEY_TYPE)?.ok_or(Rv(CKR_TEMPLATE_INCOMPLETE))?;
        let material = match (draft.class, key_type) {
            (CKO_SECRET_KEY, _) if is_secret(key_type) => {
                let value = draft.required(CKA_VALUE)?;
                if !length_fits(key_type, value.len()) {
                    return fail(CKR_ATTRIBUTE_VALUE_INVALID);
                }
                let secret = Secret::new(Buffer::copy_of(value));
                if draft
                    .bytes(CKA_CHECK_VALUE)
                    .is_some_and(|given| !given.is_empty() && given != check_value(key_type, &secret))
                {
                    return fail(CKR_ATTRIBUTE_VALUE_INVALID);
                }
                Material::Secret(secret)
            }
            (CKO_PRIVATE_KEY, CKK_EC) => {
                let curve = Curve::from_parameters(draft.required(CKA_EC_PARAMS)?)?;
                Material::EcPrivate(Box::new(EcPrivate::from_scalar(curve, draft.required(CKA_VALUE)?)?))
            }
            (CKO_PUBLIC_KEY, CKK_EC) => {
                let curve = Curve::from_parameters(draft.required(CKA_EC_PARAMS)?)?;
                Material::EcPublic(Box::new(EcPublic::new(curve, draft.required(CKA_EC_POINT)?)?))
            }
            (CKO_PRIVATE_KEY, CKK_RSA) => {
                Material::RsaPrivate(Box::new(RsaPrivate::from_components(|kind| draft.bytes(kind))?))
            }
            (CKO_PUBLIC_KEY, CKK_RSA) => {
                let modulus = draft.required(CKA_MODULUS)?;
                Material::RsaPublic(Box::new(RsaPublic::new(modulus, draft.required(CKA_PUBLIC_EXPONENT)?)?))
            }
            _ => return fail(CKR_ATTRIBUTE_VALUE_INVALID),
        };
        Ok((key_type, material))
    }

    /// What can be said against a new object before its key exists.
    fn check_new(&self, draft: &Draft<'_>) -> Result<()> {
        if draft.flag(Flags::TRUSTED, false) && self.token.login_state() != Login::SecurityOfficer {
            return fail(CKR_ATTRIBUTE_READ_ONLY);
        }
        let private = Flags::PRIVATE.set(Flags::PRIVATE, draft.flag(Flags::PRIVATE, private_by_default(draft.class)));
        self.check_write(private.set(Flags::TOKEN, draft.flag(Flags::TOKEN, false)))
    }

    fn build(&self, draft: &Draft<'_>, key_type: CK_KEY_TYPE, material: Material, birth: &Birth) -> Result<Object> {
        self.check_new(draft)?;
        let mut defaults = DEFAULTS.set(Flags::PRIVATE, private_by_default(draft.class));
        if matches!(birth, Birth::Derived(_)) {
            // A derived key can do what its template says and nothing else.
            defaults = Flags(defaults.0 & !USAGES.0);
        }
        let mut flags = Flags(defaults.0 & !draft.given.0 | draft.flags.0);
        if matches!(draft.class, CKO_PRIVATE_KEY | CKO_SECRET_KEY) {
            let sensitive = flags.has(Flags::SENSITIVE);
            let locked_in = !flags.has(Flags::EXTRACTABLE);
            let (always, never) = match birth {
                Birth::Foreign => (false, false),
                Birth::Generated(_) => (sensitive, locked_in),
                Birth::Derived(base) => {
                    (base.has(Flags::ALWAYS_SENSITIVE) && sensitive, base.has(Flags::NEVER_EXTRACTABLE) && locked_in)
                }
            };
            flags = flags.set(Flags::ALWAYS_SENSITIVE, always).set(Flags::NEVER_EXTRACTABLE, never);
        }
        let generated_by = match birth {
            Birth::Generated(mechanism) => {
                flags = flags.with(Flags::LOCAL);
                *mechanism
            }
            _ => CK_UNAVAILABLE_INFORMATION,
        };
        let is_key = key_type != NO_KEY_TYPE;
        let values = draft
            .values
            .iter()
            .filter(|(kind, _)| match *kind {
                // Kept with the key itself, or as a field of the object.
                CKA_CLASS | CKA_KEY_TYPE | CKA_VALUE_LEN | CKA_MODULUS | CKA_MODULUS_BITS | CKA_PUBLIC_EXPONENT
                | CKA_PRIVATE_EXPONENT | CKA_PRIME_1 | CKA_PRIME_2 | CKA_EXPONENT_1 | CKA_EXPONENT_2
                | CKA_COEFFICIENT => false,
                CKA_VALUE => !is_key,
                CKA_EC_POINT => draft.class == CKO_PRIVATE_KEY,
                _ => true,
            })
            .map(|(kind, value)| (*kind, Box::from(*value)))
            .collect();
        Ok(Object {
            handle: 0,
            class: draft.class,
            key_type,
            flags,
            generated_by,
            values,
            templates: draft.templates.clone(),
            material: Arc::new(material),
            session: 0,
            id: None,
        })
    }

    /// `old` with the changes of `template`.
    fn changed(&self, old: &Object, template: &[Item<'_>], copying: bool) -> Result<Object> {
        let mut new = old.clone();
        for item in template {
            let rule = check_change(item, old.class, old.flags, copying)?;
            match (rule.shape, &item.value) {
                (Shape::Flag(bit), _) => {
                    let value = truth(item.plain()?)?;
                    if bit == Flags::TRUSTED
                        && value
                        && !old.flags.has(bit)
                        && self.token.login_state() != Login::SecurityOfficer
                    {
                        return fail(CKR_ATTRIBUTE_READ_ONLY);
                    }
                    new.flags = new.flags.set(bit, value);
                }
                (_, Value::Bytes(bytes)) => new.store(item.kind, bytes),
                (_, Value::Template(_)) => return fail(CKR_ATTRIBUTE_READ_ONLY),
            }
        }
        Ok(new)
    }
}

/// The template together with what `CKA_UNWRAP_TEMPLATE` or `CKA_DERIVE_TEMPLATE` of the other key
/// wants. They must agree.
fn merge<'a>(template: &[Item<'a>], nested: &'a Nested) -> Result<Template<'a>> {
    let mut merged: Template<'a> = template.iter().cloned().collect();
    for (kind, wanted) in nested {
        match template.iter().find(|item| item.kind == *kind) {
            Some(item) if item.plain()? == &**wanted => {}
            Some(_) => return fail(CKR_TEMPLATE_INCONSISTENT),
            None => merged.push(Item::bytes(*kind, wanted)),
        }
    }
    Ok(merged)
}

fn wrap_bytes(mechanism: &Mechanism<'_>, wrapping: &Object, key: &[u8], room: Room) -> Result<Output> {
    let wrong = CKR_WRAPPING_KEY_TYPE_INCONSISTENT;
    let settle = |needed: usize| room.settle(needed);
    let length = key.len();
    match (mechanism.kind, &mechanism.parameters) {
        (CKM_AES_KEY_WRAP, Parameters::None) => {
            let schedule = wrapping.aes(wrong)?;
            if length < 16 || !length.is_multiple_of(8) {
                return fail(CKR_KEY_SIZE_RANGE);
            }
            match settle(length + 8) {
                Some(answer) => Ok(answer),
                None => schedule.cipher.wrap(key).map(Output::Data),
            }
        }
        (CKM_AES_KEY_WRAP_KWP, Parameters::None) => {
            let schedule = wrapping.aes(wrong)?;
            match settle(length.next_multiple_of(8) + 8) {
                Some(answer) => Ok(answer),
                None => schedule.cipher.wrap_padded(key).map(Output::Data),
            }
        }
        (CKM_AES_ECB | CKM_AES_CBC | CKM_AES_CBC_PAD, parameters) => {
            let schedule = wrapping.aes(wrong)?;
            let mut iv = match (mechanism.kind, parameters) {
                (CKM_AES_ECB, Parameters::None) => [0; BLOCK],
                (CKM_AES_CBC | CKM_AES_CBC_PAD, Parameters::Iv(iv)) => *iv,
                _ => return fail(CKR_MECHANISM_PARAM_INVALID),
            };
            let mut out = Buffer::copy_of(key);
            if mechanism.kind == CKM_AES_CBC_PAD {
                cipher::pad(&mut out);
            } else {
                // The standard fills up with zeros.
                out.extend(&Buffer::zeros(length.next_multiple_of(BLOCK) - length));
            }
            if let Some(answer) = settle(out.len()) {
                return Ok(answer);
            }
            if mechanism.kind == CKM_AES_ECB {
                schedule.cipher.ecb(true, &mut out);
            } else {
                schedule.cipher.cbc(true, &mut iv, &mut out);
            }
            Ok(Output::Data(out))
        }
        (CKM_AES_GCM, Parameters::Gcm { iv, aad, tag_bits }) => {
            let schedule = wrapping.aes(wrong)?;
            let tag = tag_length(*tag_bits)?;
            if let Some(answer) = settle(length + tag) {
                return Ok(answer);
            }
            let mut gcm = Gcm::to_encrypt(schedule, iv, aad)?;
            let mut out = Buffer::copy_of(key);
            gcm.encrypt(&mut out)?;
            out.extend(gcm.tag().get(..tag).unwrap_or_default());
            Ok(Output::Data(out))
        }
        (CKM_RSA_PKCS | CKM_RSA_PKCS_OAEP, parameters) => {
            let Material::RsaPublic(public) = &*wrapping.material else { return fail(wrong) };
            let padding = Padding::for_encryption(mechanism.kind, parameters)?;
            if length > public.capacity(&padding) {
                return fail(CKR_KEY_SIZE_RANGE);
            }
            match settle(public.modulus().len()) {
                Some(answer) => Ok(answer),
                None => public.encrypt(&padding, key).map(Output::Data),
            }
        }
        (CKM_AES_KEY_WRAP | CKM_AES_KEY_WRAP_KWP | CKM_AES_GCM, _) => fail(CKR_MECHANISM_PARAM_INVALID),
        _ => fail(CKR_MECHANISM_INVALID),
    }
}

fn unwrap_bytes(mechanism: &Mechanism<'_>, unwrapping: &Object, wrapped: &[u8]) -> Result<Buffer> {
    let wrong = CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT;
    let invalid = Rv(CKR_WRAPPED_KEY_INVALID);
    let range = |fits: bool| if fits { Ok(()) } else { fail(CKR_WRAPPED_KEY_LEN_RANGE) };
    let length = wrapped.len();
    match (mechanism.kind, &mechanism.parameters) {
        (CKM_AES_KEY_WRAP, Parameters::None) => {
            let schedule = unwrapping.aes(wrong)?;
            range(length >= 24 && length.is_multiple_of(8))?;
            schedule.cipher.unwrap(wrapped).ok_or(invalid)
        }
        (CKM_AES_KEY_WRAP_KWP, Parameters::None) => {
            let schedule = unwrapping.aes(wrong)?;
            range(length >= 16 && length.is_multiple_of(8))?;
            schedule.cipher.unwrap_padded(wrapped).ok_or(invalid)
        }
        (CKM_AES_ECB, Parameters::None) => {
            let schedule = unwrapping.aes(wrong)?;
            range(length > 0 && length.is_multiple_of(BLOCK))?;
            let mut out = Buffer::copy_of(wrapped);
            schedule.cipher.ecb(false, &mut out);
            Ok(out)
        }
        (CKM_AES_CBC | CKM_AES_CBC_PAD, Parameters::Iv(iv)) => {
            let schedule = unwrapping.aes(wrong)?;
            range(length > 0 && length.is_multiple_of(BLOCK))?;
            let mut out = Buffer::copy_of(wrapped);
            schedule.cipher.cbc(false, &mut iv.clone(), &mut out);
            if mechanism.kind == CKM_AES_CBC_PAD {
                cipher::unpad(&mut out).map_err(|_| invalid)?;
            }
            Ok(out)
        }
        (CKM_AES_GCM, Parameters::Gcm { iv, aad, tag_bits }) => {
            let schedule = unwrapping.aes(wrong)?;
            let tag = tag_length(*tag_bits)?;
            range(length > tag)?;
            let mut gcm = Gcm::new(&schedule.cipher, schedule.hash(), iv, aad)?;
            let mut out = Buffer::copy_of(wrapped);
            cipher::open(&mut gcm, &mut out, tag).map_err(|_| invalid)?;
            Ok(out)
        }
        (CKM_RSA_PKCS | CKM_RSA_PKCS_OAEP, parameters) => {
            let Material::RsaPrivate(private) = &*unwrapping.material else { return fail(wrong) };
            let padding = Padding::for_encryption(mechanism.kind, parameters)?;
            range(length == private.modulus().len())?;
            private.decrypt(&padding, wrapped, CKR_WRAPPED_KEY_INVALID)
        }
        (CKM_AES_KEY_WRAP | CKM_AES_KEY_WRAP_KWP | CKM_AES_ECB | CKM_AES_CBC | CKM_AES_CBC_PAD | CKM_AES_GCM, _) => {
            fail(CKR_MECHANISM_PARAM_INVALID)
        }
        _ => fail(CKR_MECHANISM_INVALID),
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

/// Key types of secret keys that may have any length.
fn is_generic(key_type: CK_KEY_TYPE) -> bool {
    matches!(
        key_type,
        CKK_GENERIC_SECRET
            | CKK_HKDF
            | CKK_SHA_1_HMAC
            | CKK_SHA224_HMAC
            | CKK_SHA256_HMAC
            | CKK_SHA384_HMAC
            | CKK_SHA512_HMAC
    )
}

fn is_secret(key_type: CK_KEY_TYPE) -> bool {
    key_type == CKK_AES || is_generic(key_type)
}

fn length_fits(key_type: CK_KEY_TYPE, length: usize) -> bool {
    if key_type == CKK_AES { matches!(length, 16 | 24 | 32) } else { (1..=MAX_SECRET).contains(&length) }
}

/// Keys and data are private unless the template says otherwise; what everyone may know is not.
fn private_by_default(class: CK_OBJECT_CLASS) -> bool {
    !matches!(class, CKO_PUBLIC_KEY | CKO_CERTIFICATE)
}

/// Flags that are set unless the template says otherwise. The classes that lack one never show it.
const DEFAULTS: Flags =
    Flags::MODIFIABLE.with(Flags::COPYABLE).with(Flags::DESTROYABLE).with(Flags::SENSITIVE).with(USAGES);

/// What a key can be used for. Derivation is not among the defaults.
const USAGES: Flags = Flags::ENCRYPT
    .with(Flags::DECRYPT)
    .with(Flags::SIGN)
    .with(Flags::SIGN_RECOVER)
    .with(Flags::VERIFY)
    .with(Flags::VERIFY_RECOVER)
    .with(Flags::WRAP)
    .with(Flags::UNWRAP);

/// The longest secret key in bytes.
const MAX_SECRET: usize = 4096;
