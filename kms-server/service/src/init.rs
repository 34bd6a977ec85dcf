//! The ceremony (`kms-server init`): makes an island from one reviewable file: tokens, roots,
//! escrow, CA, certificates, database, and the record of all this.
//!
//! It can be interrupted at any point and run again with the same file: it finds and keeps what was
//! made. The escrow's shares are on disk before a root exists, and the wraps of the roots are on
//! disk before the roots are locked.

mod error;
mod file;
mod folder;

use async_recursion::async_recursion as boxed;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kms_domain::{
    ChunkSize, ClassRoots, DatabaseHistory, DiversificationRoot, Enrolment, Island as IslandRow, IslandKind, KeyClass,
    KeyDerivation, Principal, PrincipalStatus, SealKey, SealRootKey,
};
use kms_hsm::{
    EscrowPackage, Hsm, KeyFingerprint, Module, Pin, PinSource, ProcessPinMemory, RootVersion, StandbyToken,
    TokenSettings, create_roots, create_standby_transport, install_wrapped_roots,
};
use kms_proto::v1::{CeremonyHeld, Fingerprint, PrincipalChanged, audit_record::Event};
use kms_store::{DatabaseLocation, Reads, RowKind, Store};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

pub use self::error::InitError;
pub use self::file::{CeremonyPlan, CeremonyToken, CopyToken, FirstPrincipal, Storage};
pub(crate) use self::folder::StoredCopy;
use self::folder::{ESCROW, PreparedEscrow, SECRET, SERVER_KEY, StateFolder, copy_name};

use super::certificate::signing::{CA_KEY, IssuedCertificate};
use super::certificate::{CertificateAuthority, Validity};
use crate::island::IslandContext;
use kms_base::error::ServiceError;
use kms_config::SecretSource;
use kms_ledger::principal_row;
use kms_ledger::{AuditKey, Committer, CommitterSettings, Decision, RestoreSettings, ServerAct};

/// The result of a ceremony.
pub struct Held {
    /// Every key with its fingerprint, for the record that people sign.
    pub fingerprints: Vec<KeyFingerprint>,
    /// The island's root certificate.
    pub root: CertificateDer<'static>,
    /// The first principals' certificates.
    pub certificates: Vec<IssuedCertificate>,
    /// The text that is printed and stored as `ceremony.txt`.
    pub summary: String,
    /// The configuration for `kms-server run`.
    pub configuration: PathBuf,
}

impl CeremonyPlan {
    /// Holds the ceremony. It writes its results to the folder `state`: `escrow.json`, `root.pem`,
    /// `server.pem` and `server.key`, `principals/`, `kms-server.toml`, `ceremony.txt`, and copies
    /// of roots for other tokens.
    ///
    /// # Errors
    /// What stopped the ceremony, and what to do. A second run continues where the first one
    /// stopped.
    #[boxed]
    pub async fn hold(self, state: &Path) -> Result<Held, InitError> {
        let state = StateFolder::open(state)?;
        let escrow = state.escrow(&self)?;
        let settings = TokenSettings::new(
            self.token.module.clone(),
            self.token.selector.label.clone(),
            pin_source(&self.token.pin),
        );
        let settings = TokenSettings { selector: self.token.selector.clone(), ..settings };
        let allow_cbc_expand = self.kind == IslandKind::Development;

        // Blocking: PKCS#11, and an RSA key or two.
        let (plan, folder) = (self.clone(), state.clone());
        let (mut fingerprints, derivation) = tokio::task::spawn_blocking(move || plan.make_roots(&folder, &escrow))
            .await
            .map_err(|_| InitError::Interrupted)??;

        let hsm = Hsm::start(
            self.island.clone(),
            TokenSettings { allow_cbc_expand, ..settings },
            Arc::new(ProcessPinMemory::default()),
        )?;
        hsm.usable(USABLE_WITHIN).await?;
        let held = self.certify(&state, &hsm, derivation, &mut fingerprints).await;
        tokio::task::spawn_blocking(move || hsm.close()).await.map_err(|_| InitError::Interrupted)?;
        let (root, certificates) = held?;

        let summary = self.summary(&fingerprints, &root);
        state.write("ceremony.txt", summary.as_bytes(), PUBLIC)?;
        let configuration = state.write("kms-server.toml", self.configuration(&state).as_bytes(), PUBLIC)?;
        Ok(Held { fingerprints, root, certificates, summary, configuration })
    }

    /// Tokens, roots and copies of roots.
    fn make_roots(
        &self,
        state: &StateFolder,
        escrow: &PreparedEscrow,
    ) -> Result<(Vec<KeyFingerprint>, Option<KeyDerivation>), InitError> {
        let (module, so_pin, pin) = self.token.prepare()?;
        let mut copies = Vec::new();
        for copy in &self.copies {
            let (module, _, pin) = copy.token.prepare()?;
            let public = create_standby_transport(&module, &copy.token.selector, &pin, &self.island)?;
            copies.push((copy, module, pin, public));
        }
        let plan = kms_hsm::CeremonyPlan {
            island: self.island.clone(),
            classes: KeyClass::WITH_ROOTS.into_iter().chain([KeyClass::Ca]).collect(),
            general: true,
            escrow_public_key: escrow.document.escrow_key().to_vec(),
            standby: copies
                .iter()
                .map(|(copy, _, _, public)| StandbyToken { public_key: public.clone(), classes: copy.classes.clone() })
                .collect(),
        };
        let previous = state.previous(&self.island, escrow, copies.len())?;
        let persist = |package: &EscrowPackage| {
            for (number, copy) in package.standby.iter().enumerate() {
                state
                    .write(&copy_name(number), StoredCopy::of(&self.island, copy).as_bytes(), SECRET)
                    .map_err(|error| error.to_string())?;
            }
            let document = escrow.document.clone().with_roots(&self.island, &package.escrow);
            state.write(ESCROW, document.to_json().as_bytes(), SECRET).map(drop).map_err(|error| error.to_string())
        };
        let result = create_roots(&module, &self.token.selector, &so_pin, &pin, &plan, previous.as_ref(), persist)?;
        let escrow_key = sha256(escrow.document.escrow_key()).to_vec();
        let mut fingerprints =
            vec![KeyFingerprint { label: ESCROW_KEY_LABEL.to_owned(), kind: "SHA-256", value: escrow_key }];
        fingerprints.extend(result.fingerprints);
        for ((copy, module, pin, _), wrapped) in copies.iter().zip(&result.package.standby) {
            let installed = install_wrapped_roots(module, &copy.token.selector, pin, &self.island, wrapped)?;
            let token = &copy.token.selector.label;
            fingerprints.extend(
                installed
                    .into_iter()
                    .map(|print| KeyFingerprint { label: format!("{} (copy in {token})", print.label), ..print }),
            );
        }
        Ok((fingerprints, result.derivation))
    }

    /// The CA, all certificates, and the database.
    async fn certify(
        &self,
        state: &StateFolder,
        hsm: &Hsm,
        derivation: Option<KeyDerivation>,
        fingerprints: &mut Vec<KeyFingerprint>,
    ) -> Result<(CertificateDer<'static>, Vec<IssuedCertificate>), InitError> {
        let now = IslandContext::now();
        let authority = match state.read("root.pem")? {
            Some(text) => CertificateAuthority::from_der(
                &CertificateDer::from_pem_slice(&text).map_err(|_| state.damaged("root.pem"))?,
            )
            .map_err(|_| state.damaged("root.pem"))?,
            None => {
                let point = hsm.public_key(CA_KEY).await?;
                let root =
                    CertificateAuthority::root(&self.island, point, Validity::days(now, ROOT_DAYS))?.sign(hsm).await?;
                state.write("root.pem", root.pem().as_bytes(), PUBLIC)?;
                CertificateAuthority::from_der(&root.der)
                    .map_err(|error| InitError::Service(ServiceError::Internal(error.to_string())))?
            }
        };
        authority.check_key(hsm).await?;
        fingerprints.push(KeyFingerprint {
            label: "root certificate".to_owned(),
            kind: "SHA-256",
            value: sha256(authority.certificate()).to_vec(),
        });

        let server_key = state.server_key()?;
        let names = &self.server_names;
        let server =
            authority.server(&self.island, names, &server_key, Validity::days(now, LEAF_DAYS))?.sign(hsm).await?;
        state.write("server.pem", server.pem().as_bytes(), PUBLIC)?;

        let mut certificates = Vec::with_capacity(self.principals.len());
        for first in &self.principals {
            let issued =
                authority.principal(&first.id, &first.certification, Validity::days(now, LEAF_DAYS))?.sign(hsm).await?;
            certificates.push(issued);
        }
        self.record(hsm, derivation, fingerprints, &certificates).await?;
        // Certificates are written only after the record is durable.
        for (first, issued) in self.principals.iter().zip(&certificates) {
            state.write(
                &format!("principals/{}-{}.pem", first.id.role(), first.id.name()),
                issued.pem().as_bytes(),
                PUBLIC,
            )?;
        }
        Ok((authority.certificate().clone(), certificates))
    }

    /// The island's row, the principals' rows and the record, in one act.
    async fn record(
        &self,
        hsm: &Hsm,
        derivation: Option<KeyDerivation>,
        fingerprints: &[KeyFingerprint],
        certificates: &[IssuedCertificate],
    ) -> Result<(), InitError> {
        let store = kms_store::open(&self.storage.store).await?;
        let result = self.record_in(&store, hsm, derivation, fingerprints, certificates).await;
        store.close().await;
        result
    }

    async fn record_in(
        &self,
        store: &Arc<dyn Store>,
        hsm: &Hsm,
        derivation: Option<KeyDerivation>,
        fingerprints: &[KeyFingerprint],
        certificates: &[IssuedCertificate],
    ) -> Result<(), InitError> {
        if store.sealed(RowKind::Island, self.island.as_str().as_bytes()).await?.is_some() {
            return Err(InitError::Exists { island: self.island.clone() });
        }
        let mac =
            async |key: SealRootKey| hsm.mac(RootVersion::FIRST, key.message(SEAL_KEY_VERSION, &self.island)).await;
        let seal = SealKey::new(SEAL_KEY_VERSION, &mac(SealRootKey::Seal).await?);
        let chain = AuditKey::new(SEAL_KEY_VERSION, &*mac(SealRootKey::AuditChain).await?);
        let settings = CommitterSettings {
            policy_sha256: None,
            island: self.island.clone(),
            server: "ceremony".to_owned(),
            chunk_size: ChunkSize::default(),
            limits: Arc::default(),
            restore: RestoreSettings::default(),
            silence: CommitterSettings::SILENCE,
        };
        let committer = Committer::start(Arc::clone(store), seal, chain, settings);

        let mut row = self.row(derivation, fingerprints);
        row.history.timeline = store.timeline().await?;
        let held = CeremonyHeld {
            fingerprints: fingerprints
                .iter()
                .map(|print| Fingerprint { name: print.label.clone(), sha256: print.value.clone().into() })
                .collect(),
            development: self.kind == IslandKind::Development,
        };
        let principals: Vec<(Principal, String)> = self
            .principals
            .iter()
            .zip(certificates)
            .map(|(first, issued)| (first.row(issued), hex::encode(&issued.serial)))
            .collect();
        let mut sealed: Vec<_> = principals.iter().map(|(principal, _)| principal_row(&principal.id)).collect();
        sealed.push((RowKind::Island, self.island.as_str().as_bytes().to_vec()));
        let reads = Reads { sealed, ..Reads::default() };
        committer
            .act(ServerAct::CEREMONY, reads, move |view| {
                view.put_island(row.clone())?;
                let entry = view.append(Event::CeremonyHeld(held.clone()));
                for (principal, serial) in &principals {
                    view.put_principal(principal.clone())?;
                    view.append(Event::PrincipalChanged(PrincipalChanged {
                        principal: principal.id.to_string(),
                        change: "added".to_owned(),
                        certificate_serial: serial.clone(),
                        reason: "ceremony".to_owned(),
                    }));
                }
                Ok(Decision::recorded(entry, ()))
            })
            .await?;
        committer.stop().await;
        Ok(())
    }

    fn row(&self, derivation: Option<KeyDerivation>, fingerprints: &[KeyFingerprint]) -> IslandRow {
        let escrow = fingerprints
            .iter()
            .find(|print| print.label == ESCROW_KEY_LABEL)
            .and_then(|print| print.value.as_slice().try_into().ok());
        IslandRow {
            name: self.island.clone(),
            kind: self.kind,
            classes: KeyClass::WITH_ROOTS
                .into_iter()
                .map(|class| ClassRoots {
                    class,
                    diversification: derivation
                        .map(|derivation| DiversificationRoot { version: 1, derivation })
                        .into_iter()
                        .collect(),
                    storage_kek_version: 1,
                })
                .collect(),
            seal_key_version: SEAL_KEY_VERSION,
            escrow_fingerprint: escrow,
            history: DatabaseHistory::default(),
            ledger: kms_domain::RootLedger::default(),
            principals_added: 0,
            // Without rows the index lacks none.
            exposures_indexed: true,
            created: IslandContext::now(),
        }
    }

    fn summary(&self, fingerprints: &[KeyFingerprint], root: &CertificateDer<'_>) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header(["key", "kind", "fingerprint"]);
        for print in fingerprints {
            table.add_row([print.label.as_str(), print.kind, &hex::encode(&print.value)]);
        }
        let kind = match self.kind {
            IslandKind::Production => "production",
            IslandKind::Development => "development: not for real keys",
        };
        let mut text = format!("Ceremony of the island `{}` ({kind})\n\n", self.island);
        text += &format!("Root certificate, SHA-256: {}\n", hex::encode(sha256(root)));
        text += &format!("Escrow: {} custodians open it together:\n", self.quorum);
        for custodian in &self.custodians {
            text += &format!("  {} (key SHA-256 {})\n", custodian.name(), hex::encode(custodian.key_sha256()));
        }
        if self.quorum.needed() == self.quorum.custodians() {
            text += "  Note: every custodian is needed. One lost key loses the escrow.\n";
        }
        text += "First principals:\n";
        for first in &self.principals {
            let person = first.person.as_ref().map(|person| format!(" ({})", person.as_str())).unwrap_or_default();
            text += &format!("  {}{person}\n", first.id);
        }
        format!("{text}\n{table}\n")
    }

    fn configuration(&self, state: &StateFolder) -> String {
        let quoted = |path: &Path| toml::Value::String(path.display().to_string()).to_string();
        let token = &self.token;
        // The server may run in another folder. A bare name is searched for by the loader.
        let bare = token.module.components().count() == 1;
        let module = std::path::absolute(&token.module).ok().filter(|_| !bare).unwrap_or_else(|| token.module.clone());
        let serial = token
            .selector
            .serial
            .as_ref()
            .map(|serial| format!("serial = {}\n", toml::Value::String(serial.clone())))
            .unwrap_or_default();
        let (development, hsm) = match self.kind {
            IslandKind::Development => ("allow_development_island = true\n", "[hsm]\nallow_cbc_expand = true\n\n"),
            IslandKind::Production => ("", ""),
        };
        format!(
            "# Made by the ceremony of the island `{island}`. docs/kms-server.toml explains every setting.\n\
             island = \"{island}\"\nlisten = \"127.0.0.1:7443\"\n{development}{watermark}\n\
             [tls]\ncertificate = {certificate}\nprivate_key = {key}\nclient_ca = {root}\n\n\
             {storage}\n{hsm}\
             [[hsm.token]]\nname = \"main\"\nmodule = {module}\nlabel = {label}\n{serial}pin = {pin}\n",
            island = self.island,
            certificate = quoted(&state.0.join("server.pem")),
            key = quoted(&state.0.join(SERVER_KEY)),
            root = quoted(&state.0.join("root.pem")),
            storage = self.storage.section,
            module = quoted(&module),
            label = toml::Value::String(token.selector.label.clone()),
            pin = token.pin.to_toml(),
            // With SQLite it is beside the database.
            watermark = match self.storage.store.database {
                DatabaseLocation::Postgres(_) => format!("watermark = {}\n", quoted(&state.0.join("watermark"))),
                DatabaseLocation::Sqlite(_) => String::new(),
            },
        )
    }
}

impl CeremonyToken {
    /// The module with the token in it, initialised if that was asked for, and both PINs.
    fn prepare(&self) -> Result<(Arc<Module>, Pin, Pin), InitError> {
        let module = Module::load(&self.module)?;
        let exists = module.has_token(&self.selector)?;
        if !exists && !self.initialise {
            return Err(InitError::NoToken { selector: self.selector.clone() });
        }
        let (so_pin, pin) = if exists {
            (read_pin(&self.so_pin)?, read_pin(&self.pin)?)
        } else {
            (pin_or_new(&self.so_pin)?, pin_or_new(&self.pin)?)
        };
        if !exists {
            module.init_token(&self.selector.label, &so_pin, &pin)?;
        }
        Ok((module, so_pin, pin))
    }
}

impl FirstPrincipal {
    fn row(&self, issued: &IssuedCertificate) -> Principal {
        Principal {
            id: self.id.clone(),
            revision: 1,
            status: PrincipalStatus::Enabled,
            certificates: vec![issued.for_principal(Enrolment::Ceremony, None)],
            transport: None,
            client_titles: self.client_titles.clone(),
            person: self.person.clone(),
            assurance: None,
            shipment_key: None,
            added: IslandContext::now(),
        }
    }
}

/// Writes a new random PIN to the file if the file does not exist. Only the owner can read it. No
/// PIN has a default.
fn pin_or_new(source: &SecretSource) -> Result<Pin, InitError> {
    if let SecretSource::File(path) = source
        && !path.exists()
    {
        let mut random = Zeroizing::new([0; PIN_DIGITS]);
        aws_lc_rs::rand::fill(random.as_mut_slice())
            .map_err(|_| InitError::Service(ServiceError::Internal("no random octets".to_owned())))?;
        // 16 characters of an alphabet of 32: 80 bits, without characters that look alike.
        let pin = Zeroizing::new(
            random
                .iter()
                .map(|octet| char::from(PIN_ALPHABET.get(usize::from(octet % 32)).copied().unwrap_or(b'0')))
                .collect::<String>(),
        );
        let write = || {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(SECRET).open(path)?;
            file.write_all(pin.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()
        };
        write().map_err(|error| InitError::file(path, error))?;
    }
    read_pin(source)
}

fn read_pin(source: &SecretSource) -> Result<Pin, InitError> {
    Ok(Pin::new(source.read("the PIN")?.to_string()))
}

fn pin_source(source: &SecretSource) -> PinSource {
    match source {
        SecretSource::File(path) => PinSource::File(path.clone()),
        SecretSource::Env(name) => PinSource::Environment(name.clone()),
    }
}

fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, octets).as_ref());
    value
}

const ESCROW_KEY_LABEL: &str = "escrow key";
const PUBLIC: u32 = 0o644;
const SEAL_KEY_VERSION: u8 = 1;
/// 20 years: longer than meters are planned for. A ceremony replaces the root certificate.
const ROOT_DAYS: u16 = 7_305;
const LEAF_DAYS: u16 = 365;
const USABLE_WITHIN: Duration = Duration::from_secs(60);
const PIN_DIGITS: usize = 16;
const PIN_ALPHABET: &[u8; 32] = b"23456789abcdefghijkmnpqrstuvwxyz";
