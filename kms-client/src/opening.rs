//! What the opening of an envelope depends on, and how it fails.

use kms_domain::{GrantId, KeyType, ParseError, PrincipalId, RequestId, UnixMillis};

use crate::counters::now;

/// The conditions for opening a genuine envelope. The default: made for any request, algorithm 1,
/// opened now.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    at: Option<UnixMillis>,
    pub(crate) allow_cbc_expand: bool,
    pub(crate) request_id: Option<RequestId>,
}

impl OpenOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Compare expiry with this time and not with the machine's clock.
    #[must_use]
    pub const fn at(mut self, now: UnixMillis) -> Self {
        self.at = Some(now);
        self
    }

    /// Accept algorithm 2, `ecdh-p256-cbc-expand`, which is not for production.
    #[must_use]
    pub const fn allow_cbc_expand(mut self) -> Self {
        self.allow_cbc_expand = true;
        self
    }

    /// Accept only an answer to this request.
    #[must_use]
    pub const fn answering(mut self, request_id: RequestId) -> Self {
        self.request_id = Some(request_id);
        self
    }

    pub(crate) fn now(&self) -> UnixMillis {
        self.at.unwrap_or_else(now)
    }
}

/// Why an envelope was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A field of the header is wrong.
    #[error("envelope header, {field}: {reason}")]
    Header {
        /// The field.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Algorithm 2, which the options do not allow.
    #[error(
        "envelope algorithm `ecdh-p256-cbc-expand` is not for production, and not allowed here. The HSM module of the island has no X9.63 KDF; allow this algorithm for trials only"
    )]
    AlgorithmRefused,
    /// The envelope is for another transport key of the grantee, or for another grantee.
    #[error(
        "the envelope is for the transport certificate with SHA-256 `{named}`, this one has `{own}`: use the newest transport key"
    )]
    OtherTransportKey {
        /// SHA-256 of the certificate that the header names, hex.
        named: String,
        /// This key's certificate, hex.
        own: String,
    },
    /// Expired.
    #[error("the envelope expired at {} ms, now is {} ms (Unix time): ask again with a new request id, and check the clock of this machine", .not_after.0, .now.0)]
    Expired {
        /// The expiry.
        not_after: UnixMillis,
        /// The time that it was compared with.
        now: UnixMillis,
    },
    /// The ephemeral key is no point of the curve.
    #[error("envelope header, ephemeral_public: not a point of P-256")]
    Agreement,
    /// The seal does not verify.
    #[error(
        "the seal of the envelope does not verify: the header or manifest was changed, or the envelope was made for another key; none of its keys was used"
    )]
    Seal,
    /// The manifest is genuine, but its content is wrong.
    #[error("envelope manifest: {reason}")]
    Manifest {
        /// What is wrong.
        reason: String,
    },
    /// Made for another principal.
    #[error("the envelope is for `{named}`, but this transport key belongs to `{own}`: use the profile of `{named}`")]
    OtherPrincipal {
        /// The principal that the manifest names.
        named: PrincipalId,
        /// The principal that the transport certificate names.
        own: PrincipalId,
    },
    /// An answer to another request.
    #[error("the envelope of grant {grant_id} answers request {named}, not this one: ask again with a new request id")]
    OtherRequest {
        /// The request that the manifest names.
        named: RequestId,
        /// The grant.
        grant_id: GrantId,
    },
    /// A wrapped key does not open.
    #[error(
        "{owner}, {key_type}: the wrapped key does not open, or has the wrong length; report this to the operator of the server"
    )]
    Unwrap {
        /// The meter or group.
        owner: String,
        /// The key type.
        key_type: KeyType,
    },
}

impl OpenError {
    pub(crate) fn manifest(reason: impl Into<String>) -> Self {
        Self::Manifest { reason: reason.into() }
    }
}

impl From<ParseError> for OpenError {
    /// Only the manifest is parsed by types of the domain.
    fn from(error: ParseError) -> Self {
        Self::manifest(error.to_string())
    }
}
