//! Errors of a ceremony, each with its next step.

use std::path::{Path, PathBuf};

use kms_base::error::ServiceError;
use kms_config::ConfigError;
use kms_domain::IslandName;
use kms_hsm::{HsmError, TokenSelector};
use kms_store::StoreError;

use crate::escrow::EscrowError;

/// Why a ceremony stopped.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The ceremony file is refused; nothing was made.
    #[error("the ceremony file `{path}` is refused: {reason}")]
    Plan {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("`{path}`: {reason}; make it accessible and run the ceremony again")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file of an interrupted ceremony does not hold what it should.
    #[error(
        "`{path}` is damaged, so the interrupted ceremony cannot go on; restore it from a copy, or begin anew with a wiped token and an empty folder"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The escrow file is of another ceremony.
    #[error(
        "`{path}` is of a ceremony with another island, quorum or custodians; give the same file as before, or another folder"
    )]
    OtherEscrow {
        /// The file.
        path: PathBuf,
    },
    /// The database has the island already.
    #[error(
        "the database holds the island `{island}` already: a ceremony is held once; start it with `kms-server run`"
    )]
    Exists {
        /// The island.
        island: IslandName,
    },
    /// There is no such token.
    #[error("there is no token labelled `{}`; initialise it with the HSM's own tool, or set `initialise = true`", selector.label)]
    NoToken {
        /// What was looked for.
        selector: TokenSelector,
    },
    /// A PIN cannot be read.
    #[error(transparent)]
    Pin(#[from] ConfigError),
    /// The escrow could not be made.
    #[error(transparent)]
    Escrow(#[from] EscrowError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates or the record.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The process is stopping.
    #[error("the ceremony was interrupted; run it again with the same file")]
    Interrupted,
}

impl InitError {
    pub(super) fn file(path: &Path, error: std::io::Error) -> Self {
        Self::File { path: path.to_owned(), reason: error.to_string() }
    }
}
