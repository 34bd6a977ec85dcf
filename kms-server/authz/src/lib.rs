//! Who may do what: the caller from its certificate, actions and their resources, quotas, and the
//! decisions of the policies (I8), whichever engine makes them.

mod action;
mod caller;
mod certificate;
mod criticality;
mod frame;
mod policy;
mod quota;

pub use action::{Action, Attribute, Purpose, ResourceKind};
pub use caller::Caller;
pub use certificate::{PeerCertificate, PeerCertificateError};
pub use criticality::Criticality;
pub use frame::{CosemTarget, FrameService};
pub use policy::{
    DeviceTypeFacts, Engine, EvaluationError, GroupFacts, Policy, PolicyDecision, PrincipalFacts, Resource, facts,
};
pub use quota::{Quota, QuotaError, Quotas};
