//! Floods of what costs its sender nothing.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use attacker::{Attacker, is_open};
use kms_client::{
    Connection,
    proto::{OpenSessionRequest, ScrubRequest},
};
use kms_tests::{DevServer, terms};
use tokio::{net::TcpStream, task::JoinSet};

use crate::{
    scene::{Neighbour, meter, percentiles, request_id},
    verdict::{Figure, Verdict},
};

/// Connections on which nothing is said, not even a handshake. A neighbour does not wait until
/// their time is up: what waited beside it when it came still waits when it is served. A machine
/// that stands still meanwhile would look the same, so there are three rounds, of which one must be
/// so.
pub(crate) async fn idle_connections() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let attacker = Attacker::of(&server.profile("head-end")).unwrap();
    let quiet = neighbour.ask_anew().await.unwrap().as_secs_f64() * 1_000.0;
    let mut seen = Vec::new();
    let mut best = f64::NAN;
    let mut held = false;
    for _ in 0..3 {
        let mut idle = Vec::new();
        for _ in 0..IDLE {
            idle.extend(attacker.tcp(ELSEWHERE).await);
        }
        let open = |idle: &[TcpStream]| idle.iter().filter(|connection| is_open(connection)).count();
        let (mut before, mut same) = (open(&idle), 0);
        while same < 3 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let now = open(&idle);
            same = if now == before { same + 1 } else { 0 };
            before = now;
        }
        let answer = neighbour.ask_anew().await;
        let after = open(&idle);
        let time = answer.as_ref().map_or(f64::NAN, |time| time.as_secs_f64() * 1_000.0);
        best = best.min(time);
        seen.push(format!("{time:.1} ms beside {before}, of which {after} still wait"));
        held = answer.is_ok() && after * 2 > before;
        if held {
            break;
        }
    }
    let figure = Figure::of(best, format!("ms for a neighbour's new connection and grant beside {IDLE} idle ones"));
    vec![
        Verdict::new("A17", "idle connections", held, figure)
            .with(format!("{quiet:.1} ms without them; {}", seen.join("; "))),
    ]
}

/// Calls that are refused, in a loop: the log does not grow with them.
pub(crate) async fn refused_calls() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let head_end = server.connect("head-end").await;
    let before = records(&server).await;
    let mut calling = JoinSet::new();
    for _ in 0..CALLERS {
        let connection = head_end.clone();
        calling.spawn(async move {
            let mut refused = 0;
            for call in 0..CALLS / CALLERS {
                // A neighbour's meter, an unknown one, and what does not parse.
                let meter = match call % 3 {
                    0 => meter(40),
                    1 => vec![0x4B, 0x41, 0x4D, 0xFF, 0xFF, 0xFF, 0xFF, u8::try_from(call % 256).unwrap()].into(),
                    _ => vec![1; 9].into(),
                };
                let request = OpenSessionRequest { request_id: request_id(), meter, terms: Some(terms(1)) };
                refused += usize::from(connection.grants().open_session(request).await.is_err());
            }
            refused
        });
    }
    let mut times = Vec::new();
    let mut refused = 0;
    while !calling.is_empty() {
        times.push(neighbour.ask().await.unwrap());
        while let Some(called) = calling.try_join_next() {
            refused += called.unwrap();
        }
    }
    assert_eq!(refused, CALLS / CALLERS * CALLERS, "a call was not refused");
    // The neighbour's own grants are recorded.
    let grown = (records(&server).await - before).saturating_sub(times.len());
    let (p50, p99) = percentiles(&times);
    let verdict = Verdict::new(
        "flood",
        "refused calls",
        grown < refused / 10,
        Figure::count(grown, format!("records of {refused} refused calls")),
    );
    vec![verdict.with(format!("a neighbour's grant meanwhile: {p50:.1} ms, p99 {p99:.1} ms"))]
}

/// Scrubs at the same time: they are one.
pub(crate) async fn scrubs() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let auditor = server.connect("auditor").await;
    scrub(&auditor).await.unwrap();
    let before = processor(&server);
    scrub(&auditor).await.unwrap();
    let one = processor(&server) - before;
    let before = processor(&server);
    let mut scrubbing = JoinSet::new();
    for _ in 0..SCRUBS {
        let auditor = auditor.clone();
        scrubbing.spawn(async move { scrub(&auditor).await });
    }
    let mut times = Vec::new();
    let mut done = 0;
    while !scrubbing.is_empty() {
        times.push(neighbour.ask().await.unwrap());
        while let Some(scrubbed) = scrubbing.try_join_next() {
            done += usize::from(scrubbed.unwrap().is_ok());
        }
    }
    let all = processor(&server) - before;
    let (p50, p99) = percentiles(&times);
    let ratio = all.as_secs_f64() / one.as_secs_f64();
    let detail = format!(
        "{done} of {SCRUBS} ended well; {:.1} ms of the processor for one; \
         a neighbour's grant meanwhile: {p50:.1} ms, p99 {p99:.1} ms",
        one.as_secs_f64() * 1_000.0
    );
    let figure = Figure::of(ratio, format!("× the processor time of one scrub for {SCRUBS} at once"));
    // Alone, each would take as much as one: what they share is most of it.
    vec![Verdict::new("A17", "scrubs at once", done > 0 && ratio * 2.0 < SCRUBS_AT_ONCE, figure).with(detail)]
}

/// Whether it read everything.
async fn scrub(auditor: &Connection) -> Result<(), String> {
    let mut answers = auditor.audit().scrub(ScrubRequest {}).await.map_err(|status| status.to_string())?.into_inner();
    let mut finished = false;
    while let Some(answer) = answers.message().await.map_err(|status| status.to_string())? {
        finished = answer.finished;
    }
    if finished { Ok(()) } else { Err("cut off".to_owned()) }
}

/// Records in the log.
async fn records(server: &DevServer) -> usize {
    let tails = server.glance().await.store.audit_tails().await.unwrap();
    usize::try_from(tails.iter().map(|tail| tail.sequence).sum::<u64>()).unwrap()
}

/// What the threads of the server have used of the processor.
fn processor(server: &DevServer) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let used = |path: std::path::PathBuf| std::fs::read_to_string(path).ok()?.split(' ').next()?.parse::<u64>().ok();
    Duration::from_nanos(tasks.filter_map(|task| used(task.ok()?.path().join("schedstat"))).sum())
}

const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 66));
const IDLE: usize = 200;
const CALLS: usize = 3_000;
const CALLERS: usize = 4;
const SCRUBS: usize = 24;
const SCRUBS_AT_ONCE: f64 = 24.0;
