//! Under what conditions was measured.

use std::{
    fmt, fs,
    fs::File,
    io::{Seek as _, Write as _},
    path::Path,
    process::Command,
    time::Instant,
};

use serde::Serialize;

use crate::{Failure, figure::shown};

/// What a figure has to be read with.
#[derive(Serialize)]
pub(crate) struct Conditions {
    date: String,
    processor: String,
    cores: usize,
    memory_gib: f64,
    kernel: String,
    /// Load average of the last minute before the measuring.
    load_before: f64,
    rustc: String,
    commit: String,
    sqlite: String,
    /// One write of 4 KiB and fdatasync where the databases are, in milliseconds (median).
    fdatasync_ms: f64,
    pub(crate) modules: Vec<String>,
    pub(crate) sizes: Vec<String>,
}

impl Conditions {
    /// Now, on this machine. `load_before`, where the load was looked at earlier.
    pub(crate) async fn now(directory: &Path, load_before: Option<f64>) -> Result<Self, Failure> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            text.lines()
                .find_map(|line| Some(line.strip_prefix(name)?.trim_start_matches([' ', '\t', ':']).trim().to_owned()))
                .unwrap_or_default()
        };
        let kib: f64 = field(&text("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
        let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect("sqlite::memory:").await?;
        Ok(Self {
            date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
            processor: field(&text("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism()?.get(),
            memory_gib: kib / 1024.0 / 1024.0,
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_before: load_before
                .or_else(|| text("/proc/loadavg").split_whitespace().next()?.parse().ok())
                .unwrap_or(f64::NAN),
            rustc: output("rustc", &["--version"]),
            commit: output("git", &["describe", "--always", "--dirty"]),
            sqlite: sqlx::query_scalar("SELECT sqlite_version()").fetch_one(&mut connection).await?,
            fdatasync_ms: fdatasync_ms(directory)?,
            modules: Vec::new(),
            sizes: Vec::new(),
        })
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { date, processor, cores, kernel, rustc, commit, sqlite, .. } = self;
        writeln!(f, "{date}, commit {commit}, {rustc}, SQLite {sqlite}")?;
        writeln!(
            f,
            "{processor}, {cores} cores for server and load generator together, {:.0} GiB, Linux {kernel}",
            self.memory_gib
        )?;
        writeln!(f, "load before: {:.2}; fdatasync of 4 KiB: {} ms", self.load_before, shown(self.fdatasync_ms))?;
        writeln!(f, "modules: {}", self.modules.join(", "))?;
        writeln!(f, "sizes: {}", self.sizes.join("; "))
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(|_| "?".to_owned(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn fdatasync_ms(directory: &Path) -> Result<f64, Failure> {
    let path = directory.join("fdatasync");
    let mut file = File::create(&path)?;
    let mut times = Vec::with_capacity(SYNCS);
    for _ in 0..SYNCS {
        let begun = Instant::now();
        file.rewind()?;
        file.write_all(&[0x5A; 4096])?;
        file.sync_data()?;
        times.push(begun.elapsed());
    }
    fs::remove_file(&path)?;
    times.sort_unstable();
    Ok(times.get(SYNCS / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1_000.0))
}

const SYNCS: usize = 201;
