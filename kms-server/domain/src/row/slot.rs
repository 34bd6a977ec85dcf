//! Key slots, their versions and counters in rows.

use bytes::Bytes;

use super::{
    RowError,
    message::{CounterRow, ExposureRow, PrincipalRef, VersionRow},
    octets, version,
};
use crate::{
    CounterDomainId, CounterJump, CounterKey, CounterOwnership, CounterPlace, CounterState, Counters, Evidence,
    Exposure, ExposureReason, HourlyUse, IslandName, KeyDerivation, KeyLength, KeyMaterial, KeyOrigin, KeyState,
    KeyType, KeyVersion, KeyVersionNumber, Party, PrincipalId, QuotaHour, Role, SecuritySetupId, Slot, Slots,
    SystemTitle, Transport, UnixMillis, WrappedKey, WriterId,
};

/// The principals that a row names by position: each is stored once.
#[derive(Default)]
pub(super) struct Principals(Vec<PrincipalId>);

impl Principals {
    pub(super) fn from_rows(island: &IslandName, rows: &[PrincipalRef]) -> Result<Self, RowError> {
        rows.iter()
            .map(|row| {
                let role = Role::ALL
                    .into_iter()
                    .find(|role| role_number(*role) == row.role)
                    .ok_or_else(|| RowError::new(format!("role {} is unknown", row.role)))?;
                Ok(PrincipalId::new(island.clone(), role, &row.name)?)
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    pub(super) fn to_rows(&self) -> Vec<PrincipalRef> {
        self.0
            .iter()
            .map(|principal| PrincipalRef { role: role_number(principal.role()), name: principal.name().to_owned() })
            .collect()
    }

    fn get(&self, position: u32) -> Result<&PrincipalId, RowError> {
        usize::try_from(position)
            .ok()
            .and_then(|position| self.0.get(position.checked_sub(1)?))
            .ok_or_else(|| RowError::new("a principal is named by a position that the row does not have"))
    }

    pub(super) fn optional(&self, position: u32) -> Result<Option<PrincipalId>, RowError> {
        if position == 0 { Ok(None) } else { self.get(position).cloned().map(Some) }
    }

    /// The position of a principal, which is added when it is new.
    pub(super) fn reference(&mut self, principal: &PrincipalId) -> u32 {
        if let Some((_, position)) = self.0.iter().zip(1..).find(|(known, _)| *known == principal) {
            return position;
        }
        self.0.push(principal.clone());
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }
}

pub(super) fn slots_from_rows(rows: Vec<VersionRow>, base: i64, principals: &Principals) -> Result<Slots, RowError> {
    let mut slots: Vec<Slot> = Vec::with_capacity(rows.len());
    let mut rows = rows.into_iter().peekable();
    while let Some(first) = rows.next() {
        let [0, 0, b, e] = first.setup.to_be_bytes() else {
            return Err(RowError::new("a security setup has more than two octets"));
        };
        let slot = (first.setup, first.key_type);
        let key_type = KeyType::from_number(u8::try_from(first.key_type).unwrap_or_default())?;
        // Most slots have one version, so no room is reserved for more.
        let mut versions = Vec::with_capacity(1);
        versions.push(version_from_row(key_type, first, base, principals)?);
        while let Some(row) = rows.next_if(|row| (row.setup, row.key_type) == slot) {
            versions.push(version_from_row(key_type, row, base, principals)?);
        }
        slots.push(Slot::from_versions(SecuritySetupId::from_octets([b, e]), key_type, versions)?);
    }
    Ok(Slots::from_sorted(slots)?)
}

fn version_from_row(
    key_type: KeyType,
    row: VersionRow,
    base: i64,
    principals: &Principals,
) -> Result<KeyVersion, RowError> {
    let state = state_from_number(row.state)?;
    let root_version = version("root", row.root_version)?;
    let diversified = |derivation, length| KeyOrigin::Diversified { root_version, derivation, length };
    let origin = match row.origin {
        1 => diversified(KeyDerivation::Sp800108Cmac, KeyLength::Aes128),
        2 => diversified(KeyDerivation::AesCbcEncryptData, KeyLength::Aes128),
        3 => diversified(KeyDerivation::Sp800108Cmac, KeyLength::Aes256),
        4 => diversified(KeyDerivation::AesCbcEncryptData, KeyLength::Aes256),
        5 => KeyOrigin::Generated,
        6 => KeyOrigin::Imported,
        other => return Err(RowError::new(format!("key origin {other} is unknown"))),
    };
    let material = if state == KeyState::Destroyed && row.wrapped.is_empty() {
        KeyMaterial::Destroyed
    } else if row.wrapped.is_empty() {
        KeyMaterial::Derived
    } else {
        KeyMaterial::Wrapped(WrappedKey::new(key_type, root_version, row.wrapped)?)
    };
    let counters = if row.domain.is_empty() {
        CounterPlace::Own(counters_from_rows(row.counters, principals)?)
    } else if row.counters.is_empty() {
        CounterPlace::Domain(CounterDomainId(octets("counter domain", &row.domain)?))
    } else {
        return Err(RowError::new("a key version has counters and a counter domain"));
    };
    let exposures = exposures_from_rows(row.exposures, base, principals)?;
    Ok(KeyVersion {
        number: KeyVersionNumber::new(row.earlier_numbers.wrapping_add(1))?,
        state,
        since: UnixMillis(base.wrapping_add(row.since)),
        origin,
        material,
        fingerprint: if row.fingerprint.is_empty() { None } else { Some(octets("fingerprint", &row.fingerprint)?) },
        candidate: row.candidate,
        exposures,
        counters,
        transport: Transport {
            left: row.left,
            confirmed: row.confirmed,
            evidence: Evidence::from_number(row.evidence)?,
            kek: if row.kek == 0 { None } else { Some(KeyVersionNumber::new(row.kek)?) },
            meter_counter: row.meter_counter,
        },
    })
}

pub(super) fn slots_to_rows(slots: &Slots, base: UnixMillis, principals: &mut Principals) -> Vec<VersionRow> {
    let mut rows = Vec::new();
    for slot in slots.iter() {
        let [b, e] = slot.setup().octets();
        for version in slot.versions() {
            rows.push(version_to_row(
                version,
                base.0,
                principals,
                u32::from_be_bytes([0, 0, b, e]),
                slot.key_type().number().into(),
            ));
        }
    }
    rows
}

fn version_to_row(
    version: &KeyVersion,
    base: i64,
    principals: &mut Principals,
    setup: u32,
    key_type: u32,
) -> VersionRow {
    let (origin, origin_root) = match version.origin {
        KeyOrigin::Diversified { root_version, derivation, length } => {
            let longer = if length == KeyLength::Aes256 { 2 } else { 0 };
            (derivation_number(derivation) + longer, u32::from(root_version))
        }
        // A destroyed key has no KEK version; any valid number stands for none.
        KeyOrigin::Generated => (5, 1),
        KeyOrigin::Imported => (6, 1),
    };
    let (wrapped, root_version) = match &version.material {
        KeyMaterial::Wrapped(wrapped) => (wrapped.blob().clone(), wrapped.storage_kek_version().into()),
        KeyMaterial::Derived | KeyMaterial::Destroyed => (Bytes::new(), origin_root),
    };
    let (counters, domain) = match &version.counters {
        CounterPlace::Own(counters) => (counters_to_rows(counters, principals), Bytes::new()),
        CounterPlace::Domain(domain) => (Vec::new(), Bytes::copy_from_slice(&domain.0)),
    };
    let exposures = exposures_to_rows(&version.exposures, base, principals);
    VersionRow {
        setup,
        key_type,
        earlier_numbers: version.number.number() - 1,
        state: state_number(version.state),
        since: version.since.0.wrapping_sub(base),
        origin,
        root_version,
        wrapped,
        fingerprint: version.fingerprint.map(|fingerprint| Bytes::copy_from_slice(&fingerprint)).unwrap_or_default(),
        candidate: version.candidate,
        exposures,
        counters,
        domain,
        left: version.transport.left,
        confirmed: version.transport.confirmed,
        evidence: version.transport.evidence.number(),
        kek: version.transport.kek.map_or(0, KeyVersionNumber::number),
        meter_counter: version.transport.meter_counter,
    }
}

pub(super) fn exposures_from_rows(
    rows: Vec<ExposureRow>,
    base: i64,
    principals: &Principals,
) -> Result<Vec<Exposure>, RowError> {
    let exposures = rows.into_iter().map(|row| {
        Ok(Exposure {
            party: match row.party {
                0 => Party::Vendor,
                1 => Party::Anyone,
                position => Party::Principal(principals.get(position - 1)?.clone()),
            },
            since: UnixMillis(base.wrapping_add(row.since)),
            reason: ExposureReason::from_number(row.reason)?,
        })
    });
    exposures.collect()
}

pub(super) fn exposures_to_rows(exposures: &[Exposure], base: i64, principals: &mut Principals) -> Vec<ExposureRow> {
    let rows = exposures.iter().map(|exposure| ExposureRow {
        party: match &exposure.party {
            Party::Vendor => 0,
            Party::Anyone => 1,
            Party::Principal(principal) => principals.reference(principal) + 1,
        },
        since: exposure.since.0.wrapping_sub(base),
        reason: exposure.reason.number(),
    });
    rows.collect()
}

pub(super) fn counters_from_rows(rows: Vec<CounterRow>, principals: &Principals) -> Result<Counters, RowError> {
    let states = rows
        .into_iter()
        .map(|row| {
            let key = match row.client_title {
                0 => CounterKey::Setup,
                title => CounterKey::ClientTitle(SystemTitle::from_octets(&title.to_be_bytes())?),
            };
            let holder = if row.holder.is_empty() { None } else { Some(WriterId::from_octets(&row.holder)?) };
            let ownership = principals.optional(row.owned_by)?.map_or(CounterOwnership::Kms, CounterOwnership::HeadEnd);
            let state = CounterState::new(key, row.bound, holder, ownership, row.leased)?
                .with_jumped(CounterJump::new(row.jumped));
            let hourly = HourlyUse { hour: QuotaHour::from_number(row.hour), counters: row.reserved };
            Ok(state.with_floor(row.floor)?.with_hourly(hourly))
        })
        .collect::<Result<_, RowError>>()?;
    Ok(Counters::from_states(states)?)
}

pub(super) fn counters_to_rows(counters: &Counters, principals: &mut Principals) -> Vec<CounterRow> {
    counters
        .states()
        .iter()
        .map(|state| CounterRow {
            client_title: match state.key() {
                CounterKey::Setup => 0,
                CounterKey::ClientTitle(title) => u64::from_be_bytes(title.octets()),
            },
            bound: state.bound(),
            holder: state.holder().map(|holder| Bytes::copy_from_slice(&holder.octets())).unwrap_or_default(),
            owned_by: match state.ownership() {
                CounterOwnership::Kms => 0,
                CounterOwnership::HeadEnd(head_end) => principals.reference(head_end),
            },
            jumped: state.jumped().counters(),
            leased: state.leased(),
            floor: state.floor(),
            hour: state.hourly().hour.number(),
            reserved: state.hourly().counters,
        })
        .collect()
}

pub(super) const fn derivation_number(derivation: KeyDerivation) -> u32 {
    match derivation {
        KeyDerivation::Sp800108Cmac => 1,
        KeyDerivation::AesCbcEncryptData => 2,
    }
}

const fn role_number(role: Role) -> u32 {
    match role {
        Role::HeadEnd => 0,
        Role::Officer => 1,
        Role::Auditor => 2,
        Role::Handheld => 3,
        Role::Manufacturer => 4,
        Role::ServiceAccount => 5,
    }
}

const fn state_number(state: KeyState) -> u32 {
    match state {
        KeyState::Active => 0,
        KeyState::PreActive => 1,
        KeyState::Suspended => 2,
        KeyState::Deactivated => 3,
        KeyState::Compromised => 4,
        KeyState::Destroyed => 5,
    }
}

fn state_from_number(number: u32) -> Result<KeyState, RowError> {
    KeyState::ALL
        .into_iter()
        .find(|state| state_number(*state) == number)
        .ok_or_else(|| RowError::new(format!("key state {number} is unknown")))
}
