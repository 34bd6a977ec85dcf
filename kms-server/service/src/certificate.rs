//! The island's certification authority (CA): a P-256 key in the HSM (CKM_ECDSA). It signs
//! certificates that are built and checked here.
//!
//! Issuing has fixed steps: parse the request → build the TBSCertificate → lint it → sign its
//! digest in the HSM → check the signature → (by the caller) register the certificate with its
//! audit record in one act → issue it. A certificate that is signed but not registered is useless:
//! the principal's sealed row decides (I5).
//!
//! The certificate profiles follow RFC 5280. Extensions of a request are ignored: the server
//! chooses everything in a certificate but the key.

pub mod request;
pub mod signing;

use async_recursion::async_recursion as boxed;
use std::net::IpAddr;

use kms_domain::{IslandName, ParseError, PrincipalId, UnixMillis};
use kms_hsm::Hsm;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use self::request::{CertificationRequest, p256_point};
use self::signing::{CA_KEY, CaKey, Issuing, ToBeSigned, internal};
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

    /// The certificate of a principal's transport key: keyAgreement only, so that it cannot be used
    /// for TLS.
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

    /// Checks that the key in the HSM is the key of the root certificate. Called at start: another
    /// key would sign certificates that nobody accepts.
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

/// The validity period of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    not_before: UnixMillis,
    not_after: UnixMillis,
}

impl Validity {
    /// This many days from now. It begins five minutes ago, for clocks that are late.
    pub const fn days(now: UnixMillis, days: u16) -> Self {
        Self { not_before: now.after(-5 * 60 * 1000), not_after: now.after(days as i64 * 86_400_000) }
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

#[cfg(test)]
pub(crate) mod tests {
    use std::process::Command;

    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
    use kms_domain::Role;
    use rcgen::KeyPair;

    use super::signing::{IssuedCertificate, ecdsa_sig_value, pem};
    use super::*;
    use kms_authz::PeerCertificate;
    use x509_parser::prelude::GeneralName;

    /// A CA key in memory, in place of the one in the HSM.
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
