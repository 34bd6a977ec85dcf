//! Secrets: the configuration says where they are, and does not contain them.

use std::path::PathBuf;

use serde::Deserialize;
use zeroize::Zeroizing;

use crate::error::ConfigError;

/// The source of a secret. The secret is never in the configuration itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum SecretSource {
    /// A file that only its owner can read. Line ends at its end are dropped.
    File(PathBuf),
    /// An environment variable.
    Env(String),
}

impl SecretSource {
    /// The source as TOML, for a configuration file.
    pub fn to_toml(&self) -> String {
        match self {
            Self::File(path) => format!("{{ file = {} }}", toml::Value::String(path.display().to_string())),
            Self::Env(name) => format!("{{ env = {} }}", toml::Value::String(name.clone())),
        }
    }

    /// Reads the secret; `what` names it in errors.
    ///
    /// # Errors
    /// The secret cannot be read, others can read the file, or it is empty. The error contains
    /// nothing of the secret.
    pub fn read(&self, what: &str) -> Result<Zeroizing<String>, ConfigError> {
        let refuse = |reason: String| ConfigError::Secret { what: what.to_owned(), reason };
        let mut text = match self {
            Self::File(path) => {
                use std::os::unix::fs::PermissionsExt;
                let shown = path.display();
                let mode = std::fs::metadata(path)
                    .map_err(|error| refuse(format!("`{shown}`: {error}")))?
                    .permissions()
                    .mode()
                    & 0o777;
                if mode & 0o077 != 0 {
                    return Err(refuse(format!(
                        "`{shown}` can be read by others (mode {mode:o}); run `chmod 600` on it and change the secret"
                    )));
                }
                Zeroizing::new(std::fs::read_to_string(path).map_err(|error| refuse(format!("`{shown}`: {error}")))?)
            }
            Self::Env(name) => Zeroizing::new(
                std::env::var(name).map_err(|_| refuse(format!("the environment variable `{name}` is not set")))?,
            ),
        };
        let kept = text.trim_end_matches(['\r', '\n']).len();
        text.truncate(kept);
        if text.is_empty() {
            return Err(refuse("the secret is empty".to_owned()));
        }
        Ok(text)
    }
}
