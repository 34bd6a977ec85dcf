//! The chunks of counters that this run of the server has reserved, in its memory (I4).

use std::collections::HashMap;

use kms_domain::{
    CounterDomainId, CounterKey, KeyType, KeyVersionNumber, LiveChunk, Owner, SecuritySetupId, UnixMillis,
};

/// The counter that a chunk is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ChunkName {
    /// Of one key version.
    Version { owner: Owner, setup: SecuritySetupId, key_type: KeyType, version: KeyVersionNumber, counter: CounterKey },
    /// Of a key value that several slots share.
    Domain { domain: CounterDomainId, counter: CounterKey },
}

/// A chunk that this server allocates counters from.
pub(super) struct HeldChunk {
    pub(super) chunk: LiveChunk,
    /// The end of the newest lease that was allocated from it.
    pub(super) leased_until: UnixMillis,
}

/// Chunks whose reservation is durable (I4).
#[derive(Default)]
pub(super) struct Chunks(HashMap<ChunkName, HeldChunk>);

impl Chunks {
    pub(super) fn get(&self, name: &ChunkName) -> Option<&HeldChunk> {
        self.0.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &ChunkName) -> Option<&mut HeldChunk> {
        self.0.get_mut(name)
    }

    /// Adds chunks, once their reservation is durable.
    pub(super) fn extend(&mut self, reserved: HashMap<ChunkName, HeldChunk>) {
        self.0.extend(reserved);
    }

    /// The end of the counters that this server knows as reserved; 0 if it has no chunk.
    pub(super) fn bound(&self, name: &ChunkName) -> u64 {
        self.0.get(name).map_or(0, |held| held.chunk.bound())
    }
}
