//! Who may: the caller from its certificate, actions and what they are on, and the decisions of the
//! policies (I8), whichever engine makes them.

mod action;
mod caller;
mod certificate;
mod criticality;
mod policy;
mod quota;

pub use action::{Action, Attribute, CosemTarget, FrameService, Purpose, ResourceKind};
pub use caller::Caller;
pub use certificate::{PeerCertificate, PeerCertificateError};
pub use criticality::Criticality;
pub use policy::{
    Decision, DeviceTypeFacts, Engine, EvaluationError, GroupFacts, Policy, PrincipalFacts, Resource, facts,
};
pub use quota::{Quota, QuotaError, Quotas};
