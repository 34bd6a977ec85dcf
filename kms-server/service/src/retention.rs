//! Retention: destroys key versions that nobody needs any more. Old versions of a slot when a later
//! one was proven and the retention time has passed (I3); every version of a retired meter when it
//! has passed since the retirement.
//!
//! A destroyed version has no wrapped form in its row, and no diversified one is ever derived
//! again. Backups of the database and free pages of its files may still hold what was there before,
//! wrapped under the island's storage KEK; see docs/operations.md.
//!
//! All servers of an island may do this at the same time: each decides on the rows within its own
//! transaction, and finds nothing to do where another one was faster.

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Duration};

use kms_domain::{
    CounterDomainId, ExpiredKeys, ExposureReason, Group, GroupId, KeyType, KeyVersionNumber, Meter, Owner, Retention,
    SharedExposures, SharedKey, Slot, SystemTitle, UnixMillis,
};
use kms_proto::v1::{AuditRecord, DestroyedKeys, KeysDestroyed, MetersChanged, audit_record::Event};
use kms_store::{AuditFilter, MeterFilter, Reads, RowKind};
use prost::Message as _;

use crate::island::Island;
use crate::keys::exposure::expose_to_who_knows_a_kek;
use kms_base::error::ServiceError;
use kms_ledger::{CLOCK_JUMPED, Decision, ServerAct, View};

/// Keeps an island's house; on the way, the list of which meters are in which groups.
#[derive(Clone)]
pub struct Housekeeper {
    island: Arc<Island>,
    retention: Retention,
}

/// What was looked at, and what was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HousekeepingReport {
    /// Rows of meters and groups.
    pub rows_read: u64,
    /// Rows that were written.
    pub rows_changed: u64,
    /// Key versions that are no candidates any more (I3).
    pub released: u64,
    /// Key versions that were destroyed.
    pub destroyed: u64,
    /// Nothing was done, since the clock was set ahead not long ago.
    pub clock_in_doubt: bool,
}

impl Housekeeper {
    /// A housekeeper who destroys after this time.
    pub const fn new(island: Arc<Island>, retention: Retention) -> Self {
        Self { island, retention }
    }

    /// Keeps house soon after the start and then every day, until the task is dropped or aborted.
    pub fn in_background(self) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            match self.share_exposures().await {
                Ok(0) => {}
                Ok(meters) => {
                    tracing::info!(meters, "who could know their keys is noted for all meters that have the same keys")
                }
                Err(error) => {
                    tracing::error!(%error, "who could know keys that several meters share is not noted everywhere: the next start tries again")
                }
            }
            tokio::time::sleep(FIRST).await;
            loop {
                match self.keep_house(self.time().await).await {
                    Ok(HousekeepingReport { clock_in_doubt: true, .. }) => {
                        tracing::warn!(
                            "a clock was set ahead within the last days: no key is destroyed until it is a week ago, or the clock is right again"
                        );
                    }
                    Ok(HousekeepingReport { rows_read, rows_changed, released, destroyed, clock_in_doubt: false }) => {
                        tracing::info!(
                            rows_read,
                            rows_changed,
                            released,
                            destroyed,
                            "keys whose retention time has passed are destroyed"
                        );
                    }
                    Err(error) => tracing::error!(%error, "destroying old keys could not finish; it goes on tomorrow"),
                }
                tokio::time::sleep(PERIOD).await;
            }
        })
    }

    /// Has the rows of counter domains say who could know their values, as far as the rows of the
    /// meters say more: an island of an earlier version kept that in each meter's row alone. How
    /// many meters said more. Where no key has the value of another, nothing is read.
    ///
    /// # Errors
    /// The database is away, or the server is busy.
    #[boxed]
    pub async fn share_exposures(&self) -> Result<u64, ServiceError> {
        let known = shared_values(&self.island).await?;
        let (mut told, mut after) = (0, None);
        while !known.is_empty() {
            let page = self.island.store.meter_page(&MeterFilter::default(), after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.title);
            let meters = page
                .iter()
                .filter_map(|row| Meter::from_row(row.title, self.island.name(), row.row.body.clone().into()).ok());
            let says_more = |meter: &Meter| {
                let mut versions = meter
                    .slots
                    .iter()
                    .flat_map(Slot::versions)
                    .filter_map(|version| Some((version, known.get(&version.domain()?)?)));
                versions.any(|(version, known)| {
                    version.exposures().iter().any(|exposure| {
                        !known.iter().any(|one| (&one.party, one.reason) == (&exposure.party, exposure.reason))
                    })
                })
            };
            let due: Vec<SystemTitle> = meters.filter(says_more).map(|meter| meter.title).collect();
            if due.is_empty() {
                continue;
            }
            told += due.len() as u64;
            let reads = Reads { meters: due.clone(), ..Reads::default() };
            let act = self.island.committer.act(ServerAct::SHARE_EXPOSURES, reads, move |view| {
                let mut meters = Vec::new();
                for title in &due {
                    if let Some(meter) = view.meter(*title)?
                        && view.share_exposures_of(&meter)?
                    {
                        meters.push(title.octets().to_vec().into());
                    }
                }
                if meters.is_empty() {
                    return Ok(Decision::unchanged(()));
                }
                let entry = view.append(Event::MetersChanged(MetersChanged {
                    change: "exposures-shared".to_owned(),
                    meters,
                    ..MetersChanged::default()
                }));
                Ok(Decision::recorded(entry, ()))
            });
            act.await?;
        }
        Ok(told)
    }

    /// The time that keys are judged by: this server's clock or the database's, whichever is
    /// behind.
    async fn time(&self) -> UnixMillis {
        let own = Island::now();
        self.island.store.now().await.map_or(own, |database| database.min(own))
    }

    /// Whether clocks were set ahead by more than a day, all in all, within the week before `now`,
    /// as the log tells: then it is not sure that a retention time has passed, and what is
    /// destroyed is lost (I3). Officers have that week to set the clock right.
    async fn is_clock_in_doubt(&self, now: UnixMillis) -> Result<bool, ServiceError> {
        // The writer looks at the clock before each act: a jump of a moment ago is in the log then.
        self.island.committer.act(ServerAct::DESTROY_KEYS, Reads::default(), |_| Ok(Decision::unchanged(()))).await?;
        let filter = AuditFilter { kind: Some(CLOCK_JUMPED), newest_first: true, ..AuditFilter::default() };
        let rows = self.island.store.audit_page(&filter, None, JUMPS_READ).await?;
        let jumps =
            rows.iter().filter_map(|row| match AuditRecord::decode(row.record.record.as_slice()).ok()?.event? {
                Event::ClockJumped(jump) => Some(jump),
                _ => None,
            });
        // A jump to a time that has not come was of another server, or was undone.
        let recent = jumps.filter(|jump| (now.after(-DOUBTED_MS).0..=now.after(DAY_MS).0).contains(&jump.observed_ms));
        let ahead =
            recent.map(|jump| jump.observed_ms.saturating_sub(jump.expected_ms).max(0)).fold(0, i64::saturating_add);
        Ok(ahead > DAY_MS)
    }

    /// Looks at all meters and groups once, and destroys what is due at `now`. Every page that
    /// changes is one act with one record (I2).
    ///
    /// # Errors
    /// The database is away, or the server is busy. What was done until then is done and recorded.
    #[boxed]
    pub async fn keep_house(&self, now: UnixMillis) -> Result<HousekeepingReport, ServiceError> {
        let mut report =
            HousekeepingReport { clock_in_doubt: self.is_clock_in_doubt(now).await?, ..HousekeepingReport::default() };
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
            // A look without the seal only chooses the rows that the act reads again and verifies
            // (I5); a row that is none is the scrubber's find.
            let meters: Vec<Meter> = page
                .iter()
                .filter_map(|row| Meter::from_row(row.title, self.island.name(), row.row.body.clone().into()).ok())
                .collect();
            let members: Vec<_> =
                meters.iter().flat_map(|meter| meter.class.groups.iter().map(|group| (meter.title, group.0))).collect();
            if !members.is_empty() {
                let missing = self.island.store.complete_group_members(&members).await?;
                if missing > 0 {
                    tracing::warn!(
                        missing,
                        "meters were missing in the list of their groups' members, and are there again"
                    );
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
        report: &mut HousekeepingReport,
    ) -> Result<(), ServiceError> {
        let retention = self.retention;
        let reads = Reads { meters: due.clone(), ..Reads::default() };
        self.act(reads, report, move |view| {
            let mut done = Done::default();
            for title in &due {
                // An error is a row that does not verify, which is left alone (I5), or one that is
                // read for the next attempt.
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
        report: &mut HousekeepingReport,
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

    async fn act<F>(&self, reads: Reads, report: &mut HousekeepingReport, mut decide: F) -> Result<(), ServiceError>
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

/// Who could know the values that several slots have, as the rows of counter domains say.
async fn shared_values(island: &Island) -> Result<SharedExposures, ServiceError> {
    let (mut known, mut after) = (SharedExposures::new(), None);
    loop {
        let page = island.store.sealed_page(RowKind::CounterDomain, after.as_deref(), PAGE).await?;
        let Some((last, _)) = page.last() else { return Ok(known) };
        after = Some(last.clone());
        let opened = page.iter().filter_map(|(id, row)| {
            island.committer.open_domain(id.as_slice().try_into().map(CounterDomainId).ok()?, row).ok()
        });
        known.extend(opened.map(|domain| (domain.id, domain.exposures.clone())));
    }
}

/// Who knows a key value knows what left under it for every meter that has it as its KEK, whichever
/// meter it was reported of: the keys of groups among that are exposed, and their own rows say so.
/// What is the meters' own is seen by the counter domain of the value. Where no value that several
/// slots have was reported, no meter is read; which slots have one, no list says.
///
/// # Errors
/// The database is away, or the server is busy. What was noted until then is noted and recorded.
pub(crate) async fn expose_groups_under_equal_keks(island: &Arc<Island>) -> Result<(), ServiceError> {
    let mut reported = shared_values(island).await?;
    reported.retain(|_, exposures| exposures.iter().any(|exposure| exposure.reason == ExposureReason::Reported));
    let mut after = None;
    while !reported.is_empty() {
        let page = island.store.meter_page(&MeterFilter::default(), after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.title);
        // A look without the seal only chooses the rows that the act reads again and verifies (I5).
        let meters =
            page.iter().filter_map(|row| Meter::from_row(row.title, island.name(), row.row.body.clone().into()).ok());
        let concerned = |meter: &Meter| {
            keks_of_domains(meter)
                .into_iter()
                .any(|(id, delivered)| reported.contains_key(&id) && !delivered.is_empty())
        };
        let due: Vec<SystemTitle> = meters.filter(concerned).map(|meter| meter.title).collect();
        if due.is_empty() {
            continue;
        }
        let reads = Reads { meters: due.clone(), ..Reads::default() };
        let act = island.committer.act(ServerAct::SHARE_EXPOSURES, reads, move |view| {
            for title in &due {
                let meter = match view.meter(*title) {
                    Ok(Some(meter)) => meter,
                    // I5: its row was refused, which is on the record.
                    Ok(None) | Err(ServiceError::PermissionDenied { .. }) => continue,
                    Err(error) => return Err(error),
                };
                for (id, delivered) in keks_of_domains(&meter) {
                    let exposures = view.domain(id)?.map(|domain| domain.exposures.clone()).unwrap_or_default();
                    for exposure in exposures.iter().filter(|exposure| exposure.reason == ExposureReason::Reported) {
                        expose_to_who_knows_a_kek(view, &meter, &delivered, &exposure.party)?;
                    }
                }
            }
            Ok(Decision::of(view.entry(), ()))
        });
        act.await?;
    }
    Ok(())
}

/// The counter domains of a meter's KEKs, with the keys of groups that left under each.
fn keks_of_domains(meter: &Meter) -> Vec<(CounterDomainId, Vec<SharedKey>)> {
    let keks = meter.slots.iter().filter(|slot| slot.key_type() == KeyType::KEK);
    let versions = keks.flat_map(|slot| slot.versions().iter().map(|version| (slot.setup(), version)));
    versions
        .filter_map(|(setup, version)| Some((version.domain()?, meter.shared_under(setup, version.number()))))
        .collect()
}

/// What one act has done.
#[derive(Default)]
struct Done {
    rows: u64,
    keys: Vec<DestroyedKeys>,
}

impl Done {
    /// Notes what was done to an owner's row. False: nothing.
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

/// An owner as `RowWrite` names its row.
fn owner_row(owner: Owner) -> (u32, Vec<u8>) {
    match owner {
        Owner::Meter(title) => (1, title.octets().to_vec()),
        Owner::Group(id) => (2, id.0.to_be_bytes().to_vec()),
        Owner::DeviceType(id) => (3, id.0.to_be_bytes().to_vec()),
    }
}

/// Rows that are read, and at most written, at once.
const PAGE: u32 = 256;
/// The start of a server has other work.
const FIRST: Duration = Duration::from_mins(10);
const PERIOD: Duration = Duration::from_hours(24);
const DAY_MS: i64 = 86_400_000;
/// How long a clock that was set ahead is doubted.
const DOUBTED_MS: i64 = 7 * DAY_MS;
/// More jumps than that were hardly looked for by a clock that goes right.
const JUMPS_READ: u32 = 1_000;

#[cfg(test)]
mod tests {
    use kms_domain::{KeyMaterial, KeyOrigin, KeyState, KeyType, NewKeyVersion, RequestId, SecuritySetupId};

    use super::*;
    use crate::testing::{TestIsland, island_tests, meter, sample};
    use crate::{
        meter::{MeterService, Request},
        scrub::Scrubber,
    };
    use kms_base::clock;

    const DAY: i64 = 86_400_000;

    impl TestIsland {
        fn housekeeper(&self) -> Housekeeper {
            Housekeeper::new(self.island.clone(), Retention::DEFAULT)
        }

        async fn retire(&self, number: u64) {
            let request = Request { id: RequestId::from_octets(&[9; 16]).unwrap(), digest: [9; 32] };
            let response = MeterService::new(self.island.clone())
                .retire(&self.officer, request, vec![meter(number)], "scrapped".to_owned())
                .await
                .unwrap();
            assert_eq!(response.changed, 1);
        }

        /// A rotation of the GUEK that was proven now.
        async fn rotate(&self, number: u64) {
            let title = meter(number);
            let act = self.island.committer.act_in_test(
                kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
                Reads { meters: vec![title], ..Reads::default() },
                move |view| {
                    let mut meter = view.meter(title)?.unwrap();
                    let now = view.now();
                    let slot =
                        Arc::make_mut(&mut meter).slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
                    let KeyMaterial::Wrapped(wrapped) = slot.active().unwrap().material().clone() else {
                        panic!("the sample's keys are imported")
                    };
                    let new = NewKeyVersion {
                        state: KeyState::PreActive,
                        origin: KeyOrigin::Generated,
                        wrapped: Some(wrapped),
                        fingerprint: None,
                    };
                    let version = slot.add_version(new, now).unwrap();
                    slot.mark_left(version, 1, kms_domain::KeyVersionNumber::FIRST).unwrap();
                    slot.confirm(version, 2, kms_domain::Evidence::Proven, now).unwrap();
                    view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                    view.put_meter((*meter).clone(), false)
                },
            );
            act.await.unwrap();
        }

        async fn states(&self, number: u64, key_type: KeyType) -> Vec<(KeyState, bool)> {
            let stored = self.island.meter(meter(number)).await.unwrap().unwrap();
            stored
                .slots
                .get(SecuritySetupId::DEFAULT, key_type)
                .unwrap()
                .versions()
                .iter()
                .map(|version| (version.state(), version.candidate()))
                .collect()
        }

        async fn destroyed(&self) -> Vec<KeysDestroyed> {
            let rows = self
                .island
                .store
                .audit_page(&AuditFilter { kind: Some(30), ..AuditFilter::default() }, None, 100)
                .await
                .unwrap();
            let events =
                rows.iter().filter_map(|row| match AuditRecord::decode(row.record.record.as_slice()).unwrap().event {
                    Some(Event::KeysDestroyed(event)) => Some(event),
                    _ => None,
                });
            events.collect()
        }
    }

    island_tests! {
        async fn old_versions_and_retired_meters_lose_their_keys_after_retention(island) {
            use KeyState::{Active, Deactivated, Destroyed};
            // More than one page.
            island.deliver(&sample("generic-suite0", 300)).await;
            island.retire(7).await;
            island.rotate(280).await;
            let now = Island::now();

            let before = island.housekeeper().keep_house(now.after(89 * DAY)).await.unwrap();
            assert_eq!(before, HousekeepingReport { rows_read: 300, ..HousekeepingReport::default() });
            assert_eq!(island.states(7, KeyType::KEK).await, [(Deactivated, true)]);
            assert_eq!(island.states(280, KeyType::GUEK).await, [(Deactivated, true), (Active, true)]);

            let later = now.after(91 * DAY);
            let report = island.housekeeper().keep_house(later).await.unwrap();
            assert_eq!(report, HousekeepingReport { rows_read: 300, rows_changed: 2, released: 5, destroyed: 5, clock_in_doubt: false });
            for key_type in [KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK] {
                assert_eq!(island.states(7, key_type).await, [(Destroyed, false)], "{key_type}");
            }
            assert_eq!(island.states(280, KeyType::GUEK).await, [(Destroyed, false), (Active, true)]);
            assert_eq!(island.states(280, KeyType::KEK).await, [(Active, true)]);
            // The wrapped key is not in the row any more.
            let stored = island.island.meter(meter(7)).await.unwrap().unwrap();
            assert!(stored.slots.iter().flat_map(kms_domain::Slot::versions).all(|version| *version.material() == KeyMaterial::Destroyed));

            // I2: a record a page, with owner, slots and versions.
            let records = island.destroyed().await;
            assert_eq!(records.len(), 2);
            assert!(records.iter().all(|record| record.retention_days == 90));
            let keys: Vec<&DestroyedKeys> = records.iter().flat_map(|record| &record.keys).collect();
            assert_eq!(keys.len(), 5);
            assert!(keys.iter().all(|keys| keys.versions == [1] && keys.released == [1] && keys.kind == 1 && keys.security_setup == 0));
            assert_eq!(keys.iter().filter(|keys| keys.retired && keys.owner == meter(7).octets().as_slice()).count(), 4);
            assert!(keys.iter().any(|keys| !keys.retired && keys.owner == meter(280).octets().as_slice() && keys.key_type == KeyType::GUEK.to_string()));

            // Another server finds nothing to do, the scrubber nothing to say, and people see it.
            let other = Housekeeper::new(island.another_server().await, Retention::DEFAULT).keep_house(later).await.unwrap();
            assert_eq!((other.rows_changed, other.destroyed), (0, 0));
            assert_eq!(island.destroyed().await.len(), 2);
            assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
            let shown = MeterService::new(island.island.clone()).show(&island.officer, meter(7)).await.unwrap();
            let versions: Vec<_> = shown.security_setups.iter().flat_map(|setup| &setup.slots).flat_map(|slot| &slot.versions).collect();
            assert!(versions.len() == 4 && versions.iter().all(|version| version.state == "destroyed" && !version.candidate));
        }

        async fn a_clock_that_was_set_ahead_destroys_nothing(island) {
            use KeyState::{Active, Deactivated, Destroyed};
            island.deliver(&sample("generic-suite0", 3)).await;
            island.rotate(2).await;
            let (housekeeper, kept) = (island.housekeeper(), [(Deactivated, true), (Active, true)]);
            // I3: a year that has not passed. The clock goes on from there for some days, and jumps
            // again.
            for ahead in [365, 370, 372] {
                clock::testing::set_ahead(ahead * DAY);
                let report = housekeeper.keep_house(Island::now()).await.unwrap();
                assert_eq!(report, HousekeepingReport { clock_in_doubt: true, ..HousekeepingReport::default() }, "{ahead}");
                assert_eq!(island.states(2, KeyType::GUEK).await, kept);
            }
            // Set right, it is not doubted; and when the time has passed, the keys go.
            clock::testing::set_ahead(0);
            let report = housekeeper.keep_house(Island::now()).await.unwrap();
            assert_eq!((report.clock_in_doubt, report.destroyed), (false, 0));
            assert_eq!(housekeeper.keep_house(Island::now().after(91 * DAY)).await.unwrap().destroyed, 1);
            assert_eq!(island.states(2, KeyType::GUEK).await, [(Destroyed, false), (Active, true)]);
        }

        async fn two_servers_at_once_destroy_once(island) {
            island.deliver(&sample("generic-suite0", 20)).await;
            for number in [2, 3] {
                island.rotate(number).await;
            }
            let later = Island::now().after(91 * DAY);
            let (one, another) = (island.housekeeper(), Housekeeper::new(island.another_server().await, Retention::DEFAULT));
            let (first, second) = tokio::join!(one.keep_house(later), another.keep_house(later));
            assert_eq!(first.unwrap().destroyed + second.unwrap().destroyed, 2);
            assert_eq!(island.destroyed().await.iter().flat_map(|record| &record.keys).count(), 2);
        }
    }
}
