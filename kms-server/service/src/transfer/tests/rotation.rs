//! Keys that are rotated over the air: each key type and suite, faults on the way, and head-ends
//! with keys of their own.

use kms_client::sample::SampleShipment;
use kms_domain::{
    DeviceProfile, KeyState, KeyType, KeyVersionNumber, Outcome, OwnerKind, SecuritySetupId, SecuritySuite,
    TransferForm,
};
use meter_sim::{
    Connection, KeyId, Obis,
    behaviour::{Behaviour, Fault, HexBytes, ScriptedFault},
};

use super::super::{NextStep, Order, ReportedAnswer};
use super::{Field, OPTICAL_PORT_ID, at_association, at_key_transfer, order, permit_master_keys};
use crate::testing::{client_title, island_tests, sample};
use kms_base::error::ServiceError;

island_tests! {
    async fn every_key_of_a_meter_is_rotated_and_proven(island) {
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        for (round, key_type) in [KeyType::GUEK, KeyType::GAK, KeyType::KEK, KeyType::GUEK].into_iter().enumerate() {
            assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven, "round {round}");
            field.compare(0).await;
        }
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        let row = field.row(0).await;
        let guek = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert_eq!(guek.active().unwrap().number().number(), 4);
        assert!(!guek.in_doubt() && row.transfer.is_none());
        // What left under a KEK that its vendor knows is exposed to the vendor, if it recorded the
        // traffic.
        assert!(
            guek.version(KeyVersionNumber::new(2).unwrap())
                .unwrap()
                .exposures()
                .iter()
                .any(|exposure| exposure.reason == kms_domain::ExposureReason::TransferUnderExposedKek)
        );
        field.assert_no_nonce_twice();
    }

    async fn every_key_of_a_meter_of_suite_1_or_2_is_rotated_and_proven(island) {
        permit_master_keys(&island);
        let (mut island, mut requests, mut suites) = (island, 0, Vec::new());
        for (first_number, (name, text)) in (1..).zip(DeviceProfile::SHIPPED) {
            let profile = DeviceProfile::parse(text).unwrap();
            if profile.suite == SecuritySuite::Suite0 {
                continue;
            }
            let field = Field::of(island, &SampleShipment { first_number, ..sample(name, 1) }).await;
            // No request id serves twice on one island.
            field.requests.set(requests);
            // The last GUEK leaves under a KEK that came over the air.
            for key_type in [KeyType::GUEK, KeyType::GAK, KeyType::KEK, KeyType::GUEK] {
                assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven, "{key_type} of {name}");
                field.compare(0).await;
            }
            // The GBEK of a group is delivered by the group's rotations.
            if profile.key(SecuritySetupId::DEFAULT, KeyType::GBEK).is_some_and(|key| key.owner == OwnerKind::Meter) {
                assert_eq!(field.transfer(0, Some(KeyType::GBEK)).await, Outcome::Acknowledged, "GBEK of {name}");
                assert_eq!(field.held(0, KeyType::GBEK).await, 2, "GBEK of {name}");
                field.compare_broadcast_key(0).await;
            }
            let memory = field.meters[0].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
            let octets = if profile.suite == SecuritySuite::Suite2 { 32 } else { 16 };
            assert!([&memory.guek, &memory.gak, &memory.kek].into_iter().chain(&memory.gbek).all(|key| key.expose().len() == octets), "{name}");
            field.assert_no_nonce_twice();
            suites.push(profile.suite);
            requests = field.requests.get();
            island = field.island;
        }
        assert!(suites.contains(&SecuritySuite::Suite1) && suites.contains(&SecuritySuite::Suite2), "{suites:?}");
    }

    async fn a_vendors_key_is_brought_by_the_id_of_its_profile_and_acknowledged(island) {
        let field = Field::new(island, "gateway-suite0", 1).await;
        let optical_port = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::OPTICAL_PORT).unwrap().clone();
        assert_eq!(field.transfer(0, Some(KeyType::OPTICAL_PORT)).await, Outcome::Acknowledged);
        let memory = || field.meters[0].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
        let holds = async |version| {
            let row = field.row(0).await;
            field.wrapped(&row, KeyVersionNumber::FIRST, KeyType::OPTICAL_PORT, KeyVersionNumber::new(version).unwrap(), &memory().kek).await
                == memory().vendor_keys[&OPTICAL_PORT_ID]
        };
        assert!(holds(2).await);
        let version = optical_port(&field.row(0).await).active().unwrap().clone();
        assert_eq!((version.number().number(), version.transport().evidence), (2, kms_domain::Evidence::Acknowledged));
        // An answer that is lost leaves it in doubt; no exchange could settle that, so the next
        // order is no urgent one.
        field.meters[0].add_fault(at_key_transfer(2, Fault::LoseAnswer));
        assert_eq!(field.transfer(0, Some(KeyType::OPTICAL_PORT)).await, Outcome::InDoubt);
        let slot = optical_port(&field.row(0).await);
        assert!(slot.in_doubt() && slot.candidates().count() == 3 && holds(3).await, "I3");
        assert_eq!(field.transfer(0, Some(KeyType::OPTICAL_PORT)).await, Outcome::Acknowledged);
        assert!(holds(4).await && !optical_port(&field.row(0).await).in_doubt());
        // What key_transfer does not bring, and what the meter does not own.
        for key_type in [KeyType::M_BUS_CHILD, KeyType::FIRMWARE, KeyType::LLS_SECRET, KeyType::HLS_SECRET] {
            let before = field.row(0).await;
            let refused = field.begin(order(field.title(0), Some(key_type))).await.next;
            assert!(matches!(&refused, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("key_transfer")), "{key_type}: {refused:?}");
            assert_eq!(field.row(0).await, before);
        }
        field.assert_no_nonce_twice();
    }

    async fn no_fault_loses_a_meter(island) {
        permit_master_keys(&island);
        let faults: Vec<(&str, Vec<ScriptedFault>)> = vec![
            ("lost request", vec![at_key_transfer(1, Fault::LoseRequest)]),
            ("lost answer", vec![at_key_transfer(1, Fault::LoseAnswer)]),
            ("held request", vec![at_key_transfer(1, Fault::HoldRequest(2))]),
            ("held request and answer", vec![at_key_transfer(1, Fault::HoldRequestAndAnswer(1))]),
            ("duplicated request", vec![at_key_transfer(1, Fault::DuplicateRequest)]),
            ("duplicated answer", vec![at_key_transfer(1, Fault::DuplicateAnswer)]),
            ("applied but error", vec![at_key_transfer(1, Fault::AppliedButError(9))]),
            ("refused", vec![at_key_transfer(1, Fault::RefusedWithoutApplying(250))]),
            ("success without applying", vec![at_key_transfer(1, Fault::SuccessWithoutApplying)]),
            ("forged answer", vec![at_key_transfer(1, Fault::WrongAnswer(HexBytes(vec![0xD8, 1, 5])))]),
            ("forged counter", vec![at_key_transfer(1, Fault::WrongAnswer(HexBytes(vec![0xD8, 1, 6, 0xFF, 0xFF, 0xFF, 0xFF])))]),
            ("corrupt answer", vec![at_key_transfer(1, Fault::CorruptAnswer(3))]),
            ("connection cut", vec![at_key_transfer(1, Fault::CloseConnection)]),
            ("power fails before the answer", vec![at_key_transfer(1, Fault::PowerCycleBeforeAnswer)]),
            ("the proof's association is lost", vec![at_association(2, Fault::LoseRequest)]),
            ("both associations are lost", vec![at_association(2, Fault::LoseAnswer), at_association(3, Fault::LoseAnswer)]),
            ("lost answer twice", vec![at_key_transfer(1, Fault::LoseAnswer), at_key_transfer(2, Fault::LoseAnswer)]),
        ];
        let field = Field::new(island, "generic-suite0", faults.len() as u64).await;
        for (number, (name, script)) in faults.into_iter().enumerate() {
            for fault in script {
                field.meters[number].add_fault(fault);
            }
            for key_type in [KeyType::GUEK, KeyType::GAK, KeyType::KEK] {
                for attempt in 0.. {
                    let outcome = field.transfer(number, Some(key_type)).await;
                    field.assert_not_lost(number).await;
                    if outcome == Outcome::Proven {
                        break;
                    }
                    assert!(attempt < 6, "{name}: {key_type} is {}", outcome.name());
                    // What is in doubt is probed before it is tried again.
                    field.transfer(number, None).await;
                    field.assert_not_lost(number).await;
                }
            }
            field.compare(number).await;
        }
        field.assert_no_nonce_twice();
    }

    async fn a_meter_that_goes_back_to_its_former_key_is_found_and_healed(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        field.meters[0].set_behaviour(Behaviour { reverts_on_power_cycle: [KeyId::GlobalUnicastEncryption].into(), ..Behaviour::default() });
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.meters[0].power_cycle();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        // The meter holds version 1, which does not become active again.
        assert_eq!(field.held(0, KeyType::GUEK).await, 1);
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert_eq!(slot.active().unwrap().number().number(), 2);
        assert!(slot.in_doubt());
        assert_eq!(slot.version(KeyVersionNumber::FIRST).unwrap().state(), KeyState::Deactivated);
        assert!(field.security_events().await.contains(&"earlier-key-held".to_owned()));
        field.assert_not_lost(0).await;
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven, "it is known what it holds: nothing urgent");
        assert_eq!(field.held(0, KeyType::GUEK).await, 3);
        field.compare(0).await;
        field.assert_no_nonce_twice();
    }

    async fn without_counters_nothing_of_a_transfer_is_stored(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        field.island.leave_counters(title).await;
        let before = field.row(0).await;
        let refused = field.begin(order(title, Some(KeyType::GUEK))).await.next;
        assert!(matches!(refused, Err(ServiceError::FailedPrecondition { .. })));
        assert_eq!(field.row(0).await, before);
    }

    async fn a_head_end_with_keys_of_its_own_delivers_and_the_hsm_proves(island) {
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 2).await;
        for (number, attests) in [(0, false), (1, true)] {
            let memory = field.meters[number].keys_for_inspection(Obis::SECURITY_SETUP).unwrap();
            let mut session = meter_sim::client::ClientSession::new(meter_sim::client::ClientConfig {
                client_title: meter_sim::SystemTitle::new(client_title().octets()),
                suite: meter_sim::SecuritySuite::default(),
                keys: meter_sim::security::Ciphering { encryption: memory.guek.clone(), authentication: memory.gak.clone() },
                dedicated_key: None,
                counters: 1..=100,
                general_ciphering: true,
            })
            .unwrap();
            let mut connection = Connection::new(field.meters[number].clone(), 1);
            let request = session.association_request().unwrap();
            session.process_association_response(&connection.exchange(&request).unwrap()).unwrap();
            let request = session.hls_request().unwrap();
            session.process_hls_response(&connection.exchange(&request).unwrap()).unwrap();
            // Counters that the head-end has used by itself are taken over before the server makes
            // frames.
            field.island.take_counters_over(field.title(number), 200).await;

            let order = Order { form: TransferForm::WrappedKey, ..order(field.title(number), Some(KeyType::GUEK)) };
            let step = field.begin(order).await;
            let (id, at) = step.transfer.unwrap();
            let NextStep::Send(sending) = step.next.unwrap() else { panic!("nothing to send") };
            assert!(sending.apdu.is_empty());
            let delivery = sending.delivery.unwrap();
            let request = session.key_transfer_request(Obis::SECURITY_SETUP, &[(KeyId::GlobalUnicastEncryption, &delivery.wrapped)]).unwrap();
            let answer = connection.exchange(&request).unwrap();
            let mut step = field.report(&field.island.head_end, step.meter, id, at, ReportedAnswer::Apdu(answer)).await;
            let mut connection = Connection::new(field.meters[number].clone(), 1);
            let outcome = loop {
                match step.next.unwrap() {
                    NextStep::End { outcome, .. } => break outcome,
                    NextStep::Send(sending) => {
                        let (id, at) = step.transfer.unwrap();
                        let answer = match attests {
                            true => ReportedAnswer::Attested(true),
                            false => ReportedAnswer::Apdu(connection.exchange(&sending.apdu).unwrap()),
                        };
                        step = field.report(&field.island.head_end, step.meter, id, at, answer).await;
                    }
                }
            };
            assert_eq!(outcome, if attests { Outcome::Attested } else { Outcome::Proven });
            field.compare(number).await;
        }
        field.assert_no_nonce_twice();
    }
}
