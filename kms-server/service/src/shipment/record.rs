//! One batch of a shipment in one transaction: meters, groups, fingerprints, counter domains,
//! progress, and the record of all that (I2).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use kms_domain::{
    CounterDomain, CounterDomainId, CounterOwnership, CounterState, ExposureReason, GroupId, KeyOrigin, KeyState,
    KeyType, KeyVersion, Meter, MeterClass, MeterStatus, NewKeyVersion, Owner, Party, PrincipalId, PrincipalStatus,
    ShipmentLineError, Slot, Slots, SystemTitle, UnixMillis,
};
use kms_proto::v1::{DuplicateKey, MetersChanged, RefusedLine, SecurityEvent, ShipmentImported, audit_record::Event};
use kms_store::{FingerprintOwner, FingerprintPrefix, Reads, ShipmentRefusal, ShipmentState, UploadId};
use prost::Message as _;

use super::{
    batch::{ReadyBatch, ReadyDevice, ReadyKey},
    import::{IMPORT, Recorded},
    overtaken,
    progress::Progress,
    unknown,
    verify::Verified,
};
use crate::island::Island;
use kms_authz::{Action, Resource};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

/// The decision on one batch.
pub(super) struct Step {
    pub(super) island: Arc<Island>,
    pub(super) own: bool,
    pub(super) head_end: Option<PrincipalId>,
    pub(super) status: MeterStatus,
    pub(super) manufacturer: PrincipalId,
    pub(super) upload: UploadId,
    pub(super) verified: Arc<Verified>,
    /// The groups that the batch names, as far as they can be used.
    pub(super) groups: BTreeMap<String, GroupId>,
    /// No meter may have one of these titles (I4).
    pub(super) client_titles: HashSet<SystemTitle>,
    pub(super) batch: Arc<ReadyBatch>,
}

/// What else a batch came to.
#[derive(Default)]
struct Tally {
    duplicates: Vec<DuplicateKey>,
    alerts: Vec<Event>,
    /// Known meters whose counters go on higher.
    raised: Vec<SystemTitle>,
}

/// What became of a device.
enum Outcome {
    Imported,
    Unchanged,
    Refused(ShipmentLineError),
}

impl Act for Step {
    type Answer = Recorded;
    // The row of the file says up to which line it is imported.
    type Past = Never;

    fn name(&self) -> &'static str {
        IMPORT
    }

    /// All that the decision usually looks at; duplicates make it read more.
    fn reads(&self) -> Reads {
        let mut sealed = vec![self.island.row_name(), principal_row(&self.manufacturer)];
        sealed.extend(self.head_end.as_ref().map(principal_row));
        let keys = || self.batch.devices.iter().flat_map(|device| &device.keys);
        Reads {
            meters: self.batch.devices.iter().map(|device| device.title).collect(),
            sealed,
            fingerprints: keys().map(|key| FingerprintPrefix::of(&key.fingerprint)).collect(),
            shipments: vec![self.upload],
            ..Reads::default()
        }
    }

    /// I8: caller, manufacturer and head-end are still who they were when the import began.
    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let permit = asker.require(&Action::ImportShipment { own: self.own }, &Resource::Island)?;
        if view.principal(&self.manufacturer)?.is_none_or(|known| known.status != PrincipalStatus::Enabled) {
            return Err(super::no_shipment_key(&self.manufacturer));
        }
        if let Some(head_end) = &self.head_end
            && view.principal(head_end)?.is_none_or(|known| known.status != PrincipalStatus::Enabled)
        {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("`{head_end}` was disabled"),
                next_step: "import without a head-end, and assign the meters afterwards".to_owned(),
            });
        }
        Ok(permit)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Recorded>, ServiceError> {
        let (batch, header) = (&*self.batch, &self.verified.header);
        let mut row = view.shipment(self.upload)?.ok_or_else(|| unknown(&[0; 32]))?;
        // Two servers cannot import the same lines.
        if row.state != ShipmentState::Importing || row.next_line != batch.first_line {
            return Err(overtaken());
        }
        self.look_at_duplicates(view)?;

        let mut refused: Vec<(u64, ShipmentLineError)> = batch.refusals.clone();
        let (mut tally, mut imported, mut unchanged) = (Tally::default(), 0, 0);
        for device in &batch.devices {
            match self.import(permit, view, device, &mut tally)? {
                Outcome::Imported => imported += 1,
                Outcome::Unchanged => unchanged += 1,
                Outcome::Refused(error) => refused.push((device.line, error)),
            }
        }
        refused.sort_unstable_by_key(|(line, _)| *line);
        let Tally { duplicates, alerts, raised } = tally;

        let entry = view.append(Event::ShipmentImported(ShipmentImported {
            file_sha256: row.sha256.to_vec().into(),
            batch: header.batch.clone(),
            manufacturer: self.manufacturer.to_string(),
            first_line: batch.first_line,
            last_line: batch.next_line.saturating_sub(1),
            imported,
            refused: refused.len() as u64,
            duplicates: duplicates.len() as u64,
            refusal: String::new(),
        }));
        for alert in alerts {
            view.append(alert);
        }
        if !raised.is_empty() {
            view.append(Event::MetersChanged(MetersChanged {
                change: "floor-raised".to_owned(),
                meters: raised.iter().map(|title| title.octets().to_vec().into()).collect(),
                value: format!("shipment `{}`", header.batch),
                reason: String::new(),
            }));
        }
        let mut progress = Progress::of(&row)?;
        progress.unchanged += unchanged;
        progress.duplicates += duplicates.len() as u64;
        let room = Progress::KEPT_DUPLICATES.saturating_sub(progress.duplicate_keys.len());
        progress.duplicate_keys.extend(duplicates.iter().take(room).cloned());
        row.imported += imported;
        row.refused += refused.len() as u64;
        row.next_line = batch.next_line;
        if batch.last {
            row.state = ShipmentState::Imported;
        }
        row.progress = progress.encode_to_vec();
        row.generation += 1;
        row.updated = view.now();
        view.put_shipment(row.clone());
        for (line, error) in &refused {
            view.put_refused_line(ShipmentRefusal {
                upload: self.upload,
                line: *line,
                field: error.field.clone(),
                reason: error.reason.clone(),
            });
        }
        let refused = refused
            .into_iter()
            .map(|(line, error)| RefusedLine { line, field: error.field, reason: error.reason })
            .collect();
        Ok(Decision::recorded(entry, Recorded { row, refused, duplicates }))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<Recorded, ServiceError> {
        match never {}
    }
}

impl Step {
    /// Has all rows read that keys with equal values need: so that the transaction asks once, and
    /// not once for each.
    fn look_at_duplicates(&self, view: &mut View<'_, '_>) -> Result<(), ServiceError> {
        let mut failed = None;
        let mut seen: HashMap<[u8; 16], ()> = HashMap::new();
        for device in &self.batch.devices {
            if let Err(error) = view.meter(device.title) {
                failed = Some(error);
            }
            for key in &device.keys {
                let owners = view.fingerprint_owners(FingerprintPrefix::of(&key.fingerprint)).unwrap_or_else(|error| {
                    failed = Some(error);
                    Vec::new()
                });
                let again = seen.insert(key.fingerprint, ()).is_some();
                if (again || !owners.is_empty())
                    && let Err(error) = view.domain(CounterDomainId(key.fingerprint))
                {
                    failed = Some(error);
                }
                for owner in owners {
                    if let Owner::Meter(title) = owner.owner
                        && let Err(error) = view.meter(title)
                    {
                        failed = Some(error);
                    }
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn import(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
        device: &ReadyDevice,
        tally: &mut Tally,
    ) -> Result<Outcome, ServiceError> {
        let header = &self.verified.header;
        if let Some(known) = view.meter(device.title)? {
            return Ok(match self.compare(&known, device) {
                Ok(()) if known.class.status == MeterStatus::Retired => {
                    let detail = format!(
                        "the retired meter {} is in shipment `{}`, line {}",
                        device.title, header.batch, device.line
                    );
                    tally.alerts.push(Event::SecurityEvent(SecurityEvent {
                        kind: "retired-meter-delivered".to_owned(),
                        detail,
                        meter: device.title.octets().to_vec().into(),
                    }));
                    Outcome::Refused(refuse(
                        "title",
                        format!("{} is retired; a refurbished meter needs a new system title", device.title),
                    ))
                }
                Ok(()) => self.take_floors(view, &known, device, tally)?,
                Err(error) => Outcome::Refused(error),
            });
        }
        // I4: under one key, frames of a client with the meter's title would repeat the nonces of
        // the meter's own answers.
        if self.client_titles.contains(&device.title) {
            return Ok(Outcome::Refused(refuse(
                "title",
                format!("{} is a client title here, of a principal or a device profile", device.title),
            )));
        }
        let mut groups = Vec::with_capacity(device.groups.len());
        for (index, name) in device.groups.iter().enumerate() {
            match self.groups.get(name) {
                Some(group) => groups.push(*group),
                None => {
                    return Ok(Outcome::Refused(refuse(
                        &format!("groups[{index}]"),
                        format!(
                            "group `{name}` is of another security suite, or the island has no room for more groups"
                        ),
                    )));
                }
            }
        }
        groups.sort_unstable();
        if let Some(counter) = device
            .counters
            .iter()
            .find(|counter| counter.owned_by.as_ref().is_some_and(|owner| owner.island() != self.island.name()))
        {
            return Ok(Outcome::Refused(refuse(
                "counters",
                format!("the head-end that owns the counter of {} is of another island", counter.key),
            )));
        }

        let now = view.now();
        let mut class = MeterClass {
            vendor: header.manufacturer,
            profile: header.device_profile.clone(),
            status: MeterStatus::InStock,
            groups,
            head_end: None,
        };
        if let Some(head_end) = &self.head_end {
            if !permit.permits(&Action::AssignMeters, &Resource::Meters(&class)) {
                return Err(ServiceError::denied(format!(
                    "importShipment for `{head_end}`, since it is an assignMeters too"
                )));
            }
            class.status = self.status;
            class.head_end = Some(head_end.clone());
        }
        let mut meter = Meter {
            title: device.title,
            class,
            serial: device.serial.clone(),
            suite: self.verified.profile.suite,
            batch: header.batch.clone(),
            added: now,
            retired: None,
            slots: slots(device, now)?,
            sequence: 0,
            transfer: None,
            shared: Vec::new(),
        };
        for key in &device.keys {
            self.join_duplicates(view, device, key, &mut meter, &mut tally.duplicates)?;
        }
        view.put_meter(meter, true)?;
        Ok(Outcome::Imported)
    }

    /// Whether a known meter is what the line says: the same device with the same keys, of whatever
    /// version.
    fn compare(&self, known: &Meter, device: &ReadyDevice) -> Result<(), ShipmentLineError> {
        let header = &self.verified.header;
        if known.class.vendor != header.manufacturer || known.class.profile != header.device_profile {
            return Err(refuse(
                "title",
                format!(
                    "{} is known already, with device profile `{}` of {}",
                    device.title, known.class.profile, known.class.vendor
                ),
            ));
        }
        if known.serial != device.serial {
            return Err(refuse("serial", format!("{} is known already, with another serial number", device.title)));
        }
        for (index, key) in device.keys.iter().enumerate() {
            let same = known.slots.get(key.setup, key.key_type).is_some_and(|slot| {
                slot.versions().iter().any(|version| version.fingerprint() == Some(key.fingerprint))
            });
            if !same {
                return Err(refuse(
                    &format!("keys[{index}].wrapped"),
                    format!(
                        "{} is known already, with another {}",
                        device.title,
                        self.verified.profile.key_type_name(key.key_type)
                    ),
                ));
            }
        }
        Ok(())
    }

    /// I4: the next counter of a known meter is at or above a floor that a shipment brings. Inside
    /// a chunk that a server allocates from, the floor is raised. Above all that is reserved, the
    /// line is refused: it would use up counters, and an officer takes such a floor over.
    fn take_floors(
        &self,
        view: &mut View<'_, '_>,
        known: &Meter,
        device: &ReadyDevice,
        tally: &mut Tally,
    ) -> Result<Outcome, ServiceError> {
        let fault = |error: &dyn std::fmt::Display| ServiceError::Internal(error.to_string());
        let mut meter = known.clone();
        let mut domains: Vec<CounterDomain> = Vec::new();
        for (index, counter) in device.counters.iter().enumerate().filter(|(_, counter)| counter.owned_by.is_none()) {
            let floor = u64::from(counter.floor);
            for key in device
                .keys
                .iter()
                .filter(|key| key.setup == counter.setup && matches!(key.key_type, KeyType::GUEK | KeyType::GBEK))
            {
                let Ok(slot) = meter.slots.get_mut(key.setup, key.key_type) else { continue };
                let same = |version: &&KeyVersion| {
                    version.fingerprint() == Some(key.fingerprint) && version.state() != KeyState::Destroyed
                };
                let Some(number) = slot.versions().iter().find(same).map(KeyVersion::number) else { continue };
                let version = slot.version_mut(number).map_err(|error| fault(&error))?;
                let counters = match version.domain() {
                    None => version.counters_mut().map_err(|error| fault(&error))?,
                    Some(id) => {
                        if !domains.iter().any(|domain| domain.id == id) {
                            domains.extend(view.domain(id)?.map(|domain| (*domain).clone()));
                        }
                        let Some(domain) = domains.iter_mut().find(|domain| domain.id == id) else {
                            return Err(lost_domain(id, device.title));
                        };
                        &mut domain.counters
                    }
                };
                let state = counters.get(counter.key);
                if state.is_some_and(|state| *state.ownership() != CounterOwnership::Kms) {
                    continue;
                }
                if floor > state.map_or_else(|| CounterState::FIRST.into(), CounterState::bound) {
                    let reason = format!(
                        "{} is known already, and its counters below {} are not used up: take the floor over with `kms meter adopt`",
                        device.title, counter.floor
                    );
                    return Ok(Outcome::Refused(refuse(&format!("counters[{index}].floor"), reason)));
                }
                if state.is_some() {
                    counters.raise_floor(counter.key, floor, None).map_err(|error| fault(&error))?;
                }
            }
        }
        let mut raised = false;
        if meter.slots != known.slots {
            raised = true;
            view.put_meter(meter, false)?;
        }
        for domain in domains {
            if view.domain(domain.id)?.is_none_or(|stored| stored.counters != domain.counters) {
                raised = true;
                view.put_domain(domain)?;
            }
        }
        if raised {
            tally.raised.push(device.title);
        }
        Ok(Outcome::Unchanged)
    }

    /// I4: a key whose value another slot has counts with it, from one counter domain. The list of
    /// owners holds the first slot with a value only: later ones find the domain through it,
    /// however many they are.
    fn join_duplicates(
        &self,
        view: &mut View<'_, '_>,
        device: &ReadyDevice,
        key: &ReadyKey,
        meter: &mut Meter,
        duplicates: &mut Vec<DuplicateKey>,
    ) -> Result<(), ServiceError> {
        let prefix = FingerprintPrefix::of(&key.fingerprint);
        let me = FingerprintOwner {
            owner: Owner::Meter(meter.title),
            setup: key.setup,
            key_type: key.key_type,
            version: kms_domain::KeyVersionNumber::FIRST,
        };
        let Some((first, title)) = self.first_owner(view, key, meter)? else {
            view.put_fingerprint(prefix, me);
            return Ok(());
        };
        let id = CounterDomainId(key.fingerprint);
        let named = |meter: &Meter| {
            meter.slots.get(first.setup, first.key_type).and_then(|slot| slot.version(first.version)?.domain())
        };
        let names_one =
            if title == meter.title { named(meter) } else { view.meter(title)?.and_then(|other| named(&other)) }
                .is_some();
        let mut domain = match view.domain(id)? {
            Some(domain) => (*domain).clone(),
            None if names_one => return Err(lost_domain(id, title)),
            None => CounterDomain::new(id),
        };
        let fault = |error: kms_domain::SlotError| ServiceError::Internal(error.to_string());
        if title == meter.title {
            join(meter, &first, &mut domain).map_err(fault)?;
        } else if !names_one && let Some(mut other) = view.meter(title)? {
            let changed = Arc::make_mut(&mut other);
            join(changed, &first, &mut domain).map_err(fault)?;
            view.put_meter(changed.clone(), false)?;
        }
        join(meter, &me, &mut domain).map_err(fault)?;
        view.put_domain(domain)?;
        duplicates.push(DuplicateKey {
            line: device.line,
            meter: meter.title.octets().to_vec().into(),
            key_type: self.verified.profile.key_type_name(key.key_type),
            other_meter: title.octets().to_vec().into(),
            security_setup: key.setup.obis().to_vec().into(),
        });
        Ok(())
    }

    /// The first slot with the key's value: the whole fingerprint stands in the owner's sealed row.
    fn first_owner(
        &self,
        view: &mut View<'_, '_>,
        key: &ReadyKey,
        meter: &Meter,
    ) -> Result<Option<(FingerprintOwner, SystemTitle)>, ServiceError> {
        for owner in view.fingerprint_owners(FingerprintPrefix::of(&key.fingerprint))? {
            // Keys of groups and device types are made here and never imported.
            let Owner::Meter(title) = owner.owner else { continue };
            let fingerprint = |meter: &Meter| {
                meter.slots.get(owner.setup, owner.key_type).and_then(|slot| slot.version(owner.version)?.fingerprint())
            };
            let found = if title == meter.title {
                fingerprint(meter)
            } else {
                view.meter(title)?.and_then(|other| fingerprint(&other))
            };
            if found == Some(key.fingerprint) {
                return Ok(Some((owner, title)));
            }
        }
        Ok(None)
    }
}

fn join(meter: &mut Meter, owner: &FingerprintOwner, domain: &mut CounterDomain) -> Result<(), kms_domain::SlotError> {
    meter.slots.get_mut(owner.setup, owner.key_type)?.join_domain(owner.version, domain)
}

/// The slots of a delivered meter: it holds the keys, and its vendor knows them.
fn slots(device: &ReadyDevice, now: UnixMillis) -> Result<Slots, ServiceError> {
    let fault = |error: &dyn std::fmt::Display| {
        ServiceError::Internal(format!("a device that was parsed makes no slots: {error}"))
    };
    let mut slots = Vec::with_capacity(device.keys.len());
    for key in &device.keys {
        let mut slot = Slot::new(key.setup, key.key_type);
        let new = NewKeyVersion {
            state: KeyState::Active,
            origin: KeyOrigin::Imported,
            wrapped: Some(key.wrapped.clone()),
            fingerprint: Some(key.fingerprint),
        };
        let number = slot.add_version(new, now).map_err(|error| fault(&error))?;
        let version = slot.version_mut(number).map_err(|error| fault(&error))?;
        version.expose(Party::Vendor, ExposureReason::Shipment, now);
        if matches!(key.key_type, KeyType::GUEK | KeyType::GBEK) {
            let counters = version.counters_mut().map_err(|error| fault(&error))?;
            for counter in device.counters.iter().filter(|counter| counter.setup == key.setup) {
                // I4: the manufacturer signed the floor, so no cap bounds it.
                counters.raise_floor(counter.key, u64::from(counter.floor), None).map_err(|error| fault(&error))?;
                if let Some(head_end) = &counter.owned_by {
                    counters.leave_to(counter.key, head_end.clone());
                }
            }
        }
        slots.push(slot);
    }
    Slots::new(slots).map_err(|error| fault(&error))
}

/// I4, I5: a domain that a key version names has a row. A new one would begin to count below what
/// was given out already.
fn lost_domain(id: CounterDomainId, title: SystemTitle) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!(
            "a key of {title} counts in the counter domain {}, whose row is missing: it was deleted, or the database was restored in part",
            hex::encode(id.0)
        ),
        next_step: "restore the row from a copy of the database, then go on with the import".to_owned(),
    }
}

fn refuse(field: &str, reason: String) -> ShipmentLineError {
    ShipmentLineError { field: field.to_owned(), reason }
}
