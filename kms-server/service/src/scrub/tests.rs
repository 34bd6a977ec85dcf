use std::collections::BTreeSet;

use kms_domain::RequestId;
use kms_proto::v1::{ScrubFinding, ScrubResponse, audit_record::Event};
use kms_store::{AuditFilter, Changes, Committed, Decision, MeterPut, ReadSet, Reads, RowKind, SealedPut, SealedRow};
use prost::Message as _;

use super::Scrubber;
use crate::scrub_flight::{Joined, ScrubReport};
use crate::testing::{Forged, TestIsland, database, island_tests, meter, sample};
use crate::{
    audit_log::{AuditLog, LogQuery},
    meter::{Assignment, MeterService, Request, Selection},
};
use kms_base::error::ServiceError;

impl TestIsland {
    async fn scrubbed(&self) -> ScrubReport {
        let all = Scrubber::new(self.island.clone()).scrub(|_| true).await.unwrap();
        // However many passes it takes, the findings are the same.
        let parts = Scrubber::new(self.island.clone()).with_rows_at_once(7).scrub(|_| true).await.unwrap();
        assert_eq!(named(&all), named(&parts));
        all
    }

    async fn assign(&self, number: u8, meters: &[u64]) {
        let selection = Selection::Meters(meters.iter().map(|number| meter(*number)).collect());
        let request = Request { id: RequestId::from_octets(&[number; 16]).unwrap(), digest: [number; 32] };
        let head_end = number.is_multiple_of(2).then(|| self.other_head_end.principal.clone());
        MeterService::new(self.island.clone())
            .assign(&self.officer, request, Assignment { selection, head_end, dry_run: false })
            .await
            .unwrap();
    }

    async fn row(&self, number: u64) -> SealedRow {
        self.island.store.meters(&[meter(number)]).await.unwrap().remove(0).row
    }

    /// What someone with the database's password can do to a meter's row.
    async fn forge(&self, number: u64, row: SealedRow) {
        let present = self.row(number).await;
        // The store itself only writes the next generation, so an attacker's statement is played by
        // SQL of its own.
        let statement = format!(
            "UPDATE meter SET generation = {}, seal = {}, body = {} WHERE title = {} AND generation = {}",
            row.generation,
            octets(&row.seal),
            octets(&row.body),
            meter(number).as_i64(),
            present.generation
        );
        self.sql(&statement).await;
    }

    /// Runs a statement beside the server; it meets a row.
    async fn sql(&self, statement: &str) {
        assert!(kms_store_testing::execute(&database().database, statement).await.unwrap() > 0, "{statement}");
    }
}

/// Octets in SQL.
fn octets(octets: &[u8]) -> String {
    kms_store_testing::octets(&database().database, octets)
}

fn named(report: &ScrubReport) -> BTreeSet<(u32, String, String)> {
    report
        .findings
        .iter()
        .map(|finding| (finding.kind, hex::encode_upper(&finding.id), finding.finding.clone()))
        .collect()
}

fn expected(findings: &[(u64, &str)]) -> BTreeSet<(u32, String, String)> {
    findings.iter().map(|(number, finding)| (1, meter(*number).to_string(), (*finding).to_owned())).collect()
}

island_tests! {
    async fn an_untouched_island_has_no_findings_and_any_touched_row_is_found(island) {
        island.deliver(&sample("generic-suite0", 40)).await;
        let old: Vec<SealedRow> = { let mut rows = Vec::new(); for number in 1..=10 { rows.push(island.row(number).await); } rows };
        island.assign(2, &[1, 2, 3]).await;
        island.assign(3, &[1, 2]).await;
        let other = island.another_server().await;
        drop(other);
        let clean = island.scrubbed().await;
        assert_eq!(clean.findings, Vec::<ScrubFinding>::new());
        // 40 meters, 5 principals, the island.
        assert_eq!(clean.rows_read, 46);
        assert!(clean.records_read >= 8);

        // I5: any older sealed row, put back as it was; swapped rows; an edited one; one that is
        // gone; one that nobody recorded.
        island.forge(1, old[0].clone()).await;
        let (five, six) = (island.row(5).await, island.row(6).await);
        island.forge(5, six).await;
        island.forge(6, five).await;
        let mut edited = island.row(7).await;
        *edited.body.last_mut().unwrap() ^= 1;
        island.forge(7, edited).await;
        island.sql(&format!("DELETE FROM meter WHERE title = {}", meter(8).as_i64())).await;
        let mut jumped = island.row(9).await;
        jumped.generation += 5;
        island.forge(9, jumped).await;
        let found = named(&island.scrubbed().await);
        let found_rows = [(1, "stale"), (5, "edited"), (6, "edited"), (7, "edited"), (8, "deleted"), (8, "fingerprint-stray"), (9, "edited")];
        assert_eq!(found, expected(&found_rows));

        // The use path refuses them too, and the findings are security events.
        let service = MeterService::new(island.island.clone());
        for number in [1, 5, 6, 7] {
            assert!(service.show(&island.officer, meter(number)).await.is_err(), "{number}");
        }
        let events = island.recorded(|event| matches!(event, Event::SecurityEvent(_)).then_some(())).await;
        assert!(events.len() >= 12);
    }

    async fn equal_keys_that_count_apart_are_found(island) {
        // The list of fingerprints loses an entry; then a vendor delivers all keys of meter 1 once
        // more, as those of meter 201.
        let (file, signature) = island.sample(&sample("generic-suite0", 1)).await;
        let sha256 = island.upload(&file, &signature).await;
        island.import(sha256, Some(&island.head_end)).await;
        island.sql(&format!("DELETE FROM fingerprint WHERE owner = {} AND key_type = 2", meter(1).as_i64())).await;
        let mut again = Forged::of(&file);
        again.device(1, |line| line.replace("\"batch\":\"B-", "\"batch\":\"D-"));
        again.device(2, |line| line.replace(&meter(1).to_string(), &meter(201).to_string()));
        let response = island.deliver_file(&again.file()).await;
        assert_eq!((response.shipment.unwrap().imported, response.duplicate_keys.len()), (1, 3), "KEK, GBEK and GAK are found");
        // I4: both would count from 1 with one GUEK.
        assert_eq!(named(&island.scrubbed().await), expected(&[(1, "domain-not-shared")]));
    }

    async fn what_does_not_fit_the_list_of_fingerprints_is_found(island) {
        island.deliver(&sample("generic-suite0", 4)).await;
        assert_eq!(island.scrubbed().await.findings, []);
        let owner = |number: u64| meter(number).as_i64();
        // An entry that is gone: an equal key would not be found when it is imported.
        island.sql(&format!("DELETE FROM fingerprint WHERE owner = {} AND key_type = 2", owner(2))).await;
        assert_eq!(named(&island.scrubbed().await), expected(&[(2, "fingerprint-missing")]));
        // One that points to a key of another value, and one to a meter that nobody knows.
        island.sql(&format!("UPDATE fingerprint SET prefix = prefix + 1 WHERE owner = {} AND key_type = 2", owner(3))).await;
        island.sql(&format!("UPDATE fingerprint SET owner = {} WHERE owner = {} AND key_type = 2", owner(77), owner(4))).await;
        let found = [(2, "fingerprint-missing"), (3, "fingerprint-missing"), (3, "fingerprint-stray"), (4, "fingerprint-missing"), (77, "fingerprint-stray")];
        assert_eq!(named(&island.scrubbed().await), expected(&found));
    }

    async fn a_row_that_nobody_recorded_and_a_deleted_principal_are_found(island) {
        island.deliver(&sample("generic-suite0", 2)).await;
        // Somebody with the seal key (a bug, or a server that was broken into) writes past the log.
        let title = meter(1);
        let stored = island.island.meter(title).await.unwrap().unwrap();
        let generation = kms_domain::Generation::from_i64(2).unwrap();
        let body = stored.to_row().unwrap();
        let seal = *island.island.committer.seal_key().seal(&kms_domain::RowId::Meter(title), generation, &body).octets();
        let row = SealedRow { generation: 2, seal, body };
        let mut decide = |_: &ReadSet| Decision::Commit(Box::new(Changes { meters: vec![MeterPut::update(title, row.clone())], ..Changes::default() }));
        assert_eq!(island.island.store.transact(Reads::default(), &mut decide).await.unwrap(), Committed::Written);
        // A group of its own.
        let group = kms_domain::Group::new(kms_domain::GroupId(9), "mine".to_owned(), stored.suite, stored.added);
        let body = group.to_row().unwrap();
        let seal = *island.island.committer.seal_key().seal(&kms_domain::RowId::Group(group.id), kms_domain::Generation::FIRST, &body).octets();
        let put = SealedPut { kind: RowKind::Group, id: 9_u64.to_be_bytes().to_vec(), row: SealedRow { generation: 1, seal, body } };
        let mut decide = |_: &ReadSet| Decision::Commit(Box::new(Changes { sealed: vec![put.clone()], ..Changes::default() }));
        island.island.store.transact(Reads::default(), &mut decide).await.unwrap();
        island.sql(&format!("DELETE FROM sealed WHERE kind = 4 AND id = {}", octets(island.other_head_end.principal.to_string().as_bytes()))).await;
        let found = named(&island.scrubbed().await);
        let other = [
            (1, title.to_string(), "unrecorded".to_owned()),
            (2, hex::encode_upper(9_u64.to_be_bytes()), "unrecorded".to_owned()),
            (4, hex::encode_upper(island.other_head_end.principal.to_string()), "deleted".to_owned()),
        ];
        assert_eq!(found, other.into_iter().collect());
    }

    async fn a_chain_with_a_gap_a_change_or_a_cut_end_is_found(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        island.assign(2, &[1]).await;
        island.assign(3, &[1]).await;
        assert_eq!(island.scrubbed().await.findings, []);
        let tails = island.island.store.audit_tails().await.unwrap();
        let tail = tails.iter().max_by_key(|tail| tail.sequence).unwrap();

        // A changed record.
        let records = island.island.store.audit_of_writer(tail.writer, 2, 1).await.unwrap();
        let mut changed = records[0].record.clone();
        let at = changed.len() - 3;
        changed[at] ^= 1;
        let writer = format!("(SELECT number FROM server WHERE writer = {})", octets(&tail.writer.octets()));
        let put = |record: &[u8]| format!("UPDATE audit SET record = {} WHERE sequence = 2 AND writer = {writer}", octets(record));
        island.sql(&put(&changed)).await;
        let of_chain = |report: &ScrubReport| report.findings.iter().filter(|finding| finding.kind == 0).map(|finding| (finding.finding.clone(), finding.detail.clone())).collect::<Vec<_>>();
        let found = of_chain(&Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap());
        assert!(matches!(&found[..], [(kind, detail)] if kind == "broken-chain" && detail.contains("record 2")), "{found:?}");
        island.sql(&put(&records[0].record)).await;
        // The chain goes on with the findings above, and fits again.
        assert!(of_chain(&Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap()).is_empty());

        // A gap: a record is gone, and with it what it said of its rows.
        island.sql(&format!("DELETE FROM audit WHERE sequence = 4 AND writer = {writer}")).await;
        let found = of_chain(&Scrubber::new(island.island.clone()).scrub(|_| true).await.unwrap());
        assert!(matches!(&found[..], [(kind, detail)] if kind == "broken-chain" && detail.contains("missing")), "{found:?}");
    }

    async fn an_end_that_was_cut_off_shows_at_its_successor(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let tails = island.island.store.audit_tails().await.unwrap();
        let (writer, last) = (tails[0].writer, tails[0].sequence);
        // The next run of the same server closes the chain of the one before.
        let next = std::sync::Arc::new(island.restarted().await);
        let officer = island.officer.clone();
        let service = MeterService::new(next.clone());
        let request = Request { id: RequestId::from_octets(&[8; 16]).unwrap(), digest: [8; 32] };
        service.assign(&officer, request, Assignment { selection: Selection::Meters(vec![meter(1)]), head_end: None, dry_run: false }).await.unwrap();
        assert_eq!(Scrubber::new(next.clone()).scrub(|_| true).await.unwrap().findings, []);
        island.sql(&format!("DELETE FROM audit WHERE sequence = {last} AND writer = (SELECT number FROM server WHERE writer = {})", octets(&writer.octets()))).await;
        let report = Scrubber::new(next).scrub(|_| true).await.unwrap();
        let cut = report.findings.iter().find(|finding| finding.kind == 0).unwrap();
        assert!(cut.detail.contains("cut off") && cut.id.as_ref() == writer.octets(), "{cut:?}");
    }

    /// A server that died is not started again: another one, under another name, closes its chain
    /// when it was silent for long enough.
    async fn a_successor_closes_the_chain_of_a_dead_server(island) {
        island.deliver(&sample("generic-suite0", 3)).await;
        let store = island.island.store.clone();
        let tail = store.audit_tails().await.unwrap().remove(0);
        let silent_ms = async || store.servers().await.unwrap().iter().find(|server| server.writer == tail.writer).unwrap().silent_ms;
        let closed_by = async |server: std::sync::Arc<crate::island::IslandContext>, number: u8, head_end| {
            let selection = Selection::Meters(vec![meter(1)]);
            let request = Request { id: RequestId::from_octets(&[number; 16]).unwrap(), digest: [number; 32] };
            MeterService::new(server).assign(&island.officer, request, Assignment { selection, head_end, dry_run: false }).await.unwrap();
            island.recorded(|event| match event { Event::WriterOpened(opened) => Some(opened.closed), _ => None }).await.pop().unwrap()
        };
        // As long as it may be alive, its chain is its own.
        assert_eq!(closed_by(island.another_server().await, 80, None).await, []);
        while silent_ms().await < 50 {
            tokio::task::yield_now().await;
        }
        let successor = island.another_server_after(std::time::Duration::from_millis(50)).await;
        let closed = closed_by(successor.clone(), 81, Some(island.head_end.principal.clone())).await;
        let of_dead = closed.iter().find(|chain| chain.writer == tail.writer.octets().as_slice()).unwrap();
        assert_eq!((of_dead.last_sequence, of_dead.chain.as_ref()), (tail.sequence, tail.chain.as_slice()));
        assert_eq!(Scrubber::new(successor.clone()).scrub(|_| true).await.unwrap().findings, []);
        // From now on nobody can shorten it.
        let server = format!("(SELECT number FROM server WHERE writer = {})", octets(&tail.writer.octets()));
        island.sql(&format!("DELETE FROM audit WHERE sequence = {} AND writer = {server}", tail.sequence)).await;
        let report = Scrubber::new(successor).scrub(|_| true).await.unwrap();
        assert!(report.findings.iter().any(|finding| finding.kind == 0 && finding.detail.contains("cut off")), "{:?}", report.findings);
    }

    async fn it_scrubs_while_others_write_and_tells_how_far_it_is(island) {
        island.deliver(&sample("generic-suite0", 600)).await;
        let scrubber = Scrubber::new(island.island.clone()).with_rows_at_once(200);
        assert!(matches!(scrubber.scrub_for(&island.head_end).await, Err(ServiceError::PermissionDenied { .. })));
        let mut answers = scrubber.scrub_for(&island.auditor).await.unwrap();
        let writing = async {
            for number in 0..40_u8 {
                island.assign(number + 10, &[u64::from(number) * 15 + 1]).await;
            }
        };
        let reading = async {
            let mut all: Vec<ScrubResponse> = Vec::new();
            while let Some(answer) = answers.recv().await {
                all.push(answer.unwrap());
            }
            all
        };
        let ((), all) = tokio::join!(writing, reading);
        let last = all.last().unwrap();
        assert!(last.finished && last.findings.is_empty(), "{last:?}");
        assert!(last.rows_read >= 606 && last.records_read > 0);
    }

    async fn a_scrub_that_runs_serves_all_who_ask(island) {
        let scrubber = Scrubber::new(island.island.clone());
        let Joined::Begun(runner, own) = island.island.scrubs.join() else { panic!("another scrub runs") };
        let so_far = ScrubResponse { records_read: 7, rows_read: 5, ..ScrubResponse::default() };
        assert!(runner.tell(so_far.clone()));
        let mut callers = Vec::new();
        for _ in 0..4 {
            callers.push(scrubber.scrub_for(&island.auditor).await.unwrap());
        }
        match scrubber.scrub_for(&island.auditor).await {
            Err(ServiceError::ResourceExhausted { reason, .. }) => assert!(reason.contains("`scrubs_per_principal`") && reason.contains("7 records and 5 rows"), "{reason}"),
            other => panic!("{other:?}"),
        }
        for caller in &mut callers {
            assert_eq!(caller.recv().await.unwrap().unwrap(), so_far);
        }
        // Who began it may go: others still watch.
        drop(own);
        assert!(runner.tell(so_far.clone()));
        runner.end(Ok(ScrubReport { records_read: 9, rows_read: 6, findings: Vec::new() }));
        for mut caller in callers {
            let mut last = None;
            while let Some(answer) = caller.recv().await {
                last = Some(answer.unwrap());
            }
            assert_eq!(last, Some(ScrubResponse { records_read: 9, rows_read: 6, findings: Vec::new(), finished: true }));
        }
        // The next one begins anew, and ends when nobody watches it.
        let Joined::Begun(runner, own) = island.island.scrubs.join() else { panic!("the scrub has ended") };
        let Joined::Running(other) = island.island.scrubs.join() else { panic!("it runs") };
        drop(own);
        assert!(runner.tell(so_far.clone()));
        drop(other);
        assert!(!runner.tell(so_far));
        assert!(matches!(island.island.scrubs.join(), Joined::Begun(..)));
    }

    async fn the_log_is_listed_by_who_and_what_in_both_orders(island) {
        island.deliver(&sample("generic-suite0", 20)).await;
        for number in 2..30 {
            island.assign(number, &[3]).await;
        }
        let log = AuditLog::new(island.island.clone());
        assert!(matches!(log.list(&island.head_end, &LogQuery { limit: 10, ..LogQuery::default() }).await, Err(ServiceError::PermissionDenied { .. })));
        let walk = |query: LogQuery| {
            let (log, caller) = (log.clone(), island.auditor.clone());
            async move {
                let mut query = query;
                let mut all = Vec::new();
                for _ in 0..1_000 {
                    let page = log.list(&caller, &query).await.unwrap();
                    assert!(page.records.len() <= query.limit);
                    all.extend(page.records);
                    query.after = page.next;
                    if page.next.is_none() { return all; }
                }
                panic!("it does not end");
            }
        };
        let ascending = walk(LogQuery { limit: 3, ..LogQuery::default() }).await;
        let mut descending = walk(LogQuery { limit: 5, newest_first: true, ..LogQuery::default() }).await;
        descending.reverse();
        assert_eq!(ascending, descending);
        let stored = island.island.store.audit_page(&AuditFilter::default(), None, 10_000).await.unwrap();
        assert_eq!(ascending.len(), stored.len());
        assert!(ascending.iter().zip(&stored).all(|(record, row)| record.encode_to_vec() == row.record.record));

        let of_meter = walk(LogQuery { limit: 10, meter: Some(meter(3)), ..LogQuery::default() }).await;
        assert_eq!(of_meter.len(), 29, "28 assignments and the import");
        let of_officer = walk(LogQuery { limit: 10, principal: Some(island.officer.principal.clone()), newest_first: true, ..LogQuery::default() }).await;
        assert_eq!(of_officer.len(), 29);
        assert!(matches!(of_officer.last().unwrap().event, Some(Event::ShipmentImported(_))));
        let middle = of_meter[10].time_ms;
        let later = walk(LogQuery { limit: 10, meter: Some(meter(3)), from: Some(kms_domain::UnixMillis(middle)), ..LogQuery::default() }).await;
        let earlier = walk(LogQuery { limit: 10, meter: Some(meter(3)), to: Some(kms_domain::UnixMillis(middle)), newest_first: true, ..LogQuery::default() }).await;
        assert_eq!(later.len() + earlier.len(), 29);
    }
}
