//! The decision on a chunk, inside its transaction: for each meter, or for the group, what is
//! permitted, which versions, which counters (I4, I8); and its replay from the record.

use std::sync::Arc;

use kms_domain::{
    CounterKey, GrantId, GroupId, KeyType, KeyVersion, KeyVersionNumber, Lease, MemberCounts, MeterClass, OnNewKey,
    Owner, Party, Principal, SecuritySetupId, SecuritySuite, Slot, Standing, SystemTitle, TransportCertificate,
    UnixMillis,
};
use kms_hsm::KeySource;
use kms_proto::v1::{self, GrantedMeter, KeysGranted, audit_record::Event};
use kms_store::{Reads, RowKind};

use super::plan::{GrantPlan, PlannedKey, PlannedKeys, record};
use super::terms::{GrantChunk, GrantTargets, SessionTerms, terms_record};
use crate::island::IslandContext;
use crate::keys::counter::{counter_key, on_new_key};
use crate::keys::group_rotation::rotation_message;
use crate::keys::setup::recorded_setup;
use crate::keys::source::{no_key, source};
use kms_authz::{Action, GroupFacts, Resource};
use kms_base::error::ServiceError;
use kms_ledger::{
    Act, Asker, AuditLeaf, ByRecord, CounterOf, Decision, OwnerRow, PastRecord, Permit, View, overtaken, refused_before,
};

/// Keys of the owners that a chunk names.
pub(super) struct Grant {
    pub(super) island: Arc<IslandContext>,
    pub(super) chunk: GrantChunk,
    pub(super) owners: Vec<Owner>,
    pub(super) action: &'static str,
}

impl Act for Grant {
    type Answer = GrantPlan;
    type Past = ByRecord;

    fn name(&self) -> &'static str {
        self.action
    }

    fn reads(&self) -> Reads {
        let mut reads = Reads::default();
        for owner in &self.owners {
            match owner {
                Owner::Meter(title) => reads.meters.push(*title),
                Owner::Group(id) => reads.sealed.push((RowKind::Group, id.0.to_be_bytes().to_vec())),
                Owner::DeviceType(_) => {}
            }
        }
        reads
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        transport_of(asker.principal())?;
        if let Some(title) = self.chunk.terms.client_title
            && !asker.principal().client_titles.contains(&title)
        {
            return Err(ServiceError::denied(format!("{} under client title {title}", self.action)));
        }
        Ok(asker.each())
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<GrantPlan>, ServiceError> {
        let grant = GrantId::from_octets(uuid::Uuid::now_v7().as_bytes()).map_err(|_| record_fault())?;
        let not_after = view.now().after(i64::from(self.chunk.terms.lifetime_seconds) * 1_000);
        let mut plan = self.plan(permit, grant, view.now(), not_after)?;
        let mut permissions = self.permissions(permit);
        for (place, owner) in (1_u32..).zip(self.owners.iter().copied()) {
            let granted = view.attempt(|view| self.grant(view, owner, place, &plan, &mut permissions));
            plan.add(owner, granted);
        }
        self.note_refusals(view, &plan)?;
        if plan.entries.is_empty() {
            return Ok(Decision::forgotten(plan));
        }
        Ok(Decision::recorded(record(view, &plan), plan))
    }

    fn again(
        &self,
        ByRecord(past): ByRecord,
        permit: &Permit,
        view: &mut View<'_, '_>,
    ) -> Result<GrantPlan, ServiceError> {
        let past = PastGrant::of(&past, &self.chunk)?;
        let grant = GrantId::from_octets(&past.event.grant_id).map_err(|_| record_fault())?;
        if view.grant(grant)?.is_none_or(|row| row.revoked.is_some()) {
            return Err(ServiceError::Aborted {
                reason: "the grant of this request was revoked".to_owned(),
                next_step: "ask again with a new request id".to_owned(),
            });
        }
        let not_after = UnixMillis(past.event.not_after_ms);
        if view.now() > not_after {
            return Err(overtaken("the grant has ended"));
        }
        if self.chunk.terms.dedicated_key {
            // I4: a dedicated key is made for one answer and stored nowhere. A second dedicated key
            // under the same lease would protect its InitiateRequest with a counter that the first
            // one may have used.
            return Err(ServiceError::Aborted {
                reason: "this request was answered with a dedicated key, which is not made twice".to_owned(),
                next_step: "ask again with a new request id".to_owned(),
            });
        }
        let mut plan = GrantPlan { leaf: Some(past.leaf), ..self.plan(permit, grant, past.issued, not_after)? };
        let mut permissions = self.permissions(permit);
        for (place, owner) in (1_u32..).zip(self.owners.iter().copied()) {
            let repeated = match past.entry(place, owner)? {
                Some(granted) => self.repeat(view, owner, granted, &mut permissions),
                // I2, I8: it was refused before, and a replay issues nothing new.
                None => Err(refused_before()),
            };
            plan.add(owner, repeated);
        }
        self.note_refusals(view, &plan)?;
        Ok(plan)
    }
}

impl Grant {
    /// What all owners of the chunk have in common.
    fn plan(
        &self,
        permit: &Permit,
        grant: GrantId,
        issued: UnixMillis,
        not_after: UnixMillis,
    ) -> Result<GrantPlan, ServiceError> {
        Ok(GrantPlan {
            grant,
            issued,
            not_after,
            transport: transport_of(permit.principal())?,
            principal: permit.principal().clone(),
            request: self.chunk.request,
            index: self.chunk.index,
            terms: self.chunk.terms.clone(),
            entries: Vec::with_capacity(self.owners.len()),
            refusals: Vec::new(),
            leaf: None,
        })
    }

    fn permissions<'a>(&'a self, permit: &'a Permit) -> Permissions<'a> {
        let named_version = matches!(self.chunk.targets, GrantTargets::Group { version: Some(_), .. });
        Permissions { permit, terms: &self.chunk.terms, named_version, decided: Vec::new() }
    }

    /// Counts the refusals of single owners. If the request has only one owner, its refusal refuses
    /// the request.
    fn note_refusals(&self, view: &mut View<'_, '_>, plan: &GrantPlan) -> Result<(), ServiceError> {
        if let ([(_, error)], [_]) = (plan.refusals.as_slice(), &*self.owners) {
            return Err(error.clone());
        }
        for (_, error) in &plan.refusals {
            view.refuse(reason_of(error));
        }
        Ok(())
    }

    /// Decides on one meter, or on the group.
    fn grant(
        &self,
        view: &mut View<'_, '_>,
        owner: Owner,
        place: u32,
        plan: &GrantPlan,
        permissions: &mut Permissions<'_>,
    ) -> Result<PlannedKeys, ServiceError> {
        let terms = &self.chunk.terms;
        let (row, suite) = self.permitted(view, owner, permissions)?;
        let setup = terms
            .setup
            .or_else(|| row.slots().iter().next().map(Slot::setup))
            .ok_or_else(|| no_key(&terms.key_types, None))?;
        let mut keys = Vec::with_capacity(terms.key_types.len() + 1);
        let mut unexposed = Vec::new();
        for key_type in &terms.key_types {
            let slot = row.slots().get(setup, *key_type).ok_or_else(|| no_key(&[*key_type], Some(setup)))?;
            let version = self.issuable(&row, slot).ok_or_else(|| self.not_issuable(*key_type, setup))?;
            let party = Party::Principal(plan.principal.id.clone());
            if !version
                .exposures()
                .iter()
                .any(|exposure| exposure.party == party && exposure.reason == kms_domain::ExposureReason::Grant)
            {
                unexposed.push((*key_type, version.number()));
            }
            keys.push(PlannedKey {
                key_type: *key_type,
                version: Some(version.number()),
                source: source(owner, slot, version)?,
                in_doubt: slot.in_doubt(),
            });
        }
        if terms.dedicated_key {
            keys.push(dedicated(suite));
        }
        let lease = match (terms.client_title, encryption_key(&keys)) {
            (Some(client), Some((key_type, version))) => {
                let of = self.counter_of(&row, setup, (key_type, version), client)?;
                Some((client, version, view.lease(of, terms.counters, plan.not_after)?))
            }
            _ => None,
        };
        if !unexposed.is_empty() {
            // The first grant of a version to a principal is written into the ledger of exposures;
            // later grants change nothing. The lease may have changed the row, so it is read again.
            let mut changed = view.owner(owner)?.ok_or_else(|| self.denied(owner))?;
            for (key_type, version) in unexposed {
                let version = changed
                    .slots_mut()
                    .get_mut(setup, key_type)
                    .and_then(|slot| slot.version_mut(version))
                    .map_err(|error| ServiceError::Internal(error.to_string()))?;
                version.expose(
                    Party::Principal(plan.principal.id.clone()),
                    kms_domain::ExposureReason::Grant,
                    view.now(),
                );
            }
            view.put_owner(changed)?;
        }
        Ok(PlannedKeys {
            owner,
            place,
            name: name_of(&row),
            setup,
            suite,
            keys,
            lease,
            rotation: rotation_of(&row, setup),
        })
    }

    /// Only the active version: a pre-active one is granted to nobody (I3), and earlier candidates
    /// are for those who probe. A group's former GBEK is for members that its rotation has left
    /// behind.
    fn issuable<'a>(&self, row: &'a OwnerRow, slot: &'a Slot) -> Option<&'a KeyVersion> {
        match (row, &self.chunk.targets) {
            (OwnerRow::Group(group), GrantTargets::Group { version, .. }) => {
                group.issuable(slot.setup(), slot.key_type(), version.filter(|_| slot.key_type() == KeyType::GBEK))
            }
            _ => slot
                .grantable()
                .find(|grantable| grantable.standing == Standing::Active)
                .map(|grantable| grantable.version),
        }
    }

    fn not_issuable(&self, key_type: KeyType, setup: SecuritySetupId) -> ServiceError {
        match &self.chunk.targets {
            GrantTargets::Group { version: Some(version), .. } if key_type == KeyType::GBEK => {
                ServiceError::FailedPrecondition {
                    reason: format!(
                        "{key_type} version {version} is neither the active one nor one that members are left behind with"
                    ),
                    next_step: "look at the rotation with `kms group rotation`, and ask for the active version"
                        .to_owned(),
                }
            }
            _ => no_key(&[key_type], Some(setup)),
        }
    }

    /// The row and its security suite, if policy permits all keys that the caller asks for (I8).
    fn permitted(
        &self,
        view: &mut View<'_, '_>,
        owner: Owner,
        permissions: &mut Permissions<'_>,
    ) -> Result<(OwnerRow, SecuritySuite), ServiceError> {
        let row = view.owner(owner)?.ok_or_else(|| self.denied(owner))?;
        let (permitted, suite) = match &row {
            OwnerRow::Meter(meter) => (permissions.meter(&meter.class), meter.suite),
            OwnerRow::Group(group) => (permissions.group(&GroupFacts::from(&**group)), group.suite),
            // Firmware keys are never issued.
            OwnerRow::DeviceType(_) => return Err(self.denied(owner)),
        };
        if permitted { Ok((row, suite)) } else { Err(self.denied(owner)) }
    }

    /// The counter of a client title. That of a group's key is the title's own: a broadcast goes to
    /// meters of several profiles.
    fn counter_key(
        &self,
        row: &OwnerRow,
        setup: SecuritySetupId,
        client: SystemTitle,
    ) -> Result<CounterKey, ServiceError> {
        match row {
            OwnerRow::Meter(meter) => counter_key(&self.island, meter, setup, client),
            OwnerRow::Group(_) | OwnerRow::DeviceType(_) => Ok(CounterKey::ClientTitle(client)),
        }
    }

    fn on_new_key(&self, row: &OwnerRow, setup: SecuritySetupId) -> OnNewKey {
        match row {
            OwnerRow::Meter(meter) => on_new_key(&self.island, meter, setup),
            OwnerRow::Group(_) | OwnerRow::DeviceType(_) => OnNewKey::Continue,
        }
    }

    /// The counter of a key version for a client title: what a grant leases from, and what the
    /// repetition of the grant looks at (I4).
    fn counter_of(
        &self,
        row: &OwnerRow,
        setup: SecuritySetupId,
        (key_type, version): (KeyType, KeyVersionNumber),
        client: SystemTitle,
    ) -> Result<CounterOf, ServiceError> {
        Ok(CounterOf {
            owner: row.owner(),
            setup,
            key_type,
            version,
            counter: self.counter_key(row, setup, client)?,
            on_new_key: self.on_new_key(row, setup),
        })
    }

    /// The same answer for an owner that does not exist and one that the caller may not use.
    fn denied(&self, owner: Owner) -> ServiceError {
        match (owner, &self.chunk.targets) {
            (Owner::Meter(title), _) => denied(title),
            (_, GrantTargets::Group { name, .. }) => ServiceError::denied(format!("{} with group {name}", self.action)),
            _ => ServiceError::denied(self.action),
        }
    }

    /// Repeats a recorded grant, if it is still permitted, its versions are still grantable and its
    /// lease is still the newest.
    fn repeat(
        &self,
        view: &mut View<'_, '_>,
        owner: Owner,
        granted: &GrantedMeter,
        permissions: &mut Permissions<'_>,
    ) -> Result<PlannedKeys, ServiceError> {
        let terms = &self.chunk.terms;
        let (row, suite) = self.permitted(view, owner, permissions)?;
        let setup = recorded_setup(granted.security_setup);
        if terms.key_types.len() != granted.versions.len() || terms.setup.is_some_and(|asked| asked != setup) {
            return Err(record_fault());
        }
        let mut keys = Vec::with_capacity(terms.key_types.len() + 1);
        for (key_type, number) in terms.key_types.iter().zip(&granted.versions) {
            let slot = row.slots().get(setup, *key_type).ok_or_else(|| overtaken("the key is gone"))?;
            let version = self
                .issuable(&row, slot)
                .filter(|version| version.number().number() == *number)
                .ok_or_else(|| overtaken("the key was rotated"))?;
            keys.push(PlannedKey {
                key_type: *key_type,
                version: Some(version.number()),
                source: source(owner, slot, version)?,
                in_doubt: slot.in_doubt(),
            });
        }
        let lease = match (terms.client_title, encryption_key(&keys)) {
            (Some(_), Some(_)) if granted.lease_count != terms.counters.get() => return Err(record_fault()),
            (Some(client), Some((key_type, version))) => {
                let lease = Lease { first: granted.lease_first, count: granted.lease_count };
                let of = self.counter_of(&row, setup, (key_type, version), client)?;
                if !view.is_live(of, lease)? {
                    return Err(overtaken("a newer lease was allocated, or the server restarted,"));
                }
                Some((client, version, lease))
            }
            _ => None,
        };
        Ok(PlannedKeys {
            owner,
            place: granted.place,
            name: name_of(&row),
            setup,
            suite,
            keys,
            lease,
            rotation: rotation_of(&row, setup),
        })
    }
}

/// The transport key for which a principal's keys are wrapped.
fn transport_of(principal: &Principal) -> Result<TransportCertificate, ServiceError> {
    principal.transport.clone().ok_or_else(|| ServiceError::FailedPrecondition {
        reason: "no transport key is registered, so there is nothing to wrap keys for".to_owned(),
        next_step: "register one with `kms principal register-transport-key`".to_owned(),
    })
}

/// Policy's answers within one chunk: one for each class of meters.
struct Permissions<'a> {
    permit: &'a Permit,
    terms: &'a SessionTerms,
    /// A version of a group's key was named.
    named_version: bool,
    decided: Vec<(MeterClass, bool)>,
}

impl Permissions<'_> {
    /// I8: every key type that is asked for must be permitted for the meter's class.
    fn meter(&mut self, class: &MeterClass) -> bool {
        match self.decided.iter().find(|(known, _)| known == class) {
            Some((_, permitted)) => *permitted,
            None => {
                let permitted = self.permits(class);
                self.decided.push((class.clone(), permitted));
                permitted
            }
        }
    }

    /// I8: the same for the group. Rights on members do not count here: the right to a member's
    /// keys gives no right to a broadcast key.
    fn group(&self, group: &GroupFacts) -> bool {
        let (purpose, lifetime_seconds) = (self.terms.purpose, self.terms.lifetime_seconds);
        !self.terms.dedicated_key
            && self.terms.key_types.iter().all(|key_type| {
                let action = Action::OpenGroupSession {
                    key_type: *key_type,
                    purpose,
                    lifetime_seconds,
                    named_version: self.named_version,
                };
                self.permit.permits(&action, &Resource::Group(group))
            })
    }

    fn permits(&self, class: &MeterClass) -> bool {
        let dedicated = self.terms.dedicated_key.then_some(KeyType::DEDICATED);
        class.status.may_grant()
            && self.terms.key_types.iter().copied().chain(dedicated).all(|key_type| {
                let action = Action::OpenSession {
                    key_type,
                    purpose: self.terms.purpose,
                    lifetime_seconds: self.terms.lifetime_seconds,
                    dedicated_key: self.terms.dedicated_key,
                };
                self.permit.permits(&action, &Resource::Meters(class))
            })
    }
}

/// A grant of the past, from its audit record.
struct PastGrant<'p> {
    event: &'p KeysGranted,
    issued: UnixMillis,
    leaf: AuditLeaf,
}

impl<'p> PastGrant<'p> {
    /// The grant in a record, if its terms are those of this request.
    fn of(past: &'p PastRecord, chunk: &GrantChunk) -> Result<Self, ServiceError> {
        let Some(Event::KeysGranted(event)) = &past.record.event else { return Err(record_fault()) };
        let asked = KeysGranted {
            grant_id: event.grant_id.clone(),
            not_after_ms: past.record.time_ms + i64::from(chunk.terms.lifetime_seconds) * 1_000,
            meters: event.meters.clone(),
            ..terms_record(&chunk.terms, chunk.index)
        };
        // Earlier servers recorded no places: two entries of one owner cannot be told apart.
        if *event != asked || event.meters.iter().any(|granted| granted.place == 0) {
            return Err(overtaken("the server was upgraded"));
        }
        Ok(Self { event, issued: UnixMillis(past.record.time_ms), leaf: past.leaf() })
    }

    /// The recorded keys of the owner at this place of the request, from 1; `None`: it was refused.
    fn entry(&self, place: u32, owner: Owner) -> Result<Option<&'p GrantedMeter>, ServiceError> {
        match self.event.meters.iter().find(|granted| granted.place == place) {
            Some(granted) if !is_of(granted, owner) => Err(record_fault()),
            found => Ok(found),
        }
    }
}

/// Whether an entry of a grant's record is of this owner.
fn is_of(granted: &GrantedMeter, owner: Owner) -> bool {
    match owner {
        Owner::Meter(title) => granted.group == 0 && granted.meter == u64::from_be_bytes(title.octets()),
        Owner::Group(GroupId(number)) => granted.group == number,
        Owner::DeviceType(_) => false,
    }
}

fn name_of(row: &OwnerRow) -> String {
    match row {
        OwnerRow::Group(group) => group.name.clone(),
        OwnerRow::Meter(_) | OwnerRow::DeviceType(_) => String::new(),
    }
}

/// The state of the rotation of a group's GBEK, without counts.
fn rotation_of(row: &OwnerRow, setup: SecuritySetupId) -> Option<v1::GroupRotation> {
    let OwnerRow::Group(group) = row else { return None };
    group
        .slots
        .get(setup, KeyType::GBEK)
        .map(|slot| rotation_message(group, slot.setup(), slot.key_type(), MemberCounts::default()))
}

fn dedicated(suite: SecuritySuite) -> PlannedKey {
    PlannedKey {
        key_type: KeyType::DEDICATED,
        version: None,
        source: KeySource::Fresh(suite.key_length()),
        in_doubt: false,
    }
}

/// The same answer for a meter that does not exist and one that the caller may not see.
fn denied(title: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("openSession with meter {title}"))
}

/// The key whose counters a session leases.
fn encryption_key(keys: &[PlannedKey]) -> Option<(KeyType, KeyVersionNumber)> {
    let key = keys.iter().find(|key| matches!(key.key_type, KeyType::GUEK | KeyType::GBEK))?;
    Some((key.key_type, key.version?))
}

fn record_fault() -> ServiceError {
    ServiceError::Internal("the record of a past request does not read".to_owned())
}

/// The reason of a refusal without the meter: a batch of refused meters is one line in the log, not
/// thousands.
fn reason_of(error: &ServiceError) -> String {
    match error {
        ServiceError::PermissionDenied { .. } => "not permitted for a meter of the request".to_owned(),
        other => other.to_string(),
    }
}
