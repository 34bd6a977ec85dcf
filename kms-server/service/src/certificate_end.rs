//! The end of certificates: the server renews its own in time, and warns in its log about others
//! that end soon.

use async_recursion::async_recursion as boxed;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kms_domain::{PrincipalId, PrincipalStatus, Role, UnixMillis};
use kms_hsm::Hsm;
use kms_proto::v1::{PrincipalChanged, audit_record::Event};
use kms_store::{Reads, RowKind};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use zeroize::Zeroizing;

use super::certificate::request::CertificationRequest;
use super::certificate::signing::IssuedCertificate;
use super::certificate::{CertificateAuthority, Validity};
use crate::island::IslandContext;
use kms_base::error::ServiceError;
use kms_base::files;
use kms_ledger::{Committer, Decision, ServerAct};

/// The TLS certificate of a server, in its two PEM files.
pub struct ServerCertificate {
    /// The certificate. It is replaced as a whole; servers reload it automatically.
    pub certificate: PathBuf,
    /// The private key, PKCS#8. It stays the same: one file can be replaced atomically, two cannot.
    pub private_key: PathBuf,
    /// The lifetime of the certificate in days.
    pub days: u16,
}

impl ServerCertificate {
    /// Renews the certificate for the same names and key: the CA key in the HSM signs it, it is
    /// recorded, and only then is it written.
    ///
    /// # Errors
    /// A file cannot be read or written, or holds no such certificate or key; no token holds the CA
    /// key; a failure of the HSM or the database.
    #[boxed]
    pub async fn renew(
        &self,
        authority: &CertificateAuthority,
        hsm: &Hsm,
        committer: &Committer,
    ) -> Result<IssuedCertificate, ServiceError> {
        let names = self.current()?.names;
        let request = self.request()?;
        let validity = Validity::days(IslandContext::now(), self.days);
        let issued = authority.server(hsm.island(), &names, &request, validity)?.sign(hsm).await?;
        let record = PrincipalChanged {
            principal: format!("server {}", names.join(", ")),
            change: "renewed".to_owned(),
            certificate_serial: hex::encode(&issued.serial),
            reason: "its certificate was to end".to_owned(),
        };
        committer
            .act(ServerAct::RENEW_SERVER_CERTIFICATE, Reads::default(), move |view| {
                Ok(Decision::recorded(view.append(Event::PrincipalChanged(record.clone())), ()))
            })
            .await?;
        files::replace(&self.certificate, issued.pem().as_bytes(), PUBLIC)
            .map_err(|error| file_error(&self.certificate, &error.to_string()))?;
        Ok(issued)
    }

    fn current(&self) -> Result<Current, ServiceError> {
        let der = CertificateDer::from_pem_file(&self.certificate)
            .map_err(|error| file_error(&self.certificate, &error.to_string()))?;
        Current::of(&der)
            .ok_or_else(|| file_error(&self.certificate, "it is no X.509 certificate with names of a server"))
    }

    /// A request with the key in the file, which proves its possession.
    fn request(&self) -> Result<CertificationRequest, ServiceError> {
        let refuse = |reason: String| file_error(&self.private_key, &reason);
        let text =
            Zeroizing::new(std::fs::read_to_string(&self.private_key).map_err(|error| refuse(error.to_string()))?);
        let key = rcgen::KeyPair::from_pem(&text).map_err(|_| refuse("it is no private key in PKCS#8".to_owned()))?;
        let request =
            rcgen::CertificateParams::default().serialize_request(&key).map_err(|error| refuse(error.to_string()))?;
        CertificationRequest::parse(request.der()).map_err(|error| refuse(error.to_string()))
    }
}

/// Watches the ends of certificates while a server runs.
pub struct CertificateWatch {
    /// The island.
    pub island: Arc<IslandContext>,
    /// Its authority.
    pub authority: CertificateAuthority,
    /// The certificate of this server.
    pub own: ServerCertificate,
}

impl CertificateWatch {
    /// Checks now, and then daily; more often for a certificate with a lifetime of a few days.
    /// Never returns.
    #[boxed]
    pub async fn run(self) {
        loop {
            let pause = self.look().await;
            tokio::time::sleep(pause).await;
        }
    }

    /// Renews the server's own certificate if it is due, warns about the others, and returns when
    /// to check again.
    async fn look(&self) -> Duration {
        let mut pause = A_DAY;
        match self.own.current() {
            Ok(current) => {
                pause = (current.lifetime() / 12).clamp(Duration::from_secs(60), A_DAY);
                if current.is_due(IslandContext::now()) {
                    self.renew_own(&current).await;
                }
            }
            Err(error) => {
                tracing::error!(%error, "the server's certificate cannot be checked; correct the files of `tls.certificate` and `tls.private_key`")
            }
        }
        let root = self.authority.not_after();
        if days_left(root, IslandContext::now()) < ROOT_WARNING_DAYS {
            tracing::warn!(
                days = days_left(root, IslandContext::now()),
                "the island's root certificate ends: everything below it ends with it"
            );
        }
        if let Err(error) = self.warn_of_principals().await {
            tracing::warn!(%error, "the ends of principals' certificates could not be read");
        }
        pause
    }

    async fn renew_own(&self, current: &Current) {
        let days = days_left(current.not_after, IslandContext::now());
        if !self.island.hsm.serves(kms_domain::KeyClass::Ca) {
            let command = format!(
                "kms-server certificate renew --config AUTHORITY.toml --certificate {} --private-key {}",
                self.own.certificate.display(),
                self.own.private_key.display()
            );
            tracing::warn!(
                days,
                command,
                "the server's certificate ends, and this server has no token for the CA: renew it where one is"
            );
            return;
        }
        match self.own.renew(&self.authority, &self.island.hsm, &self.island.committer).await {
            Ok(issued) => tracing::info!(serial = hex::encode(&issued.serial), "the server's certificate was renewed"),
            Err(error) => tracing::error!(%error, days, "the server's certificate ends and cannot be renewed"),
        }
    }

    /// Logs one line for each enabled principal whose newest certificate or transport certificate
    /// ends within 30 days, and one more if no officer would be left: then only the custodians
    /// could renew an officer's certificate.
    async fn warn_of_principals(&self) -> Result<(), ServiceError> {
        let mut after: Option<Vec<u8>> = None;
        let mut officers = OfficersLeft::default();
        loop {
            let page = self.island.store.sealed_page(RowKind::Principal, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else {
                officers.warn(IslandContext::now());
                return Ok(());
            };
            after = Some(last.clone());
            for (name, row) in page {
                let Some(id) = std::str::from_utf8(&name).ok().and_then(|name| PrincipalId::parse(name).ok()) else {
                    continue;
                };
                // The scrubber reports a row that does not verify.
                let Ok(principal) = self.island.committer.open_principal(&id, &row) else { continue };
                if principal.status != PrincipalStatus::Enabled {
                    continue;
                }
                let transport = principal.transport.as_ref().and_then(|transport| end_of(&transport.certificate));
                let newest = principal.certificates.iter().map(|certificate| certificate.not_after).max();
                officers.note(&id, newest);
                for (what, end) in [("TLS certificate", newest), ("transport certificate", transport)] {
                    let Some(days) =
                        end.map(|end| days_left(end, IslandContext::now())).filter(|days| *days < WARNING_DAYS)
                    else {
                        continue;
                    };
                    if days < 0 {
                        tracing::warn!(principal = %id, what, "a certificate has ended");
                    } else {
                        tracing::warn!(principal = %id, what, days, "a certificate ends soon");
                    }
                }
            }
        }
    }
}

/// The enabled officer whose certificate ends last.
#[derive(Default)]
struct OfficersLeft(Option<(PrincipalId, UnixMillis)>);

impl OfficersLeft {
    fn note(&mut self, id: &PrincipalId, newest: Option<UnixMillis>) {
        let end = newest.unwrap_or(UnixMillis(0));
        if id.role() == Role::Officer && self.0.as_ref().is_none_or(|(_, known)| *known < end) {
            self.0 = Some((id.clone(), end));
        }
    }

    /// The warning, if there is one: the last officer and the next step.
    fn warning(&self, now: UnixMillis) -> Option<(&PrincipalId, i64, String)> {
        let (id, end) = self.0.as_ref().filter(|(_, end)| days_left(*end, now) < OFFICERS_WARNING_DAYS)?;
        let days = days_left(*end, now);
        let next_step = if now < *end {
            "every officer runs `kms principal renew` now".to_owned()
        } else {
            format!(
                "no officer can call any more; on the token's machine, with the custodians: kms-server officers recertify {id}"
            )
        };
        Some((id, days, next_step))
    }

    fn warn(&self, now: UnixMillis) {
        if let Some((id, days, next_step)) = self.warning(now) {
            tracing::error!(officer = %id, days, next_step, "the last certificate of an officer ends");
        }
    }
}

/// The needed values of a certificate in use.
struct Current {
    names: Vec<String>,
    not_before: UnixMillis,
    not_after: UnixMillis,
}

impl Current {
    fn of(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let alternative = certificate.subject_alternative_name().ok()??;
        let names: Vec<String> = alternative.value.general_names.iter().filter_map(server_name).collect();
        let moment = |seconds: i64| UnixMillis(seconds.saturating_mul(1000));
        let validity = certificate.validity();
        let current = Self {
            names,
            not_before: moment(validity.not_before.timestamp()),
            not_after: moment(validity.not_after.timestamp()),
        };
        (!current.names.is_empty()).then_some(current)
    }

    fn lifetime(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.not_after.0.saturating_sub(self.not_before.0)).unwrap_or_default())
    }

    /// Whether less than a third of its life is left.
    fn is_due(&self, now: UnixMillis) -> bool {
        let left = self.not_after.0.saturating_sub(now.0);
        left.saturating_mul(3) < self.not_after.0.saturating_sub(self.not_before.0)
    }
}

fn server_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(octets) => {
            let address = <[u8; 4]>::try_from(*octets)
                .map(IpAddr::from)
                .or_else(|_| <[u8; 16]>::try_from(*octets).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

fn end_of(der: &[u8]) -> Option<UnixMillis> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(UnixMillis(certificate.validity().not_after.timestamp().saturating_mul(1000)))
}

/// Whole days until then; negative for a time in the past.
const fn days_left(end: UnixMillis, now: UnixMillis) -> i64 {
    end.0.saturating_sub(now.0).div_euclid(86_400_000)
}

fn file_error(path: &Path, reason: &str) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("`{}`: {reason}", path.display()),
        next_step: "correct `tls.certificate` and `tls.private_key`, or the files".to_owned(),
    }
}

const PUBLIC: u32 = 0o644;
const A_DAY: Duration = Duration::from_hours(24);
const WARNING_DAYS: i64 = 30;
/// If the certificates of all officers end, the custodians must meet. So this warning comes earlier
/// and as an error.
const OFFICERS_WARNING_DAYS: i64 = 60;
/// It takes long until every device has a new root certificate.
const ROOT_WARNING_DAYS: i64 = 730;
const PAGE: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::signing::CA_KEY;
    use crate::testing::island_tests;

    const DAY: i64 = 86_400_000;

    #[test]
    fn a_certificate_is_due_in_the_last_third_of_its_life() {
        let current = Current { names: Vec::new(), not_before: UnixMillis(0), not_after: UnixMillis(90 * DAY) };
        assert!(!current.is_due(UnixMillis(60 * DAY)));
        assert!(current.is_due(UnixMillis(60 * DAY + 1)));
        assert!(current.is_due(UnixMillis(100 * DAY)), "one that has ended is due too");
    }

    #[test]
    fn the_end_of_the_last_officer_is_told_in_time_with_the_way_out() {
        let officer = |name: &str| PrincipalId::parse(&format!("urn:meterkms:north:officer:{name}")).unwrap();
        let mut left = OfficersLeft::default();
        assert_eq!(left.warning(UnixMillis(0)), None);
        left.note(&PrincipalId::parse("urn:meterkms:north:head-end:hes-1").unwrap(), Some(UnixMillis(900 * DAY)));
        left.note(&officer("ada"), Some(UnixMillis(370 * DAY)));
        left.note(&officer("bo"), Some(UnixMillis(100 * DAY)));
        left.note(&officer("cy"), None);
        assert_eq!(left.warning(UnixMillis(300 * DAY)), None, "one officer left is enough");
        let (id, days, next_step) = left.warning(UnixMillis(350 * DAY)).unwrap();
        assert_eq!((id, days), (&officer("ada"), 20));
        assert!(next_step.contains("kms principal renew"), "{next_step}");
        let (_, days, next_step) = left.warning(UnixMillis(370 * DAY)).unwrap();
        assert!(
            days == 0 && next_step.contains("kms-server officers recertify urn:meterkms:north:officer:ada"),
            "{next_step}"
        );
    }

    island_tests! {
        async fn a_server_renews_its_own_certificate_in_time(t) {
            let (island, hsm) = (&t.island, &t.island.hsm);
            let now = IslandContext::now();
            let point = hsm.public_key(CA_KEY).await.unwrap();
            let root = CertificateAuthority::root(island.name(), point, Validity::days(now, 3_000)).unwrap().sign(hsm).await.unwrap();
            let authority = CertificateAuthority::from_der(&root.der).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let own = || ServerCertificate { certificate: folder.path().join("server.pem"), private_key: folder.path().join("server.key"), days: 365 };
            std::fs::write(own().private_key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
            let names = ["kms.example".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
            // 65 of 365 days are left.
            let old = authority.server(island.name(), &names, &own().request().unwrap(), Validity::days(now.after(-300 * DAY), 365)).unwrap();
            let old = old.sign(hsm).await.unwrap();
            std::fs::write(own().certificate, old.pem()).unwrap();

            let watch = CertificateWatch { island: island.clone(), authority, own: own() };
            watch.look().await;
            let renewed = std::fs::read(own().certificate).unwrap();
            assert_ne!(renewed, old.pem().as_bytes());
            let current = own().current().unwrap();
            assert_eq!(current.names, names);
            assert!(days_left(current.not_after, now) >= 364);
            let der = CertificateDer::from_pem_slice(&renewed).unwrap();
            let (_, certificate) = X509Certificate::from_der(&der).unwrap();
            let (_, before) = X509Certificate::from_der(&old.der).unwrap();
            assert_eq!(certificate.public_key(), before.public_key(), "the key stays");
            let changes = t.recorded(|event| match event { Event::PrincipalChanged(event) => Some(event), _ => None }).await;
            let recorded = changes.iter().filter(|event| event.principal.contains("kms.example")).count();
            assert_eq!(recorded, 1);

            watch.look().await;
            assert_eq!(std::fs::read(own().certificate).unwrap(), renewed, "it is not due any more");
        }
    }
}
