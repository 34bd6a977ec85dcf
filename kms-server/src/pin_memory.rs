//! The memory of refused PINs, in the database: the same server does not try a PIN again that a
//! token refused, not even after a restart, until the PIN is changed. Otherwise a server that
//! restarts in a loop would lock its token.

use std::{path::Path, sync::Arc};

use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Argon2, PasswordHash};
use aws_lc_rs::hmac;
use kms_hsm::{Pin, PinMemory};
use kms_store::{PinFailure, Store, StoreError};
use tokio::runtime::Handle;
use zeroize::Zeroizing;

use kms_service::island::IslandContext;

/// Remembers refused PINs as Argon2id (RFC 9106) with a random salt, of HMAC-SHA-256 of the PIN
/// under a key that is not in the database.
///
/// A PIN has few digits, and a refused PIN is often nearly the right one. Without the key, a reader
/// of the database could find it by trying all PINs. The key comes from the server's TLS private
/// key, so each server has its own memory: each of several servers tries a wrong PIN once.
pub struct StoredPinMemory {
    store: Arc<dyn Store>,
    runtime: Handle,
    key: hmac::Key,
    /// The name of this key's memory, different from those of other servers.
    name: String,
}

impl StoredPinMemory {
    /// A memory in this database, of the server with this TLS private key (PEM file). Called inside
    /// the tokio runtime; its methods are called by the threads of tokens.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn new(store: Arc<dyn Store>, tls_private_key: &Path) -> std::io::Result<Self> {
        Ok(Self::with_secret(store, &Zeroizing::new(std::fs::read(tls_private_key)?)))
    }

    fn with_secret(store: Arc<dyn Store>, secret: &[u8]) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let key = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&secret, b"meterkms/pin-memory/key").as_ref());
        let name = hmac::sign(&secret, b"meterkms/pin-memory/name");
        let name = hex::encode(name.as_ref().get(..8).unwrap_or_default());
        Self { store, runtime: Handle::current(), key, name }
    }

    /// The name of the memory of a token.
    fn row(&self, token_serial: &str) -> String {
        format!("{token_serial}/{}", self.name)
    }

    /// The value that is hashed instead of the PIN.
    fn keyed(&self, pin: &Pin) -> hmac::Tag {
        hmac::sign(&self.key, pin.octets())
    }

    /// Moves an entry of an earlier version, which had no key, to this memory. Returns whether this
    /// PIN was refused then.
    fn take_over(&self, token_serial: &str, pin: &Pin) -> Result<bool, StoreError> {
        let Some(failure) = self.runtime.block_on(self.store.pin_failure(token_serial, CKU_USER))? else {
            return Ok(false);
        };
        let refused = is_hash_of(&failure.phc, pin.octets());
        if refused {
            self.remember_refused(token_serial, pin);
        }
        self.runtime.block_on(self.store.clear_pin_failure(token_serial, CKU_USER))?;
        Ok(refused)
    }
}

/// An entry that cannot be read counts as the same PIN: an operator can correct one attempt too
/// few, but one attempt too many locks a token.
fn is_hash_of(phc: &str, octets: &[u8]) -> bool {
    PasswordHash::new(phc).map_or(true, |hash| Argon2::default().verify_password(octets, &hash).is_ok())
}

impl PinMemory for StoredPinMemory {
    fn was_refused(&self, token_serial: &str, pin: &Pin) -> bool {
        let known = self.take_over(token_serial, pin).and_then(|refused| {
            let failure = self.runtime.block_on(self.store.pin_failure(&self.row(token_serial), CKU_USER))?;
            Ok(refused || failure.is_some_and(|failure| is_hash_of(&failure.phc, self.keyed(pin).as_ref())))
        });
        known.unwrap_or_else(|error| {
            tracing::error!(%error, token = token_serial, "the PIN is not tried: the database cannot say whether the token refused it before");
            true
        })
    }

    fn remember_refused(&self, token_serial: &str, pin: &Pin) {
        let mut salt = [0; 16];
        let phc = aws_lc_rs::rand::fill(&mut salt).map_err(|_| "no random octets".to_owned()).and_then(|()| {
            Argon2::default()
                .hash_password_with_salt(self.keyed(pin).as_ref(), &salt)
                .map(|hash| hash.to_string())
                .map_err(|error| error.to_string())
        });
        let outcome = phc.and_then(|phc| {
            let failure =
                PinFailure { token: self.row(token_serial), user_type: CKU_USER, phc, time: IslandContext::now() };
            self.runtime.block_on(self.store.put_pin_failure(&failure)).map_err(|error| error.to_string())
        });
        if let Err(error) = outcome {
            tracing::error!(
                error,
                token = token_serial,
                "a refused PIN could not be stored; correct the PIN before you restart this server, or the token may lock"
            );
        }
    }
}

/// CKU_USER of PKCS#11: servers log in as this user only.
const CKU_USER: u8 = 1;

#[cfg(test)]
mod tests {
    use kms_store::StoreConfig;

    use super::*;

    #[test]
    fn what_the_database_holds_of_a_refused_pin_does_not_tell_the_pin() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = runtime
            .block_on(kms_store::open(&StoreConfig::new(kms_store::DatabaseLocation::Sqlite(
                folder.path().join("island.db"),
            ))))
            .unwrap();
        let memory = |secret: &[u8]| {
            let _entered = runtime.enter();
            StoredPinMemory::with_secret(Arc::clone(&store), secret)
        };
        let pin = |text: &str| Pin::new(text.to_owned());
        let (one, two) = (memory(b"the key of one"), memory(b"the key of two"));
        one.remember_refused("TOKEN", &pin("123456"));
        assert!(
            one.was_refused("TOKEN", &pin("123456")) && memory(b"the key of one").was_refused("TOKEN", &pin("123456"))
        );
        assert!(!one.was_refused("TOKEN", &pin("123457")) && !one.was_refused("OTHER", &pin("123456")));
        // Without the key the row does not say whether a PIN is the one.
        let row = runtime.block_on(store.pin_failure(&one.row("TOKEN"), CKU_USER)).unwrap().unwrap();
        assert!(!is_hash_of(&row.phc, b"123456"));
        // Another server's memory is its own, and overwrites none.
        assert!(!two.was_refused("TOKEN", &pin("123456")));
        two.remember_refused("TOKEN", &pin("654321"));
        assert!(one.was_refused("TOKEN", &pin("123456")));
    }

    #[test]
    fn what_was_remembered_without_a_key_is_taken_over_and_removed() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = runtime
            .block_on(kms_store::open(&StoreConfig::new(kms_store::DatabaseLocation::Sqlite(
                folder.path().join("island.db"),
            ))))
            .unwrap();
        let memory = {
            let _entered = runtime.enter();
            StoredPinMemory::with_secret(Arc::clone(&store), b"a key")
        };
        for (tried, refused) in [("123456", true), ("123457", false)] {
            let phc = Argon2::default().hash_password_with_salt(b"123456", &[7; 16]).unwrap().to_string();
            let failure =
                PinFailure { token: "TOKEN".to_owned(), user_type: CKU_USER, phc, time: IslandContext::now() };
            runtime.block_on(store.put_pin_failure(&failure)).unwrap();
            assert_eq!(memory.was_refused("TOKEN", &Pin::new(tried.to_owned())), refused);
            assert_eq!(runtime.block_on(store.pin_failure("TOKEN", CKU_USER)), Ok(None));
        }
        assert!(memory.was_refused("TOKEN", &Pin::new("123456".to_owned())));
    }
}
