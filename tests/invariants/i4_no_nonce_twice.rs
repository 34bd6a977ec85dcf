//! I4: two servers on one PostgreSQL, two head-ends, crashes in between, and a meter that refuses counters that do not increase.

use kms_client::{Connection, Profile, Session};
use kms_tests::{DevServer, open, put_on_line, read_energy, title};
use meter_sim::inspect::RepeatedNonce;

fn lease(session: &Session) -> (u32, u32) {
    let counters = session.keys.meters[0].counters.as_ref().unwrap();
    (counters.next().unwrap(), counters.next().unwrap() + counters.remaining() - 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_two_head_ends_and_crashes_repeat_no_counter_and_meet_no_refusal() {
    let mut first = DevServer::start_on_postgresql();
    let mut second = first.second("b", |text| text).await;
    let profile = first.profile("head-end");
    let meter = first.meter(9);
    let address = put_on_line(&meter).await;
    let mut leases = Vec::new();

    for round in 0..4 {
        // Two head-ends under one client title, each with a server of its own, take turns: every newer lease ends the older.
        let connections = [first.connect("head-end").await, second.connect("head-end").await];
        for turn in 0..6 {
            let session = open(&connections[turn % 2], &profile, title(9), 20).await.unwrap();
            leases.push(lease(&session));
            read_energy(address, &session, title(9)).await.unwrap_or_else(|error| panic!("round {round}, turn {turn}: the meter refused: {error}"));
        }
        match round {
            0 => {
                first.kill();
                first.restart();
            }
            1 => {
                second.kill();
                second = first.second(&format!("b{round}"), |text| text).await;
            }
            _ => {}
        }
    }
    assert!(leases.windows(2).all(|pair| pair[0].1 < pair[1].0), "leases do not rise: {leases:?}");
    assert!(meter.refusals().is_empty(), "{:?}", meter.refusals());
    assert!(RepeatedNonce::find(&[meter]).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_head_ends_never_get_overlapping_leases() {
    let first = DevServer::start_on_postgresql();
    let second = first.second("b", |text| text).await;
    let profile = first.profile("head-end");
    let connections = [first.connect("head-end").await, second.connect("head-end").await];
    let racing: Vec<_> = (0..16).map(|racer| tokio::spawn(race(connections[racer % 2].clone(), profile.clone()))).collect();
    let mut leases = Vec::new();
    for racer in racing {
        leases.extend(racer.await.unwrap());
    }
    leases.sort_unstable();
    assert_eq!(leases.len(), 16 * 10);
    assert!(leases.windows(2).all(|pair| pair[0].1 < pair[1].0), "leases overlap");
}

async fn race(connection: Connection, profile: Profile) -> Vec<(u32, u32)> {
    let mut leases = Vec::new();
    for _ in 0..10 {
        leases.push(lease(&open(&connection, &profile, title(4), 7).await.unwrap()));
    }
    leases
}
