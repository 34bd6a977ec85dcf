//! An identity on disk.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{PrincipalId, TransportKey, TransportKeyError};

/// A directory with what one principal needs to talk to one server: `profile.toml`, which names the
/// server and the files beside it, the island's CA certificate, the principal's TLS certificate and
/// key, and, where registered, its transport key and certificate.
///
/// Private keys are PEM files that only their owner may read (mode 0600); others are refused.
#[derive(Clone, Debug)]
pub struct Profile {
    directory: PathBuf,
    settings: Settings,
}

/// `profile.toml`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// `host:port`.
    server: String,
    /// The name that the server's certificate must carry.
    server_name: String,
    /// The principal of the profile, for people only: the certificate decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    principal: Option<String>,
    #[serde(default = "ca")]
    ca: PathBuf,
    #[serde(default = "certificate")]
    certificate: PathBuf,
    #[serde(default = "key")]
    key: PathBuf,
    #[serde(default = "transport_certificate")]
    transport_certificate: PathBuf,
    #[serde(default = "transport_key")]
    transport_key: PathBuf,
}

impl Profile {
    /// Reads `profile.toml` of a directory. The keys are read when they are needed.
    ///
    /// # Errors
    /// The file is not there or not well formed.
    pub fn load(directory: impl Into<PathBuf>) -> Result<Self, ProfileError> {
        let directory = directory.into();
        let path = directory.join(SETTINGS_FILE);
        let text = fs::read_to_string(&path).map_err(|error| ProfileError::read(&path, error))?;
        let settings = toml::from_str::<Settings>(&text)
            .map_err(|error| ProfileError::Content { path: path.clone(), reason: error.message().to_owned() })?;
        if settings.server.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
            return Err(ProfileError::Content {
                path,
                reason: format!("server: `{}` is not host:port", settings.server),
            });
        }
        Ok(Self { directory, settings })
    }

    /// Writes a new profile directory (mode 0700, private keys 0600). Existing files of the same
    /// names are replaced.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn create(directory: impl Into<PathBuf>, new: &NewProfile<'_>) -> Result<Self, ProfileError> {
        let directory = directory.into();
        create_private_directory(&directory).map_err(|error| ProfileError::write(&directory, error))?;
        let settings = Settings {
            server: new.server.to_owned(),
            server_name: new.server_name.to_owned(),
            principal: Some(new.principal.to_string()),
            ca: ca(),
            certificate: certificate(),
            key: key(),
            transport_certificate: transport_certificate(),
            transport_key: transport_key(),
        };
        let profile = Self { directory, settings };
        profile.write(&profile.settings.ca, new.ca_pem.as_bytes())?;
        profile.renew(new.key_pem, new.certificate_pem)?;
        profile.write_settings(&profile.settings)?;
        Ok(profile)
    }

    /// Puts a new TLS key and certificate (PEM) into the profile.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn renew(&self, key_pem: &str, certificate_pem: &str) -> Result<(), ProfileError> {
        self.write(&self.settings.key, key_pem.as_bytes())?;
        self.write(&self.settings.certificate, certificate_pem.as_bytes())
    }

    /// Sets the server's address, `host:port`.
    ///
    /// # Errors
    /// `profile.toml` cannot be written.
    pub fn set_server(&self, server: &str) -> Result<(), ProfileError> {
        self.write_settings(&Settings { server: server.to_owned(), ..self.settings.clone() })
    }

    /// Puts a transport key and its certificate (PEM) into the profile.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn set_transport_key(&self, key_pem: &str, certificate_pem: &str) -> Result<(), ProfileError> {
        self.write(&self.settings.transport_key, key_pem.as_bytes())?;
        self.write(&self.settings.transport_certificate, certificate_pem.as_bytes())
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The server, `host:port`.
    pub fn server(&self) -> &str {
        &self.settings.server
    }

    /// The name that the server's certificate must carry.
    ///
    /// # Errors
    /// The name is neither a DNS name nor an IP address.
    pub fn server_name(&self) -> Result<ServerName<'static>, ProfileError> {
        let reason = || format!("server_name: `{}` is neither a DNS name nor an IP address", self.settings.server_name);
        ServerName::try_from(self.settings.server_name.clone())
            .map_err(|_| ProfileError::Content { path: self.directory.join(SETTINGS_FILE), reason: reason() })
    }

    /// `server_name` as it stands in the file.
    pub fn server_name_text(&self) -> &str {
        &self.settings.server_name
    }

    /// The island's CA certificates, PEM.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn ca_pem(&self) -> Result<String, ProfileError> {
        let path = self.directory.join(&self.settings.ca);
        fs::read_to_string(&path).map_err(|error| ProfileError::read(&path, error))
    }

    /// Whether the profile has a transport key.
    pub fn has_transport_key(&self) -> bool {
        self.directory.join(&self.settings.transport_key).exists()
    }

    /// The transport key.
    ///
    /// # Errors
    /// The transport key is missing, not readable, readable by others, or malformed.
    pub fn transport_key(&self) -> Result<TransportKey, ProfileError> {
        if !self.has_transport_key() {
            return Err(ProfileError::NoTransportKey { directory: self.directory.clone() });
        }
        let key = self.read_private(&self.settings.transport_key)?;
        let path = self.directory.join(&self.settings.transport_certificate);
        let certificate = fs::read(&path).map_err(|error| ProfileError::read(&path, error))?;
        TransportKey::from_pem(&key, &certificate)
            .map_err(|error| ProfileError::TransportKey { directory: self.directory.clone(), error })
    }

    /// The end of the profile's TLS certificate, in milliseconds since 1970; `None`: no certificate
    /// can be read.
    pub fn certificate_not_after_ms(&self) -> Option<i64> {
        use x509_parser::prelude::FromDer as _;
        let chain = self.certificate_chain().ok()?;
        let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(chain.first()?).ok()?;
        Some(certificate.validity().not_after.timestamp().saturating_mul(1000))
    }

    /// Whether this certificate (DER) is one of the island's CA certificates in this profile.
    ///
    /// # Errors
    /// The file cannot be read or holds no certificate.
    pub fn trusts(&self, certificate: &[u8]) -> Result<bool, ProfileError> {
        Ok(self.ca_certificates()?.iter().any(|known| known.as_ref() == certificate))
    }

    pub(crate) fn ca_certificates(&self) -> Result<Vec<CertificateDer<'static>>, ProfileError> {
        self.certificates(&self.settings.ca)
    }

    pub(crate) fn certificate_chain(&self) -> Result<Vec<CertificateDer<'static>>, ProfileError> {
        self.certificates(&self.settings.certificate)
    }

    pub(crate) fn private_key(&self) -> Result<PrivateKeyDer<'static>, ProfileError> {
        let pem = self.read_private(&self.settings.key)?;
        PrivateKeyDer::from_pem_slice(&pem).map_err(|_| ProfileError::Content {
            path: self.directory.join(&self.settings.key),
            reason: "this is not a private key in PEM".into(),
        })
    }

    fn certificates(&self, name: &Path) -> Result<Vec<CertificateDer<'static>>, ProfileError> {
        let path = self.directory.join(name);
        let pem = fs::read(&path).map_err(|error| ProfileError::read(&path, error))?;
        match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            _ => Err(ProfileError::Content { path, reason: "this is not a certificate in PEM".into() }),
        }
    }

    fn read_private(&self, name: &Path) -> Result<Zeroizing<Vec<u8>>, ProfileError> {
        let path = self.directory.join(name);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let metadata = fs::metadata(&path).map_err(|error| ProfileError::read(&path, error))?;
            let mode = metadata.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                return Err(ProfileError::Exposed { path, mode });
            }
        }
        fs::read(&path).map(Zeroizing::new).map_err(|error| ProfileError::read(&path, error))
    }

    fn write_settings(&self, settings: &Settings) -> Result<(), ProfileError> {
        let path = Path::new(SETTINGS_FILE);
        let text = toml::to_string(settings)
            .map_err(|error| ProfileError::Content { path: self.directory.join(path), reason: error.to_string() })?;
        self.write(path, text.as_bytes())
    }

    fn write(&self, name: &Path, content: &[u8]) -> Result<(), ProfileError> {
        let path = self.directory.join(name);
        write_private_file(&path, content).map_err(|error| ProfileError::write(&path, error))
    }
}

/// The folder that tools keep profiles in, `.kms` unless told otherwise: `profiles/NAME/` for each,
/// and `default-profile` with the name of the one to use.
#[derive(Clone, Debug)]
pub struct StateDirectory(PathBuf);

impl StateDirectory {
    /// The folder at a path; it need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory of a profile.
    pub fn profile_directory(&self, name: &str) -> PathBuf {
        self.0.join("profiles").join(name)
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// As [`Profile::load`].
    pub fn profile(&self, name: &str) -> Result<Profile, ProfileError> {
        Profile::load(self.profile_directory(name))
    }

    /// The names of all profiles, sorted.
    pub fn profile_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.join("profiles")).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter(|entry| entry.path().join(SETTINGS_FILE).exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The name of the profile that is used by default.
    pub fn default_profile(&self) -> Option<String> {
        let text = fs::read_to_string(self.0.join(DEFAULT_PROFILE_FILE)).ok()?;
        Some(text.trim().to_owned()).filter(|name| !name.is_empty())
    }

    /// Sets the profile that is used by default.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_default_profile(&self, name: &str) -> Result<(), ProfileError> {
        let path = self.0.join(DEFAULT_PROFILE_FILE);
        create_private_directory(&self.0)
            .and_then(|()| write_private_file(&path, format!("{name}\n").as_bytes()))
            .map_err(|error| ProfileError::write(&path, error))
    }
}

/// The content of a new profile.
#[derive(Clone, Copy, Debug)]
pub struct NewProfile<'a> {
    /// `host:port`.
    pub server: &'a str,
    /// The name in the server's certificate.
    pub server_name: &'a str,
    /// The principal of the profile.
    pub principal: &'a PrincipalId,
    /// The island's CA certificates, PEM.
    pub ca_pem: &'a str,
    /// The TLS certificate and its issuers, PEM, leaf first.
    pub certificate_pem: &'a str,
    /// The TLS key, PKCS#8 PEM.
    pub key_pem: &'a str,
}

impl NewProfile<'_> {
    /// The server's address as `host:port`.
    pub fn address(address: std::net::SocketAddr) -> String {
        address.to_string()
    }
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// A file cannot be read.
    #[error("cannot read `{}`: {error}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write `{}`: {error}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// The content of a file is wrong.
    #[error("`{}`: {reason}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Other users can read a private key.
    #[error("`{}` can be read by other users (mode {mode:04o}): `chmod 600` it, and renew the key if others could have read it", .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No transport key was registered.
    #[error("no transport key in `{}`: make and register one with `kms principal register-transport-key`", .directory.display())]
    NoTransportKey {
        /// The profile's directory.
        directory: PathBuf,
    },
    /// The transport key or certificate is not usable.
    #[error("`{}`: {error}", .directory.display())]
    TransportKey {
        /// The profile's directory.
        directory: PathBuf,
        /// Why.
        error: TransportKeyError,
    },
}

impl ProfileError {
    fn read(path: &Path, error: io::Error) -> Self {
        Self::Read { path: path.to_owned(), error }
    }

    fn write(path: &Path, error: io::Error) -> Self {
        Self::Write { path: path.to_owned(), error }
    }
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write_private_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600);
    }
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = options.open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt as _;
        builder.mode(0o700);
    }
    builder.create(path)
}

fn ca() -> PathBuf {
    "ca.pem".into()
}

fn certificate() -> PathBuf {
    "certificate.pem".into()
}

fn key() -> PathBuf {
    "key.pem".into()
}

fn transport_certificate() -> PathBuf {
    "transport-certificate.pem".into()
}

fn transport_key() -> PathBuf {
    "transport-key.pem".into()
}

const SETTINGS_FILE: &str = "profile.toml";
const DEFAULT_PROFILE_FILE: &str = "default-profile";

#[cfg(test)]
mod tests {
    use super::*;

    fn new_profile<'a>(principal: &'a PrincipalId) -> NewProfile<'a> {
        NewProfile {
            server: "127.0.0.1:7460",
            server_name: "localhost",
            principal,
            ca_pem: "ca",
            certificate_pem: "leaf",
            key_pem: "key",
        }
    }

    #[test]
    #[cfg(unix)]
    fn a_private_key_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let principal = PrincipalId::parse("urn:meterkms:north:officer:ada").unwrap();
        let profile = Profile::create(directory.path().join("ada"), &new_profile(&principal)).unwrap();
        let key = profile.directory().join("key.pem");
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(profile.private_key(), Err(ProfileError::Exposed { mode: 0o640, .. })));
    }

    #[test]
    fn a_profile_comes_back_and_mistakes_in_it_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let principal = PrincipalId::parse("urn:meterkms:north:officer:ada").unwrap();
        Profile::create(directory.path(), &new_profile(&principal)).unwrap();
        let profile = Profile::load(directory.path()).unwrap();
        assert_eq!(
            (profile.server(), profile.server_name_text(), profile.has_transport_key()),
            ("127.0.0.1:7460", "localhost", false)
        );
        assert!(profile.transport_key().unwrap_err().to_string().contains("register-transport-key"));
        for (text, named) in [
            ("server = 'x'\nserver_name = 'y'", "server"),
            ("server_name = 'y'", "server"),
            ("server='a:1'\nserver_name='y'\nport=3", "port"),
        ] {
            fs::write(directory.path().join(SETTINGS_FILE), text).unwrap();
            let error = Profile::load(directory.path()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
