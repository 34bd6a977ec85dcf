//! A token: its state, its login, and the threads that use it.
//!
//! PKCS#11 sessions are blocking and used by one thread at a time. A *keeper* thread connects
//! (loads the module, finds the token by label, logs in, probes) and repairs; worker threads have a
//! session each and take jobs from one queue. Login is per token and ends with the last session, so
//! the keeper holds an *anchor* session, and nothing ever logs out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::error::RvError;
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki_sys::{CKO_PRIVATE_KEY, CKO_PUBLIC_KEY, CKU_USER};
use kms_domain::IslandName;
use tokio::sync::{oneshot, watch};

use crate::envelope::{AgreementCache, AgreementLimits, EnvelopeAlgorithm};
use crate::error::HsmError;
use crate::label::{Purpose, TokenKey};
use crate::metrics::Metrics;
use crate::module::{Module, TokenSelector};
use crate::pin::{Pin, PinMemory, PinSource};
use crate::probe::Capabilities;
use crate::queue::{Full, Payer, Queue, QueueLimits, Received};
use crate::raw::Session;
use crate::worker::{Worker, find_one};

/// Where a token is and how it is used.
#[derive(Clone, Debug)]
pub struct TokenSettings {
    /// Path of the PKCS#11 module.
    pub module: PathBuf,
    /// Which token of the module.
    pub selector: TokenSelector,
    /// Where the user PIN is read from.
    pub pin: PinSource,
    /// Worker threads; without a number, what was measured to be best for the module.
    pub workers: Option<usize>,
    /// Jobs that may wait; a job above is refused as overloaded. A batch is a job for each
    /// [`PART`](crate::PART) of it.
    pub queue: usize,
    /// Jobs of one payer that may wait ([`Hsm::paid_by`](crate::Hsm::paid_by)), so that none fills
    /// the queue alone.
    pub queue_of_one: usize,
    /// How long agreements are reused.
    pub agreements: AgreementLimits,
    /// Whether `ecdh-p256-cbc-expand` may be used where the module has no X9.63 KDF. Not for
    /// production.
    pub allow_cbc_expand: bool,
}

impl TokenSettings {
    /// The usual settings for a token of `module` with this label.
    pub fn new(module: PathBuf, label: String, pin: PinSource) -> Self {
        Self {
            module,
            selector: TokenSelector { label, serial: None },
            pin,
            workers: None,
            queue: 4096,
            queue_of_one: 1024,
            agreements: AgreementLimits::default(),
            allow_cbc_expand: false,
        }
    }
}

/// What the token is found to be.
#[derive(Clone, Debug)]
pub enum TokenState {
    /// It is being connected and probed for the first time.
    Probing,
    /// It answers, the user is logged in, and the essentials work.
    Usable(Arc<Capabilities>),
    /// It cannot be used; it is tried again with growing pauses.
    Unusable {
        /// What was found.
        reason: String,
        /// What the operator can do.
        next_step: String,
        /// Whether it can become usable without an operator.
        may_recover: bool,
    },
}

impl TokenState {
    /// Whether jobs are taken.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Usable(_))
    }
}

/// A token in use. Clones share it; the threads end when the last clone is dropped.
#[derive(Clone)]
pub struct Token(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Token {
    /// Starts to use a token. Returns at once: a dead HSM does not hold up the start, see
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
    /// It is found unusable in a way that needs an operator, or not usable within `limit`.
    pub async fn usable(&self, limit: Duration) -> Result<Arc<Capabilities>, HsmError> {
        let mut state = self.state();
        let settled =
            |state: &TokenState| !matches!(state, TokenState::Probing | TokenState::Unusable { may_recover: true, .. });
        // A time-out leaves the state as it is, and that is what the error below tells.
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

    /// What the last probe found, also where the token cannot be used for the lack of something.
    pub fn capabilities(&self) -> Option<Arc<Capabilities>> {
        lock(&self.0.shared.found).capabilities.clone()
    }

    /// Whether two handles are of one token.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Stops the threads, after the jobs that wait are done, and waits for their end. Blocking.
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

    /// Runs `work` for the server itself on a worker, measured under the name `job`. It runs a
    /// second time if the session was lost under it, so it must have no effect outside the HSM
    /// before it succeeds.
    pub(crate) async fn run<R: Send + 'static>(
        &self,
        job: &'static str,
        work: impl FnMut(&Worker) -> Result<R, HsmError> + Send + 'static,
    ) -> Result<R, HsmError> {
        self.submit(&None, 1, job, work)?.outcome().await
    }

    /// Puts `work` into the queue, as [`Self::run`] does, in its payer's lane: it waits for its
    /// turn by what it costs, in keys. Dropping what is given back takes the job out of turn when
    /// it comes to it.
    pub(crate) fn submit<R: Send + 'static>(
        &self,
        payer: &Payer,
        cost: usize,
        job: &'static str,
        work: impl FnMut(&Worker) -> Result<R, HsmError> + Send + 'static,
    ) -> Result<Pending<R>, HsmError> {
        let shared = &self.0.shared;
        if !shared.state.borrow().is_usable() {
            return Err(shared.not_usable());
        }
        let (reply, answer) = oneshot::channel();
        let task = Box::new(TaskOf { job, work, reply: Some(reply) });
        shared.metrics.queued();
        shared.queue.push(payer, u64::try_from(cost).unwrap_or(u64::MAX), task as Box<dyn Task>).map_err(|full| {
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
    /// What it came to.
    pub(crate) async fn outcome(self) -> Result<R, HsmError> {
        self.answer.await.unwrap_or_else(|_| Err(self.shared.unavailable("the worker gave up the job")))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The threads are not joined: a module that hangs must not hang its user too.
        self.shared.stop();
    }
}

struct Shared {
    settings: TokenSettings,
    island: IslandName,
    memory: Arc<dyn PinMemory>,
    queue: Queue<Box<dyn Task>>,
    metrics: Metrics,
    state: watch::Sender<TokenState>,
    found: Mutex<Found>,
    inner: Mutex<Inner>,
    wake: Condvar,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Inner {
    connection: Option<Connection>,
    /// Grows by one with every connection; what a session knows is worth nothing under another
    /// number.
    generation: u64,
    refused: Option<(String, Pin)>,
    /// What was probed, by serial number: a token that comes back is not probed again.
    probed: Option<(String, Arc<Capabilities>)>,
}

struct Connection {
    module: Arc<Module>,
    slot: Slot,
    anchor: Session,
    capabilities: Arc<Capabilities>,
}

impl Shared {
    /// The keeper thread.
    fn keep(self: Arc<Self>) {
        let mut workers: Vec<std::thread::JoinHandle<()>> = Vec::new();
        let mut pause = SHORTEST_PAUSE;
        let mut inner = lock(&self.inner);
        while !self.is_stopping() {
            let usable = self.check(&mut inner);
            if usable && workers.is_empty() {
                let count = self
                    .settings
                    .workers
                    .or_else(|| inner.connection.as_ref().map(|connection| connection.capabilities.best_workers))
                    .unwrap_or(1)
                    .max(1);
                self.queue.set_receivers(count);
                for number in 0..count {
                    let shared = Arc::clone(&self);
                    match spawn(&format!("hsm-worker-{number}"), move || shared.work()) {
                        Ok(worker) => workers.push(worker),
                        Err(error) => tracing::error!(%error, "no thread for an HSM worker"),
                    }
                }
            }
            pause = if usable { SHORTEST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            let wait = if usable { CHECK_EVERY } else { pause };
            if self.is_stopping() {
                break;
            }
            inner = self.wake.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(inner);
        self.queue.close();
        for worker in workers {
            if worker.join().is_err() {
                tracing::error!("an HSM worker panicked");
            }
        }
        // Without workers nobody takes what waits; dropping it answers it.
        while let Received::Item(task, _) = self.queue.pop(Duration::ZERO) {
            self.metrics.taken();
            task.fail(self.unavailable("the HSM token is being closed"));
        }
        if let Some(connection) = lock(&self.inner).connection.take() {
            connection.anchor.close();
        }
    }

    /// A worker thread.
    fn work(self: Arc<Self>) {
        let mut session: Option<(u64, Worker)> = None;
        loop {
            let (mut task, _turn) = match self.queue.pop(TIDY_EVERY) {
                Received::Item(task, turn) => {
                    self.metrics.taken();
                    (task, turn)
                }
                Received::Idle => {
                    if let Some((_, worker)) = &session {
                        worker.tidy();
                    }
                    continue;
                }
                Received::Closed => break,
            };
            let mut attempts = 0;
            loop {
                attempts += 1;
                if let Err(error) = self.ready(&mut session) {
                    task.fail(error);
                    break;
                }
                let Some((generation, worker)) = &session else { break };
                let (job, began) = (task.job(), Instant::now());
                let outcome = catch_unwind(AssertUnwindSafe(|| task.run(worker, attempts < ATTEMPTS)));
                self.metrics.done(job, began);
                let Ok(outcome) = outcome else {
                    // The task dropped its reply while unwinding. What it left in the session is
                    // unknown.
                    tracing::error!("a job of the HSM panicked");
                    if let Some((_, worker)) = session.take() {
                        worker.session.close();
                    }
                    break;
                };
                let Some(error) = outcome else { break };
                tracing::warn!(%error, token = self.settings.selector.label, "an HSM session was lost; opening it again");
                self.metrics.reopened();
                let generation = *generation;
                if let Some((_, worker)) = session.take() {
                    worker.session.abandon();
                }
                self.repair(generation, &error);
            }
        }
        if let Some((_, worker)) = session {
            worker.tidy();
            worker.session.close();
        }
    }

    /// Makes sure that the worker has a session of the present connection.
    fn ready(&self, session: &mut Option<(u64, Worker)>) -> Result<(), HsmError> {
        let inner = lock(&self.inner);
        let Some(connection) = &inner.connection else {
            drop(inner);
            return Err(self.not_usable());
        };
        if session.as_ref().is_some_and(|(generation, _)| *generation == inner.generation) {
            return Ok(());
        }
        if let Some((_, stale)) = session.take() {
            stale.session.abandon();
        }
        let opened = connection.module.open(connection.slot)?;
        let agreements = AgreementCache::new(self.settings.agreements, self.algorithm(&connection.capabilities));
        *session = Some((
            inner.generation,
            Worker::new(opened, self.island.clone(), Arc::clone(&connection.capabilities), agreements),
        ));
        Ok(())
    }

    /// After a lost session: finds out whether the login is lost too, and connects again if so.
    fn repair(&self, generation: u64, error: &HsmError) {
        let mut inner = lock(&self.inner);
        if inner.generation != generation || self.is_stopping() {
            return;
        }
        // Stale object handles alone (a token that was wiped or restored) show in a session that is
        // well: then a new session with nothing remembered is enough.
        if !self.check(&mut inner) {
            tracing::warn!(%error, token = self.settings.selector.label, "the HSM token is not usable");
        }
        drop(inner);
        self.wake.notify_all();
    }

    /// Whether the connection is well; connects if it is not. Publishes the state.
    fn check(&self, inner: &mut Inner) -> bool {
        if inner.connection.as_ref().is_some_and(|connection| connection.anchor.is_logged_in()) {
            return true;
        }
        if let Some(connection) = inner.connection.take() {
            connection.anchor.abandon();
        }
        match self.connect(inner) {
            Ok(connection) => {
                let capabilities = Arc::clone(&connection.capabilities);
                tracing::info!(
                    token = self.settings.selector.label,
                    module = connection.module.description(),
                    "the HSM token is usable"
                );
                inner.connection = Some(connection);
                inner.generation += 1;
                self.state.send_replace(TokenState::Usable(capabilities));
                true
            }
            Err(Refusal { reason, next_step, may_recover }) => {
                let changed =
                    !matches!(&*self.state.borrow(), TokenState::Unusable { reason: known, .. } if *known == reason);
                if changed {
                    tracing::error!(
                        token = self.settings.selector.label,
                        reason,
                        next_step,
                        "the HSM token is not usable"
                    );
                }
                self.state.send_replace(TokenState::Unusable { reason, next_step, may_recover });
                false
            }
        }
    }

    fn connect(&self, inner: &mut Inner) -> Result<Connection, Refusal> {
        let settings = &self.settings;
        let module = Module::load(&settings.module).map_err(Refusal::by_operator)?;
        let token = module.find(&settings.selector).map_err(Refusal::of)?.ok_or_else(|| Refusal {
            reason: format!(
                "no slot of `{}` has a token labelled `{}`",
                settings.module.display(),
                settings.selector.label
            ),
            next_step: "insert or connect the token, or correct the label; `kms hsm check` lists what is there"
                .to_owned(),
            may_recover: true,
        })?;
        let serial = token.info.serial_number().to_owned();
        lock(&self.found).serial = Some(serial.clone());
        let pin = self.permitted_pin(inner, &serial, &token.info)?;
        let anchor = module.open(token.slot).map_err(Refusal::of)?;
        if let Err(error) = anchor.login(CKU_USER, pin.octets()) {
            anchor.close();
            return Err(self.login_refused(inner, serial, pin, error));
        }
        let capabilities = match &inner.probed {
            Some((known, capabilities)) if *known == serial => Arc::clone(capabilities),
            _ => match self.capabilities(&module, token.slot) {
                Ok(capabilities) => capabilities,
                Err(refusal) => {
                    anchor.close();
                    return Err(refusal);
                }
            },
        };
        inner.probed = Some((serial, Arc::clone(&capabilities)));
        Ok(Connection { module, slot: token.slot, anchor, capabilities })
    }

    /// Reads the PIN, unless trying it could lock the token.
    fn permitted_pin(&self, inner: &Inner, serial: &str, info: &TokenInfo) -> Result<Pin, Refusal> {
        let refuse = |reason: &str, next_step: &str| Refusal {
            reason: reason.to_owned(),
            next_step: next_step.to_owned(),
            may_recover: false,
        };
        if !info.user_pin_initialized() {
            return Err(refuse("the token has no user PIN", "initialise the token with `kms-server init`"));
        }
        if info.user_pin_locked() {
            return Err(refuse(
                "the token's user PIN is locked",
                "unlock it as security officer with the HSM's own tool",
            ));
        }
        if info.user_pin_final_try() {
            return Err(refuse(
                "one more wrong PIN would lock the token (CKF_USER_PIN_FINAL_TRY), so none is tried",
                "log in once by hand with the right PIN, which resets the token's counter",
            ));
        }
        let pin = self.settings.pin.read().map_err(|reason| refuse(&reason, "correct the PIN's source"))?;
        let refused_here = inner
            .refused
            .as_ref()
            .is_some_and(|(refused_serial, refused)| refused_serial == serial && refused.is_same(&pin));
        if refused_here || self.memory.was_refused(serial, &pin) {
            return Err(pin_was_refused(&self.settings.pin));
        }
        Ok(pin)
    }

    fn login_refused(&self, inner: &mut Inner, serial: String, pin: Pin, error: HsmError) -> Refusal {
        match error.code() {
            // One attempt, then never again with this PIN: not by this process, not by the next,
            // not by another server.
            Some(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange) => {
                self.memory.remember_refused(&serial, &pin);
                inner.refused = Some((serial, pin));
                pin_was_refused(&self.settings.pin)
            }
            _ => Refusal::of(error),
        }
    }

    fn capabilities(&self, module: &Module, slot: Slot) -> Result<Arc<Capabilities>, Refusal> {
        let mechanisms = module.mechanisms(slot).map_err(Refusal::of)?;
        // A session of its own: some modules leave objects behind when they refuse a template, and
        // they end with the session.
        let session = module.open(slot).map_err(Refusal::of)?;
        let label = TokenKey::first(Purpose::VendorTransport).label(&self.island);
        // Making an RSA key to probe with takes seconds on some HSMs, so the island's own is used
        // where there is one.
        let transport = match (find_one(&session, &label, CKO_PUBLIC_KEY), find_one(&session, &label, CKO_PRIVATE_KEY))
        {
            (Ok(public), Ok(private)) => Some((public, private)),
            _ => None,
        };
        let capabilities =
            Arc::new(Capabilities::probe(&session, module.description(), &mechanisms, transport).map_err(Refusal::of)?);
        session.close();
        lock(&self.found).capabilities = Some(Arc::clone(&capabilities));
        let missing = capabilities.missing_essentials(self.settings.allow_cbc_expand);
        if !missing.is_empty() {
            return Err(Refusal {
                reason: format!("the module cannot do what is essential: {}", missing.join("; ")),
                next_step: "use another module or firmware; `kms hsm check` prints the whole table".to_owned(),
                may_recover: false,
            });
        }
        Ok(capabilities)
    }

    fn algorithm(&self, capabilities: &Capabilities) -> Option<EnvelopeAlgorithm> {
        capabilities.envelope_algorithm(self.settings.allow_cbc_expand)
    }

    fn not_usable(&self) -> HsmError {
        let token = self.settings.selector.label.clone();
        match &*self.state.borrow() {
            TokenState::Unusable { reason, next_step, may_recover: false } => {
                HsmError::Unusable { token, reason: reason.clone(), next_step: next_step.clone() }
            }
            TokenState::Unusable { reason, next_step, may_recover: true } => HsmError::Unavailable {
                token,
                reason: format!("{reason}; {next_step}"),
                retry_after: Duration::from_secs(1),
            },
            TokenState::Probing => self.unavailable("it is being probed"),
            TokenState::Usable(_) => self.unavailable("its session is being opened again"),
        }
    }

    fn unavailable(&self, reason: &str) -> HsmError {
        HsmError::Unavailable {
            token: self.settings.selector.label.clone(),
            reason: reason.to_owned(),
            retry_after: Duration::from_secs(1),
        }
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Not waited for: the keeper may hold the lock in a module that hangs. It looks at the flag
        // before it waits again.
        if let Ok(_inner) = self.inner.try_lock() {
            self.wake.notify_all();
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// What is known of the token apart from whether it can be used. Never locked during a call of the
/// module.
#[derive(Default)]
struct Found {
    serial: Option<String>,
    capabilities: Option<Arc<Capabilities>>,
}

/// Why a token cannot be connected.
struct Refusal {
    reason: String,
    next_step: String,
    may_recover: bool,
}

impl Refusal {
    fn of(error: HsmError) -> Self {
        let may_recover = error.kind() == crate::error::ErrorKind::Transient;
        Self {
            reason: error.to_string(),
            next_step: "look at the HSM's own log; `kms hsm check` tries again".to_owned(),
            may_recover,
        }
    }

    fn by_operator(error: HsmError) -> Self {
        Self {
            reason: error.to_string(),
            next_step: "correct the module's path or its own configuration".to_owned(),
            may_recover: false,
        }
    }
}

fn pin_was_refused(source: &PinSource) -> Refusal {
    Refusal {
        reason: "the token refused the user PIN; it is not tried again, because a few wrong PINs lock a token"
            .to_owned(),
        next_step: format!(
            "put the right PIN into {source}; a changed PIN is tried by itself (a changed environment needs a restart)"
        ),
        may_recover: false,
    }
}

/// A job in the queue.
trait Task: Send {
    /// What it is, for the metrics.
    fn job(&self) -> &'static str;

    /// Runs it. Gives back the error, and keeps the caller waiting, if the session was lost and
    /// `may_retry`.
    fn run(&mut self, worker: &Worker, may_retry: bool) -> Option<HsmError>;

    /// Answers it with an error.
    fn fail(self: Box<Self>, error: HsmError);
}

struct TaskOf<F, R> {
    job: &'static str,
    work: F,
    reply: Option<oneshot::Sender<Result<R, HsmError>>>,
}

impl<R: Send, F: FnMut(&Worker) -> Result<R, HsmError> + Send> Task for TaskOf<F, R> {
    fn job(&self) -> &'static str {
        self.job
    }

    fn run(&mut self, worker: &Worker, may_retry: bool) -> Option<HsmError> {
        // Nobody waits any more: the call was cancelled.
        if self.reply.as_ref().is_none_or(oneshot::Sender::is_closed) {
            return None;
        }
        let result = (self.work)(worker);
        match result {
            Err(error) if may_retry && error.needs_repair() => Some(error),
            result => {
                let lost = result.as_ref().err().filter(|error| error.needs_repair()).cloned();
                if let Some(reply) = self.reply.take() {
                    // The receiver may have gone meanwhile; then nobody wants the answer.
                    drop(reply.send(result));
                }
                lost
            }
        }
    }

    fn fail(mut self: Box<Self>, error: HsmError) {
        if let Some(reply) = self.reply.take() {
            drop(reply.send(Err(error)));
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, HsmError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| HsmError::Module {
        module: name.to_owned(),
        reason: format!("the operating system gives no thread: {error}"),
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A job runs at most twice.
const ATTEMPTS: u32 = 2;
/// Pauses between attempts to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// A usable token is looked at this often, so that a lost one is reported without a call.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// An idle worker destroys agreements that have run out.
const TIDY_EVERY: Duration = Duration::from_secs(5);
