//! The folder to which a ceremony writes. An interrupted ceremony continues with its content.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kms_domain::{IslandName, OaepHash};
use kms_hsm::{EscrowPackage, TokenKey, WrappedRoot, WrappedRoots};
use zeroize::Zeroizing;

use super::error::InitError;
use super::file::CeremonyPlan;
use crate::certificate::request::CertificationRequest;
use crate::escrow::{EscrowDocument, EscrowKey};
use kms_base::error::ServiceError;
use kms_base::files;

/// The escrow file before the roots are in it.
pub(super) struct PreparedEscrow {
    pub(super) document: EscrowDocument,
}

/// The folder to which the ceremony writes. Other users cannot read it.
#[derive(Clone)]
pub(super) struct StateFolder(pub(super) PathBuf);

impl StateFolder {
    pub(super) fn open(folder: &Path) -> Result<Self, InitError> {
        for path in [folder.to_owned(), folder.join("principals")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|error| InitError::file(&path, error))?;
        }
        let folder = folder.canonicalize().map_err(|error| InitError::file(folder, error))?;
        Ok(Self(folder))
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, InitError> {
        let path = self.0.join(name);
        match fs::read(&path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(InitError::file(&path, error)),
        }
    }

    /// Writes a file atomically and durably.
    pub(super) fn write(&self, name: &str, content: &[u8], mode: u32) -> Result<PathBuf, InitError> {
        let path = self.0.join(name);
        files::replace(&path, content, mode).map_err(|error| InitError::file(&path, error))?;
        Ok(path)
    }

    pub(super) fn damaged(&self, name: &str) -> InitError {
        InitError::Damaged { path: self.0.join(name) }
    }

    /// The escrow file of an interrupted ceremony, or a new one. Its shares are on disk before any
    /// root is made.
    pub(super) fn escrow(&self, plan: &CeremonyPlan) -> Result<PreparedEscrow, InitError> {
        let document = match self.read(ESCROW)? {
            Some(text) => {
                let document: EscrowDocument = serde_json::from_slice(&text).map_err(|_| self.damaged(ESCROW))?;
                if !document.is_for(&plan.island, plan.quorum, &plan.custodians) {
                    return Err(InitError::OtherEscrow { path: self.0.join(ESCROW) });
                }
                document
            }
            None => {
                let document = EscrowKey::make(&plan.island, plan.quorum, &plan.custodians)?.document(&plan.island);
                self.write(ESCROW, document.to_json().as_bytes(), SECRET)?;
                document
            }
        };
        Ok(PreparedEscrow { document })
    }

    /// What an interrupted ceremony stored of the roots.
    pub(super) fn previous(
        &self,
        island: &IslandName,
        escrow: &PreparedEscrow,
        copies: usize,
    ) -> Result<Option<EscrowPackage>, InitError> {
        let Some(roots) = escrow.document.wrapped_roots(island)? else { return Ok(None) };
        let mut standby = Vec::with_capacity(copies);
        for number in 0..copies {
            let name = copy_name(number);
            let text = self.read(&name)?.ok_or_else(|| self.damaged(&name))?;
            standby.push(StoredCopy::parse(island, &text).ok_or_else(|| self.damaged(&name))?);
        }
        Ok(Some(EscrowPackage { island: island.clone(), escrow: roots, standby }))
    }

    /// The server's TLS key, which is made once.
    pub(super) fn server_key(&self) -> Result<CertificationRequest, InitError> {
        let key = match self.read(SERVER_KEY)? {
            Some(text) => {
                let text = Zeroizing::new(text);
                std::str::from_utf8(&text)
                    .ok()
                    .and_then(|text| rcgen::KeyPair::from_pem(text).ok())
                    .ok_or_else(|| self.damaged(SERVER_KEY))?
            }
            None => {
                let key = rcgen::KeyPair::generate()
                    .map_err(|error| InitError::Service(ServiceError::Internal(error.to_string())))?;
                self.write(SERVER_KEY, Zeroizing::new(key.serialize_pem()).as_bytes(), SECRET)?;
                key
            }
        };
        let request = rcgen::CertificateParams::default()
            .serialize_request(&key)
            .map_err(|error| InitError::Service(ServiceError::Internal(error.to_string())))?;
        CertificationRequest::parse(request.der())
            .map_err(|error| InitError::Service(ServiceError::Internal(error.to_string())))
    }
}

/// Copies of roots for one token, as stored: JSON of labels and wraps.
pub(crate) struct StoredCopy;

impl StoredCopy {
    /// The file's text.
    pub(crate) fn of(island: &IslandName, copies: &WrappedRoots) -> String {
        let roots: Vec<_> = copies
            .roots
            .iter()
            .map(|root| serde_json::json!({ "label": root.key.label(island), "check_value": hex::encode(&root.check_value), "wrapped": hex::encode(&root.wrapped) }))
            .collect();
        let copy = serde_json::json!({ "format": "meterkms-copies/1", "recipient": hex::encode(copies.recipient_sha256), "oaep_hash": copies.oaep_hash.name(), "roots": roots });
        format!("{copy:#}\n")
    }

    /// The content of a file; `None` if it is not such a file of the island.
    pub(crate) fn parse(island: &IslandName, text: &[u8]) -> Option<WrappedRoots> {
        let copy: serde_json::Value = serde_json::from_slice(text).ok()?;
        let octets = |value: &serde_json::Value, name: &str| hex::decode(value.get(name)?.as_str()?).ok();
        let roots = copy.get("roots")?.as_array()?.iter().map(|root| {
            Some(WrappedRoot {
                key: TokenKey::of_label(root.get("label")?.as_str()?, island).filter(|key| key.purpose.is_root())?,
                check_value: octets(root, "check_value")?,
                wrapped: octets(root, "wrapped")?,
            })
        });
        Some(WrappedRoots {
            recipient_sha256: octets(&copy, "recipient")?.try_into().ok()?,
            oaep_hash: OaepHash::parse(copy.get("oaep_hash")?.as_str()?).ok()?,
            roots: roots.collect::<Option<_>>()?,
        })
    }
}

/// The name of the file with the roots for a copy's token.
pub(super) fn copy_name(number: usize) -> String {
    format!("copies-{}.json", number + 1)
}

/// The escrow file.
pub(super) const ESCROW: &str = "escrow.json";
/// The server's TLS key.
pub(super) const SERVER_KEY: &str = "server.key";
/// Mode of files that only their owner reads.
pub(super) const SECRET: u32 = 0o600;
