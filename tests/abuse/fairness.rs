//! A9: one principal floods with batches, another one asks for single grants.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kms_client::{
    Connection,
    proto::{OpenSessionsRequest, SessionTerms},
};
use kms_store_testing::TestDatabase;
use kms_tests::{DevServer, TestModule, terms};
use tokio::task::JoinSet;

use crate::{
    scene::{Neighbour, meter, percentiles, request_id},
    verdict::{Figure, Verdict},
};

/// What a flood got so far.
#[derive(Default)]
struct Flood {
    /// Meters that were answered.
    served: AtomicUsize,
    /// Calls that were refused.
    refused: AtomicUsize,
    stop: AtomicBool,
}

/// Turns are counted, not times: how many meters the flood was served between a neighbour's
/// question and its answer.
pub(crate) async fn batches() -> Vec<Verdict> {
    let server = DevServer::start_sized(TestModule::of_environment(), TestDatabase::of_environment(), METERS);
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 0).await;
    let mut quiet = Vec::new();
    for _ in 0..QUIET_ASKS {
        quiet.push(neighbour.ask().await.unwrap());
    }
    let flood = Arc::new(Flood::default());
    let mut flooding = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let connection = server.connect("head-end").await;
        for _ in 0..BATCHES {
            flooding.spawn(batch_after_batch(connection.clone(), Arc::clone(&flood)));
        }
    }
    let began = Instant::now();
    while flood.served.load(Ordering::Relaxed) < 2 * usize::try_from(METERS).unwrap()
        && began.elapsed() < FLOODED_WITHIN
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(flood.served.load(Ordering::Relaxed) > 0, "no batch was served");
    let (mut flooded, mut between, mut unanswered) = (Vec::new(), Vec::new(), 0);
    let began = Instant::now();
    while flooded.len() < FLOODED_ASKS && began.elapsed() < FLOOD_FOR {
        let before = flood.served.load(Ordering::Relaxed);
        match neighbour.ask().await {
            Ok(time) => flooded.push(time),
            Err(_) => unanswered += 1,
        }
        between.push(flood.served.load(Ordering::Relaxed) - before);
    }
    flood.stop.store(true, Ordering::Relaxed);
    flooding.shutdown().await;
    between.sort_unstable();
    let median = between[between.len() / 2];
    let (before, during) = (percentiles(&quiet), percentiles(&flooded));
    let turns =
        Figure::count(median, "meters served to the flood between a neighbour's question and its answer (median)");
    let detail = format!(
        "{} of the neighbour's calls answered, {unanswered} not; the flood was served {} meters, {} calls refused",
        flooded.len(),
        flood.served.load(Ordering::Relaxed),
        flood.refused.load(Ordering::Relaxed)
    );
    let all = unanswered == 0 && !flooded.is_empty();
    // A time is a figure: missing its goal fails nothing, and is said.
    let times = |which: &str, goal: f64, (quiet, flooded): (f64, f64)| {
        let ratio = flooded / quiet;
        let met = if ratio <= goal { "met" } else { "missed" };
        let figure = Figure::of(ratio, format!("× its {which} when quiet (goal ≤ {goal}: {met})"));
        Verdict::new("A9", format!("a flood of batches: a neighbour's {which}"), all, figure)
            .with(format!("{quiet:.1} ms quiet, {flooded:.1} ms flooded"))
    };
    vec![
        Verdict::new("A9", "a flood of batches: turns", all && median <= MOST_BETWEEN, turns).with(detail),
        times("p50", 5.0, (before.0, during.0)),
        times("p99", 10.0, (before.1, during.1)),
    ]
}

/// Batches of all meters but the neighbour's, one after another.
async fn batch_after_batch(connection: Connection, flood: Arc<Flood>) {
    while !flood.stop.load(Ordering::Relaxed) {
        let request = OpenSessionsRequest {
            request_id: request_id(),
            meters: (1..METERS).map(meter).collect(),
            terms: Some(SessionTerms { client_title: bytes::Bytes::new(), ..terms(1) }),
            first_chunk: 0,
        };
        let Ok(answers) = connection.grants().open_sessions(request).await else {
            flood.refused.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut answers = answers.into_inner();
        loop {
            match answers.message().await {
                Ok(Some(chunk)) => {
                    let meters = usize::try_from(METERS).unwrap() / usize::try_from(chunk.chunk_count.max(1)).unwrap();
                    flood.served.fetch_add(meters, Ordering::Relaxed);
                }
                Ok(None) => break,
                Err(_) => {
                    flood.refused.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    break;
                }
            }
        }
    }
}

const METERS: u64 = 2_000;
const CONNECTIONS: usize = 4;
/// On each connection.
const BATCHES: usize = 15;
const QUIET_ASKS: usize = 100;
const FLOODED_ASKS: usize = 100;
const FLOODED_WITHIN: Duration = Duration::from_secs(20);
const FLOOD_FOR: Duration = Duration::from_secs(10);
/// A turn of the flood is a chunk of at most 500 meters. Eight of them leave room for those that
/// were under way, and for answers that wait to be read.
const MOST_BETWEEN: usize = 4_000;
