//! Slots in doubt: urgent transfers, bounds on versions and candidates, withdrawn transfers.

use kms_domain::{KeyState, KeyType, KeyVersionNumber, Outcome, SecuritySetupId, TransferForm};
use meter_sim::{Connection, behaviour::Fault};

use super::super::{NextStep, Order, ReportedAnswer, SendingKind};
use super::{Field, at_association, at_key_transfer, order, permit_urgent};
use crate::testing::island_tests;
use kms_base::error::ServiceError;
use kms_proto::v1::audit_record::Event;

island_tests! {
    async fn urgent_transfers_are_for_policy_to_permit_and_bounded(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let candidates = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().candidates().count();
        let urgent = || Order { urgent: true, form: TransferForm::WrappedKey, lifetime_seconds: 1, ..order(field.title(0), Some(KeyType::GUEK)) };
        assert!(matches!(field.begin(urgent()).await.next, Err(ServiceError::PermissionDenied { .. })));
        permit_urgent(&field.island);
        // Each leaves at once, and nothing comes back.
        for made in 2..=kms_domain::MOST_CANDIDATES {
            let step = field.begin(urgent()).await;
            let (id, _) = step.transfer.unwrap();
            assert!(matches!(step.next, Ok(NextStep::Send(_))), "{:?}", step.next);
            field.service.withdraw(&field.island.head_end, field.request(), vec![(field.title(0), id)], String::new()).await.unwrap();
            assert_eq!(candidates(&field.row(0).await), made);
        }
        let before = field.row(0).await;
        match field.begin(urgent()).await.next {
            Err(ServiceError::FailedPrecondition { reason, next_step }) => assert!(reason.contains('8') && next_step.contains("probe"), "{reason}; {next_step}"),
            other => panic!("{other:?}"),
        }
        // I3: no candidate was dropped for it. A probe helps.
        assert_eq!(field.row(0).await, before);
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    // A head-end that simulates its own meter has nothing in doubt, and needs no permission for
    // urgent transfers.
    async fn versions_of_a_slot_are_bounded_in_doubt_or_not(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let guek = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().clone();
        // Begun and withdrawn: one version stays, whatever the number of calls.
        let mut kept = Vec::new();
        for _ in 0..4 {
            let (id, _) = field.begin(order(field.title(0), Some(KeyType::GUEK))).await.transfer.unwrap();
            field.service.withdraw(&field.island.head_end, field.request(), vec![(field.title(0), id)], String::new()).await.unwrap();
            kept.push(guek(&field.row(0).await).versions().len());
        }
        assert_eq!(kept, [2; 4]);
        // As it is after many transfers that the meter seems not to have applied.
        let (title, made) = (field.title(0), kms_domain::MOST_VERSIONS - 1);
        let reads = kms_store::Reads { meters: vec![title], ..kms_store::Reads::default() };
        let act = field.island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), reads, move |view| {
            let mut meter = (*view.meter(title)?.unwrap()).clone();
            let now = view.now();
            let slot = meter.slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
            for _ in 0..made {
                let origin = kms_domain::KeyOrigin::Diversified {
                    root_version: 1,
                    derivation: kms_domain::KeyDerivation::Sp800108Cmac,
                    length: kms_domain::KeyLength::Aes128,
                };
                let new = kms_domain::NewKeyVersion { state: KeyState::PreActive, origin, wrapped: None, fingerprint: None };
                let number = slot.add_version(new, now).unwrap();
                slot.mark_left(number, 1, KeyVersionNumber::FIRST).unwrap();
                slot.confirm(KeyVersionNumber::FIRST, 1, kms_domain::Evidence::Proven, now).unwrap();
            }
            view.put_meter(meter, false)?;
            view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
            Ok(())
        });
        act.await.unwrap();
        let before = field.row(0).await;
        assert!(!guek(&before).unresolved() && guek(&before).candidates().count() == kms_domain::MOST_VERSIONS);
        for form in [TransferForm::Frames, TransferForm::WrappedKey] {
            match field.begin(Order { form, ..order(title, Some(KeyType::GUEK)) }).await.next {
                Err(ServiceError::ResourceExhausted { reason, retry_after }) => {
                    assert!(reason.contains("128") && reason.contains("once a day"), "{reason}");
                    assert!(!retry_after.is_zero() && retry_after <= std::time::Duration::from_hours(24));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(field.row(0).await, before);
        // Other keys of the meter have room, and what it holds can be asked.
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.transfer(0, Some(KeyType::GAK)).await, Outcome::Proven);
        field.assert_no_nonce_twice();
    }

    async fn a_second_urgent_rotation_in_doubt_makes_three_candidates(island) {
        permit_urgent(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        let candidates = |row: &kms_domain::Meter| row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().candidates().count();
        // The first new key arrives and nothing comes back any more; then the second is lost on its
        // way.
        field.meters[0].add_fault(at_key_transfer(1, Fault::LoseAnswer));
        field.meters[0].add_fault(at_association(2, Fault::LoseRequest));
        field.meters[0].add_fault(at_association(3, Fault::LoseRequest));
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::InDoubt);
        assert_eq!(candidates(&field.row(0).await), 2);
        assert!(matches!(field.begin(order(field.title(0), Some(KeyType::GUEK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        field.assert_not_lost(0).await;
        // Only the opening of the second transfer gets through, and then nothing.
        field.meters[0].add_fault(at_key_transfer(2, Fault::LoseRequest));
        for number in 6..20 {
            field.meters[0].add_fault(at_association(number, Fault::LoseRequest));
        }
        let urgent = Order { urgent: true, ..order(field.title(0), Some(KeyType::GUEK)) };
        assert_eq!(field.run(0, urgent).await, Outcome::InDoubt);
        let row = field.row(0).await;
        assert_eq!(candidates(&row), 3);
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_withdrawn_transfer_leaves_its_version_in_doubt(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let mut connection = Connection::new(field.meters[0].clone(), 1);
        let mut step = field.begin(order(title, Some(KeyType::GUEK))).await;
        // Up to the delivery, whose answer never comes.
        let id = loop {
            let (id, at) = step.transfer.unwrap();
            let NextStep::Send(sending) = step.next.unwrap() else { panic!("over") };
            let answer = connection.exchange(&sending.apdu).unwrap();
            if sending.kind == SendingKind::Deliver {
                break id;
            }
            step = field.report(&field.island.head_end, title, id, at, ReportedAnswer::Apdu(answer)).await;
        };
        let ended = field.service.withdraw(&field.island.head_end, field.request(), vec![(title, id)], "test".to_owned()).await.unwrap().remove(0);
        assert!(matches!(ended.next, Ok(NextStep::End { outcome: Outcome::Withdrawn, .. })));
        assert!(field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().in_doubt());
        assert!(matches!(field.begin(order(title, Some(KeyType::GUEK))).await.next, Err(ServiceError::FailedPrecondition { .. })));
        field.assert_not_lost(0).await;
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.held(0, KeyType::GUEK).await, 2);
        field.compare(0).await;
    }
}
