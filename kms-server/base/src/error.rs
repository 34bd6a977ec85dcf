//! The one error that use cases return. [`crate::status`] turns it into a gRPC status with details.

use std::time::Duration;

use kms_domain::ParseError;
use kms_hsm::{ErrorKind, HsmError};
use kms_store::StoreError;

use crate::bounds::Bound;
use crate::metrics;

/// Why a use case did not do what was asked. Messages are for people, lower case, and never carry a
/// secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// A field of the request is not what it should be.
    #[error("{field}: {reason}")]
    InvalidArgument {
        /// The path of the field in the request.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The caller is nobody that this island knows.
    #[error("{reason}")]
    Unauthenticated {
        /// Why, without telling what exists.
        reason: String,
        /// Whether the audit log's writer has counted it already: see [`Self::recorded`].
        recorded: bool,
    },
    /// No policy permits it (I8), or what it concerns is not the caller's. Names what was asked,
    /// never whether it exists.
    #[error("`{asked}` is not permitted")]
    PermissionDenied {
        /// What was asked.
        asked: String,
        /// Whether the audit log's writer has counted it already: see [`Self::recorded`].
        recorded: bool,
    },
    /// Something that the caller may see does not exist.
    #[error("{what} does not exist")]
    NotFound {
        /// What.
        what: String,
    },
    /// The state of things forbids it.
    #[error("{reason}; {next_step}")]
    FailedPrecondition {
        /// What state.
        reason: String,
        /// What the caller can do.
        next_step: String,
    },
    /// It was overtaken by another act.
    #[error("{reason}; {next_step}")]
    Aborted {
        /// By what.
        reason: String,
        /// What the caller can do.
        next_step: String,
    },
    /// The challenge of a meter could be a request: it is not answered, and another association
    /// brings another one.
    #[error("{field}: it could be a request to a meter; begin the association again for another challenge")]
    AssociateAgain {
        /// The path of the field in the request.
        field: String,
    },
    /// The server is full.
    #[error("{reason}")]
    ResourceExhausted {
        /// Of what: which bound was met.
        reason: String,
        /// When to try again; zero where time does not help.
        retry_after: Duration,
    },
    /// HSM or database trouble.
    #[error("{reason}")]
    Unavailable {
        /// What is not there, and what operators do about it.
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

    /// The same, where it is a refusal of policy or of a certificate that the audit log's writer
    /// has counted: it is not counted again when it leaves the server.
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

    /// The number of google.rpc.Code that goes with it.
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

    /// The reason for programs: `ErrorInfo.reason` of a status, and `FrameRefusal.reason`. It stays
    /// as it is.
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

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable { .. } | StoreError::Contention { .. } => Self::unavailable(error.to_string()),
            StoreError::Conflict { .. } => {
                Self::Aborted { reason: error.to_string(), next_step: "ask again".to_owned() }
            }
            StoreError::Invalid { what, reason } => Self::invalid(what, reason),
            _ => {
                tracing::error!(%error, "the database cannot be used");
                Self::unavailable("the database cannot be used; the server's log tells more")
            }
        }
    }
}

impl From<HsmError> for ServiceError {
    fn from(error: HsmError) -> Self {
        metrics().hsm_error(&error);
        match error {
            HsmError::TooManyOfOne { .. } => Bound::HsmJobsPerPrincipal.count(),
            HsmError::Overloaded { .. } => Bound::HsmJobs.count(),
            _ => (),
        }
        match error.kind() {
            ErrorKind::Transient if matches!(error, HsmError::TooManyOfOne { .. }) => {
                Self::ResourceExhausted { reason: error.to_string(), retry_after: error.retry_after().unwrap_or(RETRY_AFTER) }
            }
            ErrorKind::Transient => Self::Unavailable { reason: error.to_string(), retry_after: error.retry_after().unwrap_or(RETRY_AFTER) },
            ErrorKind::OperatorFixable => {
                tracing::error!(%error, "the HSM needs an operator");
                Self::unavailable(error.to_string())
            }
            ErrorKind::DataRefused => Self::FailedPrecondition { reason: error.to_string(), next_step: "check keys and counters of the meter".to_owned() },
            ErrorKind::NotServed => Self::FailedPrecondition {
                reason: error.to_string(),
                next_step: "ask the island's authority server, whose configuration names a token for that class in `[hsm.classes]`".to_owned(),
            },
            ErrorKind::Permanent => Self::Internal(error.to_string()),
        }
    }
}

const RETRY_AFTER: Duration = Duration::from_secs(1);
