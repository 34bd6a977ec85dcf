//! What moves a transfer: the answer of its own meter to its present step, and nothing else (I3).

use kms_client::sample::SampleShipment;
use kms_domain::{Answer, KeyType, KeyVersion, Outcome, RequestId, SecuritySetupId, TransferForm, TransferId};
use meter_sim::{Connection, Meter, Obis, acse::AssociationResponse};

use super::super::{NextStep, Order, ReportedAnswer, SendingKind};
use super::{Field, order};
use crate::testing::{TestIsland, client_title, island_tests, meter, sample};
use kms_base::error::ServiceError;

impl Field {
    /// What a meter answers at each place of a transfer that goes well.
    async fn answers(&self, number: usize, key_type: KeyType) -> Vec<Vec<u8>> {
        let (mut answers, mut delivered) = (vec![Vec::new(); PLACES], false);
        let mut connection = Connection::new(self.meters[number].clone(), 1);
        let mut step = self.begin(order(self.title(number), Some(key_type))).await;
        for _ in 0..60 {
            match step.next.unwrap() {
                NextStep::End { outcome, .. } => {
                    assert!(outcome.is_success(), "{key_type} of meter {number}: {}", outcome.name());
                    return answers;
                }
                NextStep::Send(sending) => {
                    if sending.kind == SendingKind::Associate {
                        connection = Connection::new(self.meters[number].clone(), 1);
                    }
                    let (id, at) = step.transfer.unwrap();
                    let answer = connection.exchange(&sending.apdu).unwrap();
                    answers[place(sending.kind, delivered)].clone_from(&answer);
                    delivered |= sending.kind == SendingKind::Deliver;
                    step = self.report(&self.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
                }
            }
        }
        panic!("the transfer does not end");
    }

    /// Runs a transfer in which an answer of the next meter is reported at one place. It must
    /// change no state. Afterwards the meter itself answers. Returns the outcome.
    async fn deceived(&self, number: usize, key_type: KeyType, at: usize, foreign: Foreign) -> Outcome {
        let case = format!("{key_type}, place {at}, {foreign:?}");
        let own_exchange =
            if foreign == Foreign::OwnExchange { self.answers(number + 1, key_type).await } else { Vec::new() };
        // Requests are replayed to a double of the next meter: where both meters have the same
        // keys, it takes the key that was made for the first one.
        let mut config = self.configs[number + 1].clone();
        let alike = config.security_setups[0].guek == self.configs[number].security_setups[0].guek;
        // Its own counter is far ahead, so that none of its answers is refused only because it is
        // old.
        config.security_setups[0].server_counter = 1_000;
        config.challenges.seed = !config.challenges.seed;
        let double = Meter::new(config).unwrap();
        let doubles_keys = || double.keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let shipped = doubles_keys();
        let client = meter_sim::SystemTitle::new(client_title().octets());
        let (mut line, mut doubles_line) =
            (Connection::new(self.meters[number].clone(), 1), Connection::new(double.clone(), 1));
        let (mut delivered, mut told) = (false, false);
        let mut step = self.begin(order(self.title(number), Some(key_type))).await;
        for _ in 0..60 {
            let sending = match step.next.unwrap() {
                NextStep::End { outcome, .. } => {
                    assert!(told, "{case}: it was not come to");
                    return outcome;
                }
                NextStep::Send(sending) => sending,
            };
            match sending.kind {
                SendingKind::Associate => {
                    line = Connection::new(self.meters[number].clone(), 1);
                    doubles_line = Connection::new(double.clone(), 1);
                }
                // The double's own authentication has failed: what was answered is the first
                // meter's challenge.
                SendingKind::Deliver => doubles_line = Connection::pre_established(double.clone(), 1, client).unwrap(),
                SendingKind::Authenticate => {}
            }
            let (id, present) = step.transfer.unwrap();
            let place = place(sending.kind, delivered);
            delivered |= sending.kind == SendingKind::Deliver;
            let mut answer = line.exchange(&sending.apdu).unwrap();
            let doubles_answer = doubles_line.exchange(&sending.apdu).unwrap();
            if told || place != at {
                // Nothing protects the challenge in an AARE: the double's takes the place of the
                // meter's own, and the server answers it.
                if !told
                    && place + 1 == at
                    && (sending.kind, foreign) == (SendingKind::Associate, Foreign::Replayed)
                    && let Ok(theirs) = AssociationResponse::parse(&doubles_answer)
                {
                    let response = AssociationResponse::parse(&answer).unwrap();
                    answer =
                        AssociationResponse { authentication_value: theirs.authentication_value, ..response }.encode();
                }
                step = self.report(&self.island.head_end, step.meter, id, present, ReportedAnswer::Apdu(answer)).await;
                continue;
            }
            let reported = match foreign {
                Foreign::OwnExchange => own_exchange[at].clone(),
                Foreign::Replayed => doubles_answer,
                Foreign::Renamed => match AssociationResponse::parse(&doubles_answer) {
                    Ok(theirs) => {
                        AssociationResponse { server_title: Some(self.meters[number].system_title()), ..theirs }
                            .encode()
                    }
                    Err(_) => doubles_answer,
                },
            };
            if alike && foreign != Foreign::OwnExchange {
                // The double has understood and done what it was asked: only its title tells.
                assert_ne!(reported[0], EXCEPTION_RESPONSE, "{case}");
                assert!(sending.kind == SendingKind::Associate || doubles_line.is_associated(), "{case}");
                assert!(sending.kind != SendingKind::Deliver || doubles_keys() != shipped, "{case}");
            }
            let before = self.row(number).await;
            step = self.report(&self.island.head_end, step.meter, id, present, ReportedAnswer::Apdu(reported)).await;
            let after = self.row(number).await;
            assert_eq!(shown(&after), shown(&before), "{case}");
            told = true;
            let counted =
                after.transfer.is_some_and(|transfer| matches!(transfer.answer, Answer::Accepted | Answer::Refused(_)));
            assert!(at != DELIVER || !counted, "{case}");
            assert!(
                matches!(&step.next, Ok(NextStep::Send(_) | NextStep::End { outcome: Outcome::InDoubt, .. })),
                "{case}: {:?}",
                step.next
            );
        }
        panic!("the transfer does not end");
    }
}

/// Where an answer of another meter comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Foreign {
    /// The other meter gave it at the same place of a transfer of its own.
    OwnExchange,
    /// It was sent the very request that was made for the first one.
    Replayed,
    /// The same, and the title that stands in it in plaintext is replaced by that of the first one.
    Renamed,
}

/// Where a request stands in a transfer of one key: association and authentication, the delivery,
/// and the same two again for the proof.
const fn place(kind: SendingKind, delivered: bool) -> usize {
    match (kind, delivered) {
        (SendingKind::Associate, false) => 0,
        (SendingKind::Authenticate, false) => 1,
        (SendingKind::Deliver, _) => DELIVER,
        (SendingKind::Associate, true) => 3,
        (SendingKind::Authenticate, true) => 4,
    }
}

const DELIVER: usize = 2;
const PLACES: usize = 5;
const EXCEPTION_RESPONSE: u8 = 0xD8;

/// What the server knows of a meter's keys: the held, active and granted versions and the
/// candidates, with their evidence and the meter's own counter.
fn shown(row: &kms_domain::Meter) -> Vec<String> {
    let version = |version: &KeyVersion| (version.number(), version.state(), version.transport());
    let slots = row.slots.iter().map(|slot| {
        let granted: Vec<_> = slot.grantable().map(|grantable| grantable.version.number()).collect();
        let candidates: Vec<_> = slot.candidates().map(version).collect();
        let (held, active) = (slot.held().map(version), slot.active().map(version));
        format!(
            "{} {}: held {held:?}, active {active:?}, granted {granted:?}, candidates {candidates:?}",
            slot.setup(),
            slot.key_type()
        )
    });
    slots.collect()
}

/// Reports another meter's answer in each way and at each place of a transfer: it proves nothing,
/// and the meter's own answers prove the key in the end. Each case has a pair of meters.
async fn report_answers_of_another_meter(island: TestIsland, equal_keys: u64) {
    let mut cases = vec![(KeyType::GUEK, 0, Foreign::Renamed), (KeyType::GUEK, 3, Foreign::Renamed)];
    for foreign in [Foreign::OwnExchange, Foreign::Replayed] {
        cases.extend((0..PLACES).map(|at| (KeyType::GUEK, at, foreign)));
        // Here the answer alone decides.
        cases.push((KeyType::GBEK, DELIVER, foreign));
    }
    let meters = 2 * u64::try_from(cases.len()).unwrap();
    let field = Field::of(island, &SampleShipment { equal_keys, ..sample("generic-suite0", meters) }).await;
    for (pair, (key_type, at, foreign)) in cases.into_iter().enumerate() {
        let (number, case) = (2 * pair, format!("{key_type}, place {at}, {foreign:?}"));
        let (ended, next, last) = match (key_type, at) {
            // Nothing has left, and there is no other pair of keys to try: another transfer.
            (KeyType::GUEK, 0 | 1) => (Outcome::InDoubt, Some(KeyType::GUEK), Outcome::Proven),
            // The proof follows, and the answer is not needed.
            (KeyType::GUEK, DELIVER) => (Outcome::Proven, None, Outcome::Probed),
            // The meter does not answer under the earlier pair, which is tried next: a probe finds
            // what it holds.
            (KeyType::GUEK, _) => (Outcome::InDoubt, None, Outcome::Probed),
            _ => (Outcome::InDoubt, Some(key_type), Outcome::Acknowledged),
        };
        assert_eq!(field.deceived(number, key_type, at, foreign).await, ended, "{case}");
        field.assert_not_lost(number).await;
        assert_eq!(field.transfer(number, next).await, last, "{case}");
        assert!(field.held(number, key_type).await > 1, "{case}");
        for number in [number, number + 1] {
            field.compare(number).await;
            field.compare_broadcast_key(number).await;
        }
    }
    field.assert_no_nonce_twice();
}

island_tests! {
    /// A challenge that could be a request says nothing of the meter's keys: it costs another
    /// association, and nothing else.
    async fn a_challenge_that_could_be_a_request_is_asked_for_anew(island) {
        let field = Field::new(island, "generic-suite0", meter_sim::REQUESTS.len() as u64).await;
        for (number, first) in meter_sim::REQUESTS.into_iter().enumerate() {
            let meter = &field.meters[number];
            let (refused, answerable) = (|| vec![first, 1, 1], || vec![b'A']);
            // At the opening and at the proof.
            meter.choose_challenges([refused(), answerable(), refused(), refused(), answerable()]);
            assert_eq!(field.transfer(number, Some(KeyType::GUEK)).await, Outcome::Proven, "{first:02X}");
            assert_eq!((meter.association_requests(), field.held(number, KeyType::GUEK).await), (5, 2), "{first:02X}");
            // At every association that a transfer bears.
            let most = usize::try_from(kms_domain::MOST_UNFIT).unwrap();
            meter.choose_challenges(std::iter::repeat_with(refused).take(most).chain([answerable()]));
            meter.choose_challenges(std::iter::repeat_with(refused).take(most));
            assert_eq!(field.transfer(number, Some(KeyType::GAK)).await, Outcome::Proven, "{first:02X}");
            assert_eq!(meter.association_requests(), 5 + 2 * (u64::from(kms_domain::MOST_UNFIT) + 1), "{first:02X}");
            field.compare(number).await;
            // A meter that sends nothing else counts as silent in the end, and what is known of its
            // keys stays.
            let before = field.row(number).await;
            // Under its own keys only it sends any.
            meter.choose_challenges(std::iter::repeat_with(refused).take(most + 1));
            assert_eq!(field.transfer(number, None).await, Outcome::InDoubt, "{first:02X}");
            assert_eq!(shown(&field.row(number).await), shown(&before), "{first:02X}");
            assert_eq!(field.transfer(number, None).await, Outcome::Probed, "{first:02X}");
        }
        // I4: the counters of associations that led nowhere are spent.
        field.assert_no_nonce_twice();
        // The probe has tried the former keys, too, whose counters the meter has gone on with.
        assert!(field.security_events().await.iter().all(|event| event == "counter-followed"));
        let events = field.transfer_events().await;
        let again = events.iter().filter(|event| *event == "associate-again").count();
        assert_eq!(again, meter_sim::REQUESTS.len() * (3 + 3 * usize::try_from(kms_domain::MOST_UNFIT).unwrap()));
    }

    async fn only_the_present_step_of_ones_own_transfer_moves_anything(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let first_request = RequestId::from_octets(&[3; 16]).unwrap();
        let begin = |digest| {
            let orders = vec![order(title, Some(KeyType::GUEK))];
            field.service.begin(&field.island.head_end, first_request, digest, orders)
        };
        let step = begin([1; 32]).await.unwrap().0.remove(0);
        let (id, at) = step.transfer.unwrap();
        let NextStep::Send(sent) = step.next.unwrap() else { panic!("nothing to send") };
        // The same request: the same transfer, the same octets (I4).
        let again = begin([1; 32]).await.unwrap().0.remove(0);
        let NextStep::Send(sent_again) = again.next.unwrap() else { panic!("nothing to send") };
        assert_eq!((again.transfer, &sent_again.apdu), (step.transfer, &sent.apdu));
        assert!(matches!(begin([2; 32]).await, Err(ServiceError::InvalidArgument { .. })));
        // A second transfer, other head-ends, other steps, other ids.
        assert!(matches!(field.begin(order(title, Some(KeyType::GAK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        let before = field.row(0).await;
        let nothing = || ReportedAnswer::Nothing;
        assert!(matches!(field.report(&field.island.other_head_end, title, id, at, nothing()).await.next, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(field.report(&field.island.head_end, title, id, at + 1, nothing()).await.next, Err(ServiceError::FailedPrecondition { .. })));
        let other = TransferId::from_octets(&[9; 16]).unwrap();
        assert!(matches!(field.report(&field.island.head_end, title, other, at, nothing()).await.next, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(field.begin(order(meter(77), None)).await.next, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(field.row(0).await, before);

        // An answer that is cut proves nothing and associates with nobody.
        let mut connection = Connection::new(field.meters[0].clone(), 1);
        let genuine = connection.exchange(&sent.apdu).unwrap();
        let mut cut = genuine.clone();
        cut.truncate(genuine.len() - 1);
        let step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(genuine)).await;
        let (_, second) = step.transfer.unwrap();
        assert_eq!(second, at + 1);
        // Another report of the first step changes nothing.
        let before = field.row(0).await;
        let step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(cut.clone())).await;
        assert_eq!(step.transfer, Some((id, second)));
        assert_eq!(field.row(0).await, before);
        // What is cut proves nothing; the meter has only one pair of keys to try, so nothing was
        // shown, and nothing has left.
        let step = field.report(&field.island.head_end, title, id, second, ReportedAnswer::Apdu(cut)).await;
        assert!(matches!(step.next, Ok(NextStep::End { outcome: Outcome::InDoubt, .. })));
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert!(!slot.in_doubt() && slot.active().unwrap().number().number() == 1);
    }

    // I3: what is not the meter's own answer proves nothing.
    async fn a_foreign_meters_answer_never_moves_a_state(island) {
        report_answers_of_another_meter(island, 1).await;
    }

    // The system title in the nonce is all that tells the two meters apart.
    async fn a_foreign_meters_answer_never_moves_a_state_even_if_both_have_the_same_keys(island) {
        report_answers_of_another_meter(island, 2).await;
    }

    async fn nobody_s_word_makes_an_order_a_task_of_a_campaign(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let before = field.row(0).await;
        // The shipped policies permit a KEK to tasks of campaigns only.
        let refused = field.begin(order(title, Some(KeyType::KEK))).await.next;
        assert!(matches!(refused, Err(ServiceError::PermissionDenied { .. })));
        let task = Some(kms_domain::CampaignTask { campaign: kms_domain::CampaignId::from_octets(&[5; 16]).unwrap(), fence: 1 });
        let refused = field.begin(Order { task, ..order(title, Some(KeyType::KEK)) }).await.next;
        assert!(matches!(refused, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(field.row(0).await, before);
    }

    async fn an_attestation_is_refused_by_the_shipped_policies(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let step = field.begin(Order { form: TransferForm::WrappedKey, ..order(title, Some(KeyType::GUEK)) }).await;
        let (id, at) = step.transfer.unwrap();
        // The key never reaches the meter, but the head-end states that the meter uses it.
        let mut step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Nothing).await;
        let (id, at) = step.transfer.unwrap();
        let before = field.row(0).await;
        for holds in [true, false] {
            let refused = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Attested(holds)).await.next;
            assert!(matches!(refused, Err(ServiceError::PermissionDenied { .. })), "I8: {refused:?}");
            assert_eq!(field.row(0).await, before);
        }
        // The transfer goes on, and the meter itself shows what it holds.
        let mut connection = Connection::new(field.meters[0].clone(), 1);
        let outcome = loop {
            match step.next.unwrap() {
                NextStep::End { outcome, .. } => break outcome,
                NextStep::Send(sending) => {
                    let (id, at) = step.transfer.unwrap();
                    let answer = connection.exchange(&sending.apdu).unwrap();
                    step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(answer)).await;
                }
            }
        };
        assert_eq!(outcome, Outcome::NotApplied);
        assert_eq!(field.held(0, KeyType::GUEK).await, 1);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }
}
