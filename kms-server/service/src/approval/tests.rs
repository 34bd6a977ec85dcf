use kms_domain::{CounterKey, KeyType, KeyVersionNumber, Quorum, RequestId, SecuritySetupId, SystemTitle};
use kms_proto::v1::{AuditRecord, SecurityEvent};

use super::*;
use crate::meter::{CounterFloor, CounterRaise, MeterService, Request as MeterRequest};
use crate::testing::{TestIsland, client_title, island_tests, meter, sample};

fn request() -> Request {
    Request { id: RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap(), digest: [1; 32] }
}

fn raise(number: u64, to: u32) -> CounterRaise {
    CounterRaise {
        meter: meter(number),
        setup: None,
        key_type: KeyType::GUEK,
        version: None,
        client_title: client_title(),
        to,
        reason: "read at the meter".to_owned(),
        quorum: Quorum::ONE,
    }
}

async fn propose(island: &TestIsland, by: &Caller, raise: CounterRaise) -> Result<v1::Proposal, ServiceError> {
    let Request { id, digest } = request();
    MeterService::new(island.island.clone()).propose_raise(by, MeterRequest { id, digest }, raise).await
}

fn id(proposal: &v1::Proposal) -> ProposalId {
    ProposalId::from_octets(&proposal.proposal_id).unwrap()
}

fn approval(proposal: &v1::Proposal) -> ProposalChange {
    ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() }
}

async fn bound(island: &TestIsland, title: SystemTitle) -> u64 {
    let row = island.island.meter(title).await.unwrap().unwrap();
    let version = row
        .slots
        .get(SecuritySetupId::DEFAULT, KeyType::GUEK)
        .unwrap()
        .version(KeyVersionNumber::FIRST)
        .unwrap()
        .clone();
    let kms_domain::CounterPlace::Own(counters) = version.counters() else { panic!("in a domain") };
    counters.get(CounterKey::ClientTitle(client_title())).map_or(1, |state| state.bound())
}

async fn events(island: &TestIsland) -> Vec<Event> {
    let rows = island.island.store.audit_page(&kms_store::AuditFilter::default(), None, 500).await.unwrap();
    rows.iter()
        .filter_map(|row| <AuditRecord as prost::Message>::decode(row.record.record.as_slice()).unwrap().event)
        .collect()
}

fn code(outcome: Result<impl std::fmt::Debug, ServiceError>) -> i32 {
    outcome.map_or_else(|error| error.code(), |value| panic!("{value:?}"))
}

const FAILED_PRECONDITION: i32 = 9;
const PERMISSION_DENIED: i32 = 7;

island_tests! {
    async fn a_counter_is_raised_by_two_people_and_once(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let service = ProposalService::new(island.island.clone());
        let change = |by: &Caller, proposal: &v1::Proposal, change: ProposalChange| {
            let (service, by, id) = (service.clone(), by.clone(), id(proposal));
            async move { service.change(&by, request(), id, change).await }
        };
        let (colleague, alias) = (island.officer_of("bo", "Bo", 40).await, island.officer_of("ada-2", "ada", 41).await);
        let made = propose(&island, &island.officer, raise(1, 3_000_000_000)).await.unwrap();
        assert_eq!((made.state.as_str(), made.quorum), ("waiting", 1));
        assert!(made.description.contains("to 3000000000") && made.description.contains("GUEK version 1"), "{}", made.description);
        // Whoever may not, and meters that are not there: the same answer.
        assert_eq!(code(propose(&island, &island.auditor, raise(1, 3_000_000_000)).await), PERMISSION_DENIED);
        assert_eq!(code(propose(&island, &island.head_end, raise(1, 3_000_000_000)).await), PERMISSION_DENIED);
        assert_eq!(code(propose(&island, &island.officer, raise(999, 3_000_000_000)).await), PERMISSION_DENIED);
        // I6: not before another person has approved exactly this.
        assert_eq!(code(change(&island.officer, &made, ProposalChange::Execute).await), FAILED_PRECONDITION);
        assert_eq!(code(change(&island.officer, &made, approval(&made)).await), FAILED_PRECONDITION);
        assert_eq!(code(change(&alias, &made, approval(&made)).await), FAILED_PRECONDITION);
        assert_eq!(code(change(&island.auditor, &made, approval(&made)).await), PERMISSION_DENIED);
        assert_eq!(code(change(&colleague, &made, ProposalChange::Approve { content_sha256: [0; 32] }).await), FAILED_PRECONDITION);
        assert_eq!(change(&colleague, &made, approval(&made)).await.unwrap().state, "approved");
        assert_eq!(bound(&island, meter(1)).await, 1, "approved is not carried out");
        assert_eq!(code(change(&island.auditor, &made, ProposalChange::Execute).await), PERMISSION_DENIED);
        let carrying = request();
        let carried = service.change(&island.officer, carrying, id(&made), ProposalChange::Execute).await.unwrap();
        assert_eq!(carried.state, "carried-out");
        assert_eq!(bound(&island, meter(1)).await, 3_000_000_000);
        // The same request again is answered, another one is refused.
        assert_eq!(service.change(&island.officer, carrying, id(&made), ProposalChange::Execute).await.unwrap(), carried);
        assert_eq!(code(change(&colleague, &made, ProposalChange::Execute).await), FAILED_PRECONDITION);
        assert_eq!(service.list(&island.auditor, None, 9).await.unwrap(), [carried]);
        assert_eq!(code(service.list(&island.head_end, None, 9).await), PERMISSION_DENIED);
        let events = events(&island).await;
        assert!(events.iter().any(|event| matches!(event, Event::CounterRaised(raised) if raised.from == 1 && raised.to == 3_000_000_000)));
        assert!(events.iter().any(|event| matches!(event, Event::ProposalApproved(approved) if approved.person == "Bo" && approved.complete)));
        assert!(!events.iter().any(|event| matches!(event, Event::SecurityEvent(SecurityEvent { kind, .. }) if kind == "sealed-row-refused")));
    }

    // I4: what two people have decided holds for the server that allocates from the chunk, too.
    async fn a_counter_is_raised_inside_the_chunk_that_a_server_allocates_from(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let service = ProposalService::new(island.island.clone());
        let colleague = island.officer_of("bo", "Bo", 40).await;
        let next = || async {
            let of = kms_ledger::CounterOf {
                owner: kms_domain::Owner::Meter(meter(1)),
                setup: SecuritySetupId::DEFAULT,
                key_type: KeyType::GUEK,
                version: KeyVersionNumber::FIRST,
                counter: CounterKey::ClientTitle(client_title()),
                on_new_key: kms_domain::OnNewKey::Continue,
            };
            let act = island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), kms_store::Reads::default(), move |view| {
                view.append(Event::KeysGranted(v1::KeysGranted::default()));
                view.frame_counters(of, std::num::NonZeroU32::MIN)
            });
            act.await.unwrap().value.first
        };
        assert_eq!(next().await, 1);
        for (to, from) in [(50_000, 1), (60_000, 50_000), (65_537, 65_537), (80_000, 65_538)] {
            let made = propose(&island, &island.officer, raise(1, to)).await;
            if to == 65_537 {
                // The end of the chunk is where it would go on anyway, but not before the chunk is
                // used up.
                assert_eq!(made.as_ref().map(|made| made.state.clone()).unwrap(), "waiting");
            }
            let made = made.unwrap();
            service.change(&colleague, request(), id(&made), approval(&made)).await.unwrap();
            service.change(&colleague, request(), id(&made), ProposalChange::Execute).await.unwrap();
            let raised = events(&island).await.into_iter().filter_map(|event| match event {
                Event::CounterRaised(raised) => Some((raised.from, raised.to)),
                _ => None,
            });
            let from = if to == 80_000 { 1 } else { from.min(60_000) };
            assert!(raised.collect::<Vec<_>>().contains(&(from, u64::from(to))), "{to}");
            assert_eq!(next().await, to);
        }
        assert_eq!(code(propose(&island, &island.officer, raise(1, 70_000)).await), FAILED_PRECONDITION);
    }

    async fn what_no_longer_fits_is_not_carried_out(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let service = ProposalService::new(island.island.clone());
        let colleague = island.officer_of("bo", "Bo", 40).await;
        let made = propose(&island, &island.officer, raise(1, 50_000)).await.unwrap();
        service.change(&colleague, request(), id(&made), approval(&made)).await.unwrap();
        // Meanwhile the counter went past it by itself. // I4: it is not lowered.
        let floor = CounterFloor { meter: meter(1), setup: SecuritySetupId::DEFAULT, client_title: client_title(), floor: 60_000, owned_by: None };
        let Request { id: request_id, digest } = request();
        MeterService::new(island.island.clone()).adopt(&island.officer, MeterRequest { id: request_id, digest }, vec![floor]).await.unwrap();
        assert_eq!(code(service.change(&colleague, request(), id(&made), ProposalChange::Execute).await), FAILED_PRECONDITION);
        assert_eq!(bound(&island, meter(1)).await, 60_000);
        assert_eq!(service.show(&island.officer, id(&made)).await.unwrap().state, "approved", "nothing of the refused act was stored");
        assert_eq!(code(propose(&island, &island.officer, raise(1, 60_000)).await), FAILED_PRECONDITION);
        let withdrawn = service.change(&island.officer, request(), id(&made), ProposalChange::Withdraw { reason: "late".to_owned() }).await.unwrap();
        assert_eq!(withdrawn.state, "withdrawn");
        // A counter that a head-end counts is not this system's to raise.
        island.leave_counters(meter(2)).await;
        assert_eq!(code(propose(&island, &island.officer, raise(2, 50_000)).await), FAILED_PRECONDITION);
    }
}
