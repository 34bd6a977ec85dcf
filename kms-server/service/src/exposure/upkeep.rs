//! The upkeep of the index of exposures. It is made after an upgrade of rows that were written
//! before there was an index, and compared with all sealed rows every day.
//!
//! The island's sealed row says that the index was complete once (I5). From then on, what differs
//! was changed by somebody else, whatever the database's own mark of completeness says.

use std::{collections::HashSet, sync::Arc, time::Duration};

use kms_domain::RowId;
use kms_proto::v1::{ExposureIndexCompleted, audit_record::Event};
use kms_store::Reads;

use super::index::{Difference, IndexWalk};
use crate::{island::IslandContext, principal::security_event};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

/// What stands about the completeness of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// The mark in the database: answers are complete.
    pub(crate) marked: bool,
    /// The island's sealed row: it was complete once.
    pub(crate) sealed: bool,
}

impl Standing {
    /// Reads both. An island's row that does not verify, or is gone, switches nothing off: as if
    /// the index was complete once.
    ///
    /// # Errors
    /// The database is unavailable.
    pub(crate) async fn read(island: &IslandContext) -> Result<Self, ServiceError> {
        let (kind, name) = island.row_name();
        let sealed = match island.open_twice(kind, &name, |row| island.committer.open_island(row)).await {
            Ok(row) => row.is_none_or(|(row, _)| row.exposures_indexed),
            Err(ServiceError::FailedPrecondition { .. }) => true,
            Err(other) => return Err(other),
        };
        // After the row: another server that completes the index sets the mark before it writes the
        // row, and no server takes the mark away.
        Ok(Self { marked: island.store.exposures_are_complete().await?, sealed })
    }

    /// Whether there is nothing to complete.
    const fn is_complete(self) -> bool {
        self.marked && self.sealed
    }
}

/// When the upkeep runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pauses {
    /// Before the first comparison of an index that is complete.
    pub(crate) first: Duration,
    /// Between comparisons.
    pub(crate) period: Duration,
    /// Between attempts to complete the index.
    pub(crate) retry: Duration,
}

/// Completes the index, and then compares it every day. Never ends.
pub(crate) async fn keep_index(island: Arc<IslandContext>, pauses: Pauses) {
    let is_complete = async || Standing::read(&island).await.is_ok_and(Standing::is_complete);
    if is_complete().await {
        tokio::time::sleep(pauses.first).await;
    }
    loop {
        let pause = match complete_index(&island).await {
            Ok(differed) => {
                tracing::info!(written = differed, "the index of exposures is complete");
                pauses.period
            }
            Err(error) if is_complete().await => {
                tracing::error!(%error, "the index of exposures could not be compared with all sealed rows; the next run is in a day");
                pauses.period
            }
            // Until then answers say that owners can be missing.
            Err(error) => {
                tracing::error!(%error, "the index of exposures could not be completed; the next attempt is in a minute");
                pauses.retry
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Makes the index anew where it differs from the sealed rows. Returns how many of its rows
/// differed. If the index was complete once, that is a security event: somebody else has changed
/// it, or a server of an earlier version has written rows.
///
/// # Errors
/// The database is unavailable. What was written before stays, and is on record.
pub(crate) async fn complete_index(island: &Arc<IslandContext>) -> Result<u64, ServiceError> {
    let standing = Standing::read(island).await?;
    let mut repair = Repair { island, standing, differed: 0, told: 0 };
    if standing.sealed && !standing.marked {
        repair
            .tell(
                "the database says that the index of exposures is not complete, and it was: somebody changed that mark",
            )
            .await?;
    }
    let walked = repair.walk().await;
    // Also what was written before an error.
    if repair.differed > repair.told {
        repair.tell_rows().await?;
    }
    walked?;
    island.store.note_exposures_complete().await?;
    if !standing.sealed {
        seal_completeness(island, repair.differed).await?;
    }
    Ok(repair.differed)
}

struct Repair<'a> {
    island: &'a Arc<IslandContext>,
    standing: Standing,
    differed: u64,
    /// How many of them are on record.
    told: u64,
}

impl Repair<'_> {
    async fn walk(&mut self) -> Result<(), ServiceError> {
        let mut walk = IndexWalk::new(self.island);
        while let Some(differences) = walk.step().await? {
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
            if owners.is_empty() && strays.is_empty() {
                continue;
            }
            let owners: Vec<RowId> = owners.into_iter().collect();
            self.differed += self.island.committer.index_exposures(&owners, &strays).await?;
            // At once: a server that ends in the middle has left a record.
            if self.differed > 0 && self.told == 0 {
                self.tell_rows().await?;
                self.told = self.differed;
            }
        }
        Ok(())
    }

    async fn tell_rows(&self) -> Result<(), ServiceError> {
        let in_all = if self.told == 0 { "" } else { " in all" };
        let differed = self.differed;
        let detail = format!(
            "{differed} rows of the index of exposures were not what the sealed rows say{in_all}; they were written again"
        );
        self.tell(&detail).await
    }

    /// Records what is no first fill after an upgrade.
    async fn tell(&self, detail: &str) -> Result<(), ServiceError> {
        if !self.standing.sealed {
            return Ok(());
        }
        tracing::error!(detail, "the index of exposures differed");
        let detail = detail.to_owned();
        let act = self.island.committer.act(ServerAct::INDEX_EXPOSURES, Reads::default(), move |view| {
            let event = security_event("exposure-index-differed", detail.clone());
            Ok(Decision::recorded(view.append(Event::SecurityEvent(event)), ()))
        });
        act.await.map(drop)
    }
}

/// Notes in the island's sealed row that the index is complete for the first time.
async fn seal_completeness(island: &Arc<IslandContext>, rows_written: u64) -> Result<(), ServiceError> {
    let name = island.name().clone();
    let reads = Reads { sealed: vec![island.row_name()], ..Reads::default() };
    let act = island.committer.act(ServerAct::INDEX_EXPOSURES, reads, move |view| {
        let Some(row) = view.island(&name)?.filter(|row| !row.exposures_indexed) else {
            return Ok(Decision::unchanged(()));
        };
        view.put_island(kms_domain::Island { exposures_indexed: true, ..(*row).clone() })?;
        let event = ExposureIndexCompleted { rows_written };
        Ok(Decision::recorded(view.append(Event::ExposureIndexCompleted(event)), ()))
    });
    act.await.map(drop)
}
