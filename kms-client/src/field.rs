//! For tools on handhelds: a device enrols itself with a one-time code, keeps its keys encrypted
//! under its technician's PIN, and renews its certificate (docs/field.md).
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use kms_client::field::{Device, EnrolmentCode, EnrolmentServer, Pin};
//!
//! let code = EnrolmentCode::parse("h-17/0000-…")?;
//! let server = EnrolmentServer::parse("kms.example:7444", None)?;
//! let device = Device::enrol("device", &server, &code, &Pin::new("four words make it")?).await?;
//! println!("{} for {}", device.handheld(), device.technician());
//!
//! // Another day, without the code.
//! let mut device = Device::unlock("device", &Pin::new("four words make it")?)?;
//! if device.is_renewal_due() {
//!     device.renew().await?;
//! }
//! # Ok(()) }
//! ```

mod code;
mod enrolment;
mod error;
mod pending;
mod vault;

use std::path::{Path, PathBuf};

use kms_proto::v1 as proto;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use tonic::Code;
use x509_parser::prelude::FromDer as _;
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

pub use self::code::OneTimeCode;
pub use self::enrolment::EnrolmentServer;
pub use self::error::FieldError;
use self::pending::PendingKeys;
use self::vault::Vault;
pub use self::vault::{Pin, VaultError};
use crate::connection::TlsIdentity;
use crate::identity::{KeyRequest, certificate_pem};
use crate::{Connection, ServerError, TransportKey, new_request_id};
pub use kms_domain::{Assurance, EnrolmentCode};

/// A handheld on this machine: its identity and its keys, in one file that its technician's PIN
/// opens. The keys are in memory while this value exists.
pub struct Device {
    vault: Vault,
    content: Content,
}

/// What the file holds. All of it is encrypted, and each octet is authenticated.
#[derive(Deserialize, Serialize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
struct Content {
    /// `urn:meterkms:ISLAND:handheld:NAME`.
    #[zeroize(skip)]
    handheld: String,
    #[zeroize(skip)]
    technician: String,
    /// `host:port` of the ordinary listener.
    #[zeroize(skip)]
    server: String,
    /// The name in the server's certificate.
    #[zeroize(skip)]
    server_name: String,
    /// PEM: the island's root, the TLS certificate, and the certificate of the transport key.
    #[zeroize(skip)]
    root: String,
    #[zeroize(skip)]
    certificate: String,
    #[zeroize(skip)]
    transport_certificate: String,
    /// PKCS#8 PEM.
    key: String,
    transport_key: String,
    /// A renewal that has no answer yet.
    #[zeroize(skip)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    renewal: Option<Renewal>,
}

/// A request for a certificate. It is repeated with the same id and the same key, so a lost answer
/// uses up no second certificate.
#[derive(Clone, Deserialize, Serialize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
struct Renewal {
    /// 16 octets, hex.
    #[zeroize(skip)]
    request_id: String,
    /// PKCS#8 PEM.
    key: String,
}

impl Renewal {
    fn new(handheld: &str) -> Result<Self, FieldError> {
        let made = KeyRequest::for_device(handheld)?;
        Ok(Self { request_id: hex::encode(new_request_id().octets()), key: made.key_pem().to_owned() })
    }

    fn request(&self, handheld: &str) -> Result<proto::RenewPrincipalRequest, FieldError> {
        let key = KeyRequest::of_device_key(handheld, &self.key)?;
        Ok(proto::RenewPrincipalRequest {
            request_id: hex::decode(&self.request_id).map_err(|_| VaultError::Newer)?.into(),
            principal: handheld.to_owned(),
            certificate_request: key.certificate_request().to_vec().into(),
            ..proto::RenewPrincipalRequest::default()
        })
    }
}

impl Device {
    /// Enrols this machine as the handheld of a code: makes its TLS key and its transport key,
    /// verifies the server, sends the code, and writes the certificates and the encrypted keys into
    /// the directory. The keys are stored before the code is sent: if the answer is lost, another
    /// call with this code and this PIN goes on with them.
    ///
    /// # Errors
    /// The directory has a device already, or cannot be written; the server is not of the code's
    /// island (the code is not sent then); it does not accept the code; or its answer is wrong.
    pub async fn enrol(
        directory: impl Into<PathBuf>,
        server: &EnrolmentServer,
        code: &EnrolmentCode,
        pin: &Pin,
    ) -> Result<Self, FieldError> {
        let PendingKeys { vault, tls, transport } = PendingKeys::of(directory.into(), code, pin)?;
        let answer = server.enrol(code, &tls, &transport).await?;
        let root = answer.chain.last().filter(|root| code.is_root(root));
        let root = root.ok_or(FieldError::Answer("its chain does not end with the island's root"))?;
        let content = Content {
            server: server.address_of(&answer),
            server_name: server.name_text().to_owned(),
            root: certificate_pem(root),
            certificate: KeyRequest::chain_pem(&proto::PrincipalCertificate {
                certificate: answer.certificate.clone(),
                chain: answer.chain.clone(),
                principal: None,
            }),
            transport_certificate: certificate_pem(&answer.transport_certificate),
            handheld: answer.handheld,
            technician: answer.technician,
            key: tls.key_pem().to_owned(),
            transport_key: transport.key_pem().to_owned(),
            renewal: None,
        };
        let device = Self { vault, content };
        // Certificates of other keys show now, and not in the field.
        device.identity()?.config().map_err(FieldError::Identity)?;
        if device.transport_key()?.principal().to_string() != device.content.handheld {
            return Err(FieldError::Answer("the certificate of the transport key names another handheld"));
        }
        device.store()?;
        Ok(device)
    }

    /// Opens the device in a directory. It takes a fraction of a second and 64 MiB: so does each
    /// attempt of a thief.
    ///
    /// # Errors
    /// There is no device; or the PIN is wrong, or the file was changed.
    pub fn unlock(directory: impl Into<PathBuf>, pin: &Pin) -> Result<Self, FieldError> {
        let (vault, plain) = Vault::open(directory.into(), pin)?;
        let content = serde_json::from_slice(&plain).map_err(|_| VaultError::Newer)?;
        Ok(Self { vault, content })
    }

    /// Whether there is a device in the directory.
    pub fn is_in(directory: &Path) -> bool {
        Vault::is_in(directory)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        self.vault.directory()
    }

    /// The principal: `urn:meterkms:ISLAND:handheld:NAME`.
    pub fn handheld(&self) -> &str {
        &self.content.handheld
    }

    /// The person who carries it.
    pub fn technician(&self) -> &str {
        &self.content.technician
    }

    /// The server, `host:port`.
    pub fn server(&self) -> &str {
        &self.content.server
    }

    /// Where the keys are: in a file.
    pub const fn assurance(&self) -> Assurance {
        Assurance::Software
    }

    /// The end of the TLS certificate, in milliseconds since 1970; `None`: it cannot be read.
    pub fn certificate_not_after_ms(&self) -> Option<i64> {
        self.validity().map(|(_, not_after)| not_after)
    }

    /// Whether the second half of the certificate's validity has begun. A device that renews then,
    /// and not earlier, never has more than two certificates, which is the bound of the server.
    pub fn is_renewal_due(&self) -> bool {
        self.is_renewal_due_at(jiff::Timestamp::now().as_millisecond())
    }

    fn is_renewal_due_at(&self, now: i64) -> bool {
        // Ten minutes later: a certificate begins five minutes before it is issued.
        self.validity().is_none_or(|(from, to)| now >= from.midpoint(to).saturating_add(RENEWAL_MARGIN_MS))
    }

    fn validity(&self) -> Option<(i64, i64)> {
        let certificate = CertificateDer::from_pem_slice(self.content.certificate.as_bytes()).ok()?;
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&certificate).ok()?;
        let (from, to) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
        Some((from.saturating_mul(1_000), to.saturating_mul(1_000)))
    }

    /// Connects to the server.
    ///
    /// # Errors
    /// As [`Connection::connect`].
    pub async fn connect(&self) -> Result<Connection, FieldError> {
        let config = self.identity()?.config().map_err(FieldError::Identity)?;
        let name = ServerName::try_from(self.content.server_name.clone()).map_err(|_| {
            FieldError::Identity("the server's name is neither a DNS name nor an IP address".to_owned())
        })?;
        Ok(Connection::open(&self.content.server, name, config).await?)
    }

    /// The key that opens envelopes.
    ///
    /// # Errors
    /// It does not belong to its certificate.
    pub fn transport_key(&self) -> Result<TransportKey, FieldError> {
        let (key, certificate) = (&self.content.transport_key, &self.content.transport_certificate);
        Ok(TransportKey::from_pem(key.as_bytes(), certificate.as_bytes())?)
    }

    /// Gets a certificate for a new TLS key, and stores both. The earlier certificate ends by
    /// itself. The new key is stored before the server is asked: if the answer is lost, another
    /// call, today or after a restart, repeats the same request and gets the same certificate.
    ///
    /// # Errors
    /// No connection; the server refuses; or the file cannot be written. The earlier key stays in
    /// use then.
    pub async fn renew(&mut self) -> Result<(), FieldError> {
        let renewal = match &self.content.renewal {
            Some(pending) => pending.clone(),
            None => {
                let renewal = Renewal::new(&self.content.handheld)?;
                self.content.renewal = Some(renewal.clone());
                // What cannot be stored is not asked for.
                self.store().inspect_err(|_| self.content.renewal = None)?;
                renewal
            }
        };
        let request = renewal.request(&self.content.handheld)?;
        let mut principals = self.connect().await?.principals();
        let issued = match principals.renew_principal(request).await.map_err(ServerError::from) {
            Ok(issued) => issued.into_inner(),
            Err(error) => {
                // The server answers this request no more: the next one is another.
                if matches!(error.code(), Code::Aborted | Code::InvalidArgument) {
                    self.content.renewal = None;
                    self.store()?;
                }
                return Err(error.into());
            }
        };
        let key = Zeroizing::new(std::mem::replace(&mut self.content.key, renewal.key.clone()));
        let certificate = std::mem::replace(&mut self.content.certificate, KeyRequest::chain_pem(&issued));
        self.content.renewal = None;
        let stored = self
            .identity()
            .and_then(|identity| identity.config().map_err(FieldError::Identity))
            .and_then(|_| self.store());
        if stored.is_err() {
            self.content.key.zeroize();
            self.content.key.push_str(&key);
            self.content.certificate = certificate;
            self.content.renewal = Some(renewal);
        }
        stored
    }

    fn identity(&self) -> Result<TlsIdentity, FieldError> {
        let wrong = |_| FieldError::Answer("a certificate or key is not PEM");
        let certificates =
            |pem: &str| CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>().map_err(wrong);
        Ok(TlsIdentity {
            roots: certificates(&self.content.root)?,
            chain: certificates(&self.content.certificate)?,
            key: PrivateKeyDer::from_pem_slice(self.content.key.as_bytes()).map_err(wrong)?,
        })
    }

    fn store(&self) -> Result<(), FieldError> {
        // The whole capacity at once: a buffer that grows leaves copies of the keys behind.
        let mut plain = Zeroizing::new(Vec::with_capacity(LARGEST_CONTENT));
        serde_json::to_writer(&mut *plain, &self.content).map_err(|_| VaultError::Newer)?;
        Ok(self.vault.write(&plain)?)
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("handheld", &self.content.handheld).finish_non_exhaustive()
    }
}

/// More than the content has: two keys, three certificates and names are less than 8 KiB.
const LARGEST_CONTENT: usize = 64 << 10;
const RENEWAL_MARGIN_MS: i64 = 10 * 60 * 1_000;

#[cfg(test)]
mod tests;
