//! What only PostgreSQL must do: several servers on one database, and settings that keep what was
//! committed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

mod common;

use std::{process::Stdio, sync::Arc, time::Duration};

use common::*;
use kms_domain::{KeyType, KeyVersionNumber, Owner, SecuritySetupId, UnixMillis};
use kms_store::{
    Changes, Committed, Decision, FingerprintOwner, FingerprintPrefix, FingerprintPut, Lookup, MeterPut, Reads,
    RequestPut, RequestRow, RowKind, SealedPut, Store, StoreConfig, StoreError,
};
use kms_store_testing::PostgresCluster;

/// Two servers on one database.
async fn two() -> (Fixture, Arc<dyn Store>) {
    let f = Fixture::postgres().await;
    let other = kms_store::open(&f.config).await.unwrap();
    (f, other)
}

/// I4: of two servers that import the same key value at the same time, one sees the other's.
#[tokio::test(flavor = "multi_thread")]
async fn a_fingerprint_is_found_by_one_of_two_importers() {
    let (f, other) = two().await;
    for round in 0..30_u8 {
        let prefix = FingerprintPrefix([round; 8]);
        let import = |store: Arc<dyn Store>, number: u64| async move {
            let owner = FingerprintOwner {
                owner: Owner::Meter(title(number)),
                setup: SecuritySetupId::DEFAULT,
                key_type: KeyType::GUEK,
                version: KeyVersionNumber::FIRST,
            };
            let mut found = 0;
            let committed = store
                .transact(Reads { fingerprints: vec![prefix], ..Reads::default() }, &mut |set| {
                    found = set.fingerprint_owners(prefix).unwrap().len();
                    Decision::Commit(Box::new(Changes {
                        fingerprints: vec![FingerprintPut { prefix, owner }],
                        ..Changes::default()
                    }))
                })
                .await;
            assert_eq!(committed, Ok(Committed::Written));
            found
        };
        let (first, second) =
            tokio::join!(tokio::spawn(import(Arc::clone(&f.store), 1)), tokio::spawn(import(Arc::clone(&other), 2)));
        assert_eq!(first.unwrap() + second.unwrap(), 1, "round {round}");
    }
}

/// What was read as absent stays absent: otherwise both of these would write.
#[tokio::test(flavor = "multi_thread")]
async fn absence_is_unchanged_until_the_commit() {
    let (f, other) = two().await;
    for round in 0..30_u8 {
        let claim = |store: Arc<dyn Store>, mine: u8, theirs: u8| async move {
            let name = |number: u8| (RowKind::CounterDomain, vec![round, number]);
            store
                .transact(Reads { sealed: vec![name(mine), name(theirs)], ..Reads::default() }, &mut |set| match set
                    .sealed(RowKind::CounterDomain, &[round, theirs])
                {
                    Lookup::Absent => Decision::Commit(Box::new(Changes {
                        sealed: vec![SealedPut {
                            kind: RowKind::CounterDomain,
                            id: vec![round, mine],
                            row: row(1, ""),
                        }],
                        ..Changes::default()
                    })),
                    _ => Decision::Abandon,
                })
                .await
                .unwrap()
        };
        let (first, second) = tokio::join!(
            tokio::spawn(claim(Arc::clone(&f.store), 1, 2)),
            tokio::spawn(claim(Arc::clone(&other), 2, 1))
        );
        let written =
            [first.unwrap(), second.unwrap()].iter().filter(|committed| **committed == Committed::Written).count();
        assert_eq!(written, 1, "round {round}");
    }
}

/// What servers count in one row together is counted once each: quotas hold for all of them.
#[tokio::test(flavor = "multi_thread")]
async fn two_servers_lose_no_use_of_a_quota() {
    let (f, other) = two().await;
    let name = (RowKind::QuotaUse, b"urn:meterkms:north:head-end:hes-1".to_vec());
    let mut tasks = tokio::task::JoinSet::new();
    for store in [&f.store, &other, &f.store, &other] {
        let (store, name) = (Arc::clone(store), name.clone());
        tasks.spawn(async move {
            for _ in 0..25 {
                let reads = Reads { sealed: vec![name.clone()], ..Reads::default() };
                let mut count = |set: &kms_store::ReadSet| {
                    let generation = set.sealed(name.0, &name.1).present().map_or(1, |found| found.generation + 1);
                    let put =
                        SealedPut { kind: name.0, id: name.1.clone(), row: row(generation, &generation.to_string()) };
                    Decision::Commit(Box::new(Changes { sealed: vec![put], ..Changes::default() }))
                };
                assert_eq!(store.transact(reads, &mut count).await, Ok(Committed::Written));
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(f.store.sealed(name.0, &name.1).await.unwrap(), Some(row(100, "100")));
}

/// I4: a counter that two servers advance is never allocated twice.
#[tokio::test(flavor = "multi_thread")]
async fn two_servers_deal_no_number_twice() {
    let (f, other) = two().await;
    insert_meters(&*f.store, 1..101).await;
    let titles: Vec<_> = (1..101).map(title).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for store in [&f.store, &other, &f.store, &other] {
        let (store, titles) = (Arc::clone(store), titles.clone());
        tasks.spawn(async move {
            let mut leased = Vec::new();
            for _ in 0..20 {
                let mut now = Vec::new();
                store
                    .transact(Reads { meters: titles.clone(), ..Reads::default() }, &mut |set| {
                        now = titles
                            .iter()
                            .map(|title| (*title, set.meter(*title).present().unwrap().generation + 1))
                            .collect();
                        let meters = now
                            .iter()
                            .map(|(title, generation)| MeterPut::update(*title, row(*generation, "")))
                            .collect();
                        Decision::Commit(Box::new(Changes { meters, ..Changes::default() }))
                    })
                    .await
                    .unwrap();
                leased.append(&mut now);
            }
            leased
        });
    }
    let mut leased: Vec<_> = tasks.join_all().await.concat();
    assert_eq!(leased.len(), 4 * 20 * 100);
    leased.sort();
    leased.dedup();
    assert_eq!(leased.len(), 4 * 20 * 100);
}

/// Both servers get the same request: one executes it, the other sees its outcome.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_to_two_servers_is_carried_out_once() {
    let (f, other) = two().await;
    for round in 0..30_u8 {
        let key = request_key("hes", 0);
        let ask = |store: Arc<dyn Store>, mark: u8| {
            let key = key.clone();
            async move {
                let mut answer = 0;
                store
                    .transact(Reads { requests: vec![key.clone()], ..Reads::default() }, &mut |set| match set
                        .request(&key)
                    {
                        Lookup::Present(done) => {
                            answer = done.outcome[0];
                            Decision::Abandon
                        }
                        _ => {
                            answer = mark;
                            let row = RequestRow { digest: [0; 32], outcome: vec![mark], expires: UnixMillis(1) };
                            Decision::Commit(Box::new(Changes {
                                requests: vec![RequestPut { key: key.clone(), row }],
                                ..Changes::default()
                            }))
                        }
                    })
                    .await
                    .unwrap();
                answer
            }
        };
        let (first, second) =
            tokio::join!(tokio::spawn(ask(Arc::clone(&f.store), 1)), tokio::spawn(ask(Arc::clone(&other), 2)));
        assert_eq!(first.unwrap(), second.unwrap(), "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_lose_commits_are_refused() {
    let cluster = PostgresCluster::start(&[]).unwrap();
    let config = StoreConfig::parse(&cluster.create_database().await.unwrap()).unwrap();
    let store = kms_store::open(&config).await.unwrap();
    let setting = async || match kms_store::open(&config).await.map(drop) {
        Err(StoreError::UnsafeSetting { setting, .. }) => setting,
        other => panic!("{other:?}"),
    };
    for (statement, name) in [
        ("ALTER DATABASE kms0 SET synchronous_commit = off", "synchronous_commit"),
        ("ALTER DATABASE kms0 SET synchronous_commit = local", "synchronous_commit"),
    ] {
        cluster.execute("postgres", statement.into()).await.unwrap();
        assert_eq!(setting().await, name);
    }
    cluster.execute("postgres", "ALTER DATABASE kms0 RESET synchronous_commit".into()).await.unwrap();
    store.check().await.unwrap();
    // A standby that receives asynchronously could be failed over to.
    let archive = cluster.directory().join("archive");
    let mut receiver = {
        let mut mkdir = cluster.program("psql").unwrap();
        assert!(
            mkdir
                .args(["-d", "postgres", "-c", &format!("\\! mkdir {}", archive.display())])
                .stdout(Stdio::null())
                .status()
                .unwrap()
                .success()
        );
        cluster.program("pg_receivewal").unwrap().arg("-D").arg(&archive).stderr(Stdio::null()).spawn().unwrap()
    };
    while store.check().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(setting().await, "synchronous_standby_names");
    let replica = StoreConfig { read_replicas: vec!["pg_receivewal".into()], ..config.clone() };
    kms_store::open(&replica).await.unwrap();
    receiver.kill().unwrap();
    receiver.wait().unwrap();
    drop(store);
    drop(cluster);
    for name in ["fsync", "full_page_writes"] {
        let cluster = PostgresCluster::start(&[(name, "off")]).unwrap();
        let config = StoreConfig::parse(&cluster.create_database().await.unwrap()).unwrap();
        assert!(
            matches!(kms_store::open(&config).await.map(drop), Err(StoreError::UnsafeSetting { setting, .. }) if setting == name)
        );
    }
}

/// PostgreSQL says so with SQLSTATE 53100; a trigger says it here.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_full_and_is_free_again_is_written_to() {
    let f = Fixture::postgres().await;
    let raise = "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no space' USING ERRCODE = '53100'; END $$";
    kms_store_testing::execute(&f.config.database, raise).await.unwrap();
    // The trigger of a statement fails it at once; a deferred one fails the COMMIT.
    for (round, trigger) in
        (0_u64..).zip(["TRIGGER full_disk BEFORE INSERT", "CONSTRAINT TRIGGER full_disk AFTER INSERT"])
    {
        let deferred = if round == 0 { "" } else { "DEFERRABLE INITIALLY DEFERRED" };
        let create = format!("CREATE {trigger} ON audit {deferred} FOR EACH ROW EXECUTE FUNCTION full_disk()");
        kms_store_testing::execute(&f.config.database, &create).await.unwrap();
        let append = |sequence| {
            let (store, changes) =
                (Arc::clone(&f.store), Changes { audit: vec![record(f.writer, sequence)], ..Changes::default() });
            async move { write(&*store, changes).await }
        };
        // Each connection of the pool meets it.
        for refused in futures::future::join_all((0..40).map(|_| append(round))).await {
            assert!(
                matches!(&refused, Err(StoreError::Unavailable { cause, .. }) if cause.contains("53100")),
                "{refused:?}"
            );
        }
        kms_store_testing::execute(&f.config.database, "DROP TRIGGER full_disk ON audit").await.unwrap();
        append(round).await.unwrap();
    }
}

#[tokio::test]
async fn plaintext_over_a_network_is_refused() {
    for address in ["postgres://kms@db.example/kms", "postgres://kms@192.0.2.1/kms?sslmode=require"] {
        let refused = kms_store::open(&StoreConfig::parse(address).unwrap()).await.map(drop);
        assert!(matches!(refused, Err(StoreError::UnsafeSetting { setting: "sslmode", .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn a_socket_serves_too_and_the_timeline_is_known() {
    let f = Fixture::postgres().await;
    let timeline = f.store.timeline().await.unwrap().unwrap();
    assert_eq!(timeline.number, 1);
    let database = match &f.config.database {
        kms_store::DatabaseLocation::Postgres(address) => address.rsplit('/').next().unwrap().to_owned(),
        kms_store::DatabaseLocation::Sqlite(_) => unreachable!(),
    };
    let local = kms_store::open(&StoreConfig::parse(&cluster().socket_address(&database)).unwrap()).await.unwrap();
    assert_eq!(local.timeline().await.unwrap(), Some(timeline));
}

#[tokio::test]
async fn a_server_that_does_not_run_is_unavailable_and_the_password_is_not_told() {
    let mut config = StoreConfig::parse("postgres://kms:hush@127.0.0.1:1/kms").unwrap();
    config.call_timeout = Duration::from_millis(500);
    let error = kms_store::open(&config).await.map(drop).unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }));
    assert!(!format!("{error} {error:?} {config:?}").contains("hush"));
}
