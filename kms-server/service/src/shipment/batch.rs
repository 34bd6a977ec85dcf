//! The second pass: lines are parsed, and the HSM imports their keys, while the batch before them
//! is committed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use kms_domain::{
    KeyShape, KeyType, SecuritySetupId, ShipmentDevice, ShipmentLineError, ShippedCounter, SystemTitle, WrappedKey,
};
use kms_hsm::{ErrorKind, ImportJob};
use tokio::sync::mpsc;

use super::{
    spool::{Lines, Windows},
    verify::{IMPORTS, Verified},
};
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// Lines of a shipment, ready to be committed.
pub(super) struct ReadyBatch {
    pub(super) first_line: u64,
    /// The first line of the next batch.
    pub(super) next_line: u64,
    /// Whether no line follows.
    pub(super) last: bool,
    pub(super) devices: Vec<ReadyDevice>,
    pub(super) refusals: Vec<(u64, ShipmentLineError)>,
}

/// A device whose keys are under the island's storage KEKs.
pub(super) struct ReadyDevice {
    pub(super) line: u64,
    pub(super) title: SystemTitle,
    pub(super) serial: String,
    pub(super) groups: Vec<String>,
    pub(super) keys: Vec<ReadyKey>,
    pub(super) counters: Vec<ShippedCounter>,
}

/// A key under a storage KEK, and the fingerprint of its value.
pub(super) struct ReadyKey {
    pub(super) setup: SecuritySetupId,
    pub(super) key_type: KeyType,
    pub(super) wrapped: WrappedKey,
    pub(super) fingerprint: [u8; 16],
}

/// How many lines a batch has: more while commits are fast, fewer when they delay other callers.
pub(super) struct BatchSize(AtomicUsize);

impl BatchSize {
    pub(super) const fn new() -> Self {
        Self(AtomicUsize::new(SMALLEST))
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes the time of each commit into account.
    pub(super) fn committed_in(&self, time: Duration) {
        let now = self.get();
        let next = match time {
            quick if quick < QUICK => now * 2,
            slow if slow > SLOW => now / 2,
            _ => now,
        };
        self.0.store(next.clamp(SMALLEST, LARGEST), Ordering::Relaxed);
    }
}

/// Starts to read at line `next_line`. Batches arrive in order, and a few are prepared ahead.
/// Reading stops when the receiver is dropped.
pub(super) fn read_ahead(
    island: Arc<IslandContext>,
    verified: Arc<Verified>,
    windows: Windows,
    next_line: u64,
    size: Arc<BatchSize>,
) -> mpsc::Receiver<Result<ReadyBatch, ServiceError>> {
    let (parsed, to_import) = mpsc::channel(1);
    let (ready, receiver) = mpsc::channel(1);
    tokio::spawn(Parser::new(verified.clone(), next_line, size).run(windows, parsed));
    tokio::spawn(import_ahead(island, verified, to_import, ready));
    receiver
}

/// Lines of a shipment, parsed.
struct ParsedBatch {
    first_line: u64,
    next_line: u64,
    last: bool,
    devices: Vec<(u64, ShipmentDevice)>,
    refusals: Vec<(u64, ShipmentLineError)>,
}

impl ParsedBatch {
    const fn starting_at(line: u64) -> Self {
        Self { first_line: line, next_line: line, last: false, devices: Vec::new(), refusals: Vec::new() }
    }
}

struct Parser {
    verified: Arc<Verified>,
    lines: Lines,
    size: Arc<BatchSize>,
    batch: ParsedBatch,
    full: Vec<ParsedBatch>,
}

impl Parser {
    fn new(verified: Arc<Verified>, next_line: u64, size: Arc<BatchSize>) -> Self {
        let lines = Lines::starting_at(next_line, verified.next_begin);
        Self { verified, lines, size, batch: ParsedBatch::starting_at(next_line), full: Vec::new() }
    }

    async fn run(mut self, mut windows: Windows, parsed: mpsc::Sender<Result<ParsedBatch, ServiceError>>) {
        loop {
            let begin = windows.position();
            let window = match windows.next().await {
                Ok(Some(window)) => window,
                Ok(None) => break,
                Err(error) => {
                    let _ = parsed.send(Err(error)).await;
                    return;
                }
            };
            // Parsing keeps a processor busy for milliseconds.
            let result = tokio::task::spawn_blocking(move || {
                let skipped = usize::try_from(self.verified.next_begin.saturating_sub(begin)).unwrap_or(usize::MAX);
                self.take(window.get(skipped.min(window.len())..).unwrap_or_default());
                self
            });
            self = match result.await {
                Ok(parser) => parser,
                Err(_) => return,
            };
            for batch in std::mem::take(&mut self.full) {
                // Nobody waits for it any more: the caller has disconnected, or a commit failed.
                if parsed.send(Ok(batch)).await.is_err() {
                    return;
                }
            }
        }
        self.batch.last = true;
        let _ = parsed.send(Ok(self.batch)).await;
    }

    fn take(&mut self, octets: &[u8]) {
        let mut lines = std::mem::take(&mut self.lines);
        let pushed = lines.push(octets, |line| {
            self.line(line.number, line.octets);
            Ok::<_, std::convert::Infallible>(())
        });
        match pushed {
            Ok(_) => self.lines = lines,
            Err(never) => match never {},
        }
    }

    fn line(&mut self, number: u64, octets: &[u8]) {
        let Verified { header, profile, devices, .. } = &*self.verified;
        // The trailer is the line after the last device.
        if number > *devices + 1 {
            return;
        }
        match ShipmentDevice::parse(octets, header, profile) {
            Ok(device) => self.batch.devices.push((number, device)),
            Err(error) => self.batch.refusals.push((number, error)),
        }
        self.batch.next_line = number + 1;
        if self.batch.devices.len() + self.batch.refusals.len() >= self.size.get() {
            let next = ParsedBatch::starting_at(number + 1);
            self.full.push(std::mem::replace(&mut self.batch, next));
        }
    }
}

async fn import_ahead(
    island: Arc<IslandContext>,
    verified: Arc<Verified>,
    mut parsed: mpsc::Receiver<Result<ParsedBatch, ServiceError>>,
    ready: mpsc::Sender<Result<ReadyBatch, ServiceError>>,
) {
    while let Some(batch) = parsed.recv().await {
        let taken = match batch {
            Ok(batch) => import_keys(&island, &verified, batch).await,
            Err(error) => Err(error),
        };
        let failed = taken.is_err();
        if ready.send(taken).await.is_err() || failed {
            return;
        }
    }
}

/// Re-wraps the keys of a batch from the batch key to the storage KEKs, inside the HSM (I1).
async fn import_keys(
    island: &IslandContext,
    verified: &Verified,
    batch: ParsedBatch,
) -> Result<ReadyBatch, ServiceError> {
    let ParsedBatch { first_line, next_line, last, devices, mut refusals } = batch;
    let shape = |setup, key_type| verified.profile.key(setup, key_type).map_or(KeyShape::Secret, |key| key.shape);
    let jobs: Vec<ImportJob> = devices
        .iter()
        .flat_map(|(_, device)| &device.keys)
        .map(|key| ImportJob {
            key_type: key.key_type,
            shape: shape(key.setup, key.key_type),
            wrapped: key.wrapped.clone(),
        })
        .collect();
    let mut results =
        if jobs.is_empty() { Vec::new() } else { import_with_retries(island, verified, jobs).await? }.into_iter();
    let mut ready = Vec::with_capacity(devices.len());
    for (line, device) in devices {
        let mut keys = Vec::with_capacity(device.keys.len());
        let mut refusal = None;
        for (index, (key, result)) in device.keys.iter().zip(results.by_ref()).enumerate() {
            match result {
                Ok(stored) => {
                    let fingerprint = island.fingerprint_key.fingerprint(&stored.fingerprint_wrap);
                    let version = u8::try_from(stored.storage_kek_version.number()).unwrap_or_default();
                    let wrapped = WrappedKey::new(key.key_type, version, stored.blob.into())
                        .map_err(|error| ServiceError::Internal(error.to_string()))?;
                    keys.push(ReadyKey { setup: key.setup, key_type: key.key_type, wrapped, fingerprint });
                }
                Err(error) => {
                    refusal.get_or_insert_with(|| ShipmentLineError {
                        field: format!("keys[{index}].wrapped"),
                        reason: error.to_string(),
                    });
                }
            }
        }
        match refusal {
            Some(refusal) => refusals.push((line, refusal)),
            None if keys.len() == device.keys.len() => {
                let ShipmentDevice { title, serial, groups, counters, .. } = device;
                ready.push(ReadyDevice { line, title, serial, groups, keys, counters });
            }
            None => return Err(ServiceError::Internal("the HSM answered fewer keys than it was given".to_owned())),
        }
    }
    Ok(ReadyBatch { first_line, next_line, last, devices: ready, refusals })
}

/// Imports keys, with retries: a lost session or a full queue must not end an import of hours.
async fn import_with_retries(
    island: &IslandContext,
    verified: &Verified,
    jobs: Vec<ImportJob>,
) -> Result<Vec<Result<kms_hsm::StoredKey, kms_hsm::ImportRefusal>>, ServiceError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match island.hsm.paid_by(IMPORTS).import_keys(verified.batch_key.clone(), jobs.clone()).await {
            Err(error) if error.kind() == ErrorKind::Transient && attempts < ATTEMPTS => {
                tokio::time::sleep(error.retry_after().unwrap_or(RETRY_AFTER)).await;
            }
            other => return Ok(other?),
        }
    }
}

const SMALLEST: usize = 64;
const LARGEST: usize = 1_000;
const QUICK: Duration = Duration::from_millis(80);
const SLOW: Duration = Duration::from_millis(200);
const ATTEMPTS: u32 = 5;
const RETRY_AFTER: Duration = Duration::from_millis(500);
