//! The call to the enrolment door. The device trusts nothing but the code: the chain of the
//! server's certificates must end with the root whose digest the code has.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kms_domain::{Assurance, EnrolmentCode, ParseError};
use kms_proto::v1::{self as proto, enrolment_service_client::EnrolmentServiceClient};
use rustls::{
    CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tonic::Code;

use super::error::FieldError;
use crate::connection::{crypto, finished, tls_1_3};
use crate::{ConnectError, Connection, KeyRequest, ServerError};

/// The enrolment door of a server.
#[derive(Clone, Debug)]
pub struct EnrolmentServer {
    /// `host:port`.
    address: String,
    host: String,
    name: ServerName<'static>,
    name_text: String,
}

impl EnrolmentServer {
    /// The door at `host:port`. `name` is the name in the server's certificate, if it is not the
    /// host.
    ///
    /// # Errors
    /// Not `host:port`, or a name that no certificate can have.
    pub fn parse(address: &str, name: Option<&str>) -> Result<Self, ParseError> {
        let refuse = |reason: String| ParseError::new("server", reason);
        let (host, port) = address.rsplit_once(':').ok_or_else(|| refuse(format!("`{address}` is not HOST:PORT")))?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(refuse(format!("`{address}` is not HOST:PORT")));
        }
        let name_text = name.unwrap_or(host).trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(name_text.clone())
            .map_err(|_| refuse(format!("`{name_text}` is neither a DNS name nor an IP address")))?;
        Ok(Self { address: address.to_owned(), host: host.to_owned(), name, name_text })
    }

    /// The name in the server's certificate.
    pub(super) fn name_text(&self) -> &str {
        &self.name_text
    }

    /// `host:port` of the ordinary listener, as the answer says.
    pub(super) fn address_of(&self, answer: &proto::EnrolResponse) -> String {
        let host = if answer.server_host.is_empty() { &self.host } else { &answer.server_host };
        format!("{host}:{}", answer.server_port)
    }

    /// Sends the code and both certificate requests. If the answer is lost, it is asked for again
    /// for about a minute, in which a server starts: the same keys get the same answer.
    pub(super) async fn enrol(
        &self,
        code: &EnrolmentCode,
        tls: &KeyRequest,
        transport: &KeyRequest,
    ) -> Result<proto::EnrolResponse, FieldError> {
        let request = proto::EnrolRequest {
            name: code.name().to_owned(),
            code_id: code.id().0.to_vec().into(),
            secret: code.secret().octets().to_vec().into(),
            certificate_request: tls.certificate_request().to_vec().into(),
            transport_certificate_request: transport.certificate_request().to_vec().into(),
            assurance: Assurance::Software.name().to_owned(),
        };
        let (mut sent, mut lost, mut pause) = (None, false, PAUSE);
        loop {
            let (error, earliest) = match self.connect(code).await {
                Ok(connection) => {
                    sent.get_or_insert_with(Instant::now);
                    let mut door = EnrolmentServiceClient::new(connection.channel());
                    match door.enrol(request.clone()).await.map_err(ServerError::from) {
                        Ok(answer) => return Ok(answer.into_inner()),
                        Err(error) if error.is_unavailable() => {
                            // Where a bound is met, the server has not used the code.
                            lost |= error.code() != Code::ResourceExhausted;
                            let earliest = error.retry_after().unwrap_or_default();
                            (error.into(), earliest)
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                // The server that had the code may be starting again.
                Err(error @ FieldError::Connect(_)) if sent.is_some() => (error, Duration::ZERO),
                Err(error) => return Err(error),
            };
            let wait = pause.max(earliest);
            if sent.is_none_or(|sent| sent.elapsed() + wait > REPEATED_FOR) {
                return Err(if lost { FieldError::Unanswered(Box::new(error)) } else { error });
            }
            tokio::time::sleep(wait).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// Connects, and verifies the server with the code. Nothing is sent over the connection. For
    /// tools that have keys of their own, such as in a token: they call `EnrolmentService.Enrol`
    /// over this connection.
    ///
    /// # Errors
    /// No server listens at the address; or it is not one of the island that the code is from.
    pub async fn connect(&self, code: &EnrolmentCode) -> Result<Connection, FieldError> {
        let crypto = crypto();
        let verifier = RootOfCode { code: code.clone(), crypto: Arc::clone(&crypto) };
        let config = tls_1_3(crypto).map_err(|error| FieldError::Identity(error.to_string()))?;
        let config = config.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth();
        let connected = Connection::open(&self.address, self.name.clone(), finished(config)).await;
        connected.map_err(|error| match error {
            ConnectError::Tls { server, reason } if reason.contains(UNKNOWN_ISSUER) => {
                FieldError::AnotherIsland { server }
            }
            other => other.into(),
        })
    }
}

/// Accepts exactly the chains that end with the root of the code. A certificate for another use,
/// for another name, or that has ended is refused as everywhere.
#[derive(Debug)]
struct RootOfCode {
    code: EnrolmentCode,
    crypto: Arc<CryptoProvider>,
}

impl ServerCertVerifier for RootOfCode {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = intermediates.iter().find(|certificate| self.code.is_root(certificate));
        let root = root.ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(root.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.crypto))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.crypto.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.crypto.signature_verification_algorithms.supported_schemes()
    }
}

/// How long a lost answer is asked for.
const REPEATED_FOR: Duration = Duration::from_mins(1);
const PAUSE: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// In the text of the error of TLS.
const UNKNOWN_ISSUER: &str = "UnknownIssuer";
