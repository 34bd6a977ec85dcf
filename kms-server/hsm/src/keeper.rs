//! The threads of a token. A *keeper* thread connects (loads the module, finds the token by label,
//! logs in, probes) and repairs; worker threads have a session each and take jobs from one queue.
//!
//! A login is per token and ends with the last session. Therefore the keeper holds an *anchor*
//! session, and nothing ever logs out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::error::RvError;
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki_sys::{CKO_PRIVATE_KEY, CKO_PUBLIC_KEY, CKU_USER};
use kms_domain::IslandName;
use tokio::sync::watch;

use crate::agreement::{AgreementCache, EnvelopeAlgorithm};
use crate::capabilities::Capabilities;
use crate::error::{ErrorKind, HsmError};
use crate::job::Job;
use crate::label::{Purpose, TokenKey};
use crate::metrics::Metrics;
use crate::module::Module;
use crate::pin::{Pin, PinMemory, PinSource};
use crate::probe::probe;
use crate::queue::{Queue, Received};
use crate::raw::Session;
use crate::token_settings::{TokenSettings, TokenState};
use crate::worker::{Worker, find_one};

/// What the handle, the keeper thread and the worker threads of one token share.
pub(crate) struct Shared {
    pub(crate) settings: TokenSettings,
    pub(crate) island: IslandName,
    pub(crate) memory: Arc<dyn PinMemory>,
    pub(crate) queue: Queue<Box<dyn Job>>,
    pub(crate) metrics: Metrics,
    pub(crate) state: watch::Sender<TokenState>,
    pub(crate) found: Mutex<Found>,
    pub(crate) inner: Mutex<Inner>,
    pub(crate) wake: Condvar,
    pub(crate) stopping: AtomicBool,
}

/// What the keeper knows of the connection.
#[derive(Default)]
pub(crate) struct Inner {
    connection: Option<Connection>,
    /// Grows by one with every connection. What a session knows is invalid under another number.
    generation: u64,
    refused: Option<(String, Pin)>,
    /// The last probe, by serial number: a token that comes back is not probed again.
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
    pub(crate) fn keep(self: Arc<Self>) {
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
        // Without workers the jobs that wait are never taken: each is answered with an error.
        while let Received::Item(job, _) = self.queue.pop(Duration::ZERO) {
            self.metrics.taken();
            job.fail(self.unavailable("the HSM token is being closed"));
        }
        if let Some(connection) = lock(&self.inner).connection.take() {
            connection.anchor.close();
        }
    }

    /// A worker thread.
    fn work(self: Arc<Self>) {
        let mut session: Option<(u64, Worker)> = None;
        loop {
            let (mut job, _turn) = match self.queue.pop(TIDY_EVERY) {
                Received::Item(job, turn) => {
                    self.metrics.taken();
                    (job, turn)
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
                    job.fail(error);
                    break;
                }
                let Some((generation, worker)) = &session else { break };
                let (name, began) = (job.name(), Instant::now());
                let outcome = catch_unwind(AssertUnwindSafe(|| job.run(worker, attempts < ATTEMPTS)));
                self.metrics.done(name, began);
                let Ok(outcome) = outcome else {
                    // The job dropped its reply while unwinding. The state of the session is
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

    /// Gives the worker a session of the present connection, if it has none.
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

    /// Repairs after a lost session: connects again if the login is lost, too.
    fn repair(&self, generation: u64, error: &HsmError) {
        let mut inner = lock(&self.inner);
        if inner.generation != generation || self.is_stopping() {
            return;
        }
        // If only object handles are stale (the token was wiped or restored), the login is still
        // good. Then a new session, which knows no handles, is enough.
        if !self.check(&mut inner) {
            tracing::warn!(%error, token = self.settings.selector.label, "the HSM token is not usable");
        }
        drop(inner);
        self.wake.notify_all();
    }

    /// Whether the connection works; connects if it does not. Publishes the state.
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
            // A PIN is tried once, and never again after a refusal: not by this process, the next
            // one, or another server.
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
        // The probe has a session of its own. Some modules leave objects behind when they refuse a
        // template; these end with the session.
        let session = module.open(slot).map_err(Refusal::of)?;
        let label = TokenKey::first(Purpose::VendorTransport).label(&self.island);
        // To make an RSA key for the probe takes seconds on some HSMs. So the probe uses the
        // island's own, if there is one.
        let transport = match (find_one(&session, &label, CKO_PUBLIC_KEY), find_one(&session, &label, CKO_PRIVATE_KEY))
        {
            (Ok(public), Ok(private)) => Some((public, private)),
            _ => None,
        };
        let capabilities =
            Arc::new(probe(&session, module.description(), &mechanisms, transport).map_err(Refusal::of)?);
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

    pub(crate) fn not_usable(&self) -> HsmError {
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

    pub(crate) fn unavailable(&self, reason: &str) -> HsmError {
        HsmError::Unavailable {
            token: self.settings.selector.label.clone(),
            reason: reason.to_owned(),
            retry_after: Duration::from_secs(1),
        }
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // This does not wait for the lock: the keeper may hold it in a module that hangs. The
        // keeper looks at the flag before it waits again.
        if let Ok(_inner) = self.inner.try_lock() {
            self.wake.notify_all();
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// What is known of the token, whether it can be used or not. Never locked during a call of the
/// module.
#[derive(Default)]
pub(crate) struct Found {
    pub(crate) serial: Option<String>,
    pub(crate) capabilities: Option<Arc<Capabilities>>,
}

/// Why a token cannot be connected.
struct Refusal {
    reason: String,
    next_step: String,
    may_recover: bool,
}

impl Refusal {
    fn of(error: HsmError) -> Self {
        let may_recover = error.kind() == ErrorKind::Transient;
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

/// Starts a thread.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, HsmError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| HsmError::Module {
        module: name.to_owned(),
        reason: format!("the operating system gives no thread: {error}"),
    })
}

/// Locks, also after a thread has panicked with the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
