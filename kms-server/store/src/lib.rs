//! The only SQL of the server: SQLite and PostgreSQL behind one [`Store`].
//!
//! The store keeps sealed rows as opaque octets (I5): it has no keys and makes no decisions. Its
//! central method is [`Store::transact`]: it reads rows, lets the caller decide, and writes what
//! the caller has decided, all in one transaction.
//!
//! SQLite is for one server: a lock file prevents a second one. PostgreSQL is for several: the rows
//! that a transaction reads are locked in one order, and every write names the generation that it
//! replaces.
//!
//! `shared/` holds the statements. It is compiled twice, once inside `sqlite` and once inside
//! `postgres`, which differ in how they connect, lock and check the database.

#[macro_use]
mod batch;
mod config;
mod error;
mod exposure;
mod postgres;
mod row;
mod schema;
mod sqlite;
mod store;
mod transaction;

use std::sync::Arc;

pub use config::{DatabaseLocation, StoreConfig};
pub use error::{RowName, StoreError};
pub use exposure::{ExposureCursor, ExposureOwner, ExposureParty, ExposureRow, ExposureTotals, KeyValuePrefix};
pub use kms_domain::Timeline;
pub use row::{
    Assigned, AuditAppend, AuditCursor, AuditFilter, AuditReference, AuditRow, AuditTail, FingerprintOwner,
    FingerprintPrefix, GrantFilter, GrantRow, MeterFilter, MeterProjection, MeterRow, PinFailure, RequestKey,
    RequestRow, RowKind, SealedRow, ServerRow, ShipmentRefusal, ShipmentRow, ShipmentState, Sizes, SpooledFile,
    TaskFilter, TaskKey, TaskLoad, TaskRow, TaskTally, UploadId, WorkOrderColumns, WorkOrderCount, WorkOrderEnding,
    WorkOrderFilter, WorkOrderRow,
};
pub use store::Store;
pub use transaction::{
    Changes, Committed, Decision, FingerprintPut, GrantRevocation, Lookup, MeterPut, ReadSet, Reads, RequestPut,
    SealedPut,
};

/// Opens a database: checks its settings, brings its schema up to date, refuses a newer one.
///
/// # Errors
/// [`StoreError::InUse`], [`StoreError::UnsafeSetting`], [`StoreError::NewerSchema`],
/// [`StoreError::Unavailable`], [`StoreError::Corrupt`].
pub async fn open(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    if config.connections < 2 {
        return Err(StoreError::Invalid {
            what: "number of database connections",
            reason: "at least 2 are needed".into(),
        });
    }
    Ok(match &config.database {
        DatabaseLocation::Sqlite(path) => Arc::new(sqlite::Engine::open(path, config).await?),
        DatabaseLocation::Postgres(url) => Arc::new(postgres::Engine::open(url, config).await?),
    })
}
