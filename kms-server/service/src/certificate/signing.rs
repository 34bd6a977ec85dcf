//! Signing a certificate: the TBSCertificate is built and linted, the HSM signs it, and the
//! signature is checked.

use async_recursion::async_recursion as boxed;
use std::sync::Mutex;
use std::sync::PoisonError;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use bytes::Bytes;
use kms_domain::{Enrolment, PrincipalCertificate, PrincipalId, TransportCertificate, UnixMillis};
use kms_hsm::{Hsm, Purpose, TokenKey};
use rcgen::{
    Certificate, CertificateParams, Issuer, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use x509_parser::asn1_rs::{Integer, Sequence, ToDer};
use x509_parser::prelude::{FromDer, GeneralName, TbsCertificate, X509Certificate, X509Version};

use super::request::{p256_point, sha256};
use kms_base::error::ServiceError;

/// A TBSCertificate (RFC 5280, 4.1.2), built and linted, without its signature.
pub struct ToBeSigned {
    params: CertificateParams,
    issuing: Issuing,
    pub(super) tbs: Vec<u8>,
}

impl ToBeSigned {
    /// The SHA-256 digest that the CA key signs by CKM_ECDSA, 32 octets.
    pub fn digest(&self) -> [u8; 32] {
        sha256(&self.tbs)
    }

    /// Has the CA key in the HSM sign it.
    ///
    /// # Errors
    /// The HSM's, and as [`Self::finish`].
    #[boxed]
    pub async fn sign(self, hsm: &Hsm) -> Result<IssuedCertificate, ServiceError> {
        let signature = hsm.sign_ecdsa(CA_KEY, self.digest()).await?;
        self.finish(&signature)
    }

    /// The certificate with its signature `r ‖ s`, 64 octets.
    ///
    /// # Errors
    /// Internal: the signature does not verify with the CA key over the linted octets.
    pub fn finish(self, signature: &[u8]) -> Result<IssuedCertificate, ServiceError> {
        // The result is checked: an HSM that signs other octets, or with another key, is noticed.
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.issuing.key().0).verify(&self.tbs, signature).map_err(
            |_| ServiceError::Internal("the HSM's signature does not verify under the CA certificate's key".to_owned()),
        )?;
        let signer = Signed { key: self.issuing.key(), tbs: self.tbs, signature: ecdsa_sig_value(signature)? };
        let certificate = self.issuing.certificate(&self.params, &signer).map_err(internal("the certificate"))?;
        IssuedCertificate::parse(certificate.der().clone())
    }

    /// Builds it, and lints it.
    ///
    /// # Errors
    /// Internal: it could not be built, or it breaks a rule of its profile.
    pub(super) fn build(
        params: CertificateParams,
        issuing: Issuing,
        authority_not_after: Option<UnixMillis>,
    ) -> Result<Self, ServiceError> {
        let capture = Capture { key: issuing.key(), message: Mutex::default() };
        issuing.certificate(&params, &capture).map_err(internal("the certificate"))?;
        let tbs = capture.message.into_inner().unwrap_or_else(PoisonError::into_inner);
        let this = Self { params, issuing, tbs };
        this.lint(authority_not_after).map_err(|rule| ServiceError::Internal(format!("certificate lint: {rule}")))?;
        Ok(this)
    }

    /// Parses the result with another library and compares it with the intended certificate.
    fn lint(&self, authority_not_after: Option<UnixMillis>) -> Result<(), &'static str> {
        let (rest, tbs) = TbsCertificate::from_der(&self.tbs).map_err(|_| "it is not a TBSCertificate")?;
        let require = |holds: bool, rule: &'static str| if holds { Ok(()) } else { Err(rule) };
        require(rest.is_empty(), "octets follow")?;
        require(tbs.version() == X509Version::V3, "not version 3")?;
        require(
            tbs.raw_serial().len() <= 20 && tbs.raw_serial().first().is_some_and(|first| *first & 0x80 == 0),
            "serial number is not positive and short",
        )?;
        require(tbs.validity.not_before < tbs.validity.not_after, "it ends before it begins")?;
        let not_after = tbs.validity.not_after.timestamp().saturating_mul(1000);
        require(authority_not_after.is_none_or(|authority| not_after <= authority.0), "it outlives its issuer")?;
        let usage = tbs.key_usage().map_err(|_| "key usage twice")?.ok_or("no key usage")?;
        require(usage.critical, "key usage is not critical")?;
        let constraints =
            tbs.basic_constraints().map_err(|_| "basic constraints twice")?.ok_or("no basic constraints")?;
        require(constraints.critical, "basic constraints are not critical")?;
        match &self.issuing {
            Issuing::Root(key) => {
                require(tbs.is_ca() && usage.value.key_cert_sign(), "the root is no authority")?;
                require(tbs.subject.as_raw() == tbs.issuer.as_raw(), "the root has another issuer")?;
                require(p256_point(&tbs.subject_pki) == Some(key.0), "the root has another key")
            }
            Issuing::Leaf { authority, subject, .. } => {
                let (_, authority) =
                    X509Certificate::from_der(authority).map_err(|_| "the issuer is not a certificate")?;
                require(
                    !tbs.is_ca() && !usage.value.key_cert_sign() && !usage.value.crl_sign(),
                    "a leaf is an authority",
                )?;
                require(tbs.issuer.as_raw() == authority.subject().as_raw(), "the issuer's name differs")?;
                require(tbs.subject_pki.raw == subject.subject_public_key_info(), "the subject's key differs")?;
                let names =
                    tbs.subject_alternative_name().map_err(|_| "subjectAltName twice")?.ok_or("no subjectAltName")?;
                let uris = names.value.general_names.iter().filter(|name| matches!(name, GeneralName::URI(_))).count();
                let extended = tbs.extended_key_usage().map_err(|_| "extended key usage twice")?;
                let server = extended.as_ref().is_some_and(|usage| usage.value.server_auth);
                let client = extended.as_ref().is_some_and(|usage| usage.value.client_auth);
                require(!(server && client), "server and client at once")?;
                require(
                    if server { uris == 0 } else { uris == 1 && names.value.general_names.len() == 1 },
                    "the names do not fit the use",
                )?;
                require(
                    (server || client) == usage.value.digital_signature(),
                    "digitalSignature does not fit the use",
                )?;
                require((server || client) != usage.value.key_agreement(), "keyAgreement does not fit the use")
            }
        }
    }
}

/// A signed certificate, with the values that rows and records keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// SHA-256 of the DER, 32 octets.
    pub sha256: [u8; 32],
    /// The serial number, big-endian, 16 octets.
    pub serial: Bytes,
    /// The end of its validity.
    pub not_after: UnixMillis,
    /// SHA-256 of the SubjectPublicKeyInfo (DER) that it certifies, 32 octets.
    pub key_sha256: [u8; 32],
    p256_point: Option<[u8; 65]>,
}

impl IssuedCertificate {
    /// The entry for the TLS certificates of a principal's row.
    pub fn for_principal(&self, enrolment: Enrolment, issued_by: Option<PrincipalId>) -> PrincipalCertificate {
        PrincipalCertificate {
            serial: self.serial.clone(),
            sha256: self.sha256,
            not_after: self.not_after,
            key_sha256: Some(self.key_sha256),
            enrolment,
            issued_by,
        }
    }

    /// The transport certificate of a principal's row; `None` for a key that is not on P-256.
    pub fn for_transport(&self) -> Option<TransportCertificate> {
        Some(TransportCertificate {
            certificate: Bytes::copy_from_slice(&self.der),
            sha256: self.sha256,
            public_point: self.p256_point?,
        })
    }

    /// The certificate in PEM.
    pub fn pem(&self) -> String {
        pem("CERTIFICATE", &self.der)
    }

    /// Parses the signed certificate.
    fn parse(der: CertificateDer<'static>) -> Result<Self, ServiceError> {
        let (_, certificate) = X509Certificate::from_der(&der).map_err(internal("the signed certificate"))?;
        let issued = Self {
            sha256: sha256(&der),
            serial: Bytes::from(certificate.serial.to_bytes_be()),
            not_after: UnixMillis(certificate.validity().not_after.timestamp().saturating_mul(1000)),
            key_sha256: sha256(certificate.public_key().raw),
            p256_point: p256_point(certificate.public_key()),
            der: CertificateDer::from(Vec::new()),
        };
        Ok(Self { der, ..issued })
    }
}

/// PEM (RFC 7468) of one object.
pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

/// The signer and the subject's key.
pub(super) enum Issuing {
    Root(CaKey),
    Leaf { authority: CertificateDer<'static>, key: CaKey, subject: SubjectPublicKeyInfo },
}

impl Issuing {
    const fn key(&self) -> CaKey {
        match self {
            Self::Root(key) | Self::Leaf { key, .. } => *key,
        }
    }

    fn certificate(&self, params: &CertificateParams, signer: &impl SigningKey) -> Result<Certificate, rcgen::Error> {
        match self {
            Self::Root(_) => params.self_signed(signer),
            Self::Leaf { authority, subject, .. } => {
                params.signed_by(subject, &Issuer::from_ca_cert_der(authority, signer)?)
            }
        }
    }
}

/// The public half of the CA key: a P-256 point, `04 ‖ x ‖ y`.
#[derive(Clone, Copy)]
pub(super) struct CaKey(pub(super) [u8; 65]);

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// First pass: captures the octets to sign.
struct Capture {
    key: CaKey,
    message: Mutex<Vec<u8>>,
}

impl PublicKeyData for Capture {
    fn der_bytes(&self) -> &[u8] {
        self.key.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.key.algorithm()
    }
}

impl SigningKey for Capture {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = message.to_vec();
        Ok(Vec::new())
    }
}

/// Second pass: the HSM's signature, for exactly the octets that were linted.
struct Signed {
    key: CaKey,
    tbs: Vec<u8>,
    signature: Vec<u8>,
}

impl PublicKeyData for Signed {
    fn der_bytes(&self) -> &[u8] {
        self.key.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.key.algorithm()
    }
}

impl SigningKey for Signed {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        if message != self.tbs {
            return Err(rcgen::Error::RemoteKeyError);
        }
        Ok(self.signature.clone())
    }
}

/// ECDSA-Sig-Value (RFC 3279, 2.2.3) of `r ‖ s`.
pub(super) fn ecdsa_sig_value(signature: &[u8]) -> Result<Vec<u8>, ServiceError> {
    let integer = |octets: &[u8]| {
        let significant =
            octets.iter().position(|octet| *octet != 0).and_then(|first| octets.get(first..)).unwrap_or(&[0]);
        let mut content = Vec::with_capacity(significant.len() + 1);
        if significant.first().is_some_and(|first| *first & 0x80 != 0) {
            content.push(0);
        }
        content.extend_from_slice(significant);
        Integer::new(&content).to_der_vec()
    };
    let (r, s) = signature.split_at(signature.len() / 2);
    let mut content = integer(r).map_err(internal("r of a signature"))?;
    content.extend(integer(s).map_err(internal("s of a signature"))?);
    Sequence::new(content.into()).to_der_vec().map_err(internal("a signature"))
}

/// An internal error of this server, with its subject.
pub(super) fn internal<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> ServiceError {
    move |error| ServiceError::Internal(format!("{what}: {error}"))
}

/// The island's CA key.
pub const CA_KEY: TokenKey = TokenKey::first(Purpose::Ca);
