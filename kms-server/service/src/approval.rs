//! Four-eyes approval: officers list, approve, withdraw and execute proposals (I6).

#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{Approval, Proposal, ProposalId, ProposedAction, SystemTitle};
use kms_proto::v1::{self, ProposalApproved, audit_record::Event};
use kms_store::{Reads, RowKind};

pub use super::Request;
use super::{
    meter::raise_counter,
    principal::{key::confirm, people::counted_person},
    proposal::{ended, execute, message, missing, proposal_row, refused},
};
use crate::island::IslandContext;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Entry, Known, Permit, View};

/// Proposals of an island.
#[derive(Clone)]
pub struct ProposalService {
    island: Arc<IslandContext>,
}

/// A change of a proposal by an officer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProposalChange {
    /// Approves the content with this digest.
    Approve {
        /// SHA-256 of the content that the approver has seen.
        content_sha256: [u8; 32],
    },
    /// Ends it unused.
    Withdraw {
        /// Why.
        reason: String,
    },
    /// Executes it.
    Execute,
}

impl ProposalChange {
    const fn action(&self) -> Action {
        match self {
            Self::Approve { .. } => Action::ApproveProposal,
            Self::Withdraw { .. } => Action::WithdrawProposal,
            Self::Execute => Action::CarryOutProposal,
        }
    }

    /// Executes it, and records it.
    fn apply(
        &self,
        view: &mut View<'_, '_>,
        island: &IslandContext,
        permit: &Permit,
        id: ProposalId,
    ) -> Result<Entry, ServiceError> {
        let principal = permit.principal();
        let now = view.now();
        let mut proposal = Arc::unwrap_or_clone(view.proposal(id)?.ok_or_else(|| missing(id))?);
        match self {
            Self::Approve { content_sha256 } => {
                // I6: a person approves, not a certificate.
                let person = counted_person(view, principal, "approveProposal")?;
                let approval = Approval { principal: principal.id.clone(), person: person.clone(), time: now };
                proposal.approve(approval, content_sha256).map_err(refused)?;
                let entry = view.append(Event::ProposalApproved(ProposalApproved {
                    proposal_id: id.octets().to_vec().into(),
                    person: person.as_str().to_owned(),
                    content_sha256: content_sha256.to_vec().into(),
                    complete: proposal.approvals.suffice(&proposal.terms()),
                }));
                view.put_proposal(proposal)?;
                Ok(entry)
            }
            Self::Withdraw { reason } => {
                proposal.withdraw(principal.id.clone(), now).map_err(refused)?;
                let entry = view.append(ended(&proposal, "withdrawn", reason));
                view.put_proposal(proposal)?;
                Ok(entry)
            }
            Self::Execute => {
                let (action, entry) = execute(view, permit, id)?;
                match action {
                    ProposedAction::RaiseCounter(raise) => raise_counter(view, island, permit, &raise, id)?,
                    ProposedAction::RecertifyPrincipal(recertify) => confirm(view, permit, &recertify, id)?,
                    ProposedAction::DestroyRoot(_) => {
                        return Err(ServiceError::FailedPrecondition {
                            reason: "the destruction of a root is more than a change of rows, and is not executed by this call"
                                .to_owned(),
                            next_step: format!("execute it with `kms roots destroy {id}`"),
                        });
                    }
                }
                Ok(entry)
            }
        }
    }
}

impl ProposalService {
    /// Proposals of an island.
    pub const fn new(island: Arc<IslandContext>) -> Self {
        Self { island }
    }

    /// Up to `limit` proposals before an id, the newest first.
    ///
    /// # Errors
    /// Not permitted, or the database is unavailable.
    #[boxed]
    pub async fn list(
        &self,
        caller: &Caller,
        before: Option<ProposalId>,
        limit: usize,
    ) -> Result<Vec<v1::Proposal>, ServiceError> {
        self.island.require(caller, &Action::ListProposals).await?;
        let (mut proposals, mut after) = (Vec::new(), None);
        loop {
            let page = self.island.store.sealed_page(RowKind::Proposal, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            // A proposal whose row does not verify is left out. The scrubber reports it (I5).
            proposals.extend(page.iter().filter_map(|(id, row)| {
                self.island.committer.open_proposal(ProposalId::from_octets(id).ok()?, row).ok()
            }));
        }
        // Ids are time-ordered (UUID version 7).
        proposals.retain(|proposal| before.is_none_or(|before| proposal.id.octets() < before.octets()));
        let now = IslandContext::now();
        Ok(proposals.iter().rev().take(limit).map(|proposal| message(proposal, now)).collect())
    }

    /// One proposal.
    ///
    /// # Errors
    /// Not permitted, no such proposal, or the database is unavailable.
    #[boxed]
    pub async fn show(&self, caller: &Caller, id: ProposalId) -> Result<v1::Proposal, ServiceError> {
        self.island.require(caller, &Action::ListProposals).await?;
        Ok(message(&*self.load(id).await?, IslandContext::now()))
    }

    /// Approves, withdraws or executes a proposal. A repeated request changes nothing more.
    ///
    /// # Errors
    /// Not permitted; no such proposal; its state or the rules of approval (I6) forbid the change;
    /// the content does not fit any more; or the database is unavailable.
    #[boxed]
    pub async fn change(
        &self,
        caller: &Caller,
        request: Request,
        id: ProposalId,
        change: ProposalChange,
    ) -> Result<v1::Proposal, ServiceError> {
        let action = change.action();
        self.island.require(caller, &action).await?;
        let about = concerns(&self.load(id).await?.content.action);
        let act = ChangeProposal { island: self.island.clone(), id, change, about };
        Ok(self.island.door.act(caller, request, act).await?.value)
    }

    /// A proposal as it is in the database now.
    async fn load(&self, id: ProposalId) -> Result<Arc<Proposal>, ServiceError> {
        let row = self.island.store.sealed(RowKind::Proposal, &id.octets()).await?.ok_or_else(|| missing(id))?;
        self.island.committer.open_proposal(id, &row)
    }
}

/// The act of an officer that changes a proposal.
struct ChangeProposal {
    island: Arc<IslandContext>,
    id: ProposalId,
    change: ProposalChange,
    /// The meter that the proposal is about.
    about: Option<SystemTitle>,
}

impl Act for ChangeProposal {
    type Answer = v1::Proposal;
    type Past = Known;

    fn name(&self) -> &'static str {
        self.change.action().name()
    }

    fn reads(&self) -> Reads {
        let meters = self.about.into_iter().collect();
        Reads { meters, sealed: vec![proposal_row(self.id)], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.change.action(), &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Proposal>, ServiceError> {
        let entry = self.change.apply(view, &self.island, permit, self.id)?;
        Ok(Decision::recorded(entry, shown(view, self.id)?))
    }

    fn again(&self, _: Known, _: &Permit, view: &mut View<'_, '_>) -> Result<v1::Proposal, ServiceError> {
        shown(view, self.id)
    }
}

/// A proposal as it is in the transaction.
fn shown(view: &mut View<'_, '_>, id: ProposalId) -> Result<v1::Proposal, ServiceError> {
    let proposal = view.proposal(id)?.ok_or_else(|| missing(id))?;
    Ok(message(&proposal, view.now()))
}

/// The meter of an action.
const fn concerns(action: &ProposedAction) -> Option<SystemTitle> {
    match action {
        ProposedAction::RaiseCounter(raise) => Some(raise.meter),
        ProposedAction::DestroyRoot(_) | ProposedAction::RecertifyPrincipal(_) => None,
    }
}

const PAGE: u32 = 200;
