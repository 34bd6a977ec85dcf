//! A grant as it was decided: its record, and the manifests of its envelopes.

use std::sync::Arc;

use kms_domain::{
    GrantId, GroupId, KeyType, KeyVersionNumber, Lease, Owner, Principal, RequestId, SecuritySetupId, SecuritySuite,
    SystemTitle, TransportCertificate, UnixMillis,
};
use kms_hsm::{HsmError, KeySource, WrappedKey};
use kms_proto::v1::{self, GrantedMeter, KeysGranted, audit_record::Event};
use kms_store::{AuditReference, GrantRow};

use super::terms::{SessionTerms, terms_record};
use crate::keys::setup::setup_record;
use kms_base::error::ServiceError;
use kms_ledger::{AuditLeaf, Entry, View};

/// A recorded grant, to be delivered.
pub(super) struct GrantPlan {
    pub(super) principal: Arc<Principal>,
    pub(super) transport: TransportCertificate,
    pub(super) grant: GrantId,
    pub(super) request: RequestId,
    pub(super) index: u32,
    pub(super) terms: Arc<SessionTerms>,
    pub(super) issued: UnixMillis,
    pub(super) not_after: UnixMillis,
    /// The meters, or the group.
    pub(super) entries: Vec<PlannedKeys>,
    pub(super) refusals: Vec<(Owner, ServiceError)>,
    /// The leaf of the first record, if the grant is a replay.
    pub(super) leaf: Option<AuditLeaf>,
}

pub(super) struct PlannedKeys {
    pub(super) owner: Owner,
    /// Its place among what the chunk asks for, from 1.
    pub(super) place: u32,
    /// The name of a group; empty for a meter.
    pub(super) name: String,
    pub(super) setup: SecuritySetupId,
    pub(super) suite: SecuritySuite,
    pub(super) keys: Vec<PlannedKey>,
    pub(super) lease: Option<(SystemTitle, KeyVersionNumber, Lease)>,
    /// Of a group.
    pub(super) rotation: Option<v1::GroupRotation>,
}

pub(super) struct PlannedKey {
    pub(super) key_type: KeyType,
    /// `None`: a dedicated key.
    pub(super) version: Option<KeyVersionNumber>,
    pub(super) source: KeySource,
    pub(super) in_doubt: bool,
}

/// I2: one record for the chunk. The grant and the request refer to it.
pub(super) fn record(view: &mut View<'_, '_>, plan: &GrantPlan) -> Entry {
    let terms = &plan.terms;
    let entry = view.append(Event::KeysGranted(KeysGranted {
        grant_id: plan.grant.octets().to_vec().into(),
        not_after_ms: plan.not_after.0,
        meters: plan.entries.iter().map(PlannedKeys::recorded).collect(),
        ..terms_record(terms, plan.index)
    }));
    view.put_grant(GrantRow {
        id: plan.grant,
        principal: plan.principal.id.clone(),
        purpose: terms.purpose.name().to_owned(),
        issued: plan.issued,
        not_after: plan.not_after,
        audit: AuditReference { writer: view.writer(), sequence: 0 },
        meters: u32::try_from(plan.entries.len()).unwrap_or(u32::MAX),
        revoked: None,
    });
    entry
}

impl GrantPlan {
    /// Adds the outcome of one owner.
    pub(super) fn add(&mut self, owner: Owner, planned: Result<PlannedKeys, ServiceError>) {
        match planned {
            Ok(planned) => self.entries.push(planned),
            Err(error) => self.refusals.push((owner, error)),
        }
    }

    /// The manifest of the keys at `places`, and the owners of which a key could not be wrapped.
    pub(super) fn manifest(
        &self,
        places: &[(usize, usize)],
        wrapped: &[Result<WrappedKey, HsmError>],
    ) -> (v1::Manifest, Vec<(Owner, ServiceError)>) {
        let mut failed: Vec<(Owner, ServiceError)> = Vec::new();
        let mut granted: Vec<(usize, Vec<v1::GrantedKey>)> = Vec::new();
        for ((entry, key), wrapped) in places.iter().zip(wrapped) {
            let Some((planned, key)) =
                self.entries.get(*entry).and_then(|planned| Some((planned, planned.keys.get(*key)?)))
            else {
                continue;
            };
            match wrapped {
                Err(error) => failed.push((planned.owner, ServiceError::from(error.clone()))),
                Ok(WrappedKey(octets)) => {
                    if granted.last().is_none_or(|(last, _)| last != entry) {
                        granted.push((*entry, Vec::with_capacity(planned.keys.len())));
                    }
                    if let Some((_, keys)) = granted.last_mut() {
                        keys.push(v1::GrantedKey {
                            key_type: key.key_type.to_string(),
                            version: key.version.map_or(0, KeyVersionNumber::number),
                            wrapped: octets.clone().into(),
                            in_doubt: key.in_doubt,
                        });
                    }
                }
            }
        }
        let (mut meters, mut groups) = (Vec::new(), Vec::new());
        for (entry, keys) in granted {
            // All or nothing for an owner.
            let Some(planned) =
                self.entries.get(entry).filter(|planned| failed.iter().all(|(owner, _)| *owner != planned.owner))
            else {
                continue;
            };
            match planned.owner {
                Owner::Meter(title) => meters.push(planned.of_meter(title, keys)),
                Owner::Group(id) => groups.push(planned.of_group(id, keys)),
                Owner::DeviceType(_) => {}
            }
        }
        let manifest = v1::Manifest {
            principal: self.principal.id.to_string(),
            grant_id: self.grant.octets().to_vec().into(),
            request_id: self.request.octets().to_vec().into(),
            chunk_index: self.index,
            purpose: self.terms.purpose.to_proto().into(),
            issued_ms: self.issued.0,
            not_after_ms: self.not_after.0,
            meters,
            groups,
        };
        (manifest, failed)
    }
}

impl PlannedKeys {
    fn of_meter(&self, title: SystemTitle, keys: Vec<v1::GrantedKey>) -> v1::MeterKeys {
        v1::MeterKeys {
            meter: title.octets().to_vec().into(),
            security_setup: self.setup.obis().to_vec().into(),
            security_suite: u32::from(self.suite.number()),
            keys,
            lease: self.lease(),
        }
    }

    fn of_group(&self, id: GroupId, keys: Vec<v1::GrantedKey>) -> v1::GroupKeys {
        v1::GroupKeys {
            group: id.0,
            name: self.name.clone(),
            security_setup: self.setup.obis().to_vec().into(),
            security_suite: u32::from(self.suite.number()),
            keys,
            lease: self.lease(),
        }
    }

    fn lease(&self) -> Option<v1::CounterLease> {
        self.lease.map(|(client, version, lease)| v1::CounterLease {
            client_title: client.octets().to_vec().into(),
            key_version: version.number(),
            first: lease.first,
            count: lease.count,
        })
    }

    fn recorded(&self) -> GrantedMeter {
        GrantedMeter {
            meter: if let Owner::Meter(title) = self.owner { u64::from_be_bytes(title.octets()) } else { 0 },
            group: if let Owner::Group(GroupId(number)) = self.owner { number } else { 0 },
            versions: self.keys.iter().filter_map(|key| key.version).map(KeyVersionNumber::number).collect(),
            lease_first: self.lease.map_or(0, |(_, _, lease)| lease.first),
            lease_count: self.lease.map_or(0, |(_, _, lease)| lease.count),
            security_setup: setup_record(self.setup),
            place: self.place,
        }
    }
}
