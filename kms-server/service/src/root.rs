//! The island's roots: which versions there are, what uses them, and their rotation.
//!
//! The life of a root: a version is made on the token's machine ([`make`]), because this needs the
//! token while no server uses it, and is noted in the island's row. An officer makes it current.
//! Servers then rewrite what uses an earlier version (`pass`). docs/roots.md describes the
//! procedure.

mod count;
mod destroy;
pub mod make;
mod pass;
mod refresh;
#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kms_domain::{KeyClass, RootError, RootId, RootPurpose, RootRotation, RootRotationState, RootStanding, UnixMillis};
use kms_proto::v1::{self, RootRotationChanged, audit_record::Event};
use kms_store::{MeterFilter, Reads, RowKind};
use tokio::sync::mpsc;

pub use self::destroy::Destruction;
pub use self::refresh::learn_seal_keys;
use crate::Request;
use crate::island::IslandContext;
use crate::keys::token::token_key;
use crate::watch::{self, Watched};
use kms_authz::{Action, Caller, Resource};
use kms_base::Repetition;
use kms_base::error::ServiceError;
use kms_ledger::{Act, Asker, Decision, Known, Permit, View};

/// Roots of an island.
#[derive(Clone)]
pub struct RootService {
    island: Arc<IslandContext>,
    timing: RootTiming,
    /// The end of the pass after which the old seal key could not be retired yet, and when this was
    /// last checked.
    not_retired: Arc<Mutex<Option<(UnixMillis, Instant)>>>,
}

/// How long things take until every server has noticed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootTiming {
    /// How long a version must have been noted before it may become current, and how long its
    /// destruction must have been decided before tokens are changed. Servers look every 2 s.
    pub settling: Duration,
    /// How long the old seal key is accepted after the last row has got a seal of the new one:
    /// requests that were answered before can be repeated for so long.
    pub seal_overlap: Duration,
    /// How long other servers leave a pass to the one that did the last page.
    pub lead: Duration,
    /// How long until the server checks again whether the old seal key can be retired: the check
    /// reads all rows.
    pub look_again: Duration,
}

impl RootTiming {
    /// For a database that no other server uses: nothing has to be waited for.
    const ALONE: Self = Self { settling: Duration::ZERO, lead: Duration::ZERO, ..Self::DEFAULT };
    /// 20 seconds, 24 hours, 30 seconds, 10 minutes.
    pub const DEFAULT: Self = Self {
        settling: Duration::from_secs(20),
        seal_overlap: Duration::from_hours(24),
        lead: Duration::from_secs(30),
        look_again: Duration::from_mins(10),
    };
}

/// A change of a root's rotation by an officer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RotationChange {
    /// Makes the newest version current and begins the pass, if the root has one.
    Rotate {
        /// The most rows that the pass reads in a second.
        rows_per_second: u32,
    },
    /// Stops the pass.
    Pause {
        /// Why.
        reason: String,
    },
    /// Resumes the pass.
    Resume {
        /// At another rate.
        rows_per_second: Option<u32>,
    },
    /// Retires all earlier versions of the vendor transport key.
    Retire,
}

impl RootService {
    /// Roots of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        let timing = if island.store.is_shared() { RootTiming::DEFAULT } else { RootTiming::ALONE };
        Self { island, timing, not_retired: Arc::default() }
    }

    /// The same with other times.
    #[must_use]
    pub fn with_timing(self, timing: RootTiming) -> Self {
        Self { timing, ..self }
    }

    /// Reads every `period` which roots are in use, and continues passes and destructions, until it
    /// is dropped or aborted.
    pub fn in_background(self, period: Duration) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            // Other servers rely on this server's knowledge of the roots: a slow pass must not
            // delay it.
            tokio::join!(self.look(period), self.lead(period));
        })
    }

    async fn look(&self, period: Duration) {
        let mut failures = Repetition::default();
        loop {
            tokio::time::sleep(period).await;
            if let Err(error) = self.refresh().await
                && failures.is_news(&error.to_string())
            {
                tracing::error!(%error, "the island's roots could not be looked after; it is tried again");
            }
        }
    }

    async fn lead(&self, period: Duration) {
        let mut failures = Repetition::default();
        // Destructions that were decided before this server started are executed too.
        let (mut done, mut due) = (None, Instant::now());
        loop {
            tokio::time::sleep(period).await;
            let worked = async {
                let row = self.island.row();
                if done.as_ref() != Some(&row.ledger) && due <= Instant::now() {
                    // After an error it is not tried again at once: each attempt is recorded.
                    due = Instant::now() + TRY_AGAIN;
                    match self.destroy_decided(&row).await? {
                        None => done = Some(row.ledger.clone()),
                        Some(wait) => due = Instant::now() + wait,
                    }
                }
                self.lead_for(period).await
            };
            if let Err(error) = worked.await
                && failures.is_news(&error.to_string())
            {
                tracing::error!(%error, "the rotation of the island's roots stands still; it is tried again");
            }
        }
    }

    /// All versions of all roots, and the progress of rotations.
    ///
    /// # Errors
    /// Not permitted, or the database is unavailable.
    #[boxed]
    pub async fn show(&self, caller: &Caller) -> Result<v1::ShowRootsResponse, ServiceError> {
        self.island.require(caller, &Action::ListRoots).await?;
        let row = self.newest_row().await;
        let mut roots = Vec::new();
        for purpose in RootPurpose::ALL {
            for id in row.root_versions(purpose) {
                let entry = row.root_entry(id);
                let standing = row.root_standing(id).unwrap_or(RootStanding::Destroyed);
                let derivation = match purpose {
                    RootPurpose::Diversification(class) => {
                        let known = row
                            .roots(class)
                            .and_then(|roots| roots.diversification.iter().find(|root| root.version == id.version));
                        known
                            .map(|root| root.derivation)
                            .or_else(|| entry?.derivation)
                            .map(kms_domain::KeyDerivation::name)
                    }
                    _ => None,
                };
                roots.push(v1::Root {
                    root: purpose.to_string(),
                    version: id.version.into(),
                    standing: standing.name().to_owned(),
                    made_ms: entry.map_or(row.created, |entry| entry.made).0,
                    destroyed_ms: entry.and_then(|entry| entry.destroyed).map_or(0, |time| time.0),
                    fingerprint: entry.map(|entry| entry.fingerprint.clone()).unwrap_or_default().into(),
                    key_derivation: derivation.unwrap_or_default().to_owned(),
                    // `None`: this server has no token for the class, or the token is unavailable.
                    in_token: self.island.hsm.has_key(token_key(id)?).await.ok(),
                    rotation: self.load(id).await?.map(|rotation| message(&rotation)),
                });
            }
        }
        Ok(v1::ShowRootsResponse { roots })
    }

    /// Rotates a root, or changes its rotation. A request that comes again changes nothing more.
    ///
    /// # Errors
    /// Not permitted; there is no version to rotate to, it is too new, or this server's token lacks
    /// it; the rotation's state forbids it; or the database is unavailable.
    #[boxed]
    pub async fn change(
        &self,
        caller: &Caller,
        request: Request,
        purpose: RootPurpose,
        change: RotationChange,
    ) -> Result<v1::ShowRootsResponse, ServiceError> {
        self.island.require(caller, &Action::RotateRoot).await?;
        let known = self.newest_row().await;
        let no_root = || refused(RootError::NoSuchRoot { purpose });
        let to = if matches!(change, RotationChange::Rotate { .. }) {
            // A version that was given up cannot become current.
            let newest = known
                .root_versions(purpose)
                .into_iter()
                .filter(|id| known.may_store_under(*id))
                .max()
                .ok_or_else(no_root)?;
            self.is_in_token(newest).await?;
            newest
        } else {
            RootId { purpose, version: known.current_root(purpose).ok_or_else(no_root)? }
        };
        let rows = if purpose.has_pass() { self.island.store.meter_count(&MeterFilter::default()).await? } else { 0 };
        let settling = millis(self.timing.settling);
        let act = ChangeRotation { island: self.island.clone(), change, to, rows, settling };
        self.island.door.act(caller, request, act).await?;
        self.show(caller).await
    }

    /// The island's row, even if this server's tokens lack roots that it names: an officer can
    /// still look and pause a pass.
    async fn newest_row(&self) -> Arc<kms_domain::Island> {
        self.refresh().await.unwrap_or_else(|_| self.island.row())
    }

    /// The progress of a rotation: at once and at each change. The stream ends with the rotation.
    ///
    /// # Errors
    /// Not permitted, the root was never rotated, or the database is unavailable.
    #[boxed]
    pub async fn watch(
        &self,
        caller: &Caller,
        purpose: RootPurpose,
    ) -> Result<mpsc::Receiver<Result<v1::RootRotation, ServiceError>>, ServiceError> {
        self.island.require(caller, &Action::ListRoots).await?;
        let current =
            self.newest_row().await.current_root(purpose).ok_or_else(|| refused(RootError::NoSuchRoot { purpose }))?;
        let to = RootId { purpose, version: current };
        let first = self.load(to).await?.ok_or_else(|| no_rotation(purpose))?;
        let watched = WatchedRotation { service: self.clone(), caller: caller.clone(), to };
        Ok(watch::watch(caller, watched, message(&first), LOOK_EVERY))
    }

    /// The rotation to a version as it stands in the database now.
    async fn load(&self, to: RootId) -> Result<Option<Arc<RootRotation>>, ServiceError> {
        let Some(row) = self.island.store.sealed(RowKind::RootRotation, &to.octets()).await? else { return Ok(None) };
        if let Ok(rotation) = self.island.committer.open_root_rotation(to, &row) {
            return Ok(Some(rotation));
        }
        // Another server may have written the row after it was read here. So it is read once more:
        // only a row that fails twice was tampered with.
        let Some(row) = self.island.store.sealed(RowKind::RootRotation, &to.octets()).await? else { return Ok(None) };
        self.island.committer.open_root_rotation(to, &row).map(Some)
    }

    /// Refuses a root that this server's token does not hold: nothing could be wrapped under it.
    async fn is_in_token(&self, id: RootId) -> Result<(), ServiceError> {
        if self.island.hsm.has_key(token_key(id)?).await? {
            return Ok(());
        }
        Err(ServiceError::FailedPrecondition {
            reason: format!("this server's token does not hold the root `{id}`"),
            next_step: "install its copy with `kms-server roots install`, on every server's token".to_owned(),
        })
    }

    fn island_row(&self) -> (RowKind, Vec<u8>) {
        self.island.row_name()
    }
}

/// The act of an officer that changes the rotation of a root.
struct ChangeRotation {
    island: Arc<IslandContext>,
    change: RotationChange,
    to: RootId,
    /// How many rows a pass will look at.
    rows: u64,
    settling: i64,
}

impl Act for ChangeRotation {
    type Answer = ();
    type Past = Known;

    fn name(&self) -> &'static str {
        Action::RotateRoot.name()
    }

    fn reads(&self) -> Reads {
        Reads { sealed: vec![self.island.row_name(), rotation_row(self.to)], clock: true, ..Reads::default() }
    }

    fn permit(&self, asker: Asker, _: &mut View<'_, '_>) -> Result<Permit, ServiceError> {
        asker.require(&Action::RotateRoot, &Resource::Island)
    }

    fn decide(&self, permit: &Permit, view: &mut View<'_, '_>) -> Result<Decision<()>, ServiceError> {
        let (to, purpose) = (self.to, self.to.purpose);
        let now = view.clock()?;
        let mut row = (*view.island(self.island.name())?.ok_or_else(no_island)?).clone();
        let mut event = RootRotationChanged {
            root: purpose.to_string(),
            version: to.version.into(),
            ..RootRotationChanged::default()
        };
        match &self.change {
            RotationChange::Rotate { rows_per_second } => {
                let from = row.activate_root(to, self.settling, now).map_err(refused)?;
                event = RootRotationChanged {
                    change: "begun".to_owned(),
                    from: from.into(),
                    rows_per_second: *rows_per_second,
                    ..event
                };
                if purpose.has_pass() {
                    view.put_root_rotation(RootRotation::new(
                        to,
                        permit.principal().id.clone(),
                        *rows_per_second,
                        self.rows,
                        now,
                    ))?;
                }
                view.put_island(row)?;
            }
            RotationChange::Retire => {
                if purpose != RootPurpose::VendorTransport {
                    return Err(ServiceError::invalid(
                        "root",
                        "only earlier versions of `vendor-transport` are retired by hand",
                    ));
                }
                row.retire_roots(purpose).map_err(refused)?;
                event.change = "retired".to_owned();
                view.put_island(row)?;
            }
            RotationChange::Pause { reason } => {
                let mut rotation = (*view.root_rotation(to)?.ok_or_else(|| no_rotation(purpose))?).clone();
                rotation.pause(reason.clone(), now).map_err(|state| is_in(purpose, state))?;
                event = RootRotationChanged { change: "paused".to_owned(), reason: reason.clone(), ..event };
                view.put_root_rotation(rotation)?;
            }
            RotationChange::Resume { rows_per_second } => {
                let mut rotation = (*view.root_rotation(to)?.ok_or_else(|| no_rotation(purpose))?).clone();
                rotation.resume(*rows_per_second, now).map_err(|state| is_in(purpose, state))?;
                event = RootRotationChanged {
                    change: "resumed".to_owned(),
                    rows_per_second: rotation.rows_per_second,
                    ..event
                };
                view.put_root_rotation(rotation)?;
            }
        }
        Ok(Decision::recorded(view.append(Event::RootRotationChanged(event)), ()))
    }

    fn again(&self, _: Known, _: &Permit, _: &mut View<'_, '_>) -> Result<(), ServiceError> {
        Ok(())
    }
}

/// A watched rotation.
struct WatchedRotation {
    service: RootService,
    caller: Caller,
    to: RootId,
}

impl Watched for WatchedRotation {
    type Standing = v1::RootRotation;

    async fn look(&mut self) -> Result<v1::RootRotation, ServiceError> {
        self.service.island.require(&self.caller, &Action::ListRoots).await?;
        self.service.load(self.to).await?.map(|rotation| message(&rotation)).ok_or_else(|| no_rotation(self.to.purpose))
    }

    fn is_alike(known: &v1::RootRotation, now: &v1::RootRotation) -> bool {
        known == now
    }

    fn has_ended(rotation: &v1::RootRotation) -> bool {
        rotation.state == RootRotationState::Finished.name()
    }
}

/// The name of a rotation's row in the store.
fn rotation_row(to: RootId) -> (RowKind, Vec<u8>) {
    (RowKind::RootRotation, to.octets().to_vec())
}

fn message(rotation: &RootRotation) -> v1::RootRotation {
    v1::RootRotation {
        root: rotation.to.purpose.to_string(),
        version: rotation.to.version.into(),
        state: rotation.state.name().to_owned(),
        since_ms: rotation.since.0,
        reason: rotation.reason.clone(),
        requested_by: rotation.requested_by.to_string(),
        began_ms: rotation.began.0,
        rows_per_second: rotation.rows_per_second,
        rows: rotation.rows,
        round: rotation.round,
        looked: rotation.looked,
        changed: rotation.changed,
        refused: rotation.refused,
        all_changed: rotation.all_changed,
        keys: rotation.keys,
    }
}

fn refused(error: RootError) -> ServiceError {
    let next_step = match &error {
        RootError::NoSuchRoot { .. } => "`kms roots show` lists the roots",
        RootError::NotMade { standing: RootStanding::Current, .. } | RootError::NoSuchVersion { .. } => {
            "make a new version with `kms-server roots new` first"
        }
        RootError::NotSettled { .. } => "wait, and try again",
        RootError::Needed { standing: RootStanding::Made, .. } => {
            "rotate to it with `kms roots rotate` first, or give it up with `kms roots propose-destruction`"
        }
        _ => "look at it with `kms roots show`",
    };
    ServiceError::FailedPrecondition { reason: error.to_string(), next_step: next_step.to_owned() }
}

fn no_rotation(purpose: RootPurpose) -> ServiceError {
    let (reason, next_step) = if purpose.has_pass() {
        (
            format!("the root `{purpose}` was never rotated, so there is no pass"),
            format!("begin one with `kms roots rotate {purpose}`"),
        )
    } else {
        (
            format!("no pass belongs to the root `{purpose}`: nothing is wrapped or sealed with it"),
            "look at it with `kms roots show --count`".to_owned(),
        )
    };
    ServiceError::FailedPrecondition { reason, next_step }
}

fn is_in(purpose: RootPurpose, state: RootRotationState) -> ServiceError {
    ServiceError::FailedPrecondition {
        reason: format!("the pass of the root `{purpose}` is {}", state.name()),
        next_step: "look at it with `kms roots show`".to_owned(),
    }
}

fn no_island() -> ServiceError {
    ServiceError::Internal("the island's row is missing (I5)".to_owned())
}

/// Whether this server has a token for the root's class.
fn is_served(island: &IslandContext, purpose: RootPurpose) -> bool {
    purpose.class().is_none_or(|class: KeyClass| island.hsm.serves(class))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// How long a failed destruction waits for the next attempt.
const TRY_AGAIN: Duration = Duration::from_mins(1);
/// How often a watched rotation is read.
const LOOK_EVERY: Duration = Duration::from_millis(500);
