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
mod fingerprints;
mod flight;
mod tasks;
#[cfg(test)]
mod tests;

use async_recursion::async_recursion as boxed;
use std::{collections::HashMap, sync::Arc, time::Duration};

use kms_domain::{
    CampaignId, CounterDomainId, DeviceTypeId, Generation, GroupId, IslandName, PrincipalId, ProposalId, RootId, RowId,
    RowSeal, SystemTitle, row_digest,
};
use kms_proto::v1::{RowWrite, ScrubFinding, ScrubResponse, SecurityEvent, audit_record::Event};
use kms_store::{MeterFilter, Reads, RowKind, SealedRow};
use tokio::sync::{mpsc, watch};

pub use self::flight::Flight;
use self::{
    chains::Chains,
    fingerprints::Fingerprints,
    flight::{Joined, Progress},
    tasks::Tasks,
};
use crate::island::Island;
use kms_authz::{Action, Caller};
use kms_base::error::ServiceError;
use kms_ledger::{Decision, ServerAct};

/// The scrubber of an island.
#[derive(Clone)]
pub struct Scrubber {
    island: Arc<Island>,
    rows_at_once: usize,
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
                let Progress { so_far, outcome } = watched.borrow_and_update().clone();
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
    fn watch(&self) -> watch::Receiver<Progress> {
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
            let mut scan = Scan {
                island: &self.island,
                partition: Partition { pass, passes },
                recorded: HashMap::new(),
                chains: Chains::new(&self.island, pass == 0),
                suspects: Vec::new(),
            };
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

impl ScrubReport {
    fn progress(&self) -> ScrubResponse {
        ScrubResponse {
            records_read: self.records_read,
            rows_read: self.rows_read,
            findings: Vec::new(),
            finished: false,
        }
    }
}

fn event(finding: &ScrubFinding) -> SecurityEvent {
    let meter = if finding.kind == METER { finding.id.clone() } else { Default::default() };
    SecurityEvent {
        kind: format!("scrub-{}", finding.finding),
        detail: format!("{} {}: {}", kind_name(finding.kind), text_of(finding.kind, &finding.id), finding.detail),
        meter,
    }
}

/// Names a sealed row: kind and id.
type Name = (u8, Box<[u8]>);

/// Generation and digest of a row's last record.
type Recorded = (u64, [u8; 16]);

/// One part of all rows, by a hash of their names.
#[derive(Clone, Copy)]
struct Partition {
    pass: u64,
    passes: u64,
}

impl Partition {
    fn holds(self, kind: u8, id: &[u8]) -> bool {
        // FNV-1a: any even spread will do.
        let hash = id.iter().fold(0xCBF2_9CE4_8422_2325 ^ u64::from(kind), |hash: u64, octet| {
            (hash ^ u64::from(*octet)).wrapping_mul(0x0100_0000_01B3)
        });
        (hash >> 16) % self.passes == self.pass
    }
}

/// One pass.
struct Scan<'a> {
    island: &'a Island,
    partition: Partition,
    recorded: HashMap<Name, Recorded>,
    chains: Chains<'a>,
    /// Rows that did not fit when they were read; servers write meanwhile, so they are looked at
    /// again.
    suspects: Vec<Name>,
}

/// Where the walk over all rows is.
#[derive(Default)]
struct Walk {
    rows: u64,
    after_meter: Option<SystemTitle>,
    meters_done: bool,
    kind: usize,
    after: Option<Vec<u8>>,
}

impl Scan<'_> {
    /// Reads a few more records; false at the end of what is there now.
    async fn read_log(&mut self) -> Result<bool, ServiceError> {
        let (partition, recorded) = (self.partition, &mut self.recorded);
        self.chains.step(|write| note(partition, recorded, write)).await
    }

    /// Reads a page of rows and compares them; false behind the last.
    async fn read_rows(&mut self, walk: &mut Walk) -> Result<bool, ServiceError> {
        if !walk.meters_done {
            let page = self.island.store.meter_page(&MeterFilter::default(), walk.after_meter, PAGE).await?;
            walk.after_meter = page.last().map(|row| row.title);
            walk.meters_done = page.is_empty();
            walk.rows += page.len() as u64;
            for row in &page {
                self.look(METER as u8, &row.title.octets(), &row.row);
            }
            return Ok(true);
        }
        let Some(kind) = RowKind::ALL.get(walk.kind).copied() else { return Ok(false) };
        let page = self.island.store.sealed_page(kind, walk.after.as_deref(), PAGE).await?;
        walk.after = page.last().map(|(id, _)| id.clone());
        if page.is_empty() {
            walk.kind += 1;
        }
        walk.rows += page.len() as u64;
        for (id, row) in &page {
            self.look(kind.number(), id, row);
        }
        Ok(true)
    }

    /// What fits is forgotten, so that what remains are rows that are gone.
    fn look(&mut self, kind: u8, id: &[u8], row: &SealedRow) {
        if !self.partition.holds(kind, id) {
            return;
        }
        let name: Name = (kind, id.into());
        let fits = self.recorded.get(&name).is_some_and(|(generation, digest)| {
            row.generation == *generation && self.digest(&name, row).is_ok_and(|found| found == *digest)
        });
        if fits {
            self.recorded.remove(&name);
        } else {
            self.suspects.push(name);
        }
    }

    /// Looks again at all that did not fit: a row may have been written between the reading of the
    /// log and its own.
    async fn conclude(mut self) -> Result<Vec<ScrubFinding>, ServiceError> {
        let mut names = std::mem::take(&mut self.suspects);
        names.extend(self.recorded.keys().cloned());
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        // Rows that fitted are not in the map any more; records about them may come back with newer
        // ones, and are passed by.
        while self.read_log().await? {}
        let mut findings = Vec::new();
        let mut again = Vec::new();
        for name in names {
            let at_least = self.recorded.get(&name).map_or(0, |(generation, _)| *generation);
            match self.row(&name).await? {
                None => {
                    findings.push(finding(&name, "deleted", format!("its last record is of generation {at_least}")))
                }
                Some(row) => again.push((name, at_least, row)),
            }
        }
        // Whoever wrote one of these rows had its record in the same transaction: it can be read
        // now.
        while self.read_log().await? {}
        for (name, at_least, row) in again {
            let recorded = self.recorded.get(&name).copied();
            findings.extend(self.judge(&name, at_least, &row, recorded));
        }
        Ok(findings)
    }

    /// `at_least` is the generation that was recorded before the row was read, `recorded` the last
    /// one after.
    fn judge(&self, name: &Name, at_least: u64, row: &SealedRow, recorded: Option<Recorded>) -> Option<ScrubFinding> {
        let digest = match self.digest(name, row) {
            Ok(digest) => digest,
            Err(reason) => return Some(finding(name, "edited", reason)),
        };
        let Some((last, recorded)) = recorded else {
            return Some(finding(name, "unrecorded", "no record says that it was written".to_owned()));
        };
        match row.generation {
            generation if generation < at_least => Some(finding(
                name,
                "stale",
                format!("it is of generation {generation}, and its last record of {at_least}"),
            )),
            generation if generation > last => Some(finding(
                name,
                "unrecorded",
                format!("it is of generation {generation}, and its last record of {last}"),
            )),
            generation if generation == last && digest != recorded => {
                Some(finding(name, "edited", format!("it is not what was recorded of generation {last}")))
            }
            _ => None,
        }
    }

    async fn row(&self, (kind, id): &Name) -> Result<Option<SealedRow>, ServiceError> {
        let store = &self.island.store;
        if u32::from(*kind) == METER {
            let Ok(title) = SystemTitle::from_octets(id) else { return Ok(None) };
            return Ok(store.meters(&[title]).await?.into_iter().next().map(|row| row.row));
        }
        match RowKind::ALL.into_iter().find(|known| known.number() == *kind) {
            Some(kind) => Ok(store.sealed(kind, id).await?),
            None => Ok(None),
        }
    }

    /// The digest of a row whose seal holds.
    fn digest(&self, (kind, id): &Name, row: &SealedRow) -> Result<[u8; 16], String> {
        let id = row_id(*kind, id, self.island.name()).ok_or_else(|| "its id is none of its kind".to_owned())?;
        let generation = i64::try_from(row.generation)
            .ok()
            .and_then(|number| Generation::from_i64(number).ok())
            .ok_or_else(|| "its generation is out of range".to_owned())?;
        let seal = RowSeal::from_octets(&row.seal).map_err(|error| error.to_string())?;
        self.island
            .committer
            .seal_keys()
            .verify(&id, generation, &row.body, &seal)
            .map_err(|error| error.to_string())?;
        Ok(row_digest(seal.key_version(), &id, generation, &row.body))
    }
}

/// Keeps the newest record of each row of the partition.
fn note(partition: Partition, recorded: &mut HashMap<Name, Recorded>, write: &RowWrite) {
    let (Ok(kind), Ok(digest)) = (u8::try_from(write.kind), <[u8; 16]>::try_from(write.digest.as_ref())) else {
        return;
    };
    if !partition.holds(kind, &write.id) {
        return;
    }
    let newest = recorded.entry((kind, write.id.as_ref().into())).or_insert((write.generation, digest));
    if write.generation > newest.0 {
        *newest = (write.generation, digest);
    }
}

pub(crate) fn row_id(kind: u8, id: &[u8], island: &IslandName) -> Option<RowId> {
    let text = || std::str::from_utf8(id).ok();
    let number = || id.try_into().ok().map(u64::from_be_bytes);
    match kind {
        1 => SystemTitle::from_octets(id).ok().map(RowId::Meter),
        2 => number().map(|number| RowId::Group(GroupId(number))),
        3 => number().map(|number| RowId::DeviceType(DeviceTypeId(number))),
        4 => PrincipalId::parse(text()?).ok().map(RowId::Principal),
        5 => id.try_into().ok().map(|octets| RowId::CounterDomain(CounterDomainId(octets))),
        6 => text().filter(|name| *name == island.as_str()).map(|_| RowId::Island(island.clone())),
        7 => PrincipalId::parse(text()?).ok().map(RowId::QuotaUse),
        8 => CampaignId::from_octets(id).ok().map(RowId::Campaign),
        12 => ProposalId::from_octets(id).ok().map(RowId::Proposal),
        9 => RootId::from_octets(id).ok().map(RowId::RootRotation),
        _ => None,
    }
}

fn finding((kind, id): &Name, finding: &str, detail: String) -> ScrubFinding {
    ScrubFinding { kind: u32::from(*kind), id: id.to_vec().into(), finding: finding.to_owned(), detail }
}

fn kind_name(kind: u32) -> &'static str {
    match kind {
        0 => "chain of writer",
        METER => "meter",
        _ => RowKind::ALL.into_iter().find(|known| u32::from(known.number()) == kind).map_or("row", RowKind::name),
    }
}

fn text_of(kind: u32, id: &[u8]) -> String {
    match (kind, std::str::from_utf8(id)) {
        (4 | 6 | 7, Ok(text)) => text.to_owned(),
        _ => hex::encode_upper(id),
    }
}

/// The kind of meters' rows.
const METER: u32 = 1;
/// Rows of one page.
const PAGE: u32 = 1_000;
/// Security events of one scrub.
const MOST_EVENTS: usize = 100;
