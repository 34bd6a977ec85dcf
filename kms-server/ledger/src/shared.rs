//! What the [`super::Committer`], the writing task and the maintenance task share.

use std::{
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use arc_swap::ArcSwap;
use kms_domain::{ChunkSize, DatabaseHistory, IslandName, SealKeys, WriterId};
use kms_store::Store;
use tokio::sync::watch;

use super::{
    chain::AuditKeys,
    refusals::Outside,
    seen::Seen,
    watermark::{RestoreSettings, Watermark},
};
use kms_base::bounds::Limits;

/// How the committer works.
#[derive(Clone, Debug)]
pub struct CommitterSettings {
    /// The island.
    pub island: IslandName,
    /// The name of this server in the log.
    pub server: String,
    /// How many counters are reserved at once.
    pub chunk_size: ChunkSize,
    /// How many acts may wait, how much they may write, and how many counters they may reserve.
    pub limits: Arc<Limits>,
    /// How a restored database is noticed (I4).
    pub restore: RestoreSettings,
    /// SHA-256 of the policies and quotas of this run, from `kms_authz::Policy::digest`. None: this
    /// run decides on no request of a caller.
    pub policy_sha256: Option<[u8; 32]>,
    /// After how long a silence another server counts as gone, so that its chain is closed.
    pub silence: Duration,
}

impl CommitterSettings {
    /// Six heartbeats.
    pub const SILENCE: Duration = Duration::from_mins(1);
}

/// What the [`super::Committer`], the writing task and the maintenance task share.
pub(super) struct Shared {
    pub(super) seal: ArcSwap<SealKeys>,
    pub(super) audit_keys: ArcSwap<AuditKeys>,
    pub(super) seen: Seen,
    pub(super) settings: CommitterSettings,
    pub(super) store: Arc<dyn Store>,
    pub(super) ready: AtomicBool,
    /// The writer of the current chain.
    pub(super) writer: Mutex<Option<WriterId>>,
    /// The last record that is durable.
    pub(super) last_record: Mutex<Option<LastRecord>>,
    /// The database's history, as it was compared last. None before the first comparison.
    pub(super) history: watch::Sender<Option<DatabaseHistory>>,
    /// The server may be connected to another database than before: compare before the next act.
    pub(super) compare: AtomicBool,
    /// What the watermark file holds.
    pub(super) remembered: tokio::sync::Mutex<Option<Watermark>>,
    /// Refusals of calls that did not become an act.
    pub(super) outside: Outside,
    /// The server stops: its database may be closed at any moment.
    pub(super) stopping: AtomicBool,
}

/// The last durable record of this run of the server.
#[derive(Clone, Copy)]
pub(super) struct LastRecord {
    pub(super) writer: WriterId,
    pub(super) sequence: u64,
    /// The version of the audit key that links the next record.
    pub(super) next_key: u8,
}

impl Shared {
    pub(super) fn new(
        seal: SealKeys,
        audit_keys: AuditKeys,
        settings: CommitterSettings,
        store: Arc<dyn Store>,
    ) -> Self {
        Self {
            seal: ArcSwap::from_pointee(seal),
            audit_keys: ArcSwap::from_pointee(audit_keys),
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
        }
    }

    /// The writer of the current chain. None before the first record of this run.
    pub(super) fn writer(&self) -> Option<WriterId> {
        self.writer.lock().ok().and_then(|writer| *writer)
    }

    /// The last durable record of this run, if there is one.
    pub(super) fn last_record(&self) -> Option<LastRecord> {
        self.last_record.lock().ok().and_then(|last| *last)
    }

    /// The last durable record and the jump, once both are known.
    pub(super) fn watermark(&self) -> Option<Watermark> {
        let history = (*self.history.borrow())?;
        let LastRecord { writer, sequence, .. } = self.last_record()?;
        Some(Watermark { writer, sequence, jump: history.jump, oldest_seal_key: self.seal.load().oldest() })
    }

    /// Writes the watermark file, unless it has this content already. Only what is durable in the
    /// database is written, and by one task at a time.
    pub(super) async fn remember(self: &Arc<Self>) {
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
