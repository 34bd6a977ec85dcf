//! The server's use of HSMs, and the only crate that calls PKCS#11: modules and tokens, the probe
//! of a module, worker threads, the ceremony, and the verbs that the services need.
//!
//! - [`Module`] is a loaded PKCS#11 library, [`Token`] a token in use: logged in, probed, repaired
//!   when sessions are lost.
//! - [`Hsm`] has the verbs: wrap keys for a grantee, protect frames, import and generate stored
//!   keys, sign, MAC.
//! - [`create_roots`] is the ceremony that makes an island's roots.
//!
//! Keys stay inside the HSM (I1): verbs take descriptions of keys, and return wrapped keys, frames,
//! signatures and MACs. A meter key is a session object for the length of one call. docs/hsm.md
//! lists the functions, mechanisms and modules.

mod agreement;
mod batch_key;
mod capabilities;
mod ceremony;
mod envelope;
mod error;
mod frame;
mod hsm;
mod import;
mod inventory;
mod job;
mod keeper;
mod key_source;
mod label;
mod metrics;
mod module;
mod pin;
mod probe;
mod public_key;
mod queue;
mod raw;
mod template;
mod token;
mod token_settings;
mod transfer;
mod worker;

pub use agreement::{Agreement, AgreementLimits, EnvelopeAlgorithm, Recipient};
pub use batch_key::BatchKey;
pub use capabilities::{Capabilities, CapabilityRow};
pub use ceremony::create::{CeremonyResult, create_roots};
pub use ceremony::package::{EscrowPackage, KeyFingerprint, WrappedRoot, WrappedRoots};
pub use ceremony::plan::{CeremonyPlan, StandbyToken};
pub use ceremony::standby::{create_standby_transport, install_wrapped_roots};
pub use ceremony::version::{NewRoot, NewRootResult, create_root_version};
pub use envelope::{Envelope, WrappedKey};
pub use error::{ErrorKind, HsmError};
pub use frame::{FrameInput, FrameKeys, FrameParameters, FrameProtection, ProtectedFrame};
pub use hsm::{Hsm, PART};
pub use import::{ImportJob, ImportRefusal, StoredKey};
pub use inventory::InventoryObject;
pub use key_source::KeySource;
pub use label::{Purpose, RootVersion, TokenKey};
pub use module::{Module, TokenSelector};
pub use pin::{Pin, PinMemory, PinSource, ProcessPinMemory};
pub use token::Token;
pub use token_settings::{TokenSettings, TokenState};
pub use transfer::TransferJob;
