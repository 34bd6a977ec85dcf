//! I5: rows that somebody edits, swaps, puts back or deletes in the database are refused on use, and found by the scrubber.

use kms_client::proto::{ListAuditRecordsRequest, ScrubFinding, ScrubRequest, audit_record::Event};
use kms_domain::{IslandName, PrincipalId, Role};
use kms_store::{
    RowKind, SealedRow, Store, StoreConfig,
    testing::{Damage, PostgresCluster, damage},
};
use kms_tests::{DevServer, open, title};

struct Scene {
    _cluster: PostgresCluster,
    database: StoreConfig,
    store: std::sync::Arc<dyn Store>,
    server: DevServer,
}

impl Scene {
    async fn new() -> Self {
        let cluster = PostgresCluster::start(&[]).unwrap();
        let address = cluster.create_database().await.unwrap();
        let server = DevServer::start_with(&["--database", &address]);
        let database = StoreConfig::parse(&address).unwrap();
        let store = kms_store::open(&database).await.unwrap();
        Self { _cluster: cluster, database, store, server }
    }

    async fn row(&self, number: u64) -> SealedRow {
        self.store.meters(&[title(number)]).await.unwrap().remove(0).row
    }

    async fn damage(&self, what: Damage) {
        assert_eq!(damage(&self.database.database, &what).await.unwrap(), 1, "{what:?}");
    }

    async fn grant(&self, number: u64) -> Result<(), String> {
        let connection = self.server.connect("head-end").await;
        open(&connection, &self.server.profile("head-end"), title(number), 10).await.map(|_| ()).map_err(|error| error.to_string())
    }

    async fn scrub(&self) -> Vec<ScrubFinding> {
        let mut answers = self.server.connect("auditor").await.audit().scrub(ScrubRequest {}).await.unwrap().into_inner();
        let mut findings = Vec::new();
        let mut finished = false;
        while let Some(answer) = answers.message().await.unwrap() {
            findings.extend(answer.findings);
            finished = answer.finished;
        }
        assert!(finished);
        findings
    }

    async fn finds(&self, number: u64, finding: &str) {
        let findings = self.scrub().await;
        assert!(findings.iter().any(|found| found.id == title(number).octets().as_slice() && found.finding == finding), "no `{finding}` among {findings:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untouched_island_has_no_findings() {
    let scene = Scene::new().await;
    scene.grant(1).await.unwrap();
    assert_eq!(scene.scrub().await, Vec::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn any_older_row_that_is_put_back_is_refused_and_found() {
    let scene = Scene::new().await;
    let mut older = vec![scene.row(1).await];
    for _ in 0..2 {
        scene.grant(1).await.unwrap();
        let row = scene.row(1).await;
        if older.iter().all(|known| known.generation != row.generation) {
            older.push(row);
        }
    }
    let newest = older.pop().unwrap();
    assert!(!older.is_empty(), "a first grant writes the row");
    for row in older {
        scene.damage(Damage::PutMeter(title(1), row)).await;
        let refusal = scene.grant(1).await.unwrap_err();
        assert!(refusal.contains("not permitted"), "{refusal}");
        scene.finds(1, "stale").await;
    }
    // The officers are told, and the right row works again.
    let records = scene
        .server
        .connect("auditor")
        .await
        .audit()
        .list_audit_records(ListAuditRecordsRequest { page_size: 500, newest_first: true, ..Default::default() })
        .await
        .unwrap();
    assert!(records.into_inner().records.iter().any(|record| matches!(&record.event, Some(Event::SecurityEvent(event)) if event.kind == "sealed-row-refused")));
    scene.damage(Damage::PutMeter(title(1), newest)).await;
    scene.grant(1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_row_is_found_by_the_scrubber_of_a_server_that_never_saw_the_newer() {
    let mut scene = Scene::new().await;
    let older = scene.row(2).await;
    scene.grant(2).await.unwrap();
    scene.server.kill();
    scene.damage(Damage::PutMeter(title(2), older)).await;
    // The stated limit of I5 on use: this process has not seen the newer row. The log has.
    scene.server.restart();
    scene.finds(2, "stale").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn swapped_and_edited_rows_are_refused_and_found() {
    let scene = Scene::new().await;
    let (one, other) = (scene.row(3).await, scene.row(4).await);
    scene.damage(Damage::PutMeter(title(3), other.clone())).await;
    scene.damage(Damage::PutMeter(title(4), one)).await;
    assert!(scene.grant(3).await.is_err() && scene.grant(4).await.is_err());
    scene.finds(3, "edited").await;
    let mut edited = scene.row(5).await;
    *edited.body.last_mut().unwrap() ^= 1;
    scene.damage(Damage::PutMeter(title(5), edited)).await;
    assert!(scene.grant(5).await.is_err());
    scene.finds(5, "edited").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_row_is_refused_and_found() {
    let scene = Scene::new().await;
    scene.grant(6).await.unwrap();
    scene.damage(Damage::DeleteMeter(title(6))).await;
    assert!(scene.grant(6).await.is_err());
    scene.finds(6, "deleted").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_becomes_another_by_copying_a_principals_row() {
    let scene = Scene::new().await;
    let name = |role, name: &str| PrincipalId::new(IslandName::parse("dev").unwrap(), role, name).unwrap().to_string().into_bytes();
    let (handheld, head_end) = (name(Role::Handheld, "handheld"), name(Role::HeadEnd, "head-end"));
    let row = scene.store.sealed(RowKind::Principal, &head_end).await.unwrap().unwrap();
    scene.damage(Damage::PutSealed(RowKind::Principal, handheld, row)).await;
    let connection = scene.server.connect("handheld").await;
    assert!(open(&connection, &scene.server.profile("handheld"), title(0), 1).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_or_shortened_log_is_found() {
    let mut scene = Scene::new().await;
    scene.grant(7).await.unwrap();
    // The chain of the server that runs, not that of the ceremony.
    let writer = scene.store.servers().await.unwrap()[0].writer;
    let tail = scene.store.audit_tails().await.unwrap().into_iter().find(|tail| tail.writer == writer).unwrap();
    let record = scene.store.audit_of_writer(tail.writer, tail.sequence, 1).await.unwrap().remove(0);
    let mut changed = record.record.clone();
    *changed.last_mut().unwrap() ^= 1;
    scene.damage(Damage::PutAuditRecord(tail.writer, tail.sequence, changed)).await;
    let found = |findings: Vec<ScrubFinding>| findings.iter().any(|found| found.finding == "broken-chain");
    assert!(found(scene.scrub().await));
    scene.damage(Damage::PutAuditRecord(tail.writer, tail.sequence, record.record)).await;
    // The next run of the server closes the chain, so that its end cannot be cut off any more.
    scene.server.kill();
    scene.server.restart();
    assert!(damage(&scene.database.database, &Damage::DeleteAuditFrom(tail.writer, tail.sequence)).await.unwrap() > 0);
    assert!(found(scene.scrub().await));
}
