//! The HSM room of the server, and its only PKCS#11: modules and tokens, the capability probe,
//! worker threads, the ceremony, and the few verbs that the services need.
//!
//! - [`Module`] is a loaded PKCS#11 library, [`Token`] a token in use: logged in, probed, repaired
//!   when sessions are lost.
//! - [`Hsm`] has the verbs: wrap keys for a grantee, protect frames, import and generate stored
//!   keys, sign, MAC.
//! - [`create_roots`] is the ceremony that makes an island's roots.
//!
//! Keys stay inside (I1): verbs take descriptions of keys and give wrapped keys, frames, signatures
//! and MACs. A meter key is a session object for the length of one call. docs/hsm.md lists the
//! functions, mechanisms and modules.

mod ceremony;
mod envelope;
mod error;
mod frame;
mod hsm;
mod import;
mod inventory;
mod label;
mod metrics;
mod module;
mod pin;
mod probe;
mod queue;
mod raw;
mod template;
mod token;
mod transfer;
mod worker;

pub use ceremony::{
    CeremonyPlan, CeremonyResult, EscrowPackage, KeyFingerprint, NewRoot, NewRootResult, StandbyToken, WrappedRoot,
    WrappedRoots, create_root_version, create_roots, create_standby_transport, install_wrapped_roots,
};
pub use envelope::{Agreement, AgreementLimits, Envelope, EnvelopeAlgorithm, Recipient, WrappedKey};
pub use error::{ErrorKind, HsmError};
pub use frame::{FrameInput, FrameKeys, FrameParameters, FrameProtection, ProtectedFrame};
pub use hsm::{Hsm, PART};
pub use import::{BatchKey, ImportJob, ImportRefusal, StoredKey};
pub use inventory::InventoryObject;
pub use label::{Purpose, RootVersion, TokenKey};
pub use module::{Module, TokenSelector};
pub use pin::{Pin, PinMemory, PinSource, ProcessPinMemory};
pub use probe::{Capabilities, CapabilityRow};
pub use token::{Token, TokenSettings, TokenState};
pub use transfer::TransferJob;
pub use worker::KeySource;
