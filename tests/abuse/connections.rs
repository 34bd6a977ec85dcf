//! A8: one principal, all connections; a server with few file descriptors.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use attacker::{Attacker, HeldConnection};
use kms_client::proto::DisablePrincipalRequest;
use kms_tests::DevServer;
use tokio::task::JoinSet;

use crate::{
    scene::{Neighbour, percentiles, request_id, urn},
    verdict::{Figure, Verdict},
};

/// A principal opens connections from many addresses until it is refused, enabled and disabled: a
/// neighbour gets in.
pub(crate) async fn of_one_principal() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let flooder = Neighbour::settle(&server, "flooder", "4D4D4D0000000078", 41).await;
    let attacker = Attacker::of(&flooder.profile).unwrap();
    let mut verdicts = Vec::new();
    for status in ["enabled", "disabled"] {
        if status == "disabled" {
            let officer = server.connect("officer-1").await;
            let disable = DisablePrincipalRequest {
                request_id: request_id(),
                principal: urn("head-end", "flooder"),
                reason: "a test".to_owned(),
            };
            officer.principals().disable_principal(disable).await.unwrap();
        }
        let held = hold(&attacker, MOST).await;
        let mut times = Vec::new();
        let mut unanswered = String::new();
        for _ in 0..10 {
            match neighbour.ask_anew().await {
                Ok(time) => times.push(time),
                Err(error) => unanswered = error,
            }
        }
        let open = held.iter().filter(|connection| connection.is_open()).count();
        let (p50, p99) = percentiles(&times);
        let figure = Figure::count(open, format!("of {MOST} connections of one {status} principal open"));
        let verdict = Verdict::new(
            "A8",
            format!("connections of one {status} principal"),
            open < MOST && unanswered.is_empty(),
            figure,
        );
        verdicts.push(
            verdict.with(format!("a neighbour's new connection and grant: {p50:.1} ms, p99 {p99:.1} ms; {unanswered}")),
        );
    }
    verdicts
}

/// With 256 descriptors: a neighbour is served on its connection and on a new one, and the
/// watermark is written.
pub(crate) async fn few_descriptors() -> Vec<Verdict> {
    let mut server = DevServer::start();
    server.restart_with_open_files(DESCRIPTORS);
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let flooder = Neighbour::settle(&server, "flooder", "4D4D4D0000000078", 41).await;
    let attacker = Attacker::of(&flooder.profile).unwrap();
    let held = hold(&attacker, MOST).await;
    let (mut seen, mut failed) = (Vec::new(), 0);
    let mut note = |what: &str, outcome: Result<Duration, String>| match outcome {
        Ok(time) => seen.push(format!("{what}: {:.1} ms", time.as_secs_f64() * 1_000.0)),
        Err(error) => {
            failed += 1;
            seen.push(format!("{what}: {error}"));
        }
    };
    let before = watermark(&server);
    note(
        "a grant",
        tokio::time::timeout(WITHIN, neighbour.ask()).await.unwrap_or_else(|_| Err("no answer".to_owned())),
    );
    let anew = tokio::time::timeout(WITHIN, neighbour.ask_anew()).await;
    note("over a new connection", anew.unwrap_or_else(|_| Err("no answer".to_owned())));
    let began = Instant::now();
    let written = loop {
        if watermark(&server) != before {
            break Ok(began.elapsed());
        }
        if began.elapsed() > WRITTEN_WITHIN {
            break Err("not written".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    note("the watermark", written);
    let open = held.iter().filter(|connection| connection.is_open()).count();
    let figure = Figure::count(failed, format!("of 3 duties not done by a server with {DESCRIPTORS} descriptors"));
    let verdict = Verdict::new("A8", "all file descriptors", failed == 0, figure);
    vec![verdict.with(format!("{open} of {MOST} connections open; {}", seen.join("; ")))]
}

/// Opens connections from many addresses, until a whole round is refused: those that the server
/// accepted.
pub(crate) async fn hold(attacker: &Attacker, most: usize) -> Vec<HeldConnection> {
    let mut held = Vec::new();
    for round in 0..most.div_ceil(AT_ONCE) {
        let mut opening = JoinSet::new();
        for number in round * AT_ONCE..most.min((round + 1) * AT_ONCE) {
            let from = IpAddr::V4(Ipv4Addr::new(127, 0, 1, u8::try_from(number % ADDRESSES + 1).unwrap()));
            let attacker = attacker.clone();
            opening.spawn(async move { tokio::time::timeout(OPENS_WITHIN, attacker.hold(from)).await });
        }
        let before = held.len();
        while let Some(opened) = opening.join_next().await {
            held.extend(opened.unwrap().into_iter().flatten());
        }
        // A server that says good-bye closes a moment later.
        held.retain(HeldConnection::is_open);
        if held.len() <= before {
            break;
        }
    }
    held
}

fn watermark(server: &DevServer) -> Option<String> {
    let places = ["island.db.watermark", "island/watermark"];
    places.iter().find_map(|place| std::fs::read_to_string(server.state().join(place)).ok())
}

/// More than one principal has use for.
const MOST: usize = 600;
const DESCRIPTORS: u32 = 256;
const AT_ONCE: usize = 20;
const ADDRESSES: usize = 100;
/// Where a server does not even accept, its kernel does.
const OPENS_WITHIN: Duration = Duration::from_secs(5);
const WITHIN: Duration = Duration::from_secs(20);
/// A server looks every ten seconds whether there is something to remember.
const WRITTEN_WITHIN: Duration = Duration::from_secs(40);
