//! Databases of every earlier schema, with data in them: they are brought up to date, and all that
//! they hold is read and written.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests"
)]

mod common;

use std::{collections::BTreeMap, path::PathBuf};

use common::*;
use kms_domain::{
    CampaignId, GrantId, KeyType, KeyVersionNumber, Owner, RequestId, SecuritySetupId, Task, TaskState, TaskStep,
    TaskWork, UnixMillis, WorkOrderId, WriterId,
};
use kms_store::{
    Assigned, AuditFilter, AuditReference, Changes, DatabaseLocation, ExposureOwner, ExposureParty, ExposureRow,
    FingerprintOwner, FingerprintPrefix, FingerprintPut, GrantFilter, GrantRevocation, GrantRow, Lookup, MeterFilter,
    MeterProjection, MeterPut, PinFailure, Reads, RequestKey, RequestPut, RequestRow, RowKind, SealedPut,
    ShipmentRefusal, ShipmentRow, ShipmentState, Store, StoreConfig, TaskFilter, TaskKey, TaskRow, UploadId,
    WorkOrderColumns, WorkOrderEnding,
};
use kms_store_testing as testing;

#[tokio::test]
async fn every_earlier_schema_is_brought_up_to_date_on_sqlite() {
    for version in versions("sqlite") {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("kms.db");
        std::fs::File::create(&path).unwrap();
        upgraded(version, "sqlite", DatabaseLocation::Sqlite(path)).await;
    }
}

#[tokio::test]
async fn every_earlier_schema_is_brought_up_to_date_on_postgresql() {
    for version in versions("postgres") {
        let address = cluster().create_database().await.unwrap();
        upgraded(version, "postgres", DatabaseLocation::Postgres(address)).await;
    }
}

/// A step may take longer than a call, and the next server waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_takes_longer_than_a_call_succeeds_on_postgresql() {
    let database = DatabaseLocation::Postgres(cluster().create_database().await.unwrap());
    filled(4, "postgres", &database).await;
    let slow = "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(2.5); END $$; \
                CREATE EVENT TRIGGER slow ON ddl_command_start WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION slow()";
    testing::execute(&database, slow).await.unwrap();
    let config = StoreConfig { call_timeout: std::time::Duration::from_secs(1), ..StoreConfig::new(database) };
    let (first, second) = tokio::join!(kms_store::open(&config), kms_store::open(&config));
    for store in [first.unwrap(), second.unwrap()] {
        assert_eq!(store.exposure_page(None, 9).await.unwrap(), []);
        store.close().await;
    }
}

/// The rows of each version fill every table that it has.
#[test]
fn every_table_of_every_schema_has_rows() {
    for version in versions("sqlite") {
        let steps: String = steps("sqlite", version).into_values().collect();
        let rows = rows(version);
        for table in steps.split("CREATE TABLE ").skip(1).map(|rest| rest.split(' ').next().unwrap()) {
            assert!(rows.contains(&format!("INSERT INTO {table} (")), "version {version} has no row in `{table}`");
        }
    }
}

/// Makes a database as it was, opens it, reads and writes all of it, and opens it again.
async fn upgraded(version: usize, kind: &str, database: DatabaseLocation) {
    println!("schema version {version} on {kind}");
    filled(version, kind, &database).await;
    let config = StoreConfig::new(database);
    let store = kms_store::open(&config).await.unwrap();
    read(&*store, version).await;
    write_all(&*store, version).await;
    store.close().await;
    drop(store);
    let store = kms_store::open(&config).await.unwrap();
    written(&*store).await;
    store.close().await;
}

/// A database as servers of a version left it.
async fn filled(version: usize, kind: &str, database: &DatabaseLocation) {
    for step in steps(kind, version).values() {
        testing::execute(database, step).await.unwrap();
    }
    let others = if kind == "sqlite" { "-- postgres only" } else { "-- sqlite only" };
    let rows: Vec<_> = rows(version).lines().filter(|line| !line.ends_with(others)).map(str::to_owned).collect();
    let rows = rows.join("\n");
    let rows = if kind == "sqlite" { rows } else { rows.replace("x'", "'\\x") };
    testing::execute(database, &rows).await.unwrap();
}

async fn read(store: &dyn Store, version: usize) {
    let meters = store.meters(&[title(1), title(2)]).await.unwrap();
    assert_eq!(meters.iter().map(|meter| &meter.row).collect::<Vec<_>>(), [&row(2, "meter 1"), &row(1, "meter 2")]);
    let found = async |filter: MeterFilter| {
        let page = store.meter_page(&filter, None, 9).await.unwrap();
        page.iter().map(|meter| meter.title).collect::<Vec<_>>()
    };
    let assigned = Assigned::To(principal("hes").to_string());
    assert_eq!(found(MeterFilter { head_end: assigned, ..MeterFilter::default() }).await, [title(1)]);
    assert_eq!(found(MeterFilter { head_end: Assigned::ToNone, ..MeterFilter::default() }).await, [title(2)]);
    assert_eq!(found(MeterFilter { batch: Some("KAM-2026-0001".into()), ..MeterFilter::default() }).await, [title(1)]);
    let class = MeterFilter {
        vendor: Some("KAM".into()),
        profile: Some("generic-suite0".into()),
        status: Some(1),
        ..MeterFilter::default()
    };
    assert_eq!(found(class).await, [title(1), title(2)]);
    let in_group = MeterFilter { group: Some(4), ..MeterFilter::default() };
    if version < 3 {
        // Servers before had no such columns: the pass over sealed rows adds them.
        assert!(found(in_group.clone()).await.is_empty());
        assert_eq!(store.complete_group_members(&[(title(1), 4)]).await.unwrap(), 1);
    }
    assert_eq!(found(in_group).await, [title(1)]);
    for kind in sealed_kinds(version) {
        let name = vec![0, 255, kind.number()];
        assert_eq!(store.sealed_page(kind, None, 9).await.unwrap(), [(name, row(1, kind.name()))], "{kind:?}");
    }
    let servers = store.servers().await.unwrap();
    let servers: Vec<_> = servers.iter().map(|s| (s.writer, s.name.as_str(), s.started, s.heartbeat)).collect();
    assert_eq!(servers, [(writer(), "kms-1", UnixMillis(1_000), UnixMillis(2_000))]);
    let log = store.audit_page(&AuditFilter { kind: Some(KIND), ..AuditFilter::default() }, None, 9).await.unwrap();
    assert_eq!(log.into_iter().map(|row| row.record).collect::<Vec<_>>(), [record(writer(), 0), record(writer(), 1)]);
    let tails = store.audit_tails().await.unwrap();
    assert_eq!(tails.iter().map(|tail| (tail.writer, tail.sequence)).collect::<Vec<_>>(), [(writer(), 1)]);
    let grants = store.grant_page(&GrantFilter::default(), None, 9).await.unwrap();
    assert_eq!(grants, [grant(2), grant(1)]);
    let of_principal = GrantFilter { principal: Some(principal("hes")), ..GrantFilter::default() };
    assert_eq!(store.grant_page(&of_principal, None, 9).await.unwrap().len(), 2);
    let fingerprints = store.fingerprints(&[PREFIX]).await.unwrap();
    assert_eq!(fingerprints, [(PREFIX, fingerprint_owner())]);
    assert_eq!(store.shipment_page(None, 9).await.unwrap(), [shipment()]);
    assert_eq!(store.shipments_of_file(&principal("vendor"), &[8; 32]).await.unwrap(), [shipment()]);
    assert_eq!(store.shipment_chunk(UPLOAD, 3).await.unwrap(), Some((0, b"01234".to_vec())));
    assert_eq!(store.shipment_refusals(UPLOAD, 0, 9).await.unwrap(), [refusal(7)]);
    assert_eq!(store.pin_failure("north", 1).await.unwrap(), Some(pin_failure()));
    if version >= 2 {
        assert_eq!(store.campaign_chunk(campaign(), 0).await.unwrap().unwrap(), title(1).octets());
        assert_eq!(store.task_page(campaign(), TaskFilter::All, None, 9).await.unwrap(), [task()]);
        let due = store.due_tasks(campaign(), &principal("hes").to_string(), 9).await.unwrap();
        assert_eq!(due, [title(1)]);
    }
    // Servers before had no index of exposures: a pass over sealed rows makes it.
    assert_eq!(store.exposures_are_complete().await.unwrap(), version >= 5);
    if version < 5 {
        assert_eq!(store.exposure_totals(&exposure().party, None).await.unwrap().owners, 0);
        write(store, Changes { exposures: vec![exposure()], ..Changes::default() }).await.unwrap();
        store.note_exposures_complete().await.unwrap();
    }
    assert_eq!(store.missing_exposures(&[exposure()]).await.unwrap(), []);
    let reads = Reads {
        requests: vec![request()],
        audit_tails: vec![writer()],
        work_orders_of: vec![principal("hes")],
        ..Reads::default()
    };
    store
        .transact(reads, &mut |set| {
            assert_eq!(set.request(&request()), Lookup::Present(&outcome()));
            assert_eq!(set.audit_tail(writer()).present().unwrap().chain, [1; 32]);
            assert_eq!(set.work_orders_of(&principal("hes")).map(|count| count.orders), Some(u64::from(version >= 4)));
            kms_store::Decision::Abandon
        })
        .await
        .unwrap();
}

/// The next generation of every row, and new rows beside the old ones.
async fn write_all(store: &dyn Store, version: usize) {
    let run = writer_id();
    store.register_server(run, "kms-2").await.unwrap();
    store.heartbeat(writer()).await.unwrap();
    let groups = MeterProjection { groups: vec![5], head_end: None, ..projection() };
    let (new_task, generation) = if version >= 2 { (task(), 2) } else { (task(), 1) };
    if version < 2 {
        store.put_campaign_chunk(campaign(), 0, &title(1).octets()).await.unwrap();
    }
    let sealed = RowKind::ALL.map(|kind| {
        let generation = if sealed_kinds(version).contains(&kind) { 2 } else { 1 };
        SealedPut { kind, id: vec![0, 255, kind.number()], row: row(generation, "new") }
    });
    let changes = Changes {
        meters: vec![
            MeterPut::update_projection(title(1), row(3, "new"), groups.clone()),
            MeterPut::update(title(2), row(2, "new")),
            MeterPut::insert(title(3), row(1, "new"), groups),
        ],
        sealed: sealed.to_vec(),
        requests: vec![RequestPut { key: RequestKey { chunk: 4, ..request() }, row: outcome() }],
        grants: vec![grant(3)],
        revocations: vec![GrantRevocation { id: grant(2).id, revoked: UnixMillis(88) }],
        fingerprints: vec![FingerprintPut { prefix: FingerprintPrefix([1; 8]), owner: fingerprint_owner() }],
        shipments: vec![ShipmentRow { generation: 2, imported: 1, ..shipment() }],
        refusals: vec![refusal(8)],
        tasks: vec![TaskRow { generation, ..new_task }],
        work_orders: vec![work_order("WO-1"), work_order("WO-2")],
        exposures: vec![ExposureRow { open: 0, ..exposure() }],
        exposures_gone: Vec::new(),
        audit: vec![record(writer(), 2), record(run, 0)],
    };
    write(store, changes).await.unwrap();
    assert_eq!(store.append_shipment_chunk(UPLOAD, 5, b"56789".to_vec(), UnixMillis(3)).await.unwrap(), 10);
    store.clear_pin_failure("north", 1).await.unwrap();
    store.put_pin_failure(&PinFailure { user_type: 0, ..pin_failure() }).await.unwrap();
    assert_eq!(store.purge_requests(UnixMillis(100), 1).await.unwrap(), 1);
}

async fn written(store: &dyn Store) {
    let meters = store.meter_page(&MeterFilter::default(), None, 9).await.unwrap();
    assert_eq!(meters.iter().map(|meter| meter.row.generation).collect::<Vec<_>>(), [3, 2, 1]);
    let count = async |filter: MeterFilter| store.meter_count(&filter).await.unwrap();
    assert_eq!(count(MeterFilter { group: Some(5), ..MeterFilter::default() }).await, 2);
    assert_eq!(count(MeterFilter { group: Some(4), ..MeterFilter::default() }).await, 0);
    assert_eq!(count(MeterFilter { head_end: Assigned::ToNone, ..MeterFilter::default() }).await, 3);
    for kind in RowKind::ALL {
        assert_eq!(store.sealed(kind, &[0, 255, kind.number()]).await.unwrap().unwrap().body, b"new", "{kind:?}");
    }
    assert_eq!(store.servers().await.unwrap().len(), 2);
    assert_eq!(store.audit_of_writer(writer(), 0, 9).await.unwrap().len(), 3);
    let revoked: Vec<_> =
        store.grant_page(&GrantFilter::default(), None, 9).await.unwrap().iter().map(|grant| grant.revoked).collect();
    assert_eq!(revoked, [None, Some(UnixMillis(88)), Some(UnixMillis(77))]);
    assert_eq!(store.fingerprint_page(None, 9).await.unwrap().len(), 2);
    let shipment = store.shipment(UPLOAD).await.unwrap().unwrap();
    assert_eq!((shipment.generation, shipment.imported, shipment.received), (2, 1, 10));
    assert_eq!(store.shipment_refusals(UPLOAD, 0, 9).await.unwrap(), [refusal(7), refusal(8)]);
    assert_eq!(store.campaign_chunk(campaign(), 0).await.unwrap().unwrap(), title(1).octets());
    assert_eq!(store.task_page(campaign(), TaskFilter::All, None, 9).await.unwrap().len(), 1);
    assert_eq!(store.complete_work_orders(&["WO-1", "WO-2", "WO-3"].map(work_order)).await.unwrap(), 1);
    assert!(store.exposures_are_complete().await.unwrap());
    let totals = store.exposure_totals(&exposure().party, None).await.unwrap();
    assert_eq!((totals.owners, totals.slots, totals.open), (1, 2, 0));
    assert!(store.pin_failure("north", 1).await.unwrap().is_none());
    assert!(store.pin_failure("north", 0).await.unwrap().is_some());
    assert_eq!(store.purge_requests(UnixMillis(100), 9).await.unwrap(), 1);
}

/// The versions of the schema, the newest too: its rows are the earlier ones of the next version.
fn versions(kind: &str) -> std::ops::RangeInclusive<usize> {
    1..=steps(kind, usize::MAX).len()
}

/// The statements of the steps up to a version, by the names of their files, which are in order.
fn steps(kind: &str, version: usize) -> BTreeMap<String, String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("migrations").join(kind);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let named = files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path));
    let named: BTreeMap<_, _> = named.collect();
    named.into_iter().take(version).map(|(name, path)| (name, std::fs::read_to_string(path).unwrap())).collect()
}

fn rows(version: usize) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/schemas/{version:04}.sql"));
    std::fs::read_to_string(&path).unwrap_or_else(|_| {
        panic!(
            "{} is missing: copy the file of the version before, add a row for each new table and the digests of the \
             new step (`sha256sum kms-server/store/migrations/*/{version:04}_*.sql`), and read and write the rows here",
            path.display()
        )
    })
}

/// Those that there were: the kinds from 8 on came later, work orders after these, and invitations
/// without a step.
fn sealed_kinds(version: usize) -> Vec<RowKind> {
    let since = |kind: RowKind| match kind {
        RowKind::Invitation => usize::MAX,
        RowKind::WorkOrder => 4,
        kind if kind.number() >= 8 => 2,
        _ => 1,
    };
    RowKind::ALL.into_iter().filter(|kind| version >= since(*kind)).collect()
}

fn work_order(id: &str) -> WorkOrderColumns {
    WorkOrderColumns {
        id: WorkOrderId::parse(id).unwrap(),
        maker: principal("hes"),
        technician: "bo".into(),
        end: WorkOrderEnding::Completed,
        from: UnixMillis(1_000),
        until: UnixMillis(2_000),
    }
}

fn writer() -> WriterId {
    WriterId::from_octets(&[7; 16]).unwrap()
}

fn campaign() -> CampaignId {
    CampaignId::from_octets(&[6; 16]).unwrap()
}

fn request() -> RequestKey {
    RequestKey { principal: principal("hes"), request: RequestId::from_octets(&[2; 16]).unwrap(), chunk: 3 }
}

fn outcome() -> RequestRow {
    RequestRow { digest: [5; 32], outcome: b"outcome".to_vec(), expires: UnixMillis(99) }
}

fn grant(number: u8) -> GrantRow {
    GrantRow {
        id: GrantId::from_octets(&[number; 16]).unwrap(),
        principal: principal("hes"),
        purpose: "read".into(),
        issued: UnixMillis(i64::from(number) * 10),
        not_after: UnixMillis(i64::from(number) * 10 + 100),
        audit: AuditReference { writer: writer(), sequence: u64::from(number) - 1 },
        meters: if number == 1 { 1_000 } else { 1 },
        revoked: (number == 1).then_some(UnixMillis(77)),
    }
}

fn fingerprint_owner() -> FingerprintOwner {
    FingerprintOwner {
        owner: Owner::Meter(title(1)),
        setup: SecuritySetupId::from_octets([1, 2]),
        key_type: KeyType::GUEK,
        version: KeyVersionNumber::FIRST,
    }
}

fn shipment() -> ShipmentRow {
    ShipmentRow {
        upload: UPLOAD,
        generation: 1,
        sha256: [8; 32],
        size: 10,
        batch: String::new(),
        principal: principal("vendor"),
        state: ShipmentState::Receiving,
        received: 5,
        next_line: 0,
        imported: 0,
        refused: 0,
        created: UnixMillis(1),
        updated: UnixMillis(2),
        progress: vec![9],
    }
}

fn refusal(line: u64) -> ShipmentRefusal {
    ShipmentRefusal { upload: UPLOAD, line, field: "serial".into(), reason: "it is empty".into() }
}

fn exposure() -> ExposureRow {
    ExposureRow {
        party: ExposureParty::Principal(principal("hes")),
        owner: ExposureOwner::Owner(Owner::Meter(title(1))),
        slots: 2,
        open: 1,
        newest: UnixMillis(77),
    }
}

fn pin_failure() -> PinFailure {
    PinFailure { token: "north".into(), user_type: 1, phc: "$argon2id$".into(), time: UnixMillis(5) }
}

fn task() -> TaskRow {
    TaskRow {
        key: TaskKey { campaign: campaign(), meter: title(1) },
        generation: 1,
        wave: 1,
        vendor: "KAM".into(),
        head_end: Some(principal("hes").to_string()),
        mark: [4; 16],
        task: Task {
            step: TaskStep {
                setup: SecuritySetupId::from_octets([0, 0]),
                work: TaskWork::Rotate(KeyType::GUEK),
                from: 1,
            },
            state: TaskState::Pending,
            probe: true,
            attempts: 2,
            due: UnixMillis(1_000),
            fence: 3,
            leased: UnixMillis(900),
            ended: UnixMillis(0),
            reason: "unreachable".into(),
        },
    }
}

const UPLOAD: UploadId = UploadId([3; 16]);
const PREFIX: FingerprintPrefix = FingerprintPrefix([0xFF; 8]);
