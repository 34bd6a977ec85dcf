//! I3 and retention: whatever happens to a slot and whenever the retention pass runs, nothing that
//! the meter may hold is destroyed before a later version was proven and the retention time has
//! passed; of a retired meter, nothing before the retention time after its retirement, and
//! everything then.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use kms_domain::*;
use proptest::prelude::*;

const START: UnixMillis = UnixMillis(1_795_165_200_000);
const DAY: i64 = 86_400_000;

/// One step. Versions are chosen from those that there are.
#[derive(Clone, Debug)]
enum Step {
    Wait {
        hours: i64,
    },
    Add {
        diversified: bool,
    },
    /// The wrapped form leaves for the meter.
    Leave(usize),
    /// The meter shows that it holds it.
    Prove(usize),
    /// An officer changes the state.
    Change(usize, KeyState),
    Retire,
    Maintain,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let state = prop::sample::select(KeyState::ALL.to_vec());
    let step = prop_oneof![
        6 => (1..60 * 24i64).prop_map(|hours| Step::Wait { hours }),
        4 => any::<bool>().prop_map(|diversified| Step::Add { diversified }),
        5 => (0..8usize).prop_map(Step::Leave),
        5 => (0..8usize).prop_map(Step::Prove),
        2 => (0..8usize, state).prop_map(|(version, state)| Step::Change(version, state)),
        1 => Just(Step::Retire),
        8 => Just(Step::Maintain),
    ];
    prop::collection::vec(step, 0..80)
}

fn new_version(state: KeyState, diversified: bool) -> NewKeyVersion {
    if diversified {
        let origin = KeyOrigin::Diversified {
            root_version: 1,
            derivation: KeyDerivation::Sp800108Cmac,
            length: KeyLength::Aes128,
        };
        return NewKeyVersion { state, origin, wrapped: None, fingerprint: None };
    }
    let wrapped = WrappedKey::new(KeyType::GUEK, 1, Bytes::from_static(&[9; 24])).unwrap();
    NewKeyVersion { state, origin: KeyOrigin::Generated, wrapped: Some(wrapped), fingerprint: None }
}

fn meter() -> Meter {
    let mut slot = Slot::new(SecuritySetupId::DEFAULT, KeyType::GUEK);
    slot.add_version(new_version(KeyState::Active, false), START).unwrap();
    Meter {
        title: SystemTitle::parse("4B414D0000000001").unwrap(),
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
        added: START,
        retired: None,
        slots: Slots::new(vec![slot]).unwrap(),
        sequence: 0,
        transfer: None,
        shared: Vec::new(),
    }
}

/// What the world knows, kept apart from the code under test.
struct World {
    now: UnixMillis,
    /// Versions whose wrapped form left, or that the meter was delivered with.
    left: BTreeSet<KeyVersionNumber>,
    /// When the meter showed each version and it became active.
    proven: BTreeMap<KeyVersionNumber, UnixMillis>,
    retired: Option<UnixMillis>,
}

impl World {
    /// I3, said once more: whether the meter can do without this version.
    fn may_destroy(&self, number: KeyVersionNumber, retention: i64) -> bool {
        if let Some(retired) = self.retired {
            return self.now >= retired.after(retention);
        }
        let later_is_proven =
            self.proven.iter().any(|(later, since)| *later > number && self.now >= since.after(retention));
        !self.left.contains(&number) || later_is_proven
    }
}

fn destroyed(slot: &Slot) -> BTreeSet<KeyVersionNumber> {
    slot.versions().iter().filter(|version| version.state() == KeyState::Destroyed).map(KeyVersion::number).collect()
}

fn slot(meter: &mut Meter) -> &mut Slot {
    meter.slots.get_mut(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_meter_may_hold_is_destroyed(steps in steps(), days in 0..200u32) {
        let retention = Retention::from_days(days).unwrap();
        let mut meter = meter();
        let first = KeyVersionNumber::FIRST;
        let mut world = World { now: START, left: [first].into(), proven: [(first, START)].into(), retired: None };
        for step in steps {
            let chosen = |meter: &Meter, index: usize| {
                let versions = meter.slots.iter().next().unwrap().versions();
                versions.get(index % versions.len()).unwrap().number()
            };
            match step {
                Step::Wait { hours } => world.now = world.now.after(hours * 3_600_000),
                Step::Add { diversified } => {
                    if world.retired.is_none() {
                        slot(&mut meter).add_version(new_version(KeyState::PreActive, diversified), world.now).unwrap();
                    }
                }
                Step::Leave(index) => {
                    let number = chosen(&meter, index);
                    if world.retired.is_none() && slot(&mut meter).mark_left(number, 1, KeyVersionNumber::FIRST).is_ok() {
                        world.left.insert(number);
                    }
                }
                Step::Prove(index) => {
                    let number = chosen(&meter, index);
                    let was_active = slot(&mut meter).active().map(KeyVersion::number) == Some(number);
                    if world.retired.is_none() && slot(&mut meter).confirm(number, 2, Evidence::Proven, world.now) == Ok(Confirmation::Activated) && !was_active {
                        world.proven.insert(number, world.now);
                    }
                }
                Step::Change(index, state) => {
                    let number = chosen(&meter, index);
                    let before = destroyed(slot(&mut meter));
                    // Without a proof nothing becomes active here, and only what never left is
                    // destroyed at once.
                    if state != KeyState::Active && slot(&mut meter).transition(number, state, world.now).is_ok() && state == KeyState::Destroyed {
                        prop_assert!(world.retired.is_some() || world.may_destroy(number, retention.milliseconds()));
                        prop_assert_eq!(destroyed(slot(&mut meter)).len(), before.len() + 1);
                    }
                }
                Step::Retire => {
                    meter.retire(world.now).unwrap();
                    world.retired.get_or_insert(world.now);
                }
                Step::Maintain => maintain(&mut meter, &world, retention)?,
            }
        }
        // Long after everything, a retired meter has no key left.
        world.now = world.now.after(400 * DAY);
        maintain(&mut meter, &world, retention)?;
    }
}

fn maintain(meter: &mut Meter, world: &World, retention: Retention) -> Result<(), TestCaseError> {
    let before = meter.clone();
    let gone = destroyed(slot(meter));
    let expired = meter.expire_keys(retention, world.now);
    prop_assert_eq!(expired.is_empty(), *meter == before, "what is reported is what is changed");
    for number in destroyed(slot(meter)).difference(&gone) {
        prop_assert!(world.may_destroy(*number, retention.milliseconds()), "I3: version {} was destroyed", number);
        prop_assert!(expired.iter().any(|keys| keys.destroyed.contains(number)));
    }
    for version in slot(&mut before.clone()).candidates() {
        let still = slot(meter).version(version.number()).unwrap().candidate();
        prop_assert!(
            still || world.may_destroy(version.number(), retention.milliseconds()),
            "I3: version {} is no candidate any more",
            version.number()
        );
    }
    if world.retired.is_some_and(|retired| world.now >= retired.after(retention.milliseconds())) {
        prop_assert!(
            slot(meter)
                .versions()
                .iter()
                .all(|version| version.state() == KeyState::Destroyed && version.shape().is_none())
        );
        prop_assert_eq!(slot(meter).candidates().count(), 0);
    }
    // A second server finds nothing to do.
    prop_assert!(meter.clone().expire_keys(retention, world.now).is_empty());
    // What is left can be stored and read.
    let row = meter.to_row().unwrap();
    prop_assert_eq!(&Meter::from_row(meter.title, &IslandName::parse("north").unwrap(), row.into()).unwrap(), meter);
    Ok(())
}

#[test]
fn the_retention_time_is_exact() {
    let retention = Retention::from_days(90).unwrap();
    let mut meter = meter();
    let second = slot(&mut meter).add_version(new_version(KeyState::PreActive, true), START).unwrap();
    slot(&mut meter).mark_left(second, 1, KeyVersionNumber::FIRST).unwrap();
    slot(&mut meter).confirm(second, 2, Evidence::Proven, START.after(DAY)).unwrap();
    assert!(meter.expire_keys(retention, START.after(91 * DAY - 1)).is_empty());
    let expired = meter.expire_keys(retention, START.after(91 * DAY));
    let first = vec![KeyVersionNumber::FIRST];
    assert_eq!(
        expired,
        [ExpiredKeys {
            setup: SecuritySetupId::DEFAULT,
            key_type: KeyType::GUEK,
            released: first.clone(),
            destroyed: first
        }]
    );
    assert_eq!(slot(&mut meter).active().map(KeyVersion::number), Some(second));

    meter.retire(START.after(100 * DAY)).unwrap();
    assert!(meter.expire_keys(retention, START.after(190 * DAY - 1)).is_empty());
    let expired = meter.expire_keys(retention, START.after(190 * DAY));
    assert_eq!(
        expired.iter().map(|keys| (keys.released.clone(), keys.destroyed.clone())).collect::<Vec<_>>(),
        [(vec![second], vec![second])]
    );
}

#[test]
fn a_retention_of_more_than_a_century_is_refused() {
    assert!(Retention::from_days(36_526).is_err() && Retention::from_days(u32::MAX).is_err());
    assert_eq!(Retention::from_days(36_525).unwrap().days(), 36_525);
    assert_eq!(Retention::DEFAULT.milliseconds(), 90 * DAY);
}
