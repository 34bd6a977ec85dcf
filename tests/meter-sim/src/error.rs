//! Errors of the codec and of the client half.

use crate::results::{DataAccessResult, ExceptionResponse};

/// An error of the codec or of the client half. None carries key material.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Bytes or text that are malformed.
    #[error("the {what} {problem}")]
    Malformed {
        /// What was read.
        what: &'static str,
        /// What is wrong with it, as the rest of a sentence.
        problem: &'static str,
    },
    /// The tag does not verify: wrong key, title or counter, or changed bytes.
    #[error("deciphering failed: the key, the system title or the bytes are not the sender's")]
    Deciphering,
    /// The content is not authenticated, so it is not used.
    #[error("the content is not authenticated: ask for authentication and encryption")]
    NotProtected,
    /// The RFC 3394 check value is wrong: wrong KEK, or changed bytes.
    #[error("the wrapped key does not unwrap: it was wrapped under another KEK or changed")]
    Unwrap,
    /// A key of a length that the suite does not have.
    #[error("a key has the wrong length for its cipher")]
    KeyLength,
    /// The operating system gives no random bytes.
    #[error("the operating system gave no random bytes")]
    Random,
    /// The client's counters are used up.
    #[error("the invocation counters of this session are used up: get a new range")]
    CountersExhausted,
    /// The peer's counter did not increase.
    #[error("invocation counter {received} of the meter is not above {last}")]
    CounterNotIncreasing {
        /// The counter in the answer.
        received: u32,
        /// The last accepted one.
        last: u32,
    },
    /// The meter answered with an exception response.
    #[error("the meter answered with exception {0}")]
    Exception(ExceptionResponse),
    /// The meter rejected the association.
    #[error("the meter rejected the association: result {result}, diagnostic {diagnostic}")]
    AssociationRejected {
        /// `Association-result` of the AARE.
        result: u8,
        /// `Associate-source-diagnostic` of the AARE.
        diagnostic: u8,
    },
    /// The meter refused a GET or a SET.
    #[error("the meter answered with data-access-result {}", .0.0)]
    Access(DataAccessResult),
    /// The meter refused an ACTION.
    #[error("the meter answered with action-result {0}")]
    Action(u8),
    /// A call that does not fit the state of the session.
    #[error("the session is not ready for this: {0}")]
    State(&'static str),
    /// The transport failed.
    #[error("the transport failed: {0}")]
    Transport(std::io::ErrorKind),
}

impl Error {
    pub(crate) const fn malformed(what: &'static str, problem: &'static str) -> Self {
        Self::Malformed { what, problem }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Transport(error.kind())
    }
}
