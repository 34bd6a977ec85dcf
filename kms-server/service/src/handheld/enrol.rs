//! A device answers an invitation: the one use case of a caller that is no principal yet.
//!
//! Nobody has authenticated the device, so the act is the server's own (`ServerAct::ENROL`), and
//! its record names the invitation. What permits it is the right of the officer who made the
//! invitation: the officer's row and the policies are read again in the transaction (I8), so the
//! invitations of an officer who was disabled are worth nothing.
//!
//! A stranger learns nothing but whether a code is accepted. Every other end has one text, and
//! comes after the same time.

use std::sync::Arc;
use std::time::Duration;

use async_recursion::async_recursion as boxed;
use bytes::Bytes;
use kms_domain::{
    Assurance, CodeId, CodeSecret, EnrolledDevice, Enrolment, Invitation, InvitationEnd, InvitationState, Occasion,
    Principal, PrincipalId, PrincipalStatus,
};
use kms_proto::v1::{self, HandheldEnrolled, WrongEnrolmentCode, audit_record::Event};
use kms_store::Reads;
use tokio::time::Instant;

use super::refuse_titles_of_meters;
use crate::certificate::CertificateAuthority;
use crate::certificate::request::CertificationRequest;
use crate::certificate::signing::IssuedCertificate;
use crate::island::IslandContext;
use crate::principal::everyone::{Everyone, refuse_shared_key, refuse_shared_titles};
use crate::principal::{enabled, security_event, validity};
use kms_authz::{Action, Resource};
use kms_base::bounds::Bound;
use kms_base::error::ServiceError;
use kms_ledger::{Asker, Decision, ServerAct, View, invitation_row, principal_row};

/// Enrols devices.
pub struct EnrolmentService {
    island: Arc<IslandContext>,
    authority: CertificateAuthority,
}

/// What a device sends.
#[derive(Clone, Debug)]
pub struct EnrolRequest {
    /// The handheld that the code names.
    pub handheld: PrincipalId,
    /// The public part of the code.
    pub code_id: CodeId,
    /// The secret of the code.
    pub secret: CodeSecret,
    /// The request for the certificate of the device's TLS key.
    pub tls: CertificationRequest,
    /// The same for its transport key, another one.
    pub transport: CertificationRequest,
    /// Where the device has its keys, as it says.
    pub assurance: Assurance,
}

impl EnrolRequest {
    /// The SHA-256 of its TLS key and of its transport key.
    fn keys(&self) -> ([u8; 32], [u8; 32]) {
        (self.tls.spki_sha256(), self.transport.spki_sha256())
    }
}

impl EnrolmentService {
    /// The use case for an island with this authority.
    pub const fn new(island: Arc<IslandContext>, authority: CertificateAuthority) -> Self {
        Self { island, authority }
    }

    /// The island.
    pub const fn island(&self) -> &Arc<IslandContext> {
        &self.island
    }

    /// Enrols a device. Its certificates are in the answer when its principal and the record are
    /// durable (I2). The same device gets the same answer again while the code has not expired.
    ///
    /// # Errors
    /// Unauthenticated: the code is not accepted, for whatever reason. With the right code: the
    /// name or a key is taken, or a failure of the HSM or the database.
    #[boxed]
    pub async fn enrol(&self, asked: EnrolRequest) -> Result<v1::EnrolResponse, ServiceError> {
        let not_before = Instant::now() + REFUSED_AFTER;
        let outcome = self.attempt(Arc::new(asked)).await;
        if outcome.is_err() {
            // Neither the text nor the time tells why.
            tokio::time::sleep_until(not_before).await;
        }
        outcome
    }

    async fn attempt(&self, asked: Arc<EnrolRequest>) -> Result<v1::EnrolResponse, ServiceError> {
        let (kind, name) = invitation_row(&asked.handheld);
        let row = self.island.store.sealed(kind, &name).await?;
        // A row that does not verify is on the record of who opens it, and no row for a stranger.
        let invitation = row.and_then(|row| self.island.committer.open_invitation(&asked.handheld, &row).ok());
        let Some(invitation) = invitation.filter(|invitation| invitation.code_id == asked.code_id) else {
            return Err(refused());
        };
        if !invitation.is_answered_by(&asked.secret) {
            let counted = self.count_wrong_code(asked).await?;
            return Err(if counted { refused().recorded() } else { refused() });
        }
        // Nothing is signed that the act would refuse.
        let issued = if invitation.state(IslandContext::now()) == InvitationState::Pending {
            Some(self.sign(&asked).await?)
        } else {
            None
        };
        let mut answer = Everyone::consistently(&self.island, |everyone| {
            let (asked, issued, invited_by) = (Arc::clone(&asked), issued.clone(), invitation.invited_by.clone());
            let mut reads = everyone.reads();
            reads.sealed.extend([invitation_row(&asked.handheld), principal_row(&asked.handheld)]);
            reads.sealed.push(principal_row(&invited_by));
            reads.meters.extend(&invitation.client_titles);
            let (policy, committer) = (Arc::clone(&self.island.policy), &self.island.committer);
            async move {
                let act = committer.act(ServerAct::ENROL, reads, move |view| {
                    let invitation = view.invitation(&asked.handheld)?.ok_or_else(refused)?;
                    if !fits(&invitation, &asked) {
                        return Err(refused());
                    }
                    // A thief is noticed whatever became of the officer.
                    refuse_second_device(view, &asked, &invitation)?;
                    let inviter = view.principal(&invitation.invited_by)?.ok_or_else(refused)?;
                    // I8: the right of the officer, as it is now.
                    let action = match invitation.occasion {
                        Occasion::First => Action::InviteHandheld,
                        Occasion::HandOver => Action::HandOverHandheld,
                    };
                    let may_invite = inviter.status == PrincipalStatus::Enabled
                        && Asker::new(inviter, policy.load_full()).permits(&action, &Resource::Island);
                    if !may_invite {
                        return Err(refused());
                    }
                    decide(view, &asked, &invitation, issued.as_ref(), &everyone)
                });
                Ok(act.await?.value)
            }
        })
        .await?;
        answer.chain = vec![Bytes::copy_from_slice(self.authority.certificate())];
        Ok(answer)
    }

    async fn sign(&self, asked: &EnrolRequest) -> Result<Issued, ServiceError> {
        let hsm = self.island.hsm.paid_by(PAYER);
        let validity = validity(&self.island, &asked.handheld, self.island.limits.handheld_days());
        Ok(Issued {
            tls: self.authority.principal(&asked.handheld, &asked.tls, validity)?.sign(&hsm).await?,
            transport: self.authority.transport(&asked.handheld, &asked.transport, validity)?.sign(&hsm).await?,
        })
    }

    /// Counts a wrong code, on the record. The last one ends the invitation. False: there is
    /// nothing to count, because the invitation has ended.
    async fn count_wrong_code(&self, asked: Arc<EnrolRequest>) -> Result<bool, ServiceError> {
        let most = u32::try_from(self.island.limits.of(Bound::WrongCodesPerInvitation)).unwrap_or(u32::MAX);
        let reads = Reads { sealed: vec![invitation_row(&asked.handheld)], ..Reads::default() };
        let counted = self.island.committer.act(ServerAct::ENROL, reads, move |view| {
            let now = view.now();
            let Some(known) = view.invitation(&asked.handheld)? else { return Ok(Decision::unchanged(false)) };
            let another = known.code_id != asked.code_id || known.is_answered_by(&asked.secret);
            if another || known.state(now) != InvitationState::Pending {
                return Ok(Decision::unchanged(false));
            }
            let mut invitation = Arc::unwrap_or_clone(known);
            let ended = invitation.count_wrong_code(most, now);
            let entry = view.append(Event::WrongEnrolmentCode(WrongEnrolmentCode {
                handheld: asked.handheld.to_string(),
                code_id: Bytes::copy_from_slice(&invitation.code_id.0),
                wrong_codes: invitation.wrong_codes,
                ended,
            }));
            if ended {
                Bound::WrongCodesPerInvitation.count();
                let detail = format!(
                    "{} wrong codes came for the invitation of `{}`, which has ended: somebody who has seen a part of the code guesses, or the code was copied wrongly",
                    invitation.wrong_codes, asked.handheld
                );
                view.alert(security_event("enrolment-wrong-codes", detail));
            }
            view.put_invitation(invitation)?;
            Ok(Decision::recorded(entry, true))
        });
        Ok(counted.await?.value)
    }
}

/// The certificates of a device, signed and not yet issued.
#[derive(Clone)]
struct Issued {
    tls: IssuedCertificate,
    transport: IssuedCertificate,
}

fn fits(invitation: &Invitation, asked: &EnrolRequest) -> bool {
    invitation.code_id == asked.code_id && invitation.is_answered_by(&asked.secret)
}

/// Refuses a device whose code was used with other keys, on the record: two devices have had it.
fn refuse_second_device(
    view: &mut View<'_, '_>,
    asked: &EnrolRequest,
    invitation: &Invitation,
) -> Result<(), ServiceError> {
    let Some(InvitationEnd::Used(device)) = &invitation.end else { return Ok(()) };
    if (device.tls_key_sha256, device.transport_key_sha256) == asked.keys() {
        return Ok(());
    }
    let (handheld, technician) = (&asked.handheld, invitation.technician.as_str());
    view.alert_refused(
        "enrolment-code-twice",
        format!(
            "a second device came with the code of `{handheld}`, which another one has used: ask `{technician}` whether the first one is theirs; if not, somebody \
             has the code: `kms principal disable {handheld}`; if `{technician}` has one device, whose files were lost before the first answer came: \
             `kms handheld hand-over {} --technician '{technician}'`",
            handheld.name()
        ),
    );
    Err(refused())
}

/// Enrols the device that has the right code, or gives it the answer that it had.
fn decide(
    view: &mut View<'_, '_>,
    asked: &EnrolRequest,
    invitation: &Invitation,
    issued: Option<&Issued>,
    everyone: &Everyone,
) -> Result<Decision<v1::EnrolResponse>, ServiceError> {
    let now = view.now();
    let keys = asked.keys();
    if let Some(InvitationEnd::Used(device)) = &invitation.end {
        // The same device: its answer was lost on its way.
        return if now < invitation.expires {
            Ok(Decision::unchanged(answer(invitation, device)))
        } else {
            Err(refused())
        };
    }
    if invitation.state(now) != InvitationState::Pending {
        return Err(refused());
    }
    let issued = issued.ok_or_else(|| ServiceError::Aborted {
        reason: "the invitation was changed at the same moment".to_owned(),
        next_step: "try again".to_owned(),
    })?;
    refuse_shared_key(&everyone.rows(view)?, &asked.handheld, &issued.tls.key_sha256)?;
    // Counts one more: no rows of all principals are read afterwards.
    let mut principal = enrolled_principal(view, invitation, everyone)?;
    let not_p256 = || ServiceError::Internal("a transport certificate without a P-256 key".to_owned());
    // I6: one officer stands behind it. Nobody counts as a person with a handheld anyway.
    let certificate = issued.tls.for_principal(Enrolment::OnePerson, Some(invitation.invited_by.clone()));
    principal.certificates = vec![certificate];
    principal.transport = Some(issued.transport.for_transport().ok_or_else(not_p256)?);
    principal.assurance = Some(asked.assurance);
    principal.revision += 1;
    principal.check().map_err(ServiceError::parse("name"))?;
    let device = EnrolledDevice {
        time: now,
        tls_key_sha256: keys.0,
        transport_key_sha256: keys.1,
        certificate: Bytes::copy_from_slice(&issued.tls.der),
        transport_certificate: Bytes::copy_from_slice(&issued.transport.der),
    };
    let entry = view.append(Event::HandheldEnrolled(HandheldEnrolled {
        handheld: asked.handheld.to_string(),
        technician: invitation.technician.as_str().to_owned(),
        code_id: Bytes::copy_from_slice(&invitation.code_id.0),
        invited_by: invitation.invited_by.to_string(),
        assurance: asked.assurance.name().to_owned(),
        occasion: invitation.occasion.name().to_owned(),
        certificate_serial: hex::encode(&issued.tls.serial),
        key_sha256: Bytes::copy_from_slice(&keys.0),
        transport_key_sha256: Bytes::copy_from_slice(&keys.1),
    }));
    let answer = answer(invitation, &device);
    view.put_principal(principal)?;
    view.put_invitation(Invitation { end: Some(InvitationEnd::Used(device)), ..invitation.clone() })?;
    Ok(Decision::recorded(entry, answer))
}

/// The principal that the device becomes, still without keys.
fn enrolled_principal(
    view: &mut View<'_, '_>,
    invitation: &Invitation,
    everyone: &Everyone,
) -> Result<Principal, ServiceError> {
    let id = &invitation.handheld;
    let existing = view.principal(id)?;
    match invitation.occasion {
        Occasion::First => {
            if existing.is_some() {
                return Err(ServiceError::FailedPrecondition {
                    reason: format!("`{id}` exists"),
                    next_step: "ask an officer for an invitation under another name".to_owned(),
                });
            }
            refuse_titles_of_meters(view, &invitation.client_titles)?;
            refuse_shared_titles(&everyone.rows(view)?, id, &invitation.client_titles)?;
            everyone.count_one_more(view)?;
            Ok(Principal {
                id: id.clone(),
                revision: 0,
                status: PrincipalStatus::Enabled,
                certificates: Vec::new(),
                transport: None,
                client_titles: invitation.client_titles.clone(),
                person: Some(invitation.technician.clone()),
                assurance: None,
                shipment_key: None,
                added: view.now(),
            })
        }
        Occasion::HandOver => {
            let principal = enabled(id, existing)?;
            // An officer has certified a key of it in between: that one is in use.
            if principal.can_act(view.now()) {
                return Err(refused());
            }
            Ok(principal)
        }
    }
}

fn answer(invitation: &Invitation, device: &EnrolledDevice) -> v1::EnrolResponse {
    v1::EnrolResponse {
        handheld: invitation.handheld.to_string(),
        technician: invitation.technician.as_str().to_owned(),
        certificate: device.certificate.clone(),
        transport_certificate: device.transport_certificate.clone(),
        client_titles: invitation.client_titles.iter().map(|title| Bytes::copy_from_slice(&title.octets())).collect(),
        ..v1::EnrolResponse::default()
    }
}

/// The one refusal of all codes that are not accepted.
fn refused() -> ServiceError {
    ServiceError::unauthenticated(
        "the enrolment code is not accepted: it is wrong, was used or withdrawn, or its time is over; ask an officer for another one",
    )
}

/// What the HSM's queue calls enrolments, so that they wait for each other and not for principals.
const PAYER: &str = "enrolment";
/// When a refusal is answered: later than the slowest way to it takes in a server that is not
/// overloaded.
const REFUSED_AFTER: Duration = Duration::from_millis(500);
