//! Certification requests (PKCS#10) and the keys that they may contain.

use aws_lc_rs::digest::{SHA256, digest};
use kms_domain::ParseError;
use rcgen::{PublicKeyData as _, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

/// A PKCS#10 request (RFC 2986) that proves possession of its key. Only the key is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificationRequest {
    pub(super) spki: Vec<u8>,
    pub(super) p256_point: Option<[u8; 65]>,
}

impl CertificationRequest {
    /// Parses a request, at most 16 KiB of DER, and verifies its signature.
    ///
    /// # Errors
    /// Not a request, a signature that does not fit its key, or a key that is not accepted.
    /// Accepted keys are EC P-256 and P-384, RSA of 3072 to 4096 bits, and Ed25519.
    pub fn parse(der: &[u8]) -> Result<Self, ParseError> {
        let refuse = |reason: &str| ParseError::new("certificate request", reason);
        if der.len() > LONGEST_REQUEST {
            return Err(refuse("it is longer than 16384 octets"));
        }
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|_| refuse("not a PKCS#10 request (DER)"))?;
        if !rest.is_empty() {
            return Err(refuse("octets follow the request"));
        }
        // The algorithm of the SPKI counts, not that of the signature: `openssl req` signs P-384
        // requests with SHA-256.
        let info = &request.certification_request_info.subject_pki;
        let accepted = match info.parsed() {
            Ok(PublicKey::RSA(key)) => (3072..=4096).contains(&key.key_size()),
            Ok(PublicKey::EC(_)) => ec_curve(info).is_some_and(|curve| curve == OID_P256 || curve == OID_P384),
            _ => info.algorithm.algorithm.to_id_string() == OID_ED25519,
        };
        if !accepted {
            return Err(refuse("its key is none of EC P-256, EC P-384, RSA with 3072 to 4096 bits, Ed25519"));
        }
        request
            .verify_signature()
            .map_err(|_| refuse("its signature is not by its own key: possession is not proven"))?;
        // I6: one key has one name, its SHA-256. A key with a choice of encodings would have
        // several names.
        let canonical = SubjectPublicKeyInfo::from_der(info.raw).map_err(|_| refuse("its key cannot be read"))?;
        let compressed = matches!(info.parsed(), Ok(PublicKey::EC(point)) if point.data().first() != Some(&4));
        if canonical.subject_public_key_info() != info.raw || compressed {
            return Err(refuse(
                "its key is not encoded in the usual way: uncompressed points, DER as RFC 5480, RFC 4055 and RFC 8410 say",
            ));
        }
        Ok(Self { spki: info.raw.to_vec(), p256_point: p256_point(info) })
    }

    /// Parses a request in PEM.
    ///
    /// # Errors
    /// As [`Self::parse`], or no PEM.
    pub fn parse_pem(pem: &[u8]) -> Result<Self, ParseError> {
        let der = CertificateSigningRequestDer::from_pem_slice(pem)
            .map_err(|_| ParseError::new("certificate request", "no PEM block CERTIFICATE REQUEST"))?;
        Self::parse(&der)
    }

    /// Whether the key is on P-256, as transport keys are.
    pub const fn is_p256(&self) -> bool {
        self.p256_point.is_some()
    }

    /// SHA-256 of the SubjectPublicKeyInfo, 32 octets.
    pub fn spki_sha256(&self) -> [u8; 32] {
        sha256(&self.spki)
    }
}

/// The public point `04 ‖ x ‖ y` of a P-256 key.
pub(super) fn p256_point(info: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Option<[u8; 65]> {
    if ec_curve(info)? != OID_P256 {
        return None;
    }
    let point: [u8; 65] = info.subject_public_key.data.as_ref().try_into().ok()?;
    (point.first() == Some(&4)).then_some(point)
}

fn ec_curve(info: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Option<String> {
    let parameters = info.algorithm.parameters.as_ref()?;
    Some(parameters.as_oid().ok()?.to_id_string())
}

/// SHA-256.
pub(super) fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest(&SHA256, octets).as_ref());
    value
}

const LONGEST_REQUEST: usize = 16_384;
const OID_P256: &str = "1.2.840.10045.3.1.7";
const OID_P384: &str = "1.3.132.0.34";
const OID_ED25519: &str = "1.3.101.112";
