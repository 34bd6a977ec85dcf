//! The hash chain of one writer's records (docs/formats.md, *Audit records*).

use std::{fmt, sync::Arc};

use aws_lc_rs::{digest, hmac};
use kms_domain::{UnixMillis, WriterId};
use kms_proto::v1::{AuditRecord, audit_record::Event};
use prost::Message;

/// The key of the audit chain: whoever can write the database cannot forge a record without it.
pub struct AuditKey {
    version: u8,
    key: hmac::Key,
}

impl AuditKey {
    /// The key of these 32 octets, which the HSM computed from this version of the seal root.
    pub fn new(version: u8, octets: &[u8; 32]) -> Self {
        Self { version, key: hmac::Key::new(hmac::HMAC_SHA256, octets) }
    }

    /// The version of the seal root that it was computed from.
    pub const fn version(&self) -> u8 {
        self.version
    }

    /// `chain(n)` of `chain(n-1)` and `leaf(n)`.
    pub fn next(&self, previous: &[u8; 32], leaf: &AuditLeaf) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(previous);
        context.update(&leaf.0);
        let mut value = [0; 32];
        value.copy_from_slice(context.sign().as_ref());
        value
    }
}

impl fmt::Debug for AuditKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuditKey(version {})", self.version)
    }
}

/// The audit keys of an island in a server's memory: the current one links new records, and the
/// others check earlier records. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AuditKeys {
    keys: Vec<Arc<AuditKey>>,
    current: Arc<AuditKey>,
}

impl From<AuditKey> for AuditKeys {
    fn from(key: AuditKey) -> Self {
        let current = Arc::new(key);
        Self { keys: vec![Arc::clone(&current)], current }
    }
}

impl AuditKeys {
    /// With one more key.
    #[must_use]
    pub fn with(mut self, key: AuditKey) -> Self {
        if self.get(key.version).is_none() {
            self.keys.push(Arc::new(key));
        }
        self
    }

    /// Begins chains with the key of this version from now on. If there is no such key, nothing
    /// changes.
    #[must_use]
    pub fn using(mut self, version: u8) -> Self {
        if let Some(key) = self.get(version) {
            self.current = Arc::clone(key);
        }
        self
    }

    /// The key that chains are begun with.
    pub const fn current(&self) -> &Arc<AuditKey> {
        &self.current
    }

    /// The key of a version.
    pub fn get(&self, version: u8) -> Option<&Arc<AuditKey>> {
        self.keys.iter().find(|key| key.version == version)
    }

    /// The version of the key that computes `link` from the chain value before it and a record.
    /// None: no known key does.
    pub fn version_of(&self, previous: &[u8; 32], record: &[u8], link: &[u8; 32]) -> Option<u8> {
        let leaf = AuditLeaf::of(record);
        self.keys.iter().find(|key| key.next(previous, &leaf) == *link).map(|key| key.version)
    }
}

/// The leaf hash of a record, 32 octets: `SHA-256(00 ‖ record)` (RFC 9162, 2.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AuditLeaf(pub [u8; 32]);

impl AuditLeaf {
    /// The leaf of an encoded record.
    pub fn of(record: &[u8]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&[0]);
        context.update(record);
        let mut leaf = [0; 32];
        leaf.copy_from_slice(context.finish().as_ref());
        Self(leaf)
    }
}

/// The end of a writer's chain: the next record's number, the last chain value, and the key of the
/// next link.
#[derive(Clone, Debug)]
pub(super) struct ChainHead {
    pub(super) writer: WriterId,
    key: Arc<AuditKey>,
    next_sequence: u64,
    chain: [u8; 32],
}

/// A record in its place in the chain.
pub(super) struct Linked {
    pub(super) sequence: u64,
    pub(super) record: Vec<u8>,
    pub(super) leaf: AuditLeaf,
    pub(super) chain: [u8; 32],
}

impl ChainHead {
    pub(super) fn new(writer: WriterId, key: Arc<AuditKey>) -> Self {
        Self { writer, key, next_sequence: 0, chain: [0; 32] }
    }

    /// The version of the key of the next link.
    pub(super) fn key_version(&self) -> u8 {
        self.key.version
    }

    /// The number of the last record; `None` before the first.
    pub(super) const fn last_sequence(&self) -> Option<u64> {
        self.next_sequence.checked_sub(1)
    }

    /// Numbers, encodes and chains a record. After a record that says that the audit key changes,
    /// the chain continues with the new key.
    pub(super) fn link(&mut self, keys: &AuditKeys, mut record: AuditRecord, now: UnixMillis) -> Linked {
        let mut next = Arc::clone(&self.key);
        if let Some(Event::AuditKeyChanged(changed)) = &mut record.event {
            // A chain never returns to an earlier key: a later version may have become current
            // since this record was requested.
            let requested = u8::try_from(changed.version).ok().and_then(|version| keys.get(version));
            if let Some(key) = requested.filter(|key| key.version > next.version) {
                next = Arc::clone(key);
            }
            changed.version = next.version.into();
        }
        record.writer = self.writer.octets().to_vec().into();
        record.sequence = self.next_sequence;
        record.time_ms = now.0;
        let record = record.encode_to_vec();
        let leaf = AuditLeaf::of(&record);
        self.chain = self.key.next(&self.chain, &leaf);
        self.key = next;
        let linked = Linked { sequence: self.next_sequence, record, leaf, chain: self.chain };
        self.next_sequence += 1;
        linked
    }
}
