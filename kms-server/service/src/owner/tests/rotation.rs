//! Rotations of a group's key over simulated meters: what the server says that a member holds is
//! compared with the meter's memory.

use std::num::NonZeroU8;

use kms_client::sample::SampleShipment;
use kms_domain::{
    CampaignAction, CampaignId, CampaignName, CampaignSelection, CampaignTask, CampaignTerms, ExposureReason, KeyState,
    KeyVersionNumber, MaintenanceWindows, Outcome, Party, PersonName, PrincipalCertificate, PrincipalId,
    PrincipalStatus, Quorum, Role, SwitchThreshold, SystemTitle, UnixMillis, WaveSize,
};
use meter_sim::behaviour::Fault;

use super::*;
use crate::testing::sample;
use crate::{
    campaign::{self, CampaignChange, CampaignService, LeaseQuery, NewCampaign},
    meter::{Compromise, Membership},
    owner::{NamedGroupKey, Switch},
    transfer::{
        Order,
        tests::{Field, at_key_transfer, order},
    },
};

const PERMIT_ROTATION: &str = "permit (principal == HeadEnd::\"urn:meterkms:north:head-end:hes-1\", \
                               action in [Action::\"openGroupSession\", Action::\"showGroupRotation\", Action::\"switchGroupKey\"], \
                               resource == MeterGroup::\"1\") when { !(context has early) || !context.early };";
const SETUP: SecuritySetupId = SecuritySetupId::DEFAULT;

/// Meters of the group `north`, whose GBEK is not made yet.
async fn members(island: TestIsland, count: u64) -> Field {
    let mut shipment = sample("two-setups-suite1", count);
    shipment.groups = vec!["north".to_owned()];
    let field = Field::of(island, &shipment).await;
    field.island.with_transport_key(&field.island.head_end).await;
    field.island.permit(PERMIT_ROTATION);
    field
}

/// Two meters with equal keys. Only the second one is in the group `north`.
async fn twins(island: TestIsland) -> Field {
    let shipment = SampleShipment { equal_keys: 2, groups: vec!["north".to_owned()], ..sample("two-setups-suite1", 2) };
    let field = Field::of(island, &shipment).await;
    let meters = MeterService::new(field.island.island.clone());
    let left = meters
        .change_members(
            &field.island.officer,
            request(1),
            "north",
            vec![field.title(0)],
            Membership::Remove,
            "test".to_owned(),
        )
        .await;
    assert_eq!(left.unwrap().changed, 1);
    field
}

/// The first version of a key of a meter is known to anyone.
async fn report(island: &TestIsland, number: u8, meter: SystemTitle, key_type: KeyType) {
    let found = Compromise {
        meter,
        setup: None,
        key_type,
        version: KeyVersionNumber::FIRST,
        known_to: Party::Anyone,
        reason: "test".to_owned(),
    };
    MeterService::new(island.island.clone()).report_compromise(&island.officer, request(number), found).await.unwrap();
}

fn key() -> NamedGroupKey {
    NamedGroupKey { group: "north".to_owned(), key_type: KeyType::GBEK, setup: None }
}

fn to(version: u32, early: bool) -> Switch {
    Switch { key: key(), version: KeyVersionNumber::new(version).unwrap(), early, reason: "test".to_owned() }
}

fn id(number: u8) -> RequestId {
    RequestId::from_octets(&[number; 16]).unwrap()
}

async fn row(island: &TestIsland) -> kms_domain::Group {
    (*island.island.group(GroupId(1)).await.unwrap().unwrap().0).clone()
}

/// The version that is issued when this one is asked for.
async fn issuable(island: &TestIsland, number: u8, version: Option<u32>) -> Result<u32, ServiceError> {
    let target = GrantTargets::Group {
        name: "north".to_owned(),
        version: version.map(|version| KeyVersionNumber::new(version).unwrap()),
    };
    let granted = GrantService::new(island.island.clone())
        .open(&island.head_end, chunk(number, target, &[KeyType::GBEK]))
        .await?;
    Ok(group_keys(&granted).keys[0].version)
}

/// Another officer than the one who asks.
async fn colleague(island: &TestIsland) -> Caller {
    let principal = PrincipalId::new(island.island.name().clone(), Role::Officer, "bo").unwrap();
    let not_after = IslandContext::now().after(86_400_000);
    let row = kms_domain::Principal {
        id: principal.clone(),
        revision: 1,
        status: PrincipalStatus::Enabled,
        certificates: vec![PrincipalCertificate::unrecorded(bytes::Bytes::from(vec![40]), [40; 32], not_after)],
        transport: None,
        client_titles: Vec::new(),
        person: Some(PersonName::parse("Bo").unwrap()),
        assurance: None,
        shipment_key: None,
        added: UnixMillis(1),
    };
    put_principal(&island.island, row).await;
    Caller { principal, certificate_sha256: [40; 32], not_after }
}

/// A campaign that rotates the group's GBEK, approved and started.
async fn campaign(island: &TestIsland) -> CampaignId {
    let service = CampaignService::new(island.island.clone());
    let ask =
        || campaign::Request { id: RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap(), digest: [1; 32] };
    let terms = CampaignTerms {
        quorum: Quorum::ONE,
        canary: 0,
        waves: vec![WaveSize::Percent(100)],
        success_threshold: 1,
        failure_limit: 10,
        windows: MaintenanceWindows::always(),
        starts_per_minute: None,
        in_flight: 100.try_into().unwrap(),
        attempts: NonZeroU8::new(1).unwrap(),
        back_off_seconds: 1,
    };
    let new = NewCampaign {
        name: CampaignName::parse("broadcast").unwrap(),
        action: CampaignAction::rotate(KeyType::GBEK).unwrap(),
        setup: None,
        selection: CampaignSelection { group: Some(GroupId(1)), ..CampaignSelection::default() },
        named: Vec::new(),
        terms,
    };
    // The key of a group is rotated for a group that is named.
    let whole_island = NewCampaign {
        selection: CampaignSelection { whole_island: true, ..CampaignSelection::default() },
        ..new.clone()
    };
    assert!(matches!(
        service.create(&island.officer, ask(), whole_island, true).await,
        Err(ServiceError::InvalidArgument { .. })
    ));
    let draft = service.create(&island.officer, ask(), new, true).await.unwrap().campaign.unwrap();
    let id = CampaignId::from_octets(&draft.campaign_id).unwrap();
    let content_sha256 = draft.content_sha256.as_ref().try_into().unwrap();
    service.change(&colleague(island).await, ask(), id, CampaignChange::Approve { content_sha256 }).await.unwrap();
    let start = ask();
    for _ in 0..2 {
        // A start that comes again begins nothing more.
        assert_eq!(service.change(&island.officer, start, id, CampaignChange::Start).await.unwrap().state, "running");
    }
    service.lead(id).await.unwrap();
    id
}

/// The meters of the campaign's tasks, each with its order.
async fn tasks(island: &TestIsland, campaign: CampaignId) -> Vec<Order> {
    let service = CampaignService::new(island.island.clone());
    let query = LeaseQuery { campaign: Some(campaign), most: 100, lease_ms: 60_000 };
    let mut tasks = service.lease(&island.head_end, query).await.unwrap();
    tasks.sort_by_key(|task| task.meter.clone());
    let order_of = |task: &v1::Task| Order {
        task: Some(CampaignTask { campaign, fence: task.fence }),
        ..order(SystemTitle::from_octets(&task.meter).unwrap(), Some(KeyType::GBEK))
    };
    tasks.iter().map(order_of).collect()
}

island_tests! {
    async fn a_campaign_brings_one_version_to_all_members_and_broadcasts_switch_at_the_threshold(island) {
        let field = members(island, 4).await;
        let (island, service) = (&field.island, field.island.owners());
        // The first version, which nobody holds: brought by orders of the head-end.
        service.create_group_key(&island.officer, request(2), "north", new("GBEK", false), None).await.unwrap();
        for member in 0..4 {
            assert_eq!(field.transfer(member, Some(KeyType::GBEK)).await, Outcome::Acknowledged);
        }
        let rotation = service.rotation(&island.head_end, &key()).await.unwrap();
        assert_eq!((rotation.version, rotation.active_version, rotation.members, rotation.acknowledged), (1, 0, 4, 4));
        assert_eq!(rotation.stage, "rolling-out", "nobody has taken note yet");
        service.follow_rotations().await.unwrap();
        assert_eq!(service.rotation(&island.auditor, &key()).await.unwrap().stage, "may-switch");
        assert_eq!(service.switch(&island.head_end, id(30), to(1, false)).await.unwrap().stage, "complete");
        assert_eq!(issuable(island, 31, None).await.unwrap(), 1);
        // What left under a KEK that the vendor knows is exposed to the vendor.
        let exposures = |group: &kms_domain::Group, version: usize| group.slots.get(SETUP, KeyType::GBEK).unwrap().versions()[version].exposures().to_vec();
        assert!(exposures(&row(island).await, 0).iter().any(|one| (&one.party, one.reason) == (&Party::Vendor, ExposureReason::TransferUnderExposedKek)));

        let campaign = campaign(island).await;
        let versions = |group: &kms_domain::Group| group.slots.get(SETUP, KeyType::GBEK).unwrap().versions().iter().map(|one| one.state()).collect::<Vec<_>>();
        assert_eq!(versions(&row(island).await), [KeyState::Active, KeyState::PreActive], "one version for the whole campaign");
        let tasks = tasks(island, campaign).await;
        assert_eq!(tasks.len(), 4);
        for (member, order) in tasks.iter().take(2).enumerate() {
            assert_eq!(field.run(member, order.clone()).await, Outcome::Acknowledged);
            assert!(field.holds_group_key(member, &row(island).await, KeyVersionNumber::new(2).unwrap()).await);
        }
        let rotation = service.rotation(&island.head_end, &key()).await.unwrap();
        assert_eq!((rotation.version, rotation.active_version, rotation.acknowledged, rotation.stage.as_str()), (2, 1, 2, "rolling-out"));
        assert_eq!(rotation.campaign_id.as_ref(), campaign.octets());
        let behind = service.members_behind(&island.head_end, &key(), None, 1).await.unwrap();
        assert_eq!(behind.next, Some(field.title(2)));
        let rest = service.members_behind(&island.head_end, &key(), behind.next, 9).await.unwrap();
        assert_eq!((rest.next, rest.members.len(), rest.members[0].meter.as_ref()), (None, 1, field.title(3).octets().as_slice()));
        assert_eq!((rest.members[0].acknowledged_version, rest.members[0].delivered), (1, false));
        // I3, I8: the new version is issued to nobody yet, and the head-end may not switch early.
        assert!(matches!(issuable(island, 32, Some(2)).await, Err(ServiceError::FailedPrecondition { .. })));
        let session = open(&island.island, &island.head_end, 33, "north").await.unwrap().rotation.unwrap();
        assert_eq!((session.active_version, session.version, session.stage.as_str(), session.members), (1, 2, "rolling-out", 0));
        assert!(matches!(service.switch(&island.head_end, id(34), to(2, false)).await, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("95 %")));
        assert!(matches!(service.switch(&island.head_end, id(35), to(2, true)).await, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(service.switch(&island.officer, id(36), to(3, false)).await, Err(ServiceError::FailedPrecondition { .. })));

        // One more has it; of the last one the answer is lost.
        field.meters[3].add_fault(at_key_transfer(2, Fault::LoseAnswer));
        assert_eq!(field.run(2, tasks[2].clone()).await, Outcome::Acknowledged);
        assert_eq!(field.run(3, tasks[3].clone()).await, Outcome::InDoubt);
        assert!(matches!(service.set_switch_threshold(&island.head_end, id(37), "north", SwitchThreshold::new(75).unwrap()).await, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(service.set_switch_threshold(&island.officer, id(38), "north", SwitchThreshold::new(75).unwrap()).await.unwrap().switch_threshold_percent, 75);
        let switched = service.switch(&island.head_end, id(39), to(2, false)).await.unwrap();
        assert_eq!((switched.stage.as_str(), switched.active_version, switched.former_version, switched.unacknowledged), ("switched", 2, 1, 1));
        assert_eq!(service.switch(&island.head_end, id(40), to(2, false)).await.unwrap().stage, "switched", "once more is no fault");
        // The overlap: both are issued, each with counters of its own.
        assert_eq!((issuable(island, 41, None).await.unwrap(), issuable(island, 42, Some(1)).await.unwrap(), issuable(island, 43, Some(2)).await.unwrap()), (2, 1, 2));
        let behind = service.members_behind(&island.auditor, &key(), None, 9).await.unwrap().members;
        assert!(behind.len() == 1 && behind[0].delivered && behind[0].meter.as_ref() == field.title(3).octets());
        // A new order reaches the last one, and the overlap ends.
        assert_eq!(field.transfer(3, Some(KeyType::GBEK)).await, Outcome::Acknowledged);
        service.follow_rotations().await.unwrap();
        assert_eq!(service.rotation(&island.head_end, &key()).await.unwrap().stage, "complete");
        assert!(matches!(issuable(island, 44, Some(1)).await, Err(ServiceError::FailedPrecondition { .. })));
        for member in 0..4 {
            assert!(field.holds_group_key(member, &row(island).await, KeyVersionNumber::new(2).unwrap()).await);
        }
        field.assert_no_nonce_twice();
        // I2: the record tells the story.
        let changes = island.recorded(|event| match event { Event::GroupKeyChanged(event) => Some(event.change), _ => None }).await;
        let told = ["threshold-reached", "switched", "complete", "begun", "threshold-set", "threshold-reached", "switched", "complete"];
        assert_eq!(changes, told);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }

    async fn a_compromised_kek_exposes_the_groups_key_that_left_under_it(island) {
        let field = members(island, 3).await;
        let (island, service) = (&field.island, field.island.owners());
        let meters = MeterService::new(island.island.clone());
        service.create_group_key(&island.officer, request(2), "north", new("GBEK", true), None).await.unwrap();
        let wanted = async || service.rotation(&island.auditor, &key()).await.unwrap().wanted_because;
        let compromised = async |number, member, key_type| {
            let version = KeyVersionNumber::FIRST;
            let found = Compromise { meter: field.title(member), setup: None, key_type, version, known_to: Party::Anyone, reason: "test".to_owned() };
            meters.report_compromise(&island.officer, request(number), found).await.unwrap()
        };
        let campaign = campaign(island).await;
        for (member, order) in tasks(island, campaign).await.into_iter().enumerate().take(2) {
            assert_eq!(field.run(member, order).await, Outcome::Acknowledged);
        }
        // Under the third member's KEK nothing left, and a GUEK opens no key.
        compromised(3, 2, KeyType::KEK).await;
        compromised(4, 0, KeyType::GUEK).await;
        assert!(wanted().await.is_empty());
        compromised(5, 1, KeyType::KEK).await;
        assert_eq!(wanted().await, ["member-compromised"]);
        let version = KeyVersionNumber::new(2).unwrap();
        let group = row(island).await;
        let exposures = |number| {
            let version = group.slots.get(SETUP, KeyType::GBEK).unwrap().version(number).unwrap();
            version.exposures().iter().filter(|exposure| exposure.reason == ExposureReason::MemberCompromised).count()
        };
        assert_eq!((exposures(KeyVersionNumber::FIRST), exposures(version)), (0, 1), "what left under it, and nothing else");
        assert_eq!(field.security_events().await.iter().filter(|kind| *kind == "group-key-exposed").count(), 1);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }

    /// Meter 1 and a meter that is in no group have equal keys: who knows the KEK by the one knows
    /// what leaves under it for the other.
    async fn a_kek_that_is_reported_of_another_meter_exposes_the_groups_key_that_leaves_under_it(island) {
        let field = twins(island).await;
        let (island, service) = (&field.island, field.island.owners());
        service.create_group_key(&island.officer, request(2), "north", new("GBEK", true), None).await.unwrap();
        let wanted = async || service.rotation(&island.auditor, &key()).await.unwrap().wanted_because;
        report(island, 3, field.title(0), KeyType::KEK).await;
        assert!(wanted().await.is_empty(), "nothing left under it yet");
        let campaign = campaign(island).await;
        for order in tasks(island, campaign).await {
            assert_eq!(field.run(1, order).await, Outcome::Acknowledged);
        }
        assert_eq!(wanted().await, ["member-compromised"]);
        let group = row(island).await;
        let reasons = |number: KeyVersionNumber| {
            let version = group.slots.get(SETUP, KeyType::GBEK).unwrap().version(number).unwrap();
            version.exposures().iter().filter(|exposure| exposure.party == Party::Anyone).map(|exposure| exposure.reason).collect::<Vec<_>>()
        };
        assert_eq!(reasons(KeyVersionNumber::new(2).unwrap()), [ExposureReason::TransferUnderExposedKek, ExposureReason::MemberCompromised]);
        assert_eq!(reasons(KeyVersionNumber::FIRST), [], "what did not leave under it");
        assert_eq!(field.security_events().await.iter().filter(|kind| *kind == "group-key-exposed").count(), 1);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }

    /// The other order.
    async fn a_kek_that_is_reported_of_another_meter_exposes_the_groups_key_that_left_under_it(island) {
        let field = twins(island).await;
        let (island, service) = (&field.island, field.island.owners());
        service.create_group_key(&island.officer, request(2), "north", new("GBEK", true), None).await.unwrap();
        let wanted = async || service.rotation(&island.auditor, &key()).await.unwrap().wanted_because;
        let campaign = campaign(island).await;
        for order in tasks(island, campaign).await {
            assert_eq!(field.run(1, order).await, Outcome::Acknowledged);
        }
        report(island, 3, field.title(0), KeyType::GUEK).await;
        assert!(wanted().await.is_empty(), "a GUEK opens no key");
        report(island, 4, field.title(0), KeyType::KEK).await;
        assert_eq!(wanted().await, ["member-compromised"]);
        assert_eq!(field.security_events().await.iter().filter(|kind| *kind == "group-key-exposed").count(), 1);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }

    async fn who_leaves_takes_the_groups_key_and_it_is_rotated(island) {
        let field = members(island, 5).await;
        let (island, service) = (&field.island, field.island.owners());
        let meters = MeterService::new(island.island.clone());
        service.create_group_key(&island.officer, request(2), "north", new("GBEK", true), None).await.unwrap();
        let wanted = async || service.rotation(&island.auditor, &key()).await.unwrap().wanted_because;
        let change = async |number, caller, member, change| {
            meters.change_members(caller, request(number), "north", vec![field.title(member)], change, "test".to_owned()).await
        };
        assert!(wanted().await.is_empty());
        assert!(matches!(change(3, &island.head_end, 0, Membership::Remove).await, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(
            meters.change_members(&island.officer, request(4), "west", vec![field.title(0)], Membership::Remove, "test".to_owned()).await,
            Err(ServiceError::NotFound { .. })
        ));
        assert_eq!(change(5, &island.officer, 0, Membership::Remove).await.unwrap().changed, 1);
        assert_eq!(change(5, &island.officer, 0, Membership::Remove).await.unwrap().changed, 1, "the same request");
        assert_eq!(change(6, &island.officer, 0, Membership::Remove).await.unwrap().unchanged, 1);
        assert_eq!(wanted().await, ["member-left"]);
        // Who is no member gets none of its keys, and is not counted.
        assert!(matches!(field.begin(order(field.title(0), Some(KeyType::GBEK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        assert_eq!(service.rotation(&island.auditor, &key()).await.unwrap().members, 4);
        // The next one for the same reason is no news; one that is retired is.
        assert_eq!(change(7, &island.officer, 1, Membership::Remove).await.unwrap().changed, 1);
        assert_eq!(meters.retire(&island.officer, request(8), vec![field.title(2)], "scrapped".to_owned()).await.unwrap().changed, 1);
        assert_eq!(wanted().await, ["member-left", "member-retired"]);
        assert_eq!(field.security_events().await.iter().filter(|kind| *kind == "group-key-exposed").count(), 2);
        assert_eq!(change(9, &island.officer, 2, Membership::Add).await.unwrap().problems.len(), 1, "it is retired");

        // The campaign's version is known to none of them; until one that has it is compromised.
        let first = campaign(island).await;
        assert!(wanted().await.is_empty());
        assert_eq!(field.run(3, tasks(island, first).await[0].clone()).await, Outcome::Acknowledged);
        assert_eq!(change(10, &island.officer, 3, Membership::RemoveCompromised).await.unwrap().changed, 1);
        assert_eq!(wanted().await, ["member-compromised"]);
        let second = campaign(island).await;
        let group = row(island).await;
        let slot = group.slots.get(SETUP, KeyType::GBEK).unwrap();
        assert_eq!(slot.versions().iter().map(|version| version.state()).collect::<Vec<_>>(), [KeyState::Active, KeyState::Compromised, KeyState::PreActive]);
        // One that comes back gets what all get.
        assert_eq!(change(11, &island.officer, 1, Membership::Add).await.unwrap().changed, 1);
        assert_eq!(field.transfer(1, Some(KeyType::GBEK)).await, Outcome::Acknowledged);
        for order in tasks(island, second).await {
            assert_eq!(field.run(4, order).await, Outcome::Acknowledged);
        }
        let switched = service.switch(&island.head_end, id(12), to(3, false)).await.unwrap();
        assert_eq!((switched.members, switched.acknowledged, switched.stage.as_str()), (2, 2, "complete"));
        assert!(wanted().await.is_empty());
        assert!(field.holds_group_key(1, &group, KeyVersionNumber::new(3).unwrap()).await && !field.holds_group_key(3, &group, KeyVersionNumber::new(3).unwrap()).await);
        // A meter's own row says what it has acknowledged.
        let shown = meters.show(&island.officer, field.title(1)).await.unwrap();
        assert_eq!(shown.shared_keys.iter().map(|key| (key.group.as_str(), key.version, key.acknowledged)).collect::<Vec<_>>(), [("north", 3, true)]);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
    }
}
