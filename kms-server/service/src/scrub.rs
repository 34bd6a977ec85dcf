//! The scrubber (I5): reads the whole log and every sealed row, and finds what does not fit. A row
//! that is older than its last record, a row that is gone, one that nobody recorded, one that was
//! edited; a chain with a gap, a changed record, or an end that was cut off; imported keys that the
//! list of fingerprints does not know, and equal ones that count apart (I4); tasks of campaigns
//! that were edited, or do what was not approved (I6).
//!
//! What it cannot see: the newest records of a chain that is still being written are only guarded
//! by those that follow, so an end that was cut off a living server's chain shows with that
//! server's next record.

mod chains;
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
    finding::event,
    fingerprints::Fingerprints,
    rows::{Partition, Scan, Walk},
    tasks::Tasks,
};
use crate::island::Island;
use crate::scrub_flight::{Joined, ScrubProgress, ScrubReport};
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

/// The scrubber of an island.
#[derive(Clone)]
pub struct Scrubber {
    island: Arc<Island>,
    rows_at_once: usize,
}

impl Scrubber {
    /// How many rows are remembered at once, in about 100 octets each. An island with more is read
    /// in several passes.
    pub const ROWS_AT_ONCE: usize = 2_000_000;

    /// A scrubber that remembers [`Self::ROWS_AT_ONCE`] rows.
    pub const fn new(island: Arc<Island>) -> Self {
        Self { island, rows_at_once: Self::ROWS_AT_ONCE }
    }

    /// Remembers this many rows at once, at least one.
    #[must_use]
    pub fn with_rows_at_once(self, rows: usize) -> Self {
        Self { rows_at_once: rows.max(1), ..self }
    }

    /// Scrubs for a caller, and tells how far it is. Where a scrub runs already the caller gets its
    /// answer: it may have read some rows before the call.
    ///
    /// # Errors
    /// Not permitted; the caller watches as many scrubs as it may; or the database is away.
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
                        // A caller that reads slowly misses some of it.
                        let _ = answers.try_send(Ok(so_far));
                        tokio::select! {
                            changed = watched.changed() => match changed {
                                Ok(()) => continue,
                                Err(_) => Err(ServiceError::unavailable("the scrub was ended")),
                            },
                            // A caller that has gone away has no use for it; the findings are on
                            // the record.
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

    /// Scrubs every `period`, from one period after the start on, until it is dropped or aborted.
    /// What is found is a security event in the log, and an error in the server's own.
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

    /// The scrub that runs, or one that begins now. It ends early when nobody watches it any more.
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

    /// Reads everything once, and records what it finds. `progress` is called every now and then;
    /// when it says no, the scrubber stops early with what it has found.
    ///
    /// # Errors
    /// HSM or database are away.
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
        self.record(&report.findings).await?;
        Ok(report)
    }

    /// Every finding is a security event, up to a number; all of them are errors in the server's
    /// log.
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
        // Other sealed rows are few beside the meters; an island of groups alone is one pass all
        // the same.
        let rows = self.island.store.meter_count(&MeterFilter::default()).await?;
        Ok(rows / u64::try_from(self.rows_at_once).unwrap_or(u64::MAX) + 1)
    }
}

/// Security events of one scrub.
const MOST_EVENTS: usize = 100;
