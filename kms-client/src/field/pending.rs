//! The keys of an enrolment before its answer is there. They are stored first, encrypted like the
//! device: if the answer is lost, the next attempt has the same keys and gets the same answer.

use std::path::PathBuf;

use kms_domain::EnrolmentCode;
use serde::{Deserialize, Serialize};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use super::error::FieldError;
use super::vault::{Pin, Vault, VaultError};
use crate::KeyRequest;

/// The keys with which a code is sent.
pub(super) struct PendingKeys {
    pub(super) vault: Vault,
    pub(super) tls: KeyRequest,
    pub(super) transport: KeyRequest,
}

/// What the file holds.
#[derive(Deserialize, Serialize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
struct Content {
    /// The SHA-256 of the code that the server stores, in hex.
    #[zeroize(skip)]
    code_sha256: String,
    /// PKCS#8 PEM.
    key: String,
    transport_key: String,
}

impl PendingKeys {
    /// The keys of the earlier attempt with this code, or new ones, which are stored now: later,
    /// the code is used up.
    ///
    /// # Errors
    /// The directory has a device or cannot be written, or the earlier attempt had another PIN.
    pub(super) fn of(directory: PathBuf, code: &EnrolmentCode, pin: &Pin) -> Result<Self, FieldError> {
        let code_sha256 = hex::encode(code.digest());
        let vault = match Vault::open_pending(&directory, pin)? {
            None => Vault::create(directory, pin)?,
            Some((vault, plain)) => {
                let content: Content = serde_json::from_slice(&plain).map_err(|_| VaultError::Newer)?;
                if content.code_sha256 == code_sha256 {
                    let tls = KeyRequest::of_device_key(code.name(), &content.key)?;
                    let transport = KeyRequest::of_device_key(code.name(), &content.transport_key)?;
                    return Ok(Self { vault, tls, transport });
                }
                vault
            }
        };
        let (tls, transport) = (KeyRequest::for_device(code.name())?, KeyRequest::for_device(code.name())?);
        let (key, transport_key) = (tls.key_pem().to_owned(), transport.key_pem().to_owned());
        let content = Content { code_sha256, key, transport_key };
        // The whole capacity at once: a buffer that grows leaves copies of the keys behind.
        let mut plain = Zeroizing::new(Vec::with_capacity(LARGEST_CONTENT));
        serde_json::to_writer(&mut *plain, &content).map_err(|_| VaultError::Newer)?;
        vault.write_pending(&plain)?;
        Ok(Self { vault, tls, transport })
    }
}

/// More than two keys and a digest.
const LARGEST_CONTENT: usize = 4 << 10;
