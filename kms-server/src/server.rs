//! A server of one island (I7: a process each): opens database, tokens and island, and serves them.
//!
//! Start-up does not wait for a dead HSM or database: the port is open, health says NOT_SERVING,
//! and calls answer UNAVAILABLE until the island is open. A fault that only an operator can
//! correct, such as a wrong island or a forged row, ends the server.

use async_recursion::async_recursion as boxed;
use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use kms_domain::{ChunkSize, DatabaseHistory, IslandKind, IslandName, KeyClass};
use kms_hsm::{Hsm, HsmError, KeyFingerprint};
use kms_store::{Store, StoreError};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::Service;
use tracing::Instrument as _;

use crate::descriptors;
use crate::pin_memory::StoredPinMemory;
use kms_api as api;
use kms_api::enrolment_door::EnrolmentDoor;
use kms_api::enrolments::ServerAddress;
use kms_api::intake::Intake;
use kms_api::listener::{Listener, TransportLimits};
use kms_api::telemetry::Call;
use kms_api::tls::{ServerTls, TlsError};
use kms_authz::Policy;
use kms_base::Repetition;
use kms_base::error::ServiceError;
use kms_base::metrics;
use kms_config::{Config, ConfigError, EnrolmentSection};
use kms_ledger::{Committer, CommitterSettings, Door, RestoreSettings};
use kms_policy::PolicyError;
use kms_service::campaign::CampaignService;
use kms_service::certificate::CertificateAuthority;
use kms_service::certificate::signing::IssuedCertificate;
use kms_service::certificate_end::{CertificateWatch, ServerCertificate};
use kms_service::island::IslandContext;
use kms_service::island_keys::{IslandKeys, IslandKeysError};
use kms_service::officers::Recertification;
use kms_service::owner::OwnerService;
use kms_service::profiles::Profiles;
use kms_service::retention::RetentionPass;
use kms_service::root::make::{self, MadeRoot, MakeRootError, NewRootSettings};
use kms_service::root::{RootService, learn_seal_keys};
use kms_service::scrub::Scrubber;
use kms_service::scrub_flight::ScrubFlight;
use kms_service::shipment::ShipmentService;

/// A server that is bound to its port. Its island is opened when it serves.
pub struct Server {
    config: Config,
    listener: Listener,
    enrolment: Option<EnrolmentDoor>,
    tls: Arc<ServerTls>,
    authority: CertificateAuthority,
    policy: Policy,
    profiles: Profiles,
    opened: watch::Sender<Option<Arc<IslandContext>>>,
}

impl Server {
    /// Reads all files of the configuration and binds the port. Wrong policies and certificates are
    /// refused here, before anything is served.
    ///
    /// # Errors
    /// A file cannot be read or used; the error names it.
    #[boxed]
    pub async fn start(mut config: Config) -> Result<Self, ServerError> {
        let strangers = config.enrolment.as_ref().map_or(0, |_| config.limits.enrolment_connections);
        config.limits = descriptors::fit(&config.limits, strangers).map_err(ServerError::Descriptors)?;
        let policy = kms_policy::load(config.policies.directory.as_deref())?;
        let profiles = Profiles::load(config.device_profiles.directory.as_deref()).map_err(ServerError::Profiles)?;
        let authority = read_authority(&config)?;
        let tls = Arc::new(ServerTls::load(config.tls.clone().into())?);
        let listener = Listener::bind(config.listen, Arc::clone(&tls), &config.limits)
            .await
            .map_err(|error| ServerError::Bind { address: config.listen, reason: error.to_string() })?;
        let enrolment = match &config.enrolment {
            Some(section) => Some(
                EnrolmentDoor::bind(section.listen, Arc::clone(&tls), &config.limits)
                    .await
                    .map_err(|error| ServerError::Bind { address: section.listen, reason: error.to_string() })?,
            ),
            None => None,
        };
        tracing::info!(policies = %hex::encode(policy.digest()), "policies loaded");
        Ok(Self { config, listener, enrolment, tls, authority, policy, profiles, opened: watch::Sender::new(None) })
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The address of the enrolment door that is bound; `None`: there is none.
    pub fn enrolment_addr(&self) -> Option<SocketAddr> {
        self.enrolment.as_ref().and_then(|door| door.local_addr().ok())
    }

    /// A watch that gets the island when it is open.
    pub fn opened(&self) -> watch::Receiver<Option<Arc<IslandContext>>> {
        self.opened.subscribe()
    }

    /// Serves until `shutdown`. Calls under way are then answered, for up to ten seconds.
    ///
    /// # Errors
    /// A fault that only an operator can correct.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServerError> {
        self.serve_until(Box::pin(shutdown)).await
    }

    #[boxed]
    async fn serve_until(self, shutdown: Pin<Box<dyn Future<Output = ()> + Send>>) -> Result<(), ServerError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(kms_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|error| ServerError::Transport(error.to_string()))?;
        let intake = Intake::new(Arc::new(self.config.limits.clone()));
        let gate = Gate {
            always: Routes::new(health_service).add_service(reflection).prepare(),
            island: Arc::new(OnceLock::new()),
            intake,
        };
        health.set_service_status("", ServingStatus::NotServing).await;

        let limits = TransportLimits::of(&self.config.limits);
        let Self { config, listener, enrolment, tls, authority, policy, profiles, opened } = self;
        let ordinary = listener.local_addr().map_or(config.listen.port(), |address| address.port());
        let devices = enrolment.as_ref().map(|door| (door.gate(), address_for_devices(&config, ordinary)));
        let scrub_period = config.scrub_hours.period();
        let retention = config.retention.days;
        let own = ServerCertificate {
            certificate: config.tls.certificate.clone(),
            private_key: config.tls.private_key.clone(),
            days: config.limits.server_days(),
        };
        let watched = authority.clone();
        let (stop, stopping) = watch::channel(false);
        let stopped = async move |mut stopping: watch::Receiver<bool>| drop(stopping.wait_for(|stop| *stop).await);
        let signal = stopped(stopping.clone());
        let end_of_enrolment = Box::pin(stopped(stopping.clone()));
        let enrolling = async {
            match enrolment {
                Some(door) => door.serve(end_of_enrolment).await,
                None => {
                    end_of_enrolment.await;
                    Ok(())
                }
            }
        };
        let serving = limits.server().serve_with_incoming_shutdown(gate.clone(), listener.incoming(), signal);
        let island = Opening { config, authority, policy, profiles };
        let background = Background::default();
        let open = async {
            let island = island.until_open(&gate).await?;
            // I5: the scrubber finds within this time what is not refused on use.
            background.add(Scrubber::new(Arc::clone(&island)).in_background(scrub_period));
            background.add(RetentionPass::new(Arc::clone(&island), retention).in_background());
            background.add(CampaignService::new(Arc::clone(&island)).in_background(LEADING_INTERVAL));
            background.add(OwnerService::new(Arc::clone(&island)).in_background(FOLLOWING_INTERVAL));
            background.add(ShipmentService::new(Arc::clone(&island)).in_background());
            background.add(RootService::new(Arc::clone(&island)).in_background(LEADING_INTERVAL));
            if let Some((gate, address)) = devices {
                gate.open(Arc::clone(&island), watched.clone(), address);
            }
            let watch = CertificateWatch { island: Arc::clone(&island), authority: watched, own };
            background.add(tokio::spawn(watch.run()));
            opened.send_replace(Some(Arc::clone(&island)));
            report_health(&health, &island).await
        };

        tokio::pin!(serving, enrolling, shutdown);
        let outcome = tokio::select! {
            () = &mut shutdown => Ok(()),
            outcome = open => outcome.map(|never| match never {}),
            outcome = &mut serving => return outcome.map_err(|error| ServerError::Transport(error.to_string())),
            outcome = &mut enrolling => return outcome.map_err(|error| ServerError::Transport(error.to_string())),
            () = tls.watch() => Ok(()),
        };
        stop.send_replace(true);
        // The passes have ended before the database is closed: one that fails because the server
        // stops would be logged as a fault.
        let (served, enrolled, ended) = tokio::join!(
            tokio::time::timeout(GRACE, serving),
            tokio::time::timeout(GRACE, enrolling),
            tokio::time::timeout(GRACE, background.end())
        );
        if served.is_err() || enrolled.is_err() {
            tracing::warn!("calls that did not end in time are cut off");
        }
        if ended.is_err() {
            tracing::warn!("background work that did not end in time is cut off");
        }
        let island = opened.borrow().clone();
        if let Some(island) = island {
            island.committer.stop().await;
            island.store.close().await;
            close(island.hsm.clone()).await;
        }
        outcome
    }
}

/// Tasks in the background, which end with the server.
#[derive(Default)]
struct Background(Mutex<Vec<JoinHandle<()>>>);

impl Background {
    fn add(&self, task: JoinHandle<()>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// Ends all tasks, and waits until they have ended.
    async fn end(mut self) {
        let tasks = std::mem::take(self.0.get_mut().unwrap_or_else(PoisonError::into_inner));
        for task in &tasks {
            task.abort();
        }
        for task in tasks {
            drop(task.await);
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        for task in self.0.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
    }
}

/// The inputs for opening the island.
struct Opening {
    config: Config,
    authority: CertificateAuthority,
    policy: Policy,
    profiles: Profiles,
}

impl Opening {
    /// Tries to open the island until database and tokens answer.
    async fn until_open(self, gate: &Gate) -> Result<Arc<IslandContext>, ServerError> {
        let mut failures = Repetition::default();
        let store = loop {
            match kms_store::open(&self.config.storage.store()?).await {
                Ok(store) => break store,
                Err(error @ StoreError::Unavailable { .. }) => {
                    if failures.is_news(&error.to_string()) {
                        tracing::error!(%error, "the database cannot be opened yet; it is tried again every 2 s");
                    }
                }
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(PAUSE).await;
        };
        let memory = pin_memory(&self.config, &store)?;
        let hsm = self.config.hsm.start(&self.config.island, &self.config.limits, memory)?;
        let restore = self.config.restore();
        let keys = loop {
            match IslandKeys::open(&store, &hsm, &self.config.island, &restore).await {
                Ok(keys) => break keys,
                Err(error) if error.may_pass() => {
                    if failures.is_news(&error.to_string()) {
                        tracing::error!(%error, "the island cannot be opened yet; it is tried again every 2 s");
                    }
                }
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(PAUSE).await;
        };
        if keys.row.kind == IslandKind::Development && !self.config.allow_development_island {
            return Err(ServerError::Development { island: self.config.island });
        }
        if self.config.retention.days.days() == 0 && keys.row.kind != IslandKind::Development {
            return Err(ServerError::Retention { island: self.config.island });
        }
        if hsm.serves(KeyClass::Ca) {
            self.authority.check_key(&hsm).await?;
        }
        if restore.watermark.is_none() {
            tracing::warn!(
                "no `watermark` is configured: this server cannot notice a restored database without a new timeline (I4), nor a row of the island under a retired seal key (I5); set `watermark` to a file on another disk"
            );
        }
        let committer = Committer::start(
            Arc::clone(&store),
            keys.seal,
            keys.audit,
            committer_settings(&self.config, restore, Some(&self.policy)),
        );
        // I4: not before the counters of a restored database are raised. Other servers may rotate
        // the seal root meanwhile.
        tokio::select! {
            _ = committer.settled() => {}
            never = keep_learning(&store, &hsm, &committer) => match never {},
        }
        let policy = Arc::new(ArcSwap::from_pointee(self.policy));
        let door = Door::new(committer.clone(), Arc::clone(&store), Arc::clone(&policy));
        let island = Arc::new(IslandContext {
            row: ArcSwap::from_pointee(keys.row),
            hsm,
            store,
            policy,
            profiles: self.profiles,
            committer,
            door,
            limits: Arc::new(self.config.limits.clone()),
            disk: self.config.storage.disk(),
            fingerprint_key: keys.fingerprint,
            scrubs: ScrubFlight::default(),
            refreshing: tokio::sync::Mutex::default(),
        });
        // New keys are stored under the storage KEKs that the row names. If a root is missing in
        // this server's tokens, the server still serves everything else.
        if let Err(error) = RootService::new(Arc::clone(&island)).refresh().await {
            tracing::error!(%error, "the island's roots could not be looked after; it is tried again");
        }
        let routes = api::routes(Arc::clone(&island), self.authority, &self.config.limits);
        drop(gate.island.set((routes, Arc::clone(&island))));
        tracing::info!(island = %island.name(), "the island is open");
        Ok(island)
    }
}

/// Declares that the database was restored: raises the counters and records it. For operators.
///
/// # Errors
/// Database or tokens do not answer, or do not belong together. With SQLite: a server is running.
pub async fn declare_restored(config: &Config) -> Result<DatabaseHistory, ServerError> {
    let restore = RestoreSettings { declared: true, ..config.restore() };
    without_serving(config, restore, async |_, committer, _| Ok(committer.settled().await)).await
}

/// Renews the TLS certificate of the configuration's server, or that in these two files:
/// certificate and private key.
///
/// # Errors
/// As [`declare_restored`], and as [`ServerCertificate::renew`].
pub async fn renew_certificate(
    config: &Config,
    files: Option<(PathBuf, PathBuf)>,
) -> Result<IssuedCertificate, ServerError> {
    let authority = read_authority(config)?;
    let (certificate, private_key) =
        files.unwrap_or_else(|| (config.tls.certificate.clone(), config.tls.private_key.clone()));
    let own = ServerCertificate { certificate, private_key, days: config.limits.server_days() };
    without_serving(config, config.restore(), async move |hsm, committer, _| {
        authority.check_key(hsm).await?;
        Ok(own.renew(&authority, hsm, committer).await?)
    })
    .await
}

/// Certifies an officer's new key with a quorum of the escrow's custodians. Servers in other
/// processes may run, except with SQLite.
///
/// # Errors
/// As [`declare_restored`], and as [`Recertification::run`].
pub async fn recertify_officer(
    config: &Config,
    recertification: Recertification,
) -> Result<IssuedCertificate, ServerError> {
    let authority = read_authority(config)?;
    without_serving(config, config.restore(), async move |hsm, committer, store| {
        authority.check_key(hsm).await?;
        Ok(recertification.run(&authority, hsm, committer, store, IslandContext::now()).await?)
    })
    .await
}

/// Makes another version of a root, and notes it in the island's row. Servers in other processes
/// may run, and notice it by themselves.
///
/// # Errors
/// As [`declare_restored`], and as [`NewRootSettings::make`].
pub async fn make_root(config: &Config, settings: NewRootSettings) -> Result<MadeRoot, ServerError> {
    let store = kms_store::open(&config.storage.store()?).await?;
    let hsm = config.hsm.start(&config.island, &config.limits, pin_memory(config, &store)?)?;
    let made = async {
        let restore = config.restore();
        let keys = IslandKeys::open(&store, &hsm, &config.island, &restore).await;
        // What follows uses the token alone, and logs in again.
        close(hsm).await;
        let keys = keys?;
        let committer =
            Committer::start(Arc::clone(&store), keys.seal, keys.audit, committer_settings(config, restore, None));
        tokio::time::timeout(USABLE_WITHIN, committer.settled()).await.map_err(|_| ServerError::NotSettled)?;
        let made = settings.make(config, &committer).await;
        committer.stop().await;
        Ok(made?)
    };
    let made = made.await;
    store.close().await;
    made
}

/// Installs copies of roots in the token of this configuration that they are for.
///
/// # Errors
/// As [`make::install`].
pub async fn install_roots(config: &Config, copies: &std::path::Path) -> Result<Vec<KeyFingerprint>, ServerError> {
    Ok(make::install(config, copies).await?)
}

/// Opens database and tokens for one command of an operator.
async fn without_serving<T>(
    config: &Config,
    restore: RestoreSettings,
    work: impl AsyncFnOnce(&Hsm, &Committer, &Arc<dyn Store>) -> Result<T, ServerError>,
) -> Result<T, ServerError> {
    let store = kms_store::open(&config.storage.store()?).await?;
    let hsm = config.hsm.start(&config.island, &config.limits, pin_memory(config, &store)?)?;
    let worked = async {
        let keys = IslandKeys::open(&store, &hsm, &config.island, &restore).await?;
        let committer =
            Committer::start(Arc::clone(&store), keys.seal, keys.audit, committer_settings(config, restore, None));
        tokio::time::timeout(USABLE_WITHIN, committer.settled()).await.map_err(|_| ServerError::NotSettled)?;
        let outcome = work(&hsm, &committer, &store).await;
        committer.stop().await;
        outcome
    };
    let outcome = worked.await;
    store.close().await;
    close(hsm).await;
    outcome
}

/// Logs out of the tokens. A module that hangs does not stop what comes next: no work is given to
/// these tokens after this.
async fn close(hsm: Hsm) {
    let closed = tokio::task::spawn_blocking(move || hsm.close());
    if tokio::time::timeout(GRACE, closed).await.is_err() {
        tracing::warn!("an HSM did not end its sessions in time");
    }
}

/// The memory of PINs that tokens refused, under this server's key.
fn pin_memory(config: &Config, store: &Arc<dyn Store>) -> Result<Arc<StoredPinMemory>, ServerError> {
    let path = &config.tls.private_key;
    let memory = StoredPinMemory::new(Arc::clone(store), path).map_err(|error| ServiceError::FailedPrecondition {
        reason: format!("`{}`: {error}", path.display()),
        next_step: "correct `tls.private_key`, or the file".to_owned(),
    })?;
    Ok(Arc::new(memory))
}

/// Where devices that were enrolled find the ordinary listener.
fn address_for_devices(config: &Config, port: u16) -> ServerAddress {
    match config.enrolment.as_ref().and_then(EnrolmentSection::server) {
        Some((host, port)) => ServerAddress { host: host.to_owned(), port },
        None => ServerAddress { host: String::new(), port },
    }
}

fn read_authority(config: &Config) -> Result<CertificateAuthority, ServerError> {
    let root =
        CertificateDer::from_pem_file(&config.tls.client_ca).map_err(|error| ServerError::Root(error.to_string()))?;
    CertificateAuthority::from_der(&root).map_err(|error| ServerError::Root(error.to_string()))
}

fn committer_settings(config: &Config, restore: RestoreSettings, policy: Option<&Policy>) -> CommitterSettings {
    let server = config.server_name.clone().unwrap_or_else(host_name);
    CommitterSettings {
        island: config.island.clone(),
        server,
        chunk_size: ChunkSize::default(),
        limits: Arc::new(config.limits.clone()),
        restore,
        policy_sha256: policy.map(Policy::digest),
        silence: CommitterSettings::SILENCE,
    }
}

/// Reads every 2 s which seal keys the island's row names, while the database's history is
/// compared.
async fn keep_learning(store: &Arc<dyn Store>, hsm: &Hsm, committer: &Committer) -> Infallible {
    let mut failures = Repetition::default();
    loop {
        tokio::time::sleep(PAUSE).await;
        if let Err(error) = learn_seal_keys(&**store, hsm, committer).await
            && failures.is_news(&error.to_string())
        {
            tracing::error!(%error, "the island's row cannot be read yet; it is tried again every 2 s");
        }
    }
}

/// Tells load balancers whether the island is ready: its tokens are usable and its last transaction
/// was committed.
async fn report_health(health: &HealthReporter, island: &IslandContext) -> Result<Infallible, ServerError> {
    let mut known = None;
    loop {
        let tokens = island.hsm.all_tokens().iter().all(|token| token.state().borrow().is_usable());
        let ready = tokens && island.committer.is_ready();
        metrics().ready(ready);
        if known != Some(ready) {
            known = Some(ready);
            let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
            health.set_service_status("", status).await;
            tracing::info!(ready, "readiness changed");
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

/// Health and reflection always answer; the island's services answer when the island is open.
#[derive(Clone)]
struct Gate {
    always: Routes,
    /// The services and the island. Their refusals are recorded (I2).
    island: Arc<OnceLock<(Routes, Arc<IslandContext>)>>,
    intake: Intake,
}

impl Service<http::Request<Body>> for Gate {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path().starts_with("/grpc.") {
            let (intake, routes) = (self.intake.clone(), self.always.clone());
            return Box::pin(async move { Ok(intake.serve(request, None, routes).await) });
        }
        match self.island.get() {
            Some((routes, island)) => {
                let call = Call::begin(&request).watched(api::refusals::watch(&island.committer, &request));
                let answer = self
                    .intake
                    .clone()
                    .serve(request, Some(Arc::clone(island)), routes.clone())
                    .instrument(call.span());
                Box::pin(async move { Ok(call.answered(answer.await)) })
            }
            None => {
                let call = Call::begin(&request);
                let unavailable =
                    Status::from(ServiceError::unavailable("the island is not open yet; the server's log tells why"));
                Box::pin(std::future::ready(Ok(call.answered(unavailable.into_http()))))
            }
        }
    }
}

/// Why a server does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration, or a secret that it names.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The policies.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The device profiles.
    #[error("device profiles: {0}")]
    Profiles(String),
    /// The listener's certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The island's root certificate.
    #[error("[tls] client_ca: {0}; it must be the island's root certificate")]
    Root(String),
    /// The port.
    #[error(
        "cannot listen on {address}: {reason}; check `listen` in the configuration, and whether another server is running"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Too few files may be open.
    #[error("{0}")]
    Descriptors(String),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// A use case.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The island's row and keys.
    #[error(transparent)]
    Keys(#[from] IslandKeysError),
    /// A development island under a production configuration.
    #[error(
        "the island `{island}` was made for development: its keys protect nothing; set `allow_development_island = true` for a trial, or make an island with `kms-server init`"
    )]
    Development {
        /// The island.
        island: IslandName,
    },
    /// A production island whose keys would be destroyed at once.
    #[error(
        "[retention] days = 0 destroys keys as soon as they are out of use, which is for development islands only; set at least 1 day for `{island}`, and more days than the age of your oldest backup"
    )]
    Retention {
        /// The island.
        island: IslandName,
    },
    /// The database could not be compared with what is known of its history.
    #[error("the database's history could not be compared or written; the log lines above say why")]
    NotSettled,
    /// A new version of a root.
    #[error(transparent)]
    MakeRoot(#[from] MakeRootError),
    /// gRPC.
    #[error("gRPC: {0}")]
    Transport(String),
}

/// The host's name, for records and logs.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "kms-server".to_owned() } else { name.trim().to_owned() }
}

/// How long calls under way and background work may take at the shutdown, and then an HSM that
/// hangs.
const GRACE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(2);
const USABLE_WITHIN: Duration = Duration::from_secs(10);
/// How often campaigns are checked.
const LEADING_INTERVAL: Duration = Duration::from_secs(2);
/// How often the rotations of groups' keys are checked, and their members counted.
const FOLLOWING_INTERVAL: Duration = Duration::from_mins(1);
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    struct Ended(Arc<AtomicBool>);

    impl Drop for Ended {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn background_work_has_ended_when_the_database_may_be_closed() {
        let (background, ended) = (Background::default(), Arc::new(AtomicBool::new(false)));
        let guard = Ended(Arc::clone(&ended));
        background.add(tokio::spawn(async move {
            let _guard = guard;
            std::future::pending().await
        }));
        tokio::task::yield_now().await;
        background.end().await;
        assert!(ended.load(Ordering::SeqCst));
    }
}
