//! Why a device cannot be enrolled or used.

use super::vault::VaultError;
use crate::{ConnectError, IdentityError, ParseError, ServerError, TransportKeyError};

/// Why a device cannot be enrolled or used.
#[derive(Debug, thiserror::Error)]
pub enum FieldError {
    /// The file of the device.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The code, or the server's address.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// The server has another root than the code says. Nothing was sent.
    #[error(
        "`{server}` is not a server of the island that the code is from; nothing was sent: check the address, and ask the officer whether the code is theirs"
    )]
    AnotherIsland {
        /// `host:port`.
        server: String,
    },
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server refuses, or fails.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The code was sent, and no answer came.
    #[error(
        "{0}; the code was sent and may be used: run the same command again, with the same code and the same PIN, before the code expires"
    )]
    Unanswered(Box<FieldError>),
    /// The server's answer is wrong.
    #[error("the server's answer cannot be used: {0}; tell the operators of the server")]
    Answer(&'static str),
    /// Certificate and key cannot be used with TLS.
    #[error("certificate or key of the device: {0}")]
    Identity(String),
    /// A key pair could not be made.
    #[error(transparent)]
    Keys(#[from] IdentityError),
    /// The transport key.
    #[error(transparent)]
    TransportKey(#[from] TransportKeyError),
}
