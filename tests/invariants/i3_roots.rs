//! I3 and I6: the keys under all other keys are replaced while meters are served, the server is
//! killed in the middle of it, and the old root is destroyed by two people. After each step the
//! keys of every meter are what its vendor gave it.

use std::collections::BTreeMap;

use crate::now_ms;
use kms_client::{Connection, KeyType, SystemTitle, new_request_id, proto};
use kms_store_testing::TestDatabase;
use kms_tests::{DevServer, TestModule, terms};
use tonic::Code;

const METERS: usize = 1_000;
const STORAGE_KEK: &str = "session/storage-kek";

#[tokio::test(flavor = "multi_thread")]
async fn no_meter_is_lost_when_roots_are_rotated_and_destroyed() {
    let mut server = DevServer::start_sized(TestModule::of_environment(), TestDatabase::Sqlite, METERS as u64);
    let keys = Keys::of(&server);
    keys.are_granted(&server).await;

    // Made on the token's machine, with the server ended.
    assert!(server.interrupt());
    for root in [STORAGE_KEK, "session/diversification"] {
        let mut command = server.command("roots");
        command.args(["new", root, "--config"]).arg(server.state().join("island/kms-server.toml"));
        let output = command.arg("--escrow").arg(server.state().join("island/escrow.json")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    server.restart();
    let ada = server.connect("officer-1").await;
    let rotate = |root: &str, rows_per_second| proto::RotateRootRequest {
        request_id: request_id(),
        root: root.to_owned(),
        rows_per_second,
    };
    ada.roots().rotate_root(rotate("session/diversification", 0)).await.unwrap();
    ada.roots().rotate_root(rotate(STORAGE_KEK, 500)).await.unwrap();

    // kill -9 after the first page. Some keys are wrapped under the old storage KEK then, some
    // under the new one, and all are served.
    let mut pass = ada
        .roots()
        .watch_root_rotation(proto::WatchRootRotationRequest { root: STORAGE_KEK.to_owned() })
        .await
        .unwrap()
        .into_inner();
    while pass.message().await.unwrap().unwrap().all_changed == 0 {}
    server.kill();
    server.restart();
    let ada = server.connect("officer-1").await;
    let rotation = pass_of(&ada).await;
    assert!(
        rotation.state == "running" && (1..METERS as u64).contains(&rotation.all_changed),
        "not in the middle: {rotation:?}"
    );
    keys.are_granted(&server).await;

    // An officer pauses it, and resumes it at a higher rate.
    let pause = proto::PauseRootRotationRequest {
        request_id: request_id(),
        root: STORAGE_KEK.to_owned(),
        reason: "busy hour".to_owned(),
    };
    ada.roots().pause_root_rotation(pause).await.unwrap();
    assert_eq!(pass_of(&ada).await.state, "paused");
    ada.roots().resume_root_rotation(rotate(STORAGE_KEK, 100_000)).await.unwrap();

    // I3, I6: not destroyed while keys use it, and not by one person.
    assert_eq!(propose(&ada, now_ms()).await.unwrap_err().code(), Code::FailedPrecondition);
    let mut pass = ada
        .roots()
        .watch_root_rotation(proto::WatchRootRotationRequest { root: STORAGE_KEK.to_owned() })
        .await
        .unwrap()
        .into_inner();
    let mut last = proto::RootRotation::default();
    while let Some(step) = pass.message().await.unwrap() {
        last = step;
    }
    assert_eq!((last.state.as_str(), last.all_changed, last.refused), ("finished", METERS as u64, 0));
    keys.are_granted(&server).await;
    let refused = propose(&ada, last.since_ms).await.unwrap_err();
    assert!(refused.message().contains("backups"), "{refused}");
    let proposal = propose(&ada, now_ms()).await.unwrap();
    let destroy = || proto::DestroyRootRequest { request_id: request_id(), proposal_id: proposal.proposal_id.clone() };
    let approve = || proto::ApproveProposalRequest {
        request_id: request_id(),
        proposal_id: proposal.proposal_id.clone(),
        content_sha256: proposal.content_sha256.clone(),
    };
    assert_eq!(ada.roots().destroy_root(destroy()).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(ada.proposals().approve_proposal(approve()).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(first_storage_kek(&ada).await, ("replaced".to_owned(), Some(true)));
    server.connect("officer-2").await.proposals().approve_proposal(approve()).await.unwrap();
    ada.roots().destroy_root(destroy()).await.unwrap();
    assert_eq!(first_storage_kek(&ada).await, ("destroyed".to_owned(), Some(false)));
    keys.are_granted(&server).await;

    // What is made from now on needs neither of the old roots, and a server that starts does not
    // either.
    server.kill();
    server.restart();
    keys.are_granted(&server).await;
    let scrubbed =
        server.connect("auditor").await.audit().scrub(proto::ScrubRequest::default()).await.unwrap().into_inner();
    assert_eq!(findings(scrubbed).await, Vec::new());
}

/// What the vendor of the sample says that its meters hold.
struct Keys(BTreeMap<SystemTitle, BTreeMap<KeyType, Vec<u8>>>);

impl Keys {
    fn of(server: &DevServer) -> Self {
        let text = std::fs::read_to_string(server.state().join("vendor/devices.jsonl")).unwrap();
        let device = |line: &str| {
            let device: serde_json::Value = serde_json::from_str(line).unwrap();
            let key = |name: &str| hex::decode(device["security_setups"][0][name].as_str().unwrap()).unwrap();
            let title = SystemTitle::parse(device["system_title"].as_str().unwrap()).unwrap();
            (title, BTreeMap::from([(KeyType::GUEK, key("guek")), (KeyType::GAK, key("gak"))]))
        };
        Self(text.lines().map(device).collect())
    }

    /// Opens a session with every meter.
    async fn are_granted(&self, server: &DevServer) {
        let (connection, key) = (server.connect("head-end").await, server.profile("head-end").transport_key().unwrap());
        let meters: Vec<SystemTitle> = self.0.keys().copied().collect();
        let mut batch = connection.open_sessions(
            &key,
            new_request_id(),
            &meters,
            terms(10),
            &TestModule::of_environment().open_options(),
        );
        let mut granted = BTreeMap::new();
        while let Some(chunk) = batch.next().await.unwrap() {
            assert_eq!(chunk.refusals, Vec::new());
            for meter in &chunk.sessions.unwrap().meters {
                let keys =
                    [KeyType::GUEK, KeyType::GAK].map(|name| (name, meter.key(name).unwrap().key.expose().to_vec()));
                granted.insert(meter.meter, BTreeMap::from(keys));
            }
        }
        assert_eq!(granted.len(), METERS);
        assert!(granted == self.0, "a meter's key is not what its vendor gave it");
    }
}

async fn propose(by: &Connection, oldest_backup_ms: i64) -> Result<proto::Proposal, tonic::Status> {
    let request = proto::ProposeRootDestructionRequest {
        request_id: request_id(),
        root: STORAGE_KEK.to_owned(),
        version: 1,
        oldest_backup_ms,
        reason: "yearly rotation".to_owned(),
        quorum: None,
    };
    by.roots().propose_root_destruction(request).await.map(tonic::Response::into_inner)
}

async fn pass_of(by: &Connection) -> proto::RootRotation {
    let roots = by.roots().show_roots(proto::ShowRootsRequest {}).await.unwrap().into_inner().roots;
    roots.into_iter().find(|root| root.root == STORAGE_KEK && root.version == 2).unwrap().rotation.unwrap()
}

/// How the storage KEK of the ceremony stands, and whether the token has it.
async fn first_storage_kek(by: &Connection) -> (String, Option<bool>) {
    let roots = by.roots().show_roots(proto::ShowRootsRequest {}).await.unwrap().into_inner().roots;
    let root = roots.into_iter().find(|root| root.root == STORAGE_KEK && root.version == 1).unwrap();
    (root.standing, root.in_token)
}

async fn findings(mut answers: tonic::Streaming<proto::ScrubResponse>) -> Vec<proto::ScrubFinding> {
    let mut all = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        all.extend(answer.findings);
    }
    all
}

fn request_id() -> bytes::Bytes {
    new_request_id().octets().to_vec().into()
}
