//! One scrub at a time in a server. A scrub reads the whole log and every row: a second one at the
//! same time would cost as much and find the same.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kms_domain::PrincipalId;
use kms_proto::v1::{ScrubFinding, ScrubResponse};
use tokio::sync::watch;

use kms_base::bounds::{Bound, Limits};
use kms_base::error::ServiceError;

/// The running scrub of this server, if there is one.
#[derive(Clone, Default)]
pub struct ScrubFlight(Arc<Mutex<FlightState>>);

#[derive(Default)]
struct FlightState {
    /// The running scrub, with its number among all scrubs of this server.
    running: Option<(u64, watch::Receiver<ScrubProgress>)>,
    number: u64,
    watching: HashMap<PrincipalId, usize>,
}

/// What a scrub read, and what did not fit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScrubReport {
    /// Records of the log, each once.
    pub records_read: u64,
    /// Sealed rows, each once.
    pub rows_read: u64,
    /// What did not fit.
    pub findings: Vec<ScrubFinding>,
}

impl ScrubReport {
    pub(crate) fn progress(&self) -> ScrubResponse {
        ScrubResponse {
            records_read: self.records_read,
            rows_read: self.rows_read,
            findings: Vec::new(),
            finished: false,
        }
    }
}

/// The progress of a scrub.
#[derive(Clone, Debug, Default)]
pub(crate) struct ScrubProgress {
    pub(crate) so_far: ScrubResponse,
    pub(crate) outcome: Option<Result<ScrubReport, ServiceError>>,
}

/// The right of a caller to watch a scrub, until it is dropped.
pub(crate) struct WatchPlace {
    flight: ScrubFlight,
    principal: PrincipalId,
}

/// A scrub to watch, or to run.
pub(crate) enum Joined {
    /// The scrub is already running.
    Running(watch::Receiver<ScrubProgress>),
    /// The caller runs the scrub and reports its progress.
    Begun(ScrubRunner, watch::Receiver<ScrubProgress>),
}

/// The runner of a scrub. Dropping it ends the scrub for its watchers.
pub(crate) struct ScrubRunner {
    flight: ScrubFlight,
    number: u64,
    progress: watch::Sender<ScrubProgress>,
}

impl ScrubFlight {
    /// Joins the running scrub, or begins one.
    pub(crate) fn join(&self) -> Joined {
        let mut state = self.state();
        if let Some((_, watched)) = &state.running {
            return Joined::Running(watched.clone());
        }
        let (progress, watched) = watch::channel(ScrubProgress::default());
        state.number += 1;
        let number = state.number;
        // The receiver that is kept here does not count as a watcher.
        state.running = Some((number, watched.clone()));
        Joined::Begun(ScrubRunner { flight: self.clone(), number, progress }, watched)
    }

    /// Lets a caller watch.
    ///
    /// # Errors
    /// The principal already watches the permitted number of scrubs. The error names the progress.
    pub(crate) fn place(&self, principal: &PrincipalId, limits: &Limits) -> Result<WatchPlace, ServiceError> {
        let mut state = self.state();
        let watching = state.watching.get(principal).copied().unwrap_or_default();
        if watching >= limits.number(Bound::ScrubsPerPrincipal) {
            let so_far = state.running.as_ref().map(|(_, watched)| watched.borrow().so_far.clone()).unwrap_or_default();
            let what = format!(
                "{principal} watches {watching} scrubs already; one runs for all, and has read {} records and {} rows",
                so_far.records_read, so_far.rows_read
            );
            return Err(Bound::ScrubsPerPrincipal.met(limits, &what, RETRY_AFTER));
        }
        state.watching.insert(principal.clone(), watching + 1);
        Ok(WatchPlace { flight: self.clone(), principal: principal.clone() })
    }

    fn state(&self) -> MutexGuard<'_, FlightState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ScrubRunner {
    /// Reports the progress. Returns whether somebody still watches, so that the scrub goes on.
    pub(crate) fn tell(&self, so_far: ScrubResponse) -> bool {
        self.progress.send_modify(|progress| progress.so_far = so_far);
        if self.is_watched() {
            return true;
        }
        // Checked again under the lock, where no new watcher can join.
        let mut state = self.flight.state();
        let watched = self.is_watched();
        if !watched {
            state.running.take_if(|(number, _)| *number == self.number);
        }
        watched
    }

    /// Reports the outcome.
    pub(crate) fn end(self, outcome: Result<ScrubReport, ServiceError>) {
        self.flight.state().running.take_if(|(number, _)| *number == self.number);
        self.progress.send_modify(|progress| progress.outcome = Some(outcome));
    }

    /// Whether there is a receiver besides the flight's own.
    fn is_watched(&self) -> bool {
        self.progress.receiver_count() > 1
    }
}

impl Drop for ScrubRunner {
    fn drop(&mut self) {
        self.flight.state().running.take_if(|(number, _)| *number == self.number);
    }
}

impl Drop for WatchPlace {
    fn drop(&mut self) {
        let mut state = self.flight.state();
        if let Some(watching) = state.watching.get_mut(&self.principal) {
            *watching -= 1;
            if *watching == 0 {
                state.watching.remove(&self.principal);
            }
        }
    }
}

/// After this time a caller that watches too many scrubs may try again.
const RETRY_AFTER: Duration = Duration::from_secs(10);
