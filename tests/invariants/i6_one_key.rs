//! I6: one person, one key. Broken on purpose: by an officer who certifies a key of their own for a
//! colleague, and by one who adds a colleague that does not exist.

use kms_client::{Connection, KeyRequest, NewProfile, PrincipalId, Profile, new_request_id, proto};
use kms_tests::{CLIENT_TITLE, DevServer, title};
use tonic::{Code, Status};

fn request_id() -> bytes::Bytes {
    new_request_id().octets().to_vec().into()
}

async fn renew(by: &Connection, principal: &str, key: &KeyRequest) -> Result<proto::PrincipalCertificate, Status> {
    let request = proto::RenewPrincipalRequest {
        request_id: request_id(),
        principal: principal.to_owned(),
        certificate_request: key.certificate_request().to_vec().into(),
        ..proto::RenewPrincipalRequest::default()
    };
    by.principals().renew_principal(request).await.map(tonic::Response::into_inner)
}

async fn propose(by: &Connection) -> proto::Proposal {
    let request = proto::ProposeCounterRaiseRequest {
        request_id: request_id(),
        meter: title(1).octets().to_vec().into(),
        client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
        to: 3_000_000_000,
        reason: "read at the meter".to_owned(),
        ..proto::ProposeCounterRaiseRequest::default()
    };
    by.meters().propose_counter_raise(request).await.unwrap().into_inner()
}

async fn approve(by: &Connection, proposal: &proto::Proposal) -> Result<proto::Proposal, Status> {
    let (proposal_id, content_sha256) = (proposal.proposal_id.clone(), proposal.content_sha256.clone());
    let request = proto::ApproveProposalRequest { request_id: request_id(), proposal_id, content_sha256 };
    by.proposals().approve_proposal(request).await.map(tonic::Response::into_inner)
}

/// Connects as `principal` by what was issued.
async fn connect(
    server: &DevServer,
    name: &str,
    principal: &str,
    key: &KeyRequest,
    issued: &proto::PrincipalCertificate,
) -> Connection {
    let officer = server.profile("officer-1");
    let new = NewProfile {
        server: officer.server(),
        server_name: officer.server_name_text(),
        principal: &PrincipalId::parse(principal).unwrap(),
        ca_pem: &officer.ca_pem().unwrap(),
        certificate_pem: &KeyRequest::chain_pem(issued),
        key_pem: key.key_pem(),
    };
    Profile::create(server.state().join("profiles").join(name), &new).unwrap();
    server.connect(name).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_officer_who_renews_a_colleague_does_not_become_two_people() {
    let server = DevServer::start();
    let (ada, bo) = (server.connect("officer-1").await, server.connect("officer-2").await);
    let (colleague, auditor) = ("urn:meterkms:dev:officer:officer-2", "urn:meterkms:dev:auditor:auditor");
    let proposal = propose(&ada).await;
    let key = KeyRequest::generate(&PrincipalId::parse(colleague).unwrap()).unwrap();
    let outcome = renew(&ada, colleague, &key).await;
    if let Ok(issued) = &outcome {
        let second_face = connect(&server, "second-face", colleague, &key, issued).await;
        assert!(approve(&second_face, &proposal).await.is_err(), "officer-1 is officer-2, too");
    }
    assert_eq!(outcome.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(renew(&ada, auditor, &key).await.unwrap_err().code(), Code::FailedPrecondition);
    // A machine's certificate an officer renews, and the machine sees who did.
    let head_end = "urn:meterkms:dev:head-end:head-end";
    renew(&ada, head_end, &KeyRequest::generate(&PrincipalId::parse(head_end).unwrap()).unwrap()).await.unwrap();
    let shown =
        server.connect("head-end").await.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap().into_inner();
    assert!(
        matches!(&shown.certificates[..], [own, made] if own.in_use && made.issued_by.ends_with("officer:officer-1")),
        "{shown:?}"
    );
    // The colleague, by the own certificate and by its renewal.
    let issued = renew(&bo, colleague, &key).await.unwrap();
    let renewed = connect(&server, "renewed", colleague, &key, &issued).await;
    assert_eq!(approve(&renewed, &proposal).await.unwrap().state, "approved");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_officer_who_adds_a_colleague_does_not_become_two_people() {
    let server = DevServer::start();
    let ada = server.connect("officer-1").await;
    let proposal = propose(&ada).await;
    let eve = server.add_officer("eve", "Eve Officer").await;
    assert_eq!(approve(&eve, &proposal).await.unwrap_err().code(), Code::FailedPrecondition);
    // A renewal by such a key is such a key.
    let name = "urn:meterkms:dev:officer:eve";
    let key = KeyRequest::generate(&PrincipalId::parse(name).unwrap()).unwrap();
    let issued = renew(&eve, name, &key).await.unwrap();
    let renewed = connect(&server, "renewed", name, &key, &issued).await;
    assert_eq!(approve(&renewed, &proposal).await.unwrap_err().code(), Code::FailedPrecondition);
    // Two others stand behind one whom they have met.
    let cy = server.add_confirmed_officer("cy", "Cy Officer").await;
    assert_eq!(approve(&cy, &proposal).await.unwrap().state, "approved");
}
