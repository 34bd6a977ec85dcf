//! I4: two servers on one PostgreSQL, two head-ends, crashes in between, and a meter that refuses
//! counters that do not increase.

use std::path::Path;

use kms_client::{
    Connection, Profile, Session,
    proto::{ListAuditRecordsRequest, audit_record::Event},
};
use kms_store_testing::PostgresCluster;
use kms_tests::{DevServer, open, put_on_line, read_energy, title};
use meter_sim::nonces::RepeatedNonce;

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
        // Two head-ends under one client title, each with a server of its own, take turns: every
        // newer lease ends the older.
        let connections = [first.connect("head-end").await, second.connect("head-end").await];
        for turn in 0..6 {
            let session = open(&connections[turn % 2], &profile, title(9), 20).await.unwrap();
            leases.push(lease(&session));
            read_energy(address, &session, title(9))
                .await
                .unwrap_or_else(|error| panic!("round {round}, turn {turn}: the meter refused: {error}"));
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
    let racing: Vec<_> =
        (0..16).map(|racer| tokio::spawn(race(connections[racer % 2].clone(), profile.clone()))).collect();
    let mut leases = Vec::new();
    for racer in racing {
        leases.extend(racer.await.unwrap());
    }
    leases.sort_unstable();
    assert_eq!(leases.len(), 16 * 10);
    assert!(leases.windows(2).all(|pair| pair[0].1 < pair[1].0), "leases overlap");
}

/// What is put back is an older database. The counters that were allocated after the
/// backup must not be allocated again.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_put_back_allocates_no_counter_again() {
    let mut server = DevServer::start_on_sqlite();
    let mut leased = open_leases(&server).await;
    assert!(server.interrupt());
    let backup = Backup::take(server.state());
    server.restart();
    for _ in 0..3 {
        extend_rising(&mut leased, open_leases(&server).await);
    }
    // Twice: the second time the database does not even know of the first.
    for _ in 0..2 {
        assert!(server.interrupt());
        backup.put_back(server.state());
        server.restart();
        extend_rising(&mut leased, open_leases(&server).await);
        assert_eq!(restores(&server).await, 1, "the record is in the log");
    }
    assert!(server.interrupt());
    server.restart();
    extend_rising(&mut leased, open_leases(&server).await);
    assert_eq!(restores(&server).await, 1, "a restart is no restore");
}

/// Without its watermark the server cannot know; an operator tells.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_declares_a_restore() {
    let mut server = DevServer::start_on_sqlite();
    let mut leased = open_leases(&server).await;
    assert!(server.interrupt());
    let backup = Backup::take(server.state());
    server.restart();
    extend_rising(&mut leased, open_leases(&server).await);
    assert!(server.interrupt());
    backup.put_back(server.state());
    std::fs::remove_file(server.state().join("island.db.watermark")).unwrap();
    let output =
        server.command("restored").arg("--config").arg(server.state().join("island/kms-server.toml")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("counts as restored, once"));
    server.restart();
    extend_rising(&mut leased, open_leases(&server).await);
    assert_eq!(restores(&server).await, 1);
}

/// A base backup of PostgreSQL that is restored writes a new timeline.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_timeline_of_postgresql_raises_the_counters() {
    let cluster = PostgresCluster::start(&[]).unwrap();
    let database = cluster.create_database().await.unwrap();
    let mut server = DevServer::start_at(&database);
    let mut leased = open_leases(&server).await;
    let backup = cluster.back_up().unwrap();
    extend_rising(&mut leased, open_leases(&server).await);
    assert!(server.interrupt());

    let restored = PostgresCluster::restore(&backup).unwrap();
    let configuration = server.state().join("island/kms-server.toml");
    let text = std::fs::read_to_string(&configuration).unwrap();
    std::fs::write(&configuration, text.replace(&database, &restored.address(database.rsplit('/').next().unwrap())))
        .unwrap();
    // The timeline alone tells.
    std::fs::remove_file(server.state().join("island/watermark")).unwrap();
    server.restart();
    extend_rising(&mut leased, open_leases(&server).await);
    assert_eq!(restores(&server).await, 1);
}

/// Leases of two meters, as (meter, first, last).
async fn open_leases(server: &DevServer) -> Vec<(u64, u32, u32)> {
    let connection = server.connect("head-end").await;
    let profile = server.profile("head-end");
    let mut leases = Vec::new();
    for meter in [3, 4, 3] {
        let (first, last) = lease(&open(&connection, &profile, title(meter), 50).await.unwrap());
        leases.push((meter, first, last));
    }
    leases
}

/// Every newer lease of a meter begins above all older ones.
fn extend_rising(leased: &mut Vec<(u64, u32, u32)>, newer: Vec<(u64, u32, u32)>) {
    for (meter, first, last) in newer {
        let highest = leased.iter().filter(|(other, ..)| *other == meter).map(|(_, _, last)| *last).max();
        assert!(
            highest.is_none_or(|highest| first > highest),
            "counter {first} of meter {meter} was leased before: {leased:?}"
        );
        leased.push((meter, first, last));
    }
}

/// How many restores the log tells of.
async fn restores(server: &DevServer) -> usize {
    let connection = server.connect("auditor").await;
    let answer = connection
        .audit()
        .list_audit_records(ListAuditRecordsRequest { page_size: 1_000, ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    let is_restore = |event: &Event| matches!(event, Event::SecurityEvent(event) if event.kind == "database-restored");
    answer.records.iter().filter(|record| record.event.as_ref().is_some_and(is_restore)).count()
}

/// The files of a SQLite database whose server has ended.
struct Backup(tempfile::TempDir);

impl Backup {
    const FILES: [&str; 3] = ["island.db", "island.db-wal", "island.db-shm"];

    fn take(state: &Path) -> Self {
        let backup = Self(tempfile::tempdir().unwrap());
        for name in Self::FILES {
            if state.join(name).exists() {
                std::fs::copy(state.join(name), backup.0.path().join(name)).unwrap();
            }
        }
        backup
    }

    fn put_back(&self, state: &Path) {
        for name in Self::FILES {
            let _ = std::fs::remove_file(state.join(name));
            if self.0.path().join(name).exists() {
                std::fs::copy(self.0.path().join(name), state.join(name)).unwrap();
            }
        }
    }
}

async fn race(connection: Connection, profile: Profile) -> Vec<(u32, u32)> {
    let mut leases = Vec::new();
    for _ in 0..10 {
        leases.push(lease(&open(&connection, &profile, title(4), 7).await.unwrap()));
    }
    leases
}
