//! Decisions of an island's policies (I8): default deny, and any failure denies.
//!
//! Decisions are made for classes of meters and remembered, but for those that
//! [`Action::is_remembered`] excepts: a remembered decision costs about 100 ns, a new one 50 µs.
//! What can change between two calls is part of the key (the principal's revision), or is checked
//! elsewhere (time, revocation, and the class of a meter, which its sealed row names).

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{PoisonError, RwLock},
};

use kms_base::ServiceError;
use kms_domain::{Assurance, DeviceType, Group, MeterClass, PersonName, Principal, PrincipalId};

use crate::{Action, Quotas};

/// Evaluates policies: `kms-policy` has an engine for Cedar. All other crates know this trait only,
/// so they compile without waiting for Cedar.
pub trait Engine: Send + Sync {
    /// Whether the principal may do this.
    ///
    /// # Errors
    /// The decision could not be made, which is a denial: a policy raised an evaluation error, or
    /// the question does not fit the schema.
    fn decide(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
    ) -> Result<PolicyDecision, EvaluationError>;
}

/// A decision that could not be made: a denial, and a fault of a policy or of the server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EvaluationError(pub String);

/// A validated set of policies, with the decisions that it has made so far. To change policies,
/// load another one: a decision never outlives the set that made it.
pub struct Policy {
    engine: Box<dyn Engine>,
    quotas: Quotas,
    digest: [u8; 32],
    decisions: Decisions,
}

impl Policy {
    /// A set of policies. `digest` is SHA-256 over the names and texts of the policies and quotas.
    pub fn new(engine: Box<dyn Engine>, quotas: Quotas, digest: [u8; 32]) -> Self {
        Self { engine, quotas, digest, decisions: Decisions::default() }
    }

    /// SHA-256 over the names and texts of the policies and quotas: it identifies the set that
    /// decided.
    pub const fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The quotas on what policies permit.
    pub const fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Whether the principal may do this.
    // I8: what is not permitted, what fails to evaluate, and what does not fit the schema is
    // denied.
    pub fn permits(&self, principal: &PrincipalFacts, action: &Action, resource: &Resource<'_>) -> PolicyDecision {
        let decide = || {
            self.engine.decide(principal, action, resource).unwrap_or_else(|error| {
                tracing::error!(%error, action = action.name(), principal = %principal.principal, "a policy decision failed, so the request is denied");
                PolicyDecision::Deny
            })
        };
        if action.is_remembered() { self.decisions.of(principal, action, resource, decide) } else { decide() }
    }

    /// As [`Self::permits`], as a result.
    ///
    /// # Errors
    /// Permission denied, naming the action.
    pub fn require(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
    ) -> Result<(), ServiceError> {
        match self.permits(principal, action, resource) {
            PolicyDecision::Permit => Ok(()),
            PolicyDecision::Deny => Err(ServiceError::denied(action.to_string())),
        }
    }
}

/// The decision of the policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyDecision {
    /// A policy permits it and none forbids it.
    Permit,
    /// Everything else.
    Deny,
}

impl PolicyDecision {
    /// Whether it is a permit.
    pub const fn is_permit(self) -> bool {
        matches!(self, Self::Permit)
    }
}

/// What policies may know about a principal: its identity, and the revision of its sealed row. A
/// changed row makes earlier decisions about it unreachable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrincipalFacts {
    /// The principal.
    pub principal: PrincipalId,
    /// The generation of its sealed row.
    pub revision: u64,
    /// Of a handheld: the person who carries it, folded.
    pub technician: Option<String>,
    /// Of a handheld: where it has its keys, as it said when it was enrolled.
    pub assurance: Option<Assurance>,
}

/// What policies may know about a principal.
pub fn facts(principal: &Principal) -> PrincipalFacts {
    PrincipalFacts {
        principal: principal.id.clone(),
        revision: u64::from(principal.revision),
        technician: principal.technician().map(PersonName::folded),
        assurance: principal.assurance,
    }
}

/// The resource of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource<'a> {
    /// The island as a whole. It is the caller's own: certificates of other islands were refused
    /// before (I7).
    Island,
    /// Meters of this class.
    Meters(&'a MeterClass),
    /// A group of meters, as the owner of keys.
    Group(&'a GroupFacts),
    /// A device type, as the owner of keys.
    DeviceType(&'a DeviceTypeFacts),
}

/// What policies may know about a group of meters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupFacts {
    /// The island's number for it.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// The number of its members' security suite.
    pub suite: u8,
}

impl From<&Group> for GroupFacts {
    fn from(group: &Group) -> Self {
        Self { number: group.id.0, name: group.name.clone(), suite: group.suite.number() }
    }
}

/// What policies may know about a device type.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceTypeFacts {
    /// Its name.
    pub name: String,
    /// The manufacturer's FLAG id.
    pub manufacturer: String,
    /// The name of its device profile.
    pub device_profile: String,
}

impl From<&DeviceType> for DeviceTypeFacts {
    fn from(device_type: &DeviceType) -> Self {
        Self {
            name: device_type.name.clone(),
            manufacturer: device_type.vendor.to_string(),
            device_profile: device_type.profile.to_string(),
        }
    }
}

/// Earlier decisions, found by a hash of the whole question and confirmed by a comparison. Bounded:
/// a full shard is emptied.
struct Decisions {
    hasher: RandomState,
    shards: [RwLock<HashMap<u64, RememberedDecision>>; SHARDS],
}

struct RememberedDecision {
    principal: PrincipalFacts,
    action: Action,
    resource: RememberedResource,
    decision: PolicyDecision,
}

/// An owned [`Resource`].
enum RememberedResource {
    Island,
    Meters(MeterClass),
    Group(GroupFacts),
    DeviceType(DeviceTypeFacts),
}

impl RememberedResource {
    fn of(resource: &Resource<'_>) -> Self {
        match *resource {
            Resource::Island => Self::Island,
            Resource::Meters(class) => Self::Meters(class.clone()),
            Resource::Group(group) => Self::Group(group.clone()),
            Resource::DeviceType(device_type) => Self::DeviceType(device_type.clone()),
        }
    }

    fn is(&self, resource: &Resource<'_>) -> bool {
        match (self, resource) {
            (Self::Island, Resource::Island) => true,
            (Self::Meters(known), Resource::Meters(class)) => known == *class,
            (Self::Group(known), Resource::Group(group)) => known == *group,
            (Self::DeviceType(known), Resource::DeviceType(device_type)) => known == *device_type,
            _ => false,
        }
    }
}

impl Default for Decisions {
    fn default() -> Self {
        Self { hasher: RandomState::new(), shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

impl Decisions {
    fn of(
        &self,
        principal: &PrincipalFacts,
        action: &Action,
        resource: &Resource<'_>,
        decide: impl FnOnce() -> PolicyDecision,
    ) -> PolicyDecision {
        let hash = self.hasher.hash_one((principal, action, resource));
        let Some(shard) = self.shards.get(hash as usize % SHARDS) else { return decide() };
        if let Some(known) = shard.read().unwrap_or_else(PoisonError::into_inner).get(&hash)
            && known.resource.is(resource)
            && known.action == *action
            && known.principal == *principal
        {
            return known.decision;
        }
        let decision = decide();
        let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
        if shard.len() >= DECISIONS_PER_SHARD {
            shard.clear();
        }
        shard.insert(
            hash,
            RememberedDecision {
                principal: principal.clone(),
                action: action.clone(),
                resource: RememberedResource::of(resource),
                decision,
            },
        );
        decision
    }
}

const SHARDS: usize = 16;
/// 16 × 1,024 decisions of about 500 octets: 8 MB at most.
const DECISIONS_PER_SHARD: usize = 1_024;

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use kms_domain::{IslandName, Role, WorkOrderTasks};

    use super::*;

    struct Counting(Arc<AtomicUsize>);

    impl Engine for Counting {
        fn decide(&self, _: &PrincipalFacts, _: &Action, _: &Resource<'_>) -> Result<PolicyDecision, EvaluationError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(PolicyDecision::Permit)
        }
    }

    #[test]
    fn what_callers_choose_freely_takes_no_place_of_remembered_decisions() {
        let asked = Arc::new(AtomicUsize::new(0));
        let quotas = Quotas::parse(Quotas::SHIPPED).unwrap();
        let policy = Policy::new(Box::new(Counting(Arc::clone(&asked))), quotas, [0; 32]);
        let principal = PrincipalId::new(IslandName::parse("north").unwrap(), Role::ServiceAccount, "wfm").unwrap();
        let principal = PrincipalFacts { principal, revision: 1, technician: None, assurance: None };
        let remembered = || -> usize { policy.decisions.shards.iter().map(|shard| shard.read().unwrap().len()).sum() };
        policy.permits(&principal, &Action::Scrub, &Resource::Island);
        for number in 0..100 {
            let technician = PersonName::parse(&format!("Ida {number}")).unwrap();
            let action = Action::CreateWorkOrder { tasks: WorkOrderTasks::default(), technician, hours: number };
            policy.permits(&principal, &action, &Resource::Island);
        }
        policy.permits(&principal, &Action::Scrub, &Resource::Island);
        assert_eq!((remembered(), asked.load(Ordering::Relaxed)), (1, 101));
    }

    #[test]
    fn remembered_decisions_are_bounded() {
        let decisions = Decisions::default();
        for revision in 0..40_000 {
            let principal = PrincipalId::new(IslandName::parse("north").unwrap(), Role::Officer, "ada").unwrap();
            let principal = PrincipalFacts { principal, revision, technician: None, assurance: None };
            decisions.of(&principal, &Action::Scrub, &Resource::Island, || PolicyDecision::Deny);
        }
        let remembered: usize = decisions.shards.iter().map(|shard| shard.read().unwrap().len()).sum();
        assert!(remembered <= SHARDS * DECISIONS_PER_SHARD, "{remembered}");
    }
}
