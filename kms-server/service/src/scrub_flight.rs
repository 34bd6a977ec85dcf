//! One scrub at a time in a server: it reads the whole log and every row, so a second one beside it
//! costs as much and finds the same.

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

/// The scrub that runs in this server, if one does.
#[derive(Clone, Default)]
pub struct ScrubFlight(Arc<Mutex<FlightState>>);

#[derive(Default)]
struct FlightState {
    /// The number of the scrub that runs tells it from those before it.
    running: Option<(u64, watch::Receiver<ScrubProgress>)>,
    number: u64,
    watching: HashMap<PrincipalId, usize>,
}

/// What was read, and what did not fit.
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

/// How far a scrub is.
#[derive(Clone, Debug, Default)]
pub(crate) struct ScrubProgress {
    pub(crate) so_far: ScrubResponse,
    pub(crate) outcome: Option<Result<ScrubReport, ServiceError>>,
}

/// The place of a caller that watches a scrub, until it is dropped.
pub(crate) struct WatchPlace {
    flight: ScrubFlight,
    principal: PrincipalId,
}

/// A scrub to be watched, or to be carried out.
pub(crate) enum Joined {
    /// It runs already.
    Running(watch::Receiver<ScrubProgress>),
    /// The caller carries it out, and tells of it.
    Begun(ScrubRunner, watch::Receiver<ScrubProgress>),
}

/// Who carries a scrub out. Dropping it ends the scrub for those who watch it.
pub(crate) struct ScrubRunner {
    flight: ScrubFlight,
    number: u64,
    progress: watch::Sender<ScrubProgress>,
}

impl ScrubFlight {
    /// Joins the scrub that runs, or begins one.
    pub(crate) fn join(&self) -> Joined {
        let mut state = self.state();
        if let Some((_, watched)) = &state.running {
            return Joined::Running(watched.clone());
        }
        let (progress, watched) = watch::channel(ScrubProgress::default());
        state.number += 1;
        let number = state.number;
        // The receiver that is kept here is not one that watches.
        state.running = Some((number, watched.clone()));
        Joined::Begun(ScrubRunner { flight: self.clone(), number, progress }, watched)
    }

    /// A place to watch from.
    ///
    /// # Errors
    /// The principal has as many as it may: with how far the scrub is.
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
    /// Tells how far it is. Whether to go on: somebody watches.
    pub(crate) fn tell(&self, so_far: ScrubResponse) -> bool {
        self.progress.send_modify(|progress| progress.so_far = so_far);
        if self.is_watched() {
            return true;
        }
        // Looked at again where nobody can join meanwhile.
        let mut state = self.flight.state();
        let watched = self.is_watched();
        if !watched {
            state.running.take_if(|(number, _)| *number == self.number);
        }
        watched
    }

    /// Tells what it came to.
    pub(crate) fn end(self, outcome: Result<ScrubReport, ServiceError>) {
        self.flight.state().running.take_if(|(number, _)| *number == self.number);
        self.progress.send_modify(|progress| progress.outcome = Some(outcome));
    }

    /// Beside the flight's own receiver.
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

/// When a caller that watches as many scrubs as it may can come back.
const RETRY_AFTER: Duration = Duration::from_secs(10);
