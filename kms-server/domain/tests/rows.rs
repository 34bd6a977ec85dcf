//! Rows: what is written comes back, in few octets; anything else is refused without a panic.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::num::NonZeroU32;

use bytes::Bytes;
use kms_domain::*;
use proptest::prelude::*;

const NOW: UnixMillis = UnixMillis(1_795_165_200_000);

fn island() -> IslandName {
    IslandName::parse("north").unwrap()
}

fn title() -> SystemTitle {
    SystemTitle::parse("4B414D0000000001").unwrap()
}

fn principal(name: &str) -> PrincipalId {
    PrincipalId::new(island(), Role::HeadEnd, name).unwrap()
}

fn meter(slots: Slots) -> Meter {
    Meter {
        title: title(),
        class: MeterClass {
            vendor: FlagId::parse("KAM").unwrap(),
            profile: DeviceProfileName::parse("generic-suite0").unwrap(),
            status: MeterStatus::InService,
            groups: vec![GroupId(3)],
            head_end: Some(principal("hes-north")),
        },
        serial: "10000001".to_owned(),
        suite: SecuritySuite::Suite0,
        batch: "KAM-2026-0041".to_owned(),
        added: NOW,
        retired: None,
        slots,
        sequence: 0,
        transfer: None,
        shared: Vec::new(),
    }
}

fn diversified() -> NewKeyVersion {
    let origin =
        KeyOrigin::Diversified { root_version: 1, derivation: KeyDerivation::Sp800108Cmac, length: KeyLength::Aes128 };
    NewKeyVersion { state: KeyState::Active, origin, wrapped: None, fingerprint: None }
}

fn imported(key_type: KeyType) -> NewKeyVersion {
    let wrapped = WrappedKey::new(key_type, 1, Bytes::from(vec![0xA5; 24])).unwrap();
    NewKeyVersion {
        state: KeyState::Active,
        origin: KeyOrigin::Imported,
        wrapped: Some(wrapped),
        fingerprint: Some([0xF1; 16]),
    }
}

/// A meter as it stands after its first session.
fn in_use(types: &[KeyType], new: impl Fn(KeyType) -> NewKeyVersion, shipped: bool) -> Meter {
    let slots = types.iter().map(|key_type| {
        let mut slot = Slot::new(SecuritySetupId::DEFAULT, *key_type);
        let number = slot.add_version(new(*key_type), NOW).unwrap();
        let version = slot.version_mut(number).unwrap();
        if shipped {
            version.expose(Party::Vendor, ExposureReason::Shipment, NOW);
        }
        if [KeyType::GUEK, KeyType::GAK].contains(key_type) {
            version.expose(Party::Principal(principal("hes-north")), ExposureReason::Grant, NOW.after(86_400_000));
        }
        if *key_type == KeyType::GUEK {
            let client = CounterKey::ClientTitle(SystemTitle::parse("4D4D4D0000000001").unwrap());
            version
                .counters_mut()
                .unwrap()
                .reserve(
                    client,
                    CounterUse::Lease,
                    WriterId::from_octets(&[7; 16]).unwrap(),
                    ChunkSize::DEFAULT,
                    0,
                    CounterJump::new(9),
                )
                .unwrap();
        }
        slot
    });
    meter(Slots::new(slots.collect()).unwrap())
}

const FOUR: [KeyType; 4] = [KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK];

#[test]
fn rows_are_small() {
    let two = in_use(&[KeyType::GUEK, KeyType::GAK], |_| diversified(), false).to_row().unwrap();
    let four = in_use(&FOUR, imported, true).to_row().unwrap();
    println!("two diversified keys: {} octets; four imported keys: {} octets", two.len(), four.len());
    assert!(two.len() <= 152, "{}", two.len());
    assert!(four.len() <= 370, "{}", four.len());
}

#[test]
fn a_cut_row_is_refused_at_every_octet() {
    for meter in [in_use(&FOUR, imported, true), in_use(&[KeyType::GUEK, KeyType::GAK], |_| diversified(), false)] {
        let body = Bytes::from(meter.to_row().unwrap());
        assert_eq!(Meter::from_row(title(), &island(), body.clone()).unwrap(), meter);
        for length in 0..body.len() {
            assert!(Meter::from_row(title(), &island(), body.slice(..length)).is_err(), "cut to {length}");
        }
    }
}

#[test]
fn what_was_used_of_quotas_comes_back_whole_or_not_at_all() {
    let mut used = QuotaUse::new(principal("hes-1"));
    let hour = QuotaHour::of(NOW);
    for (quota, limit) in [
        ("supply-control", QuotaLimit::new(10, Some(5)).unwrap()),
        ("image-transfer", QuotaLimit::new(500, None).unwrap()),
    ] {
        for meter in ["4B414D0000000002", "4B414D0000000001"] {
            used.count(&QuotaName::parse(quota).unwrap(), limit, hour, SystemTitle::parse(meter).unwrap(), 2).unwrap();
        }
    }
    let body = Bytes::from(used.to_row());
    assert!(body.len() < 80, "{}", body.len());
    assert_eq!(QuotaUse::from_row(principal("hes-1"), body.clone()).unwrap(), used);
    for length in 0..body.len() {
        assert!(QuotaUse::from_row(principal("hes-1"), body.slice(..length)).is_err(), "cut to {length}");
    }
}

#[test]
fn an_invitation_comes_back_whole_or_not_at_all() {
    let handheld = PrincipalId::new(island(), Role::Handheld, "h-17").unwrap();
    let pending = Invitation {
        handheld: handheld.clone(),
        technician: PersonName::parse("Tom Field").unwrap(),
        client_titles: vec![title()],
        occasion: Occasion::First,
        code_id: CodeId([3; 6]),
        code_sha256: [4; 32],
        invited_by: PrincipalId::new(island(), Role::Officer, "ada").unwrap(),
        invited: NOW,
        expires: NOW.after(3_600_000),
        wrong_codes: 2,
        end: None,
    };
    let device = EnrolledDevice {
        time: NOW.after(5),
        tls_key_sha256: [5; 32],
        transport_key_sha256: [6; 32],
        certificate: Bytes::from_static(b"der"),
        transport_certificate: Bytes::from_static(b"another"),
    };
    let ends = [
        None,
        Some(InvitationEnd::Used(device)),
        Some(InvitationEnd::Withdrawn(NOW.after(6))),
        Some(InvitationEnd::WrongCodes(NOW.after(7))),
    ];
    for (end, occasion) in
        ends.into_iter().zip([Occasion::First, Occasion::HandOver, Occasion::First, Occasion::HandOver])
    {
        let invitation = Invitation { end, occasion, ..pending.clone() };
        let body = Bytes::from(invitation.to_row().unwrap());
        assert_eq!(Invitation::from_row(handheld.clone(), body.clone()).unwrap(), invitation);
        for length in 0..body.len() {
            assert!(Invitation::from_row(handheld.clone(), body.slice(..length)).is_err(), "cut to {length}");
        }
    }
    let officer = PrincipalId::new(island(), Role::Officer, "ada").unwrap();
    assert!(Invitation { handheld: officer, ..pending.clone() }.to_row().is_err());
    assert!(Invitation { expires: NOW, ..pending }.to_row().is_err());
}

#[test]
fn what_breaks_an_invariant_is_not_written() {
    let right = in_use(&FOUR, imported, true);
    assert!(Meter { serial: String::new(), ..right.clone() }.to_row().is_err());
    assert!(Meter { batch: "b".repeat(65), ..right.clone() }.to_row().is_err());
    for groups in [vec![GroupId(2), GroupId(1)], vec![GroupId(1), GroupId(1)], vec![GroupId(0)]] {
        assert!(Meter { class: MeterClass { groups, ..right.class.clone() }, ..right.clone() }.to_row().is_err());
    }
}

#[test]
fn a_retired_meter_stays_retired() {
    let mut meter = in_use(&FOUR, imported, true);
    meter.set_status(MeterStatus::Quarantined).unwrap();
    assert!(!meter.class.status.may_grant());
    meter.set_status(MeterStatus::InService).unwrap();
    assert!(meter.set_status(MeterStatus::Retired).is_err(), "retiring is an act of its own");
    meter.retire(NOW.after(5)).unwrap();
    meter.retire(NOW.after(9)).unwrap();
    assert_eq!(meter.retired, Some(NOW.after(5)));
    assert_eq!(Meter::from_row(title(), &island(), meter.to_row().unwrap().into()).unwrap(), meter);
    // The status and the time belong together.
    let without = Meter { retired: None, ..meter.clone() };
    assert!(without.to_row().is_err());
    assert!(!meter.class.status.may_grant());
    assert!(
        MeterStatus::ALL
            .into_iter()
            .filter(|status| *status != MeterStatus::Retired)
            .all(|status| meter.set_status(status).is_err())
    );
    assert!(
        meter.slots.iter().all(|slot| slot.active().is_none() && slot.candidates().count() == 1),
        "I3: what it may hold stays"
    );
}

#[test]
fn groups_device_types_principals_and_the_island_come_back() {
    let slots = in_use(&[KeyType::GBEK], imported, true).slots;
    let mut group =
        Group { slots: slots.clone(), ..Group::new(GroupId(3), "north".to_owned(), SecuritySuite::Suite1, NOW) };
    let row = group.to_row().unwrap();
    assert_eq!(Group::from_row(group.id, &island(), row.clone().into()).unwrap(), group);
    group.switch_at = SwitchThreshold::new(80).unwrap();
    let slot = group.slots.iter().next().unwrap();
    let (setup, version) = (slot.setup(), slot.versions()[0].number());
    group.roll_out(setup, KeyType::GBEK, version, Some(CampaignId::from_octets(&[7; 16]).unwrap()), NOW.after(5));
    group.note_members(
        setup,
        KeyType::GBEK,
        version,
        MemberCounts { members: 5, acknowledged: 4, unacknowledged: 1 },
        NOW.after(9),
    );
    assert_eq!(group.rotation(setup, KeyType::GBEK).unwrap().reached, Some(NOW.after(9)));
    assert_eq!(Group::from_row(group.id, &island(), group.to_row().unwrap().into()).unwrap(), group);
    group.rotations[0].version = KeyVersionNumber::new(9).unwrap();
    assert!(
        Group::from_row(group.id, &island(), group.to_row().unwrap().into()).is_err(),
        "a version that the group does not have"
    );

    let device_type = DeviceType {
        id: DeviceTypeId(4),
        vendor: FlagId::parse("KAM").unwrap(),
        name: "omnia".to_owned(),
        profile: DeviceProfileName::parse("generic-suite0").unwrap(),
        added: NOW,
        slots,
    };
    assert_eq!(
        DeviceType::from_row(device_type.id, &island(), device_type.to_row().unwrap().into()).unwrap(),
        device_type
    );

    let certificate = PrincipalCertificate {
        key_sha256: Some([4; 32]),
        enrolment: Enrolment::OnePerson,
        issued_by: Some(PrincipalId::new(island(), Role::Officer, "bo").unwrap()),
        ..PrincipalCertificate::unrecorded(Bytes::from_static(&[1; 20]), [2; 32], NOW)
    };
    let mut point = [5; 65];
    point[0] = 4;
    let officer = Principal {
        id: PrincipalId::new(island(), Role::Officer, "ada").unwrap(),
        revision: 7,
        status: PrincipalStatus::Enabled,
        certificates: vec![certificate.clone()],
        transport: Some(TransportCertificate {
            certificate: Bytes::from_static(b"der"),
            sha256: [3; 32],
            public_point: point,
        }),
        client_titles: vec![title()],
        person: Some(PersonName::parse("Ada Lovelace").unwrap()),
        assurance: None,
        shipment_key: None,
        added: NOW,
    };
    let manufacturer = Principal {
        id: PrincipalId::new(island(), Role::Manufacturer, "kam").unwrap(),
        person: None,
        shipment_key: Some(Bytes::from_static(b"spki")),
        ..officer.clone()
    };
    // Only a handheld has an assurance. In rows of earlier versions it has none.
    for assurance in [Some(Assurance::Software), Some(Assurance::Hardware), None] {
        let id = PrincipalId::new(island(), Role::Handheld, "h-17").unwrap();
        let handheld = Principal { id: id.clone(), assurance, ..officer.clone() };
        assert_eq!(Principal::from_row(id, handheld.to_row().unwrap().into()).unwrap(), handheld);
    }
    assert!(Principal { assurance: Some(Assurance::Hardware), ..officer.clone() }.to_row().is_err());
    assert_eq!(
        Principal::from_row(manufacturer.id.clone(), manufacturer.to_row().unwrap().into()).unwrap(),
        manufacturer
    );
    assert!(Principal { shipment_key: manufacturer.shipment_key.clone(), ..officer.clone() }.to_row().is_err());
    assert_eq!(Principal::from_row(officer.id.clone(), officer.to_row().unwrap().into()).unwrap(), officer);
    assert!(officer.accepts(&[2; 32], UnixMillis(NOW.0 - 1)));
    assert!(!officer.accepts(&[2; 32], NOW) && !officer.accepts(&[9; 32], UnixMillis(0)));
    assert!(!Principal { status: PrincipalStatus::Disabled, ..officer.clone() }.accepts(&[2; 32], UnixMillis(0)));
    // I6: an officer without a person would count as nobody.
    assert!(Principal { person: None, ..officer.clone() }.to_row().is_err());
    assert!(Principal { client_titles: vec![title(), title()], ..officer.clone() }.to_row().is_err());
    assert!(Principal { certificates: vec![certificate.clone(), certificate], ..officer }.to_row().is_err());

    let roots = |class| ClassRoots {
        class,
        diversification: vec![
            DiversificationRoot { version: 1, derivation: KeyDerivation::AesCbcEncryptData },
            DiversificationRoot { version: 2, derivation: KeyDerivation::Sp800108Cmac },
        ],
        storage_kek_version: 1,
    };
    let island = Island {
        name: island(),
        kind: IslandKind::Development,
        classes: KeyClass::WITH_ROOTS.map(roots).to_vec(),
        seal_key_version: 1,
        escrow_fingerprint: Some([6; 32]),
        history: DatabaseHistory {
            timeline: Some(Timeline { cluster: -7, number: 2 }),
            restores: 1,
            jump: CounterJump::new(1 << 24),
        },
        ledger: RootLedger::default(),
        principals_added: 3,
        exposures_indexed: true,
        created: NOW,
    };
    assert_eq!(Island::from_row(island.name.clone(), island.to_row().into()).unwrap(), island);
    assert_eq!(island.roots(KeyClass::Session).unwrap().current().unwrap().version, 2);
    let twice = Island { classes: vec![roots(KeyClass::Kek), roots(KeyClass::Kek)], ..island };
    assert!(Island::from_row(twice.name.clone(), twice.to_row().into()).is_err());
}

/// Something done to a slot. What the slot refuses is left undone.
#[derive(Clone, Debug)]
enum Change {
    Add { origin: u8, active: bool, long: bool },
    Transition { version: u32, state: usize },
    Candidate { version: u32 },
    Prove { version: u32 },
    Release,
    Expose { version: u32, who: u8, later: i64 },
    Reserve { version: u32, key: u8 },
    Floor { version: u32, key: u8, floor: u64 },
    LeaveTo { version: u32, key: u8 },
    Join { version: u32 },
}

fn change() -> impl Strategy<Value = Change> {
    let version = 1..6u32;
    prop_oneof![
        (0..4u8, any::<bool>(), any::<bool>()).prop_map(|(origin, active, long)| Change::Add { origin, active, long }),
        (version.clone(), 0..6usize).prop_map(|(version, state)| Change::Transition { version, state }),
        version.clone().prop_map(|version| Change::Candidate { version }),
        version.clone().prop_map(|version| Change::Prove { version }),
        Just(Change::Release),
        (version.clone(), 0..5u8, -1_000_000_000_000..i64::MAX).prop_map(|(version, who, later)| Change::Expose {
            version,
            who,
            later
        }),
        (version.clone(), 0..3u8).prop_map(|(version, key)| Change::Reserve { version, key }),
        (version.clone(), 0..3u8, 0..1u64 << 33).prop_map(|(version, key, floor)| Change::Floor {
            version,
            key,
            floor
        }),
        (version.clone(), 0..3u8).prop_map(|(version, key)| Change::LeaveTo { version, key }),
        version.prop_map(|version| Change::Join { version }),
    ]
}

fn apply(slot: &mut Slot, change: &Change) {
    let number = |version: u32| KeyVersionNumber::new(version).unwrap();
    let key = |key: u8| match SystemTitle::from_octets(&[0, 0, 0, 0, 0, 0, 0, key]) {
        Ok(title) => CounterKey::ClientTitle(title),
        Err(_) => CounterKey::Setup,
    };
    let counters = |slot: &mut Slot, version, change: &dyn Fn(&mut Counters)| {
        if let Ok(version) = slot.version_mut(number(version))
            && let Ok(counters) = version.counters_mut()
        {
            change(counters);
        }
    };
    match *change {
        Change::Add { origin, active, long } => {
            let length = if long { KeyLength::Aes256 } else { KeyLength::Aes128 };
            let derivation = if origin == 0 { KeyDerivation::Sp800108Cmac } else { KeyDerivation::AesCbcEncryptData };
            let (origin, wrapped) = match origin {
                0 | 1 => (KeyOrigin::Diversified { root_version: 3, derivation, length }, None),
                2 => (KeyOrigin::Generated, Some(length)),
                _ => (KeyOrigin::Imported, Some(length)),
            };
            let wrapped = wrapped.map(|length| {
                WrappedKey::new(slot.key_type(), 2, Bytes::from(vec![1; length.wrapped_octets()])).unwrap()
            });
            let state = if active { KeyState::Active } else { KeyState::PreActive };
            let _ = slot.add_version(
                NewKeyVersion { state, origin, wrapped, fingerprint: long.then_some([4; 16]) },
                NOW.after(5),
            );
        }
        Change::Transition { version, state } => {
            drop(slot.transition(number(version), KeyState::ALL[state], NOW.after(6)))
        }
        Change::Candidate { version } => drop(slot.mark_left(number(version), 1, KeyVersionNumber::FIRST)),
        Change::Prove { version } => drop(slot.confirm(number(version), 2, Evidence::Proven, NOW.after(7))),
        Change::Release => drop(slot.release_candidates(1, NOW.after(9))),
        Change::Expose { version, who, later } => {
            let party = match who {
                0 => Party::Vendor,
                1 => Party::Anyone,
                number => Party::Principal(principal(&format!("p{number}"))),
            };
            if let Ok(version) = slot.version_mut(number(version)) {
                version.expose(party, ExposureReason::ALL[usize::from(who)], UnixMillis(later));
            }
        }
        Change::Reserve { version, key: which } => counters(slot, version, &|counters| {
            let chunk = ChunkSize::new(NonZeroU32::new(1 << 30).unwrap());
            let counter_use = if version % 2 == 0 { CounterUse::Lease } else { CounterUse::Frames };
            if let Ok(reserved) = counters.reserve(
                key(which),
                counter_use,
                WriterId::from_octets(&[8; 16]).unwrap(),
                chunk,
                0,
                CounterJump::NONE,
            ) {
                let _ = counters.count_into_hour(reserved, counter_use, CounterCap::new(u32::MAX).unwrap(), NOW);
            }
        }),
        Change::Floor { version, key: which, floor } => {
            counters(slot, version, &|counters| counters.raise_floor(key(which), floor, None).unwrap())
        }
        Change::LeaveTo { version, key: which } => {
            counters(slot, version, &|counters| counters.leave_to(key(which), principal("old-hes")))
        }
        Change::Join { version } => {
            drop(slot.join_domain(number(version), &mut CounterDomain::new(CounterDomainId([9; 16]))))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn whatever_is_done_to_a_meter_it_comes_back(
        changes in prop::collection::vec((0..3usize, change()), 0..40),
        groups in prop::collection::btree_set(1..u64::MAX, 0..5),
        assigned in any::<bool>(),
    ) {
        let ids = [(KeyType::KEK, [0, 0]), (KeyType::GUEK, [0, 0]), (KeyType::from_number(63).unwrap(), [1, 255])];
        let mut slots = ids.map(|(key_type, setup)| Slot::new(SecuritySetupId::from_octets(setup), key_type));
        for (at, change) in &changes {
            apply(&mut slots[*at], change);
            // I3: whatever happened, no candidate is destroyed and nothing else than these two
            // states is granted.
            for slot in &slots {
                prop_assert!(slot.candidates().all(|version| version.state() != KeyState::Destroyed));
                prop_assert!(slot.grantable().all(|one| matches!(one.version.state(), KeyState::Active | KeyState::Deactivated)));
            }
        }
        // A slot without versions is not stored.
        let slots = slots.into_iter().filter(|slot| !slot.versions().is_empty()).collect();
        let mut meter = meter(Slots::new(slots).unwrap());
        meter.class.groups = groups.into_iter().map(GroupId).collect();
        if !assigned {
            meter.class.head_end = None;
        }
        let body = meter.to_row().unwrap();
        let read = Meter::from_row(title(), &island(), body.clone().into()).unwrap();
        prop_assert_eq!(&read, &meter);
        prop_assert_eq!(read.to_row().unwrap(), body);
    }

    #[test]
    fn random_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..400)) {
        let body = Bytes::from(octets.clone());
        let _ = Meter::from_row(title(), &island(), body.clone());
        let _ = Group::from_row(GroupId(1), &island(), body.clone());
        let _ = DeviceType::from_row(DeviceTypeId(1), &island(), body.clone());
        let _ = CounterDomain::from_row(CounterDomainId([1; 16]), &island(), body.clone());
        let _ = Principal::from_row(principal("p"), body.clone());
        let _ = QuotaUse::from_row(principal("p"), body.clone());
        let _ = Invitation::from_row(PrincipalId::new(island(), Role::Handheld, "h").unwrap(), body.clone());
        let _ = Island::from_row(island(), body);
        let _ = RowSeal::from_octets(&octets);
        let _ = ShipmentHeader::parse(&octets);
        let _ = ShipmentTrailer::parse(&octets);
        let _ = DeviceProfile::parse(&String::from_utf8_lossy(&octets));
    }

    #[test]
    fn an_edited_row_is_refused_or_read_whole(at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut body = in_use(&FOUR, imported, true).to_row().unwrap();
        *at.get_mut(&mut body) = value;
        if let Ok(read) = Meter::from_row(title(), &island(), body.into()) {
            // What was accepted keeps every invariant, so it can be written again.
            let again = read.to_row().unwrap();
            prop_assert_eq!(Meter::from_row(title(), &island(), again.into()).unwrap(), read);
        }
    }
}
