//! Session grants: keys of a meter, or of a group of meters, lent to a principal, for a purpose and
//! a time, on the record.
//!
//! A grant is decided and recorded in one transaction (I2, I4), then carried out: the keys are
//! wrapped for the grantee in the HSM. If that fails, the record stands, and the same request
//! carries the same grant out later.

mod batch;

use async_recursion::async_recursion as boxed;
use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex},
};

use aws_lc_rs::digest;
use futures::future;
use kms_domain::{
    CounterKey, GrantId, GroupId, KeyMaterial, KeyOrigin, KeyType, KeyVersion, KeyVersionNumber, Lease, MemberCounts,
    Meter, MeterClass, OnNewKey, Owner, ParseError, Party, Principal, PrincipalId, RequestId, Role, SecuritySetupId,
    SecuritySuite, Slot, Standing, SystemTitle, TransportCertificate, UnixMillis,
};
use kms_hsm::{Agreement, HsmError, KeySource, Recipient, RootVersion, WrappedKey};
use kms_proto::v1::{self, GrantedMeter, KeysGranted, audit_record::Event};
use kms_store::{AuditReference, GrantFilter, GrantRevocation, GrantRow, Reads, RowKind};
use prost::Message as _;
use tracing::Instrument as _;

pub use self::batch::Batch;
use self::batch::Batches;
use super::{group_names::Groups, owner::rotation_message};
use crate::island::Island;
use kms_authz::{Action, Caller, GroupFacts, Purpose, Resource};
use kms_base::error::ServiceError;
use kms_base::metrics;
use kms_ledger::{
    Act, Asker, AuditLeaf, ByRecord, CounterOf, Decision, Entry, Never, OwnerRow, PastRecord, Permit, Request, View,
    overtaken, refused_before,
};

/// What is asked for each meter of a request, or for a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionTerms {
    /// What for.
    pub purpose: Purpose,
    /// Which security setup; `None` is the first that the meter or group has keys in.
    pub setup: Option<SecuritySetupId>,
    /// Which keys, each type once, at least one.
    pub key_types: Vec<KeyType>,
    /// The client title to count under; `None`: no lease.
    pub client_title: Option<SystemTitle>,
    /// How many counters.
    pub counters: NonZeroU32,
    /// Whether to add a fresh dedicated key; never for a group.
    pub dedicated_key: bool,
    /// How long.
    pub lifetime_seconds: u32,
}

impl SessionTerms {
    /// Counters of a lease where none are asked for.
    pub const DEFAULT_COUNTERS: u32 = 1_000;
    /// The most counters of a lease.
    pub const MOST_COUNTERS: u32 = 1_000_000;
    /// Seconds of a grant where none are asked for.
    pub const DEFAULT_LIFETIME: u32 = 900;
    /// The most seconds that can be asked for; policy caps it lower.
    pub const LONGEST_LIFETIME: u32 = 7 * 24 * 3_600;
}

/// One chunk of a request: what is committed, recorded and answered as one grant.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The request.
    pub request: RequestId,
    /// Which chunk of it, from 0.
    pub index: u32,
    /// Digest of the whole request, so that an id is not used for two.
    pub digest: [u8; 32],
    /// Whose keys.
    pub targets: GrantTargets,
    /// What is asked.
    pub terms: Arc<SessionTerms>,
}

/// Whose keys are asked for.
#[derive(Clone, Debug)]
pub enum GrantTargets {
    /// Those of meters.
    Meters(Vec<SystemTitle>),
    /// Those of a group of meters.
    Group {
        /// Its name.
        name: String,
        /// The version of its GBEK; `None`: the active one.
        version: Option<KeyVersionNumber>,
    },
}

/// What a chunk was answered with.
#[derive(Debug)]
pub struct Granted {
    /// One envelope or more for each token that keys came from.
    pub envelopes: Vec<v1::Envelope>,
    /// Meters that got nothing, or the group.
    pub refusals: Vec<(Owner, ServiceError)>,
    /// The leaf of the grant's audit record, if anything was granted.
    pub leaf: Option<AuditLeaf>,
    /// How the rotation of the group's GBEK is; of a group.
    pub rotation: Option<v1::GroupRotation>,
}

/// The use case.
#[derive(Clone)]
pub struct GrantService {
    island: Arc<Island>,
    groups: Arc<Groups>,
    batches: Batches,
}

impl GrantService {
    /// Meters that one chunk of a batch serves. Larger chunks commit less often; smaller ones
    /// answer sooner.
    pub const CHUNK: usize = 500;

    /// Grants of an island.
    pub fn new(island: Arc<Island>) -> Self {
        Self { island, groups: Arc::default(), batches: Batches::default() }
    }

    /// Begins a batch of so many meters: its chunks take turns with those of the caller's other
    /// batches.
    ///
    /// # Errors
    /// The caller's unanswered batches name too many meters already.
    pub fn begin_batch(&self, caller: &Caller, meters: usize) -> Result<Batch, ServiceError> {
        self.batches.begin(&caller.principal, meters, &self.island.limits)
    }

    /// Grants what is asked for the meters of a chunk, or repeats the grant that this request got
    /// before.
    ///
    /// # Errors
    /// The caller is nobody, has no transport key, uses a client title of others or a request id
    /// twice; the grant was revoked or overtaken; HSM or database are away. What concerns single
    /// meters is in [`Granted::refusals`].
    #[boxed]
    pub async fn open(&self, caller: &Caller, chunk: Chunk) -> Result<Granted, ServiceError> {
        let meters = match &chunk.targets {
            GrantTargets::Meters(meters) => meters.len(),
            GrantTargets::Group { .. } => 1,
        };
        let granted = self
            .decide_and_carry_out(caller, chunk)
            .instrument(tracing::debug_span!("grant", kms.meters = meters))
            .await;
        if let Err(error) = &granted {
            // What refuses the request, or its only meter, refuses all of them.
            metrics().grant_refused(std::iter::repeat_n(error, meters));
        }
        granted
    }

    async fn decide_and_carry_out(&self, caller: &Caller, chunk: Chunk) -> Result<Granted, ServiceError> {
        let (owners, action): (Vec<Owner>, _) = match &chunk.targets {
            GrantTargets::Meters(meters) => (meters.iter().copied().map(Owner::Meter).collect(), "openSession"),
            GrantTargets::Group { name, .. } => {
                // A name that no group has is refused like a group that the caller gets nothing of.
                let id = self.groups.find(&self.island, name).await?.unwrap_or(NO_GROUP);
                (vec![Owner::Group(id)], "openGroupSession")
            }
        };
        let request = Request { id: chunk.request, digest: chunk.digest }.chunk(chunk.index);
        let act = Grant { island: self.island.clone(), chunk, owners, action };
        let committed = self.island.door.act(caller, request, act).await?;
        let plan = committed.value;
        let leaf = committed.leaves.first().copied().or(plan.leaf);
        self.carry_out(caller, plan, leaf).await
    }

    /// Grants, newest first: the caller's own, or all where policy permits it.
    ///
    /// # Errors
    /// Not permitted, or the database is away.
    #[boxed]
    pub async fn list(&self, caller: &Caller, query: GrantQuery) -> Result<Vec<v1::Grant>, ServiceError> {
        let own = query.principal.as_ref() == Some(&caller.principal)
            || (query.principal.is_none() && matches!(caller.principal.role(), Role::HeadEnd | Role::Handheld));
        self.island.require(caller, &Action::ListGrants { own }).await?;
        let principal = if own { Some(caller.principal.clone()) } else { query.principal };
        let filter = GrantFilter { principal, live_at: query.only_live.then(Island::now), ..GrantFilter::default() };
        Ok(self.island.store.grant_page(&filter, query.before, query.page).await?.iter().map(grant_message).collect())
    }

    /// Ends a grant. What the grantee learned stays known: the ledger keeps it.
    ///
    /// # Errors
    /// Not permitted, no such grant, or the database is away.
    #[boxed]
    pub async fn revoke(
        &self,
        caller: &Caller,
        request: RequestId,
        grant: GrantId,
        reason: String,
    ) -> Result<v1::Grant, ServiceError> {
        Ok(self.island.door.act(caller, Some(request), Revoke { grant, reason }).await?.value)
    }

    /// Wraps the keys of a recorded grant for the grantee, and seals the manifest.
    async fn carry_out(&self, caller: &Caller, plan: Plan, leaf: Option<AuditLeaf>) -> Result<Granted, ServiceError> {
        let Plan { entries, refusals, .. } = &plan;
        let rotation = entries.first().and_then(|entry| entry.rotation.clone());
        let mut granted = Granted { envelopes: Vec::new(), refusals: refusals.clone(), leaf, rotation };
        if entries.is_empty() {
            metrics().grant_refused(granted.refusals.iter().map(|(_, error)| error));
            return Ok(granted);
        }
        let replayed = plan.leaf.is_some();
        // Grants of one minute share an agreement: the expiry is part of its derivation.
        let expiry = (plan.not_after.0 + 59_999) / 60_000 * 60_000;
        let transport = &plan.transport;
        let recipient =
            Recipient::new(&transport.public_point, transport.sha256, u64::try_from(expiry).unwrap_or_default())
                .map_err(ServiceError::from)?;
        let sources: Vec<KeySource> =
            entries.iter().flat_map(|entry| entry.keys.iter().map(|key| key.source.clone())).collect();
        let places: Vec<(usize, usize)> = entries
            .iter()
            .enumerate()
            .flat_map(|(entry, planned)| (0..planned.keys.len()).map(move |key| (entry, key)))
            .collect();
        let hsm = self.island.hsm_for(caller);
        let groups = hsm.split_by_token(&sources)?;
        let plan = Arc::new(plan);
        // An envelope for each token, and for each part of a chunk: no worker of the token is busy
        // with one caller's chunk for long.
        let mut envelopes = Vec::new();
        for group in groups.iter().flat_map(|group| parts(group, &places)) {
            let keys: Vec<KeySource> = group.iter().filter_map(|index| sources.get(*index).cloned()).collect();
            let places: Vec<(usize, usize)> = group.iter().filter_map(|index| places.get(*index).copied()).collect();
            let (island, digest) = (self.island.name().to_string(), transport_digest(&plan));
            let header = move |agreement: &Agreement| {
                let header = v1::EnvelopeHeader {
                    algorithm: i32::from(agreement.algorithm.number()),
                    island: island.clone(),
                    ephemeral_public: agreement.ephemeral_public.to_vec().into(),
                    transport_certificate_sha256: digest.clone(),
                    not_after_ms: expiry,
                };
                header.encode_to_vec()
            };
            let failed = Arc::new(Mutex::new(Vec::new()));
            let (planned, failures) = (plan.clone(), failed.clone());
            let manifest = move |wrapped: &[Result<WrappedKey, HsmError>]| {
                let (manifest, missing) = planned.manifest(&places, wrapped);
                if let Ok(mut failures) = failures.lock() {
                    *failures = missing;
                }
                manifest.encode_to_vec()
            };
            let span = tracing::debug_span!("hsm.envelope", kms.keys = keys.len());
            let (hsm, recipient) = (hsm.clone(), recipient.clone());
            envelopes.push(async move {
                hsm.envelope(recipient, keys, header, manifest)
                    .instrument(span)
                    .await
                    .map(|envelope| (envelope, failed))
            });
        }
        for (envelope, failed) in future::try_join_all(envelopes).await? {
            granted.envelopes.push(v1::Envelope {
                header: envelope.header.into(),
                manifest: envelope.manifest.into(),
                seal: envelope.seal.to_vec().into(),
            });
            if let Ok(mut failures) = failed.lock() {
                granted.refusals.append(&mut failures);
            }
        }
        // All or nothing for a meter: what could not be wrapped stands among the refusals, with
        // every key of its meter.
        let refused = |owner: Owner| granted.refusals.iter().any(|(refused, _)| *refused == owner);
        let given = plan.entries.iter().filter(|entry| granted.refusals.is_empty() || !refused(entry.owner));
        let (count, keys) = given.fold((0, 0), |(entries, keys), entry| (entries + 1, keys + entry.keys.len()));
        metrics().granted(replayed, count, keys);
        metrics().grant_refused(granted.refusals.iter().map(|(_, error)| error));
        Ok(granted)
    }
}

/// Divides the keys of one token, at the borders of meters: `group` are indices of `places`.
fn parts(group: &[usize], places: &[(usize, usize)]) -> Vec<Vec<usize>> {
    let entry = |index: &usize| places.get(*index).map(|(entry, _)| *entry);
    let mut parts: Vec<Vec<usize>> = Vec::new();
    for of_meter in group.chunk_by(|one, next| entry(one) == entry(next)) {
        match parts.last_mut().filter(|part| part.len() + of_meter.len() <= PART) {
            Some(part) => part.extend_from_slice(of_meter),
            None => parts.push(of_meter.to_vec()),
        }
    }
    parts
}

/// Which grants to list.
#[derive(Clone, Debug)]
pub struct GrantQuery {
    /// Of this principal.
    pub principal: Option<PrincipalId>,
    /// Neither ended nor revoked.
    pub only_live: bool,
    /// Older than this one.
    pub before: Option<GrantId>,
    /// At most.
    pub page: u32,
}

fn grant_message(row: &GrantRow) -> v1::Grant {
    let purpose = Purpose::ALL.into_iter().find(|purpose| purpose.name() == row.purpose);
    v1::Grant {
        grant_id: row.id.octets().to_vec().into(),
        principal: row.principal.to_string(),
        purpose: purpose.map(|purpose| purpose.to_proto().into()).unwrap_or_default(),
        issued_ms: row.issued.0,
        not_after_ms: row.not_after.0,
        revoked_ms: row.revoked.map_or(0, |revoked| revoked.0),
        meter_count: row.meters,
    }
}

fn transport_digest(plan: &Plan) -> bytes::Bytes {
    plan.transport.sha256.to_vec().into()
}

/// A grant of the past, from its audit record.
struct PastGrant<'p> {
    event: &'p KeysGranted,
    issued: UnixMillis,
    leaf: AuditLeaf,
}

impl<'p> PastGrant<'p> {
    /// The grant in a record, if its terms are those of this request.
    fn of(past: &'p PastRecord, chunk: &Chunk) -> Result<Self, ServiceError> {
        let Some(Event::KeysGranted(event)) = &past.record.event else { return Err(record_fault()) };
        let asked = KeysGranted {
            grant_id: event.grant_id.clone(),
            not_after_ms: past.record.time_ms + i64::from(chunk.terms.lifetime_seconds) * 1_000,
            meters: event.meters.clone(),
            ..terms_record(&chunk.terms, chunk.index)
        };
        // Of a version that did not note places: an entry cannot be told from another one of the
        // same owner.
        if *event != asked || event.meters.iter().any(|granted| granted.place == 0) {
            return Err(overtaken("the server was upgraded"));
        }
        Ok(Self { event, issued: UnixMillis(past.record.time_ms), leaf: past.leaf() })
    }

    /// What an owner got that was asked for at this place, from 1; `None`: it was refused.
    fn entry(&self, place: u32, owner: Owner) -> Result<Option<&'p GrantedMeter>, ServiceError> {
        match self.event.meters.iter().find(|granted| granted.place == place) {
            Some(granted) if !is_of(granted, owner) => Err(record_fault()),
            found => Ok(found),
        }
    }
}

/// The end of a grant.
struct Revoke {
    grant: GrantId,
    reason: String,
}

impl Act for Revoke {
    type Answer = v1::Grant;
    type Past = Never;

    fn name(&self) -> &'static str {
        "revokeGrant"
    }

    fn reads(&self) -> Reads {
        Reads { grants: vec![self.grant], ..Reads::default() }
    }

    fn permit(&self, asker: Asker, view: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        let own = view.grant(self.grant)?.is_some_and(|row| row.principal == asker.principal().id);
        asker.require(&Action::RevokeGrant { own }, &Resource::Island)
    }

    fn decide(&self, _: &Permit, view: &mut View<'_, '_>) -> Result<Decision<v1::Grant>, ServiceError> {
        let grant = self.grant;
        let mut row = view.grant(grant)?.ok_or_else(|| ServiceError::NotFound { what: format!("grant {grant}") })?;
        if row.revoked.is_some() {
            return Ok(Decision::unchanged(grant_message(&row)));
        }
        row.revoked = Some(view.now());
        view.revoke_grant(GrantRevocation { id: grant, revoked: view.now() });
        let revoked = v1::GrantRevoked { grant_id: grant.octets().to_vec().into(), reason: self.reason.clone() };
        let entry = view.append(Event::GrantRevoked(revoked));
        Ok(Decision::recorded(entry, grant_message(&row)))
    }

    fn again(&self, never: Never, _: &Permit, _: &mut View<'_, '_>) -> Result<v1::Grant, ServiceError> {
        match never {}
    }
}

/// Keys of the owners that a chunk names.
struct Grant {
    island: Arc<Island>,
    chunk: Chunk,
    owners: Vec<Owner>,
    action: &'static str,
}

/// A recorded grant, to be carried out.
struct Plan {
    principal: Arc<Principal>,
    transport: TransportCertificate,
    grant: GrantId,
    request: RequestId,
    index: u32,
    terms: Arc<SessionTerms>,
    issued: UnixMillis,
    not_after: UnixMillis,
    /// The meters, or the group.
    entries: Vec<PlannedKeys>,
    refusals: Vec<(Owner, ServiceError)>,
    /// Of a replayed grant.
    leaf: Option<AuditLeaf>,
}

struct PlannedKeys {
    owner: Owner,
    /// Its place among what the chunk asks for, from 1.
    place: u32,
    /// A group's; empty for a meter.
    name: String,
    setup: SecuritySetupId,
    suite: SecuritySuite,
    keys: Vec<PlannedKey>,
    lease: Option<(SystemTitle, KeyVersionNumber, Lease)>,
    /// Of a group.
    rotation: Option<v1::GroupRotation>,
}

struct PlannedKey {
    key_type: KeyType,
    /// `None`: a dedicated key.
    version: Option<KeyVersionNumber>,
    source: KeySource,
    in_doubt: bool,
}

impl Act for Grant {
    type Answer = Plan;
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

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<Plan>, ServiceError> {
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

    fn again(&self, ByRecord(past): ByRecord, permit: &Permit, view: &mut View<'_, '_>) -> Result<Plan, ServiceError> {
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
            // I4: a dedicated key is made for one answer and kept nowhere. Another one under the
            // same lease would protect its InitiateRequest with a counter that the one before may
            // have used.
            return Err(ServiceError::Aborted {
                reason: "this request was answered with a dedicated key, which is not made twice".to_owned(),
                next_step: "ask again with a new request id".to_owned(),
            });
        }
        let mut plan = Plan { leaf: Some(past.leaf), ..self.plan(permit, grant, past.issued, not_after)? };
        let mut permissions = self.permissions(permit);
        for (place, owner) in (1_u32..).zip(self.owners.iter().copied()) {
            let repeated = match past.entry(place, owner)? {
                Some(granted) => self.repeat(view, owner, granted, &mut permissions),
                // I2, I8: it was refused then, and a replay grants nothing new.
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
    ) -> Result<Plan, ServiceError> {
        Ok(Plan {
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

    /// Counts the refusals of parts. What refuses the only owner refuses the request.
    fn note_refusals(&self, view: &mut View<'_, '_>, plan: &Plan) -> Result<(), ServiceError> {
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
        plan: &Plan,
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
            let version = self.lendable(&row, slot).ok_or_else(|| self.not_lendable(*key_type, setup))?;
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
        let lease = match (
            terms.client_title,
            keys.iter()
                .find(|key| matches!(key.key_type, KeyType::GUEK | KeyType::GBEK))
                .and_then(|key| Some((key.key_type, key.version?))),
        ) {
            (Some(client), Some((key_type, version))) => {
                let of = CounterOf {
                    owner,
                    setup,
                    key_type,
                    version,
                    counter: self.counter_key(&row, setup, client)?,
                    on_new_key: self.on_new_key(&row, setup),
                };
                Some((client, version, view.lease(of, terms.counters, plan.not_after)?))
            }
            _ => None,
        };
        if !unexposed.is_empty() {
            // The first grant of a version to a principal is written into the ledger; later ones
            // change nothing. The lease may have changed the row, so it is read anew.
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
    fn lendable<'a>(&self, row: &'a OwnerRow, slot: &'a Slot) -> Option<&'a KeyVersion> {
        match (row, &self.chunk.targets) {
            (OwnerRow::Group(group), GrantTargets::Group { version, .. }) => {
                group.lent(slot.setup(), slot.key_type(), version.filter(|_| slot.key_type() == KeyType::GBEK))
            }
            _ => slot
                .grantable()
                .find(|grantable| grantable.standing == Standing::Active)
                .map(|grantable| grantable.version),
        }
    }

    fn not_lendable(&self, key_type: KeyType, setup: SecuritySetupId) -> ServiceError {
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

    /// The row and its security suite, if policy lets the caller have all keys that it asks for
    /// (I8).
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
            // Firmware keys are lent to nobody.
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

    /// The same answer for what does not exist and what the caller may not have.
    fn denied(&self, owner: Owner) -> ServiceError {
        match (owner, &self.chunk.targets) {
            (Owner::Meter(title), _) => denied(title),
            (_, GrantTargets::Group { name, .. }) => ServiceError::denied(format!("{} with group {name}", self.action)),
            _ => ServiceError::denied(self.action),
        }
    }

    /// The same again, as recorded: permitted still, the versions still grantable, the lease still
    /// the newest.
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
                .lendable(&row, slot)
                .filter(|version| version.number().number() == *number)
                .ok_or_else(|| overtaken("the key was rotated"))?;
            keys.push(PlannedKey {
                key_type: *key_type,
                version: Some(version.number()),
                source: source(owner, slot, version)?,
                in_doubt: slot.in_doubt(),
            });
        }
        let encryption = keys
            .iter()
            .find(|key| matches!(key.key_type, KeyType::GUEK | KeyType::GBEK))
            .and_then(|key| Some((key.key_type, key.version?)));
        let lease = match (terms.client_title, encryption) {
            (Some(_), Some(_)) if granted.lease_count != terms.counters.get() => return Err(record_fault()),
            (Some(client), Some((key_type, version))) => {
                let lease = Lease { first: granted.lease_first, count: granted.lease_count };
                let of = CounterOf {
                    owner,
                    setup,
                    key_type,
                    version,
                    counter: self.counter_key(&row, setup, client)?,
                    on_new_key: self.on_new_key(&row, setup),
                };
                if !view.is_live(of, lease)? {
                    return Err(overtaken("a newer lease was dealt, or the server restarted,"));
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

/// I2: one record for the chunk; grant and request name it.
fn record(view: &mut View<'_, '_>, plan: &Plan) -> Entry {
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

/// The key that the principal's keys are wrapped for.
fn transport_of(principal: &Principal) -> Result<TransportCertificate, ServiceError> {
    principal.transport.clone().ok_or_else(|| ServiceError::FailedPrecondition {
        reason: "no transport key is registered, so there is nothing to wrap keys for".to_owned(),
        next_step: "register one with `kms principal register-transport-key`".to_owned(),
    })
}

impl Plan {
    /// What came of one owner.
    fn add(&mut self, owner: Owner, planned: Result<PlannedKeys, ServiceError>) {
        match planned {
            Ok(planned) => self.entries.push(planned),
            Err(error) => self.refusals.push((owner, error)),
        }
    }

    /// The manifest of the keys at `places`, and the owners that a key could not be had for.
    fn manifest(
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

    /// I8: the same for the group. Nothing of its members counts here: who may have a member's keys
    /// gets no broadcast key by that.
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

/// The digest of a request: what must be the same when its id comes again.
pub fn request_digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in parts {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    let mut value = [0; 32];
    value.copy_from_slice(context.finish().as_ref());
    value
}

/// What the record of a grant says of its terms.
fn terms_record(terms: &SessionTerms, chunk: u32) -> KeysGranted {
    KeysGranted {
        purpose: terms.purpose.to_proto().into(),
        security_setup: terms.setup.map(|setup| setup.obis().to_vec().into()).unwrap_or_default(),
        key_types: terms.key_types.iter().map(ToString::to_string).collect(),
        client_title: terms.client_title.map(|title| title.octets().to_vec().into()).unwrap_or_default(),
        dedicated_key: terms.dedicated_key,
        chunk_index: chunk,
        ..KeysGranted::default()
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

/// How the rotation of a group's GBEK is, without counts.
fn rotation_of(row: &OwnerRow, setup: SecuritySetupId) -> Option<v1::GroupRotation> {
    let OwnerRow::Group(group) = row else { return None };
    group
        .slots
        .get(setup, KeyType::GBEK)
        .map(|slot| rotation_message(group, slot.setup(), slot.key_type(), MemberCounts::default()))
}

/// Where the HSM takes a key version from.
pub fn source(owner: Owner, slot: &Slot, version: &KeyVersion) -> Result<KeySource, ServiceError> {
    let fault = |error: ParseError| ServiceError::Internal(error.to_string());
    match (version.material(), version.origin()) {
        (KeyMaterial::Wrapped(wrapped), _) => Ok(KeySource::Stored {
            key_type: slot.key_type(),
            storage_kek_version: RootVersion::new(u32::from(wrapped.storage_kek_version())).map_err(fault)?,
            shape: wrapped.shape(),
            blob: wrapped.blob().to_vec(),
        }),
        (KeyMaterial::Derived, KeyOrigin::Diversified { root_version, derivation, length }) => {
            Ok(KeySource::Diversified {
                root_version: RootVersion::new(u32::from(root_version)).map_err(fault)?,
                derivation,
                context: slot.diversification(owner, version.number(), length),
            })
        }
        _ => Err(no_key(&[slot.key_type()], Some(slot.setup()))),
    }
}

/// A security setup as audit records carry it: `b × 256 + e`.
pub(super) fn setup_record(setup: SecuritySetupId) -> u32 {
    u32::from(u16::from_be_bytes(setup.octets()))
}

/// The security setup of an audit record.
pub(super) fn recorded_setup(setup: u32) -> SecuritySetupId {
    let [_, _, b, e] = setup.to_be_bytes();
    SecuritySetupId::from_octets([b, e])
}

/// Which counter a client title uses with a meter's security setup: its own, or the setup's only
/// one (device profile).
///
/// # Errors
/// This server does not know the meter's device profile.
pub fn counter_key(
    island: &Island,
    meter: &Meter,
    setup: SecuritySetupId,
    client: SystemTitle,
) -> Result<CounterKey, ServiceError> {
    if client == meter.title {
        // I4: the nonces of the meter's own answers are not a client's to use.
        return Err(ServiceError::denied(format!("a client title that is the meter's own, {client}")));
    }
    let profile =
        island.profiles.get(&meter.class.profile).and_then(|profile| profile.setup(setup)).ok_or_else(|| {
            ServiceError::FailedPrecondition {
                reason: format!(
                    "the device profile `{}` with security setup {setup} is not among this server's",
                    meter.class.profile
                ),
                next_step: "add its file to the folder of device profiles on every server".to_owned(),
            }
        })?;
    Ok(profile.counter.scope.key(client))
}

/// What the meter's counters do when its encryption key changes (device profile). Going on suits
/// all meters.
pub fn on_new_key(island: &Island, meter: &Meter, setup: SecuritySetupId) -> OnNewKey {
    island
        .profiles
        .get(&meter.class.profile)
        .and_then(|profile| profile.setup(setup))
        .map_or(OnNewKey::Continue, |profile| profile.counter.on_new_key)
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
pub(super) fn denied(title: SystemTitle) -> ServiceError {
    ServiceError::denied(format!("openSession with meter {title}"))
}

fn no_key(key_types: &[KeyType], setup: Option<SecuritySetupId>) -> ServiceError {
    let names: Vec<String> = key_types.iter().map(ToString::to_string).collect();
    let place = setup.map(|setup| format!(" in security setup {setup}")).unwrap_or_default();
    ServiceError::FailedPrecondition {
        reason: format!("there is no active {}{place}", names.join(", ")),
        next_step: "look at the slots with `kms meter show` or `kms group show`".to_owned(),
    }
}

fn record_fault() -> ServiceError {
    ServiceError::Internal("the record of a past request does not read".to_owned())
}

/// A refusal's reason without the meter: a batch of refused meters is one line in the log, not
/// thousands.
fn reason_of(error: &ServiceError) -> String {
    match error {
        ServiceError::PermissionDenied { .. } => "not permitted for a meter of the request".to_owned(),
        other => other.to_string(),
    }
}

/// Keys of one envelope: as many as a worker of a token makes in a few milliseconds, or in 0.4 s
/// with 1 ms for each call of an HSM.
const PART: usize = 128;
/// Numbers of groups begin with 1.
const NO_GROUP: GroupId = GroupId(0);
