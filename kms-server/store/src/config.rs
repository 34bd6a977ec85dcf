//! Where the database is, and how to use it.

use std::{path::PathBuf, time::Duration};

use crate::StoreError;

/// Where the database is, and how to use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// The location.
    pub database: DatabaseLocation,
    /// The longest time that a call waits, in a queue or for the database. Default 10 s.
    pub call_timeout: Duration,
    /// The most connections to use, at least 2. Default 8.
    pub connections: u32,
    /// PostgreSQL: `application_name`s of asynchronous standbys that never become the primary.
    /// Other asynchronous standbys are refused.
    pub read_replicas: Vec<String>,
}

/// Where a database is.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// A file. It is made if it is missing.
    Sqlite(PathBuf),
    /// A libpq URI. It may hold a password, so it is never printed.
    Postgres(String),
}

impl std::fmt::Debug for DatabaseLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(_) => f.write_str("postgres://…"),
        }
    }
}

impl StoreConfig {
    /// A configuration with defaults, from `sqlite:PATH` or `postgres://…` (also `postgresql://…`).
    ///
    /// # Errors
    /// Another form.
    pub fn parse(address: &str) -> Result<Self, StoreError> {
        let database = match address.split_once(':') {
            Some(("sqlite", path)) if !path.is_empty() => {
                DatabaseLocation::Sqlite(path.strip_prefix("//").unwrap_or(path).into())
            }
            Some(("postgres" | "postgresql", _)) => DatabaseLocation::Postgres(address.to_owned()),
            _ => {
                return Err(StoreError::Invalid {
                    what: "database address",
                    reason: "it is neither sqlite:PATH nor postgres://USER@HOST/DATABASE".into(),
                });
            }
        };
        Ok(Self::new(database))
    }

    /// A configuration with defaults.
    pub const fn new(database: DatabaseLocation) -> Self {
        Self { database, call_timeout: Duration::from_secs(10), connections: 8, read_replicas: Vec::new() }
    }
}
