//! PostgreSQL: the database of several servers.
//!
//! Transactions are READ COMMITTED and lock what they read: existing rows in order of their keys,
//! and for absent rows an advisory lock on a part of the key space. SERIALIZABLE would need no such
//! locks, but in batches of thousands of meters its predicate locks grow to whole tables, and then
//! transactions of different servers fail each other all the time.

use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Row as _,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions, PgSslMode},
};

use crate::{Sizes, StoreConfig, StoreError, Timeline, error::Failure, schema::Migration};

/// The FROM item over a batch.
macro_rules! rows {
    () => {
        "jsonb_array_elements(CAST($1 AS JSONB)) AS j(value)"
    };
}

/// The FROM item over the integers of an array that `$of` is.
macro_rules! integers {
    ($of:literal) => {
        concat!("jsonb_array_elements(", $of, ") AS i(value)")
    };
}

/// The FROM item over integer keys.
macro_rules! keys {
    () => {
        "unnest($1) AS k(value)"
    };
}

/// A join.
macro_rules! join {
    () => {
        " JOIN "
    };
}

/// Locks rows for writing, in order of their keys.
macro_rules! exclusive {
    ($table:literal, $order:literal) => {
        concat!(" ORDER BY ", $order, " FOR NO KEY UPDATE OF ", $table)
    };
}

/// Keeps rows from being written, in order of their keys.
macro_rules! shared {
    ($table:literal, $order:literal) => {
        concat!(" ORDER BY ", $order, " FOR SHARE OF ", $table)
    };
}

/// The database's clock, Unix milliseconds.
macro_rules! now {
    () => {
        "CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS BIGINT)"
    };
}

#[path = "shared/mod.rs"]
#[expect(clippy::duplicate_mod, reason = "the statements are written once and compiled for each database")]
mod shared;

use shared::names::Names;

type Database = sqlx::Postgres;
type Connection = PgConnection;
type Row = sqlx::postgres::PgRow;
type Writer<'a> = PoolConnection<sqlx::Postgres>;
type Keys = Vec<i64>;

/// A PostgreSQL database.
pub(crate) struct Engine {
    /// Separate from the readers, so that no grant waits for lists.
    writers: PgPool,
    readers: PgPool,
    names: Names,
    call_timeout: Duration,
    read_replicas: Vec<String>,
}

impl Engine {
    pub(crate) async fn open(url: &str, config: &StoreConfig) -> Result<Self, StoreError> {
        let milliseconds = config.call_timeout.as_millis().to_string();
        let options = PgConnectOptions::from_str(url)?
            .application_name("kms-server")
            .statement_cache_capacity(256)
            .options([
                ("statement_timeout", milliseconds.as_str()),
                ("lock_timeout", milliseconds.as_str()),
                // A server that hangs in a transaction must not keep its locks.
                ("idle_in_transaction_session_timeout", milliseconds.as_str()),
            ])
            .disable_statement_logging();
        refuse_plaintext(&options)?;
        let pool = |connections: u32| {
            PgPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(config.call_timeout)
                .test_before_acquire(false)
                .connect_lazy_with(options.clone())
        };
        let readers = (config.connections / 4).max(1);
        let engine = Self {
            writers: pool(config.connections - readers),
            readers: pool(readers),
            names: Names::default(),
            call_timeout: config.call_timeout,
            read_replicas: config.read_replicas.clone(),
        };
        engine.settings().await?;
        shared::migrate(&mut *engine.writer().await?, MIGRATIONS).await?;
        Ok(engine)
    }

    async fn writer(&self) -> Result<Writer<'_>, StoreError> {
        Ok(self.writers.acquire().await?)
    }

    fn timed_out(&self) {}

    fn committed(&self) {}

    /// Refuses settings with which a committed record can be lost (I2, I3, I4).
    async fn settings(&self) -> Result<(), StoreError> {
        let mut connection = self.readers.acquire().await?;
        let row =
            sqlx::query("SELECT pg_is_in_recovery(), current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')")
                .fetch_one(&mut *connection)
                .await?;
        if row.try_get::<bool, _>(0)? {
            return Err(StoreError::Unavailable {
                cause: "this PostgreSQL server is a standby".into(),
                next_step: "connect to the primary",
            });
        }
        for (index, setting, safe, next_step) in [
            (1, "fsync", &["on"][..], "set `fsync = on` in postgresql.conf"),
            (2, "full_page_writes", &["on"], "set `full_page_writes = on` in postgresql.conf"),
            (
                3,
                "synchronous_commit",
                &["on", "remote_apply"],
                "set `synchronous_commit = on` for the server's user and database",
            ),
        ] {
            let value: String = row.try_get(index)?;
            if !safe.contains(&value.as_str()) {
                return Err(StoreError::UnsafeSetting { setting, value, next_step });
            }
        }
        let standbys =
            sqlx::query("SELECT application_name, sync_state FROM pg_stat_replication WHERE state IS NULL OR state IN ('startup', 'catchup', 'streaming')")
                .fetch_all(&mut *connection)
                .await?;
        for standby in standbys {
            let name = standby.try_get::<Option<String>, _>(0)?.unwrap_or_default();
            if self.read_replicas.contains(&name) {
                continue;
            }
            match standby.try_get::<Option<String>, _>(1)?.as_deref() {
                Some("async") => {
                    return Err(StoreError::UnsafeSetting {
                        setting: "synchronous_standby_names",
                        value: format!("without the standby {name}"),
                        next_step: "add the standby to it, or name it in `read_replicas` if it never becomes the primary",
                    });
                }
                Some(_) => {}
                None => {
                    return Err(StoreError::UnsafeSetting {
                        setting: "pg_stat_replication",
                        value: "hidden from this user".into(),
                        next_step: "grant the role pg_monitor to the server's user, so that asynchronous standbys can be seen",
                    });
                }
            }
        }
        Ok(())
    }

    /// The current timeline, by the name of the log's file: after a promotion the control file
    /// still names the old timeline until the next checkpoint.
    async fn history(&self) -> Result<Option<Timeline>, StoreError> {
        let row = sqlx::query(
            "SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) FROM pg_control_system()",
        )
        .fetch_one(&self.readers)
        .await?;
        let number = u32::from_str_radix(row.try_get(1)?, 16)
            .map_err(|_| StoreError::corrupt("the name of the write-ahead log's file"))?;
        Ok(Some(Timeline { cluster: row.try_get(0)?, number }))
    }

    async fn measure(&self) -> Result<Sizes, StoreError> {
        let octets: i64 =
            sqlx::query_scalar("SELECT pg_database_size(current_database())").fetch_one(&self.readers).await?;
        Ok(Sizes { database: u64::try_from(octets).unwrap_or_default(), log: 0 })
    }

    async fn shut(&self) {
        self.writers.close().await;
        self.readers.close().await;
    }
}

fn keys(keys: impl IntoIterator<Item = i64>) -> Keys {
    keys.into_iter().collect()
}

/// Locks parts of the key space until the transaction ends, in ascending order.
async fn lock_stripes(connection: &mut Connection, stripes: &[i32]) -> Result<(), Failure> {
    if !stripes.is_empty() {
        sqlx::query("SELECT pg_advisory_xact_lock($2, k.value) FROM unnest($1) AS k(value)")
            .bind(stripes)
            .bind(ADVISORY_CLASS)
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// Requires a verified TLS connection over a network: `prefer`, the default, falls back to
/// plaintext.
fn refuse_plaintext(options: &PgConnectOptions) -> Result<(), StoreError> {
    let host = options.get_host();
    let local = options.get_socket().is_some()
        || host.starts_with('/')
        || ["localhost", "127.0.0.1", "::1", "[::1]"].contains(&host);
    if local || matches!(options.get_ssl_mode(), PgSslMode::VerifyFull) {
        return Ok(());
    }
    Err(StoreError::UnsafeSetting {
        setting: "sslmode",
        value: format!("{:?}", options.get_ssl_mode()).to_ascii_lowercase(),
        next_step: "add `?sslmode=verify-full&sslrootcert=FILE` to the database's address",
    })
}

const BEGIN: &str = "BEGIN";
/// The bounds of a call are not those of a migration. The next server waits at this lock for as
/// long as the first one needs.
const MIGRATION_BEGIN: &str = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0";
const MIGRATION_LOCK: &str = "SELECT pg_advisory_xact_lock(1296780112, -1)";
/// Behind a table's lock that waits, all who use the table wait too: this wait stays bounded.
const MIGRATION_LOCKED: &str = "RESET lock_timeout";
/// Whether transactions of others run at the same time.
const CONCURRENT: bool = true;
const MIGRATIONS: &[Migration] = &[
    Migration { version: 1, name: "initial", sql: include_str!("../migrations/postgres/0001_initial.sql") },
    Migration { version: 2, name: "campaigns", sql: include_str!("../migrations/postgres/0002_campaigns.sql") },
    Migration { version: 3, name: "group members", sql: include_str!("../migrations/postgres/0003_group_members.sql") },
    Migration { version: 4, name: "work orders", sql: include_str!("../migrations/postgres/0004_work_orders.sql") },
    Migration { version: 5, name: "exposures", sql: include_str!("../migrations/postgres/0005_exposures.sql") },
];
/// ASCII `MKMP`: distinguishes our advisory locks from those of other programs.
const ADVISORY_CLASS: i32 = 1_296_780_112;
