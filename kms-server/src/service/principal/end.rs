//! The end of one certificate, at once.

use kms_domain::{Principal, PrincipalId, RequestId};
use kms_proto::v1;
use kms_store::Reads;

use super::{Principals, enabled, request_digest};
use crate::{
    authz::{Action, Caller},
    error::ServiceError,
    service::Request,
};

impl Principals {
    /// Ends one TLS certificate of a principal, from the next call on.
    ///
    /// A principal ends its own certificates that were issued after the one that it calls with. The others are ended by an officer: a thief of its key,
    /// who has renewed, would otherwise shut the owner out.
    ///
    /// # Errors
    /// Not permitted; no such principal or certificate; an own one that was issued before; the last certificate of the last officer; or the database is
    /// away.
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
        self.island.require(caller, &action).await?;
        let digest = request_digest("end-certificate", &[id.to_string().as_bytes(), &serial, reason.as_bytes()]);
        let asking = caller.certificate_sha256;
        let answer = self
            .act_among_all(
                caller,
                Request { id: request, digest },
                action,
                id.clone(),
                Reads::default(),
                move |view, existing, everyone| {
                    let mut principal = enabled(&id, existing)?;
                    let place = |ends: &dyn Fn(&kms_domain::PrincipalCertificate) -> bool| {
                        principal.certificates.iter().position(ends)
                    };
                    let at = place(&|one| one.serial == serial).ok_or_else(|| no_certificate(&id, &serial))?;
                    if own && place(&|one| one.sha256 == asking).is_none_or(|in_use| at <= in_use) {
                        return Err(not_before(&principal));
                    }
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

fn not_before(principal: &Principal) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!(
            "`{}` ends its own certificates only if they were issued after the one of this call: a thief of the key would otherwise shut the owner out",
            principal.id
        ),
        next_step: "ask an officer, another one if you are one, to end it".to_owned(),
    }
}
