//! I6: a proposal is executed only if distinct people, none of them the requester, have approved
//! its exact content. Broken on purpose: by the requester, by the requester's second certificate,
//! by edited and older rows, and by a quorum of nobody.

use kms_client::{Connection, new_request_id, proto};
use kms_store::{RowKind, SealedRow};
use kms_store_testing::{Damage, damage};
use kms_tests::{CLIENT_TITLE, DevServer, title};
use tonic::{Code, Status};

struct Scene {
    server: DevServer,
    ada: Connection,
    bo: Connection,
}

impl Scene {
    async fn new() -> Self {
        let server = DevServer::start();
        let (ada, bo) = (server.connect("officer-1").await, server.connect("officer-2").await);
        Self { server, ada, bo }
    }

    async fn propose(&self, quorum: Option<u32>) -> Result<proto::Proposal, Status> {
        let request = proto::ProposeCounterRaiseRequest {
            request_id: new_request_id().octets().to_vec().into(),
            meter: title(1).octets().to_vec().into(),
            client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
            to: 3_000_000_000,
            reason: "read at the meter".to_owned(),
            quorum,
            ..proto::ProposeCounterRaiseRequest::default()
        };
        self.ada.meters().propose_counter_raise(request).await.map(tonic::Response::into_inner)
    }

    async fn row(&self, proposal: &proto::Proposal) -> SealedRow {
        self.server.glance().await.store.sealed(RowKind::Proposal, &proposal.proposal_id).await.unwrap().unwrap()
    }

    async fn put(&self, proposal: &proto::Proposal, row: SealedRow) {
        assert_eq!(
            damage(&self.server.database(), &Damage::PutSealed(RowKind::Proposal, proposal.proposal_id.to_vec(), row))
                .await
                .unwrap(),
            1
        );
    }
}

async fn approve(by: &Connection, proposal: &proto::Proposal) -> Result<proto::Proposal, Status> {
    let request = proto::ApproveProposalRequest {
        request_id: new_request_id().octets().to_vec().into(),
        proposal_id: proposal.proposal_id.clone(),
        content_sha256: proposal.content_sha256.clone(),
    };
    by.proposals().approve_proposal(request).await.map(tonic::Response::into_inner)
}

async fn execute(by: &Connection, proposal: &proto::Proposal) -> Result<proto::Proposal, Status> {
    let request = proto::CarryOutProposalRequest {
        request_id: new_request_id().octets().to_vec().into(),
        proposal_id: proposal.proposal_id.clone(),
    };
    by.proposals().carry_out_proposal(request).await.map(tonic::Response::into_inner)
}

fn code<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Code {
    outcome.unwrap_err().code()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_person_alone_carries_nothing_out_whatever_he_holds() {
    let scene = Scene::new().await;
    assert_eq!(code(scene.propose(Some(0)).await), Code::InvalidArgument, "a quorum of nobody does not parse");
    let proposal = scene.propose(Some(2)).await.unwrap();
    let ada_again = scene.server.add_officer("ada-2", "Ada Officer").await;
    let bo_again = scene.server.add_officer("bo-2", "Bo Officer").await;
    for requester in [&scene.ada, &ada_again] {
        assert_eq!(code(approve(requester, &proposal).await), Code::FailedPrecondition);
    }
    assert_eq!(approve(&scene.bo, &proposal).await.unwrap().state, "waiting");
    assert_eq!(
        code(approve(&bo_again, &proposal).await),
        Code::FailedPrecondition,
        "a second certificate is no second person"
    );
    assert_eq!(code(execute(&scene.ada, &proposal).await), Code::FailedPrecondition);
    let cy = scene.server.add_confirmed_officer("cy", "Cy Officer").await;
    assert_eq!(approve(&cy, &proposal).await.unwrap().state, "approved");
    assert_eq!(execute(&scene.ada, &proposal).await.unwrap().state, "carried-out");
    assert_eq!(code(execute(&scene.bo, &proposal).await), Code::FailedPrecondition, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_that_somebody_writes_into_the_database_approves_nothing() {
    let scene = Scene::new().await;
    let (approved, other) = (scene.propose(None).await.unwrap(), scene.propose(None).await.unwrap());
    let waiting = scene.row(&approved).await;
    approve(&scene.bo, &approved).await.unwrap();
    let with_approval = scene.row(&approved).await;
    // The approval of one proposal in the row of another, and a number changed in what was
    // approved.
    let untouched = scene.row(&other).await;
    scene.put(&other, with_approval.clone()).await;
    assert_eq!(code(execute(&scene.ada, &other).await), Code::FailedPrecondition);
    scene.put(&other, SealedRow { body: with_approval.body.clone(), ..untouched.clone() }).await;
    assert_eq!(code(execute(&scene.ada, &other).await), Code::FailedPrecondition);
    scene.put(&other, untouched).await;
    for at in 0..with_approval.body.len() {
        if with_approval.body[at..].starts_with(b"Bo Officer") {
            let mut edited = with_approval.clone();
            edited.body[at] = b'C';
            scene.put(&approved, edited).await;
            assert_eq!(code(execute(&scene.ada, &approved).await), Code::FailedPrecondition);
        }
    }
    // Executed once, then the row from before is put back: the older row is refused.
    scene.put(&approved, with_approval.clone()).await;
    execute(&scene.ada, &approved).await.unwrap();
    for older in [with_approval, waiting] {
        scene.put(&approved, older).await;
        assert_eq!(code(execute(&scene.bo, &approved).await), Code::FailedPrecondition);
    }
}
