//! Work orders: who works at which meters, for which tasks, and when. A workforce system makes
//! them, as a service account; officers can do all that it can; handhelds see and complete those
//! of their technician.
//!
//! An order is a sealed row (I5) that is never removed: the log says what was ordered, and an
//! auditor compares. Only the place is removed, some time after the end. Search columns
//! find orders, and decide nothing.

mod change;
mod create;
mod judge;
mod message;
pub(crate) mod places;
mod show;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use kms_domain::{ParseError, PlaceSalt, WorkOrderContent, WorkOrderId};

pub use self::{
    change::WorkOrderChange,
    show::{WorkOrderPage, WorkOrderQuery},
};
pub use super::Request;
use crate::island::IslandContext;
use kms_base::error::ServiceError;

/// The work orders of an island.
#[derive(Clone)]
pub struct WorkOrderService {
    island: Arc<IslandContext>,
}

/// A work order to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewWorkOrder {
    /// The id of the workforce system.
    pub id: WorkOrderId,
    /// What is ordered.
    pub content: WorkOrderContent,
}

impl WorkOrderService {
    /// The most orders of a call.
    pub const MOST_ORDERS: usize = 500;
    /// The most meters of all orders of a call.
    pub const MOST_METERS: usize = 10_000;

    /// Work orders of an island.
    pub const fn new(island: Arc<IslandContext>) -> Self {
        Self { island }
    }
}

/// The field of the contract's `WorkOrderContent` that an error of the domain is about. Rows and
/// files name the two ends of the time without a unit.
pub fn content_field(error: &ParseError) -> &'static str {
    match error.what() {
        "from" => "from_ms",
        "until" => "until_ms",
        other => other,
    }
}

/// New random octets for the place of an order.
fn new_salt() -> Result<PlaceSalt, ServiceError> {
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random)
        .map_err(|_| ServiceError::Internal("there are no random octets for the place of a work order".to_owned()))?;
    Ok(PlaceSalt::new(random))
}
