//! Sessions of the ceremony: the slot, the login and the probe of the module.

use cryptoki::slot::Slot;
use cryptoki_sys::*;
use kms_domain::OaepHash;

use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::module::{Module, TokenSelector};
use crate::pin::Pin;
use crate::probe::probe;
use crate::raw::Session;

pub(super) fn find_slot(module: &Module, token: &TokenSelector) -> Result<Slot, HsmError> {
    module.find(token)?.map(|found| found.slot).ok_or_else(|| HsmError::Ceremony {
        reason: format!("no slot of `{}` has a token labelled `{}`", module.path().display(), token.label),
        next_step: "initialise the token first, or correct the label".to_owned(),
    })
}

pub(super) fn capabilities(module: &Module, slot: Slot, user_pin: &Pin) -> Result<(Capabilities, OaepHash), HsmError> {
    let mechanisms = module.mechanisms(slot)?;
    let capabilities =
        logged_in(module, slot, CKU_USER, user_pin, |session| probe(session, module.description(), &mechanisms, None))?;
    let hash = capabilities.oaep_hash().ok_or(HsmError::Unsupported {
        what: "RSA-OAEP",
        instead: "roots cannot be escrowed with this module; use another",
    })?;
    Ok((capabilities, hash))
}

/// Runs `work` in a session of its own as `user`, and logs out.
pub(super) fn logged_in<R>(
    module: &Module,
    slot: Slot,
    user: CK_USER_TYPE,
    pin: &Pin,
    work: impl FnOnce(&Session) -> Result<R, HsmError>,
) -> Result<R, HsmError> {
    let session = module.open(slot)?;
    let result = session.login(user, pin.octets()).and_then(|()| {
        let result = work(&session);
        let logout = session.inner().logout().map_err(|error| module.error(&error));
        result.and_then(|value| logout.map(|()| value))
    });
    session.close();
    result
}
