//! I2: no key leaves without a durable record; a log that cannot be written answers an error.

use std::time::{Duration, Instant};

use kms_client::proto::{
    AuditRecord, BeginTransfersRequest, ListAuditRecordsRequest, TransferForm, TransferOrder, audit_record::Event,
    transfer_step::Next,
};
use kms_store::StoreConfig;
use kms_store_testing::Obstruction;
use kms_tests::{CLIENT_TITLE, DevServer, open, title};
use meter_sim::{Obis, security::unwrap_key};
use prost::Message as _;

#[tokio::test(flavor = "multi_thread")]
async fn every_grant_is_in_the_log_under_the_leaf_that_its_holder_got() {
    let mut server = DevServer::start();
    let mut leaves = Vec::new();
    for number in 0..5 {
        leaves.push(
            open(&server.connect("head-end").await, &server.profile("head-end"), title(number), 10)
                .await
                .unwrap()
                .audit_leaf,
        );
    }
    // Right after the answer: what is not durable now is gone.
    server.kill();
    server.restart();
    let records = all_records(&server).await;
    let recorded: Vec<Vec<u8>> = records.iter().map(|record| leaf(&record.encode_to_vec())).collect();
    for leaf in leaves {
        assert!(recorded.contains(&leaf), "a grant's record is not in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_on_the_record_and_a_flood_of_them_is_not() {
    let server = DevServer::start();
    let handheld = server.connect("handheld").await;
    for _ in 0..200 {
        open(&handheld, &server.profile("handheld"), title(0), 10).await.unwrap_err();
    }
    let refused = all_records(&server)
        .await
        .into_iter()
        .filter(|record| matches!(&record.event, Some(Event::Refused(refused)) if refused.action == "openSession"))
        .count();
    assert!((1..=3).contains(&refused), "{refused} records of 200 refusals");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_log_answers_an_error_and_lets_no_key_out() {
    let server = DevServer::start();
    let (connection, profile) = (server.connect("head-end").await, server.profile("head-end"));
    open(&connection, &profile, title(0), 10).await.unwrap();

    let obstruction = Obstruction::begin(&StoreConfig::new(server.database())).await.unwrap();
    let began = Instant::now();
    let mut grants = connection.grants();
    let request = kms_client::proto::OpenSessionRequest {
        request_id: kms_client::new_request_id().octets().to_vec().into(),
        meter: title(1).octets().to_vec().into(),
        terms: Some(kms_tests::terms(10)),
    };
    let status = grants.open_session(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert!(began.elapsed() < LONGEST_WAIT, "the caller was kept for {:?}", began.elapsed());
    obstruction.end().await.unwrap();

    // The same request is answered as soon as the log can be written, and is recorded then.
    let mut answer = grants.open_session(request.clone()).await;
    while let Err(status) = answer {
        assert!(began.elapsed() < LONGEST_WAIT, "{status}");
        answer = grants.open_session(request.clone()).await;
    }
    let answered = answer.unwrap().into_inner().audit_leaf.to_vec();
    assert!(all_records(&server).await.iter().any(|record| leaf(&record.encode_to_vec()) == answered));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_log_lets_no_wrapped_key_out() {
    let server = DevServer::start();
    let mut transfers = server.connect("head-end").await.transfers();
    let request = |number| BeginTransfersRequest {
        request_id: kms_client::new_request_id().octets().to_vec().into(),
        orders: vec![TransferOrder {
            meter: title(number).octets().to_vec().into(),
            key_type: "GUEK".to_owned(),
            client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
            form: TransferForm::WrappedKey.into(),
            ..TransferOrder::default()
        }],
    };
    let before = transfers.begin_transfers(request(0)).await.unwrap().into_inner();
    assert!(matches!(&before.steps[0].next, Some(Next::Send(send)) if !send.wrapped_key.is_empty()), "{before:?}");

    let obstruction = Obstruction::begin(&StoreConfig::new(server.database())).await.unwrap();
    let began = Instant::now();
    let request = request(1);
    let status = transfers.begin_transfers(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert!(began.elapsed() < LONGEST_WAIT, "the caller was kept for {:?}", began.elapsed());
    obstruction.end().await.unwrap();

    // The same request is answered as soon as the log can be written. The key opens under the
    // meter's KEK, and its leaving is recorded, once.
    let mut answer = transfers.begin_transfers(request.clone()).await;
    while let Err(status) = answer {
        assert!(began.elapsed() < LONGEST_WAIT, "{status}");
        answer = transfers.begin_transfers(request.clone()).await;
    }
    let step = answer.unwrap().into_inner().steps.remove(0);
    let Some(Next::Send(send)) = step.next else { panic!("{:?}", step.next) };
    unwrap_key(&server.meter(1).keys_for_inspection(Obis::SECURITY_SETUP).unwrap().kek, &send.wrapped_key).unwrap();
    let leavings = all_records(&server).await.into_iter().filter_map(|record| match record.event {
        Some(Event::TransfersAdvanced(event)) => Some(event.advances),
        _ => None,
    });
    let leavings: Vec<_> = leavings
        .flatten()
        .filter(|advance| advance.transfer_id == step.transfer_id && advance.key_version > 0)
        .collect();
    assert_eq!(leavings.len(), 1, "{leavings:?}");
    assert_eq!((leavings[0].key_type.as_str(), leavings[0].key_version), ("GUEK", send.key_version));
}

async fn all_records(server: &DevServer) -> Vec<AuditRecord> {
    let auditor = server.connect("auditor").await;
    let mut records = Vec::new();
    let mut page_token = Default::default();
    loop {
        let request = ListAuditRecordsRequest { page_size: 500, page_token, ..ListAuditRecordsRequest::default() };
        let page = auditor.audit().list_audit_records(request).await.unwrap().into_inner();
        records.extend(page.records);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return records;
        }
    }
}

fn leaf(record: &[u8]) -> Vec<u8> {
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    context.update(&[0]);
    context.update(record);
    context.finish().as_ref().to_vec()
}

/// Whoever waits for ever is told. A caller's own deadline is seconds; a busy machine takes longer.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
