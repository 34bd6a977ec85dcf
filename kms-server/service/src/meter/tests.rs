use kms_domain::{
    CounterKey, DeviceProfileName, FlagId, KeyOrigin, KeyState, KeyType, MeterStatus, PrincipalId, RequestId,
    SecuritySetupId, SystemTitle,
};
use kms_proto::v1::{self, audit_record::Event};
use prost::Message as _;

use super::{Assignment, CounterFloor, Enrolment, Filter, MeterService, NewMeter, Request, Selection};
use crate::testing::{TestIsland, client_title, island_tests, meter, sample};
use kms_base::error::ServiceError;
use kms_ledger::CounterOf;

fn request(number: u8) -> Request {
    Request { id: RequestId::from_octets(&[number; 16]).unwrap(), digest: [number; 32] }
}

fn assignment(meters: &[SystemTitle], head_end: Option<&PrincipalId>) -> Assignment {
    Assignment { selection: Selection::Meters(meters.to_vec()), head_end: head_end.cloned(), dry_run: false }
}

fn counts(response: &v1::ChangeMetersResponse) -> (u64, u64, usize) {
    (response.changed, response.unchanged, response.problems.len())
}

impl TestIsland {
    fn service(&self) -> MeterService {
        MeterService::new(self.island.clone())
    }

    async fn changes(&self) -> Vec<v1::MetersChanged> {
        self.recorded(|event| match event {
            Event::MetersChanged(event) => Some(event),
            _ => None,
        })
        .await
    }

    async fn first_counter(&self, title: SystemTitle) -> Result<u32, ServiceError> {
        let of = CounterOf {
            owner: kms_domain::Owner::Meter(title),
            setup: SecuritySetupId::DEFAULT,
            key_type: KeyType::GUEK,
            version: kms_domain::KeyVersionNumber::FIRST,
            counter: CounterKey::ClientTitle(client_title()),
            on_new_key: kms_domain::OnNewKey::Continue,
        };
        let committed = self.island.committer.act_in_test(
            kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
            kms_store::Reads::default(),
            move |view| {
                view.append(Event::KeysGranted(v1::KeysGranted::default()));
                view.lease(of, std::num::NonZeroU32::MIN, kms_domain::UnixMillis(i64::MAX))
            },
        );
        committed.await.map(|committed| committed.value.first)
    }
}

fn guek_counter(title: SystemTitle) -> CounterOf {
    CounterOf {
        owner: kms_domain::Owner::Meter(title),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: kms_domain::KeyVersionNumber::FIRST,
        counter: CounterKey::ClientTitle(client_title()),
        on_new_key: kms_domain::OnNewKey::Continue,
    }
}

/// The next counters of a server: a session's lease, or those of frames.
async fn next_counters(
    server: &crate::island::IslandContext,
    title: SystemTitle,
    counters: u32,
    frames: bool,
) -> kms_domain::Lease {
    let count = std::num::NonZeroU32::new(counters).unwrap();
    let act = server.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        kms_store::Reads::default(),
        move |view| {
            view.append(Event::KeysGranted(v1::KeysGranted::default()));
            if frames {
                view.frame_counters(guek_counter(title), count)
            } else {
                view.lease(guek_counter(title), count, kms_domain::UnixMillis(i64::MAX))
            }
        },
    );
    act.await.unwrap().value
}

async fn is_live(server: &crate::island::IslandContext, title: SystemTitle, lease: kms_domain::Lease) -> bool {
    let act = server.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        kms_store::Reads::default(),
        move |view| view.is_live(guek_counter(title), lease),
    );
    act.await.unwrap().value
}

island_tests! {
    async fn a_head_end_sees_its_own_meters_and_no_others(island) {
        island.deliver(&sample("generic-suite0", 30)).await;
        let service = island.service();
        let all = service.list(&island.officer, Filter::default(), None, 100).await.unwrap();
        assert_eq!((all.meters.len(), all.total, all.next), (30, 30, None));
        assert_eq!(service.list(&island.head_end, Filter::default(), None, 100).await.unwrap().total, 30);
        let others = service.list(&island.other_head_end, Filter::default(), None, 100).await.unwrap();
        assert_eq!((others.meters.len(), others.total), (0, 0));
        let asked = Filter { head_end: Some(Some(island.head_end.principal.clone())), ..Filter::default() };
        assert_eq!(service.list(&island.other_head_end, asked, None, 100).await.unwrap().total, 0);

        // Pages.
        let mut titles = Vec::new();
        let mut after = None;
        loop {
            let page = service.list(&island.officer, Filter::default(), after, 7).await.unwrap();
            titles.extend(page.meters.iter().map(|meter| meter.meter.clone()));
            after = page.next;
            if after.is_none() { break; }
        }
        titles.dedup();
        assert_eq!(titles.len(), 30);

        // The same answer for a meter of others and for one that does not exist.
        let shown = service.show(&island.head_end, meter(1)).await.unwrap();
        assert_eq!(shown.security_setups[0].slots.len(), 4);
        assert_eq!(shown.generation, 1);
        let refused = |title: SystemTitle| { let (service, caller) = (service.clone(), island.other_head_end.clone()); async move { service.show(&caller, title).await.unwrap_err() } };
        let (of_others, unknown) = (refused(meter(1)).await, refused(meter(999)).await);
        assert_eq!(of_others.to_string().replace(&meter(1).to_string(), "X"), unknown.to_string().replace(&meter(999).to_string(), "X"));
        assert!(matches!(unknown, ServiceError::PermissionDenied { .. }));
        // I1: what is shown has no key material, not even wrapped.
        let stored = island.island.meter(meter(1)).await.unwrap().unwrap();
        let encoded = shown.encode_to_vec();
        for slot in stored.slots.iter() {
            let kms_domain::KeyMaterial::Wrapped(wrapped) = slot.active().unwrap().material() else { panic!() };
            assert!(!encoded.windows(8).any(|window| wrapped.blob().windows(8).any(|secret| secret == window)));
        }
    }

    async fn meters_are_assigned_once_however_often_it_is_asked(island) {
        let mut stock = sample("generic-suite0", 1_200);
        stock.batch = "stock".to_owned();
        let (file, signature) = island.sample(&stock).await;
        let sha256 = island.upload(&file, &signature).await;
        island.import(sha256, None).await;
        let service = island.service();
        let hes = island.other_head_end.principal.clone();

        let unknown = [meter(1), meter(2), meter(5_000)];
        let denied = service.assign(&island.head_end, request(1), assignment(&unknown, Some(&hes))).await.unwrap();
        assert_eq!(counts(&denied), (0, 0, 3));
        let first = service.assign(&island.officer, request(2), assignment(&unknown, Some(&hes))).await.unwrap();
        assert_eq!(counts(&first), (2, 0, 1));
        let stored = island.island.meter(meter(1)).await.unwrap().unwrap();
        assert_eq!((stored.class.status, stored.class.head_end.as_ref()), (MeterStatus::InService, Some(&hes)));
        assert_eq!(service.assign(&island.officer, request(2), assignment(&unknown, Some(&hes))).await.unwrap(), first);
        let misused = service.assign(&island.officer, Request { digest: [9; 32], ..request(2) }, assignment(&unknown, None)).await;
        assert!(matches!(misused, Err(ServiceError::InvalidArgument { field, .. }) if field == "request_id"));

        let of_batch = |dry_run| Assignment { selection: Selection::Filter(Filter { batch: Some("stock".to_owned()), ..Filter::default() }), head_end: Some(hes.clone()), dry_run };
        assert_eq!(counts(&service.assign(&island.officer, request(3), of_batch(true)).await.unwrap()), (1_198, 2, 0));
        assert_eq!(counts(&service.assign(&island.officer, request(3), of_batch(false)).await.unwrap()), (1_198, 2, 0));
        assert_eq!(counts(&service.assign(&island.officer, request(3), of_batch(false)).await.unwrap()), (1_198, 2, 0));
        assert_eq!(counts(&service.assign(&island.officer, request(4), of_batch(false)).await.unwrap()), (0, 1_200, 0));
        assert_eq!(service.list(&island.other_head_end, Filter::default(), None, 10).await.unwrap().total, 1_200);
        let nobody = PrincipalId::parse("urn:meterkms:north:head-end:nobody").unwrap();
        assert!(matches!(service.assign(&island.officer, request(5), assignment(&[meter(1)], Some(&nobody))).await, Err(ServiceError::InvalidArgument { .. })));
        assert_eq!(counts(&service.assign(&island.officer, request(6), assignment(&[meter(1)], None)).await.unwrap()), (1, 0, 0));
        assert_eq!(service.list(&island.other_head_end, Filter::default(), None, 10).await.unwrap().total, 1_199);
        assert_eq!(island.changes().await.iter().filter(|change| change.change == "assigned").map(|change| change.meters.len()).sum::<usize>(), 1_201);
    }

    async fn counters_are_taken_over_with_floors_and_left_to_head_ends(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let service = island.service();
        let floor = |number, floor, owned_by: Option<&PrincipalId>| CounterFloor { meter: meter(number), setup: SecuritySetupId::DEFAULT, client_title: client_title(), floor, owned_by: owned_by.cloned() };
        // A new counter takes any floor.
        let hes = island.other_head_end.principal.clone();
        let adopted = service.adopt(&island.officer, request(1), vec![floor(1, 5_000_000, None), floor(2, 300, Some(&hes)), floor(77, 1, None)]).await.unwrap();
        assert_eq!(counts(&adopted), (2, 0, 1));
        assert_eq!(service.adopt(&island.officer, request(1), vec![floor(1, 5_000_000, None), floor(2, 300, Some(&hes)), floor(77, 1, None)]).await.unwrap(), adopted);
        assert_eq!(island.first_counter(meter(1)).await.unwrap(), 5_000_000);
        assert!(matches!(island.first_counter(meter(2)).await, Err(ServiceError::FailedPrecondition { .. })));
        let shown = service.show(&island.officer, meter(2)).await.unwrap();
        assert_eq!((shown.security_setups[0].counters[0].owned_by.as_str(), shown.security_setups[0].counters[0].reserved_below), (hes.to_string().as_str(), 300));
        // The head-end gives it up.
        assert_eq!(counts(&service.adopt(&island.officer, request(2), vec![floor(2, 4_000_000, None)]).await.unwrap()), (1, 0, 0));
        assert_eq!(island.first_counter(meter(2)).await.unwrap(), 4_000_000);
        // A counter of this system jumps no further than the cap of the profile, and never back.
        assert_eq!(counts(&service.adopt(&island.officer, request(3), vec![floor(2, 4_300_000, None)]).await.unwrap()), (0, 0, 1));
        // The row does not say how much of its chunk the server has used. The floor is noted there,
        // and counters above it are used.
        assert_eq!(counts(&service.adopt(&island.officer, request(4), vec![floor(2, 10, None)]).await.unwrap()), (1, 0, 0));
        assert_eq!(island.first_counter(meter(2)).await.unwrap(), 4_000_001);
        assert_eq!(counts(&service.adopt(&island.officer, request(5), vec![floor(2, 4_100_000, None)]).await.unwrap()), (1, 0, 0));
        assert_eq!(island.first_counter(meter(2)).await.unwrap(), 4_100_000);
        assert_eq!(counts(&service.adopt(&island.head_end, request(6), vec![floor(1, 1, None)]).await.unwrap()), (0, 0, 1));
    }

    // I4: a server that allocates from a chunk also observes the floor.
    async fn an_adopted_floor_binds_the_server_that_holds_the_chunk_and_every_other(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        // Meters 3 and 4 have equal keys: their counters are in a domain.
        let mut twins = kms_client::sample::SampleShipment { equal_keys: 2, ..sample("generic-suite0", 2) };
        (twins.first_number, twins.batch) = (3, "twins".to_owned());
        island.deliver(&twins).await;
        let (here, there) = (island.island.clone(), island.another_server().await);
        let mut numbers = 10..;
        let mut adopt = |server: &std::sync::Arc<crate::island::IslandContext>, title, floor| {
            let (service, caller, number) = (MeterService::new(server.clone()), island.officer.clone(), numbers.next().unwrap());
            async move {
                let floor = CounterFloor { meter: title, setup: SecuritySetupId::DEFAULT, client_title: client_title(), floor, owned_by: None };
                let adopted = service.adopt(&caller, request(number), vec![floor]).await.unwrap();
                assert!(adopted.problems.is_empty(), "{adopted:?}");
            }
        };
        for (meter_number, floors_at) in [(1, &here), (2, &there), (3, &there)] {
            let title = meter(meter_number);
            let chunk_end = 65_537;
            let lease = next_counters(&here, title, 1_000, false).await;
            assert_eq!((lease.first, lease.count), (1, 1_000));
            assert!(is_live(&here, title, lease).await);
            adopt(floors_at, title, lease.first + 1).await;
            assert!(!is_live(&here, title, lease).await, "its first counter is below the floor: it is not handed out again");
            adopt(floors_at, title, 5_004).await;
            assert_eq!(next_counters(&here, title, 1_000, false).await.first, 5_004);
            // A low floor wastes nothing.
            adopt(floors_at, title, 7).await;
            assert_eq!(next_counters(&here, title, 1, true).await.first, 6_004);
            // So near to the end of the chunk that a session's counters need another one; and the
            // end itself.
            adopt(floors_at, title, chunk_end - 10).await;
            assert_eq!(next_counters(&here, title, 1, true).await.first, chunk_end - 10);
            assert_eq!(next_counters(&here, title, 1_000, false).await.first, chunk_end);
            adopt(floors_at, title, chunk_end + 65_536).await;
            assert_eq!(next_counters(&here, title, 1, false).await.first, chunk_end + 65_536);
            adopt(floors_at, title, chunk_end + 2 * 65_536 + 30_000).await;
            assert_eq!(next_counters(&here, title, 1, false).await.first, chunk_end + 2 * 65_536 + 30_000);
            // The floor lies in the chunk of this server. Another server continues, and then a
            // restarted one.
            let floor = chunk_end + 2 * 65_536 + 35_000;
            adopt(floors_at, title, floor).await;
            assert!(next_counters(&there, title, 1, true).await.first >= floor);
            adopt(floors_at, title, floor + 90_000).await;
            assert!(next_counters(&island.restarted().await, title, 1, true).await.first >= floor + 90_000);
            if meter_number == 3 {
                assert!(next_counters(&here, meter(4), 1, true).await.first > floor + 90_000, "its twin counts with it");
            }
        }
    }

    async fn meters_are_enrolled_with_keys_of_the_island(island) {
        let service = island.service();
        let new = |number| NewMeter { title: meter(number), serial: format!("S{number}"), groups: vec!["depot".to_owned()] };
        let enrolment = |profile: &str, meters| Enrolment {
            manufacturer: FlagId::parse("KAM").unwrap(), device_profile: DeviceProfileName::parse(profile).unwrap(), batch: "E-1".to_owned(), meters,
        };
        let stranger = NewMeter { title: SystemTitle::parse("4C414D0000000001").unwrap(), ..new(1) };
        let first = service.enrol(&island.officer, request(1), enrolment("generic-suite0", (1..=300).map(new).chain([stranger]).collect())).await.unwrap();
        assert_eq!(counts(&first), (300, 0, 1));
        let stored = island.island.meter(meter(300)).await.unwrap().unwrap();
        assert_eq!((stored.class.status, stored.batch.as_str(), stored.class.groups.len()), (MeterStatus::InStock, "E-1", 1));
        let origin = |key_type| stored.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap().active().unwrap().origin();
        assert!(matches!(origin(KeyType::GUEK), KeyOrigin::Diversified { .. }) && matches!(origin(KeyType::KEK), KeyOrigin::Diversified { .. }));
        assert_eq!(origin(KeyType::GBEK), KeyOrigin::Generated);
        assert_eq!(counts(&service.enrol(&island.officer, request(2), enrolment("generic-suite0", vec![new(1), new(301)])).await.unwrap()), (1, 1, 0));
        assert_eq!(counts(&service.enrol(&island.officer, request(3), enrolment("generic-suite1", vec![new(1)])).await.unwrap()), (0, 0, 1));
        assert!(matches!(service.enrol(&island.officer, request(4), enrolment("unheard-of", vec![new(9)])).await, Err(ServiceError::InvalidArgument { .. })));
        assert!(matches!(service.enrol(&island.head_end, request(5), enrolment("generic-suite0", vec![new(400)])).await, Err(ServiceError::PermissionDenied { .. })));
        let gateway = service.enrol(&island.officer, request(6), enrolment("gateway-suite0", vec![NewMeter { groups: Vec::new(), ..new(500) }])).await.unwrap();
        assert_eq!(counts(&gateway), (1, 0, 0));
        // I1: a secret is not made here, so meters that need one are delivered.
        let needs_secret = service.enrol(&island.officer, request(10), enrolment("needs-secret", vec![NewMeter { groups: Vec::new(), ..new(501) }])).await;
        assert!(matches!(needs_secret, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("LLS-SECRET")));
        let stored = island.island.meter(meter(500)).await.unwrap().unwrap();
        assert!(stored.slots.iter().all(|slot| slot.key_type().is_aes() && slot.key_type() != KeyType::GBEK && slot.key_type() != KeyType::FIRMWARE));
        // A group's number is the same for whoever names it next, also on another server.
        let other = MeterService::new(island.another_server().await);
        other.enrol(&island.officer, request(7), enrolment("generic-suite0", vec![NewMeter { groups: vec!["yard".to_owned(), "depot".to_owned()], ..new(600) }])).await.unwrap();
        let groups = island.island.meter(meter(600)).await.unwrap().unwrap().class.groups.clone();
        assert_eq!(groups.iter().map(|group| group.0).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(service.show(&island.officer, meter(600)).await.unwrap().groups, ["depot", "yard"]);
        // I4: a client's title is no meter's; the code tells programs why.
        let client = NewMeter { title: client_title(), groups: Vec::new(), ..new(800) };
        let of_client = Enrolment { manufacturer: FlagId::parse("MMM").unwrap(), ..enrolment("generic-suite0", vec![client]) };
        let refused = service.enrol(&island.officer, request(9), of_client).await.unwrap();
        assert_eq!((counts(&refused), refused.problems[0].code()), ((0, 0, 1), v1::MeterProblemCode::Title));
        // Other suites have groups of their own.
        let mixed = service.enrol(&island.officer, request(8), enrolment("generic-suite2", vec![new(700)])).await.unwrap();
        assert_eq!((counts(&mixed), mixed.problems[0].code()), ((0, 0, 1), v1::MeterProblemCode::Group));
    }

    async fn a_retired_meter_is_the_end_of_an_identity(island) {
        let delivered = sample("generic-suite0", 4);
        let (file, signature) = island.sample(&delivered).await;
        let sha256 = island.upload(&file, &signature).await;
        island.import(sha256, Some(&island.head_end)).await;
        let service = island.service();
        assert_eq!(counts(&service.retire(&island.officer, request(1), vec![meter(1), meter(9)], "scrapped".to_owned()).await.unwrap()), (1, 0, 1));
        assert_eq!(counts(&service.retire(&island.officer, request(2), vec![meter(1)], String::new()).await.unwrap()), (0, 1, 0));
        let stored = island.island.meter(meter(1)).await.unwrap().unwrap();
        assert_eq!(stored.class.status, MeterStatus::Retired);
        // I3: nothing is destroyed, and nothing is active.
        assert!(stored.slots.iter().flat_map(|slot| slot.versions()).all(|version| version.state() == KeyState::Deactivated && version.candidate()));
        assert_eq!(counts(&service.assign(&island.officer, request(3), assignment(&[meter(1)], None)).await.unwrap()), (0, 0, 1));

        assert!(matches!(service.replace(&island.officer, request(4), meter(1), meter(2), String::new()).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(service.replace(&island.officer, request(5), meter(2), meter(99), String::new()).await, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(service.replace(&island.officer, request(6), meter(2), meter(2), String::new()).await, Err(ServiceError::InvalidArgument { .. })));
        let mut spare = sample("generic-suite0", 1);
        spare.first_number = 40;
        let (file, signature) = island.sample(&spare).await;
        let sha256 = island.upload(&file, &signature).await;
        island.import(sha256, None).await;
        let replaced = service.replace(&island.officer, request(7), meter(2), meter(40), "broken display".to_owned()).await.unwrap();
        assert_eq!(counts(&replaced), (2, 0, 0));
        assert_eq!(service.replace(&island.officer, request(7), meter(2), meter(40), "broken display".to_owned()).await.unwrap(), replaced);
        let successor = island.island.meter(meter(40)).await.unwrap().unwrap();
        assert_eq!((successor.class.status, successor.class.head_end.as_ref()), (MeterStatus::InService, Some(&island.head_end.principal)));
        assert_eq!(island.island.meter(meter(2)).await.unwrap().unwrap().class.status, MeterStatus::Retired);
        let change = island.changes().await.into_iter().find(|change| change.change == "replaced").unwrap();
        assert_eq!((change.meters.len(), change.reason.as_str()), (2, "broken display"));
    }
}
