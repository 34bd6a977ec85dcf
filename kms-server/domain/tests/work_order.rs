//! Work orders: what they permit, how they change and end, and how their rows come back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use bytes::Bytes;
use kms_domain::*;
use proptest::prelude::*;

const NOW: UnixMillis = UnixMillis(1_795_165_200_000);
const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

fn title(number: u64) -> SystemTitle {
    SystemTitle::from_octets(&(0x4B41_4D00_0000_0000 + number).to_be_bytes()).unwrap()
}

fn person(name: &str) -> PersonName {
    PersonName::parse(name).unwrap()
}

fn account(name: &str) -> PrincipalId {
    PrincipalId::new(IslandName::parse("north").unwrap(), Role::ServiceAccount, name).unwrap()
}

fn id() -> WorkOrderId {
    WorkOrderId::parse("WO-2026-004711").unwrap()
}

fn content(meters: &[u64], tasks: &[WorkOrderTask], from: i64, until: i64) -> Result<WorkOrderContent, ParseError> {
    WorkOrderContent::new(
        person("Ida Berg"),
        meters.iter().map(|number| title(*number)).collect(),
        tasks.iter().copied().collect(),
        (NOW.after(from), NOW.after(until)),
        Place::parse("Hafenstraße 7, cellar").unwrap(),
    )
}

fn salt(octet: u8) -> PlaceSalt {
    PlaceSalt::new([octet; 16])
}

fn order(from: i64, until: i64) -> WorkOrder {
    let content = content(&[3, 1, 2], &[WorkOrderTask::Read, WorkOrderTask::Firmware], from, until).unwrap();
    WorkOrder::new(id(), account("wfm"), content, salt(1), NOW).unwrap()
}

#[test]
fn what_is_ordered_and_nothing_else_is_permitted() {
    let order = order(HOUR, 9 * HOUR);
    let permits = |technician: &str, meter, task, at| order.permits(&person(technician), title(meter), task, at);
    let during = NOW.after(2 * HOUR);
    assert_eq!(permits("Ida Berg", 2, WorkOrderTask::Read, during), Ok(()));
    assert_eq!(permits("ida  berg", 3, WorkOrderTask::Firmware, NOW.after(HOUR)), Ok(()));
    for (technician, meter, task, at, expected) in [
        ("Bo", 2, WorkOrderTask::Read, during, NotOrdered::Technician),
        ("Ida Berg", 4, WorkOrderTask::Read, during, NotOrdered::Meter(title(4))),
        ("Ida Berg", 2, WorkOrderTask::ControlSupply, during, NotOrdered::Task(WorkOrderTask::ControlSupply)),
        ("Ida Berg", 2, WorkOrderTask::Read, NOW, NotOrdered::State(WorkOrderState::Planned)),
        ("Ida Berg", 2, WorkOrderTask::Read, NOW.after(9 * HOUR), NotOrdered::State(WorkOrderState::Expired)),
    ] {
        assert_eq!(permits(technician, meter, task, at), Err(expected));
    }
}

#[test]
fn a_change_names_the_revision_that_it_saw() {
    let mut order = order(0, HOUR);
    let later = content(&[1], &[WorkOrderTask::Read], 0, 2 * HOUR).unwrap();
    assert_eq!(order.change(1, later.clone(), salt(2), NOW), Ok(true));
    assert_eq!(order.change(1, later.clone(), salt(2), NOW), Err(WorkOrderError::OtherRevision { seen: 1, is: 2 }));
    assert_eq!(order.change(2, later.clone(), salt(2), NOW), Ok(false), "the same content is no change");
    assert_eq!(order.revision, 2);
    // Its time is over: it can be ordered again.
    let evening = NOW.after(3 * HOUR);
    assert_eq!(order.state(evening), WorkOrderState::Expired);
    let past = content(&[1], &[WorkOrderTask::Configure], 0, 2 * HOUR).unwrap();
    assert!(matches!(order.change(2, past, salt(2), evening), Err(WorkOrderError::Content(_))));
    let tomorrow = content(&[1], &[WorkOrderTask::Read], DAY, DAY + HOUR).unwrap();
    assert_eq!(order.change(2, tomorrow, salt(2), evening), Ok(true));
    assert_eq!(order.state(evening), WorkOrderState::Planned);
    order.end(false, account("wfm"), evening).unwrap();
    assert_eq!((order.state(evening), order.revision), (WorkOrderState::Cancelled, 4));
    let refused = Err(WorkOrderError::Ended(WorkOrderState::Cancelled));
    assert_eq!(order.change(4, later, salt(2), evening).map(drop), refused);
    assert_eq!(order.end(true, account("wfm"), evening), refused);
}

#[test]
fn a_place_is_removed_some_time_after_the_end() {
    let mut expired = order(0, HOUR);
    assert!(!expired.remove_place(DAY, NOW.after(DAY)) && !expired.content.place.as_str().is_empty());
    assert!(expired.remove_place(DAY, NOW.after(HOUR + DAY)) && expired.content.place.as_str().is_empty());
    assert!(!expired.remove_place(DAY, NOW.after(HOUR + DAY)), "once");
    let mut completed = order(0, 20 * DAY);
    completed.end(true, account("wfm"), NOW).unwrap();
    assert!(completed.remove_place(DAY, NOW.after(DAY)));
    assert_eq!(format!("{:?}", Place::parse("Hafenstraße 7").unwrap()), "Place(14 octets)");
}

/// The digest of a row in audit records has no key. All of the row but place and salt is in the
/// record.
#[test]
fn the_digest_of_a_row_tells_no_place() {
    let digest =
        |order: &WorkOrder| row_digest(1, &RowId::WorkOrder(order.id.clone()), Generation::FIRST, &order.to_row());
    let made = |octet| {
        let content = content(&[1], &[WorkOrderTask::Read], 0, HOUR).unwrap();
        WorkOrder::new(id(), account("wfm"), content, salt(octet), NOW).unwrap()
    };
    let (mut order, other) = (made(1), made(2));
    assert_ne!(digest(&order), digest(&other), "the right place does not fit without the salt");
    // It is no part of what is ordered.
    assert!(order.content == other.content && !order.change(1, other.content, salt(3), NOW).unwrap());
    assert!(!format!("{order:?}").contains("1, 1, 1"));

    // Another place has another salt, the same place the same, and no place none.
    let placed = |meters: &[u64], place: &str| {
        let mut content = content(meters, &[WorkOrderTask::Read], 0, HOUR).unwrap();
        content.place = Place::parse(place).unwrap();
        content
    };
    let has_salt = |order: &WorkOrder, octet: u8| order.to_row().windows(16).any(|octets| octets == [octet; 16]);
    assert!(order.change(1, placed(&[1, 2], "Hafenstraße 7, cellar"), salt(4), NOW).unwrap() && has_salt(&order, 1));
    assert!(order.change(2, placed(&[1, 2], "Hafenstraße 8"), salt(5), NOW).unwrap());
    assert!(has_salt(&order, 5) && !has_salt(&order, 1));
    assert!(order.change(3, placed(&[1, 2], ""), salt(6), NOW).unwrap());
    assert!(!has_salt(&order, 5) && !has_salt(&order, 6));
    assert!(order.change(4, placed(&[1, 2], "Hafenstraße 9"), salt(7), NOW).unwrap() && has_salt(&order, 7));
    assert!(order.remove_place(DAY, NOW.after(HOUR + DAY)) && !has_salt(&order, 7));
    assert_eq!(WorkOrder::from_row(id(), Bytes::from(order.to_row())).unwrap(), order);

    // A row with a place and without a salt is refused: its octets end with field 11.
    let row = made(1).to_row();
    assert!(WorkOrder::from_row(id(), Bytes::from(row[..row.len() - 18].to_vec())).is_err());
}

#[test]
fn bounds_of_an_order() {
    use WorkOrderTask::Read;
    let meters: Vec<u64> = (1..=5_001).collect();
    assert!(content(&meters[..5_000], &[Read], 0, HOUR).is_ok());
    for (meters, tasks, from, until, field) in [
        (&meters[..], &[Read][..], 0, HOUR, "meters"),
        (&[], &[Read], 0, HOUR, "meters"),
        (&[1, 2, 1], &[Read], 0, HOUR, "meters"),
        (&[1], &[], 0, HOUR, "tasks"),
        (&[1], &[Read], HOUR, HOUR, "until"),
        (&[1], &[Read], 0, 31 * DAY + 1, "until"),
    ] {
        assert_eq!(content(meters, tasks, from, until).unwrap_err().what(), field);
    }
    for (from, until, field) in [(-2 * HOUR, -HOUR, "until"), (366 * DAY + 1, 367 * DAY, "from")] {
        let content = content(&[1], &[Read], from, until).unwrap();
        assert_eq!(WorkOrder::new(id(), account("wfm"), content, salt(1), NOW).unwrap_err().what(), field);
    }
    for refused in ["", " x", "x ", "a\nb", &"x".repeat(65)] {
        assert!(WorkOrderId::parse(refused).is_err(), "{refused:?}");
    }
    assert!(WorkOrderId::parse(&"x".repeat(64)).is_ok());
    assert!(Place::parse(&"x".repeat(257)).is_err() && Place::parse("a\tb").is_err() && Place::parse("").is_ok());
}

#[test]
fn a_service_account_has_nothing_that_keys_need() {
    let account = Principal {
        id: account("wfm"),
        revision: 1,
        status: PrincipalStatus::Enabled,
        certificates: Vec::new(),
        transport: None,
        client_titles: Vec::new(),
        person: None,
        assurance: None,
        shipment_key: None,
        added: NOW,
    };
    let row = account.to_row().unwrap();
    assert_eq!(Principal::from_row(account.id.clone(), row.into()).unwrap(), account);
    let titled = Principal { client_titles: vec![title(1)], ..account.clone() };
    let transport =
        TransportCertificate { certificate: Bytes::from_static(b"x"), sha256: [1; 32], public_point: [4; 65] };
    assert!(titled.to_row().is_err() && Principal { transport: Some(transport), ..account }.to_row().is_err());
}

/// One step in the life of an order.
#[derive(Clone, Debug)]
enum Step {
    Wait(i64),
    Change { lag: u32, meters: Vec<u64>, tasks: Vec<WorkOrderTask>, from: i64, hours: i64 },
    End(bool),
    RemovePlace,
}

fn tasks() -> impl Strategy<Value = Vec<WorkOrderTask>> {
    prop::sample::subsequence(WorkOrderTask::ALL.to_vec(), 1..=6)
}

fn step() -> impl Strategy<Value = Step> {
    let meters = prop::collection::btree_set(1..40_u64, 1..20).prop_map(|meters| meters.into_iter().collect());
    prop_oneof![
        3 => (0..40 * HOUR).prop_map(Step::Wait),
        4 => (0..2_u32, meters, tasks(), -5..48_i64, 1..24 * 31_i64)
            .prop_map(|(lag, meters, tasks, from, hours)| Step::Change { lag, meters, tasks, from: from * HOUR, hours }),
        1 => any::<bool>().prop_map(Step::End),
        1 => Just(Step::RemovePlace),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to an order: its row comes back, revisions only grow, by one with each
    /// change; an end is for ever; and the order permits work only while it is open, at its meters,
    /// for its tasks, to its technician.
    #[test]
    fn the_life_of_an_order(steps in prop::collection::vec(step(), 1..40), probes in prop::collection::vec((0..45_u64, 0..6_usize), 8)) {
        let mut now = NOW;
        let mut order = order(HOUR, 9 * HOUR);
        for step in steps {
            let before = order.clone();
            match step {
                Step::Wait(time) => now = now.after(time),
                Step::Change { lag, meters, tasks, from, hours } => {
                    let titles = meters.iter().map(|number| title(*number)).collect();
                    let window = (now.after(from), now.after(from + hours * HOUR));
                    let tasks = tasks.into_iter().collect();
                    let place = Place::parse("there").unwrap();
                    let content = WorkOrderContent::new(person("Bo"), titles, tasks, window, place).unwrap();
                    let seen = order.revision.saturating_sub(lag);
                    match order.change(seen, content.clone(), salt(2), now) {
                        Ok(true) => {
                            prop_assert!(lag == 0 && before.end.is_none() && window.1 > now);
                            prop_assert_eq!((&order.content, order.revision), (&content, before.revision + 1));
                        }
                        Ok(false) => prop_assert_eq!(&order, &before),
                        Err(_) => {
                            prop_assert!(lag > 0 || before.end.is_some() || window.1 <= now);
                            prop_assert_eq!(&order, &before);
                        }
                    }
                }
                Step::End(completed) => {
                    let ended = order.end(completed, account("wfm"), now);
                    prop_assert_eq!(ended.is_ok(), before.end.is_none());
                    prop_assert_eq!(order.revision, before.revision + u32::from(ended.is_ok()));
                }
                Step::RemovePlace => {
                    let removed = order.remove_place(DAY, now);
                    let since = order.end.as_ref().map_or(order.content.until, |end| end.time);
                    let over = since.after(DAY) <= now;
                    prop_assert_eq!(removed, over && !before.content.place.as_str().is_empty());
                    prop_assert_eq!(order.revision, before.revision);
                }
            }
            if before.end.is_some() {
                prop_assert_eq!(&order.end, &before.end);
            }
            prop_assert_eq!(&WorkOrder::from_row(id(), Bytes::from(order.to_row())).unwrap(), &order);
            for (meter, task) in &probes {
                let task = WorkOrderTask::ALL[*task];
                let open = order.state(now) == WorkOrderState::Open;
                prop_assert_eq!(open, order.end.is_none() && order.content.from <= now && now < order.content.until);
                let expected = open && order.content.has(title(*meter + 1)) && order.content.tasks.contains(task);
                let technician = order.content.technician.clone();
                prop_assert_eq!(order.permits(&technician, title(*meter + 1), task, now).is_ok(), expected);
                prop_assert!(order.permits(&person("Eve"), title(*meter + 1), task, now).is_err());
            }
        }
    }

    /// No octets make a row that panics, or one that breaks an invariant.
    #[test]
    fn damaged_rows_are_refused_or_right(at in 0..200_usize, octet in any::<u8>(), cut in 0..200_usize) {
        let mut row = order(HOUR, 9 * HOUR).to_row();
        if let Some(place) = row.get_mut(at) {
            *place = octet;
        }
        for body in [row.clone(), row[..cut.min(row.len())].to_vec()] {
            if let Ok(order) = WorkOrder::from_row(id(), Bytes::from(body)) {
                prop_assert!(order.content.meters().windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(!order.content.tasks.is_empty() && order.content.from < order.content.until);
            }
        }
    }
}

#[test]
fn the_largest_row_has_at_most_41_kilobytes() {
    let meters: Vec<u64> = (1..=5_000).collect();
    let mut content = content(&meters, &WorkOrderTask::ALL, 0, 31 * DAY).unwrap();
    content.place = Place::parse(&"x".repeat(256)).unwrap();
    let order = WorkOrder::new(id(), account(&"w".repeat(64)), content, salt(1), NOW).unwrap();
    let octets = order.to_row().len();
    assert!(octets < 41_000, "{octets}");
}
