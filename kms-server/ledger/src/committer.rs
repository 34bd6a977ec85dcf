//! The one writer of an island in this process: acts are queued, decided in turn, and committed
//! together, each with its record (I2).
//!
//! One transaction serves many acts, because the disk's answer costs more than an act. Between read
//! and commit nothing else changes the rows (the store's transaction), so what an act decides on is
//! what it changes (I4, I5).

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use kms_domain::{
    ChunkSize, CounterJump, DatabaseHistory, Generation, IslandName, LiveChunk, Meter, PrincipalId, RowId, SealKey,
    SealKeys, SystemTitle, UnixMillis, WriterId,
};
use kms_proto::v1::{AuditKeyChanged, AuditRecord, ClosedChain, RowWrite, WriterOpened, audit_record::Event};
use kms_store::{
    AuditAppend, AuditFilter, AuditReference, AuditTail, Changes, Committed as StoreCommitted, Decision,
    FingerprintPut, MeterProjection, MeterPut, ReadSet, Reads, RequestPut, RowName, SealedPut, SealedRow, Store,
    StoreError,
};
use prost::Message as _;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use super::{
    AuditKeys, AuditLeaf,
    bounds::WORK_OF_AN_ACT,
    chain::ChainHead,
    clock::ClockWatch,
    decision::{Decision as Decided, Kind},
    growth::{Grown, Growth},
    history::{Comparison, RestoreSettings, Watermark},
    queue::{Receiver, Sender, queue},
    refusals::{Outside, Refusal, Refusals},
    replay::RecordName,
    view::{Actor, Batch, ChunkName, Opened, ServerAct, Staged, Value, View, open_row, sealed_name},
};
use kms_base::Repetition;
use kms_base::bounds::Limits;
use kms_base::clock::now;
use kms_base::error::ServiceError;
use kms_base::metrics;

/// What an act came to, and the leaf hashes of its records, in order.
#[derive(Clone, Debug)]
pub struct Committed<T> {
    /// What the act decided.
    pub value: T,
    /// The leaves of its audit records.
    pub leaves: Vec<AuditLeaf>,
}

/// How the committer works.
#[derive(Clone, Debug)]
pub struct CommitterSettings {
    /// The island.
    pub island: IslandName,
    /// This server's name, for the log.
    pub server: String,
    /// How many counters are reserved at once.
    pub chunk_size: ChunkSize,
    /// How many acts may wait, how much they may write, and how many counters they may reserve.
    pub limits: Arc<Limits>,
    /// How a restored database is found (I4).
    pub restore: RestoreSettings,
    /// SHA-256 of the policies and quotas that this run decides by: [`kms_authz::Policy::digest`];
    /// none: it decides on no request.
    pub policy_sha256: Option<[u8; 32]>,
    /// How long another server must have been silent for this one to take it for gone, and close
    /// its chain.
    pub silence: Duration,
}

impl CommitterSettings {
    /// Six heartbeats.
    pub const SILENCE: Duration = Duration::from_mins(1);
}

/// Queues acts. Cheap to clone.
#[derive(Clone)]
pub struct Committer {
    queue: Arc<Sender>,
    shared: Arc<Shared>,
    /// The maintenance task, until [`Self::stop`] ends it.
    maintenance: Arc<Mutex<Option<JoinHandle<()>>>>,
}

struct Shared {
    seal: ArcSwap<SealKeys>,
    audit_keys: ArcSwap<AuditKeys>,
    seen: Seen,
    settings: CommitterSettings,
    store: Arc<dyn Store>,
    ready: AtomicBool,
    /// Under which name the chain at hand is written.
    writer: Mutex<Option<WriterId>>,
    /// The last record that is durable.
    last_record: Mutex<Option<LastRecord>>,
    /// The database's history as it was compared last; none before the first time.
    history: watch::Sender<Option<DatabaseHistory>>,
    /// The database may be another one than it was: compare before the next act.
    compare: AtomicBool,
    /// What the watermark file holds.
    remembered: tokio::sync::Mutex<Option<Watermark>>,
    /// Refusals of calls that came to no act.
    outside: Outside,
    /// The server stops: its database is closed at any moment.
    stopping: AtomicBool,
}

/// The last record of this run of the server that is durable.
#[derive(Clone, Copy)]
struct LastRecord {
    writer: WriterId,
    sequence: u64,
    /// The version of the audit key that the next one is linked with.
    next_key: u8,
}

impl Committer {
    /// Starts the writer and its first chain.
    pub fn start(
        store: Arc<dyn Store>,
        seal: impl Into<SealKeys>,
        audit_keys: impl Into<AuditKeys>,
        settings: CommitterSettings,
    ) -> Self {
        let (queue, waiting) = queue(Arc::clone(&settings.limits));
        let shared = Arc::new(Shared {
            seal: ArcSwap::from_pointee(seal.into()),
            audit_keys: ArcSwap::from_pointee(audit_keys.into()),
            seen: Seen::default(),
            settings,
            store,
            ready: AtomicBool::new(true),
            writer: Mutex::new(None),
            last_record: Mutex::new(None),
            history: watch::Sender::new(None),
            compare: AtomicBool::new(true),
            remembered: tokio::sync::Mutex::new(None),
            outside: Outside::default(),
            stopping: AtomicBool::new(false),
        });
        let maintenance = tokio::spawn(keep_house(Arc::downgrade(&shared)));
        tokio::spawn(Writer::new(shared.clone()).run(waiting));
        Self { queue: Arc::new(queue), shared, maintenance: Arc::new(Mutex::new(Some(maintenance))) }
    }

    /// Lets the server itself act: reads `reads`, lets `decide` look and change, and commits what
    /// it changed together with its records. When this returns, all of it is durable (I2).
    ///
    /// `decide` may be called several times: when it uses a row that was not read, and when another
    /// server's transaction came in between. Only what the last call did counts.
    ///
    /// # Errors
    /// What `decide` returned (nothing is written then, but the refusal is recorded); or
    /// [`ServiceError::Unavailable`].
    pub async fn act<T, F>(&self, act: ServerAct, reads: Reads, decide: F) -> Result<Committed<T>, ServiceError>
    where
        T: Send + 'static,
        F: FnMut(&mut View<'_, '_>) -> Result<Decided<T>, ServiceError> + Send + 'static,
    {
        self.enqueue(Actor::server(act), reads, decide).await
    }

    /// As [`Self::act`], for whoever it is, without the door; how it ends follows from what it has
    /// staged.
    #[doc(hidden)]
    pub async fn act_in_test<T, F>(
        &self,
        actor: Actor,
        reads: Reads,
        mut decide: F,
    ) -> Result<Committed<T>, ServiceError>
    where
        T: Send + 'static,
        F: FnMut(&mut View<'_, '_>) -> Result<T, ServiceError> + Send + 'static,
    {
        self.enqueue(actor, reads, move |view| decide(view).map(|answer| view.ended_in_test(answer))).await
    }

    /// As [`Self::act`], for whoever it is: callers come by [`super::Door::act`].
    pub(super) async fn enqueue<T, F>(
        &self,
        actor: Actor,
        reads: Reads,
        decide: F,
    ) -> Result<Committed<T>, ServiceError>
    where
        T: Send + 'static,
        F: FnMut(&mut View<'_, '_>) -> Result<Decided<T>, ServiceError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let act = Box::new(TypedAct { actor, reads, decide, value: None, reply: Some(reply) });
        self.queue.push(act)?;
        let outcome = answer
            .instrument(tracing::debug_span!("commit"))
            .await
            .map_err(|_| ServiceError::unavailable("the server is stopping"))?;
        // What an act refuses is counted with its transaction.
        outcome.map_err(ServiceError::recorded)
    }

    /// Counts a refusal that is no part of an act: a call that was refused before it came to one,
    /// or that only reads. It is written like the others, the first of a kind at once, and kept
    /// while the database is away (I2). Neither waits nor fails.
    pub fn refused(&self, principal: Option<&PrincipalId>, action: &str, reason: String) {
        let principal = principal.map(ToString::to_string).unwrap_or_default();
        metrics().refused(1, 0);
        self.shared
            .outside
            .note(Refusal { principal, action: action.to_owned(), reason, security_event: false }, now());
    }

    /// Whether the last transaction went through: what readiness reports.
    pub fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Relaxed)
    }

    /// Waits until the database was compared with what is known of its history: no counter is dealt
    /// before (I4). What stands in the way is logged.
    pub async fn settled(&self) -> DatabaseHistory {
        let mut history = self.shared.history.subscribe();
        loop {
            if let Some(history) = *history.borrow_and_update() {
                return history;
            }
            // The sender lives as long as this committer.
            if history.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Remembers in the watermark file up to where the log was written.
    pub async fn remember(&self) {
        self.shared.remember().await;
    }

    /// Remembers it for the last time, and ends the maintenance task: to be called before the
    /// database is closed.
    pub async fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        // A statement that fails because the database is closed would be logged as a fault.
        let maintenance = self.maintenance.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(maintenance) = maintenance {
            maintenance.abort();
            drop(maintenance.await);
        }
        self.shared.remember().await;
    }

    /// Opens a meter's row that was read outside a transaction, for showing it (I5: verified all
    /// the same).
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_meter(&self, title: SystemTitle, row: &SealedRow) -> Result<Arc<Meter>, ServiceError> {
        match self.open(&RowId::Meter(title), row)? {
            Some(Value::Meter(meter)) => Ok(meter),
            _ => Err(ServiceError::Internal("a meter's row holds something else".to_owned())),
        }
    }

    /// Opens a principal's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_principal(
        &self,
        id: &kms_domain::PrincipalId,
        row: &SealedRow,
    ) -> Result<Arc<kms_domain::Principal>, ServiceError> {
        match self.open(&RowId::Principal(id.clone()), row)? {
            Some(Value::Principal(principal)) => Ok(principal),
            _ => Err(ServiceError::Internal("a principal's row holds something else".to_owned())),
        }
    }

    /// Opens a group's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_group(&self, id: kms_domain::GroupId, row: &SealedRow) -> Result<Arc<kms_domain::Group>, ServiceError> {
        match self.open(&RowId::Group(id), row)? {
            Some(Value::Group(group)) => Ok(group),
            _ => Err(ServiceError::Internal("a group's row holds something else".to_owned())),
        }
    }

    /// Opens a device type's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_device_type(
        &self,
        id: kms_domain::DeviceTypeId,
        row: &SealedRow,
    ) -> Result<Arc<kms_domain::DeviceType>, ServiceError> {
        match self.open(&RowId::DeviceType(id), row)? {
            Some(Value::DeviceType(device_type)) => Ok(device_type),
            _ => Err(ServiceError::Internal("a device type's row holds something else".to_owned())),
        }
    }

    /// Opens a counter domain's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_domain(
        &self,
        id: kms_domain::CounterDomainId,
        row: &SealedRow,
    ) -> Result<Arc<kms_domain::CounterDomain>, ServiceError> {
        match self.open(&RowId::CounterDomain(id), row)? {
            Some(Value::Domain(domain)) => Ok(domain),
            _ => Err(ServiceError::Internal("a counter domain's row holds something else".to_owned())),
        }
    }

    /// Opens a campaign's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_campaign(
        &self,
        id: kms_domain::CampaignId,
        row: &SealedRow,
    ) -> Result<Arc<kms_domain::Campaign>, ServiceError> {
        match self.open(&RowId::Campaign(id), row)? {
            Some(Value::Campaign(campaign)) => Ok(campaign),
            _ => Err(ServiceError::Internal("a campaign's row holds something else".to_owned())),
        }
    }

    /// Opens a proposal's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_proposal(
        &self,
        id: kms_domain::ProposalId,
        row: &SealedRow,
    ) -> Result<Arc<kms_domain::Proposal>, ServiceError> {
        match self.open(&RowId::Proposal(id), row)? {
            Some(Value::Proposal(proposal)) => Ok(proposal),
            _ => Err(ServiceError::Internal("a proposal's row holds something else".to_owned())),
        }
    }

    /// Opens the island's own row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_island(&self, row: &SealedRow) -> Result<Arc<kms_domain::Island>, ServiceError> {
        match self.open(&RowId::Island(self.shared.settings.island.clone()), row)? {
            Some(Value::Island(island)) => Ok(island),
            _ => Err(ServiceError::Internal("the island's row holds something else".to_owned())),
        }
    }

    /// Opens the row of a rotation of a root that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_root_rotation(
        &self,
        to: kms_domain::RootId,
        row: &SealedRow,
    ) -> Result<Arc<kms_domain::RootRotation>, ServiceError> {
        match self.open(&RowId::RootRotation(to), row)? {
            Some(Value::RootRotation(rotation)) => Ok(rotation),
            _ => Err(ServiceError::Internal("a rotation's row holds something else".to_owned())),
        }
    }

    /// The key that seals rows now.
    pub fn seal_key(&self) -> Arc<SealKey> {
        Arc::clone(self.shared.seal.load().current())
    }

    /// All seal keys.
    pub fn seal_keys(&self) -> Arc<SealKeys> {
        self.shared.seal.load_full()
    }

    /// Uses these seal keys from the next transaction on.
    pub fn use_seal_keys(&self, keys: SealKeys) {
        self.shared.seal.store(Arc::new(keys));
    }

    /// All audit keys.
    pub fn audit_keys(&self) -> Arc<AuditKeys> {
        self.shared.audit_keys.load_full()
    }

    /// Uses these audit keys: a chain that begins from now on begins with the current one of them,
    /// and the chain at hand goes over to it. That is on the record, in the chain itself: in the
    /// last record that the key before links, and the first that the new one does.
    ///
    /// # Errors
    /// The records could not be written. The chain goes on as it was.
    pub async fn use_audit_keys(&self, keys: AuditKeys) -> Result<(), ServiceError> {
        let version = keys.current().version();
        self.shared.audit_keys.store(Arc::new(keys));
        if self.is_linked_with(version) {
            return Ok(());
        }
        let changed = AuditKeyChanged { version: version.into(), closed: Vec::new() };
        self.append_all(vec![changed.clone(), changed]).await
    }

    /// Whether the chain at hand, if there is one, goes on with this version of the audit key.
    pub fn is_linked_with(&self, version: u8) -> bool {
        self.last_record().is_none_or(|last| last.next_key == version)
    }

    /// Closes, on the record, the chains of all other writers that end with an audit key of a
    /// version below `oldest`, and are believed still: to be called before that key is retired. A
    /// server that is alive goes on, and is believed by what it links afterwards.
    ///
    /// # Errors
    /// The database is away, or the record could not be written.
    pub async fn close_chains_below(&self, oldest: u8) -> Result<(), ServiceError> {
        let (own, believed) = (self.writer(), self.shared.seal.load().oldest());
        let mut closed = Vec::new();
        // Whatever records say that they closed: who writes the database could have put them there.
        for tail in self.shared.store.audit_tails().await?.into_iter().filter(|tail| Some(tail.writer) != own) {
            if self.shared.end_version(&tail).await?.is_some_and(|version| version >= believed && version < oldest) {
                closed.push(closed_chain(&tail));
            }
        }
        let version = self.audit_keys().current().version().into();
        self.append_all(
            closed.chunks(CLOSED_AT_ONCE).map(|closed| AuditKeyChanged { version, closed: closed.to_vec() }).collect(),
        )
        .await
    }

    async fn append_all(&self, changes: Vec<AuditKeyChanged>) -> Result<(), ServiceError> {
        let act = self.act(ServerAct::AUDIT_KEY, Reads::default(), move |view| {
            let mut entry = None;
            for changed in &changes {
                entry = Some(view.append(Event::AuditKeyChanged(changed.clone())));
            }
            Ok(Decided::of(entry, ()))
        });
        act.await.map(drop)
    }

    fn last_record(&self) -> Option<LastRecord> {
        self.shared.last_record.lock().ok().and_then(|last| *last)
    }

    /// Under which name this run of the server writes the log; none before its first record.
    pub fn writer(&self) -> Option<WriterId> {
        self.shared.writer.lock().ok().and_then(|writer| *writer)
    }

    fn open(&self, id: &RowId, row: &SealedRow) -> Result<Option<Value>, ServiceError> {
        open_row(id, Some(row), &self.shared.seal.load(), &self.shared.seen, &self.shared.settings.island)
            .map(|opened| opened.value)
            .map_err(|reason| {
                tracing::error!(row = %id, reason, "a sealed row was refused");
                ServiceError::FailedPrecondition {
                    reason: format!("a sealed row was refused (I5): {reason}"),
                    next_step: "run `kms audit scrub` and call the security officers".to_owned(),
                }
            })
    }
}

impl Shared {
    /// Begins the chain of a new writer: its first record closes the chains of writers that are
    /// gone (docs/formats.md).
    async fn open_chain(&self, keys: &AuditKeys) -> Result<(ChainHead, AuditRecord), StoreError> {
        let writer = WriterId::from_octets(uuid::Uuid::new_v4().as_bytes())
            .map_err(|error| StoreError::Corrupt { what: error.to_string() })?;
        let closed = self.unclosed().await?;
        self.store.register_server(writer, &self.settings.server).await?;
        if let Ok(mut current) = self.writer.lock() {
            *current = Some(writer);
        }
        let head = ChainHead::new(writer, Arc::clone(keys.current()));
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let event = WriterOpened {
            server: self.settings.server.clone(),
            version,
            closed,
            audit_key_version: head.key_version().into(),
            policy_sha256: self.settings.policy_sha256.map(|digest| digest.to_vec().into()).unwrap_or_default(),
        };
        Ok((head, AuditRecord { event: Some(Event::WriterOpened(event)), ..Default::default() }))
    }

    /// The ends of chains whose writers are gone, and which no later chain closes in its first
    /// record.
    async fn unclosed(&self) -> Result<Vec<ClosedChain>, StoreError> {
        let silence = i64::try_from(self.settings.silence.as_millis()).unwrap_or(i64::MAX);
        let servers = self.store.servers().await?.into_iter();
        let alive: HashSet<WriterId> = servers
            .filter(|server| server.silent_ms < silence && server.name != self.settings.server)
            .map(|server| server.writer)
            .collect();
        let tails = self.store.audit_tails().await?;
        // One that was taken for gone may have gone on: it is closed again where it ends now.
        let mut known = HashSet::new();
        for tail in &tails {
            let first = self.store.audit_of_writer(tail.writer, 0, 1).await?;
            known.extend(first.iter().flat_map(|first| closed_in(&first.record)));
        }
        let oldest = self.seal.load().oldest();
        let mut closed = Vec::new();
        for tail in
            tails.iter().filter(|tail| !alive.contains(&tail.writer) && !known.contains(&(tail.writer, tail.sequence)))
        {
            // I5: nobody vouches for an end that who learned a retired key could have made. Those
            // that were there before were closed at its retirement.
            if oldest <= 1 || self.end_version(tail).await?.is_some_and(|version| version >= oldest) {
                closed.push(closed_chain(tail));
            }
        }
        Ok(closed)
    }

    /// The newest sign of life of a server of the island: the time of the last record, or of a
    /// heartbeat. None: there was no server before.
    async fn last_sign(&self) -> Result<Option<(UnixMillis, UnixMillis)>, StoreError> {
        let newest =
            self.store.audit_page(&AuditFilter { newest_first: true, ..AuditFilter::default() }, None, 1).await?;
        let Some(last) = newest.first().map(|row| row.record.time) else { return Ok(None) };
        let heard = self.store.servers().await?.into_iter().map(|server| server.heartbeat).max().unwrap_or(last);
        Ok(Some((last, last.max(heard))))
    }

    /// The version of the audit key that links the last record of a chain; none: none that is known
    /// here.
    async fn end_version(&self, tail: &AuditTail) -> Result<Option<u8>, StoreError> {
        let end = self.store.audit_of_writer(tail.writer, tail.sequence.saturating_sub(1), 2).await?;
        let (previous, last) = match end.as_slice() {
            [only] if tail.sequence == 0 => ([0; 32], only),
            [before, last, ..] => (before.chain, last),
            _ => return Ok(None),
        };
        Ok(self.audit_keys.load().version_of(&previous, &last.record, &last.chain))
    }

    /// The last durable record and the jump, if there is anything to remember yet.
    fn watermark(&self) -> Option<Watermark> {
        let history = (*self.history.borrow())?;
        let LastRecord { writer, sequence, .. } = self.last_record.lock().ok().and_then(|last| *last)?;
        Some(Watermark { writer, sequence, jump: history.jump, oldest_seal_key: self.seal.load().oldest() })
    }

    /// Writes the watermark file, unless it says the same already. Only what is durable in the
    /// database is written, and by one task at a time.
    async fn remember(self: &Arc<Self>) {
        let Some(path) = self.settings.restore.watermark.clone() else { return };
        let mut remembered = self.remembered.lock().await;
        let Some(mark) = self.watermark().filter(|mark| *remembered != Some(*mark)) else { return };
        let shared = Arc::clone(self);
        match tokio::task::spawn_blocking(move || {
            mark.write(&path, &shared.settings.island, shared.seal.load().current())
        })
        .await
        {
            Ok(Ok(())) => *remembered = Some(mark),
            Ok(Err(error)) => {
                tracing::error!(%error, "the watermark file cannot be written: a database that is put back to an older state would not be noticed (I4)");
            }
            // The runtime is ending.
            Err(_) => {}
        }
    }
}

/// The newest generation that this server has seen of each row (I5).
#[derive(Default)]
pub(super) struct Seen {
    meters: RwLock<HashMap<i64, u64>>,
    others: RwLock<HashMap<RowId, u64>>,
}

impl Seen {
    pub(super) fn generation(&self, id: &RowId) -> Option<u64> {
        match id {
            RowId::Meter(title) => self.meters.read().ok()?.get(&title.as_i64()).copied(),
            other => self.others.read().ok()?.get(other).copied(),
        }
    }

    pub(super) fn note(&self, id: &RowId, generation: u64) {
        if self.generation(id).is_some_and(|known| known >= generation) {
            return;
        }
        match id {
            RowId::Meter(title) => {
                if let Ok(mut meters) = self.meters.write() {
                    let known = meters.entry(title.as_i64()).or_default();
                    *known = generation.max(*known);
                }
            }
            other => {
                if let Ok(mut others) = self.others.write() {
                    let known = others.entry(other.clone()).or_default();
                    *known = generation.max(*known);
                }
            }
        }
    }
}

/// Counter chunks whose reservation is durable (I4).
#[derive(Default)]
pub(super) struct Chunks(HashMap<ChunkName, Held>);

/// A chunk in this server's hands.
pub(super) struct Held {
    pub(super) chunk: LiveChunk,
    /// Until when the newest counters dealt from it are lent to a grantee.
    pub(super) leased_until: UnixMillis,
}

impl Chunks {
    pub(super) fn get(&self, name: &ChunkName) -> Option<&Held> {
        self.0.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &ChunkName) -> Option<&mut Held> {
        self.0.get_mut(name)
    }

    /// Up to where this server knows counters as reserved; 0 if it has no chunk.
    pub(super) fn bound(&self, name: &ChunkName) -> u64 {
        self.0.get(name).map_or(0, |held| held.chunk.bound())
    }
}

/// An act in the queue, whatever its result's type.
pub(super) trait Queued: Send {
    fn actor(&self) -> Actor;
    /// In whose lane it waits; none is the server's own.
    fn payer(&self) -> Option<PrincipalId>;
    fn reads(&self) -> &Reads;
    fn decide(&mut self, view: &mut View<'_, '_>) -> Result<Kind, ServiceError>;
    fn finish(self: Box<Self>, outcome: Result<Vec<AuditLeaf>, ServiceError>);

    /// How much of the writer's time it takes, in rows of meters. A fingerprint is looked up and
    /// not opened.
    fn cost(&self) -> u64 {
        let reads = self.reads();
        let rows = reads.meters.len() + reads.tasks.len() + reads.sealed.len() + reads.fingerprints.len() / 4;
        u64::try_from(rows).unwrap_or(u64::MAX).saturating_add(WORK_OF_AN_ACT)
    }
}

struct TypedAct<T, F> {
    actor: Actor,
    reads: Reads,
    decide: F,
    value: Option<T>,
    reply: Option<oneshot::Sender<Result<Committed<T>, ServiceError>>>,
}

impl<T, F> Queued for TypedAct<T, F>
where
    T: Send,
    F: FnMut(&mut View<'_, '_>) -> Result<Decided<T>, ServiceError> + Send,
{
    fn actor(&self) -> Actor {
        self.actor.clone()
    }

    fn payer(&self) -> Option<PrincipalId> {
        self.actor.principal.clone()
    }

    fn reads(&self) -> &Reads {
        &self.reads
    }

    fn decide(&mut self, view: &mut View<'_, '_>) -> Result<Kind, ServiceError> {
        self.value = None;
        let (value, kind) = (self.decide)(view)?.into_parts();
        self.value = Some(value);
        Ok(kind)
    }

    fn finish(mut self: Box<Self>, outcome: Result<Vec<AuditLeaf>, ServiceError>) {
        let outcome = match (outcome, self.value.take()) {
            (Ok(leaves), Some(value)) => Ok(Committed { value, leaves }),
            (Ok(_), None) => Err(ServiceError::Internal("an act was committed without a decision".to_owned())),
            (Err(error), _) => Err(error),
        };
        if let Some(reply) = self.reply.take() {
            // A caller that has gone away loses its answer; what was committed stays, and a replay
            // finds it.
            let _ = reply.send(outcome);
        }
    }
}

/// The state of the writing task.
struct Writer {
    shared: Arc<Shared>,
    /// `None`: the next transaction opens a chain of a new writer.
    head: Option<ChainHead>,
    chunks: Chunks,
    refusals: Refusals,
    growth: Growth,
    /// What this server remembers outside the database; read from its file at the first comparison.
    watermark: Option<Watermark>,
    /// An operator's word that the database was restored, until it is carried out.
    declared: bool,
    failures: Repetition,
    clock: ClockWatch,
}

/// Tells those that ask for health that the writing task has ended, however it ended: nothing can
/// be recorded from then on (I2).
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ready.store(false, Ordering::Relaxed);
        if std::thread::panicking() {
            tracing::error!(
                "the writing task failed (a fault of the server): all acts are refused until the server is restarted"
            );
        }
    }
}

/// What one attempt decided, to be kept if it commits.
struct Attempt {
    head: ChainHead,
    outcomes: Vec<Result<(), ServiceError>>,
    leaves: Vec<Vec<AuditLeaf>>,
    fresh_chunks: HashMap<ChunkName, Held>,
    written: Vec<(RowId, u64)>,
    /// Set where refusals were counted or are written.
    refusals: Option<Refusals>,
    /// How many refusals were counted, and how many security events.
    refused: (u64, u64),
    grown: Grown,
}

impl Writer {
    fn new(shared: Arc<Shared>) -> Self {
        let declared = shared.settings.restore.declared;
        let (chunks, refusals, failures) = (Chunks::default(), Refusals::default(), Repetition::default());
        let (growth, clock) = (Growth::default(), ClockWatch::new(now(), Instant::now()));
        Self { shared, head: None, chunks, refusals, growth, watermark: None, declared, failures, clock }
    }

    async fn run(mut self, waiting: Receiver) {
        let _ending = Ending(Arc::clone(&self.shared));
        let mut idle = tokio::time::interval(IDLE);
        loop {
            tokio::select! {
                more = waiting.ready() => {
                    if !more {
                        return;
                    }
                }
                _ = idle.tick() => drop(self.compare().await),
                () = self.shared.outside.news() => {}
            }
            self.refusals.absorb(self.shared.outside.take());
            self.clock.look(now(), Instant::now());
            while !waiting.is_empty() || self.refusals.any_due(Instant::now()) || self.clock.has_news() {
                let committed = self.commit(waiting.take()).await;
                if waiting.is_empty() && !committed {
                    // Refusals that could not be written are kept, and tried with the next acts or
                    // tick.
                    break;
                }
            }
        }
    }

    /// Commits a batch of acts, and answers them. Whether the transaction went through.
    async fn commit(&mut self, mut acts: Vec<Box<dyn Queued>>) -> bool {
        if let Err(error) = self.compare().await {
            for act in acts {
                act.finish(Err(error.clone()));
            }
            return false;
        }
        let began = Instant::now();
        let mut attempts = 0;
        let outcome = loop {
            attempts += 1;
            match self.attempt(&mut acts).await {
                // Another server put a row in between that this one found absent: look again.
                Err(StoreError::Conflict { .. }) if attempts < MOST_ATTEMPTS => {}
                other => break other,
            }
        };
        metrics().committed(acts.len(), began, outcome.is_ok());
        match outcome {
            Ok((outcomes, leaves)) => {
                self.shared.ready.store(true, Ordering::Relaxed);
                for ((act, outcome), leaves) in acts.into_iter().zip(outcomes).zip(leaves) {
                    act.finish(outcome.map(|()| leaves));
                }
                true
            }
            Err(StoreError::Conflict { .. }) if acts.len() > 1 => {
                // Nothing was written, and one act stands in the way: it shall not fail the others.
                let mut committed = true;
                for act in acts {
                    committed &= Box::pin(self.commit(vec![act])).await;
                }
                committed
            }
            Err(error) => {
                tracing::error!(%error, "a transaction failed");
                if !matches!(&error, StoreError::Conflict { row } if !matches!(row, RowName::Audit(..))) {
                    // Whether the transaction is durable may be unknown. I4: nothing reserved in it
                    // is dealt, and the chain goes on under a new writer, which reads where the old
                    // one ended.
                    self.head = None;
                    self.chunks = Chunks::default();
                    self.shared.compare.store(true, Ordering::Relaxed);
                }
                let error = ServiceError::from(error);
                self.shared.ready.store(!matches!(error, ServiceError::Unavailable { .. }), Ordering::Relaxed);
                for act in acts {
                    act.finish(Err(error.clone()));
                }
                false
            }
        }
    }

    /// Compares the database with what is known of its history, where that is due, and raises the
    /// counters of a restored one (I4).
    async fn compare(&mut self) -> Result<(), ServiceError> {
        if !self.shared.compare.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.try_compare().await {
            Ok(compared) => {
                self.shared.ready.store(true, Ordering::Relaxed);
                if compared {
                    self.shared.compare.store(false, Ordering::Relaxed);
                }
                Ok(())
            }
            Err(error) => {
                // A database that this server closes is no news.
                if !self.shared.stopping.load(Ordering::Relaxed) && self.failures.is_news(&error.to_string()) {
                    tracing::error!(%error, "the database's history cannot be compared, so no counter is dealt (I4); it is tried again");
                }
                self.shared.ready.store(false, Ordering::Relaxed);
                Err(error)
            }
        }
    }

    /// Whether there was a row of the island to compare with: the ceremony writes it last.
    async fn try_compare(&mut self) -> Result<bool, ServiceError> {
        let shared = Arc::clone(&self.shared);
        let (store, settings) = (&shared.store, &shared.settings);
        if !shared.ready.load(Ordering::Relaxed) {
            store.check().await?;
        }
        let id = RowId::Island(settings.island.clone());
        let (kind, name) = sealed_name(&id);
        let row = store.sealed(kind, &name).await?;
        let opened =
            open_row(&id, row.as_ref(), &shared.seal.load(), &shared.seen, &settings.island).map_err(|reason| {
                ServiceError::unavailable(format!("{reason}; if the database was restored, restart the server"))
            })?;
        let Some(Value::Island(island)) = opened.value else { return Ok(false) };
        let timeline = store.timeline().await?;
        self.clock.compare_with_database(now(), store.now().await?);
        self.watermark = match (shared.watermark(), &settings.restore.watermark) {
            (Some(mark), _) => Some(mark),
            (None, Some(path)) if self.watermark.is_none() => {
                Watermark::read(path, &settings.island, &shared.seal.load()).map_err(ServiceError::unavailable)?
            }
            _ => self.watermark,
        };
        let mut reasons = Vec::new();
        if self.declared {
            reasons.push("an operator said so".to_owned());
        }
        if let Some(mark) = self.watermark
            && store
                .audit_of_writer(mark.writer, mark.sequence, 1)
                .await?
                .first()
                .is_none_or(|record| record.sequence != mark.sequence)
        {
            reasons.push(format!(
                "the log lacks record {} of writer {}, which this server remembers",
                mark.sequence, mark.writer
            ));
        }
        let remembered = self.watermark.map_or(CounterJump::NONE, |mark| mark.jump);
        let comparison = Comparison { timeline, remembered, reasons, counter_jump: settings.restore.counter_jump };
        let history = if comparison.judge(island.history).0 == island.history {
            island.history
        } else {
            self.settle(comparison).await?
        };
        self.declared = false;
        self.watermark = None;
        shared.history.send_replace(Some(history));
        shared.remember().await;
        Ok(true)
    }

    /// Writes what a comparison came to, as an act of its own before all others.
    async fn settle(&mut self, comparison: Comparison) -> Result<DatabaseHistory, ServiceError> {
        let (reply, answer) = oneshot::channel();
        let name = self.shared.settings.island.clone();
        let reads = Reads { sealed: vec![sealed_name(&RowId::Island(name.clone()))], ..Reads::default() };
        let decide = move |view: &mut View<'_, '_>| comparison.settle(view, &name);
        let mut acts: Vec<Box<dyn Queued>> = vec![Box::new(TypedAct {
            actor: Actor::server(ServerAct::RESTORE),
            reads,
            decide,
            value: None,
            reply: Some(reply),
        })];
        let attempted = self.attempt(&mut acts).await;
        // I4: what was reserved before is not dealt any more; and after an error it is not known
        // what is durable.
        self.chunks = Chunks::default();
        if attempted.is_err() {
            self.head = None;
        }
        let (outcomes, leaves) = attempted?;
        for ((act, outcome), leaves) in acts.into_iter().zip(outcomes).zip(leaves) {
            act.finish(outcome.map(|()| leaves));
        }
        let committed =
            answer.await.map_err(|_| ServiceError::Internal("the act of a comparison has no outcome".to_owned()))??;
        Ok(committed.value)
    }

    async fn attempt(
        &mut self,
        acts: &mut [Box<dyn Queued>],
    ) -> Result<(Vec<Result<(), ServiceError>>, Vec<Vec<AuditLeaf>>), StoreError> {
        let now = self.clock.look(now(), Instant::now());
        let shared = self.shared.clone();
        let keys = shared.audit_keys.load_full();
        let (head, mut opening) = match &self.head {
            Some(head) => (head.clone(), Vec::new()),
            None => {
                self.clock.compare_with_log(now, || shared.last_sign()).await?;
                let (head, record) = shared.open_chain(&keys).await?;
                (head, vec![record])
            }
        };
        // Before all others: the times of those are by the clock as it is now.
        opening.extend(self.clock.news());
        let mut reads = Reads::default();
        for act in acts.iter() {
            reads.extend(act.reads());
        }
        let actors: Vec<Actor> = acts.iter().map(|act| act.actor()).collect();
        let seal = shared.seal.load_full();
        let at = Instant::now();
        let mut attempt = None;
        let (chunks, refusals, growth) = (&mut self.chunks, &self.refusals, &self.growth);
        let bound = shared.settings.limits.log_octets_per_principal_and_hour;
        let mut decide = |read: &ReadSet| {
            let mut batch = Batch::new(read, now, head.writer, &shared, &seal, chunks);
            let outcomes =
                decide_all(acts, &actors, &mut batch, |actor| growth.permit(actor, &shared.settings.limits, at));
            if !batch.missing.is_empty() {
                return Decision::More(Box::new(batch.missing));
            }
            let (decision, decided) = finish(
                batch,
                outcomes,
                head.clone(),
                opening.clone(),
                &keys,
                refusals,
                (growth, bound),
                &actors,
                &seal,
                at,
            );
            attempt = Some(decided);
            decision
        };
        let committed = shared.store.transact(reads, &mut decide).await?;
        let Some(Attempt { head, outcomes, leaves, fresh_chunks, written, refusals, refused, grown }) = attempt else {
            return Err(StoreError::Corrupt { what: "a transaction ended without a decision".to_owned() });
        };
        let (refused, security_events) = refused;
        metrics().refused(refused, security_events);
        if committed == StoreCommitted::Written {
            let opened = self.head.is_none();
            if let (Ok(mut last), Some(sequence)) = (shared.last_record.lock(), head.last_sequence()) {
                *last = Some(LastRecord { writer: head.writer, sequence, next_key: head.key_version() });
            }
            self.head = Some(head);
            self.clock.written(now);
            if opened {
                // A chain that is never heard of again must not be missed.
                shared.remember().await;
            }
            for (id, generation) in &written {
                self.shared.seen.note(id, *generation);
            }
            metrics().chunks_reserved(fresh_chunks.len());
            self.growth.written(grown, at);
            // I4: dealt from only now that the reservation is durable; what was dealt within the
            // transaction goes out with it.
            self.chunks.0.extend(fresh_chunks);
            if let Some(mut refusals) = refusals {
                refusals.written(at);
                self.refusals = refusals;
            }
        } else if let Some(refusals) = refusals {
            self.refusals = refusals;
        }
        Ok((outcomes, leaves))
    }
}

impl<'b> Batch<'b> {
    fn new(
        read: &'b ReadSet,
        now: UnixMillis,
        writer: WriterId,
        shared: &'b Shared,
        seal: &'b SealKeys,
        chunks: &'b mut Chunks,
    ) -> Self {
        Self {
            read,
            now,
            island: &shared.settings.island,
            seal,
            writer,
            chunk_size: shared.settings.chunk_size,
            counter_cap: shared.settings.limits.counter_cap(),
            jump: shared.history.borrow().map_or(CounterJump::NONE, |history| history.jump),
            seen: &shared.seen,
            chunks,
            fresh_chunks: HashMap::new(),
            rows: HashMap::new(),
            missing: Reads::default(),
            events: Vec::new(),
            requests: HashMap::new(),
            request_events: HashMap::new(),
            grants: Vec::new(),
            revocations: Vec::new(),
            fingerprints: BTreeMap::new(),
            shipments: HashMap::new(),
            refused_lines: Vec::new(),
            tasks: HashMap::new(),
            refusals: Vec::new(),
        }
    }
}

/// Lets each act that is permitted to write decide on what the acts before it left.
fn decide_all(
    acts: &mut [Box<dyn Queued>],
    actors: &[Actor],
    batch: &mut Batch<'_>,
    permit: impl Fn(&Actor) -> Result<(), ServiceError>,
) -> Vec<Result<(), ServiceError>> {
    let mut outcomes = Vec::with_capacity(acts.len());
    for (number, (act, actor)) in acts.iter_mut().zip(actors).enumerate() {
        if let Err(refusal) = permit(actor) {
            outcomes.push(Err(refusal));
            continue;
        }
        let mut view = View { base: batch, actor, staged: Staged::default() };
        let outcome = view.attempt(|view| act.decide(view));
        outcomes.push(outcome.and_then(|kind| view.accept(number, kind)));
    }
    outcomes
}

/// Turns what the acts decided into the transaction's writes.
#[expect(clippy::too_many_arguments, reason = "the one place where all of a transaction comes together")]
fn finish(
    batch: Batch<'_>,
    mut outcomes: Vec<Result<(), ServiceError>>,
    mut head: ChainHead,
    opening: Vec<AuditRecord>,
    keys: &AuditKeys,
    refusals: &Refusals,
    (growth, bound): (&Growth, u64),
    actors: &[Actor],
    seal: &SealKeys,
    at: Instant,
) -> (Decision, Attempt) {
    let now = batch.now;
    let mut changes = Changes::default();
    let mut written = Vec::new();
    let mut row_writes: HashMap<RowId, RowWrite> = HashMap::new();
    for (id, opened) in batch.rows.into_iter().filter(|(_, opened)| opened.changed) {
        match put_row(&id, opened, seal.current(), &mut changes) {
            Ok(row_write) => {
                written.push((id.clone(), row_write.generation));
                row_writes.insert(id, row_write);
            }
            Err(error) => {
                // A row that does not encode is a fault of this program: nothing of the transaction
                // is written.
                outcomes.iter_mut().for_each(|outcome| *outcome = Err(error.clone()));
                let leaves = vec![Vec::new(); outcomes.len()];
                return (
                    Decision::Abandon,
                    Attempt {
                        head,
                        outcomes,
                        leaves,
                        fresh_chunks: HashMap::new(),
                        written: Vec::new(),
                        refusals: None,
                        refused: (0, 0),
                        grown: Grown::default(),
                    },
                );
            }
        }
    }

    let mut noted = None;
    let mut refused = (0, 0);
    let denials = outcomes.iter().zip(actors).filter_map(|(outcome, actor)| refusal_of(outcome.as_ref().err()?, actor));
    for refusal in denials.chain(batch.refusals) {
        let (others, security_events) = &mut refused;
        *if refusal.security_event { security_events } else { others } += 1;
        noted.get_or_insert_with(|| refusals.clone()).note(refusal, now);
    }
    let due = noted.as_ref().unwrap_or(refusals).due(at);
    if !due.is_empty() {
        noted.get_or_insert_with(|| refusals.clone());
    }

    let mut leaves = vec![Vec::new(); outcomes.len()];
    let mut references = Vec::with_capacity(batch.events.len());
    for opening in opening {
        changes.audit.push(append(&mut head, keys, opening, now).1);
    }
    let mut grown = Grown::default();
    for event in batch.events {
        let mut record = event.record;
        record.row_writes = event.written.iter().filter_map(|id| row_writes.get(id).cloned()).collect();
        let (leaf, appended) = append(&mut head, keys, record, now);
        references.push((AuditReference { writer: appended.writer, sequence: appended.sequence }, leaf));
        if let Some(of_act) = leaves.get_mut(event.act) {
            of_act.push(leaf);
        }
        if let Some(principal) = actors.get(event.act).and_then(|actor| actor.principal.as_ref()) {
            grown.add(principal, &appended.record);
        }
        changes.audit.push(appended);
    }
    for record in due.into_iter().chain(growth.alarms(&mut grown, bound, at)) {
        changes.audit.push(append(&mut head, keys, record, now).1);
    }

    for (mut grant, event) in batch.grants {
        if let Some((reference, _)) = references.get(event) {
            grant.audit = *reference;
        }
        changes.grants.push(grant);
    }
    for (key, mut row) in batch.requests {
        // An outcome that is empty stands for the record itself.
        if let (true, Some(reference)) =
            (row.outcome.is_empty(), batch.request_events.get(&key).and_then(|event| references.get(*event)))
        {
            let (reference, leaf) = *reference;
            row.outcome = RecordName { reference, leaf }.encode();
        }
        let seal =
            seal.current().seal_request(&key.principal, key.request, key.chunk, &row.digest, row.expires, &row.outcome);
        row.outcome.splice(..0, seal);
        changes.requests.push(RequestPut { key, row });
    }
    changes.revocations = batch.revocations;
    changes.fingerprints = batch
        .fingerprints
        .into_iter()
        .flat_map(|(prefix, owners)| owners.into_iter().map(move |owner| FingerprintPut { prefix, owner }))
        .collect();
    changes.shipments = batch.shipments.into_values().collect();
    changes.refusals = batch.refused_lines;
    changes.tasks = batch.tasks.into_values().collect();

    let nothing = changes.audit.is_empty()
        && changes.requests.is_empty()
        && changes.shipments.is_empty()
        && changes.refusals.is_empty()
        && changes.tasks.is_empty();
    let decision = if nothing { Decision::Abandon } else { Decision::Commit(Box::new(changes)) };
    (
        decision,
        Attempt { head, outcomes, leaves, fresh_chunks: batch.fresh_chunks, written, refusals: noted, refused, grown },
    )
}

/// Seals a changed row in its next generation, and says what the audit record tells of it.
fn put_row(id: &RowId, opened: Opened, seal: &SealKey, changes: &mut Changes) -> Result<RowWrite, ServiceError> {
    let fault = |error: String| ServiceError::Internal(format!("the row of {id} cannot be written: {error}"));
    let generation = opened.generation.map_or(Generation::FIRST, Generation::next);
    let value = opened.value.ok_or_else(|| fault("it is absent".to_owned()))?;
    let body = match &value {
        Value::Meter(meter) => meter.to_row().map_err(|error| fault(error.to_string()))?,
        Value::Principal(principal) => principal.to_row().map_err(|error| fault(error.to_string()))?,
        Value::Group(group) => group.to_row().map_err(|error| fault(error.to_string()))?,
        Value::DeviceType(device_type) => device_type.to_row().map_err(|error| fault(error.to_string()))?,
        Value::Domain(domain) => domain.to_row(),
        Value::Island(island) => island.to_row(),
        Value::QuotaUse(used) => used.to_row(),
        Value::Campaign(campaign) => campaign.to_row(),
        Value::Proposal(proposal) => proposal.to_row(),
        Value::RootRotation(rotation) => rotation.to_row(),
    };
    let digest = seal.row_digest(id, generation, &body);
    let row = SealedRow { generation: generation.number(), seal: *seal.seal(id, generation, &body).octets(), body };
    let row_write = RowWrite {
        kind: u32::from(id.kind()),
        id: id_octets(id).into(),
        generation: row.generation,
        digest: digest.to_vec().into(),
    };
    match value {
        Value::Meter(meter) => changes.meters.push(match (opened.generation, opened.reprojected) {
            (None, _) => MeterPut::insert(meter.title, row, projection(&meter)),
            (Some(_), true) => MeterPut::update_projection(meter.title, row, projection(&meter)),
            (Some(_), false) => MeterPut::update(meter.title, row),
        }),
        _ => {
            let (kind, octets) = sealed_name(id);
            changes.sealed.push(SealedPut { kind, id: octets, row });
        }
    }
    Ok(row_write)
}

/// What the search columns show of a meter.
fn projection(meter: &Meter) -> MeterProjection {
    MeterProjection {
        vendor: meter.class.vendor.to_string(),
        profile: meter.class.profile.to_string(),
        status: u8::try_from(meter.class.status.number()).unwrap_or_default(),
        head_end: meter.class.head_end.as_ref().map(ToString::to_string),
        batch: Some(meter.batch.clone()).filter(|batch| !batch.is_empty()),
        groups: meter.class.groups.iter().map(|group| group.0).collect(),
    }
}

fn id_octets(id: &RowId) -> Vec<u8> {
    match id {
        RowId::Meter(title) => title.octets().to_vec(),
        other => sealed_name(other).1,
    }
}

fn closed_chain(tail: &AuditTail) -> ClosedChain {
    ClosedChain {
        writer: tail.writer.octets().to_vec().into(),
        last_sequence: tail.sequence,
        chain: tail.chain.to_vec().into(),
    }
}

/// The chains that the first record of another closes: the writer, and the number of its last
/// record.
fn closed_in(record: &[u8]) -> Vec<(WriterId, u64)> {
    let Some(Event::WriterOpened(opened)) = AuditRecord::decode(record).ok().and_then(|record| record.event) else {
        return Vec::new();
    };
    opened
        .closed
        .into_iter()
        .filter_map(|chain| Some((WriterId::from_octets(&chain.writer).ok()?, chain.last_sequence)))
        .collect()
}

fn append(head: &mut ChainHead, keys: &AuditKeys, record: AuditRecord, now: UnixMillis) -> (AuditLeaf, AuditAppend) {
    let kind = record.event.as_ref().map_or(0, event_kind);
    let linked = head.link(keys, record, now);
    (
        linked.leaf,
        AuditAppend {
            writer: head.writer,
            sequence: linked.sequence,
            time: now,
            kind,
            record: linked.record,
            chain: linked.chain,
        },
    )
}

/// The number of [`Event::ClockJumped`].
pub const CLOCK_JUMPED: u16 = 66;

/// The field number of the event in the record.
pub const fn event_kind(event: &Event) -> u16 {
    match event {
        Event::WriterOpened(_) => 16,
        Event::KeysGranted(_) => 17,
        Event::Refused(_) => 18,
        Event::ShipmentImported(_) => 19,
        Event::MetersChanged(_) => 20,
        Event::PrincipalChanged(_) => 21,
        Event::GrantRevoked(_) => 22,
        Event::FramesProtected(_) => 23,
        Event::SecurityEvent(_) => 24,
        Event::CeremonyHeld(_) => 25,
        Event::KeyCreated(_) => 26,
        Event::GroupKeyChanged(_) => 33,
        Event::DeviceTypeAdded(_) => 27,
        Event::KeysDestroyed(_) => 30,
        Event::TransfersAdvanced(_) => 31,
        Event::ProposalMade(_) => 35,
        Event::ProposalApproved(_) => 36,
        Event::ProposalEnded(_) => 37,
        Event::CounterRaised(_) => 38,
        Event::CampaignCreated(_) => 40,
        Event::CampaignApproved(_) => 41,
        Event::CampaignChanged(_) => 42,
        Event::WaveChanged(_) => 43,
        Event::TasksChanged(_) => 44,
        Event::RootVersionBegun(_) => 45,
        Event::RootVersionMade(_) => 46,
        Event::RootRotationChanged(_) => 47,
        Event::RootRowsAdvanced(_) => 48,
        Event::RootDestroyed(_) => 49,
        Event::AuditKeyChanged(_) => 50,
        Event::ClockJumped(_) => CLOCK_JUMPED,
    }
}

/// A refused act, as the log counts it; trouble of the server is no refusal.
fn refusal_of(error: &ServiceError, actor: &Actor) -> Option<Refusal> {
    match error {
        ServiceError::PermissionDenied { .. }
        | ServiceError::Unauthenticated { .. }
        | ServiceError::FailedPrecondition { .. }
        | ServiceError::NotFound { .. } => Some(Refusal {
            principal: actor.principal.as_ref().map(ToString::to_string).unwrap_or_default(),
            action: actor.action.to_owned(),
            // Without the meter: one client that asks for many unknown meters is one line in the
            // log, not thousands.
            reason: match error {
                ServiceError::PermissionDenied { asked, .. } => {
                    format!("`{}` is not permitted", asked.split(" with ").next().unwrap_or_default())
                }
                other => other.to_string(),
            },
            security_event: false,
        }),
        _ => None,
    }
}

/// Tells other servers that this one is alive, and removes requests that can no longer be repeated,
/// a few at a time so that acts do not wait.
async fn keep_house(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(PURGE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for tick in 0_u64.. {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.store.purge_requests(now(), PURGED_AT_ONCE).await {
            tracing::warn!(%error, "expired requests could not be removed");
            // Connections that break may lead to another database from now on.
            shared.compare.store(true, Ordering::Relaxed);
        }
        if tick.is_multiple_of(HEARTBEAT_TICKS) {
            shared.compare.store(true, Ordering::Relaxed);
        }
        let writer = shared.writer.lock().ok().and_then(|writer| *writer);
        if let Some(writer) = writer.filter(|_| tick.is_multiple_of(HEARTBEAT_TICKS))
            && let Err(error) = shared.store.heartbeat(writer).await
        {
            tracing::warn!(%error, "no heartbeat could be written");
        }
    }
}

/// Chains that one record closes.
const CLOSED_AT_ONCE: usize = 1_000;
/// How often the writer looks whether counted refusals are due.
const IDLE: Duration = Duration::from_secs(5);
const PURGE_EVERY: Duration = Duration::from_secs(1);
/// More than single grants come in a second.
const PURGED_AT_ONCE: u32 = 20_000;
/// Every how many purges the server says that it is alive.
const HEARTBEAT_TICKS: u64 = 10;
const MOST_ATTEMPTS: u32 = 5;
