use kms_client::sample::{SampleCounter, VendorKey};
use kms_domain::{
    CounterKey, CounterOwnership, DeviceProfile, Exposure, ExposureReason, FlagId, KeyOrigin, KeyState, KeyType,
    MeterStatus, OaepHash, Party, PrincipalId, PrincipalStatus, SecuritySetupId, SystemTitle,
};
use kms_proto::v1::{AuditRecord, ImportShipmentResponse, audit_record::Event};
use kms_store::{MeterFilter, RowKind};

use super::{ShipmentService, UploadStart};
use crate::island::IslandContext;
use crate::testing::{
    self, Forged, TestIsland, client_title, database, import, island_tests, meter, sample, sha256, sign,
};
use crate::{campaign::CampaignService, equal_keys::share_exposures, meter::MeterService};
use kms_base::error::ServiceError;
use kms_ledger::CounterOf;

impl TestIsland {
    async fn stored(&self, title: SystemTitle) -> std::sync::Arc<kms_domain::Meter> {
        self.island.meter(title).await.unwrap().unwrap()
    }

    async fn meters(&self) -> u64 {
        self.island.store.meter_count(&MeterFilter::default()).await.unwrap()
    }

    async fn lease(&self, title: SystemTitle) -> Result<kms_domain::Lease, ServiceError> {
        lease(&self.island, title).await
    }
}

async fn lease(island: &IslandContext, title: SystemTitle) -> Result<kms_domain::Lease, ServiceError> {
    lease_of(island, title, KeyType::GUEK).await
}

async fn lease_of(
    island: &IslandContext,
    title: SystemTitle,
    key_type: KeyType,
) -> Result<kms_domain::Lease, ServiceError> {
    let of = CounterOf {
        owner: kms_domain::Owner::Meter(title),
        setup: SecuritySetupId::DEFAULT,
        key_type,
        version: kms_domain::KeyVersionNumber::FIRST,
        counter: CounterKey::ClientTitle(client_title()),
        on_new_key: kms_domain::OnNewKey::Continue,
    };
    let committed = island.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        kms_store::Reads::default(),
        move |view| {
            view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
            view.lease(of, std::num::NonZeroU32::new(100).unwrap(), kms_domain::UnixMillis(i64::MAX))
        },
    );
    committed.await.map(|committed| committed.value)
}

fn lines(response: &ImportShipmentResponse) -> Vec<(u64, &str)> {
    response.refused_lines.iter().map(|refused| (refused.line, refused.field.as_str())).collect()
}

island_tests! {
    async fn a_shipment_is_imported_and_again_nothing_changes(island) {
        let mut sample = sample("generic-suite0", 150);
        sample.groups = vec!["north".to_owned(), "a-group".to_owned()];
        let first = island.deliver(&sample).await;
        let shipment = first.shipment.clone().unwrap();
        assert_eq!(
            (shipment.state.as_str(), shipment.devices, shipment.imported, shipment.refused, shipment.duplicates),
            ("imported", 150, 150, 0, 0),
            "{first:?}"
        );
        assert!(first.refused_lines.is_empty() && first.duplicate_keys.is_empty());

        let meter = island.stored(meter(7)).await;
        assert_eq!(
            (meter.class.status, meter.class.head_end.as_ref(), meter.class.groups.len()),
            (MeterStatus::InService, Some(&island.head_end.principal), 2)
        );
        assert_eq!(meter.slots.iter().map(|slot| slot.key_type()).collect::<Vec<_>>(), [KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK]);
        for slot in meter.slots.iter() {
            let version = slot.active().unwrap();
            assert_eq!((version.state(), version.origin(), version.candidate()), (KeyState::Active, KeyOrigin::Imported, true));
            assert!(matches!(version.exposures(), [Exposure { party: Party::Vendor, reason: ExposureReason::Shipment, .. }]));
        }
        // The octets are gone, and the record of each batch names every row (I2, I5).
        let upload = super::upload_id(&shipment.file_sha256.as_ref().try_into().unwrap(), 0);
        assert_eq!(island.island.store.shipment_chunk(upload, 0).await.unwrap(), None);
        let recorded: usize = island
            .log()
            .await
            .iter()
            .filter(|record| matches!(record.event, Some(Event::ShipmentImported(_))))
            .map(|record| record.row_writes.len())
            .sum();
        assert_eq!(recorded, 150);

        // Calling again repeats the result.
        let sha256 = shipment.file_sha256.as_ref().try_into().unwrap();
        assert_eq!(island.import(sha256, Some(&island.head_end)).await.shipment, Some(shipment));
    }

    async fn an_identical_device_in_another_file_is_unchanged(island) {
        let (file, _) = island.sample(&sample("generic-suite0", 40)).await;
        assert_eq!(island.deliver_file(&file).await.shipment.unwrap().imported, 40);
        let generation = island.island.store.meters(&[meter(3)]).await.unwrap()[0].row.generation;
        let mut other = Forged::of(&file);
        let other = other.device(1, |line| line.replace("\"batch\":\"B-", "\"batch\":\"C-")).file();
        let shipment = island.deliver_file(&other).await.shipment.unwrap();
        assert_eq!((shipment.imported, shipment.unchanged, shipment.refused, shipment.duplicates), (0, 40, 0, 0));
        assert_eq!(island.island.store.meters(&[meter(3)]).await.unwrap()[0].row.generation, generation);
    }

    async fn a_wrong_file_imports_nothing_and_is_on_the_record(island) {
        let (file, signature) = island.sample(&sample("generic-suite0", 5)).await;
        let content_end = file.len() - file.split_inclusive(|octet| *octet == b'\n').next_back().unwrap().len();
        let text = |change: &dyn Fn(String) -> String| change(String::from_utf8(file.clone()).unwrap()).into_bytes();
        let header = |from: &str, to: &str| Forged::of(&file).device(1, |line| line.replace(from, to)).file();
        let other_transport = hex::encode_upper(sha256(&island.island.hsm.transport_key_spki(kms_hsm::RootVersion::FIRST).await.unwrap()));
        let stranger = VendorKey::generate().unwrap();
        let other_hash = if island.module.oaep_hash() == OaepHash::Sha256 { OaepHash::Sha1 } else { OaepHash::Sha256 };
        let signed = |file: Vec<u8>| { let signature = island.signed(&file); (file, signature) };
        type Signed = (Vec<u8>, Vec<u8>);
        let cases: Vec<(&str, Signed)> = vec![
            ("the signature", (file.clone(), sign(&stranger, &file))),
            ("the signature", (text(&|text| text.replacen("\"serial\":\"1", "\"serial\":\"2", 1)), signature.clone())),
            ("the signature", (file[..file.len() / 2].to_vec(), signature.clone())),
            ("the signature", (file[..content_end].to_vec(), signature.clone())),
            ("trailer.sha256", signed(text(&|text| text.replacen("\"serial\":\"1", "\"serial\":\"2", 1)))),
            ("trailer.devices", signed(text(&|text| text.replace("\"devices\":5", "\"devices\":6")))),
            ("the trailer is missing", signed(file[..content_end].to_vec())),
            ("the trailer is missing", signed(file[..content_end / 2].to_vec())),
            ("line 1: line", signed(b"\n".to_vec())),
            ("lines after the trailer", signed([file.as_slice(), b"{}\n"].concat())),
            ("not the manufacturer", signed(header("\"KAM\"", "\"LAM\""))),
            ("device_profile", signed(header("generic-suite0", "unheard-of"))),
            ("transport_key", signed(header(&other_transport, &"AB".repeat(32)))),
            ("oaep_hash", signed(header(&format!("\"{}\"", island.module.oaep_hash().name()), &format!("\"{}\"", other_hash.name())))),
            ("batch_key", signed(header("\"batch_key\":\"", "\"batch_key\":\"AAAA"))),
            ("line 1: line", signed(header("\"format\"", "\"formats\""))),
            ("line 1: format", signed(header("shipment/1", "shipment/2"))),
        ];
        for (expected, (file, signature)) in cases {
            let sha256 = island.upload(&file, &signature).await;
            let shipment = island.import(sha256, Some(&island.head_end)).await.shipment.unwrap();
            assert_eq!(shipment.state, "refused", "{expected}");
            assert!(shipment.refusal.contains(expected), "{expected}: {}", shipment.refusal);
            let records = island.log().await;
            let recorded = records.iter().rev().find_map(|record| match &record.event {
                Some(Event::ShipmentImported(event)) => Some(event.clone()),
                _ => None,
            });
            assert_eq!(recorded.unwrap().refusal, shipment.refusal);
            assert_eq!(island.meters().await, 0, "{expected}");
        }
        // With the right signature the same file is accepted. It is sent again from its first
        // octet.
        let service = ShipmentService::new(island.island.clone());
        let known = service.get(&island.officer, &sha256(&file)).await.unwrap();
        assert_eq!((known.state.as_str(), known.received), ("refused", 0));
        let sha256 = island.upload(&file, &signature).await;
        assert_eq!(island.import(sha256, Some(&island.head_end)).await.shipment.unwrap().imported, 5);
    }

    async fn refused_lines_are_told_and_the_others_imported(island) {
        let (file, _) = island.sample(&sample("generic-suite0", 12)).await;
        let mut forged = Forged::of(&file);
        forged.device(3, |line| line.replace("\"serial\":\"1", "\"serial\":\"\\u0000"));
        forged.device(4, |line| line.replace("\"GAK\"", "\"GUEK\""));
        // Damaged: the HSM refuses it.
        forged.device(6, |line| { let at = line.rfind("\"wrapped\":\"").unwrap() + 11; let flipped = if &line[at..=at] == "0" { "1" } else { "0" }; format!("{}{flipped}{}", &line[..at], &line[at + 1..]) });
        forged.lines[7] = vec![b'x'; 200_000];
        forged.lines[7].push(b'\n');
        forged.lines[8] = b"{\"title\":\"\xFF\xFE\"}\n".to_vec();
        forged.lines[9] = [vec![b'['; 10_000], b"\n".to_vec()].concat();
        forged.lines[10] = b"\n".to_vec();
        forged.device(12, |line| line.replace("\"groups\":[]", "\"groups\":[\"UP\"]").replace("{\"title\":\"4B", "{\"title\":\"4C"));
        let file = forged.file();
        let response = island.deliver_file(&file).await;
        let told = lines(&response);
        assert_eq!(told.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [3, 4, 6, 8, 9, 10, 11, 12], "{response:?}");
        assert_eq!(told[2].1, "keys[3].wrapped");
        let shipment = response.shipment.clone().unwrap();
        assert_eq!((shipment.state.as_str(), shipment.imported, shipment.refused, shipment.devices), ("imported", 4, 8, 12));
        for (number, known) in [(1, true), (2, false), (4, true), (5, false), (6, true), (12, true)] {
            assert_eq!(island.island.meter(meter(number)).await.unwrap().is_some(), known, "{number}");
        }
        // A repeated call reports the same.
        let again = island.import(sha256(&file), Some(&island.head_end)).await;
        assert_eq!((again.shipment, again.refused_lines), (response.shipment, response.refused_lines));
    }

    async fn a_device_with_a_client_title_is_a_refused_line(island) {
        // I4: the title of a principal that is disabled, too: frames under it were made before.
        let principal = island.island.principal(&island.other_head_end).await.unwrap();
        let mut other = (*principal).clone();
        other.client_titles = vec![meter(2)];
        other.status = PrincipalStatus::Disabled;
        testing::put_principal(&island.island, other).await;
        let response = island.deliver(&sample("generic-suite0", 3)).await;
        assert_eq!(lines(&response), [(3, "title")]);
        assert!(response.refused_lines[0].reason.contains("client title"), "{response:?}");
        assert_eq!(response.shipment.unwrap().imported, 2);
        assert!(island.island.meter(meter(2)).await.unwrap().is_none());
    }

    async fn an_upload_goes_on_where_it_broke_off(island) {
        let (file, signature) = island.sample(&sample("generic-suite0", 3_000)).await;
        let start = island.start(&file, &signature);
        let service = ShipmentService::new(island.island.clone());
        let mut upload = service.upload(&island.officer, start.clone()).await.unwrap();
        assert!(matches!(upload.append(1, b"x").await, Err(ServiceError::FailedPrecondition { .. })));
        for piece in file[..1_300_000].chunks(300_000) {
            upload.append(upload.position(), piece).await.unwrap();
        }
        drop(upload);
        // Octets that were not stored are lost with the server. Another server continues after the
        // stored octets.
        let other = island.another_server().await;
        let service = ShipmentService::new(other.clone());
        let known = service.get(&island.officer, &start.file_sha256).await.unwrap();
        assert_eq!((known.state.as_str(), known.received, known.file_length), ("uploading", 1_200_000, file.len() as u64));
        let early = service.import(&island.officer, &start.file_sha256, None).await;
        assert!(matches!(early, Err(ServiceError::FailedPrecondition { .. })));
        let mut upload = service.upload(&island.officer, start.clone()).await.unwrap();
        assert_eq!(upload.position(), 1_200_000);
        for piece in file[1_200_000..].chunks(1 << 20) {
            upload.append(upload.position(), piece).await.unwrap();
        }
        assert!(matches!(upload.append(file.len() as u64, b"x").await, Err(ServiceError::InvalidArgument { .. })));
        assert_eq!(upload.finish().await.unwrap().state, "uploaded");
        let shipment = import(&other, &island.officer, start.file_sha256, None).await.shipment.unwrap();
        assert_eq!((shipment.imported, shipment.state.as_str()), (3_000, "imported"));
        let meter = island.stored(meter(2_999)).await;
        assert_eq!((meter.class.status, &meter.class.head_end), (MeterStatus::InStock, &None));
    }

    async fn an_import_goes_on_where_it_stopped_on_any_server(island) {
        let (file, signature) = island.sample(&sample("generic-suite0", 2_500)).await;
        let mut forged = Forged::of(&file);
        let file = forged.device(3, |line| line.replace("\"GAK\"", "\"GUEK\"")).file();
        drop(signature);
        let sha256 = island.upload(&file, &island.signed(&file)).await;
        let service = ShipmentService::new(island.island.clone());
        let mut import_one = service.import(&island.officer, &sha256, Some(island.head_end.principal.clone())).await.unwrap();
        let first = import_one.next().await.unwrap().unwrap();
        assert_eq!(lines(&first), [(3, "keys[3]")]);
        drop(import_one);
        // The batch that was being committed may still be committed. Then the import stops.
        let other = island.another_server().await;
        let mut before = 0;
        loop {
            let imported = service.get(&island.officer, &sha256).await.unwrap().imported;
            if imported == before { break; }
            before = imported;
            tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        }
        assert!(before > 0 && before < 2_499, "{before}");
        let response = import(&other, &island.officer, sha256, Some(&island.head_end)).await;
        let shipment = response.shipment.clone().unwrap();
        assert_eq!((shipment.imported, shipment.refused, shipment.unchanged, shipment.state.as_str()), (2_499, 1, 0, "imported"));
        assert_eq!(lines(&response), [(3, "keys[3]")]);
        assert_eq!(island.meters().await, 2_499);
        // Each line was imported once: every meter is in its first generation.
        let rows = island.island.store.meter_page(&MeterFilter::default(), None, 3_000).await.unwrap();
        assert!(rows.iter().all(|row| row.row.generation == 1));
    }

    async fn what_changes_in_the_spool_is_not_imported(island) {
        // I5: somebody who can write the database changes octets of a verified shipment.
        let (file, signature) = island.sample(&sample("generic-suite0", 4)).await;
        let sha256 = island.upload(&file, &signature).await;
        let upload = super::upload_id(&sha256, 0);
        island.island.store.delete_shipment_chunks(upload, 10).await.unwrap();
        let gone = ShipmentService::new(island.island.clone());
        let mut run = gone.import(&island.officer, &sha256, None).await.unwrap();
        assert!(matches!(run.next().await, Some(Err(ServiceError::FailedPrecondition { .. }))));
        // The second pass checks each window against the first.
        let windows: std::sync::Arc<[super::spool::WindowDigest]> = vec![[0; 32]].into();
        let (other, signature) = island.sample(&sample("generic-suite1", 4)).await;
        let sha256 = island.upload(&other, &signature).await;
        let mut windows = super::spool::Windows::verified(island.island.store.clone(), super::upload_id(&sha256, 0), other.len() as u64, 5, windows);
        assert!(matches!(windows.next().await, Err(ServiceError::FailedPrecondition { reason, .. }) if reason.contains("I5")));
        assert_eq!(island.meters().await, 0);
    }

    async fn equal_keys_share_a_counter_domain_and_leases_never_meet(island) {
        // I4: a vendor gave the same unicast key to meters 1, 2 (one batch) and, in another
        // shipment, to meter 101; and meter 3 has one key twice.
        let (file, _) = island.sample(&sample("generic-suite0", 4)).await;
        let mut forged = Forged::of(&file);
        let wrapped = |line: &[u8], key: &str| {
            let text = String::from_utf8(line.to_vec()).unwrap();
            let at = text.find(&format!("\"type\":\"{key}\"")).unwrap();
            let begin = at + text[at..].find("\"wrapped\":\"").unwrap() + 11;
            (begin, text[begin..begin + 48].to_owned())
        };
        let guek = wrapped(&forged.lines[1], "GUEK").1;
        let put = |line: String, key: &str, value: &str| { let (begin, _) = wrapped(line.as_bytes(), key); format!("{}{value}{}", &line[..begin], &line[begin + 48..]) };
        forged.device(3, |line| put(line, "GUEK", &guek));
        let kek = wrapped(&forged.lines[3], "KEK").1;
        forged.device(4, |line| put(line, "GBEK", &kek));
        let mut first_file = forged.file();
        let response = island.deliver_file(&first_file).await;
        let duplicates: Vec<_> = response.duplicate_keys.iter().map(|one| (one.line, one.key_type.as_str(), one.meter.as_ref(), one.other_meter.as_ref())).collect();
        assert_eq!(duplicates, [(3, "GUEK", &meter(2).octets()[..], &meter(1).octets()[..]), (4, "GBEK", &meter(3).octets()[..], &meter(3).octets()[..])], "{response:?}");
        assert_eq!(response.shipment.unwrap().duplicates, 2);

        let one = island.lease(meter(1)).await.unwrap();
        let two = island.lease(meter(2)).await.unwrap();
        assert!(two.first > one.last(), "{one:?} {two:?}");

        // Later, after leases of meter 1 were allocated: another shipment brings the value a third
        // time, with a floor of its own.
        first_file.clear();
        let text = String::from_utf8(forged.lines[1].clone()).unwrap();
        let third = text.replace(&meter(1).to_string(), &meter(101).to_string()).replace("\"keys\":", "\"serial2\":1,\"keys\":").replace("\"serial2\":1,", "");
        let other_keys: Vec<String> = ["KEK", "GBEK", "GAK"].iter().map(|key| wrapped(&forged.lines[4], key).1).collect();
        let mut third = third;
        for (key, value) in ["KEK", "GBEK", "GAK"].iter().zip(&other_keys) {
            third = put(third, key, value);
        }
        let third = third.trim_end().strip_suffix('}').unwrap().replace(",\"counters\":[]", "")
            + &format!(",\"counters\":[{{\"setup\":\"0.0.43.0.0.255\",\"client_title\":\"{}\",\"floor\":90000}}]}}\n", client_title());
        let mut next = Forged { lines: vec![forged.lines[0].clone(), third.into_bytes(), Vec::new()] };
        next.device(1, |line| line.replace("\"batch\":\"B-", "\"batch\":\"D-"));
        let response = island.deliver_file(&next.file()).await;
        assert_eq!(response.shipment.as_ref().unwrap().imported, 1, "{response:?}");
        // GUEK with meters 1 and 2, and the three other keys with meter 4.
        assert_eq!(response.duplicate_keys.len(), 4, "{response:?}");
        let three = island.lease(meter(101)).await.unwrap();
        assert!(three.first >= 90_000 && three.first > two.last());
        let mut seen = vec![(one.first, one.last()), (two.first, two.last()), (three.first, three.last())];
        let other = island.another_server().await;
        for round in 0..3 {
            for (server, number) in [(&island.island, 1), (&other, 2), (&island.island, 101), (&other, 1)] {
                let allocated = lease(server, meter(number)).await.unwrap();
                assert!(seen.iter().all(|(first, last)| allocated.last() < *first || allocated.first > *last), "round {round}, meter {number}: {allocated:?} meets {seen:?}");
                seen.push((allocated.first, allocated.last()));
            }
        }
    }

    async fn who_knows_the_key_of_one_meter_knows_that_of_all_that_have_it(island) {
        let (file, _) = island.sample(&sample("generic-suite0", 6)).await;
        let mut forged = Forged::of(&file);
        let guek = |line: &[u8]| {
            let text = String::from_utf8(line.to_vec()).unwrap();
            let at = text.find("\"type\":\"GUEK\"").unwrap();
            let begin = at + text[at..].find("\"wrapped\":\"").unwrap() + 11;
            (begin, text[begin..begin + 48].to_owned())
        };
        let value = guek(&forged.lines[1]).1;
        // Meters 1 to 5 have one value, and meter 6 another.
        for line in 3..=6 {
            forged.device(line, |line| { let (begin, _) = guek(line.as_bytes()); format!("{}{value}{}", &line[..begin], &line[begin + 48..]) });
        }
        let response = island.deliver_file(&forged.file()).await;
        let setup = SecuritySetupId::DEFAULT;
        let duplicates: Vec<_> = response.duplicate_keys.iter().map(|one| (one.meter.to_vec(), one.security_setup.to_vec(), one.key_type.as_str())).collect();
        let expected: Vec<_> = (2..=5).map(|number| (meter(number).octets().to_vec(), setup.obis().to_vec(), "GUEK")).collect();
        assert_eq!(duplicates, expected);

        // One of them is granted to a head-end, and another one reported.
        let (known_to, other) = (Party::Principal(island.other_head_end.principal.clone()), Party::Anyone);
        let expose = async |number: u64, party: Party, reason: ExposureReason| {
            let reads = kms_store::Reads { meters: vec![meter(number)], ..kms_store::Reads::default() };
            let act = island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), reads, move |view| {
                view.append(Event::KeysGranted(kms_proto::v1::KeysGranted::default()));
                let mut row = (*view.meter(meter(number))?.unwrap()).clone();
                let version = row.slots.get_mut(setup, KeyType::GUEK).unwrap().version_mut(kms_domain::KeyVersionNumber::FIRST).unwrap();
                assert!(version.expose(party.clone(), reason, view.now()));
                view.put_meter(row, false)
            });
            act.await.unwrap();
        };
        expose(2, known_to.clone(), ExposureReason::Grant).await;
        expose(6, other.clone(), ExposureReason::Reported).await;
        let shown = async |number: u64| {
            let meter = MeterService::new(island.island.clone()).show(&island.officer, meter(number)).await.unwrap();
            let slot = meter.security_setups[0].slots.iter().find(|slot| slot.key_type == "GUEK").unwrap().clone();
            slot.versions[0].exposures.iter().map(|exposure| exposure.party.clone()).collect::<Vec<_>>()
        };
        let selected = async |exposed_to: &Party| {
            let mut asked = crate::campaign::tests::new(crate::campaign::tests::terms());
            asked.selection = kms_domain::CampaignSelection { exposed_to: Some(exposed_to.clone()), ..Default::default() };
            let service = CampaignService::new(island.island.clone());
            let answer = service.create(&island.officer, crate::campaign::tests::request(), asked, false).await;
            answer.map_or(0, |answer| answer.preview.unwrap().meters)
        };
        let check = async || {
            for number in 1..=5 {
                assert!(shown(number).await.contains(&known_to.to_string()), "{number}");
            }
            assert!(!shown(6).await.contains(&known_to.to_string()));
            assert_eq!((selected(&known_to).await, selected(&other).await), (5, 1));
        };
        check().await;

        // An island of an earlier version: only the row of meter 2 has the exposure.
        let store = &island.island.store;
        let (id, row) = store.sealed_page(kms_store::RowKind::CounterDomain, None, 10).await.unwrap().remove(0);
        let id = kms_domain::CounterDomainId(id.as_slice().try_into().unwrap());
        let mut domain = (*island.island.committer.open_domain(id, &row).unwrap()).clone();
        domain.exposures.clear();
        let generation = kms_domain::Generation::from_i64(i64::try_from(row.generation).unwrap() + 1).unwrap();
        let body = domain.to_row();
        let seal = *island.island.committer.seal_key().seal(&kms_domain::RowId::CounterDomain(id), generation, &body).octets();
        let octets = |octets: &[u8]| kms_store_testing::octets(&database().database, octets);
        let statement = format!(
            "UPDATE sealed SET generation = {}, seal = {}, body = {} WHERE kind = {}",
            generation.number(), octets(&seal), octets(&body), kms_store::RowKind::CounterDomain.number()
        );
        assert_eq!(kms_store_testing::execute(&database().database, &statement).await.unwrap(), 1);
        assert_eq!(selected(&known_to).await, 1, "the test's own step back");
        assert!(share_exposures(&island.island).await.unwrap() >= 1);
        check().await;
        assert_eq!(share_exposures(&island.island).await.unwrap(), 0);
    }

    async fn a_counter_domain_that_somebody_deleted_is_not_begun_anew(island) {
        let (file, _) = island.sample(&sample("generic-suite0", 3)).await;
        let mut forged = Forged::of(&file);
        let guek = |line: &[u8]| {
            let text = String::from_utf8(line.to_vec()).unwrap();
            let at = text.find("\"type\":\"GUEK\"").unwrap();
            let begin = at + text[at..].find("\"wrapped\":\"").unwrap() + 11;
            (begin, text[begin..begin + 48].to_owned())
        };
        let value = guek(&forged.lines[1]).1;
        forged.device(3, |line| { let (begin, _) = guek(line.as_bytes()); format!("{}{value}{}", &line[..begin], &line[begin + 48..]) });
        assert_eq!(island.deliver_file(&forged.file()).await.shipment.unwrap().duplicates, 1);
        island.lease(meter(1)).await.unwrap();
        let before = island.lease(meter(2)).await.unwrap();

        // I4, I5: without the row nobody knows which counters were allocated, so no more are
        // allocated.
        let statement = format!("DELETE FROM sealed WHERE kind = {}", kms_store::RowKind::CounterDomain.number());
        assert_eq!(kms_store_testing::execute(&database().database, &statement).await.unwrap(), 1);
        let never_saw_it = [island.another_server().await, std::sync::Arc::new(island.restarted().await)];
        for number in [1, 2] {
            island.lease(meter(number)).await.unwrap_err();
            for server in &never_saw_it {
                let refused = lease(server, meter(number)).await.unwrap_err();
                assert!(refused.to_string().contains("is missing (I5)"), "{refused}");
            }
        }
        assert!(lease(&never_saw_it[0], meter(3)).await.is_ok(), "a meter with a key of its own goes on");

        // A shipment with the same value must not make a new domain either, which would begin
        // below.
        let third = String::from_utf8(forged.lines[1].clone()).unwrap().replace(&meter(1).to_string(), &meter(101).to_string());
        let mut next = Forged { lines: vec![forged.lines[0].clone(), third.into_bytes(), Vec::new()] };
        next.device(1, |line| line.replace("\"batch\":\"B-", "\"batch\":\"D-"));
        let file = next.file();
        let sha256 = island.upload(&file, &island.signed(&file)).await;
        let mut run = ShipmentService::new(never_saw_it[0].clone()).import(&island.officer, &sha256, None).await.unwrap();
        let stopped = run.next().await.unwrap().unwrap_err();
        assert!(matches!(&stopped, ServiceError::FailedPrecondition { reason, .. } if reason.contains("whose row is missing")), "{stopped}");
        assert_eq!(island.meters().await, 3);
        assert!(lease(&never_saw_it[1], meter(2)).await.is_err(), "{before:?} could be given out again");

        // The scrubber tells which row it is.
        let findings = crate::scrub::Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap().findings;
        assert!(findings.iter().any(|finding| finding.kind == u32::from(RowKind::CounterDomain.number()) && finding.finding == "deleted"), "{findings:?}");
    }

    async fn a_title_that_a_head_end_counts_gets_no_lease(island) {
        let owner = PrincipalId::parse("urn:meterkms:north:head-end:hes-2").unwrap();
        let mut owned = sample("generic-suite0", 2);
        owned.counters = vec![SampleCounter { security_setup: SecuritySetupId::DEFAULT, client_title: client_title(), floor: 1_200, owned_by: Some(owner.clone()) }];
        assert_eq!(island.deliver(&owned).await.shipment.unwrap().imported, 2);
        let stored = island.stored(meter(1)).await;
        let version = stored.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().active().unwrap();
        let kms_domain::CounterPlace::Own(counters) = version.counters() else { panic!() };
        let state = counters.get(CounterKey::ClientTitle(client_title())).unwrap();
        assert_eq!((state.bound(), state.ownership()), (1_200, &CounterOwnership::HeadEnd(owner)));
        assert!(matches!(island.lease(meter(1)).await, Err(ServiceError::FailedPrecondition { .. })));

        let mut floors = sample("generic-suite0", 1);
        floors.first_number = 50;
        floors.counters = vec![SampleCounter { security_setup: SecuritySetupId::DEFAULT, client_title: client_title(), floor: 777, owned_by: None }];
        let (file, _) = island.sample(&floors).await;
        island.deliver_file(&Forged::of(&file).file()).await;
        assert_eq!(island.lease(meter(50)).await.unwrap().first, 777);

        // In another shipment the meter is known. A floor above all that is reserved is reported,
        // and changes nothing.
        let again = |batch: &str, floor: &str| {
            let mut next = Forged::of(&file);
            next.device(1, |line| line.replace("\"batch\":\"B-", &format!("\"batch\":\"{batch}-")));
            next.device(2, |line| line.replace(":777", floor));
            next.file()
        };
        let known = island.deliver_file(&again("D", ":777")).await;
        assert_eq!((known.shipment.unwrap().unchanged, known.refused_lines.len()), (1, 0));
        // One inside the chunks that this server allocates from is kept, under each key of the
        // line.
        lease_of(&island.island, meter(50), KeyType::GBEK).await.unwrap();
        let inside = island.deliver_file(&again("F", ":5004")).await;
        assert_eq!((inside.shipment.unwrap().unchanged, inside.refused_lines.len()), (1, 0));
        assert_eq!(island.lease(meter(50)).await.unwrap().first, 5_004);
        assert_eq!(lease_of(&island.island, meter(50), KeyType::GBEK).await.unwrap().first, 5_004);
        let once_more = island.deliver_file(&again("G", ":5004")).await;
        assert_eq!((once_more.shipment.unwrap().unchanged, once_more.refused_lines.len()), (1, 0));
        let raised = |record: &AuditRecord| matches!(&record.event, Some(Event::MetersChanged(change)) if change.change == "floor-raised" && change.value.contains("`F-"));
        assert_eq!(island.log().await.iter().filter(|record| raised(record)).count(), 1);
        let higher = island.deliver_file(&again("E", ":900000")).await;
        assert_eq!(lines(&higher), [(2, "counters[0].floor")]);
        assert!(island.lease(meter(50)).await.unwrap().first < 900_000);

        // A head-end of another island owns nothing here.
        let mut foreign = sample("generic-suite0", 1);
        foreign.first_number = 60;
        foreign.counters = vec![SampleCounter { owned_by: Some(PrincipalId::parse("urn:meterkms:south:head-end:hes-2").unwrap()), ..owned.counters[0].clone() }];
        assert_eq!(lines(&island.deliver(&foreign).await), [(2, "counters")]);
    }

    async fn only_who_may_and_only_with_a_known_key(island) {
        let (file, signature) = island.sample(&sample("generic-suite0", 2)).await;
        let start = island.start(&file, &signature);
        let service = ShipmentService::new(island.island.clone());
        for caller in [&island.head_end, &island.auditor] {
            assert!(matches!(service.upload(caller, start.clone()).await, Err(ServiceError::PermissionDenied { .. })));
            assert!(matches!(service.import(caller, &start.file_sha256, None).await, Err(ServiceError::PermissionDenied { .. })));
        }
        let somebody = PrincipalId::parse("urn:meterkms:north:manufacturer:lam").unwrap();
        let unknown = super::UploadStart { manufacturer: somebody, ..start.clone() };
        assert!(matches!(service.upload(&island.officer, unknown.clone()).await, Err(ServiceError::FailedPrecondition { .. })));
        assert!(matches!(service.upload(&island.manufacturer, unknown).await, Err(ServiceError::PermissionDenied { .. })));

        // As long as nothing was imported, a signature can be corrected, and another length begins
        // a new upload.
        let shorter = super::UploadStart { file_length: start.file_length - 1, signature: vec![0x30; 70].into(), ..start.clone() };
        let mut upload = service.upload(&island.officer, shorter).await.unwrap();
        upload.append(0, &file[..file.len() - 1]).await.unwrap();
        assert_eq!(upload.finish().await.unwrap().state, "uploaded");
        assert!(matches!(service.upload(&island.manufacturer, start.clone()).await, Err(ServiceError::PermissionDenied { .. })));
        assert_eq!(service.upload(&island.officer, super::UploadStart { signature: vec![0x30; 70].into(), ..start.clone() }).await.unwrap().position(), 0);
        assert_eq!(service.upload(&island.officer, start.clone()).await.unwrap().position(), 0);

        // The manufacturer uploads its own file and sees it, but may not import it.
        let mut upload = service.upload(&island.manufacturer, start.clone()).await.unwrap();
        upload.append(0, &file).await.unwrap();
        assert_eq!(upload.finish().await.unwrap().state, "uploaded");
        assert_eq!(service.list(&island.manufacturer).await.unwrap().len(), 2);
        assert!(matches!(service.import(&island.manufacturer, &start.file_sha256, None).await, Err(ServiceError::PermissionDenied { .. })));
        assert!(matches!(service.get(&island.manufacturer, &[7; 32]).await, Err(ServiceError::NotFound { .. })));
        let nobody = Some(PrincipalId::parse("urn:meterkms:north:head-end:nobody").unwrap());
        assert!(matches!(service.import(&island.officer, &start.file_sha256, nobody).await, Err(ServiceError::InvalidArgument { field, .. }) if field == "head_end"));
        assert_eq!(island.import(start.file_sha256, Some(&island.other_head_end)).await.shipment.unwrap().imported, 2);
        assert_eq!(service.transport_key(&island.officer).await.unwrap().oaep_hashes, [island.module.oaep_hash().name()]);
    }

    /// A11: 31 of 40 uploads passed a bound of 16 that was checked outside the act.
    async fn parallel_uploads_never_pass_the_bounds_of_the_spool(island) {
        let services = [ShipmentService::new(island.island.clone()), ShipmentService::new(island.another_server().await)];
        let start = |number: u8, file_length: u64| UploadStart {
            file_sha256: [number; 32],
            file_length,
            signature: vec![0x30; 70].into(),
            manufacturer: island.manufacturer.principal.clone(),
        };
        let begun = (0..40).map(|number| services[usize::from(number) % 2].upload(&island.manufacturer, start(number, 1_000)));
        let begun = futures::future::join_all(begun).await;
        assert_eq!(begun.iter().filter(|upload| upload.is_ok()).count(), 16);
        for refused in begun.into_iter().filter_map(Result::err) {
            assert!(matches!(&refused, ServiceError::ResourceExhausted { reason, .. } if reason.contains("`uploads_per_principal` is 16")), "{refused:?}");
        }
        // Octets are counted as they are announced, for each principal.
        let mut officer = Vec::new();
        for number in 100..103 {
            officer.push(services[0].upload(&island.officer, start(number, 3 << 29)).await);
        }
        let refused = officer.pop().unwrap().err();
        assert!(matches!(&refused, Some(ServiceError::ResourceExhausted { reason, .. }) if reason.contains("`spool_octets_per_principal`")), "{refused:?}");
        assert!(officer.iter().all(Result::is_ok));
    }

    /// A11: a file that cannot be a shipment to this island is refused because of its first line.
    async fn a_foreign_file_is_refused_before_it_is_in_the_spool(island) {
        let (file, signature) = island.sample(&sample("generic-suite0", 3)).await;
        let foreign = Forged::of(&file).device(1, |line| line.replace("\"KAM\"", "\"LAM\"")).file();
        let service = ShipmentService::new(island.island.clone());
        for (octets, expected) in [(foreign, "not the manufacturer"), (vec![b'x'; 20_000], "line 1")] {
            let start = UploadStart { file_length: 1 << 30, ..island.start(&octets, &signature) };
            let mut upload = service.upload(&island.manufacturer, start.clone()).await.unwrap();
            upload.append(0, &octets[..100]).await.unwrap();
            assert!(!upload.is_refused());
            upload.append(100, &octets[100..]).await.unwrap();
            assert!(upload.is_refused());
            let shipment = upload.finish().await.unwrap();
            assert!(shipment.state == "refused" && shipment.refusal.contains(expected), "{shipment:?}");
            let stored = island.island.store.shipment_chunk(super::upload_id(&start.file_sha256, 0), 0).await.unwrap();
            assert_eq!(stored, None);
        }
    }

    /// A11.
    async fn what_senders_leave_is_dropped(island) {
        let (file, signature) = island.sample(&sample("generic-suite0", 3_000)).await;
        let service = ShipmentService::new(island.island.clone());
        let start = island.start(&file, &signature);
        let mut upload = service.upload(&island.manufacturer, start.clone()).await.unwrap();
        for piece in file[..1_200_000].chunks(600_000) {
            upload.append(upload.position(), piece).await.unwrap();
        }
        let id = super::upload_id(&start.file_sha256, 0);
        let there = async || island.island.store.shipment_chunk(id, 0).await.unwrap().is_some();
        service.drop_forgotten(IslandContext::now().after(23 * 3_600_000)).await.unwrap();
        assert!(there().await);
        service.drop_forgotten(IslandContext::now().after(25 * 3_600_000)).await.unwrap();
        assert!(!there().await);
        let shipment = service.get(&island.manufacturer, &start.file_sha256).await.unwrap();
        assert!(shipment.state == "refused" && shipment.refusal.contains("not complete in time"), "{shipment:?}");
        // The same file goes through when it is sent again.
        island.upload(&file, &signature).await;
        assert_eq!(island.import(start.file_sha256, None).await.shipment.unwrap().imported, 3_000);
    }

    async fn suites_and_profiles_of_all_kinds(island) {
        for (number, (name, text)) in (1..).zip(DeviceProfile::SHIPPED) {
            let mut shipment = sample(name, 3);
            shipment.first_number = number * 1_000;
            let response = island.deliver(&shipment).await;
            assert_eq!(response.shipment.as_ref().unwrap().imported, 3, "{name}: {response:?}");
            let profile = DeviceProfile::parse(text).unwrap();
            let stored = island.stored(meter(number * 1_000)).await;
            for slot in stored.slots.iter() {
                assert_eq!(slot.active().unwrap().shape(), profile.key(slot.setup(), slot.key_type()).map(|key| key.shape), "{name} {}", slot.key_type());
            }
        }
        assert!(FlagId::parse("KAM").is_ok());
    }

    /// How fast: `KMS_TEST_METERS=200000 KMS_TEST_SHOW=1 cargo test --release -p kms-service --lib
    /// import_rate -- --nocapture`.
    async fn import_rate(island) {
        let meters: u64 = std::env::var("KMS_TEST_METERS").ok().and_then(|text| text.parse().ok()).unwrap_or(3_000);
        let (file, signature) = island.sample(&sample("generic-suite0", meters)).await;
        let begun = std::time::Instant::now();
        let sha256 = island.upload(&file, &signature).await;
        drop(file);
        let uploaded = begun.elapsed();
        let begun = std::time::Instant::now();
        let shipment = island.import(sha256, Some(&island.head_end)).await.shipment.unwrap();
        let taken = begun.elapsed();
        let resident = std::fs::read_to_string("/proc/self/status").unwrap().lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")).collect::<Vec<_>>().join(", ");
        println!("{meters} meters: upload {uploaded:?}, import {taken:?}, {:.0} meters/s; {resident}", meters as f64 / taken.as_secs_f64());
        assert_eq!(shipment.imported, meters);
    }
}
