//! I2 and I8: refusals of every call are recorded too, and no client fills the
//! disk with it.

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use kms_client::{Connection, new_request_id, proto};
use kms_store::StoreConfig;
use kms_store_testing::Obstruction;
use kms_tests::{DevServer, terms, title};
use proto::audit_record::Event;
use tonic::{Code, Status};

const OFFICER: &str = "urn:meterkms:dev:officer:officer-2";
const HEAD_END: &str = "urn:meterkms:dev:head-end:head-end";

/// Calls of which no policy decides, and why.
const WITHOUT_POLICY: [(&str, &str); 4] = [
    ("WhoAmI", "everybody may know who they are"),
    ("LeaseTasks", "gives the tasks that the caller may have: none"),
    ("HeartbeatTasks", "tells which leases the caller does not hold"),
    ("ReleaseTasks", "tells which leases the caller does not hold"),
];

fn id() -> bytes::Bytes {
    new_request_id().octets().to_vec().into()
}

/// The one method that the ordinary listener does not offer: tests/end_to_end/enrolment.rs.
const ELSEWHERE: &str = "Enrol";

/// Every method of the contract, as the definitions have it.
fn methods() -> BTreeSet<String> {
    let mut methods = BTreeSet::new();
    for file in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../proto/meterkms/v1")).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        methods.extend(
            text.lines()
                .filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next().map(str::to_owned))
                .filter(|method| method != ELSEWHERE),
        );
    }
    methods
}

/// Calls every method with what it takes. The method, how its refusal is called in the log, and the
/// answer's status.
#[expect(clippy::too_many_lines, reason = "one line a method")]
async fn call_all(caller: &Connection) -> Vec<(&'static str, &'static str, Result<(), Status>)> {
    let meter = || bytes::Bytes::from(title(0).octets().to_vec());
    let reason = || "a test".to_owned();
    let text = ToString::to_string;
    let some_id = || bytes::Bytes::from(vec![7; 16]);
    let csr = |principal: &str| {
        let principal = kms_domain::PrincipalId::parse(principal).unwrap();
        bytes::Bytes::copy_from_slice(kms_client::KeyRequest::generate(&principal).unwrap().certificate_request())
    };
    let client_title = || bytes::Bytes::from(hex::decode(kms_tests::CLIENT_TITLE).unwrap());
    let (guek, group, root) = (|| "GUEK".to_owned(), || "north".to_owned(), || "seal".to_owned());
    let lease = || vec![proto::TaskLease { campaign_id: some_id(), meter: meter(), fence: 1 }];
    let mut all = Vec::new();
    macro_rules! call {
        ($method:literal, $action:literal, $service:ident.$function:ident($request:expr)) => {
            all.push(($method, $action, caller.$service().$function($request).await.map(drop)));
        };
    }

    call!(
        "AddPrincipal",
        "addPrincipal",
        principals.add_principal(proto::AddPrincipalRequest {
            request_id: id(),
            principal: "urn:meterkms:dev:officer:eve".to_owned(),
            certificate_request: csr("urn:meterkms:dev:officer:eve"),
            person: "Eve".to_owned(),
            ..Default::default()
        })
    );
    call!(
        "RenewPrincipal",
        "renewPrincipal",
        principals.renew_principal(proto::RenewPrincipalRequest {
            request_id: id(),
            principal: HEAD_END.to_owned(),
            certificate_request: csr(HEAD_END),
            ..Default::default()
        })
    );
    call!(
        "ProposePrincipalKey",
        "proposePrincipalKey",
        principals.propose_principal_key(proto::ProposePrincipalKeyRequest {
            request_id: id(),
            principal: OFFICER.to_owned(),
            key_sha256: vec![7; 32].into(),
            reason: "lost".to_owned(),
            quorum: None,
        })
    );
    call!(
        "EndCertificate",
        "endCertificate",
        principals.end_certificate(proto::EndCertificateRequest {
            request_id: id(),
            principal: OFFICER.to_owned(),
            serial: vec![7; 16].into(),
            reason: "lost".to_owned(),
        })
    );
    call!(
        "RegisterTransportKey",
        "registerTransportKey",
        principals.register_transport_key(proto::RegisterTransportKeyRequest {
            request_id: id(),
            certificate_request: csr(HEAD_END)
        })
    );
    call!(
        "DisablePrincipal",
        "disablePrincipal",
        principals.disable_principal(proto::DisablePrincipalRequest {
            request_id: id(),
            principal: "urn:meterkms:dev:officer:officer-1".to_owned(),
            reason: reason()
        })
    );
    call!("ListPrincipals", "listPrincipals", principals.list_principals(proto::ListPrincipalsRequest {}));
    call!("WhoAmI", "", principals.who_am_i(proto::WhoAmIRequest {}));

    let code = || Some(proto::CodeDigest { code_id: vec![7; 6].into(), sha256: vec![7; 32].into() });
    call!(
        "InviteHandheld",
        "inviteHandheld",
        handhelds.invite_handheld(proto::InviteHandheldRequest {
            request_id: id(),
            name: "h-99".to_owned(),
            technician: "Eve".to_owned(),
            code: code(),
            ..Default::default()
        })
    );
    call!(
        "HandOverHandheld",
        "handOverHandheld",
        handhelds.hand_over_handheld(proto::HandOverHandheldRequest {
            request_id: id(),
            name: "handheld".to_owned(),
            technician: "Eve".to_owned(),
            code: code(),
            ..Default::default()
        })
    );
    call!(
        "WithdrawInvitation",
        "withdrawInvitation",
        handhelds.withdraw_invitation(proto::WithdrawInvitationRequest {
            request_id: id(),
            name: "h-99".to_owned(),
            reason: reason()
        })
    );
    call!("ListHandhelds", "listHandhelds", handhelds.list_handhelds(proto::ListHandheldsRequest {}));

    call!("ShowRoots", "showRoots", roots.show_roots(proto::ShowRootsRequest {}));
    call!(
        "RotateRoot",
        "rotateRoot",
        roots.rotate_root(proto::RotateRootRequest { request_id: id(), root: root(), rows_per_second: 0 })
    );
    call!(
        "PauseRootRotation",
        "pauseRootRotation",
        roots.pause_root_rotation(proto::PauseRootRotationRequest { request_id: id(), root: root(), reason: reason() })
    );
    call!(
        "ResumeRootRotation",
        "resumeRootRotation",
        roots.resume_root_rotation(proto::RotateRootRequest { request_id: id(), root: root(), rows_per_second: 0 })
    );
    call!("RetireRoot", "retireRoot", roots.retire_root(proto::RetireRootRequest { request_id: id(), root: root() }));
    call!(
        "WatchRootRotation",
        "watchRootRotation",
        roots.watch_root_rotation(proto::WatchRootRotationRequest { root: root() })
    );
    call!(
        "ProposeRootDestruction",
        "proposeRootDestruction",
        roots.propose_root_destruction(proto::ProposeRootDestructionRequest {
            request_id: id(),
            root: "kek/storage-kek".to_owned(),
            version: 1,
            oldest_backup_ms: 1,
            reason: reason(),
            quorum: None
        })
    );
    call!(
        "DestroyRoot",
        "destroyRoot",
        roots.destroy_root(proto::DestroyRootRequest { request_id: id(), proposal_id: some_id() })
    );
    call!(
        "CountRootReferences",
        "countRootReferences",
        roots.count_root_references(proto::CountRootReferencesRequest {})
    );

    let work = || proto::WorkOrderContent {
        technician: "Ida Technician".to_owned(),
        meters: vec![meter()],
        tasks: vec!["read".to_owned()],
        from_ms: crate::now_ms(),
        until_ms: crate::now_ms() + 3_600_000,
        place: String::new(),
    };
    let order = || "WO-1".to_owned();
    let new_order = || proto::NewWorkOrder { work_order_id: order(), content: Some(work()) };
    call!(
        "CreateWorkOrders",
        "createWorkOrder",
        work_orders.create_work_orders(proto::CreateWorkOrdersRequest { request_id: id(), orders: vec![new_order()] })
    );
    call!(
        "ChangeWorkOrder",
        "changeWorkOrder",
        work_orders.change_work_order(proto::ChangeWorkOrderRequest {
            request_id: id(),
            work_order_id: order(),
            revision: 1,
            content: Some(work()),
        })
    );
    call!(
        "CancelWorkOrder",
        "cancelWorkOrder",
        work_orders.cancel_work_order(proto::CancelWorkOrderRequest {
            request_id: id(),
            work_order_id: order(),
            reason: reason(),
        })
    );
    call!(
        "CompleteWorkOrder",
        "completeWorkOrder",
        work_orders.complete_work_order(proto::CompleteWorkOrderRequest { request_id: id(), work_order_id: order() })
    );
    call!(
        "ShowWorkOrder",
        "showWorkOrder",
        work_orders.show_work_order(proto::ShowWorkOrderRequest { work_order_id: order() })
    );
    call!("ListWorkOrders", "listWorkOrders", work_orders.list_work_orders(proto::ListWorkOrdersRequest::default()));
    let subject = proto::list_exposures_request::Subject::Principal(OFFICER.to_owned());
    call!(
        "ListExposures",
        "listExposures",
        exposures.list_exposures(proto::ListExposuresRequest { subject: Some(subject), ..Default::default() })
    );

    call!("ListAuditRecords", "listAuditRecords", audit.list_audit_records(proto::ListAuditRecordsRequest::default()));
    call!("Scrub", "scrub", audit.scrub(proto::ScrubRequest {}));

    call!(
        "OpenSession",
        "openSession",
        grants.open_session(proto::OpenSessionRequest { request_id: id(), meter: meter(), terms: Some(terms(1)) })
    );
    // The first message of the stream tells.
    let sessions =
        proto::OpenSessionsRequest { request_id: id(), meters: vec![meter()], terms: Some(terms(1)), first_chunk: 0 };
    let opened = match caller.grants().open_sessions(sessions).await {
        Ok(answers) => answers.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    all.push(("OpenSessions", "openSession", opened));
    call!(
        "OpenGroupSession",
        "openGroupSession",
        grants.open_group_session(proto::OpenGroupSessionRequest {
            request_id: id(),
            group: group(),
            terms: Some(proto::SessionTerms { key_types: vec!["GBEK".to_owned()], ..terms(1) }),
            key_version: 0
        })
    );
    call!("ListGrants", "listGrants", grants.list_grants(proto::ListGrantsRequest::default()));
    call!(
        "RevokeGrant",
        "revokeGrant",
        grants.revoke_grant(proto::RevokeGrantRequest { request_id: id(), grant_id: some_id(), reason: reason() })
    );

    call!("ListProposals", "listProposals", proposals.list_proposals(proto::ListProposalsRequest::default()));
    call!(
        "ShowProposal",
        "showProposal",
        proposals.show_proposal(proto::ShowProposalRequest { proposal_id: some_id() })
    );
    call!(
        "ApproveProposal",
        "approveProposal",
        proposals.approve_proposal(proto::ApproveProposalRequest {
            request_id: id(),
            proposal_id: some_id(),
            content_sha256: vec![0; 32].into()
        })
    );
    call!(
        "WithdrawProposal",
        "withdrawProposal",
        proposals.withdraw_proposal(proto::WithdrawProposalRequest {
            request_id: id(),
            proposal_id: some_id(),
            reason: reason()
        })
    );
    call!(
        "CarryOutProposal",
        "carryOutProposal",
        proposals.carry_out_proposal(proto::CarryOutProposalRequest { request_id: id(), proposal_id: some_id() })
    );

    let start = proto::UploadShipmentStart {
        file_sha256: vec![1; 32].into(),
        file_length: 100,
        signature: vec![1; 70].into(),
        manufacturer: "urn:meterkms:dev:manufacturer:kam".to_owned(),
    };
    let upload = tonic::codegen::tokio_stream::once(proto::UploadShipmentRequest {
        start: Some(start),
        offset: 0,
        octets: bytes::Bytes::new(),
    });
    call!("UploadShipment", "uploadShipment", shipments.upload_shipment(upload));
    call!(
        "ImportShipment",
        "importShipment",
        shipments
            .import_shipment(proto::ImportShipmentRequest { file_sha256: vec![1; 32].into(), head_end: String::new() })
    );
    call!(
        "GetShipment",
        "getShipment",
        shipments.get_shipment(proto::GetShipmentRequest { file_sha256: vec![1; 32].into() })
    );
    call!("ListShipments", "listShipments", shipments.list_shipments(proto::ListShipmentsRequest {}));
    call!(
        "GetVendorTransportKey",
        "getVendorTransportKey",
        shipments.get_vendor_transport_key(proto::GetVendorTransportKeyRequest {})
    );

    let plan = proto::CampaignPlan {
        name: "spring".to_owned(),
        action: proto::CampaignAction::Rotate.into(),
        key_type: guek(),
        selection: Some(proto::CampaignSelection { meters: vec![meter()], ..Default::default() }),
        terms: Some(proto::CampaignTerms::default()),
        ..Default::default()
    };
    let change = || proto::ChangeCampaignRequest { request_id: id(), campaign_id: some_id(), reason: reason() };
    call!(
        "CreateCampaign",
        "createCampaign",
        campaigns.create_campaign(proto::CreateCampaignRequest { request_id: id(), plan: Some(plan), commit: true })
    );
    call!("ListCampaigns", "listCampaigns", campaigns.list_campaigns(proto::ListCampaignsRequest::default()));
    call!(
        "ShowCampaign",
        "showCampaign",
        campaigns.show_campaign(proto::ShowCampaignRequest { campaign_id: some_id() })
    );
    call!(
        "ApproveCampaign",
        "approveCampaign",
        campaigns.approve_campaign(proto::ApproveCampaignRequest {
            request_id: id(),
            campaign_id: some_id(),
            content_sha256: vec![0; 32].into()
        })
    );
    call!("StartCampaign", "startCampaign", campaigns.start_campaign(change()));
    call!("PauseCampaign", "pauseCampaign", campaigns.pause_campaign(change()));
    call!("ResumeCampaign", "resumeCampaign", campaigns.resume_campaign(change()));
    call!("AbortCampaign", "abortCampaign", campaigns.abort_campaign(change()));
    call!(
        "WatchCampaign",
        "watchCampaign",
        campaigns.watch_campaign(proto::WatchCampaignRequest { campaign_id: some_id() })
    );
    call!(
        "ReportCampaign",
        "reportCampaign",
        campaigns.report_campaign(proto::ReportCampaignRequest { campaign_id: some_id(), ..Default::default() })
    );
    call!(
        "ReportAcceptance",
        "reportAcceptance",
        campaigns.report_acceptance(proto::ReportAcceptanceRequest { campaign_id: some_id(), ..Default::default() })
    );
    call!("LeaseTasks", "", tasks.lease_tasks(proto::LeaseTasksRequest::default()));
    call!(
        "HeartbeatTasks",
        "",
        tasks.heartbeat_tasks(proto::HeartbeatTasksRequest { leases: lease(), lease_seconds: 0 })
    );
    call!("ReleaseTasks", "", tasks.release_tasks(proto::ReleaseTasksRequest { leases: lease(), reason: reason() }));

    call!("ListMeters", "listMeters", meters.list_meters(proto::ListMetersRequest::default()));
    call!("ShowMeter", "showMeter", meters.show_meter(proto::ShowMeterRequest { meter: meter() }));
    call!(
        "AssignMeters",
        "assignMeters",
        meters.assign_meters(proto::AssignMetersRequest {
            request_id: id(),
            meters: vec![meter()],
            head_end: HEAD_END.to_owned(),
            ..Default::default()
        })
    );
    let floor = proto::CounterFloor { meter: meter(), client_title: client_title(), floor: 100, ..Default::default() };
    call!(
        "AdoptCounters",
        "adoptCounters",
        meters.adopt_counters(proto::AdoptCountersRequest { request_id: id(), floors: vec![floor] })
    );
    call!(
        "ProposeCounterRaise",
        "raiseCounter",
        meters.propose_counter_raise(proto::ProposeCounterRaiseRequest {
            request_id: id(),
            meter: meter(),
            key_type: guek(),
            key_version: 1,
            client_title: client_title(),
            to: 1_000_000,
            reason: reason(),
            ..Default::default()
        })
    );
    let new = proto::NewMeter {
        meter: b"KAM\x00\x00\x00\x01\x23".to_vec().into(),
        serial: "1".to_owned(),
        groups: Vec::new(),
    };
    call!(
        "EnrolMeters",
        "enrolMeters",
        meters.enrol_meters(proto::EnrolMetersRequest {
            request_id: id(),
            manufacturer: "KAM".to_owned(),
            device_profile: "generic-suite0".to_owned(),
            batch: "B".to_owned(),
            meters: vec![new]
        })
    );
    call!(
        "ReportCompromise",
        "reportCompromise",
        meters.report_compromise(proto::ReportCompromiseRequest {
            request_id: id(),
            meter: meter(),
            key_type: guek(),
            key_version: 1,
            known_to: String::new(),
            reason: reason(),
            ..Default::default()
        })
    );
    call!(
        "RetireMeters",
        "retireMeters",
        meters.retire_meters(proto::RetireMetersRequest { request_id: id(), meters: vec![meter()], reason: reason() })
    );
    call!(
        "ReplaceMeter",
        "replaceMeter",
        meters.replace_meter(proto::ReplaceMeterRequest {
            request_id: id(),
            old_meter: meter(),
            new_meter: title(1).octets().to_vec().into(),
            reason: reason()
        })
    );

    call!("CheckHsm", "checkHsm", hsm.check_hsm(proto::CheckHsmRequest {}));
    call!("InventoryHsm", "inventoryHsm", hsm.inventory_hsm(proto::InventoryHsmRequest {}));

    let gbek = || "GBEK".to_owned();
    call!("ListGroups", "listGroups", groups.list_groups(proto::ListGroupsRequest::default()));
    call!("ShowGroup", "showGroup", groups.show_group(proto::ShowGroupRequest { group: group() }));
    call!(
        "CreateGroupKey",
        "createGroupKey",
        groups.create_group_key(proto::CreateGroupKeyRequest {
            request_id: id(),
            group: group(),
            key_type: gbek(),
            device_profile: "generic-suite0".to_owned(),
            ..Default::default()
        })
    );
    call!(
        "ShowGroupRotation",
        "showGroupRotation",
        groups.show_group_rotation(proto::ShowGroupRotationRequest {
            group: group(),
            key_type: gbek(),
            ..Default::default()
        })
    );
    call!(
        "ListMembersBehind",
        "listMembersBehind",
        groups.list_members_behind(proto::ListMembersBehindRequest {
            group: group(),
            key_type: gbek(),
            ..Default::default()
        })
    );
    call!(
        "SwitchGroupKey",
        "switchGroupKey",
        groups.switch_group_key(proto::SwitchGroupKeyRequest {
            request_id: id(),
            group: group(),
            key_type: gbek(),
            version: 2,
            reason: reason(),
            ..Default::default()
        })
    );
    call!(
        "SetSwitchThreshold",
        "setSwitchThreshold",
        groups.set_switch_threshold(proto::SetSwitchThresholdRequest { request_id: id(), group: group(), percent: 90 })
    );
    call!(
        "ChangeGroupMembers",
        "changeGroupMembers",
        groups.change_group_members(proto::ChangeGroupMembersRequest {
            request_id: id(),
            group: group(),
            meters: vec![meter()],
            change: proto::MembershipChange::Add.into(),
            reason: reason()
        })
    );
    call!(
        "AddDeviceType",
        "addDeviceType",
        device_types.add_device_type(proto::AddDeviceTypeRequest {
            request_id: id(),
            name: "kam-meter".to_owned(),
            manufacturer: "KAM".to_owned(),
            device_profile: "generic-suite0".to_owned()
        })
    );
    call!("ListDeviceTypes", "listDeviceTypes", device_types.list_device_types(proto::ListDeviceTypesRequest {}));
    call!(
        "ShowDeviceType",
        "showDeviceType",
        device_types.show_device_type(proto::ShowDeviceTypeRequest { device_type: text("kam-meter") })
    );
    call!(
        "CreateDeviceTypeKey",
        "createDeviceTypeKey",
        device_types.create_device_type_key(proto::CreateDeviceTypeKeyRequest {
            request_id: id(),
            device_type: text("kam-meter"),
            key_type: "FIRMWARE".to_owned(),
            ..Default::default()
        })
    );

    let order = proto::TransferOrder {
        meter: meter(),
        key_type: guek(),
        client_title: client_title(),
        form: proto::TransferForm::WrappedKey.into(),
        ..Default::default()
    };
    call!(
        "BeginTransfers",
        "beginTransfer",
        transfers.begin_transfers(proto::BeginTransfersRequest { request_id: id(), orders: vec![order] })
    );
    let report = proto::TransferReport {
        meter: meter(),
        transfer_id: some_id(),
        step: 1,
        answer: Some(proto::transfer_report::Answer::Nothing(true)),
    };
    call!(
        "ContinueTransfers",
        "continueTransfer",
        transfers.continue_transfers(proto::ContinueTransfersRequest { reports: vec![report] })
    );
    let withdrawn = proto::WithdrawnTransfer { meter: meter(), transfer_id: some_id() };
    call!(
        "WithdrawTransfers",
        "withdrawTransfer",
        transfers.withdraw_transfers(proto::WithdrawTransfersRequest {
            request_id: id(),
            transfers: vec![withdrawn],
            reason: reason()
        })
    );
    let frame = proto::PlainFrame {
        meter: meter(),
        client_title: client_title(),
        form: proto::FrameForm::GeneralGlo.into(),
        apdu: hex::decode("c001c10003010001 0800ff0200".replace(' ', "")).unwrap().into(),
        ..Default::default()
    };
    call!(
        "Protect",
        "protectFrame",
        frames.protect(proto::ProtectRequest {
            request_id: id(),
            purpose: proto::Purpose::Read.into(),
            frames: vec![frame],
            supersede_lease: false
        })
    );
    let frame =
        proto::CipheredFrame { meter: meter(), apdu: vec![0xcc, 0x05, 0x30, 0, 0, 0, 1].into(), ..Default::default() };
    call!(
        "Unprotect",
        "unprotectFrame",
        frames.unprotect(proto::UnprotectRequest { purpose: proto::Purpose::Read.into(), frames: vec![frame] })
    );
    all
}

/// What was refused to the head-end, as the log has it: action and how often.
async fn refused(auditor: &Connection) -> Vec<(String, String, u64)> {
    let mut all = Vec::new();
    let mut page_token = bytes::Bytes::new();
    loop {
        let request = proto::ListAuditRecordsRequest {
            principal: HEAD_END.to_owned(),
            page_size: 1_000,
            page_token,
            ..Default::default()
        };
        let page = auditor.audit().list_audit_records(request).await.unwrap().into_inner();
        all.extend(page.records.into_iter().filter_map(|record| match record.event {
            Some(Event::Refused(event)) => Some((event.action, event.reason, event.count)),
            _ => None,
        }));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return all;
        }
    }
}

/// Waits until the log says that so many of each action were refused, or more.
async fn until_refused(auditor: &Connection, expected: &BTreeSet<&str>) -> Vec<(String, String, u64)> {
    let began = Instant::now();
    loop {
        let all = refused(auditor).await;
        let known: BTreeSet<&str> = all.iter().map(|(action, _, _)| action.as_str()).collect();
        let missing: Vec<_> = expected.difference(&known).collect();
        if missing.is_empty() {
            return all;
        }
        assert!(began.elapsed() < WITHIN, "not on the record: {missing:?}; on the record: {all:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refused_call_is_on_the_record() {
    let server = DevServer::start_on_postgresql();
    let officer = server.connect("officer-1").await;
    // A server of the same island whose one policy concerns something else.
    let policies = server.state().join("policies");
    fs::create_dir_all(&policies).unwrap();
    fs::write(
        policies.join("nothing.cedar"),
        "permit (principal is Auditor, action == Action::\"listMeters\", resource);",
    )
    .unwrap();
    let bare =
        server.second("bare", |text| format!("{text}\n[policies]\ndirectory = \"{}\"\n", policies.display())).await;
    let caller = bare.connect("head-end").await;

    let answers = call_all(&caller).await;
    let called: BTreeSet<String> = answers.iter().map(|(method, _, _)| (*method).to_owned()).collect();
    assert_eq!(called, methods(), "a method that this test does not know");
    let (mut expected, mut wrong) = (BTreeSet::new(), Vec::new());
    for (method, action, answer) in &answers {
        if WITHOUT_POLICY.iter().any(|(without, _)| without == method) {
            continue;
        }
        expected.insert(*action);
        // Calls about several meters answer for each.
        let refused =
            answer.as_ref().map_or_else(|status| status.code() == Code::PermissionDenied, |()| ITEMS.contains(method));
        if !refused {
            wrong.push((*method, answer));
        }
    }
    assert!(wrong.is_empty(), "not refused: {wrong:?}");

    let all = until_refused(&officer, &expected).await;
    // Each call was counted once: where an act refuses, it is not counted again when the answer
    // leaves.
    for action in &expected {
        let calls = answers.iter().filter(|(_, of, _)| of == action).count() as u64;
        let counted: u64 = all.iter().filter(|(of, _, _)| of == action).map(|(_, _, count)| count).sum();
        assert!((1..=calls).contains(&counted), "{action}: {counted} counted of {calls}");
    }

    // A flood of each of them does not grow the log: what follows the first of a kind is counted,
    // and written each minute at most.
    let (before, began) = (refused(&officer).await.len(), Instant::now());
    for _ in 0..5 {
        call_all(&caller).await;
    }
    let all = refused(&officer).await;
    let kinds: BTreeSet<_> = all.iter().map(|(action, reason, _)| (action, reason)).collect();
    // However long it took here.
    let most = before + kinds.len() * usize::try_from(began.elapsed().as_secs() / 60 + 2).unwrap();
    assert!(
        all.len() <= most,
        "{before} records, and {} after {} further refusals of {} kinds",
        all.len(),
        5 * expected.len(),
        kinds.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_dangerous_acts_and_disabled_principals_are_on_the_record() {
    let server = DevServer::start();
    let officer = server.connect("officer-1").await;
    let head_end = server.connect("head-end").await;
    // With the shipped policies.
    head_end.audit().list_audit_records(proto::ListAuditRecordsRequest::default()).await.unwrap_err();
    let disable = |principal: &str| proto::DisablePrincipalRequest {
        request_id: id(),
        principal: principal.to_owned(),
        reason: "a test".to_owned(),
    };
    head_end.principals().disable_principal(disable("urn:meterkms:dev:officer:officer-2")).await.unwrap_err();
    until_refused(&officer, &BTreeSet::from(["listAuditRecords", "disablePrincipal"])).await;

    // A disabled principal knocks; the connection is open still.
    officer.principals().disable_principal(disable(HEAD_END)).await.unwrap();
    let refusal = head_end.meters().list_meters(proto::ListMetersRequest::default()).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unauthenticated);
    let all = until_refused(&officer, &BTreeSet::from(["listMeters"])).await;
    assert!(
        all.iter().any(|(action, reason, _)| action == "listMeters" && reason.contains("enabled principal")),
        "{all:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_while_the_log_cannot_be_written_is_written_later() {
    let server = DevServer::start();
    let (officer, head_end) = (server.connect("officer-1").await, server.connect("head-end").await);
    let obstruction = Obstruction::begin(&StoreConfig::new(server.database())).await.unwrap();
    // A refusal waits for nobody.
    let refusal = head_end.audit().list_audit_records(proto::ListAuditRecordsRequest::default()).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    // The writer has tried by then, and could not.
    let request =
        proto::OpenSessionRequest { request_id: id(), meter: title(0).octets().to_vec().into(), terms: Some(terms(1)) };
    assert_eq!(head_end.grants().open_session(request).await.unwrap_err().code(), Code::Unavailable);
    obstruction.end().await.unwrap();
    let all = until_refused(&officer, &BTreeSet::from(["listAuditRecords"])).await;
    let counted: u64 =
        all.iter().filter(|(action, _, _)| action == "listAuditRecords").map(|(_, _, count)| count).sum();
    assert_eq!(counted, 1, "{all:?}");
}

/// Methods that answer for each item: a refusal stands in the answer.
const ITEMS: [&str; 11] = [
    "AssignMeters",
    "AdoptCounters",
    "CreateWorkOrders",
    "EnrolMeters",
    "RetireMeters",
    "ChangeGroupMembers",
    "BeginTransfers",
    "ContinueTransfers",
    "WithdrawTransfers",
    "Protect",
    "Unprotect",
];
const WITHIN: Duration = Duration::from_secs(60);
