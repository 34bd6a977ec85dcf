//! Recovery of an officer's access by the custodians: they confirm an officer's new key (I6), on
//! the token's machine.
//!
//! Two other officers normally renew a colleague's certificate by a proposal. If there are not two,
//! or if all certificates have ended, nobody can call the server. Recovery then needs the token's
//! PIN and a quorum of custodians. Their shares open the private half of the escrow key that the
//! island's sealed row names. No root is opened.

use async_recursion::async_recursion as boxed;
use std::{path::PathBuf, sync::Arc};

use kms_domain::{Enrolment, PrincipalId, PrincipalStatus, Role, UnixMillis};
use kms_hsm::Hsm;
use kms_proto::v1::{PrincipalChanged, SecurityEvent, audit_record::Event};
use kms_store::Store;
use zeroize::Zeroizing;

use super::{
    certificate::request::CertificationRequest,
    certificate::signing::IssuedCertificate,
    certificate::{CertificateAuthority, Validity},
    escrow::EscrowDocument,
    principal::everyone::{Everyone, refuse_shared_key},
};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Committer, Decision, ServerAct};

/// An officer's new key, and the custodians' shares that confirm it.
#[derive(Clone, Debug)]
pub struct Recertification {
    /// The officer: enabled, and registered.
    pub officer: PrincipalId,
    /// The PKCS#10 request for the new key, PEM.
    pub certificate_request: PathBuf,
    /// An escrow file of the island.
    pub escrow: PathBuf,
    /// Shares that custodians have decrypted, one per file.
    pub shares: Vec<PathBuf>,
    /// The lifetime of the certificate in days.
    pub days: u16,
}

impl Recertification {
    /// Certifies the key. All other certificates of the officer end. This is recorded, also as a
    /// security event.
    ///
    /// # Errors
    /// A file cannot be read or has the wrong content; the shares do not open the escrow of this
    /// island; there is no such enabled officer; the key belongs to another principal; or a failure
    /// of the HSM or the database.
    #[boxed]
    pub async fn run(
        &self,
        authority: &CertificateAuthority,
        hsm: &Hsm,
        committer: &Committer,
        store: &Arc<dyn Store>,
        now: UnixMillis,
    ) -> Result<IssuedCertificate, ServiceError> {
        let id = &self.officer;
        if id.role() != Role::Officer || id.island() != hsm.island() {
            return Err(ServiceError::invalid(
                "principal",
                format!("`{id}` is no officer of the island `{}`", hsm.island()),
            ));
        }
        let request = CertificationRequest::parse_pem(&self.read(&self.certificate_request)?)
            .map_err(ServiceError::parse("certificate request"))?;
        self.prove_quorum(hsm, committer, store).await?;
        let issued = authority.principal(id, &request, Validity::days(now, self.days))?.sign(hsm).await?;
        for _ in 0..MOST_ATTEMPTS {
            let everyone = Everyone::of(&**store, committer, hsm.island()).await?;
            let (mut reads, id, certificate, quorum) =
                (everyone.reads(), id.clone(), issued.clone(), self.shares.len());
            reads.sealed.push(principal_row(&id));
            let act = committer.act(ServerAct::RECERTIFY_OFFICER, reads, move |view| {
                let known = view.principal(&id)?.filter(|officer| officer.status == PrincipalStatus::Enabled);
                let mut officer = Arc::unwrap_or_clone(known.ok_or_else(|| no_officer(&id))?);
                refuse_shared_key(&everyone.rows(view)?, &id, &certificate.key_sha256)?;
                officer.certificates = vec![certificate.for_principal(Enrolment::Custodians, None)];
                officer.revision += 1;
                let reason = format!("{quorum} custodians on the token's machine");
                let entry = view.append(Event::PrincipalChanged(PrincipalChanged {
                    principal: id.to_string(),
                    change: "recertified".to_owned(),
                    certificate_serial: hex::encode(&certificate.serial),
                    reason: reason.clone(),
                }));
                let detail = format!(
                    "`{id}` got the certificate {} from {reason}; its other certificates ended",
                    hex::encode(&certificate.serial)
                );
                view.alert(SecurityEvent {
                    kind: "principal-recertified".to_owned(),
                    detail,
                    ..SecurityEvent::default()
                });
                view.put_principal(officer)?;
                Ok(Decision::recorded(entry, ()))
            });
            match act.await {
                Err(error) if Everyone::is_stale(&error) => {}
                outcome => return outcome.map(|_| issued),
            }
        }
        Err(ServiceError::unavailable("principals are added all the time: try again"))
    }

    /// I6: checks that the quorum of custodians of this island's escrow has taken part.
    async fn prove_quorum(&self, hsm: &Hsm, committer: &Committer, store: &Arc<dyn Store>) -> Result<(), ServiceError> {
        let refuse = |reason: String| {
            ServiceError::FailedPrecondition {
            reason,
            next_step: "let each custodian decrypt the own share of the escrow file, as docs/operations.md shows, and name all of them by `--share`".to_owned(),
        }
        };
        let name = hsm.island();
        let row = store.sealed(kms_store::RowKind::Island, name.as_str().as_bytes()).await?;
        let row = committer
            .open_island(&row.ok_or_else(|| ServiceError::Internal("the island has no row (I5)".to_owned()))?)?;
        let fingerprint = row.escrow_fingerprint.ok_or_else(|| ServiceError::FailedPrecondition {
            reason: format!("the roots of the island `{name}` were never escrowed, so that it has no custodians"),
            next_step: "while two other officers have certificates, they certify the key by a proposal: `kms principal propose-key`".to_owned(),
        })?;
        let document: EscrowDocument = serde_json::from_slice(&self.read(&self.escrow)?)
            .map_err(|_| refuse(format!("`{}` is no escrow file", self.escrow.display())))?;
        let shares = self.shares.iter().map(|path| self.read(path)).collect::<Result<Vec<_>, _>>()?;
        document.prove(name, &fingerprint, &shares).map_err(|error| refuse(error.to_string()))
    }

    fn read(&self, path: &std::path::Path) -> Result<Zeroizing<Vec<u8>>, ServiceError> {
        std::fs::read(path).map(Zeroizing::new).map_err(|error| ServiceError::FailedPrecondition {
            reason: format!("`{}`: {error}", path.display()),
            next_step: "name a file that can be read".to_owned(),
        })
    }
}

fn no_officer(id: &PrincipalId) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("`{id}` is no enabled officer of this island"),
        next_step: "name an officer who is registered and not disabled".to_owned(),
    }
}

/// How often the act is tried again because a principal was added meanwhile.
const MOST_ATTEMPTS: usize = 8;
