//! The index of exposures, compared with the sealed rows in both directions. The scrubber reports
//! differences, and [`super::upkeep`] mends them.
//!
//! Servers write while the walk reads, and it locks nothing. What it names is different all the
//! same: the index was read between two readings of a sealed row that found the same generation.

use std::collections::{HashMap, HashSet};

use kms_domain::{Owner, RowId, SystemTitle};
use kms_store::{ExposureCursor, ExposureOwner, ExposureRow, MeterFilter, RowKind, SealedRow};

use crate::{island::IslandContext, row_id::row_id};
use kms_base::error::ServiceError;

/// What differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// A sealed row says this, and the index does not, or says something else.
    Missing(RowId, ExposureRow),
    /// The index has a row that no sealed row supports. The ids are those of the sealed rows that
    /// it could repeat, whether they exist or not.
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
                self.missing(rows, None).await.map(Some)
            }
            Stage::Sealed(at, after) => {
                let at = *at;
                let Some(kind) = KINDS.get(at).copied() else {
                    self.stage = Stage::Index(None);
                    return Ok(Some(Vec::new()));
                };
                let after = after.clone();
                let page = store.sealed_page(kind, after.as_deref(), PAGE).await?;
                self.stage = match page.last() {
                    Some((last, _)) => Stage::Sealed(at, Some(last.clone())),
                    None => Stage::Sealed(at + 1, None),
                };
                self.missing(self.named(kind, page), Some((kind, after))).await.map(Some)
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

    /// What these sealed rows say and the index does not. `page` says how they were read; `None`:
    /// they are meters'. A row that does not verify is a finding of its own.
    async fn missing(
        &self,
        mut rows: Vec<(RowId, SealedRow)>,
        page: Option<(RowKind, Option<Vec<u8>>)>,
    ) -> Result<Vec<Difference>, ServiceError> {
        let mut differences = Vec::new();
        for _ in 0..ROUNDS {
            let suspects = self.unsupported(&rows).await?;
            let ids: HashSet<RowId> = suspects.iter().map(|(id, _)| id.clone()).collect();
            if ids.is_empty() {
                break;
            }
            let before: HashMap<RowId, u64> = rows.into_iter().map(|(id, row)| (id, row.generation)).collect();
            let again = self.again(&ids, page.as_ref()).await?;
            let (same, changed): (Vec<_>, Vec<_>) =
                again.into_iter().partition(|(id, row)| before.get(id) == Some(&row.generation));
            let same: HashSet<RowId> = same.into_iter().map(|(id, _)| id).collect();
            let certain = suspects.into_iter().filter(|(id, _)| same.contains(id));
            differences.extend(certain.map(|(id, row)| Difference::Missing(id, row)));
            // The others were written meanwhile, with their part of the index. What is written all
            // the time is left to the next walk.
            rows = changed;
        }
        Ok(differences)
    }

    /// Reads these rows of a page once more.
    async fn again(
        &self,
        ids: &HashSet<RowId>,
        page: Option<&(RowKind, Option<Vec<u8>>)>,
    ) -> Result<Vec<(RowId, SealedRow)>, ServiceError> {
        let Some((kind, after)) = page else {
            let titles: Vec<SystemTitle> =
                ids.iter().filter_map(|id| if let RowId::Meter(title) = id { Some(*title) } else { None }).collect();
            let rows = self.island.store.meters(&titles).await?;
            return Ok(rows.into_iter().map(|row| (RowId::Meter(row.title), row.row)).collect());
        };
        let (mut found, mut after) = (Vec::new(), after.clone());
        // New rows can have moved the last ones of the page to the next.
        for _ in 0..2 {
            let page = self.island.store.sealed_page(*kind, after.as_deref(), PAGE).await?;
            after = page.last().map(|(last, _)| last.clone());
            found.extend(self.named(*kind, page).into_iter().filter(|(id, _)| ids.contains(id)));
            if after.is_none() || found.len() == ids.len() {
                break;
            }
        }
        Ok(found)
    }

    fn named(&self, kind: RowKind, page: Vec<(Vec<u8>, SealedRow)>) -> Vec<(RowId, SealedRow)> {
        let id = |octets: &[u8]| row_id(kind.number(), octets, self.island.name());
        page.into_iter().filter_map(|(octets, row)| Some((id(&octets)?, row))).collect()
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
        let mut candidates: HashMap<ExposureOwner, Vec<RowId>> = titles
            .iter()
            .map(|title| (ExposureOwner::Owner(Owner::Meter(*title)), vec![RowId::Meter(*title)]))
            .collect();
        let mut rows: Vec<(ExposureOwner, RowId, SealedRow)> = Vec::new();
        for row in self.island.store.meters(&titles).await? {
            rows.push((ExposureOwner::Owner(Owner::Meter(row.title)), RowId::Meter(row.title), row.row));
        }
        for owner in owners.iter().filter(|owner| title_of(owner).is_none()) {
            let ids = self.candidates(*owner).await?;
            for id in &ids {
                rows.extend(self.row(id).await?.map(|row| (*owner, id.clone(), row)));
            }
            candidates.insert(*owner, ids);
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
                let ids = row.as_ref().and_then(|row| candidates.get(&row.owner)).cloned().unwrap_or_default();
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

    /// A row that is no meter's.
    async fn row(&self, id: &RowId) -> Result<Option<SealedRow>, ServiceError> {
        let (kind, octets) = kms_ledger::sealed_name(id);
        Ok(self.island.store.sealed(kind, &octets).await?)
    }
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
/// How often a row is compared that others write at the same time.
const ROUNDS: u32 = 4;
/// Counter domains with the same 8 octets: more than one is a coincidence.
const SAME_PREFIX: u32 = 16;
