//! One batch of a shipment in one transaction: meters, groups, fingerprints, counter domains,
//! progress, and the audit record (I2).

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use kms_domain::{
    ExposureReason, GroupId, KeyOrigin, KeyState, KeyType, Meter, MeterClass, MeterStatus, NewKeyVersion, Party,
    PrincipalId, PrincipalStatus, ShipmentLineError, Slot, Slots, SystemTitle, UnixMillis,
};
use kms_proto::v1::{DuplicateKey, MetersChanged, RefusedLine, SecurityEvent, ShipmentImported, audit_record::Event};
use kms_store::{FingerprintPrefix, Reads, ShipmentRefusal, ShipmentRow, ShipmentState, UploadId};
use prost::Message as _;

use super::{
    batch::{ReadyBatch, ReadyDevice},
    duplicates::{join_duplicate, read_rows},
    error::{no_shipment_key, overtaken, refuse, unknown},
    known::{compare, take_floors},
    progress::Progress,
    verify::Verified,
};
use crate::island::IslandContext;
use kms_authz::{Action, Resource};
use kms_base::error::ServiceError;
use kms_ledger::principal_row;
use kms_ledger::{Act, Asker, Decision, Never, Permit, View};

/// The import of one batch, as one act.
pub(super) struct ImportBatch {
    pub(super) island: Arc<IslandContext>,
    pub(super) own: bool,
    pub(super) head_end: Option<PrincipalId>,
    pub(super) status: MeterStatus,
    pub(super) manufacturer: PrincipalId,
    pub(super) upload: UploadId,
    pub(super) verified: Arc<Verified>,
    /// The groups that the batch names. Those that cannot be used are left out.
    pub(super) groups: BTreeMap<String, GroupId>,
    /// No meter may have one of these titles (I4).
    pub(super) client_titles: HashSet<SystemTitle>,
    pub(super) batch: Arc<ReadyBatch>,
}

/// The answer of [`ImportBatch`].
pub(super) struct ImportedBatch {
    pub(super) row: ShipmentRow,
    pub(super) refused: Vec<RefusedLine>,
    pub(super) duplicates: Vec<DuplicateKey>,
}

/// What is collected while the devices of a batch are imported.
#[derive(Default)]
struct Tally {
    duplicates: Vec<DuplicateKey>,
    alerts: Vec<Event>,
    /// Known meters whose counters were raised.
    raised: Vec<SystemTitle>,
}

/// The outcome of one device.
enum DeviceOutcome {
    Imported,
    Unchanged,
    Refused(ShipmentLineError),
}

impl Act for ImportBatch {
    type Answer = ImportedBatch;
    // The row of the file names the line that is imported next.
    type Past = Never;

    fn name(&self) -> &'static str {
        Action::ImportShipment { own: self.own }.name()
    }

    /// What the decision usually reads. Duplicates need more rows.
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

    /// I8: caller, manufacturer and head-end must be enabled still, as when the import began.
    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let permit = asker.require(&Action::ImportShipment { own: self.own }, &Resource::Island)?;
        if view.principal(&self.manufacturer)?.is_none_or(|known| known.status != PrincipalStatus::Enabled) {
            return Err(no_shipment_key(&self.manufacturer));
        }
        if let Some(head_end) = &self.head_end
            && view.principal(head_end)?.is_none_or(|known| known.status != PrincipalStatus::Enabled)
        {
            return Err(ServiceError::FailedPrecondition {
                reason: format!("the head-end `{head_end}` was disabled"),
                next_step: "a disabled head-end is not enabled again, and this import can continue only with it: ask the manufacturer \
                            for a new file and import that with another head-end, or with none and assign the meters with \
                            `kms meter assign`"
                    .to_owned(),
            });
        }
        Ok(permit)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<ImportedBatch>, ServiceError> {
        let (batch, header) = (&*self.batch, &self.verified.header);
        let mut row = view.shipment(self.upload)?.ok_or_else(|| unknown(&[0; 32]))?;
        // Two servers cannot import the same lines.
        if row.state != ShipmentState::Importing || row.next_line != batch.first_line {
            return Err(overtaken());
        }
        read_rows(view, batch)?;

        let mut refused: Vec<(u64, ShipmentLineError)> = batch.refusals.clone();
        let (mut tally, mut imported, mut unchanged) = (Tally::default(), 0, 0);
        for device in &batch.devices {
            match self.import(permit, view, device, &mut tally)? {
                DeviceOutcome::Imported => imported += 1,
                DeviceOutcome::Unchanged => unchanged += 1,
                DeviceOutcome::Refused(error) => refused.push((device.line, error)),
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
        Ok(Decision::recorded(entry, ImportedBatch { row, refused, duplicates }))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<ImportedBatch, ServiceError> {
        match never {}
    }
}

impl ImportBatch {
    fn import(
        &self,
        permit: &Permit,
        view: &mut View<'_, '_>,
        device: &ReadyDevice,
        tally: &mut Tally,
    ) -> Result<DeviceOutcome, ServiceError> {
        let header = &self.verified.header;
        if let Some(known) = view.meter(device.title)? {
            return Ok(match compare(&self.verified, &known, device) {
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
                    DeviceOutcome::Refused(refuse(
                        "title",
                        format!("{} is retired; a refurbished meter needs a new system title", device.title),
                    ))
                }
                Ok(()) => match take_floors(view, &known, device)? {
                    Ok(raised) => {
                        tally.raised.extend(raised.then_some(device.title));
                        DeviceOutcome::Unchanged
                    }
                    Err(error) => DeviceOutcome::Refused(error),
                },
                Err(error) => DeviceOutcome::Refused(error),
            });
        }
        // I4: under one key, frames of a client with the meter's title would repeat the nonces of
        // the meter's own answers.
        if self.client_titles.contains(&device.title) {
            return Ok(DeviceOutcome::Refused(refuse(
                "title",
                format!("{} is a client title of this island, in a principal or a device profile", device.title),
            )));
        }
        let mut groups = Vec::with_capacity(device.groups.len());
        for (index, name) in device.groups.iter().enumerate() {
            match self.groups.get(name) {
                Some(group) => groups.push(*group),
                None => {
                    return Ok(DeviceOutcome::Refused(refuse(
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
            return Ok(DeviceOutcome::Refused(refuse(
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
                    "importShipment for `{head_end}`, which also needs assignMeters"
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
            let duplicate = join_duplicate(view, &self.verified.profile, device.line, key, &mut meter)?;
            tally.duplicates.extend(duplicate);
        }
        view.put_meter(meter, true)?;
        Ok(DeviceOutcome::Imported)
    }
}

/// The slots of a delivered meter. The meter holds the keys, and its vendor knows them.
fn slots(device: &ReadyDevice, now: UnixMillis) -> Result<Slots, ServiceError> {
    let fault = |error: &dyn std::fmt::Display| {
        ServiceError::Internal(format!("the slots of a parsed device are not valid: {error}"))
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
