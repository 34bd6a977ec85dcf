//! The memory of refused PINs, in the database: a PIN that a token refused is never tried again, by no server and after no restart, until
//! it is changed. Otherwise a server that restarts in a loop would lock its token.

use std::sync::Arc;

use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Argon2, PasswordHash};
use kms_hsm::{Pin, PinMemory};
use kms_store::{PinFailure, Store};
use tokio::runtime::Handle;

use crate::island::Island;

/// Remembers refused PINs as Argon2id (RFC 9106) with a random salt.
pub struct StoredPinMemory {
    store: Arc<dyn Store>,
    runtime: Handle,
}

impl StoredPinMemory {
    /// A memory in this database. Called inside the tokio runtime; its methods are called by the threads of tokens.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store, runtime: Handle::current() }
    }
}

impl PinMemory for StoredPinMemory {
    fn was_refused(&self, token_serial: &str, pin: &Pin) -> bool {
        match self.runtime.block_on(self.store.pin_failure(token_serial, CKU_USER)) {
            Ok(None) => false,
            Ok(Some(failure)) => match PasswordHash::new(&failure.phc) {
                Ok(hash) => Argon2::default().verify_password(pin.octets(), &hash).is_ok(),
                // What cannot be read is taken for the same PIN: a try too few is mended by an operator, one too many locks a token.
                Err(_) => true,
            },
            Err(error) => {
                tracing::error!(%error, token = token_serial, "the PIN is not tried, because the database does not tell whether it was refused before");
                true
            }
        }
    }

    fn remember_refused(&self, token_serial: &str, pin: &Pin) {
        let mut salt = [0; 16];
        let phc = aws_lc_rs::rand::fill(&mut salt)
            .map_err(|_| "no random octets".to_owned())
            .and_then(|()| Argon2::default().hash_password_with_salt(pin.octets(), &salt).map(|hash| hash.to_string()).map_err(|error| error.to_string()));
        let outcome = phc.and_then(|phc| {
            let failure = PinFailure { token: token_serial.to_owned(), user_type: CKU_USER, phc, time: Island::now() };
            self.runtime.block_on(self.store.put_pin_failure(&failure)).map_err(|error| error.to_string())
        });
        if let Err(error) = outcome {
            tracing::error!(error, token = token_serial, "a refused PIN could not be remembered; do not restart this server before the PIN is right");
        }
    }
}

/// CKU_USER of PKCS#11: services log in as nobody else.
const CKU_USER: u8 = 1;
