//! Layouts of docs/formats.md against values that Python computed (tests/vectors/generate.py).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use kms_domain::*;
use serde_json::Value;
use zeroize::Zeroizing;

fn vectors() -> Value {
    serde_json::from_str(include_str!("../../../tests/vectors/vectors.json")).unwrap()
}

fn octets(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn array<const LENGTH: usize>(value: &Value) -> [u8; LENGTH] {
    octets(value).try_into().unwrap()
}

fn key(value: &Value) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(array(value))
}

#[test]
fn diversification_contexts() {
    let vectors = vectors();
    let keys = vectors["diversified"]["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 18);
    for vector in keys {
        let id: [u8; 8] = array(&vector["owner_id"]);
        let owner = match vector["owner_kind"].as_str().unwrap() {
            "meter" => Owner::Meter(SystemTitle::from_octets(&id).unwrap()),
            "group" => Owner::Group(GroupId(u64::from_be_bytes(id))),
            _ => Owner::DeviceType(DeviceTypeId(u64::from_be_bytes(id))),
        };
        let length = KeyLength::from_octets(vector["octets"].as_u64().unwrap().try_into().unwrap()).unwrap();
        let key_type = KeyType::from_number(vector["key_type"].as_u64().unwrap().try_into().unwrap()).unwrap();
        let version = KeyVersionNumber::new(vector["version"].as_u64().unwrap().try_into().unwrap()).unwrap();
        let slot = Slot::new(SecuritySetupId::from_octets(array(&vector["setup"])), key_type);
        let context = slot.diversification(owner, version, length);
        assert_eq!(context.label().as_slice(), octets(&vector["label"]));
        assert_eq!(context.context().as_slice(), octets(&vector["context"]));
        assert_eq!(context.block().as_slice(), octets(&vector["block"]));
        let second_block: &[u8] = if length == KeyLength::Aes256 { b"meterkms-block-2" } else { b"" };
        assert_eq!(context.cbc_data(), [octets(&vector["block"]).as_slice(), second_block].concat());
        assert!(KeyDerivation::parse(vector["derivation"].as_str().unwrap()).is_ok());
    }
}

#[test]
fn secrets() {
    for vector in vectors()["secrets"].as_array().unwrap() {
        assert_eq!(EncodedSecret::encode(&octets(&vector["secret"])).unwrap().octets(), octets(&vector["encoded"]));
    }
}

#[test]
fn messages_for_the_seal_root() {
    let vectors = vectors();
    let island = IslandName::parse(vectors["seal_root"]["island"].as_str().unwrap()).unwrap();
    for (name, kind) in [
        ("seal-key", SealRootKey::Seal),
        ("audit-chain-key", SealRootKey::AuditChain),
        ("fingerprint-key", SealRootKey::Fingerprint),
    ] {
        assert_eq!(kind.message(1, &island), octets(&vectors["seal_root"]["keys"][name]["message"]));
    }
}

#[test]
fn seals_and_digests_of_rows() {
    let vectors = vectors();
    let seal_key = SealKey::new(1, &key(&vectors["seal_root"]["keys"]["seal-key"]["key"]));
    for vector in vectors["rows"].as_array().unwrap() {
        let id = octets(&vector["id"]);
        let text = String::from_utf8_lossy(&id);
        let id = match vector["kind"].as_u64().unwrap() {
            1 => RowId::Meter(SystemTitle::from_octets(&id).unwrap()),
            2 => RowId::Group(GroupId(u64::from_be_bytes(id.as_slice().try_into().unwrap()))),
            3 => RowId::DeviceType(DeviceTypeId(u64::from_be_bytes(id.as_slice().try_into().unwrap()))),
            4 => RowId::Principal(PrincipalId::parse(&text).unwrap()),
            5 => RowId::CounterDomain(CounterDomainId(id.as_slice().try_into().unwrap())),
            6 => RowId::Island(IslandName::parse(&text).unwrap()),
            7 => RowId::QuotaUse(PrincipalId::parse(&text).unwrap()),
            _ => RowId::Campaign(CampaignId::from_octets(&id).unwrap()),
        };
        let generation = Generation::from_i64(vector["generation"].as_i64().unwrap()).unwrap();
        let body = octets(&vector["body"]);
        let seal = RowSeal::from_octets(&octets(&vector["seal"])).unwrap();
        assert_eq!(seal_key.seal(&id, generation, &body), seal, "{id}");
        assert_eq!(seal_key.verify(&id, generation, &body, &seal), Ok(()));
        assert_eq!(seal_key.row_digest(&id, generation, &body).as_slice(), octets(&vector["digest"]));
    }
}

#[test]
fn the_body_of_a_meter_row() {
    let body = octets(&vectors()["rows"][0]["body"]);
    let title = SystemTitle::parse("4B414D0000000001").unwrap();
    let island = IslandName::parse("north").unwrap();
    let meter = Meter::from_row(title, &island, Bytes::from(body.clone())).unwrap();
    assert_eq!(meter.to_row().unwrap(), body);

    assert_eq!(
        (meter.class.vendor.as_str(), meter.serial.as_str(), meter.batch.as_str()),
        ("KAM", "10000001", "KAM-2026-0041")
    );
    assert_eq!((meter.class.status, meter.suite), (MeterStatus::InService, SecuritySuite::Suite0));
    assert_eq!(meter.class.groups, [GroupId(3), GroupId(300)]);
    let head_end = PrincipalId::parse("urn:meterkms:north:head-end:hes-north").unwrap();
    assert_eq!(meter.class.head_end.as_ref(), Some(&head_end));

    let guek = meter.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
    assert_eq!(guek.versions()[0].material(), &KeyMaterial::Destroyed);
    let active = guek.active().unwrap();
    let origin =
        KeyOrigin::Diversified { root_version: 3, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    assert_eq!((active.number().number(), active.origin(), active.since()), (2, origin, meter.added.after(5)));
    let grant = Exposure {
        party: Party::Principal(head_end),
        since: meter.added.after(86_400_000),
        reason: ExposureReason::Grant,
    };
    assert_eq!(active.exposures(), [grant]);
    let CounterPlace::Own(counters) = active.counters() else { panic!("no domain") };
    let client = CounterKey::ClientTitle(SystemTitle::parse("4D4D4D0000000001").unwrap());
    assert_eq!(counters.get(client).unwrap().bound(), 65_537);

    let gak = meter.slots.get(SecuritySetupId::DEFAULT, KeyType::GAK).unwrap().active().unwrap();
    assert_eq!((gak.origin(), gak.fingerprint().is_some(), gak.candidate()), (KeyOrigin::Imported, true, true));
    assert_eq!(gak.exposures()[0].party, Party::Vendor);
}

#[test]
fn plans_and_tasks_of_campaigns() {
    let vectors = vectors();
    let vector = &vectors["campaign"];
    let campaign = CampaignId::from_octets(&octets(&vector["campaign"])).unwrap();
    let mut link = PlanChain::new(campaign);
    let (mut titles, mut planner) = (Vec::new(), WavePlanner::new(campaign));
    for (chunk, expected) in vector["chunks"].as_array().unwrap().iter().zip(vector["links"].as_array().unwrap()) {
        let chunk = octets(chunk);
        titles.extend(chunk.chunks(8).map(|title| SystemTitle::from_octets(title).unwrap()));
        link = link.link(&chunk);
        assert_eq!(link.digest(), array(expected));
    }
    // The wave of a meter follows from its bucket.
    titles.iter().for_each(|title| planner.add(*title));
    let plan = Plan {
        meters: planner.total(),
        chunks: 2,
        digest: link.digest(),
        waves: planner.waves(0, &[WaveSize::Meters(1)]),
    };
    let mut buckets: Vec<u64> =
        vector["buckets"].as_array().unwrap().iter().map(|bucket| bucket.as_u64().unwrap()).collect();
    for (title, bucket) in titles.iter().zip(buckets.clone()) {
        let below = buckets.iter().filter(|other| **other < bucket).count();
        assert_eq!(plan.wave_of(campaign, *title) as usize, below + 1);
    }
    buckets.sort_unstable();
    let bounds: Vec<u64> = plan.waves.iter().map(|wave| u64::from(wave.below)).collect();
    let mut expected: Vec<u64> = buckets.iter().map(|bucket| bucket + 1).collect();
    *expected.last_mut().unwrap() = 1 << 20;
    assert_eq!(bounds, expected);

    let seal_key = SealKey::new(1, &key(&vectors["seal_root"]["keys"]["seal-key"]["key"]));
    let meter = SystemTitle::from_octets(&octets(&vector["task"]["meter"])).unwrap();
    let step = TaskStep { setup: SecuritySetupId::from_octets([1, 2]), work: TaskWork::Rotate(KeyType::KEK), from: 4 };
    let task = Task {
        state: TaskState::Leased,
        probe: true,
        attempts: 1,
        fence: 7,
        leased: UnixMillis(1_795_165_100_000),
        ..Task::new(step, UnixMillis(1_795_165_200_000))
    };
    let head_end = vector["task"]["head_end"].as_str().unwrap();
    assert_eq!(seal_key.seal_task(campaign, meter, 3, 5, head_end, &task).as_slice(), octets(&vector["task"]["mark"]));
    assert_eq!(seal_key.seal_former_task(campaign, meter, 3).as_slice(), octets(&vector["task"]["former_mark"]));
}

#[test]
fn fingerprints() {
    let vectors = vectors();
    let fingerprint_key = FingerprintKey::new(&key(&vectors["seal_root"]["keys"]["fingerprint-key"]["key"]));
    let vector = &vectors["fingerprint"];
    assert_eq!(fingerprint_key.fingerprint(&octets(&vector["wrapped"])).as_slice(), octets(&vector["fingerprint"]));
}

#[test]
fn the_lines_of_a_shipment() {
    let vectors = vectors();
    let profile = DeviceProfile::parse(DeviceProfile::SHIPPED[0].1).unwrap();
    let lines: Vec<&[u8]> = vectors["shipment"]["file"].as_str().unwrap().lines().map(str::as_bytes).collect();
    let [header, devices @ .., trailer] = lines.as_slice() else { panic!("no lines") };
    let header = ShipmentHeader::parse(header).unwrap();
    assert_eq!(header.device_profile, profile.name);
    for line in devices {
        assert_eq!(ShipmentDevice::parse(line, &header, &profile).unwrap().keys.len(), 4);
    }
    assert!(ShipmentTrailer::recognise(trailer));
    let trailer = ShipmentTrailer::parse(trailer).unwrap();
    assert_eq!((trailer.devices, trailer.sha256), (2, array(&vectors["shipment"]["sha256_before_trailer"])));
}

#[test]
fn enrolment_codes() {
    let vector = &vectors()["enrolment_code"];
    let text = vector["text"].as_str().unwrap();
    let code = EnrolmentCode::parse(text).unwrap();
    assert_eq!(code.name(), vector["name"].as_str().unwrap());
    assert_eq!(code.id().0.as_slice(), octets(&vector["public"]));
    assert_eq!(code.secret().octets().as_slice(), octets(&vector["secret"]));
    assert_eq!(code.digest().as_slice(), octets(&vector["digest"]));
    assert!(code.is_root(&octets(&vector["root"])));
    let random = [octets(&vector["public"]), octets(&vector["secret"])].concat();
    let made = EnrolmentCode::new("h-17", random.as_slice().try_into().unwrap(), &octets(&vector["root"])).unwrap();
    assert_eq!(made.to_text().as_str(), text);
}
