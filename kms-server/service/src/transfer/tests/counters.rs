//! The counters of transfers: meters that are ahead, forged counters, hours and reserves (I4).

use kms_client::sample::SampleShipment;
use kms_domain::{KeyType, KeyVersionNumber, Outcome, SecuritySetupId, SystemTitle};
use meter_sim::{
    Connection, Meter,
    behaviour::{Behaviour, CounterOnNewKey},
    config::SecuritySetupConfig,
};

use super::super::{NextStep, ReportedAnswer, TransferService, emit};
use super::{Field, order};
use crate::testing::{TestIsland, client_title, island_tests, sample};
use crate::{
    approval::{ProposalChange, ProposalService},
    frame::{
        FrameService,
        unprotect::{ReceivedContent, ReceivedFrame},
    },
    meter::{CounterRaise, MeterService},
};
use kms_authz::{Caller, Purpose};
use kms_base::error::ServiceError;
use kms_proto::v1::audit_record::Event;

/// Repeats a nonce, to show that the check after every test finds it.
#[test]
#[ignore = "breaks I4 on purpose, for the test below"]
fn repeats_a_nonce() {
    crate::testing::run(concat!(module_path!(), "::repeats_a_nonce"), |island| async move {
        let field = Field::new(island, "generic-suite0", 1).await;
        let row = field.row(0).await;
        let keys =
            emit::pair_keys(&row, SecuritySetupId::DEFAULT, row.pairs(SecuritySetupId::DEFAULT, None)[0]).unwrap();
        let nonce = kms_dlms::Nonce::new(client_title(), 9);
        for content in [1, 2] {
            let parameters =
                kms_hsm::FrameParameters::new(kms_dlms::HlsGmac::control(row.suite).octet(), *nonce.octets()).unwrap();
            let input = kms_hsm::FrameInput { parameters, plaintext: vec![content; 16] };
            field.island.island.hsm.protect_batch(vec![(keys.clone(), input)]).await.unwrap().remove(0).unwrap();
        }
    });
}

/// SoftHSM2 does not note nonces. The counters in the audit log are checked on both modules.
#[test]
fn a_test_that_repeats_a_nonce_fails() {
    let failed = std::panic::catch_unwind(repeats_a_nonce)
        .err()
        .map(|panic| panic.downcast_ref::<String>().cloned().unwrap_or_default());
    let seen = failed.as_ref().is_some_and(|failed| failed.contains("a nonce was repeated (I4)"));
    assert_eq!((failed.is_some(), seen), (seen, crate::testing::notes_nonces()), "{failed:?}");
}

/// The counter of the head-end's title under the key that the vendor shipped.
fn first_guek(meter: SystemTitle) -> kms_ledger::CounterOf {
    kms_ledger::CounterOf {
        owner: kms_domain::Owner::Meter(meter),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
        counter: kms_domain::CounterKey::ClientTitle(client_title()),
        on_new_key: kms_domain::OnNewKey::Continue,
    }
}

/// The bound of the counter under the first GUEK.
async fn own_bound(field: &Field, number: usize) -> u64 {
    let row = field.row(number).await;
    let version =
        row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().version(KeyVersionNumber::FIRST).unwrap();
    let kms_domain::CounterPlace::Own(counters) = version.counters() else { panic!("in a domain") };
    counters.highest_bound()
}

/// A probe whose requests reach no meter: each is answered by a counter that is as far ahead as the
/// profile lets a meter be. The bound after the order and after each answer.
async fn forge_answers(field: &Field, number: usize) -> Vec<u64> {
    let mut step = field.begin(order(field.title(number), None)).await;
    let mut bounds = Vec::new();
    loop {
        let bound = own_bound(field, number).await;
        bounds.push(bound);
        let (Some((id, at)), NextStep::Send(_)) = (step.transfer, step.next.unwrap()) else { return bounds };
        let said = u32::try_from(bound - 1 + 100_000).unwrap();
        let answer = [&[0xD8, 1, 6][..], &said.to_be_bytes()].concat();
        step = field.report(&field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
    }
}

/// Meters that are ahead of the server's counter, inside its chunk, at its edge and above it, are
/// reached by the request after their answer: on the server that holds the chunk, on another one,
/// and after a restart. Of `equal_keys` meters at a time the keys are equal.
async fn reach_meters_ahead(island: TestIsland, equal_keys: u64) {
    const AHEAD: [u32; 4] = [1, 5_000, 65_536, 70_000];
    let number = std::cell::Cell::new(0);
    let ahead = |setup: &mut SecuritySetupConfig| {
        let at = number.replace(number.get() + 1);
        setup
            .counter_floors
            .insert(meter_sim::SystemTitle::new(client_title().octets()), AHEAD[at / 3 % AHEAD.len()] + 1);
    };
    let shipment = SampleShipment { equal_keys, ..sample("generic-suite0", 3 * AHEAD.len() as u64) };
    let mut field = Field::edited(island, &shipment, ahead).await;
    let services = [
        field.service.clone(),
        TransferService::new(field.island.another_server().await),
        TransferService::new(std::sync::Arc::new(field.island.restarted().await)),
    ];
    for number in 0..field.meters.len() {
        let step = field.begin(order(field.title(number), None)).await;
        let (id, at) = step.transfer.unwrap();
        let NextStep::Send(sending) = step.next.unwrap() else { panic!("nothing to send") };
        let [sent] = field.row(number).await.transfer.unwrap().counters[..] else { panic!("one counter") };
        let mut connection = Connection::new(field.meters[number].clone(), 1);
        let answer = connection.exchange(&sending.apdu).unwrap();
        let said = u32::from_be_bytes(answer[answer.len() - 4..].try_into().unwrap());
        field.service = services[number % services.len()].clone();
        let step = field.report(&field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
        if sent > AHEAD[number / 3] + 1 {
            continue;
        }
        let followed = field.row(number).await.transfer.unwrap().counters;
        assert!(followed[0] > said, "counter {sent}, then {followed:?}, and the meter has accepted {said}");
        let NextStep::Send(sending) = step.next.unwrap() else { panic!("nothing to send") };
        let answer = Connection::new(field.meters[number].clone(), 1).exchange(&sending.apdu).unwrap();
        assert_eq!(answer[0], 0x61, "the meter takes the next request: {}", hex::encode(&answer));
        field.service = services[0].clone();
    }
    let events = field.security_events().await;
    assert!(events.iter().all(|event| event == "counter-followed"), "{events:?}");
    field.assert_no_nonce_twice();
}

island_tests! {
    // I4: a head-end that uses up the counters of an hour does not stop transfers.
    async fn an_hour_s_counters_that_are_used_up_stop_no_transfer(island) {
        let field = Field::new(island, "generic-suite0", 2).await;
        let million = std::num::NonZeroU32::new(1_000_000).unwrap();
        let lease = |number: usize, count| {
            let of = first_guek(field.title(number));
            let act = field.island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), kms_store::Reads::default(), move |view| {
                view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                view.lease(of, count, kms_domain::UnixMillis(0))
            });
            async move { act.await.map(|committed| committed.value) }
        };
        // An hour may end meanwhile.
        let mut refused = None;
        for _ in 0..9 {
            if let Err(error) = lease(0, million).await {
                refused = Some(error);
                break;
            }
        }
        let Some(ServiceError::ResourceExhausted { reason, retry_after }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("counters_per_hour") && reason.contains("4000000"), "{reason}");
        assert!(retry_after <= std::time::Duration::from_hours(1));
        assert!(field.security_events().await.contains(&"counter-use-high".to_owned()), "long before");
        // What is reserved already is used; another meter's counters are its own.
        assert!(lease(1, million).await.is_ok());
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    // A12: an unauthenticated exception that names a counter can be forged as often as a head-end
    // may probe.
    async fn a_forged_counter_uses_up_neither_the_key_nor_more_than_an_hour_has(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let mut refused = false;
        // An hour may end meanwhile: 4,000,000 counters are three jumps of 100,000 in each of 14
        // probes.
        for _ in 0..30 {
            let bounds = forge_answers(&field, 0).await;
            assert!(bounds.len() <= 5, "{bounds:?}");
            if let [.., last_followed, in_vain] = bounds[..] {
                assert_eq!(last_followed, in_vain, "the answer after the last retry raises nothing");
            }
            refused = field.security_events().await.contains(&"counter-jump-refused".to_owned());
            if refused {
                break;
            }
        }
        assert!(refused, "never, up to {}", own_bound(&field, 0).await);
        assert!(own_bound(&field, 0).await < 8_100_000);
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn neither_forged_counters_nor_two_servers_use_up_what_transfers_have(island) {
        let end = kms_domain::CounterState::SESSIONS_END;
        let mut field = Field::new(island, "generic-suite0", 1).await;
        field.island.take_counters_over(field.title(0), end).await;
        for _ in 0..5 {
            assert_eq!(forge_answers(&field, 0).await.len(), 2, "not followed at all");
        }
        assert!(own_bound(&field, 0).await <= end + 5, "one association each");
        let services = [field.service.clone(), TransferService::new(field.island.another_server().await)];
        for turn in 0..10 {
            field.service = services[turn % 2].clone();
            let step = field.begin(order(field.title(0), None)).await;
            let (id, _) = step.transfer.unwrap();
            field.service.withdraw(&field.island.head_end, field.request(), vec![(step.meter, id)], "again".to_owned()).await.unwrap();
        }
        field.service = services[0].clone();
        assert!(own_bound(&field, 0).await <= end + 15, "a change of the server throws nothing away");
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        // The meter goes on counting, so the new key gives sessions nothing back, and the refusal
        // says what does.
        let Err(ServiceError::FailedPrecondition { reason, next_step }) = field.frame(0).await else { panic!("a frame in the reserve") };
        assert!(reason.contains("none left for sessions and frames") && next_step.contains("another client title"), "{reason}; {next_step}");
        field.assert_no_nonce_twice();
    }

    async fn transfers_between_sessions_open_no_way_past_the_hour(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let most = std::num::NonZeroU32::new(65_535).unwrap();
        let mut refused = None;
        // What a chunk has beside one counter of a transfer: 61 of them are an hour's, and an hour
        // may end meanwhile.
        for _ in 0..125 {
            let step = field.begin(order(field.title(0), None)).await;
            let (id, _) = step.transfer.unwrap();
            field.service.withdraw(&field.island.head_end, field.request(), vec![(step.meter, id)], "again".to_owned()).await.unwrap();
            let of = first_guek(field.title(0));
            let act = field.island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), kms_store::Reads::default(), move |view| {
                view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                view.lease(of, most, kms_domain::UnixMillis(0))
            });
            if let Err(error) = act.await {
                refused = Some(error);
                break;
            }
        }
        assert!(matches!(refused, Some(ServiceError::ResourceExhausted { .. })), "{refused:?}, up to {}", own_bound(&field, 0).await);
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        field.assert_no_nonce_twice();
    }

    async fn the_last_counters_of_a_key_bring_the_next_one(island) {
        let field = Field::new(island, "counter-resets", 1).await;
        field.meters[0].set_behaviour(Behaviour { counter_on_new_key: CounterOnNewKey::RestartAt(250), ..Behaviour::default() });
        field.island.take_counters_over(field.title(0), kms_domain::CounterState::SESSIONS_END).await;
        let refused = field.frame(0).await;
        assert!(matches!(refused, Err(ServiceError::FailedPrecondition { .. })), "{refused:?}");
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        assert!(field.frame(0).await.is_ok(), "under the new key");
        field.assert_no_nonce_twice();
    }

    async fn a_meter_that_is_ahead_is_reached_in_the_next_step(island) {
        reach_meters_ahead(island, 1).await;
    }

    async fn meters_of_a_counter_domain_that_are_ahead_are_reached_in_the_next_step(island) {
        reach_meters_ahead(island, 2).await;
    }

    async fn a_meter_that_is_truly_ahead_is_followed_when_two_people_say_so(island) {
        let ahead = |setup: &mut SecuritySetupConfig| {
            setup.counter_floors.insert(meter_sim::SystemTitle::new(client_title().octets()), 3_000_000_000);
        };
        let field = Field::with(island, "generic-suite0", 1, ahead).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::InDoubt);
        assert!(field.security_events().await.contains(&"counter-jump-refused".to_owned()));
        assert!(!field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().in_doubt(), "nothing has left");
        // What the officers have read at the meter.
        let meters = MeterService::new(field.island.island.clone());
        let raise = CounterRaise {
            meter: field.title(0),
            setup: None,
            key_type: KeyType::GUEK,
            version: None,
            client_title: client_title(),
            to: 3_000_000_001,
            reason: "read at the meter".to_owned(),
            quorum: kms_domain::Quorum::ONE,
        };
        let request = || (field.request(), [3; 32]);
        let (id, digest) = request();
        let proposal = meters.propose_raise(&field.island.officer, crate::meter::Request { id, digest }, raise).await.unwrap();
        let proposals = ProposalService::new(field.island.island.clone());
        let proposed = kms_domain::ProposalId::from_octets(&proposal.proposal_id).unwrap();
        let colleague = field.island.colleague().await;
        let change = |by: &Caller, change: ProposalChange| {
            let ((id, digest), by, proposals) = (request(), by.clone(), proposals.clone());
            async move { proposals.change(&by, crate::Request { id, digest }, proposed, change).await }
        };
        assert!(change(&field.island.officer, ProposalChange::Execute).await.is_err());
        change(&colleague, ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() }).await.unwrap();
        change(&colleague, ProposalChange::Execute).await.unwrap();
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_meter_whose_counter_starts_again_under_the_same_key_is_a_security_event(island) {
        let mut field = Field::new(island, "generic-suite0", 1).await;
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert!(field.security_events().await.is_empty());
        // Its memory of counters is lost, its keys are not.
        field.meters[0] = Meter::new(field.configs[0].clone()).unwrap();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.security_events().await, ["meter-counter-backwards"]);
        // The same in a frame that answers a challenge: recorded once, and opened nevertheless.
        let row = field.row(0).await;
        let known = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().active().unwrap().transport().meter_counter;
        assert!(known > 0);
        let pair = row.pairs(SecuritySetupId::DEFAULT, None)[0];
        let keys = emit::pair_keys(&row, SecuritySetupId::DEFAULT, pair).unwrap();
        let nonce = kms_dlms::Nonce::new(row.title, known - 1);
        let parameters = kms_hsm::FrameParameters::new(kms_dlms::HlsGmac::control(row.suite).octet(), *nonce.octets()).unwrap();
        let input = kms_hsm::FrameInput { parameters, plaintext: vec![7; 16] };
        let made = field.island.island.hsm.protect_batch(vec![(keys, input)]).await.unwrap().remove(0).unwrap();
        let response = kms_dlms::HlsGmac { suite: row.suite, counter: known - 1, tag: kms_dlms::AuthenticationTag(made.tag) }.octets().to_vec();
        let service = FrameService::new(field.island.island.clone());
        for _ in 0..2 {
            let frame =
                ReceivedFrame { meter: row.title, setup: None, content: ReceivedContent::HlsResponse { response: response.clone(), challenge: vec![7; 16] } };
            let outcomes = service.unprotect(&field.island.head_end, Purpose::Read, vec![frame]).await.unwrap();
            assert!(outcomes[0].octets.is_ok(), "{:?}", outcomes[0].octets);
        }
        assert_eq!(field.security_events().await.len(), 2);
    }

    async fn a_profile_that_resets_counters_starts_new_keys_low(island) {
        let field = Field::new(island, "counter-resets", 1).await;
        field.meters[0].set_behaviour(Behaviour { counter_on_new_key: CounterOnNewKey::RestartAt(250), ..Behaviour::default() });
        field.island.take_counters_over(field.title(0), 3_500_000_000).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        let row = field.row(0).await;
        let bound = |number| {
            let version = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().version(KeyVersionNumber::new(number).unwrap()).unwrap();
            let kms_domain::CounterPlace::Own(counters) = version.counters() else { panic!("in a domain") };
            (counters.highest_bound(), version.rotation_due())
        };
        assert!(bound(1).0 > 3_500_000_000 && bound(1).1);
        assert!(bound(2).0 < 1_000_000 && !bound(2).1, "{:?}", bound(2));
        // The old key asked for its rotation, once.
        assert_eq!(field.security_events().await, ["counter-rotation-due"]);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn the_counters_of_a_former_key_are_no_reason_to_jump_where_a_profile_resets_them(island) {
        let field = Field::new(island, "counter-resets", 1).await;
        field.island.take_counters_over(field.title(0), 3_000_000_000).await;
        // The meter goes on counting against its profile. Its answer could be forged, and would use
        // up most of the new key.
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::InDoubt);
        assert!(field.security_events().await.contains(&"counter-jump-refused".to_owned()));
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        let kms_domain::CounterPlace::Own(counters) = slot.version(KeyVersionNumber::new(2).unwrap()).unwrap().counters() else { panic!("in a domain") };
        assert!(counters.highest_bound() < 1_000_000, "{}", counters.highest_bound());
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_new_key_counts_above_those_of_a_domain(island) {
        let field = Field::of(island, &SampleShipment { equal_keys: 2, ..sample("generic-suite0", 2) }).await;
        field.island.take_counters_over(field.title(0), 3_000_000_000).await;
        for number in [0, 1] {
            assert_eq!(field.transfer(number, Some(KeyType::GUEK)).await, Outcome::Proven);
            field.compare(number).await;
        }
        assert!(!field.security_events().await.contains(&"counter-followed".to_owned()), "no meter refused a counter");
        field.assert_no_nonce_twice();
    }

    async fn a_counter_that_starts_again_with_a_new_key_does_no_harm(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        field.meters[0].set_behaviour(Behaviour { counter_on_new_key: CounterOnNewKey::RestartAt(250), ..Behaviour::default() });
        for _ in 0..3 {
            assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
            field.compare(0).await;
        }
        field.assert_no_nonce_twice();
    }
}
