//! The hash chain of one writer's records (docs/formats.md, *Audit records*).

use std::fmt;

use aws_lc_rs::{digest, hmac};
use kms_domain::{UnixMillis, WriterId};
use kms_proto::v1::AuditRecord;
use prost::Message;

/// The key of the audit chain: whoever can write the database cannot forge a record without it.
pub struct AuditKey(hmac::Key);

impl AuditKey {
    /// The key of these 32 octets, which the HSM computed from the seal root.
    pub fn new(octets: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, octets))
    }

    /// `chain(n)` of `chain(n-1)` and `leaf(n)`.
    pub fn next(&self, previous: &[u8; 32], leaf: &AuditLeaf) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(previous);
        context.update(&leaf.0);
        let mut value = [0; 32];
        value.copy_from_slice(context.sign().as_ref());
        value
    }
}

impl fmt::Debug for AuditKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuditKey")
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

/// Where a writer's chain stands: the next record's number and the last chain value.
#[derive(Clone, Debug)]
pub(super) struct ChainHead {
    pub(super) writer: WriterId,
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
    pub(super) fn new(writer: WriterId) -> Self {
        Self { writer, next_sequence: 0, chain: [0; 32] }
    }

    /// The number of the last record; `None` before the first.
    pub(super) const fn last_sequence(&self) -> Option<u64> {
        self.next_sequence.checked_sub(1)
    }

    /// Numbers, encodes and chains a record.
    pub(super) fn link(&mut self, key: &AuditKey, mut record: AuditRecord, now: UnixMillis) -> Linked {
        record.writer = self.writer.octets().to_vec().into();
        record.sequence = self.next_sequence;
        record.time_ms = now.0;
        let record = record.encode_to_vec();
        let leaf = AuditLeaf::of(&record);
        self.chain = key.next(&self.chain, &leaf);
        let linked = Linked { sequence: self.next_sequence, record, leaf, chain: self.chain };
        self.next_sequence += 1;
        linked
    }
}
