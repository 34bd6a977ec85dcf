//! `meterkms.v1.EnrolmentService`: the one method of the enrolment door.

use kms_domain::{Assurance, CodeSecret, IslandName};
use kms_proto::v1;
use kms_proto::v1::enrolment_service_server::EnrolmentService as EnrolmentRpc;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use crate::handhelds::{code_id, handheld};
use kms_base::error::ServiceError;
use kms_service::certificate::request::CertificationRequest;
use kms_service::handheld::enrol::{EnrolRequest, EnrolmentService};

/// Where devices find the ordinary listener.
#[derive(Clone, Debug)]
pub struct ServerAddress {
    /// Empty: the host that the device has called.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// The service over gRPC.
pub(crate) struct EnrolmentApi {
    enrolments: EnrolmentService,
    address: ServerAddress,
}

impl EnrolmentApi {
    /// The service over this use case.
    pub(crate) const fn new(enrolments: EnrolmentService, address: ServerAddress) -> Self {
        Self { enrolments, address }
    }
}

#[tonic::async_trait]
impl EnrolmentRpc for EnrolmentApi {
    async fn enrol(&self, request: Request<v1::EnrolRequest>) -> Result<Response<v1::EnrolResponse>, Status> {
        let asked = parse(self.enrolments.island().name(), request.into_inner())?;
        let answer = self.enrolments.enrol(asked).await?;
        let (server_host, server_port) = (self.address.host.clone(), u32::from(self.address.port));
        Ok(Response::new(v1::EnrolResponse { server_host, server_port, ..answer }))
    }
}

fn parse(island: &IslandName, message: v1::EnrolRequest) -> Result<EnrolRequest, ServiceError> {
    // The message's own octets are in a buffer of the connection, which the library does not wipe.
    let secret = Zeroizing::new(message.secret.to_vec());
    let request =
        |field: &str, der: &[u8]| CertificationRequest::parse(der).map_err(ServiceError::parse(field.to_owned()));
    let tls = request("certificate_request", &message.certificate_request)?;
    let transport = request("transport_certificate_request", &message.transport_certificate_request)?;
    if tls.spki_sha256() == transport.spki_sha256() {
        return Err(ServiceError::invalid(
            "transport_certificate_request",
            "it is the TLS key: a device has two keys, each for one use",
        ));
    }
    if !transport.is_p256() {
        return Err(ServiceError::invalid("transport_certificate_request", "a transport key is an EC key on P-256"));
    }
    Ok(EnrolRequest {
        handheld: handheld(island, &message.name)?,
        code_id: code_id("code_id", &message.code_id)?,
        secret: CodeSecret::from_octets(&secret).map_err(ServiceError::parse("secret"))?,
        tls,
        transport,
        assurance: Assurance::ALL
            .into_iter()
            .find(|known| known.name() == message.assurance)
            .ok_or_else(|| ServiceError::invalid("assurance", "it is neither `software` nor `hardware`"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate_request(key: &rcgen::KeyPair) -> bytes::Bytes {
        rcgen::CertificateParams::default().serialize_request(key).unwrap().der().to_vec().into()
    }

    #[test]
    fn every_field_is_named_when_it_is_wrong() {
        let island = IslandName::parse("north").unwrap();
        let (tls, transport) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
        let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let right = v1::EnrolRequest {
            name: "h-17".to_owned(),
            code_id: vec![1; 6].into(),
            secret: vec![2; 15].into(),
            certificate_request: certificate_request(&tls),
            transport_certificate_request: certificate_request(&transport),
            assurance: "software".to_owned(),
        };
        parse(&island, right.clone()).unwrap();
        parse(&island, v1::EnrolRequest { certificate_request: certificate_request(&p384), ..right.clone() }).unwrap();
        let transport = "transport_certificate_request";
        let broken = |request| v1::EnrolRequest { transport_certificate_request: request, ..right.clone() };
        for (expected, message) in [
            ("name", v1::EnrolRequest { name: "urn:x".to_owned(), ..right.clone() }),
            ("code_id", v1::EnrolRequest { code_id: vec![1; 7].into(), ..right.clone() }),
            ("secret", v1::EnrolRequest { secret: vec![2; 14].into(), ..right.clone() }),
            ("certificate_request", v1::EnrolRequest { certificate_request: vec![0x30].into(), ..right.clone() }),
            (transport, broken(vec![0x30].into())),
            (transport, broken(right.certificate_request.clone())),
            (transport, broken(certificate_request(&p384))),
            ("assurance", v1::EnrolRequest { assurance: "magic".to_owned(), ..right.clone() }),
        ] {
            match parse(&island, message) {
                Err(ServiceError::InvalidArgument { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
