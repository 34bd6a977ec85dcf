//! New keys for meters over the air (I3). The state machine is in `kms_domain::transfer`. This
//! module connects it to the meter's octets, the HSM and the database.
//!
//! A step is decided in one transaction: the meter's row, the counters of the next request and the
//! audit record (I2). Afterwards the HSM makes the request, from the row alone, so that a step has
//! the same octets on every server (I4). The meter's answer is opened in the HSM before the next
//! step is decided. The transaction checks that the row is still at the step that the answer was
//! read for.

mod begin;
mod counters;
mod emit;
mod error;
mod exposure;
mod permit;
mod proceed;
mod read;
mod record;
mod rows;
mod step;
mod task;
#[cfg(test)]
pub(crate) mod tests;
mod withdraw;

use std::{collections::HashMap, sync::Arc};

use kms_domain::{CHALLENGE, Meter, SystemTitle};
use kms_hsm::Hsm;

pub use self::step::{Delivery, NextStep, Order, Report, ReportedAnswer, Sending, SendingKind, StepAnswer};
pub(crate) use self::{
    emit::pair_keys,
    proceed::{EARLIER_KEY_HELD, earlier_key_held},
    step::Brought,
};
use crate::island::IslandContext;
use kms_authz::Caller;
use kms_base::error::ServiceError;

/// The use cases of transfers.
#[derive(Clone)]
pub struct TransferService {
    island: Arc<IslandContext>,
    /// Its work is charged to the server itself, or to a caller.
    hsm: Hsm,
}

impl TransferService {
    /// Transfers of an island.
    pub fn new(island: Arc<IslandContext>) -> Self {
        Self { hsm: island.hsm.clone(), island }
    }

    /// The same service, whose work in the HSM is charged to the caller.
    fn paid_by(&self, caller: &Caller) -> Self {
        Self { hsm: self.island.hsm_for(caller), island: self.island.clone() }
    }

    /// The meters as they are now, for the work before the transaction.
    async fn meters(
        &self,
        titles: impl Iterator<Item = SystemTitle>,
    ) -> Result<HashMap<SystemTitle, Arc<Meter>>, ServiceError> {
        let titles: Vec<SystemTitle> = titles.collect();
        let rows = self.island.store.meters(&titles).await?;
        // A row that does not verify counts as absent (I5). The transaction records it.
        Ok(rows
            .iter()
            .filter_map(|row| Some((row.title, self.island.committer.open_meter(row.title, &row.row).ok()?)))
            .collect())
    }

    /// Random challenges from the HSM.
    async fn challenges(&self, count: usize) -> Result<Vec<[u8; CHALLENGE]>, ServiceError> {
        let octets = self.hsm.random(count.saturating_mul(CHALLENGE)).await?;
        Ok(octets.as_chunks().0.to_vec())
    }
}
