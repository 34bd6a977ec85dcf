//! The caller of a request: the principal that the connection's certificate names.

use kms_domain::{IslandName, PrincipalId, UnixMillis};

use crate::api::listener::Peer;
use crate::error::ServiceError;

/// Who calls. The certificate is verified, in time and of this island. Whether the principal is
/// enabled and the certificate still listed stands in its sealed row, which every act reads (I5).
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
    /// The caller of a request that came over a connection of the listener.
    ///
    /// # Errors
    /// Unauthenticated: no certificate, one of another island, or one that has expired since the
    /// handshake.
    pub fn of<T>(request: &tonic::Request<T>, island: &IslandName, now: UnixMillis) -> Result<Self, ServiceError> {
        Self::from_extensions(request.extensions(), island, now)
    }

    /// As [`Self::of`], from the extensions of a request.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn from_extensions(
        extensions: &tonic::Extensions,
        island: &IslandName,
        now: UnixMillis,
    ) -> Result<Self, ServiceError> {
        Self::from_peer(extensions.get::<Peer>(), island, now)
    }

    /// As [`Self::of`], of the other end of the connection; none where there is no certificate.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn from_peer(peer: Option<&Peer>, island: &IslandName, now: UnixMillis) -> Result<Self, ServiceError> {
        let refuse = |reason: &str| Err(ServiceError::unauthenticated(reason));
        let Some(peer) = peer else {
            return refuse("the connection has no client certificate");
        };
        let certificate = &peer.certificate;
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
    use std::sync::Arc;

    use bytes::Bytes;
    use kms_domain::Role;

    use super::*;
    use crate::api::tls::PeerCertificate;

    fn extensions(island: &str) -> tonic::Extensions {
        let mut extensions = tonic::Extensions::new();
        extensions.insert(Peer {
            certificate: Arc::new(PeerCertificate {
                principal: PrincipalId::new(IslandName::parse(island).unwrap(), Role::HeadEnd, "hes-1").unwrap(),
                sha256: [7; 32],
                serial: Bytes::from_static(&[1]),
                not_after: UnixMillis(1_000),
            }),
            remote: "127.0.0.1:1".parse().unwrap(),
            usage: Arc::default(),
        });
        extensions
    }

    #[test]
    fn only_certificates_of_the_island_and_in_time_make_a_caller() {
        let north = IslandName::parse("north").unwrap();
        let caller = Caller::from_extensions(&extensions("north"), &north, UnixMillis(999)).unwrap();
        assert_eq!((caller.principal.name(), caller.certificate_sha256), ("hes-1", [7; 32]));
        for (extensions, now) in
            [(extensions("south"), 999), (extensions("north"), 1_000), (tonic::Extensions::new(), 999)]
        {
            let refusal = Caller::from_extensions(&extensions, &north, UnixMillis(now));
            assert!(matches!(refusal, Err(ServiceError::Unauthenticated { .. })), "{refusal:?}");
        }
    }
}
