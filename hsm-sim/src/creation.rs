//! Objects as they enter the token, change and leave it: C_CreateObject, C_CopyObject,
//! C_SetAttributeValue, C_DestroyObject. The rules for every new object are here, too: its flags,
//! its lengths, and which nested templates it has to fit.

use std::sync::Arc;

use cryptoki_sys::*;

use crate::attribute::{Flags, MAY_CREATE, Shape};
use crate::buffer::Buffer;
use crate::crypto::ec::{Curve, EcPrivate, EcPublic};
use crate::crypto::rsa::{RsaPrivate, RsaPublic};
use crate::error::{Result, Rv, fail};
use crate::object::{Material, NO_KEY_TYPE, Object, Secret, check_value};
use crate::session::Session;
use crate::template::{Draft, Item, Nested, Template, Value, check_change, truth};
use crate::token::Login;

/// The origin of a new object. It decides the attributes that the token sets.
pub(crate) enum Birth {
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

    /// Refuses a new object before its key is made.
    pub(crate) fn check_new(&self, draft: &Draft<'_>) -> Result<()> {
        if draft.flag(Flags::TRUSTED, false) && self.token.login_state() != Login::SecurityOfficer {
            return fail(CKR_ATTRIBUTE_READ_ONLY);
        }
        let private = Flags::PRIVATE.set(Flags::PRIVATE, draft.flag(Flags::PRIVATE, private_by_default(draft.class)));
        self.check_write(private.set(Flags::TOKEN, draft.flag(Flags::TOKEN, false)))
    }

    pub(crate) fn build(
        &self,
        draft: &Draft<'_>,
        key_type: CK_KEY_TYPE,
        material: Material,
        birth: &Birth,
    ) -> Result<Object> {
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
                // Stored with the key itself, or as a field of the object.
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

/// The template together with `CKA_UNWRAP_TEMPLATE` or `CKA_DERIVE_TEMPLATE` of the other key. They
/// must agree.
pub(crate) fn merge<'a>(template: &[Item<'a>], nested: &'a Nested) -> Result<Template<'a>> {
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

pub(crate) fn is_secret(key_type: CK_KEY_TYPE) -> bool {
    key_type == CKK_AES || is_generic(key_type)
}

/// Key types of secret keys that may have any length.
pub(crate) fn is_generic(key_type: CK_KEY_TYPE) -> bool {
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

pub(crate) fn length_fits(key_type: CK_KEY_TYPE, length: usize) -> bool {
    if key_type == CKK_AES { matches!(length, 16 | 24 | 32) } else { (1..=MAX_SECRET).contains(&length) }
}

/// Keys and data are private unless the template says otherwise. Public keys and certificates are
/// not.
fn private_by_default(class: CK_OBJECT_CLASS) -> bool {
    !matches!(class, CKO_PUBLIC_KEY | CKO_CERTIFICATE)
}

/// Flags that are set unless the template says otherwise. The classes that lack one never show it.
const DEFAULTS: Flags =
    Flags::MODIFIABLE.with(Flags::COPYABLE).with(Flags::DESTROYABLE).with(Flags::SENSITIVE).with(USAGES);

/// The usages of a key. Derivation is not a default.
const USAGES: Flags = Flags::ENCRYPT
    .with(Flags::DECRYPT)
    .with(Flags::SIGN)
    .with(Flags::SIGN_RECOVER)
    .with(Flags::VERIFY)
    .with(Flags::VERIFY_RECOVER)
    .with(Flags::WRAP)
    .with(Flags::UNWRAP);

/// The longest secret key in bytes.
pub(crate) const MAX_SECRET: usize = 4096;
