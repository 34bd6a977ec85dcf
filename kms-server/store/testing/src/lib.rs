//! For tests of all crates: new databases, and ways to damage rows on purpose. No part of a server.

use std::{
    io::{self, Write as _},
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use kms_domain::{SystemTitle, WriterId};
use sqlx::{Connection as _, Executor as _, PgConnection, SqliteConnection};
use tempfile::TempDir;

use kms_store::{DatabaseLocation, RowKind, SealedRow, Store, StoreConfig, StoreError};

/// A new PostgreSQL cluster, with `fsync` on, on a loopback port and a socket in a temporary
/// directory.
///
/// It is stopped and removed when this is dropped, and also when the process ends in another way: a
/// shell guards the cluster, and notices that its standard input has ended.
pub struct PostgresCluster {
    guard: Child,
    lifeline: Option<ChildStdin>,
    directory: PathBuf,
    binaries: PathBuf,
    port: u16,
    databases: AtomicU32,
}

impl PostgresCluster {
    /// Makes and starts a cluster with settings besides the defaults.
    ///
    /// # Errors
    /// PostgreSQL is not installed (the text says how to install it), or it does not start (the
    /// text has its log).
    pub fn start(settings: &[(&str, &str)]) -> io::Result<Self> {
        Self::start_from(settings, None)
    }

    /// Takes a base backup of the running cluster, below its directory. Returns its path.
    ///
    /// # Errors
    /// `pg_basebackup` fails.
    pub fn back_up(&self) -> io::Result<PathBuf> {
        let backup = self.directory.join("backup");
        succeed(
            self.program("pg_basebackup")?
                .args(["--wal-method=stream", "--checkpoint=fast", "--no-sync", "--pgdata"])
                .arg(&backup),
        )?;
        Ok(backup)
    }

    /// Restores a base backup as a new cluster. Its recovery ends at the end of the backup, on a
    /// new timeline.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restore(backup: &Path) -> io::Result<Self> {
        Self::start_from(&[("restore_command", "false")], Some(backup))
    }

    fn start_from(settings: &[(&str, &str)], backup: Option<&Path>) -> io::Result<Self> {
        let binaries = binaries()?;
        let directory = TempDir::with_prefix("kms-postgres-")?.keep();
        let started = Self::start_in(settings, binaries, &directory, backup);
        if started.is_err() {
            // Best effort: the error of the start matters more.
            let _ = std::fs::remove_dir_all(&directory);
        }
        started
    }

    fn start_in(
        settings: &[(&str, &str)],
        binaries: PathBuf,
        directory: &Path,
        backup: Option<&Path>,
    ) -> io::Result<Self> {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
        // PostgreSQL refuses to run as root: it runs as the user that its package made.
        if is_root()? {
            let id = |flag| -> io::Result<u32> {
                let output = succeed(Command::new("id").args([flag, "postgres"]))?;
                String::from_utf8_lossy(&output.stdout).trim().parse().map_err(io::Error::other)
            };
            chown(directory, Some(id("-u")?), Some(id("-g")?))?;
        }
        let data = directory.join("data");
        match backup {
            Some(backup) => {
                succeed(demoted(Path::new("cp"))?.arg("-a").arg(backup).arg(&data))?;
                succeed(demoted(Path::new("touch"))?.arg(data.join("recovery.signal")))?;
            }
            None => succeed(
                demoted(&binaries.join("initdb"))?
                    .args(["--username=kms", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "--pgdata"])
                    .arg(&data),
            )
            .map(drop)?,
        }
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let mut guard = Command::new("sh");
        guard.args(["-c", GUARD, "kms-postgres-guard"]).arg(directory);
        let postgres = demoted(&binaries.join("postgres"))?;
        guard.arg(postgres.get_program()).args(postgres.get_args());
        guard.arg("-D").arg(&data).args(["-p", &port.to_string(), "-k"]).arg(directory).args([
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "fsync=on",
        ]);
        for (name, value) in settings {
            guard.arg("-c").arg(format!("{name}={value}"));
        }
        let mut guard = guard.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let lifeline = guard.stdin.take();
        let cluster =
            Self { guard, lifeline, directory: directory.to_owned(), binaries, port, databases: AtomicU32::new(0) };
        cluster.await_ready()?;
        Ok(cluster)
    }

    fn await_ready(&self) -> io::Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        let port = self.port.to_string();
        loop {
            let ready = Command::new(self.binaries.join("pg_isready"))
                .args(["-q", "-h", "127.0.0.1", "-U", "kms", "-d", "postgres", "-p", &port])
                .status()?;
            if ready.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
                return Err(io::Error::other(format!("PostgreSQL did not start; its log says: {log}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes an empty database. Returns its address for [`StoreConfig::parse`].
    ///
    /// # Errors
    /// PostgreSQL does not answer.
    pub async fn create_database(&self) -> Result<String, StoreError> {
        let name = format!("kms{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.execute("postgres", format!("CREATE DATABASE {name}")).await?;
        Ok(self.address(&name))
    }

    /// Makes a copy of a database that no client has open. Returns its address.
    ///
    /// # Errors
    /// The address is not one of this cluster's databases, a client has it open, or PostgreSQL does
    /// not answer.
    pub async fn copy_database(&self, address: &str) -> Result<String, StoreError> {
        let name = format!("kms{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let of = address.rsplit('/').next().unwrap_or_default();
        self.execute("postgres", format!("CREATE DATABASE {name} TEMPLATE {of}")).await?;
        Ok(self.address(&name))
    }

    /// Runs statements as the superuser, in the database of this name.
    ///
    /// # Errors
    /// PostgreSQL does not answer, or refuses.
    pub async fn execute(&self, database: &str, statements: String) -> Result<(), StoreError> {
        let mut connection = PgConnection::connect(&self.address(database)).await?;
        connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(statements))).await?;
        Ok(connection.close().await?)
    }

    /// The address of a database over loopback TCP.
    pub fn address(&self, database: &str) -> String {
        format!("postgres://kms@127.0.0.1:{}/{database}", self.port)
    }

    /// The address of a database over the Unix socket.
    pub fn socket_address(&self, database: &str) -> String {
        format!("postgres://kms@localhost:{}/{database}?host={}", self.port, self.directory.display())
    }

    /// One of PostgreSQL's own programs, as a command that runs as the same user as PostgreSQL,
    /// with connection parameters in its environment.
    ///
    /// # Errors
    /// The current user is not known.
    pub fn program(&self, name: &str) -> io::Result<Command> {
        let mut command = demoted(&self.binaries.join(name))?;
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.port.to_string()).env("PGUSER", "kms");
        Ok(command)
    }

    /// A directory that PostgreSQL's user may write to; removed with the cluster.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for PostgresCluster {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        // The guard ends by itself; waiting only keeps it from being a zombie.
        let _ = self.guard.wait();
    }
}

/// The database on which the tests of servers run: `KMS_TEST_DATABASE`, which is `sqlite` (the
/// default) or `postgresql`.
///
/// Tests that need two servers always run on PostgreSQL: SQLite is the database of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TestDatabase {
    /// A file beside the token.
    Sqlite,
    /// A database of its own for each test, in one cluster for each test program.
    Postgresql,
}

impl TestDatabase {
    /// The database that the environment names.
    ///
    /// # Panics
    /// It has another value: a test that ran on another database than requested would prove
    /// nothing.
    pub fn of_environment() -> Self {
        match std::env::var("KMS_TEST_DATABASE").as_deref() {
            Err(_) | Ok("sqlite") => Self::Sqlite,
            Ok("postgresql") => Self::Postgresql,
            #[expect(clippy::panic, reason = "a test harness: what fails here fails the test")]
            Ok(other) => panic!("KMS_TEST_DATABASE: `{other}` is neither `sqlite` nor `postgresql`"),
        }
    }

    /// The address of a new, empty database. `None` for SQLite, where the test makes a file.
    ///
    /// # Errors
    /// PostgreSQL is missing or does not start.
    pub fn create(self) -> io::Result<Option<String>> {
        match self {
            Self::Sqlite => Ok(None),
            Self::Postgresql => Self::create_postgresql().map(Some),
        }
    }

    /// The address of a new, empty PostgreSQL database, for tests that always need one. The cluster
    /// belongs to this process, and ends with it.
    ///
    /// # Errors
    /// PostgreSQL is missing or does not start.
    pub fn create_postgresql() -> io::Result<String> {
        let cluster = Self::cluster()?;
        wait(cluster.create_database())
    }

    /// The address of a copy of a database that [`Self::create_postgresql`] made, and that no
    /// client has open.
    ///
    /// # Errors
    /// A client has it open, or PostgreSQL does not answer.
    pub fn copy_postgresql(address: &str) -> io::Result<String> {
        let cluster = Self::cluster()?;
        wait(cluster.copy_database(address))
    }

    fn cluster() -> io::Result<&'static PostgresCluster> {
        static CLUSTER: OnceLock<Result<PostgresCluster, String>> = OnceLock::new();
        let cluster = CLUSTER.get_or_init(|| PostgresCluster::start(&[]).map_err(|error| error.to_string()));
        cluster.as_ref().map_err(|reason| io::Error::other(reason.clone()))
    }
}

/// Waits on a new thread with its own runtime: callers may be inside a runtime, or outside of any.
fn wait<T: Send>(work: impl Future<Output = Result<T, StoreError>> + Send) -> io::Result<T> {
    let wait =
        || tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work).map_err(io::Error::other);
    std::thread::scope(|scope| scope.spawn(wait).join())
        .map_err(|_| io::Error::other("the thread that waits for PostgreSQL panicked"))?
}

/// A store that reads a database while a server has it open.
pub struct Glance {
    /// The store. With SQLite it is on a copy.
    pub store: Arc<dyn Store>,
    _copy: Option<TempDir>,
}

impl Glance {
    /// Opens PostgreSQL as another client. Opens a present copy of SQLite, which only one process
    /// may open.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn at(database: &DatabaseLocation) -> Result<Self, StoreError> {
        let DatabaseLocation::Sqlite(_) = database else {
            return Ok(Self { store: kms_store::open(&StoreConfig::new(database.clone())).await?, _copy: None });
        };
        let folder = TempDir::with_prefix("kms-sqlite-")
            .map_err(|error| StoreError::Invalid { what: "copy of a database", reason: error.to_string() })?;
        let copy = folder.path().join("copy.db");
        execute(database, &format!("VACUUM INTO '{}'", copy.display())).await?;
        Ok(Self {
            store: kms_store::open(&StoreConfig::new(DatabaseLocation::Sqlite(copy))).await?,
            _copy: Some(folder),
        })
    }
}

/// Runs one statement while servers have the database open, as someone with its password can.
/// Returns how many rows it affected.
///
/// # Errors
/// The database does not answer, or refuses.
pub async fn execute(database: &DatabaseLocation, statement: &str) -> Result<u64, StoreError> {
    let statement = sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned()));
    Ok(match database {
        DatabaseLocation::Sqlite(path) => {
            let mut connection = SqliteConnection::connect(&format!("sqlite:{}", path.display())).await?;
            let met = connection.execute(statement).await?.rows_affected();
            connection.close().await?;
            met
        }
        DatabaseLocation::Postgres(address) => {
            let mut connection = PgConnection::connect(address).await?;
            let met = connection.execute(statement).await?.rows_affected();
            connection.close().await?;
            met
        }
    })
}

/// Octets as a literal of the database's SQL.
pub fn octets(database: &DatabaseLocation, octets: &[u8]) -> String {
    match database {
        DatabaseLocation::Sqlite(_) => format!("x'{}'", hex::encode(octets)),
        DatabaseLocation::Postgres(_) => format!("'\\x{}'::bytea", hex::encode(octets)),
    }
}

/// Damage that someone who can write to the database could do (I5).
#[derive(Clone, Debug)]
pub enum Damage {
    /// Puts any row in a meter's place, an older one for example.
    PutMeter(SystemTitle, SealedRow),
    /// Deletes a meter.
    DeleteMeter(SystemTitle),
    /// Puts any row in another sealed row's place.
    PutSealed(RowKind, Vec<u8>, SealedRow),
    /// Deletes another sealed row.
    DeleteSealed(RowKind, Vec<u8>),
    /// Replaces the content of an audit record.
    PutAuditRecord(WriterId, u64, Vec<u8>),
    /// Deletes the audit records of a writer from a sequence on.
    DeleteAuditFrom(WriterId, u64),
    /// Pretends that a newer server has migrated the database.
    AddSchemaVersion(i64),
    /// Pretends that a released migration was another one.
    ChangeSchemaDigest,
}

/// Does damage to a database while servers have it open. Returns how many rows it affected.
///
/// # Errors
/// The database does not answer.
pub async fn damage(database: &DatabaseLocation, damage: &Damage) -> Result<u64, StoreError> {
    macro_rules! run {
        ($connection:expr) => {{
            let mut connection = $connection;
            let query = |sql: &'static str| sqlx::query(sql);
            let query = match damage {
                Damage::PutMeter(title, row) => query("UPDATE meter SET generation = $2, seal = $3, body = $4 WHERE title = $1")
                    .bind(title.as_i64())
                    .bind(row.generation.cast_signed())
                    .bind(row.seal.to_vec())
                    .bind(row.body.clone()),
                Damage::DeleteMeter(title) => query("DELETE FROM meter WHERE title = $1").bind(title.as_i64()),
                Damage::PutSealed(kind, id, row) => query("UPDATE sealed SET generation = $3, seal = $4, body = $5 WHERE kind = $1 AND id = $2")
                    .bind(i64::from(kind.number()))
                    .bind(id.clone())
                    .bind(row.generation.cast_signed())
                    .bind(row.seal.to_vec())
                    .bind(row.body.clone()),
                Damage::DeleteSealed(kind, id) => query("DELETE FROM sealed WHERE kind = $1 AND id = $2").bind(i64::from(kind.number())).bind(id.clone()),
                Damage::PutAuditRecord(writer, sequence, record) => {
                    query("UPDATE audit SET record = $3 WHERE writer = (SELECT number FROM server WHERE writer = $1) AND sequence = $2")
                        .bind(writer.octets().to_vec())
                        .bind(sequence.cast_signed())
                        .bind(record.clone())
                }
                Damage::DeleteAuditFrom(writer, sequence) => {
                    query("DELETE FROM audit WHERE writer = (SELECT number FROM server WHERE writer = $1) AND sequence >= $2")
                        .bind(writer.octets().to_vec())
                        .bind(sequence.cast_signed())
                }
                Damage::AddSchemaVersion(version) => {
                    query("INSERT INTO schema_version (version, name, sha256, applied_ms) VALUES ($1, 'newer', '', 0)").bind(*version)
                }
                Damage::ChangeSchemaDigest => query("UPDATE schema_version SET sha256 = '00'"),
            };
            let met = query.execute(&mut connection).await?.rows_affected();
            connection.close().await?;
            Ok(met)
        }};
    }
    match database {
        DatabaseLocation::Sqlite(path) => run!(SqliteConnection::connect(&format!("sqlite:{}", path.display())).await?),
        DatabaseLocation::Postgres(address) => run!(PgConnection::connect(address).await?),
    }
}

/// Holds the database's write lock, or the table of meters, as a hung process would. Released when
/// it is dropped.
pub enum Obstruction {
    /// SQLite's one write lock.
    Sqlite(SqliteConnection),
    /// A PostgreSQL transaction that holds a table.
    Postgres(PgConnection),
}

impl Obstruction {
    /// Obstructs all writing of meters.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn begin(config: &StoreConfig) -> Result<Self, StoreError> {
        match &config.database {
            DatabaseLocation::Sqlite(path) => {
                let mut connection = SqliteConnection::connect(&format!("sqlite:{}", path.display())).await?;
                connection.execute("BEGIN IMMEDIATE").await?;
                Ok(Self::Sqlite(connection))
            }
            DatabaseLocation::Postgres(address) => {
                let mut connection = PgConnection::connect(address).await?;
                connection.execute("BEGIN; LOCK TABLE meter IN ACCESS EXCLUSIVE MODE").await?;
                Ok(Self::Postgres(connection))
            }
        }
    }

    /// Ends the obstruction.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn end(self) -> Result<(), StoreError> {
        match self {
            Self::Sqlite(mut connection) => {
                connection.execute("ROLLBACK").await?;
                Ok(connection.close().await?)
            }
            Self::Postgres(mut connection) => {
                connection.execute("ROLLBACK").await?;
                Ok(connection.close().await?)
            }
        }
    }
}

/// The newest PostgreSQL of this machine.
fn binaries() -> io::Result<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|binaries| binaries.join("initdb").exists())
        .collect();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        let binaries = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if binaries.join("initdb").exists() {
            found.push(binaries);
        }
    }
    found.sort();
    found.pop().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "PostgreSQL is not installed: run `apt-get install postgresql`, or `tests/run`, which does",
        )
    })
}

/// A command that runs as a user that PostgreSQL accepts.
fn demoted(program: &Path) -> io::Result<Command> {
    if !is_root()? {
        return Ok(Command::new(program));
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]).arg(program);
    Ok(command)
}

fn is_root() -> io::Result<bool> {
    Ok(std::fs::metadata("/proc/self")?.uid() == 0)
}

fn succeed(command: &mut Command) -> io::Result<Output> {
    let output = command.current_dir("/").output()?;
    if !output.status.success() {
        // Best effort: the whole output, where the test's own output goes.
        let _ = io::stderr().write_all(&output.stderr);
        return Err(io::Error::other(format!("{} failed", command.get_program().display())));
    }
    Ok(output)
}

/// Arguments: directory, program, arguments. Ends when standard input does.
const GUARD: &str = r#"trap '' INT TERM HUP; directory=$1; shift; cd /
"$@" >"$directory/log" 2>&1 & child=$!
while read -r _; do :; done
kill -QUIT "$child"; wait "$child"; rm -rf "$directory""#;

const START_LIMIT: Duration = Duration::from_secs(60);
