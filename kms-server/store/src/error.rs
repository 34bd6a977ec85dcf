//! The one error of the store. It never holds SQL, parameters or rows: only what happened, the name
//! of the row, and what to do.

use std::time::Duration;

use kms_domain::{GrantId, RequestId, SystemTitle, WriterId};

use crate::{FingerprintPrefix, RowKind, TaskKey, UploadId};

/// Why a call of the store failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The database did not answer, or not in time. It is not known whether a transaction that was
    /// being committed is durable: read again before the same numbers are used again.
    #[error("the database is unavailable: {cause}; {next_step}")]
    Unavailable {
        /// What was seen.
        cause: String,
        /// What an operator can do.
        next_step: &'static str,
    },
    /// A row was not in the state that the caller named: another transaction wrote it first.
    /// Nothing was written.
    #[error("{row} was changed by another transaction meanwhile; read it again and repeat")]
    Conflict {
        /// The row.
        row: RowName,
    },
    /// Each attempt conflicted with a transaction of another server. Nothing was written.
    #[error(
        "gave up after {attempts} attempts, because transactions of other servers changed the same rows; try again"
    )]
    Contention {
        /// The number of attempts.
        attempts: u32,
    },
    /// A newer release has changed the schema of this database.
    #[error(
        "the database has schema version {found}, this server knows versions up to {known}; start the newer server, or restore the backup that was made before the upgrade"
    )]
    NewerSchema {
        /// The version in the database.
        found: i64,
        /// The newest version that this server knows.
        known: i64,
    },
    /// The database loses committed data in some failures: I2, I3 and I4 would not hold.
    #[error("the database setting `{setting}` is `{value}`, which can lose committed records; {next_step}")]
    UnsafeSetting {
        /// The setting's name.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What to change.
        next_step: &'static str,
    },
    /// Another server process has this SQLite database open.
    #[error("another server uses the database `{path}`; stop it first, or use PostgreSQL for more than one server")]
    InUse {
        /// The database's path.
        path: String,
    },
    /// The database holds something that no server wrote.
    #[error("the database is damaged: {what}; stop, keep a copy, and restore from a backup")]
    Corrupt {
        /// What is wrong, without content.
        what: String,
    },
    /// The configuration or the call is invalid.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// The argument or setting.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}

/// Names a row, for errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowName {
    /// A meter's row.
    Meter(SystemTitle),
    /// Another sealed row.
    Sealed(RowKind, Vec<u8>),
    /// An audit record of a writer.
    Audit(WriterId, u64),
    /// A request that was executed already, and its chunk.
    Request(RequestId, u32),
    /// A grant.
    Grant(GrantId),
    /// An owner of a key fingerprint.
    Fingerprint(FingerprintPrefix),
    /// An upload of a shipment.
    Shipment(UploadId),
    /// A task of a campaign.
    Task(TaskKey),
}

impl std::fmt::Display for RowName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Meter(title) => write!(f, "meter {title}"),
            Self::Sealed(kind, id) => write!(
                f,
                "{} {}",
                kind.name(),
                String::from_utf8(id.clone())
                    .ok()
                    .filter(|text| text.chars().all(|c| c.is_ascii_graphic()))
                    .unwrap_or_else(|| hex::encode(id))
            ),
            Self::Audit(writer, sequence) => write!(f, "audit record {sequence} of writer {writer}"),
            Self::Request(request, chunk) => write!(f, "request {request}, chunk {chunk}"),
            Self::Grant(grant) => write!(f, "grant {grant}"),
            Self::Fingerprint(prefix) => write!(f, "fingerprint {}", hex::encode(prefix.0)),
            Self::Task(key) => write!(f, "task of campaign {} for meter {}", key.campaign, key.meter),
            Self::Shipment(upload) => write!(f, "shipment upload {}", hex::encode(upload.0)),
        }
    }
}

impl StoreError {
    /// The call took too long.
    pub(crate) fn timed_out(limit: Duration) -> Self {
        Self::Unavailable {
            cause: format!("no answer within {} ms", limit.as_millis()),
            next_step: "look at the database's disk, locks and load",
        }
    }

    /// A value in the database that this server would not have written.
    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }
}

/// Why one attempt at a transaction failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Another transaction came in between: try again.
    Retry,
    /// The decision requested rows that cannot be locked in order after the first ones: begin again
    /// with all of them.
    OutOfOrder,
    /// An error for the caller.
    Fatal(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Fatal(error)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        if let sqlx::Error::Database(database) = &error
            && let Some(code) = database.code()
            && [SERIALIZATION_FAILURE, DEADLOCK_DETECTED].contains(&code.as_ref())
        {
            return Self::Retry;
        }
        Self::Fatal(error.into())
    }
}

/// Keeps only codes and kinds: the database's own message may quote rows and statements.
impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        let unavailable = |cause: String, next_step| Self::Unavailable { cause, next_step };
        match error {
            sqlx::Error::Database(database) => {
                let code = database.code().unwrap_or_default();
                match code.as_ref() {
                    // SQLite's primary result codes are the low octet; PostgreSQL's SQLSTATEs have
                    // five characters.
                    sqlite if sqlite.len() < 5 && sqlite.parse::<u32>().is_ok() => {
                        match sqlite.parse::<u32>().unwrap_or_default() & 0xFF {
                            11 | 26 => Self::corrupt(format!("SQLite reports code {sqlite}")),
                            19 => Self::corrupt(format!("a constraint refused a row, SQLite code {sqlite}")),
                            13 => unavailable("the disk is full".into(), "make room"),
                            5 | 6 => {
                                unavailable("the database is locked by another process".into(), "end the other process")
                            }
                            8 => unavailable(
                                "the database is read-only".into(),
                                "check the owner and the mode of the file and its directory",
                            ),
                            10 => unavailable(
                                format!("the disk reported an error, SQLite code {sqlite}"),
                                "check the disk and the system's log",
                            ),
                            14 => unavailable(
                                "the file cannot be opened".into(),
                                "check that the directory exists, and its owner and mode",
                            ),
                            _ => unavailable(
                                format!("SQLite reports code {sqlite}"),
                                "see https://sqlite.org/rescode.html",
                            ),
                        }
                    }
                    state => match state.get(..2).unwrap_or_default() {
                        "23" => Self::corrupt(format!("a constraint refused a row, SQLSTATE {state}")),
                        "28" => unavailable(
                            format!("PostgreSQL refused the login, SQLSTATE {state}"),
                            "check user, password and pg_hba.conf",
                        ),
                        "3D" => unavailable(
                            "the database does not exist on the PostgreSQL server".into(),
                            "create it with createdb",
                        ),
                        "42" => unavailable(
                            format!("PostgreSQL refused a statement, SQLSTATE {state}"),
                            "check that the server's user owns the database",
                        ),
                        "53" => unavailable(
                            format!("PostgreSQL has run out of a resource, SQLSTATE {state}"),
                            "check disk, memory and max_connections",
                        ),
                        "XX" => Self::corrupt(format!("PostgreSQL reports SQLSTATE {state}")),
                        _ => unavailable(
                            format!("PostgreSQL reports SQLSTATE {state}"),
                            "see the PostgreSQL server's log",
                        ),
                    },
                }
            }
            sqlx::Error::Io(io) => unavailable(
                format!("the connection failed ({})", io.kind()),
                "check that the database runs and that its address is right",
            ),
            sqlx::Error::Tls(_) => {
                unavailable("no TLS connection to the database".into(), "check its certificate and sslrootcert")
            }
            sqlx::Error::PoolTimedOut => {
                unavailable("no connection became free in time".into(), "look at the database's load and locks")
            }
            sqlx::Error::ColumnDecode { index, .. } => Self::corrupt(format!("column {index} has another type")),
            sqlx::Error::Configuration(_) => {
                Self::Invalid { what: "database address", reason: "it cannot be parsed".into() }
            }
            _ => unavailable("the connection to the database broke".into(), "see the database's log"),
        }
    }
}

const SERIALIZATION_FAILURE: &str = "40001";
const DEADLOCK_DETECTED: &str = "40P01";
