//! A6: requests whose body never ends, and what the server holds for them.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use attacker::{Attacker, Cut, Hoard, unfinished};
use kms_client::proto::DisablePrincipalRequest;
use kms_tests::DevServer;
use tonic::{Code, transport::Channel};

use crate::{
    scene::{Neighbour, memory_mib, percentiles, request_id, urn},
    verdict::{Figure, Verdict},
};

/// Of a principal that is enabled, and of one that is not; and how a single one ends.
pub(crate) async fn unfinished_requests() -> Vec<Verdict> {
    let server = DevServer::start();
    let neighbour = Neighbour::settle(&server, "other", "4D4D4D0000000077", 40).await;
    let flooder = Neighbour::settle(&server, "flooder", "4D4D4D0000000078", 41).await;
    let attacker = Attacker::of(&flooder.profile).unwrap();
    // Before the flood: what the server needs for ordinary calls is not counted.
    let mut times = Vec::new();
    for _ in 0..20 {
        times.push(neighbour.ask_anew().await.unwrap());
    }
    let (quiet, _) = percentiles(&times);

    let slow = attacker.channel(ELSEWHERE).await.unwrap();
    let single = tokio::spawn(unfinished(slow, SMALL_CALL, SMALL, Arc::new(AtomicUsize::new(0))));
    let connections = [attacker.channel(ELSEWHERE).await.unwrap(), attacker.channel(ELSEWHERE).await.unwrap()];
    let (held, hoard) = hoard(&server, &connections).await;
    let mut beside = Vec::new();
    for _ in 0..20 {
        beside.push(neighbour.ask_anew().await);
    }
    let answered: Vec<Duration> = beside.iter().filter_map(|answer| answer.clone().ok()).collect();
    let (p50, p99) = percentiles(&answered);
    let figure = Figure::of(held, format!("MiB held for 2 connections × {REQUESTS} unfinished requests"));
    let detail = format!(
        "{} octets taken, {} requests cut, {} open; \
         a neighbour's new connection and grant: {quiet:.1} ms, then {p50:.1} ms, p99 {p99:.1} ms",
        hoard.octets_sent(),
        hoard.cut(),
        hoard.open()
    );
    let enabled = Verdict::new("A6", "unfinished requests", held < GOAL_MIB && answered.len() == beside.len(), figure)
        .with(detail);
    hoard.end().await;
    drop(connections);

    let cut = tokio::time::timeout(BODY_WITHIN, single).await;
    let figure = Figure::count(usize::from(cut.is_err()), "of 1 requests without its last octet still waits");
    let ended = Verdict::new("A6", "a request that is never finished", cut.is_ok(), figure).with(format!("{cut:?}"));

    let officer = server.connect("officer-1").await;
    let disable = DisablePrincipalRequest {
        request_id: request_id(),
        principal: urn("head-end", "flooder"),
        reason: "a test".to_owned(),
    };
    officer.principals().disable_principal(disable).await.unwrap();
    vec![enabled, ended, disabled(&server, &attacker).await]
}

/// A disabled principal is cut at its first call, before its body is there.
async fn disabled(server: &DevServer, attacker: &Attacker) -> Verdict {
    let attack = "unfinished requests of a disabled principal";
    let (Ok(one), Ok(other)) = (attacker.channel(ELSEWHERE).await, attacker.channel(ELSEWHERE).await) else {
        return Verdict::new("A6", attack, true, Figure::of(0.0, "MiB held")).with("it gets no connection");
    };
    let first = unfinished(one.clone(), SMALL_CALL, SMALL, Arc::new(AtomicUsize::new(0)));
    let first = tokio::time::timeout(Duration::from_secs(5), first).await.ok();
    let refused = [Code::Unauthenticated, Code::PermissionDenied].map(|code| Cut::Status(code as i32));
    let is_cut = first.is_some_and(|cut| cut == Cut::Broken || refused.contains(&cut));
    let connections: Vec<Channel> = vec![one, other];
    let (held, hoard) = hoard(server, &connections).await;
    let detail = format!(
        "its first call: {}; {} octets taken, {} requests open",
        first.map_or_else(|| "waits for the body".to_owned(), |cut| format!("{cut:?}")),
        hoard.octets_sent(),
        hoard.open()
    );
    hoard.end().await;
    Verdict::new("A6", attack, is_cut && held < GOAL_MIB, Figure::of(held, "MiB held")).with(detail)
}

/// Hoards until the server takes no more, or holds far too much: what it holds then, in MiB.
async fn hoard(server: &DevServer, connections: &[Channel]) -> (f64, Hoard) {
    let before = memory_mib(server.pid(), "VmRSS");
    let hoard = Hoard::begin(connections, REQUESTS);
    let mut most = before;
    let enough = || {
        most = most.max(memory_mib(server.pid(), "VmRSS"));
        most - before > FAR_TOO_MUCH_MIB
    };
    hoard.settle(HOARD_WITHIN, enough).await;
    (most - before, hoard)
}

/// Not the neighbour's address.
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 66));
const SMALL_CALL: &str = "/meterkms.v1.GrantService/OpenSession";
const SMALL: usize = 128;
const REQUESTS: usize = 250;
const GOAL_MIB: f64 = 32.0;
/// The attack ends here: the machine that tests run on is not to suffer.
const FAR_TOO_MUCH_MIB: f64 = 256.0;
const HOARD_WITHIN: Duration = Duration::from_secs(20);
/// A request of an honest client is there in a second, or in ten over a bad line.
const BODY_WITHIN: Duration = Duration::from_secs(40);
