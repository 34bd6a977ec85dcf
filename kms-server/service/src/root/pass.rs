//! The pass: rewrites all rows to a version of a storage KEK or of the seal root.
//!
//! A page of rows is first read without a transaction and without checking seals, only to choose.
//! The HSM wraps the chosen keys again. Then an act reads the rows again, verifies them (I5),
//! replaces exactly the wraps that were unwrapped, and writes rows, rotation and record together
//! (I2). So a crash at any point loses nothing: a page is either written whole or done again. Old
//! wraps stay readable until the last row is done (I3).

use async_recursion::async_recursion as boxed;
use std::time::{Duration, Instant};

use kms_domain::{
    CampaignState, DeviceType, DeviceTypeId, Group, GroupId, Island as IslandRow, KeyClass, KeyMaterial, KeyType,
    KeyVersionNumber, Meter, Owner, PassPage, RootId, RootPurpose, RootRotation, RootRotationState, RowId, RowPlace,
    RowSeal, SecuritySetupId, Slots, SystemTitle, WrappedKey,
};
use kms_hsm::{ErrorKind, KeySource, RootVersion};
use kms_proto::v1::{RootRotationChanged, RootRowsAdvanced, audit_record::Event};
use kms_store::{MeterFilter, Reads, RowKind, SealedRow, TaskFilter};

use super::{RootService, is_served, millis, no_island, rotation_row};
use crate::island::IslandContext;
use crate::keys::source::source;
use crate::keys::token::{root_version, token_key};
use crate::row_id::row_id;
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct, View, sealed_name};

impl RootService {
    /// Continues all passes for about this period, and retires the old seal key when it is due.
    ///
    /// # Errors
    /// The HSM or the database is unavailable.
    #[boxed]
    pub async fn lead_for(&self, period: Duration) -> Result<(), ServiceError> {
        let began = Instant::now();
        for purpose in
            RootPurpose::ALL.into_iter().filter(|purpose| purpose.has_pass() && is_served(&self.island, *purpose))
        {
            let Some(version) = self.island.row().current_root(purpose) else { continue };
            let to = RootId { purpose, version };
            while let Some(looked) = self.page(to).await? {
                let Some(rotation) = self.load(to).await? else { break };
                let pause =
                    Duration::from_millis(looked.saturating_mul(1_000) / u64::from(rotation.rows_per_second.max(1)));
                tokio::time::sleep(pause).await;
                if began.elapsed() >= period {
                    break;
                }
            }
        }
        self.retire_seal_key().await
    }

    /// Does one page of a pass. Returns the number of rows read; `None`: there is nothing to do, or
    /// another server does it.
    ///
    /// # Errors
    /// The HSM or the database is unavailable. Nothing is lost: the page is done again.
    #[boxed]
    pub async fn page(&self, to: RootId) -> Result<Option<u64>, ServiceError> {
        let Some(rotation) = self.load(to).await?.filter(|rotation| rotation.state == RootRotationState::Running)
        else {
            return Ok(None);
        };
        if let Some(writer) = self.island.committer.writer()
            && !rotation.may_lead(writer, self.island.store.now().await?)
        {
            return Ok(None);
        }
        // A server without the new root leaves the pass to one that has it.
        if !self.island.hsm.has_key(token_key(to)?).await? {
            return Ok(None);
        }
        let scan = self.scan(&rotation).await?;
        let work = match to.purpose {
            RootPurpose::StorageKek(class) => Work::Rewrap(self.wrap_anew(&scan.due, class, to.version).await?),
            _ => Work::Seal,
        };
        let looked = scan.page.looked;
        Ok(self.write(to, scan, work).await?.then_some(looked))
    }

    /// Reads rows from the position of the pass, up to the first page with something to do.
    pub(super) async fn scan(&self, rotation: &RootRotation) -> Result<Scan, ServiceError> {
        let mut page =
            PassPage { from: rotation.place.clone(), next: Some(rotation.place.clone()), ..PassPage::default() };
        let mut due = Vec::new();
        let most_looked = u64::from(rotation.rows_per_second).clamp(u64::from(PAGE), MOST_LOOKED);
        let kinds: &[RowKind] = if rotation.to.purpose == RootPurpose::Seal {
            &RowKind::ALL
        } else {
            &[RowKind::Group, RowKind::DeviceType]
        };
        while let Some(place) = page.next.clone()
            && due.is_empty()
            && page.looked < most_looked
        {
            let stage = place.stage as usize;
            let rows: Vec<(Vec<u8>, Option<RowId>, SealedRow)> = match stage.checked_sub(1) {
                None => {
                    let after = if place.after.is_empty() { None } else { SystemTitle::from_octets(&place.after).ok() };
                    let rows = self.island.store.meter_page(&MeterFilter::default(), after, PAGE).await?;
                    rows.into_iter()
                        .map(|row| (row.title.octets().to_vec(), Some(RowId::Meter(row.title)), row.row))
                        .collect()
                }
                Some(kind) => {
                    let Some(kind) = kinds.get(kind).copied() else {
                        page.next = None;
                        break;
                    };
                    let after = (!place.after.is_empty()).then_some(place.after.as_slice());
                    let rows = self.island.store.sealed_page(kind, after, PAGE).await?;
                    let named = rows.into_iter().map(|(id, row)| {
                        let name = row_id(kind.number(), &id, self.island.name());
                        (id, name, row)
                    });
                    named.collect()
                }
            };
            page.next = Some(match rows.last() {
                Some((last, ..)) => RowPlace { stage: place.stage, after: last.clone() },
                None => RowPlace { stage: place.stage + 1, after: Vec::new() },
            });
            page.looked += rows.len() as u64;
            for (octets, id, row) in rows {
                match id {
                    Some(id) if self.is_due(rotation.to, &id, &row) => due.push((id, row)),
                    Some(_) => {}
                    None => {
                        // I5: no server wrote this row. It must not delay the others.
                        tracing::error!(name = %hex::encode(octets), "a row whose name none of its kind has was left alone; run `kms audit scrub`");
                        page.refused += 1;
                    }
                }
            }
        }
        Ok(Scan { page, due })
    }

    /// Whether a row uses an earlier version. This only chooses the row: the act verifies it.
    fn is_due(&self, to: RootId, id: &RowId, row: &SealedRow) -> bool {
        match to.purpose {
            RootPurpose::StorageKek(class) => match self.slots(id, row) {
                Some((owner, slots)) => !old_wraps(owner, &slots, class, to.version).is_empty(),
                // The row cannot be read: the act counts it.
                None => true,
            },
            _ => RowSeal::from_octets(&row.seal).map_or(true, |seal| seal.key_version() != to.version),
        }
    }

    fn slots(&self, id: &RowId, row: &SealedRow) -> Option<(Owner, Slots)> {
        let (name, body) = (self.island.name(), bytes::Bytes::copy_from_slice(&row.body));
        match id {
            RowId::Meter(title) => Meter::from_row(*title, name, body).ok().map(|meter| (meter.owner(), meter.slots)),
            RowId::Group(group) => Group::from_row(*group, name, body).ok().map(|group| (group.owner(), group.slots)),
            RowId::DeviceType(number) => DeviceType::from_row(*number, name, body)
                .ok()
                .map(|device_type| (device_type.owner(), device_type.slots)),
            _ => None,
        }
    }

    /// Wraps keys under the new version, inside the HSM (I1): they are unwrapped as sensitive
    /// session objects for this call only. A key that the HSM refuses stays as it is, and its row
    /// is counted as refused.
    pub(super) async fn wrap_anew(
        &self,
        due: &[(RowId, SealedRow)],
        class: KeyClass,
        version: u8,
    ) -> Result<Vec<NewWrap>, ServiceError> {
        let mut wraps: Vec<OldWrap> = Vec::new();
        let mut sources: Vec<KeySource> = Vec::new();
        for (id, row) in due {
            let Some((owner, slots)) = self.slots(id, row) else { continue };
            for old in old_wraps(owner, &slots, class, version) {
                let slot = slots.get(old.setup, old.key_type);
                let Some((slot, found)) = slot.and_then(|slot| Some((slot, slot.version(old.number)?))) else {
                    continue;
                };
                sources.push(source(owner, slot, found)?);
                wraps.push(old);
            }
        }
        let results =
            if sources.is_empty() { Vec::new() } else { self.rewrap(sources, root_version(version)?).await? };
        let mut done = Vec::with_capacity(wraps.len());
        for (old, result) in wraps.into_iter().zip(results) {
            match result {
                Ok(stored) => {
                    let fingerprint = self.island.fingerprint_key.fingerprint(&stored.fingerprint_wrap);
                    let new = WrappedKey::new(old.key_type, version, stored.blob.into())
                        .map_err(|error| ServiceError::Internal(error.to_string()))?;
                    done.push(NewWrap { old, new, fingerprint });
                }
                Err(error) => {
                    tracing::error!(owner = %owner_name(old.owner), key_type = %old.key_type, version = %old.number, %error, "a stored key could not be wrapped anew; it stays as it is");
                }
            }
        }
        Ok(done)
    }

    /// A lost session or a full queue must not end a pass that runs for hours.
    async fn rewrap(
        &self,
        sources: Vec<KeySource>,
        version: RootVersion,
    ) -> Result<Vec<Result<kms_hsm::StoredKey, kms_hsm::HsmError>>, ServiceError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.island.hsm.rewrap_batch(sources.clone(), version).await {
                Err(error) if error.kind() == ErrorKind::Transient && attempts < ATTEMPTS => {
                    tokio::time::sleep(error.retry_after().unwrap_or(RETRY_AFTER)).await;
                }
                other => return Ok(other?),
            }
        }
    }

    /// Writes the result of a page. False: another server was faster, and nothing was written.
    pub(super) async fn write(&self, to: RootId, scan: Scan, work: Work) -> Result<bool, ServiceError> {
        let Scan { page, due } = scan;
        let due: Vec<RowId> = due.into_iter().map(|(id, _)| id).collect();
        let mut reads = Reads { sealed: vec![rotation_row(to)], clock: true, ..Reads::default() };
        if matches!(work, Work::Rewrap(_)) {
            reads.sealed.push(self.island_row());
        }
        for id in &due {
            match id {
                RowId::Meter(title) => reads.meters.push(*title),
                // The rotation's own row is already in the reads.
                RowId::RootRotation(own) if *own == to => {}
                other => reads.sealed.push(sealed_name(other)),
            }
        }
        let lead = millis(self.timing.lead);
        let act = self.island.committer.act(ServerAct::ROTATE_ROOT, reads, move |view| {
            let Some(known) = view.root_rotation(to)? else { return Ok(Decision::unchanged(false)) };
            let (mut rotation, mut page) = ((*known).clone(), page.clone());
            if rotation.state != RootRotationState::Running || rotation.place != page.from {
                return Ok(Decision::unchanged(false));
            }
            for id in &due {
                // An error means that the row does not verify and stays as it is (I5), or that it
                // is read for the next attempt.
                let outcome = match &work {
                    Work::Seal => view.seal_again(id.clone()).map(|written| (written, 0)),
                    Work::Rewrap(wraps) => rewrap_row(view, id, wraps, to),
                };
                match outcome {
                    Ok((changed, keys)) => {
                        page.changed += u64::from(changed);
                        page.keys += keys;
                    }
                    Err(_) => page.refused += 1,
                }
            }
            let (writer, now, round) = (view.writer(), view.clock()?, rotation.round);
            // The rotation was checked above in this transaction, so the page is its next one. If
            // it were not, the error would undo the rows (I2).
            if !rotation.advance(&page, writer, lead, now) {
                return Err(ServiceError::Internal("a page of a pass was written out of order".to_owned()));
            }
            let entry = view.append(Event::RootRowsAdvanced(RootRowsAdvanced {
                root: to.purpose.to_string(),
                version: to.version.into(),
                round,
                looked: page.looked,
                changed: page.changed,
                refused: page.refused,
                keys: page.keys,
            }));
            if rotation.state != RootRotationState::Running {
                view.append(Event::RootRotationChanged(RootRotationChanged {
                    root: to.purpose.to_string(),
                    version: to.version.into(),
                    change: rotation.state.name().to_owned(),
                    reason: rotation.reason.clone(),
                    ..RootRotationChanged::default()
                }));
            }
            view.put_root_rotation(rotation)?;
            Ok(Decision::recorded(entry, true))
        });
        Ok(act.await?.value)
    }

    /// Retires the old seal key: some time after the last row got a seal of the new key, and when
    /// no task of an unfinished campaign carries a mark of the old key. The check reads all rows,
    /// so one server does it, every few minutes at most.
    async fn retire_seal_key(&self) -> Result<(), ServiceError> {
        let row = self.island.row();
        if row.ledger.oldest_seal_key_version >= row.seal_key_version {
            return Ok(());
        }
        let to = RootId { purpose: RootPurpose::Seal, version: row.seal_key_version };
        let Some(rotation) = self.load(to).await?.filter(|rotation| rotation.state == RootRotationState::Finished)
        else {
            return Ok(());
        };
        let looked = self.not_retired.lock().ok().and_then(|looked| *looked);
        let just_looked =
            looked.is_some_and(|(since, at)| since == rotation.since && at.elapsed() < self.timing.look_again);
        if rotation.since.after(millis(self.timing.seal_overlap)) > IslandContext::now()
            || just_looked
            || !self.is_first().await?
        {
            return Ok(());
        }
        if let Ok(mut looked) = self.not_retired.lock() {
            *looked = Some((rotation.since, Instant::now()));
        }
        if self.has_old_tasks().await? {
            return self
                .tell_why_not(
                    to,
                    "the old seal key is still accepted: tasks of an unfinished campaign carry its marks".to_owned(),
                )
                .await;
        }
        // A slow server may have written a row with the old seal since: meters must not become
        // unusable because their seals are refused.
        let counts = self.count(|_| true).await?;
        let late: u64 = counts
            .references
            .iter()
            .filter(|(id, _)| id.purpose == RootPurpose::Seal && id.version < to.version)
            .map(|(_, rows)| rows)
            .sum();
        if late > 0 || counts.unreadable > 0 {
            return self.another_round(to, late + counts.unreadable).await;
        }
        // I2: earlier records stay accepted, because a record under the new audit key closes their
        // chains. After the retirement no server closes such a chain.
        self.island.committer.close_chains_below(to.version).await?;
        let (kind, name) = self.island_row();
        let (reads, island) =
            (Reads { sealed: vec![(kind, name), rotation_row(to)], ..Reads::default() }, self.island.clone());
        let act = self.island.committer.act(ServerAct::RETIRE_SEAL_KEY, reads, move |view| {
            let mut row: IslandRow = (*view.island(island.name())?.ok_or_else(no_island)?).clone();
            let finished =
                view.root_rotation(to)?.is_some_and(|rotation| rotation.state == RootRotationState::Finished);
            if !finished || row.seal_key_version != to.version || row.ledger.oldest_seal_key_version == to.version {
                return Ok(Decision::unchanged(()));
            }
            row.retire_roots(RootPurpose::Seal).map_err(super::refused)?;
            view.append(Event::RootRotationChanged(RootRotationChanged {
                root: to.purpose.to_string(),
                version: to.version.into(),
                change: "retired".to_owned(),
                ..RootRotationChanged::default()
            }));
            if let Some(rotation) = view.root_rotation(to)?.filter(|rotation| !rotation.reason.is_empty()) {
                view.put_root_rotation(RootRotation { reason: String::new(), ..(*rotation).clone() })?;
            }
            view.put_island(row)?;
            Ok(Decision::of(view.entry(), ()))
        });
        act.await?;
        self.refresh().await.map(drop)
    }

    /// Whether this server does the work that only one server should do: of the live servers it is
    /// the one with the lowest writer id.
    async fn is_first(&self) -> Result<bool, ServiceError> {
        let own = self.island.committer.writer();
        let lately = millis(self.timing.lead);
        let servers = self.island.store.servers().await?;
        Ok(!servers.iter().any(|server| {
            Some(server.writer) != own && server.silent_ms < lately && own.is_none_or(|own| server.writer < own)
        }))
    }

    /// Notes in the rotation's row why the old seal key is not retired yet, if the reason has
    /// changed.
    async fn tell_why_not(&self, to: RootId, reason: String) -> Result<(), ServiceError> {
        let reads = Reads { sealed: vec![rotation_row(to)], ..Reads::default() };
        let act = self.island.committer.act(ServerAct::RETIRE_SEAL_KEY, reads, move |view| {
            let Some(known) = view
                .root_rotation(to)?
                .filter(|known| known.state == RootRotationState::Finished && known.reason != reason)
            else {
                return Ok(Decision::unchanged(()));
            };
            view.append(Event::RootRotationChanged(RootRotationChanged {
                root: to.purpose.to_string(),
                version: to.version.into(),
                change: "not retired".to_owned(),
                reason: reason.clone(),
                ..RootRotationChanged::default()
            }));
            view.put_root_rotation(RootRotation { reason: reason.clone(), ..(*known).clone() })?;
            Ok(Decision::of(view.entry(), ()))
        });
        act.await.map(drop)
    }

    /// Begins the pass over all rows once more.
    async fn another_round(&self, to: RootId, rows: u64) -> Result<(), ServiceError> {
        let reads = Reads { sealed: vec![rotation_row(to)], clock: true, ..Reads::default() };
        let act = self.island.committer.act(ServerAct::ROTATE_ROOT, reads, move |view| {
            let Some(known) = view.root_rotation(to)? else { return Ok(Decision::unchanged(())) };
            let mut rotation = (*known).clone();
            if rotation.state != RootRotationState::Finished || rotation.resume(None, view.clock()?).is_err() {
                return Ok(Decision::unchanged(()));
            }
            view.append(Event::RootRotationChanged(RootRotationChanged {
                root: to.purpose.to_string(),
                version: to.version.into(),
                change: "resumed".to_owned(),
                rows_per_second: rotation.rows_per_second,
                reason: format!("rows with earlier seals: {rows}"),
                ..RootRotationChanged::default()
            }));
            view.put_root_rotation(rotation)?;
            Ok(Decision::of(view.entry(), ()))
        });
        act.await.map(drop)
    }

    async fn has_old_tasks(&self) -> Result<bool, ServiceError> {
        let (store, key) = (&self.island.store, self.island.committer.seal_key());
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = store.sealed_page(RowKind::Campaign, after.as_deref(), PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(false) };
            after = Some(last.clone());
            for (id, row) in &page {
                let Ok(id) = kms_domain::CampaignId::from_octets(id) else { continue };
                let Ok(campaign) = self.island.committer.open_campaign(id, row) else { continue };
                if !matches!(campaign.state, CampaignState::Running | CampaignState::Paused) {
                    continue;
                }
                let mut meter = None;
                loop {
                    let tasks = store.task_page(id, TaskFilter::All, meter, TASKS).await?;
                    let Some(last) = tasks.last() else { break };
                    meter = Some(last.key.meter);
                    if tasks.iter().any(|task| ![task.mark_by(&key), task.former_mark_by(&key)].contains(&task.mark)) {
                        return Ok(true);
                    }
                }
            }
        }
    }
}

/// Replaces the wraps of one row. Returns whether the row was written, and the number of keys.
fn rewrap_row(view: &mut View<'_, '_>, id: &RowId, wraps: &[NewWrap], to: RootId) -> Result<(bool, u64), ServiceError> {
    let owner = match id {
        RowId::Meter(title) => Owner::Meter(*title),
        RowId::Group(group) => Owner::Group(*group),
        RowId::DeviceType(number) => Owner::DeviceType(*number),
        _ => return Ok((false, 0)),
    };
    let Some(mut row) = view.owner(owner)? else { return Ok((false, 0)) };
    let mut keys = 0;
    for NewWrap { old, new, fingerprint } in wraps.iter().filter(|wrap| wrap.old.owner == owner) {
        let Ok(slot) = row.slots_mut().get_mut(old.setup, old.key_type) else { continue };
        // I3: the wrap of another value never replaces the key.
        if slot
            .version(old.number)
            .and_then(kms_domain::KeyVersion::fingerprint)
            .is_some_and(|known| known != *fingerprint)
        {
            return Err(ServiceError::Internal("a stored key is not the one that its fingerprint tells".to_owned()));
        }
        keys += u64::from(
            slot.rewrap(old.number, &old.wrap, new.clone())
                .map_err(|error| ServiceError::Internal(error.to_string()))?,
        );
    }
    let left = match to.purpose {
        RootPurpose::StorageKek(class) => old_wraps(owner, row.slots(), class, to.version).len(),
        _ => 0,
    };
    if keys > 0 {
        view.put_owner(row)?;
    }
    match left {
        0 => Ok((keys > 0, keys)),
        // The HSM refused some keys, or the row got a key after it was read: a later round reads it
        // again.
        _ if keys > 0 => Ok((true, keys)),
        _ => Err(ServiceError::Internal("keys of the row could not be wrapped anew".to_owned())),
    }
}

/// The keys of a class that are wrapped under an earlier version.
fn old_wraps(owner: Owner, slots: &Slots, class: KeyClass, version: u8) -> Vec<OldWrap> {
    let of_class = slots.iter().filter(|slot| slot.key_type().class() == class);
    let versions = of_class.flat_map(|slot| slot.versions().iter().map(move |found| (slot, found)));
    let old = versions.filter_map(|(slot, found)| match found.material() {
        KeyMaterial::Wrapped(wrap) if wrap.storage_kek_version() < version => Some(OldWrap {
            owner,
            setup: slot.setup(),
            key_type: slot.key_type(),
            number: found.number(),
            wrap: wrap.clone(),
        }),
        _ => None,
    });
    old.collect()
}

fn owner_name(owner: Owner) -> String {
    match owner {
        Owner::Meter(title) => title.to_string(),
        Owner::Group(GroupId(number)) => format!("group {number}"),
        Owner::DeviceType(DeviceTypeId(number)) => format!("device type {number}"),
    }
}

/// A page of rows, and those that are due.
pub(super) struct Scan {
    page: PassPage,
    pub(super) due: Vec<(RowId, SealedRow)>,
}

/// What to do with the rows that are due.
pub(super) enum Work {
    Rewrap(Vec<NewWrap>),
    Seal,
}

/// A key as it is wrapped under an earlier version.
pub(super) struct OldWrap {
    owner: Owner,
    setup: SecuritySetupId,
    key_type: KeyType,
    number: KeyVersionNumber,
    wrap: WrappedKey,
}

/// The same key under the new one.
pub(super) struct NewWrap {
    old: OldWrap,
    new: WrappedKey,
    fingerprint: [u8; 16],
}

/// Rows of one page, which is at most what one act writes: grants wait no longer than for one page.
const PAGE: u32 = 256;
/// Rows that are read before the pass notes its position.
const MOST_LOOKED: u64 = 8_192;
const TASKS: u32 = 2_000;
const ATTEMPTS: u32 = 5;
const RETRY_AFTER: Duration = Duration::from_millis(500);
