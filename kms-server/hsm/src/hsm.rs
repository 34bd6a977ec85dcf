//! The verbs that the services need. Each call is an item in the queue of one token; a batch has
//! one item for each of its parts.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use cryptoki_sys::CKM_ECDSA;
use kms_domain::{IslandName, KeyClass, KeyLength, KeyType, OaepHash};
use zeroize::Zeroizing;

use crate::agreement::{Agreement, Recipient};
use crate::batch_key::BatchKey;
use crate::capabilities::Capabilities;
use crate::envelope::{Envelope, WrappedKey};
use crate::error::HsmError;
use crate::frame::{FrameInput, FrameKeys, ProtectedFrame, each};
use crate::import::{ImportJob, ImportRefusal, StorageKekVersions, StoredKey};
use crate::inventory::{InventoryObject, inventory};
use crate::key_source::KeySource;
use crate::label::{Purpose, RootVersion, TokenKey};
use crate::pin::PinMemory;
use crate::public_key::{public_point, rsa_public_key_der};
use crate::queue::Payer;
use crate::token::{Pending, Token};
use crate::token_settings::TokenSettings;
use crate::transfer::TransferJob;
use crate::worker::Worker;

/// The HSM of an island: which token holds the keys of which class. Clones share the tokens.
#[derive(Clone)]
pub struct Hsm {
    island: IslandName,
    tokens: Arc<HashMap<KeyClass, Token>>,
    /// The payer in whose lane of the queues the verbs of this handle wait.
    payer: Payer,
    /// The token of keys that belong to no class: seal root, fingerprint KEK, audit signing key,
    /// vendor transport key.
    general: Token,
    storage_keks: Arc<RwLock<StorageKekVersions>>,
}

impl Hsm {
    /// One token for all classes: the simple form. Returns at once; see [`Hsm::usable`].
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn start(island: IslandName, settings: TokenSettings, memory: Arc<dyn PinMemory>) -> Result<Self, HsmError> {
        let token = Token::start(settings, island.clone(), memory)?;
        let tokens = [KeyClass::Kek, KeyClass::Session, KeyClass::Authentication, KeyClass::Ca]
            .map(|class| (class, token.clone()));
        Ok(Self::of_tokens(island, token, tokens.into()))
    }

    /// Tokens that are started already: `general` for the keys of no class, `tokens` for the
    /// others. A class without a token is not served: verbs that need it answer
    /// [`HsmError::NotServed`].
    pub fn of_tokens(island: IslandName, general: Token, tokens: HashMap<KeyClass, Token>) -> Self {
        Self {
            island,
            tokens: Arc::new(tokens),
            payer: None,
            general,
            storage_keks: Arc::new(RwLock::new(StorageKekVersions::FIRST)),
        }
    }

    /// The same tokens, for jobs of this payer. Payers are served in turn by the cost of their
    /// jobs, so that one with many or large jobs delays only itself. A handle without a payer is
    /// the server's own.
    #[must_use]
    pub fn paid_by(&self, name: &str) -> Self {
        Self { payer: Some(name.into()), ..self.clone() }
    }

    /// Stores new and imported keys of a class under this version of its storage KEK from now on,
    /// instead of the first. Counts for all clones.
    pub fn use_storage_kek(&self, class: KeyClass, version: RootVersion) {
        self.storage_keks.write().unwrap_or_else(PoisonError::into_inner).set(class, version);
    }

    /// The version of a class's storage KEK that new and imported keys are stored under.
    pub fn storage_kek(&self, class: KeyClass) -> RootVersion {
        self.storage_keks().of(class)
    }

    fn storage_keks(&self) -> StorageKekVersions {
        *self.storage_keks.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The island.
    pub const fn island(&self) -> &IslandName {
        &self.island
    }

    /// Whether there is a token for this class.
    pub fn serves(&self, class: KeyClass) -> bool {
        self.tokens.contains_key(&class)
    }

    /// The token of a class.
    ///
    /// # Errors
    /// [`HsmError::NotServed`].
    pub fn token(&self, class: KeyClass) -> Result<&Token, HsmError> {
        self.tokens.get(&class).ok_or(HsmError::NotServed { class })
    }

    /// All tokens, each once, the general one first.
    pub fn all_tokens(&self) -> Vec<&Token> {
        let mut all = vec![&self.general];
        for token in self.tokens.values() {
            if !all.iter().any(|known| known.is_same(token)) {
                all.push(token);
            }
        }
        all
    }

    /// Waits until all tokens are usable; the capabilities of the general one.
    ///
    /// # Errors
    /// A token needs an operator, or is not usable within `limit`.
    pub async fn usable(&self, limit: Duration) -> Result<Arc<Capabilities>, HsmError> {
        for token in self.all_tokens() {
            token.usable(limit).await?;
        }
        self.general.usable(limit).await
    }

    /// Stops all threads after the waiting jobs. Blocking.
    pub fn close(&self) {
        for token in self.all_tokens() {
            token.close();
        }
    }

    /// The indices of `keys`, grouped by token: an envelope holds keys of one token.
    ///
    /// # Errors
    /// [`HsmError::NotServed`] for a class without a token.
    pub fn split_by_token(&self, keys: &[KeySource]) -> Result<Vec<Vec<usize>>, HsmError> {
        let mut groups: Vec<(&Token, Vec<usize>)> = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            let token = self.token(key.class())?;
            match groups.iter_mut().find(|(known, _)| known.is_same(token)) {
                Some((_, group)) => group.push(index),
                None => groups.push((token, vec![index])),
            }
        }
        Ok(groups.into_iter().map(|(_, group)| group).collect())
    }

    /// Wraps keys for a grantee and seals the manifest (docs/formats.md, *Envelopes*).
    ///
    /// `header` makes the header's octets from the agreement, `manifest` the manifest's from the
    /// wrapped keys, which come in the order of `keys`. Both run on a worker thread, so they must
    /// not block, and a second time if the session was lost meanwhile. A key that cannot be made
    /// (missing root, refused blob) is an error in its place; the envelope holds the others.
    ///
    /// # Errors
    /// The keys are of two tokens, or the HSM fails. Then no key has left.
    pub async fn envelope<H, M>(
        &self,
        recipient: Recipient,
        keys: Vec<KeySource>,
        mut header: H,
        mut manifest: M,
    ) -> Result<Envelope, HsmError>
    where
        H: FnMut(&Agreement) -> Vec<u8> + Send + 'static,
        M: FnMut(&[Result<WrappedKey, HsmError>]) -> Vec<u8> + Send + 'static,
    {
        let (token, cost) = (self.token_of_all(keys.iter().map(KeySource::class))?, keys.len());
        let job = move |worker: &Worker| worker.envelope(&recipient, &keys, &mut header, &mut manifest);
        token.submit(&self.payer, cost, "envelope", job)?.outcome().await
    }

    /// Protects a DLMS frame. The caller answers for the nonce being new (I4).
    ///
    /// # Errors
    /// A key that cannot be made, keys of two tokens, or a failing HSM.
    pub async fn protect(&self, keys: FrameKeys, frame: FrameInput) -> Result<ProtectedFrame, HsmError> {
        first(self.protect_batch(vec![(keys, frame)]).await?)
    }

    /// Protects frames; one result each.
    ///
    /// # Errors
    /// Keys of two tokens, or a failing HSM.
    pub async fn protect_batch(
        &self,
        frames: Vec<(FrameKeys, FrameInput)>,
    ) -> Result<Vec<Result<ProtectedFrame, HsmError>>, HsmError> {
        let token = self.token_of_frames(frames.iter().map(|(keys, _)| keys))?.clone();
        self.in_parts(&token, "protect", frames, |worker, (keys, frame)| worker.protect(keys, frame)).await
    }

    /// Checks and opens a DLMS frame: its plaintext.
    ///
    /// # Errors
    /// [`HsmError::TagInvalid`], a key that cannot be made, keys of two tokens, or a failing
    /// HSM.
    pub async fn unprotect(&self, keys: FrameKeys, frame: ProtectedFrame) -> Result<Vec<u8>, HsmError> {
        first(self.unprotect_batch(vec![(keys, frame)]).await?)
    }

    /// Checks and opens frames; one result each.
    ///
    /// # Errors
    /// Keys of two tokens, or a failing HSM.
    pub async fn unprotect_batch(
        &self,
        frames: Vec<(FrameKeys, ProtectedFrame)>,
    ) -> Result<Vec<Result<Vec<u8>, HsmError>>, HsmError> {
        let token = self.token_of_frames(frames.iter().map(|(keys, _)| keys))?.clone();
        self.in_parts(&token, "unprotect", frames, |worker, (keys, frame)| worker.unprotect(keys, frame)).await
    }

    /// Wraps keys for meters; one result each: 24 or 40 octets.
    ///
    /// # Errors
    /// The KEKs and the keys are of two tokens (a server of another role has both), or the HSM
    /// fails.
    pub async fn wrap_for_meters(&self, jobs: Vec<TransferJob>) -> Result<Vec<Result<Vec<u8>, HsmError>>, HsmError> {
        let token = self.token_of_all(jobs.iter().flat_map(|job| [job.kek.class(), job.key.class()]))?.clone();
        self.in_parts(&token, "wrap-for-meter", jobs, |worker, job| worker.wrap_for_meter(job)).await
    }

    /// Opens a vendor's batch key: RSA-OAEP under this version of the vendor transport key, an AES
    /// key inside.
    ///
    /// # Errors
    /// [`HsmError::WrappedKeyInvalid`] if it is for another transport key or damaged, or a failing
    /// HSM.
    pub async fn open_batch_key(
        &self,
        transport_version: RootVersion,
        hash: OaepHash,
        ciphertext: Vec<u8>,
    ) -> Result<BatchKey, HsmError> {
        let batch = BatchKey::new(transport_version, hash, ciphertext);
        let opened = batch.clone();
        self.one(self.importing_token()?, OF_RSA, "open-batch-key", move |worker| worker.batch_key(&opened).map(drop))
            .await?;
        Ok(batch)
    }

    /// Imports keys from a batch key to storage wrapping, inside the HSM; one result per job.
    ///
    /// # Errors
    /// The HSM fails: the whole batch can be tried again.
    pub async fn import_keys(
        &self,
        batch: BatchKey,
        jobs: Vec<ImportJob>,
    ) -> Result<Vec<Result<StoredKey, ImportRefusal>>, HsmError> {
        let versions = self.storage_keks();
        let token = self.importing_token()?;
        let submit = |jobs: Vec<ImportJob>| {
            let batch = batch.clone();
            token.submit(&self.payer, jobs.len(), "import", move |worker| worker.import_keys(&batch, &jobs, versions))
        };
        joined(parts(jobs).into_iter().map(submit).collect::<Result<_, _>>()?).await
    }

    /// Makes a random AES key and stores it under the storage KEK of its type's class.
    ///
    /// # Errors
    /// Missing roots, or a failing HSM.
    pub async fn generate_stored(&self, key_type: KeyType, length: KeyLength) -> Result<StoredKey, HsmError> {
        let version = self.storage_keks().of(key_type.class());
        self.one(self.token(key_type.class())?, 1, "generate", move |worker| {
            worker.generate_stored(key_type, length, version)
        })
        .await
    }

    /// Wraps a key anew under the present storage KEK of its class: when the KEK is rotated, or a
    /// diversified key becomes a stored one.
    ///
    /// # Errors
    /// A refused blob, missing roots, or a failing HSM.
    pub async fn rewrap_stored(&self, source: KeySource) -> Result<StoredKey, HsmError> {
        let version = self.storage_keks().of(source.class());
        self.one(self.token(source.class())?, 1, "rewrap", move |worker| worker.rewrap(&source, version)).await
    }

    /// Wraps keys anew under this version of their class's storage KEK; one result each. Every new
    /// wrap is unwrapped again inside the HSM, and the key is compared, before the wrap is
    /// returned.
    ///
    /// # Errors
    /// Keys of two tokens, or a failing HSM: the whole batch can be tried again.
    pub async fn rewrap_batch(
        &self,
        sources: Vec<KeySource>,
        version: RootVersion,
    ) -> Result<Vec<Result<StoredKey, HsmError>>, HsmError> {
        let token = self.token_of_all(sources.iter().map(KeySource::class))?.clone();
        self.in_parts(&token, "rewrap", sources, move |worker, source| worker.rewrap(source, version)).await
    }

    /// Whether the token that serves it holds this key: the secret key, or the private key of a
    /// pair.
    ///
    /// # Errors
    /// [`HsmError::NotServed`], two keys of one name, or a failing HSM.
    pub async fn has_key(&self, key: TokenKey) -> Result<bool, HsmError> {
        self.one(self.token_of_key(key)?, 1, "find", move |worker| worker.holds(key)).await
    }

    /// Destroys a root in every token of this server that holds it: all objects of its name.
    /// Returns their number. This cannot be undone: the caller must know that nothing needs the
    /// root.
    ///
    /// # Errors
    /// The HSM fails.
    pub async fn destroy_root(&self, key: TokenKey) -> Result<usize, HsmError> {
        let mut destroyed = 0;
        for token in self.all_tokens() {
            destroyed += token.run("destroy-root", move |worker| worker.destroy_token_key(key)).await?;
        }
        Ok(destroyed)
    }

    /// The vendor transport key of this version: DER of its SubjectPublicKeyInfo (RSA, RFC 3279).
    ///
    /// # Errors
    /// The key is missing, or a failing HSM.
    pub async fn transport_key_spki(&self, version: RootVersion) -> Result<Vec<u8>, HsmError> {
        let key = TokenKey { purpose: Purpose::VendorTransport, version };
        let read = move |worker: &Worker| {
            let object = worker.public_key(key)?;
            rsa_public_key_der(&worker.session, object)?
                .ok_or_else(|| HsmError::invalid("vendor transport key", "the token's public key has no modulus"))
        };
        self.one(self.importing_token()?, 1, "public-key", read).await
    }

    /// Signs a SHA-256 digest by ECDSA P-256 with [`Purpose::AuditSign`] or [`Purpose::Ca`]: `r ‖
    /// s`, 64 octets.
    ///
    /// # Errors
    /// The key is missing or of another kind, or a failing HSM.
    pub async fn sign_ecdsa(&self, key: TokenKey, digest: [u8; 32]) -> Result<[u8; 64], HsmError> {
        let sign = move |worker: &Worker| {
            let object = worker.token_key(key)?;
            let mut signature = [0; 64];
            match worker.session.sign(CKM_ECDSA, object, &digest, &mut signature)? {
                64 => Ok(signature),
                _ => Err(HsmError::invalid(
                    "signing key",
                    "its signatures are not 64 octets long, so it is no P-256 key",
                )),
            }
        };
        self.one(self.signing_token(key)?, 1, "sign", sign).await
    }

    /// The public key of [`Purpose::AuditSign`] or [`Purpose::Ca`]: `04 ‖ x ‖ y`, P-256.
    ///
    /// # Errors
    /// The key is missing or of another kind, or a failing HSM.
    pub async fn public_key(&self, key: TokenKey) -> Result<[u8; 65], HsmError> {
        let read = move |worker: &Worker| {
            let object = worker.public_key(key)?;
            public_point(&worker.session, object)
        };
        self.one(self.signing_token(key)?, 1, "public-key", read).await
    }

    /// HMAC-SHA-256 under this version of the seal root: the keys of docs/formats.md, *Keys derived
    /// from the seal root*.
    ///
    /// # Errors
    /// The root is missing, or a failing HSM.
    pub async fn mac(&self, version: RootVersion, message: Vec<u8>) -> Result<Zeroizing<[u8; 32]>, HsmError> {
        let compute = move |worker: &Worker| {
            let root = worker.token_key(TokenKey { purpose: Purpose::Seal, version })?;
            let mut mac = Zeroizing::new([0; 32]);
            worker.mac_into(root, &message, &mut mac)?;
            Ok(mac)
        };
        self.one(&self.general, 1, "mac", compute).await
    }

    /// Random octets of the general token.
    ///
    /// # Errors
    /// The HSM fails.
    pub async fn random(&self, octets: usize) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let read = move |worker: &Worker| {
            let mut buffer = Zeroizing::new(vec![0; octets]);
            worker.session.random(&mut buffer)?;
            Ok(buffer)
        };
        self.one(&self.general, 1, "random", read).await
    }

    /// Every object that the tokens show, by token label.
    ///
    /// # Errors
    /// The HSM fails.
    pub async fn inventory(&self) -> Result<Vec<(String, Vec<InventoryObject>)>, HsmError> {
        let mut all = Vec::new();
        for token in self.all_tokens() {
            let objects = token.run("inventory", |worker| inventory(&worker.session)).await?;
            all.push((token.label().to_owned(), objects));
        }
        Ok(all)
    }

    /// One job of this handle's payer.
    async fn one<R: Send + 'static>(
        &self,
        token: &Token,
        cost: usize,
        job: &'static str,
        work: impl FnMut(&Worker) -> Result<R, HsmError> + Send + 'static,
    ) -> Result<R, HsmError> {
        token.submit(&self.payer, cost, job, work)?.outcome().await
    }

    /// A batch, in jobs that keep no worker for long; the results in the order of what was given.
    async fn in_parts<T: Send + 'static, R: Send + 'static>(
        &self,
        token: &Token,
        job: &'static str,
        batch: Vec<T>,
        one: impl Fn(&Worker, &T) -> Result<R, HsmError> + Clone + Send + 'static,
    ) -> Result<Vec<Result<R, HsmError>>, HsmError> {
        let submit = |part: Vec<T>| {
            let one = one.clone();
            token.submit(&self.payer, part.len(), job, move |worker| each(&part, |input| one(worker, input)))
        };
        if (1..=PART).contains(&batch.len()) {
            return submit(batch)?.outcome().await;
        }
        joined(parts(batch).into_iter().map(submit).collect::<Result<_, _>>()?).await
    }

    /// The general token, where it is also that of the KEKs. An import wraps under the storage KEKs
    /// of several classes, so it runs where they and the vendor transport key are: a server that
    /// only grants has neither.
    fn importing_token(&self) -> Result<&Token, HsmError> {
        self.token(KeyClass::Kek).map(|_| &self.general)
    }

    fn signing_token(&self, key: TokenKey) -> Result<&Token, HsmError> {
        match key.purpose {
            Purpose::Ca => self.token(KeyClass::Ca),
            Purpose::AuditSign => Ok(&self.general),
            other => Err(HsmError::invalid("signing key", format!("`{other}` is not a signing key"))),
        }
    }

    fn token_of_key(&self, key: TokenKey) -> Result<&Token, HsmError> {
        match key.purpose {
            Purpose::Diversification(class) | Purpose::StorageKek(class) => self.token(class),
            Purpose::Ca => self.token(KeyClass::Ca),
            Purpose::VendorTransport => self.importing_token(),
            _ => Ok(&self.general),
        }
    }

    fn token_of_frames<'a>(&self, keys: impl Iterator<Item = &'a FrameKeys>) -> Result<&Token, HsmError> {
        self.token_of_all(keys.flat_map(|keys| [keys.encryption.class(), keys.authentication.class()]))
    }

    fn token_of_all(&self, classes: impl Iterator<Item = KeyClass>) -> Result<&Token, HsmError> {
        let mut chosen: Option<&Token> = None;
        for class in classes {
            let token = self.token(class)?;
            if chosen.is_some_and(|chosen| !chosen.is_same(token)) {
                return Err(HsmError::invalid("keys", "they are of more than one token; split them by token"));
            }
            chosen = Some(token);
        }
        Ok(chosen.unwrap_or(&self.general))
    }
}

/// Divides a batch. Each item is moved once, however long the batch is.
fn parts<T>(batch: Vec<T>) -> Vec<Vec<T>> {
    let mut parts = Vec::with_capacity(batch.len().div_ceil(PART));
    let mut rest = batch.into_iter();
    loop {
        let part: Vec<T> = rest.by_ref().take(PART).collect();
        if part.is_empty() {
            return parts;
        }
        parts.push(part);
    }
}

/// The results of all parts, in order. The first error of a whole part is that of the batch; what
/// of it still waits is given up.
async fn joined<R>(pending: Vec<Pending<Vec<R>>>) -> Result<Vec<R>, HsmError> {
    let mut results = Vec::with_capacity(pending.len() * PART);
    for part in pending {
        results.append(&mut part.outcome().await?);
    }
    Ok(results)
}

fn first<T>(results: Vec<Result<T, HsmError>>) -> Result<T, HsmError> {
    results.into_iter().next().unwrap_or_else(|| Err(HsmError::invalid("batch", "a batch of one had no result")))
}

/// Keys, frames or lines of a batch that are one job: a worker is busy with that many, at most,
/// before others have their turn. With 1 ms for each call of an HSM that is about 0.2 s; with a
/// module in memory a few milliseconds.
pub const PART: usize = 64;
/// What an RSA operation costs, in keys.
const OF_RSA: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_divided_in_order() {
        for length in [0, 1, PART - 1, PART, PART + 1, 10 * PART, 10 * PART + 1] {
            let divided = parts((0..length).collect());
            assert_eq!(divided.len(), length.div_ceil(PART));
            assert!(divided.iter().all(|part| (1..=PART).contains(&part.len())));
            assert_eq!(divided.concat(), (0..length).collect::<Vec<_>>());
        }
    }
}
