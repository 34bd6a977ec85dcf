use std::sync::atomic::{AtomicBool, Ordering};

use kms_client::sample::SampleShipment;
use kms_domain::{
    FlagId, KeyMaterial, KeyOrigin, KeyType, PersonName, Place, RequestId, RowId, RowSeal, SecuritySetupId,
    SystemTitle, UnixMillis, WorkOrderContent, WorkOrderId, WorkOrderTask, WriterId,
};
use kms_hsm::RootVersion;
use kms_proto::v1::AuditRecord;
use kms_store::{AuditAppend, AuditTail, Changes, Decision, ReadSet, SealedRow};
use prost::Message as _;

use super::*;
use crate::testing::{TestIsland, database, island_tests, meter, sample};
use crate::{
    keys::seal::{held_audit_key, seal_key},
    keys::source::source,
    keys::token::root_version,
    meter::{Enrolment, MeterService, NewMeter},
    scrub::Scrubber,
    work_order::{NewWorkOrder, WorkOrderService},
};
use kms_ledger::{AuditKey, AuditLeaf};

const AT_ONCE: RootTiming = RootTiming {
    settling: Duration::ZERO,
    seal_overlap: Duration::ZERO,
    lead: Duration::ZERO,
    look_again: Duration::ZERO,
};
const STORAGE: RootPurpose = RootPurpose::StorageKek(KeyClass::Session);
const DIVERSIFICATION: RootPurpose = RootPurpose::Diversification(KeyClass::Session);

fn request() -> Request {
    Request { id: RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap(), digest: [1; 32] }
}

/// A work order at a meter.
fn order() -> NewWorkOrder {
    let now = IslandContext::now();
    let (technician, tasks) = (PersonName::parse("Ida").unwrap(), [WorkOrderTask::Read].into_iter().collect());
    let time = (now, now.after(3_600_000));
    let content = WorkOrderContent::new(technician, vec![meter(1)], tasks, time, Place::default()).unwrap();
    NewWorkOrder { id: WorkOrderId::parse("WO-1").unwrap(), content }
}

fn rotate() -> RotationChange {
    RotationChange::Rotate { rows_per_second: 1_000_000 }
}

fn service(island: &Arc<IslandContext>) -> RootService {
    RootService::new(island.clone()).with_timing(AT_ONCE)
}

/// Writes a record.
async fn note(island: &IslandContext) {
    let act = island.committer.act_in_test(
        kms_ledger::Actor::server(kms_ledger::ServerAct::TEST),
        Reads::default(),
        |view| {
            view.append(Event::RootVersionMade(v1::RootVersionMade::default()));
            Ok(())
        },
    );
    act.await.unwrap();
}

/// Puts records into the database, past the server, which this key links: to the chain of `writer`,
/// from the record after `tail` on.
async fn forge_records(
    island: &IslandContext,
    key: &AuditKey,
    writer: WriterId,
    tail: Option<&AuditTail>,
    events: Vec<Event>,
) {
    let time = UnixMillis(IslandContext::now().0 - 86_400_000);
    let (mut sequence, mut chain) = tail.map_or((0, [0; 32]), |tail| (tail.sequence + 1, tail.chain));
    let mut forged = Vec::new();
    for event in events {
        let kind = kms_ledger::event_kind(&event);
        let record = AuditRecord {
            writer: writer.octets().to_vec().into(),
            sequence,
            time_ms: time.0,
            event: Some(event),
            ..AuditRecord::default()
        };
        let record = record.encode_to_vec();
        chain = key.next(&chain, &AuditLeaf::of(&record));
        forged.push(AuditAppend { writer, sequence, time, kind, record, chain });
        sequence += 1;
    }
    if tail.is_none() {
        island.store.register_server(writer, "forged").await.unwrap();
    }
    let mut write = |_: &ReadSet| Decision::Commit(Box::new(Changes { audit: forged.clone(), ..Changes::default() }));
    island.store.transact(Reads::default(), &mut write).await.unwrap();
}

fn begins(version: u32, closed: Vec<v1::ClosedChain>) -> Event {
    Event::WriterOpened(v1::WriterOpened {
        server: "forged".to_owned(),
        audit_key_version: version,
        closed,
        ..v1::WriterOpened::default()
    })
}

fn goes_on_with(version: u32) -> Event {
    Event::AuditKeyChanged(v1::AuditKeyChanged { version, closed: Vec::new() })
}

async fn tail_of(island: &IslandContext, writer: WriterId) -> AuditTail {
    island.store.audit_tails().await.unwrap().into_iter().find(|tail| tail.writer == writer).unwrap()
}

async fn findings(island: &Arc<IslandContext>) -> Vec<v1::ScrubFinding> {
    Scrubber::new(island.clone()).scrub(|_| true).await.unwrap().findings
}

impl TestIsland {
    fn roots(&self) -> RootService {
        service(&self.island)
    }

    /// Every key of a class: meter, type, version, KEK version, and the fingerprint of the value
    /// that the HSM finds under the wrap.
    async fn stored_keys(&self, class: KeyClass, meters: u64) -> Vec<(u64, KeyType, u8, [u8; 16])> {
        let mut found = Vec::new();
        for number in 1..=meters {
            let meter = self.island.meter(meter(number)).await.unwrap().unwrap();
            for slot in meter.slots.iter().filter(|slot| slot.key_type().class() == class) {
                for version in slot.versions() {
                    let KeyMaterial::Wrapped(wrap) = version.material() else { continue };
                    let source = source(meter.owner(), slot, version).unwrap();
                    let opened = self
                        .island
                        .hsm
                        .rewrap_batch(vec![source], root_version(wrap.storage_kek_version()).unwrap())
                        .await
                        .unwrap()
                        .remove(0)
                        .unwrap();
                    let value = self.island.fingerprint_key.fingerprint(&opened.fingerprint_wrap);
                    assert_eq!(version.fingerprint(), Some(value), "{number} {}", slot.key_type());
                    found.push((number, slot.key_type(), wrap.storage_kek_version(), value));
                }
            }
        }
        found
    }

    /// I1: nothing in the tokens is readable, extractable or usable beyond its purpose.
    async fn nothing_is_readable(&self) {
        let capabilities = self.island.hsm.usable(Duration::from_secs(10)).await.unwrap();
        for (_, objects) in self.island.hsm.inventory().await.unwrap() {
            for object in objects {
                assert_eq!(
                    object.findings(self.island.name(), &capabilities),
                    Vec::<String>::new(),
                    "{}",
                    object.label
                );
            }
        }
    }

    async fn state(&self, purpose: RootPurpose) -> v1::RootRotation {
        let shown = self.roots().show(&self.auditor).await.unwrap();
        shown
            .roots
            .into_iter()
            .rev()
            .find(|root| root.root == purpose.to_string() && root.rotation.is_some())
            .unwrap()
            .rotation
            .unwrap()
    }

    /// The records whose events are of this kind.
    async fn records_of(&self, is_kind: impl Fn(&Event) -> bool) -> Vec<AuditRecord> {
        let mut records = self.log().await;
        records.retain(|record| record.event.as_ref().is_some_and(&is_kind));
        records
    }

    async fn put_back(&self, number: u64, row: &SealedRow) {
        self.put_where(&format!("meter SET {} WHERE title = {}", columns(row), meter(number).as_i64())).await;
    }

    async fn put_island_back(&self, row: &SealedRow) {
        self.put_where(&format!("sealed SET {} WHERE kind = {}", columns(row), RowKind::Island.number())).await;
    }

    async fn put_where(&self, update: &str) {
        assert_eq!(kms_store_testing::execute(&database().database, &format!("UPDATE {update}")).await.unwrap(), 1);
    }

    async fn island_row(&self) -> SealedRow {
        let (kind, name) = self.island.row_name();
        self.island.store.sealed(kind, &name).await.unwrap().unwrap()
    }

    /// Why an import of a shipment stops.
    async fn import_refused(&self, island: &Arc<IslandContext>, file_sha256: [u8; 32]) -> String {
        let shipments = crate::shipment::ShipmentService::new(island.clone());
        let mut import =
            shipments.import(&self.officer, &file_sha256, Some(self.head_end.principal.clone())).await.unwrap();
        loop {
            if let Err(error) = import.next().await.unwrap() {
                return error.to_string();
            }
        }
    }

    async fn row_of(&self, number: u64) -> SealedRow {
        self.island.store.meters(&[meter(number)]).await.unwrap().remove(0).row
    }
}

fn columns(row: &SealedRow) -> String {
    let octets = |octets: &[u8]| kms_store_testing::octets(&database().database, octets);
    format!("generation = {}, seal = {}, body = {}", row.generation, octets(&row.seal), octets(&row.body))
}

fn next_step(outcome: Result<impl std::fmt::Debug, ServiceError>) -> String {
    match outcome.unwrap_err() {
        ServiceError::FailedPrecondition { next_step, .. } => next_step,
        other => panic!("{other}"),
    }
}

island_tests! {
    async fn stored_keys_move_to_the_new_storage_kek_and_stay_what_they_are(island) {
        let mut island = island;
        island.deliver(&sample("generic-suite0", 300)).await;
        assert!(next_step(island.roots().change(&island.officer, request(), STORAGE, rotate()).await).contains("roots new"));
        let before = island.stored_keys(KeyClass::Session, 300).await;
        let id = island.add_root(STORAGE).await;
        assert_eq!(island.island.row().root_standing(id), Some(RootStanding::Made));
        let roots = island.roots();
        assert!(matches!(roots.change(&island.auditor, request(), STORAGE, rotate()).await, Err(ServiceError::PermissionDenied { .. })));
        let settling = roots.clone().with_timing(RootTiming { settling: Duration::from_secs(3_600), ..AT_ONCE });
        assert!(next_step(settling.change(&island.officer, request(), STORAGE, rotate()).await).contains("wait"));
        let same = request();
        roots.change(&island.officer, same, STORAGE, rotate()).await.unwrap();
        roots.change(&island.officer, same, STORAGE, rotate()).await.unwrap();

        // I1: while keys move, another session of the token sees no object whose value could be
        // read.
        let (done, hsm) = (Arc::new(AtomicBool::new(false)), island.island.hsm.clone());
        let looked = tokio::spawn({
            let done = done.clone();
            async move {
                let mut times = 0;
                while !done.load(Ordering::Relaxed) || times == 0 {
                    let objects = hsm.inventory().await.unwrap();
                    assert!(objects.iter().flat_map(|(_, objects)| objects).all(|object| !object.is_secret() || !object.value_readable));
                    times += 1;
                }
            }
        });
        let mut pages = 0;
        while roots.page(id).await.unwrap().is_some() {
            island.nothing_is_readable().await;
            pages += 1;
        }
        done.store(true, Ordering::Relaxed);
        looked.await.unwrap();
        assert!(pages >= 3, "two pages of meters, and a round that finds nothing");

        let state = island.state(STORAGE).await;
        assert_eq!((state.state.as_str(), state.round, state.all_changed, state.refused), ("finished", 2, 300, 0));
        let after = island.stored_keys(KeyClass::Session, 300).await;
        assert_eq!(state.keys, after.len() as u64);
        assert!(before.iter().all(|key| key.2 == 1) && after.iter().all(|key| key.2 == 2));
        let values = |keys: &[(u64, KeyType, u8, [u8; 16])]| keys.iter().map(|key| (key.0, key.1, key.3)).collect::<Vec<_>>();
        assert_eq!(values(&before), values(&after), "every key is the same, by its fingerprint");
        assert!(island.stored_keys(KeyClass::Kek, 3).await.iter().all(|key| key.2 == 1), "another class has its own KEK");
        // I2: a record a page, with the rows.
        let records = island.records_of(|event| matches!(event, Event::RootRowsAdvanced(_))).await;
        assert_eq!(records.iter().map(|record| record.row_writes.iter().filter(|row| row.kind == u32::from(RowId::Meter(meter(1)).kind())).count()).sum::<usize>(), 300);
        let counts = roots.count(|_| true).await.unwrap();
        assert_eq!((counts.of(RootId { purpose: STORAGE, version: 1 }), counts.of(id), counts.unreadable), (0, after.len() as u64, 0));
        // What comes from now on is under the new one, on every server.
        let other = TestIsland { island: island.another_server().await, ..island };
        other.roots().refresh().await.unwrap();
        other.deliver(&SampleShipment { first_number: 1_001, ..sample("generic-suite1", 2) }).await;
        assert_eq!(other.roots().count(|_| true).await.unwrap().of(RootId { purpose: STORAGE, version: 1 }), 0);
        assert_eq!(Scrubber::new(other.island.clone()).scrub(|_| true).await.unwrap().findings, []);
        other.end().await;
    }

    async fn a_pass_survives_a_crash_anywhere_and_two_servers_do_not_disturb_each_other(island) {
        let mut island = island;
        island.deliver(&sample("generic-suite0", 300)).await;
        let before = island.stored_keys(KeyClass::Session, 300).await;
        let id = island.add_root(STORAGE).await;
        let (first, second) = (island.roots(), service(&island.another_server().await));
        second.refresh().await.unwrap();
        first.change(&island.officer, request(), STORAGE, rotate()).await.unwrap();
        // A server that has wrapped keys anew and dies before it writes: nothing of it is left.
        let rotation = first.load(id).await.unwrap().unwrap();
        let scan = first.scan(&rotation).await.unwrap();
        let wraps = first.wrap_anew(&scan.due, KeyClass::Session, 2).await.unwrap();
        assert_eq!(island.stored_keys(KeyClass::Session, 300).await, before);
        assert_eq!(second.page(id).await.unwrap(), Some(256));
        // A server that was paused in the same place comes too late, and writes nothing.
        assert!(!first.write(id, scan, pass::Work::Rewrap(wraps)).await.unwrap());
        assert_eq!(island.state(STORAGE).await.looked, 256);
        // One that was not heard of for a while is left the pass; then another goes on from where
        // it was.
        let slow = second.clone().with_timing(RootTiming { lead: Duration::from_secs(60), ..AT_ONCE });
        assert_eq!(slow.page(id).await.unwrap(), Some(44));
        assert_eq!(first.page(id).await.unwrap(), None);
        while slow.page(id).await.unwrap().is_some() {}
        assert_eq!(island.state(STORAGE).await.state, "finished");
        let after = island.stored_keys(KeyClass::Session, 300).await;
        assert_eq!(before.iter().map(|key| (key.0, key.3)).collect::<Vec<_>>(), after.iter().map(|key| (key.0, key.3)).collect::<Vec<_>>());
        assert_eq!(island.state(STORAGE).await.all_changed, 300, "each row was written once");
        island.end().await;
    }

    async fn a_row_that_does_not_verify_is_left_and_pauses_the_pass(island) {
        let mut island = island;
        island.deliver(&sample("generic-suite0", 5)).await;
        let id = island.add_root(STORAGE).await;
        island.roots().change(&island.officer, request(), STORAGE, rotate()).await.unwrap();
        let good = island.row_of(3).await;
        let mut edited = good.clone();
        *edited.body.last_mut().unwrap() ^= 1;
        island.put_back(3, &edited).await;
        let roots = island.roots();
        while roots.page(id).await.unwrap().is_some() {}
        let state = island.state(STORAGE).await;
        assert_eq!((state.state.as_str(), state.reason.as_str(), state.all_changed), ("paused", "1 row skipped: unreadable, or refused by the HSM", 4));
        island.put_back(3, &good).await;
        roots.change(&island.officer, request(), STORAGE, RotationChange::Resume { rows_per_second: None }).await.unwrap();
        while roots.page(id).await.unwrap().is_some() {}
        let state = island.state(STORAGE).await;
        assert_eq!((state.state.as_str(), state.all_changed), ("finished", 5));
        island.end().await;
    }

    async fn a_row_with_a_name_that_none_has_does_not_hold_up_the_others(island) {
        let mut island = island;
        island.deliver(&sample("generic-suite0", 5)).await;
        let id = island.add_root(RootPurpose::Seal).await;
        let octets = |octets: &[u8]| kms_store_testing::octets(&database().database, octets);
        let row = format!("{}, {}, 1, {}, {}", RowKind::Group.number(), octets(&[1, 2, 3]), octets(&[1; 18]), octets(&[0]));
        let insert = format!("INSERT INTO sealed (kind, id, generation, seal, body) VALUES ({row})");
        kms_store_testing::execute(&database().database, &insert).await.unwrap();
        let roots = island.roots();
        roots.change(&island.officer, request(), RootPurpose::Seal, rotate()).await.unwrap();
        while roots.page(id).await.unwrap().is_some() {}
        let state = island.state(RootPurpose::Seal).await;
        assert_eq!((state.state.as_str(), state.reason.as_str()), ("paused", "1 row skipped: unreadable, or refused by the HSM"));
        let counts = roots.count(|_| true).await.unwrap();
        assert_eq!((counts.of(RootId { purpose: RootPurpose::Seal, version: 1 }), counts.unreadable), (0, 1), "all others have the new seal");
        island.end().await;
    }

    async fn a_token_that_lacks_a_storage_kek_keeps_the_one_before_and_learns_all_else(island) {
        let mut island = island;
        let id = island.add_root(STORAGE).await;
        // As on a server whose token was not given its copy.
        island.island.hsm.destroy_root(token_key(id).unwrap()).await.unwrap();
        let other = island.add_root(RootPurpose::StorageKek(KeyClass::Authentication)).await;
        let name = island.island.name().clone();
        let reads = Reads { sealed: vec![island.island.row_name()], ..Reads::default() };
        let act = island.island.committer.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), reads, move |view| {
            let mut row = (*view.island(&name)?.unwrap()).clone();
            row.activate_root(id, 0, IslandContext::now()).unwrap();
            row.activate_root(other, 0, IslandContext::now()).unwrap();
            view.append(Event::RootRotationChanged(RootRotationChanged::default()));
            view.put_island(row)
        });
        act.await.unwrap();
        for _ in 0..2 {
            let refused = island.roots().refresh().await.unwrap_err().to_string();
            assert!(refused.contains("does not hold the root `session/storage-kek/2`"), "{refused}");
        }
        let used = |class| island.island.hsm.storage_kek(class).number();
        assert_eq!((used(KeyClass::Session), used(KeyClass::Authentication)), (1, 2));
        assert_eq!(island.island.row().current_root(STORAGE), Some(2), "the row is the newest all the same");
        let shown = island.roots().show(&island.auditor).await.unwrap().roots;
        assert!(shown.iter().any(|root| root.root == STORAGE.to_string() && root.version == 2 && root.in_token == Some(false)));
        // I3: the one before is used as long as its destruction was not decided.
        island.deliver(&sample("generic-suite0", 1)).await;
        assert!(island.stored_keys(KeyClass::Session, 1).await.iter().all(|key| key.2 == 1));
        island.end().await;
    }

    async fn a_version_that_was_only_made_is_given_up_by_two_people(island) {
        let mut island = island;
        let id = island.add_root(STORAGE).await;
        let roots = island.roots();
        let destruction = Destruction { id, oldest_backup: IslandContext::now(), reason: "a copy was forgotten".to_owned(), quorum: kms_domain::Quorum::ONE };
        let proposal = roots.propose_destruction(&island.officer, request(), destruction).await.unwrap();
        let approved = kms_domain::ProposalId::from_octets(&proposal.proposal_id).unwrap();
        let approval = crate::approval::ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() };
        let colleague = island.colleague().await;
        crate::approval::ProposalService::new(island.island.clone()).change(&colleague, request(), approved, approval).await.unwrap();
        roots.destroy(&island.officer, request(), approved).await.unwrap();
        assert!(!island.island.hsm.has_key(token_key(id).unwrap()).await.unwrap());
        assert!(next_step(roots.change(&island.officer, request(), STORAGE, rotate()).await).contains("roots new"));
        // The next one takes its place.
        let third = island.add_root(STORAGE).await;
        assert_eq!(third.version, 3);
        island.roots().change(&island.officer, request(), STORAGE, rotate()).await.unwrap();
        assert_eq!(island.island.row().current_root(STORAGE), Some(3));
        island.end().await;
    }

    async fn rows_get_the_seal_of_the_new_version_and_the_old_one_is_refused_afterwards(island) {
        let mut island = island;
        island.deliver(&sample("generic-suite0", 30)).await;
        let orders = WorkOrderService::new(island.island.clone());
        orders.create(&island.officer, request(), vec![order()]).await.unwrap();
        let id = island.add_root(RootPurpose::Seal).await;
        let old = island.row_of(1).await;
        let late = service(&island.another_server().await);
        let roots = island.roots();
        roots.change(&island.officer, request(), RootPurpose::Seal, rotate()).await.unwrap();
        assert_eq!(island.island.committer.seal_key().version(), 2);
        while roots.page(id).await.unwrap().is_some() {}
        assert_eq!(island.state(RootPurpose::Seal).await.state, "finished");
        let counts = roots.count(|_| true).await.unwrap();
        assert_eq!((counts.of(RootId { purpose: RootPurpose::Seal, version: 1 }), counts.of(id)), (0, counts.rows));
        assert_eq!(RowSeal::from_octets(&island.row_of(1).await.seal).unwrap().key_version(), 2);
        let sealed = island.island.store.sealed(RowKind::WorkOrder, b"WO-1").await.unwrap().unwrap();
        assert_eq!((RowSeal::from_octets(&sealed.seal).unwrap().key_version(), sealed.generation), (2, 2));
        let orders = WorkOrderService::new(island.island.clone());
        let page = orders.list(&island.officer, crate::work_order::WorkOrderQuery::default(), None, 9).await.unwrap();
        assert_eq!(page.orders.iter().map(|order| order.revision).collect::<Vec<_>>(), [1], "what is ordered is the same");
        // A server that has not looked yet refuses what it cannot check, and goes on as soon as it
        // has looked.
        assert!(late.island.meter(meter(1)).await.is_err());
        late.refresh().await.unwrap();
        assert!(late.island.meter(meter(1)).await.unwrap().is_some());

        // I5: after the old key was retired, a row with its seal is refused everywhere, even in its
        // newest generation.
        let newest = late.island.meter(meter(2)).await.unwrap().unwrap();
        let row = island.row_of(2).await;
        let generation = kms_domain::Generation::from_i64(i64::try_from(row.generation).unwrap() + 1).unwrap();
        let body = newest.to_row().unwrap();
        let key = seal_key(&island.island.hsm, 1).await.unwrap();
        let seal = *key.seal(&RowId::Meter(meter(2)), generation, &body).octets();
        let forged = SealedRow { generation: generation.number(), seal, body };
        island.put_back(2, &forged).await;
        assert!(late.island.meter(meter(2)).await.is_ok(), "still accepted");
        // The old key is not retired while a row has its seal: it would be lost. Another round of
        // the pass begins.
        roots.lead_for(Duration::ZERO).await.unwrap();
        let first = RootId { purpose: RootPurpose::Seal, version: 1 };
        assert_eq!(island.island.row().root_standing(first), Some(RootStanding::Replaced));
        assert_eq!((island.state(RootPurpose::Seal).await.state.as_str(), island.state(RootPurpose::Seal).await.looked), ("running", 0));
        island.put_back(2, &row).await;
        while roots.page(id).await.unwrap().is_some() {}
        roots.lead_for(Duration::ZERO).await.unwrap();
        late.refresh().await.unwrap();
        island.put_back(2, &forged).await;
        assert_eq!(island.island.row().root_standing(first), Some(RootStanding::Retired));
        assert!(late.island.meter(meter(2)).await.is_err() && island.island.meter(meter(2)).await.is_err());
        island.put_back(2, &row).await;

        // I5: nor does the island's own row come back under it, for a server that starts anew and
        // remembers. It would say that nothing was retired.
        let folder = tempfile::tempdir().unwrap();
        let restore = kms_ledger::RestoreSettings { watermark: Some(folder.path().join("watermark")), ..Default::default() };
        let (store, hsm, name) = (&island.island.store, &island.island.hsm, island.island.name());
        let open = async |restore: kms_ledger::RestoreSettings| crate::island_keys::IslandKeys::open(store, hsm, name, &restore).await;
        let keys = open(restore.clone()).await.unwrap();
        let settings = kms_ledger::CommitterSettings {
            policy_sha256: None,
            island: name.clone(),
            server: "three".to_owned(),
            chunk_size: kms_domain::ChunkSize::DEFAULT,
            limits: Arc::default(),
            restore: restore.clone(),
            silence: kms_ledger::CommitterSettings::SILENCE,
        };
        let three = kms_ledger::Committer::start(store.clone(), keys.seal, keys.audit, settings);
        three.settled().await;
        let noted = three.act_in_test(kms_ledger::Actor::server(kms_ledger::ServerAct::TEST), Reads::default(), |view| {
            view.append(Event::RootVersionMade(v1::RootVersionMade::default()));
            Ok(())
        });
        noted.await.unwrap();
        three.remember().await;
        let true_row = island.island_row().await;
        let forged = kms_domain::Island { seal_key_version: 1, ledger: kms_domain::RootLedger::default(), ..(*island.island.row()).clone() };
        let generation = kms_domain::Generation::from_i64(i64::try_from(true_row.generation).unwrap() + 1).unwrap();
        let seal = *seal_key(hsm, 1).await.unwrap().seal(&RowId::Island(name.clone()), generation, &forged.to_row()).octets();
        island.put_island_back(&SealedRow { generation: generation.number(), seal, body: forged.to_row() }).await;
        let refused = open(restore.clone()).await.err().unwrap().to_string();
        assert!(refused.contains("were retired") && refused.contains("kms-server restored"), "{refused}");
        // The limit: who remembers nothing believes it; and an operator can say that an older
        // database was put back.
        assert!(open(kms_ledger::RestoreSettings::default()).await.is_ok());
        assert!(open(kms_ledger::RestoreSettings { declared: true, ..restore.clone() }).await.is_ok());
        island.put_island_back(&true_row).await;
        assert!(open(restore).await.is_ok());
        // The earlier records and the fingerprints are checked with keys of the first seal root,
        // which stays.
        let fresh = island.another_server().await;
        // It began with the key of before, and is not stuck with it.
        learn_seal_keys(&*fresh.store, &fresh.hsm, &fresh.committer).await.unwrap();
        tokio::time::timeout(Duration::from_secs(60), fresh.committer.settled()).await.unwrap();
        assert_eq!(fresh.committer.seal_key().version(), 2);
        service(&fresh).refresh().await.unwrap();
        assert_eq!(Scrubber::new(fresh.clone()).scrub(|_| true).await.unwrap().findings, []);
        assert!(fresh.meter(meter(1)).await.unwrap().is_some());
        assert_ne!(old.seal, island.row_of(1).await.seal);
        island.end().await;
    }

    async fn the_log_goes_on_under_the_new_audit_key_and_what_the_old_one_links_is_believed_no_more(island) {
        let mut island = island;
        let gone = island.island.committer.writer().unwrap();
        let id = island.add_root(RootPurpose::Seal).await;
        // One that hears of nothing, and is there all the time.
        let deaf = island.another_server().await;
        note(&deaf).await;
        let leader = island.another_server().await;
        note(&leader).await;
        let roots = service(&leader);
        roots.change(&island.officer, request(), RootPurpose::Seal, rotate()).await.unwrap();
        island.roots().refresh().await.unwrap();
        assert!(leader.committer.is_linked_with(2) && island.island.committer.is_linked_with(2) && deaf.committer.is_linked_with(1));
        while roots.page(id).await.unwrap().is_some() {}
        roots.lead_for(Duration::ZERO).await.unwrap();
        assert_eq!(leader.committer.seal_keys().oldest(), 2);
        // Each chain tells where the key changes, in the last record under the old one and the
        // first under the new; and one closes those of the others.
        let changes = island.records_of(|event| matches!(event, Event::AuditKeyChanged(_))).await;
        let closing = |record: &AuditRecord| matches!(&record.event, Some(Event::AuditKeyChanged(event)) if !event.closed.is_empty());
        assert_eq!((changes.len(), changes.iter().filter(|record| closing(record)).count()), (5, 1), "{changes:?}");
        assert_eq!(findings(&leader).await, []);
        // What the deaf one adds under the old key is doubted, and not what it links when it has
        // heard of the new one.
        learn_seal_keys(&*deaf.store, &deaf.hsm, &deaf.committer).await.unwrap();
        note(&deaf).await;
        let doubted = findings(&leader).await;
        assert!(doubted.len() == 1 && doubted[0].detail.contains("retired"), "{doubted:?}");
        service(&deaf).refresh().await.unwrap();
        assert_eq!(findings(&leader).await, []);

        // I5: who learned the old key and writes the database begins a chain as if it were from
        // before.
        let stolen = held_audit_key(&leader.hsm, 1).await.unwrap().unwrap();
        let forger = |number: u8| WriterId::from_octets(&[number; 16]).unwrap();
        forge_records(&leader, &stolen, forger(9), None, vec![begins(0, Vec::new())]).await;
        // Another says that it goes on with the new one, and closes the first, and one that is
        // alive besides.
        let alive = tail_of(&leader, island.island.committer.writer().unwrap()).await;
        let ends = [tail_of(&leader, forger(9)).await, alive.clone()];
        let closed: Vec<_> = ends.iter().map(|tail| v1::ClosedChain {
            writer: tail.writer.octets().to_vec().into(),
            last_sequence: tail.sequence,
            chain: tail.chain.to_vec().into(),
        }).collect();
        forge_records(&leader, &stolen, forger(10), None, vec![begins(1, closed), goes_on_with(2)]).await;
        // And the chain of a server that is gone, which was closed, goes on.
        forge_records(&leader, &stolen, gone, Some(&tail_of(&leader, gone).await), vec![goes_on_with(2)]).await;
        let found = |findings: Vec<v1::ScrubFinding>| {
            let mut found: Vec<_> = findings.into_iter().filter(|finding| finding.detail.contains("retired")).map(|finding| finding.id.to_vec()).collect();
            found.sort();
            found
        };
        let mut expected = [forger(9), forger(10), gone].map(|writer| writer.octets().to_vec());
        expected.sort();
        assert_eq!(found(findings(&leader).await), expected.to_vec());
        // A server that starts afterwards closes none of them, so the findings stay.
        let late = island.another_server_after(Duration::ZERO).await;
        learn_seal_keys(&*late.store, &late.hsm, &late.committer).await.unwrap();
        service(&late).refresh().await.unwrap();
        note(&late).await;
        assert_eq!(found(findings(&late).await), expected.to_vec());
        // Nor does a link of the old key pass for one of the new.
        forge_records(&leader, &stolen, forger(11), None, vec![begins(2, Vec::new())]).await;
        let found = findings(&late).await;
        assert!(found.iter().any(|finding| finding.id == forger(11).octets().as_slice() && finding.detail.contains("chain value")), "{found:?}");
        island.end().await;
    }

    async fn tasks_of_a_campaign_under_way_hold_up_the_retirement_and_the_rotation_says_so(island) {
        use crate::campaign::{CampaignService, CampaignChange, tests as campaigns};
        let mut island = island;
        island.deliver(&sample("generic-suite0", 5)).await;
        let service = CampaignService::new(island.island.clone());
        let draft = service.create(&island.officer, request(), campaigns::new(campaigns::terms()), true).await.unwrap().campaign.unwrap();
        let campaign = campaigns::id(&draft);
        let colleague = island.colleague().await;
        service.change(&colleague, request(), campaign, campaigns::approval(&draft)).await.unwrap();
        service.change(&island.officer, request(), campaign, CampaignChange::Start).await.unwrap();
        service.lead(campaign).await.unwrap();
        let id = island.add_root(RootPurpose::Seal).await;
        let roots = island.roots();
        roots.change(&island.officer, request(), RootPurpose::Seal, rotate()).await.unwrap();
        while roots.page(id).await.unwrap().is_some() {}
        for _ in 0..2 {
            roots.lead_for(Duration::ZERO).await.unwrap();
            let state = island.state(RootPurpose::Seal).await;
            assert!(state.state == "finished" && state.reason.contains("tasks of an unfinished campaign"), "{state:?}");
        }
        let not_retired = |record: &AuditRecord| matches!(&record.event, Some(Event::RootRotationChanged(event)) if event.change == "not retired");
        assert_eq!(island.log().await.iter().filter(|record| not_retired(record)).count(), 1, "on the record when it is news");
        // Within ten minutes nobody reads all rows again.
        let service = CampaignService::new(island.island.clone());
        service.change(&island.officer, request(), campaign, CampaignChange::Abort { reason: "test".to_owned() }).await.unwrap();
        let first = RootId { purpose: RootPurpose::Seal, version: 1 };
        roots.clone().with_timing(RootTiming { look_again: Duration::from_secs(600), ..AT_ONCE }).lead_for(Duration::ZERO).await.unwrap();
        assert_eq!(island.island.row().root_standing(first), Some(RootStanding::Replaced));
        roots.lead_for(Duration::ZERO).await.unwrap();
        assert_eq!(island.island.row().root_standing(first), Some(RootStanding::Retired));
        assert_eq!(island.state(RootPurpose::Seal).await.reason, "");
        island.end().await;
    }

    async fn new_keys_are_derived_from_the_newest_diversification_root(island) {
        let mut island = island;
        let new = |number: u64| NewMeter { title: meter(number), serial: number.to_string(), groups: Vec::new() };
        let enrolment = |meters| Enrolment {
            manufacturer: FlagId::parse("KAM").unwrap(),
            device_profile: kms_domain::DeviceProfileName::parse("generic-suite0").unwrap(),
            batch: "lab".to_owned(),
            meters,
        };
        let request_of = |number: u8| Request { id: RequestId::from_octets(&[number; 16]).unwrap(), digest: [number; 32] };
        let meters = MeterService::new(island.island.clone());
        meters.enrol(&island.officer, request_of(1), enrolment(vec![new(1)])).await.unwrap();
        let origin = async |island: &TestIsland, title: SystemTitle| {
            let meter = island.island.meter(title).await.unwrap().unwrap();
            meter.slots.get(SecuritySetupId::DEFAULT, KeyType::GUEK).unwrap().active().unwrap().origin()
        };
        let KeyOrigin::Diversified { root_version: 1, .. } = origin(&island, meter(1)).await else { panic!("the profile's GUEK is diversified") };
        let id = island.add_root(DIVERSIFICATION).await;
        let meters = MeterService::new(island.island.clone());
        meters.enrol(&island.officer, request_of(2), enrolment(vec![new(2)])).await.unwrap();
        assert!(matches!(origin(&island, meter(2)).await, KeyOrigin::Diversified { root_version: 1, .. }), "made is not current");
        island.roots().change(&island.officer, request(), DIVERSIFICATION, rotate()).await.unwrap();
        meters.enrol(&island.officer, request_of(3), enrolment(vec![new(3)])).await.unwrap();
        assert!(matches!(origin(&island, meter(3)).await, KeyOrigin::Diversified { root_version: 2, .. }));
        // The old keys are what they were: still derived from the old root, and counted.
        let counts = island.roots().count(|_| true).await.unwrap();
        let first = RootId { purpose: DIVERSIFICATION, version: 1 };
        assert!(counts.of(first) >= 2 && counts.of(id) >= 1, "{counts:?}");
        // I3: while a meter may hold a key of the old root, it is not destroyed.
        let destruction = Destruction { id: first, oldest_backup: IslandContext::now(), reason: "leaked".to_owned(), quorum: kms_domain::Quorum::ONE };
        let refused = island.roots().propose_destruction(&island.officer, request(), destruction).await.unwrap_err().to_string();
        assert!(refused.contains("key versions use the root"), "{refused}");
        assert!(matches!(origin(&island, meter(1)).await, KeyOrigin::Diversified { root_version: 1, .. }));
        island.end().await;
    }

    async fn vendors_are_given_the_new_transport_key_and_the_old_one_serves_until_it_is_retired(island) {
        let mut island = island;
        let old = island.sample(&sample("generic-suite0", 2)).await;
        let late = island.sample(&sample("generic-suite0", 3)).await;
        let id = island.add_root(RootPurpose::VendorTransport).await;
        let shipments = crate::shipment::ShipmentService::new(island.island.clone());
        let before = shipments.transport_key(&island.officer).await.unwrap().spki;
        island.roots().change(&island.officer, request(), RootPurpose::VendorTransport, rotate()).await.unwrap();
        let now = shipments.transport_key(&island.officer).await.unwrap().spki;
        assert_ne!(before, now);
        assert_eq!(now, island.island.hsm.transport_key_spki(root_version(id.version).unwrap()).await.unwrap());
        // What a vendor has packed before is still read.
        let sha256 = island.upload(&old.0, &old.1).await;
        assert_eq!(island.import(sha256, Some(&island.head_end)).await.shipment.unwrap().imported, 2);
        island.roots().change(&island.officer, request(), RootPurpose::VendorTransport, RotationChange::Retire).await.unwrap();
        let sha256 = island.upload(&late.0, &late.1).await;
        let refused = shipments.import(&island.officer, &sha256, Some(island.head_end.principal.clone())).await.unwrap().next().await.unwrap();
        let refused = refused.map_or_else(|error| error.to_string(), |answer| answer.shipment.unwrap().refusal);
        assert!(refused.contains("transport_key"), "{refused}");
        island.end().await;
    }

    async fn an_old_root_is_destroyed_by_two_people_when_nothing_refers_to_it(island) {
        let mut island = island;
        island.deliver(&sample("generic-suite0", 20)).await;
        let before_the_pass = island.row_of(1).await;
        let id = island.add_root(STORAGE).await;
        let first = RootId { purpose: STORAGE, version: 1 };
        let roots = island.roots();
        let propose = |id, oldest_backup| {
            let destruction = Destruction { id, oldest_backup, reason: "yearly rotation".to_owned(), quorum: kms_domain::Quorum::ONE };
            roots.propose_destruction(&island.officer, request(), destruction)
        };
        let reason = |outcome: Result<v1::Proposal, ServiceError>| outcome.unwrap_err().to_string();
        // Too early, in every way: current; in use; a backup that is older.
        assert!(reason(propose(first, IslandContext::now()).await).contains("needed"));
        roots.change(&island.officer, request(), STORAGE, rotate()).await.unwrap();
        assert!(reason(propose(first, IslandContext::now()).await).contains("key versions use the root"));
        while roots.page(id).await.unwrap().is_some() {}
        let ended = UnixMillis(island.state(STORAGE).await.since_ms);
        assert!(reason(propose(first, ended).await).contains("backups"));
        assert!(reason(propose(first, IslandContext::now().after(3_600_000)).await).contains("future"));
        assert!(reason(propose(id, IslandContext::now()).await).contains("needed"), "the current one");
        assert!(reason(propose(RootId { purpose: RootPurpose::Seal, version: 1 }, IslandContext::now()).await).contains("audit log"));
        while IslandContext::now() <= ended {}
        let proposal = propose(first, ended.after(1)).await.unwrap();
        let approved = kms_domain::ProposalId::from_octets(&proposal.proposal_id).unwrap();

        // I6: the requester alone destroys nothing, and approves nothing of their own.
        assert!(roots.destroy(&island.officer, request(), approved).await.is_err());
        let proposals = crate::approval::ProposalService::new(island.island.clone());
        let approval = crate::approval::ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() };
        let by = |number: u8| Request { id: RequestId::from_octets(&[number; 16]).unwrap(), digest: [number; 32] };
        assert!(proposals.change(&island.officer, by(1), approved, approval.clone()).await.is_err());
        let colleague = island.colleague().await;
        proposals.change(&colleague, by(2), approved, approval).await.unwrap();
        let key = token_key(first).unwrap();
        assert!(island.island.hsm.has_key(key).await.unwrap(), "approved is not carried out");
        // A shipment that was imported by a server which had not heard of the new KEK: references
        // are counted again when it is carried out.
        island.island.hsm.use_storage_kek(KeyClass::Session, RootVersion::FIRST);
        island.deliver(&SampleShipment { first_number: 101, ..sample("generic-suite0", 1) }).await;
        island.island.hsm.use_storage_kek(KeyClass::Session, root_version(2).unwrap());
        let refused = async |approved| roots.destroy(&island.officer, request(), approved).await.unwrap_err().to_string();
        assert!(refused(approved).await.contains("key versions use the root"));
        // The pass looks at all rows once more. What was approved says of backups that they are
        // younger than the first pass only.
        roots.change(&island.officer, request(), STORAGE, RotationChange::Resume { rows_per_second: None }).await.unwrap();
        while roots.page(id).await.unwrap().is_some() {}
        assert_eq!(island.state(STORAGE).await.all_changed, 21);
        assert!(refused(approved).await.contains("backups"));
        let ended = UnixMillis(island.state(STORAGE).await.since_ms);
        while IslandContext::now() <= ended {}
        let proposal = propose(first, ended.after(1)).await.unwrap();
        let approved = kms_domain::ProposalId::from_octets(&proposal.proposal_id).unwrap();
        let approval = crate::approval::ProposalChange::Approve { content_sha256: proposal.content_sha256.as_ref().try_into().unwrap() };
        proposals.change(&colleague, by(3), approved, approval).await.unwrap();

        // I3: decided, and not done before every server has heard of it.
        let (same, late) = (request(), island.another_server().await);
        let settling = roots.clone().with_timing(RootTiming { settling: Duration::from_secs(3_600), ..AT_ONCE });
        settling.destroy(&island.officer, same, approved).await.unwrap();
        assert_eq!(island.island.row().root_standing(first), Some(RootStanding::Destroyed));
        // What the HSM has wrapped under it before is not stored any more, not even by a server
        // that has not heard of it: its batch is wrapped again.
        let (file, signature) = island.sample(&SampleShipment { first_number: 201, ..sample("generic-suite0", 2) }).await;
        let sha256 = island.upload(&file, &signature).await;
        island.island.hsm.use_storage_kek(KeyClass::Session, RootVersion::FIRST);
        for server in [&late, &island.island] {
            let refused = island.import_refused(server, sha256).await;
            assert!(refused.contains("`session/storage-kek/1` was destroyed") && refused.contains("try again"), "{refused}");
        }
        island.island.hsm.use_storage_kek(KeyClass::Session, root_version(2).unwrap());
        assert_eq!(island.import(sha256, Some(&island.head_end)).await.shipment.unwrap().imported, 2);
        assert_eq!(roots.count(|_| true).await.unwrap().of(first), 0);
        // A row that somebody put back from before keeps the root in the token.
        let newest = island.row_of(1).await;
        island.put_back(1, &before_the_pass).await;
        roots.destroy(&island.officer, same, approved).await.unwrap();
        assert!(island.island.hsm.has_key(key).await.unwrap());
        island.put_back(1, &newest).await;
        assert!(settling.destroy_decided(&island.island.row()).await.unwrap().is_some());
        assert!(island.island.hsm.has_key(key).await.unwrap());
        assert_eq!(roots.destroy_decided(&island.island.row()).await.unwrap(), None);
        assert!(!island.island.hsm.has_key(key).await.unwrap());
        assert_eq!(roots.destroy_decided(&island.island.row()).await.unwrap(), None);
        let events = island.recorded(|event| match event { Event::RootDestroyed(event) => Some(event.change), _ => None }).await;
        assert_eq!(events, ["decided", "begun", "done"], "I2: on the record before the token is changed");
        let left = island.stored_keys(KeyClass::Session, 20).await;
        assert!(!left.is_empty() && left.iter().all(|key| key.2 == 2), "every key is there still");
        island.nothing_is_readable().await;
        assert!(reason(propose(first, IslandContext::now()).await).contains("destroyed"));
        island.end().await;
    }
}
