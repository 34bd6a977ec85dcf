//! A token in use: what the verbs call. The threads that work for it are in `keeper`.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kms_domain::IslandName;
use tokio::sync::{oneshot, watch};

use crate::capabilities::Capabilities;
use crate::error::HsmError;
use crate::job::{Job, JobOf};
use crate::keeper::{Shared, lock, spawn};
use crate::metrics::Metrics;
use crate::pin::PinMemory;
use crate::queue::{Full, Payer, Queue, QueueLimits};
use crate::token_settings::{TokenSettings, TokenState};
use crate::worker::Worker;

/// A token in use. Clones share it; the threads end when the last clone is dropped.
#[derive(Clone)]
pub struct Token(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Token {
    /// Starts to use a token. Returns at once: a dead HSM does not delay the start, see
    /// [`Token::state`].
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn start(settings: TokenSettings, island: IslandName, memory: Arc<dyn PinMemory>) -> Result<Self, HsmError> {
        let (state, _) = watch::channel(TokenState::Probing);
        let queue = Queue::new(QueueLimits { all: settings.queue, of_one: settings.queue_of_one });
        let metrics = Metrics::of(&settings.selector.label);
        let shared = Arc::new(Shared {
            settings,
            island,
            memory,
            queue,
            metrics,
            state,
            inner: Mutex::default(),
            found: Mutex::default(),
            wake: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        let handle = Handle { shared: Arc::clone(&shared), threads: Mutex::default() };
        let keeper = spawn("hsm-keeper", move || shared.keep())?;
        lock(&handle.threads).push(keeper);
        Ok(Self(Arc::new(handle)))
    }

    /// The state, and a way to wait for its changes.
    pub fn state(&self) -> watch::Receiver<TokenState> {
        self.0.shared.state.subscribe()
    }

    /// Waits until the token is usable.
    ///
    /// # Errors
    /// The token needs an operator, or is not usable within `limit`.
    pub async fn usable(&self, limit: Duration) -> Result<Arc<Capabilities>, HsmError> {
        let mut state = self.state();
        let settled =
            |state: &TokenState| !matches!(state, TokenState::Probing | TokenState::Unusable { may_recover: true, .. });
        // After a time-out the error below tells the state.
        let waited = tokio::time::timeout(limit, state.wait_for(settled)).await;
        if let Ok(Ok(found)) = &waited
            && let TokenState::Usable(capabilities) = &**found
        {
            return Ok(Arc::clone(capabilities));
        }
        drop(waited);
        Err(self.0.shared.not_usable())
    }

    /// The label of the token.
    pub fn label(&self) -> &str {
        &self.0.shared.settings.selector.label
    }

    /// The serial number of the token, once it was found in its module.
    pub fn serial(&self) -> Option<String> {
        lock(&self.0.shared.found).serial.clone()
    }

    /// What the last probe found, also if the token cannot be used.
    pub fn capabilities(&self) -> Option<Arc<Capabilities>> {
        lock(&self.0.shared.found).capabilities.clone()
    }

    /// Whether both are handles of one token.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Stops the threads after they have done the jobs that wait, and waits for their end.
    /// Blocking.
    pub fn close(&self) {
        self.0.shared.stop();
        drop(lock(&self.0.shared.inner));
        self.0.shared.wake.notify_all();
        loop {
            let Some(thread) = lock(&self.0.threads).pop() else { break };
            if thread.join().is_err() {
                tracing::error!(token = self.label(), "a thread of the HSM token panicked");
            }
        }
    }

    /// Runs `work` for the server itself on a worker, measured under this name. `work` runs a
    /// second time if the session is lost meanwhile, so it must have no effect outside the HSM
    /// before it succeeds.
    pub(crate) async fn run<R: Send + 'static>(
        &self,
        name: &'static str,
        work: impl FnMut(&Worker) -> Result<R, HsmError> + Send + 'static,
    ) -> Result<R, HsmError> {
        self.submit(&None, 1, name, work)?.outcome().await
    }

    /// Puts `work` into its payer's lane of the queue. Its cost is its number of keys; payers are
    /// served in turn by cost. If the returned value is dropped, the job is skipped.
    pub(crate) fn submit<R: Send + 'static>(
        &self,
        payer: &Payer,
        cost: usize,
        name: &'static str,
        work: impl FnMut(&Worker) -> Result<R, HsmError> + Send + 'static,
    ) -> Result<Pending<R>, HsmError> {
        let shared = &self.0.shared;
        if !shared.state.borrow().is_usable() {
            return Err(shared.not_usable());
        }
        let (reply, answer) = oneshot::channel();
        let job = Box::new(JobOf { name, work, reply: Some(reply) });
        shared.metrics.queued();
        shared.queue.push(payer, u64::try_from(cost).unwrap_or(u64::MAX), job as Box<dyn Job>).map_err(|full| {
            shared.metrics.taken();
            let (token, retry_after) = (shared.settings.selector.label.clone(), Duration::from_millis(200));
            match full {
                Full::All(limit) => HsmError::Overloaded { token, limit, retry_after },
                Full::OfOne(limit) => HsmError::TooManyOfOne { token, limit, retry_after },
            }
        })?;
        Ok(Pending { answer, shared: Arc::clone(shared) })
    }
}

/// A job that waits or runs.
pub(crate) struct Pending<R> {
    answer: oneshot::Receiver<Result<R, HsmError>>,
    shared: Arc<Shared>,
}

impl<R> Pending<R> {
    /// The result of the job.
    pub(crate) async fn outcome(self) -> Result<R, HsmError> {
        self.answer.await.unwrap_or_else(|_| Err(self.shared.unavailable("the worker ended before the job was done")))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The threads are not joined: a module that hangs must not hang its user too.
        self.shared.stop();
    }
}
