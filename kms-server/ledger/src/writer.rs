//! The writing task: it takes acts from the queue, has them decided in turn, and commits them
//! together.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use kms_domain::{CounterJump, DatabaseHistory, RowId};
use kms_store::{Committed as StoreCommitted, Decision as StoreDecision, ReadSet, Reads, RowName, StoreError};

use super::{
    actor::{Actor, ServerAct},
    chain::{AuditLeaf, ChainHead},
    chunks::Chunks,
    clock_watch::ClockWatch,
    draft::TransactionDraft,
    growth::Growth,
    history::Comparison,
    queue::Receiver,
    queued::{Queued, TypedAct},
    refusals::Refusals,
    sealed::{Value, open_row, sealed_name},
    shared::{LastRecord, Shared},
    transaction::{Decided, decide_all, finish},
    view::View,
    watermark::Watermark,
};
use kms_base::Repetition;
use kms_base::clock::now;
use kms_base::error::ServiceError;
use kms_base::metrics;

/// The state of the writing task.
pub(super) struct Writer {
    shared: Arc<Shared>,
    /// `None`: the next transaction opens a chain of a new writer.
    head: Option<ChainHead>,
    chunks: Chunks,
    refusals: Refusals,
    growth: Growth,
    /// What this server remembers outside the database. Read from the file at the first comparison.
    watermark: Option<Watermark>,
    /// An operator has said that the database was restored, and this was not executed yet.
    declared: bool,
    failures: Repetition,
    clock: ClockWatch,
}

/// Makes the server not ready when the writing task ends, for whatever reason: nothing can be
/// recorded from then on (I2).
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

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let declared = shared.settings.restore.declared;
        let (chunks, refusals, failures) = (Chunks::default(), Refusals::default(), Repetition::default());
        let (growth, clock) = (Growth::default(), ClockWatch::new(now(), Instant::now()));
        Self { shared, head: None, chunks, refusals, growth, watermark: None, declared, failures, clock }
    }

    pub(super) async fn run(mut self, waiting: Receiver) {
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
                    // Refusals that could not be written are kept until the next acts or tick.
                    break;
                }
            }
        }
    }

    /// Commits acts together, and answers them. True: the transaction was committed.
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
            match self.try_transaction(&mut acts).await {
                // Another server has meanwhile inserted a row that was absent: read again.
                Err(StoreError::Conflict { .. }) if attempts < MOST_ATTEMPTS => {}
                other => break other,
            }
        };
        metrics().committed(acts.len(), began, outcome.is_ok());
        match outcome {
            Ok(outcomes) => {
                self.shared.ready.store(true, Ordering::Relaxed);
                finish_all(acts, outcomes);
                true
            }
            Err(StoreError::Conflict { .. }) if acts.len() > 1 => {
                // Nothing was written. One act is in conflict, and must not fail the others.
                let mut committed = true;
                for act in acts {
                    committed &= Box::pin(self.commit(vec![act])).await;
                }
                committed
            }
            Err(error) => {
                // The acts are answered all the same. This server itself may have closed the
                // database.
                if !self.shared.stopping.load(Ordering::Relaxed) {
                    tracing::error!(%error, "a transaction failed");
                }
                if !matches!(&error, StoreError::Conflict { row } if !matches!(row, RowName::Audit(..))) {
                    // It may be unknown whether the transaction is durable. I4: nothing that it
                    // reserved is allocated. A new writer reads where the chain ended, and begins
                    // the next chain.
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

    /// Compares the database with what is known of its history, if that is due, and raises the
    /// counters of a restored database (I4).
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
                // Not worth a line if this server itself has closed the database.
                if !self.shared.stopping.load(Ordering::Relaxed) && self.failures.is_news(&error.to_string()) {
                    tracing::error!(%error, "the database's history cannot be compared, so no counter is allocated (I4); the server tries again");
                }
                self.shared.ready.store(false, Ordering::Relaxed);
                Err(error)
            }
        }
    }

    /// True: there was a row of the island to compare with. The ceremony writes that row last.
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
            reasons.push("an operator declared it restored".to_owned());
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

    /// Writes the result of a comparison, as an act of its own before all others.
    async fn settle(&mut self, comparison: Comparison) -> Result<DatabaseHistory, ServiceError> {
        let name = self.shared.settings.island.clone();
        let reads = Reads { sealed: vec![sealed_name(&RowId::Island(name.clone()))], ..Reads::default() };
        let decide = move |view: &mut View<'_, '_>| comparison.settle(view, &name);
        let (act, outcome) = TypedAct::new(Actor::server(ServerAct::RESTORE), reads, decide);
        let mut acts: Vec<Box<dyn Queued>> = vec![act];
        let attempted = self.try_transaction(&mut acts).await;
        // I4: nothing is allocated any more of what was reserved before. After an error it is not
        // known what is durable.
        self.chunks = Chunks::default();
        if attempted.is_err() {
            self.head = None;
        }
        finish_all(acts, attempted?);
        let committed = outcome
            .await
            .map_err(|_| ServiceError::Internal("the act of a comparison has no outcome".to_owned()))??;
        Ok(committed.value)
    }

    /// Makes one attempt at a transaction of these acts.
    async fn try_transaction(&mut self, acts: &mut [Box<dyn Queued>]) -> Result<ActOutcomes, StoreError> {
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
        // Before all others, whose times are by the present clock.
        opening.extend(self.clock.news());
        let mut reads = Reads::default();
        for act in acts.iter() {
            reads.extend(act.reads());
        }
        let actors: Vec<Actor> = acts.iter().map(|act| act.actor()).collect();
        let seal = shared.seal.load_full();
        let at = Instant::now();
        let mut decided = None;
        let (chunks, refusals, growth) = (&mut self.chunks, &self.refusals, &self.growth);
        let bound = shared.settings.limits.log_octets_per_principal_and_hour;
        let mut decide = |read: &ReadSet| {
            let mut draft = TransactionDraft::new(read, now, head.writer, &shared, &seal, chunks);
            let outcomes =
                decide_all(acts, &actors, &mut draft, |actor| growth.permit(actor, &shared.settings.limits, at));
            if !draft.missing.is_empty() {
                return StoreDecision::More(Box::new(draft.missing));
            }
            let (decision, result) = finish(
                draft,
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
            decided = Some(result);
            decision
        };
        let committed = shared.store.transact(reads, &mut decide).await?;
        let Some(Decided { head, outcomes, leaves, fresh_chunks, written, refusals, refused, grown }) = decided else {
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
                // The watermark names the new chain at once, in case its records are lost.
                shared.remember().await;
            }
            for (id, generation) in &written {
                self.shared.seen.note(id, *generation);
            }
            metrics().chunks_reserved(fresh_chunks.len());
            self.growth.written(grown, at);
            // I4: the server allocates from a chunk only once its reservation is durable. What was
            // allocated within the transaction leaves with it.
            self.chunks.extend(fresh_chunks);
            if let Some(mut refusals) = refusals {
                refusals.written(at);
                self.refusals = refusals;
            }
        } else if let Some(refusals) = refusals {
            self.refusals = refusals;
        }
        Ok(ActOutcomes { outcomes, leaves })
    }
}

/// How each act of a transaction ended, and the leaves of its records.
struct ActOutcomes {
    outcomes: Vec<Result<(), ServiceError>>,
    leaves: Vec<Vec<AuditLeaf>>,
}

fn finish_all(acts: Vec<Box<dyn Queued>>, ActOutcomes { outcomes, leaves }: ActOutcomes) {
    for ((act, outcome), leaves) in acts.into_iter().zip(outcomes).zip(leaves) {
        act.finish(outcome.map(|()| leaves));
    }
}

/// How often the writer checks whether counted refusals are due.
const IDLE: Duration = Duration::from_secs(5);
const MOST_ATTEMPTS: u32 = 5;
