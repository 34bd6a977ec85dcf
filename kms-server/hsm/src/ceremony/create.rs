//! The run of the ceremony: makes, escrows and locks the roots of one token.

use cryptoki_sys::*;
use kms_domain::{KeyClass, KeyDerivation};

use super::login::{capabilities, find_slot, logged_in};
use super::package::{EscrowPackage, KeyFingerprint};
use super::plan::CeremonyPlan;
use super::recipients::{RsaPublicKey, install_recipients};
use super::steps::Ceremony;
use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::module::{Module, TokenSelector};
use crate::pin::Pin;

/// The result of a ceremony.
#[derive(Clone, Debug)]
pub struct CeremonyResult {
    /// The package, as it was stored.
    pub package: EscrowPackage,
    /// Every key, for the printed record.
    pub fingerprints: Vec<KeyFingerprint>,
    /// How the diversification roots derive keys, to be recorded with their version; none if the
    /// module cannot derive.
    pub derivation: Option<KeyDerivation>,
    /// What the module can do.
    pub capabilities: Capabilities,
}

/// Makes, escrows and locks the roots of a token. Blocking; not while the token is in use in this
/// process, because it logs in as security officer and out again.
///
/// `persist` must store the package durably. If it fails, nothing is locked, and the ceremony can
/// be run again. `previous` is the package that an interrupted ceremony stored, if there is one.
///
/// # Errors
/// [`HsmError::Ceremony`] names the obstacle and the next step; other errors are the token's.
pub fn create_roots(
    module: &Module,
    token: &TokenSelector,
    so_pin: &Pin,
    user_pin: &Pin,
    plan: &CeremonyPlan,
    previous: Option<&EscrowPackage>,
    persist: impl FnOnce(&EscrowPackage) -> Result<(), String>,
) -> Result<CeremonyResult, HsmError> {
    let escrow = RsaPublicKey::parse(&plan.escrow_public_key)?;
    let standby =
        plan.standby.iter().map(|token| RsaPublicKey::parse(&token.public_key)).collect::<Result<Vec<_>, _>>()?;
    let slot = find_slot(module, token)?;
    let (capabilities, oaep_hash) = capabilities(module, slot, user_pin)?;

    let mut recipients = vec![(TokenKey::first(Purpose::Escrow), escrow)];
    recipients
        .extend((0..).zip(standby).map(|(number, key)| (TokenKey::first(Purpose::StandbyRecipient(number)), key)));
    let trusted =
        logged_in(module, slot, CKU_SO, so_pin, |session| install_recipients(session, &plan.island, &recipients))?;

    logged_in(module, slot, CKU_USER, user_pin, |session| {
        let ceremony = Ceremony {
            session,
            plan,
            capabilities: &capabilities,
            oaep_hash,
            trusted: trusted && capabilities.wrap_with_trusted,
        };
        let roots =
            ceremony.roots().into_iter().map(|key| ceremony.root(key, previous)).collect::<Result<Vec<_>, _>>()?;
        let mut fingerprints = ceremony.key_pairs()?;
        let mut wrapped = recipients
            .iter()
            .enumerate()
            .map(|(index, (key, recipient))| ceremony.wrap_all(*key, recipient, &roots, previous, index))
            .collect::<Result<Vec<_>, _>>()?;
        let package = EscrowPackage { island: plan.island.clone(), escrow: wrapped.remove(0), standby: wrapped };
        for root in &package.escrow.roots {
            fingerprints.push(KeyFingerprint {
                label: root.key.label(&plan.island),
                kind: "check value",
                value: root.check_value.clone(),
            });
        }
        persist(&package).map_err(|reason| HsmError::Ceremony {
            reason: format!("the escrow package could not be stored ({reason}); no root is locked"),
            next_step: "make room for the package and run the ceremony again".to_owned(),
        })?;
        for root in &roots {
            ceremony.lock(root)?;
        }
        let derives = plan.classes.iter().any(|class| *class != KeyClass::Ca);
        Ok(CeremonyResult {
            package,
            fingerprints,
            derivation: capabilities.key_derivation().filter(|_| derives),
            capabilities: capabilities.clone(),
        })
    })
}
