//! The configuration file of `kms-server run`: strict TOML. What is not known is refused, so that a
//! slip of the pen is not a setting that silently does nothing. `docs/kms-server.toml` is a
//! commented example.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kms_domain::{IslandName, KeyClass, Retention};
use kms_hsm::{Hsm, HsmError, PinMemory, PinSource, Token, TokenSelector, TokenSettings};
use kms_store::{DatabaseLocation, StoreConfig};
use serde::{Deserialize, Deserializer, de};
use zeroize::Zeroizing;

use kms_base::bounds::{Bound, Limits};
use kms_ledger::RestoreSettings;

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
    /// Accept an island that was made for development. Default: false; a production server refuses
    /// one.
    #[serde(default)]
    pub allow_development_island: bool,
    /// Every how many hours the log and all sealed rows are read and compared (I5), 1 to 168.
    /// Default: 24.
    #[serde(default = "default_scrub_hours")]
    pub scrub_hours: ScrubHours,
    /// When keys are destroyed.
    #[serde(default)]
    pub retention: RetentionSection,
    /// By how much a restored database raises every invocation counter (I4), 1 to 2³¹. Default: 2²⁴
    /// = 16,777,216.
    #[serde(default)]
    pub counter_jump: CounterJumpSetting,
    /// Where this server remembers up to where it has seen the log, so that an older database is
    /// noticed. Default: with SQLite the database's path with `.watermark`; with PostgreSQL none.
    pub watermark: Option<PathBuf>,
    /// Certificates of the listener.
    pub tls: TlsSection,
    /// The database.
    pub storage: StorageSection,
    /// The HSM tokens.
    pub hsm: HsmSection,
    /// The policies. Default: those that the server ships with.
    #[serde(default)]
    pub policies: DirectorySection,
    /// Device profiles besides those that the server ships with.
    #[serde(default)]
    pub device_profiles: DirectorySection,
    /// Logs, traces and metrics.
    #[serde(default)]
    pub telemetry: TelemetrySection,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
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

/// Counters by which a restore raises each, 1 to 2³¹.
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

/// `[tls]`: PEM files. They are read again when they change, and on SIGHUP.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// The server's certificate and its chain.
    pub certificate: PathBuf,
    /// Its private key; not readable by other users.
    pub private_key: PathBuf,
    /// The island's root certificate: clients are let in below it.
    pub client_ca: PathBuf,
    /// Revocation lists of the client CA. Default: none.
    #[serde(default)]
    pub client_crls: Vec<PathBuf>,
}

/// Where the listener's certificates are. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, followed by its chain without the root.
    pub certificate: PathBuf,
    /// The server's private key: PKCS#8, SEC 1 or PKCS#1. Not readable by other users.
    pub private_key: PathBuf,
    /// The island's client CA: only certificates below it are let in.
    pub client_ca: PathBuf,
    /// Certificate revocation lists of the client CA. May be empty: revocation acts per call
    /// anyhow, on the principal's row.
    pub client_crls: Vec<PathBuf>,
}

impl From<TlsSection> for TlsFiles {
    fn from(section: TlsSection) -> Self {
        Self {
            certificate: section.certificate,
            private_key: section.private_key,
            client_ca: section.client_ca,
            client_crls: section.client_crls,
        }
    }
}

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
    /// The folder of the embedded database: a full disk there stops the log.
    pub fn disk(&self) -> Option<PathBuf> {
        let Self::Sqlite(path) = self else { return None };
        Some(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned())
    }

    /// How the store opens it.
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
    /// Where the password is. Default: none, for certificates or peer authentication.
    pub password: Option<SecretSource>,
    /// Connections at most. Default: 8.
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

/// `[hsm]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HsmSection {
    /// `[[hsm.token]]`, one for each token that this server may log in to.
    #[serde(rename = "token")]
    pub tokens: Vec<TokenSection>,
    /// `[hsm.classes]`: which token holds which key class. May be left out where there is one
    /// token.
    #[serde(default)]
    pub classes: Option<ClassesSection>,
    /// Permit the envelope algorithm `ecdh-p256-cbc-expand` for a module that offers only CKD_NULL.
    /// Default: false; not for production.
    #[serde(default)]
    pub allow_cbc_expand: bool,
}

/// `[[hsm.token]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenSection {
    /// A name for this file, that `[hsm.classes]` uses.
    pub name: String,
    /// Path of the PKCS#11 module.
    pub module: PathBuf,
    /// The token's label.
    pub label: String,
    /// The token's serial number, where several tokens have one label.
    pub serial: Option<String>,
    /// `pin = { file = "PATH" }` or `pin = { env = "NAME" }`. Never in this file or on the command
    /// line.
    pub pin: SecretSource,
    /// Worker threads. Default: what was measured to be best for the module.
    pub workers: Option<usize>,
}

impl TokenSection {
    /// Which token of the module it is.
    pub fn selector(&self) -> TokenSelector {
        TokenSelector { label: self.label.clone(), serial: self.serial.clone() }
    }

    /// How the HSM room uses the token.
    pub fn settings(&self, limits: &Limits, allow_cbc_expand: bool) -> TokenSettings {
        let pin = match &self.pin {
            SecretSource::File(path) => PinSource::File(path.clone()),
            SecretSource::Env(name) => PinSource::Environment(name.clone()),
        };
        let defaults = TokenSettings::new(self.module.clone(), self.label.clone(), pin);
        TokenSettings {
            selector: self.selector(),
            workers: self.workers,
            queue: limits.number(Bound::HsmJobs),
            queue_of_one: limits.number(Bound::HsmJobsPerPrincipal),
            allow_cbc_expand,
            ..defaults
        }
    }
}

/// `[hsm.classes]`: the name of a token for each class. A class that is left out is not served: a
/// server for grants names no token for `kek` and `ca`, and cannot even log in there.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassesSection {
    /// Master keys.
    pub kek: Option<String>,
    /// Encryption keys.
    pub session: Option<String>,
    /// Authentication keys, dedicated keys and secrets.
    pub authentication: Option<String>,
    /// The certification authority and the audit key.
    pub ca: Option<String>,
}

impl HsmSection {
    /// The token of a class; none if this server does not serve the class.
    pub fn token_of(&self, class: KeyClass) -> Option<&TokenSection> {
        let Some(classes) = &self.classes else {
            return self.tokens.first();
        };
        let name = match class {
            KeyClass::Kek => &classes.kek,
            KeyClass::Session => &classes.session,
            KeyClass::Authentication => &classes.authentication,
            KeyClass::Ca => &classes.ca,
        };
        let name = name.as_ref()?;
        self.tokens.iter().find(|token| token.name == *name)
    }

    /// Starts to use the tokens. Returns at once: a dead HSM does not hold up the start. The first
    /// token in the file is the general one: it has the seal root.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn start(&self, island: &IslandName, limits: &Limits, memory: Arc<dyn PinMemory>) -> Result<Hsm, HsmError> {
        let mut started = HashMap::new();
        let mut general = None;
        for section in &self.tokens {
            let token =
                Token::start(section.settings(limits, self.allow_cbc_expand), island.clone(), Arc::clone(&memory))?;
            general.get_or_insert_with(|| token.clone());
            started.insert(section.name.as_str(), token);
        }
        let general = general
            .ok_or_else(|| HsmError::InvalidInput { what: "hsm.token", reason: "no token is configured".to_owned() })?;
        let classes = [KeyClass::Kek, KeyClass::Session, KeyClass::Authentication, KeyClass::Ca];
        let tokens = classes
            .into_iter()
            .filter_map(|class| Some((class, started.get(self.token_of(class)?.name.as_str())?.clone())))
            .collect();
        Ok(Hsm::of_tokens(island.clone(), general, tokens))
    }

    fn check(&self) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Err("[[hsm.token]]: at least one token is needed".to_owned());
        }
        for (at, token) in self.tokens.iter().enumerate() {
            if self.tokens.iter().take(at).any(|earlier| earlier.name == token.name) {
                return Err(format!("[[hsm.token]]: the name `{}` is used twice", token.name));
            }
            if token.workers == Some(0) {
                return Err(format!("[[hsm.token]] `{}`: workers is 0; leave it out for the best number", token.name));
            }
        }
        match &self.classes {
            None if self.tokens.len() > 1 => {
                Err("[hsm.classes]: with several tokens, say which class is where".to_owned())
            }
            None => Ok(()),
            Some(classes) => {
                let named = [
                    ("kek", &classes.kek),
                    ("session", &classes.session),
                    ("authentication", &classes.authentication),
                    ("ca", &classes.ca),
                ];
                match named.into_iter().find_map(|(class, name)| {
                    Some((class, name.as_ref().filter(|name| !self.tokens.iter().any(|token| token.name == **name))?))
                }) {
                    Some((class, name)) => {
                        Err(format!("[hsm.classes] {class}: there is no [[hsm.token]] with the name `{name}`"))
                    }
                    None => Ok(()),
                }
            }
        }
    }
}

/// A section that names a directory.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectorySection {
    /// The directory.
    pub directory: Option<PathBuf>,
}

/// `[telemetry]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TelemetrySection {
    /// Which log lines are written to stderr, in the form of `tracing`'s filters. Default: `info`.
    /// The environment variable `KMS_LOG` overrides it.
    pub log: Option<String>,
    /// An OTLP (gRPC) endpoint for traces and metrics, such as `http://127.0.0.1:4317`. Default:
    /// none are sent.
    pub otlp_endpoint: Option<String>,
    /// Which part of the calls is traced, 0 to 1. Default: 0.01. A call that comes with a sampled
    /// `traceparent` is traced always.
    #[serde(default)]
    pub trace_ratio: TraceRatio,
    /// Every how many seconds metrics are sent, 1 to 3,600. Default: 60.
    #[serde(default)]
    pub metrics_seconds: MetricsSeconds,
}

/// A part of the whole, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "f64")]
pub struct TraceRatio(f64);

impl TraceRatio {
    /// The number.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl Default for TraceRatio {
    fn default() -> Self {
        Self(0.01)
    }
}

impl TryFrom<f64> for TraceRatio {
    type Error = String;

    fn try_from(ratio: f64) -> Result<Self, String> {
        if (0.0..=1.0).contains(&ratio) { Ok(Self(ratio)) } else { Err(format!("`{ratio}` is not 0 to 1")) }
    }
}

/// Seconds between two exports of metrics, 1 to 3,600.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u16")]
pub struct MetricsSeconds(u16);

impl MetricsSeconds {
    /// The time between two exports.
    pub fn period(self) -> Duration {
        Duration::from_secs(u64::from(self.0))
    }
}

impl Default for MetricsSeconds {
    fn default() -> Self {
        Self(60)
    }
}

impl TryFrom<u16> for MetricsSeconds {
    type Error = String;

    fn try_from(seconds: u16) -> Result<Self, String> {
        if (1..=3_600).contains(&seconds) {
            Ok(Self(seconds))
        } else {
            Err(format!("`{seconds}` is not 1 to 3,600 seconds"))
        }
    }
}

/// Where a secret is. It is never in the configuration itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum SecretSource {
    /// A file that its owner alone can read; one trailing line end is dropped.
    File(PathBuf),
    /// An environment variable.
    Env(String),
}

impl SecretSource {
    /// The value as a configuration file has it.
    pub fn to_toml(&self) -> String {
        match self {
            Self::File(path) => format!("{{ file = {} }}", toml::Value::String(path.display().to_string())),
            Self::Env(name) => format!("{{ env = {} }}", toml::Value::String(name.clone())),
        }
    }

    /// Reads the secret; `what` names it in errors.
    ///
    /// # Errors
    /// It cannot be read, others can read the file, or it is empty. Nothing of it is in the error.
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
            return Err(refuse("it is empty".to_owned()));
        }
        Ok(text)
    }
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

    /// How a restored database is found.
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
        if let StorageSection::Postgres(postgres) = &config.storage {
            let after_scheme =
                postgres.url.strip_prefix("postgres://").or_else(|| postgres.url.strip_prefix("postgresql://"));
            let after_scheme =
                after_scheme.ok_or("[storage.postgres] url: not of the form postgres://USER@HOST/DATABASE")?;
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
        }
        Ok(config)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration `{path}`: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file's content is refused.
    #[error("the configuration `{path}` is refused: {reason}")]
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

fn island_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IslandName, D::Error> {
    IslandName::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn retention_days<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Retention, D::Error> {
    Retention::from_days(u32::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7443))
}

const fn default_connections() -> u32 {
    8
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
