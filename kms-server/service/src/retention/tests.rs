use kms_domain::{KeyMaterial, KeyOrigin, KeyState, KeyType, NewKeyVersion, RequestId, SecuritySetupId};

use super::*;
use crate::testing::{TestIsland, island_tests, meter, sample};
use crate::{
    meter::{MeterService, Request},
    scrub::Scrubber,
};
use kms_base::clock;

const DAY: i64 = 86_400_000;

impl TestIsland {
    fn retention_pass(&self) -> RetentionPass {
        RetentionPass::new(self.island.clone(), Retention::DEFAULT)
    }

    async fn retire(&self, number: u64) {
        let request = Request { id: RequestId::from_octets(&[9; 16]).unwrap(), digest: [9; 32] };
        let response = MeterService::new(self.island.clone())
            .retire(&self.officer, request, vec![meter(number)], "scrapped".to_owned())
            .await
            .unwrap();
        assert_eq!(response.changed, 1);
    }

    /// A rotation of the GUEK that was proven now.
    async fn rotate(&self, number: u64) {
        let title = meter(number);
        let act = self.island.committer.act_in_test(
            kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
            Reads { meters: vec![title], ..Reads::default() },
            move |view| {
                let mut meter = view.meter(title)?.unwrap();
                let now = view.now();
                let slot = Arc::make_mut(&mut meter).slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
                let KeyMaterial::Wrapped(wrapped) = slot.active().unwrap().material().clone() else {
                    panic!("the sample's keys are imported")
                };
                let new = NewKeyVersion {
                    state: KeyState::PreActive,
                    origin: KeyOrigin::Generated,
                    wrapped: Some(wrapped),
                    fingerprint: None,
                };
                let version = slot.add_version(new, now).unwrap();
                slot.mark_left(version, 1, kms_domain::KeyVersionNumber::FIRST).unwrap();
                slot.confirm(version, 2, kms_domain::Evidence::Proven, now).unwrap();
                view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                view.put_meter((*meter).clone(), false)
            },
        );
        act.await.unwrap();
    }

    async fn states(&self, number: u64, key_type: KeyType) -> Vec<(KeyState, bool)> {
        let stored = self.island.meter(meter(number)).await.unwrap().unwrap();
        stored
            .slots
            .get(SecuritySetupId::DEFAULT, key_type)
            .unwrap()
            .versions()
            .iter()
            .map(|version| (version.state(), version.candidate()))
            .collect()
    }

    async fn destroyed(&self) -> Vec<KeysDestroyed> {
        self.recorded(|event| match event {
            Event::KeysDestroyed(event) => Some(event),
            _ => None,
        })
        .await
    }
}

island_tests! {
    async fn old_versions_and_retired_meters_lose_their_keys_after_retention(island) {
        use KeyState::{Active, Deactivated, Destroyed};
        // More than one page.
        island.deliver(&sample("generic-suite0", 300)).await;
        island.retire(7).await;
        island.rotate(280).await;
        let now = IslandContext::now();

        let before = island.retention_pass().run(now.after(89 * DAY)).await.unwrap();
        assert_eq!(before, RetentionReport { rows_read: 300, ..RetentionReport::default() });
        assert_eq!(island.states(7, KeyType::KEK).await, [(Deactivated, true)]);
        assert_eq!(island.states(280, KeyType::GUEK).await, [(Deactivated, true), (Active, true)]);

        let later = now.after(91 * DAY);
        let report = island.retention_pass().run(later).await.unwrap();
        assert_eq!(report, RetentionReport { rows_read: 300, rows_changed: 2, released: 5, destroyed: 5, ..RetentionReport::default() });
        for key_type in [KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK] {
            assert_eq!(island.states(7, key_type).await, [(Destroyed, false)], "{key_type}");
        }
        assert_eq!(island.states(280, KeyType::GUEK).await, [(Destroyed, false), (Active, true)]);
        assert_eq!(island.states(280, KeyType::KEK).await, [(Active, true)]);
        // The wrapped key is not in the row any more.
        let stored = island.island.meter(meter(7)).await.unwrap().unwrap();
        assert!(stored.slots.iter().flat_map(kms_domain::Slot::versions).all(|version| *version.material() == KeyMaterial::Destroyed));

        // I2: a record a page, with owner, slots and versions.
        let records = island.destroyed().await;
        assert_eq!(records.len(), 2);
        assert!(records.iter().all(|record| record.retention_days == 90));
        let keys: Vec<&DestroyedKeys> = records.iter().flat_map(|record| &record.keys).collect();
        assert_eq!(keys.len(), 5);
        assert!(keys.iter().all(|keys| keys.versions == [1] && keys.released == [1] && keys.kind == owner_row(Owner::Meter(meter(7))).0 && keys.security_setup == 0));
        assert_eq!(keys.iter().filter(|keys| keys.retired && keys.owner == meter(7).octets().as_slice()).count(), 4);
        assert!(keys.iter().any(|keys| !keys.retired && keys.owner == meter(280).octets().as_slice() && keys.key_type == KeyType::GUEK.to_string()));

        // Another server finds nothing to do, the scrub finds nothing, and officers see the states.
        let other = RetentionPass::new(island.another_server().await, Retention::DEFAULT).run(later).await.unwrap();
        assert_eq!((other.rows_changed, other.destroyed), (0, 0));
        assert_eq!(island.destroyed().await.len(), 2);
        assert_eq!(Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings, []);
        let shown = MeterService::new(island.island.clone()).show(&island.officer, meter(7)).await.unwrap();
        let versions: Vec<_> = shown.security_setups.iter().flat_map(|setup| &setup.slots).flat_map(|slot| &slot.versions).collect();
        assert!(versions.len() == 4 && versions.iter().all(|version| version.state == "destroyed" && !version.candidate));
    }

    async fn a_clock_that_was_set_ahead_destroys_nothing(island) {
        use KeyState::{Active, Deactivated, Destroyed};
        island.deliver(&sample("generic-suite0", 3)).await;
        island.rotate(2).await;
        let (retention_pass, kept) = (island.retention_pass(), [(Deactivated, true), (Active, true)]);
        // I3: the clock jumps by a year that has not passed. It runs for some days, then jumps
        // again.
        for ahead in [365, 370, 372] {
            clock::testing::set_ahead(ahead * DAY);
            let report = retention_pass.run(IslandContext::now()).await.unwrap();
            assert_eq!(report, RetentionReport { clock_in_doubt: true, ..RetentionReport::default() }, "{ahead}");
            assert_eq!(island.states(2, KeyType::GUEK).await, kept);
        }
        // With the clock set right, keys are destroyed when the retention time has passed.
        clock::testing::set_ahead(0);
        let report = retention_pass.run(IslandContext::now()).await.unwrap();
        assert_eq!((report.clock_in_doubt, report.destroyed), (false, 0));
        assert_eq!(retention_pass.run(IslandContext::now().after(91 * DAY)).await.unwrap().destroyed, 1);
        assert_eq!(island.states(2, KeyType::GUEK).await, [(Destroyed, false), (Active, true)]);
    }

    async fn two_servers_at_once_destroy_once(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        for number in [2, 3] {
            island.rotate(number).await;
        }
        let later = IslandContext::now().after(91 * DAY);
        let (one, another) = (island.retention_pass(), RetentionPass::new(island.another_server().await, Retention::DEFAULT));
        let (first, second) = tokio::join!(one.run(later), another.run(later));
        assert_eq!(first.unwrap().destroyed + second.unwrap().destroyed, 2);
        assert_eq!(island.destroyed().await.iter().flat_map(|record| &record.keys).count(), 2);
    }
}
