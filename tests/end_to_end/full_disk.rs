//! A disk that was full and is free again: the server goes on by itself.

use std::time::{Duration, Instant};

use kms_client::SessionError;
use kms_tests::{DevServer, open, title};
use tonic::Code;

/// On SQLite, whose files are the server's own. For PostgreSQL see the tests of kms-store.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_disk_was_full_goes_on_by_itself() {
    let server = DevServer::start_on_sqlite();
    let (connection, profile) = (server.connect("head-end").await, server.profile("head-end"));
    open(&connection, &profile, title(1), 10).await.unwrap();
    for _ in 0..2 {
        server.limit_files("16384");
        // I2: nothing is granted that cannot be recorded, and the caller is told so.
        for number in 1..8 {
            match open(&connection, &profile, title(number), 10).await {
                Err(SessionError::Server(error)) => assert_eq!(error.code(), Code::Unavailable, "{error}"),
                other => panic!("{other:?}"),
            }
        }
        server.limit_files("unlimited");
        let began = Instant::now();
        while let Err(error) = open(&connection, &profile, title(1), 10).await {
            assert!(began.elapsed() < Duration::from_secs(60), "it does not go on: {error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
