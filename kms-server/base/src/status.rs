//! Errors on the wire: [`ServiceError`] becomes a gRPC status with `google.rpc` details.
//!
//! | error | code | details |
//! |---|---|---|
//! | `InvalidArgument` | INVALID_ARGUMENT | `BadRequest` with the field |
//! | `Unauthenticated` | UNAUTHENTICATED | `ErrorInfo` |
//! | `PermissionDenied` | PERMISSION_DENIED | `ErrorInfo`, metadata `asked` |
//! | `NotFound` | NOT_FOUND | `ErrorInfo` |
//! | `FailedPrecondition` | FAILED_PRECONDITION | `PreconditionFailure`, `ErrorInfo` with metadata `next_step` |
//! | `Aborted` | ABORTED | `ErrorInfo` with metadata `next_step` |
//! | `AssociateAgain` | ABORTED | `ErrorInfo` with reason `ASSOCIATE_AGAIN`, metadata `field` |
//! | `ResourceExhausted`, `Unavailable` | the same | `RetryInfo` where time helps, `ErrorInfo` |
//! | `Internal` | INTERNAL | none: the text stays in the server's log |

use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::ServiceError;

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        let message = error.to_string();
        let code = Code::from(error.code());
        let recorded = matches!(
            error,
            ServiceError::PermissionDenied { recorded: true, .. }
                | ServiceError::Unauthenticated { recorded: true, .. }
        );
        let info = |reason: &str, metadata: Vec<(&str, String)>| {
            let metadata = metadata
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect::<std::collections::HashMap<_, _>>();
            ErrorDetails::with_error_info(reason, DOMAIN, metadata)
        };
        let details = match error {
            ServiceError::InvalidArgument { field, reason } => ErrorDetails::with_bad_request_violation(field, reason),
            ServiceError::Unauthenticated { .. } => info("UNAUTHENTICATED", Vec::new()),
            ServiceError::PermissionDenied { asked, .. } => info("NOT_PERMITTED", vec![("asked", asked)]),
            ServiceError::NotFound { .. } => info("NOT_FOUND", Vec::new()),
            ServiceError::FailedPrecondition { reason, next_step } => {
                let mut details = info("PRECONDITION", vec![("next_step", next_step.clone())]);
                details.set_precondition_failure(vec![tonic_types::PreconditionViolation::new(
                    "STATE", reason, next_step,
                )]);
                details
            }
            ServiceError::Aborted { next_step, .. } => info("OVERTAKEN", vec![("next_step", next_step)]),
            ServiceError::AssociateAgain { field } => info("ASSOCIATE_AGAIN", vec![("field", field)]),
            ServiceError::ResourceExhausted { retry_after, .. } => {
                let mut details = info("EXHAUSTED", Vec::new());
                // Zero: time does not help.
                if !retry_after.is_zero() {
                    details.set_retry_info(Some(retry_after));
                }
                details
            }
            ServiceError::Unavailable { retry_after, .. } => {
                let mut details = info("UNAVAILABLE", Vec::new());
                details.set_retry_info(Some(retry_after));
                details
            }
            ServiceError::Internal(rule) => {
                tracing::error!(%rule, "internal error");
                return Self::internal("internal error; the server's log tells more");
            }
        };
        let mut status = Self::with_error_details(code, message, details);
        if recorded {
            status.metadata_mut().insert(RECORDED, MetadataValue::from_static("1"));
        }
        status
    }
}

/// Marks a refusal that is counted already, so that the API does not count it again. The mark does
/// not leave the server.
pub const RECORDED: &str = "meterkms-recorded";

/// The domain of every `google.rpc.ErrorInfo`.
const DOMAIN: &str = "meterkms";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_invalid_argument_names_its_field() {
        let status = Status::from(ServiceError::invalid("terms.client_title", "7 octets instead of 8"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let violation = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(
            (violation.field.as_str(), violation.description.as_str()),
            ("terms.client_title", "7 octets instead of 8")
        );
    }

    #[test]
    fn trouble_carries_a_retry_hint() {
        let status = Status::from(ServiceError::Unavailable {
            reason: "the HSM token is gone".into(),
            retry_after: Duration::from_secs(3),
        });
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.get_error_details().retry_info().unwrap().retry_delay, Some(Duration::from_secs(3)));
    }

    #[test]
    fn internal_text_stays_inside() {
        let status = Status::from(ServiceError::Internal("row digest of a sealed row".into()));
        assert!(!status.message().contains("row digest"));
        assert!(status.details().is_empty());
    }

    #[test]
    fn a_precondition_tells_the_next_step() {
        let status = Status::from(ServiceError::FailedPrecondition {
            reason: "a lease is live".into(),
            next_step: "set supersede_lease".into(),
        });
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().metadata["next_step"], "set supersede_lease");
        assert_eq!(details.precondition_failure().unwrap().violations.len(), 1);
    }
}
