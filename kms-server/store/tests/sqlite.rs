//! What only SQLite must do: one server, one file, and commits that survive the process.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
};

use common::*;
use kms_domain::UnixMillis;
use kms_store::{AuditAppend, Changes, ShipmentRow, ShipmentState, StoreConfig, StoreError, UploadId};

#[tokio::test]
async fn a_second_server_is_refused_by_whatever_path_it_comes() {
    let f = Fixture::sqlite().await;
    let directory = f.directory.as_ref().unwrap().path();
    assert!(matches!(kms_store::open(&f.config).await.map(drop), Err(StoreError::InUse { .. })));
    let link = directory.join("link.db");
    std::os::unix::fs::symlink(directory.join("kms.db"), &link).unwrap();
    let linked = StoreConfig::parse(&format!("sqlite:{}", link.display())).unwrap();
    assert!(matches!(kms_store::open(&linked).await.map(drop), Err(StoreError::InUse { .. })));
    // A process that still holds a closed database does not keep others out, and writes nothing.
    f.store.close().await;
    let other = kms_store::open(&linked).await.unwrap();
    assert!(
        f.store.sizes().await.is_err()
            && write(&*f.store, Changes { audit: vec![record(f.writer, 0)], ..Changes::default() }).await.is_err()
    );
    assert!(matches!(kms_store::open(&f.config).await.map(drop), Err(StoreError::InUse { .. })));
    other.sizes().await.unwrap();
}

#[tokio::test]
async fn nobody_else_may_read_the_files() {
    let f = Fixture::sqlite().await;
    write(&*f.store, Changes { audit: vec![record(f.writer, 0)], ..Changes::default() }).await.unwrap();
    let mut files = 0;
    for entry in std::fs::read_dir(f.directory.as_ref().unwrap().path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{}", entry.path().display());
        files += 1;
    }
    assert!(files >= 3);
}

#[tokio::test]
async fn what_is_no_database_is_refused() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("kms.db");
    std::fs::write(&path, [0x5A; 8192]).unwrap();
    let config = StoreConfig::parse(&format!("sqlite:{}", path.display())).unwrap();
    assert!(matches!(kms_store::open(&config).await.map(drop), Err(StoreError::Corrupt { .. })));
    let nowhere = StoreConfig::parse("sqlite:/nonexistent/kms.db").unwrap();
    assert!(matches!(kms_store::open(&nowhere).await.map(drop), Err(StoreError::Unavailable { .. })));
    assert!(StoreConfig::parse("mysql://x").is_err() && StoreConfig::parse("sqlite:").is_err());
}

/// I2: what was acknowledged is there after kill -9.
#[tokio::test]
async fn acknowledged_commits_survive_a_kill() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("kms.db");
    for round in 1..4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_commits_until_it_is_killed", "--ignored", "--nocapture"])
            .env(CHILD_DATABASE, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut writer = None;
        let mut acknowledged = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok) {
            if let Some(id) = line.strip_prefix("writer ") {
                writer = Some(kms_domain::WriterId::parse(id).unwrap());
            }
            if let Some(sequence) = line.strip_prefix("committed ") {
                acknowledged = sequence.parse().unwrap();
                if acknowledged >= 40 * round {
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        let store = kms_store::open(&StoreConfig::parse(&format!("sqlite:{}", path.display())).unwrap()).await.unwrap();
        let records = store.audit_of_writer(writer.unwrap(), 0, 100_000).await.unwrap();
        assert!(records.len() as u64 > acknowledged, "{} records, {acknowledged} acknowledged", records.len());
        for (sequence, found) in (0..).zip(records) {
            assert_eq!(found, record(writer.unwrap(), sequence));
        }
    }
}

/// Not a test by itself: the process of the test above.
#[tokio::test]
#[ignore = "a child process of `acknowledged_commits_survive_a_kill`"]
async fn child_that_commits_until_it_is_killed() {
    let path = std::env::var_os(CHILD_DATABASE).expect("the test above starts this one");
    let store = kms_store::open(&StoreConfig::parse(&format!("sqlite:{}", path.display())).unwrap()).await.unwrap();
    let writer = writer_id();
    store.register_server(writer, "child").await.unwrap();
    println!("\nwriter {writer}");
    for sequence in 0..100_000 {
        write(&*store, Changes { audit: vec![record(writer, sequence)], ..Changes::default() }).await.unwrap();
        println!("committed {sequence}");
        std::io::stdout().flush().unwrap();
    }
}

/// A disk that is full, as far as one process sees it: no file may grow. SQLite rolls a transaction
/// back by itself then.
#[tokio::test]
async fn a_disk_that_was_full_and_is_free_again_is_written_to() {
    let directory = tempfile::TempDir::new().unwrap();
    let output = Command::new("sh")
        // Without this a process that reaches its limit gets a signal.
        .args(["-c", "trap '' XFSZ; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child_whose_disk_is_full_for_a_while", "--ignored", "--nocapture"])
        .env(CHILD_FULL_DISK, directory.path().join("kms.db"))
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && out.contains("written again"),
        "{out}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Not a test by itself: the process of the test above.
#[tokio::test]
#[ignore = "a child process of `a_disk_that_was_full_and_is_free_again_is_written_to`"]
async fn child_whose_disk_is_full_for_a_while() {
    let path = std::env::var_os(CHILD_FULL_DISK).expect("the test above starts this one");
    let limit = |octets: &str| {
        let status = Command::new("prlimit")
            .args(["--pid", &std::process::id().to_string(), &format!("--fsize={octets}:")])
            .status();
        assert!(status.unwrap().success());
    };
    let store = kms_store::open(&StoreConfig::parse(&format!("sqlite:{}", path.display())).unwrap()).await.unwrap();
    let writer = writer_id();
    store.register_server(writer, "child").await.unwrap();
    let large = |sequence| AuditAppend { record: vec![7; 256 * 1024], ..record(writer, sequence) };
    let append = async |sequence| write(&*store, Changes { audit: vec![large(sequence)], ..Changes::default() }).await;
    append(0).await.unwrap();
    let upload = UploadId([1; 16]);
    write(&*store, Changes { shipments: vec![shipment(upload)], audit: vec![record(writer, 1)], ..Changes::default() })
        .await
        .unwrap();
    for (round, attempts) in (0_u64..).zip([1, 5]) {
        limit("16384");
        for _ in 0..attempts {
            let refused = append(2 + round).await;
            assert!(
                matches!(&refused, Err(StoreError::Unavailable { cause, .. }) if cause.contains("disk")),
                "{refused:?}"
            );
            let refused = store.append_shipment_chunk(upload, round * 65_536, vec![7; 65_536], UnixMillis(1)).await;
            assert!(
                matches!(&refused, Err(StoreError::Unavailable { cause, .. }) if cause.contains("disk")),
                "{refused:?}"
            );
            assert!(store.check().await.is_err(), "there is no room");
        }
        limit("unlimited");
        store.check().await.unwrap();
        append(2 + round).await.unwrap();
        store.append_shipment_chunk(upload, round * 65_536, vec![7; 65_536], UnixMillis(1)).await.unwrap();
    }
    let records = store.audit_of_writer(writer, 0, 10).await.unwrap();
    assert_eq!(records.iter().map(|record| record.sequence).collect::<Vec<_>>(), [0, 1, 2, 3]);
    println!("written again");
}

fn shipment(upload: UploadId) -> ShipmentRow {
    ShipmentRow {
        upload,
        generation: 1,
        sha256: [8; 32],
        size: 1 << 20,
        batch: String::new(),
        principal: principal("vendor"),
        state: ShipmentState::Receiving,
        received: 0,
        next_line: 0,
        imported: 0,
        refused: 0,
        created: UnixMillis(1),
        updated: UnixMillis(1),
        progress: vec![],
    }
}

const CHILD_DATABASE: &str = "KMS_STORE_TEST_DATABASE";
const CHILD_FULL_DISK: &str = "KMS_STORE_TEST_FULL_DISK";
