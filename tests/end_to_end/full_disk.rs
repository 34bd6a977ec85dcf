//! A disk that was full and is free again: the server continues by itself.

use std::time::{Duration, Instant};

use kms_client::{
    new_request_id,
    proto::{OpenSessionRequest, OpenSessionResponse},
};
use kms_tests::{DevServer, terms, title};
use tonic::{Code, Status};

/// On SQLite, whose files are the server's own. For PostgreSQL see the tests of kms-store.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_disk_was_full_goes_on_by_itself() {
    let server = DevServer::start_on_sqlite();
    let connection = server.connect("head-end").await;
    // Without the patience of the client's own calls.
    let open = async |number| -> Result<OpenSessionResponse, Status> {
        let (request_id, meter) = (new_request_id().octets().to_vec().into(), title(number).octets().to_vec().into());
        let request = OpenSessionRequest { request_id, meter, terms: Some(terms(10)) };
        connection.grants().open_session(request).await.map(tonic::Response::into_inner)
    };
    open(1).await.unwrap();
    for _ in 0..2 {
        server.limit_files("16384");
        // I2: nothing is granted that cannot be recorded, and the caller is told so.
        for number in 1..8 {
            let refused = open(number).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        }
        server.limit_files("unlimited");
        let began = Instant::now();
        while let Err(error) = open(1).await {
            assert!(began.elapsed() < Duration::from_secs(60), "it does not go on: {error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
