//! `meterkms.v1.PrincipalService`: messages to domain types and back.

use std::sync::Arc;

use kms_domain::{PersonName, PrincipalId, ProposalId, Quorum, RequestId, Role};
use kms_proto::v1;
use kms_proto::v1::principal_service_server::PrincipalService;
use tonic::{Request, Response, Status};

use crate::parse::{self, parse_client_titles, parse_optional_reason};
use crate::peer::caller_of;
use kms_authz::Caller;
use kms_base::error::ServiceError;
use kms_service::certificate::request::CertificationRequest;
use kms_service::island::IslandContext;
use kms_service::principal::key::ProposedKey;
use kms_service::principal::{NewPrincipal, Principals, parse_shipment_key};

/// The service over gRPC.
pub(crate) struct PrincipalApi {
    principals: Arc<Principals>,
}

impl PrincipalApi {
    /// The service over these use cases.
    pub(crate) const fn new(principals: Arc<Principals>) -> Self {
        Self { principals }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        caller_of(request, self.principals.island().name(), IslandContext::now())
    }
}

#[tonic::async_trait]
impl PrincipalService for PrincipalApi {
    async fn add_principal(
        &self,
        request: Request<v1::AddPrincipalRequest>,
    ) -> Result<Response<v1::PrincipalCertificate>, Status> {
        let caller = self.caller(&request)?;
        let new = new_principal(request.into_inner())?;
        Ok(Response::new(self.principals.add(&caller, new).await?))
    }

    async fn renew_principal(
        &self,
        request: Request<v1::RenewPrincipalRequest>,
    ) -> Result<Response<v1::PrincipalCertificate>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let principal = PrincipalId::parse(&message.principal).map_err(ServiceError::parse("principal"))?;
        let certification = CertificationRequest::parse(&message.certificate_request)
            .map_err(ServiceError::parse("certificate_request"))?;
        let proposal = match message.proposal_id.is_empty() {
            true => None,
            false => Some(ProposalId::from_octets(&message.proposal_id).map_err(ServiceError::parse("proposal_id"))?),
        };
        Ok(Response::new(self.principals.renew(&caller, id, principal, &certification, proposal).await?))
    }

    async fn propose_principal_key(
        &self,
        request: Request<v1::ProposePrincipalKeyRequest>,
    ) -> Result<Response<v1::Proposal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let same = v1::ProposePrincipalKeyRequest { request_id: bytes::Bytes::new(), ..message.clone() };
        let request = parse::request(&message.request_id, b"ProposePrincipalKey", &same)?;
        let key_sha256 = <[u8; 32]>::try_from(message.key_sha256.as_ref()).map_err(|_| {
            ServiceError::invalid("key_sha256", format!("{} octets instead of 32", message.key_sha256.len()))
        })?;
        let key = ProposedKey {
            id: PrincipalId::parse(&message.principal).map_err(ServiceError::parse("principal"))?,
            key_sha256,
            reason: parse_optional_reason(message.reason)?,
            quorum: message.quorum.map_or(Ok(Quorum::ONE), Quorum::new).map_err(ServiceError::parse("quorum"))?,
        };
        Ok(Response::new(self.principals.propose_key(&caller, request, key).await?))
    }

    async fn end_certificate(
        &self,
        request: Request<v1::EndCertificateRequest>,
    ) -> Result<Response<v1::Principal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let principal = PrincipalId::parse(&message.principal).map_err(ServiceError::parse("principal"))?;
        if !(1..=20).contains(&message.serial.len()) {
            return Err(ServiceError::invalid(
                "serial",
                format!("{} octets; a serial number has 1 to 20", message.serial.len()),
            )
            .into());
        }
        let reason = parse_optional_reason(message.reason)?;
        Ok(Response::new(
            self.principals.end_certificate(&caller, id, principal, message.serial.to_vec(), reason).await?,
        ))
    }

    async fn register_transport_key(
        &self,
        request: Request<v1::RegisterTransportKeyRequest>,
    ) -> Result<Response<v1::PrincipalCertificate>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let certification = CertificationRequest::parse(&message.certificate_request)
            .map_err(ServiceError::parse("certificate_request"))?;
        Ok(Response::new(self.principals.register_transport_key(&caller, id, &certification).await?))
    }

    async fn disable_principal(
        &self,
        request: Request<v1::DisablePrincipalRequest>,
    ) -> Result<Response<v1::Principal>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let id = RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?;
        let principal = PrincipalId::parse(&message.principal).map_err(ServiceError::parse("principal"))?;
        let reason = parse_optional_reason(message.reason)?;
        Ok(Response::new(self.principals.disable(&caller, id, principal, reason).await?))
    }

    async fn list_principals(
        &self,
        request: Request<v1::ListPrincipalsRequest>,
    ) -> Result<Response<v1::ListPrincipalsResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(v1::ListPrincipalsResponse { principals: self.principals.list(&caller).await? }))
    }

    async fn who_am_i(&self, request: Request<v1::WhoAmIRequest>) -> Result<Response<v1::Principal>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(self.principals.who_am_i(&caller).await?))
    }
}

fn new_principal(message: v1::AddPrincipalRequest) -> Result<NewPrincipal, ServiceError> {
    let id = PrincipalId::parse(&message.principal).map_err(ServiceError::parse("principal"))?;
    let manufacturer = id.role() == Role::Manufacturer;
    let certification = match message.certificate_request.is_empty() {
        true if manufacturer => None,
        _ => Some(
            CertificationRequest::parse(&message.certificate_request)
                .map_err(ServiceError::parse("certificate_request"))?,
        ),
    };
    let shipment_key = match message.shipment_key.is_empty() {
        true if manufacturer => {
            return Err(ServiceError::invalid(
                "shipment_key",
                "it is missing: a manufacturer needs the key that signs its shipments",
            ));
        }
        true => None,
        false if manufacturer => {
            Some(parse_shipment_key(&message.shipment_key).map_err(ServiceError::parse("shipment_key"))?)
        }
        false => return Err(ServiceError::invalid("shipment_key", "only a manufacturer has a shipment key")),
    };
    // I6: approvals count persons.
    let person = match (message.person.is_empty(), id.role()) {
        (true, Role::Officer | Role::Auditor) => {
            return Err(ServiceError::invalid(
                "person",
                "it is missing: an officer or auditor needs the name of its person",
            ));
        }
        (true, _) => None,
        (false, _) => Some(PersonName::parse(&message.person).map_err(ServiceError::parse("person"))?),
    };
    let client_titles = parse_client_titles(&message.client_titles)?;
    Ok(NewPrincipal {
        request: RequestId::from_octets(&message.request_id).map_err(ServiceError::parse("request_id"))?,
        id,
        certification,
        person,
        client_titles,
        shipment_key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::AddPrincipalRequest {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate_request =
            rcgen::CertificateParams::default().serialize_request(&key).unwrap().der().to_vec().into();
        v1::AddPrincipalRequest {
            request_id: vec![1; 16].into(),
            principal: "urn:meterkms:north:head-end:hes-1".to_owned(),
            certificate_request,
            client_titles: vec![b"MMM\0\0\0\0\x01".to_vec().into()],
            ..Default::default()
        }
    }

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        assert!(new_principal(request()).is_ok());
        type Break = fn(&mut v1::AddPrincipalRequest);
        let cases: [(&str, Break); 10] = [
            ("request_id", |message| message.request_id = vec![1; 15].into()),
            ("principal", |message| message.principal = "urn:meterkms:north:king:hes-1".to_owned()),
            ("certificate_request", |message| message.certificate_request = Default::default()),
            ("certificate_request", |message| message.certificate_request = vec![0x30; 20].into()),
            ("person", |message| message.principal = "urn:meterkms:north:officer:ada".to_owned()),
            ("person", |message| message.person = "a\nb".to_owned()),
            ("client_titles[1]", |message| message.client_titles.push(message.client_titles[0].clone())),
            ("client_titles[1]", |message| message.client_titles.push(vec![0; 8].into())),
            ("client_titles", |message| message.client_titles = vec![vec![1; 8].into(); 65]),
            ("shipment_key", |message| message.shipment_key = vec![1].into()),
        ];
        for (expected, break_it) in cases {
            let mut message = request();
            break_it(&mut message);
            match new_principal(message) {
                Err(ServiceError::InvalidArgument { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {:?}", other.map(|new| new.id)),
            }
        }
    }

    #[test]
    fn a_manufacturer_brings_its_shipment_key() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
        let manufacturer = |shipment_key: Vec<u8>| v1::AddPrincipalRequest {
            principal: "urn:meterkms:north:manufacturer:kam".to_owned(),
            certificate_request: Default::default(),
            client_titles: Vec::new(),
            shipment_key: shipment_key.into(),
            ..request()
        };
        assert!(new_principal(manufacturer(spki.clone())).unwrap().shipment_key.is_some());
        let mut off_curve = spki.clone();
        *off_curve.last_mut().unwrap() ^= 1;
        for wrong in [Vec::new(), vec![1], off_curve, [spki, vec![0]].concat()] {
            assert!(
                matches!(new_principal(manufacturer(wrong)), Err(ServiceError::InvalidArgument { field, .. }) if field == "shipment_key")
            );
        }
    }
}
