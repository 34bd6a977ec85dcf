//! I8: without a policy that permits, nothing; a policy that fails denies.

use std::fs;

use kms_client::{new_request_id, proto};
use kms_tests::{DevServer, open, title};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn without_policies_every_call_is_refused_and_an_erroring_policy_denies() {
    let server = DevServer::start_on_postgresql();
    let policies = server.state().join("policies");
    fs::create_dir_all(&policies).unwrap();
    let with_policies = |text: String| format!("{text}\n[policies]\ndirectory = \"{}\"\n", policies.display());
    let profile = server.profile("head-end");
    open(&server.connect("head-end").await, &profile, title(0), 1).await.unwrap();

    // A server on the same island whose one policy concerns something else.
    fs::write(
        policies.join("nothing.cedar"),
        "permit (principal is Auditor, action == Action::\"listMeters\", resource);",
    )
    .unwrap();
    let bare = server.second("bare", with_policies).await;
    let head_end = bare.connect("head-end").await;
    let refusal = open(&head_end, &profile, title(0), 1).await.unwrap_err().to_string();
    assert!(refusal.contains("not permitted"), "{refusal}");
    let officer = bare.connect("officer-1").await;
    let listed = officer.meters().list_meters(proto::ListMetersRequest::default()).await.unwrap_err();
    assert_eq!(listed.code(), Code::PermissionDenied);
    let inventory = officer.hsm().inventory_hsm(proto::InventoryHsmRequest {}).await.unwrap_err();
    assert_eq!(inventory.code(), Code::PermissionDenied);
    let records = officer.audit().list_audit_records(proto::ListAuditRecordsRequest::default()).await.unwrap_err();
    assert_eq!(records.code(), Code::PermissionDenied);
    let groups = officer.groups().list_groups(proto::ListGroupsRequest::default()).await.unwrap_err();
    assert_eq!(groups.code(), Code::PermissionDenied);
    let roots = officer.roots().show_roots(proto::ShowRootsRequest {}).await.unwrap_err();
    assert_eq!(roots.code(), Code::PermissionDenied);
    let rotate = proto::RotateRootRequest {
        request_id: new_request_id().octets().to_vec().into(),
        root: "seal".to_owned(),
        rows_per_second: 0,
    };
    assert_eq!(officer.roots().rotate_root(rotate).await.unwrap_err().code(), Code::PermissionDenied);
    let (request_id, group) = (new_request_id().octets().to_vec(), "north".to_owned());
    let request = proto::OpenGroupSessionRequest {
        request_id: request_id.into(),
        group,
        terms: Some(kms_tests::terms(1)),
        key_version: 0,
    };
    assert_eq!(head_end.grants().open_group_session(request).await.unwrap_err().code(), Code::PermissionDenied);
    let request = proto::ShowGroupRotationRequest { group: "north".to_owned(), ..Default::default() };
    assert_eq!(head_end.groups().show_group_rotation(request).await.unwrap_err().code(), Code::PermissionDenied);
    let disabled = officer
        .principals()
        .disable_principal(proto::DisablePrincipalRequest {
            request_id: new_request_id().octets().to_vec().into(),
            principal: "urn:meterkms:dev:head-end:head-end".to_owned(),
            reason: "a test".to_owned(),
        })
        .await
        .unwrap_err();
    assert_eq!(disabled.code(), Code::PermissionDenied);
    drop(bare);

    // Everything is permitted, and a `forbid` fails when it is evaluated (an overflow): Cedar by
    // itself would skip it and allow.
    fs::write(
        policies.join("nothing.cedar"),
        "permit (principal, action, resource);\nforbid (principal, action == Action::\"openSession\", resource) when { context.lifetime_seconds * 9223372036854775807 > 0 };",
    )
    .unwrap();
    let erring = server.second("erring", with_policies).await;
    let refusal = open(&erring.connect("head-end").await, &profile, title(0), 1).await.unwrap_err().to_string();
    assert!(refusal.contains("not permitted"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn revocation_acts_in_open_connections() {
    let server = DevServer::start();
    let (connection, profile) = (server.connect("head-end").await, server.profile("head-end"));
    open(&connection, &profile, title(0), 1).await.unwrap();
    let request = proto::DisablePrincipalRequest {
        request_id: new_request_id().octets().to_vec().into(),
        principal: "urn:meterkms:dev:head-end:head-end".to_owned(),
        reason: "a test".to_owned(),
    };
    server.connect("officer-1").await.principals().disable_principal(request).await.unwrap();
    let refusal = open(&connection, &profile, title(0), 1).await.unwrap_err();
    assert!(refusal.to_string().contains("enabled principal"), "{refusal}");
    // A certificate that has ended is as good as none, though its principal is enabled.
    let (officer, auditor) = (server.connect("officer-1").await, server.connect("auditor").await);
    let known = auditor.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap().into_inner();
    let request = proto::EndCertificateRequest {
        request_id: new_request_id().octets().to_vec().into(),
        principal: known.principal,
        serial: known.certificates[0].serial.clone(),
        reason: "a test".to_owned(),
    };
    officer.principals().end_certificate(request).await.unwrap();
    let refusal = auditor.principals().who_am_i(proto::WhoAmIRequest {}).await.unwrap_err();
    assert!(refusal.message().contains("enabled principal"), "{refusal}");
}
