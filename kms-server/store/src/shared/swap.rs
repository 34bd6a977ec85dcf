//! Compare and swap: a statement writes its rows only over the state that they replace, and counts
//! them (I3, I4).

use super::{Connection, Database};
use crate::{StoreError, batch::RowBatch, error::Failure};

/// Why the changes were not written.
#[derive(Debug)]
pub(super) enum Stopped {
    /// An error, or another transaction.
    Failed(Failure),
    /// A row of this table was not in the state that the changes replace.
    Mismatch(Table),
}

/// The table of a mismatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Meters,
    Sealed,
    Requests,
    Grants,
    Revocations,
    Fingerprints,
    Shipments,
    Tasks,
    Audit,
    Exposures,
}

impl From<sqlx::Error> for Stopped {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Writes a batch with a statement that skips rows in another state.
///
/// # Errors
/// A row was skipped, or the database failed.
pub(super) async fn put(
    connection: &mut Connection,
    statement: &'static str,
    batch: RowBatch,
    table: Table,
) -> Result<(), Stopped> {
    let rows = batch.rows();
    if rows == 0 {
        return Ok(());
    }
    let (json, blob) = batch.into_parameters();
    let done = sqlx::query::<Database>(statement).bind(json).bind(blob).execute(connection).await?;
    count(rows, done.rows_affected(), table)
}

/// I3, I4: a row that was not in the state that the change replaces was not written.
pub(super) const fn count(rows: u64, written: u64, table: Table) -> Result<(), Stopped> {
    if rows == written { Ok(()) } else { Err(Stopped::Mismatch(table)) }
}
