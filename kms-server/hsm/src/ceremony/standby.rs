//! A standby token: its transport key, and the copies of roots that it receives.

use aws_lc_rs::digest::{SHA256, digest};
use cryptoki_sys::*;
use kms_domain::{IslandName, OaepHash};

use super::login::{capabilities, find_slot, logged_in};
use super::objects::{rsa_pair, with_root_template};
use super::package::{KeyFingerprint, WrappedRoot, WrappedRoots};
use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::module::{Module, TokenSelector};
use crate::pin::Pin;
use crate::public_key::rsa_public_key_der;
use crate::raw::{Mechanism, Object, Session};
use crate::worker::find_one;

/// Makes the key pair under which a standby token receives roots: DER of its SubjectPublicKeyInfo,
/// for the plan of the ceremony. A second run returns the same key. Blocking; not while the token
/// is in use in this process.
///
/// # Errors
/// The token's.
pub fn create_standby_transport(
    module: &Module,
    token: &TokenSelector,
    user_pin: &Pin,
    island: &IslandName,
) -> Result<Vec<u8>, HsmError> {
    let slot = find_slot(module, token)?;
    logged_in(module, slot, CKU_USER, user_pin, |session| {
        let public = rsa_pair(session, island, TokenKey::first(Purpose::StandbyTransport))?;
        rsa_public_key_der(session, public)?
            .ok_or_else(|| HsmError::invalid("standby transport key", "the token's public key has no modulus"))
    })
}

/// Installs copies of roots in a standby token, locked from the start. Roots that the token holds
/// already stay as they are, if their check values agree. Blocking; not while the token is in use
/// in this process.
///
/// # Errors
/// The copies are for another token or do not unwrap, or the token holds a different root.
pub fn install_wrapped_roots(
    module: &Module,
    token: &TokenSelector,
    user_pin: &Pin,
    island: &IslandName,
    copies: &WrappedRoots,
) -> Result<Vec<KeyFingerprint>, HsmError> {
    let slot = find_slot(module, token)?;
    let (capabilities, _) = capabilities(module, slot, user_pin)?;
    logged_in(module, slot, CKU_USER, user_pin, |session| {
        let transport = TokenKey::first(Purpose::StandbyTransport);
        let public = find_one(session, &transport.label(island), CKO_PUBLIC_KEY)?;
        let own = rsa_public_key_der(session, public)?.unwrap_or_default();
        if digest(&SHA256, &own).as_ref() != copies.recipient_sha256 {
            return Err(HsmError::Ceremony {
                reason: "the copies of roots are for another standby token".to_owned(),
                next_step: "choose the copies whose recipient is the SHA-256 of this token's transport key".to_owned(),
            });
        }
        let private = find_one(session, &transport.label(island), CKO_PRIVATE_KEY)?;
        copies
            .roots
            .iter()
            .map(|root| install_root(session, island, private, copies.oaep_hash, root, &capabilities))
            .collect()
    })
}

fn install_root(
    session: &Session,
    island: &IslandName,
    private: Object,
    hash: OaepHash,
    root: &WrappedRoot,
    capabilities: &Capabilities,
) -> Result<KeyFingerprint, HsmError> {
    let label = root.key.label(island);
    let object = match find_one(session, &label, CKO_SECRET_KEY) {
        Ok(object) => object,
        Err(HsmError::KeyMissing { .. }) => {
            let id = root.key.id(island);
            with_root_template(root.key, &label, &id, capabilities, |template| {
                let mut template = template.flag(CKA_EXTRACTABLE, false);
                if capabilities.wrap_with_trusted {
                    template = template.flag(CKA_WRAP_WITH_TRUSTED, true);
                }
                session.unwrap(&Mechanism::Oaep(hash), private, &root.wrapped, template.as_slice())
            })?
        }
        Err(error) => return Err(error),
    };
    let check_value = session.attribute(object, CKA_CHECK_VALUE)?.map(|value| value.to_vec()).unwrap_or_default();
    if !check_value.is_empty() && !root.check_value.is_empty() && check_value != root.check_value {
        return Err(HsmError::Ceremony {
            reason: format!("the root `{label}` in this token is not the one of the copies (check values differ)"),
            next_step: "remove the object from this token if it was never used, and install again".to_owned(),
        });
    }
    Ok(KeyFingerprint { label, kind: "check value", value: check_value })
}
