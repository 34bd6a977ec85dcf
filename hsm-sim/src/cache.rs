//! A cache of token objects that a session uses often, such as the KEK of all its unwraps.
//!
//! All sessions use the same few token objects. Looked up in the token's table, each use would
//! write the lock and the reference count that all threads share, and threads would wait for each
//! other's cache lines. So a session keeps copies of its own (the key material itself is shared,
//! and never written). The token empties all caches when a token object changes or goes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cryptoki_sys::CK_OBJECT_HANDLE;

use crate::object::Object;
use crate::table::Table;

/// Copies of the token objects that one session used last.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct ObjectCache(Mutex<Vec<Arc<Object>>>);

impl ObjectCache {
    /// The object with this handle, from the cache or from the table.
    pub(crate) fn get(&self, handle: CK_OBJECT_HANDLE, table: &Table<Object>) -> Option<Arc<Object>> {
        // The lock is held during the lookup in the table. So an object that is removed meanwhile
        // is either not found, or removed from this cache afterwards.
        let mut known = self.lock();
        if let Some(object) = known.iter().find(|object| object.handle == handle) {
            return Some(Arc::clone(object));
        }
        let object = table.get(handle)?;
        if object.id.is_none() {
            return Some(object);
        }
        let copy = Arc::new(Object::clone(&object));
        if known.len() >= MOST {
            known.remove(0);
        }
        known.push(Arc::clone(&copy));
        Some(copy)
    }

    /// Empties the cache.
    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Object>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session of the server uses few: storage KEKs, roots, the seal root.
const MOST: usize = 8;
