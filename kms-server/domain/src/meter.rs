//! Owners of keys: meters, groups of meters and device types.

use std::{collections::BTreeSet, fmt};

use crate::{
    DeviceTypeId, ExposureReason, FlagId, GroupId, KeyState, KeyType, KeyVersion, KeyVersionNumber, Owner, ParseError,
    Party, PrincipalId, SecuritySetupId, SecuritySuite, SharedKey, Slot, SlotError, Slots, SystemTitle, Transfer,
    UnixMillis, id::parse_name,
};

/// The status of a meter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MeterStatus {
    /// Delivered, not installed.
    InStock,
    /// Installed.
    InService,
    /// Out of use by decision of an officer: suspected of manipulation or theft. No grants.
    Quarantined,
    /// Out of use for good: no grants ever again, and keys are destroyed after retention.
    Retired,
}

impl MeterStatus {
    /// All statuses.
    pub const ALL: [Self; 4] = [Self::InStock, Self::InService, Self::Quarantined, Self::Retired];

    /// Whether keys of such a meter may be granted at all. Policy decides the details.
    pub const fn may_grant(self) -> bool {
        matches!(self, Self::InStock | Self::InService)
    }

    /// Whether a meter may change from this status to the other. A retired meter stays retired: a
    /// refurbished meter gets a new identity.
    pub const fn may_become(self, next: Self) -> bool {
        !matches!(self, Self::Retired) && self.number() != next.number()
    }

    /// The number in rows, from 1.
    pub const fn number(self) -> u32 {
        match self {
            Self::InStock => 1,
            Self::InService => 2,
            Self::Quarantined => 3,
            Self::Retired => 4,
        }
    }

    /// The status with this number.
    ///
    /// # Errors
    /// No status has the number.
    pub fn from_number(number: u32) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|status| status.number() == number)
            .ok_or_else(|| ParseError::new("meter status", format!("`{number}` is not 1 to 4")))
    }

    /// The name in policies and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InStock => "in-stock",
            Self::InService => "in-service",
            Self::Quarantined => "quarantined",
            Self::Retired => "retired",
        }
    }

    /// The status of this name.
    ///
    /// # Errors
    /// No status has the name.
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        Self::ALL.into_iter().find(|status| status.name() == name).ok_or_else(|| {
            ParseError::new("meter status", format!("`{name}` is not in-stock, in-service, quarantined or retired"))
        })
    }
}

impl fmt::Display for MeterStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of a device profile: 1–32 octets of a–z, 0–9 and `-`, starting with a letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceProfileName(String);

impl DeviceProfileName {
    /// The profile of this name.
    ///
    /// # Errors
    /// The name has another form.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        Self::from_text(text.to_owned())
    }

    pub(crate) fn from_text(text: String) -> Result<Self, ParseError> {
        parse_name("device profile", &text, 32)?;
        Ok(Self(text))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What policy decides on. Meters of one class get the same decision, so a batch needs a few
/// decisions and not thousands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MeterClass {
    /// The vendor.
    pub vendor: FlagId,
    /// The device profile.
    pub profile: DeviceProfileName,
    /// The status.
    pub status: MeterStatus,
    /// The groups, in increasing order, each once.
    pub groups: Vec<GroupId>,
    /// The head-end that the meter is assigned to.
    pub head_end: Option<PrincipalId>,
}

/// A meter: its identity, what policy sees of it, and its key slots. All of it is one sealed row
/// (I5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meter {
    /// The identity.
    pub title: SystemTitle,
    /// What policy decides on.
    pub class: MeterClass,
    /// The vendor's serial number: 1–32 printable ASCII characters ([`check_serial`]).
    pub serial: String,
    /// The security suite that the meter uses.
    pub suite: SecuritySuite,
    /// The vendor's batch, empty for a meter that was enrolled without a shipment.
    pub batch: String,
    /// When the meter was added.
    pub added: UnixMillis,
    /// When it was retired: present exactly if its status is retired. Its keys are destroyed when
    /// the retention time has passed since then.
    pub retired: Option<UnixMillis>,
    /// The keys.
    pub slots: Slots,
    /// The last moment of the meter's own sequence, which orders what left for it and what it
    /// showed.
    pub sequence: u32,
    /// The transfer under way.
    pub transfer: Option<Transfer>,
    /// Keys of groups and device types that left for it, in order, each once.
    pub shared: Vec<SharedKey>,
}

impl Meter {
    /// The meter as an owner of keys.
    pub const fn owner(&self) -> Owner {
        Owner::Meter(self.title)
    }

    /// I3: releases the candidates before the active versions, slot by slot as
    /// [`crate::Slot::release_candidates`] does. It releases none of a security setup in which KEK,
    /// GUEK or GAK is in doubt: a meter that went back to an earlier GUEK also went back to an
    /// earlier KEK, and only the next transfer shows that. It releases none while a transfer is
    /// under way. Returns whether a candidate was released.
    pub fn release_candidates(&mut self, retention: i64, now: UnixMillis) -> bool {
        let held_back = self.held_back(now);
        let mut released = false;
        for slot in self.slots.iter_mut().filter(|slot| !held_back.contains(&slot.setup())) {
            released |= slot.release_candidates(retention, now);
        }
        released
    }

    /// The security setups whose candidates are not released (I3).
    pub(crate) fn held_back(&self, now: UnixMillis) -> Vec<SecuritySetupId> {
        let under_way = self.transfer.as_ref().is_some_and(|transfer| transfer.not_after > now);
        let doubted = |slot: &&Slot| {
            under_way || ([KeyType::KEK, KeyType::GUEK, KeyType::GAK].contains(&slot.key_type()) && slot.in_doubt())
        };
        self.slots.iter().filter(doubted).map(Slot::setup).collect()
    }

    /// Changes the status, except to retired: see [`Self::retire`].
    ///
    /// # Errors
    /// A retired meter stays retired.
    pub fn set_status(&mut self, status: MeterStatus) -> Result<(), ParseError> {
        if self.class.status == status {
            return Ok(());
        }
        if status == MeterStatus::Retired {
            return Err(ParseError::new(
                "meter status",
                "a meter is retired with its own command: retire or replace it",
            ));
        }
        if !self.class.status.may_become(status) {
            return Err(ParseError::new(
                "meter status",
                format!(
                    "a {} meter cannot become {status}: enrol it again under a new system title",
                    self.class.status
                ),
            ));
        }
        self.class.status = status;
        Ok(())
    }

    /// Adds the meter to a group, or removes it. False: nothing was changed, because it is so
    /// already. [`Self::shared`] still says which of the group's keys it holds.
    pub fn set_member(&mut self, group: GroupId, member: bool) -> bool {
        match (self.class.groups.binary_search(&group), member) {
            (Err(at), true) => self.class.groups.insert(at, group),
            (Ok(at), false) => drop(self.class.groups.remove(at)),
            _ => return false,
        }
        true
    }

    /// The newest version of a key of a group or device type that the meter has acknowledged.
    pub fn acknowledged(&self, owner: Owner, setup: SecuritySetupId, key_type: KeyType) -> Option<KeyVersionNumber> {
        self.shared_of(owner, setup, key_type).filter(|key| key.acknowledged).map(|key| key.version).max()
    }

    /// The versions of a key of a group or device type that left for the meter.
    pub fn shared_of(
        &self,
        owner: Owner,
        setup: SecuritySetupId,
        key_type: KeyType,
    ) -> impl Iterator<Item = &SharedKey> {
        self.shared.iter().filter(move |key| (key.owner, key.setup, key.key_type) == (owner, setup, key_type))
    }

    /// Marks a version as compromised, known to `party`: it is never granted and never active
    /// again. The meter may still hold it, so it stays a candidate (I3). Keys that left wrapped
    /// under a compromised KEK are exposed too, and so are keys that left under these. Returns the
    /// exposed keys of groups and device types, whose own rows must say so. Such keys that the
    /// meter has replaced since are not known here.
    ///
    /// # Errors
    /// There is no such version, or it is compromised or destroyed already.
    pub fn report_compromise(
        &mut self,
        setup: SecuritySetupId,
        key_type: KeyType,
        number: KeyVersionNumber,
        party: &Party,
        now: UnixMillis,
    ) -> Result<Vec<SharedKey>, SlotError> {
        let slot = self.slots.get_mut(setup, key_type)?;
        slot.transition(number, KeyState::Compromised, now)?;
        slot.version_mut(number)?.expose(party.clone(), ExposureReason::Reported, now);
        let mut known = if key_type == KeyType::KEK { vec![number] } else { Vec::new() };
        let mut shared = Vec::new();
        while let Some(kek) = known.pop() {
            shared.extend(self.shared.iter().filter(|key| key.setup == setup && key.kek == kek).copied());
            for slot in self.slots.iter_mut().filter(|slot| slot.setup() == setup) {
                let under: Vec<KeyVersionNumber> = slot
                    .versions()
                    .iter()
                    .filter(|version| version.transport().kek == Some(kek))
                    .map(KeyVersion::number)
                    .collect();
                for number in under {
                    // Only new exposures continue, so this loop ends.
                    if slot.version_mut(number)?.expose(party.clone(), ExposureReason::TransferUnderExposedKek, now)
                        && slot.key_type() == KeyType::KEK
                    {
                        known.push(number);
                    }
                }
            }
        }
        Ok(shared)
    }

    /// The keys of groups and device types that left for the meter under a version of its KEK, or
    /// under a KEK that left under it. A party that knows this version and recorded the traffic
    /// knows them.
    pub fn shared_under(&self, setup: SecuritySetupId, kek: KeyVersionNumber) -> Vec<SharedKey> {
        let keks = self.slots.get(setup, KeyType::KEK).map(Slot::versions).unwrap_or_default();
        let mut known = BTreeSet::from([kek]);
        // A KEK leaves under an earlier one.
        for version in keks {
            if version.transport().kek.is_some_and(|under| known.contains(&under)) {
                known.insert(version.number());
            }
        }
        self.shared.iter().filter(|key| key.setup == setup && known.contains(&key.kek)).copied().collect()
    }

    /// Ends the meter's identity: none of its versions is active any more. Candidates stay
    /// candidates (I3) until the retention time has passed: see [`Self::expire_keys`]. A meter that
    /// is retired already is not changed.
    ///
    /// # Errors
    /// A slot refuses a transition: it breaks a rule that is always true of slots.
    pub fn retire(&mut self, now: UnixMillis) -> Result<(), SlotError> {
        if self.class.status == MeterStatus::Retired {
            return Ok(());
        }
        for slot in self.slots.iter_mut() {
            let in_use = |version: &&KeyVersion| matches!(version.state(), KeyState::Active | KeyState::Suspended);
            let numbers: Vec<_> = slot.versions().iter().filter(in_use).map(KeyVersion::number).collect();
            for number in numbers {
                slot.transition(number, KeyState::Deactivated, now)?;
            }
        }
        // A transfer under way ends: its keys are not needed any more.
        self.close_transfer(now);
        self.class.status = MeterStatus::Retired;
        self.retired = Some(now);
        Ok(())
    }
}

/// A device type: the owner of firmware keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceType {
    /// The island's number for it.
    pub id: DeviceTypeId,
    /// The vendor.
    pub vendor: FlagId,
    /// Its name: 1–64 octets of a–z, 0–9 and `-`, starting with a letter.
    pub name: String,
    /// The device profile of its meters.
    pub profile: DeviceProfileName,
    /// When it was made.
    pub added: UnixMillis,
    /// Its keys.
    pub slots: Slots,
}

impl DeviceType {
    /// The device type as an owner of keys.
    pub const fn owner(&self) -> Owner {
        Owner::DeviceType(self.id)
    }
}

/// One key version of an owner: what a grant, an exposure or a campaign names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyVersionId {
    /// Whose key.
    pub owner: Owner,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The key type.
    pub key_type: KeyType,
    /// The version.
    pub version: KeyVersionNumber,
}

/// Checks a serial number: 1–32 printable ASCII characters.
///
/// # Errors
/// Another length, or other characters.
pub fn check_serial(text: &str) -> Result<(), ParseError> {
    check_printable("serial", text, 1, 32)
}

/// Checks a batch name: at most 64 printable ASCII characters; empty for none.
///
/// # Errors
/// Another length, or other characters.
pub fn check_batch(text: &str) -> Result<(), ParseError> {
    check_printable("batch", text, 0, 64)
}

pub(crate) fn check_printable(
    what: &'static str,
    text: &str,
    shortest: usize,
    longest: usize,
) -> Result<(), ParseError> {
    if !(shortest..=longest).contains(&text.len()) || !text.bytes().all(|octet| (b' '..=b'~').contains(&octet)) {
        return Err(ParseError::new(what, format!("not {shortest} to {longest} printable ASCII characters")));
    }
    Ok(())
}
