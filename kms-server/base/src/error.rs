//! The one error that use cases return. [`crate::status`] turns it into a gRPC status with details.

use std::time::Duration;

use kms_domain::ParseError;

/// Why a use case refuses or fails. Messages are for people, in lower case, and never hold a
/// secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// A field of the request is invalid.
    #[error("{field}: {reason}")]
    InvalidArgument {
        /// The path of the field in the request.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificate does not name an enabled principal of this island.
    #[error("{reason}")]
    Unauthenticated {
        /// Why. It does not tell what exists.
        reason: String,
        /// The writer of the audit log has counted it already: see [`Self::recorded`].
        recorded: bool,
    },
    /// No policy permits it (I8), or it is about something that is not the caller's. The text names
    /// what was asked, and never whether it exists.
    #[error("`{asked}` is not permitted")]
    PermissionDenied {
        /// What was asked.
        asked: String,
        /// The writer of the audit log has counted it already: see [`Self::recorded`].
        recorded: bool,
    },
    /// Something that the caller may see does not exist.
    #[error("{what} does not exist")]
    NotFound {
        /// What.
        what: String,
    },
    /// The present state does not allow it.
    #[error("{reason}; {next_step}")]
    FailedPrecondition {
        /// Which state.
        reason: String,
        /// What the caller can do.
        next_step: String,
    },
    /// Another act came first.
    #[error("{reason}; {next_step}")]
    Aborted {
        /// What has changed.
        reason: String,
        /// What the caller can do.
        next_step: String,
    },
    /// The challenge of a meter could be a request, so the server does not answer it. A new
    /// association brings another challenge.
    #[error("{field}: it could be a request to a meter; begin the association again for another challenge")]
    AssociateAgain {
        /// The path of the field in the request.
        field: String,
    },
    /// A bound of the server is met.
    #[error("{reason}")]
    ResourceExhausted {
        /// Which bound.
        reason: String,
        /// When to try again; zero where time does not help.
        retry_after: Duration,
    },
    /// The HSM or the database does not work.
    #[error("{reason}")]
    Unavailable {
        /// What is missing, and what operators do about it.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// A fault of the server itself. The text names the broken rule, without data.
    #[error("internal error: {0}")]
    Internal(String),
}

impl ServiceError {
    /// An [`Self::InvalidArgument`].
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidArgument { field: field.into(), reason: reason.into() }
    }

    /// An [`Self::InvalidArgument`] of a parsed field.
    pub fn parse(field: impl Into<String>) -> impl FnOnce(ParseError) -> Self {
        let field = field.into();
        move |error| Self::InvalidArgument { field, reason: error.reason().to_owned() }
    }

    /// A [`Self::PermissionDenied`].
    pub fn denied(asked: impl Into<String>) -> Self {
        Self::PermissionDenied { asked: asked.into(), recorded: false }
    }

    /// A [`Self::Unauthenticated`].
    pub fn unauthenticated(reason: impl Into<String>) -> Self {
        Self::Unauthenticated { reason: reason.into(), recorded: false }
    }

    /// The same error. A refusal by policy or of a certificate is marked as counted by the writer
    /// of the audit log, so that it is not counted again when it leaves the server.
    #[must_use]
    pub fn recorded(self) -> Self {
        match self {
            Self::PermissionDenied { asked, .. } => Self::PermissionDenied { asked, recorded: true },
            Self::Unauthenticated { reason, .. } => Self::Unauthenticated { reason, recorded: true },
            other => other,
        }
    }

    /// An [`Self::Unavailable`] with the usual hint.
    pub fn unavailable(reason: impl Into<String>) -> Self {
        Self::Unavailable { reason: reason.into(), retry_after: RETRY_AFTER }
    }

    /// Its google.rpc.Code, as a number.
    pub const fn code(&self) -> i32 {
        match self {
            Self::InvalidArgument { .. } => 3,
            Self::NotFound { .. } => 5,
            Self::PermissionDenied { .. } => 7,
            Self::ResourceExhausted { .. } => 8,
            Self::FailedPrecondition { .. } => 9,
            Self::Aborted { .. } | Self::AssociateAgain { .. } => 10,
            Self::Internal(_) => 13,
            Self::Unavailable { .. } => 14,
            Self::Unauthenticated { .. } => 16,
        }
    }

    /// The reason for programs: `ErrorInfo.reason` of a status, and `FrameRefusal.reason`. It never
    /// changes.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::InvalidArgument { .. } => "INVALID",
            Self::NotFound { .. } => "NOT_FOUND",
            Self::PermissionDenied { .. } => "NOT_PERMITTED",
            Self::ResourceExhausted { .. } => "EXHAUSTED",
            Self::FailedPrecondition { .. } => "PRECONDITION",
            Self::Aborted { .. } => "OVERTAKEN",
            Self::AssociateAgain { .. } => "ASSOCIATE_AGAIN",
            Self::Internal(_) => "INTERNAL",
            Self::Unavailable { .. } => "UNAVAILABLE",
            Self::Unauthenticated { .. } => "UNAUTHENTICATED",
        }
    }
}

/// After what time to try again, if nothing better is known.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);
