//! The scrubber (I5): reads the whole log and every sealed row, and reports what does not fit: a
//! row that is older than its last record, is gone, has no record, or was edited; a chain with a
//! gap, a changed record, or an end that was cut off; imported keys that are missing from the list
//! of fingerprints, and equal keys in different counter domains (I4); tasks of campaigns that were
//! edited, or do what was not approved (I6); an index of exposures that does not say what the rows
//! say.
//!
//! What it cannot see: in a chain that is still being written, the newest records are only
//! protected by the records that follow them. If the end of such a chain is cut off, this shows
//! with the next record of its server.

mod chains;
mod exposures;
mod finding;
mod fingerprints;
mod rows;
mod tasks;
#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::{sync::Arc, time::Duration};

use kms_proto::v1::{ScrubFinding, ScrubResponse, SecurityEvent, audit_record::Event};
use kms_store::{MeterFilter, Reads};
use tokio::sync::{mpsc, watch};

use self::{
    exposures::Exposures,
    finding::event,
    fingerprints::Fingerprints,
    rows::{Partition, Scan, Walk},
    tasks::Tasks,
};
use crate::island::IslandContext;
use crate::scrub_flight::{Joined, ScrubProgress, ScrubReport};
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

/// The scrubber of an island.
#[derive(Clone)]
pub struct Scrubber {
    island: Arc<IslandContext>,
    rows_at_once: usize,
}

impl Scrubber {
    /// How many rows are remembered at once, in about 100 octets each. An island with more is read
    /// in several passes.
    pub const ROWS_AT_ONCE: usize = 2_000_000;

    /// A scrubber that remembers [`Self::ROWS_AT_ONCE`] rows.
    pub const fn new(island: Arc<IslandContext>) -> Self {
        Self { island, rows_at_once: Self::ROWS_AT_ONCE }
    }

    /// Remembers this many rows at once, at least one.
    #[must_use]
    pub fn with_rows_at_once(self, rows: usize) -> Self {
        Self { rows_at_once: rows.max(1), ..self }
    }

    /// Scrubs for a caller and reports the progress. If a scrub is already running, the caller gets
    /// the result of that one: it may have read some rows before the call.
    ///
    /// # Errors
    /// Not permitted; the caller already watches the permitted number of scrubs; or the database is
    /// unavailable.
    #[boxed]
    pub async fn scrub_for(
        &self,
        caller: &Caller,
    ) -> Result<mpsc::Receiver<Result<ScrubResponse, ServiceError>>, ServiceError> {
        self.island.require(caller, &Action::Scrub).await?;
        let place = self.island.scrubs.place(&caller.principal, &self.island.limits)?;
        let mut watched = self.watch();
        let (answers, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            let _place = place;
            loop {
                let ScrubProgress { so_far, outcome } = watched.borrow_and_update().clone();
                let last = match outcome {
                    Some(outcome) => outcome.map(|report| ScrubResponse {
                        records_read: report.records_read,
                        rows_read: report.rows_read,
                        findings: report.findings,
                        finished: true,
                    }),
                    None => {
                        // A slow reader misses some progress messages.
                        let _ = answers.try_send(Ok(so_far));
                        tokio::select! {
                            changed = watched.changed() => match changed {
                                Ok(()) => continue,
                                Err(_) => Err(ServiceError::unavailable("the scrub was ended")),
                            },
                            // The caller is gone. The findings are recorded anyway.
                            () = answers.closed() => return,
                        }
                    }
                };
                let _ = answers.send(last).await;
                return;
            }
        });
        Ok(receiver)
    }

    /// Scrubs every `period`, first one period after the start, until it is dropped or aborted. A
    /// finding is a security event in the audit log and an error in the server's log.
    pub fn in_background(self, period: Duration) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(period).await;
                let mut watched = self.watch();
                let outcome = watched
                    .wait_for(|progress| progress.outcome.is_some())
                    .await
                    .ok()
                    .and_then(|progress| progress.outcome.clone());
                match outcome {
                    Some(Ok(report)) => {
                        tracing::info!(
                            records = report.records_read,
                            rows = report.rows_read,
                            findings = report.findings.len(),
                            "scrubbed"
                        );
                    }
                    Some(Err(error)) => tracing::error!(%error, "the scrubber could not finish"),
                    None => tracing::error!("the scrubber was ended"),
                }
            }
        })
    }

    /// The running scrub, or one that begins now. It ends early when its last watcher is gone.
    fn watch(&self) -> watch::Receiver<ScrubProgress> {
        match self.island.scrubs.join() {
            Joined::Running(watched) => watched,
            Joined::Begun(runner, watched) => {
                let scrubber = self.clone();
                tokio::spawn(async move {
                    let outcome = scrubber.scrub(|so_far| runner.tell(so_far)).await;
                    runner.end(outcome);
                });
                watched
            }
        }
    }

    /// Reads everything once and records the findings. `progress` is called after each page; if it
    /// returns false, the scrubber stops early with the findings so far.
    ///
    /// # Errors
    /// The HSM or the database is unavailable.
    pub async fn scrub(
        &self,
        mut progress: impl FnMut(ScrubResponse) -> bool + Send,
    ) -> Result<ScrubReport, ServiceError> {
        let passes = self.passes().await?;
        let mut report = ScrubReport::default();
        'passes: for pass in 0..passes {
            let mut scan = Scan::new(&self.island, Partition { pass, passes });
            loop {
                let more = scan.read_log().await?;
                report.records_read = report.records_read.max(scan.chains.records_read());
                if !progress(report.progress()) {
                    break 'passes;
                }
                if !more {
                    break;
                }
            }
            if pass == 0 {
                report.findings.append(&mut scan.chains.finish().await?);
            }
            let mut walk = Walk::default();
            while scan.read_rows(&mut walk).await? {
                if pass == 0 {
                    report.rows_read = walk.rows;
                }
                if !progress(report.progress()) {
                    break 'passes;
                }
            }
            if pass == 0 {
                report.rows_read = walk.rows;
            }
            report.findings.append(&mut scan.conclude().await?);
        }
        let mut fingerprints = Fingerprints::new(&self.island);
        while fingerprints.step().await? && progress(report.progress()) {}
        report.findings.append(&mut fingerprints.finish());
        let mut tasks = Tasks::new(&self.island);
        while tasks.step().await? && progress(report.progress()) {}
        report.findings.append(&mut tasks.finish());
        let mut exposures = Exposures::new(&self.island).await?;
        while exposures.step().await? && progress(report.progress()) {}
        report.findings.append(&mut exposures.finish());
        self.record(&report.findings).await?;
        Ok(report)
    }

    /// Each finding becomes a security event, up to a limit. All findings are errors in the
    /// server's log.
    async fn record(&self, findings: &[ScrubFinding]) -> Result<(), ServiceError> {
        for finding in findings {
            tracing::error!(
                kind = finding.kind,
                id = hex::encode(&finding.id),
                finding = finding.finding,
                detail = finding.detail,
                "the scrubber found what does not fit (I5)"
            );
        }
        if findings.is_empty() {
            return Ok(());
        }
        let mut events: Vec<SecurityEvent> = findings.iter().take(MOST_EVENTS).map(event).collect();
        if findings.len() > MOST_EVENTS {
            let detail = format!("{} findings in all; `kms audit scrub` lists them", findings.len());
            events.push(SecurityEvent { kind: "scrub".to_owned(), detail, meter: Default::default() });
        }
        let committed = self.island.committer.act(ServerAct::SCRUB, Reads::default(), move |view| {
            let mut entry = None;
            for event in &events {
                entry = Some(view.append(Event::SecurityEvent(event.clone())));
            }
            Ok(Decision::of(entry, ()))
        });
        committed.await.map(drop)
    }

    async fn passes(&self) -> Result<u64, ServiceError> {
        // Compared with meters there are few other sealed rows, so only meters are counted.
        let rows = self.island.store.meter_count(&MeterFilter::default()).await?;
        Ok(rows / u64::try_from(self.rows_at_once).unwrap_or(u64::MAX) + 1)
    }
}

/// Security events of one scrub.
const MOST_EVENTS: usize = 100;
