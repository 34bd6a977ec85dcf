//! The newest generation that this server has seen of each row (I5): a row does not get older, and
//! does not vanish.

use std::{collections::HashMap, sync::RwLock};

use kms_domain::RowId;

/// The newest generation that this server has seen of each row (I5).
#[derive(Default)]
pub(super) struct Seen {
    meters: RwLock<HashMap<i64, u64>>,
    others: RwLock<HashMap<RowId, u64>>,
}

impl Seen {
    pub(super) fn generation(&self, id: &RowId) -> Option<u64> {
        match id {
            RowId::Meter(title) => self.meters.read().ok()?.get(&title.as_i64()).copied(),
            other => self.others.read().ok()?.get(other).copied(),
        }
    }

    /// How many rows are remembered.
    pub(super) fn count(&self) -> usize {
        let (meters, others) = (self.meters.read(), self.others.read());
        meters.map_or(0, |meters| meters.len()) + others.map_or(0, |others| others.len())
    }

    pub(super) fn note(&self, id: &RowId, generation: u64) {
        if self.generation(id).is_some_and(|known| known >= generation) {
            return;
        }
        match id {
            RowId::Meter(title) => {
                if let Ok(mut meters) = self.meters.write() {
                    let known = meters.entry(title.as_i64()).or_default();
                    *known = generation.max(*known);
                }
            }
            other => {
                if let Ok(mut others) = self.others.write() {
                    let known = others.entry(other.clone()).or_default();
                    *known = generation.max(*known);
                }
            }
        }
    }
}
