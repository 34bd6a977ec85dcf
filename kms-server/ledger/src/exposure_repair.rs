//! The index of exposures of rows that were written before there was an index, or of which it was
//! changed by somebody else. The sealed rows decide (I5): the index is made of them anew.

use std::collections::HashSet;

use kms_domain::RowId;
use kms_store::{Changes, Decision, ExposureCursor, ExposureRow, Lookup, Reads, SealedRow};

use super::{
    committer::Committer,
    exposure_rows::exposure_rows,
    sealed::{open_row, sealed_name},
};
use kms_base::error::ServiceError;

impl Committer {
    /// The rows of the index of exposures that repeat a sealed row, which was read outside a
    /// transaction. `None`: the row does not verify.
    pub fn exposure_rows(&self, id: &RowId, row: &SealedRow) -> Option<Vec<ExposureRow>> {
        let shared = &self.shared;
        let opened = open_row(id, Some(row), &shared.seal.load(), &shared.seen, &shared.settings.island).ok()?;
        opened.value.as_ref().map(exposure_rows)
    }

    /// Writes the rows of the index of exposures that repeat these sealed rows, as they are in the
    /// transaction, and removes those of `strays` that repeat none of them. Rows that do not verify
    /// are left out. The index is no sealed row, so there is no record.
    ///
    /// # Errors
    /// The database is unavailable.
    pub async fn index_exposures(
        &self,
        owners: &[RowId],
        strays: &[(ExposureCursor, Option<ExposureRow>)],
    ) -> Result<(), ServiceError> {
        let mut reads = Reads::default();
        for id in owners {
            match id {
                RowId::Meter(title) => reads.meters.push(*title),
                other => reads.sealed.push(sealed_name(other)),
            }
        }
        let shared = &self.shared;
        let mut decide = |set: &kms_store::ReadSet| {
            let mut changes = Changes::default();
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
                    Ok(opened) => {
                        changes.exposures.extend(opened.value.as_ref().map(exposure_rows).unwrap_or_default())
                    }
                    // What the row said cannot be known, so nothing of it is removed.
                    Err(_) => drop(refused.insert(id)),
                }
            }
            let repeats = |stray: &ExposureRow| {
                changes.exposures.iter().any(|row| (&row.party, row.owner) == (&stray.party, stray.owner))
            };
            let gone: Vec<ExposureCursor> = strays
                .iter()
                .filter(|(_, stray)| refused.is_empty() && !stray.as_ref().is_some_and(repeats))
                .map(|(place, _)| *place)
                .collect();
            changes.exposures_gone = gone;
            Decision::Commit(Box::new(changes))
        };
        shared.store.transact(reads, &mut decide).await?;
        Ok(())
    }
}
