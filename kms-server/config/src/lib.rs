//! The configuration file of `kms-server run`: strict TOML. Unknown settings are refused, so that a
//! typing error is not a setting that silently does nothing. `docs/kms-server.toml` is a commented
//! example.

mod enrolment;
mod error;
mod hsm;
mod secret;
mod storage;
mod telemetry;
mod tls;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kms_base::bounds::Limits;
use kms_domain::{IslandName, KeyClass, Retention};
use kms_ledger::RestoreSettings;
use serde::{Deserialize, Deserializer, de};

pub use enrolment::EnrolmentSection;
pub use error::ConfigError;
pub use hsm::{ClassesSection, HsmSection, TokenSection};
pub use secret::SecretSource;
pub use storage::{PostgresSection, StorageSection};
pub use telemetry::{MetricsSeconds, TelemetrySection, TraceRatio};
pub use tls::{TlsFiles, TlsSection};

/// The configuration of one server of one island.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The island that the server serves.
    #[serde(deserialize_with = "island_name")]
    pub island: IslandName,
    /// A name for this server in records and logs. Default: the host's name.
    pub server_name: Option<String>,
    /// Address and port of the gRPC listener. Default: `127.0.0.1:7443`.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Accept a development island. Default: false; a production server refuses one.
    #[serde(default)]
    pub allow_development_island: bool,
    /// The hours between two scrubs: the log and all sealed rows are read and compared (I5), 1 to
    /// 168. Default: 24.
    #[serde(default = "default_scrub_hours")]
    pub scrub_hours: ScrubHours,
    /// When keys are destroyed.
    #[serde(default)]
    pub retention: RetentionSection,
    /// By how much a restored database raises every invocation counter (I4), 1 to 2³¹. Default: 2²⁴
    /// = 16,777,216.
    #[serde(default)]
    pub counter_jump: CounterJumpSetting,
    /// The file in which this server stores the last record that it knows, to notice an older
    /// database (I4). Default: with SQLite the database's path with `.watermark`; with PostgreSQL
    /// none.
    pub watermark: Option<PathBuf>,
    /// Certificates of the listener.
    pub tls: TlsSection,
    /// The listener that enrols handhelds. Default: none.
    pub enrolment: Option<EnrolmentSection>,
    /// The database.
    pub storage: StorageSection,
    /// The HSM tokens.
    pub hsm: HsmSection,
    /// The policies. Default: the policies that come with the server.
    #[serde(default)]
    pub policies: DirectorySection,
    /// More device profiles than those that come with the server.
    #[serde(default)]
    pub device_profiles: DirectorySection,
    /// Logs, traces and metrics.
    #[serde(default)]
    pub telemetry: TelemetrySection,
    /// Bounds on what callers can make the server hold.
    #[serde(default)]
    pub limits: Limits,
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has unknown or missing settings (with line and
    /// column), or settings that contradict each other.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Read { path: path.to_owned(), reason: error.to_string() })?;
        Self::parse(&text).map_err(|reason| ConfigError::Invalid { path: path.to_owned(), reason })
    }

    /// How the server notices a restored database.
    pub fn restore(&self) -> RestoreSettings {
        let beside_database = || match &self.storage {
            StorageSection::Sqlite(path) => {
                let mut watermark = path.clone().into_os_string();
                watermark.push(".watermark");
                Some(watermark.into())
            }
            StorageSection::Postgres(_) => None,
        };
        RestoreSettings {
            counter_jump: self.counter_jump.counters(),
            watermark: self.watermark.clone().or_else(beside_database),
            declared: false,
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        config.hsm.check()?;
        config.limits.check()?;
        config.storage.check()?;
        if let Some(enrolment) = &config.enrolment {
            enrolment.check()?;
            if config.hsm.token_of(KeyClass::Ca).is_none() {
                return Err("[enrolment]: a server without the CA key enrols nobody: name the token in `hsm.classes.ca`, or remove the section and enrol on a server that has it".to_owned());
            }
        }
        Ok(config)
    }
}

/// Hours between two scrubs, 1 to 168.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u8")]
pub struct ScrubHours(u8);

impl ScrubHours {
    /// The time between two scrubs.
    pub fn period(self) -> Duration {
        Duration::from_hours(u64::from(self.0))
    }
}

impl TryFrom<u8> for ScrubHours {
    type Error = String;

    fn try_from(hours: u8) -> Result<Self, String> {
        if (1..=168).contains(&hours) { Ok(Self(hours)) } else { Err(format!("`{hours}` is not 1 to 168 hours")) }
    }
}

const fn default_scrub_hours() -> ScrubHours {
    ScrubHours(24)
}

/// `[retention]`: when keys that are out of use are destroyed (I3).
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionSection {
    /// Days, 1 to 36,525. Default: 90. A development island may have 0.
    #[serde(deserialize_with = "retention_days")]
    pub days: Retention,
}

impl Default for RetentionSection {
    fn default() -> Self {
        Self { days: Retention::DEFAULT }
    }
}

/// By how many counters a restore raises each invocation counter, 1 to 2³¹.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct CounterJumpSetting(NonZeroU32);

impl CounterJumpSetting {
    /// The number of counters.
    pub const fn counters(self) -> NonZeroU32 {
        self.0
    }
}

impl Default for CounterJumpSetting {
    fn default() -> Self {
        Self(RestoreSettings::DEFAULT_COUNTER_JUMP)
    }
}

impl TryFrom<u32> for CounterJumpSetting {
    type Error = String;

    fn try_from(counters: u32) -> Result<Self, String> {
        let refuse = || format!("`{counters}` is not 1 to 2147483648 counters");
        NonZeroU32::new(counters).filter(|jump| jump.get() <= 1 << 31).map(Self).ok_or_else(refuse)
    }
}

/// A section that names a directory.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectorySection {
    /// The directory.
    pub directory: Option<PathBuf>,
}

fn island_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IslandName, D::Error> {
    IslandName::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn retention_days<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Retention, D::Error> {
    Retention::from_days(u32::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7443))
}

#[cfg(test)]
mod tests {

    use super::*;

    const LEAST: &str = r#"
island = "north"
[tls]
certificate = "server.pem"
private_key = "server.key"
client_ca = "ca.pem"
[storage]
sqlite = "island.db"
[[hsm.token]]
name = "main"
module = "/usr/lib/softhsm/libsofthsm2.so"
label = "north"
pin = { file = "pin" }
"#;

    #[test]
    fn the_least_configuration_has_safe_defaults() {
        let config = Config::parse(LEAST).unwrap();
        assert_eq!(config.listen, default_listen());
        assert_eq!(config.retention.days.days(), 90);
        assert!(!config.allow_development_island && !config.hsm.allow_cbc_expand);
        for class in [KeyClass::Kek, KeyClass::Session, KeyClass::Authentication, KeyClass::Ca] {
            assert_eq!(config.hsm.token_of(class).unwrap().name, "main");
        }
    }

    #[test]
    fn the_documented_example_is_accepted() {
        Config::parse(include_str!("../../../docs/kms-server.toml")).unwrap();
    }

    #[test]
    fn slips_are_refused() {
        let token = "[[hsm.token]]\nname = \"second\"\nmodule = \"m\"\nlabel = \"l\"\npin = { env = \"PIN\" }\n";
        let cases = [
            (format!("{LEAST}[enrolment]\n"), "listen"),
            (format!("{LEAST}[enrolment]\nlisten = \"127.0.0.1:7444\"\nserver = \"kms\"\n"), "[enrolment] server"),
            (
                format!("{LEAST}{token}[hsm.classes]\nsession = \"main\"\n[enrolment]\nlisten = \"127.0.0.1:7444\"\n"),
                "`hsm.classes.ca`",
            ),
            (LEAST.replace("island =", "iland ="), "iland"),
            (LEAST.replace("island = \"north\"", "island = \"North\""), "island"),
            (LEAST.replace("sqlite = \"island.db\"", ""), "storage"),
            (format!("counter_jump = 0\n{LEAST}"), "counter_jump"),
            (format!("{LEAST}[limits]\ncounters_per_hour = 999999\n"), "counters_per_hour"),
            (format!("counter_jump = 2147483649\n{LEAST}"), "counter_jump"),
            (LEAST.replace("pin = { file = \"pin\" }", "pin = \"1234\""), "pin"),
            (LEAST.replace("pin = { file = \"pin\" }", "pin = { file = \"a\", env = \"B\" }"), "pin"),
            (format!("{LEAST}{token}"), "[hsm.classes]"),
            (format!("{LEAST}{token}[hsm.classes]\nkek = \"third\"\n"), "`third`"),
            (format!("{LEAST}[limits]\nconnections = 0\n"), "connections"),
            (format!("{LEAST}[retention]\ndays = 36526\n"), "retention"),
            (format!("{LEAST}[retention]\ndays = -1\n"), "days"),
            (format!("{LEAST}[telemetry]\notlp = \"x\"\n"), "otlp"),
            (format!("{LEAST}[telemetry]\ntrace_ratio = 1.5\n"), "not 0 to 1"),
            (format!("{LEAST}[telemetry]\nmetrics_seconds = 0\n"), "not 1 to 3,600"),
            (
                LEAST.replace("sqlite = \"island.db\"", "[storage.postgres]\nurl = \"postgres://kms:secret@db/kms\""),
                "holds a password",
            ),
            (LEAST.replace("sqlite = \"island.db\"", "[storage.postgres]\nurl = \"mysql://kms@db/kms\""), "url"),
        ];
        for (text, expected) in cases {
            let reason = Config::parse(&text).unwrap_err();
            assert!(reason.contains(expected), "{expected}: {reason}");
            assert!(!reason.contains("secret@"), "{reason}");
        }
    }

    #[test]
    fn the_watermark_is_beside_a_sqlite_database_unless_it_is_elsewhere() {
        let restore = Config::parse(LEAST).unwrap().restore();
        assert_eq!((restore.watermark, restore.counter_jump.get()), (Some("island.db.watermark".into()), 1 << 24));
        let elsewhere =
            Config::parse(&format!("watermark = \"/other/disk\"\ncounter_jump = 5\n{LEAST}")).unwrap().restore();
        assert_eq!((elsewhere.watermark, elsewhere.counter_jump.get()), (Some("/other/disk".into()), 5));
    }

    #[test]
    fn classes_may_live_in_tokens_of_their_own() {
        let token = "[[hsm.token]]\nname = \"second\"\nmodule = \"m\"\nlabel = \"l\"\npin = { env = \"PIN\" }\n";
        let config =
            Config::parse(&format!("{LEAST}{token}[hsm.classes]\nsession = \"second\"\nauthentication = \"second\"\n"))
                .unwrap();
        assert_eq!(config.hsm.token_of(KeyClass::Session).unwrap().name, "second");
        assert!(config.hsm.token_of(KeyClass::Kek).is_none(), "a class without a token is not served");
    }
}
