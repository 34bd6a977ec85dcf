//! Ends one certificate at once.

use async_recursion::async_recursion as boxed;
use kms_domain::{PrincipalId, RequestId};
use kms_proto::v1;
use kms_store::Reads;

use super::{Principals, enabled};
use crate::Request;
use crate::request_digest::request_digest;
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;

impl Principals {
    /// Ends one TLS certificate of another principal, from the next call on.
    ///
    /// Nobody ends their own certificate: a thief of the key of one certificate could otherwise end
    /// the owner's other certificate and lock the owner out.
    ///
    /// # Errors
    /// Not permitted; no such principal or certificate; the caller's own; the last certificate of
    /// the last officer; or the database is unavailable.
    #[boxed]
    pub async fn end_certificate(
        &self,
        caller: &Caller,
        request: RequestId,
        id: PrincipalId,
        serial: Vec<u8>,
        reason: String,
    ) -> Result<v1::Principal, ServiceError> {
        let own = id == caller.principal;
        let action = Action::EndCertificate { role: id.role(), own };
        self.island.principal(caller).await?;
        // This early answer tells what to do. The act checks the same again.
        refuse_own(&id, own).map_err(|refusal| self.on_record(caller, &action, refusal))?;
        self.island.require(caller, &action).await?;
        let digest = request_digest(&[b"end-certificate", id.to_string().as_bytes(), &serial, reason.as_bytes()]);
        let answer = self
            .act_among_all(
                caller,
                Request { id: request, digest },
                action,
                id.clone(),
                Reads::default(),
                move |view, _, existing, everyone| {
                    refuse_own(&id, own)?;
                    let mut principal = enabled(&id, existing)?;
                    let at = principal.certificates.iter().position(|one| one.serial == serial);
                    let at = at.ok_or_else(|| no_certificate(&id, &serial))?;
                    principal.certificates.remove(at);
                    principal.revision += 1;
                    if principal.live_certificates(view.now()).next().is_none() {
                        everyone.refuse_last_officer(view, &id)?;
                    }
                    let record = v1::PrincipalChanged {
                        principal: id.to_string(),
                        change: "certificate-ended".to_owned(),
                        certificate_serial: hex::encode(&serial),
                        reason: reason.clone(),
                    };
                    Ok((principal, record, None, Vec::new()))
                },
            )
            .await?;
        answer.principal.ok_or_else(|| ServiceError::Internal("an answer without its principal".to_owned()))
    }
}

fn no_certificate(id: &PrincipalId, serial: &[u8]) -> ServiceError {
    ServiceError::NotFound { what: format!("a certificate of `{id}` with the serial number {}", hex::encode(serial)) }
}

fn refuse_own(id: &PrincipalId, own: bool) -> Result<(), ServiceError> {
    if !own {
        return Ok(());
    }
    Err(ServiceError::FailedPrecondition {
        reason: format!("`{id}` ends no certificate of its own: a thief of the key would shut the owner out"),
        next_step: "ask an officer, another one if you are one, to end it".to_owned(),
    })
}
