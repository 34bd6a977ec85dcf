//! `[tls]`: the certificates of the listener.

use std::path::PathBuf;

use serde::Deserialize;

/// `[tls]`: PEM files. They are read again when they change, and on SIGHUP.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// The server's certificate and its chain.
    pub certificate: PathBuf,
    /// Its private key. Other users must not be able to read it.
    pub private_key: PathBuf,
    /// The island's root certificate. Only client certificates below it are accepted.
    pub client_ca: PathBuf,
    /// Revocation lists of the client CA. Default: none.
    #[serde(default)]
    pub client_crls: Vec<PathBuf>,
}

/// The files of the listener's certificates. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, followed by its chain without the root.
    pub certificate: PathBuf,
    /// The server's private key: PKCS#8, SEC 1 or PKCS#1. Other users must not be able to read it.
    pub private_key: PathBuf,
    /// The island's client CA. Only client certificates below it are accepted.
    pub client_ca: PathBuf,
    /// Certificate revocation lists of the client CA. May be empty: each call checks the
    /// principal's row anyway.
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
