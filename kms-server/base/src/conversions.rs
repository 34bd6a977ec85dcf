//! What errors of the store and of the HSM mean for a caller. Errors of the HSM, and the bounds of
//! its queue, are counted where they are converted.

use kms_hsm::{ErrorKind, HsmError};
use kms_store::StoreError;

use crate::bounds::Bound;
use crate::error::{RETRY_AFTER, ServiceError};
use crate::metrics::metrics;

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
