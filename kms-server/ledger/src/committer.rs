//! The handle of the one writer of an island in this process. Acts are queued, decided in turn, and
//! committed together, each with its record (I2).
//!
//! One transaction serves many acts, because a sync of the disk costs more than an act. Between
//! read and commit nothing else changes the rows (the store's transaction), so an act changes
//! exactly what it has decided on (I4, I5).

use std::sync::{Arc, Mutex, PoisonError, atomic::Ordering};

use kms_domain::{
    Campaign, CampaignId, CounterDomain, CounterDomainId, DatabaseHistory, DeviceType, DeviceTypeId, Group, GroupId,
    Invitation, Island, Meter, Principal, PrincipalId, Proposal, ProposalId, RootId, RootRotation, SealKey, SealKeys,
    SystemTitle, WorkOrder, WorkOrderId, WriterId,
};
use kms_proto::v1::{AuditKeyChanged, audit_record::Event};
use kms_store::{Reads, SealedRow, Store};
use tokio::task::JoinHandle;
use tracing::Instrument as _;

use super::{
    actor::{Actor, ServerAct},
    chain::AuditKeys,
    decision::Decision,
    maintenance::maintain,
    queue::{ENDED, Sender, queue},
    queued::{Committed, TypedAct},
    refusals::Refusal,
    sealed::{RowContent, open_row},
    shared::{CommitterSettings, Shared},
    view::View,
    writer::Writer,
};
use kms_base::clock::now;
use kms_base::error::ServiceError;
use kms_base::metrics;

/// Queues acts. Cheap to clone.
#[derive(Clone)]
pub struct Committer {
    queue: Arc<Sender>,
    pub(super) shared: Arc<Shared>,
    /// The maintenance task, until [`Self::stop`] ends it.
    maintenance: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Committer {
    /// Starts the writing task. It begins its first chain with the first record.
    pub fn start(
        store: Arc<dyn Store>,
        seal: impl Into<SealKeys>,
        audit_keys: impl Into<AuditKeys>,
        settings: CommitterSettings,
    ) -> Self {
        let (queue, waiting) = queue(Arc::clone(&settings.limits));
        let shared = Arc::new(Shared::new(seal.into(), audit_keys.into(), settings, store));
        let maintenance = tokio::spawn(maintain(Arc::downgrade(&shared)));
        tokio::spawn(Writer::new(shared.clone()).run(waiting));
        Self { queue: Arc::new(queue), shared, maintenance: Arc::new(Mutex::new(Some(maintenance))) }
    }

    /// Runs an act of the server itself: reads `reads`, lets `decide` look and change, and commits
    /// the changes together with their records. When this returns, all of it is durable (I2).
    ///
    /// `decide` may be called several times: when it uses a row that was not read, and when the
    /// transaction of another server came in between. Only the last call counts.
    ///
    /// # Errors
    /// What `decide` returned (nothing is written then, but the refusal is recorded); or
    /// [`ServiceError::Unavailable`].
    pub async fn act<T, F>(&self, act: ServerAct, reads: Reads, decide: F) -> Result<Committed<T>, ServiceError>
    where
        T: Send + 'static,
        F: FnMut(&mut View<'_, '_>) -> Result<Decision<T>, ServiceError> + Send + 'static,
    {
        self.enqueue(Actor::server(act), reads, decide).await
    }

    /// As [`Self::act`], for any actor and without the door. The ending follows from what is
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

    /// Of how many rows this server remembers the generation (I5).
    #[doc(hidden)]
    pub fn rows_seen_in_test(&self) -> usize {
        self.shared.seen.count()
    }

    /// As [`Self::act`], for any actor. The acts of callers come through [`super::Door::act`].
    pub(super) async fn enqueue<T, F>(
        &self,
        actor: Actor,
        reads: Reads,
        decide: F,
    ) -> Result<Committed<T>, ServiceError>
    where
        T: Send + 'static,
        F: FnMut(&mut View<'_, '_>) -> Result<Decision<T>, ServiceError> + Send + 'static,
    {
        let (act, outcome) = TypedAct::new(actor, reads, decide);
        self.queue.push(act)?;
        let outcome =
            outcome.instrument(tracing::debug_span!("commit")).await.map_err(|_| ServiceError::unavailable(ENDED))?;
        // The refusal of an act is counted with its transaction.
        outcome.map_err(ServiceError::recorded)
    }

    /// Counts a refusal that is not part of an act: of a call that only reads, or that was refused
    /// before it became an act. It is written like the others: the first of a kind at once. It is
    /// kept while the database is away (I2). This neither waits nor fails.
    pub fn refused(&self, principal: Option<&PrincipalId>, action: &str, reason: String) {
        let principal = principal.map(ToString::to_string).unwrap_or_default();
        metrics().refused(1, 0);
        self.shared
            .outside
            .note(Refusal { principal, action: action.to_owned(), reason, security_event: false }, now());
    }

    /// Whether the last transaction was committed: what readiness reports.
    pub fn is_ready(&self) -> bool {
        self.shared.ready.load(Ordering::Relaxed)
    }

    /// Waits until the database was compared with what is known of its history. No counter is
    /// allocated before (I4). The log says what prevents the comparison.
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

    /// Writes the watermark file: the last record that is durable.
    pub async fn remember(&self) {
        self.shared.remember().await;
    }

    /// Writes the watermark file for the last time, and ends the maintenance task. To be called
    /// before the database is closed.
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

    /// Opens a meter's row that was read outside a transaction, to show it. It is verified all the
    /// same (I5).
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_meter(&self, title: SystemTitle, row: &SealedRow) -> Result<Arc<Meter>, ServiceError> {
        self.open(title, row)
    }

    /// Opens a principal's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_principal(&self, id: &PrincipalId, row: &SealedRow) -> Result<Arc<Principal>, ServiceError> {
        self.open(id.clone(), row)
    }

    /// Opens a group's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_group(&self, id: GroupId, row: &SealedRow) -> Result<Arc<Group>, ServiceError> {
        self.open(id, row)
    }

    /// Opens a device type's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_device_type(&self, id: DeviceTypeId, row: &SealedRow) -> Result<Arc<DeviceType>, ServiceError> {
        self.open(id, row)
    }

    /// Opens a counter domain's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_domain(&self, id: CounterDomainId, row: &SealedRow) -> Result<Arc<CounterDomain>, ServiceError> {
        self.open(id, row)
    }

    /// Opens a campaign's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_campaign(&self, id: CampaignId, row: &SealedRow) -> Result<Arc<Campaign>, ServiceError> {
        self.open(id, row)
    }

    /// Opens a proposal's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_proposal(&self, id: ProposalId, row: &SealedRow) -> Result<Arc<Proposal>, ServiceError> {
        self.open(id, row)
    }

    /// Opens a work order's row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_work_order(&self, id: &WorkOrderId, row: &SealedRow) -> Result<Arc<WorkOrder>, ServiceError> {
        self.open(id.clone(), row)
    }

    /// Opens the island's own row that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_island(&self, row: &SealedRow) -> Result<Arc<Island>, ServiceError> {
        self.open(self.shared.settings.island.clone(), row)
    }

    /// Opens the row of a rotation of a root that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_root_rotation(&self, to: RootId, row: &SealedRow) -> Result<Arc<RootRotation>, ServiceError> {
        self.open(to, row)
    }

    /// Opens the row of an invitation that was read outside a transaction.
    ///
    /// # Errors
    /// The row does not verify.
    pub fn open_invitation(&self, handheld: &PrincipalId, row: &SealedRow) -> Result<Arc<Invitation>, ServiceError> {
        self.open(handheld.clone(), row)
    }

    /// The current seal key, which seals rows.
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

    /// Uses these audit keys. A chain that begins from now on begins with the current one of them,
    /// and the present chain changes to it. The chain itself records that, in the last record under
    /// the earlier key and in the first under the new one.
    ///
    /// # Errors
    /// The records could not be written. The chain continues as before.
    pub async fn use_audit_keys(&self, keys: AuditKeys) -> Result<(), ServiceError> {
        let version = keys.current().version();
        self.shared.audit_keys.store(Arc::new(keys));
        if self.is_linked_with(version) {
            return Ok(());
        }
        let changed = AuditKeyChanged { version: version.into(), closed: Vec::new() };
        self.append_all(vec![changed.clone(), changed]).await
    }

    /// Whether the present chain, if there is one, continues with this version of the audit key.
    pub fn is_linked_with(&self, version: u8) -> bool {
        self.shared.last_record().is_none_or(|last| last.next_key == version)
    }

    /// Closes, on the record, the chains of all other writers that end with an audit key below
    /// version `oldest` and are still accepted. To be called before that key is retired. A server
    /// that is alive continues, and what it links afterwards is accepted.
    ///
    /// # Errors
    /// The database is away, or the record could not be written.
    pub async fn close_chains_below(&self, oldest: u8) -> Result<(), ServiceError> {
        let closed = self.shared.ends_below(oldest).await?;
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
            Ok(Decision::of(entry, ()))
        });
        act.await.map(drop)
    }

    /// The name under which this run of the server writes the log. None before its first record.
    pub fn writer(&self) -> Option<WriterId> {
        self.shared.writer()
    }

    fn open<T: RowContent>(&self, key: T::Key, row: &SealedRow) -> Result<Arc<T>, ServiceError> {
        let (shared, id) = (&self.shared, T::row(key));
        let opened =
            open_row(&id, Some(row), &shared.seal.load(), &shared.seen, &shared.settings.island).map_err(|reason| {
                tracing::error!(row = %id, reason, "a sealed row was refused");
                ServiceError::FailedPrecondition {
                    reason: format!("a sealed row was refused (I5): {reason}"),
                    next_step: "run `kms audit scrub` and call the security officers".to_owned(),
                }
            })?;
        opened
            .value
            .and_then(T::of)
            .ok_or_else(|| ServiceError::Internal(format!("the row of {id} holds content of another kind")))
    }
}

/// The most chains that one record closes.
const CLOSED_AT_ONCE: usize = 1_000;
