//! New random keys: C_GenerateKey and C_GenerateKeyPair.

use cryptoki_sys::*;

use crate::attribute::MAY_GENERATE;
use crate::buffer::Buffer;
use crate::creation::{Birth, is_generic, length_fits};
use crate::crypto::digest::Hash;
use crate::crypto::ec::{Curve, EcPrivate, EcPublic};
use crate::crypto::random;
use crate::crypto::rsa::RsaPrivate;
use crate::error::{Result, Rv, fail};
use crate::mechanism::{Mechanism, Parameters};
use crate::object::{Material, Secret};
use crate::session::Session;
use crate::template::{Draft, Item};

impl Session {
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
        // All refusals come before the key is made.
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
        // The private key first. If the second write fails, the private key is removed, and nothing
        // is lost.
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
}
