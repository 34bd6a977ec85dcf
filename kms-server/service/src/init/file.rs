//! The ceremony file: one TOML file that people can review and sign before anything is made.
//! Unknown settings are refused.

use std::path::{Path, PathBuf};

use kms_domain::{IslandKind, IslandName, KeyClass, PersonName, PrincipalId, Role, SystemTitle};
use kms_hsm::TokenSelector;
use kms_store::{DatabaseLocation, StoreConfig};
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;
use serde::Deserialize;

use super::error::InitError;
use crate::certificate::request::CertificationRequest;
use crate::escrow::{Custodian, Quorum};
use kms_config::{SecretSource, StorageSection};

/// The checked content of a ceremony file. Every file that it names was read.
#[derive(Clone)]
pub struct CeremonyPlan {
    /// The island.
    pub island: IslandName,
    /// For production or for development.
    pub kind: IslandKind,
    /// DNS names and IP addresses of the servers.
    pub server_names: Vec<String>,
    /// The authority's token, which holds all roots.
    pub token: CeremonyToken,
    /// Tokens that get copies of roots: standby tokens and those of grant servers.
    pub copies: Vec<CopyToken>,
    /// How many custodians must act together.
    pub quorum: Quorum,
    /// The custodians.
    pub custodians: Vec<Custodian>,
    /// The first principals: officers, and in a development island others.
    pub principals: Vec<FirstPrincipal>,
    /// The database.
    pub storage: Storage,
}

/// A token of the ceremony.
#[derive(Clone, Debug)]
pub struct CeremonyToken {
    /// Path of the PKCS#11 module.
    pub module: PathBuf,
    /// Which token.
    pub selector: TokenSelector,
    /// The user PIN.
    pub pin: SecretSource,
    /// The security officer's PIN.
    pub so_pin: SecretSource,
    /// Whether to initialise the token if there is none with the label. PIN files that do not exist
    /// are then made, with random PINs.
    pub initialise: bool,
}

/// A token to which roots are copied.
#[derive(Clone, Debug)]
pub struct CopyToken {
    /// The token.
    pub token: CeremonyToken,
    /// Classes whose roots it gets.
    pub classes: Vec<KeyClass>,
}

/// A principal that the ceremony registers.
#[derive(Clone, Debug)]
pub struct FirstPrincipal {
    /// The principal.
    pub id: PrincipalId,
    /// The person behind an officer or auditor (I6).
    pub person: Option<PersonName>,
    /// Its TLS key.
    pub certification: CertificationRequest,
    /// Client system titles that it may use.
    pub client_titles: Vec<SystemTitle>,
}

/// The database of the island, and its section in the server's configuration.
#[derive(Clone, Debug)]
pub struct Storage {
    /// The settings with which the ceremony opens it.
    pub store: StoreConfig,
    /// The lines of the section `[storage]` of the server's configuration.
    pub section: String,
}

impl Storage {
    /// An SQLite database.
    pub fn sqlite(path: PathBuf) -> Self {
        let section = format!("[storage]\nsqlite = {}\n", toml::Value::String(path.display().to_string()));
        Self { store: StoreConfig::new(DatabaseLocation::Sqlite(path)), section }
    }
}

impl CeremonyPlan {
    /// Reads a ceremony file and all files that it names. Relative paths are relative to the file's
    /// folder. Without `[storage]`, the database is `island.db` in the state folder.
    ///
    /// # Errors
    /// A setting is missing, unknown or malformed; the error names it. Nothing was made.
    pub fn read(path: &Path, state: &Path) -> Result<Self, InitError> {
        let refuse = |reason: String| InitError::Plan { path: path.to_owned(), reason };
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        // The paths are made absolute: the server's configuration names them, and the server runs
        // in another folder.
        let absolute =
            |path: &Path| std::path::absolute(path).map_err(|error| refuse(format!("`{}`: {error}", path.display())));
        let (path, state) = (absolute(path)?, absolute(state)?);
        Self::parse(&text, path.parent().unwrap_or(&path), &state).map_err(refuse)
    }

    pub(super) fn parse(text: &str, folder: &Path, state: &Path) -> Result<Self, String> {
        let file: CeremonyFile = toml::from_str(text).map_err(|error| error.to_string())?;
        let island = IslandName::parse(&file.island).map_err(|error| error.to_string())?;
        let kind = match file.kind {
            KindSetting::Production => IslandKind::Production,
            KindSetting::Development => IslandKind::Development,
        };
        if file.server.names.is_empty() {
            return Err("[server] names: a server needs at least one DNS name or IP address".to_owned());
        }
        let quorum =
            Quorum::new(file.escrow.needed, file.escrow.custodians.len()).map_err(|error| error.to_string())?;
        let custodians =
            file.escrow.custodians.iter().map(|custodian| custodian.read(folder)).collect::<Result<Vec<_>, _>>()?;
        // I6: two people must be able to act from the first day.
        if kind == IslandKind::Production && file.officers.len() < 2 {
            return Err(
                "[[officer]]: at least two officers are needed, because dangerous actions take two people".to_owned()
            );
        }
        let principals =
            file.officers.iter().map(|officer| officer.read(&island, folder)).collect::<Result<Vec<_>, _>>()?;
        for (at, officer) in principals.iter().enumerate() {
            let same_person = |earlier: &FirstPrincipal| {
                earlier.person.iter().zip(&officer.person).any(|(one, other)| one.is_same(other))
            };
            let same = |earlier: &FirstPrincipal| {
                earlier.id == officer.id || same_person(earlier) || earlier.certification == officer.certification
            };
            if principals.iter().take(at).any(same) {
                return Err(format!(
                    "[[officer]] `{}`: name, person or key is used twice; officers are distinct people",
                    officer.id.name()
                ));
            }
        }
        let copies = file.copies.iter().map(|copy| copy.read(folder)).collect::<Result<Vec<_>, _>>()?;
        let storage = match file.storage {
            None => Storage::sqlite(state.join("island.db")),
            Some(StorageSection::Sqlite(path)) => Storage::sqlite(folder.join(path)),
            Some(StorageSection::Postgres(mut postgres)) => {
                postgres.password = postgres.password.map(|source| beside(folder, &source));
                let password = match &postgres.password {
                    None => String::new(),
                    Some(source) => format!("password = {}\n", source.to_toml()),
                };
                let section =
                    format!("[storage.postgres]\nurl = {}\n{password}", toml::Value::String(postgres.url.clone()));
                Storage {
                    store: StorageSection::Postgres(postgres).store().map_err(|error| error.to_string())?,
                    section,
                }
            }
        };
        Ok(Self {
            island,
            kind,
            server_names: file.server.names,
            token: file.token.read(folder)?,
            copies,
            quorum,
            custodians,
            principals,
            storage,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CeremonyFile {
    island: String,
    kind: KindSetting,
    server: ServerSetting,
    token: TokenSetting,
    #[serde(default, rename = "copy")]
    copies: Vec<CopySetting>,
    escrow: EscrowSetting,
    #[serde(default, rename = "officer")]
    officers: Vec<OfficerSetting>,
    storage: Option<StorageSection>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum KindSetting {
    Production,
    Development,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerSetting {
    names: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenSetting {
    module: PathBuf,
    label: String,
    serial: Option<String>,
    pin: SecretSource,
    so_pin: SecretSource,
    #[serde(default)]
    initialise: bool,
}

impl TokenSetting {
    fn read(&self, folder: &Path) -> Result<CeremonyToken, String> {
        if self.pin == self.so_pin {
            return Err(format!(
                "token `{}`: user PIN and security officer's PIN come from one source; they must differ",
                self.label
            ));
        }
        Ok(CeremonyToken {
            // The loader searches for a bare name.
            module: if self.module.components().count() > 1 { folder.join(&self.module) } else { self.module.clone() },
            selector: TokenSelector { label: self.label.clone(), serial: self.serial.clone() },
            pin: beside(folder, &self.pin),
            so_pin: beside(folder, &self.so_pin),
            initialise: self.initialise,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CopySetting {
    token: TokenSetting,
    /// kek, session, authentication. The CA key is in one token and is never copied.
    classes: Vec<String>,
}

impl CopySetting {
    fn read(&self, folder: &Path) -> Result<CopyToken, String> {
        let class = |name: &String| {
            KeyClass::WITH_ROOTS
                .into_iter()
                .find(|class| class.name() == name)
                .ok_or_else(|| format!("[[copy]] classes: `{name}` is not kek, session or authentication"))
        };
        let classes = self.classes.iter().map(class).collect::<Result<Vec<_>, _>>()?;
        if classes.is_empty() {
            return Err("[[copy]] classes: a token without roots serves nothing".to_owned());
        }
        Ok(CopyToken { token: self.token.read(folder)?, classes })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EscrowSetting {
    needed: usize,
    #[serde(default, rename = "custodian")]
    custodians: Vec<CustodianSetting>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CustodianSetting {
    name: String,
    /// PEM of an RSA public key (`openssl pkey -pubout`).
    public_key: PathBuf,
}

impl CustodianSetting {
    fn read(&self, folder: &Path) -> Result<Custodian, String> {
        let path = folder.join(&self.public_key);
        let spki = SubjectPublicKeyInfoDer::from_pem_file(&path).map_err(|error| {
            format!("[[escrow.custodian]] `{}`: `{}` is no public key in PEM: {error}", self.name, path.display())
        })?;
        Custodian::new(&self.name, &spki).map_err(|error| error.to_string())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfficerSetting {
    name: String,
    person: String,
    /// PEM of a PKCS#10 request (`openssl req -new`).
    certificate_request: PathBuf,
}

impl OfficerSetting {
    fn read(&self, island: &IslandName, folder: &Path) -> Result<FirstPrincipal, String> {
        let refuse = |reason: String| format!("[[officer]] `{}`: {reason}", self.name);
        let path = folder.join(&self.certificate_request);
        let pem = std::fs::read(&path).map_err(|error| refuse(format!("`{}`: {error}", path.display())))?;
        Ok(FirstPrincipal {
            id: PrincipalId::new(island.clone(), Role::Officer, &self.name)
                .map_err(|error| refuse(error.to_string()))?,
            person: Some(PersonName::parse(&self.person).map_err(|error| refuse(error.to_string()))?),
            certification: CertificationRequest::parse_pem(&pem).map_err(|error| refuse(error.to_string()))?,
            client_titles: Vec::new(),
        })
    }
}

/// A secret's file, relative to the ceremony file's folder.
fn beside(folder: &Path, source: &SecretSource) -> SecretSource {
    match source {
        SecretSource::File(path) => SecretSource::File(folder.join(path)),
        SecretSource::Env(name) => SecretSource::Env(name.clone()),
    }
}
