//! The daily retention pass destroys key versions that nobody needs any more. Old versions of a
//! slot are destroyed when a later one was proven and the retention time has passed since
//! (I3). All versions of a retired meter are destroyed when it has passed since the retirement.
//! The places of work orders are removed after it.
//!
//! A destroyed version has no wrapped key in its row, and a diversified one is never derived again.
//! Backups of the database and free pages of its files may still hold the wrapped key; see
//! docs/operations.md.
//!
//! All servers of an island may do this at the same time: each decides on the rows in its own
//! transaction, and finds nothing to do if another one was faster.

#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Duration};

use kms_domain::{ExpiredKeys, Group, GroupId, KeyVersionNumber, Meter, Owner, Retention, SystemTitle, UnixMillis};
use kms_proto::v1::{AuditRecord, DestroyedKeys, KeysDestroyed, audit_record::Event};
use kms_store::{AuditFilter, MeterFilter, Reads, RowKind};
use prost::Message as _;

use crate::equal_keys::{expose_groups_under_equal_keks, share_exposures};
use crate::exposure::upkeep::{Pauses, keep_index};
use crate::island::IslandContext;
use crate::work_order::places::remove_places;
use kms_base::error::ServiceError;
use kms_ledger::{CLOCK_JUMPED, Decision, ServerAct, View};

/// The daily retention pass of an island. It also completes the list of the members of groups, and
/// the index of exposures.
#[derive(Clone)]
pub struct RetentionPass {
    island: Arc<IslandContext>,
    retention: Retention,
}

/// What a run of the retention pass read and changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetentionReport {
    /// Rows of meters and groups.
    pub rows_read: u64,
    /// Rows that were written.
    pub rows_changed: u64,
    /// Key versions that are no candidates any more (I3).
    pub released: u64,
    /// Key versions that were destroyed.
    pub destroyed: u64,
    /// Nothing was done, because a clock was set ahead within the last week.
    pub clock_in_doubt: bool,
}

impl RetentionPass {
    /// The retention pass of an island with this retention time.
    pub const fn new(island: Arc<IslandContext>, retention: Retention) -> Self {
        Self { island, retention }
    }

    /// Runs soon after the start and then every day, until the task is dropped or aborted.
    pub fn in_background(self) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            match share_exposures(&self.island).await {
                Ok(0) => {}
                Ok(meters) => {
                    tracing::info!(
                        meters,
                        "exposures of keys that several meters have were added to the rows of their counter domains"
                    )
                }
                Err(error) => {
                    tracing::error!(%error, "exposures of keys that several meters have could not be added to all rows of counter domains; the next start tries again")
                }
            }
            let pauses = Pauses { first: FIRST, period: PERIOD, retry: Duration::from_mins(1) };
            tokio::join!(self.run_daily(), keep_index(self.island.clone(), pauses));
        })
    }

    async fn run_daily(&self) {
        tokio::time::sleep(FIRST).await;
        loop {
            match self.run(self.time().await).await {
                Ok(RetentionReport { clock_in_doubt: true, .. }) => {
                    tracing::warn!(
                        "a clock was set ahead within the last week: no key is destroyed until a week has passed since, or the clock is set right"
                    );
                }
                Ok(report) => {
                    tracing::info!(
                        rows_read = report.rows_read,
                        rows_changed = report.rows_changed,
                        released = report.released,
                        destroyed = report.destroyed,
                        "key versions whose retention time has passed were destroyed"
                    );
                }
                Err(error) => {
                    tracing::error!(%error, "old key versions could not all be destroyed; the next run is in a day")
                }
            }
            match self.remove_places(self.time().await).await {
                Ok(0) => {}
                Ok(places) => {
                    tracing::info!(places, "places of work orders that have been over for long were removed")
                }
                Err(error) => {
                    tracing::error!(%error, "places of work orders could not all be removed; the next run is in a day")
                }
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// The time that decides on retention: this server's clock or the database's, whichever is
    /// earlier.
    async fn time(&self) -> UnixMillis {
        let own = IslandContext::now();
        self.island.store.now().await.map_or(own, |database| database.min(own))
    }

    /// Whether the log says that clocks were set ahead by more than a day in total within the week
    /// before `now`. Then it is not certain that a retention time has passed, and a destroyed key
    /// cannot be restored (I3). Officers have that week to set the clock right.
    async fn is_clock_in_doubt(&self, now: UnixMillis) -> Result<bool, ServiceError> {
        // The writer checks the clock before each act. After this act the latest jump is in the
        // log.
        self.island.committer.act(ServerAct::DESTROY_KEYS, Reads::default(), |_| Ok(Decision::unchanged(()))).await?;
        let filter = AuditFilter { kind: Some(CLOCK_JUMPED), newest_first: true, ..AuditFilter::default() };
        let rows = self.island.store.audit_page(&filter, None, JUMPS_READ).await?;
        let jumps =
            rows.iter().filter_map(|row| match AuditRecord::decode(row.record.record.as_slice()).ok()?.event? {
                Event::ClockJumped(jump) => Some(jump),
                _ => None,
            });
        // A jump to a time in the future was another server's, or was undone.
        let recent = jumps.filter(|jump| (now.after(-DOUBTED_MS).0..=now.after(DAY_MS).0).contains(&jump.observed_ms));
        let ahead =
            recent.map(|jump| jump.observed_ms.saturating_sub(jump.expected_ms).max(0)).fold(0, i64::saturating_add);
        Ok(ahead > DAY_MS)
    }

    /// Removes the places of work orders that are due at `now`, and returns how many. None while a
    /// clock is in doubt: an order that technicians still need might lose its place, which nobody
    /// but its maker knows. A place that stays a week longer harms less.
    ///
    /// # Errors
    /// The database cannot be reached, or the server is busy. What was done before is committed and
    /// recorded.
    #[boxed]
    pub async fn remove_places(&self, now: UnixMillis) -> Result<u64, ServiceError> {
        let in_doubt = self.is_clock_in_doubt(now).await?;
        remove_places(&self.island, Some(now).filter(|_| !in_doubt)).await
    }

    /// Reads all meters and groups once, and destroys what is due at `now`. Every page with changes
    /// is one act with one record (I2).
    ///
    /// # Errors
    /// The database cannot be reached, or the server is busy. What was done before is committed and
    /// recorded.
    #[boxed]
    pub async fn run(&self, now: UnixMillis) -> Result<RetentionReport, ServiceError> {
        let mut report =
            RetentionReport { clock_in_doubt: self.is_clock_in_doubt(now).await?, ..RetentionReport::default() };
        if report.clock_in_doubt {
            return Ok(report);
        }
        expose_groups_under_equal_keks(&self.island).await?;
        let mut after = None;
        loop {
            let page = self.island.store.meter_page(&MeterFilter::default(), after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.title);
            report.rows_read += page.len() as u64;
            // The seals are not checked here: this only chooses rows, which the act reads again and
            // verifies (I5). The scrub reports rows that do not verify.
            let meters: Vec<Meter> = page
                .iter()
                .filter_map(|row| Meter::from_row(row.title, self.island.name(), row.row.body.clone().into()).ok())
                .collect();
            let members: Vec<_> =
                meters.iter().flat_map(|meter| meter.class.groups.iter().map(|group| (meter.title, group.0))).collect();
            if !members.is_empty() {
                let missing = self.island.store.complete_group_members(&members).await?;
                if missing > 0 {
                    tracing::warn!(missing, "meters were missing in the list of group members and were added");
                }
            }
            let due = meters
                .into_iter()
                .filter_map(|mut meter| (!meter.expire_keys(self.retention, now).is_empty()).then_some(meter.title));
            let due: Vec<SystemTitle> = due.collect();
            if !due.is_empty() {
                self.expire_meters(due, now, &mut report).await?;
            }
        }
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = self.island.store.sealed_page(RowKind::Group, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            report.rows_read += page.len() as u64;
            let numbered = page
                .iter()
                .filter_map(|(id, row)| Some((GroupId(u64::from_be_bytes(id.as_slice().try_into().ok()?)), row)));
            let due = numbered.filter(|(id, row)| {
                let group = Group::from_row(*id, self.island.name(), row.body.clone().into());
                group.is_ok_and(|mut group| !group.expire_keys(self.retention, now).is_empty())
            });
            let due: Vec<GroupId> = due.map(|(id, _)| id).collect();
            if !due.is_empty() {
                self.expire_groups(due, now, &mut report).await?;
            }
        }
        Ok(report)
    }

    async fn expire_meters(
        &self,
        due: Vec<SystemTitle>,
        now: UnixMillis,
        report: &mut RetentionReport,
    ) -> Result<(), ServiceError> {
        let retention = self.retention;
        let reads = Reads { meters: due.clone(), ..Reads::default() };
        self.act(reads, report, move |view| {
            let mut done = Done::default();
            for title in &due {
                // An error means that the row does not verify and is left as it is (I5), or that it
                // is read for the next attempt.
                let Some(mut meter) = view.meter(*title).ok().flatten() else { continue };
                let expired = Arc::make_mut(&mut meter).expire_keys(retention, now);
                if done.add(meter.owner(), meter.retired.is_some(), expired) {
                    view.put_meter((*meter).clone(), false)?;
                }
            }
            Ok(done)
        })
        .await
    }

    async fn expire_groups(
        &self,
        due: Vec<GroupId>,
        now: UnixMillis,
        report: &mut RetentionReport,
    ) -> Result<(), ServiceError> {
        let retention = self.retention;
        let reads = Reads {
            sealed: due.iter().map(|id| (RowKind::Group, id.0.to_be_bytes().to_vec())).collect(),
            ..Reads::default()
        };
        self.act(reads, report, move |view| {
            let mut done = Done::default();
            for id in &due {
                let Some(mut group) = view.group(*id).ok().flatten() else { continue };
                let expired = Arc::make_mut(&mut group).expire_keys(retention, now);
                if done.add(group.owner(), false, expired) {
                    view.put_group((*group).clone())?;
                }
            }
            Ok(done)
        })
        .await
    }

    async fn act<F>(&self, reads: Reads, report: &mut RetentionReport, mut decide: F) -> Result<(), ServiceError>
    where
        F: FnMut(&mut View<'_, '_>) -> Result<Done, ServiceError> + Send + 'static,
    {
        let retention_days = u32::from(self.retention.days());
        let committed = self.island.committer.act(ServerAct::DESTROY_KEYS, reads, move |view| {
            let done = decide(view)?;
            if done.keys.is_empty() {
                return Ok(Decision::unchanged(done));
            }
            // I2.
            let destroyed = KeysDestroyed { retention_days, keys: done.keys.clone() };
            Ok(Decision::recorded(view.append(Event::KeysDestroyed(destroyed)), done))
        });
        let done = committed.await?.value;
        report.rows_changed += done.rows;
        report.released += done.keys.iter().map(|keys| keys.released.len() as u64).sum::<u64>();
        report.destroyed += done.keys.iter().map(|keys| keys.versions.len() as u64).sum::<u64>();
        Ok(())
    }
}

/// What one act has done.
#[derive(Default)]
struct Done {
    rows: u64,
    keys: Vec<DestroyedKeys>,
}

impl Done {
    /// Adds the changes of an owner's row. False if there are none.
    fn add(&mut self, owner: Owner, retired: bool, expired: Vec<ExpiredKeys>) -> bool {
        let numbers = |versions: &[KeyVersionNumber]| versions.iter().map(|version| version.number()).collect();
        let changed = !expired.is_empty();
        self.rows += u64::from(changed);
        let (kind, owner) = owner_row(owner);
        self.keys.extend(expired.iter().map(|keys| DestroyedKeys {
            kind,
            owner: owner.clone().into(),
            security_setup: u32::from(u16::from_be_bytes(keys.setup.octets())),
            key_type: keys.key_type.to_string(),
            versions: numbers(&keys.destroyed),
            released: numbers(&keys.released),
            retired,
        }));
        changed
    }
}

/// The kind and name of an owner's row in `RowWrite`.
fn owner_row(owner: Owner) -> (u32, Vec<u8>) {
    match owner {
        Owner::Meter(title) => (1, title.octets().to_vec()),
        Owner::Group(id) => (2, id.0.to_be_bytes().to_vec()),
        Owner::DeviceType(id) => (3, id.0.to_be_bytes().to_vec()),
    }
}

/// Rows that are read, and at most written, at once.
const PAGE: u32 = 256;
/// The first run waits, because a server that starts has other work.
const FIRST: Duration = Duration::from_mins(10);
const PERIOD: Duration = Duration::from_hours(24);
const DAY_MS: i64 = 86_400_000;
/// For how long no key is destroyed after a clock was set ahead.
const DOUBTED_MS: i64 = 7 * DAY_MS;
/// The most jumps that are read. A clock that works does not jump that often.
const JUMPS_READ: u32 = 1_000;
