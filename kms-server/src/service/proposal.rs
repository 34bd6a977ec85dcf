//! Proposals: dangerous actions that other people approve before they run (I6).
//!
//! A use case that is dangerous calls [`propose`] instead of acting. When enough people have
//! approved, an officer carries the proposal out: its use case gets the content from [`carry_out`],
//! in the transaction in which it acts, and checks that it still fits.

#[cfg(test)]
mod tests;

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
use crate::{
    audit::{Actor, Asked, Asking, View, Window, used_for_another},
    authz::{Action, Caller, Resource},
    error::ServiceError,
    island::{Island, facts, principal_row},
};

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

    /// Carries it out, and records it.
    fn apply(
        &self,
        view: &mut View<'_, '_>,
        island: &Island,
        principal: &Principal,
        id: ProposalId,
    ) -> Result<(), ServiceError> {
        let now = view.now();
        let mut proposal = Arc::unwrap_or_clone(view.proposal(id)?.ok_or_else(|| missing(id))?);
        match self {
            Self::Approve { content_sha256 } => {
                // I6: a person approves, not a certificate.
                let person = counted_person(view, principal, "approveProposal")?;
                let approval = Approval { principal: principal.id.clone(), person: person.clone(), time: now };
                proposal.approve(approval, content_sha256).map_err(refused)?;
                view.append(Event::ProposalApproved(ProposalApproved {
                    proposal_id: id.octets().to_vec().into(),
                    person: person.as_str().to_owned(),
                    content_sha256: content_sha256.to_vec().into(),
                    complete: proposal.approvals.suffice(&proposal.terms()),
                }));
                view.put_proposal(proposal)
            }
            Self::Withdraw { reason } => {
                proposal.withdraw(principal.id.clone(), now).map_err(refused)?;
                view.append(ended(&proposal, "withdrawn", reason));
                view.put_proposal(proposal)
            }
            Self::CarryOut => match carry_out(view, principal, id)? {
                ProposedAction::RaiseCounter(raise) => raise_counter(view, island, principal, &raise, id),
                ProposedAction::RecertifyPrincipal(recertify) => confirm(view, island, principal, &recertify, id),
                ProposedAction::DestroyRoot(_) => Err(ServiceError::FailedPrecondition {
                    reason:
                        "the destruction of a root is more than a change of rows, and is not carried out by this call"
                            .to_owned(),
                    next_step: format!("carry it out with `kms roots destroy {id}`"),
                }),
            },
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
    pub async fn show(&self, caller: &Caller, id: ProposalId) -> Result<v1::Proposal, ServiceError> {
        self.island.require(caller, &Action::ListProposals).await?;
        Ok(message(&*self.load(id).await?, Island::now()))
    }

    /// Approves, withdraws or carries out. A request that comes again changes nothing more.
    ///
    /// # Errors
    /// Not permitted, no such proposal, its state or the rules of approval (I6) forbid it, what it
    /// does fits no more, or the database is away.
    pub async fn change(
        &self,
        caller: &Caller,
        request: Request,
        id: ProposalId,
        change: Change,
    ) -> Result<v1::Proposal, ServiceError> {
        let action = change.action();
        self.island.require(caller, &action).await?;
        let asking = Asking::new(caller, request.id, request.digest, Window::Administration);
        let mut reads = Reads {
            sealed: vec![principal_row(&caller.principal), proposal_row(id)],
            requests: asking.reads(),
            ..Reads::default()
        };
        reads.meters.extend(concerns(&self.load(id).await?.content.action));
        let actor = Actor::caller(caller, Some(request.id), action.name());
        let (island, caller) = (self.island.clone(), caller.clone());
        let committed = self
            .island
            .committer
            .act(actor, reads, move |view| {
                let principal = view.caller(&caller)?;
                island.policy.load().require(&facts(&principal), &action, &Resource::Island)?;
                if let Asked::First = view.asked(&asking)? {
                    change.apply(view, &island, &principal, id)?;
                    view.answered(&asking);
                }
                let proposal = view.proposal(id)?.ok_or_else(|| missing(id))?;
                Ok(message(&proposal, view.now()))
            })
            .await?;
        Ok(committed.value)
    }

    /// A proposal as it stands in the database now.
    async fn load(&self, id: ProposalId) -> Result<Arc<Proposal>, ServiceError> {
        let row = self.island.store.sealed(RowKind::Proposal, &id.octets()).await?.ok_or_else(|| missing(id))?;
        self.island.committer.open_proposal(id, &row)
    }
}

/// What is proposed, within the act of its use case.
#[derive(Clone, Debug)]
pub struct NewProposal {
    /// What is to run.
    pub action: ProposedAction,
    /// Why, 1–256 octets.
    pub reason: String,
    /// How many people must approve, beside the one who proposes.
    pub quorum: Quorum,
}

/// Stores a proposal under the id of the request that makes it, and records it. The use case has
/// asked its policy (I8), and names [`proposal_row`] among its reads.
///
/// # Errors
/// The caller is no person, or there is such a proposal already.
pub fn propose(
    view: &mut View<'_, '_>,
    principal: &Principal,
    request: RequestId,
    new: NewProposal,
) -> Result<Proposal, ServiceError> {
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
    view.append(Event::ProposalMade(ProposalMade {
        proposal_id: id.octets().to_vec().into(),
        action: proposal.content.action.to_string(),
        reason: proposal.content.reason.clone(),
        content_sha256: proposal.content_digest().to_vec().into(),
        quorum: proposal.content.quorum.number().into(),
        expires_ms: proposal.content.expires.0,
    }));
    view.put_proposal(proposal.clone())?;
    Ok(proposal)
}

/// Marks a proposal as carried out, records it, and says what the caller has to do in this act. It
/// runs once: whoever comes second is refused.
///
/// # Errors
/// There is no such proposal, it ran or was withdrawn, or people have not approved it (I6), or no
/// more.
pub fn carry_out(
    view: &mut View<'_, '_>,
    principal: &Principal,
    id: ProposalId,
) -> Result<ProposedAction, ServiceError> {
    let mut proposal = Arc::unwrap_or_clone(view.proposal(id)?.ok_or_else(|| missing(id))?);
    let action = proposal.carry_out(principal.id.clone(), view.now()).map_err(refused)?;
    view.append(ended(&proposal, "carried-out", ""));
    view.put_proposal(proposal)?;
    Ok(action)
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
