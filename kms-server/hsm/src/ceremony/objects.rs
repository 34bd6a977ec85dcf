//! The token objects of an island and their attributes: roots, and key pairs for signing and for
//! transport.

use cryptoki_sys::*;
use kms_domain::{IslandName, KeyClass, KeyDerivation};

use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::public_key::P256_OID;
use crate::raw::{Attribute, Object, Session};
use crate::template::Template;
use crate::worker::find_one;

/// Calls `make` with all attributes of a root but EXTRACTABLE, WRAP_WITH_TRUSTED and VALUE_LEN.
pub(super) fn with_root_template<R>(
    key: TokenKey,
    label: &str,
    id: &[u8],
    capabilities: &Capabilities,
    make: impl FnOnce(Template<'_>) -> R,
) -> R {
    let sensitive_only = [Attribute::flag(CKA_SENSITIVE, true)];
    // I1: GAKs and secrets may be read as session objects for one call, so their roots have no such
    // template; all others have.
    let class_is_read = |class| class == KeyClass::Authentication;
    let (usages, mechanisms): (&[CK_ATTRIBUTE_TYPE], &[CK_MECHANISM_TYPE]) = match key.purpose {
        Purpose::Diversification(_) if capabilities.key_derivation() == Some(KeyDerivation::Sp800108Cmac) => {
            (&[CKA_DERIVE], &[CKM_SP800_108_COUNTER_KDF])
        }
        Purpose::Diversification(_) => (&[CKA_DERIVE], &[CKM_AES_CBC_ENCRYPT_DATA]),
        Purpose::StorageKek(_) => (&[CKA_WRAP, CKA_UNWRAP], &[CKM_AES_KEY_WRAP]),
        Purpose::FingerprintKek => (&[CKA_WRAP], &[CKM_AES_KEY_WRAP]),
        _ => (&[CKA_SIGN], &[CKM_SHA256_HMAC]),
    };
    let mut template = Template::empty()
        .number(CKA_CLASS, &CKO_SECRET_KEY)
        .number(CKA_KEY_TYPE, if key.purpose == Purpose::Seal { &CKK_GENERIC_SECRET } else { &CKK_AES })
        .flag(CKA_TOKEN, true)
        .flag(CKA_PRIVATE, true)
        .flag(CKA_SENSITIVE, true)
        .octets(CKA_LABEL, label.as_bytes())
        .octets(CKA_ID, id)
        .usage(usages);
    if capabilities.allowed_mechanisms {
        template = template.with(Attribute::numbers(CKA_ALLOWED_MECHANISMS, mechanisms));
    }
    match key.purpose {
        Purpose::StorageKek(class) if capabilities.unwrap_template && !class_is_read(class) => {
            template = template.with(Attribute::template(CKA_UNWRAP_TEMPLATE, &sensitive_only))
        }
        Purpose::Diversification(class) if capabilities.derive_template && !class_is_read(class) => {
            template = template.with(Attribute::template(CKA_DERIVE_TEMPLATE, &sensitive_only))
        }
        _ => {}
    }
    make(template)
}

/// Finds or makes a P-256 signing key pair: the public key.
pub(super) fn p256_pair(session: &Session, island: &IslandName, key: TokenKey) -> Result<Object, HsmError> {
    find_or_make_pair(session, island, key, |label, id| {
        let public = public_template(label, id).octets(CKA_EC_PARAMS, P256_OID).flag(CKA_VERIFY, true);
        let private = private_template(label, id).private_usage(&[CKA_SIGN]);
        session.generate_pair(CKM_EC_KEY_PAIR_GEN, public.as_slice(), private.as_slice())
    })
}

/// Finds or makes an RSA-3072 unwrapping key pair: the public key.
pub(super) fn rsa_pair(session: &Session, island: &IslandName, key: TokenKey) -> Result<Object, HsmError> {
    let bits = 3072 as CK_ULONG;
    find_or_make_pair(session, island, key, |label, id| {
        let public = public_template(label, id)
            .number(CKA_MODULUS_BITS, &bits)
            .octets(CKA_PUBLIC_EXPONENT, &[1, 0, 1])
            .flag(CKA_WRAP, true)
            .flag(CKA_ENCRYPT, false)
            .flag(CKA_VERIFY, false);
        let private = private_template(label, id).private_usage(&[CKA_UNWRAP]);
        session.generate_pair(CKM_RSA_PKCS_KEY_PAIR_GEN, public.as_slice(), private.as_slice())
    })
}

fn find_or_make_pair(
    session: &Session,
    island: &IslandName,
    key: TokenKey,
    make: impl FnOnce(&str, &[u8]) -> Result<(Object, Object), HsmError>,
) -> Result<Object, HsmError> {
    let (label, id) = (key.label(island), key.id(island));
    match (find_one(session, &label, CKO_PUBLIC_KEY), find_one(session, &label, CKO_PRIVATE_KEY)) {
        (Ok(public), Ok(_)) => Ok(public),
        (Err(HsmError::KeyMissing { .. }), Err(HsmError::KeyMissing { .. })) => {
            make(&label, &id).map(|(public, _)| public)
        }
        (Err(HsmError::KeyMissing { .. }), Ok(_)) | (Ok(_), Err(HsmError::KeyMissing { .. })) => {
            Err(HsmError::Ceremony {
                reason: format!("only one half of the key pair `{label}` is in the token"),
                next_step: "remove that object (it was left by an interrupted ceremony) and run the ceremony again"
                    .to_owned(),
            })
        }
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

fn public_template<'a>(label: &'a str, id: &'a [u8]) -> Template<'a> {
    Template::empty()
        .flag(CKA_TOKEN, true)
        .flag(CKA_PRIVATE, false)
        .octets(CKA_LABEL, label.as_bytes())
        .octets(CKA_ID, id)
}

fn private_template<'a>(label: &'a str, id: &'a [u8]) -> Template<'a> {
    Template::empty()
        .flag(CKA_TOKEN, true)
        .flag(CKA_PRIVATE, true)
        .sensitive(false)
        .flag(CKA_MODIFIABLE, false)
        .octets(CKA_LABEL, label.as_bytes())
        .octets(CKA_ID, id)
}
