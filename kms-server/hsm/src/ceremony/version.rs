//! Another version of a root, made after the ceremony.

use aws_lc_rs::digest::{SHA256, digest};
use cryptoki_sys::*;
use kms_domain::{IslandName, KeyClass, KeyDerivation};

use super::login::{capabilities, find_slot, logged_in};
use super::objects::rsa_pair;
use super::package::{EscrowPackage, KeyFingerprint};
use super::plan::{CeremonyPlan, StandbyToken};
use super::recipients::{RsaPublicKey, known_recipients};
use super::steps::Ceremony;
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::module::{Module, TokenSelector};
use crate::pin::Pin;
use crate::public_key::rsa_public_key_der;
use crate::raw::Session;
use crate::worker::find_one;

/// A version of a root that is made after the ceremony.
#[derive(Clone, Debug)]
pub struct NewRoot {
    /// The island.
    pub island: IslandName,
    /// Purpose and version. A symmetric root, or [`Purpose::VendorTransport`].
    pub key: TokenKey,
    /// The escrow key of the ceremony, DER: it must be the one that the token holds.
    pub escrow_public_key: Vec<u8>,
    /// The standby tokens of the ceremony that get a copy, by their numbers, from 0.
    pub standby: Vec<u8>,
    /// Those that get no copy. Each standby token must be in one of the lists: the root leaves the
    /// token once, so a forgotten copy can never be made.
    pub without: Vec<u8>,
}

impl NewRoot {
    /// Refuses unless every standby token of the ceremony is in one of the lists.
    fn names_all_standby_tokens(&self, session: &Session) -> Result<(), HsmError> {
        for number in 0..u8::MAX {
            match find_one(
                session,
                &TokenKey::first(Purpose::StandbyRecipient(number)).label(&self.island),
                CKO_PUBLIC_KEY,
            ) {
                // The ceremony numbers them without gaps.
                Err(HsmError::KeyMissing { .. }) => break,
                Err(error) => return Err(error),
                Ok(_) if self.standby.contains(&number) || self.without.contains(&number) => {}
                Ok(_) => {
                    let name = number + 1;
                    return Err(HsmError::Ceremony {
                        reason: format!(
                            "the command does not say whether the standby token of `[[copy]]` {name} of the ceremony file gets a copy"
                        ),
                        next_step: format!(
                            "add `--copy {name}`, or `--no-copy {name}` if it does not serve the class; no copy can be made later"
                        ),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The result of making a new version of a root.
#[derive(Clone, Debug)]
pub struct NewRootResult {
    /// Its fingerprint.
    pub fingerprint: KeyFingerprint,
    /// How a diversification root derives.
    pub derivation: Option<KeyDerivation>,
    /// The package, as it was stored; `None` for a key pair, which never leaves the token.
    pub package: Option<EscrowPackage>,
}

/// Makes another version of a root: a symmetric one is wrapped for the escrow key and for standby
/// tokens, stored by `persist`, and then locked, as in [`crate::create_roots`]; a key pair is made
/// and never leaves the token. After an interruption, run this again with the package that was
/// stored: it continues. Blocking; not while the token is in use in this process.
///
/// No security officer is needed: the keys that roots may leave under are in the token since the
/// ceremony, and none is added here.
///
/// # Errors
/// [`HsmError::Ceremony`] names the obstacle and the next step; other errors are the token's.
pub fn create_root_version(
    module: &Module,
    token: &TokenSelector,
    user_pin: &Pin,
    new: &NewRoot,
    previous: Option<&EscrowPackage>,
    persist: impl FnOnce(&EscrowPackage) -> Result<(), String>,
) -> Result<NewRootResult, HsmError> {
    let escrow = RsaPublicKey::parse(&new.escrow_public_key)?;
    let slot = find_slot(module, token)?;
    let (capabilities, oaep_hash) = capabilities(module, slot, user_pin)?;
    logged_in(module, slot, CKU_USER, user_pin, |session| {
        if new.key.purpose == Purpose::VendorTransport {
            let public = rsa_pair(session, &new.island, new.key)?;
            let value = digest(&SHA256, &rsa_public_key_der(session, public)?.unwrap_or_default()).as_ref().to_vec();
            let fingerprint = KeyFingerprint { label: new.key.label(&new.island), kind: "SHA-256", value };
            return Ok(NewRootResult { fingerprint, derivation: None, package: None });
        }
        let class = match new.key.purpose {
            Purpose::Diversification(class) | Purpose::StorageKek(class) => Some(class),
            Purpose::Seal => None,
            other => return Err(HsmError::invalid("root", format!("`{other}` has no versions"))),
        };
        new.names_all_standby_tokens(session)?;
        let mut recipients = vec![(TokenKey::first(Purpose::Escrow), escrow)];
        for number in &new.standby {
            let key = TokenKey::first(Purpose::StandbyRecipient(*number));
            let object = find_one(session, &key.label(&new.island), CKO_PUBLIC_KEY)?;
            recipients.push((key, RsaPublicKey::parse(&rsa_public_key_der(session, object)?.unwrap_or_default())?));
        }
        let trusted = known_recipients(session, &new.island, &recipients)?;
        let classes: Vec<KeyClass> = class.into_iter().collect();
        let standby =
            new.standby.iter().map(|_| StandbyToken { public_key: Vec::new(), classes: classes.clone() }).collect();
        let plan = CeremonyPlan {
            island: new.island.clone(),
            classes,
            general: false,
            escrow_public_key: new.escrow_public_key.clone(),
            standby,
        };
        let ceremony = Ceremony {
            session,
            plan: &plan,
            capabilities: &capabilities,
            oaep_hash,
            trusted: trusted && capabilities.wrap_with_trusted,
        };
        let root = ceremony.root(new.key, previous)?;
        let mut wrapped = recipients
            .iter()
            .enumerate()
            .map(|(index, (key, recipient))| {
                ceremony.wrap_all(*key, recipient, std::slice::from_ref(&root), previous, index)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let package = EscrowPackage { island: new.island.clone(), escrow: wrapped.remove(0), standby: wrapped };
        persist(&package).map_err(|reason| HsmError::Ceremony {
            reason: format!("the escrow package could not be stored ({reason}); the new root is not locked"),
            next_step: "make room for the package and run the command again".to_owned(),
        })?;
        ceremony.lock(&root)?;
        let fingerprint =
            KeyFingerprint { label: new.key.label(&new.island), kind: "check value", value: root.check_value };
        let derivation =
            capabilities.key_derivation().filter(|_| matches!(new.key.purpose, Purpose::Diversification(_)));
        Ok(NewRootResult { fingerprint, derivation, package: Some(package) })
    })
}
