//! A transfer and the campaign's task that it belongs to.

use kms_domain::{Outcome, SystemTitle, Transfer};

use crate::campaign::{end_task, holds_task};
use kms_base::error::ServiceError;
use kms_ledger::View;

/// Whether a transfer cannot continue because its task lease was lost. Then another one can begin
/// before its lifetime has ended.
pub(super) fn is_lost(view: &mut View<'_, '_>, transfer: &Transfer, meter: SystemTitle) -> Result<bool, ServiceError> {
    transfer.campaign.map_or(Ok(false), |task| holds_task(view, task, meter).map(|held| !held))
}

/// Ends the campaign's task with the outcome of its transfer. `reason` adds to the outcome; it may
/// be empty.
pub(super) fn tell_task(
    view: &mut View<'_, '_>,
    transfer: &Transfer,
    meter: SystemTitle,
    outcome: Outcome,
    reason: &str,
) -> Result<(), ServiceError> {
    let Some(task) = transfer.campaign else { return Ok(()) };
    match end_task(view, task, meter, outcome, reason) {
        // I5: the campaign's row was refused, which is recorded. The meter's evidence is kept
        // nevertheless.
        Ok(_) | Err(ServiceError::PermissionDenied { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
