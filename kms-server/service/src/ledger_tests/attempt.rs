//! What an act stages, and what of it is undone.

use std::{num::NonZeroU32, sync::Arc};

use kms_domain::{
    CampaignId, CounterKey, CounterPlace, GrantId, KeyType, KeyVersionNumber, Owner, PrincipalId, RequestId,
    SecuritySetupId, Task, TaskStep, TaskWork, UnixMillis, WriterId,
};
use kms_proto::v1::{MetersChanged, audit_record::Event};
use kms_store::{AuditReference, FingerprintOwner, FingerprintPrefix, GrantRow, Reads, TaskFilter, TaskKey, TaskRow};

use crate::testing::{TestIsland, client_title, island_tests, meter, sample};
use kms_base::error::ServiceError;
use kms_ledger::{Actor, Asked, Asking, CounterOf, LiveLease, ServerAct, View, Window};

fn counter_of(number: u64) -> CounterOf {
    CounterOf {
        owner: Owner::Meter(meter(number)),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
        counter: CounterKey::ClientTitle(client_title()),
        on_new_key: kms_domain::OnNewKey::Continue,
    }
}

fn event(value: &str) -> Event {
    Event::MetersChanged(MetersChanged {
        change: "test".to_owned(),
        value: value.to_owned(),
        ..MetersChanged::default()
    })
}

fn rename(view: &mut View<'_, '_>, number: u64, serial: &str) -> Result<(), ServiceError> {
    let mut changed = view.meter(meter(number))?.unwrap();
    Arc::make_mut(&mut changed).serial = serial.to_owned();
    view.put_meter((*changed).clone(), false)
}

const CAMPAIGN: [u8; 16] = [6; 16];
const PREFIX: FingerprintPrefix = FingerprintPrefix([7; 8]);
const COUNT: NonZeroU32 = NonZeroU32::new(10).unwrap();
const LATER: UnixMillis = UnixMillis(i64::MAX);

/// Stages something of every kind for a meter, and fails.
fn spoil(view: &mut View<'_, '_>, number: u64, by: &PrincipalId, asking: &Asking) -> Result<(), ServiceError> {
    rename(view, number, "spoiled")?;
    view.append(event("spoiled"));
    view.lease(counter_of(number), COUNT, LATER)?;
    view.answered_with(asking, &());
    view.put_grant(GrantRow {
        id: GrantId::from_octets(&[8; 16]).unwrap(),
        principal: by.clone(),
        purpose: "test".to_owned(),
        issued: UnixMillis(1),
        not_after: LATER,
        audit: AuditReference { writer: WriterId::from_octets(&[9; 16]).unwrap(), sequence: 0 },
        meters: 1,
        revoked: None,
    });
    let owner = FingerprintOwner {
        owner: Owner::Meter(meter(number)),
        setup: SecuritySetupId::DEFAULT,
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
    };
    view.put_fingerprint(PREFIX, owner);
    view.plan_task(TaskRow {
        key: TaskKey { campaign: CampaignId::from_octets(&CAMPAIGN).unwrap(), meter: meter(number) },
        generation: 1,
        wave: 1,
        vendor: "KAM".to_owned(),
        head_end: None,
        mark: [0; 16],
        task: Task::new(TaskStep { setup: SecuritySetupId::DEFAULT, work: TaskWork::Probe, from: 0 }, UnixMillis(1)),
    });
    Err(ServiceError::denied("spoil"))
}

async fn serials(island: &TestIsland) -> Vec<String> {
    let mut serials = Vec::new();
    for number in 1..=3 {
        serials.push(island.island.meter(meter(number)).await.unwrap().unwrap().serial.clone());
    }
    serials
}

island_tests! {
    async fn an_item_that_fails_leaves_nothing(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let before = serials(&island).await;
        let by = island.officer.principal.clone();
        let request = RequestId::from_octets(&[3; 16]).unwrap();
        let asking = Asking::new(&island.officer, request, [1; 32], Window::Administration);
        let reads = Reads {
            meters: (1..=3).map(meter).collect(),
            requests: asking.reads(),
            fingerprints: vec![PREFIX],
            ..Reads::default()
        };
        let again = asking.clone();
        let act = island.island.committer.act_in_test(Actor::server(ServerAct::TEST), reads, move |view| {
            rename(view, 1, "first")?;
            view.append(event("first"));
            // Each fails on its own: beside what was staged before, over it, and with what
            // succeeded inside of it.
            for number in [2, 1] {
                assert!(view.attempt(|view| spoil(view, number, &by, &again)).is_err());
            }
            let nested = view.attempt(|view| {
                view.attempt(|view| rename(view, 2, "inner"))?;
                let _ = view.attempt(|view| spoil(view, 1, &by, &again));
                assert_eq!((view.meter(meter(1))?.unwrap().serial.as_str(), view.meter(meter(2))?.unwrap().serial.as_str()), ("first", "inner"));
                Err::<(), _>(ServiceError::denied("outer"))
            });
            assert!(nested.is_err());
            assert_eq!(view.meter(meter(1))?.unwrap().serial, "first");
            assert!(view.fingerprint_owners(PREFIX)?.is_empty());
            view.attempt(|view| {
                view.append(event("third"));
                rename(view, 3, "third")
            })
        });
        act.await.unwrap();

        assert_eq!(serials(&island).await, ["first".to_owned(), before[1].clone(), "third".to_owned()]);
        let records = island.log().await.into_iter().filter_map(|record| match record.event {
            Some(Event::MetersChanged(changed)) if changed.change == "test" => Some((changed.value, record.row_writes.len())),
            _ => None,
        });
        let mut records: Vec<_> = records.collect();
        records.sort_unstable();
        // The act's first record names the rows, and only those that it wrote (I2).
        assert_eq!(records, [("first".to_owned(), 2), ("third".to_owned(), 0)]);
        let store = &island.island.store;
        assert!(store.task_page(CampaignId::from_octets(&CAMPAIGN).unwrap(), TaskFilter::All, None, 9).await.unwrap().is_empty());
        let reads = Reads { grants: vec![GrantId::from_octets(&[8; 16]).unwrap()], requests: asking.reads(), fingerprints: vec![PREFIX], ..Reads::default() };
        let act = island.island.committer.act_in_test(Actor::server(ServerAct::TEST), reads, move |view| {
            let known = matches!(view.asked(&asking)?, Asked::Before(_)) || view.grant(GrantId::from_octets(&[8; 16]).unwrap())?.is_some();
            Ok(known || !view.fingerprint_owners(PREFIX)?.is_empty())
        });
        assert!(!act.await.unwrap().value);
    }

    async fn counters_of_what_failed_are_skipped_and_not_leased(island) {
        island.deliver(&sample("generic-suite0", 1)).await;
        let lease = async |fails: &'static [bool]| {
            let reads = Reads { meters: vec![meter(1)], ..Reads::default() };
            let act = island.island.committer.act_in_test(Actor::server(ServerAct::TEST), reads, move |view| {
                view.append(event("lease"));
                let mut firsts = Vec::new();
                for fails in fails {
                    let until = UnixMillis(if *fails { i64::MAX } else { i64::MAX - 1 });
                    let _ = view.attempt(|view| {
                        firsts.push(view.lease(counter_of(1), COUNT, until)?.first);
                        if *fails { Err(ServiceError::denied("lease")) } else { Ok(()) }
                    });
                }
                Ok((firsts, view.live_lease(counter_of(1))?))
            });
            act.await.unwrap().value
        };
        // I4: counters that were allocated to a failed item are not allocated again, whether their
        // chunk was reserved with the item or before. And the item has no lease.
        let mut all = Vec::new();
        let (firsts, live) = lease(&[true, true]).await;
        assert!(live.is_none());
        all.extend(firsts);
        let (firsts, live) = lease(&[false, true, false, true]).await;
        assert_eq!(live, Some(LiveLease::Until(UnixMillis(i64::MAX - 1))));
        all.extend(firsts);
        all.extend(lease(&[true, false]).await.0);
        assert!(all.is_sorted_by(|one, next| one + COUNT.get() <= *next), "{all:?}");
        let row = island.island.meter(meter(1)).await.unwrap().unwrap();
        let slot = row.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap();
        let CounterPlace::Own(counters) = slot.active().unwrap().counters() else { panic!("the key has counters of its own") };
        assert!(counters.get(CounterKey::ClientTitle(client_title())).unwrap().bound() > u64::from(*all.last().unwrap()));
    }
}
