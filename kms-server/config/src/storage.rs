//! `[storage]`: where the database is.

use std::path::{Path, PathBuf};

use kms_store::{DatabaseLocation, StoreConfig};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::error::ConfigError;
use crate::secret::SecretSource;

/// `[storage]`: exactly one of `sqlite` and `postgres`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum StorageSection {
    /// `sqlite = "PATH"`: the embedded database, for one server.
    Sqlite(PathBuf),
    /// `[storage.postgres]`: for more than one server.
    Postgres(PostgresSection),
}

impl StorageSection {
    /// The folder of the embedded database. If its disk is full, no record can be written.
    pub fn disk(&self) -> Option<PathBuf> {
        let Self::Sqlite(path) = self else { return None };
        Some(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned())
    }

    /// Checks what TOML cannot express.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self::Postgres(postgres) = self else { return Ok(()) };
        let after_scheme =
            postgres.url.strip_prefix("postgres://").or_else(|| postgres.url.strip_prefix("postgresql://"));
        let after_scheme =
            after_scheme.ok_or("[storage.postgres] url: it is not of the form postgres://USER@HOST/DATABASE")?;
        let user = after_scheme
            .split('/')
            .next()
            .and_then(|authority| authority.rsplit_once('@'))
            .map_or("", |(user, _)| user);
        if user.contains(':') || after_scheme.contains("password=") {
            return Err("[storage.postgres] url: it holds a password; set `password = { file = \"…\" }` instead, and change the password".to_owned());
        }
        if postgres.connections < 2 {
            return Err("[storage.postgres] connections: at least 2 are needed".to_owned());
        }
        Ok(())
    }

    /// The settings of the store.
    ///
    /// # Errors
    /// The password cannot be read.
    pub fn store(&self) -> Result<StoreConfig, ConfigError> {
        Ok(match self {
            Self::Sqlite(path) => StoreConfig::new(DatabaseLocation::Sqlite(path.clone())),
            Self::Postgres(section) => StoreConfig {
                connections: section.connections,
                read_replicas: section.read_replicas.clone(),
                ..StoreConfig::new(DatabaseLocation::Postgres(section.url_with_password()?.to_string()))
            },
        })
    }
}

/// `[storage.postgres]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresSection {
    /// `postgres://USER@HOST/DATABASE?sslmode=verify-full…`, without a password.
    pub url: String,
    /// The source of the password. Default: none, for certificates or peer authentication.
    pub password: Option<SecretSource>,
    /// The most connections. Default: 8.
    #[serde(default = "default_connections")]
    pub connections: u32,
    /// `application_name`s of asynchronous standbys that are never failed over to. Default: none; a
    /// standby that is neither synchronous nor listed here is refused.
    #[serde(default)]
    pub read_replicas: Vec<String>,
}

impl PostgresSection {
    /// The URL with the password, percent-encoded (RFC 3986).
    ///
    /// # Errors
    /// The password cannot be read.
    pub fn url_with_password(&self) -> Result<Zeroizing<String>, ConfigError> {
        let Some(source) = &self.password else { return Ok(Zeroizing::new(self.url.clone())) };
        let password = source.read("the database password")?;
        let mut url = Zeroizing::new(self.url.clone());
        url.push_str(if self.url.contains('?') { "&password=" } else { "?password=" });
        for octet in password.bytes() {
            if octet.is_ascii_alphanumeric() || b"-._~".contains(&octet) {
                url.push(char::from(octet));
            } else {
                url.push_str(&format!("%{octet:02X}"));
            }
        }
        Ok(url)
    }
}

const fn default_connections() -> u32 {
    8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_from_a_file_of_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "p@ss wörd\n").unwrap();
        let source = SecretSource::File(file.path().to_owned());
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(source.read("the password").unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(source.read("the password").unwrap().as_str(), "p@ss wörd");
        let postgres = PostgresSection {
            url: "postgres://kms@db/kms".to_owned(),
            password: Some(source),
            connections: 8,
            read_replicas: Vec::new(),
        };
        assert_eq!(postgres.url_with_password().unwrap().as_str(), "postgres://kms@db/kms?password=p%40ss%20w%C3%B6rd");
    }
}
