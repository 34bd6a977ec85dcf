//! The index of exposures of rows that were written before there was an index, or of which it was
//! changed by somebody else. The sealed rows decide (I5): the index is made of them anew.

use std::collections::HashSet;

use kms_domain::RowId;
use kms_store::{Changes, Decision, ExposureCursor, ExposureRow, Lookup, Reads, SealedRow};

use super::{
    committer::Committer,
    exposure_rows::exposure_rows,
    sealed::{look_at_row, open_row, sealed_name},
};
use kms_base::error::ServiceError;

impl Committer {
    /// The rows of the index of exposures that repeat a sealed row, which was read outside a
    /// transaction. `None`: the row does not verify. A walk asks for every row of the island, so
    /// the generation is compared with what this server has seen (I5), and not noted.
    pub fn exposure_rows(&self, id: &RowId, row: &SealedRow) -> Option<Vec<ExposureRow>> {
        let shared = &self.shared;
        let opened = look_at_row(id, Some(row), &shared.seal.load(), &shared.seen, &shared.settings.island).ok()?;
        opened.value.as_ref().map(exposure_rows)
    }

    /// Writes the rows of the index of exposures that repeat these sealed rows, as they are in the
    /// transaction, and removes those of `strays` that repeat none of them. Rows that do not verify
    /// are left out. Returns how many rows of the index were not so: under the locks of the sealed
    /// rows, so what other servers write at the same time does not count. The index is no sealed
    /// row, so the transaction has no record: who asked for it records what differed.
    ///
    /// # Errors
    /// The database is unavailable.
    pub async fn index_exposures(
        &self,
        owners: &[RowId],
        strays: &[(ExposureCursor, Option<ExposureRow>)],
    ) -> Result<u64, ServiceError> {
        let mut reads = Reads::default();
        for id in owners {
            match id {
                RowId::Meter(title) => reads.meters.push(*title),
                other => reads.sealed.push(sealed_name(other)),
            }
        }
        let (shared, mut differed) = (&self.shared, 0);
        let mut decide = |set: &kms_store::ReadSet| {
            let mut expected: Vec<ExposureRow> = Vec::new();
            let mut refused = HashSet::new();
            for id in owners {
                let row = match id {
                    RowId::Meter(title) => set.meter(*title),
                    other => {
                        let (kind, octets) = sealed_name(other);
                        set.sealed(kind, &octets)
                    }
                };
                let Lookup::Present(row) = row else { continue };
                match open_row(id, Some(row), &shared.seal.load(), &shared.seen, &shared.settings.island) {
                    Ok(opened) => expected.extend(opened.value.as_ref().map(exposure_rows).unwrap_or_default()),
                    // What the row said cannot be known, so nothing of it is removed.
                    Err(_) => drop(refused.insert(id)),
                }
            }
            let unread: Vec<_> = expected.iter().filter(|row| set.has_exposure(row).is_none()).cloned().collect();
            if !unread.is_empty() {
                return Decision::More(Box::new(Reads { exposures: unread, ..Reads::default() }));
            }
            let repeated: HashSet<_> = expected.iter().map(|row| (&row.party, row.owner)).collect();
            let repeats = |stray: &ExposureRow| repeated.contains(&(&stray.party, stray.owner));
            let gone: Vec<ExposureCursor> = strays
                .iter()
                .filter(|(_, stray)| refused.is_empty() && !stray.as_ref().is_some_and(repeats))
                .map(|(place, _)| *place)
                .collect();
            expected.retain(|row| set.has_exposure(row) == Some(false));
            differed = (expected.len() + gone.len()) as u64;
            if differed == 0 {
                return Decision::Abandon;
            }
            Decision::Commit(Box::new(Changes { exposures: expected, exposures_gone: gone, ..Changes::default() }))
        };
        shared.store.transact(reads, &mut decide).await?;
        Ok(differed)
    }
}
