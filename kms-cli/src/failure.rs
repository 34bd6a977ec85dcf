//! The failure of a command, and its exit code for scripts.

use std::{fmt, process::ExitCode};

use kms_client::{
    ConnectError, IdentityError, OpenError, ParseError, ProfileError, ServerError, SessionError,
    field::{FieldError, VaultError},
    sample::SampleError,
};
use tonic::{Code, Status};

/// A failed command. Its cause and the next step go to standard error, each on its own line. Its
/// kind is the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    text: String,
    hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Failed = 1,
    Usage = 2,
    Refused = 3,
    Unavailable = 4,
    Partly = 5,
}

impl Failure {
    /// Exit code 1: the command failed, and another attempt does not help.
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::new(Kind::Failed, text)
    }

    /// Exit code 2: the command line is wrong.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(Kind::Usage, text)
    }

    /// Exit code 5: only a part was done.
    pub(crate) fn partly(text: impl Into<String>) -> Self {
        Self::new(Kind::Partly, text)
    }

    /// Adds the next step.
    pub(crate) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }

    /// Adds, in front of the cause, what the command was doing.
    pub(crate) fn while_doing(self, what: &str) -> Self {
        Self { text: format!("{what}: {}", self.text), ..self }
    }

    fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), hint: String::new() }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, "\n     {}", self.hint) }
    }
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        let kind = match error.code() {
            _ if error.is_refused() => Kind::Refused,
            _ if error.is_unavailable() => Kind::Unavailable,
            Code::InvalidArgument | Code::OutOfRange => Kind::Usage,
            _ => Kind::Failed,
        };
        // The server's sentences hold cause and next step; the details repeat them for programs.
        let mut text = format!("{}: {}", title(error.code()), error.message());
        for (field, description) in error.fields().iter().filter(|(field, _)| !error.message().contains(field.as_str()))
        {
            text.push_str(&format!("; {field}: {description}"));
        }
        let hint = match error.retry_after() {
            Some(delay) => format!("try again in {:.1} s", delay.as_secs_f32()),
            None => hint(error.code()).to_owned(),
        };
        Self { kind, text, hint }
    }
}

const fn title(code: Code) -> &'static str {
    match code {
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
        Code::Ok | Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => "server error",
    }
}

const fn hint(code: Code) -> &'static str {
    match code {
        Code::PermissionDenied => {
            "unknown, not assigned to you, or not permitted: `kms principal whoami` shows your principal"
        }
        Code::Unavailable | Code::DeadlineExceeded | Code::Aborted => "try again",
        Code::Unknown | Code::Internal | Code::DataLoss => "see the server's log",
        _ => "",
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        ServerError::from(status).into()
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let kind = if matches!(error, ConnectError::Unreachable { .. }) { Kind::Unavailable } else { Kind::Failed };
        Self::new(kind, error.to_string())
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Server(error) => error.into(),
            other => Self::failed(other.to_string()),
        }
    }
}

impl From<FieldError> for Failure {
    fn from(error: FieldError) -> Self {
        let said = error.to_string();
        match error {
            // The caller has no certificate that the server could not accept.
            FieldError::Server(error) if error.code() == Code::Unauthenticated => {
                Self::new(Kind::Refused, error.message())
            }
            FieldError::Server(error) => error.into(),
            FieldError::Unanswered(cause) => Self { text: said, hint: String::new(), ..Self::from(*cause) },
            FieldError::Connect(error) => error.into(),
            FieldError::Parse(error) => error.into(),
            FieldError::Vault(error) => error.into(),
            _ => Self::failed(said),
        }
    }
}

impl From<VaultError> for Failure {
    fn from(error: VaultError) -> Self {
        let kind = if matches!(error, VaultError::PinForm) { Kind::Usage } else { Kind::Failed };
        Self::new(kind, error.to_string())
    }
}

impl From<ParseError> for Failure {
    fn from(error: ParseError) -> Self {
        Self::usage(error.to_string())
    }
}

macro_rules! plain_failures {
    ($($error:ty),+) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::failed(error.to_string())
            }
        })+
    };
}

plain_failures!(ProfileError, IdentityError, OpenError, SampleError);
