//! Errors that a server answers, as readable text.

use std::{fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::connection::{tls_error, tls_reason};

/// The reason of a frame's refusal ([`crate::proto::FrameRefusal`]) and of a status
/// ([`ServerError::reason`]) that says: the meter's challenge could be a request, so it is not
/// answered. Open another association and use its challenge; one in 26 is of this kind. Nothing is
/// wrong with program, keys or meter.
pub const ASSOCIATE_AGAIN: &str = "ASSOCIATE_AGAIN";

/// A refusal or failure that the server reported: google.rpc.Status with its details.
#[derive(Clone, Debug)]
pub struct ServerError {
    code: Code,
    message: String,
    /// Fields of the request that are wrong: name, and what is wrong.
    fields: Vec<(String, String)>,
    /// Further reasons, in the server's words.
    reasons: Vec<String>,
    retry_after: Option<Duration>,
    /// `ErrorInfo.reason`; empty if there is none.
    reason: String,
    /// The connection broke: it is unknown whether the server executed the call.
    connection_lost: bool,
}

impl ServerError {
    /// The gRPC status code.
    pub const fn code(&self) -> Code {
        self.code
    }

    /// The server's own text.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The request's fields that are wrong, each with what is wrong.
    pub fn fields(&self) -> &[(String, String)] {
        &self.fields
    }

    /// The reason for programs, such as [`ASSOCIATE_AGAIN`]: `ErrorInfo.reason`; empty if the
    /// server names none.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The time that the server asks to wait before the next attempt.
    pub const fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether the same call may succeed later: the server, its HSM or its database is unavailable,
    /// or the connection was lost. In these cases it is unknown whether the server executed the
    /// call. Under the same request id, nothing is executed twice.
    pub fn is_unavailable(&self) -> bool {
        self.connection_lost
            || matches!(self.code, Code::Unavailable | Code::DeadlineExceeded)
            || (self.code == Code::ResourceExhausted && self.retry_after.is_some())
    }

    /// Whether policy refused the request, or the server did not accept the caller.
    pub fn is_refused(&self) -> bool {
        matches!(self.code, Code::PermissionDenied | Code::Unauthenticated)
    }
}

impl From<Status> for ServerError {
    fn from(status: Status) -> Self {
        // A connection that is made again during a call may be refused.
        if let Some(tls) = std::error::Error::source(&status).and_then(tls_error) {
            return Self {
                code: Code::Unauthenticated,
                message: tls_reason(tls),
                fields: Vec::new(),
                reasons: Vec::new(),
                retry_after: None,
                reason: String::new(),
                connection_lost: false,
            };
        }
        // A server's error has no source on this side; a transport error has one.
        let connection_lost = status.code() != Code::Unavailable && std::error::Error::source(&status).is_some();
        // Details that cannot be decoded are ignored: the message alone still tells the cause.
        let details = status.get_error_details();
        let mut reasons = Vec::new();
        if let Some(failure) = details.precondition_failure() {
            reasons.extend(
                failure.violations.iter().map(|violation| format!("{}: {}", violation.subject, violation.description)),
            );
        }
        if let Some(failure) = details.quota_failure() {
            reasons.extend(
                failure.violations.iter().map(|violation| format!("{}: {}", violation.subject, violation.description)),
            );
        }
        if let Some(info) = details.error_info() {
            reasons.push(info.reason.clone());
            reasons.extend(info.metadata.iter().map(|(key, value)| format!("{key}: {value}")));
        }
        if let Some(message) = details.localized_message() {
            reasons.push(message.message.clone());
        }
        if let Some(help) = details.help() {
            reasons.extend(help.links.iter().map(|link| {
                if link.url.is_empty() {
                    link.description.clone()
                } else {
                    format!("{} ({})", link.description, link.url)
                }
            }));
        }
        reasons.retain(|reason| !reason.is_empty() && !status.message().contains(reason.as_str()));
        let fields = details.bad_request().map(|request| {
            request.field_violations.iter().map(|field| (field.field.clone(), field.description.clone())).collect()
        });
        Self {
            code: status.code(),
            message: if status.message().is_empty() {
                status.code().description().to_lowercase()
            } else {
                status.message().to_owned()
            },
            fields: fields.unwrap_or_default(),
            reasons,
            reason: details.error_info().map(|info| info.reason.clone()).unwrap_or_default(),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
            connection_lost,
        }
    }
}

impl std::error::Error for ServerError {}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", if self.connection_lost { "connection lost" } else { title(self.code) }, self.message)?;
        for (field, description) in self.fields.iter().filter(|(field, _)| !self.message.contains(field.as_str())) {
            write!(f, "; {field}: {description}")?;
        }
        for reason in &self.reasons {
            write!(f, "; {reason}")?;
        }
        if let Some(delay) = self.retry_after {
            write!(f, "; try again in {:.1} s", delay.as_secs_f32())?;
        } else if let Some(hint) = next_step(if self.connection_lost { Code::Unavailable } else { self.code }) {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

const fn title(code: Code) -> &'static str {
    match code {
        Code::Ok => "no error",
        Code::Cancelled => "cancelled",
        Code::InvalidArgument | Code::OutOfRange => "bad request",
        Code::DeadlineExceeded => "no answer in time",
        Code::NotFound => "not found",
        Code::AlreadyExists => "already there",
        Code::PermissionDenied => "refused by policy",
        Code::Unauthenticated => "certificate not accepted",
        Code::ResourceExhausted => "limit reached",
        Code::FailedPrecondition => "not possible in this state",
        Code::Aborted => "superseded",
        Code::Unimplemented => "not offered by this server",
        Code::Unavailable => "unavailable",
        Code::Unknown | Code::Internal | Code::DataLoss => "server error",
    }
}

const fn next_step(code: Code) -> Option<&'static str> {
    match code {
        Code::PermissionDenied => {
            Some("`kms principal whoami` shows your principal; an officer can change the policy or the assignment")
        }
        Code::Unauthenticated => Some("the certificate may be disabled or expired: ask an officer"),
        Code::Unavailable | Code::DeadlineExceeded => {
            Some("try again with the same request id: nothing is executed twice")
        }
        Code::Aborted => Some("ask again with a new request id"),
        Code::Unknown | Code::Internal | Code::DataLoss => Some("see the server's log"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    #[test]
    fn details_become_text() {
        let details = ErrorDetails::with_bad_request(vec![FieldViolation::new("terms.counters", "at most 1,000,000")]);
        let error =
            ServerError::from(Status::with_error_details(Code::InvalidArgument, "the request is malformed", details));
        assert_eq!(error.to_string(), "bad request: the request is malformed; terms.counters: at most 1,000,000");
        let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(1500)));
        let error = ServerError::from(Status::with_error_details(
            Code::Unavailable,
            "token `north` is being repaired",
            details,
        ));
        assert_eq!(error.to_string(), "unavailable: token `north` is being repaired; try again in 1.5 s");
        assert!(error.is_unavailable() && !error.is_refused());
    }

    #[test]
    fn the_reason_for_programs_is_kept() {
        let details = ErrorDetails::with_error_info(
            ASSOCIATE_AGAIN,
            "meterkms",
            std::collections::HashMap::<String, String>::new(),
        );
        let error = ServerError::from(Status::with_error_details(Code::Aborted, "it could be a request", details));
        assert_eq!(error.reason(), ASSOCIATE_AGAIN);
        assert_eq!(ServerError::from(Status::new(Code::Aborted, "")).reason(), "");
    }

    #[test]
    fn every_code_has_words() {
        for code in 0..=16 {
            let error = ServerError::from(Status::new(Code::from_i32(code), ""));
            assert!(!error.to_string().is_empty() && error.to_string().is_ascii());
        }
    }
}
