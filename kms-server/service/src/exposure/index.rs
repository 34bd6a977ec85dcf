//! The index of exposures, compared with the sealed rows in both directions. The scrubber reports
//! differences; the daily retention pass makes the index anew where it differs, and so does the
//! first start after an upgrade for rows that were written before there was an index.

use std::{collections::HashSet, sync::Arc};

use kms_domain::{Owner, RowId, SystemTitle};
use kms_proto::v1::{SecurityEvent, audit_record::Event};
use kms_store::{ExposureCursor, ExposureOwner, ExposureRow, MeterFilter, Reads, RowKind, SealedRow};

use crate::{island::IslandContext, row_id::row_id};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

/// What differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// A sealed row says this, and the index does not, or says something else.
    Missing(RowId, ExposureRow),
    /// The index has a row that no sealed row supports. The ids are those of the sealed rows that
    /// it could repeat.
    Stray(Vec<RowId>, ExposureCursor, Option<ExposureRow>),
}

/// The walk over all sealed rows with keys, and then over the index.
pub(crate) struct IndexWalk<'a> {
    island: &'a IslandContext,
    stage: Stage,
}

enum Stage {
    Meters(Option<SystemTitle>),
    Sealed(usize, Option<Vec<u8>>),
    Index(Option<ExposureCursor>),
    Done,
}

impl<'a> IndexWalk<'a> {
    pub(crate) const fn new(island: &'a IslandContext) -> Self {
        Self { island, stage: Stage::Meters(None) }
    }

    /// The walk over the index alone, while it is known to lack rows.
    pub(crate) const fn over_the_index(island: &'a IslandContext) -> Self {
        Self { island, stage: Stage::Index(None) }
    }

    /// Compares one more page; `None` behind the last.
    pub(crate) async fn step(&mut self) -> Result<Option<Vec<Difference>>, ServiceError> {
        let store = &self.island.store;
        match &self.stage {
            Stage::Meters(after) => {
                let page = store.meter_page(&MeterFilter::default(), *after, PAGE).await?;
                self.stage = match page.last() {
                    Some(last) => Stage::Meters(Some(last.title)),
                    None => Stage::Sealed(0, None),
                };
                let rows: Vec<_> = page.into_iter().map(|row| (RowId::Meter(row.title), row.row)).collect();
                self.missing(&rows).await.map(Some)
            }
            Stage::Sealed(at, after) => {
                let at = *at;
                let Some(kind) = KINDS.get(at).copied() else {
                    self.stage = Stage::Index(None);
                    return Ok(Some(Vec::new()));
                };
                let page = store.sealed_page(kind, after.as_deref(), PAGE).await?;
                self.stage = match page.last() {
                    Some((last, _)) => Stage::Sealed(at, Some(last.clone())),
                    None => Stage::Sealed(at + 1, None),
                };
                let id = |octets: &[u8]| row_id(kind.number(), octets, self.island.name());
                let rows: Vec<_> = page.into_iter().filter_map(|(octets, row)| Some((id(&octets)?, row))).collect();
                self.missing(&rows).await.map(Some)
            }
            Stage::Index(after) => {
                let page = store.exposure_page(*after, PAGE).await?;
                self.stage = match page.last() {
                    Some((last, _)) => Stage::Index(Some(*last)),
                    None => Stage::Done,
                };
                self.strays(page).await.map(Some)
            }
            Stage::Done => Ok(None),
        }
    }

    /// What these sealed rows say and the index does not. A row that does not verify is a finding
    /// of its own.
    async fn missing(&self, rows: &[(RowId, SealedRow)]) -> Result<Vec<Difference>, ServiceError> {
        let suspects = self.unsupported(rows).await?;
        if suspects.is_empty() {
            return Ok(Vec::new());
        }
        // A server may have written a row and its part of the index between the two reads.
        let mut again = Vec::with_capacity(suspects.len());
        let ids: HashSet<RowId> = suspects.into_iter().map(|(id, _)| id).collect();
        for id in ids {
            again.extend(self.row(&id).await?.map(|row| (id, row)));
        }
        let differences = self.unsupported(&again).await?;
        Ok(differences.into_iter().map(|(id, row)| Difference::Missing(id, row)).collect())
    }

    async fn unsupported(&self, rows: &[(RowId, SealedRow)]) -> Result<Vec<(RowId, ExposureRow)>, ServiceError> {
        let mut expected: Vec<(RowId, ExposureRow)> = Vec::new();
        for (id, row) in rows {
            let said = self.island.committer.exposure_rows(id, row).unwrap_or_default();
            expected.extend(said.into_iter().map(|said| (id.clone(), said)));
        }
        let all: Vec<ExposureRow> = expected.iter().map(|(_, row)| row.clone()).collect();
        let missing: HashSet<ExposureRow> = self.island.store.missing_exposures(&all).await?.into_iter().collect();
        expected.retain(|(_, row)| missing.contains(row));
        Ok(expected)
    }

    /// Which rows of the index no sealed row supports. Index and sealed row are written together,
    /// and nobody forgets a key: so the sealed row, which is read later, supports what was read of
    /// the index.
    async fn strays(&self, page: Vec<(ExposureCursor, Option<ExposureRow>)>) -> Result<Vec<Difference>, ServiceError> {
        let owners: HashSet<ExposureOwner> = page.iter().filter_map(|(_, row)| Some(row.as_ref()?.owner)).collect();
        let titles: Vec<SystemTitle> = owners.iter().filter_map(title_of).collect();
        let mut said: HashSet<(kms_store::ExposureParty, ExposureOwner)> = HashSet::new();
        let mut refused: HashSet<ExposureOwner> = HashSet::new();
        let mut rows: Vec<(ExposureOwner, RowId, SealedRow)> = Vec::new();
        for row in self.island.store.meters(&titles).await? {
            rows.push((ExposureOwner::Owner(Owner::Meter(row.title)), RowId::Meter(row.title), row.row));
        }
        for owner in owners.iter().filter(|owner| title_of(owner).is_none()) {
            for id in self.candidates(*owner).await? {
                rows.extend(self.row(&id).await?.map(|row| (*owner, id, row)));
            }
        }
        for (owner, id, row) in &rows {
            match self.island.committer.exposure_rows(id, row) {
                Some(rows) => said.extend(rows.into_iter().map(|row| (row.party, row.owner))),
                None => drop(refused.insert(*owner)),
            }
        }
        let mut strays = Vec::new();
        for (place, row) in page {
            let supported = row
                .as_ref()
                .is_some_and(|row| refused.contains(&row.owner) || said.contains(&(row.party.clone(), row.owner)));
            if !supported {
                let owner = row.as_ref().map(|row| row.owner);
                let ids: Vec<RowId> =
                    rows.iter().filter(|(of, ..)| Some(*of) == owner).map(|(_, id, _)| id.clone()).collect();
                strays.push(Difference::Stray(ids, place, row));
            }
        }
        Ok(strays)
    }

    /// The sealed rows that a row of the index could repeat: one, or the counter domains with its
    /// prefix.
    async fn candidates(&self, owner: ExposureOwner) -> Result<Vec<RowId>, ServiceError> {
        let prefix = match owner {
            ExposureOwner::Owner(Owner::Meter(title)) => return Ok(vec![RowId::Meter(title)]),
            ExposureOwner::Owner(Owner::Group(id)) => return Ok(vec![RowId::Group(id)]),
            ExposureOwner::Owner(Owner::DeviceType(id)) => return Ok(vec![RowId::DeviceType(id)]),
            ExposureOwner::KeyValue(prefix) => prefix.0,
        };
        let page = self.island.store.sealed_page(RowKind::CounterDomain, Some(&prefix), SAME_PREFIX).await?;
        let same = page.into_iter().map(|(id, _)| id).filter(|id| id.starts_with(&prefix));
        Ok(same.filter_map(|id| row_id(RowKind::CounterDomain.number(), &id, self.island.name())).collect())
    }

    async fn row(&self, id: &RowId) -> Result<Option<SealedRow>, ServiceError> {
        if let RowId::Meter(title) = id {
            return Ok(self.island.store.meters(&[*title]).await?.into_iter().next().map(|row| row.row));
        }
        let (kind, octets) = kms_ledger::sealed_name(id);
        Ok(self.island.store.sealed(kind, &octets).await?)
    }
}

/// Makes the index anew where it differs from the sealed rows. Returns how many rows differed. If
/// the index was complete before, that is a security event: somebody else has changed it, or a
/// server of an earlier version has written rows.
///
/// # Errors
/// The database is unavailable. What was written before stays.
pub(crate) async fn complete_index(island: &Arc<IslandContext>) -> Result<u64, ServiceError> {
    let was_complete = island.store.exposures_are_complete().await?;
    let (mut walk, mut differed) = (IndexWalk::new(island), 0_u64);
    while let Some(differences) = walk.step().await? {
        differed += differences.len() as u64;
        let (mut owners, mut strays) = (HashSet::new(), Vec::new());
        for difference in differences {
            match difference {
                Difference::Missing(id, _) => drop(owners.insert(id)),
                Difference::Stray(ids, place, row) => {
                    owners.extend(ids);
                    strays.push((place, row));
                }
            }
        }
        if !owners.is_empty() || !strays.is_empty() {
            let owners: Vec<RowId> = owners.into_iter().collect();
            island.committer.index_exposures(&owners, &strays).await?;
        }
    }
    island.store.note_exposures_complete().await?;
    if was_complete && differed > 0 {
        let detail = format!(
            "{differed} rows of the index of exposures were not what the sealed rows say; they were written again"
        );
        let event = SecurityEvent { kind: "exposure-index-differed".to_owned(), detail, meter: Default::default() };
        let act = island.committer.act(ServerAct::INDEX_EXPOSURES, Reads::default(), move |view| {
            Ok(Decision::of(Some(view.append(Event::SecurityEvent(event.clone()))), ()))
        });
        act.await?;
    }
    Ok(differed)
}

/// All differences.
#[cfg(test)]
pub(crate) async fn differences(island: &IslandContext) -> Result<Vec<Difference>, ServiceError> {
    let (mut walk, mut all) = (IndexWalk::new(island), Vec::new());
    while let Some(differences) = walk.step().await? {
        all.extend(differences);
    }
    Ok(all)
}

const fn title_of(owner: &ExposureOwner) -> Option<SystemTitle> {
    match owner {
        ExposureOwner::Owner(Owner::Meter(title)) => Some(*title),
        _ => None,
    }
}

/// The kinds of rows, beside meters, that the index repeats.
const KINDS: [RowKind; 3] = [RowKind::Group, RowKind::DeviceType, RowKind::CounterDomain];
/// Rows of one page.
const PAGE: u32 = 1_000;
/// Counter domains with the same 8 octets: more than one is a coincidence.
const SAME_PREFIX: u32 = 16;
