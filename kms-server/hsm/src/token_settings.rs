//! How a token is used, and whether it can be used.

use std::path::PathBuf;
use std::sync::Arc;

use crate::agreement::AgreementLimits;
use crate::capabilities::Capabilities;
use crate::module::TokenSelector;
use crate::pin::PinSource;

/// Where a token is and how it is used.
#[derive(Clone, Debug)]
pub struct TokenSettings {
    /// Path of the PKCS#11 module.
    pub module: PathBuf,
    /// Which token of the module.
    pub selector: TokenSelector,
    /// Where the user PIN is read from.
    pub pin: PinSource,
    /// Worker threads. `None`: the number that is fastest with the module.
    pub workers: Option<usize>,
    /// Jobs that may wait; a further one is refused as overloaded. A batch has one job for each
    /// [`PART`](crate::PART) of it.
    pub queue: usize,
    /// Jobs of one payer that may wait ([`Hsm::paid_by`](crate::Hsm::paid_by)), so that none fills
    /// the queue alone.
    pub queue_of_one: usize,
    /// How long agreements are reused.
    pub agreements: AgreementLimits,
    /// Whether `ecdh-p256-cbc-expand` may be used where the module has no X9.63 KDF. Not for
    /// production.
    pub allow_cbc_expand: bool,
}

impl TokenSettings {
    /// The usual settings for a token of `module` with this label.
    pub fn new(module: PathBuf, label: String, pin: PinSource) -> Self {
        Self {
            module,
            selector: TokenSelector { label, serial: None },
            pin,
            workers: None,
            queue: 4096,
            queue_of_one: 1024,
            agreements: AgreementLimits::default(),
            allow_cbc_expand: false,
        }
    }
}

/// The state of the token.
#[derive(Clone, Debug)]
pub enum TokenState {
    /// It is being connected and probed for the first time.
    Probing,
    /// It answers, the user is logged in, and the essentials work.
    Usable(Arc<Capabilities>),
    /// It cannot be used. The keeper tries again with growing pauses.
    Unusable {
        /// What was found.
        reason: String,
        /// What the operator can do.
        next_step: String,
        /// Whether it can become usable without an operator.
        may_recover: bool,
    },
}

impl TokenState {
    /// Whether jobs are taken.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Usable(_))
    }
}
