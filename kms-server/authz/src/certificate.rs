//! The client's certificate of a connection.

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use kms_domain::{PrincipalId, UnixMillis};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// The client's certificate of a connection, parsed once. TLS has verified its chain against the
/// client CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The URI subjectAltName `urn:meterkms:ISLAND:ROLE:NAME`.
    pub principal: PrincipalId,
    /// SHA-256 of the DER, 32 octets.
    pub sha256: [u8; 32],
    /// The serial number, big-endian, without leading zeros.
    pub serial: Bytes,
    /// The end of its validity.
    pub not_after: UnixMillis,
}

impl PeerCertificate {
    /// Parses a certificate that the handshake has verified.
    ///
    /// # Errors
    /// It is not a TLS client certificate of a principal: not exactly one principal URI, no
    /// `clientAuth`, or no `digitalSignature`. The last two checks keep transport certificates
    /// (keyAgreement) from being used for TLS, because path validation accepts a certificate
    /// without extended key usage.
    pub fn parse(der: &[u8]) -> Result<Self, PeerCertificateError> {
        let refuse = |reason: &str| PeerCertificateError { reason: reason.to_owned() };
        let (rest, certificate) =
            X509Certificate::from_der(der).map_err(|_| refuse("it is not an X.509 certificate"))?;
        if !rest.is_empty() {
            return Err(refuse("octets follow the certificate"));
        }
        let usage = certificate.key_usage().ok().flatten().ok_or_else(|| refuse("it has no key usage"))?;
        if !usage.value.digital_signature() {
            return Err(refuse("its key usage lacks digitalSignature: a transport certificate is not for TLS"));
        }
        let extended =
            certificate.extended_key_usage().ok().flatten().ok_or_else(|| refuse("it has no extended key usage"))?;
        if !extended.value.client_auth {
            return Err(refuse("its extended key usage lacks clientAuth"));
        }
        let names =
            certificate.subject_alternative_name().ok().flatten().ok_or_else(|| refuse("it has no subjectAltName"))?;
        let mut uris = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let principal = match (uris.next(), uris.next()) {
            (Some(uri), None) => PrincipalId::parse(uri).map_err(|error| refuse(error.reason()))?,
            _ => return Err(refuse("it has not exactly one URI subjectAltName")),
        };
        Ok(Self {
            principal,
            sha256: sha256(der),
            serial: Bytes::from(certificate.serial.to_bytes_be()),
            not_after: UnixMillis(certificate.validity().not_after.timestamp().saturating_mul(1000)),
        })
    }
}

/// Why a certificate is not one of a principal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client certificate is refused: {reason}")]
pub struct PeerCertificateError {
    /// What is wrong with it.
    pub reason: String,
}

fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest(&SHA256, octets).as_ref());
    value
}
