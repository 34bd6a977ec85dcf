//! The steps of the ceremony in one logged-in session: make a root, wrap it, lock it, make key
//! pairs. Each step finds what an interrupted run has left.

use aws_lc_rs::digest::{SHA256, digest};
use cryptoki_sys::*;
use kms_domain::{KeyClass, OaepHash};

use super::objects::{p256_pair, rsa_pair, with_root_template};
use super::package::{EscrowPackage, KeyFingerprint, WrappedRoot, WrappedRoots};
use super::plan::CeremonyPlan;
use super::recipients::RsaPublicKey;
use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::public_key::{public_point, rsa_public_key_der};
use crate::raw::{Attribute, Mechanism, Object, Session};
use crate::template::Template;
use crate::worker::find_one;

pub(super) struct Ceremony<'a> {
    pub(super) session: &'a Session,
    pub(super) plan: &'a CeremonyPlan,
    pub(super) capabilities: &'a Capabilities,
    pub(super) oaep_hash: OaepHash,
    /// Whether the recipients' keys are trusted and the module enforces CKA_WRAP_WITH_TRUSTED.
    pub(super) trusted: bool,
}

pub(super) struct Root {
    key: TokenKey,
    object: Object,
    locked: bool,
    pub(super) check_value: Vec<u8>,
}

impl Ceremony<'_> {
    pub(super) fn roots(&self) -> Vec<TokenKey> {
        let mut purposes = Vec::new();
        for class in KeyClass::WITH_ROOTS.into_iter().filter(|class| self.plan.classes.contains(class)) {
            if self.capabilities.key_derivation().is_some() {
                purposes.push(Purpose::Diversification(class));
            }
            purposes.push(Purpose::StorageKek(class));
        }
        if self.plan.general {
            purposes.extend([Purpose::Seal, Purpose::FingerprintKek]);
        }
        purposes.into_iter().map(TokenKey::first).collect()
    }

    /// Finds or makes a root.
    pub(super) fn root(&self, key: TokenKey, previous: Option<&EscrowPackage>) -> Result<Root, HsmError> {
        let label = key.label(&self.plan.island);
        let object = match find_one(self.session, &label, CKO_SECRET_KEY) {
            Ok(object) => object,
            Err(HsmError::KeyMissing { .. }) => {
                let octets = ROOT_OCTETS;
                let id = key.id(&self.plan.island);
                let mechanism = if key.purpose == Purpose::Seal { CKM_GENERIC_SECRET_KEY_GEN } else { CKM_AES_KEY_GEN };
                with_root_template(key, &label, &id, self.capabilities, |template| {
                    let template = template
                        .flag(CKA_EXTRACTABLE, true)
                        .flag(CKA_WRAP_WITH_TRUSTED, self.trusted)
                        .number(CKA_VALUE_LEN, &octets);
                    self.session.generate(mechanism, template.as_slice())
                })?
            }
            Err(error) => return Err(error),
        };
        let locked = self.session.flag(object, CKA_EXTRACTABLE)? == Some(false);
        let escrowed = previous.is_some_and(|package| package.escrow.roots.iter().any(|root| root.key == key));
        if locked && !escrowed {
            return Err(HsmError::Ceremony {
                reason: format!("the root `{label}` is locked, and no escrow package that was given holds it, so it can never be escrowed"),
                next_step: "give the package that the earlier ceremony stored; if there is none, remove this root (or wipe the token, if no key was made from it) and run the ceremony again".to_owned(),
            });
        }
        let check_value =
            self.session.attribute(object, CKA_CHECK_VALUE)?.map(|value| value.to_vec()).unwrap_or_default();
        Ok(Root { key, object, locked, check_value })
    }

    /// Wraps the roots that one recipient gets. A root that is locked already is taken from the
    /// stored package. The recipients are the escrow key, which gets all roots, and then the
    /// standby tokens in the order of the plan.
    pub(super) fn wrap_all(
        &self,
        recipient: TokenKey,
        public: &RsaPublicKey,
        roots: &[Root],
        previous: Option<&EscrowPackage>,
        index: usize,
    ) -> Result<WrappedRoots, HsmError> {
        let token = index.checked_sub(1).and_then(|number| self.plan.standby.get(number));
        let stored = previous.and_then(|package| match index {
            0 => Some(&package.escrow),
            _ => package.standby.get(index - 1),
        });
        let recipient_object = find_one(self.session, &recipient.label(&self.plan.island), CKO_PUBLIC_KEY)?;
        let mut wrapped = Vec::with_capacity(roots.len());
        // I1: a root of another class never leaves for this token, not even wrapped: its transport
        // key would open it at any later time.
        for root in roots.iter().filter(|root| token.is_none_or(|token| token.gets(root.key.purpose))) {
            if root.locked {
                let known = stored
                    .filter(|stored| stored.recipient_sha256 == public.sha256)
                    .and_then(|stored| stored.roots.iter().find(|known| known.key == root.key));
                wrapped.push(known.cloned().ok_or_else(|| HsmError::Ceremony {
                    reason: format!(
                        "the root `{}` is locked, and the stored package has no copy of it for `{}`",
                        root.key.label(&self.plan.island),
                        recipient.purpose
                    ),
                    next_step: "run the ceremony with the same escrow and standby keys as before; a recipient cannot be added later".to_owned(),
                })?);
                continue;
            }
            let mut buffer = [0; 1024];
            let written =
                self.session.wrap(&Mechanism::Oaep(self.oaep_hash), recipient_object, root.object, &mut buffer)?;
            let octets = buffer.get(..written.min(public.octets())).unwrap_or_default().to_vec();
            wrapped.push(WrappedRoot { key: root.key, check_value: root.check_value.clone(), wrapped: octets });
        }
        let oaep_hash =
            stored.filter(|_| roots.iter().all(|root| root.locked)).map_or(self.oaep_hash, |stored| stored.oaep_hash);
        Ok(WrappedRoots { recipient_sha256: public.sha256, oaep_hash, roots: wrapped })
    }

    /// Sets CKA_EXTRACTABLE to false, and proves that it cannot be set back.
    pub(super) fn lock(&self, root: &Root) -> Result<(), HsmError> {
        let label = root.key.label(&self.plan.island);
        if !root.locked {
            self.session.set_attributes(root.object, &[Attribute::flag(CKA_EXTRACTABLE, false)])?;
        }
        let open = |what: &str| HsmError::Ceremony {
            reason: format!("the root `{label}` is not locked: {what}"),
            next_step: "do not use this token; the module does not keep CKA_EXTRACTABLE=false".to_owned(),
        };
        if self.session.flag(root.object, CKA_EXTRACTABLE)? != Some(false) {
            return Err(open("CKA_EXTRACTABLE still reads true"));
        }
        let escrow =
            find_one(self.session, &TokenKey::first(Purpose::Escrow).label(&self.plan.island), CKO_PUBLIC_KEY)?;
        if self.session.wrap(&Mechanism::Oaep(self.oaep_hash), escrow, root.object, &mut [0; 1024]).is_ok() {
            return Err(open("it can still be wrapped"));
        }
        if self.session.set_attributes(root.object, &[Attribute::flag(CKA_EXTRACTABLE, true)]).is_ok() {
            return Err(open("CKA_EXTRACTABLE could be set back"));
        }
        let copy = Template::empty().flag(CKA_TOKEN, false).flag(CKA_EXTRACTABLE, true);
        if let Ok(copy) = self.session.copy(root.object, copy.as_slice()) {
            self.session.destroy(copy)?;
            return Err(open("a copy of it can be extractable"));
        }
        Ok(())
    }

    pub(super) fn key_pairs(&self) -> Result<Vec<KeyFingerprint>, HsmError> {
        let island = &self.plan.island;
        let mut fingerprints = Vec::new();
        let mut add = |key: TokenKey, public: &[u8]| {
            fingerprints.push(KeyFingerprint {
                label: key.label(island),
                kind: "SHA-256",
                value: digest(&SHA256, public).as_ref().to_vec(),
            })
        };
        let mut signing = Vec::new();
        if self.plan.general {
            signing.push(TokenKey::first(Purpose::AuditSign));
        }
        if self.plan.classes.contains(&KeyClass::Ca) {
            signing.push(TokenKey::first(Purpose::Ca));
        }
        for key in signing {
            let public = p256_pair(self.session, island, key)?;
            add(key, &public_point(self.session, public)?);
        }
        if self.plan.general {
            let key = TokenKey::first(Purpose::VendorTransport);
            let public = rsa_pair(self.session, island, key)?;
            add(key, &rsa_public_key_der(self.session, public)?.unwrap_or_default());
        }
        Ok(fingerprints)
    }
}

const ROOT_OCTETS: CK_ULONG = 32;
