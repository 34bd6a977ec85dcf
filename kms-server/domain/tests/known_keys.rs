//! What a party could open: known answers for each thing that follows from another, and what must
//! hold for all meters.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use kms_domain::*;
use proptest::prelude::*;

const NOW: UnixMillis = UnixMillis(1_795_165_200_000);
const SETUP: SecuritySetupId = SecuritySetupId::DEFAULT;
const OTHER_SETUP: SecuritySetupId = SecuritySetupId::from_octets([1, 0]);
const NOBODY: &[(KeyType, u32, &str)] = &[];

fn number(number: u32) -> KeyVersionNumber {
    KeyVersionNumber::new(number).unwrap()
}

fn principal(name: &str) -> Party {
    Party::Principal(PrincipalId::parse(&format!("urn:meterkms:north:handheld:{name}")).unwrap())
}

fn new(key_type: KeyType, state: KeyState) -> NewKeyVersion {
    let wrapped = WrappedKey::new(key_type, 1, Bytes::from_static(&[0; 24])).unwrap();
    NewKeyVersion { state, origin: KeyOrigin::Generated, wrapped: Some(wrapped), fingerprint: None }
}

/// A meter with version 1 of each key in two security setups.
fn meter() -> Meter {
    let mut slots = Vec::new();
    for setup in [SETUP, OTHER_SETUP] {
        for key_type in [KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK] {
            let mut slot = Slot::new(setup, key_type);
            slot.add_version(new(key_type, KeyState::Active), NOW).unwrap();
            slots.push(slot);
        }
    }
    Meter {
        title: SystemTitle::from_octets(b"KAM\0\0\0\0\x01").unwrap(),
        class: MeterClass {
            vendor: FlagId::parse("KAM").unwrap(),
            profile: DeviceProfileName::parse("generic-suite0").unwrap(),
            status: MeterStatus::InService,
            groups: Vec::new(),
            head_end: None,
        },
        serial: "1".to_owned(),
        suite: SecuritySuite::Suite0,
        batch: String::new(),
        added: NOW,
        retired: None,
        slots: Slots::new(slots).unwrap(),
        sequence: 0,
        transfer: None,
        shared: Vec::new(),
    }
}

fn slot(meter: &mut Meter, key_type: KeyType) -> &mut Slot {
    meter.slots.get_mut(SETUP, key_type).unwrap()
}

fn expose(meter: &mut Meter, key_type: KeyType, version: u32, party: Party, reason: ExposureReason, after: i64) {
    assert!(slot(meter, key_type).version_mut(number(version)).unwrap().expose(party, reason, NOW.after(after)));
}

/// A new version leaves under a version of the KEK. It is shown at the next moment, if at all.
fn deliver(meter: &mut Meter, key_type: KeyType, kek: u32, shown: bool) -> u32 {
    let moment = meter.sequence + 1;
    meter.sequence += 2;
    let slot = slot(meter, key_type);
    let version = slot.add_version(new(key_type, KeyState::PreActive), NOW.after(moment.into())).unwrap();
    slot.mark_left(version, moment, number(kek)).unwrap();
    if shown {
        slot.confirm(version, moment + 1, Evidence::Proven, NOW.after(moment.into())).unwrap();
    }
    version.number()
}

/// What the party knows in the default setup: key type, version, whether it is open.
fn known(meter: &Meter, party: &Party) -> Vec<(KeyType, u32, &'static str)> {
    let keys = meter.known_keys(Some(party), &SharedExposures::new());
    assert!(keys.iter().all(|key| key.party == *party && !key.ways.is_empty()));
    keys.iter()
        .filter(|key| key.setup == SETUP)
        .map(|key| (key.key_type, key.version.number(), key.reach.name()))
        .collect()
}

#[test]
fn a_gak_follows_from_the_guek_that_it_was_used_with_and_nothing_follows_from_a_gak() {
    let (mut meter, hh, hes) = (meter(), principal("hh-7"), principal("hh-8"));
    expose(&mut meter, KeyType::GUEK, 1, hh.clone(), ExposureReason::Bundle, 5);
    expose(&mut meter, KeyType::GAK, 1, hes.clone(), ExposureReason::Grant, 7);
    assert_eq!(known(&meter, &hh), [(KeyType::GUEK, 1, "open"), (KeyType::GAK, 1, "open")]);
    assert_eq!(known(&meter, &hes), [(KeyType::GAK, 1, "open")]);
    assert_eq!(known(&meter, &Party::Vendor), NOBODY);
    let keys = meter.known_keys(None, &SharedExposures::new());
    let gak = keys.iter().find(|key| key.key_type == KeyType::GAK && key.party == hh).unwrap();
    assert_eq!(
        (gak.ways.as_slice(), gak.since),
        ([KnownBy::Frames(KeyType::GUEK, number(1))].as_slice(), NOW.after(5))
    );
    assert_eq!(gak.ways[0].reason(), "frames-under-exposed-key");
    assert!(keys.iter().all(|key| key.setup == SETUP), "another security setup has keys of its own");
    // A broadcast key gives it away as well.
    let other = principal("hh-9");
    expose(&mut meter, KeyType::GBEK, 1, other.clone(), ExposureReason::Grant, 0);
    assert_eq!(known(&meter, &other), [(KeyType::GBEK, 1, "open"), (KeyType::GAK, 1, "open")]);
}

#[test]
fn after_both_keys_were_rotated_nothing_is_open_if_the_guek_went_first() {
    let (mut meter, hh) = (meter(), principal("hh-7"));
    for key_type in [KeyType::GUEK, KeyType::GAK] {
        expose(&mut meter, key_type, 1, hh.clone(), ExposureReason::Bundle, 0);
    }
    let mut first = meter.clone();
    deliver(&mut meter, KeyType::GUEK, 1, true);
    deliver(&mut meter, KeyType::GAK, 1, true);
    assert_eq!(known(&meter, &hh), [(KeyType::GUEK, 1, "replaced"), (KeyType::GAK, 1, "replaced")]);
    // The retention time has passed.
    meter.expire_keys(Retention::from_days(0).unwrap(), NOW.after(1_000));
    let keys = meter.known_keys(Some(&hh), &SharedExposures::new());
    assert_eq!(keys.iter().map(|key| key.reach.name()).collect::<Vec<_>>(), ["closed", "closed"]);
    assert!(keys.iter().all(|key| key.reach.until().is_some_and(|until| until <= NOW.after(1_000))));

    // A GAK that is rotated first is used with the known GUEK, and known again.
    deliver(&mut first, KeyType::GAK, 1, true);
    deliver(&mut first, KeyType::GUEK, 1, true);
    let again = [(KeyType::GUEK, 1, "replaced"), (KeyType::GAK, 1, "replaced"), (KeyType::GAK, 2, "open")];
    assert_eq!(known(&first, &hh), again);
}

#[test]
fn what_left_and_was_not_shown_is_open_and_so_is_what_the_meter_went_back_to() {
    let (mut meter, hh) = (meter(), principal("hh-7"));
    expose(&mut meter, KeyType::GUEK, 1, hh.clone(), ExposureReason::Grant, 0);
    deliver(&mut meter, KeyType::GUEK, 1, false);
    // The meter may hold either.
    assert_eq!(known(&meter, &hh)[0], (KeyType::GUEK, 1, "open"));
    expose(&mut meter, KeyType::GUEK, 2, hh.clone(), ExposureReason::TransferUnderExposedKek, 0);
    assert_eq!(known(&meter, &hh)[1], (KeyType::GUEK, 2, "open"));
    let moment = meter.sequence;
    slot(&mut meter, KeyType::GUEK).confirm(number(2), moment, Evidence::Proven, NOW).unwrap();
    assert_eq!(known(&meter, &hh)[0], (KeyType::GUEK, 1, "replaced"));
    // It goes back to version 1, and may return.
    slot(&mut meter, KeyType::GUEK).confirm(number(1), moment + 1, Evidence::Proven, NOW).unwrap();
    assert_eq!(known(&meter, &hh)[..2], [(KeyType::GUEK, 1, "open"), (KeyType::GUEK, 2, "open")]);
}

#[test]
fn a_kek_gives_away_what_left_under_it_however_late_it_became_known() {
    let (mut meter, thief) = (meter(), principal("hh-7"));
    deliver(&mut meter, KeyType::GUEK, 1, true);
    deliver(&mut meter, KeyType::KEK, 1, true);
    deliver(&mut meter, KeyType::GAK, 2, true);
    deliver(&mut meter, KeyType::GBEK, 2, true);
    // No report: the ledger says it of the KEK alone.
    expose(&mut meter, KeyType::KEK, 1, thief.clone(), ExposureReason::Grant, 90);
    assert_eq!(
        known(&meter, &thief),
        [
            (KeyType::KEK, 1, "replaced"),
            (KeyType::KEK, 2, "open"),
            (KeyType::GUEK, 2, "open"),
            (KeyType::GBEK, 2, "open"),
            // Used with GUEK version 2.
            (KeyType::GAK, 1, "replaced"),
            (KeyType::GAK, 2, "open"),
        ]
    );
    let keys = meter.known_keys(Some(&thief), &SharedExposures::new());
    assert_eq!(keys[1].ways, [KnownBy::Kek(number(1))]);
    assert_eq!(
        (keys[1].ways[0].reason(), keys[1].ways[0].through()),
        ("transfer-under-exposed-kek", Some((KeyType::KEK, number(1))))
    );
    assert!(keys.iter().all(|key| key.since == NOW.after(90)));
}

#[test]
fn who_knows_an_equal_key_knows_this_one_and_what_follows_from_it() {
    let (mut meter, hes) = (meter(), principal("hh-7"));
    let mut domain = CounterDomain::new(CounterDomainId([9; 16]));
    slot(&mut meter, KeyType::GUEK).join_domain(number(1), &mut domain).unwrap();
    domain.learn(&[Exposure { party: hes.clone(), since: NOW, reason: ExposureReason::Grant }]);
    let shared = SharedExposures::from([(domain.id, domain.exposures.clone())]);
    let keys = meter.known_keys(Some(&hes), &shared);
    let ways: Vec<_> = keys.iter().map(|key| (key.key_type, key.ways.clone())).collect();
    assert_eq!(
        ways,
        [
            (KeyType::GUEK, vec![KnownBy::EqualKey(ExposureReason::Grant)]),
            (KeyType::GAK, vec![KnownBy::Frames(KeyType::GUEK, number(1))])
        ]
    );
    // The index of the meter's own row says nothing of that party; it says which value the meter
    // has, and the domain's row says who knows it.
    let value = |slots| IndexedExposure {
        party: IndexedParty::KeyValue(domain.id),
        slots,
        open: 0,
        newest: UnixMillis::default(),
    };
    assert_eq!(meter.indexed_exposures(), [value(1)]);
    let of_domain = domain.indexed_exposures();
    assert_eq!((of_domain.len(), &of_domain[0].party), (1, &IndexedParty::of(&hes).unwrap()));
    assert_eq!(IndexedParty::of(&Party::Vendor), None);
}

#[test]
fn a_retired_meter_has_nothing_open() {
    let (mut meter, hh) = (meter(), principal("hh-7"));
    expose(&mut meter, KeyType::GUEK, 1, hh.clone(), ExposureReason::Bundle, 0);
    assert_eq!(meter.indexed_exposures()[0].open, 2);
    meter.retire(NOW.after(50)).unwrap();
    let keys = meter.known_keys(Some(&hh), &SharedExposures::new());
    assert!(keys.iter().all(|key| key.reach == Reach::Closed(NOW.after(50))));
    assert_eq!((meter.indexed_exposures()[0].slots, meter.indexed_exposures()[0].open), (2, 0));
}

#[test]
fn a_groups_keys_have_times_and_no_moments() {
    let anyone = Party::Anyone;
    let mut slots = Vec::new();
    for key_type in [KeyType::GBEK, KeyType::GAK] {
        let mut slot = Slot::new(SETUP, key_type);
        slot.add_version(new(key_type, KeyState::Active), NOW).unwrap();
        slots.push(slot);
    }
    let mut group = Group::new(GroupId(3), "north".to_owned(), SecuritySuite::Suite0, NOW);
    group.slots = Slots::new(slots).unwrap();
    let gbek = |group: &mut Group| {
        let slot = group.slots.get_mut(SETUP, KeyType::GBEK).unwrap();
        slot.version_mut(number(1)).unwrap().expose(Party::Anyone, ExposureReason::MemberLeft, NOW);
    };
    gbek(&mut group);
    let known = |group: &Group| -> Vec<(KeyType, u32, &'static str)> {
        let keys = group.known_keys(Some(&anyone), &SharedExposures::new());
        keys.iter().map(|key| (key.key_type, key.version.number(), key.reach.name())).collect()
    };
    assert_eq!(known(&group), [(KeyType::GBEK, 1, "open"), (KeyType::GAK, 1, "open")]);
    let rotate = |group: &mut Group, key_type, at: i64| {
        let begun = group.begin_rotation(SETUP, key_type, &new(key_type, KeyState::PreActive), None, NOW.after(at));
        group.switch(SETUP, key_type, begun.unwrap().version, true, NOW.after(at)).unwrap();
    };
    rotate(&mut group, KeyType::GBEK, 10);
    assert_eq!(known(&group)[0], (KeyType::GBEK, 1, "replaced"));
    // The former GBEK is for members that are left behind: their broadcasts are authenticated too.
    rotate(&mut group, KeyType::GAK, 20);
    assert_eq!(known(&group)[2], (KeyType::GAK, 2, "open"));
    // Without it there are no such broadcasts any more.
    group.expire_keys(Retention::from_days(0).unwrap(), NOW.after(30));
    rotate(&mut group, KeyType::GAK, 40);
    assert!(known(&group).iter().all(|(key_type, version, _)| (*key_type, *version) != (KeyType::GAK, 3)));
}

/// One act on a meter.
#[derive(Clone, Debug)]
enum Step {
    Expose(KeyType, u32, bool),
    Deliver(KeyType, bool),
    Report(KeyType),
    Expire,
    Retire,
}

fn step() -> impl Strategy<Value = Step> {
    let key_type = || prop::sample::select(vec![KeyType::KEK, KeyType::GUEK, KeyType::GBEK, KeyType::GAK]);
    prop_oneof![
        4 => (key_type(), 1..4_u32, any::<bool>()).prop_map(|(key_type, version, one)| Step::Expose(key_type, version, one)),
        4 => (key_type(), any::<bool>()).prop_map(|(key_type, shown)| Step::Deliver(key_type, shown)),
        1 => key_type().prop_map(Step::Report),
        1 => Just(Step::Expire),
        1 => Just(Step::Retire),
    ]
}

fn take(meter: &mut Meter, step: &Step, at: i64) {
    match step {
        Step::Expose(key_type, version, one) => {
            let party = principal(if *one { "hh-1" } else { "hh-2" });
            if let Ok(version) = slot(meter, *key_type).version_mut(number(*version)) {
                version.expose(party, ExposureReason::Grant, NOW.after(at));
            }
        }
        Step::Deliver(key_type, shown) if meter.retired.is_none() => {
            let kek = meter.slots.get(SETUP, KeyType::KEK).and_then(Slot::held).map_or(1, |kek| kek.number().number());
            deliver(meter, *key_type, kek, *shown);
        }
        Step::Report(key_type) => {
            let held = meter.slots.get(SETUP, *key_type).and_then(Slot::held).map(KeyVersion::number);
            if let Some(held) = held {
                let _ = meter.report_compromise(SETUP, *key_type, held, &Party::Anyone, NOW.after(at));
            }
        }
        Step::Expire => drop(meter.expire_keys(Retention::from_days(0).unwrap(), NOW.after(at))),
        Step::Retire => meter.retire(NOW.after(at)).unwrap(),
        Step::Deliver(..) => {}
    }
}

proptest! {
    /// Whoever knows a key never forgets it, the ledger is a part of what is known, the index
    /// counts what is known, and a row that is indexed as before has the same index.
    #[test]
    fn what_is_known_grows_and_the_index_counts_it(steps in prop::collection::vec(step(), 1..24)) {
        let mut meter = meter();
        for (step, at) in steps.iter().zip(100..) {
            let before = meter.clone();
            take(&mut meter, step, at);
            let known = meter.known_keys(None, &SharedExposures::new());
            for slot in meter.slots.iter() {
                for version in slot.versions() {
                    for exposure in version.exposures() {
                        prop_assert!(known.iter().any(|key| (key.setup, key.key_type, key.version, &key.party)
                            == (slot.setup(), slot.key_type(), version.number(), &exposure.party)
                            && key.since <= exposure.since));
                    }
                }
            }
            let parties = |known: &[KnownKey]| {
                let mut parties: Vec<String> = known.iter().map(|key| key.party.to_string()).collect();
                parties.sort();
                parties.dedup();
                parties
            };
            let earlier = before.known_keys(None, &SharedExposures::new());
            let now = parties(&known);
            prop_assert!(parties(&earlier).iter().all(|party| now.contains(party)), "the index loses no row");
            for entry in meter.indexed_exposures() {
                let of_party = known.iter().filter(|key| IndexedParty::of(&key.party) == Some(entry.party.clone()));
                let mut slots: Vec<_> = of_party.clone().map(|key| (key.setup, key.key_type)).collect();
                slots.dedup();
                let mut open: Vec<_> =
                    of_party.clone().filter(|key| key.reach == Reach::Open).map(|key| (key.setup, key.key_type)).collect();
                open.dedup();
                let newest = of_party.map(|key| key.since).max().unwrap();
                prop_assert_eq!((entry.slots as usize, entry.open as usize, entry.newest), (slots.len(), open.len(), newest));
            }
            let sorted = |mut entries: Vec<IndexedExposure>| {
                entries.sort_by_key(|entry| format!("{entry:?}"));
                entries
            };
            let known_before = before.indexed_exposures();
            let changed = meter.indexed_exposures().into_iter().filter(|entry| !known_before.contains(entry)).collect();
            prop_assert_eq!(sorted(meter.indexed_changes(&before)), sorted(changed));
            // One party alone has the same answer as among all.
            let one = principal("hh-1");
            let alone = meter.known_keys(Some(&one), &SharedExposures::new());
            let among: Vec<_> = known.into_iter().filter(|key| key.party == one).collect();
            prop_assert_eq!(alone, among);
        }
    }
}
