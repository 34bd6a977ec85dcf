//! A5: what a task may do comes from the plan that people approved, whatever its row says.

use std::time::Duration;

use kms_client::{
    Connection,
    proto::{
        ApproveCampaignRequest, CampaignAction, CampaignPlan, CampaignSelection, CampaignTerms, ChangeCampaignRequest,
        CreateCampaignRequest, LeaseTasksRequest, Task, transfer_step::Next,
    },
};
use kms_domain::KeyType;
use kms_store_testing::execute;
use kms_tests::DevServer;

use crate::{
    relay::{begin, order},
    scene::{meter, request_id},
    verdict::{Figure, Verdict},
};

/// Somebody who writes the database makes a KEK of the GUEK that a campaign was approved for.
pub(crate) async fn edited_tasks() -> Vec<Verdict> {
    let server = DevServer::start();
    let (ada, bo) = (server.connect("officer-1").await, server.connect("officer-2").await);
    let head_end = server.connect("head-end").await;
    let plan = CampaignPlan {
        name: "spring".to_owned(),
        action: CampaignAction::Rotate.into(),
        key_type: "GUEK".to_owned(),
        selection: Some(CampaignSelection { meters: (0..METERS).map(meter).collect(), ..CampaignSelection::default() }),
        terms: Some(CampaignTerms {
            quorum: Some(1),
            canary: Some(u32::try_from(METERS).unwrap()),
            ..CampaignTerms::default()
        }),
        ..CampaignPlan::default()
    };
    let create = CreateCampaignRequest { request_id: request_id(), plan: Some(plan), commit: true };
    let campaign = ada.campaigns().create_campaign(create).await.unwrap().into_inner().campaign.unwrap();
    let (campaign_id, content_sha256) = (campaign.campaign_id, campaign.content_sha256);
    let approve = ApproveCampaignRequest { request_id: request_id(), campaign_id: campaign_id.clone(), content_sha256 };
    bo.campaigns().approve_campaign(approve).await.unwrap();
    let start = ChangeCampaignRequest { request_id: request_id(), campaign_id, reason: String::new() };
    ada.campaigns().start_campaign(start).await.unwrap();

    // Once before the tasks are leased, and once after.
    let database = server.database();
    let edit = format!("UPDATE task SET key_type = {}", KeyType::KEK.number());
    let mut edited = 0;
    for _ in 0..WAITS {
        edited = execute(&database, &edit).await.unwrap();
        if edited > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(edited > 0, "the campaign has no tasks");
    let mut tasks = lease(&head_end).await;
    execute(&database, "UPDATE task SET key_type = 2").await.unwrap();
    tasks.extend(lease(&head_end).await);
    execute(&database, &edit).await.unwrap();

    let (mut asked, mut left) = (0, 0);
    for task in &tasks {
        let number = (0..METERS).find(|number| meter(*number) == task.meter).unwrap();
        let order = kms_client::proto::TransferOrder {
            campaign_id: task.campaign_id.clone(),
            fence: task.fence,
            ..order(number, KEK)
        };
        asked += 1;
        if begin(&head_end, order).await.is_ok_and(|step| !matches!(step.next, Some(Next::Refusal(_)) | None)) {
            left += 1;
        }
    }
    let told = tasks.iter().filter(|task| task.key_type == KEK).count();
    let figure = Figure::count(left, format!("of {asked} KEKs begun in a campaign that was approved for GUEKs"));
    let verdict = Verdict::new("A5", "a task whose key type was edited", left == 0 && told == 0, figure);
    vec![verdict.with(format!("{edited} rows edited; {} tasks leased, {told} of them for a KEK", tasks.len()))]
}

async fn lease(head_end: &Connection) -> Vec<Task> {
    let mut tasks = Vec::new();
    let Ok(answers) = head_end.tasks().lease_tasks(LeaseTasksRequest::default()).await else { return tasks };
    let mut answers = answers.into_inner();
    while let Ok(Some(answer)) = answers.message().await {
        tasks.extend(answer.tasks);
    }
    tasks
}

const KEK: &str = "KEK";
const METERS: u64 = 3;
const WAITS: usize = 400;
