//! What an act sees and changes: rows opened and verified (I5), changes staged until the whole act
//! is decided.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use kms_domain::{
    Campaign, CampaignId, ChunkSize, CounterDomain, CounterDomainId, CounterError, CounterJump, CounterKey,
    CounterPlace, CounterState, CounterUse, Counters, DeviceType, DeviceTypeId, Exposure, Generation, Group, GroupId,
    IslandName, KeyType, KeyVersion, KeyVersionNumber, Lease, LiveChunk, Meter, OnNewKey, Owner, Principal,
    PrincipalId, Proposal, ProposalId, QuotaUse, RequestId, RootId, RootRotation, RowId, SealKeys, SecuritySetupId,
    Slots, SystemTitle, UnixMillis, WriterId,
};
use kms_proto::v1::{AuditRecord, SecurityEvent, audit_record::Event};
use kms_store::{
    FingerprintOwner, FingerprintPrefix, GrantRevocation, GrantRow, Lookup, ReadSet, Reads, RequestKey, RequestRow,
    RowKind, SealedRow, ShipmentRefusal, ShipmentRow, ShipmentState, SpooledFile, TaskKey, TaskRow, UploadId,
};

use super::{
    attempt::Change,
    committer::{Chunks, Held, Seen},
    decision::{Entry, Kind},
    owner_row::OwnerRow,
    refusals::Refusal,
    replay::Remembered,
};
use crate::quota_use_row;
use kms_authz::Caller;
use kms_base::bounds::Bound;
use kms_base::error::ServiceError;

/// Who acts: what each audit record of the act names.
#[derive(Clone, Debug)]
pub struct Actor {
    /// The principal; `None` is the server itself.
    pub principal: Option<PrincipalId>,
    /// SHA-256 of the certificate that was used.
    pub certificate_sha256: Option<[u8; 32]>,
    /// The request that is executed.
    pub request: Option<RequestId>,
    /// What is attempted, as policy names it: refusals are recorded under it.
    pub action: &'static str,
}

impl Actor {
    /// The server itself.
    pub const fn server(ServerAct(action): ServerAct) -> Self {
        Self { principal: None, certificate_sha256: None, request: None, action }
    }

    /// A caller who asks for `action`.
    pub fn caller(caller: &Caller, request: Option<RequestId>, action: &'static str) -> Self {
        Self {
            principal: Some(caller.principal.clone()),
            certificate_sha256: Some(caller.certificate_sha256),
            request,
            action,
        }
    }
}

/// What the server does by itself, without a caller: all of it, by the names under which refusals
/// are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerAct(&'static str);

impl ServerAct {
    /// The chain goes on with another audit key.
    pub const AUDIT_KEY: Self = Self("audit-key");
    /// The ceremony of an island, and its first principals.
    pub const CEREMONY: Self = Self("ceremony");
    /// Keys whose retention is over are destroyed.
    pub const DESTROY_KEYS: Self = Self("destroy-keys");
    /// A root whose destruction was decided is destroyed in this server's tokens.
    pub const DESTROY_ROOT: Self = Self("destroy-root");
    /// A shipment that nobody goes on with is dropped.
    pub const DROP_SHIPMENT: Self = Self("dropShipment");
    /// A wave of a campaign is over.
    pub const END_WAVE: Self = Self("endWave");
    /// Members of a group have a new version of its key.
    pub const FOLLOW_ROTATION: Self = Self("followRotation");
    /// A version of a root is made, on the token's machine.
    pub const MAKE_ROOT: Self = Self("make-root");
    /// A campaign whose wave fails, or whose plan was changed, is paused.
    pub const PAUSE_CAMPAIGN: Self = Self("pauseCampaign");
    /// The tasks of a wave are made.
    pub const PLAN_WAVE: Self = Self("planWave");
    /// An officer's key is certified by custodians, on the token's machine.
    pub const RECERTIFY_OFFICER: Self = Self("recertify-officer");
    /// The server's own TLS certificate is renewed.
    pub const RENEW_SERVER_CERTIFICATE: Self = Self("renew-server-certificate");
    /// The database was restored.
    pub const RESTORE: Self = Self("restore");
    /// A seal key is retired.
    pub const RETIRE_SEAL_KEY: Self = Self("retire-seal-key");
    /// Rows are stored or sealed under a new root.
    pub const ROTATE_ROOT: Self = Self("rotate-root");
    /// Rows and log are compared.
    pub const SCRUB: Self = Self("scrub");
    /// Who knows a key value knows it in every slot.
    pub const SHARE_EXPOSURES: Self = Self("share-exposures");
    /// Of tests alone.
    #[doc(hidden)]
    pub const TEST: Self = Self("test");
}

/// One act's view of the rows that were read, with the changes of the acts before it in the same
/// transaction.
///
/// A row that does not verify is as good as absent for a caller, and an event for the security
/// officers (I5).
pub struct View<'v, 'b> {
    pub(super) base: &'v mut Batch<'b>,
    pub(super) actor: &'v Actor,
    pub(super) staged: Staged,
}

/// The state of one transaction's attempt, shared by its acts.
pub(super) struct Batch<'a> {
    pub(super) read: &'a ReadSet,
    pub(super) now: UnixMillis,
    pub(super) island: &'a IslandName,
    pub(super) seal: &'a SealKeys,
    pub(super) writer: WriterId,
    pub(super) chunk_size: ChunkSize,
    pub(super) counter_cap: kms_domain::CounterCap,
    /// By how much restores raised all counters.
    pub(super) jump: CounterJump,
    pub(super) seen: &'a Seen,
    pub(super) chunks: &'a mut Chunks,
    /// Chunks whose reservation this transaction writes; they are dealt from in later transactions
    /// only if it commits.
    pub(super) fresh_chunks: HashMap<ChunkName, Held>,
    pub(super) rows: HashMap<RowId, Opened>,
    pub(super) missing: Reads,
    pub(super) events: Vec<RecordedEvent>,
    pub(super) requests: HashMap<RequestKey, RequestRow>,
    /// The first event of the act that carried the request out.
    pub(super) request_events: HashMap<RequestKey, usize>,
    pub(super) grants: Vec<(GrantRow, usize)>,
    pub(super) revocations: Vec<GrantRevocation>,
    /// By prefix: an import asks for thousands, and the database takes them better in order.
    pub(super) fingerprints: BTreeMap<FingerprintPrefix, Vec<FingerprintOwner>>,
    pub(super) shipments: HashMap<UploadId, ShipmentRow>,
    pub(super) refused_lines: Vec<ShipmentRefusal>,
    /// Tasks in the generation that is to be written.
    pub(super) tasks: HashMap<TaskKey, TaskRow>,
    pub(super) refusals: Vec<Refusal>,
}

/// A row as it stands within the transaction.
#[derive(Clone)]
pub(super) struct Opened {
    /// As in the database; `None`: absent.
    pub(super) generation: Option<Generation>,
    pub(super) value: Option<Value>,
    pub(super) changed: bool,
    /// The search columns of a meter follow.
    pub(super) reprojected: bool,
}

#[derive(Clone)]
pub(super) enum Value {
    Meter(Arc<Meter>),
    Principal(Arc<Principal>),
    Group(Arc<Group>),
    DeviceType(Arc<DeviceType>),
    Domain(Arc<CounterDomain>),
    Island(Arc<kms_domain::Island>),
    QuotaUse(Arc<QuotaUse>),
    Campaign(Arc<Campaign>),
    Proposal(Arc<Proposal>),
    RootRotation(Arc<RootRotation>),
}

impl Value {
    /// The keys in the row, if it is one of an owner of keys.
    fn slots(&self) -> Option<&Slots> {
        match self {
            Self::Meter(meter) => Some(&meter.slots),
            Self::Group(group) => Some(&group.slots),
            Self::DeviceType(device_type) => Some(&device_type.slots),
            _ => None,
        }
    }
}

/// An event with the rows that its act wrote.
pub(super) struct RecordedEvent {
    pub(super) record: AuditRecord,
    pub(super) written: Vec<RowId>,
    pub(super) act: usize,
}

/// What one act has staged; dropped when it fails.
#[derive(Default)]
pub(super) struct Staged {
    pub(super) rows: HashMap<RowId, Opened>,
    pub(super) events: Vec<Event>,
    /// What is recorded behind the others: the first event of an act is what grants and requests
    /// refer to.
    pub(super) alerts: Vec<Event>,
    pub(super) requests: Vec<StagedRequest>,
    pub(super) grants: Vec<GrantRow>,
    pub(super) revocations: Vec<GrantRevocation>,
    pub(super) fingerprints: BTreeMap<FingerprintPrefix, Vec<FingerprintOwner>>,
    pub(super) shipments: Vec<ShipmentRow>,
    pub(super) refused_lines: Vec<ShipmentRefusal>,
    pub(super) tasks: HashMap<TaskKey, TaskRow>,
    /// What [`View::attempt`] undoes by.
    pub(super) log: Vec<Change>,
}

impl Staged {
    /// I2: what is staged against the act's own word of what it came to. Whatever leaves, and
    /// whatever is written of keys, rights and people, is on the record.
    fn fault(&self, kind: Kind) -> Option<&'static str> {
        let of_right = !self.grants.is_empty()
            || !self.revocations.is_empty()
            || !self.refused_lines.is_empty()
            || self.log.iter().any(|change| !matches!(change, Change::Task(..)));
        let on_its_way = !self.tasks.is_empty() || !self.shipments.is_empty();
        match kind {
            Kind::Recorded if self.events.is_empty() => Some("says that it is on the record, and its entry was undone"),
            Kind::Progress if of_right => Some("changes more than what is on its way, and records nothing"),
            Kind::Unchanged | Kind::Forgotten if of_right || on_its_way || !self.events.is_empty() => {
                Some("changes something, and says that it does not")
            }
            Kind::Recorded | Kind::Progress | Kind::Unchanged | Kind::Forgotten => None,
        }
    }
}

/// What was answered to a request.
pub(super) struct StagedRequest {
    pub(super) key: RequestKey,
    pub(super) row: RequestRow,
    /// The outcome is the act's first record.
    pub(super) by_record: bool,
}

/// Names the counter that a live chunk deals from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ChunkName {
    /// Of one key version.
    Version { owner: Owner, setup: SecuritySetupId, key_type: KeyType, version: KeyVersionNumber, counter: CounterKey },
    /// Of a key value that several slots share.
    Domain { domain: CounterDomainId, counter: CounterKey },
}

/// Which key version's counters a lease is for.
#[derive(Clone, Copy, Debug)]
pub struct CounterOf {
    /// Whose key it is.
    pub owner: Owner,
    /// The security setup.
    pub setup: SecuritySetupId,
    /// The encryption key: GUEK, or GBEK.
    pub key_type: KeyType,
    /// Its version.
    pub version: KeyVersionNumber,
    /// Whose counter: the client title's, or the setup's (device profile).
    pub counter: CounterKey,
    /// What the meter's counter does when its key changes (device profile).
    pub on_new_key: OnNewKey,
}

/// A counter lease that its grantee may still use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveLease {
    /// Dealt by this run of this server.
    Until(UnixMillis),
    /// Dealt by another server, or before this one was started: the row tells that there was one,
    /// and not until when.
    EndUnknown,
}

impl View<'_, '_> {
    /// The time of the transaction.
    pub fn now(&self) -> UnixMillis {
        self.base.now
    }

    /// SHA-256 of the certificate that the act is asked for with; `None`: the server itself acts.
    pub const fn acting_certificate(&self) -> Option<[u8; 32]> {
        self.actor.certificate_sha256
    }

    /// The run of the server that writes the transaction's records.
    pub const fn writer(&self) -> WriterId {
        self.base.writer
    }

    /// The caller's principal, if it is enabled and this certificate speaks for it now (I5, I8).
    ///
    /// # Errors
    /// [`ServiceError::Unauthenticated`]: not, or not any more.
    pub fn caller(&mut self, caller: &Caller) -> Result<Arc<Principal>, ServiceError> {
        let now = self.now();
        match self.principal(&caller.principal)? {
            Some(principal) if principal.accepts(&caller.certificate_sha256, now) => Ok(principal),
            _ => Err(ServiceError::unauthenticated(
                "the certificate is not one of an enabled principal of this island; ask a security officer",
            )),
        }
    }

    /// A principal.
    ///
    /// # Errors
    /// The row was not read yet (the transaction reads it and decides again), or does not verify.
    pub fn principal(&mut self, id: &PrincipalId) -> Result<Option<Arc<Principal>>, ServiceError> {
        self.open(RowId::Principal(id.clone())).map(|value| match value {
            Some(Value::Principal(principal)) => Some(principal),
            _ => None,
        })
    }

    /// Writes a principal.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_principal(&mut self, principal: Principal) -> Result<(), ServiceError> {
        self.put(RowId::Principal(principal.id.clone()), Value::Principal(Arc::new(principal)), false)
    }

    /// A meter.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn meter(&mut self, title: SystemTitle) -> Result<Option<Arc<Meter>>, ServiceError> {
        self.open(RowId::Meter(title)).map(|value| match value {
            Some(Value::Meter(meter)) => Some(meter),
            _ => None,
        })
    }

    /// Writes a meter. `reprojected` says that what the search columns show has changed.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_meter(&mut self, meter: Meter, reprojected: bool) -> Result<(), ServiceError> {
        self.put(RowId::Meter(meter.title), Value::Meter(Arc::new(meter)), reprojected)
    }

    /// A group of meters.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn group(&mut self, id: GroupId) -> Result<Option<Arc<Group>>, ServiceError> {
        self.open(RowId::Group(id)).map(|value| match value {
            Some(Value::Group(group)) => Some(group),
            _ => None,
        })
    }

    /// Writes a group.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_group(&mut self, group: Group) -> Result<(), ServiceError> {
        self.put(RowId::Group(group.id), Value::Group(Arc::new(group)), false)
    }

    /// A device type.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn device_type(&mut self, id: DeviceTypeId) -> Result<Option<Arc<DeviceType>>, ServiceError> {
        self.open(RowId::DeviceType(id)).map(|value| match value {
            Some(Value::DeviceType(device_type)) => Some(device_type),
            _ => None,
        })
    }

    /// Writes a device type.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_device_type(&mut self, device_type: DeviceType) -> Result<(), ServiceError> {
        self.put(RowId::DeviceType(device_type.id), Value::DeviceType(Arc::new(device_type)), false)
    }

    /// The row of an owner of keys.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn owner(&mut self, owner: Owner) -> Result<Option<OwnerRow>, ServiceError> {
        Ok(match owner {
            Owner::Meter(title) => self.meter(title)?.map(OwnerRow::Meter),
            Owner::Group(id) => self.group(id)?.map(OwnerRow::Group),
            Owner::DeviceType(id) => self.device_type(id)?.map(OwnerRow::DeviceType),
        })
    }

    /// Writes the row of an owner whose keys changed, and nothing that search columns show.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_owner(&mut self, row: OwnerRow) -> Result<(), ServiceError> {
        match row {
            OwnerRow::Meter(meter) => self.put(RowId::Meter(meter.title), Value::Meter(meter), false),
            OwnerRow::Group(group) => self.put(RowId::Group(group.id), Value::Group(group), false),
            OwnerRow::DeviceType(device_type) => {
                self.put(RowId::DeviceType(device_type.id), Value::DeviceType(device_type), false)
            }
        }
    }

    /// A counter domain.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn domain(&mut self, id: CounterDomainId) -> Result<Option<Arc<CounterDomain>>, ServiceError> {
        self.open(RowId::CounterDomain(id)).map(|value| match value {
            Some(Value::Domain(domain)) => Some(domain),
            _ => None,
        })
    }

    /// Writes a counter domain.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_domain(&mut self, domain: CounterDomain) -> Result<(), ServiceError> {
        self.put(RowId::CounterDomain(domain.id), Value::Domain(Arc::new(domain)), false)
    }

    /// The island's own row.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn island(&mut self, name: &IslandName) -> Result<Option<Arc<kms_domain::Island>>, ServiceError> {
        self.open(RowId::Island(name.clone())).map(|value| match value {
            Some(Value::Island(island)) => Some(island),
            _ => None,
        })
    }

    /// Writes the island's own row.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_island(&mut self, island: kms_domain::Island) -> Result<(), ServiceError> {
        self.put(RowId::Island(island.name.clone()), Value::Island(Arc::new(island)), false)
    }

    /// What a principal has used of its quotas; nothing, if it never used one.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn quota_use(&mut self, principal: &PrincipalId) -> Result<QuotaUse, ServiceError> {
        self.open(RowId::QuotaUse(principal.clone())).map(|value| match value {
            Some(Value::QuotaUse(used)) => Arc::unwrap_or_clone(used),
            _ => QuotaUse::new(principal.clone()),
        })
    }

    /// Writes what a principal has used of its quotas.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_quota_use(&mut self, used: QuotaUse) -> Result<(), ServiceError> {
        self.put(RowId::QuotaUse(used.principal.clone()), Value::QuotaUse(Arc::new(used)), false)
    }

    /// A campaign.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn campaign(&mut self, id: CampaignId) -> Result<Option<Arc<Campaign>>, ServiceError> {
        self.open(RowId::Campaign(id)).map(|value| match value {
            Some(Value::Campaign(campaign)) => Some(campaign),
            _ => None,
        })
    }

    /// Writes a campaign.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_campaign(&mut self, campaign: Campaign) -> Result<(), ServiceError> {
        self.put(RowId::Campaign(campaign.id), Value::Campaign(Arc::new(campaign)), false)
    }

    /// A proposal.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn proposal(&mut self, id: ProposalId) -> Result<Option<Arc<Proposal>>, ServiceError> {
        self.open(RowId::Proposal(id)).map(|value| match value {
            Some(Value::Proposal(proposal)) => Some(proposal),
            _ => None,
        })
    }

    /// The rotation to a version of a root.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn root_rotation(&mut self, to: RootId) -> Result<Option<Arc<RootRotation>>, ServiceError> {
        self.open(RowId::RootRotation(to)).map(|value| match value {
            Some(Value::RootRotation(rotation)) => Some(rotation),
            _ => None,
        })
    }

    /// Writes a proposal.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_proposal(&mut self, proposal: Proposal) -> Result<(), ServiceError> {
        self.put(RowId::Proposal(proposal.id), Value::Proposal(Arc::new(proposal)), false)
    }

    /// Writes a rotation.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn put_root_rotation(&mut self, rotation: RootRotation) -> Result<(), ServiceError> {
        self.put(RowId::RootRotation(rotation.to), Value::RootRotation(Arc::new(rotation)), false)
    }

    /// Writes a row as it is, so that it gets the seal of the current seal key. False: there is no
    /// such row.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn seal_again(&mut self, id: RowId) -> Result<bool, ServiceError> {
        let Some(value) = self.open(id.clone())? else { return Ok(false) };
        self.put(id, value, false)?;
        Ok(true)
    }

    /// A task of a campaign. One that was edited, or that the approved plan does not have, is as
    /// good as absent, and an event for the security officers (I5, I6).
    ///
    /// # Errors
    /// The row was not read yet.
    pub fn task(&mut self, key: TaskKey) -> Result<Option<TaskRow>, ServiceError> {
        if let Some(row) = self.staged.tasks.get(&key).or_else(|| self.base.tasks.get(&key)) {
            return Ok(Some(row.clone()));
        }
        let row = match self.base.read.task(key) {
            Lookup::Present(row) => row.clone(),
            Lookup::Absent => return Ok(None),
            Lookup::NotRead => {
                self.base.missing.tasks.push(key);
                return Err(not_read());
            }
        };
        if !self.task_fits(&row)? {
            let refusal = self.refusal(
                format!("a task of campaign {} for meter {} is none of its plan", key.campaign, key.meter),
                true,
            );
            self.base.refusals.push(refusal);
            return Ok(None);
        }
        Ok(Some(row))
    }

    /// Whether a task is what was written of it, and does what was approved.
    fn task_fits(&mut self, row: &TaskRow) -> Result<bool, ServiceError> {
        let sealed = self.base.seal.accept(&row.mark, |seal| row.mark_by(seal));
        if !sealed && !self.base.seal.accept(&row.mark, |seal| row.former_mark_by(seal)) {
            return Ok(false);
        }
        // Nobody does anything for it any more.
        if row.task.state.is_final() {
            return Ok(true);
        }
        // I5: a row that is refused is on the record already.
        let Some(campaign) = unless_refused(self.campaign(row.key.campaign))? else { return Ok(false) };
        if sealed {
            return Ok(campaign.plans(&row.task.step));
        }
        // From before marks bound the step: it is derived from the plan. The next write of the row
        // binds it.
        Ok(unless_refused(self.meter(row.key.meter))?.is_some_and(|meter| campaign.plans_for(&meter, &row.task.step)))
    }

    /// Writes a task that [`Self::task`] gave; its generation and mark follow by themselves.
    pub fn put_task(&mut self, row: TaskRow) {
        let generation = self.base.read.task(row.key).present().map_or(0, |read| read.generation) + 1;
        self.seal_and_stage(TaskRow { generation, ..row });
    }

    /// Makes a task that the plan has, and binds it to the plan. The row's generation and mark
    /// follow by themselves.
    pub fn plan_task(&mut self, row: TaskRow) {
        self.seal_and_stage(TaskRow { generation: 1, ..row });
    }

    fn seal_and_stage(&mut self, row: TaskRow) {
        let mark = row.mark_by(self.base.seal.current());
        self.stage_task(TaskRow { mark, ..row });
    }

    fn stage_task(&mut self, row: TaskRow) {
        let key = row.key;
        let before = self.staged.tasks.insert(key, row);
        self.staged.log.push(Change::Task(key, before));
    }

    /// The database's clock, which all servers share: what leases of tasks run by.
    ///
    /// # Errors
    /// It was not read yet.
    pub fn clock(&mut self) -> Result<UnixMillis, ServiceError> {
        self.base.read.clock().ok_or_else(|| {
            self.base.missing.clock = true;
            not_read()
        })
    }

    /// What was answered to a request, if it was executed: see [`Self::asked`].
    ///
    /// # Errors
    /// The row was not read yet.
    pub(super) fn request(&mut self, key: &RequestKey) -> Result<Option<Remembered>, ServiceError> {
        if let Some(row) = self.base.requests.get(key) {
            return Ok(Some(Remembered {
                digest: row.digest,
                outcome: row.outcome.clone(),
                expires: Some(row.expires),
            }));
        }
        match self.base.read.request(key) {
            Lookup::Present(row) => self.open_request(key, row).map(Some),
            Lookup::Absent => Ok(None),
            Lookup::NotRead => {
                self.base.missing.requests.push(key.clone());
                Err(not_read())
            }
        }
    }

    /// Remembers what was answered to a request. `by_record`: the outcome is replaced by the name
    /// of the act's first record.
    pub(super) fn put_request(&mut self, key: RequestKey, row: RequestRow, by_record: bool) {
        self.staged.requests.push(StagedRequest { key, row, by_record });
    }

    /// A grant's row.
    ///
    /// # Errors
    /// The row was not read yet.
    pub fn grant(&mut self, id: kms_domain::GrantId) -> Result<Option<GrantRow>, ServiceError> {
        match self.base.read.grant(id) {
            Lookup::Present(row) => {
                // An earlier act of the same transaction may have revoked it.
                let revoked =
                    self.base.revocations.iter().chain(&self.staged.revocations).find(|revocation| revocation.id == id);
                Ok(Some(GrantRow {
                    revoked: row.revoked.or_else(|| revoked.map(|revocation| revocation.revoked)),
                    ..row.clone()
                }))
            }
            Lookup::Absent => Ok(None),
            Lookup::NotRead => {
                self.base.missing.grants.push(id);
                Err(not_read())
            }
        }
    }

    /// Lists a grant. The audit reference of the row is replaced by that of the act's first event.
    pub fn put_grant(&mut self, row: GrantRow) {
        self.staged.grants.push(row);
    }

    /// Revokes a grant.
    pub fn revoke_grant(&mut self, revocation: GrantRevocation) {
        self.staged.revocations.push(revocation);
    }

    /// Who has keys with this fingerprint prefix.
    ///
    /// # Errors
    /// It was not read yet.
    pub fn fingerprint_owners(&mut self, prefix: FingerprintPrefix) -> Result<Vec<FingerprintOwner>, ServiceError> {
        let Some(owners) = self.base.read.fingerprint_owners(prefix) else {
            self.base.missing.fingerprints.push(prefix);
            return Err(not_read());
        };
        let staged = [&self.base.fingerprints, &self.staged.fingerprints]
            .into_iter()
            .filter_map(|staged| staged.get(&prefix))
            .flatten();
        Ok(owners.iter().chain(staged).copied().collect())
    }

    /// Remembers a new key's fingerprint.
    pub fn put_fingerprint(&mut self, prefix: FingerprintPrefix, owner: FingerprintOwner) {
        self.staged.fingerprints.entry(prefix).or_default().push(owner);
        self.staged.log.push(Change::Fingerprint(prefix));
    }

    /// A shipment in the spool.
    ///
    /// # Errors
    /// The row was not read yet.
    pub fn shipment(&mut self, upload: UploadId) -> Result<Option<ShipmentRow>, ServiceError> {
        if let Some(row) = self.base.shipments.get(&upload) {
            return Ok(Some(row.clone()));
        }
        match self.base.read.shipment(upload) {
            Lookup::Present(row) => Ok(Some(row.clone())),
            Lookup::Absent => Ok(None),
            Lookup::NotRead => {
                self.base.missing.shipments.push(upload);
                Err(not_read())
            }
        }
    }

    /// Every file in the spool as it will be when the transaction commits. Who has read them adds
    /// the next one alone, on all servers.
    ///
    /// # Errors
    /// They were not read yet.
    pub fn spool(&mut self) -> Result<Vec<SpooledFile>, ServiceError> {
        let Some(stored) = self.base.read.spool() else {
            self.base.missing.spool = true;
            return Err(not_read());
        };
        let mut files: HashMap<UploadId, SpooledFile> = stored.iter().map(|file| (file.upload, file.clone())).collect();
        for row in self.base.shipments.values().chain(&self.staged.shipments) {
            if matches!(row.state, ShipmentState::Imported | ShipmentState::Refused) {
                files.remove(&row.upload);
            } else {
                files.insert(
                    row.upload,
                    SpooledFile {
                        upload: row.upload,
                        principal: row.principal.clone(),
                        size: row.size,
                        received: row.received,
                    },
                );
            }
        }
        Ok(files.into_values().collect())
    }

    /// Writes a shipment's progress; its generation is one above what was read.
    pub fn put_shipment(&mut self, row: ShipmentRow) {
        self.staged.shipments.push(row);
    }

    /// Remembers a refused line of a shipment.
    pub fn put_refused_line(&mut self, refusal: ShipmentRefusal) {
        self.staged.refused_lines.push(refusal);
    }

    /// Records an event (I2). The rows that the act writes are named in its first record.
    pub fn append(&mut self, event: Event) -> Entry {
        self.staged.events.push(event);
        Entry(())
    }

    /// That the act has recorded something so far; none: nothing.
    pub fn entry(&self) -> Option<Entry> {
        (!self.staged.events.is_empty()).then_some(Entry(()))
    }

    /// Records an event behind the others of the act: one for the security officers.
    pub fn alert(&mut self, event: SecurityEvent) {
        self.staged.alerts.push(Event::SecurityEvent(event));
    }

    /// Records an event for the security officers although the act is refused. One that comes again
    /// is counted, as refusals are.
    pub fn alert_refused(&mut self, kind: &str, detail: String) {
        let principal = self.actor.principal.as_ref().map(ToString::to_string).unwrap_or_default();
        self.base.refusals.push(Refusal { principal, action: kind.to_owned(), reason: detail, security_event: true });
    }

    /// Counts a refusal of a part of the act; a refusal of the whole act is counted by itself.
    pub fn refuse(&mut self, reason: String) {
        let refusal = self.refusal(reason, false);
        self.base.refusals.push(refusal);
    }

    /// The next lease of `count` counters (I4), lent until `until`. Reserves a chunk where the one
    /// at hand is spent or superseded, and has the row say that leases are dealt from it.
    ///
    /// # Errors
    /// The counters are a head-end's, used up, or the owner has no such key.
    pub fn lease(&mut self, of: CounterOf, count: NonZeroU32, until: UnixMillis) -> Result<Lease, ServiceError> {
        self.next(of, CounterUse::Lease, count, until)
    }

    /// The next `count` counters (I4), for frames that are protected here. It ends the live lease,
    /// if there is one: see [`Self::live_lease`].
    ///
    /// # Errors
    /// As [`Self::lease`].
    pub fn frame_counters(&mut self, of: CounterOf, count: NonZeroU32) -> Result<Lease, ServiceError> {
        self.next(of, CounterUse::Frames, count, UnixMillis(0))
    }

    /// The next `count` counters for requests of a transfer or a probe: as
    /// [`Self::frame_counters`], without the bounds that sessions and frames have, so that whoever
    /// used up a key cannot keep the next one from its meter.
    ///
    /// # Errors
    /// As [`Self::lease`].
    pub fn transfer_counters(&mut self, of: CounterOf, count: NonZeroU32) -> Result<Lease, ServiceError> {
        self.next(of, CounterUse::Transfer, count, UnixMillis(0))
    }

    fn next(
        &mut self,
        of: CounterOf,
        counter_use: CounterUse,
        count: NonZeroU32,
        until: UnixMillis,
    ) -> Result<Lease, ServiceError> {
        let (name, state) = self.counter(of)?;
        if let Some(lease) = self.deal(name, counter_use, state.as_ref(), count, until) {
            if counter_use == CounterUse::Lease && state.is_some_and(|state| !state.lent()) {
                // Other servers, and this one after a restart, know of the lease by the row alone.
                self.change_counters(of, name, |counters| {
                    counters.mark_lent(of.counter);
                    Ok(())
                })?;
            }
            return Ok(lease);
        }
        let (writer, chunk) = (self.base.writer, self.base.chunk_size.serving(counter_use, count));
        let jump = self.base.jump;
        let first = match of.on_new_key {
            // I4: above every other version too, because the meter goes on counting when its key
            // changes.
            OnNewKey::Continue => self.dealt_below(of)?,
            // Another key value has other nonces.
            OnNewKey::Reset(first) => u64::from(first),
        };
        // Above a chunk that was reserved in this transaction for what failed then, too.
        let at_least =
            self.held(&name).map_or(0, |held| held.chunk.bound()).max(self.base.chunks.bound(&name)).max(first);
        let known = state.as_ref().filter(|state| state.holder().is_some()).map_or(0, CounterState::bound);
        let (now, cap) = (self.now(), self.base.counter_cap);
        let (reservation, many, state) = self.change_counters(of, name, |counters| {
            let reservation = counters.reserve(of.counter, counter_use, writer, chunk, at_least, jump)?;
            let many = counters.count_into_hour(reservation, counter_use, cap, now)?;
            Ok((reservation, many, counters.get(of.counter).cloned()))
        })?;
        // Each once for a counter, when it gets there; of two thresholds that are passed at once
        // the later one.
        let passes = |threshold| known < threshold && reservation.bound >= threshold;
        if passes(CounterState::ROTATION_DUE) {
            self.staged.alerts.push(Event::SecurityEvent(counter_event(
                of,
                "counter-rotation-due",
                &used(of, reservation.bound),
            )));
        } else if passes(CounterState::HALF) {
            self.staged.alerts.push(Event::SecurityEvent(counter_event(
                of,
                "counter-half-used",
                &used(of, reservation.bound),
            )));
        }
        if many {
            self.alert_use_high(of);
        }
        self.base.fresh_chunks.insert(name, Held { chunk: LiveChunk::new(reservation), leased_until: UnixMillis(0) });
        self.deal(name, counter_use, state.as_ref(), count, until)
            .ok_or_else(|| counter_error(CounterError::exhausted(of.counter, counter_use), of, now))
    }

    /// Half of what an hour has of a counter is taken.
    fn alert_use_high(&mut self, of: CounterOf) {
        let cap = self.base.counter_cap.get();
        let detail = format!(
            "half of the {cap} invocation counters of {} that sessions and frames may have in an hour are reserved or skipped",
            of.counter
        );
        self.staged.alerts.push(Event::SecurityEvent(counter_event(of, "counter-use-high", &detail)));
    }

    /// I4: follows an unauthenticated answer that names a counter, within `jump_cap`, the hour's
    /// cap and [`CounterState::SESSIONS_END`]. Where counters go on when a key changes, also as far
    /// as this system itself has counted under another version: the next reservation begins there
    /// anyway, so a forged answer uses up nothing more. The inner error says why the answer is not
    /// believed; nothing has changed then.
    ///
    /// # Errors
    /// As [`Self::lease`].
    pub fn follow_counter(
        &mut self,
        of: CounterOf,
        floor: u64,
        jump_cap: u32,
    ) -> Result<Result<(), CounterError>, ServiceError> {
        let own = of.on_new_key == OnNewKey::Continue && floor <= self.dealt_below(of)?;
        let (now, cap) = (self.now(), self.base.counter_cap);
        let (name, _) = self.counter(of)?;
        let followed = self.try_change_counters(of, name, |counters| {
            if own {
                counters.raise_floor(of.counter, floor, None).map(|()| false)
            } else {
                counters.follow(of.counter, floor, jump_cap, cap, now)
            }
        })?;
        if matches!(followed, Ok(true)) {
            self.alert_use_high(of);
        }
        Ok(followed.map(|_| ()))
    }

    /// A counter that this system has dealt no counter from on, under whichever version of the
    /// slot: those in a counter domain are counted there.
    ///
    /// # Errors
    /// A row was not read yet, or the owner is missing.
    fn dealt_below(&mut self, of: CounterOf) -> Result<u64, ServiceError> {
        let jump = self.base.jump;
        let row = self.owner(of.owner)?.ok_or_else(|| no_such_key(of))?;
        let Some(slot) = row.slots().get(of.setup, of.key_type) else { return Ok(0) };
        let mut bound = slot.continued_counter(of.counter, jump);
        for id in slot.versions().iter().filter_map(KeyVersion::domain) {
            let domain = self.domain(id)?.ok_or_else(|| missing_domain(id))?;
            bound = bound.max(domain.counters.get(of.counter).map_or(0, |state| state.bound_after(jump)));
        }
        Ok(bound)
    }

    /// Changes the row that keeps a counter: the meter's, or its domain's.
    fn change_counters<T>(
        &mut self,
        of: CounterOf,
        name: ChunkName,
        change: impl FnOnce(&mut Counters) -> Result<T, CounterError>,
    ) -> Result<T, ServiceError> {
        let now = self.now();
        self.try_change_counters(of, name, change)?.map_err(|error| counter_error(error, of, now))
    }

    /// The same, with what the counters refuse as the inner error. No row is written then.
    fn try_change_counters<T>(
        &mut self,
        of: CounterOf,
        name: ChunkName,
        change: impl FnOnce(&mut Counters) -> Result<T, CounterError>,
    ) -> Result<Result<T, CounterError>, ServiceError> {
        match name {
            ChunkName::Version { .. } => {
                let mut row = self.owner(of.owner)?.ok_or_else(|| no_such_key(of))?;
                let slot = row.slots_mut().get_mut(of.setup, of.key_type);
                let version = slot.and_then(|slot| slot.version_mut(of.version)).map_err(|_| no_such_key(of))?;
                let changed = version.counters_mut().and_then(change);
                if changed.is_ok() {
                    self.put_owner(row)?;
                }
                Ok(changed)
            }
            ChunkName::Domain { domain: id, .. } => {
                let mut domain = self.domain(id)?.ok_or_else(|| missing_domain(id))?;
                let changed = change(&mut Arc::make_mut(&mut domain).counters);
                if changed.is_ok() {
                    self.put(RowId::CounterDomain(id), Value::Domain(domain), false)?;
                }
                Ok(changed)
            }
        }
    }

    /// The lease of this counter that may still be used by its grantee, if there is one.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn live_lease(&mut self, of: CounterOf) -> Result<Option<LiveLease>, ServiceError> {
        let (name, state) = self.counter(of)?;
        let Some(state) = state else { return Ok(None) };
        let (now, writer) = (self.now(), self.base.writer);
        let own = self.held(&name).filter(|held| state.holder() == Some(writer) && state.bound() == held.chunk.bound());
        Ok(match own {
            Some(held) => Some(LiveLease::Until(held.leased_until)).filter(|_| held.leased_until > now),
            None => state.lent().then_some(LiveLease::EndUnknown),
        })
    }

    /// Whether a lease is the newest that this server dealt from its counter, and nobody has
    /// reserved above it or raised a floor above its first counter since.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn is_live(&mut self, of: CounterOf, lease: Lease) -> Result<bool, ServiceError> {
        let (name, state) = self.counter(of)?;
        let (Some(state), Some(Held { chunk, .. })) = (state, self.held(&name)) else { return Ok(false) };
        let newest = chunk.bound() - chunk.remaining() == u64::from(lease.last()) + 1;
        Ok(state.holder() == Some(self.base.writer)
            && state.bound() == chunk.bound()
            && newest
            && u64::from(lease.first) >= state.floor())
    }

    /// Where a key version's counter is kept, and what the row says of it.
    fn counter(&mut self, of: CounterOf) -> Result<(ChunkName, Option<CounterState>), ServiceError> {
        let row = self.owner(of.owner)?.ok_or_else(|| no_such_key(of))?;
        let version = row
            .slots()
            .get(of.setup, of.key_type)
            .and_then(|slot| slot.version(of.version))
            .ok_or_else(|| no_such_key(of))?;
        match version.counters() {
            CounterPlace::Own(counters) => {
                let name = ChunkName::Version {
                    owner: of.owner,
                    setup: of.setup,
                    key_type: of.key_type,
                    version: of.version,
                    counter: of.counter,
                };
                Ok((name, counters.get(of.counter).cloned()))
            }
            CounterPlace::Domain(id) => {
                let domain = self.domain(*id)?.ok_or_else(|| missing_domain(*id))?;
                Ok((ChunkName::Domain { domain: *id, counter: of.counter }, domain.counters.get(of.counter).cloned()))
            }
        }
    }

    fn held(&self, name: &ChunkName) -> Option<&Held> {
        self.base.fresh_chunks.get(name).or_else(|| self.base.chunks.get(name))
    }

    fn deal(
        &mut self,
        name: ChunkName,
        counter_use: CounterUse,
        state: Option<&CounterState>,
        count: NonZeroU32,
        until: UnixMillis,
    ) -> Option<Lease> {
        let jump = self.base.jump;
        let held = match self.base.fresh_chunks.get_mut(&name) {
            Some(held) => held,
            None => self.base.chunks.get_mut(&name)?,
        };
        if !held.chunk.serves(counter_use) {
            return None;
        }
        let lease = held.chunk.deal(state?, count, jump).ok()?;
        let before = std::mem::replace(&mut held.leased_until, until);
        self.staged.log.push(Change::Lent(name, before));
        Some(lease)
    }

    fn open(&mut self, id: RowId) -> Result<Option<Value>, ServiceError> {
        if let Some(opened) = self.staged.rows.get(&id).or_else(|| self.base.rows.get(&id)) {
            return Ok(opened.value.clone());
        }
        let opened = self.base.open(&id).map_err(|error| match error {
            OpenError::NotRead => not_read(),
            OpenError::Refused(reason) => {
                // I5: for the caller it is as if the row were not there; the officers are told.
                let refusal = self.refusal(reason.clone(), true);
                self.base.refusals.push(refusal);
                tracing::error!(row = %id, reason, "a sealed row was refused");
                ServiceError::denied(self.actor.action)
            }
        })?;
        let value = opened.value.clone();
        self.base.rows.insert(id, opened);
        Ok(value)
    }

    /// A request's row as this island wrote it, without its seal (I5): else whoever writes the
    /// database could have an old grant carried out again under another request, past I2 and I4.
    fn open_request(&mut self, key: &RequestKey, row: &RequestRow) -> Result<Remembered, ServiceError> {
        let RequestRow { digest, outcome, expires } = row;
        let opened = outcome.split_first_chunk::<16>().and_then(|(seal, outcome)| {
            let (principal, request, chunk) = (&key.principal, key.request, key.chunk);
            let timed = self.base.seal.accept(seal.as_slice(), |seal| {
                seal.seal_request(principal, request, chunk, digest, *expires, outcome)
            });
            let known = timed
                || self.base.seal.accept(seal.as_slice(), |seal| {
                    seal.seal_untimed_request(principal, request, chunk, digest, outcome)
                });
            known.then(|| Remembered { digest: *digest, outcome: outcome.to_vec(), expires: timed.then_some(*expires) })
        });
        match opened {
            Some(remembered) => Ok(remembered),
            None => {
                let refusal = self.refusal(format!("the row of request {} does not verify", key.request), true);
                self.base.refusals.push(refusal);
                Err(ServiceError::denied(self.actor.action))
            }
        }
    }

    fn put(&mut self, id: RowId, value: Value, reprojected: bool) -> Result<(), ServiceError> {
        let known = self.open(id.clone())?;
        self.may_store(known.as_ref().and_then(Value::slots), value.slots())?;
        self.share_exposures(known.as_ref().and_then(Value::slots), value.slots())?;
        let value = match (value, known) {
            // Whoever has a copy of before forgets nothing that became known since.
            (Value::Domain(mut domain), Some(Value::Domain(known))) => {
                Arc::make_mut(&mut domain).learn(&known.exposures);
                Value::Domain(domain)
            }
            (value, _) => value,
        };
        let before = self.staged.rows.get(&id).or_else(|| self.base.rows.get(&id));
        let generation = before.and_then(|opened| opened.generation);
        let reprojected = reprojected || before.is_some_and(|opened| opened.changed && opened.reprojected);
        let before =
            self.staged.rows.insert(id.clone(), Opened { generation, value: Some(value), changed: true, reprojected });
        self.staged.log.push(Change::Row(id, before));
        Ok(())
    }

    /// Who comes to know the key of a slot knows it in every slot that has the same value: the
    /// value's counter domain says so, in the same transaction. Here, so that no use case can
    /// forget it.
    fn share_exposures(&mut self, known: Option<&Slots>, new: Option<&Slots>) -> Result<(), ServiceError> {
        for slot in new.into_iter().flat_map(Slots::iter) {
            let before = known.and_then(|known| known.get(slot.setup(), slot.key_type()));
            for version in slot.versions() {
                let Some(id) = version.domain() else { continue };
                let same = before
                    .and_then(|before| before.version(version.number()))
                    .is_some_and(|before| before.exposures() == version.exposures());
                if !same && !version.exposures().is_empty() {
                    self.learn(id, version.exposures())?;
                }
            }
        }
        Ok(())
    }

    /// Notes in a domain's row, if there is one, who could know its value.
    fn learn(&mut self, id: CounterDomainId, exposures: &[Exposure]) -> Result<bool, ServiceError> {
        let Some(mut domain) = self.domain(id)? else { return Ok(false) };
        let news = Arc::make_mut(&mut domain).learn(exposures);
        if news {
            self.put(RowId::CounterDomain(id), Value::Domain(domain), false)?;
        }
        Ok(news)
    }

    /// Notes in the rows of counter domains who could know the keys of a meter, as an island of an
    /// earlier version has not done. Whether that was news.
    ///
    /// # Errors
    /// See [`Self::principal`].
    pub fn share_exposures_of(&mut self, meter: &Meter) -> Result<bool, ServiceError> {
        let mut news = false;
        for version in meter.slots.iter().flat_map(kms_domain::Slot::versions) {
            if let Some(id) = version.domain() {
                news |= self.learn(id, version.exposures())?;
            }
        }
        Ok(news)
    }

    /// I3: no key is stored that needs a root whose destruction was decided, however long ago the
    /// HSM made it. The island's row is read in the same transaction, so that the decision comes
    /// before or after all of it. What a row has of such keys already stays.
    fn may_store(&mut self, known: Option<&Slots>, new: Option<&Slots>) -> Result<(), ServiceError> {
        for slot in new.into_iter().flat_map(Slots::iter) {
            let before = known.and_then(|known| known.get(slot.setup(), slot.key_type()));
            for version in slot.versions() {
                let Some(root) = RootId::needed_by(slot.key_type(), version) else { continue };
                let stored = before
                    .and_then(|before| before.version(version.number()))
                    .and_then(|before| RootId::needed_by(slot.key_type(), before));
                if stored == Some(root) {
                    continue;
                }
                let name = self.base.island;
                // Before the ceremony has ended there are neither a row of the island nor meters.
                if self.island(name)?.is_some_and(|island| !island.may_store_under(root)) {
                    return Err(ServiceError::Aborted {
                        reason: format!(
                            "the root `{root}` was destroyed or is not known: a key that was made under it is not stored"
                        ),
                        next_step: "try again: the key is made under the current root".to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    fn refusal(&self, reason: String, security_event: bool) -> Refusal {
        let principal = self.actor.principal.as_ref().map(ToString::to_string).unwrap_or_default();
        let action = if security_event { "sealed-row-refused" } else { self.actor.action };
        Refusal { principal, action: action.to_owned(), reason, security_event }
    }

    pub(super) fn ended_in_test<T>(&self, answer: T) -> super::Decision<T> {
        let on_its_way = !self.staged.shipments.is_empty() || !self.staged.tasks.is_empty();
        match self.entry() {
            Some(entry) => super::Decision::recorded(entry, answer),
            None if on_its_way => super::Decision::progress(answer),
            None => super::Decision::unchanged(answer),
        }
    }

    /// Takes a decided act into the batch.
    pub(super) fn accept(self, act: usize, kind: Kind) -> Result<(), ServiceError> {
        let Self { base, actor, staged } = self;
        if let Some(fault) = staged.fault(kind) {
            return Err(ServiceError::Internal(format!("the act `{}` {fault} (I2)", actor.action)));
        }
        let mut written: Vec<RowId> = staged.rows.keys().cloned().collect();
        written.sort_by_cached_key(|id| (id.kind(), id.to_string()));
        base.rows.extend(staged.rows);
        let first_event = base.events.len();
        for (number, event) in staged.events.into_iter().chain(staged.alerts).enumerate() {
            let record = AuditRecord {
                principal: actor.principal.as_ref().map(ToString::to_string).unwrap_or_default(),
                certificate_sha256: actor.certificate_sha256.map(|digest| digest.to_vec().into()).unwrap_or_default(),
                request_id: actor.request.map(|id| id.octets().to_vec().into()).unwrap_or_default(),
                event: Some(event),
                ..AuditRecord::default()
            };
            base.events.push(RecordedEvent {
                record,
                written: if number == 0 { std::mem::take(&mut written) } else { Vec::new() },
                act,
            });
        }
        base.request_events.extend(
            staged
                .requests
                .iter()
                .filter(|request| request.by_record)
                .map(|request| (request.key.clone(), first_event)),
        );
        base.requests.extend(staged.requests.into_iter().map(|request| (request.key, request.row)));
        base.grants.extend(staged.grants.into_iter().map(|grant| (grant, first_event)));
        base.revocations.extend(staged.revocations);
        for (prefix, mut owners) in staged.fingerprints {
            base.fingerprints.entry(prefix).or_default().append(&mut owners);
        }
        base.shipments.extend(staged.shipments.into_iter().map(|row| (row.upload, row)));
        base.refused_lines.extend(staged.refused_lines);
        base.tasks.extend(staged.tasks);
        Ok(())
    }
}

enum OpenError {
    NotRead,
    Refused(String),
}

impl Batch<'_> {
    /// Opens a row from the database: present in the generation that this server knows, or newer,
    /// and with a fitting seal (I5).
    fn open(&mut self, id: &RowId) -> Result<Opened, OpenError> {
        let lookup = match id {
            RowId::Meter(title) => self.read.meter(*title),
            other => {
                let (kind, octets) = sealed_name(other);
                self.read.sealed(kind, &octets)
            }
        };
        let row = match lookup {
            Lookup::Present(row) => Some(row),
            Lookup::Absent => None,
            Lookup::NotRead => {
                match id {
                    RowId::Meter(title) => self.missing.meters.push(*title),
                    // An act that writes one has named it beforehand.
                    RowId::Campaign(id) => self.missing.campaigns.push(*id),
                    other => self.missing.sealed.push(sealed_name(other)),
                }
                return Err(OpenError::NotRead);
            }
        };
        let opened = open_row(id, row, self.seal, self.seen, self.island).map_err(OpenError::Refused)?;
        Ok(opened)
    }
}

/// Opens a row that was read, inside or outside a transaction.
pub(super) fn open_row(
    id: &RowId,
    row: Option<&SealedRow>,
    seal: &SealKeys,
    seen: &Seen,
    island: &IslandName,
) -> Result<Opened, String> {
    let known = seen.generation(id);
    let Some(row) = row else {
        // I5: a row that this server has seen does not vanish.
        if known.is_some() {
            return Err(format!("the row of {id} was deleted"));
        }
        return Ok(Opened { generation: None, value: None, changed: false, reprojected: false });
    };
    let generation = i64::try_from(row.generation)
        .map_err(|_| "generation out of range".to_owned())
        .and_then(|number| Generation::from_i64(number).map_err(|error| error.to_string()))?;
    let stored = kms_domain::RowSeal::from_octets(&row.seal).map_err(|error| error.to_string())?;
    seal.verify(id, generation, &row.body, &stored).map_err(|error| error.to_string())?;
    // I5: a row older than this server has seen was put back.
    if known.is_some_and(|known| generation.number() < known) {
        return Err(format!("the row of {id} is older than this server has seen"));
    }
    let body = bytes::Bytes::copy_from_slice(&row.body);
    let value = match id {
        RowId::Meter(title) => Meter::from_row(*title, island, body).map(|meter| Value::Meter(Arc::new(meter))),
        RowId::Principal(principal) => {
            Principal::from_row(principal.clone(), body).map(|principal| Value::Principal(Arc::new(principal)))
        }
        RowId::Group(group) => Group::from_row(*group, island, body).map(|group| Value::Group(Arc::new(group))),
        RowId::CounterDomain(domain) => {
            CounterDomain::from_row(*domain, island, body).map(|domain| Value::Domain(Arc::new(domain)))
        }
        RowId::Island(name) => {
            kms_domain::Island::from_row(name.clone(), body).map(|island| Value::Island(Arc::new(island)))
        }
        RowId::QuotaUse(principal) => {
            QuotaUse::from_row(principal.clone(), body).map(|used| Value::QuotaUse(Arc::new(used)))
        }
        RowId::Campaign(campaign) => {
            Campaign::from_row(*campaign, body).map(|campaign| Value::Campaign(Arc::new(campaign)))
        }
        RowId::Proposal(proposal) => {
            Proposal::from_row(*proposal, body).map(|proposal| Value::Proposal(Arc::new(proposal)))
        }
        RowId::RootRotation(to) => {
            RootRotation::from_row(*to, body).map(|rotation| Value::RootRotation(Arc::new(rotation)))
        }
        RowId::DeviceType(id) => {
            DeviceType::from_row(*id, island, body).map(|device_type| Value::DeviceType(Arc::new(device_type)))
        }
    }
    .map_err(|error| error.to_string())?;
    if known != Some(generation.number()) {
        seen.note(id, generation.number());
    }
    Ok(Opened { generation: Some(generation), value: Some(value), changed: false, reprojected: false })
}

/// The name of a sealed row other than a meter's in the store.
pub fn sealed_name(id: &RowId) -> (RowKind, Vec<u8>) {
    match id {
        RowId::Meter(title) => (RowKind::Island, title.octets().to_vec()),
        RowId::Group(group) => (RowKind::Group, group.0.to_be_bytes().to_vec()),
        RowId::DeviceType(device_type) => (RowKind::DeviceType, device_type.0.to_be_bytes().to_vec()),
        RowId::Principal(principal) => (RowKind::Principal, principal.to_string().into_bytes()),
        RowId::CounterDomain(domain) => (RowKind::CounterDomain, domain.0.to_vec()),
        RowId::Island(island) => (RowKind::Island, island.as_str().as_bytes().to_vec()),
        RowId::QuotaUse(principal) => quota_use_row(principal),
        RowId::Campaign(campaign) => (RowKind::Campaign, campaign.octets().to_vec()),
        RowId::Proposal(proposal) => (RowKind::Proposal, proposal.octets().to_vec()),
        RowId::RootRotation(to) => (RowKind::RootRotation, to.octets().to_vec()),
    }
}

/// Says "read this too": it never reaches a caller, because the transaction reads what is missing
/// and decides again.
fn not_read() -> ServiceError {
    ServiceError::Internal("a row was used before it was read".to_owned())
}

/// I5: a row that was refused is on the record already, and as good as absent here.
fn unless_refused<T>(found: Result<Option<T>, ServiceError>) -> Result<Option<T>, ServiceError> {
    match found {
        Err(ServiceError::PermissionDenied { .. }) => Ok(None),
        found => found,
    }
}

/// How much of a counter is used, and what gives new ones.
fn used(of: CounterOf, bound: u64) -> String {
    let percent = bound * 100 / CounterState::END;
    let remedy = match of.on_new_key {
        OnNewKey::Reset(_) => "rotate the key",
        OnNewKey::Continue => "a new key goes on above them (on_new_key = \"continue\"), so find out who uses them",
    };
    format!("{percent} % of the invocation counters of {} are used: {remedy}", of.counter)
}

/// What officers are told of a counter.
fn counter_event(of: CounterOf, kind: &str, detail: &str) -> SecurityEvent {
    let (owner, meter) = match of.owner {
        Owner::Meter(title) => (format!("meter {title}"), title.octets().to_vec()),
        Owner::Group(group) => (format!("group {}", group.0), Vec::new()),
        Owner::DeviceType(device_type) => (format!("device type {}", device_type.0), Vec::new()),
    };
    SecurityEvent {
        kind: kind.to_owned(),
        detail: format!("{} version {} of {owner}, security setup {}: {detail}", of.key_type, of.version, of.setup),
        meter: meter.into(),
    }
}

fn no_such_key(of: CounterOf) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("there is no {} version {} in security setup {}", of.key_type, of.version, of.setup),
        next_step: "look at the slots of the meter or group".to_owned(),
    }
}

fn missing_domain(id: CounterDomainId) -> ServiceError {
    ServiceError::Internal(format!("the row of counter domain {id} is missing (I5)"))
}

fn counter_error(error: CounterError, of: CounterOf, now: UnixMillis) -> ServiceError {
    let next_step = match error {
        CounterError::CapMet { free, .. } => {
            Bound::CountersPerHour.count();
            let wait = u64::try_from(free.0.saturating_sub(now.0)).unwrap_or_default();
            let moment = jiff::Timestamp::from_millisecond(free.0).map(|moment| moment.to_string()).unwrap_or_default();
            return ServiceError::ResourceExhausted {
                reason: format!("{error}; it frees at {moment}"),
                retry_after: Duration::from_millis(wait),
            };
        }
        CounterError::OwnedByHeadEnd { .. } => "adopt the counter with its floor, or use another client title",
        CounterError::SessionsExhausted { .. } => match (of.on_new_key, of.counter) {
            (OnNewKey::Reset(_), _) => "rotate the key: the next one starts low",
            (OnNewKey::Continue, CounterKey::ClientTitle(_)) => {
                "use another client title, which has counters of its own. A rotation alone gives none back, because the device profile says \
                 `on_new_key = \"continue\"`; if the meters start again with a new key, let it say `reset`, and rotate the key"
            }
            (OnNewKey::Continue, CounterKey::Setup) => {
                "if the meters start again with a new key, let their device profile say `on_new_key = \"reset\"`, and rotate the key; else replace \
                 the meter. A rotation alone gives no counters back"
            }
        },
        CounterError::Exhausted { .. } => match of.counter {
            CounterKey::ClientTitle(_) => {
                "order the transfer under another client title, which has counters of its own; else change the key on site"
            }
            CounterKey::Setup => {
                "no rotation reaches the meter over the air: visit it and change the key on site, or replace it"
            }
        },
        _ => "look at the meter's counters",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}
