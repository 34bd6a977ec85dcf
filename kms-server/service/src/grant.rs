//! Session grants: keys of a meter, or of a group of meters, are issued to a principal for a stated
//! purpose and a limited time. Every issue is audited.
//!
//! A grant is decided and recorded in one transaction (I2, I4). Then it is delivered: the HSM wraps
//! the keys for the grantee. If the delivery fails, the record stays, and the same request delivers
//! the same grant later.

mod batch;
mod decide;
pub mod deliver;
mod plan;
pub mod terms;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{GrantId, GroupId, Owner, PrincipalId, RequestId, Role};
use kms_proto::v1::{self, audit_record::Event};
use kms_store::{GrantFilter, GrantRevocation, GrantRow, Reads};
use tracing::Instrument as _;

pub use self::batch::Batch;
use self::batch::Batches;
use self::decide::Grant;
use self::deliver::{Granted, deliver};
use self::terms::{GrantChunk, GrantTargets};
use super::group_names::Groups;
use crate::island::IslandContext;
use kms_authz::{Action, Caller, Purpose, Resource};
use kms_base::error::ServiceError;
use kms_base::metrics;
use kms_ledger::{Act, Asker, Decision, Never, Permit, Request, View};

/// Session grants of an island.
#[derive(Clone)]
pub struct GrantService {
    island: Arc<IslandContext>,
    groups: Arc<Groups>,
    batches: Batches,
}

impl GrantService {
    /// Meters that one chunk of a batch serves. Larger chunks commit less often; smaller ones
    /// answer sooner.
    pub const CHUNK: usize = 500;

    /// The service of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { island, groups: Arc::default(), batches: Batches::default() }
    }

    /// Begins a batch of this many meters. A bound limits how many chunks of all batches of the
    /// caller run at once.
    ///
    /// # Errors
    /// The caller's unanswered batches name too many meters already.
    pub fn begin_batch(&self, caller: &Caller, meters: usize) -> Result<Batch, ServiceError> {
        self.batches.begin(&caller.principal, meters, &self.island.limits)
    }

    /// Issues the keys that a chunk asks for. A request that was answered before gets the same
    /// grant again.
    ///
    /// # Errors
    /// The caller is not an enabled principal, has no transport key, uses a client title of another
    /// principal, or uses a request id for a second request; the grant was revoked or overtaken;
    /// the HSM or the database is unavailable. Refusals of single meters are in
    /// [`Granted::refusals`].
    #[boxed]
    pub async fn open(&self, caller: &Caller, chunk: GrantChunk) -> Result<Granted, ServiceError> {
        let meters = match &chunk.targets {
            GrantTargets::Meters(meters) => meters.len(),
            GrantTargets::Group { .. } => 1,
        };
        let granted =
            self.decide_and_deliver(caller, chunk).instrument(tracing::debug_span!("grant", kms.meters = meters)).await;
        if let Err(error) = &granted {
            // What refuses the request, or its only meter, refuses all of them.
            metrics().grant_refused(std::iter::repeat_n(error, meters));
        }
        granted
    }

    async fn decide_and_deliver(&self, caller: &Caller, chunk: GrantChunk) -> Result<Granted, ServiceError> {
        let (owners, action): (Vec<Owner>, _) = match &chunk.targets {
            GrantTargets::Meters(meters) => (meters.iter().copied().map(Owner::Meter).collect(), "openSession"),
            GrantTargets::Group { name, .. } => {
                // An unknown name is refused like a group whose keys the caller may not have.
                let id = self.groups.find(&self.island, name).await?.unwrap_or(NO_GROUP);
                (vec![Owner::Group(id)], "openGroupSession")
            }
        };
        let request = Request { id: chunk.request, digest: chunk.digest }.chunk(chunk.index);
        let act = Grant { island: self.island.clone(), chunk, owners, action };
        let committed = self.island.door.act(caller, request, act).await?;
        let plan = committed.value;
        let leaf = committed.leaves.first().copied().or(plan.leaf);
        deliver(&self.island, caller, plan, leaf).await
    }

    /// Grants, newest first: the caller's own, or all where policy permits it.
    ///
    /// # Errors
    /// Not permitted, or the database is unavailable.
    #[boxed]
    pub async fn list(&self, caller: &Caller, query: GrantQuery) -> Result<Vec<v1::Grant>, ServiceError> {
        let own = query.principal.as_ref() == Some(&caller.principal)
            || (query.principal.is_none() && matches!(caller.principal.role(), Role::HeadEnd | Role::Handheld));
        self.island.require(caller, &Action::ListGrants { own }).await?;
        let principal = if own { Some(caller.principal.clone()) } else { query.principal };
        let filter =
            GrantFilter { principal, live_at: query.only_live.then(IslandContext::now), ..GrantFilter::default() };
        Ok(self.island.store.grant_page(&filter, query.before, query.page).await?.iter().map(grant_message).collect())
    }

    /// Revokes a grant. The grantee still knows the keys, so their exposure stays in the ledger.
    ///
    /// # Errors
    /// Not permitted, no such grant, or the database is unavailable.
    #[boxed]
    pub async fn revoke(
        &self,
        caller: &Caller,
        request: RequestId,
        grant: GrantId,
        reason: String,
    ) -> Result<v1::Grant, ServiceError> {
        Ok(self.island.door.act(caller, Some(request), Revoke { grant, reason }).await?.value)
    }
}

/// Which grants to list.
#[derive(Clone, Debug)]
pub struct GrantQuery {
    /// Of this principal.
    pub principal: Option<PrincipalId>,
    /// Neither ended nor revoked.
    pub only_live: bool,
    /// Older than this one.
    pub before: Option<GrantId>,
    /// At most.
    pub page: u32,
}

fn grant_message(row: &GrantRow) -> v1::Grant {
    let purpose = Purpose::ALL.into_iter().find(|purpose| purpose.name() == row.purpose);
    v1::Grant {
        grant_id: row.id.octets().to_vec().into(),
        principal: row.principal.to_string(),
        purpose: purpose.map(|purpose| purpose.to_proto().into()).unwrap_or_default(),
        issued_ms: row.issued.0,
        not_after_ms: row.not_after.0,
        revoked_ms: row.revoked.map_or(0, |revoked| revoked.0),
        meter_count: row.meters,
    }
}

/// The revocation of a grant.
struct Revoke {
    grant: GrantId,
    reason: String,
}

impl Act for Revoke {
    type Answer = v1::Grant;
    type Past = Never;

    fn name(&self) -> &'static str {
        "revokeGrant"
    }

    fn reads(&self) -> Reads {
        Reads { grants: vec![self.grant], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let own = view.grant(self.grant)?.is_some_and(|row| row.principal == asker.principal().id);
        asker.require(&Action::RevokeGrant { own }, &Resource::Island)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Grant>, ServiceError> {
        let grant = self.grant;
        let mut row = view.grant(grant)?.ok_or_else(|| ServiceError::NotFound { what: format!("grant {grant}") })?;
        if row.revoked.is_some() {
            return Ok(Decision::unchanged(grant_message(&row)));
        }
        row.revoked = Some(view.now());
        view.revoke_grant(GrantRevocation { id: grant, revoked: view.now() });
        let revoked = v1::GrantRevoked { grant_id: grant.octets().to_vec().into(), reason: self.reason.clone() };
        let entry = view.append(Event::GrantRevoked(revoked));
        Ok(Decision::recorded(entry, grant_message(&row)))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<v1::Grant, ServiceError> {
        match never {}
    }
}

/// Numbers of groups begin with 1.
const NO_GROUP: GroupId = GroupId(0);
