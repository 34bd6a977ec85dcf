//! Rows of owners of keys: meters, groups, device types; and of counter domains.

use bytes::Bytes;
use prost::Message;

use super::{
    RowError,
    message::{CounterDomainRow, DeviceTypeRow, GroupRotationRow, GroupRow, MeterRow},
    moment,
    slot::{
        Principals, counters_from_rows, counters_to_rows, exposures_from_rows, exposures_to_rows, slots_from_rows,
        slots_to_rows,
    },
    suite,
    transfer::{key_type, setup, shared_from_rows, shared_to_rows, transfer_from_row, transfer_to_row},
};
use crate::{
    CampaignId, CounterDomain, CounterDomainId, DeviceProfileName, DeviceType, DeviceTypeId, FlagId, Group, GroupId,
    GroupRotation, IslandName, KeyVersionNumber, Meter, MeterClass, MeterStatus, SwitchThreshold, SystemTitle,
    UnixMillis,
    id::parse_name,
    meter::{check_batch, check_serial},
};

impl Meter {
    /// Reads the body of the row of `title` in `island`. Wrapped keys are not copied: they point
    /// into `body`.
    ///
    /// # Errors
    /// The body is no meter row, or breaks an invariant.
    pub fn from_row(title: SystemTitle, island: &IslandName, body: Bytes) -> Result<Self, RowError> {
        let row = MeterRow::decode(body)?;
        let principals = Principals::from_rows(island, &row.principals)?;
        let [0, vendor @ ..] = row.vendor.to_be_bytes() else {
            return Err(RowError::new("the vendor has more than three letters"));
        };
        let groups: Vec<GroupId> = row.groups.into_iter().map(GroupId).collect();
        if groups.first() == Some(&GroupId(0)) || !groups.is_sorted_by(|group, next| group < next) {
            return Err(RowError::new("the groups are not in increasing order"));
        }
        check_serial(&row.serial)?;
        check_batch(&row.batch)?;
        let status = MeterStatus::from_number(row.status)?;
        let retired = row.retired.map(|since| UnixMillis(row.added.wrapping_add(since)));
        check_retired(status, retired)?;
        Ok(Self {
            title,
            class: MeterClass {
                vendor: FlagId::parse(std::str::from_utf8(&vendor).unwrap_or_default())?,
                profile: DeviceProfileName::from_text(row.profile)?,
                status,
                groups,
                head_end: principals.optional(row.head_end)?,
            },
            serial: row.serial,
            suite: suite(row.suite)?,
            batch: row.batch,
            added: moment(row.added)?,
            retired,
            slots: slots_from_rows(row.versions, row.added, &principals)?,
            sequence: row.sequence,
            transfer: row
                .transfer
                .map(|transfer| transfer_from_row(title, transfer, row.added, &principals))
                .transpose()?,
            shared: shared_from_rows(row.shared)?,
        })
    }

    /// The body of the meter's row.
    ///
    /// # Errors
    /// The meter breaks an invariant that [`Self::from_row`] checks: a serial or batch of another
    /// form, groups out of order, a status that does not fit the time of retirement.
    pub fn to_row(&self) -> Result<Vec<u8>, RowError> {
        check_serial(&self.serial)?;
        check_batch(&self.batch)?;
        check_retired(self.class.status, self.retired)?;
        if self.class.groups.first() == Some(&GroupId(0)) || !self.class.groups.is_sorted_by(|group, next| group < next)
        {
            return Err(RowError::new("the groups are not in increasing order"));
        }
        let mut principals = Principals::default();
        let head_end = self.class.head_end.as_ref().map_or(0, |head_end| principals.reference(head_end));
        let versions = slots_to_rows(&self.slots, self.added, &mut principals);
        let transfer = self.transfer.as_ref().map(|transfer| transfer_to_row(transfer, self.added, &mut principals));
        let [first, second, third] = self.class.vendor.octets();
        let row = MeterRow {
            vendor: u32::from_be_bytes([0, first, second, third]),
            serial: self.serial.clone(),
            profile: self.class.profile.as_str().to_owned(),
            suite: self.suite.number().into(),
            status: self.class.status.number(),
            groups: self.class.groups.iter().map(|group| group.0).collect(),
            principals: principals.to_rows(),
            head_end,
            batch: self.batch.clone(),
            retired: self.retired.map(|retired| retired.0.wrapping_sub(self.added.0)),
            added: self.added.0,
            versions,
            sequence: self.sequence,
            transfer,
            shared: shared_to_rows(&self.shared),
        };
        Ok(row.encode_to_vec())
    }
}

impl Group {
    /// Reads the body of the row of group `id` in `island`.
    ///
    /// # Errors
    /// The body is no group row, or breaks an invariant.
    pub fn from_row(id: GroupId, island: &IslandName, body: Bytes) -> Result<Self, RowError> {
        let row = GroupRow::decode(body)?;
        parse_name("group", &row.name, 64)?;
        let principals = Principals::from_rows(island, &row.principals)?;
        let slots = slots_from_rows(row.versions, row.added, &principals)?;
        let switch_at =
            if row.switch_at == 0 { SwitchThreshold::DEFAULT } else { SwitchThreshold::new(row.switch_at)? };
        let rotations = row
            .rotations
            .into_iter()
            .map(|rotation| rotation_from_row(rotation, row.added))
            .collect::<Result<Vec<_>, _>>()?;
        if !rotations.is_sorted_by(|one, next| (one.setup, one.key_type) < (next.setup, next.key_type)) {
            return Err(RowError::new("the rotations are not in order"));
        }
        if rotations.iter().any(|rotation| {
            slots.get(rotation.setup, rotation.key_type).and_then(|slot| slot.version(rotation.version)).is_none()
        }) {
            return Err(RowError::new("a rotation of a version that the group does not have"));
        }
        Ok(Self {
            id,
            name: row.name,
            suite: suite(row.suite)?,
            added: moment(row.added)?,
            slots,
            switch_at,
            rotations,
        })
    }

    /// The body of the group's row.
    ///
    /// # Errors
    /// The name has another form.
    pub fn to_row(&self) -> Result<Vec<u8>, RowError> {
        parse_name("group", &self.name, 64)?;
        let mut principals = Principals::default();
        let versions = slots_to_rows(&self.slots, self.added, &mut principals);
        let row = GroupRow {
            name: self.name.clone(),
            suite: self.suite.number().into(),
            principals: principals.to_rows(),
            switch_at: if self.switch_at == SwitchThreshold::DEFAULT { 0 } else { u32::from(self.switch_at.percent()) },
            rotations: self.rotations.iter().map(|rotation| rotation_to_row(rotation, self.added)).collect(),
            added: self.added.0,
            versions,
        };
        Ok(row.encode_to_vec())
    }
}

impl DeviceType {
    /// Reads the body of the row of device type `id` in `island`.
    ///
    /// # Errors
    /// The body is no device type row, or breaks an invariant.
    pub fn from_row(id: DeviceTypeId, island: &IslandName, body: Bytes) -> Result<Self, RowError> {
        let row = DeviceTypeRow::decode(body)?;
        parse_name("device type", &row.name, 64)?;
        let principals = Principals::from_rows(island, &row.principals)?;
        Ok(Self {
            id,
            vendor: FlagId::parse(&row.vendor)?,
            slots: slots_from_rows(row.versions, row.added, &principals)?,
            name: row.name,
            profile: DeviceProfileName::from_text(row.profile)?,
            added: moment(row.added)?,
        })
    }

    /// The body of the device type's row.
    ///
    /// # Errors
    /// The name has another form.
    pub fn to_row(&self) -> Result<Vec<u8>, RowError> {
        parse_name("device type", &self.name, 64)?;
        let mut principals = Principals::default();
        let versions = slots_to_rows(&self.slots, self.added, &mut principals);
        let row = DeviceTypeRow {
            vendor: self.vendor.as_str().to_owned(),
            name: self.name.clone(),
            profile: self.profile.as_str().to_owned(),
            principals: principals.to_rows(),
            added: self.added.0,
            versions,
        };
        Ok(row.encode_to_vec())
    }
}

impl CounterDomain {
    /// Reads the body of the row of counter domain `id` in `island`.
    ///
    /// # Errors
    /// The body is no counter domain row, or breaks an invariant.
    pub fn from_row(id: CounterDomainId, island: &IslandName, body: Bytes) -> Result<Self, RowError> {
        let row = CounterDomainRow::decode(body)?;
        let principals = Principals::from_rows(island, &row.principals)?;
        if row.members == 0 {
            return Err(RowError::new("the counter domain has no members, or the row is cut"));
        }
        let exposures = exposures_from_rows(row.exposures, 0, &principals)?;
        Ok(Self { id, counters: counters_from_rows(row.counters, &principals)?, members: row.members, exposures })
    }

    /// The body of the counter domain's row. A domain without members has none: it is stored when
    /// the first joined.
    pub fn to_row(&self) -> Vec<u8> {
        let mut principals = Principals::default();
        let counters = counters_to_rows(&self.counters, &mut principals);
        let exposures = exposures_to_rows(&self.exposures, 0, &mut principals);
        CounterDomainRow { principals: principals.to_rows(), counters, exposures, members: self.members }
            .encode_to_vec()
    }
}

fn rotation_from_row(row: GroupRotationRow, base: i64) -> Result<GroupRotation, RowError> {
    let moment = |since: i64| UnixMillis(base.wrapping_add(since));
    Ok(GroupRotation {
        setup: setup(row.setup)?,
        key_type: key_type(row.key_type)?,
        version: KeyVersionNumber::new(row.version)?,
        campaign: if row.campaign.is_empty() { None } else { Some(CampaignId::from_octets(&row.campaign)?) },
        begun: moment(row.begun),
        reached: row.reached.map(moment),
        switched: row.switched.map(moment),
        completed: row.completed.map(moment),
    })
}

fn rotation_to_row(rotation: &GroupRotation, base: UnixMillis) -> GroupRotationRow {
    let since = |moment: UnixMillis| moment.0.wrapping_sub(base.0);
    GroupRotationRow {
        setup: u32::from(u16::from_be_bytes(rotation.setup.octets())),
        key_type: rotation.key_type.number().into(),
        version: rotation.version.number(),
        campaign: rotation.campaign.map(|campaign| campaign.octets().to_vec().into()).unwrap_or_default(),
        begun: since(rotation.begun),
        reached: rotation.reached.map(since),
        switched: rotation.switched.map(since),
        completed: rotation.completed.map(since),
    }
}

/// A retired meter says when, and no other does: the retention time counts from it.
fn check_retired(status: MeterStatus, retired: Option<UnixMillis>) -> Result<(), RowError> {
    if (status == MeterStatus::Retired) == retired.is_some() {
        Ok(())
    } else {
        Err(RowError::new("status and time of retirement do not belong together"))
    }
}
