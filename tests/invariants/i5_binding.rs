//! I5: rows that somebody edits, swaps, puts back or deletes in the database are refused on use,
//! and found by the scrubber.

use kms_client::proto::{ListAuditRecordsRequest, ScrubFinding, ScrubRequest, audit_record::Event};
use kms_client::{RequestId, SessionError, new_request_id, proto};
use kms_domain::{IslandName, PrincipalId, Role};
use kms_store::{RowKind, SealedRow};
use kms_store_testing::{Damage, damage, execute, octets};
use kms_tests::{DevServer, TestModule, open, terms, title};

struct Scene {
    server: DevServer,
}

impl Scene {
    fn new() -> Self {
        Self { server: DevServer::start() }
    }

    async fn row(&self, number: u64) -> SealedRow {
        self.server.glance().await.store.meters(&[title(number)]).await.unwrap().remove(0).row
    }

    async fn damage(&self, what: Damage) {
        assert_eq!(damage(&self.server.database(), &what).await.unwrap(), 1, "{what:?}");
    }

    async fn grant(&self, number: u64) -> Result<(), String> {
        let connection = self.server.connect("head-end").await;
        open(&connection, &self.server.profile("head-end"), title(number), 10)
            .await
            .map(|_| ())
            .map_err(|error| error.to_string())
    }

    async fn scrub(&self) -> Vec<ScrubFinding> {
        let mut answers =
            self.server.connect("auditor").await.audit().scrub(ScrubRequest {}).await.unwrap().into_inner();
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
        assert!(
            findings.iter().any(|found| found.id == title(number).octets().as_slice() && found.finding == finding),
            "no `{finding}` among {findings:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untouched_island_has_no_findings() {
    let scene = Scene::new();
    scene.grant(1).await.unwrap();
    assert_eq!(scene.scrub().await, Vec::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn any_older_row_that_is_put_back_is_refused_and_found() {
    let scene = Scene::new();
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
    assert!(records.into_inner().records.iter().any(
        |record| matches!(&record.event, Some(Event::SecurityEvent(event)) if event.kind == "sealed-row-refused")
    ));
    scene.damage(Damage::PutMeter(title(1), newest)).await;
    scene.grant(1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_row_is_found_by_the_scrubber_of_a_server_that_never_saw_the_newer() {
    let mut scene = Scene::new();
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
    let scene = Scene::new();
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
    let scene = Scene::new();
    scene.grant(6).await.unwrap();
    scene.damage(Damage::DeleteMeter(title(6))).await;
    assert!(scene.grant(6).await.is_err());
    scene.finds(6, "deleted").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_becomes_another_by_copying_a_principals_row() {
    let scene = Scene::new();
    let name = |role, name: &str| {
        PrincipalId::new(IslandName::parse("dev").unwrap(), role, name).unwrap().to_string().into_bytes()
    };
    let (handheld, head_end) = (name(Role::Handheld, "handheld"), name(Role::HeadEnd, "head-end"));
    let row = scene.server.glance().await.store.sealed(RowKind::Principal, &head_end).await.unwrap().unwrap();
    scene.damage(Damage::PutSealed(RowKind::Principal, handheld, row)).await;
    let connection = scene.server.connect("handheld").await;
    assert!(open(&connection, &scene.server.profile("handheld"), title(0), 1).await.is_err());
}

/// What answers a repeated request is bound to who asked what, and when: an old grant is not
/// executed again under another request (I2, I4).
#[tokio::test(flavor = "multi_thread")]
async fn a_forged_request_row_carries_no_old_grant_out_again() {
    let scene = Scene::new();
    let database = scene.server.database();
    let connection = scene.server.connect("head-end").await;
    let key = scene.server.profile("head-end").transport_key().unwrap();
    let options = TestModule::of_environment().open_options();
    let ask = async |request: RequestId, terms: proto::SessionTerms| {
        connection.open_session(&key, request, title(8), terms, &options).await
    };
    let forge = async |statement: String| assert_eq!(execute(&database, &statement).await.unwrap(), 1, "{statement}");
    let refused = |outcome: Result<kms_client::Session, SessionError>, what: &str| {
        let error = outcome.map(|session| session.keys.grant_id).unwrap_err();
        assert!(error.to_string().contains("not permitted"), "{what}: {error}");
    };
    let of = |request: RequestId| octets(&database, &request.octets());

    // A copy of the row under an id that was never used.
    let (granted, copied) = (new_request_id(), new_request_id());
    ask(granted, terms(20)).await.unwrap();
    let columns = "principal, chunk, digest, outcome, expires_ms";
    forge(format!(
        "INSERT INTO request (request, {columns}) SELECT {}, {columns} FROM request WHERE request = {}",
        of(copied),
        of(granted)
    ))
    .await;
    refused(ask(copied, terms(20)).await, "a copy under another id");
    ask(granted, terms(20)).await.expect("the grant's own request can be repeated");

    // The row of one request with what was answered to another, and with the digest of another.
    let other = new_request_id();
    ask(other, terms(21)).await.unwrap();
    let whole = format!("SELECT outcome FROM request WHERE request = {}", of(other));
    forge(format!("UPDATE request SET outcome = ({whole}) WHERE request = {}", of(granted))).await;
    refused(ask(granted, terms(20)).await, "the outcome of another request");
    forge(format!(
        "UPDATE request SET digest = (SELECT digest FROM request WHERE request = {}) WHERE request = {}",
        of(granted),
        of(other)
    ))
    .await;
    refused(ask(other, terms(20)).await, "the digest of another request");

    // A row that is kept alive past its time.
    let kept = new_request_id();
    ask(kept, terms(22)).await.unwrap();
    forge(format!("UPDATE request SET expires_ms = expires_ms + 1000000000 WHERE request = {}", of(kept))).await;
    refused(ask(kept, terms(22)).await, "a longer time");

    // A grant is repeated no longer than it lasts.
    let (short, brief) = (new_request_id(), proto::SessionTerms { lifetime_seconds: 1, ..terms(20) });
    ask(short, brief.clone()).await.unwrap();
    let began = std::time::Instant::now();
    let ended = loop {
        match ask(short, brief.clone()).await {
            Err(error) if error.to_string().contains("has ended") => break true,
            _ if began.elapsed().as_secs() > 300 => break false,
            _ => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    };
    assert!(ended, "a grant of one second was repeated for 300");

    // The officers are told of the forgeries.
    let newest = ListAuditRecordsRequest { page_size: 500, newest_first: true, ..Default::default() };
    let records =
        scene.server.connect("auditor").await.audit().list_audit_records(newest).await.unwrap().into_inner().records;
    assert!(records.iter().any(
        |record| matches!(&record.event, Some(Event::SecurityEvent(event)) if event.kind == "sealed-row-refused")
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_or_shortened_log_is_found() {
    let mut scene = Scene::new();
    scene.grant(7).await.unwrap();
    // The chain of the server that runs, not that of the ceremony.
    let glance = scene.server.glance().await;
    let writer = glance.store.servers().await.unwrap()[0].writer;
    let tail = glance.store.audit_tails().await.unwrap().into_iter().find(|tail| tail.writer == writer).unwrap();
    let record = glance.store.audit_of_writer(tail.writer, tail.sequence, 1).await.unwrap().remove(0);
    let mut changed = record.record.clone();
    *changed.last_mut().unwrap() ^= 1;
    scene.damage(Damage::PutAuditRecord(tail.writer, tail.sequence, changed)).await;
    let found = |findings: Vec<ScrubFinding>| findings.iter().any(|found| found.finding == "broken-chain");
    assert!(found(scene.scrub().await));
    scene.damage(Damage::PutAuditRecord(tail.writer, tail.sequence, record.record)).await;
    // The next run of the server closes the chain, so that its end cannot be cut off any more.
    scene.server.kill();
    scene.server.restart();
    assert!(damage(&scene.server.database(), &Damage::DeleteAuditFrom(tail.writer, tail.sequence)).await.unwrap() > 0);
    assert!(found(scene.scrub().await));
}
