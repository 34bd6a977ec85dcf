//! The caller of a request: the principal that the connection's certificate names.

use kms_base::ServiceError;
use kms_domain::{IslandName, PrincipalId, UnixMillis};

use crate::PeerCertificate;

/// Who calls. The certificate is verified, has not expired, and is of this island. Whether the
/// principal is enabled, and the certificate still listed, is in its sealed row, which every act
/// reads (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The principal of the certificate.
    pub principal: PrincipalId,
    /// SHA-256 of the certificate (DER), 32 octets.
    pub certificate_sha256: [u8; 32],
    /// The end of the certificate's validity.
    pub not_after: UnixMillis,
}

impl Caller {
    /// The caller with this certificate, which the handshake has verified. `None`: the connection
    /// has no certificate.
    ///
    /// # Errors
    /// Unauthenticated: no certificate, a certificate of another island, or one that has expired
    /// since the handshake.
    pub fn of(
        certificate: Option<&PeerCertificate>,
        island: &IslandName,
        now: UnixMillis,
    ) -> Result<Self, ServiceError> {
        let refuse = |reason: &str| Err(ServiceError::unauthenticated(reason));
        let Some(certificate) = certificate else {
            return refuse("the connection has no client certificate");
        };
        if certificate.principal.island() != island {
            return refuse("the client certificate belongs to another island");
        }
        if certificate.not_after <= now {
            return refuse("the client certificate has expired; renew it and connect again");
        }
        Ok(Self {
            principal: certificate.principal.clone(),
            certificate_sha256: certificate.sha256,
            not_after: certificate.not_after,
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use kms_domain::Role;

    use super::*;

    fn certificate(island: &str) -> PeerCertificate {
        PeerCertificate {
            principal: PrincipalId::new(IslandName::parse(island).unwrap(), Role::HeadEnd, "hes-1").unwrap(),
            sha256: [7; 32],
            serial: Bytes::from_static(&[1]),
            not_after: UnixMillis(1_000),
        }
    }

    #[test]
    fn only_certificates_of_the_island_and_in_time_make_a_caller() {
        let north = IslandName::parse("north").unwrap();
        let caller = Caller::of(Some(&certificate("north")), &north, UnixMillis(999)).unwrap();
        assert_eq!((caller.principal.name(), caller.certificate_sha256), ("hes-1", [7; 32]));
        for (certificate, now) in [(Some(certificate("south")), 999), (Some(certificate("north")), 1_000), (None, 999)]
        {
            let refusal = Caller::of(certificate.as_ref(), &north, UnixMillis(now));
            assert!(matches!(refusal, Err(ServiceError::Unauthenticated { .. })), "{refusal:?}");
        }
    }
}
