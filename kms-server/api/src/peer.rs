//! The client of a connection, and the caller of a request.

use std::sync::Arc;

use kms_authz::{Caller, PeerCertificate};
use kms_base::ServiceError;
use kms_domain::{IslandName, UnixMillis};

use crate::usage::ConnectionUse;

/// What every request of a connection carries in its extensions.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The client's certificate.
    pub(crate) certificate: Arc<PeerCertificate>,
    /// What is counted of the connection.
    pub(crate) usage: Arc<ConnectionUse>,
}

/// The caller of a request that came over a connection of the listener.
///
/// # Errors
/// Unauthenticated: no certificate, a certificate of another island, or one that has expired since
/// the handshake.
pub(crate) fn caller_of<T>(
    request: &tonic::Request<T>,
    island: &IslandName,
    now: UnixMillis,
) -> Result<Caller, ServiceError> {
    Caller::of(request.extensions().get::<Peer>().map(|peer| &*peer.certificate), island, now)
}
