//! Who may: the caller from its certificate, and the decision of the policies (I8).

mod policy;
mod principal;
mod quota;

pub use policy::{
    Action, CosemTarget, Criticality, Decision, DeviceTypeFacts, FrameService, GroupFacts, Policy, PolicyError,
    PrincipalFacts, Purpose, Resource,
};
pub use principal::Caller;
pub use quota::{Quota, QuotaError, Quotas};
