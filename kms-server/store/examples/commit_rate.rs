//! Prints how fast the store is: `commit_rate [sqlite:PATH | postgres://…] [METERS]`, by default
//! SQLite in a temporary directory and 200,000 meters.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use kms_domain::{PrincipalId, SystemTitle, UnixMillis, WriterId};
use kms_store::{
    AuditAppend, Changes, Decision, FingerprintOwner, FingerprintPrefix, FingerprintPut, MeterProjection, MeterPut,
    Reads, SealedRow, Store, StoreConfig, StoreError,
};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = tempfile::TempDir::new()?;
    let address = arguments.next().unwrap_or_else(|| format!("sqlite:{}", directory.path().join("kms.db").display()));
    let meters: u64 = arguments.next().map(|count| count.parse()).transpose()?.unwrap_or(200_000);
    let store = kms_store::open(&StoreConfig::parse(&address)?).await?;
    let writer = WriterId::from_octets(uuid::Uuid::new_v4().as_bytes())?;
    store.register_server(writer, "commit_rate").await?;
    let bench = Bench { store: &*store, writer, meters, sequence: AtomicU64::new(0), random: AtomicU64::new(1) };
    bench.fill().await?;
    bench.run("1,000 random meters read, 1 audit record", 1_000, false).await?;
    bench.run("1,000 random meters read and written, 1 audit record", 1_000, true).await?;
    bench.run("32 random meters read, 32 audit records (32 merged singles)", 32, false).await?;
    bench.run("1 random meter read, 1 audit record", 1, false).await?;
    let sizes = store.sizes().await?;
    println!(
        "database {} MB, log {} MB, {} octets a meter",
        sizes.database / 1_000_000,
        sizes.log / 1_000_000,
        sizes.database / meters
    );
    Ok(())
}

struct Bench<'a> {
    store: &'a dyn Store,
    writer: WriterId,
    meters: u64,
    sequence: AtomicU64,
    random: AtomicU64,
}

impl Bench<'_> {
    /// Imports meters with four keys each.
    async fn fill(&self) -> Result<(), Box<dyn std::error::Error>> {
        let begun = Instant::now();
        let projection = MeterProjection {
            vendor: "KAM".into(),
            profile: "generic-suite0".into(),
            status: 1,
            head_end: Some(PrincipalId::parse("urn:meterkms:north:head-end:hes")?.to_string()),
            batch: Some("KAM-2026-0041".into()),
            groups: Vec::new(),
        };
        for first in (0..self.meters).step_by(1_000) {
            let mut changes = Changes { audit: vec![self.record(400)], ..Changes::default() };
            let mut reads = Reads::default();
            for number in first..self.meters.min(first + 1_000) {
                let title = title(number)?;
                reads.meters.push(title);
                changes.meters.push(MeterPut::insert(title, row(1), projection.clone()));
                for key_type in 1..5 {
                    let prefix = FingerprintPrefix(self.random().to_be_bytes());
                    reads.fingerprints.push(prefix);
                    changes.fingerprints.push(FingerprintPut {
                        prefix,
                        owner: FingerprintOwner {
                            owner: kms_domain::Owner::Meter(title),
                            setup: kms_domain::SecuritySetupId::DEFAULT,
                            key_type: kms_domain::KeyType::from_number(key_type)?,
                            version: kms_domain::KeyVersionNumber::FIRST,
                        },
                    });
                }
            }
            self.store.transact(reads, &mut |_| Decision::Commit(Box::new(changes.clone()))).await?;
        }
        println!(
            "{:>10.0} meters/s imported, with 4 fingerprints each",
            self.meters as f64 / begun.elapsed().as_secs_f64()
        );
        Ok(())
    }

    async fn run(&self, what: &str, meters: usize, writes: bool) -> Result<(), StoreError> {
        let (begun, mut transactions, mut slowest) = (Instant::now(), 0_u64, Duration::ZERO);
        while begun.elapsed() < Duration::from_secs(5) {
            let started = Instant::now();
            let titles: Vec<SystemTitle> =
                (0..meters).filter_map(|_| title(self.random() % self.meters).ok()).collect();
            let records = if meters == 32 { 32 } else { 1 };
            let audit: Vec<_> = (0..records).map(|_| self.record(300)).collect();
            self.store
                .transact(Reads { meters: titles, ..Reads::default() }, &mut |set| {
                    let mut changes = Changes { audit: audit.clone(), ..Changes::default() };
                    if writes {
                        changes.meters = set
                            .meters()
                            .filter_map(|(title, row)| {
                                Some(MeterPut::update(title, self::row(row.present()?.generation + 1)))
                            })
                            .collect();
                    }
                    Decision::Commit(Box::new(changes))
                })
                .await?;
            transactions += 1;
            slowest = slowest.max(started.elapsed());
        }
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{:>10.0} transactions/s, {:>8.0} meters/s, slowest {:>4} ms: {what}",
            transactions as f64 / seconds,
            (transactions * meters as u64) as f64 / seconds,
            slowest.as_millis()
        );
        Ok(())
    }

    fn record(&self, octets: usize) -> AuditAppend {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        AuditAppend {
            writer: self.writer,
            sequence,
            time: UnixMillis(sequence.cast_signed()),
            kind: 1,
            record: vec![7; octets],
            chain: [7; 32],
        }
    }

    /// SplitMix64.
    fn random(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

fn title(number: u64) -> Result<SystemTitle, kms_domain::ParseError> {
    SystemTitle::from_octets(&(0x4B41_4D00_0000_0000 + number).to_be_bytes())
}

fn row(generation: u64) -> SealedRow {
    SealedRow { generation, seal: [1; 18], body: vec![9; 330] }
}
