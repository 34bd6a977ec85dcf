//! The key that envelopes are made for.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use aws_lc_rs::{agreement, digest};
use kms_domain::{ParseError, PrincipalId};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::agreement::{Agreement, EnvelopeHeader};

/// A grantee's transport key: EC P-256, with the certificate that the island gave it (use:
/// keyAgreement).
///
/// The private key is kept by the cryptographic library, which wipes it; it is never printed.
/// Opening envelopes needs a shared reference only.
pub struct TransportKey {
    private: agreement::PrivateKey,
    public: [u8; 65],
    certificate_sha256: [u8; 32],
    principal: PrincipalId,
    /// The last agreements, newest first, by header: an agreement serves many envelopes.
    agreements: Mutex<VecDeque<(Vec<u8>, Arc<Agreement>)>>,
}

impl TransportKey {
    /// The transport key of a PEM private key (PKCS#8 or SEC 1) and its PEM certificate; where
    /// several certificates follow, the first.
    ///
    /// # Errors
    /// Either is not PEM, or as [`Self::from_der`].
    pub fn from_pem(private_key: &[u8], certificate: &[u8]) -> Result<Self, TransportKeyError> {
        let private_key = PrivateKeyDer::from_pem_slice(private_key).map_err(|_| TransportKeyError::PrivateKey)?;
        let certificate = CertificateDer::from_pem_slice(certificate).map_err(|_| TransportKeyError::Certificate)?;
        Self::from_der(private_key.secret_der(), &certificate)
    }

    /// The transport key of a DER private key (PKCS#8 or SEC 1) and its DER certificate.
    ///
    /// # Errors
    /// The key is not on P-256, the certificate is for another key, or it names no principal.
    pub fn from_der(private_key: &[u8], certificate: &[u8]) -> Result<Self, TransportKeyError> {
        let private = agreement::PrivateKey::from_private_key_der(&agreement::ECDH_P256, private_key)
            .map_err(|_| TransportKeyError::PrivateKey)?;
        let public = private.compute_public_key().map_err(|_| TransportKeyError::PrivateKey)?;
        let public: [u8; 65] = public.as_ref().try_into().map_err(|_| TransportKeyError::PrivateKey)?;
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate)
            .map_err(|_| TransportKeyError::Certificate)?;
        if parsed.public_key().subject_public_key.data.as_ref() != public.as_slice() {
            return Err(TransportKeyError::CertificateOfAnotherKey);
        }
        let names = parsed
            .subject_alternative_name()
            .map_err(|_| TransportKeyError::Certificate)?
            .ok_or(TransportKeyError::NoPrincipal)?;
        let uri = names
            .value
            .general_names
            .iter()
            .find_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None });
        let principal = PrincipalId::parse(uri.ok_or(TransportKeyError::NoPrincipal)?)?;
        let certificate_sha256 = sha256(certificate);
        Ok(Self { private, public, certificate_sha256, principal, agreements: Mutex::default() })
    }

    /// A key with a certificate of which only the digest is known.
    #[cfg(test)]
    pub(crate) fn with_digest(private_key: &[u8], certificate_sha256: [u8; 32], principal: PrincipalId) -> Self {
        let private = agreement::PrivateKey::from_private_key_der(&agreement::ECDH_P256, private_key).unwrap();
        let public = private.compute_public_key().unwrap().as_ref().try_into().unwrap();
        Self { private, public, certificate_sha256, principal, agreements: Mutex::default() }
    }

    /// The principal that the certificate names: `urn:meterkms:ISLAND:ROLE:NAME`.
    pub const fn principal(&self) -> &PrincipalId {
        &self.principal
    }

    /// SHA-256 of the certificate (DER), which envelopes name.
    pub const fn certificate_sha256(&self) -> [u8; 32] {
        self.certificate_sha256
    }

    /// The public key: a P-256 point, `04 ‖ x ‖ y`.
    pub const fn public(&self) -> &[u8; 65] {
        &self.public
    }

    /// The agreement of a header: a new one, or one of the last [`AGREEMENTS_KEPT`]. `octets` are
    /// the header as received.
    pub(crate) fn agreement(&self, header: &EnvelopeHeader, octets: &[u8]) -> Option<Arc<Agreement>> {
        {
            let mut agreements = self.agreements.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(position) = agreements.iter().position(|(known, _)| known == octets) {
                let entry = agreements.remove(position)?;
                let agreement = Arc::clone(&entry.1);
                agreements.push_front(entry);
                return Some(agreement);
            }
        }
        let agreement = Arc::new(Agreement::derive(header, &self.private, &self.public)?);
        let mut agreements = self.agreements.lock().unwrap_or_else(PoisonError::into_inner);
        agreements.push_front((octets.to_vec(), Arc::clone(&agreement)));
        agreements.truncate(AGREEMENTS_KEPT);
        Some(agreement)
    }
}

impl fmt::Debug for TransportKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportKey")
            .field("principal", &self.principal)
            .field("certificate_sha256", &hex::encode(self.certificate_sha256))
            .finish_non_exhaustive()
    }
}

/// Why a transport key cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportKeyError {
    /// Not a private key on P-256.
    #[error(
        "transport key: not an EC P-256 private key in PKCS#8; make one with `kms principal register-transport-key`"
    )]
    PrivateKey,
    /// Not a certificate.
    #[error("transport certificate: not an X.509 certificate")]
    Certificate,
    /// The certificate holds another public key.
    #[error(
        "transport certificate: it certifies another key than the transport key beside it; a renewal may have replaced only one of the files; register a new one with `kms principal register-transport-key`"
    )]
    CertificateOfAnotherKey,
    /// No URI names the principal.
    #[error("transport certificate: no subjectAltName URI of the form urn:meterkms:ISLAND:ROLE:NAME")]
    NoPrincipal,
    /// The URI has another form.
    #[error("transport certificate: {0}")]
    Principal(#[from] ParseError),
}

/// SHA-256 as an array.
pub(crate) fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut result = [0; 32];
    result.copy_from_slice(digest::digest(&digest::SHA256, octets).as_ref());
    result
}

/// A server changes its ephemeral key every few minutes, and each token of an island has one.
const AGREEMENTS_KEPT: usize = 16;
