//! Proposals: dangerous actions that other people approve before they run (I6).
//!
//! A dangerous use case makes a `Propose` instead of acting. When enough people have approved, an
//! officer executes the proposal: the use case gets the content from `execute`, in the
//! transaction in which it acts, and checks that the content still fits.

use std::sync::Arc;

use kms_domain::{
    Principal, Proposal, ProposalContent, ProposalError, ProposalId, ProposedAction, Quorum, RequestId, RootKind,
    SystemTitle, UnixMillis,
};
use kms_proto::v1::{self, ProposalEnded, ProposalMade, audit_record::Event};
use kms_store::{Reads, RowKind};

use super::principal::people::counted_person;
use kms_authz::{Action, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Entry, Known, Permit, View, used_for_another};

/// A proposal to make.
#[derive(Clone, Debug)]
pub struct NewProposal {
    /// The action to execute.
    pub action: ProposedAction,
    /// Why, 1–256 octets.
    pub reason: String,
    /// How many people must approve, besides the proposer.
    pub quorum: Quorum,
}

/// The act that makes a proposal. The proposal gets the id of the request.
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
    /// A proposal of this action on the island. `content` makes its content from the rows of
    /// `reads`.
    pub(super) const fn new(request: RequestId, action: Action, reads: Reads, content: F) -> Self {
        Self { request, action, about: None, reads, content }
    }

    /// The same on a meter.
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

/// Stores a proposal under the id of its request, and records it.
///
/// # Errors
/// The caller is not a person, or the id is already in use.
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

/// Marks a proposal as executed and records it. Returns the action that the caller must do in the
/// same act. A proposal is executed once: a second attempt is refused.
///
/// # Errors
/// There is no such proposal; it was executed or withdrawn; or its approvals are missing or have
/// expired (I6).
pub(crate) fn execute(
    view: &mut View<'_, '_>,
    permit: &Permit,
    id: ProposalId,
) -> Result<(ProposedAction, Entry), ServiceError> {
    let mut proposal = Arc::unwrap_or_clone(view.proposal(id)?.ok_or_else(|| missing(id))?);
    let action = proposal.execute(permit.principal().id.clone(), view.now()).map_err(refused)?;
    let entry = view.append(ended(&proposal, "carried-out", ""));
    view.put_proposal(proposal)?;
    Ok((action, entry))
}

/// The id of the proposal that a request makes.
///
/// # Errors
/// None in practice: every request id is a valid proposal id.
pub(crate) fn proposal_id(request: RequestId) -> Result<ProposalId, ServiceError> {
    ProposalId::from_octets(&request.octets()).map_err(ServiceError::parse("request_id"))
}

/// The name of a proposal's row in the store.
pub(crate) fn proposal_row(id: ProposalId) -> (RowKind, Vec<u8>) {
    (RowKind::Proposal, id.octets().to_vec())
}

/// A proposal as a message: exactly what will be executed.
pub(crate) fn message(proposal: &Proposal, now: UnixMillis) -> v1::Proposal {
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

/// The record of a proposal's end.
pub(crate) fn ended(proposal: &Proposal, change: &str, reason: &str) -> Event {
    Event::ProposalEnded(ProposalEnded {
        proposal_id: proposal.id.octets().to_vec().into(),
        change: change.to_owned(),
        reason: reason.to_owned(),
        action: proposal.content.action.to_string(),
    })
}

/// Why a proposal cannot change, and the next step.
pub(crate) fn refused(error: ProposalError) -> ServiceError {
    let next_step = match &error {
        ProposalError::State { .. } => "look at it with `kms proposal show`",
        ProposalError::Approval(error) => error.next_step(),
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

/// The error for an unknown proposal.
pub(crate) fn missing(id: ProposalId) -> ServiceError {
    ServiceError::NotFound { what: format!("proposal {id}") }
}
