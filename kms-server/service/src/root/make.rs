//! A new version of a root (`kms-server roots new`), and its copies in other tokens (`kms-server
//! roots install`). Both run on the machine of the token, because nothing else in the process may
//! use the token meanwhile.
//!
//! The order makes a crash at any point safe: the intent is recorded (I2), the root is made, its
//! wrap for the custodians is written to disk, the root is locked, and only then does the island's
//! row name it. A second run continues where the first one stopped.

use async_recursion::async_recursion as boxed;
use std::path::{Path, PathBuf};

use kms_domain::{IslandName, KeyClass, RootEntry, RootId, RootPurpose};
use kms_hsm::{
    EscrowPackage, HsmError, KeyFingerprint, Module, NewRoot, NewRootResult, Pin, Purpose, TokenKey, WrappedRoots,
    create_root_version, install_wrapped_roots,
};
use kms_proto::v1::{RootVersionBegun, RootVersionMade, audit_record::Event};
use kms_store::{Reads, RowKind};

use super::{no_island, refused};
use crate::island::IslandContext;
use crate::keys::token::token_key;
use crate::{
    escrow::{EscrowDocument, EscrowError},
    init::StoredCopy,
};
use kms_base::error::ServiceError;
use kms_base::files;
use kms_config::{Config, ConfigError, TokenSection};
use kms_ledger::{Committer, Decision, ServerAct};

/// What to make.
#[derive(Clone, Debug)]
pub struct NewRootSettings {
    /// Which root.
    pub purpose: RootPurpose,
    /// The escrow file of the ceremony, in its newest form. The new root is added to it.
    pub escrow: PathBuf,
    /// The numbers of the ceremony's `[[copy]]`, from 1, whose tokens get a copy.
    pub copies: Vec<u8>,
    /// The copies whose tokens get none. For a symmetric root, each copy is in one of the two
    /// lists.
    pub no_copies: Vec<u8>,
    /// Labels of roots that neither the escrow file nor any other file holds any more.
    pub lost: Vec<String>,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct MadeRoot {
    /// Which version.
    pub id: RootId,
    /// Its fingerprint.
    pub fingerprint: KeyFingerprint,
    /// The escrow file, where the root was added to it.
    pub escrow: Option<PathBuf>,
    /// Files with copies for other tokens, beside the escrow file.
    pub copies: Vec<PathBuf>,
}

/// Why a root is not made or installed.
#[derive(Debug, thiserror::Error)]
pub enum MakeRootError {
    /// A file of the ceremony cannot be read or written.
    #[error("`{}`: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The escrow file is another island's, or of another ceremony.
    #[error("`{}` is not the escrow file of this island's ceremony: its key is not the one that the island's row names", path.display())]
    OtherEscrow {
        /// The file.
        path: PathBuf,
    },
    /// Another file has roots that this one lacks.
    #[error(
        "the escrow file `{}` lacks {}: name the newest one, which has all roots that are in use; of a root that no file has any more, say so with `--lost`",
        path.display(),
        missing.join(", ")
    )]
    EarlierEscrow {
        /// The file.
        path: PathBuf,
        /// CKA_LABEL of each root that it lacks.
        missing: Vec<String>,
    },
    /// This server does not serve the class.
    #[error(
        "this configuration names no token for keys of the class `{class}`; use that of the server with the ceremony's token"
    )]
    NotServed {
        /// The class.
        class: KeyClass,
    },
    /// The escrow document.
    #[error(transparent)]
    Escrow(#[from] EscrowError),
    /// A PIN.
    #[error(transparent)]
    Pin(#[from] ConfigError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// The island's row or the record.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The process is stopping.
    #[error("it was interrupted; run it again")]
    Interrupted,
}

impl NewRootSettings {
    /// Makes the next version. Nothing else in this process may use the tokens meanwhile; servers
    /// in other processes may.
    ///
    /// # Errors
    /// What prevents it, and what to do. A second run continues.
    #[boxed]
    pub async fn make(self, config: &Config, committer: &Committer) -> Result<MadeRoot, MakeRootError> {
        let name = &config.island;
        let token = match self.purpose.class() {
            Some(class) => config.hsm.token_of(class).ok_or(MakeRootError::NotServed { class })?,
            None => config.hsm.tokens.first().ok_or(MakeRootError::NotServed { class: KeyClass::Kek })?,
        };
        let document = self.escrow(name)?;
        let escrow_sha256 = sha256(document.escrow_key());
        let id = self.begin(name, committer, &document).await?;
        let made = self.in_token(name, token, document, id).await?;
        self.note(name, committer, id, &made, escrow_sha256).await?;
        let copies = if made.package.is_some() {
            self.copies.iter().map(|number| self.copy_path(*number, id)).collect()
        } else {
            Vec::new()
        };
        let escrow = made.package.is_some().then(|| self.escrow.clone());
        Ok(MadeRoot { id, fingerprint: made.fingerprint, escrow, copies })
    }

    fn escrow(&self, name: &IslandName) -> Result<EscrowDocument, MakeRootError> {
        let text = std::fs::read(&self.escrow)
            .map_err(|error| file(&self.escrow, format!("{error}; name the island's newest escrow file")))?;
        let document: EscrowDocument = serde_json::from_slice(&text).map_err(|error| file(&self.escrow, error))?;
        if !document.is_of(name) {
            return Err(MakeRootError::OtherEscrow { path: self.escrow.clone() });
        }
        Ok(document)
    }

    /// I2: records the intent before the token is changed. The escrow file must be the one that the
    /// ceremony recorded (I5), with all later roots: two files that hold a part of the roots each
    /// could restore no token.
    async fn begin(
        &self,
        name: &IslandName,
        committer: &Committer,
        document: &EscrowDocument,
    ) -> Result<RootId, MakeRootError> {
        let (purpose, island, copies) = (self.purpose, name.clone(), self.copies.clone());
        let path = self.escrow.clone();
        let escrow_sha256 = sha256(document.escrow_key());
        let present: Vec<String> = document.labels().map(str::to_owned).chain(self.lost.iter().cloned()).collect();
        let act = committer.act(ServerAct::MAKE_ROOT, island_reads(name), move |view| {
            let row = view.island(&island)?.ok_or_else(no_island)?;
            if row.escrow_fingerprint != Some(escrow_sha256) {
                return Ok(Decision::unchanged(Err(MakeRootError::OtherEscrow { path: path.clone() })));
            }
            let missing: Vec<String> = escrowed(&row)?.into_iter().filter(|label| !present.contains(label)).collect();
            if !missing.is_empty() {
                return Ok(Decision::unchanged(Err(MakeRootError::EarlierEscrow { path: path.clone(), missing })));
            }
            let id = row.next_root(purpose).map_err(refused)?;
            let entry = view.append(Event::RootVersionBegun(RootVersionBegun {
                root: purpose.to_string(),
                version: id.version.into(),
                escrow_key_sha256: escrow_sha256.to_vec().into(),
                copies: copies.iter().map(|number| u32::from(*number)).collect(),
            }));
            Ok(Decision::recorded(entry, Ok(id)))
        });
        act.await?.value
    }

    async fn in_token(
        &self,
        name: &IslandName,
        token: &TokenSection,
        document: EscrowDocument,
        id: RootId,
    ) -> Result<NewRootResult, MakeRootError> {
        let module = Module::load(&token.module)?;
        let selector = token.selector();
        let pin = Pin::new(token.pin.read("the PIN")?.to_string());
        let new = NewRoot {
            island: name.clone(),
            key: token_key(id)?,
            escrow_public_key: document.escrow_key().to_vec(),
            // The numbers of the ceremony file start at 1.
            standby: self.copies.iter().map(|number| number.saturating_sub(1)).collect(),
            without: self.no_copies.iter().map(|number| number.saturating_sub(1)).collect(),
        };
        let previous = self.previous(name, &document, id)?;
        let (settings, island) = (self.clone(), name.clone());
        let made = tokio::task::spawn_blocking(move || {
            let persist = |package: &EscrowPackage| {
                settings.persist(&island, &document, package, id).map_err(|error| error.to_string())
            };
            create_root_version(&module, &selector, &pin, &new, previous.as_ref(), persist)
        });
        Ok(made.await.map_err(|_| MakeRootError::Interrupted)??)
    }

    /// What an interrupted run stored of the root.
    fn previous(
        &self,
        name: &IslandName,
        document: &EscrowDocument,
        id: RootId,
    ) -> Result<Option<EscrowPackage>, MakeRootError> {
        let Some(escrow) = document.wrapped_roots(name)? else { return Ok(None) };
        let key = token_key(id)?;
        if !escrow.roots.iter().any(|root| root.key == key) {
            return Ok(None);
        }
        let mut standby = Vec::with_capacity(self.copies.len());
        for number in &self.copies {
            let path = self.copy_path(*number, id);
            let text = std::fs::read(&path).map_err(|error| file(&path, error))?;
            standby.push(
                StoredCopy::parse(name, &text).ok_or_else(|| file(&path, "it is not what an earlier run wrote"))?,
            );
        }
        Ok(Some(EscrowPackage { island: name.clone(), escrow, standby }))
    }

    /// Copies first: if the escrow file names the root, an interrupted run stored all copies.
    fn persist(
        &self,
        name: &IslandName,
        begun: &EscrowDocument,
        package: &EscrowPackage,
        id: RootId,
    ) -> Result<(), MakeRootError> {
        for (number, copy) in self.copies.iter().zip(&package.standby) {
            let path = self.copy_path(*number, id);
            files::replace(&path, StoredCopy::of(name, copy).as_bytes(), SECRET).map_err(|error| file(&path, error))?;
        }
        // Another command may have added a root to the file since it was read. From here on, only
        // one command writes it.
        let folder = self.escrow.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = std::fs::File::open(folder)
            .and_then(|folder| folder.lock().map(|()| folder))
            .map_err(|error| file(&self.escrow, error))?;
        let document = self.escrow(name)?;
        let missing: Vec<String> =
            begun.labels().filter(|label| !document.labels().any(|known| known == *label)).map(str::to_owned).collect();
        if !missing.is_empty() {
            return Err(MakeRootError::EarlierEscrow { path: self.escrow.clone(), missing });
        }
        let document = document.with_another_root(name, &package.escrow)?;
        let replaced = files::replace(&self.escrow, document.to_json().as_bytes(), SECRET)
            .map_err(|error| file(&self.escrow, error));
        drop(folder);
        replaced
    }

    /// Notes the version in the island's row.
    async fn note(
        &self,
        name: &IslandName,
        committer: &Committer,
        id: RootId,
        made: &NewRootResult,
        escrow_sha256: [u8; 32],
    ) -> Result<(), MakeRootError> {
        let island = name.clone();
        let copies = made
            .package
            .iter()
            .flat_map(|package| &package.standby)
            .map(|copy| copy.recipient_sha256.to_vec().into())
            .collect();
        let event = RootVersionMade {
            root: id.purpose.to_string(),
            version: id.version.into(),
            fingerprint: made.fingerprint.value.clone().into(),
            key_derivation: made.derivation.map(|derivation| derivation.name().to_owned()).unwrap_or_default(),
            escrow_key_sha256: if made.package.is_some() { escrow_sha256.to_vec().into() } else { bytes::Bytes::new() },
            copies_sha256: copies,
        };
        let entry = RootEntry {
            id,
            derivation: made.derivation,
            made: IslandContext::now(),
            fingerprint: made.fingerprint.value.clone(),
            destroyed: None,
        };
        let reads = Reads { clock: true, ..island_reads(name) };
        let act = committer.act(ServerAct::MAKE_ROOT, reads, move |view| {
            let mut row = (*view.island(&island)?.ok_or_else(no_island)?).clone();
            row.add_root(RootEntry { made: view.clock()?, ..entry.clone() }).map_err(refused)?;
            let entry = view.append(Event::RootVersionMade(event.clone()));
            view.put_island(row)?;
            Ok(Decision::recorded(entry, ()))
        });
        act.await.map(drop).map_err(MakeRootError::from)
    }

    /// Beside the escrow file: `copies-1-session-storage-kek-2.json`.
    fn copy_path(&self, number: u8, id: RootId) -> PathBuf {
        self.escrow.with_file_name(format!(
            "copies-{number}-{}-{}.json",
            id.purpose.to_string().replace('/', "-"),
            id.version
        ))
    }
}

/// Installs copies of roots in the token of a server, locked from the start. Returns their
/// fingerprints.
///
/// # Errors
/// The copies are for another token, or damaged; or the HSM's.
#[boxed]
pub async fn install(config: &Config, copies: &Path) -> Result<Vec<KeyFingerprint>, MakeRootError> {
    let text = std::fs::read(copies).map_err(|error| file(copies, error))?;
    let wrapped: WrappedRoots = StoredCopy::parse(&config.island, &text)
        .ok_or_else(|| file(copies, "it is no file of copies of this island"))?;
    let (island, path) = (config.island.clone(), copies.to_owned());
    let mut tokens = Vec::new();
    for token in &config.hsm.tokens {
        tokens.push((Module::load(&token.module)?, token.selector(), Pin::new(token.pin.read("the PIN")?.to_string())));
    }
    let installed = tokio::task::spawn_blocking(move || {
        let mut refused = file(&path, "the configuration names no token");
        for (module, selector, pin) in &tokens {
            match install_wrapped_roots(module, selector, pin, &island, &wrapped) {
                Ok(installed) => return Ok(installed),
                // For another token.
                Err(error) => refused = error.into(),
            }
        }
        Err(refused)
    });
    installed.await.map_err(|_| MakeRootError::Interrupted)?
}

/// The labels of all roots that the escrow must hold: those of the ceremony and of later versions,
/// unless destroyed.
fn escrowed(row: &kms_domain::Island) -> Result<Vec<String>, ServiceError> {
    let mut labels = vec![TokenKey::first(Purpose::FingerprintKek).label(&row.name)];
    for id in RootPurpose::ALL
        .into_iter()
        .filter(|purpose| *purpose != RootPurpose::VendorTransport)
        .flat_map(|purpose| row.root_versions(purpose))
    {
        if row.may_store_under(id) {
            labels.push(token_key(id)?.label(&row.name));
        }
    }
    Ok(labels)
}

fn island_reads(name: &IslandName) -> Reads {
    Reads { sealed: vec![(RowKind::Island, name.as_str().as_bytes().to_vec())], ..Reads::default() }
}

fn file(path: &Path, reason: impl ToString) -> MakeRootError {
    MakeRootError::File { path: path.to_owned(), reason: reason.to_string() }
}

fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, octets).as_ref());
    value
}

const SECRET: u32 = 0o600;
