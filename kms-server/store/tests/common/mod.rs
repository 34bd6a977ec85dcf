//! Databases of their own for tests, and rows to put into them.

#![allow(dead_code, reason = "each test program uses a part")]

use std::sync::{Arc, OnceLock};

use kms_domain::{PrincipalId, RequestId, SystemTitle, UnixMillis, WriterId};
use kms_store::{
    AuditAppend, Changes, Committed, Decision, MeterProjection, MeterPut, Reads, RequestKey, SealedRow, Store,
    StoreConfig, StoreError,
};
use kms_store_testing::PostgresCluster;
use tempfile::TempDir;

/// A database, opened once.
pub(crate) struct Fixture {
    pub(crate) config: StoreConfig,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) writer: WriterId,
    pub(crate) directory: Option<TempDir>,
}

impl Fixture {
    pub(crate) async fn sqlite() -> Self {
        let directory = TempDir::new().unwrap();
        let config = StoreConfig::parse(&format!("sqlite:{}", directory.path().join("kms.db").display())).unwrap();
        Self::open(config, Some(directory)).await
    }

    pub(crate) async fn postgres() -> Self {
        Self::open(StoreConfig::parse(&cluster().create_database().await.unwrap()).unwrap(), None).await
    }

    async fn open(config: StoreConfig, directory: Option<TempDir>) -> Self {
        let store = kms_store::open(&config).await.unwrap();
        let writer = writer_id();
        store.register_server(writer, "test").await.unwrap();
        Self { config, store, writer, directory }
    }
}

/// One cluster for all tests of a program.
pub(crate) fn cluster() -> &'static PostgresCluster {
    static CLUSTER: OnceLock<PostgresCluster> = OnceLock::new();
    CLUSTER
        .get_or_init(|| PostgresCluster::start(&[("max_connections", "300")]).unwrap_or_else(|error| panic!("{error}")))
}

pub(crate) fn writer_id() -> WriterId {
    WriterId::from_octets(uuid::Uuid::new_v4().as_bytes()).unwrap()
}

pub(crate) fn title(number: u64) -> SystemTitle {
    SystemTitle::parse(&format!("4B414D{number:010X}")).unwrap()
}

pub(crate) fn row(generation: u64, body: &str) -> SealedRow {
    SealedRow { generation, seal: [generation as u8; 18], body: body.as_bytes().to_vec() }
}

pub(crate) fn projection() -> MeterProjection {
    MeterProjection {
        vendor: "KAM".into(),
        profile: "generic-suite0".into(),
        status: 1,
        head_end: None,
        batch: None,
        groups: Vec::new(),
    }
}

pub(crate) fn principal(name: &str) -> PrincipalId {
    PrincipalId::parse(&format!("urn:meterkms:north:head-end:{name}")).unwrap()
}

pub(crate) fn request_key(name: &str, chunk: u32) -> RequestKey {
    RequestKey {
        principal: principal(name),
        request: RequestId::from_octets(uuid::Uuid::now_v7().as_bytes()).unwrap(),
        chunk,
    }
}

/// The number of the events in [`record`]: the store does not know what it means.
pub(crate) const KIND: u16 = 7;

pub(crate) fn record(writer: WriterId, sequence: u64) -> AuditAppend {
    AuditAppend {
        writer,
        sequence,
        time: UnixMillis(1_000 + sequence as i64),
        kind: KIND,
        record: format!("record {sequence}").into_bytes(),
        chain: [sequence as u8; 32],
    }
}

/// Writes without reading first.
pub(crate) async fn write(store: &dyn Store, changes: Changes) -> Result<Committed, StoreError> {
    store.transact(Reads::default(), &mut |_| Decision::Commit(Box::new(changes.clone()))).await
}

/// Inserts meters `range`, generation 1.
pub(crate) async fn insert_meters(store: &dyn Store, range: std::ops::Range<u64>) {
    let meters =
        range.map(|number| MeterPut::insert(title(number), row(1, &format!("meter {number}")), projection())).collect();
    write(store, Changes { meters, ..Changes::default() }).await.unwrap();
}
