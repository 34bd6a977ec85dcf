//! Proposals: dangerous actions that other people approve before they run (I6).
//!
//! A use case that is dangerous makes a `Propose` instead of acting. When enough people have
//! approved, an officer carries the proposal out: its use case gets the content from [`carry_out`],
//! in the transaction in which it acts, and checks that it still fits.

#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use kms_domain::{
    Approval, Principal, Proposal, ProposalContent, ProposalError, ProposalId, ProposedAction, Quorum, RequestId,
    RootKind, SystemTitle, UnixMillis,
};
use kms_proto::v1::{self, ProposalApproved, ProposalEnded, ProposalMade, audit_record::Event};
use kms_store::{Reads, RowKind};

pub use super::Request;
use super::{
    meter::raise_counter,
    principal::{key::confirm, people::counted_person},
};
use crate::island::Island;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Entry, Known, Permit, View, used_for_another};

/// The use cases of proposals.
#[derive(Clone)]
pub struct ProposalService {
    island: Arc<Island>,
}

/// What an officer does with a proposal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Approves the content with this digest.
    Approve {
        /// SHA-256 of the content that the approver has looked at.
        content_sha256: [u8; 32],
    },
    /// Ends it unused.
    Withdraw {
        /// Why.
        reason: String,
    },
    /// Carries it out.
    CarryOut,
}

impl Change {
    const fn action(&self) -> Action {
        match self {
            Self::Approve { .. } => Action::ApproveProposal,
            Self::Withdraw { .. } => Action::WithdrawProposal,
            Self::CarryOut => Action::CarryOutProposal,
        }
    }

    /// Executes it, and records it.
    fn apply(
        &self,
        view: &mut View<'_, '_>,
        island: &Island,
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
            Self::CarryOut => {
                let (action, entry) = carry_out(view, permit, id)?;
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
    pub const fn new(island: Arc<Island>) -> Self {
        Self { island }
    }

    /// Up to `limit` proposals before an id, the newest first.
    ///
    /// # Errors
    /// Not permitted, or the database is away.
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
            // One whose row does not verify is left out, and reported by the scrubber (I5).
            proposals.extend(page.iter().filter_map(|(id, row)| {
                self.island.committer.open_proposal(ProposalId::from_octets(id).ok()?, row).ok()
            }));
        }
        // Ids are time-ordered (UUID version 7).
        proposals.retain(|proposal| before.is_none_or(|before| proposal.id.octets() < before.octets()));
        let now = Island::now();
        Ok(proposals.iter().rev().take(limit).map(|proposal| message(proposal, now)).collect())
    }

    /// One proposal.
    ///
    /// # Errors
    /// Not permitted, no such proposal, or the database is away.
    #[boxed]
    pub async fn show(&self, caller: &Caller, id: ProposalId) -> Result<v1::Proposal, ServiceError> {
        self.island.require(caller, &Action::ListProposals).await?;
        Ok(message(&*self.load(id).await?, Island::now()))
    }

    /// Approves, withdraws or carries out. A request that comes again changes nothing more.
    ///
    /// # Errors
    /// Not permitted, no such proposal, its state or the rules of approval (I6) forbid it, what it
    /// does fits no more, or the database is away.
    #[boxed]
    pub async fn change(
        &self,
        caller: &Caller,
        request: Request,
        id: ProposalId,
        change: Change,
    ) -> Result<v1::Proposal, ServiceError> {
        let action = change.action();
        self.island.require(caller, &action).await?;
        let about = concerns(&self.load(id).await?.content.action);
        let act = Step { island: self.island.clone(), id, change, about };
        Ok(self.island.door.act(caller, request, act).await?.value)
    }

    /// A proposal as it stands in the database now.
    async fn load(&self, id: ProposalId) -> Result<Arc<Proposal>, ServiceError> {
        let row = self.island.store.sealed(RowKind::Proposal, &id.octets()).await?.ok_or_else(|| missing(id))?;
        self.island.committer.open_proposal(id, &row)
    }
}

/// What an officer does with a proposal, as one act.
struct Step {
    island: Arc<Island>,
    id: ProposalId,
    change: Change,
    /// The meter that the proposal is about.
    about: Option<SystemTitle>,
}

impl Act for Step {
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

/// A proposal as it stands in the transaction.
fn shown(view: &mut View<'_, '_>, id: ProposalId) -> Result<v1::Proposal, ServiceError> {
    let proposal = view.proposal(id)?.ok_or_else(|| missing(id))?;
    Ok(message(&proposal, view.now()))
}

/// What is proposed.
#[derive(Clone, Debug)]
pub struct NewProposal {
    /// What is to run.
    pub action: ProposedAction,
    /// Why, 1–256 octets.
    pub reason: String,
    /// How many people must approve, beside the one who proposes.
    pub quorum: Quorum,
}

/// A proposal under the id of the request that makes it, as one act.
pub(super) struct Propose<F> {
    request: RequestId,
    action: Action,
    about: Option<SystemTitle>,
    reads: Reads,
    content: F,
}

impl<F> Propose<F>
where
    F: Fn(&mut View<'_, '_>) -> Result<NewProposal, ServiceError> + Send + Sync + 'static,
{
    /// What an officer proposes with this action, on the island; `content` says what exactly, from
    /// the rows of `reads`.
    pub(super) const fn new(request: RequestId, action: Action, reads: Reads, content: F) -> Self {
        Self { request, action, about: None, reads, content }
    }

    /// The same, on a meter.
    pub(super) fn about(mut self, meter: SystemTitle) -> Self {
        self.about = Some(meter);
        self.reads.meters.push(meter);
        self
    }
}

impl<F> Act for Propose<F>
where
    F: Fn(&mut View<'_, '_>) -> Result<NewProposal, ServiceError> + Send + Sync + 'static,
{
    type Answer = v1::Proposal;
    type Past = Known;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        let mut reads = self.reads.clone();
        reads.sealed.extend(proposal_id(self.request).map(proposal_row));
        reads
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let Some(title) = self.about else { return asker.require(&self.action, &Resource::Island) };
        let denied = || ServiceError::denied(format!("{} with meter {title}", self.action.name()));
        let meter = view.meter(title)?.ok_or_else(denied)?;
        asker.require_or(&self.action, &Resource::Meters(&meter.class), denied)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Proposal>, ServiceError> {
        let new = (self.content)(view)?;
        let (proposal, entry) = propose(view, permit.principal(), self.request, new)?;
        Ok(Decision::recorded(entry, message(&proposal, view.now())))
    }

    fn again(&self, _: Known, _: &Permit, view: &mut View<'_, '_>) -> Result<v1::Proposal, ServiceError> {
        let known = view.proposal(proposal_id(self.request)?)?;
        let known = known.ok_or_else(|| ServiceError::Internal("the proposal of a past request is gone".to_owned()))?;
        Ok(message(&known, view.now()))
    }
}

/// Stores a proposal under the id of the request that makes it, and records it.
///
/// # Errors
/// The caller is no person, or there is such a proposal already.
fn propose(
    view: &mut View<'_, '_>,
    principal: &Principal,
    request: RequestId,
    new: NewProposal,
) -> Result<(Proposal, Entry), ServiceError> {
    let id = proposal_id(request)?;
    if view.proposal(id)?.is_some() {
        return Err(used_for_another());
    }
    // I6: a person proposes, not a certificate.
    let requester_person = counted_person(view, principal, "a proposal by somebody who is no person")?;
    let created = view.now();
    let content = ProposalContent {
        action: new.action,
        reason: new.reason,
        requester: principal.id.clone(),
        requester_person,
        quorum: new.quorum,
        created,
        expires: created.after(Proposal::LIFETIME_MS),
    };
    let proposal = Proposal::new(id, content).map_err(|error| ServiceError::invalid(error.what(), error.reason()))?;
    let entry = view.append(Event::ProposalMade(ProposalMade {
        proposal_id: id.octets().to_vec().into(),
        action: proposal.content.action.to_string(),
        reason: proposal.content.reason.clone(),
        content_sha256: proposal.content_digest().to_vec().into(),
        quorum: proposal.content.quorum.number().into(),
        expires_ms: proposal.content.expires.0,
    }));
    view.put_proposal(proposal.clone())?;
    Ok((proposal, entry))
}

/// Marks a proposal as executed, records it, and says what the caller has to do in this act. It
/// runs once: whoever comes second is refused.
///
/// # Errors
/// There is no such proposal, it ran or was withdrawn, or people have not approved it (I6), or no
/// more.
pub fn carry_out(
    view: &mut View<'_, '_>,
    permit: &Permit,
    id: ProposalId,
) -> Result<(ProposedAction, Entry), ServiceError> {
    let mut proposal = Arc::unwrap_or_clone(view.proposal(id)?.ok_or_else(|| missing(id))?);
    let action = proposal.carry_out(permit.principal().id.clone(), view.now()).map_err(refused)?;
    let entry = view.append(ended(&proposal, "carried-out", ""));
    view.put_proposal(proposal)?;
    Ok((action, entry))
}

/// The id of the proposal that a request makes.
///
/// # Errors
/// None: a request id is a fitting one.
pub fn proposal_id(request: RequestId) -> Result<ProposalId, ServiceError> {
    ProposalId::from_octets(&request.octets()).map_err(ServiceError::parse("request_id"))
}

/// The name of a proposal's row in the store.
pub fn proposal_row(id: ProposalId) -> (RowKind, Vec<u8>) {
    (RowKind::Proposal, id.octets().to_vec())
}

/// A proposal as a message: exactly what will run.
pub fn message(proposal: &Proposal, now: UnixMillis) -> v1::Proposal {
    let content = &proposal.content;
    let action = match &content.action {
        ProposedAction::RaiseCounter(raise) => v1::proposal::Action::RaiseCounter(v1::RaiseCounter {
            meter: raise.meter.octets().to_vec().into(),
            security_setup: raise.setup.obis().to_vec().into(),
            key_type: raise.key_type.to_string(),
            key_version: raise.version.number(),
            client_title: raise.client_title.octets().to_vec().into(),
            to: raise.to,
        }),
        ProposedAction::DestroyRoot(root) => v1::proposal::Action::DestroyRoot(v1::DestroyRoot {
            kind: RootKind::name(root.kind).to_owned(),
            key_class: root.class.map(kms_domain::KeyClass::name).unwrap_or_default().to_owned(),
            version: root.version.into(),
            oldest_backup_ms: root.oldest_backup.0,
        }),
        ProposedAction::RecertifyPrincipal(recertify) => {
            v1::proposal::Action::RecertifyPrincipal(v1::RecertifyPrincipal {
                principal: recertify.principal.to_string(),
                person: recertify.person.as_str().to_owned(),
                key_sha256: recertify.key_sha256.to_vec().into(),
            })
        }
    };
    let approvals = proposal.approvals.iter().map(|approval| v1::ProposalApproval {
        principal: approval.principal.to_string(),
        person: approval.person.as_str().to_owned(),
        time_ms: approval.time.0,
    });
    v1::Proposal {
        proposal_id: proposal.id.octets().to_vec().into(),
        action: Some(action),
        description: content.action.to_string(),
        reason: content.reason.clone(),
        requester: content.requester.to_string(),
        requester_person: content.requester_person.as_str().to_owned(),
        quorum: content.quorum.number().into(),
        created_ms: content.created.0,
        expires_ms: content.expires.0,
        content_sha256: proposal.content_digest().to_vec().into(),
        approvals: approvals.collect(),
        state: proposal.state(now).name().to_owned(),
        ended_by: proposal.end.as_ref().map(|end| end.principal.to_string()).unwrap_or_default(),
        ended_ms: proposal.end.as_ref().map_or(0, |end| end.time.0),
    }
}

/// The meter that an action is about.
const fn concerns(action: &ProposedAction) -> Option<SystemTitle> {
    match action {
        ProposedAction::RaiseCounter(raise) => Some(raise.meter),
        ProposedAction::DestroyRoot(_) | ProposedAction::RecertifyPrincipal(_) => None,
    }
}

fn ended(proposal: &Proposal, change: &str, reason: &str) -> Event {
    Event::ProposalEnded(ProposalEnded {
        proposal_id: proposal.id.octets().to_vec().into(),
        change: change.to_owned(),
        reason: reason.to_owned(),
        action: proposal.content.action.to_string(),
    })
}

fn refused(error: ProposalError) -> ServiceError {
    let next_step = match &error {
        ProposalError::State { .. } => "look at it with `kms proposal show`",
        ProposalError::Approval(error) => error.next_step(),
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

fn missing(id: ProposalId) -> ServiceError {
    ServiceError::NotFound { what: format!("proposal {id}") }
}

const PAGE: u32 = 200;
