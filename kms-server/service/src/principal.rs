//! Principals: registered, certified, renewed and disabled, each by one act with its record (I2).
//!
//! A certificate is signed before the act that registers it, and is issued only after the act is
//! durable. A certificate that no sealed row lists is accepted nowhere (I5).
//!
//! I6: only the officer or auditor may certify their own key alone. A key that one other principal
//! certified does not count where several people are needed ([`people`]), until two others confirm
//! it ([`key`]).

mod end;
pub(super) mod everyone;
pub mod key;
pub mod people;
mod renew;
#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::sync::Arc;

use bytes::Bytes;
use kms_domain::{
    Enrolment, ParseError, PersonName, Principal, PrincipalCertificate, PrincipalId, PrincipalStatus, RequestId, Role,
    SystemTitle, UnixMillis,
};
use kms_proto::v1::{self, PrincipalChanged, SecurityEvent, audit_record::Event};
use kms_store::{Reads, RowKind};

use self::everyone::{Everyone, MOST_AT_ONCE, parse_name, refuse_shared_key, refuse_shared_titles, unverified};
use super::Request;
use super::certificate::request::CertificationRequest;
use super::certificate::signing::IssuedCertificate;
use super::certificate::{CertificateAuthority, Validity};
use crate::island::IslandContext;
use crate::request_digest::request_digest;
use kms_authz::{Action, Caller, Resource};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Act, Asker, Decision, Permit, Remembered, View};

/// Principals of an island.
pub struct Principals {
    island: Arc<IslandContext>,
    authority: CertificateAuthority,
    /// The lifetime of certificates in days.
    certificate_days: u16,
}

/// The result of a change: the new row, the record, the issued certificate, and its chain.
type Changed = Result<(Principal, PrincipalChanged, Option<IssuedCertificate>, Vec<Bytes>), ServiceError>;

/// A principal to register.
#[derive(Clone, Debug)]
pub struct NewPrincipal {
    /// The request.
    pub request: RequestId,
    /// The principal.
    pub id: PrincipalId,
    /// Its TLS key. `None` only for a manufacturer, which does not have to call the server.
    pub certification: Option<CertificationRequest>,
    /// The person behind an officer or auditor (I6), or the technician of a handheld.
    pub person: Option<PersonName>,
    /// Client system titles that it may use.
    pub client_titles: Vec<SystemTitle>,
    /// A manufacturer's key that signs shipments.
    pub shipment_key: Option<Bytes>,
}

impl Principals {
    /// The use cases for an island with this authority.
    pub const fn new(island: Arc<IslandContext>, authority: CertificateAuthority, certificate_days: u16) -> Self {
        Self { island, authority, certificate_days }
    }

    /// The island.
    pub fn island(&self) -> &Arc<IslandContext> {
        &self.island
    }

    /// Registers a principal and certifies its TLS key. A new officer or auditor does not count
    /// where several people are needed, until two other officers confirm the key (I6).
    ///
    /// # Errors
    /// Not permitted; the principal exists; a client title is another's or a meter's; the key is
    /// another principal's; or a failure of the HSM or the database.
    #[boxed]
    pub async fn add(&self, caller: &Caller, new: NewPrincipal) -> Result<v1::PrincipalCertificate, ServiceError> {
        let action = Action::AddPrincipal { role: new.id.role() };
        self.island.require(caller, &action).await?;
        if new.id.island() != self.island.name() {
            return Err(ServiceError::invalid(
                "principal",
                format!("`{}` is not of the island `{}`", new.id, self.island.name()),
            ));
        }
        let issued = match &new.certification {
            Some(request) => Some(
                self.authority
                    .principal(&new.id, request, self.validity(&new.id))?
                    .sign(&self.island.hsm_for(caller))
                    .await?,
            ),
            None => None,
        };
        let digest = request_digest(&[
            b"add",
            new.id.to_string().as_bytes(),
            &new.certification.as_ref().map(CertificationRequest::spki_sha256).unwrap_or_default(),
            new.person.as_ref().map_or("", PersonName::as_str).as_bytes(),
            &new.client_titles.iter().flat_map(|title| title.octets()).collect::<Vec<_>>(),
            new.shipment_key.as_deref().unwrap_or_default(),
        ]);
        let chain = self.chain();
        let (id, request) = (new.id.clone(), new.request);
        let officer = caller.principal.clone();
        self.act_among_all(caller, Request { id: request, digest }, action, id, Reads::default(), move |view, _, existing, everyone| {
            if existing.is_some() {
                return Err(ServiceError::FailedPrecondition {
                    reason: format!("`{}` exists", new.id),
                    next_step: "renew its certificate, or choose another name: names are not used again".to_owned(),
                });
            }
            // I4: frames with a meter's title as client title would repeat the nonces of the
            // meter's own answers under the same key.
            for title in &new.client_titles {
                if view.meter(*title)?.is_some() {
                    return Err(ServiceError::FailedPrecondition {
                        reason: format!("the client title {title} is the system title of a meter"),
                        next_step: "give the principal a system title that no device has".to_owned(),
                    });
                }
            }
            let rows = everyone.rows(view)?;
            refuse_shared_titles(&rows, &new.id, &new.client_titles)?;
            if let Some(issued) = &issued {
                refuse_shared_key(&rows, &new.id, &issued.key_sha256)?;
            }
            let principal = Principal {
                id: new.id.clone(),
                revision: 1,
                status: PrincipalStatus::Enabled,
                certificates: issued.iter().map(|issued| issued.for_principal(Enrolment::OnePerson, Some(officer.clone()))).collect(),
                transport: None,
                client_titles: new.client_titles.clone(),
                person: new.person.clone(),
                assurance: None,
                shipment_key: new.shipment_key.clone(),
                added: view.now(),
            };
            principal.check().map_err(ServiceError::parse("principal"))?;
            everyone.count_one_more(view)?;
            if principal.is_personal() {
                let detail = format!("`{officer}` alone added `{}`, who does not count where several people are needed until two others confirm it", new.id);
                view.alert(security_event("person-added-by-one", detail));
            }
            let record = changed(&principal.id, "added", issued.as_ref(), "");
            Ok((principal, record, issued.clone(), chain.clone()))
        })
        .await
    }

    /// Certifies and registers the caller's own transport key and replaces an earlier one. From
    /// then on keys are wrapped for the new key.
    ///
    /// # Errors
    /// Not permitted, a key that is not EC P-256, or a failure of the HSM or the database.
    #[boxed]
    pub async fn register_transport_key(
        &self,
        caller: &Caller,
        request: RequestId,
        certification: &CertificationRequest,
    ) -> Result<v1::PrincipalCertificate, ServiceError> {
        let id = caller.principal.clone();
        let action = Action::RegisterTransportKey { role: id.role() };
        self.island.require(caller, &action).await?;
        let issued = self
            .authority
            .transport(&id, certification, self.validity(&id))?
            .sign(&self.island.hsm_for(caller))
            .await?;
        let digest = request_digest(&[b"transport", &certification.spki_sha256()]);
        let chain = self.chain();
        self.act(
            caller,
            Request { id: request, digest },
            action,
            id.clone(),
            Reads::default(),
            move |_, _, existing| {
                let mut principal = enabled(&id, existing)?;
                principal.transport =
                    Some(issued.for_transport().ok_or_else(|| {
                        ServiceError::Internal("a transport certificate without a P-256 key".to_owned())
                    })?);
                principal.revision += 1;
                // Whatever policy permits, a service account has none.
                principal.check().map_err(ServiceError::parse("principal"))?;
                let record = changed(&id, "transport-key-registered", Some(&issued), "");
                Ok((principal, record, Some(issued.clone()), chain.clone()))
            },
        )
        .await
    }

    /// Disables a principal, from its next call on. A repetition changes nothing.
    ///
    /// # Errors
    /// Not permitted, no such principal, the last enabled officer, or a failure of the database.
    #[boxed]
    pub async fn disable(
        &self,
        caller: &Caller,
        request: RequestId,
        id: PrincipalId,
        reason: String,
    ) -> Result<v1::Principal, ServiceError> {
        let action = Action::DisablePrincipal { role: id.role(), own: id == caller.principal };
        self.island.require(caller, &action).await?;
        let digest = request_digest(&[b"disable", id.to_string().as_bytes(), reason.as_bytes()]);
        let answer = self
            .act_among_all(
                caller,
                Request { id: request, digest },
                action,
                id.clone(),
                Reads::default(),
                move |view, _, existing, everyone| {
                    let mut principal = existing.as_deref().cloned().ok_or_else(|| unknown(&id))?;
                    if principal.status == PrincipalStatus::Enabled {
                        everyone.refuse_last_officer(view, &id)?;
                    }
                    if principal.status == PrincipalStatus::Enabled {
                        principal.status = PrincipalStatus::Disabled;
                        principal.revision += 1;
                    }
                    let record = changed(&id, "disabled", None, &reason);
                    Ok((principal, record, None, Vec::new()))
                },
            )
            .await?;
        answer.principal.ok_or_else(|| ServiceError::Internal("an answer without its principal".to_owned()))
    }

    /// All principals, in order of their URIs.
    ///
    /// # Errors
    /// Not permitted, a row that does not verify, or a failure of the database.
    #[boxed]
    pub async fn list(&self, caller: &Caller) -> Result<Vec<v1::Principal>, ServiceError> {
        self.island.require(caller, &Action::ListPrincipals).await?;
        self.all().await?.into_iter().map(|principal| Ok(to_proto(&*principal?))).collect()
    }

    /// The caller's own principal.
    ///
    /// # Errors
    /// The caller is not an enabled principal, or a failure of the database.
    #[boxed]
    pub async fn who_am_i(&self, caller: &Caller) -> Result<v1::Principal, ServiceError> {
        let row = self.island.principal(caller).await?;
        let mut principal = to_proto(&row);
        for (shown, certificate) in principal.certificates.iter_mut().zip(&row.certificates) {
            shown.in_use = certificate.sha256 == caller.certificate_sha256;
        }
        Ok(principal)
    }

    /// As [`Self::act`], for a change that must be consistent with all principals.
    async fn act_among_all<F>(
        &self,
        caller: &Caller,
        request: Request,
        action: Action,
        id: PrincipalId,
        more: Reads,
        change: F,
    ) -> Result<v1::PrincipalCertificate, ServiceError>
    where
        F: Fn(&mut View<'_, '_>, &Permit, Option<Arc<Principal>>, &Everyone) -> Changed + Clone + Send + Sync + 'static,
    {
        Everyone::consistently(&self.island, |everyone| {
            let (mut reads, change) = (everyone.reads(), change.clone());
            reads.extend(&more);
            self.act(caller, request, action.clone(), id.clone(), reads, move |view, permit, existing| {
                change(view, permit, existing, &everyone)
            })
        })
        .await
    }

    /// Changes one principal and records it.
    async fn act<F>(
        &self,
        caller: &Caller,
        request: Request,
        action: Action,
        id: PrincipalId,
        reads: Reads,
        change: F,
    ) -> Result<v1::PrincipalCertificate, ServiceError>
    where
        F: Fn(&mut View<'_, '_>, &Permit, Option<Arc<Principal>>) -> Changed + Send + Sync + 'static,
    {
        Ok(self.island.door.act(caller, request, ChangePrincipal { action, id, reads, change }).await?.value)
    }

    /// Records a refusal that comes before the act, because it may be an attempt to act as two
    /// people or to shut another person out (I2).
    fn on_record(&self, caller: &Caller, action: &Action, refusal: ServiceError) -> ServiceError {
        if matches!(refusal, ServiceError::FailedPrecondition { .. }) {
            self.island.committer.refused(Some(&caller.principal), action.name(), refusal.to_string());
        }
        refusal
    }

    /// Every principal, or why its row is refused.
    async fn all(&self) -> Result<Vec<Result<Arc<Principal>, ServiceError>>, ServiceError> {
        let mut principals = Vec::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.island.store.sealed_page(RowKind::Principal, after.as_deref(), MOST_AT_ONCE).await?;
            let Some((last, _)) = page.last() else { return Ok(principals) };
            after = Some(last.clone());
            for (id, row) in &page {
                let id = parse_name(id)?;
                principals.push(self.island.committer.open_principal(&id, row).map_err(|_| unverified(&id)));
            }
        }
    }

    fn chain(&self) -> Vec<Bytes> {
        vec![Bytes::copy_from_slice(self.authority.certificate())]
    }

    fn validity(&self, id: &PrincipalId) -> Validity {
        validity(&self.island, id, self.certificate_days)
    }
}

/// The validity of a new certificate. Those of handhelds live for days: a device gets lost.
pub(crate) fn validity(island: &IslandContext, id: &PrincipalId, certificate_days: u16) -> Validity {
    let days = match id.role() {
        Role::Handheld => island.limits.handheld_days().min(certificate_days),
        _ => certificate_days,
    };
    Validity::days(IslandContext::now(), days)
}

/// A change of one principal.
struct ChangePrincipal<F> {
    action: Action,
    id: PrincipalId,
    reads: Reads,
    change: F,
}

impl<F> Act for ChangePrincipal<F>
where
    F: Fn(&mut View<'_, '_>, &Permit, Option<Arc<Principal>>) -> Changed + Send + Sync + 'static,
{
    type Answer = v1::PrincipalCertificate;
    type Past = Remembered<v1::PrincipalCertificate>;

    fn name(&self) -> &'static str {
        self.action.name()
    }

    fn reads(&self) -> Reads {
        let mut reads = self.reads.clone();
        reads.sealed.push(principal_row(&self.id));
        reads
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&self.action, &Resource::Island)
    }

    fn decide(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
    ) -> Result<Decision<v1::PrincipalCertificate>, ServiceError> {
        let existing = view.principal(&self.id)?;
        let (principal, record, issued, chain) = (self.change)(view, permit, existing)?;
        let answer = v1::PrincipalCertificate {
            principal: Some(to_proto(&principal)),
            certificate: issued.map(|issued| Bytes::copy_from_slice(&issued.der)).unwrap_or_default(),
            chain,
        };
        view.put_principal(principal)?;
        Ok(Decision::recorded(view.append(Event::PrincipalChanged(record)), answer))
    }

    fn again(
        &self,
        Remembered(answer): Remembered<v1::PrincipalCertificate>,
        _: &Permit,
        _: &mut View<'_, '_>,
    ) -> Result<v1::PrincipalCertificate, ServiceError> {
        Ok(answer)
    }
}

/// A principal as the gRPC contract shows it.
pub fn to_proto(principal: &Principal) -> v1::Principal {
    v1::Principal {
        principal: principal.id.to_string(),
        status: match principal.status {
            PrincipalStatus::Enabled => "enabled".to_owned(),
            PrincipalStatus::Disabled => "disabled".to_owned(),
        },
        person: principal.person.as_ref().map(|person| person.as_str().to_owned()).unwrap_or_default(),
        client_titles: principal.client_titles.iter().map(|title| Bytes::copy_from_slice(&title.octets())).collect(),
        certificate_not_after_ms: principal
            .certificates
            .iter()
            .map(|certificate: &PrincipalCertificate| certificate.not_after)
            .max()
            .unwrap_or(UnixMillis(0))
            .0,
        has_transport_key: principal.transport.is_some(),
        revision: u64::from(principal.revision),
        certificates: principal.certificates.iter().map(registered).collect(),
        assurance: principal.assurance.map(|assurance| assurance.name().to_owned()).unwrap_or_default(),
    }
}

fn registered(certificate: &PrincipalCertificate) -> v1::RegisteredCertificate {
    v1::RegisteredCertificate {
        serial: certificate.serial.clone(),
        not_after_ms: certificate.not_after.0,
        key_sha256: certificate.key_sha256.map(|digest| Bytes::copy_from_slice(&digest)).unwrap_or_default(),
        enrolment: certificate.enrolment.name().to_owned(),
        issued_by: certificate.issued_by.as_ref().map(ToString::to_string).unwrap_or_default(),
        counts: certificate.enrolment.counts(),
        in_use: false,
    }
}

/// Parses the key with which a manufacturer signs shipments: DER of an EC P-256 or P-384
/// SubjectPublicKeyInfo.
///
/// # Errors
/// It is another key.
pub fn parse_shipment_key(der: &[u8]) -> Result<Bytes, ParseError> {
    use x509_parser::prelude::FromDer;
    let refuse =
        || ParseError::new("shipment key", "it is no SubjectPublicKeyInfo (DER) of an EC key on P-256 or P-384");
    let (rest, info) = x509_parser::x509::SubjectPublicKeyInfo::from_der(der).map_err(|_| refuse())?;
    let point = &info.subject_public_key.data;
    let curve = info
        .algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.as_oid().ok())
        .map(|oid| oid.to_id_string());
    let algorithm: &aws_lc_rs::agreement::Algorithm = match curve.as_deref() {
        Some("1.2.840.10045.3.1.7") => &aws_lc_rs::agreement::ECDH_P256,
        Some("1.3.132.0.34") => &aws_lc_rs::agreement::ECDH_P384,
        _ => return Err(refuse()),
    };
    // The library checks that the point is on its curve.
    let on_curve = aws_lc_rs::agreement::ParsedPublicKey::try_from(&aws_lc_rs::agreement::UnparsedPublicKey::new(
        algorithm, point,
    ))
    .is_ok();
    if !rest.is_empty() || !on_curve {
        return Err(refuse());
    }
    Ok(Bytes::copy_from_slice(der))
}

fn changed(id: &PrincipalId, change: &str, issued: Option<&IssuedCertificate>, reason: &str) -> PrincipalChanged {
    PrincipalChanged {
        principal: id.to_string(),
        change: change.to_owned(),
        certificate_serial: issued.map(|issued| hex::encode(&issued.serial)).unwrap_or_default(),
        reason: reason.to_owned(),
    }
}

pub(crate) fn security_event(kind: &str, detail: String) -> SecurityEvent {
    SecurityEvent { kind: kind.to_owned(), detail, meter: Bytes::new() }
}

pub(crate) fn enabled(id: &PrincipalId, existing: Option<Arc<Principal>>) -> Result<Principal, ServiceError> {
    let principal = existing.as_deref().cloned().ok_or_else(|| unknown(id))?;
    match principal.status {
        PrincipalStatus::Enabled => Ok(principal),
        PrincipalStatus::Disabled => Err(ServiceError::FailedPrecondition {
            reason: format!("`{id}` is disabled"),
            next_step: "add a principal with a new name".to_owned(),
        }),
    }
}

/// Policy already permitted the action on this role, so the answer may say that there is no such
/// principal.
fn unknown(id: &PrincipalId) -> ServiceError {
    ServiceError::NotFound { what: format!("the principal `{id}`") }
}
