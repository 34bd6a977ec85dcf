//! Compares sealed rows with their records in the log (I5): a row may be older than its last
//! record, may be gone, may have no record, or may have been edited.

use std::collections::HashMap;

use kms_domain::{Generation, RowSeal, SystemTitle, row_digest};
use kms_proto::v1::{RowWrite, ScrubFinding};
use kms_store::{MeterFilter, RowKind, SealedRow};

use super::chains::Chains;
use super::finding::{METER, Name, finding};
use crate::island::IslandContext;
use crate::row_id::row_id;
use kms_base::error::ServiceError;

/// Generation and digest of a row's last record.
type Recorded = (u64, [u8; 16]);

/// One part of all rows, by a hash of their names.
#[derive(Clone, Copy)]
pub(super) struct Partition {
    pub(super) pass: u64,
    pub(super) passes: u64,
}

impl Partition {
    fn holds(self, kind: u8, id: &[u8]) -> bool {
        // FNV-1a: any evenly distributed hash is good enough.
        let hash = id.iter().fold(0xCBF2_9CE4_8422_2325 ^ u64::from(kind), |hash: u64, octet| {
            (hash ^ u64::from(*octet)).wrapping_mul(0x0100_0000_01B3)
        });
        (hash >> 16) % self.passes == self.pass
    }
}

/// One pass.
pub(super) struct Scan<'a> {
    pub(super) island: &'a IslandContext,
    pub(super) partition: Partition,
    recorded: HashMap<Name, Recorded>,
    pub(super) chains: Chains<'a>,
    /// Rows that did not fit when they were read. Servers may have written meanwhile, so these rows
    /// are checked again.
    suspects: Vec<Name>,
}

/// The position of the walk over all rows.
#[derive(Default)]
pub(super) struct Walk {
    pub(super) rows: u64,
    after_meter: Option<SystemTitle>,
    meters_done: bool,
    kind: usize,
    after: Option<Vec<u8>>,
}

impl<'a> Scan<'a> {
    /// Begins a pass over one part of all rows. The first pass also checks the chains.
    pub(super) fn new(island: &'a IslandContext, partition: Partition) -> Self {
        Self {
            island,
            partition,
            recorded: HashMap::new(),
            chains: Chains::new(island, partition.pass == 0),
            suspects: Vec::new(),
        }
    }

    /// Reads one more page of records; false at the current end of the log.
    pub(super) async fn read_log(&mut self) -> Result<bool, ServiceError> {
        let (partition, recorded) = (self.partition, &mut self.recorded);
        self.chains.step(|write| note(partition, recorded, write)).await
    }

    /// Reads a page of rows and compares them; false after the last page.
    pub(super) async fn read_rows(&mut self, walk: &mut Walk) -> Result<bool, ServiceError> {
        if !walk.meters_done {
            let page = self.island.store.meter_page(&MeterFilter::default(), walk.after_meter, PAGE).await?;
            walk.after_meter = page.last().map(|row| row.title);
            walk.meters_done = page.is_empty();
            walk.rows += page.len() as u64;
            for row in &page {
                self.look(METER as u8, &row.title.octets(), &row.row);
            }
            return Ok(true);
        }
        let Some(kind) = RowKind::ALL.get(walk.kind).copied() else { return Ok(false) };
        let page = self.island.store.sealed_page(kind, walk.after.as_deref(), PAGE).await?;
        walk.after = page.last().map(|(id, _)| id.clone());
        if page.is_empty() {
            walk.kind += 1;
        }
        walk.rows += page.len() as u64;
        for (id, row) in &page {
            self.look(kind.number(), id, row);
        }
        Ok(true)
    }

    /// A row that fits is removed from the map. So the rows that remain at the end are gone from
    /// the database.
    fn look(&mut self, kind: u8, id: &[u8], row: &SealedRow) {
        if !self.partition.holds(kind, id) {
            return;
        }
        let name: Name = (kind, id.into());
        let fits = self.recorded.get(&name).is_some_and(|(generation, digest)| {
            row.generation == *generation && self.digest(&name, row).is_ok_and(|found| found == *digest)
        });
        if fits {
            self.recorded.remove(&name);
        } else {
            self.suspects.push(name);
        }
    }

    /// Checks all rows again that did not fit: a server may have written a row between the two
    /// reads.
    pub(super) async fn conclude(mut self) -> Result<Vec<ScrubFinding>, ServiceError> {
        let mut names = std::mem::take(&mut self.suspects);
        names.extend(self.recorded.keys().cloned());
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        // Rows that fitted are no longer in the map. Newer records may add them again; they are
        // ignored.
        while self.read_log().await? {}
        let mut findings = Vec::new();
        let mut again = Vec::new();
        for name in names {
            let at_least = self.recorded.get(&name).map_or(0, |(generation, _)| *generation);
            match self.row(&name).await? {
                None => {
                    findings.push(finding(&name, "deleted", format!("its last record is of generation {at_least}")))
                }
                Some(row) => again.push((name, at_least, row)),
            }
        }
        // A row and its record are written in one transaction, so the record of each of these rows
        // can be read now.
        while self.read_log().await? {}
        for (name, at_least, row) in again {
            let recorded = self.recorded.get(&name).copied();
            findings.extend(self.judge(&name, at_least, &row, recorded));
        }
        Ok(findings)
    }

    /// `at_least` is the generation recorded before the row was read; `recorded` is the last record
    /// after it.
    fn judge(&self, name: &Name, at_least: u64, row: &SealedRow, recorded: Option<Recorded>) -> Option<ScrubFinding> {
        let digest = match self.digest(name, row) {
            Ok(digest) => digest,
            Err(reason) => return Some(finding(name, "edited", reason)),
        };
        let Some((last, recorded)) = recorded else {
            return Some(finding(name, "unrecorded", "no record says that it was written".to_owned()));
        };
        match row.generation {
            generation if generation < at_least => Some(finding(
                name,
                "stale",
                format!("it is of generation {generation}, and its last record of {at_least}"),
            )),
            generation if generation > last => Some(finding(
                name,
                "unrecorded",
                format!("it is of generation {generation}, and its last record of {last}"),
            )),
            generation if generation == last && digest != recorded => {
                Some(finding(name, "edited", format!("it is not what was recorded of generation {last}")))
            }
            _ => None,
        }
    }

    async fn row(&self, (kind, id): &Name) -> Result<Option<SealedRow>, ServiceError> {
        let store = &self.island.store;
        if u32::from(*kind) == METER {
            let Ok(title) = SystemTitle::from_octets(id) else { return Ok(None) };
            return Ok(store.meters(&[title]).await?.into_iter().next().map(|row| row.row));
        }
        match RowKind::ALL.into_iter().find(|known| known.number() == *kind) {
            Some(kind) => Ok(store.sealed(kind, id).await?),
            None => Ok(None),
        }
    }

    /// The digest of a row whose seal holds.
    fn digest(&self, (kind, id): &Name, row: &SealedRow) -> Result<[u8; 16], String> {
        let id = row_id(*kind, id, self.island.name()).ok_or_else(|| "its id is none of its kind".to_owned())?;
        let generation = i64::try_from(row.generation)
            .ok()
            .and_then(|number| Generation::from_i64(number).ok())
            .ok_or_else(|| "its generation is out of range".to_owned())?;
        let seal = RowSeal::from_octets(&row.seal).map_err(|error| error.to_string())?;
        self.island
            .committer
            .seal_keys()
            .verify(&id, generation, &row.body, &seal)
            .map_err(|error| error.to_string())?;
        Ok(row_digest(seal.key_version(), &id, generation, &row.body))
    }
}

/// Keeps the newest record of each row of the partition.
fn note(partition: Partition, recorded: &mut HashMap<Name, Recorded>, write: &RowWrite) {
    let (Ok(kind), Ok(digest)) = (u8::try_from(write.kind), <[u8; 16]>::try_from(write.digest.as_ref())) else {
        return;
    };
    if !partition.holds(kind, &write.id) {
        return;
    }
    let newest = recorded.entry((kind, write.id.as_ref().into())).or_insert((write.generation, digest));
    if write.generation > newest.0 {
        *newest = (write.generation, digest);
    }
}

/// Rows of one page.
const PAGE: u32 = 1_000;
