//! Renewal of a principal's certificate: by the principal, or by an officer for a machine.

use async_recursion::async_recursion as boxed;

use kms_domain::{Enrolment, Principal, PrincipalId, ProposalId, RequestId, Role, UnixMillis};
use kms_proto::v1;
use kms_store::Reads;

use super::{Principals, changed, enabled, everyone::refuse_shared_key, security_event};
use crate::Request;
use crate::certificate::request::CertificationRequest;
use crate::island::IslandContext;
use crate::request_digest::request_digest;
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;

impl Principals {
    /// Certifies a new TLS key. Earlier certificates stay valid until they end, so that a principal
    /// can change over. There are never more than two valid certificates, and none is dropped for a
    /// new one. An officer or auditor renews their own key, or a `proposal` permits the renewal
    /// ([`super::key`]).
    ///
    /// # Errors
    /// Not permitted; no such principal, or a disabled one; too many certificates; the key belongs
    /// to another principal; or a failure of the HSM or the database.
    #[boxed]
    pub async fn renew(
        &self,
        caller: &Caller,
        request: RequestId,
        id: PrincipalId,
        certification: &CertificationRequest,
        proposal: Option<ProposalId>,
    ) -> Result<v1::PrincipalCertificate, ServiceError> {
        if let Some(approved) = proposal {
            return self.recertify(caller, request, id, certification, approved).await;
        }
        let own = id == caller.principal;
        let action = Action::RenewPrincipal { role: id.role(), own };
        // This early answer tells an officer what to do. The act checks the same again.
        if caller.principal.role().is_personal() {
            self.island.principal(caller).await?;
            refuse_for_another_person(&id, own).map_err(|refusal| self.on_record(caller, &action, refusal))?;
        }
        self.island.require(caller, &action).await?;
        // Nothing is signed that the act would refuse. A repeated request gets its answer in the
        // act.
        let issued = if self.has_room(&id).await? {
            Some(
                self.authority
                    .principal(&id, certification, self.validity(&id))?
                    .sign(&self.island.hsm_for(caller))
                    .await?,
            )
        } else {
            None
        };
        let digest = request_digest(&[b"renew", id.to_string().as_bytes(), &certification.spki_sha256()]);
        let chain = self.chain();
        let asking = caller.clone();
        self.act_among_all(
            caller,
            Request { id: request, digest },
            action,
            id.clone(),
            Reads::default(),
            move |view, _, existing, everyone| {
                // I6: this holds whatever the policies say.
                refuse_for_another_person(&id, own)?;
                let mut principal = enabled(&id, existing)?;
                let now = view.now();
                let enrolment = match principal.certificate(&asking.certificate_sha256) {
                    Some(certificate) if own => certificate.enrolment.renewed(),
                    _ => Enrolment::OnePerson,
                };
                principal.certificates.retain(|certificate| now < certificate.not_after);
                if let Err(refusal) = refuse_too_many(&principal, now) {
                    view.alert_refused("renewal-beyond-bound", refusal.to_string());
                    return Err(refusal);
                }
                let issued = issued.clone().ok_or_else(|| ServiceError::Aborted {
                    reason: "a certificate of the principal ended at the same moment".to_owned(),
                    next_step: "ask again".to_owned(),
                })?;
                refuse_shared_key(&everyone.rows(view)?, &id, &issued.key_sha256)?;
                principal
                    .certificates
                    .push(issued.for_principal(enrolment, Some(asking.principal.clone()).filter(|_| !own)));
                principal.revision += 1;
                if !own {
                    let detail = format!(
                        "`{}` made the certificate {} for `{id}`",
                        asking.principal,
                        hex::encode(&issued.serial)
                    );
                    view.alert(security_event("certificate-made-by-another", detail));
                }
                let record = changed(&id, "renewed", Some(&issued), "");
                Ok((principal, record, Some(issued), chain.clone()))
            },
        )
        .await
    }

    /// Whether the principal may have one more certificate, by its row outside the writer's
    /// transaction.
    async fn has_room(&self, id: &PrincipalId) -> Result<bool, ServiceError> {
        let (kind, name) = principal_row(id);
        let Some(row) = self.island.store.sealed(kind, &name).await? else { return Ok(true) };
        let now = IslandContext::now();
        // A row that does not verify is refused in the act.
        Ok(self
            .island
            .committer
            .open_principal(id, &row)
            .map_or(true, |principal| principal.live_certificates(now).count() < MOST_CERTIFICATES))
    }
}

/// I6: an officer who certifies a key of their own in another person's name could act as two
/// people.
fn refuse_for_another_person(id: &PrincipalId, own: bool) -> Result<(), ServiceError> {
    if own || !id.role().is_personal() {
        return Ok(());
    }
    let custodians = match id.role() {
        Role::Officer => format!(
            "; where there are not two, the custodians do, on the token's machine: `kms-server officers recertify {id}`"
        ),
        _ => String::new(),
    };
    Err(ServiceError::FailedPrecondition {
        reason: format!("nobody certifies a key for another person alone (I6), and `{id}` is a person's"),
        next_step: format!(
            "the person runs `kms principal renew`; if the certificate has ended or is lost, two other officers act: one with \
             `kms principal propose-key {id}`, another approves{custodians}"
        ),
    })
}

/// A thief of a key who renews must not displace the owner's certificate: one more certificate is
/// refused, and none is dropped.
fn refuse_too_many(principal: &Principal, now: UnixMillis) -> Result<(), ServiceError> {
    if principal.certificates.len() < MOST_CERTIFICATES {
        return Ok(());
    }
    let serials: Vec<String> =
        principal.certificates.iter().map(|certificate| hex::encode(&certificate.serial)).collect();
    let first = principal.certificates.iter().map(|certificate| certificate.not_after).min().unwrap_or(now);
    Err(ServiceError::FailedPrecondition {
        reason: format!(
            "`{}` has {} certificates that have not ended ({}), and the bound is {MOST_CERTIFICATES}: the one in use and its successor",
            principal.id,
            serials.len(),
            serials.join(", ")
        ),
        next_step: format!(
            "an officer ends one that is not in use with `kms principal end-certificate {} SERIAL`; if you do not know one of them, somebody else has the \
             key: tell the officers at once; otherwise wait: the first ends in {} days",
            principal.id,
            first.0.saturating_sub(now.0).div_euclid(86_400_000) + 1
        ),
    })
}

/// The most certificates of one principal that have not ended: the one in use and its successor.
const MOST_CERTIFICATES: usize = 2;
