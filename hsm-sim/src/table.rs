//! Handles: numbers that name sessions and objects, spread over shards so that threads rarely wait
//! for the same lock.
//!
//! Handles are allocated in blocks, and all handles of a block are in one shard. So a session that
//! takes the handles of its objects from its own block uses cache lines that no other thread
//! writes.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A map from handles to shared values. A reader holds a shard's lock only to clone the [`Arc`].
pub(crate) struct Table<T> {
    shards: Vec<Shard<T>>,
    /// The number of consecutive handles in one shard.
    block: u64,
}

// Each shard has its own cache lines, so that shards do not slow each other down.
#[repr(align(128))]
struct Shard<T>(RwLock<Entries<T>>);

type Entries<T> = HashMap<u64, Arc<T>, BuildHasherDefault<HandleHasher>>;

impl<T> Table<T> {
    /// An empty table whose handles are allocated in blocks of this size, at least one.
    pub(crate) fn new(block: u64) -> Self {
        Self { shards: (0..SHARDS).map(|_| Shard(RwLock::default())).collect(), block: block.max(1) }
    }

    pub(crate) fn get(&self, handle: u64) -> Option<Arc<T>> {
        self.read(handle)?.get(&handle).cloned()
    }

    /// Puts `value` under `handle`, replacing what was there.
    pub(crate) fn insert(&self, handle: u64, value: Arc<T>) {
        if let Some(mut shard) = self.write(handle) {
            shard.insert(handle, value);
        }
    }

    /// Replaces the value of `handle` if it is still `expected`. False: another thread has replaced
    /// or removed it.
    pub(crate) fn replace(&self, handle: u64, expected: &Arc<T>, value: Arc<T>) -> bool {
        let Some(mut shard) = self.write(handle) else { return false };
        match shard.get_mut(&handle) {
            Some(current) if Arc::ptr_eq(current, expected) => {
                *current = value;
                true
            }
            _ => false,
        }
    }

    pub(crate) fn remove(&self, handle: u64) -> Option<Arc<T>> {
        self.write(handle)?.remove(&handle)
    }

    /// All entries that `keep` accepts, in the order of their handles.
    pub(crate) fn collect(&self, keep: impl Fn(&T) -> bool) -> Vec<(u64, Arc<T>)> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.0.read().unwrap_or_else(PoisonError::into_inner);
            found.extend(
                shard.iter().filter(|(_, value)| keep(value)).map(|(handle, value)| (*handle, Arc::clone(value))),
            );
        }
        found.sort_unstable_by_key(|(handle, _)| *handle);
        found
    }

    /// Removes all entries that `condition` accepts, and returns them.
    pub(crate) fn remove_if(&self, condition: impl Fn(&T) -> bool) -> Vec<(u64, Arc<T>)> {
        let mut removed = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.0.write().unwrap_or_else(PoisonError::into_inner);
            removed.extend(shard.extract_if(|_, value| condition(value)));
        }
        removed
    }

    fn read(&self, handle: u64) -> Option<RwLockReadGuard<'_, Entries<T>>> {
        Some(self.shard(handle)?.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, handle: u64) -> Option<RwLockWriteGuard<'_, Entries<T>>> {
        Some(self.shard(handle)?.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn shard(&self, handle: u64) -> Option<&Shard<T>> {
        self.shards.get(usize::try_from(handle / self.block).unwrap_or(0) % SHARDS)
    }
}

/// This module allocates the handles, so no caller can choose colliding ones, and one
/// multiplication is enough to spread them.
#[derive(Default)]
struct HandleHasher(u64);

impl Hasher for HandleHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
}

const SHARDS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_replaced_and_removed() {
        let table = Table::new(4);
        let first = Arc::new(1);
        table.insert(7, Arc::clone(&first));
        table.insert(71, Arc::new(2));
        assert!(table.replace(7, &first, Arc::new(3)));
        assert!(!table.replace(7, &first, Arc::new(4)), "the expected value is stale");
        assert_eq!(table.get(7).as_deref(), Some(&3));
        assert_eq!(table.collect(|_| true).iter().map(|(handle, _)| *handle).collect::<Vec<_>>(), [7, 71]);
        assert_eq!(table.remove_if(|value| *value == 3).len(), 1);
        assert!(table.get(7).is_none());
        assert!(table.remove(71).is_some() && table.remove(71).is_none());
    }
}
