//! A4, A13: one person is one person, and a thief of a key does not lock its owner out.

use bytes::Bytes;
use kms_client::{
    Connection, KeyRequest, PrincipalId, new_request_id,
    proto::{
        AddPrincipalRequest, ApproveCampaignRequest, ApproveProposalRequest, Campaign, CampaignAction, CampaignPlan,
        CampaignSelection, CampaignTerms, CreateCampaignRequest, ProposeCounterRaiseRequest, RenewPrincipalRequest,
        WhoAmIRequest,
    },
};
use kms_tests::{DevServer, title};

use crate::{
    scene::{add, client_title, keep, meter, request_id, urn},
    verdict::{Figure, Verdict},
};

/// An officer certifies an own key for another officer, and for an officer that does not exist, and
/// approves with both what the first certificate asked for.
pub(crate) async fn one_officer_is_two() -> Vec<Verdict> {
    let server = DevServer::start();
    let (ada, bo) = (server.connect("officer-1").await, server.connect("officer-2").await);
    let mut forged: Vec<(&str, Connection)> = Vec::new();
    let mut seen = Vec::new();

    let other = PrincipalId::parse(&urn("officer", "officer-2")).unwrap();
    let key = KeyRequest::generate(&other).unwrap();
    let certificate_request = key.certificate_request().to_vec().into();
    let renew = renewal(&other, certificate_request);
    match ada.principals().renew_principal(renew).await {
        Err(status) => seen.push(format!("renewing another officer: {:?}", status.code())),
        Ok(issued) => {
            seen.push("renewing another officer: certified".to_owned());
            let profile = keep(&server, &other, "officer-2-forged", &key, &issued.into_inner());
            forged.extend(
                Connection::connect(&profile).await.ok().map(|connection| ("another officer's new key", connection)),
            );
        }
    }
    let new = AddPrincipalRequest {
        principal: urn("officer", "mallory"),
        person: "Mallory Officer".to_owned(),
        ..AddPrincipalRequest::default()
    };
    match add(&server, &ada, new).await {
        Err(status) => seen.push(format!("adding an officer: {:?}", status.code())),
        Ok(profile) => {
            seen.push("adding an officer: certified".to_owned());
            forged
                .extend(Connection::connect(&profile).await.ok().map(|connection| ("an officer made up", connection)));
        }
    }

    let mut counted = Vec::new();
    for (who, connection) in &forged {
        let campaign = draft(&ada).await;
        if approve(connection, &campaign).await {
            counted.push(format!("a campaign by {who}"));
        }
        let propose = ProposeCounterRaiseRequest {
            request_id: request_id(),
            meter: meter(5),
            client_title: client_title(),
            to: 3_000_000,
            reason: "a test".to_owned(),
            ..ProposeCounterRaiseRequest::default()
        };
        let proposal = ada.meters().propose_counter_raise(propose).await.unwrap().into_inner();
        let approve = ApproveProposalRequest {
            request_id: request_id(),
            proposal_id: proposal.proposal_id,
            content_sha256: proposal.content_sha256,
        };
        if connection.proposals().approve_proposal(approve).await.is_ok() {
            counted.push(format!("a proposal by {who}"));
        }
    }
    // The true second person still is one.
    let campaign = draft(&ada).await;
    assert!(approve(&bo, &campaign).await, "the second officer cannot approve any more");
    let figure = Figure::count(
        counted.len(),
        format!("of {} approvals with keys that the requester made counted", 2 * forged.len()),
    );
    let verdict = Verdict::new("A4", "an officer who approves as two", counted.is_empty(), figure);
    vec![verdict.with(seen.into_iter().chain(counted).collect::<Vec<_>>().join("; "))]
}

/// A renewal that nobody else stands behind.
fn renewal(principal: &PrincipalId, certificate_request: Bytes) -> RenewPrincipalRequest {
    RenewPrincipalRequest {
        request_id: request_id(),
        principal: principal.to_string(),
        certificate_request,
        ..RenewPrincipalRequest::default()
    }
}

async fn draft(officer: &Connection) -> Campaign {
    let selection = CampaignSelection {
        meters: (0..3).map(|number| title(number).octets().to_vec().into()).collect(),
        ..Default::default()
    };
    let plan = CampaignPlan {
        name: "spring".to_owned(),
        action: CampaignAction::Rotate.into(),
        key_type: "GUEK".to_owned(),
        selection: Some(selection),
        terms: Some(CampaignTerms { quorum: Some(1), canary: Some(3), ..CampaignTerms::default() }),
        ..CampaignPlan::default()
    };
    let create = CreateCampaignRequest { request_id: request_id(), plan: Some(plan), commit: true };
    officer.campaigns().create_campaign(create).await.unwrap().into_inner().campaign.unwrap()
}

/// Whether it counted.
async fn approve(officer: &Connection, campaign: &Campaign) -> bool {
    let (campaign_id, content_sha256) = (campaign.campaign_id.clone(), campaign.content_sha256.clone());
    let approve = ApproveCampaignRequest { request_id: request_id(), campaign_id, content_sha256 };
    officer
        .campaigns()
        .approve_campaign(approve)
        .await
        .is_ok_and(|campaign| !campaign.into_inner().approvals.is_empty())
}

/// Who has a head-end's TLS key renews its certificate again and again: the owner still gets in.
pub(crate) async fn stolen_key() -> Vec<Verdict> {
    let server = DevServer::start();
    let owner = server.profile("head-end");
    let id = PrincipalId::parse(&urn("head-end", "head-end")).unwrap();
    let mut thief = server.connect("head-end").await;
    let (mut renewed, mut refused) = (0, String::new());
    for round in 0..RENEWALS {
        let key = KeyRequest::generate(&id).unwrap();
        let certificate_request = key.certificate_request().to_vec().into();
        let renew = renewal(&id, certificate_request);
        match thief.principals().renew_principal(renew).await {
            Ok(issued) => {
                renewed += 1;
                let profile = keep(&server, &id, &format!("thief-{round}"), &key, &issued.into_inner());
                if let Ok(connection) = Connection::connect(&profile).await {
                    thief = connection;
                }
            }
            Err(status) => refused = format!("; a further one: {:?}", status.code()),
        }
    }
    let locked_out = match Connection::connect(&owner).await {
        Ok(connection) => {
            connection.principals().who_am_i(WhoAmIRequest {}).await.err().map(|status| status.message().to_owned())
        }
        Err(error) => Some(error.to_string()),
    };
    let session = locked_out.is_none() && {
        let connection = Connection::connect(&owner).await.unwrap();
        let (key, options) = (owner.transport_key().unwrap(), kms_tests::TestModule::of_environment().open_options());
        connection.open_session(&key, new_request_id(), title(1), kms_tests::terms(1), &options).await.is_ok()
    };
    let figure = Figure::count(renewed, format!("of {RENEWALS} renewals with the stolen key passed"));
    let detail = locked_out.map_or_else(
        || "the owner's certificate still works".to_owned(),
        |why| format!("the owner is locked out: {why}"),
    );
    vec![Verdict::new("A13", "renewals with a stolen TLS key", session, figure).with(format!("{detail}{refused}"))]
}

/// More than the certificates that a principal may have at a time.
const RENEWALS: usize = 12;
