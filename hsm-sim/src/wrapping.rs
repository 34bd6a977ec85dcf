//! Keys under other keys: C_WrapKey and C_UnwrapKey.

use cryptoki_sys::*;

use crate::attribute::{Flags, MAY_UNWRAP};
use crate::buffer::{Buffer, Output, Room};
use crate::cipher;
use crate::creation::{Birth, is_secret, length_fits, merge};
use crate::crypto::aes::BLOCK;
use crate::crypto::ec::EcPrivate;
use crate::crypto::gcm::{Gcm, tag_length};
use crate::crypto::rsa::{Padding, RsaPrivate};
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters};
use crate::object::{Material, Object, Secret};
use crate::session::Session;
use crate::template::{Draft, Item};

impl Session {
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
                    // ECB and CBC fill up with zeros. Only there can the key be shorter than the
                    // wrapped data.
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
