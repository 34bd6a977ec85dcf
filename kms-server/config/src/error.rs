//! Why a configuration cannot be used.

use std::path::PathBuf;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration `{path}`: {reason}; check the path and the file's permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file's content is not valid.
    #[error("the configuration `{path}` is not valid: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why, with the place where the parser knows it.
        reason: String,
    },
    /// A secret cannot be read.
    #[error("cannot read {what}: {reason}")]
    Secret {
        /// Which.
        what: String,
        /// Why.
        reason: String,
    },
}
