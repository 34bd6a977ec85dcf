//! Prints how fast questions about exposures are, and what the index of exposures costs:
//! `exposures [sqlite:PATH | postgres://…] [ROWS]`, by default SQLite in a temporary directory and
//! 10,000,000 rows of the index. A row stands for all keys of one meter that one party could know.

use std::time::{Duration, Instant};

use kms_domain::{Owner, PrincipalId, SystemTitle, UnixMillis, WriterId};
use kms_store::{
    AuditAppend, Changes, Decision, ExposureOwner, ExposureParty, ExposureRow, MeterProjection, MeterPut, Reads,
    SealedRow, Store, StoreConfig,
};

type Failed = Box<dyn std::error::Error>;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failed> {
    let mut arguments = std::env::args().skip(1);
    let directory = tempfile::TempDir::new()?;
    let address = arguments.next().unwrap_or_else(|| format!("sqlite:{}", directory.path().join("kms.db").display()));
    let rows: u64 = arguments.next().map(|count| count.parse()).transpose()?.unwrap_or(10_000_000);
    let mut config = StoreConfig::parse(&address)?;
    config.call_timeout = Duration::from_mins(2);
    let store = kms_store::open(&config).await?;
    let writer = WriterId::from_octets(uuid::Uuid::new_v4().as_bytes())?;
    store.register_server(writer, "exposures").await?;

    first_touch(&*store, writer).await?;
    let empty = store.sizes().await?.database;
    // A handheld, a head-end of a tenth of the island, and one of the rest.
    let parties = [
        ("hh-7", "handheld", 5_000),
        ("hes-2", "head-end", rows / 10),
        ("hes-1", "head-end", rows - rows / 10 - 5_000),
    ];
    let mut filled = Vec::new();
    for (name, role, count) in parties {
        let party = ExposureParty::Principal(PrincipalId::parse(&format!("urn:meterkms:north:{role}:{name}"))?);
        fill(&*store, &party, count).await?;
        filled.push((name, party, count));
    }
    println!("{rows} rows, {:.1} octets a row", (store.sizes().await?.database - empty) as f64 / rows as f64);
    for (name, party, count) in &filled {
        question(&*store, &format!("{name} ({count} meters)"), party).await?;
    }
    Ok(())
}

/// 500 meters that are written at their first grant, as the store sees it: without and with a row
/// of the index for each, in turn.
async fn first_touch(store: &dyn Store, writer: WriterId) -> Result<(), Failed> {
    let projection = MeterProjection {
        vendor: "KAM".into(),
        profile: "generic-suite0".into(),
        status: 1,
        head_end: None,
        batch: None,
        groups: Vec::new(),
    };
    let put = |generation| SealedRow { generation, seal: [1; 18], body: vec![9; 330] };
    let party = ExposureParty::Principal(PrincipalId::parse("urn:meterkms:north:head-end:first")?);
    let (mut taken, mut sequence) = ([Duration::ZERO; 2], 0);
    for round in 0..400_u64 {
        let titles: Vec<SystemTitle> =
            (0..500).map(|number| title(0x80_0000_0000 + round * 500 + number)).collect::<Result<_, _>>()?;
        let inserted = Changes {
            meters: titles.iter().map(|title| MeterPut::insert(*title, put(1), projection.clone())).collect(),
            ..Changes::default()
        };
        let reads = Reads { meters: titles.clone(), ..Reads::default() };
        store.transact(reads.clone(), &mut |_| Decision::Commit(Box::new(inserted.clone()))).await?;
        let exposures = titles.iter().filter(|_| round % 2 == 1).map(|title| row(&party, *title)).collect();
        let record =
            AuditAppend { writer, sequence, time: UnixMillis(1), kind: 1, record: vec![7; 20_000], chain: [7; 32] };
        sequence += 1;
        let touched = Changes {
            meters: titles.iter().map(|title| MeterPut::update(*title, put(2))).collect(),
            exposures,
            audit: vec![record],
            ..Changes::default()
        };
        let begun = Instant::now();
        store.transact(reads, &mut |_| Decision::Commit(Box::new(touched.clone()))).await?;
        if let Some(taken) = taken.get_mut(usize::try_from(round % 2)?) {
            *taken += begun.elapsed();
        }
    }
    let [without, with] = taken.map(|taken| taken.as_secs_f64() / 200.0);
    println!(
        "500 meters written at first touch: {:.2} ms without the index, {:.2} ms with it: ratio {:.2}",
        without * 1_000.0,
        with * 1_000.0,
        with / without
    );
    Ok(())
}

async fn fill(store: &dyn Store, party: &ExposureParty, count: u64) -> Result<(), Failed> {
    let begun = Instant::now();
    for first in (0..count).step_by(10_000) {
        let exposures: Vec<ExposureRow> = (first..count.min(first + 10_000))
            // In the order of a fleet that is read at random, not of the index.
            .map(|number| title(number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 24).map(|title| row(party, title)))
            .collect::<Result<_, _>>()?;
        let changes = Changes { exposures, ..Changes::default() };
        store.transact(Reads::default(), &mut |_| Decision::Commit(Box::new(changes.clone()))).await?;
    }
    println!("{count} rows in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// The first page and the counts; then a page in the middle, and what is new.
async fn question(store: &dyn Store, what: &str, party: &ExposureParty) -> Result<(), Failed> {
    for (name, since) in [("all", None), ("of the last moment", Some(UnixMillis(999)))] {
        let begun = Instant::now();
        let totals = store.exposure_totals(party, since).await?;
        let counted = begun.elapsed();
        let page = store.exposed_owners(party, since, None, 500).await?;
        println!(
            "{what}, {name}: {} ms for {} owners, {} slots, {} open; {} ms for the first {}",
            counted.as_millis(),
            totals.owners,
            totals.slots,
            totals.open,
            (begun.elapsed() - counted).as_millis(),
            page.len()
        );
    }
    let middle = ExposureOwner::Owner(Owner::Meter(title(1 << 39)?));
    let begun = Instant::now();
    let page = store.exposed_owners(party, None, Some(middle), 500).await?;
    println!("{what}, from the middle: {} ms for {}", begun.elapsed().as_millis(), page.len());
    Ok(())
}

fn row(party: &ExposureParty, title: SystemTitle) -> ExposureRow {
    let number = u64::from_be_bytes(title.octets());
    ExposureRow {
        party: party.clone(),
        owner: ExposureOwner::Owner(Owner::Meter(title)),
        slots: 2,
        open: u32::from(number.is_multiple_of(8)),
        newest: UnixMillis((number % 1_000).cast_signed()),
    }
}

/// A meter of manufacturer KAM: `number` has 40 bits.
fn title(number: u64) -> Result<SystemTitle, kms_domain::ParseError> {
    SystemTitle::from_octets(&(0x4B41_4D00_0000_0000 | (number & 0xFF_FFFF_FFFF)).to_be_bytes())
}
