//! SQLite: the database of one server, in one file.
//!
//! One connection writes, and callers queue for it. Others read. Every commit is synced
//! (`synchronous=FULL`). A helper connection copies the write-ahead log into the database, so that
//! no commit waits for that.

use std::{
    fs::{File, OpenOptions, Permissions, TryLockError},
    io::Write as _,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{
    ConnectOptions, Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{Sizes, StoreConfig, StoreError, Timeline, error::Failure, schema::Migration};

/// The FROM item over a batch. The binary form spares each column of each row a parse of text.
macro_rules! rows {
    () => {
        "jsonb_each($1) AS j"
    };
}

/// The FROM item over the integers of an array that `$of` is.
macro_rules! integers {
    ($of:literal) => {
        concat!("json_each(", $of, ") AS i")
    };
}

/// The FROM item over integer keys.
macro_rules! keys {
    () => {
        "json_each($1) AS k"
    };
}

/// A join whose left side is the outer loop: the planner does not know that the right side is found
/// by its key.
macro_rules! join {
    () => {
        " CROSS JOIN "
    };
}

/// Locks rows for writing: the writer has the whole database.
macro_rules! exclusive {
    ($table:literal, $order:literal) => {
        ""
    };
}

/// Keeps rows from being written: the writer has the whole database.
macro_rules! shared {
    ($table:literal, $order:literal) => {
        ""
    };
}

/// The database's clock, Unix milliseconds.
macro_rules! now {
    () => {
        "CAST(unixepoch('subsec') * 1000 AS INTEGER)"
    };
}

#[path = "shared/mod.rs"]
mod shared;

use shared::names::Names;

type Database = sqlx::Sqlite;
type Connection = SqliteConnection;
type Row = sqlx::sqlite::SqliteRow;
type Writer<'a> = MutexGuard<'a, SqliteConnection>;
type Keys = String;

/// A SQLite database, opened by this process alone.
pub(crate) struct Engine {
    writer: Arc<Mutex<SqliteConnection>>,
    /// How the writer connects, for a new one.
    options: SqliteConnectOptions,
    readers: SqlitePool,
    names: Names,
    call_timeout: Duration,
    /// A call that held the writer timed out: the connection's thread may be stuck in a system
    /// call.
    suspect: AtomicBool,
    /// Something was committed since the last checkpoint.
    written: Arc<AtomicBool>,
    checkpointer: JoinHandle<()>,
    path: PathBuf,
    closed: AtomicBool,
    /// Held until the database is closed. The system releases it when the process ends, for
    /// whatever reason.
    lock: std::sync::Mutex<Option<File>>,
}

impl Engine {
    pub(crate) async fn open(path: &Path, config: &StoreConfig) -> Result<Self, StoreError> {
        let (path, lock) = claim(path)?;
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .journal_mode(SqliteJournalMode::Wal)
            // I2, I3, I4: a commit is on disk before it is acknowledged.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(config.call_timeout)
            .pragma("wal_autocheckpoint", LAST_RESORT_PAGES.to_string())
            .pragma("cache_size", "-65536")
            .pragma("cell_size_check", "ON")
            .statement_cache_capacity(128)
            .row_buffer_size(1024)
            // A stuck disk must not fill the queue: a rollback sent to a full queue would block a
            // thread of the runtime.
            .command_buffer_size(65_536)
            .disable_statement_logging();
        let mut writer = timeout(config.call_timeout, options.connect())
            .await
            .map_err(|_| StoreError::timed_out(config.call_timeout))??;
        shared::migrate(&mut writer, MIGRATIONS).await?;
        // What undoes a statement that fails is kept in memory: a temporary file costs a write for
        // each page that changes. A migration may sort more than memory holds.
        sqlx::query("PRAGMA temp_store = MEMORY").execute(&mut writer).await?;
        let helper = options.connect().await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(config.connections - 1)
            .acquire_timeout(config.call_timeout)
            .max_lifetime(None)
            .test_before_acquire(false)
            .connect_lazy_with(options.clone().read_only(true));
        let writer = Arc::new(Mutex::new(writer));
        let written = Arc::new(AtomicBool::new(true));
        Ok(Self {
            checkpointer: tokio::spawn(checkpoint(helper, Arc::clone(&writer), Arc::clone(&written))),
            writer,
            options,
            readers,
            names: Names::default(),
            call_timeout: config.call_timeout,
            suspect: AtomicBool::new(false),
            written,
            path,
            closed: AtomicBool::new(false),
            lock: std::sync::Mutex::new(Some(lock)),
        })
    }

    async fn writer(&self) -> Result<Writer<'_>, StoreError> {
        let mut writer = self.writer.lock().await;
        if self.closed.load(Ordering::Acquire) {
            return Err(sqlx::Error::PoolClosed.into());
        }
        if self.suspect.load(Ordering::Acquire) {
            // I2: while the disk is stuck, each caller gets the error at once and does not wait for
            // a time-out.
            match timeout(PROBE, writer.ping()).await {
                Ok(Ok(())) => self.suspect.store(false, Ordering::Release),
                _ => return Err(StoreError::timed_out(PROBE)),
            }
        }
        // No other call holds the writer, so no transaction is open, unless its rollback still
        // waits in the connection's queue.
        if writer.is_in_transaction() {
            writer.ping().await?;
        }
        if writer.is_in_transaction() {
            self.replace(&mut writer).await?;
        }
        Ok(writer)
    }

    /// Replaces a connection whose driver still counts a transaction that has ended. SQLite itself
    /// rolls back when the disk is full or fails
    /// (<https://sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction>). The
    /// rollback of the driver then finds nothing to roll back, and no transaction can begin on that
    /// connection any more.
    async fn replace(&self, writer: &mut SqliteConnection) -> Result<(), StoreError> {
        let fresh = self.options.connect().await?;
        tracing::warn!("the database rolled a transaction back by itself; its connection was replaced");
        // The thread of the old connection ends by itself. Nothing waits for it, because its disk
        // may be stuck.
        drop(std::mem::replace(writer, fresh));
        Ok(())
    }

    fn timed_out(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    fn committed(&self) {
        self.written.store(true, Ordering::Release);
    }

    /// Checks that the disk has room for a transaction. A small write also succeeds on a full disk,
    /// in pages that the log has already.
    async fn settings(&self) -> Result<(), StoreError> {
        let mut path = self.path.clone().into_os_string();
        path.push(".room");
        let probe = tokio::task::spawn_blocking(move || {
            let written =
                File::create(&path).and_then(|mut file| file.write_all(&vec![0; ROOM]).and_then(|()| file.sync_all()));
            written.and(std::fs::remove_file(&path))
        });
        match probe.await {
            Ok(Err(error)) => Err(StoreError::Unavailable {
                cause: format!("{} MiB beside the database cannot be written ({})", ROOM >> 20, error.kind()),
                next_step: "free space on its disk",
            }),
            // The runtime is ending, or there is room.
            Err(_) | Ok(Ok(())) => Ok(()),
        }
    }

    async fn history(&self) -> Result<Option<Timeline>, StoreError> {
        Ok(None)
    }

    async fn measure(&self) -> Result<Sizes, StoreError> {
        let octets = |path: &Path| path.metadata().map(|metadata| metadata.len()).unwrap_or_default();
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        let pages: i64 = sqlx::query_scalar("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
            .fetch_one(&self.readers)
            .await?;
        Ok(Sizes { database: u64::try_from(pages).unwrap_or_default(), log: octets(Path::new(&log)) })
    }

    async fn shut(&self) {
        self.closed.store(true, Ordering::Release);
        self.checkpointer.abort();
        self.readers.close().await;
        // When the writer answers, the last transaction has ended and no other begins, so another
        // process may open the database. If the disk is stuck, nobody can know that, and the lock
        // is held until the process ends.
        let idle = async { self.writer.lock().await.ping().await.is_ok() };
        if timeout(self.call_timeout, idle).await == Ok(true)
            && let Ok(mut lock) = self.lock.lock()
        {
            lock.take();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.checkpointer.abort();
    }
}

fn keys(keys: impl IntoIterator<Item = i64>) -> Keys {
    let keys: Vec<String> = keys.into_iter().map(|key| key.to_string()).collect();
    format!("[{}]", keys.join(","))
}

/// Nothing to do: after `BEGIN IMMEDIATE` no other transaction writes.
async fn lock_stripes(_: &mut Connection, _: &[i32]) -> Result<(), Failure> {
    Ok(())
}

/// The canonical path of the database, and the lock that keeps other servers out. The file gets a
/// mode with which no other user can read it.
///
/// The lock is a file of its own: to close any descriptor of the database itself would release
/// SQLite's locks on it.
fn claim(path: &Path) -> Result<(PathBuf, File), StoreError> {
    let failed = |error: std::io::Error| StoreError::Unavailable {
        cause: format!("the file `{}` cannot be opened ({})", path.display(), error.kind()),
        next_step: "check that the directory exists, and its owner and mode",
    };
    drop(OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path).map_err(failed)?);
    let path = path.canonicalize().map_err(failed)?;
    let mut lock_path = path.clone().into_os_string();
    lock_path.push(".lock");
    let lock = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&lock_path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path: path.display().to_string() }),
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // SQLite gives its log the mode of the database file.
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok((path, lock))
}

/// Copies the log into the database while the writer works. A busy log never becomes empty that
/// way, so at a certain length the writer is held for the last few pages: the next commit then
/// restarts the log.
async fn checkpoint(mut helper: SqliteConnection, writer: Arc<Mutex<SqliteConnection>>, written: Arc<AtomicBool>) {
    let mut ticks = interval(CHECKPOINT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if !written.swap(false, Ordering::AcqRel) {
            continue;
        }
        if let Err(error) = checkpoint_once(&mut helper, &writer).await {
            tracing::warn!(error = %StoreError::from(error), "the checkpoint of the database's log failed");
        }
    }
}

async fn checkpoint_once(helper: &mut SqliteConnection, writer: &Mutex<SqliteConnection>) -> Result<(), sqlx::Error> {
    let (log, copied) = wal(helper, "PRAGMA wal_checkpoint(NOOP)").await?;
    if log - copied < COPY_PAGES {
        return Ok(());
    }
    let (log, _) = wal(helper, "PRAGMA wal_checkpoint(PASSIVE)").await?;
    if log >= RESTART_PAGES {
        let held = writer.lock().await;
        wal(helper, "PRAGMA wal_checkpoint(PASSIVE)").await?;
        drop(held);
    }
    Ok(())
}

/// Pages in the log, and how many of them are in the database too.
async fn wal(connection: &mut SqliteConnection, pragma: &'static str) -> Result<(i64, i64), sqlx::Error> {
    let row = sqlx::query(pragma).fetch_one(connection).await?;
    Ok((row.try_get(1)?, row.try_get(2)?))
}

const BEGIN: &str = "BEGIN IMMEDIATE";
/// The transaction has the whole database, and no statement is bounded in time.
const MIGRATION_BEGIN: &str = "SELECT 1";
const MIGRATION_LOCK: &str = "SELECT 1";
const MIGRATION_LOCKED: &str = "SELECT 1";
/// Whether transactions of others run at the same time.
const CONCURRENT: bool = false;
const MIGRATIONS: &[Migration] = &[
    Migration { version: 1, name: "initial", sql: include_str!("../migrations/sqlite/0001_initial.sql") },
    Migration { version: 2, name: "campaigns", sql: include_str!("../migrations/sqlite/0002_campaigns.sql") },
    Migration { version: 3, name: "group members", sql: include_str!("../migrations/sqlite/0003_group_members.sql") },
    Migration { version: 4, name: "work orders", sql: include_str!("../migrations/sqlite/0004_work_orders.sql") },
    Migration { version: 5, name: "exposures", sql: include_str!("../migrations/sqlite/0005_exposures.sql") },
];
const PROBE: Duration = Duration::from_secs(1);
/// The octets that must fit on the disk: more than most transactions write.
const ROOM: usize = 4 << 20;
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(100);
/// Copy when this many pages of 4 KiB wait: 8 MiB.
const COPY_PAGES: i64 = 2048;
/// Restart the log from this length on: 32 MiB.
const RESTART_PAGES: i64 = 8192;
/// If the helper does not keep up, a commit copies: 512 MiB.
const LAST_RESORT_PAGES: i64 = 131_072;
