//! Key pairs that are made on this machine, and the requests for their certificates.

use kms_domain::PrincipalId;
use kms_proto::v1 as proto;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use x509_parser::{certification_request::X509CertificationRequest, prelude::FromDer as _};
use zeroize::Zeroizing;

/// A new EC P-256 key pair and its certificate request (PKCS#10): for TLS, or as a transport key.
/// The private key never leaves this machine.
pub struct KeyRequest {
    key_pem: Zeroizing<String>,
    certificate_request: Vec<u8>,
}

impl KeyRequest {
    /// Makes a key pair for a principal.
    ///
    /// # Errors
    /// The cryptographic library failed.
    pub fn generate(principal: &PrincipalId) -> Result<Self, IdentityError> {
        Self::for_subject(principal.name(), vec![SanType::URI(principal.to_string().try_into()?)])
    }

    /// Makes a key pair for a device that does not know its island yet. The server chooses
    /// everything in a certificate but the key.
    ///
    /// # Errors
    /// The cryptographic library failed.
    pub fn for_device(name: &str) -> Result<Self, IdentityError> {
        Self::for_subject(name, Vec::new())
    }

    /// A request as [`KeyRequest::for_device`] makes, for a key that is there (PKCS#8 PEM).
    pub(crate) fn of_device_key(name: &str, key_pem: &str) -> Result<Self, IdentityError> {
        Self::of_key(&KeyPair::from_pem(key_pem)?, name, Vec::new())
    }

    fn for_subject(name: &str, alternative_names: Vec<SanType>) -> Result<Self, IdentityError> {
        Self::of_key(&KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, name, alternative_names)
    }

    fn of_key(key: &KeyPair, name: &str, alternative_names: Vec<SanType>) -> Result<Self, IdentityError> {
        let mut request = CertificateParams::default();
        request.distinguished_name = DistinguishedName::new();
        request.distinguished_name.push(DnType::CommonName, name);
        request.subject_alt_names = alternative_names;
        let certificate_request = request.serialize_request(key)?.der().to_vec();
        Ok(Self { key_pem: Zeroizing::new(key.serialize_pem()), certificate_request })
    }

    /// The certificate request, PKCS#10 DER: its signature proves possession of the key.
    pub fn certificate_request(&self) -> &[u8] {
        &self.certificate_request
    }

    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER) of a certificate request (PKCS#10,
    /// DER), 32 octets; `None`: it is no such request. The request's signature is not verified.
    pub fn key_sha256(certificate_request: &[u8]) -> Option<[u8; 32]> {
        let (_, request) = X509CertificationRequest::from_der(certificate_request).ok()?;
        let digest =
            aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, request.certification_request_info.subject_pki.raw);
        digest.as_ref().try_into().ok()
    }

    /// The private key, PKCS#8 PEM.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The certificate and its issuers without the root, PEM, leaf first, as TLS wants them.
    pub fn chain_pem(issued: &proto::PrincipalCertificate) -> String {
        let issuers = issued.chain.split_last().map(|(_root, issuers)| issuers).unwrap_or_default();
        let all = std::iter::once(&issued.certificate).chain(issuers);
        all.map(|certificate| certificate_pem(certificate)).collect()
    }

    /// The certificate alone, PEM.
    pub fn certificate_pem(issued: &proto::PrincipalCertificate) -> String {
        certificate_pem(&issued.certificate)
    }
}

impl std::fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyRequest").finish_non_exhaustive()
    }
}

/// A key pair or request could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a key pair and certificate request: {0}")]
pub struct IdentityError(#[from] rcgen::Error);

pub(crate) fn certificate_pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_proves_possession_and_names_the_principal() {
        let principal = PrincipalId::parse("urn:meterkms:north:head-end:hes-1").unwrap();
        let made = KeyRequest::generate(&principal).unwrap();
        let (_, request) = X509CertificationRequest::from_der(made.certificate_request()).unwrap();
        request.verify_signature().unwrap();
        let uri = principal.to_string();
        assert!(made.certificate_request().windows(uri.len()).any(|window| window == uri.as_bytes()));
        assert!(made.key_pem().starts_with("-----BEGIN PRIVATE KEY-----"));
        assert_eq!(format!("{made:?}"), "KeyRequest { .. }");
    }
}
