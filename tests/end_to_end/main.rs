//! The main job over real processes: a vendor's shipment, a session, a meter that answers.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod bad_input;
mod bounds;
mod campaign;
mod enrolment;
mod frames;
mod full_disk;
mod group;
mod owners;
mod rotation;
mod sessions;
mod tasks;
mod telemetry;
mod trial;

use kms_store_testing::TestDatabase;
use kms_tests::{DevServer, TestModule, open, put_on_line, read_energy, title};
use meter_sim::axdr::Data;

#[tokio::test(flavor = "multi_thread")]
async fn dev_does_the_main_job_finds_its_state_again_and_ends_cleanly() {
    let mut server = DevServer::start_afresh(TestModule::of_environment(), TestDatabase::of_environment());
    assert!(server.printed.contains("1.0.1.8.0.255 ="), "{}", server.printed);
    assert!(server.printed.contains("meters of a vendor imported"), "{}", server.printed);
    let before = open(&server.connect("head-end").await, &server.profile("head-end"), title(1), 10).await.unwrap();

    assert!(server.interrupt(), "Ctrl-C did not end the server well");
    server.restart();
    assert!(server.printed.contains("1.0.1.8.0.255 ="), "{}", server.printed);
    assert!(!server.printed.contains("ceremony "), "the second start held another ceremony:\n{}", server.printed);
    let after = open(&server.connect("head-end").await, &server.profile("head-end"), title(1), 10).await.unwrap();
    let key = |session: &kms_client::Session| session.keys.meters[0].keys[0].key.expose().to_vec();
    assert_eq!(key(&before), key(&after));
    let first = |session: &kms_client::Session| session.keys.meters[0].counters.as_ref().unwrap().next().unwrap();
    assert!(first(&after) > first(&before), "I4: the lease after a restart must start higher");
}

/// The ceremony, an import, a session, a meter that answers: on every pair, whatever the
/// environment says.
#[tokio::test(flavor = "multi_thread")]
async fn the_main_job_on_every_module_and_database() {
    for module in [TestModule::HsmSim, TestModule::SoftHsm2] {
        for database in [TestDatabase::Sqlite, TestDatabase::Postgresql] {
            let mut server = DevServer::start_afresh(module, database);
            assert!(server.printed.contains("1.0.1.8.0.255 ="), "{module:?}, {database:?}: {}", server.printed);
            server.restart();
            assert!(
                server.printed.contains("1.0.1.8.0.255 ="),
                "{module:?}, {database:?}, second start: {}",
                server.printed
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_meter_frame_opens_with_granted_keys() {
    let server = DevServer::start();
    let meter = server.meter(3);
    let address = put_on_line(&meter).await;
    let connection = server.connect("head-end").await;
    for _ in 0..3 {
        let session = open(&connection, &server.profile("head-end"), title(3), 20).await.unwrap();
        let value = read_energy(address, &session, title(3)).await.unwrap();
        assert!(matches!(value, Data::DoubleLongUnsigned(_)), "{value:?}");
    }
    assert!(meter.refusals().is_empty(), "{:?}", meter.refusals());
}
