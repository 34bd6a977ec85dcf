//! I6: a campaign is executed only if distinct people, none of them the requester, have approved
//! exactly what is executed.

use kms_client::{Connection, new_request_id, proto};
use kms_store::RowKind;
use kms_store_testing::{Damage, damage, execute, octets};
use kms_tests::{DevServer, title};
use tonic::{Code, Status};

struct Scene {
    server: DevServer,
    /// Makes campaigns.
    ada: Connection,
    bo: Connection,
}

impl Scene {
    async fn new() -> Self {
        let server = DevServer::start();
        let (ada, bo) = (server.connect("officer-1").await, server.connect("officer-2").await);
        Self { server, ada, bo }
    }

    async fn draft(&self, quorum: u32) -> proto::Campaign {
        self.draft_by(&self.ada, quorum).await.unwrap()
    }

    async fn draft_by(&self, officer: &Connection, quorum: u32) -> Result<proto::Campaign, Status> {
        let plan = proto::CampaignPlan {
            name: "spring".to_owned(),
            action: proto::CampaignAction::Rotate.into(),
            key_type: "GUEK".to_owned(),
            selection: Some(proto::CampaignSelection {
                meters: (0..9).map(|number| title(number).octets().to_vec().into()).collect(),
                ..Default::default()
            }),
            terms: Some(proto::CampaignTerms { quorum: Some(quorum), canary: Some(9), ..Default::default() }),
            ..Default::default()
        };
        let create = proto::CreateCampaignRequest { request_id: request_id(), plan: Some(plan), commit: true };
        officer.campaigns().create_campaign(create).await.map(|answer| answer.into_inner().campaign.unwrap())
    }

    async fn start(&self, campaign: &proto::Campaign) -> Result<proto::Campaign, Status> {
        let start = proto::ChangeCampaignRequest {
            request_id: request_id(),
            campaign_id: campaign.campaign_id.clone(),
            reason: String::new(),
        };
        self.ada.campaigns().start_campaign(start).await.map(tonic::Response::into_inner)
    }

    async fn show(&self, campaign: &proto::Campaign) -> Result<proto::Campaign, Status> {
        let show = proto::ShowCampaignRequest { campaign_id: campaign.campaign_id.clone() };
        self.ada.campaigns().show_campaign(show).await.map(tonic::Response::into_inner)
    }

    /// What the head-end is given to do.
    async fn leased(&self) -> usize {
        let lease = proto::LeaseTasksRequest::default();
        let mut answers = self.server.connect("head-end").await.tasks().lease_tasks(lease).await.unwrap().into_inner();
        let mut tasks = 0;
        while let Some(answer) = answers.message().await.unwrap() {
            tasks += answer.tasks.len();
        }
        tasks
    }
}

fn request_id() -> bytes::Bytes {
    new_request_id().octets().to_vec().into()
}

async fn approve(
    officer: &Connection,
    campaign: &proto::Campaign,
    content_sha256: &[u8],
) -> Result<proto::Campaign, Status> {
    let approve = proto::ApproveCampaignRequest {
        request_id: request_id(),
        campaign_id: campaign.campaign_id.clone(),
        content_sha256: content_sha256.to_vec().into(),
    };
    officer.campaigns().approve_campaign(approve).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn people_approve_and_not_certificates() {
    let scene = Scene::new().await;
    let refused =
        |answer: Result<proto::Campaign, Status>| assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition);
    // A quorum of nobody is no quorum.
    let nobody = proto::CreateCampaignRequest {
        request_id: request_id(),
        plan: scene.draft(1).await.plan.map(|plan| proto::CampaignPlan {
            terms: Some(proto::CampaignTerms { quorum: Some(0), ..Default::default() }),
            ..plan
        }),
        commit: true,
    };
    assert_eq!(scene.ada.campaigns().create_campaign(nobody).await.unwrap_err().code(), Code::InvalidArgument);

    let campaign = scene.draft(2).await;
    let content = campaign.content_sha256.to_vec();
    let (ada_again, bo_again) =
        (scene.server.add_officer("ada-2", "Ada Officer").await, scene.server.add_officer("bo-2", "Bo Officer").await);
    // The requester does not approve, under any name.
    refused(approve(&scene.ada, &campaign, &content).await);
    refused(approve(&ada_again, &campaign, &content).await);
    refused(approve(&scene.bo, &campaign, &[0; 32]).await);
    assert_eq!(approve(&scene.bo, &campaign, &content).await.unwrap().state, "draft");
    // Nobody counts twice.
    refused(approve(&scene.bo, &campaign, &content).await);
    refused(approve(&bo_again, &campaign, &content).await);
    refused(scene.start(&campaign).await);
    assert_eq!(scene.leased().await, 0);
    let cy = scene.server.add_confirmed_officer("cy", "Cy Officer").await;
    assert_eq!(approve(&cy, &campaign, &content).await.unwrap().state, "approved");
    assert_eq!(scene.start(&campaign).await.unwrap().state, "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_officer_whom_one_officer_invents_neither_asks_nor_approves() {
    let scene = Scene::new().await;
    let eve = scene.server.add_officer("eve", "Eve Officer").await;
    let campaign = scene.draft(1).await;
    assert_eq!(approve(&eve, &campaign, &campaign.content_sha256).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(scene.draft_by(&eve, 1).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(scene.show(&campaign).await.unwrap().state, "draft");
    assert_eq!(approve(&scene.bo, &campaign, &campaign.content_sha256).await.unwrap().state, "approved");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_was_approved_is_carried_out() {
    let scene = Scene::new().await;
    let database = scene.server.database();
    let row = async |campaign: &proto::Campaign| {
        scene.server.glance().await.store.sealed(RowKind::Campaign, &campaign.campaign_id).await.unwrap().unwrap()
    };

    // Another content in the place of what was approved: the row of another campaign, or the right
    // one with other octets.
    let (approved, other) = (scene.draft(1).await, scene.draft(1).await);
    approve(&scene.bo, &approved, &approved.content_sha256).await.unwrap();
    let genuine = row(&approved).await;
    let mut edited = genuine.clone();
    let at = edited.body.windows(6).position(|octets| octets == b"spring").unwrap();
    edited.body[at] = b'S';
    for forged in [row(&other).await, edited] {
        assert_eq!(
            damage(&database, &Damage::PutSealed(RowKind::Campaign, approved.campaign_id.to_vec(), forged))
                .await
                .unwrap(),
            1
        );
        scene.start(&approved).await.unwrap_err();
        assert_eq!(scene.leased().await, 0);
    }
    assert_eq!(
        damage(&database, &Damage::PutSealed(RowKind::Campaign, approved.campaign_id.to_vec(), genuine)).await.unwrap(),
        1
    );

    // The plan is too large for the row: here somebody adds a meter to it after the approval.
    let mut titles: Vec<u8> = (0..9).flat_map(|number| title(number).octets()).collect();
    titles.extend(title(20).octets());
    let [titles, id] = [titles.as_slice(), &approved.campaign_id].map(|value| octets(&database, value));
    assert_eq!(
        execute(&database, &format!("UPDATE campaign_chunk SET titles = {titles} WHERE campaign = {id}"))
            .await
            .unwrap(),
        1
    );
    let _ = scene.start(&approved).await;
    let shown = scene.show(&approved).await.unwrap();
    assert!(shown.state == "paused" && shown.reason.contains("not the one that was approved"), "{shown:?}");
    assert_eq!(scene.leased().await, 0);
    let list = proto::ListAuditRecordsRequest { page_size: 500, newest_first: true, ..Default::default() };
    let records =
        scene.server.connect("auditor").await.audit().list_audit_records(list).await.unwrap().into_inner().records;
    let told = |record: &proto::AuditRecord| matches!(&record.event, Some(proto::audit_record::Event::SecurityEvent(event)) if event.kind == "campaign-plan-refused");
    assert!(records.iter().any(told));
}
