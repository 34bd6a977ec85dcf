//! TLS of the gRPC listener: mutual TLS 1.3, hybrid key exchange first, certificates reloaded
//! without a restart.
//!
//! Sources: RFC 8446; X25519MLKEM768 of draft-ietf-tls-ecdhe-mlkem; RFC 5280 for peer certificates.

use async_recursion::async_recursion as boxed;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use kms_authz::PeerCertificateError;
use kms_config::TlsFiles;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use tokio::signal::unix::{SignalKind, signal};

/// The TLS configuration in use. [`Self::reload`] replaces it. A handshake under way ends with the
/// configuration that it began with.
pub struct ServerTls {
    files: TlsFiles,
    current: ArcSwap<Configurations>,
}

/// The same certificate for both listeners.
struct Configurations {
    /// Mutual TLS.
    mutual: Arc<ServerConfig>,
    /// For devices that have no certificate yet. The chain ends with the root, which they know only
    /// by its digest.
    strangers: Arc<ServerConfig>,
}

impl ServerTls {
    /// Loads the files.
    ///
    /// # Errors
    /// A file cannot be read or has other content, or the files do not belong together.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let current = ArcSwap::from_pointee(files.configurations()?);
        Ok(Self { files, current })
    }

    /// The configuration for the next handshake.
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().mutual)
    }

    /// The configuration for the next handshake at the enrolment door, without a client
    /// certificate.
    pub(crate) fn current_for_strangers(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().strangers)
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// As [`Self::load`]; then the configuration in use stays.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.current.store(Arc::new(self.files.configurations()?));
        Ok(())
    }

    /// Reloads when a file has changed or the process gets SIGHUP. A change that cannot be loaded
    /// is logged and tried again: files are often replaced one after the other. Never returns; drop
    /// the future to end it.
    #[boxed]
    pub async fn watch(&self) {
        let mut hang_up = signal(SignalKind::hangup()).ok();
        let mut seen = self.files.stamps();
        loop {
            let asked = async {
                match &mut hang_up {
                    Some(hang_up) => drop(hang_up.recv().await),
                    None => std::future::pending().await,
                }
            };
            let forced = tokio::select! {
                () = asked => true,
                () = tokio::time::sleep(WATCH_INTERVAL) => false,
            };
            let now = self.files.stamps();
            if !forced && now == seen {
                continue;
            }
            match self.reload() {
                Ok(()) => {
                    seen = now;
                    tracing::info!("TLS certificates reloaded");
                }
                Err(error) => {
                    tracing::error!(%error, "the changed TLS files cannot be used; the earlier ones stay in use")
                }
            }
        }
    }
}

/// The files of a configuration, as TLS reads them.
trait Readable {
    fn configurations(&self) -> Result<Configurations, TlsError>;
    /// The values that change when a file is replaced: modification time, length and inode.
    fn stamps(&self) -> Vec<Option<Stamp>>;
}

type Stamp = (std::time::SystemTime, u64, u64);

impl Readable for TlsFiles {
    fn configurations(&self) -> Result<Configurations, TlsError> {
        let chain = read_pem::<CertificateDer<'static>>(&self.certificate, "certificate")?;
        refuse_foreign_readers(&self.private_key)?;
        let key = PrivateKeyDer::from_pem_file(&self.private_key)
            .map_err(|error| TlsError::read(&self.private_key, "private key", error))?;
        let mut roots = RootCertStore::empty();
        let authorities = read_pem::<CertificateDer<'static>>(&self.client_ca, "client CA certificate")?;
        for certificate in authorities.iter().cloned() {
            roots.add(certificate).map_err(|error| TlsError::unusable(&self.client_ca, error))?;
        }
        let provider = Arc::new(provider());
        let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        for path in &self.client_crls {
            verifier = verifier
                .with_crls(read_pem::<CertificateRevocationListDer<'static>>(path, "certificate revocation list")?);
        }
        if !self.client_crls.is_empty() {
            verifier = verifier.only_check_end_entity_revocation().enforce_revocation_expiration();
        }
        let verifier = verifier.build().map_err(|error| TlsError::unusable(&self.client_ca, error))?;
        let mut whole_chain = chain.clone();
        whole_chain.extend(authorities.into_iter().filter(|authority| !chain.contains(authority)));
        let builder = || {
            ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(|error| TlsError::unusable(&self.certificate, error))
        };
        let finished = |config: Result<ServerConfig, rustls::Error>| {
            let mut config = config.map_err(|error| TlsError::unusable(&self.certificate, error))?;
            config.alpn_protocols = vec![b"h2".to_vec()];
            // No resumption: each connection proves its certificate against the present CA and
            // CRLs.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok::<_, TlsError>(Arc::new(config))
        };
        let mutual = builder()?.with_client_cert_verifier(verifier).with_single_cert(chain, key.clone_key());
        let strangers = builder()?.with_no_client_auth().with_single_cert(whole_chain, key);
        Ok(Configurations { mutual: finished(mutual)?, strangers: finished(strangers)? })
    }

    fn stamps(&self) -> Vec<Option<Stamp>> {
        use std::os::unix::fs::MetadataExt;
        [&self.certificate, &self.private_key, &self.client_ca]
            .into_iter()
            .chain(&self.client_crls)
            .map(|path| fs::metadata(path).ok().and_then(|file| Some((file.modified().ok()?, file.len(), file.ino()))))
            .collect()
    }
}

/// The provider of TLS cryptography: aws-lc-rs, TLS 1.3 suites only, the hybrid group first.
pub fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    }
}

/// Why the TLS files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or has other content.
    #[error("cannot read a {what} (PEM) from `{path}`: {reason}; check the path and the file's permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// A file's content cannot be used.
    #[error("the content of `{path}` cannot be used: {reason}; check the `[tls]` files and that they belong together")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The private key is readable by everyone.
    #[error("the private key `{path}` can be read by other users (mode {mode:o}); run `chmod 600 {path}`")]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A client's certificate names no principal.
    #[error(transparent)]
    PeerCertificate(#[from] PeerCertificateError),
}

impl TlsError {
    fn read(path: &Path, what: &'static str, error: rustls_pki_types::pem::Error) -> Self {
        let reason = match error {
            rustls_pki_types::pem::Error::Io(error) => error.to_string(),
            rustls_pki_types::pem::Error::NoItemsFound => format!("it has no {what}"),
            error => error.to_string(),
        };
        Self::Read { path: path.to_owned(), what, reason }
    }

    fn unusable(path: &Path, error: impl std::fmt::Display) -> Self {
        Self::Unusable { path: path.to_owned(), reason: error.to_string() }
    }
}

fn read_pem<T: PemObject>(path: &Path, what: &'static str) -> Result<Vec<T>, TlsError> {
    let items = T::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<T>, _>>)
        .map_err(|error| TlsError::read(path, what, error))?;
    if items.is_empty() {
        return Err(TlsError::read(path, what, rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(items)
}

fn refuse_foreign_readers(path: &Path) -> Result<(), TlsError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(path)
        .map_err(|error| TlsError::read(path, "private key", rustls_pki_types::pem::Error::Io(error)))?
        .permissions()
        .mode()
        & 0o777;
    if mode & 0o007 != 0 {
        return Err(TlsError::Permissions { path: path.to_owned(), mode });
    }
    Ok(())
}

/// How often the files are checked.
const WATCH_INTERVAL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    /// Stands for the island's authority.
    struct TestAuthority {
        root: rcgen::Certificate,
        issuer: Issuer<'static, KeyPair>,
    }

    impl TestAuthority {
        fn new() -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let root = params.self_signed(&key).unwrap();
            Self { root, issuer: Issuer::new(params, key) }
        }
    }

    fn write_server(authority: &TestAuthority, folder: &Path, key: &KeyPair) {
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let server = params.signed_by(key, &authority.issuer).unwrap();
        fs::write(folder.join("server.pem"), server.pem()).unwrap();
        fs::write(folder.join("server.key"), key.serialize_pem()).unwrap();
        fs::set_permissions(folder.join("server.key"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(folder.join("root.pem"), authority.root.pem()).unwrap();
    }

    fn files(folder: &Path) -> TlsFiles {
        TlsFiles {
            certificate: folder.join("server.pem"),
            private_key: folder.join("server.key"),
            client_ca: folder.join("root.pem"),
            client_crls: Vec::new(),
        }
    }

    #[test]
    fn a_reload_takes_what_fits_together_and_keeps_the_old_otherwise() {
        let (authority, folder) = (TestAuthority::new(), tempfile::tempdir().unwrap());
        write_server(&authority, folder.path(), &KeyPair::generate().unwrap());
        let tls = ServerTls::load(files(folder.path())).unwrap();
        let first = tls.current();
        // A key that is not the certificate's: half of a replacement.
        let next = KeyPair::generate().unwrap();
        fs::write(folder.path().join("server.key"), next.serialize_pem()).unwrap();
        assert!(matches!(tls.reload(), Err(TlsError::Unusable { .. })));
        assert!(Arc::ptr_eq(&first, &tls.current()));
        write_server(&authority, folder.path(), &next);
        tls.reload().unwrap();
        assert!(!Arc::ptr_eq(&first, &tls.current()));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let (authority, folder) = (TestAuthority::new(), tempfile::tempdir().unwrap());
        write_server(&authority, folder.path(), &KeyPair::generate().unwrap());
        let refusal = |files: TlsFiles| ServerTls::load(files).err().unwrap().to_string();
        let good = files(folder.path());
        let missing = TlsFiles { certificate: folder.path().join("none.pem"), ..good.clone() };
        assert!(refusal(missing).contains("none.pem"));
        let swapped = TlsFiles { client_ca: good.private_key.clone(), ..good.clone() };
        assert!(refusal(swapped).contains("client CA"));
        fs::set_permissions(&good.private_key, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(refusal(good).contains("chmod 600"));
    }

    #[test]
    fn tls_1_3_and_the_hybrid_group_come_first() {
        let provider = provider();
        assert_eq!(provider.kx_groups[0].name(), rustls::NamedGroup::X25519MLKEM768);
        assert!(provider.cipher_suites.iter().all(|suite| suite.tls13().is_some()));
    }
}
