//! What both databases must do: each test runs on each.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use common::*;
use kms_domain::{
    CampaignId, GrantId, KeyType, KeyVersionNumber, Owner, SecuritySetupId, Task, TaskState, TaskStep, TaskWork,
    UnixMillis, WorkOrder, WorkOrderId, WorkOrderState,
};
use kms_store::{
    Assigned, AuditFilter, AuditReference, Changes, Committed, DatabaseLocation, Decision, ExposureOwner,
    ExposureParty, ExposureRow, ExposureTotals, FingerprintOwner, FingerprintPrefix, FingerprintPut, GrantFilter,
    GrantRevocation, GrantRow, KeyValuePrefix, Lookup, MeterFilter, MeterPut, PinFailure, Reads, RequestPut,
    RequestRow, RowKind, RowName, SealedPut, ShipmentRefusal, ShipmentRow, ShipmentState, Store, StoreError,
    TaskFilter, TaskKey, TaskRow, UploadId, WorkOrderColumns, WorkOrderCount, WorkOrderEnding, WorkOrderFilter,
};
use kms_store_testing::{Damage, Obstruction, damage};

macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Fixture::sqlite().await).await })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Fixture::postgres().await).await })*
        }
    };
}

on_both!(
    what_was_written_is_read,
    absence_is_seen_and_more_can_be_read,
    an_abandoned_transaction_writes_nothing,
    a_stale_generation_is_a_conflict_and_nothing_is_written,
    an_insert_over_a_row_is_a_conflict,
    two_uses_of_an_audit_sequence_collide,
    a_writer_must_be_registered_once,
    a_request_is_carried_out_once_and_purged_after_its_time,
    ten_thousand_meters_in_one_transaction,
    meters_are_found_by_their_projections,
    the_index_of_exposures_is_written_asked_and_walked,
    audit_is_walked_in_order,
    grants_are_listed_and_revoked_once,
    fingerprints_find_all_owners,
    a_shipment_is_resumed_where_it_stopped,
    failed_pins_are_remembered,
    servers_are_known_by_the_clock_of_the_database,
    concurrent_transactions_lose_no_update,
    odd_text_survives,
    a_newer_schema_is_refused,
    a_changed_migration_is_refused,
    a_stuck_database_answers_in_time,
    a_decision_that_never_ends_is_stopped,
    a_reopened_database_has_everything,
    tasks_are_written_over_the_generation_before,
    tasks_are_found_when_they_are_due,
    plans_are_kept_in_chunks,
    campaigns_are_looked_at_together_and_written_alone,
    work_orders_are_found_by_their_columns,
    work_orders_are_counted_before_one_is_added,
);

async fn what_was_written_is_read(f: Fixture) {
    let key = request_key("hes", 3);
    let outcome = RequestRow { digest: [5; 32], outcome: b"outcome".to_vec(), expires: UnixMillis(99) };
    let changes = Changes {
        meters: vec![MeterPut::insert(title(1), row(1, "one"), projection())],
        sealed: RowKind::ALL
            .map(|kind| SealedPut { kind, id: vec![0, 255, kind.number()], row: row(1, kind.name()) })
            .to_vec(),
        requests: vec![RequestPut { key: key.clone(), row: outcome.clone() }],
        audit: vec![record(f.writer, 0), record(f.writer, 1)],
        ..Changes::default()
    };
    assert_eq!(write(&*f.store, changes).await, Ok(Committed::Written));
    let reads = Reads {
        meters: vec![title(1)],
        sealed: RowKind::ALL.map(|kind| (kind, vec![0, 255, kind.number()])).to_vec(),
        requests: vec![key.clone()],
        audit_tails: vec![f.writer],
        ..Reads::default()
    };
    let mut seen = false;
    f.store
        .transact(reads, &mut |set| {
            assert_eq!(set.meter(title(1)), Lookup::Present(&row(1, "one")));
            for kind in RowKind::ALL {
                assert_eq!(set.sealed(kind, &[0, 255, kind.number()]), Lookup::Present(&row(1, kind.name())));
            }
            assert_eq!(set.request(&key), Lookup::Present(&outcome));
            assert_eq!(set.audit_tail(f.writer).present().unwrap().chain, [1; 32]);
            seen = true;
            Decision::Abandon
        })
        .await
        .unwrap();
    assert!(seen);
    assert_eq!(f.store.meters(&[title(2), title(1), title(1)]).await.unwrap().len(), 1);
    assert_eq!(f.store.sealed(RowKind::Group, &[0, 255, 2]).await.unwrap(), Some(row(1, "group")));
    assert_eq!(f.store.sealed(RowKind::Group, &[0]).await.unwrap(), None);
    for (id, named) in [([0, 255, 2].as_slice(), Some(row(1, "group"))), (&[0], None)] {
        let titles = [title(2), title(1), title(1)];
        let (found, meters) = f.store.sealed_and_meters(RowKind::Group, id, &titles).await.unwrap();
        assert_eq!((found, meters), (named, f.store.meters(&titles).await.unwrap()));
        assert!(f.store.sealed_and_meters(RowKind::Group, id, &[]).await.unwrap().1.is_empty());
    }
    assert_eq!(f.store.sealed_page(RowKind::Island, None, 5).await.unwrap(), [(vec![0, 255, 6], row(1, "island"))]);
    assert!(f.store.sealed_page(RowKind::Island, Some(&[0, 255, 6]), 5).await.unwrap().is_empty());
    assert!(f.store.sizes().await.unwrap().database > 0);
    f.store.check().await.unwrap();
}

async fn absence_is_seen_and_more_can_be_read(f: Fixture) {
    insert_meters(&*f.store, 1..2).await;
    let mut calls = 0;
    let committed = f
        .store
        .transact(Reads { meters: vec![title(1), title(9)], ..Reads::default() }, &mut |set| {
            calls += 1;
            assert!(set.meter(title(1)).present().is_some());
            assert_eq!(set.meter(title(9)), Lookup::Absent);
            match set.sealed(RowKind::Group, b"north") {
                Lookup::NotRead => Decision::More(Box::new(Reads {
                    sealed: vec![(RowKind::Group, b"north".to_vec())],
                    ..Reads::default()
                })),
                Lookup::Absent => Decision::Commit(Box::new(Changes {
                    sealed: vec![SealedPut { kind: RowKind::Group, id: b"north".to_vec(), row: row(1, "north") }],
                    meters: vec![MeterPut::update(title(1), row(2, "moved"))],
                    ..Changes::default()
                })),
                Lookup::Present(_) => Decision::Abandon,
            }
        })
        .await;
    assert_eq!((committed, calls), (Ok(Committed::Written), 2));
    assert_eq!(f.store.meters(&[title(1)]).await.unwrap()[0].row, row(2, "moved"));
}

async fn an_abandoned_transaction_writes_nothing(f: Fixture) {
    assert_eq!(f.store.transact(Reads::default(), &mut |_| Decision::Abandon).await, Ok(Committed::Nothing));
}

async fn a_stale_generation_is_a_conflict_and_nothing_is_written(f: Fixture) {
    insert_meters(&*f.store, 1..4).await;
    for generation in [1, 3, 9] {
        let changes = Changes {
            meters: vec![
                MeterPut::update(title(1), row(2, "new")),
                MeterPut::update_projection(title(2), row(generation, "new"), projection()),
            ],
            audit: vec![record(f.writer, 0)],
            ..Changes::default()
        };
        assert_eq!(write(&*f.store, changes).await, Err(StoreError::Conflict { row: RowName::Meter(title(2)) }));
    }
    let twice = vec![MeterPut::update(title(1), row(2, "a")), MeterPut::update(title(1), row(3, "b"))];
    assert!(write(&*f.store, Changes { meters: twice, ..Changes::default() }).await.is_err());
    assert_eq!(f.store.meters(&[title(1)]).await.unwrap()[0].row.generation, 1);
    assert!(f.store.audit_tails().await.unwrap().is_empty());
    let sealed = |generation| Changes {
        sealed: vec![SealedPut { kind: RowKind::Group, id: vec![1], row: row(generation, "") }],
        ..Changes::default()
    };
    assert_eq!(
        write(&*f.store, sealed(2)).await,
        Err(StoreError::Conflict { row: RowName::Sealed(RowKind::Group, vec![1]) })
    );
    assert!(matches!(write(&*f.store, sealed(0)).await, Err(StoreError::Invalid { .. })));
    let columns_missing = Changes { meters: vec![MeterPut::update(title(8), row(1, ""))], ..Changes::default() };
    assert!(matches!(write(&*f.store, columns_missing).await, Err(StoreError::Invalid { .. })));
}

async fn an_insert_over_a_row_is_a_conflict(f: Fixture) {
    insert_meters(&*f.store, 1..2).await;
    let again =
        Changes { meters: vec![MeterPut::insert(title(1), row(1, "other"), projection())], ..Changes::default() };
    assert_eq!(write(&*f.store, again).await, Err(StoreError::Conflict { row: RowName::Meter(title(1)) }));
    let ghost = Changes { meters: vec![MeterPut::update(title(7), row(2, "ghost"))], ..Changes::default() };
    assert_eq!(write(&*f.store, ghost).await, Err(StoreError::Conflict { row: RowName::Meter(title(7)) }));
    assert_eq!(f.store.meter_count(&MeterFilter::default()).await, Ok(1));
}

async fn two_uses_of_an_audit_sequence_collide(f: Fixture) {
    let append = |sequences: &[u64]| Changes {
        audit: sequences.iter().map(|sequence| record(f.writer, *sequence)).collect(),
        ..Changes::default()
    };
    write(&*f.store, append(&[0, 1])).await.unwrap();
    assert_eq!(write(&*f.store, append(&[2, 1])).await, Err(StoreError::Conflict { row: RowName::Audit(f.writer, 1) }));
    let tails = f.store.audit_tails().await.unwrap();
    assert_eq!((tails.len(), tails[0].writer, tails[0].sequence), (1, f.writer, 1));
}

async fn a_writer_must_be_registered_once(f: Fixture) {
    let changes = Changes { audit: vec![record(writer_id(), 0)], ..Changes::default() };
    assert!(matches!(write(&*f.store, changes).await, Err(StoreError::Invalid { what: "writer id", .. })));
    assert!(matches!(
        f.store.register_server(f.writer, "other").await,
        Err(StoreError::Invalid { what: "writer id", .. })
    ));
    assert!(matches!(f.store.heartbeat(writer_id()).await, Err(StoreError::Invalid { what: "writer id", .. })));
}

async fn a_request_is_carried_out_once_and_purged_after_its_time(f: Fixture) {
    let keys: Vec<_> = (0..5).map(|chunk| request_key("hes", chunk)).collect();
    let puts = |keys: &[kms_store::RequestKey]| Changes {
        requests: keys
            .iter()
            .map(|key| RequestPut {
                key: key.clone(),
                row: RequestRow {
                    digest: [1; 32],
                    outcome: vec![1, 2],
                    expires: UnixMillis(i64::from(key.chunk) * 10),
                },
            })
            .collect(),
        ..Changes::default()
    };
    write(&*f.store, puts(&keys)).await.unwrap();
    let other = kms_store::RequestKey { principal: principal("other"), ..keys[2].clone() };
    write(&*f.store, puts(&[other])).await.unwrap();
    let again = write(&*f.store, puts(&keys[4..])).await;
    assert_eq!(again, Err(StoreError::Conflict { row: RowName::Request(keys[4].request, 4) }));
    assert_eq!(f.store.purge_requests(UnixMillis(30), 3).await, Ok(3));
    assert_eq!(f.store.purge_requests(UnixMillis(30), 3).await, Ok(1));
    assert_eq!(f.store.purge_requests(UnixMillis(30), 3).await, Ok(0));
    let mut left = Vec::new();
    f.store
        .transact(Reads { requests: keys.clone(), ..Reads::default() }, &mut |set| {
            left = keys.iter().filter(|key| set.request(key).present().is_some()).map(|key| key.chunk).collect();
            Decision::Abandon
        })
        .await
        .unwrap();
    assert_eq!(left, [3, 4]);
}

async fn ten_thousand_meters_in_one_transaction(f: Fixture) {
    insert_meters(&*f.store, 1..10_001).await;
    let titles: Vec<_> = (1..10_001).rev().map(title).collect();
    f.store
        .transact(Reads { meters: titles.clone(), ..Reads::default() }, &mut |set| {
            let meters = titles
                .iter()
                .map(|title| {
                    let old = set.meter(*title).present().unwrap();
                    MeterPut::update(
                        *title,
                        row(old.generation + 1, &format!("{} again", String::from_utf8_lossy(&old.body))),
                    )
                })
                .collect();
            Decision::Commit(Box::new(Changes { meters, ..Changes::default() }))
        })
        .await
        .unwrap();
    let (mut after, mut count) = (None, 0);
    loop {
        let page = f.store.meter_page(&MeterFilter::default(), after, 999).await.unwrap();
        let Some(last) = page.last() else { break };
        for meter in &page {
            count += 1;
            assert_eq!((meter.title, &meter.row), (title(count), &row(2, &format!("meter {count} again"))));
        }
        after = Some(last.title);
    }
    assert_eq!(count, 10_000);
}

async fn meters_are_found_by_their_projections(f: Fixture) {
    let meters = (1..101)
        .map(|number| {
            let mut projection = projection();
            projection.vendor = if number % 2 == 0 { "ISK" } else { "KAM" }.into();
            projection.status = (number % 3) as u8;
            projection.head_end = (number % 5 == 0).then(|| "urn:meterkms:north:head-end:hes".into());
            projection.batch = Some(format!("batch {}", number / 50));
            projection.groups = if number % 10 == 0 {
                vec![3, 4]
            } else if number % 2 == 0 {
                vec![4]
            } else {
                Vec::new()
            };
            MeterPut::insert(title(number), row(1, ""), projection)
        })
        .collect();
    write(&*f.store, Changes { meters, ..Changes::default() }).await.unwrap();
    let count = async |filter: MeterFilter| {
        let counted = f.store.meter_count(&filter).await.unwrap();
        assert_eq!(f.store.meter_page(&filter, None, 1_000).await.unwrap().len() as u64, counted);
        counted
    };
    assert_eq!(count(MeterFilter::default()).await, 100);
    assert_eq!(count(MeterFilter { vendor: Some("ISK".into()), ..Default::default() }).await, 50);
    assert_eq!(count(MeterFilter { vendor: Some("XXX".into()), ..Default::default() }).await, 0);
    assert_eq!(count(MeterFilter { status: Some(0), ..Default::default() }).await, 33);
    assert_eq!(count(MeterFilter { head_end: Assigned::ToNone, ..Default::default() }).await, 80);
    assert_eq!(
        count(MeterFilter { batch: Some("batch 1".into()), vendor: Some("KAM".into()), ..Default::default() }).await,
        25
    );
    let assigned =
        MeterFilter { head_end: Assigned::To("urn:meterkms:north:head-end:hes".into()), ..Default::default() };
    assert_eq!(count(assigned.clone()).await, 20);
    let in_group = |group| MeterFilter { group: Some(group), ..Default::default() };
    assert_eq!((count(in_group(3)).await, count(in_group(4)).await, count(in_group(5)).await), (10, 50, 0));
    assert_eq!(count(MeterFilter { status: Some(0), ..in_group(4) }).await, 16);
    // The pages of a group follow each other.
    let first = f.store.meter_page(&in_group(4), None, 30).await.unwrap();
    let second = f.store.meter_page(&in_group(4), first.last().map(|row| row.title), 30).await.unwrap();
    assert_eq!((first.len(), second.len(), second.last().unwrap().title), (30, 20, title(100)));
    // A new generation leaves the columns, or changes them.
    let mut moved = projection();
    moved.head_end = None;
    moved.groups = vec![5];
    let meters =
        vec![MeterPut::update(title(5), row(2, "")), MeterPut::update_projection(title(10), row(2, ""), moved)];
    write(&*f.store, Changes { meters, ..Changes::default() }).await.unwrap();
    assert_eq!(count(assigned).await, 19);
    assert_eq!((count(in_group(3)).await, count(in_group(4)).await, count(in_group(5)).await), (9, 49, 1));
    // What is missing is added, and nothing else.
    let members = [(title(2), 4), (title(10), 5), (title(11), 5), (title(11), 6)];
    assert_eq!(f.store.complete_group_members(&members).await.unwrap(), 2);
    assert_eq!(f.store.complete_group_members(&members).await.unwrap(), 0);
    assert_eq!((count(in_group(4)).await, count(in_group(5)).await, count(in_group(6)).await), (49, 2, 1));
}

async fn the_index_of_exposures_is_written_asked_and_walked(f: Fixture) {
    let (hes, other) = (ExposureParty::Principal(principal("hes")), ExposureParty::Principal(principal("other")));
    let of_meter = |number: u64| ExposureOwner::Owner(Owner::Meter(title(number)));
    let group = ExposureOwner::Owner(Owner::Group(kms_domain::GroupId(7)));
    let row = |party: &ExposureParty, owner, slots, open, newest: i64| ExposureRow {
        party: party.clone(),
        owner,
        slots,
        open,
        newest: UnixMillis(newest),
    };
    let put = async |exposures: Vec<ExposureRow>| {
        write(&*f.store, Changes { exposures, ..Changes::default() }).await.unwrap();
    };
    assert!(f.store.exposures_are_complete().await.unwrap(), "a new database has no rows of an earlier version");
    f.store.note_exposures_complete().await.unwrap();
    let mut rows: Vec<ExposureRow> =
        (1..=300).map(|number| row(&hes, of_meter(number), 2, 2, number.cast_signed())).collect();
    rows.push(row(&hes, group, 1, 0, 1_000));
    rows.push(row(&other, of_meter(5), 3, 1, 9));
    put(rows.clone()).await;
    // The same key once more: the later numbers stand.
    rows[9] = row(&hes, of_meter(10), 2, 1, 10);
    put(vec![rows[9].clone()]).await;

    let totals = async |party: &ExposureParty, since: Option<i64>| {
        f.store.exposure_totals(party, since.map(UnixMillis)).await.unwrap()
    };
    let counted = |owners, slots, open| ExposureTotals { owners, slots, open, equal_keys: 0 };
    assert_eq!(totals(&hes, None).await, counted(301, 601, 599));
    assert_eq!(totals(&hes, Some(300)).await, counted(2, 3, 2));
    assert_eq!(totals(&other, None).await, counted(1, 3, 1));
    assert_eq!(totals(&ExposureParty::Principal(principal("nobody")), None).await, counted(0, 0, 0));
    let (mut pages, mut after) = (Vec::new(), None);
    loop {
        let page = f.store.exposed_owners(&hes, None, after, 100).await.unwrap();
        after = page.last().copied();
        if page.is_empty() {
            break;
        }
        pages.push(page);
    }
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [100, 100, 100, 1]);
    assert_eq!((pages[0][0], pages[3][0]), (of_meter(1), group));
    let since = f.store.exposed_owners(&hes, Some(UnixMillis(300)), None, 9).await.unwrap();
    assert_eq!(since, [of_meter(300), group]);

    // Meters 5, 301 and 302 share a value, which only `other` knows.
    let prefix = KeyValuePrefix([0xFF, 0, 0, 0, 0, 0, 0, 1]);
    let value = ExposureParty::KeyValue(prefix);
    let mut sharing: Vec<_> = [5, 301, 302].map(|number| row(&value, of_meter(number), 1, 0, 0)).into();
    sharing.push(row(&other, ExposureOwner::KeyValue(prefix), 0, 0, 50));
    put(sharing.clone()).await;
    rows.extend(sharing);
    let found = f.store.exposed_owners(&other, None, None, 9).await.unwrap();
    assert_eq!(found, [of_meter(5), of_meter(301), of_meter(302)]);
    assert_eq!(f.store.exposed_owners(&other, None, Some(of_meter(5)), 1).await.unwrap(), [of_meter(301)]);
    assert_eq!(f.store.exposed_owners(&other, Some(UnixMillis(51)), None, 9).await.unwrap(), []);
    assert_eq!(totals(&other, None).await, ExposureTotals { equal_keys: 2, ..counted(1, 3, 1) });
    assert_eq!(totals(&hes, None).await, counted(301, 601, 599));

    // The walk over all, and what is missing of what is expected.
    let (mut walked, mut after) = (Vec::new(), None);
    loop {
        let page = f.store.exposure_page(after, 77).await.unwrap();
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        walked.extend(page);
    }
    let mut found: Vec<_> = walked.iter().map(|(_, row)| row.clone().unwrap()).collect();
    let order = |row: &ExposureRow| (row.party.clone(), row.owner);
    found.sort_by_key(order);
    rows.sort_by_key(order);
    assert_eq!(found, rows);
    assert_eq!(f.store.missing_exposures(&rows).await.unwrap(), []);
    let wrong = [
        row(&hes, of_meter(1), 2, 1, 1),
        row(&hes, of_meter(999), 2, 2, 1),
        row(&ExposureParty::Principal(principal("nobody")), of_meter(1), 1, 1, 1),
        row(&ExposureParty::Anyone, of_meter(1), 1, 1, 1),
    ];
    let asked: Vec<_> = rows.iter().take(3).cloned().chain(wrong.clone()).collect();
    assert_eq!(f.store.missing_exposures(&asked).await.unwrap(), wrong);
    // Rows are removed by their places.
    let gone: Vec<_> = walked.iter().filter(|(_, row)| row.as_ref().is_some_and(|row| row.party == hes)).collect();
    let exposures_gone = gone.iter().map(|(place, _)| *place).collect();
    write(&*f.store, Changes { exposures_gone, ..Changes::default() }).await.unwrap();
    assert_eq!(totals(&hes, None).await, counted(0, 0, 0));
    assert_eq!(f.store.exposure_page(None, 1_000).await.unwrap().len(), rows.len() - gone.len());
}

async fn audit_is_walked_in_order(f: Fixture) {
    const OTHER_KIND: u16 = KIND + 1;
    let second = writer_id();
    f.store.register_server(second, "second").await.unwrap();
    for sequence in 0..50 {
        let mut other = record(second, sequence);
        other.kind = OTHER_KIND;
        write(&*f.store, Changes { audit: vec![record(f.writer, sequence), other], ..Changes::default() })
            .await
            .unwrap();
    }
    let (mut after, mut walked) = (None, Vec::new());
    loop {
        let page = f.store.audit_page(&AuditFilter::default(), after, 7).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.cursor);
        walked.extend(page.into_iter().map(|row| (row.record.writer, row.record.sequence)));
    }
    let expected: Vec<_> = (0..50).flat_map(|sequence| [(f.writer, sequence), (second, sequence)]).collect();
    assert_eq!(walked, expected);
    let count = async |filter: AuditFilter| f.store.audit_page(&filter, None, 1_000).await.unwrap().len();
    assert_eq!(count(AuditFilter { kind: Some(OTHER_KIND), ..Default::default() }).await, 50);
    assert_eq!(count(AuditFilter { writer: Some(second), ..Default::default() }).await, 50);
    let mut back =
        f.store.audit_page(&AuditFilter { newest_first: true, ..Default::default() }, None, 1_000).await.unwrap();
    back.reverse();
    let forth = f.store.audit_page(&AuditFilter::default(), None, 1_000).await.unwrap();
    assert_eq!(back, forth);
    let newest = f
        .store
        .audit_page(&AuditFilter { newest_first: true, ..Default::default() }, Some(forth[1].cursor), 1_000)
        .await
        .unwrap();
    assert_eq!(newest, forth[..1]);
    let range = f.store.audit_range(Some(UnixMillis(1_010)), Some(UnixMillis(1_015))).await.unwrap();
    assert_eq!(range, Some((forth[20].cursor, forth[29].cursor)));
    assert_eq!(f.store.audit_range(None, None).await.unwrap(), Some((forth[0].cursor, forth[99].cursor)));
    assert_eq!(f.store.audit_range(Some(UnixMillis(9_000)), None).await.unwrap(), None);
    // A record of an earlier time comes where it was written.
    let mut late = record(f.writer, 50);
    late.time = UnixMillis(1);
    write(&*f.store, Changes { audit: vec![late.clone()], ..Changes::default() }).await.unwrap();
    let last = f.store.audit_page(&AuditFilter::default(), Some(forth[99].cursor), 10).await.unwrap();
    assert_eq!(last.iter().map(|row| &row.record).collect::<Vec<_>>(), [&late]);
    let tail = f.store.audit_of_writer(f.writer, 47, 10).await.unwrap();
    assert_eq!(tail, (47..50).map(|sequence| record(f.writer, sequence)).chain([late]).collect::<Vec<_>>());
}

async fn grants_are_listed_and_revoked_once(f: Fixture) {
    let grant = |number: u8, name: &str| GrantRow {
        id: GrantId::from_octets(&[[1; 15].as_slice(), &[number]].concat()).unwrap(),
        principal: principal(name),
        purpose: "reading".into(),
        issued: UnixMillis(i64::from(number) * 10),
        not_after: UnixMillis(i64::from(number) * 10 + 100),
        audit: AuditReference { writer: f.writer, sequence: u64::from(number) },
        meters: 1_000,
        revoked: None,
    };
    let grants: Vec<_> = (1..11).map(|number| grant(number, if number % 2 == 0 { "even" } else { "odd" })).collect();
    write(&*f.store, Changes { grants: grants.clone(), ..Changes::default() }).await.unwrap();
    assert_eq!(f.store.grant(grants[3].id).await.unwrap().as_ref(), Some(&grants[3]));
    assert_eq!(
        f.store.grant_page(&GrantFilter::default(), None, 2).await.unwrap(),
        [grants[9].clone(), grants[8].clone()]
    );
    assert_eq!(f.store.grant_page(&GrantFilter::default(), Some(grants[8].id), 1).await.unwrap(), [grants[7].clone()]);
    let even = GrantFilter { principal: Some(principal("even")), ..Default::default() };
    assert_eq!(f.store.grant_page(&even, None, 100).await.unwrap().len(), 5);
    let live = GrantFilter {
        live_at: Some(UnixMillis(150)),
        issued_from: Some(UnixMillis(30)),
        issued_before: Some(UnixMillis(100)),
        ..Default::default()
    };
    assert_eq!(f.store.grant_page(&live, None, 100).await.unwrap().len(), 4);
    let revoke = Changes {
        revocations: vec![GrantRevocation { id: grants[7].id, revoked: UnixMillis(77) }],
        ..Changes::default()
    };
    f.store
        .transact(
            Reads { grants: vec![grants[7].id, GrantId::from_octets(&[9; 16]).unwrap()], ..Reads::default() },
            &mut |set| {
                assert_eq!(set.grant(grants[7].id), Lookup::Present(&grants[7]));
                assert_eq!(set.grant(GrantId::from_octets(&[9; 16]).unwrap()), Lookup::Absent);
                Decision::Commit(Box::new(revoke.clone()))
            },
        )
        .await
        .unwrap();
    assert_eq!(write(&*f.store, revoke).await, Err(StoreError::Conflict { row: RowName::Grant(grants[7].id) }));
    assert_eq!(f.store.grant_page(&live, None, 100).await.unwrap().len(), 3);
    assert!(write(&*f.store, Changes { grants: grants[..1].to_vec(), ..Changes::default() }).await.is_err());
}

fn fingerprint_owner(number: u64) -> FingerprintOwner {
    FingerprintOwner {
        owner: Owner::Meter(title(number)),
        setup: SecuritySetupId::from_octets([1, 2]),
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
    }
}

async fn fingerprints_find_all_owners(f: Fixture) {
    let prefix = FingerprintPrefix([0xFF; 8]);
    let put = |number| FingerprintPut { prefix, owner: fingerprint_owner(number) };
    write(&*f.store, Changes { fingerprints: vec![put(1), put(2)], ..Changes::default() }).await.unwrap();
    assert_eq!(
        write(&*f.store, Changes { fingerprints: vec![put(3), put(2)], ..Changes::default() }).await.unwrap_err(),
        StoreError::Conflict { row: RowName::Fingerprint(prefix) }
    );
    let unknown = FingerprintPrefix([7; 8]);
    let mut owners = Vec::new();
    f.store
        .transact(Reads { fingerprints: vec![prefix, unknown], ..Reads::default() }, &mut |set| {
            owners = set.fingerprint_owners(prefix).unwrap().to_vec();
            assert_eq!(set.fingerprint_owners(unknown), Some(&[][..]));
            assert_eq!(set.fingerprint_owners(FingerprintPrefix([1; 8])), None);
            Decision::Abandon
        })
        .await
        .unwrap();
    owners.sort();
    assert_eq!(owners, [fingerprint_owner(1), fingerprint_owner(2)]);

    // Beside the writer, and in pages: every one once, in whatever order.
    let low = FingerprintPrefix([3; 8]);
    let puts = (1..8).map(|number| FingerprintPut { prefix: low, owner: fingerprint_owner(number) }).collect();
    write(&*f.store, Changes { fingerprints: puts, ..Changes::default() }).await.unwrap();
    assert_eq!(f.store.fingerprints(&[prefix, unknown]).await.unwrap().len(), 2);
    assert_eq!(f.store.fingerprints(&[]).await.unwrap(), []);
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = f.store.fingerprint_page(after, 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(*last);
        all.extend(page);
    }
    let mut expected: Vec<_> = (1..8)
        .map(|number| (low, fingerprint_owner(number)))
        .chain((1..3).map(|number| (prefix, fingerprint_owner(number))))
        .collect();
    all.sort_unstable();
    expected.sort_unstable();
    assert_eq!(all, expected);
}

async fn a_shipment_is_resumed_where_it_stopped(f: Fixture) {
    let upload = UploadId([3; 16]);
    let mut shipment = ShipmentRow {
        upload,
        generation: 1,
        sha256: [8; 32],
        size: 10,
        batch: String::new(),
        principal: principal("vendor"),
        state: ShipmentState::Receiving,
        received: 0,
        next_line: 0,
        imported: 0,
        refused: 0,
        created: UnixMillis(1),
        updated: UnixMillis(1),
        progress: vec![],
    };
    write(&*f.store, Changes { shipments: vec![shipment.clone()], ..Changes::default() }).await.unwrap();
    assert_eq!(f.store.append_shipment_chunk(upload, 0, b"01234".to_vec(), UnixMillis(2)).await, Ok(5));
    let conflict = Err(StoreError::Conflict { row: RowName::Shipment(upload) });
    assert_eq!(f.store.append_shipment_chunk(upload, 0, b"01234".to_vec(), UnixMillis(3)).await, conflict);
    assert_eq!(f.store.append_shipment_chunk(upload, 5, b"56789".to_vec(), UnixMillis(4)).await, Ok(10));
    assert_eq!(f.store.shipment_chunk(upload, 7).await, Ok(Some((5, b"56789".to_vec()))));
    assert_eq!(f.store.shipment_chunk(upload, 0).await, Ok(Some((0, b"01234".to_vec()))));
    assert_eq!(f.store.shipment_chunk(upload, 10).await, Ok(None));
    let stored = f.store.shipment(upload).await.unwrap().unwrap();
    assert_eq!((stored.received, stored.updated), (10, UnixMillis(4)));
    assert_eq!(f.store.shipments_of_file(&principal("vendor"), &[8; 32]).await.unwrap(), std::slice::from_ref(&stored));
    assert!(f.store.shipments_of_file(&principal("other"), &[8; 32]).await.unwrap().is_empty());
    // A change that was made from an older view of the spool is refused.
    shipment.generation = 2;
    assert_eq!(
        write(&*f.store, Changes { shipments: vec![shipment.clone()], ..Changes::default() }).await.map(drop),
        conflict.clone().map(drop)
    );
    shipment = ShipmentRow {
        generation: 2,
        state: ShipmentState::Importing,
        batch: "KAM-1".into(),
        next_line: 3,
        refused: 1,
        progress: vec![0, 1],
        ..stored
    };
    let refusals = vec![ShipmentRefusal {
        upload,
        line: 2,
        field: "title".into(),
        reason: "`\u{0}'\"\\` is not 16 hex digits".into(),
    }];
    write(&*f.store, Changes { shipments: vec![shipment.clone()], refusals, ..Changes::default() }).await.unwrap();
    f.store
        .transact(Reads { shipments: vec![upload], ..Reads::default() }, &mut |set| {
            assert_eq!(set.shipment(upload), Lookup::Present(&shipment));
            Decision::Abandon
        })
        .await
        .unwrap();
    assert_eq!(f.store.append_shipment_chunk(upload, 10, vec![1], UnixMillis(5)).await, conflict);
    let refusals = f.store.shipment_refusals(upload, 0, 10).await.unwrap();
    assert_eq!(
        (refusals.len(), refusals[0].line, refusals[0].reason.as_str()),
        (1, 2, "`\u{FFFD}'\"\\` is not 16 hex digits")
    );
    assert!(f.store.shipment_refusals(upload, 2, 10).await.unwrap().is_empty());
    assert_eq!(f.store.delete_shipment_chunks(upload, 1).await, Ok(1));
    assert_eq!(f.store.delete_shipment_chunks(upload, 9).await, Ok(1));
    assert_eq!(f.store.shipment_page(None, 9).await.unwrap(), [shipment]);
    assert!(f.store.shipment_page(Some(upload), 9).await.unwrap().is_empty());
}

async fn failed_pins_are_remembered(f: Fixture) {
    let failure =
        PinFailure { token: "0123 island".into(), user_type: 1, phc: "$argon2id$v=19$…".into(), time: UnixMillis(5) };
    assert_eq!(f.store.pin_failure(&failure.token, 1).await, Ok(None));
    f.store.put_pin_failure(&failure).await.unwrap();
    let later = PinFailure { time: UnixMillis(6), ..failure };
    f.store.put_pin_failure(&later).await.unwrap();
    assert_eq!(f.store.pin_failure(&later.token, 1).await, Ok(Some(later.clone())));
    assert_eq!(f.store.pin_failure(&later.token, 0).await, Ok(None));
    f.store.clear_pin_failure(&later.token, 1).await.unwrap();
    assert_eq!(f.store.pin_failure(&later.token, 1).await, Ok(None));
}

async fn servers_are_known_by_the_clock_of_the_database(f: Fixture) {
    let before = f.store.now().await.unwrap();
    f.store.heartbeat(f.writer).await.unwrap();
    let servers = f.store.servers().await.unwrap();
    assert_eq!((servers.len(), servers[0].writer, servers[0].name.as_str()), (1, f.writer, "test"));
    assert!(servers[0].started <= before && before <= servers[0].heartbeat && servers[0].silent_ms >= 0);
}

async fn concurrent_transactions_lose_no_update(f: Fixture) {
    insert_meters(&*f.store, 1..3).await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let store = Arc::clone(&f.store);
        tasks.spawn(async move {
            for _ in 0..25 {
                // The order of asking differs between tasks: locking in that order would deadlock.
                let (first, second) = if task % 2 == 0 { (1, 2) } else { (2, 1) };
                store
                    .transact(Reads { meters: vec![title(first)], ..Reads::default() }, &mut |set| {
                        if set.meter(title(second)) == Lookup::NotRead {
                            return Decision::More(Box::new(Reads { meters: vec![title(second)], ..Reads::default() }));
                        }
                        let next = |number| {
                            MeterPut::update(
                                title(number),
                                row(set.meter(title(number)).present().unwrap().generation + 1, ""),
                            )
                        };
                        Decision::Commit(Box::new(Changes { meters: vec![next(1), next(2)], ..Changes::default() }))
                    })
                    .await
                    .unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for meter in f.store.meters(&[title(1), title(2)]).await.unwrap() {
        assert_eq!(meter.row.generation, 201);
    }
}

async fn odd_text_survives(f: Fixture) {
    let batch = "a\"b\\c\u{1}\n\u{1F512}'; DROP TABLE meter; --";
    let mut odd = projection();
    odd.batch = Some(batch.into());
    write(&*f.store, Changes { meters: vec![MeterPut::insert(title(1), row(1, ""), odd)], ..Changes::default() })
        .await
        .unwrap();
    assert_eq!(f.store.meter_count(&MeterFilter { batch: Some(batch.into()), ..Default::default() }).await, Ok(1));
}

async fn a_newer_schema_is_refused(f: Fixture) {
    damage(&f.config.database, &Damage::AddSchemaVersion(99)).await.unwrap();
    f.store.close().await;
    drop(f.store);
    let known = match kms_store::open(&f.config).await.map(drop) {
        Err(StoreError::NewerSchema { found: 99, known }) => known,
        other => panic!("{other:?}"),
    };
    assert!(known < 99);
}

async fn a_changed_migration_is_refused(f: Fixture) {
    damage(&f.config.database, &Damage::ChangeSchemaDigest).await.unwrap();
    f.store.close().await;
    drop(f.store);
    assert!(matches!(kms_store::open(&f.config).await.map(drop), Err(StoreError::Corrupt { .. })));
}

async fn a_stuck_database_answers_in_time(mut f: Fixture) {
    insert_meters(&*f.store, 1..2).await;
    f.store.close().await;
    drop(f.store);
    f.config.call_timeout = std::time::Duration::from_millis(300);
    f.store = kms_store::open(&f.config).await.unwrap();
    let obstruction = Obstruction::begin(&f.config).await.unwrap();
    let begun = std::time::Instant::now();
    let update =
        |generation| Changes { meters: vec![MeterPut::update(title(1), row(generation, ""))], ..Changes::default() };
    for _ in 0..3 {
        assert!(matches!(write(&*f.store, update(2)).await, Err(StoreError::Unavailable { .. })));
    }
    assert!(begun.elapsed() < std::time::Duration::from_secs(120), "it waits for what does not come");
    obstruction.end().await.unwrap();
    // It recovers by itself. A write that was given up may yet have been made, so the generation is
    // read.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        let advance = f
            .store
            .transact(Reads { meters: vec![title(1)], ..Reads::default() }, &mut |set| {
                Decision::Commit(Box::new(update(set.meter(title(1)).present().unwrap().generation + 1)))
            })
            .await;
        match advance {
            Ok(_) => break,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
    }
}

async fn a_decision_that_never_ends_is_stopped(f: Fixture) {
    let endless = f.store.transact(Reads::default(), &mut |_| Decision::More(Box::default())).await;
    assert!(matches!(endless, Err(StoreError::Invalid { what: "decision", .. })));
    insert_meters(&*f.store, 1..2).await;
}

async fn a_reopened_database_has_everything(f: Fixture) {
    insert_meters(&*f.store, 1..100).await;
    write(&*f.store, Changes { audit: vec![record(f.writer, 0)], ..Changes::default() }).await.unwrap();
    f.store.close().await;
    assert!(matches!(f.store.meters(&[title(1)]).await, Err(StoreError::Unavailable { .. })));
    assert!(matches!(write(&*f.store, Changes::default()).await, Err(StoreError::Unavailable { .. })));
    drop(f.store);
    let store = kms_store::open(&f.config).await.unwrap();
    assert_eq!(store.meter_count(&MeterFilter::default()).await, Ok(99));
    assert_eq!(store.audit_tails().await.unwrap()[0].sequence, 0);
}

fn campaign(number: u8) -> CampaignId {
    CampaignId::from_octets(&[number; 16]).unwrap()
}

fn task(campaign_number: u8, meter: u64, head_end: Option<&str>) -> TaskRow {
    let step = TaskStep { setup: SecuritySetupId::from_octets([0, 1]), work: TaskWork::Rotate(KeyType::GUEK), from: 3 };
    TaskRow {
        key: TaskKey { campaign: campaign(campaign_number), meter: title(meter) },
        generation: 1,
        wave: 1,
        vendor: "KAM".into(),
        head_end: head_end.map(|name| principal(name).to_string()),
        mark: [7; 16],
        task: Task::new(step, UnixMillis(5)),
    }
}

async fn tasks_are_written_over_the_generation_before(f: Fixture) {
    let mut row = task(1, 1, Some("hes-1"));
    let unassigned = TaskRow {
        task: Task { step: TaskStep { work: TaskWork::Probe, ..row.task.step }, ..row.task.clone() },
        ..task(1, 2, None)
    };
    write(&*f.store, Changes { tasks: vec![row.clone(), unassigned.clone()], ..Changes::default() }).await.unwrap();
    let conflict = Err(StoreError::Conflict { row: RowName::Task(row.key) });
    assert_eq!(write(&*f.store, Changes { tasks: vec![row.clone()], ..Changes::default() }).await, conflict);
    row.generation = 2;
    row.head_end = Some(principal("hes-2").to_string());
    row.task = Task {
        state: TaskState::Leased,
        probe: true,
        attempts: 2,
        due: UnixMillis(9),
        fence: 4,
        leased: UnixMillis(8),
        ended: UnixMillis(6),
        reason: "odd \u{1F600} '\"".into(),
        ..row.task
    };
    write(&*f.store, Changes { tasks: vec![row.clone()], ..Changes::default() }).await.unwrap();
    assert_eq!(write(&*f.store, Changes { tasks: vec![row.clone()], ..Changes::default() }).await, conflict);
    // A fencing token never goes back.
    let older = TaskRow { generation: 3, task: Task { fence: 3, ..row.task.clone() }, ..row.clone() };
    assert_eq!(write(&*f.store, Changes { tasks: vec![older], ..Changes::default() }).await, conflict);

    let absent = TaskKey { meter: title(3), ..row.key };
    let mut clock = None;
    f.store
        .transact(Reads { tasks: vec![row.key, unassigned.key, absent], clock: true, ..Reads::default() }, &mut |set| {
            assert_eq!(set.task(row.key), Lookup::Present(&row));
            assert_eq!(set.task(unassigned.key), Lookup::Present(&unassigned));
            assert_eq!(set.task(absent), Lookup::Absent);
            assert_eq!(set.task(TaskKey { campaign: campaign(9), ..absent }), Lookup::NotRead);
            clock = set.clock();
            Decision::Abandon
        })
        .await
        .unwrap();
    let now = f.store.now().await.unwrap();
    assert!(clock.is_some_and(|clock| clock <= now && now.0 - clock.0 < 10_000));
    assert_eq!(
        f.store.task_page(campaign(1), TaskFilter::All, None, 9).await.unwrap(),
        [row.clone(), unassigned.clone()]
    );
    assert_eq!(f.store.task_page(campaign(1), TaskFilter::InDoubt, None, 9).await.unwrap(), [row.clone()]);
    assert_eq!(
        f.store.task_page(campaign(1), TaskFilter::State(TaskState::Pending), None, 9).await.unwrap(),
        [unassigned]
    );
    assert!(f.store.task_page(campaign(1), TaskFilter::All, Some(title(2)), 9).await.unwrap().is_empty());
}

async fn tasks_are_found_when_they_are_due(f: Fixture) {
    let now = f.store.now().await.unwrap();
    let with = |meter, state, due: i64, leased: i64| {
        let row = task(1, meter, Some("hes-1"));
        TaskRow { task: Task { state, due: UnixMillis(due), leased: UnixMillis(leased), ..row.task }, ..row }
    };
    let (past, future) = (now.0 - 60_000, now.0 + 60_000);
    let ended = |meter, ended: i64| {
        let row = with(meter, TaskState::Succeeded, i64::MAX, past - 9_000);
        TaskRow { task: Task { ended: UnixMillis(ended), ..row.task }, ..row }
    };
    let failed = with(7, TaskState::Failed, i64::MAX, past - 9_000);
    let tasks = vec![
        with(1, TaskState::Pending, past, 0),
        with(2, TaskState::Pending, future, 0),
        with(3, TaskState::Leased, past - 1, past - 9_000),
        with(4, TaskState::UnderWay, future, now.0),
        ended(5, 61_000),
        ended(6, 62_000),
        TaskRow { task: Task { reason: "not-applied".into(), ..failed.task.clone() }, ..failed },
        ended(8, 125_000),
        task(1, 9, Some("hes-2")),
        task(2, 1, Some("hes-1")),
    ];
    write(&*f.store, Changes { tasks, ..Changes::default() }).await.unwrap();
    let hes = principal("hes-1").to_string();
    // The lease that ran out first, then the task that has waited.
    assert_eq!(f.store.due_tasks(campaign(1), &hes, 9).await.unwrap(), [title(3), title(1)]);
    assert_eq!(f.store.due_tasks(campaign(1), &hes, 1).await.unwrap(), [title(3)]);
    assert!(f.store.due_tasks(campaign(1), "nobody", 9).await.unwrap().is_empty());
    let load = f.store.task_load(campaign(1), &hes).await.unwrap();
    assert_eq!((load.in_flight, load.leased_in_minute), (1, 1));
    assert_eq!(f.store.task_load(campaign(1), "nobody").await.unwrap(), kms_store::TaskLoad::default());
    let tallies = f.store.task_tallies(campaign(1), Some(1)).await.unwrap();
    let short: Vec<_> = tallies.iter().map(|tally| (tally.state, tally.reason.as_str(), tally.tasks)).collect();
    let expected = [
        (TaskState::Pending, "", 3),
        (TaskState::Leased, "", 1),
        (TaskState::UnderWay, "", 1),
        (TaskState::Succeeded, "", 3),
        (TaskState::Failed, "not-applied", 1),
    ];
    assert_eq!(short, expected);
    assert!(f.store.task_tallies(campaign(1), Some(2)).await.unwrap().is_empty());
    assert_eq!(
        f.store.task_timeline(campaign(1), 1, 60_000).await.unwrap(),
        [(UnixMillis(60_000), 2), (UnixMillis(120_000), 1)]
    );
    // Of earlier waves only.
    assert_eq!(f.store.delete_tasks(campaign(1), 1, TaskState::Succeeded, 9).await.unwrap(), 0);
    assert_eq!(f.store.delete_tasks(campaign(1), 2, TaskState::Succeeded, 2).await.unwrap(), 2);
    assert_eq!(f.store.delete_tasks(campaign(1), 2, TaskState::Succeeded, 2).await.unwrap(), 1);
    assert_eq!(f.store.task_page(campaign(1), TaskFilter::All, None, 99).await.unwrap().len(), 6);
}

async fn plans_are_kept_in_chunks(f: Fixture) {
    for (number, octets) in [(1, 1), (2, 1), (3, 2)] {
        f.store.put_campaign_chunk(campaign(number), 0, &vec![octets; 80_000]).await.unwrap();
    }
    f.store.put_campaign_chunk(campaign(1), 1, &[2; 8]).await.unwrap();
    assert!(matches!(f.store.put_campaign_chunk(campaign(1), 1, &[3; 8]).await, Err(StoreError::Conflict { .. })));
    assert_eq!(f.store.campaign_chunk(campaign(1), 1).await.unwrap(), Some(vec![2; 8]));
    assert_eq!(f.store.campaign_chunk(campaign(1), 2).await.unwrap(), None);
    // One that has a row is kept.
    let sealed =
        vec![SealedPut { kind: RowKind::Campaign, id: campaign(1).octets().to_vec(), row: row(1, "campaign") }];
    write(&*f.store, Changes { sealed, ..Changes::default() }).await.unwrap();
    assert_eq!(f.store.delete_unused_chunks(campaign(1)).await.unwrap(), 0);
    assert_eq!(f.store.purge_unused_chunks(campaign(3)).await.unwrap(), 1);
    assert_eq!(f.store.delete_unused_chunks(campaign(3)).await.unwrap(), 1);
    assert_eq!(f.store.campaign_chunk(campaign(1), 0).await.unwrap(), Some(vec![1; 80_000]));
}

async fn campaigns_are_looked_at_together_and_written_alone(f: Fixture) {
    let name = |number| (RowKind::Campaign, campaign(number).octets().to_vec());
    let put = |number, generation| SealedPut {
        kind: RowKind::Campaign,
        id: campaign(number).octets().to_vec(),
        row: row(generation, "campaign"),
    };
    insert_meters(&*f.store, 1..3).await;
    write(&*f.store, Changes { sealed: vec![put(1, 1), put(2, 1)], ..Changes::default() }).await.unwrap();
    let looks = || Reads { campaigns: vec![campaign(2), campaign(1)], ..Reads::default() };
    // Two servers, where there can be two.
    let several = matches!(f.config.database, DatabaseLocation::Postgres(_));
    let stores =
        [Arc::clone(&f.store), if several { kms_store::open(&f.config).await.unwrap() } else { Arc::clone(&f.store) }];
    if several {
        // Each looks at both while the other one does.
        let looking = Arc::new(AtomicU32::new(0));
        let look = |store: &Arc<dyn Store>| {
            let (store, looking) = (Arc::clone(store), Arc::clone(&looking));
            tokio::spawn(async move {
                let mut look = |set: &kms_store::ReadSet| {
                    assert!([1, 2].into_iter().all(|number| {
                        set.sealed(RowKind::Campaign, &campaign(number).octets()).present().is_some()
                    }));
                    looking.fetch_add(1, Ordering::SeqCst);
                    let began = Instant::now();
                    // The other one needs the runtime to get there.
                    tokio::task::block_in_place(|| {
                        while looking.load(Ordering::SeqCst) < 2 {
                            assert!(began.elapsed() < Duration::from_secs(120), "the other one has to wait");
                            std::thread::yield_now();
                        }
                    });
                    Decision::Abandon
                };
                store.transact(looks(), &mut look).await.unwrap();
            })
        };
        let (one, other) = tokio::join!(look(&stores[0]), look(&stores[1]));
        one.unwrap();
        other.unwrap();
    }
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0_u8..8 {
        let store = Arc::clone(&stores[usize::from(task / 2 % 2)]);
        tasks.spawn(async move {
            for _ in 0..20 {
                // Half of them look at campaigns and write a meter, in one order or the other; the
                // rest write a campaign.
                let (meter, written) = (1 + task % 2, 1 + task / 2 % 2);
                let reads = match task < 4 {
                    true => Reads {
                        meters: vec![title(meter.into())],
                        campaigns: vec![campaign(1), campaign(2)],
                        ..Reads::default()
                    },
                    false => Reads {
                        meters: vec![title(meter.into())],
                        sealed: vec![name(written)],
                        campaigns: vec![campaign(3 - written)],
                        ..Reads::default()
                    },
                };
                let mut decide = |set: &kms_store::ReadSet| {
                    let title = title(meter.into());
                    let meter = MeterPut::update(title, row(set.meter(title).present().unwrap().generation + 1, ""));
                    let known =
                        set.sealed(RowKind::Campaign, &campaign(written).octets()).present().unwrap().generation;
                    let sealed = if task < 4 { Vec::new() } else { vec![put(written, known + 1)] };
                    Decision::Commit(Box::new(Changes { meters: vec![meter], sealed, ..Changes::default() }))
                };
                store.transact(reads, &mut decide).await.unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for number in [1, 2] {
        assert_eq!(
            f.store.sealed(RowKind::Campaign, &campaign(number).octets()).await.unwrap().unwrap().generation,
            41
        );
        assert_eq!(f.store.meters(&[title(number.into())]).await.unwrap()[0].row.generation, 81);
    }
}

fn order(id: &str, technician: &str, from: i64, until: i64) -> WorkOrderColumns {
    WorkOrderColumns {
        id: WorkOrderId::parse(id).unwrap(),
        maker: principal("wfm"),
        technician: technician.into(),
        end: WorkOrderEnding::None,
        from: UnixMillis(from),
        until: UnixMillis(until),
    }
}

/// The orders with their sealed rows, in this generation.
fn orders(columns: &[WorkOrderColumns], generation: u64) -> Changes {
    let sealed = columns.iter().map(|order| SealedPut {
        kind: RowKind::WorkOrder,
        id: order.id.as_str().as_bytes().to_vec(),
        row: row(generation, order.id.as_str()),
    });
    Changes { sealed: sealed.collect(), work_orders: columns.to_vec(), ..Changes::default() }
}

async fn work_orders_are_found_by_their_columns(f: Fixture) {
    let now = 2 * WorkOrder::LONGEST_MS;
    let hour = 3_600_000;
    let completed = WorkOrderColumns { end: WorkOrderEnding::Completed, ..order("c", "ida", now - 9, now + hour) };
    let others = WorkOrderColumns { maker: principal("other"), ..order("odd '\u{1F600}", "bo", now - 2, now + hour) };
    let all = [
        order("expired", "ida", now - 2 * hour, now),
        completed.clone(),
        order("a", "ida", now - 2, now + hour),
        order("b", "bo", now - 2, now + hour),
        others.clone(),
        order("planned", "ida", now + 1, now + hour),
        // It has the longest time that an order can have.
        order("long", "bo", now - WorkOrder::LONGEST_MS + 1, now + 1),
    ];
    write(&*f.store, orders(&all, 1)).await.unwrap();
    let found = async |filter: WorkOrderFilter| {
        let page = f.store.work_order_page(&filter, None, 9).await.unwrap();
        let ids = page.into_iter().map(|order| {
            assert_eq!(order.id.as_str().as_bytes(), order.row.body);
            order.id.to_string()
        });
        ids.collect::<Vec<_>>()
    };
    let any = WorkOrderFilter::default;
    assert_eq!(found(any()).await, ["long", "expired", "c", "a", "b", "odd '\u{1F600}", "planned"]);
    assert_eq!(
        found(WorkOrderFilter { technician: Some("ida".into()), ..any() }).await,
        ["expired", "c", "a", "planned"]
    );
    assert_eq!(found(WorkOrderFilter { maker: Some(principal("other")), ..any() }).await, ["odd '\u{1F600}"]);
    assert!(found(WorkOrderFilter { maker: Some(principal("nobody")), ..any() }).await.is_empty());
    for (state, expected) in [
        (WorkOrderState::Planned, &["planned"][..]),
        (WorkOrderState::Open, &["long", "a", "b", "odd '\u{1F600}"]),
        (WorkOrderState::Expired, &["expired"]),
        (WorkOrderState::Completed, &["c"]),
        (WorkOrderState::Cancelled, &[]),
    ] {
        assert_eq!(found(WorkOrderFilter { state: Some((state, UnixMillis(now))), ..any() }).await, expected);
    }
    let between =
        WorkOrderFilter { ends_after: Some(UnixMillis(now)), begins_before: Some(UnixMillis(now - 2)), ..any() };
    assert_eq!(found(between).await, ["long", "c"]);

    // Pages follow each other.
    let (mut after, mut walked) = (None, Vec::new());
    loop {
        let page = f.store.work_order_page(&any(), after.take(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some((last.from, last.id.clone()));
        walked.extend(page.into_iter().map(|order| order.id.to_string()));
    }
    assert_eq!(walked, found(any()).await);

    // A new generation writes new columns; lost ones are added.
    let cancelled = WorkOrderColumns { end: WorkOrderEnding::Cancelled, technician: "bo".into(), ..all[2].clone() };
    write(&*f.store, orders(&[cancelled], 2)).await.unwrap();
    let state = Some((WorkOrderState::Cancelled, UnixMillis(now)));
    assert_eq!(found(WorkOrderFilter { state, technician: Some("bo".into()), ..any() }).await, ["a"]);
    assert_eq!(f.store.complete_work_orders(&all).await.unwrap(), 0);
    let lost = order("lost", "ida", now, now + 1);
    let sealed = Changes { work_orders: Vec::new(), ..orders(std::slice::from_ref(&lost), 1) };
    write(&*f.store, sealed).await.unwrap();
    assert_eq!(f.store.complete_work_orders(&[all[0].clone(), lost.clone()]).await.unwrap(), 1);
    assert_eq!(f.store.complete_work_orders(&[lost]).await.unwrap(), 0);
    assert_eq!(found(any()).await.len(), 8);
}

async fn work_orders_are_counted_before_one_is_added(f: Fixture) {
    let now = f.store.now().await.unwrap().0;
    let live = |id: &str| order(id, "ida", now - 1_000, now + 3_600_000);
    let week = WorkOrder::COUNTED_MS;
    // These two count no more. Of those that count, it does not matter how they ended.
    let over = order("over", "ida", now - week - 1_000, now - week - 1);
    let done = WorkOrderColumns { end: WorkOrderEnding::Completed, ..order("done", "ida", 1, 2) };
    let first = now - week + 3_600_000;
    let expired = WorkOrderColumns { end: WorkOrderEnding::Completed, ..order("expired", "ida", first - 1, first) };
    let ended = WorkOrderColumns { end: WorkOrderEnding::Cancelled, ..live("ended") };
    write(&*f.store, orders(&[live("1"), expired, ended, over, done], 1)).await.unwrap();
    let several = matches!(f.config.database, DatabaseLocation::Postgres(_));
    let other = if several { kms_store::open(&f.config).await.unwrap() } else { Arc::clone(&f.store) };
    // Ten at a time on two servers, and a bound of eight.
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..10 {
        let store = Arc::clone(if number % 2 == 0 { &f.store } else { &other });
        let new = live(&format!("new-{number}"));
        tasks.spawn(async move {
            let reads = Reads {
                work_orders_of: vec![principal("wfm"), principal("nobody")],
                sealed: vec![(RowKind::WorkOrder, new.id.as_str().as_bytes().to_vec())],
                ..Reads::default()
            };
            let mut decide = |set: &kms_store::ReadSet| {
                assert_eq!(set.work_orders_of(&principal("nobody")), Some(WorkOrderCount::default()));
                assert_eq!(set.work_orders_of(&principal("unread")), None);
                let count = set.work_orders_of(&principal("wfm")).unwrap();
                assert_eq!(count.first_until, Some(UnixMillis(first)));
                match count.orders {
                    8.. => Decision::Abandon,
                    _ => Decision::Commit(Box::new(orders(std::slice::from_ref(&new), 1))),
                }
            };
            store.transact(reads, &mut decide).await.unwrap()
        });
    }
    let mut written = 0;
    while let Some(done) = tasks.join_next().await {
        written += usize::from(done.unwrap() == Committed::Written);
    }
    assert_eq!(written, 5);
}
