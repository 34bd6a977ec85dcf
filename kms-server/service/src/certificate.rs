//! The island's certification authority: a P-256 key in the HSM (CKM_ECDSA) that signs what is
//! built and checked here.
//!
//! Issuing goes in steps that cannot be taken out of order: parse the request → build the
//! TBSCertificate → lint it → sign its digest in the HSM → check the signature → (by the caller)
//! register the certificate with its audit record in one act → hand it out. A certificate that is
//! signed and not registered is worth nothing: the principal's sealed row decides (I5).
//!
//! Profiles of RFC 5280. Extensions of a request are ignored: everything in a certificate is chosen
//! here.

use async_recursion::async_recursion as boxed;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::PoisonError;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use bytes::Bytes;
use kms_domain::{
    Enrolment, IslandName, ParseError, PrincipalCertificate, PrincipalId, TransportCertificate, UnixMillis,
};
use kms_hsm::{Hsm, Purpose, TokenKey};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm, SigningKey,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::asn1_rs::{Integer, Sequence, ToDer};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, TbsCertificate, X509Certificate, X509Version};
use x509_parser::public_key::PublicKey;

use kms_base::error::ServiceError;

/// The island's authority: its root certificate, which signs all others.
#[derive(Clone)]
pub struct CertificateAuthority {
    certificate: CertificateDer<'static>,
    key: CaKey,
    not_after: UnixMillis,
}

impl CertificateAuthority {
    /// The root certificate of a new island, to be signed by its own key. Path length 0: it issues
    /// no further authorities.
    ///
    /// # Errors
    /// Internal: the certificate could not be built.
    pub fn root(island: &IslandName, public_point: [u8; 65], validity: Validity) -> Result<ToBeSigned, ServiceError> {
        let mut params = params(validity)?;
        params.distinguished_name.push(DnType::OrganizationName, format!("meterkms {island}"));
        params.distinguished_name.push(DnType::CommonName, format!("meterkms {island} root CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        ToBeSigned::build(params, Issuing::Root(CaKey(public_point)), None)
    }

    /// The authority of a root certificate.
    ///
    /// # Errors
    /// Not a self-signed certificate of a P-256 authority.
    pub fn from_der(der: &[u8]) -> Result<Self, ParseError> {
        let refuse = |reason: &str| ParseError::new("CA certificate", reason);
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| refuse("not an X.509 certificate (DER)"))?;
        if !certificate.is_ca() {
            return Err(refuse("it is not a certificate of an authority"));
        }
        let key = CaKey(p256_point(certificate.public_key()).ok_or_else(|| refuse("its key is not EC P-256"))?);
        certificate.verify_signature(None).map_err(|_| refuse("it is not signed by its own key"))?;
        let not_after = UnixMillis(certificate.validity().not_after.timestamp().saturating_mul(1000));
        Ok(Self { certificate: CertificateDer::from(der.to_vec()), key, not_after })
    }

    /// The root certificate.
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// When the root certificate ends.
    pub const fn not_after(&self) -> UnixMillis {
        self.not_after
    }

    /// The certificate of a principal's TLS key: clientAuth, digitalSignature, the principal as URI
    /// subjectAltName.
    ///
    /// # Errors
    /// Failed precondition: the root certificate ends too early. Internal: the certificate could
    /// not be built.
    pub fn principal(
        &self,
        principal: &PrincipalId,
        request: &CertificationRequest,
        validity: Validity,
    ) -> Result<ToBeSigned, ServiceError> {
        let mut params = self.leaf(validity, principal_name(principal))?;
        params.subject_alt_names = vec![principal_uri(principal)?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        ToBeSigned::build(params, self.issuing(request)?, Some(self.not_after))
    }

    /// The certificate of a principal's transport key: keyAgreement and nothing else, so that it is
    /// no TLS certificate.
    ///
    /// # Errors
    /// Invalid argument: the key is not EC P-256. Else as [`Self::principal`].
    pub fn transport(
        &self,
        principal: &PrincipalId,
        request: &CertificationRequest,
        validity: Validity,
    ) -> Result<ToBeSigned, ServiceError> {
        if request.p256_point.is_none() {
            return Err(ServiceError::invalid("certificate_request", "a transport key is an EC key on P-256"));
        }
        let mut params = self.leaf(validity, principal_name(principal))?;
        params.subject_alt_names = vec![principal_uri(principal)?];
        params.key_usages = vec![KeyUsagePurpose::KeyAgreement];
        ToBeSigned::build(params, self.issuing(request)?, Some(self.not_after))
    }

    /// The certificate of a server's TLS key: serverAuth, digitalSignature, its DNS names and IP
    /// addresses.
    ///
    /// # Errors
    /// Invalid argument: no name, or one that is neither. Else as [`Self::principal`].
    pub fn server(
        &self,
        island: &IslandName,
        names: &[String],
        request: &CertificationRequest,
        validity: Validity,
    ) -> Result<ToBeSigned, ServiceError> {
        let first = names.first().ok_or_else(|| {
            ServiceError::invalid("server.names", "a server needs at least one DNS name or IP address")
        })?;
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, format!("meterkms {island}"));
        subject.push(DnType::OrganizationalUnitName, "server");
        subject.push(DnType::CommonName, first.chars().take(64).collect::<String>());
        let mut params = self.leaf(validity, subject)?;
        params.subject_alt_names = names.iter().map(|name| server_name(name)).collect::<Result<_, _>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        ToBeSigned::build(params, self.issuing(request)?, Some(self.not_after))
    }

    /// Whether the key in the HSM is the one of the root certificate. To be asked at start: another
    /// one would make certificates that nobody accepts.
    ///
    /// # Errors
    /// Failed precondition: another key. Else the HSM's.
    #[boxed]
    pub async fn check_key(&self, hsm: &Hsm) -> Result<(), ServiceError> {
        if hsm.public_key(CA_KEY).await? == self.key.0 {
            return Ok(());
        }
        Err(ServiceError::FailedPrecondition {
            reason: "the CA key in the HSM is not the key of the island's root certificate".to_owned(),
            next_step: "name this island's root certificate in `tls.client_ca`, or this island's token".to_owned(),
        })
    }

    fn leaf(&self, validity: Validity, subject: DistinguishedName) -> Result<CertificateParams, ServiceError> {
        if validity.not_after > self.not_after {
            return Err(ServiceError::FailedPrecondition {
                reason: "the island's root certificate ends before the certificate that is asked for".to_owned(),
                next_step: "hold a ceremony for a new root".to_owned(),
            });
        }
        let mut params = params(validity)?;
        params.distinguished_name = subject;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn issuing(&self, request: &CertificationRequest) -> Result<Issuing, ServiceError> {
        let subject = SubjectPublicKeyInfo::from_der(&request.spki).map_err(internal("the subject's public key"))?;
        Ok(Issuing::Leaf { authority: self.certificate.clone(), key: self.key, subject })
    }
}

/// A PKCS#10 request (RFC 2986) that proves possession of its key. Only the key is taken from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificationRequest {
    spki: Vec<u8>,
    p256_point: Option<[u8; 65]>,
}

impl CertificationRequest {
    /// Parses a request, at most 16 KiB of DER, and verifies its signature.
    ///
    /// # Errors
    /// Not a request, a signature that does not fit its key, or a key that is not accepted: EC
    /// P-256 or P-384, RSA of 3072 to 4096 bits, and Ed25519 are.
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
        // The SPKI's own algorithm counts, not that of the signature: `openssl req` signs P-384
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
        // I6: one key has one name, its SHA-256. An encoding that can be chosen would give it
        // several.
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

    /// SHA-256 of the SubjectPublicKeyInfo, 32 octets.
    pub fn spki_sha256(&self) -> [u8; 32] {
        sha256(&self.spki)
    }
}

/// From when until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    not_before: UnixMillis,
    not_after: UnixMillis,
}

impl Validity {
    /// For this many days from now. It begins five minutes ago, for clocks that are behind.
    pub const fn days(now: UnixMillis, days: u16) -> Self {
        Self { not_before: now.after(-5 * 60 * 1000), not_after: now.after(days as i64 * 86_400_000) }
    }
}

/// A TBSCertificate (RFC 5280, 4.1.2) that was built and linted, and waits for its signature.
pub struct ToBeSigned {
    params: CertificateParams,
    issuing: Issuing,
    tbs: Vec<u8>,
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
    /// Internal: the signature is not one of the CA key over what was linted.
    pub fn finish(self, signature: &[u8]) -> Result<IssuedCertificate, ServiceError> {
        // What leaves is checked: an HSM that signs something else, or with another key, does not
        // go unnoticed.
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.issuing.key().0).verify(&self.tbs, signature).map_err(
            |_| ServiceError::Internal("the HSM's signature does not verify under the CA certificate's key".to_owned()),
        )?;
        let signer = Signed { key: self.issuing.key(), tbs: self.tbs, signature: ecdsa_sig_value(signature)? };
        let certificate = self.issuing.certificate(&self.params, &signer).map_err(internal("the certificate"))?;
        IssuedCertificate::parse(certificate.der().clone())
    }

    fn build(
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

    /// Reads what was built with another library, and compares it with what was meant.
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

/// A signed certificate, with what rows and records keep of it.
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
    /// What a principal's row lists of its TLS certificate.
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

    /// What a principal's row keeps of its transport certificate; none for a key that is not on
    /// P-256.
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

enum Issuing {
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
struct CaKey([u8; 65]);

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// First pass: keeps what is to be signed.
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

fn params(validity: Validity) -> Result<CertificateParams, ServiceError> {
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(internal("a random serial number"))?;
    // RFC 5280, 4.1.2.2: positive. The second bit keeps its length, so that rows and certificates
    // show the same octets.
    if let Some(first) = serial.first_mut() {
        *first = (*first & 0x7f) | 0x40;
    }
    let time = |moment: UnixMillis| {
        ASN1Time::from_timestamp(moment.0.div_euclid(1000))
            .map(|time| time.to_datetime())
            .map_err(internal("a time of validity"))
    };
    let mut params = CertificateParams::default();
    params.not_before = time(validity.not_before)?;
    params.not_after = time(validity.not_after)?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    Ok(params)
}

fn principal_name(principal: &PrincipalId) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, format!("meterkms {}", principal.island()));
    name.push(DnType::OrganizationalUnitName, principal.role().name());
    name.push(DnType::CommonName, principal.name());
    name
}

fn principal_uri(principal: &PrincipalId) -> Result<SanType, ServiceError> {
    Ok(SanType::URI(principal.to_string().try_into().map_err(internal("the principal's URI"))?))
}

fn server_name(name: &str) -> Result<SanType, ServiceError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let parsed = rustls_pki_types::DnsName::try_from(name).map_err(|_| {
        ServiceError::invalid("server.names", format!("`{name}` is neither a DNS name nor an IP address"))
    })?;
    Ok(SanType::DnsName(parsed.as_ref().try_into().map_err(internal("a DNS name"))?))
}

/// ECDSA-Sig-Value (RFC 3279, 2.2.3) of `r ‖ s`.
fn ecdsa_sig_value(signature: &[u8]) -> Result<Vec<u8>, ServiceError> {
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

fn p256_point(info: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Option<[u8; 65]> {
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

fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest(&SHA256, octets).as_ref());
    value
}

fn internal<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> ServiceError {
    move |error| ServiceError::Internal(format!("{what}: {error}"))
}

/// The island's CA key.
pub const CA_KEY: TokenKey = TokenKey::first(Purpose::Ca);
const LONGEST_REQUEST: usize = 16_384;
const OID_P256: &str = "1.2.840.10045.3.1.7";
const OID_P384: &str = "1.3.132.0.34";
const OID_ED25519: &str = "1.3.101.112";

#[cfg(test)]
pub(crate) mod tests {
    use std::process::Command;

    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
    use kms_domain::Role;
    use rcgen::KeyPair;

    use super::*;
    use kms_authz::PeerCertificate;

    /// Stands for the CA key in the HSM.
    struct TestAuthority {
        key: EcdsaKeyPair,
        authority: CertificateAuthority,
    }

    impl TestAuthority {
        fn new() -> Self {
            let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
            let point = key.public_key().as_ref().try_into().unwrap();
            let root = CertificateAuthority::root(&island(), point, Validity::days(now(), 7300)).unwrap();
            let root = sign(&key, root);
            Self { key, authority: CertificateAuthority::from_der(&root.der).unwrap() }
        }

        fn sign(&self, certificate: ToBeSigned) -> IssuedCertificate {
            sign(&self.key, certificate)
        }
    }

    fn sign(key: &EcdsaKeyPair, certificate: ToBeSigned) -> IssuedCertificate {
        let signature = key.sign(&SystemRandom::new(), &certificate.tbs).unwrap();
        certificate.finish(signature.as_ref()).unwrap()
    }

    fn island() -> IslandName {
        IslandName::parse("north").unwrap()
    }

    fn now() -> UnixMillis {
        UnixMillis(
            i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis())
                .unwrap(),
        )
    }

    pub(crate) fn request(key: &KeyPair) -> CertificationRequest {
        // A request that asks for everything; none of it may be granted.
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
        CertificationRequest::parse(params.serialize_request(key).unwrap().der()).unwrap()
    }

    fn principal(role: Role, name: &str) -> PrincipalId {
        PrincipalId::new(island(), role, name).unwrap()
    }

    #[test]
    fn openssl_accepts_every_profile_strictly() {
        let authority = TestAuthority::new();
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root.pem");
        std::fs::write(&root, pem("CERTIFICATE", authority.authority.certificate())).unwrap();
        let hes = principal(Role::HeadEnd, "hes-1");
        let validity = Validity::days(now(), 365);
        let p256 = request(&KeyPair::generate().unwrap());
        let p384 = request(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap());
        let ed25519 = request(&KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap());
        let names = ["kms.example".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        let issued = [
            ("sslclient", authority.authority.principal(&hes, &p256, validity)),
            ("sslclient", authority.authority.principal(&hes, &p384, validity)),
            ("sslclient", authority.authority.principal(&hes, &ed25519, validity)),
            ("any", authority.authority.transport(&hes, &p256, validity)),
            ("sslserver", authority.authority.server(&island(), &names, &p256, validity)),
        ];
        for (purpose, certificate) in issued {
            let certificate = authority.sign(certificate.unwrap());
            let path = folder.path().join("leaf.pem");
            std::fs::write(&path, certificate.pem()).unwrap();
            let mut openssl = Command::new("openssl");
            openssl.args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]).arg(&root).arg(&path);
            let output = openssl.output().unwrap();
            assert!(output.status.success(), "{purpose}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }

    #[test]
    fn nothing_but_the_key_is_taken_from_a_request() {
        let authority = TestAuthority::new();
        let key = KeyPair::generate().unwrap();
        let hes = principal(Role::HeadEnd, "hes-1");
        let issued =
            authority.sign(authority.authority.principal(&hes, &request(&key), Validity::days(now(), 30)).unwrap());
        let (_, certificate) = X509Certificate::from_der(&issued.der).unwrap();
        assert!(!certificate.is_ca());
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI("urn:meterkms:north:head-end:hes-1")]);
        assert!(!certificate.key_usage().unwrap().unwrap().value.key_cert_sign());
        assert!(!certificate.extended_key_usage().unwrap().unwrap().value.any);
        let peer = PeerCertificate::parse(&issued.der).unwrap();
        assert_eq!((peer.principal, peer.sha256, peer.serial), (hes, issued.sha256, issued.serial.clone()));
        assert_eq!(issued.serial.len(), 16);
    }

    #[test]
    fn a_transport_certificate_is_no_tls_certificate() {
        let authority = TestAuthority::new();
        let hes = principal(Role::HeadEnd, "hes-1");
        let request_p256 = request(&KeyPair::generate().unwrap());
        let issued =
            authority.sign(authority.authority.transport(&hes, &request_p256, Validity::days(now(), 30)).unwrap());
        assert!(issued.for_transport().is_some());
        assert!(PeerCertificate::parse(&issued.der).is_err());
        let request_p384 = request(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap());
        assert!(matches!(
            authority.authority.transport(&hes, &request_p384, Validity::days(now(), 30)),
            Err(ServiceError::InvalidArgument { field, .. }) if field == "certificate_request"
        ));
    }

    #[test]
    fn a_request_must_prove_possession() {
        let key = KeyPair::generate().unwrap();
        let der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        assert!(CertificationRequest::parse(&der).is_ok());
        let mut forged = der.clone();
        *forged.last_mut().unwrap() ^= 1;
        assert!(CertificationRequest::parse(&forged).is_err());
        for length in 0..der.len() {
            assert!(CertificationRequest::parse(&der[..length]).is_err());
        }
        assert!(CertificationRequest::parse(&[der.as_slice(), &[0]].concat()).is_err());
        let small = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        let der = CertificateParams::default().serialize_request(&small).unwrap();
        assert!(CertificationRequest::parse(der.der()).unwrap_err().reason().contains("RSA"));
    }

    #[test]
    fn a_foreign_signature_makes_no_certificate() {
        let (authority, other) = (TestAuthority::new(), TestAuthority::new());
        let hes = principal(Role::HeadEnd, "hes-1");
        let certificate = authority
            .authority
            .principal(&hes, &request(&KeyPair::generate().unwrap()), Validity::days(now(), 30))
            .unwrap();
        let signature = other.key.sign(&SystemRandom::new(), &certificate.tbs).unwrap();
        assert!(matches!(certificate.finish(signature.as_ref()), Err(ServiceError::Internal(_))));
    }

    #[test]
    fn no_certificate_outlives_the_root() {
        let authority = TestAuthority::new();
        let hes = principal(Role::HeadEnd, "hes-1");
        let refusal =
            authority.authority.principal(&hes, &request(&KeyPair::generate().unwrap()), Validity::days(now(), 7301));
        assert!(matches!(refusal, Err(ServiceError::FailedPrecondition { .. })));
    }

    #[test]
    fn signatures_with_leading_zeros_become_minimal_integers() {
        let mut signature = [0; 64];
        signature[31] = 0x80;
        signature[63] = 1;
        assert_eq!(ecdsa_sig_value(&signature).unwrap(), [0x30, 7, 2, 2, 0, 0x80, 2, 1, 1]);
    }
}
