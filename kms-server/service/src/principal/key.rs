//! Keys of officers and auditors that other people confirm (I6): a new key after the certificate
//! has ended or is lost, and the confirmation of a key that only one officer has certified.

use async_recursion::async_recursion as boxed;
use kms_domain::{
    Enrolment, Principal, PrincipalId, PrincipalStatus, ProposalId, ProposedAction, Quorum, RecertifyPrincipal,
};
use kms_proto::v1::{self, audit_record::Event};
use kms_store::Reads;

use super::{Principals, changed, enabled, everyone::refuse_shared_key, security_event, unknown};
use crate::island::IslandContext;
use crate::request_digest::request_digest;
use crate::{
    Request,
    certificate::request::CertificationRequest,
    proposal::{NewProposal, Propose, execute, proposal_row},
};
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Permit, View};

/// A key that other people are asked to confirm.
#[derive(Clone, Debug)]
pub struct ProposedKey {
    /// The owner of the key: an officer or auditor.
    pub id: PrincipalId,
    /// SHA-256 of the SubjectPublicKeyInfo (DER), 32 octets.
    pub key_sha256: [u8; 32],
    /// Why.
    pub reason: String,
    /// How many people must approve, besides the proposer.
    pub quorum: Quorum,
}

impl Principals {
    /// Proposes to certify a key of an officer or auditor, or to confirm it if it is already
    /// certified. The proposal itself certifies nothing.
    ///
    /// # Errors
    /// Not permitted; no officer or auditor, or a disabled one; the caller is its person or does
    /// not count (I6); there are too few other officers; or the database is unavailable.
    #[boxed]
    pub async fn propose_key(
        &self,
        caller: &Caller,
        request: Request,
        new: ProposedKey,
    ) -> Result<v1::Proposal, ServiceError> {
        let action = Action::RecertifyPrincipal { role: new.id.role(), own: new.id == caller.principal };
        self.island.require(caller, &action).await?;
        if !new.id.role().is_personal() {
            return Err(ServiceError::invalid(
                "principal",
                format!("`{}` is no person: an officer renews its certificate", new.id),
            ));
        }
        self.enough_officers(caller, &new.id).await.map_err(|refusal| self.on_record(caller, &action, refusal))?;
        let reads = Reads { sealed: vec![principal_row(&new.id)], ..Reads::default() };
        let propose = Propose::new(request.id, action, reads, move |view| {
            let beneficiary = view.principal(&new.id)?;
            let beneficiary = enabled(&new.id, beneficiary)?;
            let action = ProposedAction::RecertifyPrincipal(RecertifyPrincipal {
                principal: new.id.clone(),
                person: person_of(&beneficiary)?,
                key_sha256: new.key_sha256,
            });
            Ok(NewProposal { action, reason: new.reason.clone(), quorum: new.quorum })
        });
        Ok(self.island.door.act(caller, request, propose).await?.value)
    }

    /// Certifies a key as people approved it. All other certificates of the principal end: their
    /// key is lost, or they have already ended.
    ///
    /// # Errors
    /// Not permitted; not approved by enough people (I6), or another key; the key is another
    /// principal's; or a failure of the HSM or the database.
    pub(super) async fn recertify(
        &self,
        caller: &Caller,
        request: kms_domain::RequestId,
        id: PrincipalId,
        certification: &CertificationRequest,
        approved: ProposalId,
    ) -> Result<v1::PrincipalCertificate, ServiceError> {
        let action = Action::RecertifyPrincipal { role: id.role(), own: id == caller.principal };
        self.island.require(caller, &action).await?;
        self.island.require(caller, &Action::CarryOutProposal).await?;
        let issued = self
            .authority
            .principal(&id, certification, self.validity(&id))?
            .sign(&self.island.hsm_for(caller))
            .await?;
        let digest = request_digest(&[
            b"recertify",
            id.to_string().as_bytes(),
            &certification.spki_sha256(),
            &approved.octets(),
        ]);
        let (chain, asking) = (self.chain(), caller.clone());
        let more = Reads { sealed: vec![proposal_row(approved)], ..Reads::default() };
        self.act_among_all(
            caller,
            Request { id: request, digest },
            action,
            id.clone(),
            more,
            move |view, permit, existing, everyone| {
                permit.require(&Action::CarryOutProposal, &Resource::Island)?;
                let mut principal = enabled(&id, existing)?;
                let (ProposedAction::RecertifyPrincipal(recertify), _) = execute(view, permit, approved)? else {
                    return Err(other_content(approved));
                };
                // I6: exactly the principal, the person and the key that people approved.
                fits(&recertify, &principal, approved)?;
                if recertify.key_sha256 != issued.key_sha256 {
                    return Err(other_content(approved));
                }
                refuse_shared_key(&everyone.rows(view)?, &id, &issued.key_sha256)?;
                principal.certificates =
                    vec![issued.for_principal(Enrolment::Proposal, Some(asking.principal.clone()))];
                principal.revision += 1;
                let record = changed(&id, "recertified", Some(&issued), &format!("proposal {approved}"));
                let detail = format!(
                    "`{id}` got the certificate {} by the proposal {approved}; its other certificates ended",
                    hex::encode(&issued.serial)
                );
                view.alert(security_event("principal-recertified", detail));
                Ok((principal, record, Some(issued.clone()), chain.clone()))
            },
        )
        .await
    }

    /// I6: two people who are not the beneficiary must confirm the key: the caller and another
    /// officer. This check outside the writer's transaction only gives an early answer with the
    /// next step: the approvals decide.
    async fn enough_officers(&self, caller: &Caller, beneficiary: &PrincipalId) -> Result<(), ServiceError> {
        let all: Vec<_> = self.all().await?.into_iter().flatten().collect();
        let person = |id: &PrincipalId| all.iter().find(|one| one.id == *id).and_then(|one| one.person.clone());
        let (own, theirs) = (person(&caller.principal), person(beneficiary));
        let now = IslandContext::now();
        let approves = |officer: &Principal| {
            officer.id.role() == kms_domain::Role::Officer
                && officer.status == PrincipalStatus::Enabled
                && officer.live_certificates(now).any(|certificate| certificate.enrolment.counts())
                && officer
                    .person
                    .as_ref()
                    .is_some_and(|one| ![&own, &theirs].into_iter().flatten().any(|other| other.is_same(one)))
        };
        if all.iter().any(|officer| approves(officer)) {
            return Ok(());
        }
        Err(ServiceError::FailedPrecondition {
            reason: "no other officer could approve it: it takes two officers who are not the person in question"
                .to_owned(),
            next_step: format!(
                "for an officer, on the token's machine with the custodians: kms-server officers recertify {beneficiary}"
            ),
        })
    }
}

/// Confirms a key for which the principal has a certificate, as people approved it.
///
/// # Errors
/// Not permitted; the principal is disabled, or has no certificate of this key that has not ended.
pub(crate) fn confirm(
    view: &mut View<'_, '_>,
    permit: &Permit,
    recertify: &RecertifyPrincipal,
    approved: ProposalId,
) -> Result<(), ServiceError> {
    let id = &recertify.principal;
    let action = Action::RecertifyPrincipal { role: id.role(), own: *id == permit.principal().id };
    permit.require(&action, &Resource::Island)?;
    let existing = view.principal(id)?;
    let mut principal = enabled(id, existing)?;
    fits(recertify, &principal, approved)?;
    let now = view.now();
    let mut serials = Vec::new();
    for certificate in principal
        .certificates
        .iter_mut()
        .filter(|one| now < one.not_after && one.key_sha256 == Some(recertify.key_sha256))
    {
        certificate.enrolment = Enrolment::Proposal;
        serials.push(hex::encode(&certificate.serial));
    }
    if serials.is_empty() {
        return Err(ServiceError::FailedPrecondition {
            reason: format!(
                "`{id}` has no certificate of this key that has not ended: the key is to be certified, not confirmed"
            ),
            next_step: format!(
                "certify it with `kms principal renew {id} --certificate-request FILE --proposal {approved} --out FILE`"
            ),
        });
    }
    principal.revision += 1;
    let record = v1::PrincipalChanged {
        certificate_serial: serials.join(", "),
        ..changed(id, "confirmed", None, &format!("proposal {approved}"))
    };
    view.append(Event::PrincipalChanged(record));
    view.put_principal(principal)
}

fn fits(recertify: &RecertifyPrincipal, principal: &Principal, approved: ProposalId) -> Result<(), ServiceError> {
    let same = recertify.principal == principal.id
        && principal.person.as_ref().is_some_and(|person| *person == recertify.person);
    if same { Ok(()) } else { Err(other_content(approved)) }
}

fn other_content(approved: ProposalId) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("the proposal {approved} is about another principal or another key"),
        next_step: format!("look at it with `kms proposal show {approved}`"),
    }
}

fn person_of(principal: &Principal) -> Result<kms_domain::PersonName, ServiceError> {
    principal.person.clone().ok_or_else(|| unknown(&principal.id))
}
