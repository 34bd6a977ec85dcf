//! Compromised key versions, and what a take-over leaves unhealed.

use kms_domain::{KeyState, KeyType, KeyVersionNumber, Outcome, SecuritySetupId};
use meter_sim::{KeyId, behaviour::Behaviour};

use super::{Field, permit_master_keys};
use crate::testing::island_tests;
use crate::{
    campaign::{CampaignService, NewCampaign},
    meter::{Compromise, MeterService},
};
use kms_authz::Caller;
use kms_base::error::ServiceError;

island_tests! {
    async fn a_compromised_version_is_granted_to_nobody_and_the_meter_is_not_lost(island) {
        let field = Field::new(island, "generic-suite0", 1).await;
        let title = field.title(0);
        let meters = MeterService::new(field.island.island.clone());
        let compromise = |version: u32| Compromise {
            meter: title,
            setup: None,
            key_type: KeyType::GUEK,
            version: KeyVersionNumber::new(version).unwrap(),
            known_to: kms_domain::Party::Anyone,
            reason: "found in a log".to_owned(),
        };
        let report = |by: &Caller, version: u32| {
            let (meters, by, found) = (meters.clone(), by.clone(), compromise(version));
            let request = crate::meter::Request { id: field.request(), digest: [4; 32] };
            async move { meters.report_compromise(&by, request, found).await }
        };
        assert!(matches!(report(&field.island.head_end, 1).await, Err(ServiceError::PermissionDenied { .. })));
        let shown = report(&field.island.officer, 1).await.unwrap();
        assert!(shown.security_setups[0].slots.iter().any(|slot| slot.key_type == "GUEK" && slot.versions[0].state == "compromised"));
        assert!(matches!(report(&field.island.officer, 1).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(report(&field.island.officer, 9).await, Err(ServiceError::FailedPrecondition { .. })));
        // No frame under it, and nothing to grant, while a transfer still opens with it.
        assert!(field.frame(0).await.is_err());
        assert_eq!(field.row(0).await.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().grantable().count(), 0);
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        let granted: Vec<u32> = slot.grantable().map(|grantable| grantable.version.number().number()).collect();
        assert_eq!(granted, [2], "the compromised candidate is not offered beside the new one");
        assert_eq!(slot.candidates().count(), 2);
        assert!(field.frame(0).await.is_ok());
        // In doubt between a new version and the compromised one.
        field.meters[0].set_behaviour(Behaviour { reverts_on_power_cycle: [KeyId::GlobalUnicastEncryption].into(), ..Behaviour::default() });
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        report(&field.island.officer, 2).await.unwrap();
        field.meters[0].power_cycle();
        assert_eq!(field.transfer(0, None).await, Outcome::Probed);
        assert_eq!(field.held(0, KeyType::GUEK).await, 2);
        let row = field.row(0).await;
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        assert!(slot.grantable().all(|grantable| grantable.version.number().number() == 3), "never granted again, even in doubt");
        field.assert_not_lost(0).await;
        field.assert_no_nonce_twice();
    }

    async fn a_compromised_version_is_what_a_campaign_is_for_and_to_replace_it_is_no_news(island) {
        let field = Field::new(island, "generic-suite0", 3).await;
        let meters = MeterService::new(field.island.island.clone());
        let campaigns = CampaignService::new(field.island.island.clone());
        let report = async |number: usize, version: u32| {
            let found = Compromise {
                meter: field.title(number),
                setup: None,
                key_type: KeyType::GUEK,
                version: KeyVersionNumber::new(version).unwrap(),
                known_to: kms_domain::Party::Anyone,
                reason: "found in a log".to_owned(),
            };
            let request = crate::meter::Request { id: field.request(), digest: [4; 32] };
            meters.report_compromise(&field.island.officer, request, found).await.unwrap()
        };
        let selected = async || {
            let new = NewCampaign {
                name: kms_domain::CampaignName::parse("reported").unwrap(),
                action: kms_domain::CampaignAction::rotate(KeyType::GUEK).unwrap(),
                setup: None,
                selection: kms_domain::CampaignSelection { exposed_by: Some(kms_domain::ExposureReason::Reported), ..Default::default() },
                named: Vec::new(),
                terms: kms_domain::CampaignTerms {
                    quorum: kms_domain::Quorum::ONE,
                    canary: 0,
                    waves: vec![kms_domain::WaveSize::Percent(100)],
                    success_threshold: 50,
                    failure_limit: 3,
                    windows: kms_domain::MaintenanceWindows::always(),
                    starts_per_minute: None,
                    in_flight: 100.try_into().unwrap(),
                    attempts: 2.try_into().unwrap(),
                    back_off_seconds: 1,
                },
            };
            let request = crate::campaign::Request { id: field.request(), digest: [1; 32] };
            let found = campaigns.create(&field.island.officer, request, new, false).await;
            found.map_or(Vec::new(), |answer| answer.preview.unwrap().sample)
        };
        let title = |number: usize| bytes::Bytes::from(field.title(number).octets().to_vec());
        assert_eq!(selected().await, Vec::<bytes::Bytes>::new());

        // One whose GUEK was proven, and one whose GUEK was never used.
        assert_eq!(field.transfer(0, Some(KeyType::GUEK)).await, Outcome::Proven);
        for (number, version) in [(0, 2), (1, 1)] {
            let shown = report(number, version).await;
            assert!(shown.summary.unwrap().compromised);
            let slot = shown.security_setups[0].slots.iter().find(|slot| slot.key_type == "GUEK").unwrap();
            // Of what the meter holds nothing is in doubt for that.
            assert!(slot.compromised && !slot.in_doubt, "{slot:?}");
        }
        assert_eq!(selected().await, [title(0), title(1)]);
        let accepted = field.row(1).await.acceptance(None, |_, _| true);
        assert!(accepted.iter().any(|key| key.key_type == KeyType::GUEK && key.verdict == kms_domain::Verdict::NotReplaced), "{accepted:?}");

        for number in [0, 1] {
            assert_eq!(field.transfer(number, Some(KeyType::GUEK)).await, Outcome::Proven);
            field.compare(number).await;
        }
        let events = field.security_events().await;
        assert!(!events.contains(&"earlier-key-held".to_owned()), "{events:?}");
        assert_eq!(selected().await, Vec::<bytes::Bytes>::new(), "what is replaced is done");
        assert!(!meters.show(&field.island.officer, field.title(0)).await.unwrap().summary.unwrap().compromised);
        field.assert_no_nonce_twice();
    }

    async fn a_compromised_kek_exposes_what_left_under_it(island) {
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        for key_type in [KeyType::KEK, KeyType::GAK] {
            assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven);
        }
        let mut row = field.row(0).await;
        row.report_compromise(SecuritySetupId::DEFAULT, KeyType::KEK, KeyVersionNumber::FIRST, &kms_domain::Party::Anyone, kms_domain::UnixMillis(9)).unwrap();
        // KEK 2 left under KEK 1, GUEK 2 and GAK 2 under KEK 2.
        for key_type in [KeyType::KEK, KeyType::GUEK, KeyType::GAK] {
            let slot = row.slots.get(SecuritySetupId::DEFAULT, key_type).unwrap();
            let second = slot.version(KeyVersionNumber::new(2).unwrap()).unwrap();
            assert!(second.exposures().iter().any(|exposure| exposure.party == kms_domain::Party::Anyone), "{key_type}");
            assert_eq!(second.state(), KeyState::Active);
        }
    }

    async fn a_take_over_says_what_it_did_not_heal(island) {
        use kms_domain::{Remedy, Verdict};
        permit_master_keys(&island);
        let field = Field::new(island, "generic-suite0", 1).await;
        let accepted = |row: &kms_domain::Meter| {
            let mut keys = row.acceptance(None, |_, key_type| key_type.standard_key_id().is_some());
            keys.retain(|key| [KeyType::KEK, KeyType::GUEK, KeyType::GAK].contains(&key.key_type));
            assert_eq!(keys.len(), 3);
            keys
        };
        let before = accepted(&field.row(0).await);
        assert!(before.iter().all(|key| (key.verdict, key.remedy) == (Verdict::NotReplaced, Some(Remedy::Rotation))), "{before:?}");
        // In the order of a take-over: the KEK with its GUEK, then the GAK. All of it under a KEK
        // that the vendor knows.
        for key_type in [KeyType::KEK, KeyType::GAK] {
            assert_eq!(field.transfer(0, Some(key_type)).await, Outcome::Proven);
        }
        let mut row = field.row(0).await;
        for key in &accepted(&row) {
            assert_eq!((key.verdict, key.remedy), (Verdict::NotHealed, Some(Remedy::LocalVisit)), "{key:?}");
            assert_eq!(key.known_to, [kms_domain::Party::Vendor], "{key:?}");
            assert_eq!((key.version.unwrap().number(), key.evidence), (2, kms_domain::Evidence::Proven), "{key:?}");
        }
        row.suite = kms_domain::SecuritySuite::Suite1;
        let kek = |row: &kms_domain::Meter| row.acceptance(None, |_, key_type| key_type.standard_key_id().is_some()).into_iter().find(|key| key.key_type == KeyType::KEK).unwrap();
        assert_eq!(kek(&row).remedy, Some(Remedy::KeyAgreement));
        // Another rotation over the air heals nothing: it travels under a KEK that could be known.
        assert_eq!(field.transfer(0, Some(KeyType::KEK)).await, Outcome::Proven);
        assert_eq!(kek(&field.row(0).await).verdict, Verdict::NotHealed);
    }
}
