//! Tasks of campaigns, as a head-end gets them in one stream that stays open.

use std::{collections::BTreeMap, time::Duration};

use kms_client::{
    Connection, SystemTitle, new_request_id,
    proto::{
        ApproveCampaignRequest, BeginTransfersRequest, CampaignAction, CampaignPlan, CampaignSelection, CampaignTerms,
        ChangeCampaignRequest, ContinueTransfersRequest, CreateCampaignRequest, DisablePrincipalRequest,
        LeaseTasksRequest, LeaseTasksResponse, Task, TransferForm, TransferOrder, TransferReport,
        transfer_report::Answer, transfer_send::Kind, transfer_step::Next,
    },
};
use kms_tests::{CLIENT_TITLE, DevServer, title};
use meter_sim::{Connection as MeterConnection, Meter};
use tonic::{Code, Status, Streaming};

#[tokio::test(flavor = "multi_thread")]
async fn the_tasks_of_each_wave_come_in_one_stream_until_the_head_end_is_disabled() {
    let server = DevServer::start();
    let meters: BTreeMap<SystemTitle, Meter> =
        (10..15).map(|number| (title(number as u64), server.meter(number))).collect();
    let (officer, head_end) = (server.connect("officer-1").await, server.connect("head-end").await);
    let plan = CampaignPlan {
        name: "spring".to_owned(),
        action: CampaignAction::Rotate.into(),
        key_type: "GUEK".to_owned(),
        selection: Some(CampaignSelection {
            meters: meters.keys().map(|title| title.octets().to_vec().into()).collect(),
            ..CampaignSelection::default()
        }),
        terms: Some(CampaignTerms { canary: Some(2), waves: vec!["100%".to_owned()], ..CampaignTerms::default() }),
        ..CampaignPlan::default()
    };
    let create = CreateCampaignRequest { request_id: request_id(), plan: Some(plan), commit: true };
    let campaign = officer.campaigns().create_campaign(create).await.unwrap().into_inner().campaign.unwrap();
    let [canary, others] = *campaign.waves.as_slice() else { panic!("not two waves: {campaign:?}") };
    assert_eq!(canary + others, meters.len() as u64);
    let (campaign_id, content_sha256) = (campaign.campaign_id, campaign.content_sha256);
    let approve = ApproveCampaignRequest { request_id: request_id(), campaign_id: campaign_id.clone(), content_sha256 };
    server.connect("officer-2").await.campaigns().approve_campaign(approve).await.unwrap();

    // The head-end is there before there is anything to do. No lease runs out while the test goes
    // on, so that each task comes once.
    let follow = LeaseTasksRequest {
        campaign_id: campaign_id.clone(),
        lease_seconds: 3_600,
        follow: true,
        ..LeaseTasksRequest::default()
    };
    let mut stream = head_end.tasks().lease_tasks(follow).await.unwrap().into_inner();
    let start = ChangeCampaignRequest { request_id: request_id(), campaign_id, reason: String::new() };
    officer.campaigns().start_campaign(start).await.unwrap();
    let first = leased(&mut stream, 1, canary).await;
    for task in &first {
        let meter = meters.get(&SystemTitle::from_octets(&task.meter).unwrap()).unwrap();
        assert_eq!(execute(&head_end, task, meter).await, "proven");
    }

    // The canaries have ended well, so the other meters' turn comes.
    let second = leased(&mut stream, 2, others).await;
    let mut given: Vec<SystemTitle> =
        first.iter().chain(&second).map(|task| SystemTitle::from_octets(&task.meter).unwrap()).collect();
    given.sort_unstable();
    assert!(given.iter().eq(meters.keys()), "{given:?}");

    // I5: revocation acts in open streams too.
    let disable = DisablePrincipalRequest {
        request_id: request_id(),
        principal: "urn:meterkms:dev:head-end:head-end".to_owned(),
        reason: "a test".to_owned(),
    };
    officer.principals().disable_principal(disable).await.unwrap();
    let ended = next(&mut stream).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended}");
}

/// What the stream brings next.
async fn next(stream: &mut Streaming<LeaseTasksResponse>) -> Result<Option<LeaseTasksResponse>, Status> {
    tokio::time::timeout(COMES_WITHIN, stream.message()).await.unwrap()
}

/// So many tasks that the stream brings, in one answer or in several, all of this wave.
async fn leased(stream: &mut Streaming<LeaseTasksResponse>, wave: u32, count: u64) -> Vec<Task> {
    let mut tasks: Vec<Task> = Vec::new();
    while (tasks.len() as u64) < count {
        tasks.extend(next(stream).await.unwrap().unwrap().tasks);
    }
    assert!(
        tasks.len() as u64 == count && tasks.iter().all(|task| task.wave == wave && task.key_type == "GUEK"),
        "wave {wave}: {tasks:?}"
    );
    tasks
}

/// Carries the transfer of a task between the server and its meter, which answers every time: how
/// it ended.
async fn execute(head_end: &Connection, task: &Task, meter: &Meter) -> String {
    let order = TransferOrder {
        meter: task.meter.clone(),
        security_setup: task.security_setup.clone(),
        key_type: task.key_type.clone(),
        client_title: hex::decode(CLIENT_TITLE).unwrap().into(),
        form: TransferForm::Frames.into(),
        campaign_id: task.campaign_id.clone(),
        fence: task.fence,
        ..TransferOrder::default()
    };
    let begin = BeginTransfersRequest { request_id: request_id(), orders: vec![order] };
    let mut steps = head_end.transfers().begin_transfers(begin).await.unwrap().into_inner().steps;
    let mut line = MeterConnection::new(meter.clone(), 1);
    loop {
        let step = steps.pop().unwrap();
        let send = match step.next.unwrap() {
            Next::Send(send) => send,
            Next::End(end) => return end.outcome,
            Next::Refusal(refusal) => return refusal.message,
        };
        if send.kind == i32::from(Kind::Associate) {
            line = MeterConnection::new(meter.clone(), 1);
        }
        let answer = line.deliver(&send.apdu).await.answers.pop();
        let answer = answer.map_or(Answer::Nothing(true), |apdu| Answer::Apdu(apdu.into()));
        let report =
            TransferReport { meter: step.meter, transfer_id: step.transfer_id, step: step.step, answer: Some(answer) };
        let proceed = ContinueTransfersRequest { reports: vec![report] };
        steps = head_end.transfers().continue_transfers(proceed).await.unwrap().into_inner().steps;
    }
}

fn request_id() -> bytes::Bytes {
    new_request_id().octets().to_vec().into()
}

/// Servers lead campaigns on every 2 seconds, and streams look every second.
const COMES_WITHIN: Duration = Duration::from_secs(300);
