//! Why a command did not succeed, and the exit code that says so to scripts.

use std::{fmt, process::ExitCode};

use kms_client::{ConnectError, IdentityError, OpenError, ParseError, ProfileError, ServerError, SessionError, sample::SampleError};
use tonic::{Code, Status};

/// A failed command. The text goes to standard error, the kind becomes the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    text: String,
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
    /// 1: it did not work, and trying again will not help.
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self { kind: Kind::Failed, text: text.into() }
    }

    /// 2: the command line is wrong.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, text: text.into() }
    }

    /// 5: a part was done.
    pub(crate) fn partly(text: impl Into<String>) -> Self {
        Self { kind: Kind::Partly, text: text.into() }
    }

    /// Adds what was being done, in front.
    pub(crate) fn while_doing(self, what: &str) -> Self {
        Self { text: format!("{what}: {}", self.text), ..self }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
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
        Self { kind, text: error.to_string() }
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
        Self { kind, text: error.to_string() }
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
